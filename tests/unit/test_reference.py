"""What programs and operators rely on by name is named in the reference."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from streaming_chat import api as api  # noqa: PLC0414 - its errors are among those looked at
from streaming_chat import checks, consumers, protocol
from streaming_chat.conf import ChatSettings
from streaming_chat.exceptions import TURN_ERRORS, ChatError, InvalidInputError

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
REFERENCE = {page.name: page.read_text() for page in sorted((DOCS / "reference").glob("*.md"))}


def codes(error: type[ChatError] = ChatError) -> set[str]:
    """The code of every kind of error of the app. (Those of ``api`` and ``sse`` count, as ``api`` imports them.)"""
    own = {error.code} if error.__module__.startswith("streaming_chat") else set()
    return own.union(*(codes(kind) for kind in error.__subclasses__()))


def is_named(name: str, page: str) -> bool:
    return f"`{name}`" in REFERENCE[page]


@pytest.mark.parametrize("name", [field.name.upper() for field in dataclasses.fields(ChatSettings)])
def test_every_setting_is_in_the_reference(name: str) -> None:
    assert is_named(name, "settings.md")


@pytest.mark.parametrize(
    "kind", sorted(re.findall(r'    type: Literal\["(\w+)"\]', Path(protocol.__file__).read_text()))
)
def test_every_event_and_command_is_in_the_reference(kind: str) -> None:
    assert is_named(kind, "protocol.md")


@pytest.mark.parametrize("code", sorted(codes() | set(TURN_ERRORS) | set(InvalidInputError.SENTENCES)))
def test_every_error_code_is_in_the_reference(code: str) -> None:
    assert is_named(code, "errors.md")


@pytest.mark.parametrize("code", sorted(codes() - {"internal_error"}))
def test_every_refusal_is_beside_its_status(code: str) -> None:
    assert is_named(code, "http_api.md") or is_named(code, "protocol.md")


def test_every_close_code_is_in_the_reference() -> None:
    found = {value for name, value in vars(consumers).items() if name.startswith("CLOSE_")}
    assert len(found) >= 5
    assert {int(code) for code in re.findall(r"^\| (\d{4}) \|", REFERENCE["protocol.md"], re.MULTILINE)} >= found


def test_every_system_check_is_in_the_reference() -> None:
    source = Path(checks.__file__).read_text()
    found = set(re.findall(r'"([EWI]\d{3})"|TAG}\.([EWI]\d{3})', source))
    ids = {f"streaming_chat.{first or second}" for first, second in found}
    assert ids
    assert {name for name in ids if name not in REFERENCE["checks.md"]} == set()


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
