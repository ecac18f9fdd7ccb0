"""One instance per event loop, made on first use.

Servers differ in whether they announce their start (Daphne does not), tests and commands make loops of their own, and
asyncio's primitives belong to one loop: so journal, hub, runner and provider start lazily, one per loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any, Final, Generic, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

CANCEL_SECONDS: Final = 1.0
CANCELS: Final = 10

logger = logging.getLogger(__name__)


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel ``tasks`` and wait for their ends; again if one swallows it, as a library's task may, but not for ever."""
    left = set(tasks)
    for _ in range(CANCELS):
        for task in left:
            task.cancel()
        if left:
            _, left = await asyncio.wait(left, timeout=CANCEL_SECONDS)
    for task in left:
        logger.error("the task %r does not end", task.get_name())


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
