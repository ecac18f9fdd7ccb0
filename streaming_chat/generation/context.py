"""From the stored history to the provider's request."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from django.utils.crypto import salted_hmac
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from ..blocks import Block
from ..conf import ChatSettings, get_settings
from ..models import Conversation, Message, Turn
from ..providers.base import ProviderMessage, ProviderRequest


class Options(BaseModel):
    """What ``Conversation.options`` may hold; what it leaves out is the site's setting of the same name."""

    model_config = ConfigDict(extra="forbid")

    max_tokens: Annotated[int, Field(ge=1, strict=True)] = 1
    thinking: dict[str, Any] | None = None
    effort: str | None = None
    stop_sequences: tuple[str, ...] = ()
    send_user_id: StrictBool = False
    prompt_caching: StrictBool = True
    stream: StrictBool = True


def build_request(turn_id: uuid.UUID, provider: str) -> ProviderRequest:
    """What ``provider`` is asked for a turn. Blocks: run it in a database thread.

    Raises:
        Turn.DoesNotExist: The conversation was deleted.
    """
    turn = Turn.objects.select_related("conversation").get(pk=turn_id)
    conversation, site = turn.conversation, get_settings()
    chosen: dict[str, Any] = {key: getattr(site, key) for key in Options.model_fields}
    chosen |= Options.model_validate(conversation.options).model_dump(exclude_unset=True)
    return ProviderRequest(
        model=model_of(conversation, site),
        messages=history(turn, provider),
        system=conversation.system_prompt or site.system_prompt,
        max_tokens=chosen["max_tokens"],
        thinking=chosen["thinking"],
        effort=chosen["effort"],
        stop_sequences=tuple(chosen["stop_sequences"]),
        user_id=user_hash(turn.requested_by_id) if chosen["send_user_id"] else None,
        prompt_caching=chosen["prompt_caching"],
        stream=chosen["stream"],
    )


def model_of(conversation: Conversation, site: ChatSettings) -> str:
    """The model that answers in a conversation."""
    return conversation.model or site.model


def user_hash(user_id: Any) -> str | None:
    """A stable name for a user that tells the provider nothing about them; None for nobody."""
    return None if user_id is None else salted_hmac("streaming_chat.user_id", str(user_id)).hexdigest()[:32]


def history(turn: Turn, provider: str) -> list[ProviderMessage]:
    """The branch up to the turn's prompt, as ``provider`` accepts it.

    A refused turn is left out, with its prompt, because a refusal in the history causes the next one. Replies that
    hold nothing yet are left out; neighbours of one role become one message.
    """
    messages = Message.objects.path(turn.prompt_id)
    earlier = {earlier.reply_id: earlier for earlier in Turn.objects.filter(reply__in=messages)}
    refused = [other for other in earlier.values() if other.stop_reason == "refusal"]
    left_out = {message_id for other in refused for message_id in (other.prompt_id, other.reply_id)} - {turn.prompt_id}
    history = []
    for message in messages:
        if message.pk in left_out:
            continue
        made_by = earlier.get(message.pk)
        blocks = sendable(message.blocks, thinking=made_by is not None and made_by.provider == provider)
        if blocks:
            role: Literal["user", "assistant"] = "user" if message.role == Message.Role.USER else "assistant"
            history.append(ProviderMessage(role=role, blocks=blocks))
    return merge_roles(history)


def merge_roles(messages: Iterable[ProviderMessage]) -> list[ProviderMessage]:
    """``messages`` with neighbours of one role joined, starting with the user."""
    merged: list[ProviderMessage] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            merged[-1] = ProviderMessage(role=message.role, blocks=merged[-1].blocks + message.blocks)
        elif merged or message.role == "user":
            merged.append(message)
    return merged


def sendable(blocks: Sequence[Block], *, thinking: bool = True) -> list[Block]:
    """The blocks that may be sent back: complete ones, with whatever they depend on.

    An interrupted reply can end in half a tool call or in thinking without its signature; a call needs its result in
    the same message, no text may be blank, and thinking alone is no answer.

    Args:
        blocks: Of one message.
        thinking: False leaves thinking out; its signature means something only to the provider that made it.
    """
    results = {block["tool_use_id"] for block in blocks if isinstance(block.get("tool_use_id"), str)}
    complete = [block for block in blocks if _is_complete(block, results) and (thinking or not _is_thinking(block))]
    return complete if any(not _is_thinking(block) for block in complete) else []


def _is_thinking(block: Block) -> bool:
    return block.get("type") in ("thinking", "redacted_thinking")


def _is_complete(block: Block, results: set[str]) -> bool:
    kind = block.get("type")
    if "partial_json" in block:
        return False
    if kind == "text":
        return bool(str(block.get("text") or "").strip())
    if kind == "thinking":
        return bool(block.get("signature"))
    if isinstance(kind, str) and kind.endswith("tool_use"):
        return block.get("id") in results
    return True
