"""A provider that does what the test says, and waits where the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Final, TypeAlias

from streaming_chat.blocks import Op
from streaming_chat.providers.base import Alive, Began, Ended, ProviderEvent, ProviderRequest, Usage, UsageSeen

PATIENCE_SECONDS: Final = 20.0


class Gate:
    """A place where the provider waits until the test opens it."""

    def __init__(self) -> None:
        self._reached = asyncio.Event()
        self._open = asyncio.Event()

    async def reached(self) -> None:
        """Wait until the provider stands here, so everything before was taken."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self._reached.wait()

    def open(self) -> None:
        self._open.set()

    async def pass_(self) -> None:
        self._reached.set()
        await self._open.wait()


Step: TypeAlias = ProviderEvent | Gate | BaseException


class Script:
    """What the provider does: one list of steps per request; the last one is repeated."""

    def __init__(self) -> None:
        self.replies: list[Sequence[Step]] = [answer("Hello")]
        self.requests: list[ProviderRequest] = []
        self.open_streams = 0
        self.closed_providers = 0

    async def play(self, request: ProviderRequest) -> AsyncGenerator[ProviderEvent, None]:
        steps = self.replies[min(len(self.requests), len(self.replies) - 1)]
        self.requests.append(request)
        self.open_streams += 1
        try:
            for step in steps:
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, Gate):
                    await step.pass_()
                else:
                    yield step
        finally:
            self.open_streams -= 1


current: list[Script] = []
"""The running test's script."""


class ScriptedProvider:
    """``STREAMING_CHAT["PROVIDER"]`` of the tests."""

    name = "scripted"

    def stream(self, request: ProviderRequest) -> AsyncGenerator[ProviderEvent, None]:
        return current[-1].play(request)

    async def aclose(self) -> None:
        current[-1].closed_providers += 1


BEGAN: Final = Began(model="scripted-1", request_id="req_1")
ALIVE: Final = Alive()
ENDED: Final = Ended(stop_reason="end_turn")
USAGE: Final = UsageSeen(usage=Usage(input_tokens=11, output_tokens=7, raw={"input_tokens": 11}), final=True)


def start(index: int = 0, kind: str = "text", **fields: object) -> Op:
    return {"op": "start", "index": index, "block": {"type": kind, "text": "", **fields}}


def append(text: str, index: int = 0, field: str = "text") -> Op:
    return {"op": "append", "index": index, "field": field, "text": text}


def answer(*pieces: str) -> list[Step]:
    """A complete answer in these pieces."""
    return [BEGAN, start(), *map(append, pieces), USAGE, ENDED]


def gated_answer(*pieces: str) -> tuple[list[Step], list[Gate]]:
    """An answer that stops before each piece and before its end."""
    gates = [Gate() for _ in range(len(pieces) + 1)]
    steps: list[Step] = [BEGAN, start()]
    for gate, piece in zip(gates, pieces, strict=False):
        steps += [gate, append(piece)]
    return [*steps, gates[-1], USAGE, ENDED], gates
