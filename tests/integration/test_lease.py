"""The transitions of a turn, and who wins where two happen at once."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import orjson
import pytest
from django.contrib.auth.models import User
from django.db import connection, connections
from django.db.models.functions import Now

from streaming_chat import journal
from streaming_chat.blocks import Op, text_block
from streaming_chat.database import in_database
from streaming_chat.generation import lease
from streaming_chat.generation.lease import Claim, Outcome, Request
from streaming_chat.generation.runner import get_runner
from streaming_chat.models import Conversation, JournalEntry, Message, Turn, UsageRecord
from streaming_chat.providers.base import Usage
from tests.integration.conftest import Chat
from tests.providers import append, start

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.backends]

T = TypeVar("T")
COMPLETED = Outcome(status=Turn.Status.COMPLETED, stop_reason="end_turn")
HELLO = [text_block("Hello")]


@pytest.fixture
def at_once() -> Callable[..., list[Any]]:
    """Runs calls at the same moment, each on a thread and connection of its own; their results in order."""

    def run(*calls: Callable[[], T]) -> list[T]:
        barrier = threading.Barrier(len(calls))

        def one(call: Callable[[], T]) -> T:
            try:
                barrier.wait(10)
                return call()
            finally:
                connections["default"].close()

        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(one, calls))

    return run


@pytest.fixture
def turn(ann: User) -> Turn:
    return queued(ann)


def queued(user: User, **fields: Any) -> Turn:
    conversation = Conversation.objects.create(owner=user)
    prompt = Message.objects.create(
        conversation=conversation, role="user", blocks=[text_block("Good day")], text="Good day"
    )
    reply = Message.objects.create(conversation=conversation, role="assistant", parent=prompt)
    Conversation.objects.filter(pk=conversation.pk).update(leaf=reply)
    return Turn.objects.create(conversation=conversation, prompt=prompt, reply=reply, requested_by=user, **fields)


def claimed(turn: Turn) -> Claim:
    claim = lease.claim(turn.pk, uuid.uuid4(), 15.0)
    assert claim is not None
    return claim


def asked(claim: Claim) -> uuid.UUID:
    record_id = uuid.uuid4()
    assert lease.open_request(claim.lease, record_id, provider="scripted", model="m")
    return record_id


def write(claim: Claim, seq: int, *ops: Op) -> bool:
    """Whether the journal's transaction still holds the lease."""
    entry = JournalEntry(turn_id=claim.lease.turn_id, seq=seq, ops=orjson.dumps(ops).decode())
    return claim.lease.token in journal.commit([claim.lease.token], [entry], [], 15.0)


def expire(turn: Turn) -> None:
    Turn.objects.filter(pk=turn.pk, status="running").update(lease_expires_at=Now() - timedelta(seconds=1))


def finish(claim: Claim, outcome: Outcome = COMPLETED, **fields: Any) -> Turn | None:
    fields = {"blocks": HELLO, "end_seq": 1, "requests": [], **fields}
    return lease.finish(claim.lease, outcome, **fields)


def fresh(turn: Turn) -> Turn:
    return Turn.objects.select_related("reply", "conversation").get(pk=turn.pk)


# ------------------------------------------------------------------------------------------------ claim


def test_a_claim_makes_a_queued_turn_running_under_its_token(turn: Turn) -> None:
    token = uuid.uuid4()
    claim = lease.claim(turn.pk, token, 15.0)
    assert claim is not None
    assert (claim.lease.turn_id, claim.lease.conversation_id, claim.lease.token) == (
        turn.pk,
        turn.conversation_id,
        token,
    )
    assert (claim.prompt_id, claim.timeout_seconds) == (turn.prompt_id, None)
    row = Turn.objects.timed().get(pk=turn.pk)
    assert (row.status, row.lease_token, row.attempt) == ("running", token, 1)
    assert row.lease_expires_at is not None
    assert row.started_at is not None
    assert timedelta(seconds=10) < row.lease_expires_at - row.now <= timedelta(seconds=15)


