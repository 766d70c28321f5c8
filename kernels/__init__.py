"""The Triton kernels and the plain functions that launch them; `shapes` alone can be imported without Triton."""
