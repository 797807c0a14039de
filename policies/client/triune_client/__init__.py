"""What a robot needs to be driven by an action server: numpy, msgpack and websockets, Python 3.8 and newer."""

from .client import Client
from .link import Asked
from .messages import Plan, ServerError, Welcome
from .wire import EncodedImage, Limits, WireError, decode_image, pack, unpack

__version__ = "0.1.0"

__all__ = ["Asked", "Client", "EncodedImage", "Limits", "Plan", "ServerError", "Welcome", "WireError", "decode_image", "pack", "unpack"]
