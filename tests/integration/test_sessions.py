"""Who is behind a connection, asked again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth import login
from django.contrib.sessions.backends.db import SessionStore
from django.http import HttpRequest

from streaming_chat.sessions import identity

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.contrib.auth.models import User

pytestmark = pytest.mark.django_db


def signed_in(user: User) -> SessionStore:
    request = HttpRequest()
    request.session = SessionStore()
    login(request, user, "django.contrib.auth.backends.ModelBackend")
    request.session.save()
    return SessionStore(request.session.session_key)


def deactivate(user: User, session: Any) -> None:
    user.is_active = False
    user.save()


def change_password(user: User, session: Any) -> None:
    user.set_password("another")
    user.save()


def sign_out(user: User, session: Any) -> None:
    session.flush()


def test_the_same_user_is_still_the_same(ann: User) -> None:
    assert identity(ann, signed_in(ann))() == ann


@pytest.mark.parametrize("act", [deactivate, change_password, sign_out])
def test_a_session_that_has_ended_is_nobodys(ann: User, act: Callable[[User, Any], None]) -> None:
    session = signed_in(ann)
    who = identity(ann, session)
    assert who() == ann
    act(ann, session)
    assert not who().is_authenticated


def test_a_session_that_belongs_to_somebody_else_now_is_nobodys(ann: User, bob: User) -> None:
    assert not identity(ann, signed_in(bob))().is_authenticated


def test_without_a_session_the_user_is_asked_for_by_key(ann: User) -> None:
    who = identity(ann, None)
    assert who() == ann
    deactivate(ann, None)
    assert not who().is_authenticated
