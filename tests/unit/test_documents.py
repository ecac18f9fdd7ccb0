"""The documentation cannot rot: its links lead somewhere, its Python compiles, its names exist."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pytest_django import Settings

from streaming_chat import api, exceptions, sse
from streaming_chat.conf import get_settings
from streaming_chat.exceptions import TURN_ERRORS, ChatError, InvalidInputError, ProviderError
from tests.services import ROOT

DOCUMENTS = sorted(
    [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *(ROOT / "docs").rglob("*.md")]
)
FENCE = re.compile(r"^```(?P<language>\S*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (?P<title>.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """A code block and where it is."""

    document: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def prose(document: Path) -> str:
    """The document without its code blocks."""
    return FENCE.sub("", document.read_text())


def blocks(document: Path) -> Iterator[Block]:
    """The document's code blocks."""
    text = document.read_text()
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(document, line, match["language"], match["code"])


def anchors(document: Path) -> set[str]:
    """What can follow ``#`` in a link to the document: its headings, as the forges write them."""
    titles = (match["title"].lower().replace("`", "") for match in HEADING.finditer(prose(document)))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


LINKS = [
    pytest.param(document, target, id=f"{document.relative_to(ROOT)}: {target}")
    for document in DOCUMENTS
    for target in sorted({match["target"] for match in LINK.finditer(prose(document))})
    if "://" not in target
]
PYTHON = [block for document in DOCUMENTS for block in blocks(document) if block.language == "python"]


@pytest.mark.parametrize(("document", "target"), LINKS)
def test_a_relative_link_leads_somewhere(document: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    destination = (document.parent / path).resolve() if path else document
    assert destination.exists()
    assert not anchor or anchor in anchors(destination)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_in_the_documentation_compiles(block: Block) -> None:
    compile(block.code, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_what_the_documentation_imports_of_the_app_is_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "streaming_chat":
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize("block", [block for block in PYTHON if block.code.startswith("STREAMING_CHAT")], ids=str)
def test_settings_in_the_documentation_are_accepted(block: Block, settings: Settings) -> None:
    shown: dict[str, Any] = {}
    exec(block.code, shown)
    settings.STREAMING_CHAT = shown["STREAMING_CHAT"]
    get_settings()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_every_code_block_is_closed_and_says_its_language(document: Path) -> None:
    assert len(re.findall("^```", document.read_text(), re.MULTILINE)) % 2 == 0
    assert [str(block) for block in blocks(document) if not block.language] == []


def documented_errors() -> dict[str, str]:
    """The rows of the page of error codes, each with the code's own row after it."""
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    requests, turns = page.split("\n## Turns\n")
    return {
        f"{kind}: {match['code']}": match[0]
        for kind, part in (("request", requests), ("turn", turns))
        for match in re.finditer(r"^\| `(?P<code>\w+)` \|.*$", part, re.MULTILINE)
    }


def request_errors() -> Iterator[ChatError]:
    """One of each error that a request can be refused with."""
    modules = {module.__name__ for module in (exceptions, api, sse)}
    kinds: list[type[ChatError]] = [ChatError]
    seen: set[type[ChatError]] = {ProviderError}
    while kinds:
        kind = kinds.pop()
        if kind in seen or kind.__module__ not in modules:
            continue
        seen.add(kind)
        kinds.extend(kind.__subclasses__())
        if kind is InvalidInputError:
            yield from (InvalidInputError(code) for code in InvalidInputError.SENTENCES)
        else:
            yield kind()


def test_the_page_of_error_codes_has_every_code_with_its_sentence() -> None:
    rows = documented_errors()
    errors = {f"request: {error.code}": error for error in request_errors()}
    assert set(rows) == set(errors) | {f"turn: {code}" for code in TURN_ERRORS}
    for name, error in errors.items():
        status = "–" if error.code == "binary_unsupported" else str(error.http_status)
        assert f"| {status} | {error.sentence} |" in rows[name]
    for code, sentence in TURN_ERRORS.items():
        assert f"| {sentence} |" in rows[f"turn: {code}"]
