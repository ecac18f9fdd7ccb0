"""``manage.py chat`` as a person meets it: a process of its own, on a real terminal or in a pipe."""

from __future__ import annotations

import codecs
import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator

import pytest
from django.contrib.auth.models import User

from streaming_chat.models import Conversation, Message, Turn, UsageRecord
from streaming_chat.testing import Block, FakeAnthropic, Gate, Reply, Stall
from tests import services
from tests.conftest import database_url

PATIENCE_SECONDS = 60.0
CTRL_C, CTRL_D = "\x03", "\x04"
COMMAND = [sys.executable, "manage.py", "chat"]
PROMPT = "> "

pytestmark = pytest.mark.timeout(240)  # several processes a test, on a machine that may be busy


@pytest.fixture
def server() -> Iterator[FakeAnthropic]:
    with FakeAnthropic() as server:
        yield server


@pytest.fixture
def environment(server: FakeAnthropic) -> dict[str, str]:
    return os.environ | {
        "DJANGO_SETTINGS_MODULE": "chatproject.settings",
        "DEBUG": "1",
        "DATABASE_URL": database_url(),
        "REDIS_URL": "",
        "TERM": "xterm",
        "PYTHONWARNINGS": "error::ResourceWarning",
        **server.environ,
    }


@pytest.fixture
def run(ann: User, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command without a terminal."""

    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments],
            cwd=services.ROOT,
            env=environment,
            input=stdin,
            check=False,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    return run


class Person:
    """Sits at a terminal of 80 columns, types, and waits for what must appear."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self._master, slave = pty.openpty()
        # A session that opens a terminal owns it, and then its Ctrl-C is a signal.
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", 'exec "$0" "$@" <>"$TERMINAL" >&0 2>&0', *COMMAND, *arguments],
            cwd=services.ROOT,
            env=environment | {"COLUMNS": "80", "TERMINAL": os.ttyname(slave)},
            start_new_session=True,
        )
        self._slave = slave
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.seen = ""
        self._read = 0

    def sees(self, pattern: str) -> str:
        """Wait until something new matches; what does."""
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while (found := re.search(pattern, self.seen[self._read :])) is None:
            assert time.monotonic() < give_up_at, f"no {pattern!r} in {self.seen[self._read :]!r}"
            self._take(0.05)
        self._read += found.end()
        return found[0]

    def glimpses(self, text: str, seconds: float = 2.0) -> bool:
        """Whether the text appears soon."""
        give_up_at = time.monotonic() + seconds
        while text not in self.seen[self._read :] and time.monotonic() < give_up_at:
            self._take(0.05)
        return text in self.seen[self._read :]

    def types(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def leaves(self) -> int:
        """Wait for the end of the process; its exit status."""
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < give_up_at, f"still there: {self.seen!r}"
            self._take(0.05)
        self._take(0)
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._slave)
        os.close(self._master)

    def _take(self, seconds: float) -> None:
        while select.select([self._master], [], [], seconds)[0]:
            self.seen += self._decoder.decode(os.read(self._master, 65536))
            seconds = 0


@pytest.fixture
def sit_down(ann: User, environment: dict[str, str]) -> Iterator[Callable[..., Person]]:
    """Run the command in a terminal."""
    with contextlib.ExitStack() as stack:

        def sit_down(*arguments: str) -> Person:
            person = Person(environment, *arguments)
            stack.callback(person.close)
            return person

        yield sit_down


# ------------------------------------------------------------------------------------------------ in a pipe


def test_one_question_prints_the_exact_words_and_stores_them(
    run: Callable[..., subprocess.CompletedProcess[str]], server: FakeAnthropic, ann: User
) -> None:
    text = "Olá \x1b[31m👩‍🚀\u2028 שלום\n\nend"
    server.enqueue(Reply.text(text, chunks=7))
    done = run("--once", "How are you?")
    assert (done.returncode, done.stdout) == (0, text + "\n")
    assert re.fullmatch(r"\d+ tokens in, \d+ out · \d+\.\d s · claude-sonnet-5-5\n", done.stderr)
    assert server.requests[0].prompt == "How are you?"
    reply = Message.objects.get(role="assistant")
    assert (reply.text, reply.conversation.owner) == (text, ann)
    assert (reply.turn.status, reply.turn.usage_records.get().quality) == ("completed", "exact")


def test_standard_input_is_the_question(
    run: Callable[..., subprocess.CompletedProcess[str]], server: FakeAnthropic
) -> None:
    server.enqueue(Reply.text("Two lines."))
    done = run(stdin="first\nsecond\n")
    assert (done.returncode, done.stdout) == (0, "Two lines.\n")
    assert server.requests[0].prompt == "first\nsecond"


