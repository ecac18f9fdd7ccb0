"""Everything under the prefix that the host chooses: ``path("chat/", include("streaming_chat.urls"))``."""

from __future__ import annotations

from typing import Any, cast

from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse
from django.urls import path

from . import views
from .api import api


def socket(request: HttpRequest, conversation_id: object) -> HttpResponse:
    """The chat's WebSocket, asked for over plain HTTP: the server is not ASGI, or a proxy drops the upgrade."""
    return HttpResponse(status=426, headers={"Upgrade": "websocket", "Connection": "Upgrade"})


app_name = "streaming_chat"

pages = [
    path("", views.index, name="index"),
    path("new/", views.new, name="new"),
    path("conversations/<uuid:conversation_id>/", views.conversation, name="conversation"),
    path("conversations/<uuid:conversation_id>/send/", views.send_form, name="send_form"),
    path("conversations/<uuid:conversation_id>/socket/", socket, name="socket"),
]
endpoints, api_name, namespace = api.urls

# With ATOMIC_REQUESTS, Django would refuse asynchronous views. What is changed here has transactions of its own.
for endpoint in (*pages, *endpoints):
    for alias in connections:
        transaction.non_atomic_requests(using=alias)(cast("Any", endpoint.callback))

urlpatterns = [*pages, path("api/", (endpoints, api_name, namespace))]
