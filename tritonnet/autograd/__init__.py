"""The derivatives: each family of operators is closed, so that any order and forward mode come out of itself."""

from . import conv2d, cross_entropy, linear, linear_chain, pooling  # noqa: F401  (they register the rules)
