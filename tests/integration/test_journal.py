"""The journal: first the commit, then the publish, and nothing else but that."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import orjson
import pytest
from channels.layers import get_channel_layer
from django.contrib.auth.models import User
from django.db import OperationalError, connection, connections, transaction
from django.db.models.functions import Now
from pytest_django import Settings

from streaming_chat import journal
from streaming_chat.blocks import Op
from streaming_chat.database import in_database, in_journal_thread
from streaming_chat.generation import lease
from streaming_chat.generation.coalescer import Coalescer
from streaming_chat.journal import Journal, frame_of, group_name, layer_message
from streaming_chat.models import JournalEntry, Turn
from streaming_chat.protocol import Frame
from tests.integration.conftest import Chat
from tests.integration.test_lease import claimed, expire, fresh, queued
from tests.layers import FaultyChannelLayer
from tests.providers import append, start
from tests.screen import eventually

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.backends]

Told = list[str]


class Written:
    """A turn of this process, its way into the journal, and what its owner was told."""

    def __init__(self, journal: Journal, turn: Turn, claim: lease.Claim) -> None:
        self.turn = turn
        self.claim = claim
        self.told: Told = []
        self.source = Coalescer()
        self.writer = journal.open(
            claim.lease,
            self.source,
            on_stop=lambda: self.told.append("stop"),
            on_fenced=lambda: self.told.append("fenced"),
            on_stalled=lambda: self.told.append("stalled"),
        )

    def write(self, *ops: Op, text: bool = True) -> None:
        for op in ops:
            self.source.push(op)
        self.writer.notify(text=text)

    async def entries(self) -> list[tuple[int, list[Op]]]:
        rows = JournalEntry.objects.filter(turn=self.turn).order_by("seq").values_list("seq", "ops")
        return [(seq, orjson.loads(ops)) for seq, ops in await in_database(lambda: list(rows))]

    async def text(self) -> str:
        return "".join(op["text"] for _, ops in await self.entries() for op in ops if op["op"] == "append")


class CountingJournal(Journal):
    """Counts its rounds."""

    rounds = 0

    async def _flush(self) -> None:
        self.rounds += 1
        await super()._flush()


class Desk:
    """A journal of its own that runs, and every frame it publishes."""

    def __init__(self, user: User) -> None:
        self.user = user
        self.journal = CountingJournal()
        self.frames: list[tuple[str, Frame]] = []
        self.journal.subscribe(lambda key, frame: self.frames.append((key, frame)))
        self.failing: Callable[[str, Any], bool] = lambda sql, params: False
        self.failures = 0

    async def open(self) -> Written:
        turn = await in_database(queued, self.user)
        return Written(self.journal, turn, await in_database(claimed, turn))

    def seqs(self, written: Written) -> list[int]:
        return [frame.seq for _, frame in self.frames if frame.turn == str(written.turn.pk)]

    async def published(self, count: int, of: Written | None = None) -> None:
        """Wait until ``count`` frames were published (None: of all turns)."""
        await eventually(lambda: len(self.frames if of is None else self.seqs(of)) >= count)

    def fail(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if self.failing(sql, params):
            self.failures += 1
            raise OperationalError("the database is away")
        return execute(sql, params, many, context)


@pytest.fixture
async def desk(chat: Chat) -> AsyncIterator[Desk]:
    desk = Desk(chat.user)
    await in_journal_thread(lambda: connection.execute_wrappers.append(desk.fail))
    task = asyncio.create_task(desk.journal.run())
    yield desk
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def inserts(sql: str, params: Any) -> bool:
    return "INSERT" in sql and "journalentry" in sql


# ------------------------------------------------------------------------------------------------ order


async def test_what_is_published_is_already_committed(desk: Desk) -> None:
    written = await desk.open()
    missing: list[int] = []

    def stored(frame: Frame) -> bool:
        try:
            return JournalEntry.objects.filter(turn_id=frame.turn, seq=frame.seq).exists()
        finally:
            connections["default"].close()

    with ThreadPoolExecutor(1) as pool:
        desk.journal.subscribe(
            lambda key, frame: None if pool.submit(stored, frame).result() else missing.append(frame.seq)
        )
        for number in range(10):
            written.write(append(str(number)))
            await desk.published(number + 1)
    assert missing == []
    assert desk.seqs(written) == list(range(1, 11))


async def test_each_entry_is_published_once_in_order_and_as_it_is_stored(desk: Desk) -> None:
    written = await desk.open()
    written.writer.activity = "writing"
    written.write(start(), append("Hel"))
    await eventually(lambda: len(desk.frames) == 1)
    written.write(append("l"))
    written.write(append("o"))
    assert await written.writer.flush()
    assert await written.entries() == [(1, [start(), append("Hel")]), (2, [append("lo")])]
    assert written.writer.seq == 2
    assert [frame.seq for _, frame in desk.frames] == [1, 2]
    key, frame = desk.frames[1]
    assert key == str(written.turn.conversation_id)
    assert (frame.kind, frame.turn, frame.first, frame.seq, frame.activity) == (
        "delta",
        str(written.turn.pk),
        2,
        2,
        "writing",
    )
    assert orjson.loads(frame.json)["ops"] == [append("lo")]


async def test_the_first_text_does_not_wait_for_the_tick_but_the_next_does(
    desk: Desk, fast: Callable[..., None]
) -> None:
    fast(TICK_SECONDS=60.0)
    early, late = await desk.open(), await desk.open()
    late.write(start(), text=False)
    early.write(start(), append("one"))
    await eventually(lambda: desk.seqs(early) == [1])  # from here on the tick is a minute
    assert desk.seqs(late) == [1], "it was taken along"
    assert (await in_database(fresh, early.turn)).first_text_at is not None
    assert (await in_database(fresh, late.turn)).first_text_at is None
    early.write(append("two"))
    rounds = desk.journal.rounds
    late.write(append("first"))
    await eventually(lambda: desk.seqs(late) == [1, 2])
    assert desk.seqs(early) == [1, 2], "it was taken along"
    assert desk.journal.rounds == rounds + 1
    assert (await in_database(fresh, late.turn)).first_text_at is not None
    late.write(append("second"))
    assert await early.writer.flush()  # it lacks nothing, so nothing is committed for it
    assert desk.journal.rounds == rounds + 1
    assert await late.text() == "first"
    assert await late.writer.flush()
    assert await late.text() == "firstsecond"


async def test_all_turns_of_a_tick_are_one_transaction(desk: Desk, fast: Callable[..., None]) -> None:
    statements: list[str] = []
    several = [await desk.open() for _ in range(5)]
    desk.failing = lambda sql, params: bool(statements.append(sql))  # type: ignore[func-returns-value]
    for written in several:
        written.write(start(), append("Hello"), text=False)
    await eventually(lambda: len(desk.frames) == 5)
    assert sum("INSERT" in sql for sql in statements) == 1
    assert [await written.text() for written in several] == ["Hello"] * 5


# ------------------------------------------------------------------------------------------------ the fence


async def test_a_fenced_writer_writes_and_publishes_nothing_and_tells_its_owner_once(desk: Desk) -> None:
    written, other = await desk.open(), await desk.open()
    written.write(start(), append("Hel"))
    await eventually(lambda: desk.seqs(written) == [1])
    await in_database(lambda: lease.open_request(written.claim.lease, uuid.uuid4(), provider="scripted", model="m"))
    await in_database(expire, written.turn)
    await in_database(lease.settle_expired)
    written.write(append("lo"))
    other.write(start(), append("fine"))
    assert await written.writer.flush() is False
    assert await other.writer.flush() is True
    written.write(append("!"))
    assert await written.writer.flush() is False
    assert written.told == ["fenced"]
    assert written.writer.fenced
    assert desk.seqs(written) == [1]
    assert await written.text() == "Hel"
    assert desk.seqs(other) == [1]


async def test_a_silent_turn_keeps_its_lease(desk: Desk) -> None:
    written = await desk.open()
    await in_database(Turn.objects.filter(pk=written.turn.pk).update, lease_expires_at=Now() + timedelta(seconds=1))

    async def is_renewed() -> bool:
        row = await in_database(Turn.objects.timed().get, pk=written.turn.pk)
        return bool(row.lease_expires_at and row.lease_expires_at - row.now > timedelta(seconds=10))

    await eventually(is_renewed)
    assert written.told == []
    assert desk.frames == []


async def test_a_turn_that_was_closed_is_not_renewed_any_more(desk: Desk) -> None:
    written, other = await desk.open(), await desk.open()
    written.writer.close()
    before = (await in_database(fresh, written.turn)).lease_expires_at
    other.write(append("Hello"))
    assert await other.writer.flush()
    desk.journal.wake()
    other.write(append("!"))
    assert await other.writer.flush()
    assert (await in_database(fresh, written.turn)).lease_expires_at == before


# ------------------------------------------------------------------------------------------------ stop


@pytest.mark.parametrize("wake", [False, True])
async def test_a_stop_is_heard_once_even_in_silence(desk: Desk, *, wake: bool) -> None:
    written, other = await desk.open(), await desk.open()
    await in_database(lease.request_stop, written.turn.pk)
    if wake:
        desk.journal.wake()
    await eventually(lambda: written.told == ["stop"])
    written.write(append("last words"))
    assert await written.writer.flush()
    assert written.told == ["stop"]
    assert other.told == []
    assert await written.text() == "last words"


# ------------------------------------------------------------------------------------------------ a bad database


async def test_what_could_not_be_committed_is_committed_later_and_only_then_published(desk: Desk) -> None:
    written = await desk.open()
    written.write(start(), append("Hel"))
    await eventually(lambda: desk.seqs(written) == [1])
    desk.failing = inserts
    written.write(append("lo"))
    await eventually(lambda: desk.failures >= 2)
    written.write(append(" world"))
    assert desk.seqs(written) == [1]
    assert await written.text() == "Hel"
    desk.failing = lambda sql, params: False
    assert await written.writer.flush()
    assert await written.text() == "Hello world"
    seqs = desk.seqs(written)
    assert seqs == list(range(1, len(seqs) + 1)) == [seq for seq, _ in await written.entries()]
    assert written.told == []


async def test_one_turn_that_can_not_be_written_does_not_hold_up_the_others(desk: Desk) -> None:
    bad, good = await desk.open(), await desk.open()
    ids = {str(bad.turn.pk), bad.turn.pk.hex, bad.turn.pk}
    desk.failing = lambda sql, params: inserts(sql, params) and any(param in ids for param in params or ())
    for number in range(5):
        bad.write(append("x"))
        good.write(append(str(number)))
        await desk.published(number + 1, of=good)
    assert await good.text() == "01234"
    assert desk.seqs(bad) == []
    desk.failing = lambda sql, params: False
    assert await bad.writer.flush()
    assert await bad.text() == "xxxxx"
    assert bad.told == good.told == []


@pytest.mark.skipif(connection.vendor != "postgresql", reason="SQLite has no locks on rows")
async def test_a_row_that_somebody_else_holds_does_not_hold_up_the_others(desk: Desk) -> None:
    locked, good = await desk.open(), await desk.open()
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        try:
            with transaction.atomic():
                list(Turn.objects.select_for_update().filter(pk=locked.turn.pk))
                held.set()
                let_go.wait(20)
        finally:
            connections["default"].close()

    holder = asyncio.create_task(asyncio.to_thread(hold))
    await asyncio.to_thread(held.wait, 10)
    for number in range(3):
        locked.write(append("x"))
        good.write(append(str(number)))
        await desk.published(number + 1, of=good)
    assert desk.seqs(locked) == []
    let_go.set()
    await holder
    assert await locked.writer.flush()
    assert await locked.text() == "xxx"


async def test_a_database_that_stays_away_is_told_to_the_owner_once(desk: Desk, fast: Callable[..., None]) -> None:
    fast(STORAGE_STALL_SECONDS=0.2)
    written = await desk.open()
    desk.failing = inserts
    written.write(append("Hello"))
    await eventually(lambda: "stalled" in written.told)
    failures = desk.failures
    await eventually(lambda: desk.failures > failures)
    assert written.told == ["stalled"]
    assert desk.frames == []
    desk.failing = lambda sql, params: False
    assert await written.writer.flush()
    assert await written.text() == "Hello"


async def test_whoever_flushes_while_the_database_is_away_does_not_spin(desk: Desk) -> None:
    written = await desk.open()
    desk.failing = inserts
    written.write(append("Hello"))
    await eventually(lambda: desk.failures)
    flush = asyncio.create_task(written.writer.flush())
    failures, rounds = desk.failures, desk.journal.rounds
    await eventually(lambda: desk.failures > failures)  # until it was tried once more
    desk.failing = lambda sql, params: False
    assert await flush
    # One per tick of 5 ms in a back-off of half a second, not as many as the processor can.
    assert desk.journal.rounds - rounds < 300


async def test_a_flush_that_is_cancelled_loses_nothing(desk: Desk) -> None:
    written = await desk.open()
    desk.failing = inserts
    written.write(append("Hello"))
    flush = asyncio.create_task(written.writer.flush())
    await eventually(lambda: desk.failures)
    flush.cancel()
    await asyncio.gather(flush, return_exceptions=True)
    desk.failing = lambda sql, params: False
    await eventually(lambda: desk.seqs(written) == [1])
    assert await written.text() == "Hello"


# ------------------------------------------------------------------------------------------------ a bad layer


async def test_a_layer_that_is_away_is_left_alone_for_a_while_and_stops_nothing(desk: Desk, settings: Settings) -> None:
    layer_settings = settings.CHANNEL_LAYERS["default"]
    settings.CHANNEL_LAYERS = {"default": {**layer_settings, "BACKEND": "tests.layers.FaultyChannelLayer"}}
    layer: Any = get_channel_layer()
    assert isinstance(layer, FaultyChannelLayer)
    layer.fault = lambda message: "raise"
    written = await desk.open()
    for number in range(8):
        written.write(append(str(number)))
        await desk.published(number + 1)
    assert await written.text() == "01234567"
    assert layer.faults == ["raise"] * 3


def test_a_frame_survives_the_channel_layer() -> None:
    frame = Frame("delta", '{"a":"\u2028"}', "t", 3, 5, 0, "writing")
    key = str(uuid.uuid4())
    assert frame_of(layer_message(key, frame)) == (key, frame)
    assert group_name(key) == f"streaming_chat.{key}"


# ------------------------------------------------------------------------------------------------ the transaction


def test_repeating_a_commit_whose_outcome_is_unknown_is_safe(ann: User) -> None:
    turn = queued(ann)
    token = claimed(turn).lease.token

    def commit() -> dict[uuid.UUID, bool]:
        return journal.commit([token], [JournalEntry(turn_id=turn.pk, seq=1, ops='["a"]')], [turn.pk], 15.0)

    assert commit() == {token: False}
    first = fresh(turn).first_text_at
    assert commit() == {token: False}
    assert list(JournalEntry.objects.values_list("seq", "ops")) == [(1, '["a"]')]
    assert fresh(turn).first_text_at == first is not None


def test_a_commit_writes_only_what_is_still_leased(ann: User) -> None:
    mine, lost, over = (queued(ann) for _ in range(3))
    tokens = [claimed(turn).lease.token for turn in (mine, lost, over)]
    Turn.objects.filter(pk=lost.pk).update(lease_token=uuid.uuid4())
    Turn.objects.filter(pk=over.pk).update(
        status="stopped", lease_token=None, lease_expires_at=None, end_seq=0, finished_at=Now()
    )
    entries = [JournalEntry(turn_id=turn.pk, seq=1, ops="[]") for turn in (mine, lost, over)]
    expires_at = fresh(lost).lease_expires_at
    assert journal.commit(tokens, entries, [], 99.0) == {tokens[0]: False}
    assert list(JournalEntry.objects.values_list("turn_id", flat=True)) == [mine.pk]
    assert fresh(lost).lease_expires_at == expires_at


def test_the_entries_after_a_number_are_read_as_one_list(ann: User) -> None:
    turn, other = queued(ann), queued(ann)
    for seq, ops in ((1, '["a"]'), (2, '["b","c"]'), (3, '["d"]')):
        JournalEntry.objects.create(turn=turn, seq=seq, ops=ops)
    assert journal.read_ops(turn.pk) == (3, '["a","b","c","d"]')
    assert journal.read_ops(str(turn.pk), after=1) == (3, '["b","c","d"]')
    assert journal.read_ops(turn.pk, after=3) == (3, "[]")
    assert journal.read_ops(turn.pk, after=7) == (7, "[]")
    assert journal.read_ops(other.pk) == (0, "[]")
    assert journal.last_seqs([turn.pk, other.pk, uuid.uuid4()]) == {turn.pk: 3}
    assert journal.last_seqs([]) == {}
