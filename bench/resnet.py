"""The convolutions of ResNet-50, from the table of its paper.

Source: He et al. 2015, https://arxiv.org/abs/1512.03385, table 1, for images of 224 x 224. The stride of a stage is in
the 3x3 of its first block, as in torchvision ("v1.5"). Convolutions have no bias, and are padded by half their kernel.
"""

from typing import NamedTuple

IMAGE, CHANNELS = 224, 3
STEM, STEM_KERNEL = 64, 7
# The size of the images after the stem's convolution and its max-pooling, each of stride 2.
FIRST = IMAGE // 4
# (blocks, filters of the 3x3) of each stage. The last 1x1 of a block has EXPANSION times as many filters.
STAGES = (3, 64), (4, 128), (6, 256), (3, 512)
EXPANSION = 4


class Layer(NamedTuple):
    """`count` convolutions of (N, C, H, H) images with OC filters of K x K, padded by K // 2."""

    count: int
    N: int
    C: int
    H: int
    OC: int
    K: int
    stride: int

    @property
    def name(self):
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.K}x{self.K}{stride}, {self.C} to {self.OC}, {self.H} x {self.H}"

    @property
    def OH(self):
        """Rows and columns of the result."""
        return (self.H - 1) // self.stride + 1


def layers(batch):
    """The distinct Layers in the order of their first use, each with how often the network has it."""
    used = [(CHANNELS, IMAGE, STEM, STEM_KERNEL, 2)]
    C, H = STEM, FIRST
    for stage, (blocks, width) in enumerate(STAGES):
        for block in range(blocks):
            stride, OC = 2 if stage and not block else 1, EXPANSION * width
            used += [(C, H, width, 1, 1), (width, H, width, 3, stride), (width, H // stride, OC, 1, 1)]
            if not block:  # the shortcut has a convolution where it changes the size
                used.append((C, H, OC, 1, stride))
            C, H = OC, H // stride
    return [Layer(used.count(layer), batch, *layer) for layer in dict.fromkeys(used)]
