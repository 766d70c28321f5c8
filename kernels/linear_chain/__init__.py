"""Linears with rectifiers between them."""
