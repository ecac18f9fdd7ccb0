"""One instance per event loop, made on first use.

Servers differ in whether they announce their start (Daphne does not), tests and commands make loops of their own, and
asyncio's primitives belong to one loop: so journal, hub, runner and provider start lazily, one per loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


class PerLoop(Generic[T]):
    """Call it to get the running loop's instance, which ``factory`` makes on the first call."""

    def __init__(self, factory: Callable[[], T]) -> None:
        self._factory = factory
        self._instances: WeakKeyDictionary[asyncio.AbstractEventLoop, T] = WeakKeyDictionary()

    def __call__(self) -> T:
        loop = asyncio.get_running_loop()
        try:
            return self._instances[loop]
        except KeyError:
            instance = self._instances[loop] = self._factory()
            return instance

    def existing(self) -> T | None:
        """The running loop's instance, if it was made already."""
        return self._instances.get(asyncio.get_running_loop())

    def forget(self) -> T | None:
        """Drop and return the running loop's instance; the next call makes a new one."""
        return self._instances.pop(asyncio.get_running_loop(), None)