def test_of_many_claims_at_once_one_wins(turn: Turn, at_once: Callable[..., list[Any]]) -> None:
    claims = at_once(*[lambda: lease.claim(turn.pk, uuid.uuid4(), 15.0)] * 6)
    [winner] = [claim for claim in claims if claim is not None]
    assert (fresh(turn).lease_token, fresh(turn).attempt) == (winner.lease.token, 1)


def test_repeating_a_claim_whose_outcome_is_unknown_finds_it_again(turn: Turn) -> None:
    token = uuid.uuid4()
    assert lease.claim(turn.pk, token, 15.0) == lease.claim(turn.pk, token, 15.0)
    assert fresh(turn).attempt == 1


@pytest.mark.parametrize("status", ["stopped", "completed"])
def test_what_is_over_or_gone_can_not_be_claimed(turn: Turn, status: str) -> None:
    Turn.objects.filter(pk=turn.pk).update(status=status, end_seq=0, finished_at=Now())
    assert lease.claim(turn.pk, uuid.uuid4(), 15.0) is None
    assert lease.claim(uuid.uuid4(), uuid.uuid4(), 15.0) is None
    assert fresh(turn).status == status


def test_the_time_in_the_queue_counts_towards_the_callers_limit(ann: User) -> None:
    turn = queued(ann, timeout_seconds=30.0)
    Turn.objects.filter(pk=turn.pk).update(queued_at=Now() - timedelta(seconds=20))
    timeout_seconds = claimed(turn).timeout_seconds
    assert timeout_seconds is not None
    assert 5 < timeout_seconds <= 10


def test_the_longest_waiting_turns_come_first_and_the_young_ones_not_at_all(ann: User) -> None:
    young, old, older, taken = (queued(ann) for _ in range(4))
    for turn, seconds in ((old, 5), (older, 9), (taken, 20)):
        Turn.objects.filter(pk=turn.pk).update(queued_at=Now() - timedelta(seconds=seconds))
    claimed(taken)
    assert lease.waiting_turns(10, age_seconds=2.0) == [older.pk, old.pk]
    assert lease.waiting_turns(1, age_seconds=2.0) == [older.pk]
    assert lease.waiting_turns(10, age_seconds=0.0)[-1] == young.pk


# ------------------------------------------------------------------------------------------------ stop


def test_a_stop_before_the_claim_wins(turn: Turn) -> None:
    ended = lease.request_stop(turn.pk)
    assert ended is not None
    assert (ended.status, ended.end_seq, ended.conversation.revision) == ("stopped", 0, 1)
    assert lease.claim(turn.pk, uuid.uuid4(), 15.0) is None
    assert (fresh(turn).status, fresh(turn).attempt) == ("stopped", 0)


def test_a_stop_and_a_claim_at_once_end_in_one_of_two_ways(ann: User, at_once: Callable[..., list[Any]]) -> None:
    for _ in range(8):
        turn = queued(ann)
        ended, claim = at_once(
            lambda turn=turn: lease.request_stop(turn.pk), lambda turn=turn: lease.claim(turn.pk, uuid.uuid4(), 15.0)
        )
        row = fresh(turn)
        if ended is not None:
            assert claim is None
            assert (row.status, row.attempt) == ("stopped", 0)
        else:
            assert claim is not None
            assert row.status == "running"
            assert row.stop_requested_at is not None
            assert journal.commit([claim.lease.token], [], [], 15.0) == {claim.lease.token: True}


def test_a_stop_of_a_running_turn_is_a_flag_that_the_next_commit_reads(turn: Turn) -> None:
    claim = claimed(turn)
    assert journal.commit([claim.lease.token], [], [], 15.0) == {claim.lease.token: False}
    assert lease.request_stop(turn.pk) is None
    first = fresh(turn).stop_requested_at
    assert first is not None
    assert lease.request_stop(turn.pk) is None
    assert fresh(turn).stop_requested_at == first
    assert journal.commit([claim.lease.token], [], [], 15.0) == {claim.lease.token: True}


