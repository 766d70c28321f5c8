"""Pictures of digits: drawings of every kind are read correctly, and any other file is refused in one line."""

import io
import struct
import time
import zlib

import pytest
import torch

pytest.importorskip("PIL")
from conftest import run_python
from PIL import Image, ImageDraw, ImageFont, ImageOps

import tritonnet
from tritonnet import cli
from tritonnet.cli import images
from tritonnet.cli.terminal import UserError
from tritonnet.data import MEAN, STD, load_digits

# Side in pixels, and how the 28 pixels were enlarged to it.
SIZES = [(28, "NEAREST"), (56, "NEAREST"), (84, "BICUBIC"), (140, "NEAREST"), (300, "BICUBIC")]
# Each size light on dark and dark on light, alternating one bit and grey; 28 pixels in both.
DRAWINGS = [(*size, dark, one_bit) for size in SIZES for dark in (False, True) for one_bit in (False, True)]
DRAWINGS = [case for i, case in enumerate(DRAWINGS) if case[0] == 28 or case[2] == case[3] ^ (i // 4 % 2)]


def drawing(digit, side, how="NEAREST", dark=False, one_bit=False):
    """A digit of `load_digits` as a drawing, without noise; light on dark, or dark on light."""
    grey = (255 * (digit[0, 2:-2, 2:-2] * STD + MEAN).clamp(0, 1)).round().byte()
    picture = Image.fromarray(grey.numpy()).resize((side, side), Image.Resampling[how])
    if dark:
        picture = picture.point(lambda v: 255 - v)
    return picture.point(lambda v: 255 * (v > 127)).convert("1", dither=0) if one_bit else picture


def read(picture, path):
    picture.save(path)
    return images.read_digit(path)


@pytest.fixture(scope="module")
def net(trained):
    net = tritonnet.LeNet().eval()
    net.load_state_dict(torch.load(trained[0] / "model.pt", weights_only=True))
    return net


@torch.no_grad()
def answers(net, digits):
    with tritonnet.backend("reference"):
        return net(digits).argmax(1)


@pytest.mark.parametrize("side, how, dark, one_bit", DRAWINGS)
@pytest.mark.sampled(2)
def test_drawings_are_read_as_the_digits_are(side, how, dark, one_bit, net, tmp_path):
    """Of 1,000 digits at most 1 % fewer in each case, see the README; of these 40 at most one fewer."""
    _, _, digits, labels = load_digits()
    digits, labels = digits[:40], labels[:40]
    found = torch.cat([read(drawing(d, side, how, dark, one_bit), tmp_path / "digit.png") for d in digits])
    assert (answers(net, found) == labels).sum() >= (answers(net, digits) == labels).sum() - 1


@pytest.mark.parametrize("one_bit", [False, True])
def test_cropped_drawings(one_bit, net, tmp_path):
    """Cropped to the ink, with no margin."""
    _, _, digits, labels = load_digits()
    digits, labels, found = digits[:60], labels[:60], []
    for i, digit in enumerate(digits):
        picture = drawing(digit, (28, 140)[i % 2], "BICUBIC", one_bit=one_bit).convert("L")
        picture = picture.crop(picture.point(lambda v: 255 * (v > 40)).getbbox())
        found.append(read(picture.point(lambda v: 255 - v) if i % 4 < 2 else picture, tmp_path / "digit.png"))
    assert (answers(net, torch.cat(found)) == labels).sum() >= (answers(net, digits) == labels).sum() - 2


def test_a_frame_is_no_paper(net, tmp_path):
    """A border of three pixels in the ink's colour."""
    _, _, digits, labels = load_digits()
    found = []
    for i, digit in enumerate(digits[:20]):
        picture = drawing(digit, (56, 140)[i // 4 % 2], "BICUBIC", i % 4 < 2, i % 2 == 0).convert("L")
        inside = picture.crop((3, 3, picture.width - 3, picture.height - 3))
        found.append(read(ImageOps.expand(inside, 3, 0 if i % 4 < 2 else 255), tmp_path / "digit.png"))
    assert (answers(net, torch.cat(found)) == labels[:20]).sum() >= 17  # some digits touch it


@pytest.mark.parametrize("margin", [1, 20])
def test_a_thick_bar_is_no_paper(margin, net, tmp_path):
    """A 1 that covers most of the picture."""
    picture = ImageOps.expand(Image.new("1", (14, 64), 1), margin, 0)
    assert answers(net, read(picture, tmp_path / "digit.png")) == 1


def printed(size):
    """The digits in type, black on white, in Pillow's built-in font."""
    font = ImageFont.load_default(size)
    for number in range(10):
        picture = Image.new("1", (2 * size, 2 * size), 1)
        ImageDraw.Draw(picture).text((size, size), str(number), 0, font, anchor="mm")
        yield picture


@pytest.mark.parametrize("size", [20, 48])
def test_printed_digits(size, net, tmp_path):
    found = torch.cat([read(picture, tmp_path / "digit.bmp") for picture in printed(size)])
    assert (answers(net, found) == torch.arange(10)).sum() >= 7  # the training set is handwritten


@pytest.mark.parametrize("width", [1, 2, 5, 9])
@pytest.mark.parametrize("suffix, mode", [("gif", "P"), ("bmp", "RGB"), ("ppm", "1"), ("tif", "F"), ("png", "I;16")])
def test_pens_of_any_width_in_any_format(suffix, mode, width, net, tmp_path):
    """A 7 of two lines, in a corner of the picture, as Paint draws it."""
    picture = Image.new("L", (100, 90), 255)
    ImageDraw.Draw(picture).line([(50, 20), (80, 20), (62, 75)], 0, width)
    picture = picture.convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)
    assert answers(net, read(picture, tmp_path / f"digit.{suffix}")).item() == 7


def spiral(side):
    picture = Image.new("1", (side, side))
    points = [(side // 2, side // 2)]
    for i in range(side // 3):
        x, y = points[-1]
        step = 3 * (i // 2 + 1)
        points.append([(x + step, y), (x, y + step), (x - step, y), (x, y - step)][i % 4])
    ImageDraw.Draw(picture).line(points, 1, 1)
    return picture


def pixels_at(*places, size=(28, 28)):
    picture = Image.new("L", size)
    for place in places:
        picture.putpixel(place, 255)
    return picture


def floats(*values):
    """A picture of 32-bit floats: a square, with the given values in its first pixels."""
    picture = Image.new("F", (30, 30), 1.0)
    ImageDraw.Draw(picture).rectangle((10, 5, 14, 25), 0.0)
    for x, value in enumerate(values):
        picture.putpixel((x, 0), value)
    return picture


REFUSED = {
    "one pixel": lambda: Image.new("L", (1, 1), 255),
    "three by three": lambda: Image.effect_noise((3, 3), 90),
    "a line of pixels": lambda: Image.effect_noise((500, 1), 90),
    "black": lambda: Image.new("1", (50, 50), 0),
    "white": lambda: Image.new("RGB", (300, 200), "white"),
    "transparent": lambda: Image.new("RGBA", (50, 50)),
    "a dot": lambda: pixels_at((5, 5)),
    "two dots": lambda: pixels_at((5, 5), (20, 9)),
    "not a number": lambda: floats(float("nan")),
    "infinite": lambda: floats(float("inf"), -float("inf")),
}
READ = {
    "a square in floats": floats,
    "floats beyond float32's sums": lambda: floats(3e38, -3e38),
    "a spiral": lambda: spiral(400),
    "a checkerboard": lambda: Image.linear_gradient("L").resize((90, 90)).point(lambda v: 255 * (v // 16 % 2)),
    "noise": lambda: Image.effect_noise((400, 300), 90),
    "a gradient": lambda: Image.radial_gradient("L"),
    "a strip": lambda: drawing(load_digits()[2][0], 100).resize((3000, 20)),
}


EITHER = "noise", "a gradient", "a strip", "floats beyond float32's sums"


@pytest.mark.parametrize("name", [*REFUSED, *READ])
def test_whatever_is_in_a_picture_is_answered_soon(name, tmp_path):
    picture, path = {**REFUSED, **READ}[name](), tmp_path / "picture.tif"
    start = time.process_time()
    try:
        digit = read(picture, path)
        assert name in READ and digit.shape == (1, 1, 32, 32) and digit.isfinite().all()
    except UserError as e:
        # Whether there is a digit in noise is undecidable.
        assert (name in REFUSED or name in EITHER) and str(path) in str(e)
    assert time.process_time() - start < 5


def png(*chunks):
    """A PNG file of these chunks, (name, content), with correct checksums."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, content in chunks:
        parts += struct.pack(">I", len(content)), name, content, struct.pack(">I", zlib.crc32(name + content))
    return b"".join(parts)


HEAD = b"IHDR", struct.pack(">IIBBBBB", 28, 28, 8, 0, 0, 0, 0)
REST = (b"IDAT", zlib.compress(bytes(28 * 29))), (b"IEND", b"")
LARGE = zlib.compress(bytes(2 << 20))


def tiff(width):
    content = io.BytesIO()
    Image.new("L", (20, 20)).save(content, "tiff")
    return content.getvalue().replace(struct.pack("<HHII", 256, 4, 1, 20), struct.pack("<HHII", 256, 4, 1, width))


def squeezed_tiff():
    """A TIFF whose pixels cannot be unpacked; libtiff reports that on stderr itself."""
    content = io.BytesIO()
    Image.effect_noise((20, 20), 90).save(content, "tiff", compression="tiff_deflate")
    return content.getvalue().replace(b"\x78\x9c", b"\xff\xff")


BROKEN = {
    "text of 2 MB.png": png(HEAD, (b"zTXt", b"name\0\0" + LARGE), *REST),
    "profile of 2 MB.png": png(HEAD, (b"iCCP", b"name\0\0" + LARGE), *REST),
    "head cut off.png": png((b"IHDR", HEAD[1][:5]), *REST),
    "pHYs cut off.png": png(HEAD, (b"pHYs", b"\0"), *REST),
    "tRNS cut off.png": png((b"IHDR", HEAD[1][:9] + b"\x02\0\0\0"), (b"tRNS", b"\0"), *REST),
    "no numbers.pgm": b"P2\n28 x\n255\n",
    "no size.pgm": b"P5\n",
    "negative.ppm": b"P3\n2 2\n255\n1 2 3 -4 5 6 7 8 9 10 11 12",
    "of no size.tif": tiff(0),
    "too wide.tif": tiff(2**31 - 1),
    "not to be unpacked.tif": squeezed_tiff(),
    "text.gif": b"no image",
    "empty.jpg": b"",
}


@pytest.mark.parametrize("error", [MemoryError(), KeyError(7), OSError(5, "broken"), RuntimeError("two\nlines " * 99)])
def test_whatever_pillow_raises_is_one_line(error, monkeypatch):
    def raises(*args, **options):
        raise error

    monkeypatch.setattr(Image, "open", raises)
    with pytest.raises(UserError) as caught:
        images.read_digit("a.png")
    message = str(caught.value)
    assert message.startswith("a.png cannot be read") and message.isprintable() and 30 < len(message) < 300
    assert "()" not in message


def test_our_own_errors_are_not_taken_for_broken_files(monkeypatch, tmp_path):
    def raises(pixels):
        raise ZeroDivisionError

    monkeypatch.setattr(images, "find_ink", raises)
    with pytest.raises(ZeroDivisionError):
        read(drawing(load_digits()[2][0], 28), tmp_path / "digit.png")


def test_one_bad_file_stops_no_folder(trained, tmp_path, capsys):
    """Each bad file gets one line; the good picture is read, and the exit code reports that not all were."""
    for name, content in BROKEN.items():
        (tmp_path / name).write_bytes(content)
    drawing(load_digits()[2][0], 84, one_bit=True).save(tmp_path / "good.png")
    capsys.readouterr()
    with tritonnet.backend("reference"):
        code = cli.main(["predict", str(tmp_path), "--weights", str(trained[0] / "model.pt")])
    output, error = capsys.readouterr()
    assert code == 2 and output.count(str(tmp_path)) == 1 and "good.png" in output
    lines = error.splitlines()
    assert sorted(name for name in BROKEN if any(name in line for line in lines)) == sorted(BROKEN)
    assert len(lines) == len(BROKEN) and all(len(line) < 400 + len(str(tmp_path)) for line in lines)


def test_pillow_says_nothing_beside_our_line(tmp_path):
    """No warnings and no log lines, in a process of its own: capsys gets them later than a terminal does."""
    for name, content in BROKEN.items():
        (tmp_path / name).write_bytes(content)
    torch.save(tritonnet.LeNet().state_dict(), tmp_path / "model.pt")
    arguments = "predict", str(tmp_path), "--weights", str(tmp_path / "model.pt")
    result = run_python("-m", "tritonnet", *arguments, TRITON_INTERPRET=None, OMP_NUM_THREADS="1")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == len(BROKEN), result.stderr
