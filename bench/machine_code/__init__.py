"""What the kernels compile to, read on a machine without a GPU.

report.py        the command `python -m bench.machine_code`: compiles everything, writes report.md, checks the budgets
compile.py       compiles the kernels for one GPU in some formats and prints a record for each
cases.py         the launches that are compiled
sass.py          reads NVIDIA's machine code: registers, memory accesses, matrix instructions, loops, and their cost
amdgcn.py        reads the assembler text for AMD's GPUs
ttgir.py         looks in Triton's GPU dialect for operands that are overwritten while a product reads them
bounds.py        lower bounds on the time of a launch on an H200
budgets.py       compares the records with budgets.toml
every_kernel.py  launches every kernel once, for compute-sanitizer
"""
