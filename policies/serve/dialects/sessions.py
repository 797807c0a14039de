"""Sessions of a connection whose client has no word for them."""

import asyncio
from dataclasses import dataclass, field

from ....data import Observation
from ...base import Request
from ..exchange import Reply
from ..line import Line
from ..service import Service


@dataclass
class Sessions:
    """One session for each place in the client's batches, begun when it is first asked.

    Attributes:
        begun: episodes so far; each session gets the next seed.
    """

    line: Line
    service: Service
    names: list[str] = field(default_factory=list)
    begun: int = 0

    async def plan(self, seen: list[Observation]) -> list[Reply]:
        """A plan for each place; the policy may be asked for all in one call.

        Raises:
            Refusal: one of them is refused.
        """
        while len(self.names) < len(seen):
            self.names.append(f"{self.line.name}/{len(self.names)}")
            await self._begin(self.names[-1])
        asked = [self.service.plan(Request(name, each), self.line.deadline) for name, each in zip(self.names, seen, strict=False)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if isinstance(answer, Reply)]

    async def reset(self) -> None:
        """An episode begins in each."""
        for name in self.names:
            await self._begin(name)

    async def close(self) -> None:
        """The client has gone."""
        for name in self.names:
            await self.service.close(name)

    async def _begin(self, name: str) -> None:
        await self.service.reset(name, self.line.seed + self.begun)
        self.begun += 1
