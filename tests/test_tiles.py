"""Which tile is chosen for a product, and how programs share a sum, on every architecture and by measured numbers."""

import itertools
import math

import pytest
import torch

from tritonnet.kernels import tiles
from tritonnet.kernels._common import cdiv

# Those of CARDS, and others that are computed as the nearest of them.
ARCHITECTURES = sorted({*tiles.CARDS, 7, 12})
# dtype, precision: by row of the tables.
FORMATS = {
    "half": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "ieee": (torch.float32, "ieee"),
    "fp64": (torch.float64, "ieee"),
}
GRADIENTS = "gradient", "flat gradient", "chain gradient", "products"
# M, N and K: from one element to the pixels of a batch.
SIZES = [
    (1, 1, 1), (64, 20, 147), (20, 64, 4099), (64, 576, 200_704), (256, 64, 3136), (1000, 2048, 64), (4096, 4096, 4096),
    (200_704, 64, 64), (64, 3, 1), (512, 512, 12_544),
]  # fmt: skip


@pytest.fixture(params=ARCHITECTURES, ids=lambda major: f"sm_{major}0" if major else "AMD")
def card(request, monkeypatch):
    """A GPU of each architecture, for which choices are made without it."""
    as_compiled(monkeypatch, request.param)
    return request.param


def as_compiled(monkeypatch, major):
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "compute_capability", lambda: major)
    monkeypatch.setattr(tiles, "MEASURED", {})


def rows(family):
    """The number formats of a family on the current card: products by descriptors have two, from sm_90 on."""
    return [row for row in FORMATS if family != "products" or row in tiles.PRODUCTS]


def test_no_row_is_missing(card):
    for family in tiles.FAMILIES:
        for row in rows(family):
            found = tiles.candidates(family, row)
            assert found and len(set(found)) == len(found)
            assert all(max(t.M, t.N) <= 512 and t.K >= 16 and t.num_warps in (2, 4, 8) for t in found)
            # Only a weight gradient's programs compute several taps; one of a single tap has to be among them.
            assert all(t.taps == 1 or family == "gradient" and t.taps in (2, 3, tiles.ALL_TAPS) for t in found)
            assert any(t.taps == 1 for t in found)
            assert all(number > 0 for t in found for number in tiles.numbers(family, row, t))


def test_each_choice_is_a_candidate_and_the_same_again(card):
    for family in tiles.FAMILIES:
        for row, size, (taps, repeats) in itertools.product(rows(family), SIZES, ((1, 1), (9, 2))):
            tile = tiles.gemm_tile(family, *size, *FORMATS[row], taps=taps, repeats=repeats)
            assert tile in tiles.candidates(family, row)
            assert tile == tiles.gemm_tile(family, *size, *FORMATS[row], taps=taps, repeats=repeats)


def gradients():
    """Arguments of gradient_tile: sizes, and filters of which a program may compute all taps, three, or one."""
    for size, (taps, most, whole), narrow in itertools.product(
        SIZES, ((1, 1, False), (9, 3, True), (9, 1, False)), (64, math.inf)
    ):
        padded = size[2] + size[2] // 8 + 2 if whole else None
        yield size, dict(taps=taps, most_taps=most, padded=padded, narrow=narrow)


@pytest.mark.parametrize("interpreted", [False, True])
def test_no_share_of_a_gradient_is_empty(card, interpreted, monkeypatch):
    """The kernels tell the compiler that a program's loop is never empty; all shares but the last are whole blocks."""
    monkeypatch.setattr(tiles, "INTERPRETED", interpreted)
    for family in GRADIENTS:
        for row, (size, options), repeats in itertools.product(rows(family), gradients(), (1, 4)):
            (M, N, K), taps, padded = size, options["taps"], options["padded"]
            tile, count, splits, per_split = found = tiles.gradient_tile(
                family, *size, *FORMATS[row], repeats=repeats, **options
            )
            assert tile.taps <= options["most_taps"] or padded and tile.taps == taps
            length = padded if tile.taps > options["most_taps"] else K
            assert per_split % tile.K == 0
            assert (splits - 1) * per_split < length <= splits * per_split, (family, row, size, options)
            assert count == cdiv(M, tile.M) * cdiv(N, tile.N) * cdiv(taps, tile.taps) * repeats
            if not interpreted:
                known = tiles.candidates(family, row)
                assert tile in known and tile.N <= max(options["narrow"], min(t.N for t in known))
            assert found == tiles.gradient_tile(family, *size, *FORMATS[row], repeats=repeats, **options)


