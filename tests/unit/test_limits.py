from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_chat.exceptions import RateLimitedError
from streaming_chat.limits import Rate, Slots


def test_a_slot_is_held_inside_the_with_and_free_afterwards() -> None:
    slots = Slots()
    with slots.hold("ann", 1):
        assert slots.held("ann") == 1
        with pytest.raises(RateLimitedError), slots.hold("ann", 1):
            pass
        assert slots.held("ann") == 1
        with slots.hold("bob", 1):
            assert slots.held("bob") == 1
    assert slots.held("ann") == slots.held("bob") == 0


def test_a_slot_is_free_after_an_error() -> None:
    slots = Slots()
    with pytest.raises(KeyError), slots.hold("ann", 2):
        raise KeyError
    assert slots.held("ann") == 0


def test_a_slot_released_early_is_released_once() -> None:
    slots = Slots()
    with slots.hold("ann", 2), slots.hold("ann", 2) as release:
        release()
        release()
        assert slots.held("ann") == 1
    assert slots.held("ann") == 0


def test_a_limit_of_zero_refuses_the_first() -> None:
    slots = Slots()
    with pytest.raises(RateLimitedError), slots.hold("ann", 0):
        pass
    assert slots.held("ann") == 0


def test_a_full_bucket_allows_its_size_at_once_and_says_when_the_next_is_free() -> None:
    rate = Rate(60, now=100.0)
    for _ in range(60):
        rate.take(now=100.0)
    with pytest.raises(RateLimitedError) as refused:
        rate.take(now=100.25)
    assert refused.value.retry_after_seconds == 0.8
    assert refused.value.http_status == 429
    rate.take(now=101.0)
    with pytest.raises(RateLimitedError):
        rate.take(now=101.0)


def test_a_bucket_never_holds_more_than_its_size() -> None:
    rate = Rate(2, now=0.0)
    for _ in range(2):
        rate.take(now=86_400.0)
    with pytest.raises(RateLimitedError):
        rate.take(now=86_400.0)


@given(st.integers(1, 600), st.lists(st.floats(0, 5), max_size=200))
def test_no_stretch_of_time_yields_more_than_the_bucket_and_its_refill(per_minute: int, pauses: list[float]) -> None:
    rate, now, taken = Rate(per_minute, now=0.0), 0.0, 0
    for pause in pauses:
        now += pause
        wait_seconds = 0.0
        try:
            rate.take(now=now)
            taken += 1
        except RateLimitedError as error:
            wait_seconds = error.retry_after_seconds or 0.0
        assert 0 <= wait_seconds <= 60 / per_minute + 0.1
    assert taken <= per_minute + now * per_minute / 60 + 1e-6
