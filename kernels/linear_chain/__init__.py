"""Linear layers with relu between them.

- `fused.py`: two to four layers, each at most 128 wide, in one launch, forward and both gradients.
- `layered.py`: any chain, one layer after the other, in terms of the single operators.
"""
