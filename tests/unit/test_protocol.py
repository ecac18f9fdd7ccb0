from __future__ import annotations

import json
import random
import uuid
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_chat.exceptions import InvalidInputError
from streaming_chat.protocol import (
    MAX_FRAME_LIMIT_BYTES,
    MIN_FRAME_LIMIT_BYTES,
    Ack,
    Cursor,
    Frame,
    Ping,
    Regenerate,
    Resume,
    Send,
    Stop,
    Verdict,
    clean_text,
    encode,
    encode_delta,
    frame_limit_bytes,
    load_json,
    parse_command,
    problem,
    sse_frame,
)

ID = "01a20b87-0e74-7329-a28f-c754442a7174"
ANY_TEXT = st.text(st.characters(codec=None))  # surrogates, NUL and all


# ---------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "{",
        "nonsense",
        "[]",
        "[1]",
        '"text"',
        "1",
        "null",
        "true",
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": -1e999}',
        '{"a": 1, "a": 2}',
        '{"b": {"a": 1, "a": 1}}',
        '{"a": 1234567890123456}',
        '{"a": -1234567890123456}',
        '{"a": ' + "9" * 5000 + "}",
        '{"a":' + "[" * 32 + "]" * 32 + "}",
        '{"a":' * 33 + "1" + "}" * 33,
        "[" * 30_000 + "]" * 30_000,
        '{"a":' * 10_000 + "1" + "}" * 10_000,
        "\ufeff{}",
        "{} {}",
        "{'a': 1}",
        '{"a": 1,}',
        '{"a": "\n"}',
        b"\xff\xfe",
        b'{"a": "\xff"}',
    ],
)
def test_what_a_browser_or_a_database_would_read_differently_is_bad_json(text: str | bytes) -> None:
    with pytest.raises(InvalidInputError) as refused:
        load_json(text)
    assert (refused.value.code, refused.value.http_status) == ("bad_json", 400)


@pytest.mark.parametrize(
    ("text", "document"),
    [
        ("{}", {}),
        (b'{"a": "\xc3\xbc"}', {"a": "ü"}),
        ('{"a": 123456789012345}', {"a": 123456789012345}),
        ('{"a": -123456789012345}', {"a": -123456789012345}),
        ('{"a": [1.5, true, false, null, "\\u2028"]}', {"a": [1.5, True, False, None, "\u2028"]}),
        ('{"a": {"x": 1}, "b": {"x": 1}}', {"a": {"x": 1}, "b": {"x": 1}}),
        ('{"a":' * 32 + "1" + "}" * 32, json.loads('{"a":' * 32 + "1" + "}" * 32)),
    ],
)
def test_ordinary_json_is_read(text: str | bytes, document: dict[str, Any]) -> None:
    assert load_json(text) == document


@pytest.mark.parametrize("character", ["x", "ü", "\N{GRINNING FACE}"])
def test_a_frame_is_measured_in_bytes(character: str) -> None:
    def frame(size: int) -> str:
        size -= len('{"a":""}')
        count, rest = divmod(size, len(character.encode()))
        return '{"a":"' + character * count + "x" * rest + '"}'

    for limit in (MIN_FRAME_LIMIT_BYTES, MAX_FRAME_LIMIT_BYTES):
        assert load_json(frame(limit), limit_bytes=limit)
        with pytest.raises(InvalidInputError) as refused:
            load_json(frame(limit + 1), limit_bytes=limit)
        assert (refused.value.code, refused.value.http_status) == ("too_large", 413)
    with pytest.raises(InvalidInputError):
        load_json("\ud800" * MIN_FRAME_LIMIT_BYTES)


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("character", ["x", "\n", "\x00", "ü", "漢", "\N{GRINNING FACE}"])
@pytest.mark.parametrize("max_chars", [1, 5_000, 5_200, 32_000, 81_578])
def test_the_longest_prompt_of_any_script_fits_a_frame(max_chars: int, character: str, ascii_only: bool) -> None:
    command = {
        "type": "send",
        "ref": "\N{GRINNING FACE}" * 64,
        "client_id": "\N{GRINNING FACE}" * 64,
        "parent_id": str(uuid.uuid4()),
        "text": character * max_chars,
    }
    frame = json.dumps(command, ensure_ascii=ascii_only)
    assert load_json(frame, limit_bytes=frame_limit_bytes(max_chars)) == command