def test_a_stop_after_the_end_changes_nothing(turn: Turn) -> None:
    claim = claimed(turn)
    finish(claim)
    before = fresh(turn)
    assert lease.request_stop(turn.pk) is None
    assert lease.request_stop(uuid.uuid4()) is None
    after = fresh(turn)
    assert (after.status, after.stop_requested_at, after.finished_at) == ("completed", None, before.finished_at)
    assert after.conversation.revision == before.conversation.revision


# ------------------------------------------------------------------------------------------------ finish


def test_the_end_is_one_change_of_turn_message_usage_and_conversation(turn: Turn) -> None:
    claim = claimed(turn)
    record_id = asked(claim)
    usage = Usage(input_tokens=5, output_tokens=3, cache_read_input_tokens=2, thinking_tokens=1, raw={"x": 1})
    ended = finish(claim, requests=[Request(record_id=record_id, usage=usage, final=True, request_id="r")])
    assert ended is not None
    row = fresh(turn)
    assert (row.status, row.stop_reason, row.end_seq, row.lease_token) == ("completed", "end_turn", 1, None)
    assert (row.reply.blocks, row.reply.text, row.conversation.revision) == (HELLO, "Hello", 1)
    record = UsageRecord.objects.get(pk=record_id)
    assert (record.quality, record.input_tokens, record.output_tokens) == ("exact", 5, 3)
    assert (record.cache_read_input_tokens, record.thinking_tokens, record.raw) == (2, 1, {"x": 1})
    assert (record.provider, record.model, record.request_id) == ("scripted", "m", "r")


def test_ending_twice_is_ending_once(turn: Turn) -> None:
    claim = claimed(turn)
    assert finish(claim) is not None
    before = fresh(turn)
    assert finish(claim, Outcome(status=Turn.Status.STOPPED), blocks=[text_block("other")], end_seq=9) is None
    after = fresh(turn)
    assert (after.status, after.end_seq, after.reply.blocks) == ("completed", 1, HELLO)
    assert (after.finished_at, after.conversation.revision) == (before.finished_at, before.conversation.revision)


def test_two_ends_at_once_are_one(turn: Turn, at_once: Callable[..., list[Any]]) -> None:
    claim = claimed(turn)
    results = at_once(lambda: finish(claim), lambda: finish(claim, Outcome(status=Turn.Status.STOPPED)))
    assert sorted(result is None for result in results) == [False, True]
    winner = next(result for result in results if result is not None)
    assert (fresh(turn).status, fresh(turn).conversation.revision) == (winner.status, 1)


def test_the_end_of_a_deleted_turn_is_nothing(turn: Turn) -> None:
    claim = claimed(turn)
    turn.conversation.delete()
    assert finish(claim) is None
    assert Turn.objects.count() == 0


def test_a_request_may_be_opened_by_the_owner_only_and_only_once(turn: Turn) -> None:
    claim = claimed(turn)
    record_id = asked(claim)
    assert lease.open_request(claim.lease, record_id, provider="scripted", model="m")
    assert UsageRecord.objects.count() == 1
    stale = journal.Lease(turn.pk, turn.conversation_id, uuid.uuid4())
    assert not lease.open_request(stale, uuid.uuid4(), provider="scripted", model="m")
    finish(claim)
    assert not lease.open_request(claim.lease, uuid.uuid4(), provider="scripted", model="m")
    assert UsageRecord.objects.count() == 1


# ------------------------------------------------------------------------------------------------ recovery


def test_a_living_turn_is_left_alone(turn: Turn) -> None:
    claimed(turn)
    assert lease.settle_expired() == ([], [])
    assert fresh(turn).status == "running"


