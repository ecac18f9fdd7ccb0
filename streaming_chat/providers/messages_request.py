"""Our request as the body of ``POST /v1/messages``. Sans-I/O."""

from __future__ import annotations

from typing import Any, Final

from ..blocks import Block, storable
from .base import ProviderRequest

_CACHE: Final = {"type": "ephemeral"}


def request_body(request: ProviderRequest) -> dict[str, Any]:
    """The JSON to send. ``request.options`` are taken over as they are; our own fields go before them.

    Caching: one breakpoint after the system prompt, which conversations share, and the API's automatic one at the end
    of the history.
    """
    body: dict[str, Any] = {key: value for key, value in request.options.items() if key != "betas"}
    body |= {
        "model": request.model,
        "max_tokens": request.max_tokens,
        "stream": request.stream,
        "messages": [
            {"role": message.role, "content": [input_block(block) for block in message.blocks]}
            for message in request.messages
        ],
    }
    if request.system.strip():
        system: Block = {"type": "text", "text": request.system}
        body["system"] = [{**system, "cache_control": _CACHE} if request.prompt_caching else system]
    if request.prompt_caching:
        body.setdefault("cache_control", _CACHE)
    if request.thinking is not None:
        body["thinking"] = request.thinking
    if request.effort is not None:
        body["output_config"] = {**body.get("output_config", {}), "effort": request.effort}
    if request.stop_sequences:
        body["stop_sequences"] = list(request.stop_sequences)
    if request.user_id is not None:
        body["metadata"] = {**body.get("metadata", {}), "user_id": request.user_id}
    return storable(body)  # type: ignore[no-any-return]


def request_headers(request: ProviderRequest) -> dict[str, str]:
    """The headers of our own; ``options["betas"]`` names beta features, as the SDK's parameter does."""
    # A compressing proxy would hold text back to fill its window.
    headers = {"accept-encoding": "identity"} if request.stream else {}
    if betas := request.options.get("betas"):
        headers["anthropic-beta"] = ",".join(betas)
    return headers


def input_block(block: Block) -> Block:
    """A block of an answer as the API takes it back.

    Left out: null fields, our ``partial_json``, and the ``file_id`` of citations, the one field that the SDK's response
    types have and its request types lack.
    """
    result = {key: value for key, value in block.items() if value is not None and key != "partial_json"}
    if isinstance(block.get("citations"), list):
        result["citations"] = [
            {key: value for key, value in citation.items() if key != "file_id"}
            if isinstance(citation, dict)
            else citation
            for citation in block["citations"]
        ]
    return result
