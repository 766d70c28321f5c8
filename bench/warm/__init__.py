"""Kernels that are compiled on one machine and run on another: `python -m bench.warm`."""
