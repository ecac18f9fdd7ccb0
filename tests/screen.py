"""What a viewer shows: a plain client of the wire contract, that fails where a gap or a doubled entry reaches it."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

import orjson

from streaming_chat.blocks import Block, fold, text_of
from streaming_chat.hub import Sent

PATIENCE_SECONDS = 20.0


class Screen:
    """Folds events, in order and each once; anything else is an assertion error."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.token: str | None = None
        self.revision = -1
        self.messages: dict[str, dict[str, Any]] = {}
        self.turn: dict[str, Any] | None = None
        self.seq = 0
        self.error: AssertionError | None = None

    def copy(self) -> Self:
        return copy.deepcopy(self)

    async def show(self, sent: Sent) -> None:
        """Show what was sent. An error is kept for :meth:`until`, as a task would swallow it."""
        try:
            self._show(sent)
        except AssertionError as error:
            self.error = self.error or error

    def _show(self, sent: Sent) -> None:
        self.kinds.append(sent.kind)
        if sent.token is not None:
            self.token = sent.token
        if not sent.json:
            return
        event = orjson.loads(sent.json)
        self.events.append(event)
        assert event["type"] == sent.kind
        getattr(self, f"_show_{sent.kind}", lambda event: None)(event)

    def _show_snapshot(self, event: dict[str, Any]) -> None:
        self.revision = event["revision"]
        self.messages = {message["id"]: message for message in event["messages"]}
        self.turn = event["turn"]
        self.seq = self.turn["seq"] if self.turn else 0

    def _show_turn(self, event: dict[str, Any]) -> None:
        assert event["revision"] == self.revision + 1, f"{event['revision']} after {self.revision}"
        self.revision += 1
        self.messages |= {message["id"]: message for message in event["messages"]}
        self.turn, self.seq = event["turn"], 0

    def _show_delta(self, event: dict[str, Any]) -> None:
        assert self.turn is not None
        assert event["turn"] == self.turn["id"]
        assert event["first"] == self.seq + 1, f"entry {event['first']} after {self.seq}"
        assert event["seq"] >= event["first"]
        reply = self.messages[self.turn["reply_id"]]
        reply["blocks"] = fold(event["ops"], reply["blocks"])
        self.seq = event["seq"]

    def _show_finished(self, event: dict[str, Any]) -> None:
        assert self.turn is not None
        assert event["revision"] == self.revision + 1, f"{event['revision']} after {self.revision}"
        assert event["turn"]["id"] == self.turn["id"]
        assert event["turn"]["seq"] == self.seq, f"ended at {event['turn']['seq']}, shown {self.seq}"
        self.revision += 1
        self.turn = event["turn"]

    def _show_conversation(self, event: dict[str, Any]) -> None:
        assert event["revision"] == self.revision + 1
        self.revision += 1

    @property
    def status(self) -> str | None:
        return self.turn["status"] if self.turn else None

    @property
    def blocks(self) -> list[Block]:
        """The reply's blocks of the latest turn."""
        assert self.turn is not None
        shown: list[Block] = self.messages[self.turn["reply_id"]]["blocks"]
        return shown

    @property
    def text(self) -> str:
        return text_of(self.blocks) if self.turn else ""

    async def until_text(self, text: str) -> None:
        """Wait until the reply shows exactly ``text``."""
        await self.until(lambda screen: screen.text == text)

    async def until(self, condition: Callable[[Self], object]) -> None:
        """Wait until this shows what ``condition`` asks for."""
        await eventually(lambda: self.error is not None or condition(self))
        if self.error is not None:
            raise self.error


async def eventually(
    condition: Callable[[], object | Awaitable[object]], timeout_seconds: float = PATIENCE_SECONDS
) -> None:
    """Wait until ``condition``, which may be a coroutine function, is true."""
    give_up_at = time.monotonic() + timeout_seconds
    while True:
        result = condition()
        if isinstance(result, Awaitable):
            result = await result
        if result:
            return
        assert time.monotonic() < give_up_at, "it did not happen"
        await asyncio.sleep(0.005)
