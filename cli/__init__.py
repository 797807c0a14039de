"""The command line: one file per verb, thin; it sees every folder and no folder sees it."""

from .main import main

__all__ = ["main"]
