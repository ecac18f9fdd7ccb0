"""What a host can listen to. Receivers may be async; one that raises is logged and stops nothing."""

from __future__ import annotations

import logging
from typing import Any

from django.dispatch import Signal

logger = logging.getLogger(__name__)

turn_finished = Signal()
"""A turn became terminal. Arguments: ``turn_id`` (UUID) and ``status`` (see ``Turn.Status``)."""


async def send(signal: Signal, **arguments: Any) -> None:
    """Send ``signal`` to all receivers, whatever any of them does."""
    for receiver, result in await signal.asend_robust(sender=None, **arguments):
        if isinstance(result, Exception):
            logger.error("receiver %r failed: %s", receiver, type(result).__name__)
