"""The wire contract, sans-I/O: commands in, events out, their JSON and SSE forms, and the cursor's gap rule.

A viewer follows one conversation. It starts with a ``snapshot`` and then gets two interleaved, numbered series:

- changes of the conversation (``turn``, ``finished``, ``conversation``) carry ``revision``, which grows by one;
- ``delta`` events of the running turn carry ``first`` and ``seq``, the journal entries they cover.

:class:`Cursor` applies the next number, drops what it has, and asks for a re-read on a gap. The browser has the same
rule; both are tested with the fixtures in ``tests/fixtures/cursor.json``.
"""

from __future__ import annotations

import enum
import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NotRequired, TypeAlias, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import TypedDict

from .blocks import Block, Op
from .exceptions import ChatError, InvalidInputError

PROTOCOL_VERSION: Final = 1
MIN_FRAME_LIMIT_BYTES: Final = 64 * 1024
MAX_FRAME_LIMIT_BYTES: Final = 960 * 1024
"""Below Daphne's 1 MiB, where the connection would just drop."""
MAX_CHAR_BYTES: Final = 12
"""Of one character in JSON: two escapes such as ``\\ud83d``."""
FRAME_ROOM_BYTES: Final = 4 * 1024
"""Of a command without its text."""
MAX_DEPTH: Final = 32
MAX_INTEGER_DIGITS: Final = 15
MAX_CLIENT_ID_CHARS: Final = 64

Shape = TypeVar("Shape", bound=BaseModel)

# ---------------------------------------------------------------------------------------------------- shapes


class ErrorForm(TypedDict):
    """Why something did not work: a stable code and a translated sentence."""

    code: str
    detail: str


class UsageForm(TypedDict):
    """Tokens of a turn, summed over its provider requests. ``exact`` is false when the stream was cut."""

    exact: bool
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


TurnStatus: TypeAlias = Literal["queued", "running", "completed", "stopped", "timed_out", "failed", "interrupted"]


class TurnForm(TypedDict):
    """A turn as every transport shows it. Times are seconds since it was queued; None: not yet."""

    id: str
    prompt_id: str
    reply_id: str
    status: TurnStatus
    stop_reason: str
    error: ErrorForm | None
    provider: str
    model: str
    seq: int
    elapsed_seconds: float
    first_text_seconds: float | None
    usage: UsageForm | None


class MessageForm(TypedDict):
    """A message as every transport shows it. ``turn`` is the one that made it; None for a user's message."""

    id: str
    parent_id: str | None
    role: Literal["user", "assistant"]
    author: str | None
    client_id: str | None
    blocks: list[Block]
    turn: TurnForm | None
    created_at: str


class ConversationForm(TypedDict):
    """A conversation without its messages. ``role`` is what the asking user may do."""

    id: str
    title: str
    model: str
    role: Literal["owner", "editor", "viewer"]
    archived: bool
    running: bool
    created_at: str
    updated_at: str


# ---------------------------------------------------------------------------------------------------- events


class Snapshot(TypedDict):
    """The whole state: what a viewer shows instead of all it had.

    ``messages`` are the last ones of the current branch, oldest first. ``turn`` is the branch's latest turn; while it
    runs, the reply's blocks hold journal entries 1 to ``turn.seq``.
    """

    type: Literal["snapshot"]
    protocol: int
    revision: int
    conversation: ConversationForm
    messages: list[MessageForm]
    has_earlier: bool
    turn: TurnForm | None


class TurnEvent(TypedDict):
    """A turn was accepted. ``messages`` are new; they follow their parent and replace what followed it before.

    ``title`` is the conversation's, which its first prompt may have given it.
    """

    type: Literal["turn"]
    revision: int
    title: str
    turn: TurnForm
    messages: list[MessageForm]


class Delta(TypedDict):
    """Journal entries ``first`` to ``seq`` of the turn: fold ``ops`` into the reply's blocks."""

    type: Literal["delta"]
    turn: str
    first: int
    seq: int
    ops: list[Op]


