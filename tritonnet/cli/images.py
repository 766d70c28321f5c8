"""Any picture of one digit, a scan or a photo, as LeNet has seen digits in training."""

import math
from pathlib import Path

import torch
from PIL import Image, ImageOps, ImageStat, UnidentifiedImageError
from torch.nn import functional as F

from ..data import normalize
from .terminal import UserError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Longest side of the picture that is searched, in pixels: enough for a digit that fills a tenth of it.
SIDE = 400


def read_digit(path: Path) -> torch.Tensor:
    """The digit in an image file, (1, 1, 32, 32), in the numbers of `load_digits`.

    As MNIST was made: ink on an empty background, the ink's box scaled to 20 x 20 with its proportions kept, and set
    into 28 x 28 by its centre of mass.

    Raises:
        UserError: the file is no image, or there is nothing in it.
    """
    try:
        with Image.open(path) as image:
            image.load()
            ink = find_ink(grey(ImageOps.exif_transpose(image)))
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, EOFError) as e:
        raise UserError(f"{path} cannot be read as an image ({e})") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read as an image ({e.strerror or e})") from None
    if ink is None:
        raise UserError(f"{path} has no digit in it: one digit, darker or lighter than what is around it, is needed")
    return normalize(centre(ink)[None, None])


def grey(image: Image.Image) -> torch.Tensor:
    """(H, W) in float32: the direction in which the colours differ most, at up to SIDE pixels."""
    if image.mode[0] in "IF":  # 16 bits and more, which convert("RGB") would cut off
        image = image.convert("F")
        image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32).view(image.height, image.width)
        return pixels / pixels.abs().max().clamp(min=1)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        # What can be seen of it stands out against the opposite paper.
        opaque = image.getchannel("A").point(lambda alpha: 255 * (alpha > 127))
        dark = ImageStat.Stat(image.convert("L"), opaque).mean[0] < 128
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white" if dark else "black"), image)
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    colours = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(-1, 3).float() / 255
    colours -= colours.mean(0)
    direction = torch.linalg.eigh(colours.T @ colours)[1][:, -1]
    return (colours @ direction).view(image.height, image.width)


def find_ink(pixels: torch.Tensor) -> torch.Tensor | None:
    """The digit's box, (h, w) from 0 background to 1 ink, or None if there is no digit."""
    if min(pixels.shape) < 4:
        return None
    ink = find_on_paper(pixels)
    return find_in_crop(pixels) if ink is None else ink


def find_on_paper(pixels: torch.Tensor) -> torch.Tensor | None:
    """`find_ink` where most of the picture is paper, in any light."""
    flat = pixels - background(pixels)
    # Ink is rare and stands out, darker or lighter than the paper.
    if flat.pow(3).sum() < 0:
        flat = -flat
    smooth = blur(flat, round(min(pixels.shape) / 200))
    spread = (smooth - smooth.median()).abs().median() / 0.6745  # of the paper: the standard deviation, if it is normal
    candidates = smooth[smooth > max(4 * spread.item(), 1e-3)]
    if len(candidates) < 4:
        return None
    return cut_out(smooth, otsu(candidates)[0])


