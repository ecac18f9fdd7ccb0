"""What we fold from a stream is the message that the SDK's own accumulators make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anthropic
import pytest
from jiter import from_json

from streaming_chat.blocks import storable
from streaming_chat.conf import ChatSettings
from streaming_chat.exceptions import ProviderError
from streaming_chat.providers.anthropic import AnthropicProvider
from streaming_chat.providers.base import Began, Ended, ProviderMessage, ProviderRequest, UsageSeen
from streaming_chat.testing import FakeAnthropic, Reply
from tests.streams import BETA_SCRIPTED, SCRIPTED, folded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

RECORDED = Path(__file__).parents[3] / "shared" / "streams"
RECORDINGS = sorted(path.name for path in RECORDED.glob("*.jsonl"))

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]
MODEL = "claude-sonnet-5-5"
COUNTS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
BETA_BLOCKS = {"mcp_tool_use", "mcp_tool_result", "compaction", "fallback", "advisor_tool_result", "mcp_tool_listing"}


@pytest.fixture
async def server() -> AsyncIterator[FakeAnthropic]:
    async with FakeAnthropic() as running:
        yield running


@pytest.fixture
async def provider(server: FakeAnthropic) -> AsyncIterator[AnthropicProvider]:
    made = AnthropicProvider(ChatSettings(anthropic_api_key="key", anthropic_base_url=server.base_url))
    yield made
    await made.aclose()


@pytest.fixture
async def sdk(server: FakeAnthropic) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(api_key="key", base_url=server.base_url, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("name", [*SCRIPTED, *BETA_SCRIPTED])
async def test_a_scripted_stream_is_the_sdks_message(
    name: str, server: FakeAnthropic, provider: AnthropicProvider, sdk: anthropic.AsyncAnthropic
) -> None:
    events = SCRIPTED.get(name) or BETA_SCRIPTED[name]
    await check_against_the_sdk(events, server, provider, sdk)


@pytest.mark.skipif(not RECORDINGS, reason="the recorded streams do not stand beside this checkout")
@pytest.mark.parametrize("name", RECORDINGS or [None])
async def test_a_recorded_stream_is_the_sdks_message(
    name: str, server: FakeAnthropic, provider: AnthropicProvider, sdk: anthropic.AsyncAnthropic
) -> None:
    lines = (RECORDED / name).read_text(encoding="utf-8").split("\n")
    await check_against_the_sdk([json.loads(line) for line in lines if line.strip()], server, provider, sdk)


async def check_against_the_sdk(
    events: list[dict[str, Any]],
    server: FakeAnthropic,
    provider: AnthropicProvider,
    sdk: anthropic.AsyncAnthropic,
) -> None:
    # The SDK's message so far is what it has made of the events before a failure.
    whole = [event for event in events if event.get("type") != "error"]
    server.enqueue(Reply.from_events(whole), Reply.from_events(events).in_writes(7), Reply.from_events(whole))
    async with sdk.beta.messages.stream(model=MODEL, max_tokens=100, messages=MESSAGES) as stream:
        message = await stream.get_final_message()
    theirs: dict[str, Any] = message.to_dict()
    request = ProviderRequest(
        model=MODEL,
        max_tokens=100,
        messages=[ProviderMessage(role="user", blocks=[{"type": "text", "text": "Hello"}])],
    )
    ours: list[Any] = []
    failed = False
    try:
        async for event in provider.stream(request):
            ours.append(event)  # noqa: PERF401 - what came before a failure counts
    except ProviderError:
        failed = True

    assert failed == (len(whole) < len(events))
    blocks = folded(ours)
    assert comparable(blocks) == comparable(theirs["content"])
    assert storable(blocks) == blocks
    json.dumps(blocks, allow_nan=False)
    (began,) = [event for event in ours if isinstance(event, Began)]
    usage = [event for event in ours if isinstance(event, UsageSeen)][-1]
    assert {name: getattr(usage.usage, name) for name in COUNTS} == {name: theirs["usage"].get(name) for name in COUNTS}
    ended = ours[-1]
    if failed or events[-1]["type"] != "message_stop":
        assert not isinstance(ended, Ended)
        assert not usage.final
        return
    assert isinstance(ended, Ended)
    assert usage.final
    assert ended.stop_reason == theirs["stop_reason"]
    assert ended.details.get("model", began.model) == theirs["model"]
    for field in ("stop_sequence", "stop_details", "context_management"):
        assert ended.details.get(field) == theirs.get(field)
    assert ended.details.get("container", {}).get("id") == (message.container and message.container.id)

    if BETA_BLOCKS.isdisjoint(block["type"] for block in blocks):
        async with sdk.messages.stream(model=MODEL, max_tokens=100, messages=MESSAGES) as stable:
            content = (await stable.get_final_message()).to_dict()["content"]
        assert comparable(blocks) == comparable(content)


def comparable(content: Any) -> Any:
    """Without what is known to differ: nulls, characters in two halves, and tool input that was cut off."""
    blocks = without_nulls(storable(content))
    for block in blocks:
        if "partial_json" in block:
            block["input"] = from_json(block.pop("partial_json").encode(), partial_mode=True)
    return blocks


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
