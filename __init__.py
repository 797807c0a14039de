"""Triune: vision-language-action policies on one Mixture-of-Transformers backbone.

The folders are the library: ``triune.vla`` (networks), ``triune.data`` (the words all share, datasets),
``triune.envs`` (simulators), ``triune.policies`` (networks turned into behaviour, training) and ``triune.eval``
(closed-loop evaluation). Importing ``triune`` itself loads none of them.
"""

from .errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "__version__"]
