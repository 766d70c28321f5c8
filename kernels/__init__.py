"""The Triton kernels and the plain functions that launch them; `shapes` and `layered` alone need no Triton."""
