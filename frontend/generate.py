"""Writes ``src/protocol.ts`` and ``src/strings.ts`` from the Python definitions, which are their one source.

``python frontend/generate.py`` writes them; a test fails when they differ from what it would write.
"""

from __future__ import annotations

import json
import sys
import types
import typing
import uuid
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

SOURCE = Path(__file__).resolve().parent / "src"
sys.path.insert(0, str(SOURCE.parent.parent))

from pydantic import BaseModel  # noqa: E402
from typing_extensions import NotRequired, get_type_hints, is_typeddict  # noqa: E402

from streaming_chat import blocks, protocol  # noqa: E402
from streaming_chat.templatetags.element_strings import STRINGS  # noqa: E402

HEAD = "// Written by generate.py from the Python definitions. Do not edit.\n\n"
NAMES: dict[Any, str] = {
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    uuid.UUID: "string",
    type(None): "null",
    Any: "unknown",
    blocks.Block: "Block",
    blocks.Op: "Op",
}


def type_of(annotation: Any) -> str:
    """The TypeScript type of a Python annotation."""
    if annotation in NAMES:
        return NAMES[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return type_of(arguments[0])
    if origin is Literal:
        return " | ".join(json.dumps(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_of(argument) for argument in arguments)
    if origin is list:
        return f"{type_of(arguments[0])}[]"
    if origin is dict:
        return f"Record<{type_of(arguments[0])}, {type_of(arguments[1])}>"
    return str(annotation.__name__)


def interface(shape: type) -> str:
    """The TypeScript interface of a typed dictionary or a command."""
    doc = (shape.__doc__ or "").strip().splitlines()[0]
    lines = [f"/** {doc} */", f"export interface {shape.__name__} {{"]
    for name, annotation in get_type_hints(shape, include_extras=True).items():
        if get_origin(annotation) is typing.ClassVar:
            continue
        optional = False
        if get_origin(annotation) is NotRequired:
            annotation, optional = get_args(annotation)[0], True
        if issubclass(shape, BaseModel):
            optional = not shape.model_fields[name].is_required()
        lines.append(f"  {name}{'?' if optional else ''}: {type_of(annotation)};")
    return "\n".join([*lines, "}"])


def protocol_types() -> str:
    """The text of ``protocol.ts``."""
    forms = [shape for shape in vars(protocol).values() if is_typeddict(shape) and shape.__module__ == protocol.__name__]
    ops, events, commands = (get_args(union) for union in (blocks.Op, protocol.Event, protocol.Command))
    parts = [
        f"export const PROTOCOL_VERSION = {protocol.PROTOCOL_VERSION};",
        "/** A content block as the API has it; unknown types are kept as they came. */\n"
        "export interface Block {\n  type?: string;\n  [field: string]: unknown;\n}",
        f"export type TurnStatus = {type_of(protocol.TurnStatus)};",
        *(interface(op) for op in ops),
        *(interface(form) for form in forms if form not in ops),
        *(interface(command) for command in commands),
    ]
    for name, union in (("Op", ops), ("ChatEvent", events), ("Command", commands)):
        parts.append(f"export type {name} = {' | '.join(member.__name__ for member in union)};")
    return HEAD + "\n\n".join(parts) + "\n"


def strings() -> str:
    """The text of ``strings.ts``."""
    table = "".join(f"  {key}: {json.dumps(text, ensure_ascii=False)},\n" for key, text in STRINGS.items())
    return (
        HEAD + f"/** What the element says, in English; the server renders translations of the same keys. */\n"
        f"export const STRINGS = {{\n{table}}};\n\nexport type Strings = typeof STRINGS;\n"
    )


FILES = {"protocol.ts": protocol_types, "strings.ts": strings}

if __name__ == "__main__":
    for name, text in FILES.items():
        (SOURCE / name).write_text(text(), encoding="utf-8")
