"""Convolution, rectifier and max-pooling in one kernel."""
