"""Convolution: forward, input gradient and weight gradient.

- `forward.py`, `input_grad.py`, `weight_grad.py`: implicit matrix products, one kernel each, for any stride, dilation
  and number of groups.
- `patches.py`: what the three share: the loop over the patches of an image, and `tile_for`, which adapts the tile.
- `depthwise.py`: all three for one input channel per group, as plain sums.
- `padding.py`: the padding modes, and the gradient of copied pixels.
"""
