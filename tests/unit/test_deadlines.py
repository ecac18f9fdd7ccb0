from __future__ import annotations

from streaming_chat.conf import ChatSettings
from streaming_chat.generation.engine import Deadlines

SETTINGS = ChatSettings(
    first_event_timeout_seconds=60.0, no_bytes_timeout_seconds=45.0, no_progress_timeout_seconds=300.0
)


def deadlines(*, turn_seconds: float = 900.0, streams: bool = True) -> Deadlines:
    return Deadlines(SETTINGS, turn_seconds, started_at=1000.0, streams=streams)


def test_before_the_request_only_the_turn_has_a_deadline() -> None:
    assert deadlines().due() == [(1900.0, "turn_timeout")]


def test_the_first_event_is_due_after_the_request() -> None:
    times = deadlines()
    times.request(1005.0)
    assert times.next() == (1065.0, "first_event_timeout")


def test_the_turn_ends_first_where_its_own_limit_is_shorter() -> None:
    times = deadlines(turn_seconds=30.0)
    times.request(1005.0)
    assert times.next() == (1030.0, "turn_timeout")


def test_bytes_are_due_after_bytes_and_progress_after_progress() -> None:
    times = deadlines()
    times.request(1000.0)
    times.began_at = times.bytes_at = times.progress_at = 1010.0
    assert times.next() == (1055.0, "no_bytes_timeout")
    times.bytes_at = 1290.0
    assert times.next() == (1310.0, "no_progress_timeout")
    times.progress_at = 1280.0
    assert times.next() == (1335.0, "no_bytes_timeout")
    assert sorted(code for _, code in times.due()) == ["no_bytes_timeout", "no_progress_timeout", "turn_timeout"]


def test_another_request_waits_for_its_own_first_event() -> None:
    times = deadlines()
    times.request(1000.0)
    times.began_at = times.bytes_at = times.progress_at = 1010.0
    times.requested_at = None
    assert times.due() == [(1900.0, "turn_timeout")]
    times.request(1100.0)
    assert times.next() == (1160.0, "first_event_timeout")


def test_the_silence_of_a_provider_that_answers_all_at_once_means_nothing() -> None:
    times = deadlines(streams=False)
    times.request(1000.0)
    assert times.due() == [(1900.0, "turn_timeout")]
    times.began_at = 1001.0
    assert times.due() == [(1900.0, "turn_timeout")]
