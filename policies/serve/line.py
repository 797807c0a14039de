"""One connection as a dialect sees it, and what it may cost."""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from triune_client import outofband
from triune_client.wire import Limits, WireError, pack, unpack

from .exchange import Refusal
from .keys import Keys
from .security import Rate, Token


class Connection(ABC):
    """What carries frames: a ``websocket.Bounded``, or a ``zmtp.Peer``."""

    @abstractmethod
    def __aiter__(self) -> AsyncIterator[Any]:
        """Frames as they come, until the other side closes."""

    @abstractmethod
    async def send(self, message: Any) -> None:
        """Send a frame; ends when the other side may be sent the next."""

    async def listen(self, hear: Callable[[Any], Awaitable[None] | None]) -> None:
        """Give ``hear`` each frame until the other side closes; further frames wait while what it gave back is not done."""
        async for frame in self:
            later = hear(frame)
            if later is not None:
                await later

    def send_now(self, message: bytes) -> bool:
        """Send in this turn of the event loop, unless the other side does not read as fast; whether it was sent."""
        return False


def word(value: object) -> str:
    """A client's word as a sentence may repeat it; of anything but text only what it is."""
    return value[:40] if isinstance(value, str) else f"({type(value).__name__})"


@dataclass
class Line:
    """Frames in and out.

    Attributes:
        name: of the connection, unique while the server runs; names of sessions begin with it.
        seed: of the first session that it begins without one.
        token: for protocols that have it in their messages.
        keys: names that clients of other protocols have for cameras, state and instruction.
        in_flight: requests that it may have under way.
        deadline: seconds for requests that bring none.
        timed: is told what a stage of a message took, in milliseconds.
    """

    connection: Connection
    name: str
    address: str
    seed: int
    limits: Limits
    rate: Rate
    token: Token
    keys: Keys
    in_flight: int = 16
    deadline: float | None = None
    timed: Callable[[str, float], None] = lambda stage, ms: None
    decoded: float = 0.0

    def frames(self) -> AsyncIterator[Any]:
        """Frames as they come, until the other side closes: text, or bytes of some kind."""
        return aiter(self.connection)

    async def listen(self, hear: Callable[[Any], Awaitable[None] | None]) -> None:
        """As ``Connection.listen``."""
        await self.connection.listen(hear)

    def decode(
        self, frame: bytes | memoryview | str, also: Callable[[dict[Any, Any]], object] | None = None, out_of_band: bool = False
    ) -> Any:
        """The message in a frame; ``decoded`` is how many milliseconds that took.

        Args:
            also: another codec's words, see ``triune_client.wire.unpack``.
            out_of_band: its arrays stand behind it.

        Raises:
            Refusal: too many requests, text, or no message within the limits.
        """
        if not self.rate.allows(self.address):
            raise Refusal("busy", f"more than {self.rate.per_second:g} requests per second come from this address; ask less often")
        if isinstance(frame, str):
            raise Refusal("bad_request", "this server takes binary frames of msgpack, and a text frame came")
        began = time.perf_counter()
        try:
            message = outofband.unpack(frame, self.limits) if out_of_band else unpack(frame, self.limits, also)
        except WireError as error:
            raise Refusal("bad_request", str(error)) from None
        self.decoded = 1e3 * (time.perf_counter() - began)
        self.timed("decode", self.decoded)
        return message

    async def send(self, message: Any, out_of_band: bool = False) -> None:
        """Send one message, with its arrays in it or behind it."""
        later = self.say(message, out_of_band)
        if later is not None:
            await later

    def say(self, message: Any, out_of_band: bool = False) -> Awaitable[None] | None:
        """The same in this turn of the event loop, where the connection can; else gives what is to be awaited."""
        began = time.perf_counter()
        frame = b"".join(outofband.pack_parts(message)) if out_of_band else pack(message)
        spent = 1e3 * (time.perf_counter() - began)
        later = None if self.connection.send_now(frame) else self.connection.send(frame)
        self.timed("encode", spent)
        return later
