"""Compiles kernels on a machine without a GPU and packs them for one that has it.

archive.py    the command `python -m bench.warm`: packs Triton's cache, unpacks it, and checks an archive
work.py       what will be launched, part by part, and the processes that compile it
tests.py      a pytest plugin that compiles what the tests would launch
launchers.py  builds the C libraries that Triton loads when it launches a kernel
"""
