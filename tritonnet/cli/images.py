"""Turns a picture of one digit, a drawing, a scan or a photo, into an image like those that LeNet was trained on."""

import contextlib
import logging
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from ..data import normalize
from .terminal import UserError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Longest side in pixels that a picture is reduced to: enough for a digit that fills a tenth of it.
SIDE = 400
# The least share of variance that one threshold explains in a drawing; photos also vary by light and noise.
CLEAR = 0.8
# Levels of grey in histograms.
LEVELS = 256

# Otherwise Pillow's log messages about a broken file would be printed beside our own line.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def read_digit(path: Path) -> torch.Tensor:
    """The digit in an image file, (1, 1, 32, 32), normalised as by `load_digits`.

    As in MNIST, it is ink on an empty background, its bounding box scaled to fit 20 x 20 with the aspect ratio kept,
    and placed in 28 x 28 by its centre of mass.

    Raises:
        UserError: the file is not an image, or there is no digit in it.
    """
    pixels = grey(load(path))
    if not pixels.isfinite().all():
        raise UserError(f"{path} cannot be read as an image (not all of its pixels are finite numbers)")
    ink = find_ink(pixels)
    if ink is None:
        raise UserError(f"{path} has no digit in it: one digit, darker or lighter than what is around it, is needed")
    return normalize(centre(ink)[None, None])


def load(path: Path) -> Image.Image:
    """The image in a file, upright, with sides of up to SIDE pixels, in mode F, L, RGB or RGBA.

    Raises:
        UserError: Pillow cannot read it.
    """
    # A broken file may make Pillow raise anything, from struct.error to MemoryError, so everything is caught here: this
    # block may contain only calls of Pillow.
    try:
        with silence():
            return _load(path)
    except Exception as e:
        why = (isinstance(e, OSError) and e.strerror) or str(e) or type(e).__name__
    why = textwrap.shorten("".join(c if c.isprintable() else " " for c in why), 200, placeholder=" ...")
    raise UserError(f"{path} cannot be read as an image ({why})")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No warnings, and nothing on stderr, where libtiff prints errors in addition to what Pillow raises."""
    with warnings.catch_warnings(), contextlib.ExitStack() as at_exit:
        warnings.simplefilter("ignore")
        if sys.stderr is not None:  # if it is None, descriptor 2 is not stderr
            before = os.dup(2)
            at_exit.callback(os.close, before)
            at_exit.callback(os.dup2, before, 2)
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 2)
        yield


def _load(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        if image.mode[0] in "IF":  # 16 bits and more, which convert("RGB") would cut off
            mode = "F"
        elif image.has_transparency_data:
            mode = "RGBA"
        else:
            mode = "L" if image.mode in ("1", "L") else "RGB"
        picture = image if image.mode == mode else image.convert(mode)
        picture.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
        return ImageOps.exif_transpose(picture)


def grey(image: Image.Image) -> torch.Tensor:
    """(H, W) in float32: the colours, projected onto the direction in which they vary most."""
    size = image.height, image.width, -1
    if image.mode == "F":
        numbers = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32).view(*size[:2]).double()
        lowest = numbers.min()
        return ((numbers - lowest) / (numbers.max() - lowest).clamp(min=1e-300)).float()
    colours = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size).float() / 255
    if image.mode == "L":
        return colours[..., 0]
    if image.mode == "RGBA":
        colours, alpha = colours[..., :3], colours[..., 3:]
        # Put a dark drawing on white and a light one on black.
        dark = (colours * alpha).sum() < 0.5 * 3 * alpha.sum()
        colours = colours * alpha + dark * (1 - alpha)
    colours = colours.double().view(-1, 3)
    colours -= colours.mean(0)
    direction = torch.linalg.eigh(colours.T @ colours)[1][:, -1]
    return (colours @ direction).float().view(size[:2])


def find_ink(pixels: torch.Tensor) -> torch.Tensor | None:
    """The digit's bounding box, (h, w) from 0 background to 1 ink, or None if there is no digit."""
    # Smooth away dust and noise, which are smaller than strokes.
    radius = round(min(pixels.shape) / 200)
    smooth = F.avg_pool2d(pixels[None, None], 2 * radius + 1, 1, radius, count_include_pad=False)[0, 0]
    if min(smooth.shape) < 4 or smooth.max() - smooth.min() < 1e-3:
        return None
    level, clear = otsu(smooth.flatten())
    if clear >= CLEAR:
        return find_on_plain_paper(smooth, level)
    return find_on_lit_paper(smooth)


