from __future__ import annotations

import inspect

import pytest

from streaming_chat import exceptions
from streaming_chat.exceptions import TURN_ERRORS, ChatError, InvalidInputError, ProviderError
from streaming_chat.protocol import problem

PLAIN = [
    error
    for _, error in inspect.getmembers(exceptions, inspect.isclass)
    if issubclass(error, ChatError) and error not in (InvalidInputError, ProviderError)
]
CODES = {
    "bad_json": 400,
    "bad_type": 400,
    "bad_field": 400,
    "bad_text": 400,
    "binary_unsupported": 400,
    "too_large": 413,
}


def test_the_codes_and_statuses_that_clients_know_are_these() -> None:
    assert {error.code: error.http_status for error in PLAIN} == {
        "internal_error": 500,
        "not_found": 404,
        "forbidden": 403,
        "signed_out": 401,
        "conflict": 409,
        "busy": 409,
        "rate_limited": 429,
        "draining": 503,
    }


@pytest.mark.parametrize(("code", "status"), CODES.items())
def test_each_kind_of_invalid_input_has_its_status_and_sentence(code: str, status: int) -> None:
    error = InvalidInputError(code, field="text")
    assert (error.code, error.http_status, error.field) == (code, status, "text")
    assert problem(error, "7") == {
        "type": "error",
        "ref": "7",
        "code": code,
        "detail": InvalidInputError.SENTENCES[code],
        "field": "text",
    }


def test_one_invalid_input_does_not_change_the_next() -> None:
    InvalidInputError("too_large")
    assert (InvalidInputError().code, InvalidInputError().http_status) == ("bad_field", 400)


@pytest.mark.parametrize("code", TURN_ERRORS)
def test_a_provider_error_has_the_sentence_of_its_code(code: str) -> None:
    error = ProviderError(code, retryable=True, retry_after_seconds=2.5, request_id="req_1")
    assert (error.code, error.sentence, error.http_status) == (code, TURN_ERRORS[code], 502)
    assert (error.retryable, error.retry_after_seconds, error.request_id) == (True, 2.5, "req_1")
    assert problem(error)["retry_after_seconds"] == 2.5
    assert "field" not in problem(error)


def test_an_unknown_code_is_a_mistake_of_the_programmer() -> None:
    with pytest.raises(KeyError):
        ProviderError("no_such_code")
    with pytest.raises(KeyError):
        InvalidInputError("no_such_code")


def test_a_sentence_is_translated_before_its_parameters_are_filled_in() -> None:
    class CountedError(ChatError):
        sentence = "%(count)s left"

    event = problem(CountedError(count=3), translate={"%(count)s left": "noch %(count)s"}.__getitem__)
    assert event["detail"] == "noch 3"


@pytest.mark.parametrize("error", PLAIN)
def test_every_error_prints_its_code_and_field_only(error: type[ChatError]) -> None:
    assert str(error()) == error.code
    assert str(error(field="text", secret="prompt")) == f"{error.code} (text)"
