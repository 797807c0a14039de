"""A policy on a network: ``vla serve``."""

from .config import Serve
from .process import Source
from .server import Server
from .service import Service

__all__ = ["Serve", "Server", "Service", "Source"]
