"""Admission: how much one user may open and send. Counted per process; the database guards what must be exact."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Final

from .exceptions import RateLimitedError


class Slots:
    """Places that each key may hold at the same time."""

    def __init__(self) -> None:
        self._held: Counter[Hashable] = Counter()

    def held(self, key: Hashable) -> int:
        """How many places ``key`` holds."""
        return self._held[key]

    @contextmanager
    def hold(self, key: Hashable, limit: int) -> Iterator[Callable[[], None]]:
        """Hold a place of ``key`` inside the ``with``, or until the function that it gives is called.

        Raises:
            RateLimitedError: All ``limit`` are taken.
        """
        if self._held[key] >= limit:
            raise RateLimitedError
        self._held[key] += 1
        holding = True

        def release() -> None:
            nonlocal holding
            if holding:
                holding = False
                self._held[key] -= 1
                if not self._held[key]:
                    del self._held[key]

        try:
            yield release
        finally:
            release()


class Rate:
    """A token bucket: ``per_minute`` at once, refilled evenly. Sans-I/O: the caller passes the time in."""

    def __init__(self, per_minute: int, *, now: float) -> None:
        self._per_minute = per_minute
        self._left = float(per_minute)
        self._at = now

    def take(self, *, now: float | None = None) -> None:
        """Take one.

        Raises:
            RateLimitedError: None is left; it says when there is one again.
        """
        now = time.monotonic() if now is None else now
        self._left = min(self._per_minute, self._left + (now - self._at) * self._per_minute / 60)
        self._at = now
        if self._left < 1:
            raise RateLimitedError(retry_after_seconds=round((1 - self._left) * 60 / self._per_minute, 1))
        self._left -= 1


sockets: Final = Slots()
"""Open WebSockets by user id."""
event_streams: Final = Slots()
"""Open Server-Sent Events streams by user id."""
