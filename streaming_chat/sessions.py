"""Who is behind a connection, asked again: a session can end long before the socket that it opened."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.contrib.auth import SESSION_KEY, get_user, get_user_model
from django.contrib.auth.models import AnonymousUser
from django.http import HttpRequest

if TYPE_CHECKING:
    from django.contrib.auth.base_user import AbstractBaseUser

    AnyUser = AbstractBaseUser | AnonymousUser


def identity(user: Any, session: Any) -> Callable[[], AnyUser]:
    """A function that says who the user is now: the same one, or nobody if signed out, deactivated or replaced.

    It blocks: run it in a database thread.

    Args:
        user: Who opened the connection.
        session: The session that said so; None, or one without a user, if it was something else.
    """
    session_key = session.session_key if session is not None and SESSION_KEY in session else None
    user_id = user.pk

    def now() -> AnyUser:
        if session_key is not None:
            request = HttpRequest()
            request.session = import_module(settings.SESSION_ENGINE).SessionStore(session_key)
            found: AnyUser | None = get_user(request)
        else:
            found = get_user_model()._default_manager.filter(pk=user_id).first()
        if found is None or found.pk != user_id or not found.is_active:
            return AnonymousUser()
        return found

    return now