class Finished(TypedDict):
    """The turn is over; ``turn.status`` says how and ``turn.seq`` is its last entry."""

    type: Literal["finished"]
    revision: int
    turn: TurnForm


class ConversationEvent(TypedDict):
    """The conversation was renamed, archived or brought back."""

    type: Literal["conversation"]
    revision: int
    title: str
    archived: bool


class Progress(TypedDict):
    """Nothing streams, but the turn is alive. ``activity`` says what it waits for."""

    type: Literal["progress"]
    turn: str
    elapsed_seconds: float
    activity: Literal["queued", "waiting", "thinking", "tool", "writing"]


class Accepted(TypedDict):
    """The command ``ref`` was carried out and committed. ``duplicate``: it had been before."""

    type: Literal["accepted"]
    ref: str | None
    turn: str | None
    message: str | None
    duplicate: bool


class Problem(TypedDict):
    """The command ``ref`` was refused; nothing changed."""

    type: Literal["error"]
    ref: str | None
    code: str
    detail: str
    field: NotRequired[str]
    retry_after_seconds: NotRequired[float]


class Pong(TypedDict):
    """The answer to ``ping``."""

    type: Literal["pong"]
    ref: str | None


class Deleted(TypedDict):
    """The conversation is gone, or no longer for this user. The last event."""

    type: Literal["deleted"]


class Reconnect(TypedDict):
    """The process is about to stop: come back after a random delay up to ``within_seconds``."""

    type: Literal["reconnect"]
    within_seconds: float


Event: TypeAlias = (
    Snapshot
    | TurnEvent
    | Delta
    | Finished
    | ConversationEvent
    | Progress
    | Accepted
    | Problem
    | Pong
    | Deleted
    | Reconnect
)


def problem(error: ChatError, ref: str | None = None, *, translate: Callable[[str], str] = str) -> Problem:
    """The event that tells of ``error``, its sentence passed through ``translate``."""
    event: Problem = {
        "type": "error",
        "ref": ref,
        "code": error.code,
        "detail": translate(error.sentence) % error.params,
    }
    if error.field is not None:
        event["field"] = error.field
    if error.retry_after_seconds is not None:
        event["retry_after_seconds"] = error.retry_after_seconds
    return event


def encode(event: Event) -> str:
    """The event as JSON text without line breaks."""
    return orjson.dumps(event).decode()


def encode_delta(turn_id: str, first: int, seq: int, ops_json: str) -> str:
    """A ``delta`` event around operations that are JSON already: what the journal stores is what is sent."""
    return f'{{"type":"delta","turn":"{turn_id}","first":{first},"seq":{seq},"ops":{ops_json}}}'


def sse_frame(event_type: str, data_json: str, *, event_id: str | None = None) -> bytes:
    """One Server-Sent Event. ``data_json`` is JSON, so it holds no line break that could start a field."""
    head = f"id: {event_id}\n" if event_id is not None else ""
    return f"{head}event: {event_type}\ndata: {data_json}\n\n".encode()


SSE_HEARTBEAT: Final = b": still here\n\n"

# ---------------------------------------------------------------------------------------------------- commands

Ref: TypeAlias = Annotated[str, Field(max_length=64)]