def test_a_turn_whose_owner_died_keeps_what_was_journaled_and_is_interrupted(turn: Turn) -> None:
    claim = claimed(turn)
    asked(claim)
    assert write(claim, 1, start(), append("Hel"))
    assert write(claim, 2, append("lo \N{GRINNING FACE}"))
    expire(turn)
    [ended], requeued = lease.settle_expired()
    assert requeued == []
    row = fresh(turn)
    assert (row.status, row.error_code, row.end_seq) == ("interrupted", "owner_lost", 2)
    assert (row.reply.blocks, row.reply.text) == ([text_block("Hello \N{GRINNING FACE}")], "Hello \N{GRINNING FACE}")
    assert (ended.pk, ended.status, ended.conversation.revision) == (turn.pk, "interrupted", row.conversation.revision)
    [record] = UsageRecord.objects.all()
    assert (record.quality, record.error_code) == ("estimated", "owner_lost")
    assert (record.input_tokens, record.output_tokens) == (len("Good day") // 4, 2)
    assert lease.settle_expired() == ([], [])


def test_a_turn_that_was_to_be_stopped_when_its_owner_died_is_stopped(turn: Turn) -> None:
    claim = claimed(turn)
    asked(claim)
    write(claim, 1, start(), append("Hello"))
    lease.request_stop(turn.pk)
    expire(turn)
    lease.settle_expired()
    assert (fresh(turn).status, fresh(turn).error_code, fresh(turn).reply.text) == ("stopped", "", "Hello")


def test_a_turn_that_asked_nobody_is_queued_again_and_keeps_its_place(turn: Turn) -> None:
    claim = claimed(turn)
    expire(turn)
    assert lease.settle_expired() == ([], [turn.pk])
    row = fresh(turn)
    assert (row.status, row.lease_token, row.started_at, row.attempt) == ("queued", None, None, 1)
    assert row.queued_at == Turn.objects.get(pk=turn.pk).queued_at
    assert not write(claim, 1, start())
    assert not lease.open_request(claim.lease, uuid.uuid4(), provider="scripted", model="m")
    assert finish(claim) is None
    again = claimed(turn)
    assert fresh(turn).attempt == 2
    assert write(again, 1, start())


def test_a_turn_is_given_up_after_two_owners_died_before_asking(turn: Turn) -> None:
    claimed(turn)
    expire(turn)
    assert lease.settle_expired() == ([], [turn.pk])
    claimed(turn)
    expire(turn)
    ended, requeued = lease.settle_expired()
    assert ([one.status for one in ended], requeued) == (["interrupted"], [])
    assert fresh(turn).reply.blocks == []


def test_a_turn_that_was_asked_but_showed_nothing_is_not_asked_again(turn: Turn) -> None:
    asked(claimed(turn))
    expire(turn)
    [ended], requeued = lease.settle_expired()
    assert (ended.status, ended.end_seq, requeued) == ("interrupted", 0, [])


def test_a_turn_that_was_to_be_stopped_is_not_queued_again(turn: Turn) -> None:
    claimed(turn)
    lease.request_stop(turn.pk)
    expire(turn)
    [ended], requeued = lease.settle_expired()
    assert (ended.status, requeued) == ("stopped", [])


def test_an_owner_that_was_settled_writes_nothing_any_more(turn: Turn) -> None:
    claim = claimed(turn)
    record_id = asked(claim)
    write(claim, 1, start(), append("Hello"))
    expire(turn)
    lease.settle_expired()
    before = fresh(turn)
    assert not write(claim, 2, append(" world"))
    assert JournalEntry.objects.count() == 1
    late = Request(record_id=record_id, usage=Usage(input_tokens=999), final=True)
    assert finish(claim, blocks=[text_block("Hello world")], end_seq=2, requests=[late]) is None
    after = fresh(turn)
    assert (after.status, after.reply.text, after.finished_at) == ("interrupted", "Hello", before.finished_at)
    assert UsageRecord.objects.get().quality == "estimated"


def test_many_sweepers_at_once_settle_a_turn_once(turn: Turn, at_once: Callable[..., list[Any]]) -> None:
    asked(claimed(turn))
    expire(turn)
    results = at_once(*[lease.settle_expired] * 4)
    assert sum(len(ended) for ended, _ in results) == 1
    assert fresh(turn).conversation.revision == 1


def test_a_sweeper_and_an_owner_that_ends_at_once_agree(ann: User, at_once: Callable[..., list[Any]]) -> None:
    for _ in range(6):
        turn = queued(ann)
        claim = claimed(turn)
        record_id = asked(claim)
        write(claim, 1, start(), append("Hello"))
        expire(turn)
        request = Request(record_id=record_id, usage=Usage(input_tokens=1, output_tokens=1), final=True)
        (ended, _), finished = at_once(lease.settle_expired, lambda c=claim, r=request: finish(c, requests=[r]))
        row = fresh(turn)
        assert (finished is not None) != bool(ended)
        assert row.status == ("completed" if finished is not None else "interrupted")
        assert (row.reply.text, row.conversation.revision) == ("Hello", 1)
        assert UsageRecord.objects.filter(turn=turn).exclude(quality="open").count() == 1


def test_a_sweeper_and_an_owner_that_writes_at_once_lose_nothing_shown(
    ann: User, at_once: Callable[..., list[Any]]
) -> None:
    for _ in range(6):
        turn = queued(ann)
        claim = claimed(turn)
        asked(claim)
        write(claim, 1, start(), append("Hel"))
        expire(turn)
        (ended, _), wrote = at_once(lease.settle_expired, lambda c=claim: write(c, 2, append("lo")))
        row = fresh(turn)
        if wrote:  # it was shown, so it must be kept, by whoever ends the turn
            assert JournalEntry.objects.filter(turn=turn).count() == 2
            assert row.status == "running" or row.reply.text == "Hello"
        else:
            assert JournalEntry.objects.filter(turn=turn).count() == 1
            assert (row.status, row.reply.text) == ("interrupted", "Hel")
        assert bool(ended) == (row.status != "running")


def test_an_owner_that_shows_a_sign_of_life_in_time_keeps_its_turn(turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = claimed(turn)
    asked(claim)
    expire(turn)
    lock = lease._lock

    def written_meanwhile(conversation_id: uuid.UUID) -> None:
        assert write(claim, 1, start(), append("Hello"))
        lock(conversation_id)

    monkeypatch.setattr(lease, "_lock", written_meanwhile)
    assert lease.settle_expired() == ([], [])
    assert (fresh(turn).status, fresh(turn).lease_token) == ("running", claim.lease.token)


def test_one_turn_that_can_not_be_settled_does_not_keep_the_others_waiting(
    ann: User, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [queued(ann) for _ in range(3)]
    for turn in turns:
        claim = claimed(turn)
        asked(claim)
        write(claim, 1, start(), append("secret"))
        expire(turn)
    JournalEntry.objects.filter(turn=turns[1]).update(ops='[{"op":"append","index":7,"field":"text","text":"secret"}]')
    ended, _ = lease.settle_expired()
    assert {turn.pk for turn in ended} == {turns[0].pk, turns[2].pk}
    assert fresh(turns[1]).status == "running"
    assert str(turns[1].pk) in caplog.text
    assert "secret" not in caplog.text


# ------------------------------------------------------------------------------------------------ the queue


def test_a_turn_that_waited_too_long_fails_and_frees_the_conversation(turn: Turn) -> None:
    young = queued(turn.requested_by or User())
    Turn.objects.filter(pk=turn.pk).update(queued_at=Now() - timedelta(seconds=61))
    [ended] = lease.settle_overdue(60.0)
    row = fresh(turn)
    assert (ended.pk, row.status, row.error_code, row.end_seq) == (turn.pk, "failed", "queue_timeout", 0)
    assert (row.reply.blocks, row.conversation.revision) == ([], 1)
    assert fresh(young).status == "queued"
    assert lease.settle_overdue(60.0) == []


def test_a_claim_and_the_end_of_patience_at_once_end_in_one_of_two_ways(
    ann: User, at_once: Callable[..., list[Any]]
) -> None:
    for _ in range(6):
        turn = queued(ann)
        Turn.objects.filter(pk=turn.pk).update(queued_at=Now() - timedelta(seconds=61))
        claim, ended = at_once(
            lambda turn=turn: lease.claim(turn.pk, uuid.uuid4(), 15.0), lambda: lease.settle_overdue(60.0)
        )
        assert (claim is None) == bool(ended)
        assert fresh(turn).status == ("failed" if ended else "running")


# ------------------------------------------------------------------------------------------------ retention


def test_entries_are_swept_some_time_after_the_end_and_not_before(ann: User) -> None:
    old, young, running = (queued(ann) for _ in range(3))
    for turn in (old, young, running):
        claim = claimed(turn)
        write(claim, 1, start(), append("Hello"))
        write(claim, 2, append("!"))
        if turn is not running:
            finish(claim, end_seq=2)
    Turn.objects.filter(pk=old.pk).update(finished_at=Now() - timedelta(seconds=601))
    Turn.objects.filter(pk=young.pk).update(finished_at=Now() - timedelta(seconds=599))
    assert lease.sweep_entries(600.0) == 1
    assert set(JournalEntry.objects.values_list("turn_id", flat=True)) == {young.pk, running.pk}
    assert fresh(old).reply.blocks == HELLO
    assert lease.sweep_entries(600.0) == 0


async def test_the_sweep_goes_on_until_nothing_old_is_left(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SWEEP_BATCH", 2)

    def seven_old_and_one_running() -> Turn:
        running = queued(chat.user)
        write(claimed(running), 1, start(), append("Hello"))
        for _ in range(7):
            turn = queued(chat.user)
            claim = claimed(turn)
            write(claim, 1, start(), append("Hello"))
            finish(claim)
        Turn.objects.exclude(pk=running.pk).update(finished_at=Now() - timedelta(seconds=601))
        return running

    running = await in_database(seven_old_and_one_running)
    await get_runner().retire()
    left = await in_database(lambda: list(JournalEntry.objects.values_list("turn_id", flat=True)))
    assert left == [running.pk]


def test_many_sweepers_at_once_delete_every_entry(ann: User, at_once: Callable[..., list[Any]]) -> None:
    for _ in range(4):
        claim = claimed(queued(ann))
        write(claim, 1, start(), append("Hello"))
        finish(claim)
    Turn.objects.update(finished_at=Now() - timedelta(seconds=601))
    at_once(*[lambda: lease.sweep_entries(600.0)] * 4)
    assert JournalEntry.objects.count() == 0


# ------------------------------------------------------------------------------------------------ estimates


def age(record_id: uuid.UUID, seconds: float) -> None:
    UsageRecord.objects.filter(pk=record_id).update(requested_at=Now() - timedelta(seconds=seconds))


def test_a_request_whose_conversation_was_deleted_and_whose_owner_died_is_estimated(ann: User) -> None:
    old, young = queued(ann), queued(ann)
    lost, perhaps_alive = asked(claimed(old)), asked(claimed(young))
    for turn in (old, young):
        Conversation.objects.filter(pk=turn.conversation_id).delete()
    age(lost, 101)
    age(perhaps_alive, 99)
    assert lease.settle_requests(100.0) == 1
    record = UsageRecord.objects.get(pk=lost)
    assert (record.quality, record.error_code, record.input_tokens, record.turn_id) == (
        "estimated",
        "owner_lost",
        0,
        None,
    )
    assert record.finished_at is not None
    assert UsageRecord.objects.get(pk=perhaps_alive).quality == "open"
    assert lease.settle_requests(100.0) == 0


def test_a_request_that_its_turn_ended_without_is_estimated_and_one_of_a_running_turn_is_not(ann: User) -> None:
    over, running = queued(ann), queued(ann)
    claim = claimed(over)
    forgotten, under_way = asked(claim), asked(claimed(running))
    finish(claim, requests=[])
    age(forgotten, 101)
    age(under_way, 101)
    assert lease.settle_requests(100.0) == 1
    record = UsageRecord.objects.get(pk=forgotten)
    assert (record.quality, record.input_tokens) == ("estimated", len("Good day") // 4)
    assert UsageRecord.objects.get(pk=under_way).quality == "open"


async def test_no_request_stays_open_after_the_longest_turn(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, fast: Callable[..., None]
) -> None:
    monkeypatch.setattr(lease, "SWEEP_BATCH", 2)
    fast(TURN_TIMEOUT_SECONDS=30.0, LEASE_SECONDS=10.0)

    def lose_five() -> None:
        for _ in range(5):
            turn = queued(chat.user)
            age(asked(claimed(turn)), 30 + 10 + 120 + 1)
            Conversation.objects.filter(pk=turn.conversation_id).delete()
        age(asked(claimed(queued(chat.user))), 30 + 10 + 120 - 1)
        Conversation.objects.all().delete()

    await in_database(lose_five)
    await get_runner().retire()
    qualities = await in_database(lambda: sorted(UsageRecord.objects.values_list("quality", flat=True)))
    assert qualities == ["estimated"] * 5 + ["open"]


@pytest.mark.parametrize(
    ("request_fields", "quality", "input_tokens", "output_tokens"),
    [
        ({"usage": Usage(input_tokens=5, output_tokens=0), "final": True, "received_chars": 99}, "exact", 5, 0),
        ({"usage": Usage(), "final": True, "sent_chars": 99}, "exact", 0, 0),
        ({"usage": Usage(), "sent_chars": 99, "received_chars": 9}, "estimated", 24, 3),
        ({"usage": Usage(input_tokens=5, output_tokens=50), "received_chars": 9}, "estimated", 5, 50),
        ({"usage": Usage(input_tokens=5, output_tokens=1), "received_chars": 9}, "estimated", 5, 3),
    ],
)
def test_what_a_request_cost_is_exact_or_estimated_but_never_forgotten(
    turn: Turn, request_fields: dict[str, Any], quality: str, input_tokens: int, output_tokens: int
) -> None:
    claim = claimed(turn)
    record_id = asked(claim)
    finish(claim, requests=[Request(record_id=record_id, **request_fields)])
    record = UsageRecord.objects.get(pk=record_id)
    assert (record.quality, record.input_tokens, record.output_tokens) == (quality, input_tokens, output_tokens)
    assert record.finished_at is not None


# ------------------------------------------------------------------------------------------------ by the runner


async def test_the_runner_settles_what_others_left_behind_and_tells_viewers(
    chat: Chat, fast: Callable[..., None]
) -> None:
    from streaming_chat import turns
    from streaming_chat.database import in_database
    from streaming_chat.signals import turn_finished

    heard: list[Any] = []
    turn_finished.connect(listener := lambda **kwargs: heard.append((kwargs["turn_id"], kwargs["status"])), weak=False)
    lost = await in_database(queued, chat.user)
    overdue = await in_database(queued, chat.user)

    def leave_behind() -> None:
        claim = claimed(lost)
        asked(claim)
        write(claim, 1, start(), append("Hello"))

    await in_database(leave_behind)
    screens = [chat.view(turn.conversation_id)[1] for turn in (lost, overdue)]
    for screen in screens:
        await screen.until(lambda screen: screen.kinds)
    assert screens[0].text == "Hello"
    await in_database(expire, lost)
    await in_database(Turn.objects.filter(pk=overdue.pk).update, queued_at=Now() - timedelta(seconds=61))
    assert await turns.recover_turns() == 2
    await screens[0].until(lambda screen: screen.status == "interrupted")
    await screens[1].until(lambda screen: screen.status == "failed")
    turn_finished.disconnect(listener)
    assert sorted(heard) == sorted([(lost.pk, "interrupted"), (overdue.pk, "failed")])
    assert screens[0].text == "Hello"
    assert connection.vendor in ("sqlite", "postgresql")
