"""LeNet-5 with fused layers."""

from typing import Any

import torch

from .. import nn
from ..data import MEAN, STD
from ..dispatch import launchers
from ..nn import functional as F
from ..nn._plain import is_plain
from .weights import predict

if launchers is not None:
    from ..kernels.lenet.forward import Pixels


class LeNet(nn.Module):
    """LeNet-5 for images (N, channels, size, size), with logits (N, classes).

    Results, gradients and state_dict are those of the LeNet in PyTorch's tutorials, which calls relu and max_pool2d in
    its forward; here they are fused into the layers. On a GPU, an evaluation in float32 or bfloat16 without
    gradients is two launches, the first of which packs the current weights, unless layers have hooks or were replaced.

    Args:
        classes: number of classes. Up to 1024 use the fused launches; more run layer by layer.
        channels: channels of the images. 1 and 3 use the fused launches; others run layer by layer.
        size: height and width of the images in pixels, 32 or 28. For 28 the first convolution pads with 2 pixels of
            zeros, so that all layers have the same shapes as for 32, and the state_dict is the same.
        mean, std: of the training pixels, scaled to 0..1. Images of dtype uint8 are normalised with these, and padded
            with black pixels if they are smaller than `size`.

    Source: LeCun et al. 1998, Gradient-based learning applied to document recognition, with max-pooling and relu.

    Raises:
        ValueError: size is not 28 or 32.
    """

    def __init__(
        self, classes: int = 10, channels: int = 1, size: int = 32, mean: float = MEAN, std: float = STD
    ) -> None:
        super().__init__()
        if size not in (28, 32):
            raise ValueError(f"size must be 28 or 32, got {size!r}")
        self.size, self.mean, self.std = size, mean, std
        self.conv1 = nn.Conv2dReLUMaxPool2d(channels, 6, 5, padding=(32 - size) // 2)
        self.conv2 = nn.Conv2dReLUMaxPool2d(6, 16, 5)
        self.fc1 = nn.LinearReLU(16 * 5 * 5, 120)
        self.fc2 = nn.LinearReLU(120, 84)
        self.fc3 = nn.Linear(84, classes)

    @property
    def layers(self) -> list[torch.nn.Module]:
        """conv1, conv2, fc1, fc2 and fc3."""
        # Module.__getattr__ would take longer than all the other checks of the layers in a call.
        modules: Any = self._modules
        return [modules[name] for name in ("conv1", "conv2", "fc1", "fc2", "fc3")]

    def frame(self, images: torch.Tensor) -> int:
        """Black pixels to add on each side of uint8 images (..., H, W); ValueError if they are not squares that fit."""
        frame, rest = divmod(self.size - images.shape[-1], 2)
        if images.shape[-2] != images.shape[-1] or frame < 0 or rest:
            raise ValueError(
                f"uint8 images must be squares of {self.size} pixels, or of an even number less, got "
                f"{list(images.shape)}"
            )
        return frame

    def pixels(self, images):
        """How the kernels read these images: unchanged, or normalised and padded if they are uint8."""
        if images.dtype != torch.uint8:
            return Pixels()
        return Pixels(self.frame(images), 1 / (255 * self.std), -self.mean / self.std)

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images, normalised and padded to `size` pixels; other images unchanged."""
        if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
            return images
        framed, dtype = nn.functional.pad(images, (self.frame(images),) * 4), self.conv1.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        return ((framed.to(wide) / 255 - self.mean) / self.std).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self._whole(x)
        if logits is not None:
            return logits
        x = self.conv2(self.conv1(self.normalised(x))).flatten(1)
        head = self.fc1, self.fc2, self.fc3
        plain = all(is_plain(fc, (cls,)) for fc, cls in zip(head, (nn.LinearReLU, nn.LinearReLU, nn.Linear)))
        # torch.fx is to find the layers that there are.
        if plain and not isinstance(x, torch.fx.Proxy):
            return F.linear_chain(x, [fc.weight for fc in head], [fc.bias for fc in head])
        return self.fc3(self.fc2(self.fc1(x)))  # module calls, which run hooks

    def _whole(self, x):
        if self.training or torch.is_grad_enabled():
            return None
        return predict(self, self.layers, x, self.pixels)
