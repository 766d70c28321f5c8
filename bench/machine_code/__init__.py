"""What the kernels compile to: compiling for GPUs that need not be there, reading machine code, bounds and budgets."""
