"""What `python -m bench.tune` measured of the tiles, which it writes here; tiles.py computes what is not here.

By architecture: the card, the date, and microseconds by family, number format and tile.
"""

MEASURED: dict = {}