def test_a_failed_turn_exits_with_1_and_says_why(
    run: Callable[..., subprocess.CompletedProcess[str]], server: FakeAnthropic
) -> None:
    server.enqueue(Reply.spend_limited())
    done = run("--once", "Hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("The quota for the assistant is used up. (provider_quota)\n")


def test_a_timeout_exits_with_1_and_keeps_the_words(
    run: Callable[..., subprocess.CompletedProcess[str]], server: FakeAnthropic
) -> None:
    server.enqueue(Reply.text("As far as ", Stall()))
    done = run("--once", "Hi", "--timeout", "1")
    assert (done.returncode, done.stdout) == (1, "As far as \n")
    assert "(turn_timeout)" in done.stderr
    assert Message.objects.get(role="assistant").text == "As far as "
    assert Turn.objects.get().status == "timed_out"


def test_a_conversation_is_continued(
    run: Callable[..., subprocess.CompletedProcess[str]], server: FakeAnthropic, ann: User
) -> None:
    server.enqueue(Reply.text("Hello Ann"), Reply.text("Ann"))
    assert run("--once", "I am Ann").returncode == 0
    conversation = Conversation.objects.get()
    done = run("--conversation", str(conversation.pk), "--once", "Who am I?")
    assert done.stdout == "Ann\n"
    assert [message["role"] for message in server.requests[1].body["messages"]] == ["user", "assistant", "user"]
    assert Conversation.objects.count() == 1


def test_the_list_holds_ones_own_conversations_the_latest_first(
    run: Callable[..., subprocess.CompletedProcess[str]], ann: User
) -> None:
    own = [Conversation.objects.create(owner=ann, title=title) for title in ("first", "second")]
    Conversation.objects.create(owner=User.objects.create_user("bob"), title="not hers")
    lines = run("--user", "ann", "--list").stdout.splitlines()
    assert [(line[:36], line.split()[-1]) for line in lines] == [(str(own[1].pk), "second"), (str(own[0].pk), "first")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--user", "nobody"], "CommandError: There is no active user “nobody”.\n"),
        (["--user", "gone"], "CommandError: There is no active user “gone”.\n"),
        ([], "CommandError: There are several users. Say who you are with --user NAME.\n"),
        (
            ["--user", "ann", "--conversation", str(uuid.UUID(int=1))],
            "CommandError: There is nothing here, or it is not for you.\n",
        ),
    ],
)
def test_a_session_that_cannot_begin_says_why_and_changes_nothing(
    run: Callable[..., subprocess.CompletedProcess[str]],
    server: FakeAnthropic,
    arguments: list[str],
    message: str,
) -> None:
    User.objects.create_user("gone", is_active=False)
    done = run(*arguments, "--once", "Hi")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
    assert (Conversation.objects.count(), server.requests) == (0, [])


def test_another_users_conversation_does_not_exist(
    run: Callable[..., subprocess.CompletedProcess[str]], server: FakeAnthropic
) -> None:
    bob = User.objects.create_user("bob")
    conversation = Conversation.objects.create(owner=bob)
    done = run("--user", "ann", "--conversation", str(conversation.pk), "--once", "Hi")
    assert done.stderr == "CommandError: There is nothing here, or it is not for you.\n"
    assert (Message.objects.count(), server.requests) == (0, [])


