"""Waiting without sleeping: between threads, between event loops, and between a test and the fake server."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_SECONDS = 5.0
"""How long the waits of this package last unless told otherwise."""


class Wakeup:
    """State guarded by a lock, whose changes wake waiters in any thread and in any event loop."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sleepers: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock for the block; then let every waiter look again. May be nested."""
        with self._changed:
            yield
            self._changed.notify_all()
            for loop, event in self._sleepers:
                with suppress(RuntimeError):  # that loop was closed with its waiter still in it
                    loop.call_soon_threadsafe(event.set)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the lock for the block."""
        with self._changed:
            yield

    async def wait(self, check: Callable[[], bool], timeout: float | None) -> None:  # noqa: ASYNC109
        """Return once ``check()``, called under the lock after each change, is true.

        Raises:
            TimeoutError: ``timeout`` seconds passed first; ``None`` waits for ever.

        """
        sleeper = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._sleepers.add(sleeper)
        try:
            async with asyncio.timeout(timeout):
                while True:
                    sleeper[1].clear()
                    with self._changed:
                        if check():
                            return
                    await sleeper[1].wait()
        finally:
            with self._changed:
                self._sleepers.discard(sleeper)

    def wait_sync(self, check: Callable[[], bool], timeout: float | None) -> None:
        """:meth:`wait` for code that has no event loop: blocks the calling thread."""
        with self._changed:
            if not self._changed.wait_for(check, timeout):
                raise TimeoutError


class Gate:
    """A step of a script at which the server stands still until the test lets it pass.

    One gate may stand in many replies. Every method may be called from any thread::

        gate = Gate()
        server.enqueue(Reply.text("Hel", gate, "lo"))
        ...
        await gate.reached()  # "Hel" has left the server, "lo" has not
        gate.open()
    """

    def __init__(self) -> None:
        self._wakeup = Wakeup()
        self._is_open = False
        self._passes = 0
        self._arrivals = 0

    def __repr__(self) -> str:
        return f"<Gate {'open' if self._is_open else 'closed'}, reached {self._arrivals} times>"

    @property
    def arrivals(self) -> int:
        """How often a reply has come to this gate, whether it then had to wait or not."""
        return self._arrivals

    def open(self) -> None:
        """Let everything pass, now and from now on."""
        with self._wakeup.changing():
            self._is_open = True

    def close(self) -> None:
        """Hold what comes from now on."""
        with self._wakeup.changing():
            self._is_open, self._passes = False, 0

    def let_through(self, times: int = 1) -> None:
        """Let the next ``times`` arrivals pass, those that already wait first."""
        with self._wakeup.changing():
            self._passes += times

    async def reached(self, times: int = 1, *, timeout: float = WAIT_SECONDS) -> None:  # noqa: ASYNC109
        """Wait until replies have come here ``times`` times in all.

        Raises:
            TimeoutError: They have not within ``timeout`` seconds.

        """
        await self._wakeup.wait(lambda: self._arrivals >= times, timeout)

    def reached_sync(self, times: int = 1, *, timeout: float = WAIT_SECONDS) -> None:
        """:meth:`reached` for code that has no event loop."""
        self._wakeup.wait_sync(lambda: self._arrivals >= times, timeout)

    async def pass_through(self) -> None:
        """Arrive, and return when let through. The server's side; a cancelled wait uses up no pass."""
        with self._wakeup.changing():
            self._arrivals += 1
        await self._wakeup.wait(self._take_pass, timeout=None)

    def _take_pass(self) -> bool:
        if self._is_open:
            return True
        if self._passes:
            self._passes -= 1
            return True
        return False