def find_on_plain_paper(pixels: torch.Tensor, level: torch.Tensor) -> torch.Tensor | None:
    """`find_ink` for a drawing: paper of one colour and ink of another, separated by `level`."""
    light = pixels > level
    paper = light == (rim(light).float().mean() > 0.5)
    # A frame also covers the whole rim, but then most of the picture is other paper, with ink but little at its rim.
    framed = ~paper[box(~paper)]
    if paper.float().mean() < 0.5 and rim(paper).all() and rim(framed).float().mean() > 0.9 and not framed.all():
        paper = ~paper
    sign = -1 if light[paper].all() else 1
    above = sign * (pixels - most_frequent(pixels[paper]))
    return cut_out(above, above[~paper])


def find_on_lit_paper(pixels: torch.Tensor) -> torch.Tensor | None:
    """`find_ink` for a photo: most of the picture is paper, in any light."""
    above = pixels - background(pixels)
    # Ink is rare and differs clearly, darker or lighter than the paper.
    if above.pow(3).sum() < 0:
        above = -above
    spread = (above - above.median()).abs().median() / 0.6745  # standard deviation of the paper, if it is normal
    return cut_out(above, above[above > max(4 * spread.item(), 1e-3)])


def cut_out(above: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor | None:
    """The digit's bounding box in pixels (H, W) that are 0 on paper and larger in ink; None if it is a speck.

    `candidates` are the values of the pixels that may be ink.
    """
    if len(candidates) < 4:
        return None
    level = otsu(candidates)[0]
    # If all ink has one value, no threshold separates it, and its edge is half way to the paper.
    level = torch.minimum(level, candidates[candidates >= level].median() / 2)
    ink = above > level
    mask = main_parts(ink)
    if max(mask.any(0).sum(), mask.any(1).sum()) < max(4, min(above.shape) / 25):
        return None
    full = above[mask].quantile(0.5)
    # The edge is soft: part of the ink is in the pixels next to those above the level.
    edge = F.max_pool2d(mask[None, None].float(), 3, 1, 1)[0, 0].bool() & ~ink
    low = level / 5
    ink = ((above - low) / (full - low)).clamp(0, 1) * (mask | edge)
    return ink[box(ink)]


def rim(pixels: torch.Tensor) -> torch.Tensor:
    """The outermost pixels of a picture (H, W)."""
    return torch.cat([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def box(mask: torch.Tensor) -> tuple[slice, slice]:
    """The bounding box of the mask, as slices of rows and columns."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def background(pixels: torch.Tensor) -> torch.Tensor:
    """The light on the paper: a surface of second degree fitted to pixels without ink, starting from the rim."""
    height, width = pixels.shape
    y, x = torch.linspace(-1, 1, height)[:, None].expand_as(pixels), torch.linspace(-1, 1, width).expand_as(pixels)
    surface = torch.stack([torch.ones_like(x), x, y, x * y, x * x, y * y], -1)
    step = math.ceil(max(height, width) / 100)  # a sample of pixels is enough
    terms, sample = surface[::step, ::step].double(), pixels[::step, ::step].double()
    paper = torch.maximum(x.abs(), y.abs())[::step, ::step] > 0.8
    for _ in range(6):
        # The small diagonal is for a rim that does not determine all terms.
        square = terms[paper].T @ terms[paper] + 1e-6 * torch.eye(6).double()
        fit = torch.linalg.solve(square, terms[paper].T @ sample[paper])
        off = (sample - terms @ fit).abs()
        paper = off <= 3 * off[paper].median() / 0.6745 + 1e-4
    return surface @ fit.float()


def most_frequent(values: torch.Tensor) -> torch.Tensor:
    """The most frequent value, to a resolution of LEVELS steps over their range."""
    lowest = values.min()
    scale = ((values.max() - lowest) / (LEVELS - 1)).clamp(min=1e-12)
    return lowest + scale * ((values - lowest) / scale).round().mode().values


def otsu(values: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The threshold that separates the values best into two groups, and the share of their variance that it explains.

    Source: Otsu 1979, A threshold selection method from gray-level histograms.
    """
    lowest, highest = values.min(), values.max()
    scale = ((highest - lowest) / (LEVELS - 1)).clamp(min=1e-12)
    counts = ((values - lowest) / scale).round().long().bincount(minlength=LEVELS).double()
    weighted = counts * torch.arange(LEVELS).double()
    below, low = counts.cumsum(0)[:-1], weighted.cumsum(0)[:-1]
    above, high = len(values) - below, weighted.sum() - low
    between = (below * above * (low / below - high / above.clamp(min=1)) ** 2) / len(values) ** 2
    best = int(between.argmax())
    mean = weighted.sum() / len(values)
    variance = (counts * (torch.arange(LEVELS) - mean) ** 2).sum() / len(values)
    return lowest + (best + 0.5) * scale, (between[best] / variance.clamp(min=1e-12)).item()


def main_parts(mask: torch.Tensor) -> torch.Tensor:
    """The parts of the mask that form the digit: no specks, and if possible none that touches the edge."""
    cell = math.ceil(max(mask.shape) / 100)
    coarse = F.max_pool2d(mask[None, None].float(), cell, ceil_mode=True)[0, 0].bool()
    labels = parts(coarse).repeat_interleave(cell, 0).repeat_interleave(cell, 1)[: len(mask), : mask.shape[1]] * mask
    numbers, sizes = labels[mask].unique(return_counts=True)
    inside = ~torch.isin(numbers, rim(labels))
    # If only a scrap does not touch the edge, the digit is among the parts that do.
    if inside.any() and sizes[inside].max() > sizes.max() / 20:
        numbers, sizes = numbers[inside], sizes[inside]
    return torch.isin(labels, numbers[sizes > sizes.max() / 12])


def parts(mask: torch.Tensor) -> torch.Tensor:
    """A label for each pixel of the mask, equal within a connected part, and 0 elsewhere."""
    labels = torch.arange(1, mask.numel() + 1).view_as(mask) * mask
    while True:
        # Each pixel takes the largest label around it, then the label that the pixel with this number has taken. So the
        # distance that labels travel doubles in each round, and a long spiral also takes few rounds.
        spread = F.max_pool2d(labels[None, None].float(), 3, 1, 1)[0, 0].long() * mask
        spread = torch.cat([spread.new_zeros(1), spread.flatten()])[spread]
        if torch.equal(spread, labels):
            return labels
        labels = spread


def centre(ink: torch.Tensor) -> torch.Tensor:
    """The ink as in MNIST, (28, 28): its longer side is 20 pixels, its centre of mass in the middle."""
    ink = thicken(ink)[None, None]
    scale = 20 / max(ink.shape)
    size = [max(1, round(side * scale)) for side in ink.shape[2:]]
    small = F.interpolate(ink, size, mode="bilinear", antialias=True, align_corners=False)[0, 0].clamp(0, 1)
    small /= small.max()
    offsets = []
    for axis, side in enumerate(small.shape):
        middle = (small.sum(1 - axis) * torch.arange(side)).sum() / small.sum()
        # In MNIST the middle of the 28 pixels is pixel 14.
        offsets.append(min(max(0, round(14 - middle.item())), 28 - side))
    (top, left), (height, width) = offsets, small.shape
    return F.pad(small, (left, 28 - width - left, top, 28 - height - top))


def thicken(ink: torch.Tensor) -> torch.Tensor:
    """Thickens thin strokes to MNIST's average: 2 of the 20 pixels that the digit will have."""
    # Enlarge a small picture, so that its strokes are several pixels wide.
    larger = math.ceil(100 / max(ink.shape))
    ink = F.interpolate(ink[None, None], scale_factor=larger, mode="bilinear")
    inner = -F.max_pool2d(-F.pad(ink, (1, 1, 1, 1)), 3, 1)
    width = 2 * ink.sum() / (ink - inner).sum()  # area divided by half of the outline
    grow = max(0, round((2 * max(ink.shape) / 20 - width.item()) / 2))
    ink = F.pad(ink, (grow, grow, grow, grow))
    size = 2 * grow + 1
    return F.max_pool2d(F.max_pool2d(ink, (size, 1), 1, (grow, 0)), (1, size), 1, (0, grow))[0, 0]
