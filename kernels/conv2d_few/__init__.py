"""Convolutions of few channels."""
