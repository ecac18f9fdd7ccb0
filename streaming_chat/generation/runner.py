"""The process's tasks: who claims, runs, stops, drains and recovers turns.

Only this module and the hub create tasks. Each has a name, a strong reference and an end.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import uuid
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError

from ..conf import get_settings
from ..database import in_database
from ..journal import get_journal
from ..loops import PerLoop, end_tasks
from ..models import Turn
from ..providers import get_provider
from . import lease
from .engine import FINISH_SECONDS, Generation, announce_end
from .lease import Outcome

T = TypeVar("T")

CLAIM_SECONDS: Final = 2.0
"""A turn that waits longer than this is claimed by any process with a free place."""
RETENTION_SECONDS: Final = 60.0
RETIRE_PAUSE_SECONDS: Final = 0.05
"""Between two batches, so that a long clean-up leaves the database to those who stream."""
SETTLED_SECONDS: Final = 10.0

logger = logging.getLogger(__name__)


class Runner:
    """One per event loop. Starts with the first turn, or with the server where it says that it starts."""

    def __init__(self) -> None:
        self.draining = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._running: dict[uuid.UUID, Generation] = {}
        self._finishing: dict[uuid.UUID, asyncio.Task[None]] = {}
        self._claiming = 0

    @property
    def running(self) -> int:
        """How many turns this process runs."""
        return len(self._running)

    def start(self) -> None:
        """Begin to claim waiting turns and to recover lost ones. Further calls do nothing."""
        if not self._loops and not self.draining:
            self._loops = [
                self._own(get_journal().run(), name="journal"),
                self._own(self._claim_waiting(), name="claim waiting turns"),
                self._own(self._sweep(), name="recover turns"),
                self._own(self._retire(), name="retire old turns"),
            ]

    def nudge(self, turn_id: uuid.UUID) -> None:
        """Claim a turn that was just queued, if there is a free place. Returns at once."""
        self.start()
        if not self.draining and self._free() > 0:
            self._claiming += 1
            self._own(self._claim_and_run(turn_id), name=f"turn {turn_id}")

    async def settled(self, turn_id: uuid.UUID) -> None:
        """Wait until nothing is left to do for a turn that is over: its signal was sent, its place is free."""
        finish = self._finishing.get(turn_id)
        if finish is not None:
            await asyncio.wait([finish], timeout=SETTLED_SECONDS)

    async def drain(self) -> None:
        """Refuse new turns, let the running ones end, and interrupt those that take longer than ``DRAIN_SECONDS``.

        Afterwards the runner is stopped for good.
        """
        self.draining = True
        for loop_task in self._loops[1:]:
            loop_task.cancel()
        turns = [task for task in self._tasks if task not in self._loops]
        if turns:
            await asyncio.wait(turns, timeout=get_settings().drain_seconds)
        for generation in list(self._running.values()):
            generation.interrupt(Outcome(status=Turn.Status.INTERRUPTED, error_code="shutdown"))
        turns = [task for task in self._tasks if task not in self._loops]
        if turns:
            await asyncio.wait(turns, timeout=5.0)
        await self.close()

    async def close(self) -> None:
        """Cancel every task and wait for it. Running turns are left to recovery; see :meth:`drain`."""
        self.draining = True
        await end_tasks(self._tasks)

    # ---------------------------------------------------------------- inside

    def _own(self, work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        # An empty context: inside a request's, every task would get a database thread of its own.
        task = asyncio.get_running_loop().create_task(work, name=name, context=contextvars.Context())
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)
        return task

    def _free(self) -> int:
        return get_settings().max_running_turns - len(self._running) - self._claiming

    async def _claim_and_run(self, turn_id: uuid.UUID) -> None:
        try:
            provider = get_provider()
            claim = await in_database(lease.claim, turn_id, uuid.uuid4(), get_settings().lease_seconds)
        except (DatabaseError, ImproperlyConfigured) as error:
            logger.warning("turn %s could not be claimed: %s", turn_id, type(error).__name__)
            return
        finally:
            self._claiming -= 1
        if claim is None:
            return
        generation = Generation(claim, get_journal(), provider, get_settings())
        self._running[turn_id] = generation
        try:
            await generation.run()
        finally:
            # The end is a task of its own and only awaited here, so no cancel reaches it.
            finish = self._own(generation.finish(), name=f"finish {turn_id}")
            self._finishing[turn_id] = finish
            finish.add_done_callback(lambda _: self._forget(turn_id))
            await asyncio.shield(finish)

    def _forget(self, turn_id: uuid.UUID) -> None:
        del self._running[turn_id], self._finishing[turn_id]

    async def _claim_waiting(self) -> None:
        age_seconds = 0.0  # at the start whatever waits: a process before this one may have left it
        while True:
            if self._free() > 0:
                try:
                    waiting = await in_database(lease.waiting_turns, self._free(), age_seconds=age_seconds)
                except DatabaseError as error:
                    logger.warning("the queue can't be read: %s", type(error).__name__)
                else:
                    age_seconds = CLAIM_SECONDS
                    for turn_id in waiting:
                        self.nudge(turn_id)
            await asyncio.sleep(CLAIM_SECONDS)

    async def _sweep(self) -> None:
        while True:
            try:
                await self.recover()
            except Exception as error:  # noqa: BLE001 - one turn that can't be settled must not keep all others waiting
                logger.error("recovery failed: %s", type(error).__name__)
            await asyncio.sleep(get_settings().sweep_seconds * random.uniform(0.8, 1.2))  # noqa: S311

    async def recover(self) -> int:
        """Settle every turn whose owner is gone or that waited too long; how many ended. Others are queued again."""
        ended, requeued = await in_database(lease.settle_expired)
        ended += await in_database(lease.settle_overdue, get_settings().queue_timeout_seconds)
        for turn in ended:
            logger.warning("turn %s: settled as %s (%s)", turn.pk, turn.status, turn.error_code)
            await announce_end(turn)
        for turn_id in requeued:
            self.nudge(turn_id)
        return len(ended)

    async def _retire(self) -> None:
        while True:
            await asyncio.sleep(RETENTION_SECONDS * random.uniform(0.8, 1.2))  # noqa: S311
            try:
                await self.retire()
            except DatabaseError as error:
                logger.warning("old turns can't be retired: %s", type(error).__name__)

    async def retire(self) -> None:
        """Account for the requests that nobody will report, and delete the entries of turns that ended long ago."""
        settings = get_settings()
        longest_turn_seconds = settings.turn_timeout_seconds + settings.lease_seconds + FINISH_SECONDS
        ages_seconds = {lease.settle_requests: longest_turn_seconds, lease.sweep_entries: settings.journal_keep_seconds}
        for retire_batch, age_seconds in ages_seconds.items():
            retired = 1
            while retired:
                retired = await in_database(retire_batch, age_seconds)
                await asyncio.sleep(RETIRE_PAUSE_SECONDS)


get_runner: Final = PerLoop(Runner)
"""The running event loop's runner."""