def test_without_any_user_it_says_how_to_make_one(
    run: Callable[..., subprocess.CompletedProcess[str]], ann: User
) -> None:
    ann.delete()
    done = run("--once", "Hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "CommandError: There are no users yet. Make one with “manage.py createsuperuser”.\n"


def test_a_refused_question_says_the_sentence_and_the_code(
    run: Callable[..., subprocess.CompletedProcess[str]], server: FakeAnthropic
) -> None:
    done = run("--once", " \n ")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "The message is empty or holds characters that can't be stored. (bad_text)\n"
    assert (Turn.objects.count(), server.requests) == (0, [])


def test_a_closed_pipe_stops_the_turn_quietly(ann: User, server: FakeAnthropic, environment: dict[str, str]) -> None:
    gate = Gate()
    server.enqueue(Reply.text("first ", gate, "second ", Stall()))
    process = subprocess.Popen(
        [*COMMAND, "--once", "Hi"],
        cwd=services.ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(6) == b"first "
        process.stdout.close()
        gate.open()
        assert process.wait(PATIENCE_SECONDS) == 1
        assert process.stderr.read() == b""
    turn = Turn.objects.get()
    assert (turn.status, turn.reply.text) == ("stopped", "first second ")


# ------------------------------------------------------------------------------------------------ at a terminal


def test_ctrl_c_stops_the_turn_keeps_its_text_and_the_conversation_goes_on(
    sit_down: Callable[..., Person], server: FakeAnthropic
) -> None:
    gate = Gate()
    server.enqueue(Reply.text("Kept ", "words ", gate, "never sent"), Reply.text("Go on, then."))
    person = sit_down()
    person.sees(PROMPT)
    person.types("Tell me all\r")
    person.sees("Kept words ")
    gate.reached_sync(timeout=PATIENCE_SECONDS)
    person.types(CTRL_C)
    person.sees("stopped; what you see is saved\r\n")
    server.wait_for_sync(lambda ledger: len(ledger.aborted) == 1, timeout=PATIENCE_SECONDS)
    person.sees(PROMPT)
    person.types("And now?\r")
    person.sees(r"Go on, then\.")
    person.sees(r"\d+ tokens in, \d+ out · \d+\.\d s · claude-sonnet-5-5")
    person.sees(PROMPT)
    person.types(CTRL_D)
    assert person.leaves() == 0
    conversation = Conversation.objects.get()
    assert f"Continue with: manage.py chat --conversation {conversation.pk}" in person.seen
    first, second = Turn.objects.order_by("id")
    assert (first.status, first.reply.text) == ("stopped", "Kept words ")
    assert (second.status, second.reply.text) == ("completed", "Go on, then.")
    assert "never sent" not in person.seen
    quality = UsageRecord.objects.order_by("requested_at").values_list("quality", flat=True)
    assert list(quality) == ["estimated", "exact"]


def test_ctrl_c_at_the_prompt_leaves(sit_down: Callable[..., Person]) -> None:
    person = sit_down()
    person.sees(PROMPT)
    person.types("half a question")
    person.sees("half a question")
    # Python's `input` misses a signal that comes just before it waits; then a person presses again.
    while not person.glimpses("\r\n"):
        person.types(CTRL_C)
    assert person.leaves() == 0
    assert "Traceback" not in person.seen
    assert Conversation.objects.count() == 0


def test_ctrl_c_while_a_single_question_is_answered_exits_with_1(
    sit_down: Callable[..., Person], server: FakeAnthropic
) -> None:
    server.enqueue(Reply.text("Kept ", Stall()))
    person = sit_down("--once", "Hi")
    person.sees("Kept ")
    person.types(CTRL_C)
    assert person.leaves() == 1
    person.sees("stopped; what you see is saved\r\n")
    turn = Turn.objects.get()
    assert (turn.status, turn.reply.text) == ("stopped", "Kept ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_polite_kill_stops_the_turn_keeps_its_text_and_leaves(
    sit_down: Callable[..., Person], server: FakeAnthropic, number: signal.Signals
) -> None:
    server.enqueue(Reply.text("Kept ", Stall()))
    person = sit_down()
    person.sees(PROMPT)
    person.types("Hi\r")
    person.sees("Kept ")
    person.process.send_signal(number)
    assert person.leaves() == 0
    assert "Traceback" not in person.seen
    turn = Turn.objects.get()
    assert (turn.status, turn.reply.text) == ("stopped", "Kept ")


def test_the_spinner_counts_seconds_while_nothing_streams(
    sit_down: Callable[..., Person], server: FakeAnthropic
) -> None:
    before, within = Gate(), Gate()
    server.enqueue(Reply.text("one ", within, "two").before_headers(before))
    person = sit_down("--once", "Hi")
    person.sees("\x1b7\x1b\\[\\?7l⠋ waiting 0 s|waiting 0 s")
    person.sees("waiting 1 s")
    before.open()
    person.sees("one ")
    person.sees("\x1b7\x1b\\[\\?7l . writing [12] s\x1b\\[K\x1b\\[\\?7h\x1b8")
    within.open()
    person.sees("\x1b\\[Ktwo\r\n")
    assert person.leaves() == 0
    spinner = "\x1b7\x1b\\[\\?7l.*?\x1b\\[\\?7h\x1b8"
    shown = re.sub(spinner, "", person.seen).replace("\x1b[K", "")
    assert shown.startswith("one two\r\n")


def test_thinking_is_dimmed_and_apart_from_the_words(sit_down: Callable[..., Person], server: FakeAnthropic) -> None:
    server.enqueue(Reply.of(Block.thinking("Hm, well.", signature="signed"), Block.text("Four.")))
    person = sit_down("--once", "2 + 2?")
    person.sees("\x1b\\[2mHm, well\\.\x1b\\[0m\r\n\r\nFour\\.\r\n")
    assert person.leaves() == 0


def test_control_characters_of_the_model_do_not_reach_the_terminal(
    sit_down: Callable[..., Person], server: FakeAnthropic
) -> None:
    server.enqueue(Reply.text("a\x1b]0;title\x07b\x9b31mc"))
    person = sit_down("--once", "Hi")
    person.sees("a␛]0;title␇b\N{REPLACEMENT CHARACTER}31mc\r\n")
    assert person.leaves() == 0
    assert Message.objects.get(role="assistant").text == "a\x1b]0;title\x07b\x9b31mc"