class _Command(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    ref: Ref | None = None
    """Comes back in the answer, so that a client can match the two."""


class Send(_Command):
    """Store a prompt and start a turn that answers it.

    ``client_id`` makes the command repeatable: the same id and text again is answered with the first turn.
    ``parent_id`` is the message to follow (None: the current last one), so editing a prompt is sending a new one to
    its parent; ``root`` starts a new branch at the very beginning.
    """

    type: Literal["send"]
    client_id: Annotated[str, Field(min_length=1, max_length=MAX_CLIENT_ID_CHARS)]
    text: str
    parent_id: uuid.UUID | Literal["root"] | None = None


class Regenerate(_Command):
    """Answer the prompt of ``message_id`` (an assistant message) once more, in a branch of its own."""

    type: Literal["regenerate"]
    message_id: uuid.UUID
    client_id: Annotated[str, Field(min_length=1, max_length=MAX_CLIENT_ID_CHARS)]


class Stop(_Command):
    """Stop ``turn_id``, keeping its text; None stops whatever runs. Stopping a finished turn changes nothing."""

    type: Literal["stop"]
    turn_id: uuid.UUID | None = None


class Resume(_Command):
    """Continue after ``cursor``; what it lacks is sent, or a snapshot where that can't be told."""

    type: Literal["resume"]
    cursor: Annotated[str, Field(max_length=128)] | None = None


class Ack(_Command):
    """Everything up to ``seq`` of the turn has been shown; the server may send more."""

    type: Literal["ack"]
    turn_id: uuid.UUID
    seq: Annotated[int, Field(ge=0, strict=True)]


class Ping(_Command):
    """Ask for a ``pong``."""

    type: Literal["ping"]


Command: TypeAlias = Send | Regenerate | Stop | Resume | Ack | Ping

_COMMANDS: Final[dict[str, type[Command]]] = {
    "send": Send,
    "regenerate": Regenerate,
    "stop": Stop,
    "resume": Resume,
    "ack": Ack,
    "ping": Ping,
}


def frame_limit_bytes(message_max_chars: int) -> int:
    """The size of the largest command where prompts have up to ``message_max_chars`` characters of any script."""
    wanted = MAX_CHAR_BYTES * message_max_chars + FRAME_ROOM_BYTES
    return min(max(MIN_FRAME_LIMIT_BYTES, wanted), MAX_FRAME_LIMIT_BYTES)


def parse_command(frame: str) -> Command:
    """The command in one text frame.

    Raises:
        InvalidInputError: As :func:`load_json` and :func:`command_of`.
    """
    return command_of(load_json(frame))


def ref_of(document: dict[str, Any]) -> str | None:
    """The ``ref`` of a command, so that one that can't be understood is answered by name, too."""
    try:
        return _Command.model_validate({"ref": document.get("ref")}).ref
    except ValidationError:
        return None


def command_of(document: dict[str, Any]) -> Command:
    """The command that ``document`` is.

    Raises:
        InvalidInputError: ``bad_type`` or ``bad_field``.
    """
    kind = document.get("type")
    if not isinstance(kind, str) or kind not in _COMMANDS:
        raise InvalidInputError("bad_type", field="type")
    return validate(_COMMANDS[kind], document)


def validate(shape: type[Shape], document: dict[str, Any]) -> Shape:
    """``document`` as an instance of ``shape``.

    Raises:
        InvalidInputError: ``bad_field`` with the name of the first field that does not fit.
    """
    try:
        return shape.model_validate(document)
    except ValidationError as error:
        # Shapes are flat; what follows the field's name is pydantic's own name for a kind of value.
        place = error.errors(include_url=False, include_input=False)[0]["loc"]
        raise InvalidInputError("bad_field", field=str(place[0]) if place else None) from None


def load_json(text: str | bytes, *, limit_bytes: int = MIN_FRAME_LIMIT_BYTES) -> dict[str, Any]:
    """The JSON object in ``text``, refusing what a browser or a database would read differently.

    Raises:
        InvalidInputError: ``too_large`` beyond ``limit_bytes`` of UTF-8; ``bad_json`` for anything but an object, for
            NaN and infinities, duplicate keys, depth over :data:`MAX_DEPTH` or integers over
            :data:`MAX_INTEGER_DIGITS` digits.
    """
    if len(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")) > limit_bytes:
        raise InvalidInputError("too_large")
    try:
        document = json.loads(
            text,
            object_pairs_hook=_unique_pairs,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
        if not isinstance(document, dict) or _depth(document) > MAX_DEPTH:
            raise ValueError
    except (ValueError, RecursionError):
        raise InvalidInputError("bad_json") from None
    return document


def clean_text(text: str, *, max_chars: int, field: str = "text") -> str:
    """``text`` ready to be stored: line ends unified, outer blank lines removed.

    Raises:
        InvalidInputError: ``too_large`` beyond ``max_chars``; ``bad_text`` if nothing is left or it holds a NUL, a
            lone surrogate or another control character than tab and line break.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if len(text) > max_chars:
        raise InvalidInputError("too_large", field=field)
    text = text.strip("\n\t ")
    if not text or text.isspace() or _FORBIDDEN.search(text):
        raise InvalidInputError("bad_text", field=field)
    return text


_FORBIDDEN: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError
    return document


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _bounded_int(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise ValueError
    return int(digits)


def _finite_float(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError
    return number


def _depth(value: Any) -> int:
    deepest, open_values = 0, [(value, 1)]
    while open_values:
        current, depth = open_values.pop()
        if isinstance(current, dict | list):
            deepest = max(deepest, depth)
            children = current.values() if isinstance(current, dict) else current
            open_values.extend((child, depth + 1) for child in children)
    return deepest


# ---------------------------------------------------------------------------------------------------- the gap rule


@dataclass(frozen=True, slots=True)
class Frame:
    """An encoded event with the numbers that a cursor needs, so that nobody decodes it on the way.

    ``revision`` is 0 for a delta; ``first`` and ``seq`` are 0 where the event has none. ``activity`` is what the turn
    does after a delta, for :class:`Progress`.
    """

    kind: str
    json: str
    turn: str = ""
    first: int = 0
    seq: int = 0
    revision: int = 0
    activity: str = ""


class Verdict(enum.Enum):
    """What to do with a frame."""

    APPLY = "apply"
    DROP = "drop"
    GAP = "gap"


@dataclass(slots=True)
class Cursor:
    """How far a viewer has come: the conversation's revision, its latest turn, and that turn's last entry.

    ``turn`` is empty as long as the branch has no turn.
    """

    revision: int = 0
    turn: str = ""
    seq: int = 0
    past_turn: str = ""

    def accept(self, frame: Frame) -> Verdict:
        """Decide on ``frame``, and advance if it is to be applied.

        After GAP the viewer must re-read; the cursor has not moved.
        """
        if frame.kind == "delta":
            if frame.turn != self.turn:
                return Verdict.DROP if frame.turn == self.past_turn else Verdict.GAP
            if frame.seq <= self.seq:
                return Verdict.DROP
            if frame.first != self.seq + 1:
                return Verdict.GAP
            self.seq = frame.seq
            return Verdict.APPLY
        if frame.revision:
            if frame.revision <= self.revision:
                return Verdict.DROP
            if frame.revision != self.revision + 1:
                return Verdict.GAP
            if frame.kind == "finished" and (frame.turn != self.turn or frame.seq != self.seq):
                return Verdict.GAP
            self.revision = frame.revision
            if frame.kind == "turn":
                self.past_turn, self.turn, self.seq = self.turn, frame.turn, 0
        return Verdict.APPLY

    def jump(self, *, revision: int, turn: str, seq: int) -> None:
        """Stand where a snapshot or a re-read has brought the viewer."""
        if turn != self.turn:
            self.past_turn = self.turn
        self.revision, self.turn, self.seq = revision, turn, seq

    def token(self) -> str:
        """The cursor as the opaque text that ``resume``, ``Last-Event-ID`` and ``?after=`` take."""
        return f"{self.revision}.{self.turn or '-'}.{self.seq}"

    @classmethod
    def parse(cls, token: str) -> Cursor | None:
        """The cursor that :meth:`token` wrote; None for anything else."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        turn = "" if match["turn"] == "-" else match["turn"]
        return cls(revision=int(match["revision"]), turn=turn, seq=int(match["seq"]))


_TOKEN: Final = re.compile(
    r"(?P<revision>[0-9]{1,15})\.(?P<turn>-|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.(?P<seq>[0-9]{1,9})",
    re.ASCII,
)
