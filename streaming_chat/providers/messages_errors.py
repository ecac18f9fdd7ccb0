"""How the Messages API says that something failed, as :class:`~streaming_chat.exceptions.ProviderError`. Sans-I/O.

Statuses, error types and codes: https://platform.claude.com/docs/en/api/errors and the SDK's ``types/shared``. An
error inside a stream has status 200, so its type decides. Messages are only read where type and code say too little,
and never kept.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final

from ..exceptions import ProviderError

_CODE_OF_TYPE: Final = {
    "overloaded_error": "provider_overloaded",
    "rate_limit_error": "provider_rate_limited",
    "api_error": "provider_error",
    "timeout_error": "provider_error",
    "conflict_error": "provider_error",
    "invalid_request_error": "provider_rejected",
    "request_too_large": "provider_too_large",
    "authentication_error": "provider_auth",
    "permission_error": "provider_auth",
    "billing_error": "provider_quota",
    "not_found_error": "provider_model",
}
_CODE_OF_STATUS: Final = {
    401: "provider_auth",
    402: "provider_quota",
    403: "provider_auth",
    404: "provider_model",
    408: "provider_error",
    409: "provider_error",
    413: "provider_too_large",
    429: "provider_rate_limited",
    529: "provider_overloaded",
}
_RETRYABLE: Final = frozenset({"provider_error", "provider_overloaded", "provider_rate_limited"})

_ABOUT_MONEY: Final = re.compile(r"spend|quota|billing|credit", re.IGNORECASE)
_ABOUT_LENGTH: Final = re.compile(
    r"prompt is too long|too many (?:input )?tokens|context (?:limit|window|length)|too_large|request exceeds",
    re.IGNORECASE,
)


def response_failure(
    status: int, body: object, headers: Mapping[str, str], *, now: float | None = None
) -> ProviderError:
    """What an HTTP response that is no success means.

    Args:
        status: The HTTP status.
        body: Its JSON, or anything else.
        headers: Names in lower case, or a mapping that ignores case.
        now: Seconds since the epoch, for a ``retry-after`` date; None is the present.
    """
    error_type, error_code, message = _parts(body)
    retry_after_seconds = parse_retry_after(headers, now=now)
    code = _CODE_OF_STATUS.get(status) or _CODE_OF_TYPE.get(error_type)
    if code is None:
        code = "provider_rejected" if 400 <= status < 500 else "provider_error"
    if status >= 500 and error_type == "overloaded_error":
        code = "provider_overloaded"
    code = _refined(code, error_type, error_code, message, asks_to_wait=retry_after_seconds is not None)
    retryable = code in _RETRYABLE and status >= 400
    wish = headers.get("x-should-retry")
    if wish in ("true", "false"):
        retryable = wish == "true"
    return ProviderError(
        code,
        retryable=retryable,
        retry_after_seconds=retry_after_seconds,
        request_id=headers.get("request-id"),
    )


def event_failure(event: Mapping[str, Any], *, request_id: str | None) -> ProviderError:
    """What an ``error`` event inside a stream means."""
    error_type, error_code, message = _parts(event)
    code = _CODE_OF_TYPE.get(error_type, "provider_error")
    code = _refined(code, error_type, error_code, message, asks_to_wait=False)
    return ProviderError(code, retryable=code in _RETRYABLE and error_type in _CODE_OF_TYPE, request_id=request_id)


def parse_retry_after(headers: Mapping[str, str], *, now: float | None = None) -> float | None:
    """Seconds to wait, from ``retry-after-ms`` or ``retry-after`` (seconds or an HTTP date); None if unsaid.

    A date is compared with the response's own ``date``, so that our clock does not matter.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return max(milliseconds / 1000, 0.0)
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is not None:
        return max(seconds, 0.0)
    until = _timestamp(text)
    if until is None:
        return None
    present = _timestamp(headers.get("date"))
    if present is None:
        present = time.time() if now is None else now
    return max(until - present, 0.0)


def _refined(code: str, error_type: str, error_code: str, message: str, *, asks_to_wait: bool) -> str:
    """``code`` where the same status or type can mean two things."""
    if error_type == "billing_error" or re.search("spend_limit|billing", error_code):
        return "provider_quota"
    if code == "provider_rate_limited" and not asks_to_wait and _ABOUT_MONEY.search(message):
        return "provider_quota"
    if code == "provider_rejected":
        if error_type == "request_too_large" or _ABOUT_LENGTH.search(f"{error_code} {message}"):
            return "provider_too_large"
        if "credit balance" in message.lower():
            return "provider_quota"
    return code


def _parts(body: object) -> tuple[str, str, str]:
    error = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(error, Mapping):
        return "", "", ""
    details = error.get("details")
    error_code = details.get("error_code") if isinstance(details, Mapping) else None
    error_type, error_code, message = (
        part if isinstance(part, str) else "" for part in (error.get("type"), error_code, error.get("message"))
    )
    return error_type, error_code, message


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _timestamp(text: str | None) -> float | None:
    try:
        return parsedate_to_datetime(text or "").timestamp()
    except (ValueError, OverflowError):
        return None
