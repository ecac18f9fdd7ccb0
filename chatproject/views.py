"""The site's own pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.db import connection
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache

if TYPE_CHECKING:
    from django.http import HttpRequest


@never_cache
def home(request: HttpRequest) -> HttpResponse:
    """Welcome a visitor; lead a user to the chat."""
    if request.user.is_authenticated:
        return redirect("/chat/")
    return render(request, "home.html")


@never_cache
def health(request: HttpRequest) -> HttpResponse:
    """Answer 200 while the process serves and reaches its database."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return HttpResponse("ok\n", content_type="text/plain")
