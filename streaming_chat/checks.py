"""System checks: what is wrong with the set-up, and what to do about it. Each id is explained in the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from django.apps import AppConfig, apps
from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage, register
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS
from django.urls import NoReverseMatch, reverse
from django.utils.module_loading import import_string
from django.utils.version import get_version_tuple

from .conf import ChatSettings, get_settings
from .generation.runner import CLAIM_SECONDS
from .journal import RENEW_SECONDS
from .protocol import FRAME_ROOM_BYTES, MAX_CHAR_BYTES, MAX_FRAME_LIMIT_BYTES
from .providers import provider_class

IN_MEMORY: Final = "channels.layers.InMemoryChannelLayer"
TAG: Final = "streaming_chat"
LEAST_LAYER_CAPACITY: Final = 1000
"""Messages; a layer of ``channels_redis.core`` drops what is beyond, for all viewers of a process together."""
MOST_HEARTBEAT_SECONDS: Final = 55.0
"""nginx and most load balancers close a connection that is silent for 60 seconds."""
LEAST_JOURNAL_KEEP_SECONDS: Final = 60.0
FLOORS: Final = {"django": (5, 2, 14), "daphne": (4, 2, 2)}
SQLITE_OPTIONS: Final = """
"OPTIONS": {
    "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
    "transaction_mode": "IMMEDIATE",
    "timeout": 20,
}"""

_NEEDED_MIDDLEWARE: Final = {
    "E003": "django.contrib.sessions.middleware.SessionMiddleware",
    "E004": "django.contrib.auth.middleware.AuthenticationMiddleware",
    "W011": "django.middleware.csrf.CsrfViewMiddleware",
}


@register(TAG)
def check_settings(app_configs: Sequence[AppConfig] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """``STREAMING_CHAT``: known keys, fitting values, a provider that exists."""
    try:
        chat = _read_settings()
    except ImproperlyConfigured as error:
        return [_error("E001", f"{error}.", "Correct or remove it; the reference lists all settings.")]
    return [*_check_provider(chat), *_check_seconds(chat), *_check_layer(chat), *_check_frame(chat)]


@register(TAG, deploy=True)
def check_deployment(app_configs: Sequence[AppConfig] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """What is fine on one's own machine and may not be in production."""
    try:
        alias = _read_settings().channel_layer
    except ImproperlyConfigured:  # told by `check_settings`
        return []
    if _layer(alias).get("BACKEND", IN_MEMORY) != IN_MEMORY:
        return []
    return [
        checks.Info(
            "There is no channel layer, or it is in memory.",
            hint="That is right for one process. With several, use channels_redis.pubsub.RedisPubSubChannelLayer: "
            "otherwise a viewer in another process than the turn's sees the words in lumps, every few seconds.",
            id=f"{TAG}.I001",
        )
    ]


