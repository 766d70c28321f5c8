"""Convolutions of fewer than 16 input channels, or 16 output channels in the input gradient, without dilation.

- `cut.py`: the blocks of pixels that share a patch of the image, and what of a patch is read at once.
- `convolve.py`: forward and input gradient, and which of the next two computes them.
- `product.py`: as a product of patches and filters, one launch that places the filters and one that multiplies.
- `lanes.py`: for full float32, by FMA in registers.
- `weight_grad.py`: the weight and bias gradients, a product of blocks and patches that is folded to the filters.
"""
