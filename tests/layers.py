"""The backend's channel layer, losing, doubling and reordering what is sent to groups as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.utils.module_loading import import_string

BACKEND: str = settings.CHANNEL_LAYERS["default"]["BACKEND"]
"""The real one; read before a test puts this one in its place."""


class FaultyChannelLayer:
    """Asks ``fault`` what happens to each message: ``"send"``, ``"lose"``, ``"double"``, ``"late"`` or ``"raise"``.

    A late message is sent after the next one that is not. While ``joins_return`` is cleared, joining a group hangs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._layer: Any = import_string(BACKEND)(*args, **kwargs)
        self.fault: Callable[[dict[str, Any]], str] = lambda message: "send"
        self.faults: list[str] = []
        self._late: list[tuple[str, dict[str, Any]]] = []
        self.joins_return = asyncio.Event()
        self.joins_return.set()
        self.joining: list[str] = []
        self.joined: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    async def group_add(self, group: str, channel: str) -> None:
        self.joining.append(group)
        try:
            await self.joins_return.wait()
            await self._layer.group_add(group, channel)
        finally:
            self.joining.remove(group)
        self.joined.append(group)

    async def group_send(self, group: str, message: dict[str, Any]) -> None:
        fate = self.fault(message)
        self.faults.append(fate)
        if fate == "raise":
            raise ConnectionError("the layer is away")
        if fate == "late":
            self._late.append((group, message))
        if fate in ("send", "double"):
            await self._layer.group_send(group, message)
            if fate == "double":
                await self._layer.group_send(group, message)
            late, self._late = self._late, []
            for group_of_late, late_message in reversed(late):
                await self._layer.group_send(group_of_late, late_message)
