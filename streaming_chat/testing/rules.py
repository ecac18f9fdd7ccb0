"""What the Messages API refuses before any model sees it: the checks of the fake server's strict mode.

They follow API version 2026-10-21 and the request types of version 2 of the SDK, in words of our own: the
rules that a chat can break by mistake, not all there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, TypeAlias

from .errors import ApiError

Json: TypeAlias = Mapping[str, Any]

REMOVED_PARAMETERS = ("temperature", "top_p", "top_k")
KNOWN_PARAMETERS = frozenset(
    {
        *(
            "model",
            "messages",
            "max_tokens",
            "system",
            "tools",
            "tool_choice",
            "thinking",
            "stream",
            "metadata",
        ),
        *("stop_sequences", "cache_control", "container", "diagnostics", "inference_geo", "output_config"),
        *("service_tier", "speed", "context_management", "mcp_servers"),
    }
)
ROLES = ("user", "assistant", "system")
MAX_MESSAGES = 100_000
MAX_CACHE_BREAKPOINTS = 4
MIN_THINKING_BUDGET_TOKENS = 1024


def check_message_request(body: Json) -> None:
    """Raise :class:`ApiError` unless ``POST /v1/messages`` would accept this body."""
    _check_model(body)
    _require("max_tokens" in body, "max_tokens: field required")
    limit: Any = body["max_tokens"]
    _require(isinstance(limit, int) and not isinstance(limit, bool), "max_tokens: must be an integer")
    _require(limit >= 0, "max_tokens: must not be negative")
    _require(isinstance(body.get("stream", False), bool), "stream: must be a boolean")
    for number, sequence in enumerate(_list(body.get("stop_sequences") or [], "stop_sequences")):
        place = f"stop_sequences.{number}"
        _require(
            isinstance(sequence, str) and bool(sequence.strip()),
            f"{place}: must contain more than whitespace",
        )
    thinking = body.get("thinking")
    if isinstance(thinking, Mapping) and thinking.get("type") == "enabled":
        budget = thinking.get("budget_tokens")
        valid = isinstance(budget, int) and MIN_THINKING_BUDGET_TOKENS <= budget < limit
        _require(valid, "thinking.enabled.budget_tokens: must be at least 1024 and less than max_tokens")
    check_prompt(body)


def check_count_request(body: Json) -> None:
    """Raise :class:`ApiError` unless ``POST /v1/messages/count_tokens`` would accept this body."""
    _check_model(body)
    check_prompt(body)


def check_prompt(body: Json) -> None:
    """Raise :class:`ApiError` unless the parts that both kinds of request share are in order."""
    for name in REMOVED_PARAMETERS:
        _require(name not in body, f"{name}: this parameter is no longer supported")
    for name in body:
        _require(name in KNOWN_PARAMETERS or "betas" in body, f"{name}: extra inputs are not permitted")
    _check_system(body.get("system"))
    messages = body.get("messages")
    _require(messages is not None, "messages: field required")
    messages = _list(messages, "messages")
    _require(bool(messages), "messages: at least one message is required")
    _require(len(messages) <= MAX_MESSAGES, f"messages: at most {MAX_MESSAGES} messages are allowed")
    for number, message in enumerate(messages):
        _check_message(message, f"messages.{number}", is_last=number == len(messages) - 1)
    _require(messages[0]["role"] == "user", 'messages.0: the first message must have the role "user"')
    _check_tool_pairs(messages)
    _check_ending(messages[-1])
    marked = sum("cache_control" in block for block in _all_blocks(body))
    _require(
        marked <= MAX_CACHE_BREAKPOINTS,
        f"at most {MAX_CACHE_BREAKPOINTS} blocks may carry cache_control; found {marked}",
    )


def blocks_of(message: Json) -> list[Json]:
    """Return a message's content as blocks, whichever way it was written."""
    content = message.get("content")
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ApiError(400, "invalid_request_error", message)


