"""What the kernels cost: machine code read without a GPU, times measured on one."""

import torch

# The GPUs that every kernel is compiled for: Triton's backend, architecture, lanes of a warp. The slowest to compile
# and the fastest come first, so that the tests take two processes equally long.
TARGETS = {
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
    "sm_80": ("cuda", 80, 32),
    "sm_100": ("cuda", 100, 32),
}
# Number formats: the dtype, and what float32 products are taken in.
FORMATS = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32, "ieee"),
    "float64": (torch.float64, "ieee"),
}
