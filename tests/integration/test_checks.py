"""System checks: each finds its fault, with a hint, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.core.checks import CheckMessage, run_checks
from pytest_django import Settings

from streaming_chat import checks


@pytest.fixture(autouse=True)
def sound(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site at which nothing is to be found."""
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    settings.STREAMING_CHAT = {"PROVIDER": "demo"}
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer"}}
    settings.DEBUG = True


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend to be configured for another database; only the check reads this."""

    def change(**config: Any) -> None:
        monkeypatch.setattr(django_settings, "DATABASES", {"default": config})

    return change


def found(*, deploy: bool = False) -> list[CheckMessage]:
    messages = run_checks(tags=[checks.TAG], include_deployment_checks=deploy)
    assert all(message.msg and message.hint for message in messages)
    return messages


def ids(*, deploy: bool = False) -> list[str | None]:
    return [message.id for message in found(deploy=deploy)]


def test_a_sound_site_passes() -> None:
    assert ids(deploy=True) == []


@pytest.mark.parametrize(
    "configured",
    [{"NO_SUCH_KEY": 1}, {"provider": "demo"}, {"MAX_TOKENS": "many"}, {"TICK_SECONDS": 0}, {1: 2}, ["PROVIDER"], None],
)
def test_settings_that_cannot_be_read_are_e001(settings: Settings, configured: Any) -> None:
    settings.STREAMING_CHAT = configured
    assert ids(deploy=True) == ["streaming_chat.E001"]


@pytest.mark.parametrize("provider", ["no.such.module", "streaming_chat.conf.NoSuchClass", "nodots", "json.dumps"])
def test_a_provider_that_is_none_is_e002(settings: Settings, provider: str) -> None:
    settings.STREAMING_CHAT = {"PROVIDER": provider}
    assert ids() == ["streaming_chat.E002"]


def test_an_import_error_names_the_provider(settings: Settings) -> None:
    settings.STREAMING_CHAT = {"PROVIDER": "no.such.Provider"}
    assert "STREAMING_CHAT['PROVIDER']: No module named 'no'" in found()[0].msg


def test_a_provider_of_the_hosts_own_passes(settings: Settings) -> None:
    settings.STREAMING_CHAT = {"PROVIDER": "tests.providers.ScriptedProvider"}
    assert ids() == []


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("django.contrib.sessions.middleware.SessionMiddleware", "E003"),
        ("django.contrib.auth.middleware.AuthenticationMiddleware", "E004"),
        ("django.middleware.csrf.CsrfViewMiddleware", "W011"),
    ],
)
def test_missing_middleware(settings: Settings, name: str, number: str) -> None:
    settings.MIDDLEWARE = [middleware for middleware in settings.MIDDLEWARE if middleware != name]
    (message,) = found()
    assert message.id == f"streaming_chat.{number}"
    assert message.hint == f"Add {name!r}."


def test_middleware_derived_from_the_needed_one_counts(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from django.middleware.csrf import CsrfViewMiddleware

    module = ModuleType("host_middleware")
    module.Csrf = type("Csrf", (CsrfViewMiddleware,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "host_middleware", module)
    settings.MIDDLEWARE = [
        "host_middleware.Csrf" if name.endswith("CsrfViewMiddleware") else name for name in settings.MIDDLEWARE
    ]
    assert ids() == []


def test_a_deprecated_model_is_w001_with_its_end(settings: Settings) -> None:
    settings.STREAMING_CHAT = {"PROVIDER": "anthropic", "ANTHROPIC_API_KEY": "key", "MODEL": "claude-2.1"}
    (message,) = found()
    assert message.id == "streaming_chat.W001"
    assert message.msg == "The model claude-2.1 is deprecated and ends on July 21st, 2025."


def test_the_default_model_is_not_deprecated(settings: Settings) -> None:
    settings.STREAMING_CHAT = {"PROVIDER": "anthropic", "ANTHROPIC_API_KEY": "key"}
    assert ids() == []


def test_other_providers_may_name_their_models_as_they_like(settings: Settings) -> None:
    settings.STREAMING_CHAT = {"PROVIDER": "demo", "MODEL": "claude-2.1"}
    assert ids() == []


def test_anthropic_without_a_key_is_w002(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.STREAMING_CHAT = {"PROVIDER": "anthropic"}
    assert ids() == ["streaming_chat.W002"]
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key")
    assert ids() == []


def test_a_missing_channel_layer_is_w003(settings: Settings) -> None:
    settings.CHANNEL_LAYERS = {"other": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
    assert ids() == ["streaming_chat.W003"]


def test_a_site_of_one_process_needs_no_channel_layer(settings: Settings) -> None:
    settings.CHANNEL_LAYERS = {}
    assert ids() == []
    assert ids(deploy=True) == ["streaming_chat.I001"]


def test_the_alias_of_the_settings_is_the_one_that_counts(settings: Settings) -> None:
    settings.STREAMING_CHAT = {"PROVIDER": "demo", "CHANNEL_LAYER": "chat"}
    assert ids() == ["streaming_chat.W003"]
    settings.CHANNEL_LAYERS = {"chat": {"BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer"}}
    assert ids() == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ["streaming_chat.W004"]),
        ({"capacity": 999}, ["streaming_chat.W004"]),
        ({"capacity": 1000}, []),
    ],
)
def test_a_core_layer_of_low_capacity_is_w004(settings: Settings, config: dict[str, int], expected: list[str]) -> None:
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "channels_redis.core.RedisChannelLayer", "CONFIG": config}}
    assert ids() == expected


WAL = "PRAGMA journal_mode = wal;"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["streaming_chat.W005"]),
        ({"init_command": WAL}, ["streaming_chat.W005"]),
        ({"transaction_mode": "IMMEDIATE"}, ["streaming_chat.W005"]),
        ({"init_command": WAL, "transaction_mode": "DEFERRED"}, ["streaming_chat.W005"]),
        ({"init_command": WAL, "transaction_mode": "immediate"}, []),
    ],
)
def test_sqlite_without_wal_and_immediate_is_w005(
    database: Callable[..., None], options: dict[str, str], expected: list[str]
) -> None:
    database(ENGINE="django.db.backends.sqlite3", OPTIONS=options)
    assert ids() == expected


def test_the_options_that_w005_offers_are_what_it_asks_for(database: Callable[..., None]) -> None:
    offered = eval("{" + checks.SQLITE_OPTIONS + "}")
    database(ENGINE="django.db.backends.sqlite3", **offered)
    assert ids() == []


def test_other_databases_need_no_options(database: Callable[..., None]) -> None:
    database(ENGINE="django.db.backends.postgresql")
    assert ids() == []


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("LEASE_SECONDS", 1.9, 2.0),
        ("QUEUE_TIMEOUT_SECONDS", 3.9, 4.0),
        ("HEARTBEAT_SECONDS", 56, 55),
        ("JOURNAL_KEEP_SECONDS", 59, 60),
        ("NO_PROGRESS_TIMEOUT_SECONDS", 44, 45),
    ],
)
def test_seconds_that_defeat_their_purpose_are_w006(settings: Settings, key: str, bad: float, good: float) -> None:
    settings.STREAMING_CHAT = {"PROVIDER": "demo", key: bad}
    (message,) = found()
    assert message.id == "streaming_chat.W006"
    assert message.msg == f"STREAMING_CHAT[{key!r}] is {bad:g}."
    settings.STREAMING_CHAT = {"PROVIDER": "demo", key: good}
    assert ids() == []


def test_prompts_that_may_not_fit_a_frame_are_w012(settings: Settings) -> None:
    settings.STREAMING_CHAT = {"PROVIDER": "demo", "MESSAGE_MAX_CHARS": 81_579}
    (message,) = found()
    assert (message.id, message.msg) == ("streaming_chat.W012", "STREAMING_CHAT['MESSAGE_MAX_CHARS'] is 81579.")
    assert message.hint is not None
    assert "at most 81578:" in message.hint
    settings.STREAMING_CHAT = {"PROVIDER": "demo", "MESSAGE_MAX_CHARS": 81_578}
    assert ids() == []


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (["daphne", "django.contrib.staticfiles"], []),
        (["django.contrib.staticfiles", "daphne"], ["streaming_chat.W007"]),
        (["django.contrib.staticfiles"], ["streaming_chat.W007"]),
        (["daphne.apps.DaphneConfig"], []),
    ],
)
def test_a_runserver_that_is_not_asgi_is_w007(settings: Settings, order: list[str], expected: list[str]) -> None:
    rest = [name for name in settings.INSTALLED_APPS if name not in ("daphne", "django.contrib.staticfiles")]
    settings.INSTALLED_APPS = order + rest
    assert ids() == expected
    settings.DEBUG = False
    assert ids() == []


def test_daphne_without_an_application_is_w008(settings: Settings) -> None:
    settings.ASGI_APPLICATION = None
    assert ids() == ["streaming_chat.W008"]


@pytest.mark.parametrize(
    ("package", "installed", "expected"),
    [
        ("daphne", "4.2.1", ["streaming_chat.W009"]),
        ("daphne", "4.2.2", []),
        ("daphne", "4.10.0", []),
        ("django", "5.2.13", ["streaming_chat.W009"]),
        ("django", "5.2.14", []),
        ("django", "6.0", []),
    ],
)
def test_old_versions_are_w009(
    monkeypatch: pytest.MonkeyPatch, package: str, installed: str, expected: list[str]
) -> None:
    known = {"django": "5.2.19", "daphne": "4.2.3", package: installed}
    monkeypatch.setattr(checks, "version", known.__getitem__)
    assert ids() == expected


def test_urls_that_are_not_included_are_w010(settings: Settings) -> None:
    settings.ROOT_URLCONF = "django.contrib.auth.urls"
    assert ids() == ["streaming_chat.W010"]


def test_the_in_memory_layer_is_noted_for_deployment_only(settings: Settings) -> None:
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
    assert ids() == []
    assert ids(deploy=True) == ["streaming_chat.I001"]
