"""The site's one entry point, for HTTP and WebSocket."""

from __future__ import annotations

import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "chatproject.settings")
site = get_asgi_application()

from streaming_chat.asgi import with_streaming_chat  # noqa: E402  (it needs the apps loaded)

application = with_streaming_chat(site)
