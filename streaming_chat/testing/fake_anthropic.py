"""Run the fake Anthropic server by hand.

python -m streaming_chat.testing.fake_anthropic --port 8765 --text "Hello" --tokens-per-second 20
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING

from .script import Opening, Reply
from .server import FakeAnthropic
from .steps import Delay, Event
from .tokens import CHARACTERS_PER_TOKEN, carried, output_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FakeAnthropic", "main"]

TEXT = "Hello! I am not a model, only a small server that always says the same thing, one word after another."


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted; the first line on stdout is the base URL, with the port."""
    options = _parser().parse_args(arguments)
    try:
        asyncio.run(_serve(options))
    except KeyboardInterrupt:
        return 0
    except OSError as exc:
        print(f"cannot listen on port {options.port}: {exc.strerror}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m streaming_chat.testing.fake_anthropic",
        description="Serve a fake Anthropic Messages API on loopback.",
    )
    parser.add_argument("--port", type=int, default=0, help="TCP port; 0, the default, takes a free one")
    parser.add_argument("--text", default=TEXT, help="what to answer to every message")
    parser.add_argument(
        "--events", metavar="FILE", help="answer with a recorded stream instead: one event's JSON a line"
    )
    parser.add_argument(
        "--tokens-per-second", type=float, default=0, help="pace; 0, the default, is as fast as possible"
    )
    parser.add_argument("--first-token-seconds", type=float, default=0, help="time before the first token")
    parser.add_argument("--lenient", action="store_true", help="accept requests that the API would refuse")
    return parser


async def _serve(options: argparse.Namespace) -> None:
    reply = Reply.from_jsonl(options.events) if options.events else _text_reply(options.text)
    reply = _paced(reply, options.first_token_seconds, options.tokens_per_second)
    async with FakeAnthropic(port=options.port, strict=not options.lenient) as server:
        server.respond = lambda _request: reply
        print(server.base_url, flush=True)  # noqa: T201
        await asyncio.Event().wait()


def _text_reply(text: str) -> Reply:
    return Reply.text(text, chunks=max(1, len(text) // CHARACTERS_PER_TOKEN))


def _paced(reply: Reply, first_seconds: float, tokens_per_second: float) -> Reply:
    """Put time between the events that carry output."""
    number, is_first = 0, True
    for step in reply.steps(Opening("", "", 0)):
        if not isinstance(step, Event):
            continue
        if output := carried(step.body):
            pause = output_tokens(len(output)) / tokens_per_second if tokens_per_second else 0.0
            if seconds := first_seconds if is_first else pause:
                reply = reply.after_event(number, Delay(seconds))
            is_first = False
        number += 1
    return reply


if __name__ == "__main__":
    sys.exit(main())
