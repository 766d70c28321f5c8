"""The derivatives. Each rule is written in differentiable operators, so that derivatives of any order exist."""

from . import batch_norm, conv2d, cross_entropy, epilogue, linear, linear_chain, pooling, squeeze_excite  # noqa: F401  (they register the rules)
