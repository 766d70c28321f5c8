"""Average pooling over windows and over bins, and the gradients, each of which is the other's transpose.

    avg_pool2d:          y[n, c, oh, ow]  = (sum over ih, iw in window (oh, ow) of x[n, c, ih, iw]) / divisor(oh, ow)
    avg_pool2d_grad:     dx[n, c, ih, iw] = sum over windows (oh, ow) with pixel (ih, iw) of dy[n, c, oh, ow] / divisor
    adaptive_avg_pool2d: the same over bins, the rows floor(oh * H / OH) to ceil((oh + 1) * H / OH) and columns likewise

A window is the rows oh * SH - PH to oh * SH - PH + KH, as far as they are in the image, and columns likewise. Its
divisor is the number of its pixels in the image, with `count_include_pad` in the padded image, or `divisor_override`.
In ceil_mode a window may reach past the padding; what lies there counts in no case. Each bin or window has a pixel.

The gradient adds dy and divides in a fixed order, without atomics. Sums are in float32, or float64 of float64.
`kernels/strips.py` says which elements a program computes.

- `forward.py`: the means of windows.
- `gradient.py`: for small windows in blocks of SH x SW pixels, and otherwise pixel by pixel.
- `bins.py`: bins of sizes that differ, and their gradient.
- `whole.py`: the mean of a whole image, and its gradient.
"""
