"""Where blocking database work runs, so that it never blocks the event loop or queues behind other people's.

The journal has a thread and a connection of its own: everything that streams in this process passes through it, and a
slow query elsewhere must not delay it. All other work shares a few more threads. The framework's own executor is not
used, because it is one thread for the whole process.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

from django.db import DEFAULT_DB_ALIAS, DatabaseError, InterfaceError, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

P = ParamSpec("P")
T = TypeVar("T")

WORK_THREADS: Final = 4
WORK_ATTEMPTS: Final = 6
"""With the pauses between them, about three seconds: SQLite without its options refuses at once what it could queue."""

logger = logging.getLogger(__name__)


class _Threads:
    """An executor whose threads keep their connection open, as the application's own would not outlive a request."""

    def __init__(self, size: int, name: str, *, attempts: int, lock_timeout_ms: int) -> None:
        self._size, self._name = size, name
        self._attempts, self._lock_timeout_ms = attempts, lock_timeout_ms
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._connections: dict[int, BaseDatabaseWrapper] = {}

    def submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self._size, thread_name_prefix=self._name)
            executor = self._executor
        return asyncio.get_running_loop().run_in_executor(executor, self._call, work)

    def _call(self, work: Callable[[], T]) -> T:
        connection = connections[DEFAULT_DB_ALIAS]
        self._connections[threading.get_ident()] = connection
        for attempt in range(1, self._attempts + 1):
            try:
                if connection.connection is None:
                    _set_lock_timeout(connection, self._lock_timeout_ms)
                return work()
            except (OperationalError, InterfaceError) as error:
                # A connection that the server has closed stays broken until it is closed here, too.
                _give_back(connection)
                if attempt == self._attempts:
                    raise OperationalError(*error.args) from error
                logger.warning("database work failed (%s), attempt %s", type(error).__name__, attempt)
                time.sleep(random.uniform(0.5, 1.0) * 0.05 * 2**attempt)  # noqa: S311
        raise AssertionError("unreachable")

    def close(self) -> None:
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=True)
        for connection in self._connections.values():
            connection.inc_thread_sharing()
            _give_back(connection)
        self._connections.clear()


_journal = _Threads(1, "streaming_chat-journal", attempts=1, lock_timeout_ms=500)
_work = _Threads(WORK_THREADS, "streaming_chat-database", attempts=WORK_ATTEMPTS, lock_timeout_ms=3_000)


def _set_lock_timeout(connection: BaseDatabaseWrapper, milliseconds: int | None) -> None:
    """Bound the wait for a row that somebody else holds, where the database can; None for its own setting."""
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("RESET lock_timeout" if milliseconds is None else f"SET lock_timeout = {milliseconds}")


def _give_back(connection: BaseDatabaseWrapper) -> None:
    """Close the connection; one that goes back to a pool, without our setting."""
    try:
        if connection.connection is not None and connection.is_usable():
            _set_lock_timeout(connection, None)
    except (DatabaseError, InterfaceError):
        pass
    finally:
        connection.close()


async def in_journal_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``work`` on the journal's thread, once; the journal knows itself what a failure means.

    Cancelling does not stop the thread: the transaction may still commit.
    """
    return await _journal.submit(lambda: work(*args, **kwargs))


async def in_database(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``work`` on one of the shared threads and return its result.

    Work that writes opens its own transaction (reading in one would take SQLite's only write lock). It runs again, up
    to :data:`WORK_ATTEMPTS` times, when the database was busy, had a deadlock or closed the connection; so it must be
    safe to repeat, even where the first attempt did commit. Cancelling does not stop the thread: the transaction may
    still commit.

    Raises:
        OperationalError: The database is still not there.
    """
    return await _work.submit(lambda: work(*args, **kwargs))


def close_threads() -> None:
    """End the threads and close their connections. The next work starts new ones."""
    _journal.close()
    _work.close()
