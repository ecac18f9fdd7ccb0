"""The site's own pages."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from asgiref.sync import sync_to_async
from django.db import connection
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache

from streaming_chat.generation.runner import get_runner

if TYPE_CHECKING:
    from django.http import HttpRequest


@never_cache
def home(request: HttpRequest) -> HttpResponse:
    """Welcome a visitor; lead a user to the chat."""
    if request.user.is_authenticated:
        return redirect("/chat/")
    return render(request, "home.html")


@never_cache
async def health(request: HttpRequest) -> HttpResponse:
    """Answer 200 while the process serves and reaches its database; 503 once it was asked to stop."""
    runner = get_runner.existing()
    if runner is not None and runner.draining:
        return HttpResponse("draining\n", content_type="text/plain", status=HTTPStatus.SERVICE_UNAVAILABLE)
    await sync_to_async(_ask_database)()
    return HttpResponse("ok\n", content_type="text/plain")


def _ask_database() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
