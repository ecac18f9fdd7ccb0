"""What a process does when it starts and before it ends, whoever runs it: an ASGI server or a command."""

from __future__ import annotations

import asyncio

from .database import close_threads
from .generation.runner import get_runner
from .hub import get_hub
from .providers import aclose_providers


async def start() -> None:
    """Begin to claim waiting turns and to recover lost ones, before anybody asks."""
    get_runner().start()


async def stop() -> None:
    """Let running turns end within ``DRAIN_SECONDS``, settle the rest, and close every task, connection and thread."""
    runner = get_runner()
    runner.draining = True
    get_hub().dismiss()  # now, as other processes can show them the rest
    await runner.drain()
    await get_hub().close()
    await aclose_providers()
    await asyncio.to_thread(close_threads)
