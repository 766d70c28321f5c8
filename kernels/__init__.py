"""The Triton kernels and the plain functions that launch them.

Each operator has a file or a folder, and `lenet/` is a whole network. `_common.py` and `reduce.py` are what they share,
`launchers.py` collects the launchers under
the operators' names, `launching.py` launches, `tiles.py` chooses tiles, and `shapes.py` knows the size and the layout
of every result. `shapes.py`, `linear_chain/layered.py` and `cross_entropy/targets.py` do not need Triton.
"""
