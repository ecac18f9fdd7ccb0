"""Which WebSockets are ours: those whose path Django's own URL patterns name ``socket``.

So the prefix under which a site includes ``streaming_chat.urls`` is written in one place.
"""

from __future__ import annotations

import logging
from io import BytesIO
from typing import Any, Final
from urllib.parse import urlsplit

from channels.auth import AuthMiddlewareStack
from django.conf import settings
from django.core.exceptions import DisallowedHost
from django.core.handlers.asgi import ASGIRequest
from django.urls import Resolver404, resolve
from django.utils.http import is_same_domain

from .consumers import ChatConsumer

SOCKET_URL_NAME: Final = "streaming_chat:socket"

logger = logging.getLogger(__name__)

_consumer: Any = AuthMiddlewareStack(ChatConsumer.as_asgi())


def socket_arguments(path: str) -> dict[str, Any] | None:
    """The arguments of the chat socket at ``path``; None if it is not one."""
    try:
        match = resolve(path)
    except Resolver404:
        return None
    return match.kwargs if match.view_name == SOCKET_URL_NAME else None


async def chat_socket(scope: Any, receive: Any, send: Any, arguments: dict[str, Any]) -> None:
    """Serve a chat socket, or refuse it with 403 if a page of another origin opens it.

    The rule is the one of Django's CSRF protection: the ``Origin`` must be this site's scheme, host and port, or one of
    ``CSRF_TRUSTED_ORIGINS``.
    """
    if not origin_allowed(scope):
        await receive()
        await send({"type": "websocket.close", "code": 4403})
        return
    await _consumer({**scope, "url_route": {"args": (), "kwargs": arguments}}, receive, send)


def origin_allowed(scope: Any) -> bool:
    """Whether the handshake's one ``Origin`` may open sockets here."""
    headers = list(scope.get("headers", ()))
    origins = [value.decode("latin-1") for name, value in headers if name.lower() == b"origin"]
    # Servers call a socket's scheme ws or wss, or leave it out; a page's origin has that of the page.
    scheme = "https" if scope.get("scheme") in ("wss", "https") else "http"
    request = ASGIRequest({**scope, "type": "http", "method": "GET", "scheme": scheme}, BytesIO())
    try:
        own = f"{request.scheme}://{request.get_host()}"
    except DisallowedHost:
        own = None
    if len(origins) == 1 and (origins[0].lower() == (own or "").lower() or _trusted(origins[0])):
        return True
    logger.warning("WebSocket refused: the page is of another origin")
    return False


def _trusted(origin: str) -> bool:
    try:
        parsed = urlsplit(origin)
        host = parsed.netloc
    except ValueError:
        return False
    for allowed in settings.CSRF_TRUSTED_ORIGINS:
        scheme, _, pattern = allowed.partition("://")
        if parsed.scheme == scheme and (
            host == pattern or ("*" in pattern and is_same_domain(host, pattern.lstrip("*")))
        ):
            return True
    return False
