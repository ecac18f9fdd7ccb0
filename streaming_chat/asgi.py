"""One line for the host's ``asgi.py``.

::

    application = with_streaming_chat(get_asgi_application())

Everything of the app is imported inside the functions, so that this module can be imported before the apps are loaded,
wherever a formatter sorts the line to.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

Application: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]


def with_streaming_chat(application: Application) -> Application:
    """``application`` with the chat's sockets, and with turns that are recovered at the start and drained at the end.

    Everything else goes to ``application`` as before: HTTP, and WebSockets at paths that are not the chat's, if it is
    one that takes them (such as Channels' ``ProtocolTypeRouter``).
    """
    from django.core.handlers.asgi import ASGIHandler  # noqa: PLC0415

    from .providers import provider_class  # noqa: PLC0415
    from .routing import chat_socket, socket_arguments  # noqa: PLC0415

    provider_class()  # Importing the SDK takes a second, which the first turn should not pay.
    _hook_daphne()

    async def chat_application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket" and (arguments := socket_arguments(scope["path"])) is not None:
            await chat_socket(scope, receive, send, arguments)
        elif scope["type"] == "websocket" and isinstance(application, ASGIHandler):
            await receive()
            await send({"type": "websocket.close", "code": 4404})
        else:
            await application(scope, receive, send)

    return chat_application


async def _lifespan(receive: Any, send: Any) -> None:
    from . import lifecycle  # noqa: PLC0415

    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await lifecycle.start()
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            await lifecycle.stop()
            await send({"type": "lifespan.shutdown.complete"})
            return


async def _stop() -> None:
    """End everything, also what Daphne leaves running if a socket was opened within the last second.

    (Its ``kill_all_applications`` raises then.) A coroutine that is pending at the interpreter's exit can crash it.
    """
    from . import lifecycle  # noqa: PLC0415
    from .loops import end_tasks  # noqa: PLC0415

    await lifecycle.stop()
    await end_tasks(asyncio.all_tasks() - {asyncio.current_task()})


def _hook_daphne() -> None:
    """Start and drain with Daphne's reactor, because Daphne does not speak the lifespan protocol."""
    reactor: Any = sys.modules.get("twisted.internet.reactor")
    loop = getattr(reactor, "_asyncioEventloop", None)
    if loop is None or "daphne.server" not in sys.modules:
        return
    from twisted.internet.defer import Deferred  # noqa: PLC0415

    from . import lifecycle  # noqa: PLC0415

    reactor.callWhenRunning(lambda: asyncio.ensure_future(lifecycle.start(), loop=loop))
    reactor.addSystemEventTrigger(
        "before", "shutdown", lambda: Deferred.fromFuture(asyncio.ensure_future(_stop(), loop=loop))
    )
