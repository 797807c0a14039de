"""Policies that others released, read: one module for each kind of folder, all of which answer with a ``Release``."""

from .base import Release

__all__ = ["Release"]
