"""Every setting: type, unit, default. Hosts write one dict, ``STREAMING_CHAT``; an unknown key is refused."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.dispatch import receiver


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatSettings:
    """The site's settings. Attribute names are the keys of ``STREAMING_CHAT`` in lower case."""

    # ------------------------------------------------------------------ the model
    provider: str | None = None
    """``"anthropic"``, ``"demo"`` or the dotted path of a class. None: Anthropic if a key is set, else demo."""
    anthropic_api_key: str | None = dataclasses.field(default=None, repr=False)
    """None: the environment variable ``ANTHROPIC_API_KEY``."""
    anthropic_base_url: str | None = None
    """None: the environment variable ``ANTHROPIC_BASE_URL``, else Anthropic's own address."""
    model: str = "claude-sonnet-5-5"
    """For conversations that name none."""
    models: tuple[str, ...] = ()
    """Further models that users may choose for a conversation through the API; a host's own code may choose any."""
    max_tokens: int = 8192
    """Longest answer, thinking included. Who may configure may ask for less through the API, not for more."""
    system_prompt: str = ""
    """For conversations that have none of their own."""
    thinking: dict[str, Any] | None = None
    """The API's ``thinking`` parameter, such as ``{"type": "adaptive"}``; None leaves it out."""
    effort: str | None = None
    """The API's ``output_config.effort``; None leaves it out."""
    stop_sequences: tuple[str, ...] = ()
    """The model stops before writing one of these."""
    send_user_id: bool = False
    """Send the provider a keyed hash of the user's id, so that it can tell users apart."""
    prompt_caching: bool = True
    """Ask the provider to cache the history; see the provider's prices."""
    stream: bool = True
    """False: the whole answer arrives at once, with progress events until then."""
    provider_retries: int = 2
    """How often a failed request is repeated, as long as nothing of the answer was journaled."""

    users_may_configure: bool = False
    """Users may set the system prompt, thinking, effort … of their own conversations through the API."""

    # ------------------------------------------------------------------ deadlines of a turn; the text is kept
    first_event_timeout_seconds: float = 60.0
    """From the request to the provider's first sign of life."""
    no_bytes_timeout_seconds: float = 45.0
    """Between any two signs of life, pings included. Does not apply where the answer does not stream."""
    no_progress_timeout_seconds: float = 300.0
    """Between any two pieces of content."""
    turn_timeout_seconds: float = 900.0
    """From claim to end, whatever happens. A call's own ``timeout`` can only shorten it."""
    queue_timeout_seconds: float = 60.0
    """How long a turn may wait for a process with capacity."""

    # ------------------------------------------------------------------ journal, leases, viewers
    tick_seconds: float = 0.05
    """Longest time text is held back to be committed together; the first text never waits."""
    lease_seconds: float = 15.0
    """How long a turn stays with a process that shows no sign of life."""
    sweep_seconds: float = 5.0
    """How often each process looks for turns that nobody runs."""
    positioning_seconds: float = 3.0
    """How often viewers are compared with the database, to heal a lost last message."""
    journal_keep_seconds: float = 600.0
    """How long journal entries outlive their turn, for viewers that resume."""
    storage_stall_seconds: float = 20.0
    """How long text may wait for the database before the provider's stream is closed."""
    progress_seconds: float = 1.0
    """How often viewers hear that a silent turn is alive."""
    heartbeat_seconds: float = 15.0
    """Silence after which a Server-Sent Events stream gets a comment, against idle limits of proxies."""
    drain_seconds: float = 25.0
    """How long running turns may go on once the process was asked to stop."""
    max_running_turns: int = 200
    """Turns that one process runs at a time; more wait in the queue."""

    # ------------------------------------------------------------------ limits
    message_max_chars: int = 32_000
    """Longest prompt, in characters."""
    sockets_per_user: int = 10
    """Open WebSockets per user and process."""
    event_streams_per_user: int = 6
    """Open Server-Sent Events streams per user and process."""
    commands_per_minute: int = 100
    """WebSocket commands per socket; acknowledgements do not count."""
    viewer_buffer_bytes: int = 256 * 1024
    """Unacknowledged or unsent bytes per viewer; beyond that it is re-synchronised later."""
    snapshot_messages: int = 50
    """Messages in a snapshot and in a page of the API."""

    # ------------------------------------------------------------------ hosting
    channel_layer: str = "default"
    """Alias in ``CHANNEL_LAYERS``."""
    runner: Literal["inline"] = "inline"
    """Where turns run: in the ASGI process."""

    def resolved_api_key(self) -> str | None:
        """The Anthropic key, from the settings or the environment; None if there is none."""
        return self.anthropic_api_key or os.environ.get("ANTHROPIC_API_KEY") or None

    def resolved_base_url(self) -> str | None:
        """Where the Anthropic API is; None means its own address."""
        return self.anthropic_base_url or os.environ.get("ANTHROPIC_BASE_URL") or None

    def resolved_provider(self) -> str:
        """The provider's alias or dotted path."""
        return self.provider or ("anthropic" if self.resolved_api_key() else "demo")


@cache
def get_settings() -> ChatSettings:
    """The current settings; cached until ``STREAMING_CHAT`` is overridden in a test.

    Raises:
        ImproperlyConfigured: An unknown key, or a value of the wrong type or sign.
    """
    configured: dict[str, Any] = getattr(django_settings, "STREAMING_CHAT", {})
    fields = {field.name: field for field in dataclasses.fields(ChatSettings)}
    for key in configured:
        if key != key.upper() or key.lower() not in fields:
            raise ImproperlyConfigured(f"STREAMING_CHAT has no setting {key!r}")
    values = ChatSettings(**{key.lower(): value for key, value in configured.items()})
    for name, field in fields.items():
        _check_value(name.upper(), str(field.type), getattr(values, name))
    return values


def _check_value(key: str, annotation: str, value: Any) -> None:
    plain: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "str": (str,),
        "tuple[str, ...]": (tuple, list),
        "dict[str, Any]": (dict,),
    }
    if annotation.endswith(" | None"):
        if value is None:
            return
        annotation = annotation.removesuffix(" | None")
    if annotation.startswith("Literal"):
        if repr(value) not in annotation:  # unparsed annotations quote like repr
            raise ImproperlyConfigured(f"STREAMING_CHAT[{key!r}] must be one of {annotation[8:-1]}, not {value!r}")
        return
    if not isinstance(value, plain[annotation]) or (annotation != "bool" and isinstance(value, bool)):
        raise ImproperlyConfigured(f"STREAMING_CHAT[{key!r}] must be {annotation}, not {type(value).__name__}")
    least = 0 if key == "PROVIDER_RETRIES" else 1e-3
    if isinstance(value, int | float) and annotation != "bool" and not value >= least:  # nor is NaN
        raise ImproperlyConfigured(f"STREAMING_CHAT[{key!r}] must be greater than zero")


@receiver(setting_changed)
def _forget_settings(*, setting: str, **kwargs: Any) -> None:
    if setting == "STREAMING_CHAT":
        get_settings.cache_clear()