def find_in_crop(pixels: torch.Tensor) -> torch.Tensor | None:
    """`find_ink` where the digit fills the picture: two levels and little between them."""
    level, clear = otsu(pixels.flatten())
    if clear < 0.85:
        return None
    rim = torch.cat([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    paper = rim.median()
    return cut_out((pixels - paper).abs(), (level - paper).abs())


def cut_out(above: torch.Tensor, level: torch.Tensor) -> torch.Tensor | None:
    """The box of the digit in pixels (H, W) that are 0 on paper and beyond `level` in ink; None if it is a speck."""
    mask = main_parts(above > level)
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    if max(mask[box].shape) < max(4, min(above.shape) / 25):
        return None
    full = above[mask].quantile(0.5)
    return (((above - level / 2) / (full - level / 2)).clamp(0, 1) * mask)[box]


def background(pixels: torch.Tensor) -> torch.Tensor:
    """The light on the paper: the surface of second degree through the pixels without ink, found from the rim in."""
    height, width = pixels.shape
    y, x = torch.linspace(-1, 1, height)[:, None].expand_as(pixels), torch.linspace(-1, 1, width).expand_as(pixels)
    terms = torch.stack([torch.ones_like(x), x, y, x * y, x * x, y * y], -1).double()
    paper = torch.maximum(x.abs(), y.abs()) > 0.8
    for _ in range(6):
        # The tiny diagonal is for a rim that leaves a term open.
        square = terms[paper].T @ terms[paper] + 1e-6 * torch.eye(6).double()
        fit = (terms @ torch.linalg.solve(square, terms[paper].T @ pixels[paper].double())).float()
        off = (pixels - fit).abs()
        paper = off <= 3 * off[paper].median() / 0.6745 + 1e-4
    return fit


def blur(pixels: torch.Tensor, radius: int) -> torch.Tensor:
    """The mean over (2 radius + 1) x (2 radius + 1) pixels."""
    return F.avg_pool2d(pixels[None, None], 2 * radius + 1, 1, radius, count_include_pad=False)[0, 0]


def otsu(values: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The level that parts the values best into two groups, and the share of their variance that this explains.

    Source: Otsu 1979, A threshold selection method from gray-level histograms.
    """
    values = values.sort().values.double()
    below = torch.arange(1, len(values)).double()
    above = len(values) - below
    low = values.cumsum(0)[:-1]
    between = below * above * (low / below - (values.sum() - low) / above) ** 2 / len(values) ** 2
    best = int(between.argmax())
    share = between[best] / values.var(correction=0).clamp(min=1e-12)
    return (values[best : best + 2].mean()).float(), share.item()


def main_parts(mask: torch.Tensor) -> torch.Tensor:
    """The parts of the mask that make the digit: no specks, and nothing that the edge cuts, if that can be avoided."""
    cell = math.ceil(max(mask.shape) / 100)
    coarse = F.max_pool2d(mask[None, None].float(), cell, ceil_mode=True)
    labels = coarse * torch.arange(1, coarse.numel() + 1).view_as(coarse)
    while True:  # every part takes the largest number in it
        spread = F.max_pool2d(labels, 3, 1, 1) * coarse
        if torch.equal(spread, labels):
            break
        labels = spread
    labels = labels[0, 0].repeat_interleave(cell, 0).repeat_interleave(cell, 1)[: len(mask), : mask.shape[1]] * mask
    numbers, sizes = labels[mask].unique(return_counts=True)
    rim = torch.cat([labels[0], labels[-1], labels[:, 0], labels[:, -1]]).unique()
    inside = ~torch.isin(numbers, rim)
    # A scrap is no digit, though it may be all that does not touch the edge.
    if inside.any() and sizes[inside].max() > sizes.max() / 20:
        numbers, sizes = numbers[inside], sizes[inside]
    return torch.isin(labels, numbers[sizes > sizes.max() / 12])


def centre(ink: torch.Tensor) -> torch.Tensor:
    """The ink as MNIST holds it, (28, 28): its longer side 20 pixels, its centre of mass in the middle."""
    ink = thicken(ink)[None, None]
    scale = 20 / max(ink.shape)
    size = [max(1, round(side * scale)) for side in ink.shape[2:]]
    small = F.interpolate(ink, size, mode="bilinear", antialias=True, align_corners=False)[0, 0].clamp(0, 1)
    small /= small.max()
    offsets = []
    for axis, side in enumerate(small.shape):
        middle = (small.sum(1 - axis) * torch.arange(side)).sum() / small.sum()
        offsets.append(min(max(0, round(13.5 - middle.item())), 28 - side))
    (top, left), (height, width) = offsets, small.shape
    return F.pad(small, (left, 28 - width - left, top, 28 - height - top))


def thicken(ink: torch.Tensor) -> torch.Tensor:
    """Strokes of a fine pen as thick as MNIST's finest: 1.7 of the 20 pixels that the digit will have."""
    inner = -F.max_pool2d(-F.pad(ink, (1, 1, 1, 1))[None, None], 3, 1)[0, 0]
    width = 2 * ink.sum() / (ink - inner).sum()  # area by half of the rim
    lacking = 1.7 * max(ink.shape) / 20 - width.item()
    grow = round(lacking / 2)
    if grow < 1:
        return ink
    ink = F.pad(ink, (grow, grow, grow, grow))
    return F.max_pool2d(ink[None, None], 2 * grow + 1, 1, grow)[0, 0]
