"""Convolution: forward, input gradient and weight gradient.

- `forward.py`, `input_grad.py`, `weight_grad.py`: implicit matrix products, one kernel each, for any stride, dilation
  and number of groups. Few channels without dilation have kernels of their own, in `../conv2d_few/`, and large 1x1
  convolutions of stride 1 are products of matrices, in `../product.py`.
- `patches.py`: what these share: precision, how K is walked, and the loops over K of forward and input gradient.
- `shared_taps.py`: the sums of the weight gradient for several taps at once.
- `depthwise.py`: all three for one input channel per group, as plain sums.
- `lines.py`: what those share: the lines of pixels that a thread computes, and where their taps are.
- `padding.py`: the padding modes, and the gradient of copied pixels.
"""
