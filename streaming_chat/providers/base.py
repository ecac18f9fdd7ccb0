"""What a provider is: one request in, a stream of events out.

To add a provider, write a class with ``name`` and ``stream`` and put its dotted path into
``STREAMING_CHAT["PROVIDER"]``. It yields

    Alive* → Began → (Op | Alive | UsageSeen)* → Ended

and raises :class:`~streaming_chat.exceptions.ProviderError` for every failure. Returning without ``Ended`` means that
the stream was cut. Cancelling or closing the generator must close the provider's connection at once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from ..blocks import Block, Op


@dataclass(frozen=True, kw_only=True, slots=True)
class ProviderMessage:
    """One message of the history, blocks in the API's form."""

    role: Literal["user", "assistant"]
    blocks: list[Block]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProviderRequest:
    """Everything the provider is asked.

    ``thinking``, ``effort`` and ``user_id`` are None to leave them to the provider. ``stream`` False asks for the whole
    answer at once. ``options`` are further fields of the provider's own request, sent as they are.
    """

    model: str
    messages: list[ProviderMessage]
    system: str = ""
    max_tokens: int
    thinking: dict[str, Any] | None = None
    effort: str | None = None
    stop_sequences: tuple[str, ...] = ()
    user_id: str | None = None
    prompt_caching: bool = True
    stream: bool = True
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Usage:
    """Tokens of one provider request; None where the provider has not said. ``raw`` is its own account, verbatim."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    thinking_tokens: int | None = None
    raw: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Began:
    """The provider has started to answer."""

    model: str
    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Alive:
    """Bytes arrived that carry no progress, such as a ping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageSeen:
    """What the request has used so far: totals that replace all earlier ones. ``final``: nothing will be added."""

    usage: Usage
    final: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The answer is complete. ``stop_reason`` is the provider's word; ``details`` whatever it says beside it."""

    stop_reason: str
    details: dict[str, Any] = field(default_factory=dict)


ProviderEvent: TypeAlias = Began | Op | Alive | UsageSeen | Ended


class Provider(Protocol):
    """A source of answers. One instance per process and event loop."""

    name: str
    """Short name, stored with every turn and usage record."""

    def stream(self, request: ProviderRequest) -> AsyncGenerator[ProviderEvent, None]:
        """Ask once, without retrying, and yield what comes.

        Operations are storable (see :func:`streaming_chat.blocks.storable`) and fit each other.

        Raises:
            ProviderError: The request failed, before or in the middle of the answer.
        """

    async def aclose(self) -> None:
        """Close every connection. The instance is not used again."""
