"""Measures the tiles of kernels/tiles.py on a card and writes the two numbers of each into kernels/measured_tiles.py:

    python -m bench.tune

`problems.py` has the shapes, `card.py` compiles and times, `take.py` decides what is measured next, and `fit.py` finds
the numbers, compares choices with the best tiles, and writes.
"""
