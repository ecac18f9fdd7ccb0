"""Claude, through the Anthropic SDK. The only module that imports it.

The SDK opens the request and owns the connections. The bytes of the answer are read here, because its typed
events cost several times as much and hide pings; requests are posted without its typed methods, which warn about
models.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Final

import anthropic
from anthropic.resources.messages import DEPRECATED_MODELS

from ..conf import ChatSettings, get_settings
from ..exceptions import ProviderError
from .base import Ended, ProviderEvent, ProviderRequest
from .messages_errors import response_failure
from .messages_request import request_body, request_headers
from .messages_stream import MessageStream

if TYPE_CHECKING:
    from httpx2 import Response

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_SECONDS: Final = 10.0
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
"""Longest answer that is taken in one piece."""
REST_SECONDS: Final = 0.2
"""How long to wait for the end of the response after the end of the answer; then its connection is reused."""


def deprecated_models() -> Mapping[str, str]:
    """Models that are about to go, with the date in words, as this version of the SDK knows them."""
    return DEPRECATED_MODELS


class AnthropicProvider:
    """Asks the Anthropic Messages API. One instance, with its pool of connections, per event loop.

    A failed request is not repeated here; that is the engine's decision. What breaks before the first event of
    an answer is ``provider_unreachable``, what breaks later is a cut: the stream returns without ``Ended``. A
    response that is no answer (a proxy's page, nothing at all, broken JSON) is ``provider_error``, retryable as
    long as no event of the answer has come.

    Args:
        settings: Key, address and longest wait; None for the site's.
    """

    name = "anthropic"

    def __init__(self, settings: ChatSettings | None = None) -> None:
        self._settings = settings or get_settings()
        self._client: anthropic.AsyncAnthropic | None = None
        self._farewell: AsyncGenerator[None, None] | None = None

    async def stream(self, request: ProviderRequest) -> AsyncGenerator[ProviderEvent, None]:
        """Ask once and yield what comes.

        Closing or cancelling it releases the connection before anything is waited for, so a second cancel
        leaves nothing open.

        Raises:
            ProviderError: See :mod:`streaming_chat.providers.messages_errors`.
        """
        answer = await self._ask(request)
        try:
            response = answer.response
            request_id = response.headers.get("request-id", "")
            reader = MessageStream(model=request.model, request_id=request_id)
            if not request.stream:
                for event in reader.feed_whole(await _read_whole(response)):
                    yield event
                return
            if not response.headers.get("content-type", "").lower().startswith("text/event-stream"):
                raise _no_answer(request_id)
            async with aclosing(_read_chunks(response, reader)) as chunks:
                async for chunk in chunks:
                    for event in reader.feed(chunk):
                        if type(event) is Ended:
                            await _read_rest(chunks)
                        yield event
            if not reader.began:
                raise _no_answer(request_id)
        finally:
            with suppress(Exception):
                await answer.close()

    async def aclose(self) -> None:
        """Close the pool of connections, and with it whatever is still read from them."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _until_the_loop_ends(self) -> AsyncGenerator[None, None]:
        """Close the connections when the event loop does: loops close their generators, and know nothing of us."""
        try:
            yield
        finally:
            await self.aclose()

    async def _ask(self, request: ProviderRequest) -> anthropic.AsyncStream[object]:
        body, headers = request_body(request), request_headers(request)
        try:
            client = self._connected()
            if self._farewell is None:
                self._farewell = self._until_the_loop_ends()
                await anext(self._farewell)
            if client.api_key is None and client.auth_token is None and client.credentials is None:
                raise ProviderError("provider_auth")
            # ``stream`` is about the response's body here, which is read by us either way.
            return await client.post(
                "/v1/messages",
                cast_to=object,
                body=body,
                options={"headers": headers},
                stream=True,
                stream_cls=anthropic.AsyncStream[object],
            )
        except ProviderError:
            raise
        except anthropic.APIStatusError as error:
            failure = response_failure(error.status_code, error.body, error.response.headers)
        except (anthropic.CredentialsError, TypeError, ValueError) as error:
            code = "provider_auth" if isinstance(error, anthropic.CredentialsError) else "provider_rejected"
            failure = ProviderError(code)
            _log(error, failure)
        except Exception as error:  # noqa: BLE001 - of the SDK, its two HTTP libraries, TLS or the network
            failure = ProviderError("provider_unreachable", retryable=True, may_be_billed=not _never_connected(error))
            _log(error, failure)
        # Outside of the handlers: what they caught may hold the prompt or the key.
        raise failure

    def _connected(self) -> anthropic.AsyncAnthropic:
        if self._client is None:
            # The engine's deadlines end a turn; this ends a read that nobody watches.
            timeout = anthropic.Timeout(
                self._settings.turn_timeout_seconds,
                connect=CONNECT_TIMEOUT_SECONDS,
                pool=CONNECT_TIMEOUT_SECONDS,
            )
            self._client = anthropic.AsyncAnthropic(
                api_key=self._settings.resolved_api_key(),
                base_url=self._settings.resolved_base_url(),
                timeout=timeout,
                max_retries=0,
                http_client=anthropic.DefaultAioHttpClient(timeout=timeout),
            )
        return self._client


async def _read_chunks(response: Response, reader: MessageStream) -> AsyncGenerator[bytes, None]:
    """The response's bytes as they arrive; a loss of the connection ends them, once the answer has begun."""
    # Somebody on the way may encode in spite of our wish; otherwise the decoding layer is left out.
    is_encoded = response.headers.get("content-encoding", "identity") != "identity"
    failure = None
    try:
        async with aclosing(response.aiter_bytes() if is_encoded else response.aiter_raw()) as chunks:
            async for chunk in chunks:
                yield chunk
    except Exception as error:  # noqa: BLE001 - the SDK lets the errors of its HTTP libraries through
        failure = _broken(response, error)
    if failure is not None and not reader.began:
        raise failure


async def _read_rest(chunks: AsyncGenerator[bytes, None]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(REST_SECONDS):
            async for _ in chunks:
                pass


async def _read_whole(response: Response) -> bytes:
    body = bytearray()
    try:
        async with aclosing(response.aiter_bytes()) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > MAX_MESSAGE_BYTES:
                    break
            else:
                return bytes(body)
        failure = ProviderError("provider_error", request_id=response.headers.get("request-id"), may_be_billed=True)
    except Exception as error:  # noqa: BLE001 - as above
        # The whole answer was made before its first byte came, so asking again would be billed again.
        failure = _broken(response, error, retryable=False)
    raise failure


def _no_answer(request_id: str) -> ProviderError:
    """The failure of a response that is no answer: a proxy's page, or nothing at all."""
    return ProviderError("provider_error", retryable=True, request_id=request_id or None, may_be_billed=True)


def _never_connected(error: BaseException | None) -> bool:
    """Whether the request did not reach anybody, by the names that the HTTP libraries share."""
    while error is not None:
        if type(error).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _broken(response: Response, error: Exception, *, retryable: bool = True) -> ProviderError:
    failure = ProviderError(
        "provider_unreachable",
        retryable=retryable,
        request_id=response.headers.get("request-id"),
        may_be_billed=True,
    )
    _log(error, failure)
    return failure


def _log(error: Exception, failure: ProviderError) -> None:
    # Only the kind of error: its message may hold what was sent.
    logger.info("Anthropic request %s: %s (%s)", failure.request_id, failure.code, type(error).__name__)
