"""For your own tests: a fake Anthropic API over real HTTP, and pytest fixtures that point a site at it.

    from streaming_chat.testing import FakeAnthropic, Reply

    async with FakeAnthropic() as server:
        server.enqueue(Reply.text("Hello, world", chunks=3))
        ...  # whatever talks to server.base_url
        assert server.requests[0].outcome == "completed"

Pytest: ``pytest_plugins = ["streaming_chat.testing.fixtures"]``. All of it: ``docs/howto/testing.md``.
"""

from __future__ import annotations

from .errors import ApiError
from .gate import Gate
from .ledger import Ledger, RequestRecord
from .script import Reply
from .server import FakeAnthropic
from .steps import Block, Cut, Delay, End, Event, Fail, Pings, Raw, Stall

__all__ = [
    "ApiError",
    "Block",
    "Cut",
    "Delay",
    "End",
    "Event",
    "Fail",
    "FakeAnthropic",
    "Gate",
    "Ledger",
    "Pings",
    "Raw",
    "Reply",
    "RequestRecord",
    "Stall",
]