@pytest.mark.parametrize(
    ("max_chars", "limit"),
    [(1, 65_536), (5_120, 65_536), (5_121, 65_548), (32_000, 388_096), (81_578, 983_032), (10**9, 983_040)],
)
def test_the_limit_of_a_frame_follows_that_of_a_prompt(max_chars: int, limit: int) -> None:
    assert frame_limit_bytes(max_chars) == limit


# ---------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    ("document", "command"),
    [
        ({"type": "send", "client_id": "c", "text": "Hi"}, Send(type="send", client_id="c", text="Hi")),
        (
            {"type": "send", "client_id": "c", "text": "Hi", "parent_id": ID, "ref": "1"},
            Send(type="send", client_id="c", text="Hi", parent_id=uuid.UUID(ID), ref="1"),
        ),
        (
            {"type": "send", "client_id": "c", "text": "Hi", "parent_id": "root"},
            Send(type="send", client_id="c", text="Hi", parent_id="root"),
        ),
        (
            {"type": "regenerate", "message_id": ID, "client_id": "c"},
            Regenerate(type="regenerate", message_id=uuid.UUID(ID), client_id="c"),
        ),
        ({"type": "stop"}, Stop(type="stop")),
        ({"type": "stop", "turn_id": ID}, Stop(type="stop", turn_id=uuid.UUID(ID))),
        ({"type": "resume", "cursor": "1.-.0"}, Resume(type="resume", cursor="1.-.0")),
        ({"type": "resume"}, Resume(type="resume")),
        ({"type": "ack", "turn_id": ID, "seq": 3}, Ack(type="ack", turn_id=uuid.UUID(ID), seq=3)),
        ({"type": "ping", "ref": None}, Ping(type="ping")),
    ],
)
def test_a_command_is_read(document: dict[str, Any], command: Any) -> None:
    assert parse_command(json.dumps(document)) == command


SEND = {"type": "send", "client_id": "c", "text": "Hi"}
ACK = {"type": "ack", "turn_id": ID, "seq": 3}


@pytest.mark.parametrize(
    ("document", "code", "field"),
    [
        ({}, "bad_type", "type"),
        ({"type": None}, "bad_type", "type"),
        ({"type": 1}, "bad_type", "type"),
        ({"type": ["send"]}, "bad_type", "type"),
        ({"type": "Send"}, "bad_type", "type"),
        ({"type": "shutdown"}, "bad_type", "type"),
        ({"type": "send", "text": "Hi"}, "bad_field", "client_id"),
        ({"type": "send", "client_id": "c"}, "bad_field", "text"),
        ({**SEND, "text": None}, "bad_field", "text"),
        ({**SEND, "text": 5}, "bad_field", "text"),
        ({**SEND, "text": ["Hi"]}, "bad_field", "text"),
        ({**SEND, "client_id": ""}, "bad_field", "client_id"),
        ({**SEND, "client_id": "x" * 65}, "bad_field", "client_id"),
        ({**SEND, "ref": "x" * 65}, "bad_field", "ref"),
        ({**SEND, "ref": 1}, "bad_field", "ref"),
        ({**SEND, "parent_id": "top"}, "bad_field", "parent_id"),
        ({**SEND, "parent_id": 5}, "bad_field", "parent_id"),
        ({**SEND, "extra": 1}, "bad_field", "extra"),
        ({**SEND, "role": "system"}, "bad_field", "role"),
        ({**ACK, "seq": -1}, "bad_field", "seq"),
        ({**ACK, "seq": "3"}, "bad_field", "seq"),
        ({**ACK, "seq": True}, "bad_field", "seq"),
        ({**ACK, "seq": 3.5}, "bad_field", "seq"),
        ({**ACK, "turn_id": "x"}, "bad_field", "turn_id"),
        ({**ACK, "turn_id": None}, "bad_field", "turn_id"),
        ({"type": "stop", "turn_id": 5}, "bad_field", "turn_id"),
        ({"type": "resume", "cursor": "x" * 129}, "bad_field", "cursor"),
        ({"type": "regenerate", "client_id": "c"}, "bad_field", "message_id"),
    ],
)
def test_a_command_that_is_wrong_is_refused_and_its_field_named(
    document: dict[str, Any], code: str, field: str
) -> None:
    with pytest.raises(InvalidInputError) as refused:
        parse_command(json.dumps(document))
    assert (refused.value.code, refused.value.field) == (code, field)


