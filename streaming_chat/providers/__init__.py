"""Where answers come from: ``STREAMING_CHAT["PROVIDER"]`` chooses. The contract is in :mod:`.base`."""

from __future__ import annotations

from typing import Final, TypeAlias

from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from ..conf import ChatSettings, get_settings
from ..loops import PerLoop
from .base import Provider

ALIASES: Final = {
    "anthropic": "streaming_chat.providers.anthropic.AnthropicProvider",
    "demo": "streaming_chat.providers.demo.DemoProvider",
}

_Configuration: TypeAlias = tuple[ChatSettings, str, str | None, str | None]

_instances: PerLoop[list[tuple[_Configuration, Provider]]] = PerLoop(list)


def provider_class() -> type[Provider]:
    """The class of the configured provider. Imports it, and the Anthropic SDK where it is Anthropic's.

    Raises:
        ImproperlyConfigured: There is no such class.
    """
    name = get_settings().resolved_provider()
    try:
        return import_string(ALIASES.get(name, name))  # type: ignore[no-any-return]
    except ImportError as error:
        raise ImproperlyConfigured(f"STREAMING_CHAT['PROVIDER']: {error}") from error


def get_provider() -> Provider:
    """The running event loop's provider for the settings of now; other settings get another instance.

    Raises:
        ImproperlyConfigured: There is no such provider.
    """
    settings = get_settings()
    configuration = (
        settings,
        settings.resolved_provider(),
        settings.resolved_api_key(),
        settings.resolved_base_url(),
    )
    instances = _instances()
    if not instances or instances[-1][0] != configuration:
        instances.append((configuration, provider_class()()))
    return instances[-1][1]


async def aclose_providers() -> None:
    """Close the running event loop's providers; the next :func:`get_provider` makes a new one."""
    for _, provider in _instances.forget() or ():
        await provider.aclose()
