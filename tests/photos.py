"""Pictures as a phone takes them, made from digits whose answer is known."""

import torch
import torch.nn.functional as TF
from PIL import Image, ImageFilter


def photo(digit, seed, size=(640, 480), light_on_dark=False):
    """An RGB picture of a digit (28, 28), 0 to 1: off centre, in colour, unevenly lit, blurred and noisy."""
    g = torch.Generator().manual_seed(seed)

    def between(low, high):
        return low + (high - low) * torch.rand((), generator=g).item()

    width, height = size
    side = round(between(0.35, 0.7) * min(size))
    large = TF.interpolate(digit[None, None].float(), (side, side), mode="bicubic").clamp(0, 1)[0, 0]
    top, left = round(between(0, height - side)), round(between(0, width - side))
    ink = TF.pad(large, (left, width - side - left, top, height - side - top))
    # Pen and paper of any colour, but of different lightness.
    pale, deep = [torch.tensor([between(*limits) for _ in range(3)]) for limits in ((0.7, 0.95), (0.05, 0.4))]
    paper, pen = (deep, pale) if light_on_dark else (pale, deep)
    picture = paper[:, None, None] + (pen - paper)[:, None, None] * ink
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    light = 0.8 + between(-0.2, 0.2) * x + between(-0.2, 0.2) * y - between(0, 0.15) * (x * x + y * y)
    picture = picture * light + 0.03 * torch.randn(picture.shape, generator=g)
    pixels = (255 * picture.clamp(0, 1)).byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.numpy()).filter(ImageFilter.GaussianBlur(between(0, 1.5)))