def test_a_lone_surrogate_in_a_prompt_is_bad_text() -> None:
    with pytest.raises(InvalidInputError) as refused:
        clean_text(getattr(parse_command(json.dumps({**SEND, "text": "a\ud800"})), "text"), max_chars=9)  # noqa: B009
    assert (refused.value.code, refused.value.field) == ("bad_text", "text")


KEYS = st.sampled_from(["type", "ref", "client_id", "text", "parent_id", "turn_id", "message_id", "cursor", "seq"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.just(ID),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
COMMANDS = st.dictionaries(KEYS | ANY_TEXT, JSON).flatmap(
    lambda document: st.sampled_from(["send", "regenerate", "stop", "resume", "ack", "ping"]).map(
        lambda kind: {**document, "type": kind}
    )
)


@given(ANY_TEXT | JSON.map(json.dumps) | COMMANDS.map(json.dumps))
def test_any_text_is_a_command_or_invalid_input_that_can_be_told_to_the_client(frame: str) -> None:
    try:
        command = parse_command(frame)
    except InvalidInputError as error:
        answer = encode(problem(error))
    else:
        assert isinstance(command, Send | Regenerate | Stop | Resume | Ack | Ping)
        answer = encode({"type": "pong", "ref": command.ref})
    assert json.loads(answer)["type"] in ("error", "pong")


# ---------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Hi", "Hi"),
        ("\n\t Hi \r\n", "Hi"),
        ("a\r\nb\rc\n", "a\nb\nc"),
        ("a\tb\n\n  c", "a\tb\n\n  c"),
        ("שלום \u202eabc", "שלום \u202eabc"),
        ("a\u2028b \N{GRINNING FACE} e\u0301", "a\u2028b \N{GRINNING FACE} e\u0301"),
        ("x" * 9, "x" * 9),
    ],
)
def test_a_prompt_is_stored_with_unified_line_ends(text: str, cleaned: str) -> None:
    assert clean_text(text, max_chars=12) == cleaned


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "bad_text"),
        (" \n\t\r", "bad_text"),
        ("\u2003\u3000", "bad_text"),
        *((f"a{character}b", "bad_text") for character in "\x00\x01\x07\x08\x0b\x0c\x0e\x1b\x1f\x7f\ud800\udfff"),
        ("x" * 13, "too_large"),
    ],
)
def test_a_prompt_that_can_not_be_stored_is_refused(text: str, code: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        clean_text(text, max_chars=12)
    assert (refused.value.code, refused.value.field) == (code, "text")


@given(ANY_TEXT)
def test_what_is_cleaned_is_clean(text: str) -> None:
    try:
        cleaned = clean_text(text, max_chars=1000)
    except InvalidInputError:
        return
    assert clean_text(cleaned, max_chars=1000) == cleaned
    cleaned.encode()
    assert cleaned.strip("\n\t ") == cleaned
    assert not {"\x00", "\r"} & set(cleaned)


# ---------------------------------------------------------------------------------------------------- frames


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
def test_no_text_can_begin_a_field_of_an_sse_frame(text: str, ref: str) -> None:
    frame = sse_frame("error", encode({"type": "error", "ref": ref, "code": "x", "detail": text}), event_id="1.-.0")
    lines = frame.decode().split("\n")
    assert lines[0] == "id: 1.-.0"
    assert lines[1] == "event: error"
    assert lines[2].startswith("data: ")
    assert lines[3:] == ["", ""]
    assert b"\r" not in frame
    assert json.loads(lines[2].removeprefix("data: "))["detail"] == text


def test_an_event_without_a_cursor_has_no_id() -> None:
    assert sse_frame("pong", "{}") == b"event: pong\ndata: {}\n\n"


def test_a_delta_is_put_around_what_the_journal_stores() -> None:
    ops = orjson.dumps([{"op": "append", "index": 0, "field": "text", "text": '"\u2028'}]).decode()
    assert json.loads(encode_delta(ID, 3, 5, ops)) == {
        "type": "delta",
        "turn": ID,
        "first": 3,
        "seq": 5,
        "ops": [{"op": "append", "index": 0, "field": "text", "text": '"\u2028'}],
    }


# ---------------------------------------------------------------------------------------------------- the gap rule


@given(st.integers(0, 10**15 - 1), st.just("") | st.uuids().map(str), st.integers(0, 10**9 - 1))
def test_a_cursor_survives_its_token(revision: int, turn: str, seq: int) -> None:
    assert Cursor.parse(Cursor(revision, turn, seq).token()) == Cursor(revision, turn, seq)


@pytest.mark.parametrize(
    "token",
    [
        "",
        "None",
        "1",
        "1.-",
        "1.-.",
        "-1.-.0",
        "1.-.-1",
        "1.--.0",
        "1.-.0\n",
        " 1.-.0",
        "1.-.0 ",
        "٣.-.0",
        "1.-.٣",
        "1.-.1e3",
        "1." + "0" * 36 + ".0",
        f"1.{ID.upper()}.0",
        f"1.{ID[:-1]}.0",
        "1" * 16 + ".-.0",
        "1.-." + "1" * 10,
        "1.-.0.0",
    ],
)
def test_anything_else_is_no_cursor(token: str) -> None:
    assert Cursor.parse(token) is None


@given(ANY_TEXT)
def test_no_text_breaks_the_parsing_of_a_cursor(token: str) -> None:
    cursor = Cursor.parse(token)
    assert cursor is None or cursor.token() == token or token.startswith("0") or ".0" in token


def delta(turn: str, first: int, seq: int) -> Frame:
    return Frame("delta", "", turn, first, seq)


@pytest.mark.parametrize(
    ("frame", "verdict", "after"),
    [
        (delta("b", 4, 4), Verdict.APPLY, (7, "b", 4)),
        (delta("b", 4, 9), Verdict.APPLY, (7, "b", 9)),
        (delta("b", 3, 3), Verdict.DROP, (7, "b", 3)),
        (delta("b", 1, 3), Verdict.DROP, (7, "b", 3)),
        (delta("b", 2, 4), Verdict.GAP, (7, "b", 3)),
        (delta("b", 5, 5), Verdict.GAP, (7, "b", 3)),
        (delta("a", 1, 1), Verdict.DROP, (7, "b", 3)),
        (delta("c", 1, 1), Verdict.GAP, (7, "b", 3)),
        (Frame("turn", "", "c", revision=8), Verdict.APPLY, (8, "c", 0)),
        (Frame("turn", "", "c", revision=9), Verdict.GAP, (7, "b", 3)),
        (Frame("turn", "", "b", revision=7), Verdict.DROP, (7, "b", 3)),
        (Frame("finished", "", "b", seq=3, revision=8), Verdict.APPLY, (8, "b", 3)),
        (Frame("finished", "", "b", seq=4, revision=8), Verdict.GAP, (7, "b", 3)),
        (Frame("finished", "", "b", seq=2, revision=8), Verdict.GAP, (7, "b", 3)),
        (Frame("finished", "", "a", seq=3, revision=8), Verdict.GAP, (7, "b", 3)),
        (Frame("finished", "", "b", seq=3, revision=7), Verdict.DROP, (7, "b", 3)),
        (Frame("conversation", "", revision=8), Verdict.APPLY, (8, "b", 3)),
        (Frame("conversation", "", revision=9), Verdict.GAP, (7, "b", 3)),
        (Frame("conversation", "", revision=7), Verdict.DROP, (7, "b", 3)),
        (Frame("progress", ""), Verdict.APPLY, (7, "b", 3)),
    ],
)
def test_the_next_number_is_applied_an_old_one_dropped_and_a_gap_told(
    frame: Frame, verdict: Verdict, after: tuple[int, str, int]
) -> None:
    cursor = Cursor(7, "b", 3, "a")
    assert cursor.accept(frame) is verdict
    assert (cursor.revision, cursor.turn, cursor.seq) == after


@st.composite
def histories(draw: st.DrawFn) -> list[Frame]:
    """What one conversation's viewers are sent, in the order in which it happened."""
    frames: list[Frame] = []
    revision = 0
    for turn in draw(st.lists(st.integers(0, 5), max_size=3)):
        name = f"turn {len(frames)}"
        revision += 1
        frames.append(Frame("turn", "", name, revision=revision))
        for seq in range(1, turn + 1):
            frames.append(delta(name, seq, seq))
            if draw(st.booleans()):
                revision += 1
                frames.append(Frame("conversation", "", revision=revision))
        revision += 1
        frames.append(Frame("finished", "", name, seq=turn, revision=revision))
    return frames


@given(histories(), st.randoms(use_true_random=False), st.floats(0, 0.6))
def test_whatever_is_lost_doubled_or_reordered_each_change_is_shown_once_and_in_order(
    history: list[Frame], chance: random.Random, fault: float
) -> None:
    sent = [frame for frame in history for _ in range(0 if chance.random() < fault else chance.choice([1, 1, 2]))]
    for _ in range(int(len(sent) * fault)):
        place = chance.randrange(len(sent))
        sent.insert(chance.randrange(len(sent)), sent.pop(place))

    cursor, shown = Cursor(), 0

    def reread(upto: int) -> None:
        """As the database: everything that has happened up to here."""
        nonlocal shown
        shown = max(shown, upto)
        turn, seq, revision = "", 0, 0
        for frame in history[:shown]:
            revision = frame.revision or revision
            if frame.kind == "turn":
                turn, seq = frame.turn, 0
            elif frame.kind == "delta":
                seq = frame.seq
        cursor.jump(revision=revision, turn=turn, seq=seq)

    happened = 0
    for frame in sent:
        happened = max(happened, history.index(frame) + 1)
        before = (cursor.revision, cursor.turn, cursor.seq)
        verdict = cursor.accept(frame)
        if verdict is Verdict.APPLY:
            follows = [f for f in history[shown:] if f.kind == "delta" or f.revision]
            # Changes and deltas are two series: what is applied must be the next of its own.
            series = [f for f in follows if (f.kind == "delta") == (frame.kind == "delta")]
            assert series[0] == frame, "a gap or a doubled change was shown"
            index = history.index(frame)
            history = [*history[:shown], frame, *[f for f in history[shown:] if f != frame]]
            assert index >= shown
            shown += 1
        else:
            assert (cursor.revision, cursor.turn, cursor.seq) == before
            if verdict is Verdict.GAP:
                reread(happened)
            else:
                assert frame in history[:shown]
    reread(len(history))
    assert shown == len(history)
