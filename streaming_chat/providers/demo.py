"""A provider that needs no key: the same prompt always gets the same answer, which says that it is a demo.

Prompts that begin with a slash show what can go wrong; see :data:`COMMANDS`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count, cycle, islice
from typing import Any, Final
from zlib import crc32

from ..blocks import Op, fold, ops_of, text_of
from ..exceptions import TURN_ERRORS, ProviderError
from .base import Alive, Began, Ended, ProviderEvent, ProviderRequest, Usage, UsageSeen

MODEL: Final = "demo"
CHARACTERS_PER_TOKEN: Final = 4
LONG_ANSWER_WORDS: Final = 2000
WORDS_BEFORE_TROUBLE: Final = 25
STALL_SECONDS: Final = 3600.0
MAX_WAIT_SECONDS: Final = 3600.0
PING_SECONDS: Final = 1.0

ERRORS: Final = {code.removeprefix("provider_"): code for code in TURN_ERRORS if code.startswith("provider_")}
_RETRYABLE: Final = frozenset(
    {"provider_unreachable", "provider_rate_limited", "provider_overloaded", "provider_error"}
)

COMMANDS: Final = {
    "/error": f"fails before the first word; name one of: {', '.join(ERRORS)}. Add `late` to fail after some words",
    "/cut": "the connection is lost in the middle of the answer",
    "/stall": "the answer goes silent in the middle",
    "/wait 10": "says nothing for so many seconds, then answers",
    "/max_tokens": "stops at the limit of tokens",
    "/refuse": "declines to answer",
    "/help": "shows this list",
}
"""What a prompt can begin with, and what the demo does then."""

_INTRODUCTION: Final = """\
There is **no language model** behind this answer, only a small program that plays one. To talk to Claude instead, \
set the environment variable `ANTHROPIC_API_KEY` and restart the server:"""

_SUGGESTIONS: Final = """\
### What you can try

