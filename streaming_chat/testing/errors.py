"""The errors of the Messages API, in its own form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

TYPE_OF_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
STATUS_OF_TYPE = {type_: status for status, type_ in TYPE_OF_STATUS.items()}


class ApiError(Exception):
    """A request that the API refuses or fails.

    Args:
        status: The HTTP status.
        type: The broad category; ``None`` for the API's own for that status.
        message: A sentence for people; ``None`` for a plain one.
        details: What the API calls ``details``: an ``error_code`` and what belongs to it.
        headers: Sent besides the usual ones.

    """

    def __init__(
        self,
        status: int,
        type: str | None = None,  # noqa: A002 - the API's own name
        message: str | None = None,
        *,
        details: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.type = type or TYPE_OF_STATUS.get(status, "invalid_request_error" if status < 500 else "api_error")
        self.message = message or f"The fake server answers {status} here."
        self.details = details
        self.headers = dict(headers or {})
        super().__init__(f"{self.status} {self.type}: {self.message}")

    def body(self, request_id: str) -> dict[str, Any]:
        """Return the JSON of the response."""
        error: dict[str, Any] = {"type": self.type, "message": self.message}
        if self.details is not None:
            error["details"] = dict(self.details)
        return {"type": "error", "error": error, "request_id": request_id}
