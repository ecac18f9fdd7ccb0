"""How the fake server counts tokens: simply, and always the same.

Output: every started four characters of what the deltas carry (text, thinking, tool input) are one token,
and a message that has begun costs at least one. Input: every started four characters of the compact JSON of
``system``, ``tools`` and ``messages`` are one token. Characters are Unicode code points.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

CHARACTERS_PER_TOKEN = 4


def output_tokens(characters: int) -> int:
    """Price a message whose deltas carried this many characters so far."""
    return max(1, -(-characters // CHARACTERS_PER_TOKEN))


def input_tokens(body: Mapping[str, Any]) -> int:
    """Price the reading of this request."""
    prompt = [body.get(part) for part in ("system", "tools", "messages")]
    text = json.dumps(prompt, ensure_ascii=False, separators=(",", ":"))
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def carried(event: Mapping[str, Any]) -> str:
    """Return what a stream event adds to the output: text, thinking or tool input; else nothing."""
    part = event.get("delta") if event.get("type") == "content_block_delta" else event.get("content_block")
    if not isinstance(part, Mapping):
        return ""
    for key in ("text", "thinking", "partial_json"):
        if isinstance(part.get(key), str):
            return str(part[key])
    return ""


def shown(event: Mapping[str, Any]) -> str:
    """Return what a stream event adds to the visible text of the answer."""
    part = event.get("delta") if event.get("type") == "content_block_delta" else event.get("content_block")
    text = part.get("text") if isinstance(part, Mapping) else None
    return text if isinstance(text, str) else ""
