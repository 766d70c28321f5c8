"""Batch normalisation in training.

statistics.py: mean and variance of each channel, and the running statistics.
gradient.py: the gradients, with the activation behind the normalisation.
elements.py: how the elements of a channel are divided among programs and visited, by the kernels of both.

The normalisation itself is kernels/epilogue.py.
"""
