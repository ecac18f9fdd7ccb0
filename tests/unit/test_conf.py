from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from streaming_chat.conf import ChatSettings, get_settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    monkeypatch.delenv("ANTHROPIC_BASE_URL", raising=False)
    yield
    get_settings.cache_clear()


def test_the_defaults_are_valid_settings() -> None:
    with override_settings(STREAMING_CHAT={}):
        assert get_settings() == ChatSettings()


def test_an_override_is_seen_at_once_and_taken_back() -> None:
    before = get_settings().tick_seconds
    with override_settings(STREAMING_CHAT={"TICK_SECONDS": 0.01, "MODEL": "m"}):
        assert (get_settings().tick_seconds, get_settings().model) == (0.01, "m")
    assert get_settings().tick_seconds == before


def test_the_settings_are_read_once() -> None:
    assert get_settings() is get_settings()


@pytest.mark.parametrize("key", ["MODLE", "model", "Model", "", "__class__", "RESOLVED_API_KEY"])
def test_an_unknown_key_is_refused_by_name(key: str) -> None:
    with (
        override_settings(STREAMING_CHAT={key: "x"}),
        pytest.raises(ImproperlyConfigured, match=f"no setting {key!r}"),
    ):
        get_settings()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL", None),
        ("MODEL", 1),
        ("MAX_TOKENS", 0),
        ("MAX_TOKENS", -1),
        ("MAX_TOKENS", 1.5),
        ("MAX_TOKENS", "100"),
        ("MAX_TOKENS", True),
        ("TICK_SECONDS", 0),
        ("TICK_SECONDS", -0.1),
        ("TICK_SECONDS", "0.1"),
        ("TICK_SECONDS", True),
        ("TICK_SECONDS", math.nan),
        ("PROVIDER_RETRIES", -1),
        ("STREAM", 1),
        ("STREAM", "yes"),
        ("STOP_SEQUENCES", "END"),
        ("THINKING", "adaptive"),
        ("EFFORT", 3),
        ("RUNNER", "worker"),
        ("RUNNER", ""),
    ],
)
def test_a_value_of_the_wrong_type_or_sign_is_refused_by_name(key: str, value: Any) -> None:
    with override_settings(STREAMING_CHAT={key: value}), pytest.raises(ImproperlyConfigured, match=f"'{key}'"):
        get_settings()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("PROVIDER_RETRIES", 0),
        ("TICK_SECONDS", 1),
        ("STOP_SEQUENCES", ["END"]),
        ("STOP_SEQUENCES", ()),
        ("THINKING", {"type": "adaptive"}),
        ("THINKING", None),
        ("RUNNER", "inline"),
    ],
)
def test_every_value_of_the_right_kind_is_taken(key: str, value: Any) -> None:
    with override_settings(STREAMING_CHAT={key: value}):
        assert getattr(get_settings(), key.lower()) == value


def test_the_key_comes_from_the_settings_first_and_chooses_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ChatSettings().resolved_api_key(), ChatSettings().resolved_provider()) == (None, "demo")
    assert ChatSettings().resolved_base_url() is None
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of the environment")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://environment")
    assert ChatSettings().resolved_api_key() == "of the environment"
    assert ChatSettings().resolved_provider() == "anthropic"
    assert ChatSettings().resolved_base_url() == "http://environment"
    configured = ChatSettings(anthropic_api_key="own", anthropic_base_url="http://own", provider="demo")
    assert (configured.resolved_api_key(), configured.resolved_base_url()) == ("own", "http://own")
    assert configured.resolved_provider() == "demo"
    monkeypatch.setenv("ANTHROPIC_API_KEY", "")
    assert ChatSettings().resolved_provider() == "demo"


def test_the_key_is_not_printed() -> None:
    assert "sesame" not in repr(ChatSettings(anthropic_api_key="sesame"))


def test_every_setting_has_a_type_that_is_checked() -> None:
    for field in dataclasses.fields(ChatSettings):
        with override_settings(STREAMING_CHAT={field.name.upper(): object()}), pytest.raises(ImproperlyConfigured):
            get_settings()
