"""What a host can listen to. Receivers may be async; one that raises is logged and stops nothing."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from django.dispatch import Signal

RECEIVER_SECONDS: Final = 5.0

logger = logging.getLogger(__name__)

turn_finished = Signal()
"""A turn became terminal. Arguments: ``turn_id`` (UUID) and ``status`` (see ``Turn.Status``)."""


async def send(signal: Signal, **arguments: Any) -> None:
    """Send ``signal`` to all receivers, whatever any of them does; wait for them :data:`RECEIVER_SECONDS` at most."""
    try:
        async with asyncio.timeout(RECEIVER_SECONDS):
            results = await signal.asend_robust(sender=None, **arguments)
    except TimeoutError:
        logger.error("a receiver of %r takes too long and is left alone", sorted(arguments))
        return
    for receiver, result in results:
        if isinstance(result, Exception):
            logger.error("receiver %r failed: %s", receiver, type(result).__name__)
