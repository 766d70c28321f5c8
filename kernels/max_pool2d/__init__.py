"""Max-pooling that stores each maximum's position as a small code, so that the backward needs no atomics.

    y[n, c, oh, ow]    = max over kh, kw of x[n, c, ih, iw],    code[n, c, oh, ow] = kh * KW + kw of that maximum
    scatter: dx[n, c, ih, iw] = sum over windows (oh, ow) whose code points to (ih, iw) of dy[n, c, oh, ow]
    gather:  t[n, c, oh, ow]  = x[n, c, ih, iw] at the pixel that the code points to
    indices: the code as torch's flat index ih * W + iw

with ih = oh * SH - PH + kh * DH and iw = ow * SW - PW + kw * DW.

The maximum follows torch's rules: a NaN wins, the last of several; the first of equal values wins; the code of a window
of -inf is its first pixel inside the image. Scatter and gather are each other's transpose, so each is the other's
gradient. A code of KH * KW points to no pixel, and gathers 0.

`kernels/strips.py` says which elements a program computes.

- `forward.py`: the maxima, with their codes or, where no derivative and no index is asked for, without.
- `scatter.py`: for small windows without dilation in blocks of SH x SW pixels, and otherwise pixel by pixel.
- `gather.py`: gather and indices.
"""
