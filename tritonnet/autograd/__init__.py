"""The derivatives. Each family of operators is closed under them, which gives derivatives of any order."""

from . import conv2d, cross_entropy, linear, linear_chain, pooling  # noqa: F401  (they register the rules)
