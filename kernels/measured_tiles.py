"""What `python -m bench.tune` measured of the tiles, which it writes here; tiles.py computes what is not here.

By architecture: the card, the date, and by family, number format and tile (microseconds of a step, fixed microseconds),
or None for a tile that failed or gave wrong results.
"""

MEASURED: dict = {}
