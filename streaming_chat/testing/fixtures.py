"""Pytest fixtures, loaded by ``pytest_plugins = ["streaming_chat.testing.fixtures"]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .server import FakeAnthropic

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def fake_anthropic(request: pytest.FixtureRequest) -> Iterator[FakeAnthropic]:
    """Run a fake Anthropic API, new for each test, that the site under test talks to.

    It runs in a thread of its own, so it serves synchronous tests, asynchronous ones and other processes
    alike. Where pytest-django has configured Django, the test's ``STREAMING_CHAT`` names it as the provider.
    """
    with FakeAnthropic() as server:
        if _django_is_configured(request.config):
            settings = request.getfixturevalue("settings")
            settings.STREAMING_CHAT = {
                **getattr(settings, "STREAMING_CHAT", {}),
                "PROVIDER": "anthropic",
                "ANTHROPIC_API_KEY": server.api_key,
                "ANTHROPIC_BASE_URL": server.base_url,
            }
        yield server


def _django_is_configured(config: pytest.Config) -> bool:
    if not config.pluginmanager.hasplugin("django"):
        return False
    from django.conf import settings  # noqa: PLC0415 - sites test without Django, too

    return bool(settings.configured)
