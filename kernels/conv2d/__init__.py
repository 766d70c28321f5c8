"""Convolution: one file for each of its kernels."""
