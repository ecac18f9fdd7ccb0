"""Every error that a caller can meet.

    ChatError
    ├── InvalidInputError     what was sent can't be understood   (bad_json, bad_type, bad_field, bad_text, too_large …)
    ├── NotFoundError         unknown, deleted or somebody else's: one answer for all three
    ├── ForbiddenError        visible, but not allowed
    ├── SignedOutError        the session ended
    ├── ConflictError         the client id was used for another message
    ├── BusyError             the conversation already has a running turn
    ├── RateLimitedError      too much, too often
    ├── DrainingError         this process is shutting down
    └── ProviderError         the model's provider failed; ``code`` says how

``code`` is part of the wire contract and never renamed. ``sentence`` is what a person reads; transports translate
it and fill in ``params``. Neither ever holds a prompt, a key or a provider's own words.
"""

from __future__ import annotations

from typing import Any, Final


def _(sentence: str) -> str:
    """Mark ``sentence`` for translation; the transport that shows it translates it."""
    return sentence


class ChatError(Exception):
    """Something the caller must be told about.

    Args:
        field: Path of the offending field, such as ``"text"``; None where no field is to blame.
        retry_after_seconds: When trying again makes sense; None if unknown.
        params: Values for the placeholders of :attr:`sentence`.
    """

    code: str = "internal_error"
    http_status: int = 500
    sentence: str = _("Something went wrong on our side. What you see is saved.")

    def __init__(self, *, field: str | None = None, retry_after_seconds: float | None = None, **params: Any) -> None:
        self.field = field
        self.retry_after_seconds = retry_after_seconds
        self.params = params
        super().__init__(self.code if field is None else f"{self.code} ({field})")


class InvalidInputError(ChatError):
    """What was sent can't be accepted as it is; sending it again changes nothing."""

    code = "bad_field"
    http_status = 400
    sentence = _("This part of the request is missing, unknown or of the wrong type.")

    SENTENCES: Final = {
        "bad_json": _("This is not valid JSON."),
        "bad_type": _("This type of message is unknown."),
        "bad_field": sentence,
        "bad_text": _("The message is empty or holds characters that can't be stored."),
        "binary_unsupported": _("Binary messages are not supported; send JSON text."),
        "too_large": _("The message is too long."),
    }

    def __init__(self, code: str = "bad_field", *, field: str | None = None, **params: Any) -> None:
        self.code = code
        self.sentence = self.SENTENCES[code]
        if code == "too_large":
            self.http_status = 413
        super().__init__(field=field, **params)


class NotFoundError(ChatError):
    """Unknown, deleted, or not for this user: deliberately the same answer."""

    code = "not_found"
    http_status = 404
    sentence = _("There is nothing here, or it is not for you.")


class ForbiddenError(ChatError):
    """The user may see this, but not do that with it."""

    code = "forbidden"
    http_status = 403
    sentence = _("You are not allowed to do this.")


class SignedOutError(ChatError):
    """The session behind this connection has ended."""

    code = "signed_out"
    http_status = 401
    sentence = _("Please sign in again. Your draft is kept.")


class ConflictError(ChatError):
    """The client id already belongs to a message with other content."""

    code = "conflict"
    http_status = 409
    sentence = _("This id was already used for another message.")


class BusyError(ChatError):
    """The conversation has an active turn; only one runs at a time."""

    code = "busy"
    http_status = 409
    sentence = _("The assistant is still replying. Wait for it or stop it first.")


class RateLimitedError(ChatError):
    """The caller sends or opens more than it may."""

    code = "rate_limited"
    http_status = 429
    sentence = _("Too many requests. Try again in a moment.")


class DrainingError(ChatError):
    """The process is shutting down and takes no new work; another one will."""

    code = "draining"
    http_status = 503
    sentence = _("The server is restarting. Try again in a moment.")


class ProviderError(ChatError):
    """The provider failed; one of :data:`TURN_ERRORS` says how.

    Args:
        code: A key of :data:`TURN_ERRORS`.
        retryable: Whether asking again may help, as long as nothing of the answer was journaled.
        retry_after_seconds: What the provider asked us to wait; None if it did not say.
        request_id: The provider's own id of the request, for its support; None if there was no answer.
        may_be_billed: Whether the provider may have worked on the request although no answer of it has come.
    """

    http_status = 502

    def __init__(
        self,
        code: str,
        *,
        retryable: bool = False,
        retry_after_seconds: float | None = None,
        request_id: str | None = None,
        may_be_billed: bool = False,
    ) -> None:
        self.code = code
        self.sentence = TURN_ERRORS[code]
        self.retryable = retryable
        self.request_id = request_id
        self.may_be_billed = may_be_billed
        super().__init__(retry_after_seconds=retry_after_seconds)


TURN_ERRORS: Final[dict[str, str]] = {
    # the provider
    "provider_unreachable": _("The assistant can't be reached right now. Try again."),
    "provider_rate_limited": _("The assistant is busy. Try again in a moment."),
    "provider_overloaded": _("The assistant is overloaded. Try again in a moment."),
    "provider_quota": _("The quota for the assistant is used up."),
    "provider_auth": _("The assistant is not set up correctly. Please tell the site's staff."),
    "provider_rejected": _("The assistant could not accept this conversation."),
    "provider_model": _("The chosen model is not available."),
    "provider_too_large": _("This conversation is too long for the assistant."),
    "provider_error": _("The assistant had a problem. What you see is saved."),
    "stream_cut": _("The reply was cut off. What you see is saved."),
    "unknown_tool": _("The assistant asked for a tool that this site does not have."),
    # deadlines
    "first_event_timeout": _("The assistant did not start to answer in time."),
    "no_bytes_timeout": _("The connection to the assistant went silent. What you see is saved."),
    "no_progress_timeout": _("The assistant made no progress. What you see is saved."),
    "turn_timeout": _("The reply took too long and was ended. What you see is saved."),
    # this site
    "queue_timeout": _("The message waited too long for a free place. Try again."),
    "owner_lost": _("The reply was interrupted. What you see is saved."),
    "shutdown": _("The reply was interrupted by a restart. What you see is saved."),
    "storage_stalled": _("The reply could not be saved fast enough and was ended. What you see is saved."),
    "internal_error": ChatError.sentence,
}
"""Why a turn did not complete: the code stored on it, and the sentence a person reads."""

STOP_REASONS: Final[dict[str, str]] = {
    "max_tokens": _("The reply reached its length limit."),
    "model_context_window_exceeded": _("The conversation has become too long for the assistant."),
    "pause_turn": _("The assistant paused here. Ask it to go on."),
    "refusal": _("The assistant declined to answer this."),
}
"""Why a completed reply ends where a person would not expect it; a stop reason that is not here needs no words."""