@register(TAG)
def check_database(app_configs: Sequence[AppConfig] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """SQLite that lets several connections work at once."""
    database = settings.DATABASES.get(DEFAULT_DB_ALIAS, {})
    if not str(database.get("ENGINE", "")).endswith("sqlite3"):
        return []
    options = database.get("OPTIONS", {})
    has_wal = "journal_mode=wal" in str(options.get("init_command", "")).lower().replace(" ", "")
    if has_wal and str(options.get("transaction_mode", "")).upper() == "IMMEDIATE":
        return []
    return [
        _warning(
            "W005",
            "SQLite is not set up for several connections: turns may fail with “database is locked”.",
            f"Put this into DATABASES[{DEFAULT_DB_ALIAS!r}]:{SQLITE_OPTIONS}",
        )
    ]


@register(TAG)
def check_server(app_configs: Sequence[AppConfig] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """What answers requests: ``runserver``, the ASGI application, versions."""
    found: list[CheckMessage] = []
    names = [config.name for config in apps.get_app_configs()]
    daphne = names.index("daphne") if "daphne" in names else None
    if settings.DEBUG and (daphne is None or "django.contrib.staticfiles" in names[:daphne]):
        found.append(
            _warning(
                "W007",
                "runserver does not serve WebSockets, and answers do not stream.",
                "Put 'daphne' into INSTALLED_APPS, before 'django.contrib.staticfiles'.",
            )
        )
    if daphne is not None and not getattr(settings, "ASGI_APPLICATION", None):
        found.append(
            _warning(
                "W008",
                "ASGI_APPLICATION is not set, so runserver can't start.",
                "ASGI_APPLICATION = 'yourproject.asgi.application'",
            )
        )
    for package, floor in FLOORS.items():
        installed = _installed(package)
        if installed is not None and get_version_tuple(installed) < floor:
            least = ".".join(map(str, floor))
            found.append(
                _warning(
                    "W009",
                    f"{package} {installed} has known faults that matter here.",
                    f"pip install --upgrade '{package}>={least}'",
                )
            )
    return found


@register(TAG)
def check_requests(app_configs: Sequence[AppConfig] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """What a request passes: middleware and URLs."""
    found: list[CheckMessage] = []
    present = [middleware for name in settings.MIDDLEWARE if (middleware := _import(name)) is not None]
    for number, name in _NEEDED_MIDDLEWARE.items():
        wanted = import_string(name)
        if not any(isinstance(middleware, type) and issubclass(middleware, wanted) for middleware in present):
            kind = _error if number.startswith("E") else _warning
            found.append(kind(number, f"{wanted.__name__} is missing from MIDDLEWARE.", f"Add {name!r}."))
    if getattr(settings, "ROOT_URLCONF", None) and not _has_urls():
        found.append(
            _warning(
                "W010",
                "The URLs of streaming_chat are not included.",
                "Add path('chat/', include('streaming_chat.urls')) to your urlpatterns.",
            )
        )
    return found


# ------------------------------------------------------------------------------------------------ inside


def _read_settings() -> ChatSettings:
    configured = getattr(settings, "STREAMING_CHAT", {})
    if not isinstance(configured, dict) or not all(isinstance(key, str) for key in configured):
        raise ImproperlyConfigured("STREAMING_CHAT must be a dict with names as keys")
    return get_settings()


def _check_provider(chat: ChatSettings) -> Iterator[CheckMessage]:
    try:
        provider = provider_class()
    except (ImproperlyConfigured, ValueError) as error:
        yield _error("E002", f"{error}.", "Name 'anthropic', 'demo' or the dotted path of a class.")
        return
    if not callable(getattr(provider, "stream", None)):
        yield _error(
            "E002",
            f"STREAMING_CHAT['PROVIDER']: {chat.resolved_provider()} has no method stream().",
            "The contract of a provider is in streaming_chat.providers.base.",
        )
        return
    if chat.resolved_provider() != "anthropic":
        return
    if chat.resolved_api_key() is None:
        yield _warning(
            "W002",
            "There is no key for the Anthropic API.",
            "Set the environment variable ANTHROPIC_API_KEY, or STREAMING_CHAT['ANTHROPIC_API_KEY'].",
        )
    from .providers.anthropic import deprecated_models  # noqa: PLC0415 - it imports the SDK

    if (end := deprecated_models().get(chat.model)) is not None:
        yield _warning(
            "W001",
            f"The model {chat.model} is deprecated and ends on {end}.",
            "Choose another one with STREAMING_CHAT['MODEL'].",
        )


def _check_seconds(chat: ChatSettings) -> Iterator[CheckMessage]:
    rules = [
        (
            "LEASE_SECONDS",
            chat.lease_seconds >= 4 * RENEW_SECONDS,
            f"at least {4 * RENEW_SECONDS:g}: a lease is renewed every {RENEW_SECONDS:g} s, and that may be late",
        ),
        (
            "QUEUE_TIMEOUT_SECONDS",
            chat.queue_timeout_seconds >= 2 * CLAIM_SECONDS,
            f"at least {2 * CLAIM_SECONDS:g}: other processes take waiting turns after {CLAIM_SECONDS:g} s",
        ),
        (
            "HEARTBEAT_SECONDS",
            chat.heartbeat_seconds <= MOST_HEARTBEAT_SECONDS,
            f"at most {MOST_HEARTBEAT_SECONDS:g}: proxies commonly close what is silent for 60 s",
        ),
        (
            "JOURNAL_KEEP_SECONDS",
            chat.journal_keep_seconds >= LEAST_JOURNAL_KEEP_SECONDS,
            f"at least {LEAST_JOURNAL_KEEP_SECONDS:g}: viewers that lost their connection resume from the journal",
        ),
        (
            "NO_PROGRESS_TIMEOUT_SECONDS",
            chat.no_progress_timeout_seconds >= chat.no_bytes_timeout_seconds,
            "at least NO_BYTES_TIMEOUT_SECONDS: content can't come more often than bytes",
        ),
    ]
    for key, is_kept, rule in rules:
        if not is_kept:
            value = getattr(chat, key.lower())
            yield _warning("W006", f"STREAMING_CHAT[{key!r}] is {value:g}.", f"It should be {rule}.")


def _check_layer(chat: ChatSettings) -> Iterator[CheckMessage]:
    layer = _layer(chat.channel_layer)
    named = chat.channel_layer != "default" or getattr(settings, "CHANNEL_LAYERS", {})
    if not layer and named:  # a site without any layer is one process, and needs none
        yield _warning(
            "W003",
            f"CHANNEL_LAYERS has no {chat.channel_layer!r}.",
            "Without it, a viewer in another process than the turn's sees the words in lumps, every few seconds.",
        )
    config = layer.get("CONFIG", {})
    if layer.get("BACKEND") == "channels_redis.core.RedisChannelLayer":
        capacity = config.get("capacity", 100)
        if capacity < LEAST_LAYER_CAPACITY:
            yield _warning(
                "W004",
                f"The channel layer {chat.channel_layer!r} holds {capacity} messages per process and drops the rest.",
                "Use channels_redis.pubsub.RedisPubSubChannelLayer, or set its CONFIG['capacity'] to "
                f"{LEAST_LAYER_CAPACITY} or more. What is dropped is read from the database, in lumps.",
            )


def _check_frame(chat: ChatSettings) -> Iterator[CheckMessage]:
    most_chars = (MAX_FRAME_LIMIT_BYTES - FRAME_ROOM_BYTES) // MAX_CHAR_BYTES
    if chat.message_max_chars > most_chars:
        yield _warning(
            "W012",
            f"STREAMING_CHAT['MESSAGE_MAX_CHARS'] is {chat.message_max_chars}.",
            f"It should be at most {most_chars}: longer prompts of some scripts do not fit into a WebSocket frame, "
            "for which Daphne has a limit of 1 MiB.",
        )


def _layer(alias: str) -> dict[str, Any]:
    layers: dict[str, dict[str, Any]] = getattr(settings, "CHANNEL_LAYERS", {})
    return layers.get(alias, {})


def _has_urls() -> bool:
    try:
        reverse("streaming_chat:socket", args=["00000000-0000-0000-0000-000000000000"])
    except NoReverseMatch:
        return False
    return True


def _import(name: str) -> Any:
    try:
        return import_string(name)
    except ImportError:  # the server says so itself
        return None


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _error(number: str, message: str, hint: str) -> checks.Error:
    return checks.Error(message, hint=hint, id=f"{TAG}.{number}")


def _warning(number: str, message: str, hint: str) -> checks.Warning:
    return checks.Warning(message, hint=hint, id=f"{TAG}.{number}")
