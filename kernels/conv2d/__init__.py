"""Convolution: forward, input gradient and weight gradient.

- `forward.py`, `input_grad.py`, `weight_grad.py`: implicit matrix products, one kernel each, for any stride, dilation
  and number of groups. Few channels without dilation have kernels of their own, in `../conv2d_few/`.
- `patches.py`: what convolutions share: precision, `tile_for`, which adapts the tile, and the forwards' loop over K.
- `depthwise.py`: all three for one input channel per group, as plain sums.
- `lines.py`: what those share: the lines of pixels that a thread computes, and where their taps are.
- `padding.py`: the padding modes, and the gradient of copied pixels.
"""