def test_no_sum_is_split_where_memory_is_the_bound(card, monkeypatch):
    """Of 70 groups, whose operands take longer to read than the products; with faster memories programs share a sum."""
    asked = "gradient", 64, 64, 16384, *FORMATS["half"]
    assert tiles.gradient_tile(*asked, repeats=70)[2] == 1
    for name in ("MEMORY", "L2_BYTES"):
        monkeypatch.setattr(tiles, name, 1e6 * getattr(tiles, name))
    assert tiles.gradient_tile(*asked, repeats=70)[2] > 1


def test_a_gradient_of_no_columns_has_a_tile(card):
    """A layer without features still has a bias."""
    _, count, splits, per_split = tiles.gradient_tile("gradient", 64, 0, 1000, *FORMATS["half"])
    assert count >= 1 and (splits - 1) * per_split < 1000 <= splits * per_split


def test_only_forces_and_restores(card):
    size, forced = (1000, 1000, 1000), tiles.Tile(16, 16, 16, 4, 2)
    asked = "matrices", *size, *FORMATS["half"]
    before = tiles.gemm_tile(*asked)
    with pytest.raises(KeyError), tiles.only("matrices", forced):
        assert tiles.gemm_tile(*asked) == forced
        assert tiles.gemm_tile("patches", *asked[1:]) in tiles.candidates("patches", "half")
        raise KeyError
    assert tiles.gemm_tile(*asked) == before != forced


def test_only_forces_the_tile_of_a_gradient_that_has_its_taps(card):
    asked = "gradient", 1000, 1000, 1000, *FORMATS["half"]
    three = tiles.Tile(32, 32, 32, 4, 2, 3)
    before = tiles.gradient_tile(*asked)
    with tiles.only("gradient", three):
        assert tiles.gradient_tile(*asked) == before
        assert tiles.gradient_tile(*asked, taps=9, most_taps=3)[0] == three
        assert tiles.gradient_tile(*asked, taps=9, most_taps=3, narrow=16)[0] == three
    with tiles.only("gradient", three._replace(taps=9)):
        assert tiles.gradient_tile(*asked, taps=9, most_taps=3)[0].taps <= 3
        assert tiles.gradient_tile(*asked, taps=9, most_taps=3, padded=1100)[0].taps == 9


def measured(family, row, numbers):
    """What bench.tune writes, of an H100's kind."""
    return {"sm_90": {"families": {family: {row: {tuple(t): pair for t, pair in numbers.items()}}}}}


def test_measured_numbers_decide(monkeypatch):
    as_compiled(monkeypatch, 9)
    asked = "products", 8192, 8192, 8192, *FORMATS["half"]
    computed, found = tiles.gemm_tile(*asked), tiles.candidates("products", "half")
    other = next(t for t in found if t != computed)
    numbers = {t: (1.0, 10.0) for t in found} | {other: (1e-3, 0.1)}
    monkeypatch.setattr(tiles, "MEASURED", measured("products", "half", numbers))
    assert tiles.numbers("products", "half", other) == (1e-3, 0.1)
    assert tiles.gemm_tile(*asked) == other != computed
    # What was not measured where others were is not chosen, because it failed or computed numbers would favour it.
    monkeypatch.setattr(tiles, "MEASURED", measured("products", "half", {other: (1e3, 1e4)}))
    assert tiles.candidates("products", "half") == (other,) and tiles.gemm_tile(*asked) == other
    monkeypatch.setattr(tiles, "MEASURED", measured("products", "half", {other: None}))
    assert set(tiles.candidates("products", "half")) == {*found} - {other}


def test_measured_numbers_are_of_one_family_format_and_card(monkeypatch):
    def choices():
        found = []
        for major, family, row in ((9, "patches", "half"), (9, "products", "tf32"), (10, "products", "half")):
            as_compiled(monkeypatch, major)
            found.append(tiles.gemm_tile(family, 8192, 8192, 8192, *FORMATS[row]))
        return found

    before = choices()
    # All tiles of the other tables would be slow with these.
    every = {t: (1e3, 1e4) for family in ("patches", "products") for t in tiles.SPECIAL[9]["patches"]["half"]}
    monkeypatch.setattr(tiles, "MEASURED", measured("products", "half", every))
    assert choices() == before


def test_a_split_follows_measured_numbers(monkeypatch):
    """Slow steps are worth more programs for one sum, and slow starts fewer."""
    as_compiled(monkeypatch, 9)
    asked = "gradient", 64, 64, 65536, *FORMATS["half"]
    splits = []
    for numbers in ((1e-3, 1e3), (1e3, 1e-3)):
        every = dict.fromkeys(tiles.candidates("gradient", "half"), numbers)
        monkeypatch.setattr(tiles, "MEASURED", measured("gradient", "half", every))
        splits.append(tiles.gradient_tile(*asked)[2])
    assert splits[0] == 1 < 100 < splits[1]
