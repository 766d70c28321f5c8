"""What the kernels cost: machine code read without a GPU, times measured on one."""
