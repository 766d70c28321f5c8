"""Convolution, relu and max-pooling fused: the result of the convolution is never written to memory.

- `chooser.py`: which of these kernels serves given arguments.
- `general.py`: the forward for any geometry.
- `patch.py`, `lanes.py`: the forward for few input channels, on matrix units and in full float32.
- `blocks.py`: blocks of pooled pixels, which these two share.
- `input_grad.py`, `weight_grad.py`: the gradients for few input channels; `one_hot.py` is what they share. For others
  the pooled gradient is scattered, and the gradients are those of `conv2d/`.
"""
