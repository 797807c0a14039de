"""What a robot needs to be driven by an action server: numpy, msgpack and websockets, Python 3.8 and newer."""

from .chunks import ChunkBroker, TemporalEnsemble
from .client import Client
from .link import Asked
from .messages import Plan, ServerError, Welcome
from .safety import ActionLimits, Guard, Watchdog
from .wire import EncodedImage, Limits, WireError, decode_image, pack, unpack

__version__ = "0.1.0"

__all__ = [
    "ActionLimits",
    "Asked",
    "ChunkBroker",
    "Client",
    "EncodedImage",
    "Guard",
    "Limits",
    "Plan",
    "ServerError",
    "TemporalEnsemble",
    "Watchdog",
    "Welcome",
    "WireError",
    "decode_image",
    "pack",
    "unpack",
]
