"""What the kernels cost: machine code read without a GPU, times measured on one."""

import torch

# The GPUs that every kernel is compiled for: Triton's backend, architecture, threads of a warp. The slowest and the
# fastest to compile come first, so that two test processes take equally long.
TARGETS = {
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
    "sm_80": ("cuda", 80, 32),
    "sm_100": ("cuda", 100, 32),
}
# Number formats: the dtype, and the precision of float32 products.
FORMATS = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32, "ieee"),
    "float64": (torch.float64, "ieee"),
}
