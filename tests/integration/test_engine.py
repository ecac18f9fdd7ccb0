"""One turn: every way it can go and end, and what is stored of it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable

import pytest

from streaming_chat.database import in_database
from streaming_chat.exceptions import TURN_ERRORS, ProviderError
from streaming_chat.generation import lease
from streaming_chat.generation.engine import Generation
from streaming_chat.generation.lease import Outcome
from streaming_chat.generation.runner import get_runner
from streaming_chat.journal import get_journal
from streaming_chat.models import Turn, UsageRecord
from streaming_chat.providers import get_provider
from streaming_chat.providers.base import Ended, Usage, UsageSeen
from streaming_chat.signals import turn_finished
from tests.integration.conftest import Chat
from tests.providers import ALIVE, BEGAN, ENDED, USAGE, Gate, Step, answer, append, gated_answer, start
from tests.screen import eventually

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.backends]

PROVIDER_CODES = [code for code in TURN_ERRORS if code.startswith("provider_")]


async def ran(chat: Chat, *replies: list[Step]) -> Turn:
    """The turn of these replies, once it is over and no provider stream is open."""
    chat.script.replies = list(replies)
    turn = await chat.ended((await chat.send(await chat.conversation())).id)
    assert chat.script.open_streams == 0
    await eventually(lambda: get_runner().running == 0)
    return turn


async def usage_of(chat: Chat, turn: Turn) -> UsageRecord:
    [record] = await chat.usage(turn.pk)
    return record


# ------------------------------------------------------------------------------------------------ completed


async def test_a_completed_turn_has_exact_usage_and_times(chat: Chat) -> None:
    turn = await ran(chat, answer("Hel", "lo"))
    assert (turn.status, turn.stop_reason, turn.error_code) == ("completed", "end_turn", "")
    assert turn.started_at is not None
    assert turn.first_text_at is not None
    assert turn.finished_at is not None
    assert turn.queued_at <= turn.started_at <= turn.first_text_at <= turn.finished_at
    assert (turn.lease_token, turn.lease_expires_at) == (None, None)
    record = await usage_of(chat, turn)
    assert (record.quality, record.error_code, record.request_id) == ("exact", "", "req_1")
    assert (record.provider, record.model) == ("scripted", "scripted-1")
    assert (record.input_tokens, record.output_tokens, record.raw) == (11, 7, {"input_tokens": 11})
    assert record.user_id == chat.user.pk
    assert record.first_text_ms is not None
    assert record.duration_ms is not None
    assert record.first_text_ms <= record.duration_ms


async def test_thinking_tools_and_citations_are_stored_as_they_came(chat: Chat) -> None:
    turn = await ran(
        chat,
        [
            BEGAN,
            {"op": "start", "index": 0, "block": {"type": "thinking", "thinking": "", "signature": ""}},
            append("hm", 0, "thinking"),
            append("sig", 0, "signature"),
            {"op": "start", "index": 1, "block": {"type": "server_tool_use", "id": "s1", "name": "web_search"}},
            append('{"q":', 1, "partial_json"),
            append("1}", 1, "partial_json"),
            {"op": "merge", "index": 1, "fields": {"input": {"q": 1}, "partial_json": None}},
            start(2, citations=[]),
            append("As one says", 2),
            {"op": "push", "index": 2, "field": "citations", "value": {"cited_text": "one"}},
            USAGE,
            ENDED,
        ],
    )
    assert turn.reply.blocks == [
        {"type": "thinking", "thinking": "hm", "signature": "sig"},
        {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"q": 1}},
        {"type": "text", "text": "As one says", "citations": [{"cited_text": "one"}]},
    ]
    assert turn.reply.text == "As one says"


@pytest.mark.parametrize("reason", ["max_tokens", "refusal", "stop_sequence", "pause_turn", "reason_of_tomorrow"])
async def test_the_providers_reason_is_kept(chat: Chat, reason: str) -> None:
    turn = await ran(chat, [BEGAN, start(), append("a"), Ended(stop_reason=reason, details={"x": 1})])
    assert (turn.status, turn.stop_reason, turn.stop_details) == ("completed", reason, {"x": 1})


async def test_an_empty_answer_is_complete(chat: Chat) -> None:
    turn = await ran(chat, [BEGAN, USAGE, ENDED])
    assert (turn.status, turn.reply.blocks, turn.end_seq) == ("completed", [], 0)


async def test_an_unknown_tool_fails_the_turn_and_keeps_its_blocks(chat: Chat) -> None:
    call = {"type": "tool_use", "id": "t1", "name": "rm", "input": {}}
    steps: list[Step] = [
        BEGAN,
        start(),
        append("Let me"),
        {"op": "start", "index": 1, "block": call},
        USAGE,
        Ended(stop_reason="tool_use"),
    ]
    turn = await ran(chat, steps)
    assert (turn.status, turn.error_code, turn.stop_reason) == ("failed", "unknown_tool", "tool_use")
    assert turn.reply.blocks == [{"type": "text", "text": "Let me"}, call]
    assert (await usage_of(chat, turn)).quality == "exact"


# ------------------------------------------------------------------------------------------------ the provider fails


@pytest.mark.parametrize("code", PROVIDER_CODES)
async def test_an_error_instead_of_an_answer_fails_the_turn_and_costs_nothing(chat: Chat, code: str) -> None:
    turn = await ran(chat, [ProviderError(code, request_id="req_9")])
    assert (turn.status, turn.error_code, turn.reply.blocks, turn.end_seq) == ("failed", code, [], 0)
    record = await usage_of(chat, turn)
    assert (record.quality, record.error_code, record.request_id) == ("exact", code, "req_9")
    assert (record.input_tokens, record.output_tokens) == (0, 0)
    assert len(chat.script.requests) == 1


@pytest.mark.parametrize("code", PROVIDER_CODES)
async def test_an_error_in_the_middle_keeps_the_text_and_is_not_retried(chat: Chat, code: str) -> None:
    turn = await ran(chat, [BEGAN, start(), append("Hello"), ProviderError(code, retryable=True)])
    assert (turn.status, turn.error_code, turn.reply.text) == ("failed", code, "Hello")
    record = await usage_of(chat, turn)
    assert (record.quality, record.output_tokens, record.error_code) == ("estimated", 2, code)
    assert record.input_tokens > 0 or len("Hi") < 4
    assert len(chat.script.requests) == 1


async def test_a_stream_that_just_ends_is_interrupted_and_not_complete(chat: Chat) -> None:
    turn = await ran(chat, [BEGAN, start(), append("Hello")])
    assert (turn.status, turn.error_code, turn.reply.text) == ("interrupted", "stream_cut", "Hello")
    assert (await usage_of(chat, turn)).quality == "estimated"


async def test_what_the_provider_said_of_the_usage_is_kept_where_the_stream_was_cut(chat: Chat) -> None:
    seen = UsageSeen(usage=Usage(input_tokens=90, output_tokens=1, cache_read_input_tokens=5))
    turn = await ran(chat, [BEGAN, seen, start(), append("x" * 41)])
    record = await usage_of(chat, turn)
    assert (record.quality, record.input_tokens, record.output_tokens) == ("estimated", 90, 11)
    assert record.cache_read_input_tokens == 5


async def test_operations_that_do_not_fit_are_the_providers_fault(chat: Chat) -> None:
    turn = await ran(chat, [BEGAN, start(), append("Hello"), append("?", 7), append("never")])
    assert (turn.status, turn.error_code, turn.reply.text) == ("failed", "provider_error", "Hello")


async def test_an_error_nobody_expects_fails_the_turn_and_tells_nothing(
    chat: Chat, caplog: pytest.LogCaptureFixture
) -> None:
    turn = await ran(chat, [BEGAN, start(), append("Hello"), KeyError("the prompt")])
    assert (turn.status, turn.error_code, turn.reply.text) == ("failed", "internal_error", "Hello")
    assert "KeyError" in caplog.text
    assert "the prompt" not in caplog.text


async def test_a_timeout_error_of_the_providers_own_is_no_timeout_of_the_turn(chat: Chat) -> None:
    turn = await ran(chat, [BEGAN, start(), append("Hello"), TimeoutError()])
    assert (turn.status, turn.error_code, turn.reply.text) == ("failed", "internal_error", "Hello")


async def test_what_no_database_stores_is_replaced_whatever_the_provider_sends(chat: Chat) -> None:
    turn = await ran(chat, answer("a\x00b", "c\ud800d"))
    assert (turn.status, turn.reply.text) == ("completed", "a\ufffdbc\ufffdd")


@pytest.mark.parametrize("value", [2**70, {1}, object()])
async def test_what_can_not_be_written_ends_only_its_own_turn(chat: Chat, value: object) -> None:
    steps, gates = gated_answer("Hel", "lo")
    bad: list[Step] = [BEGAN, start(), {"op": "push", "index": 0, "field": "x", "value": value}, Gate()]
    chat.script.replies = [steps, bad]
    good = await chat.send(await chat.conversation())
    await gates[0].reached()
    poisoned = await chat.send(await chat.conversation())
    for gate in gates:
        gate.open()
    assert (await chat.ended(good.id)).reply.text == "Hello"
    failed = await chat.ended(poisoned.id)
    assert (failed.status, failed.error_code, failed.reply.text) == ("failed", "provider_error", "")
    after = await chat.send(await chat.conversation())
    chat.script.replies.append(answer("still there"))
    assert (await chat.ended(after.id)).reply.text == "still there"


# ------------------------------------------------------------------------------------------------ asking again


def retryable(seconds: float | None = None) -> ProviderError:
    return ProviderError("provider_overloaded", retryable=True, retry_after_seconds=seconds)


async def test_a_failed_request_is_repeated_while_nothing_was_shown(chat: Chat) -> None:
    turn = await ran(chat, [retryable(0.01)], [BEGAN, ALIVE, retryable(0.01)], answer("Hello"))
    assert (turn.status, turn.error_code, turn.reply.text) == ("completed", "", "Hello")
    records = await chat.usage(turn.pk)
    assert [(r.quality, r.error_code, r.output_tokens) for r in records] == [
        ("exact", "provider_overloaded", 0),
        ("estimated", "provider_overloaded", 0),
        ("exact", "", 7),
    ]


async def test_a_request_that_may_be_billed_without_an_answer_is_estimated_and_not_free(chat: Chat) -> None:
    unclear = ProviderError("provider_unreachable", retryable=True, retry_after_seconds=0.01, may_be_billed=True)
    turn = await ran(chat, [unclear], answer("Hello"))
    assert (turn.status, turn.reply.text) == ("completed", "Hello")
    first, second = await chat.usage(turn.pk)
    assert (first.quality, first.error_code, first.output_tokens) == ("estimated", "provider_unreachable", 0)
    assert (second.quality, second.output_tokens) == ("exact", 7)


async def test_it_is_repeated_only_so_often(chat: Chat) -> None:
    turn = await ran(chat, [retryable(0.01)])
    assert (turn.status, turn.error_code) == ("failed", "provider_overloaded")
    assert len(chat.script.requests) == 3
    assert len(await chat.usage(turn.pk)) == 3


async def test_it_is_not_repeated_where_that_is_switched_off(chat: Chat, fast: Callable[..., None]) -> None:
    fast(PROVIDER_RETRIES=0)
    turn = await ran(chat, [retryable(0.01)])
    assert (turn.status, len(chat.script.requests)) == ("failed", 1)


async def test_the_provider_is_given_the_time_it_asks_for(chat: Chat) -> None:
    began = time.monotonic()
    turn = await ran(chat, [retryable(1.2)], answer("Hello"))
    assert turn.status == "completed"
    assert time.monotonic() - began >= 1.2


async def test_a_pause_that_is_too_long_is_not_waited_for(chat: Chat) -> None:
    turn = await ran(chat, [retryable(20.5)])
    assert (turn.status, turn.error_code, len(chat.script.requests)) == ("failed", "provider_overloaded", 1)


async def test_a_stop_ends_the_pause_before_another_request(chat: Chat) -> None:
    from streaming_chat import turns

    chat.script.replies = [[retryable(15.0)]]
    conversation = await chat.conversation()
    started = await chat.send(conversation)
    await eventually(lambda: chat.script.requests)
    assert await turns.stop_turn(chat.user, conversation.pk) == "stopped"
    assert (await chat.turn(started.id)).reply.blocks == []
    assert len(chat.script.requests) == 1


# ------------------------------------------------------------------------------------------------ deadlines


@pytest.mark.parametrize(
    ("code", "setting", "before"),
    [
        ("first_event_timeout", "FIRST_EVENT_TIMEOUT_SECONDS", []),
        ("no_bytes_timeout", "NO_BYTES_TIMEOUT_SECONDS", [BEGAN, start(), append("Hello")]),
        ("no_progress_timeout", "NO_PROGRESS_TIMEOUT_SECONDS", [BEGAN, start(), append("Hello"), ALIVE]),
        ("turn_timeout", "TURN_TIMEOUT_SECONDS", [BEGAN, start(), append("Hello")]),
        ("turn_timeout", "TURN_TIMEOUT_SECONDS", []),
    ],
)
async def test_a_missed_deadline_ends_the_turn_and_keeps_its_text(
    chat: Chat, fast: Callable[..., None], code: str, setting: str, before: list[Step]
) -> None:
    fast(**{setting: 0.2})
    turn = await ran(chat, [*before, Gate()])
    shown = "Hello" if len(before) > 1 else ""
    assert (turn.status, turn.error_code, turn.stop_reason, turn.reply.text) == ("timed_out", code, "", shown)
    record = await usage_of(chat, turn)
    assert (record.quality, record.output_tokens) == ("estimated", 2 if shown else 0)
    assert len(chat.script.requests) == 1


async def test_pings_keep_a_silent_answer_alive_until_it_makes_no_progress(
    chat: Chat, fast: Callable[..., None]
) -> None:
    fast(NO_BYTES_TIMEOUT_SECONDS=0.4, NO_PROGRESS_TIMEOUT_SECONDS=1.0)
    gates = [Gate() for _ in range(40)]
    pinged: list[Step] = [BEGAN, start(), append("Hello")]
    for gate in gates:
        pinged += [gate, ALIVE]
    chat.script.replies = [pinged]
    started = await chat.send(await chat.conversation())
    for gate in gates:
        if chat.script.requests and not chat.script.open_streams:
            break
        reached = asyncio.create_task(gate.reached())
        done, _ = await asyncio.wait([reached], timeout=0.5)
        if not done:
            reached.cancel()
            break
        gate.open()
        await asyncio.sleep(0.05)
    turn = await chat.ended(started.id)
    assert (turn.status, turn.error_code, turn.reply.text) == ("timed_out", "no_progress_timeout", "Hello")


async def test_an_answer_that_comes_all_at_once_may_be_silent(chat: Chat, fast: Callable[..., None]) -> None:
    fast(
        STREAM=False,
        FIRST_EVENT_TIMEOUT_SECONDS=0.05,
        NO_BYTES_TIMEOUT_SECONDS=0.05,
        NO_PROGRESS_TIMEOUT_SECONDS=0.05,
        TURN_TIMEOUT_SECONDS=0.6,
    )
    turn = await ran(chat, [BEGAN, start(), Gate()])
    assert (turn.status, turn.error_code) == ("timed_out", "turn_timeout")
    assert chat.script.requests[0].stream is False


# ------------------------------------------------------------------------------------------------ the end outlives


async def claimed(chat: Chat) -> tuple[Generation, uuid.UUID]:
    """A generation of a turn that this test owns, not the runner."""
    from streaming_chat import turns

    conversation = await chat.conversation()
    ids = (uuid.uuid4(), uuid.uuid4(), uuid.uuid4())
    await in_database(turns._accept_prompt, chat.user, conversation.pk, ids, "Hi", "c1", None, None)
    claim = await in_database(lease.claim, ids[0], uuid.uuid4(), 15.0)
    assert claim is not None
    from streaming_chat.conf import get_settings

    return Generation(claim, get_journal(), get_provider(), get_settings()), ids[0]


@pytest.mark.parametrize("cancels", [1, 5])
async def test_the_end_of_a_turn_outlives_any_number_of_cancels(chat: Chat, cancels: int) -> None:
    steps, gates = gated_answer("Hello", "!")
    chat.script.replies = [steps]
    started = await chat.send(await chat.conversation())
    gates[0].open()
    await gates[1].reached()
    [task] = [task for task in asyncio.all_tasks() if task.get_name() == f"turn {started.id}"]
    for _ in range(cancels):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    turn = await chat.ended(started.id)
    assert (turn.status, turn.error_code, turn.reply.text) == ("interrupted", "shutdown", "Hello")
    assert chat.script.open_streams == 0
    assert (await usage_of(chat, turn)).quality == "estimated"


async def test_the_first_reason_to_end_wins(chat: Chat) -> None:
    chat.script.replies = [[BEGAN, start(), append("Hello"), Gate()]]
    get_runner().start()
    generation, turn_id = await claimed(chat)
    run = asyncio.create_task(generation.run())
    await chat.committed(turn_id, 1)
    generation.interrupt(Outcome(status=Turn.Status.STOPPED))
    generation.interrupt(Outcome(status=Turn.Status.TIMED_OUT, error_code="turn_timeout"))
    await run
    await generation.finish()
    turn = await chat.turn(turn_id)
    assert (turn.status, turn.error_code, turn.reply.text) == ("stopped", "", "Hello")


async def test_a_turn_that_is_stopped_before_it_runs_never_asks(chat: Chat) -> None:
    get_runner().start()
    generation, turn_id = await claimed(chat)
    generation.interrupt(Outcome(status=Turn.Status.STOPPED))
    await generation.run()
    await generation.finish()
    assert (await chat.turn(turn_id)).status == "stopped"
    assert chat.script.requests == []
    assert await chat.usage(turn_id) == []


async def test_an_owner_that_lost_its_lease_stores_only_its_usage(chat: Chat) -> None:
    heard: list[object] = []
    turn_finished.connect(listener := lambda **kwargs: heard.append(kwargs["turn_id"]), weak=False)
    gate = Gate()
    chat.script.replies = [[BEGAN, start(), append("Hello"), gate, append(" world"), USAGE, ENDED]]
    get_runner().start()
    generation, turn_id = await claimed(chat)
    run = asyncio.create_task(generation.run())
    await chat.committed(turn_id, 1)
    await in_database(Turn.objects.filter(pk=turn_id).update, lease_expires_at="2000-01-01T00:00Z")
    [settled], _ = await in_database(lease.settle_expired)
    before = await chat.entries(turn_id)
    gate.open()
    await run
    await generation.finish()
    turn_finished.disconnect(listener)
    turn = await chat.turn(turn_id)
    assert (turn.status, turn.error_code, turn.reply.text) == ("interrupted", "owner_lost", "Hello")
    assert turn.finished_at == settled.finished_at
    assert await chat.entries(turn_id) == before
    [record] = await chat.usage(turn_id)
    assert record.quality == "estimated"
    assert heard == []


async def test_an_owner_that_lost_its_lease_does_not_ask_the_provider(chat: Chat) -> None:
    get_runner().start()
    generation, turn_id = await claimed(chat)
    await in_database(Turn.objects.filter(pk=turn_id).update, lease_token=uuid.uuid4())
    await generation.run()
    assert chat.script.requests == []
    assert await chat.usage(turn_id) == []
    generation.interrupt(Outcome(status=Turn.Status.STOPPED))
    await generation.finish()
    assert (await chat.turn(turn_id)).status == "running"


async def test_too_much_text_for_the_database_to_take_ends_the_turn(chat: Chat) -> None:
    flood = [append("x" * 300_000) for _ in range(5)]
    turn = await ran(chat, [BEGAN, start(), *flood, append("never")])
    assert (turn.status, turn.error_code) == ("interrupted", "storage_stalled")
    assert turn.reply.text == "x" * 300_000 * 4
