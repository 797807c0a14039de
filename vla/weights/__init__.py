"""Pretrained weights: where they are and whether they are the ones that were meant."""

from .references import Reference, anchor, digest, make_reference, resolve_reference, resolve_weights

__all__ = ["Reference", "anchor", "digest", "make_reference", "resolve_reference", "resolve_weights"]