- Ask for a **long** answer, and reload the page while it streams.
- Ask the demo to *think* first.
- Type `/help` for everything that can go wrong. 🧪"""

_SENTENCES: Final = (
    "Each word travels on its own, just as a model's words would.",
    "Close this tab, come back, and the answer goes on where it stands by then.",
    "Open the same conversation in a second window and watch both keep pace.",
    "Everything you have seen is stored before it is shown, so a reload never loses a line.",
    "Press stop at any time; what is on the screen stays.",
    "A lost network only pauses the view, never the answer.",
    "The paragraph you are reading has no meaning beyond its length.",
    "Try it on a phone, in the dark theme, or with the keyboard alone.",
    "Somewhere a server counts these words and writes the count beside the answer.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Script:
    """One answer: what is said, and how it ends."""

    text: str = ""
    thinking: str = ""
    wait_seconds: float = 0.0
    stop_reason: str = "end_turn"
    details: dict[str, Any] = field(default_factory=dict)
    error: ProviderError | None = None
    is_cut: bool = False
    stalls: bool = False


class DemoProvider:
    """Answers without a model, at the pace of one.

    Args:
        words_per_second: The pace; infinity is as fast as possible. None for the class's own.
    """

    name = "demo"
    words_per_second: float = 60.0

    def __init__(self, words_per_second: float | None = None) -> None:
        if words_per_second is not None:
            self.words_per_second = words_per_second

    async def stream(self, request: ProviderRequest) -> AsyncGenerator[ProviderEvent, None]:
        """Answer the last message.

        Raises:
            ProviderError: The prompt asked for it.
        """
        prompt = text_of(request.messages[-1].blocks[-1:]) if request.messages else ""
        script = script_for(prompt, thinks=_wants_thinking(request.thinking, prompt))
        async with aclosing(self._perform(script, request, prompt)) as events:
            if request.stream:
                async for event in events:
                    yield event
                return
            whole = [event async for event in events]
        if not isinstance(whole[-1], Ended):
            return
        yield whole[0]
        for op in ops_of(fold(event for event in whole if isinstance(event, dict))):
            yield op
        yield whole[-2]
        yield whole[-1]

    async def _perform(
        self, script: _Script, request: ProviderRequest, prompt: str
    ) -> AsyncGenerator[ProviderEvent, None]:
        if script.error is not None and not script.text:
            raise script.error
        input_tokens = _tokens(len(request.system) + sum(len(text_of(m.blocks)) for m in request.messages))
        yield Began(model=MODEL, request_id=f"demo_{crc32(prompt.encode('utf-8', 'replace')):08x}")
        yield UsageSeen(usage=_usage(input_tokens, 0, 0))
        for seconds in _naps(script.wait_seconds):
            await asyncio.sleep(seconds)
            yield Alive()
        stop_reason, said, thought = script.stop_reason, 0, 0
        clock, words = asyncio.get_running_loop().time, count()
        started = clock()
        for op in _ops(script):
            if op["op"] == "append":
                if _tokens(said) >= request.max_tokens:
                    stop_reason = "max_tokens"
                    break
                said += len(op["text"])
                thought += len(op["text"]) if op["field"] == "thinking" else 0
                await asyncio.sleep(max(started + next(words) / self.words_per_second - clock(), 0))
            yield op
        if script.stalls:
            await asyncio.sleep(STALL_SECONDS)
        if script.error is not None:
            raise script.error
        if not (script.is_cut or script.stalls):
            yield UsageSeen(usage=_usage(input_tokens, _tokens(said), _tokens(thought)), final=True)
            yield Ended(stop_reason=stop_reason, details=script.details)

    async def aclose(self) -> None:
        """Nothing is open."""


def script_for(prompt: str, *, thinks: bool) -> _Script:
    """What the demo makes of a prompt."""
    command, *arguments = prompt.split(maxsplit=3) or [""]
    opening = " ".join(answer_text(prompt).split(" ")[:WORDS_BEFORE_TROUBLE])
    match command:
        case "/error" if arguments and (code := ERRORS.get(arguments[0].removeprefix("provider_"))):
            error = ProviderError(code, retryable=code in _RETRYABLE)
            return _Script(error=error, text=opening if "late" in arguments else "")
        case "/cut":
            return _Script(text=opening, is_cut=True)
        case "/stall":
            return _Script(text=opening, stalls=True)
        case "/wait":
            seconds = _seconds(arguments[0] if arguments else "")
            return _Script(text=answer_text(prompt), wait_seconds=seconds)
        case "/max_tokens":
            return _Script(text=opening, stop_reason="max_tokens")
        case "/refuse":
            details = {"type": "refusal", "explanation": "The demo was asked to refuse."}
            return _Script(stop_reason="refusal", details={"stop_details": details})
        case "/help" | "/error":
            return _Script(text=_help_text())
    thinking = ""
    if thinks:
        thinking = f"The prompt has {len(prompt.split())} words. " + " ".join(_sentences(prompt, 2))
    return _Script(text=answer_text(prompt), thinking=thinking)


def answer_text(prompt: str) -> str:
    """The answer in Markdown; it depends on nothing but the prompt."""
    parts = [
        "## Hello from the demo 👋",
        _INTRODUCTION,
        "```sh\nexport ANTHROPIC_API_KEY=…\n```",
        "You wrote:",
        _quote(prompt),
        _table(prompt),
        _SUGGESTIONS,
        " ".join(_sentences(prompt, 3)),
    ]
    if re.search(r"\blong\b", prompt, re.IGNORECASE):
        words = sum(len(part.split()) for part in parts)
        for number in count(1):
            if words >= LONG_ANSWER_WORDS:
                break
            section = f"### Part {number}\n\n" + " ".join(_sentences(f"{number} {prompt}", 8))
            parts.append(section)
            words += len(section.split())
    return "\n\n".join(parts)


def _help_text() -> str:
    rows = "\n".join(f"- `{command}`: {effect}" for command, effect in COMMANDS.items())
    return f"### What the demo understands\n\n{rows}"


def _sentences(seed: str, number: int) -> Iterator[str]:
    first = crc32(seed.encode("utf-8", "replace")) % len(_SENTENCES)
    return islice(cycle(_SENTENCES), first, first + number)


def _quote(prompt: str) -> str:
    clipped = prompt[:280] + ("…" if len(prompt) > 280 else "")
    return "\n".join(f"> {line}" for line in clipped.split("\n"))


def _table(prompt: str) -> str:
    counts = {"words": len(prompt.split()), "characters": len(prompt), "lines": prompt.count("\n") + 1}
    rows = "\n".join(f"| {name} | {number} |" for name, number in counts.items())
    return f"| | your prompt |\n|---|---:|\n{rows}"


def _wants_thinking(thinking: dict[str, Any] | None, prompt: str) -> bool:
    if thinking is not None:
        return thinking.get("type") != "disabled"
    return "think" in prompt.lower()


def _ops(script: _Script) -> Iterator[Op]:
    index = 0
    if script.thinking:
        yield {"op": "start", "index": index, "block": {"type": "thinking", "thinking": "", "signature": ""}}
        for word in _words(script.thinking):
            yield {"op": "append", "index": index, "field": "thinking", "text": word}
        yield {
            "op": "merge",
            "index": index,
            "fields": {"signature": f"demo-{crc32(script.thinking.encode()):08x}"},
        }
        index += 1
    if script.text:
        yield {"op": "start", "index": index, "block": {"type": "text", "text": ""}}
        for word in _words(script.text):
            yield {"op": "append", "index": index, "field": "text", "text": word}


def _words(text: str) -> Iterator[str]:
    return (match.group() for match in re.finditer(r"\s*\S+\s*$|\s*\S+", text))


def _seconds(text: str) -> float:
    try:
        return min(max(float(text), 0.0), MAX_WAIT_SECONDS)
    except ValueError:
        return 5.0


def _naps(seconds: float) -> Iterator[float]:
    while seconds > 0:
        yield min(seconds, PING_SECONDS)
        seconds -= PING_SECONDS


def _tokens(characters: int) -> int:
    return -(-characters // CHARACTERS_PER_TOKEN)


def _usage(input_tokens: int, output_tokens: int, thinking_tokens: int) -> Usage:
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=0,
        thinking_tokens=thinking_tokens,
        raw={"input_tokens": input_tokens, "output_tokens": output_tokens},
    )