def _list(value: Any, place: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ApiError(400, "invalid_request_error", f"{place}: must be a list")
    return value


def _check_model(body: Json) -> None:
    _require("model" in body, "model: field required")
    _require(isinstance(body["model"], str) and bool(body["model"]), "model: must be a non-empty string")


def _check_system(system: Any) -> None:
    if system is None or isinstance(system, str):
        return
    for number, block in enumerate(_list(system, "system")):
        place = f"system.{number}"
        _require(isinstance(block, Mapping) and block.get("type") == "text", f"{place}: must be a text block")
        _check_text(block, place)


def _check_message(message: Any, place: str, *, is_last: bool) -> None:
    _require(isinstance(message, Mapping), f"{place}: must be an object")
    _require(message.get("role") in ROLES, f"{place}.role: must be one of {', '.join(ROLES)}")
    _require("content" in message, f"{place}.content: field required")
    if not isinstance(message["content"], str):
        for number, block in enumerate(_list(message["content"], f"{place}.content")):
            _check_block(block, f"{place}.content.{number}")
    may_be_empty = is_last and message["role"] == "assistant"
    _require(
        may_be_empty or bool(message["content"]),
        f"{place}: all messages must have non-empty content except for an optional final assistant message",
    )
    if isinstance(message["content"], str) and not may_be_empty:
        _check_text({"text": message["content"]}, place)


def _check_block(block: Any, place: str) -> None:
    _require(isinstance(block, Mapping), f"{place}: must be an object")
    _require(isinstance(block.get("type"), str), f"{place}.type: field required")
    match block["type"]:
        case "text":
            _check_text(block, place)
        case "tool_use":
            for name, kind in (("id", str), ("name", str), ("input", dict)):
                _require(isinstance(block.get(name), kind), f"{place}.tool_use.{name}: field required")
        case "tool_result":
            _require(isinstance(block.get("tool_use_id"), str), f"{place}.tool_result.tool_use_id: field required")
        case "thinking":
            _require(isinstance(block.get("signature"), str), f"{place}.thinking.signature: field required")


def _check_text(block: Json, place: str) -> None:
    _require(isinstance(block.get("text"), str), f"{place}.text: must be a string")
    _require(bool(block["text"]), f"{place}: text content blocks must be non-empty")
    _require(bool(block["text"].strip()), f"{place}: text content blocks must contain non-whitespace text")


def _check_tool_pairs(messages: Sequence[Json]) -> None:
    """Require every call to be answered in the very next turn, and every answer to have its call."""
    turns = _turns(messages)
    for place, role, blocks in turns:
        calls = [block["id"] for block in blocks if role == "assistant" and block["type"] == "tool_use"]
        _require(len(calls) == len(set(calls)), f"{place}: `tool_use` ids must be unique")
    for (place, role, blocks), (_, _, following) in pairwise([*turns, ("", "", [])]):
        calls = [block["id"] for block in blocks if role == "assistant" and block["type"] == "tool_use"]
        results = [block["tool_use_id"] for block in following if block["type"] == "tool_result"]
        missing = [call for call in calls if call not in results]
        _require(
            not missing,
            f"{place}: `tool_use` ids without a `tool_result` block right after them: {', '.join(missing)}",
        )
    for (_, _, preceding), (place, _, blocks) in pairwise([("", "", []), *turns]):
        calls = [block["id"] for block in preceding if block["type"] == "tool_use"]
        for block in blocks:
            if block["type"] == "tool_result":
                name = block["tool_use_id"]
                _require(name in calls, f"{place}: `tool_result` without its `tool_use` in the turn before: {name}")


def _turns(messages: Sequence[Json]) -> list[tuple[str, str, list[Json]]]:
    """Return place, role and blocks of each turn; neighbouring messages of one role are one turn."""
    turns = []
    numbered = [(number, message) for number, message in enumerate(messages) if message["role"] != "system"]
    for role, group in groupby(numbered, key=lambda pair: pair[1]["role"]):
        members = list(group)
        blocks = [block for _, message in members for block in blocks_of(message)]
        turns.append((f"messages.{members[0][0]}", str(role), blocks))
    return turns


def _check_ending(message: Json) -> None:
    """Refuse a prefill, as the newest models do; a turn that the API itself paused may be handed back."""
    blocks = blocks_of(message)
    paused = bool(blocks) and (
        blocks[-1]["type"] in ("server_tool_use", "mcp_tool_use") or "result" in blocks[-1]["type"]
    )
    _require(
        message["role"] != "assistant" or paused,
        "this model takes no prefill: the conversation must end with a user message",
    )


def _all_blocks(body: Json) -> Iterator[Json]:
    if isinstance(body.get("system"), list):
        yield from body["system"]
    yield from (tool for tool in body.get("tools") or [] if isinstance(tool, Mapping))
    for message in body["messages"]:
        yield from blocks_of(message)
