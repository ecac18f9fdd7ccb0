"""``manage.py chat``: a conversation in the terminal.

The main thread belongs to the person: it reads the keyboard, prints, and takes the signals. The event loop has a
thread of its own, so a terminal that stands still (Ctrl-S, a full pipe) delays no turn, and a line can be edited with
everything that ``readline`` offers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from django.contrib.auth import get_user_model
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError
from django.utils.formats import date_format
from django.utils.timezone import localtime
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from ... import turns
from ...blocks import Op, TextReader
from ...conf import get_settings
from ...database import in_database
from ...exceptions import STOP_REASONS, ChatError, NotFoundError
from ...lifecycle import stop
from ...models import Conversation
from ...protocol import TurnForm
from ...providers import provider_class
from ...snapshot import read_conversation
from ..terminal import Terminal, TerminalGoneError

if TYPE_CHECKING:
    from ...snapshot import AnyUser

T = TypeVar("T")
Call: TypeAlias = Callable[[Coroutine[Any, Any, T]], "Future[T]"]

PROMPT: Final = "> "
TICK_SECONDS: Final = 0.1
QUIET_SECONDS: Final = 0.5
"""Silence after which the spinner shows."""
LISTED_CONVERSATIONS: Final = 20

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 - its import gives `input` line editing and a history, which is never stored


class Command(BaseCommand):
    """Talk to the assistant in the terminal."""

    help = (
        "Talk to the assistant. Ctrl-C stops a reply and keeps its text; Ctrl-C or Ctrl-D at the prompt leaves. "
        "With --once, or with a question on standard input, one reply is printed, and the exit status says whether "
        "it is complete."
    )
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """Define the options."""
        parser.add_argument("--user", metavar="NAME", help="Who you are; needed where there are several users.")
        parser.add_argument("--conversation", metavar="ID", type=uuid.UUID, help="Continue this conversation.")
        parser.add_argument("--once", metavar="QUESTION", help="Ask this, print the reply, and leave.")
        parser.add_argument("--timeout", metavar="SECONDS", type=seconds, help="End a reply that takes longer.")
        parser.add_argument("--list", action="store_true", help="List your latest conversations, and leave.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Run the session.

        Raises:
            CommandError: It can't begin: an unknown user or conversation, an incomplete set-up.
        """
        try:
            provider_class()
            if options["verbosity"] < 2:
                logging.getLogger("streaming_chat").setLevel(logging.ERROR)  # lines between the words
            user = _find_user(options["user"])
            if options["list"]:
                return self._list(user)
            question = _question(options["once"])
            terminal = Terminal(self.stdout, self.stderr, color=not options["no_color"])
            complete = False
            with _event_loop() as call:
                session = Session(user, terminal, call, options["conversation"], options["timeout"])
                with _signals(session.interrupt), contextlib.suppress(KeyboardInterrupt):
                    session.begin()
                    if question is None:
                        session.talk()
                        return None
                    complete = session.ask(question) == "completed"
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from None
        except NotFoundError as error:
            raise CommandError(_(error.sentence)) from None
        except DatabaseError as error:
            raise CommandError(
                _("The database does not answer (%s). Did you run “manage.py migrate”?") % type(error).__name__
            ) from None
        except TerminalGoneError:
            # What is left in the buffer must not fail a second time.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        if not complete:
            sys.exit(1)
        return None

    def _list(self, user: AnyUser) -> None:
        for row in Conversation.objects.visible_to(user).order_by("-updated_at", "-id")[:LISTED_CONVERSATIONS]:
            updated = date_format(localtime(row.updated_at), "SHORT_DATETIME_FORMAT")
            self.stdout.write(f"{row.pk}  {updated}  {row.title}")


class Session:
    """One conversation between a person and the assistant.

    Args:
        user: The person.
        terminal: Where to print.
        call: Runs a coroutine in the event loop.
        conversation_id: None: a new one, made with the first question.
        timeout_seconds: For every turn; None: the site's own limit.
    """

    def __init__(
        self,
        user: AnyUser,
        terminal: Terminal,
        call: Call[Any],
        conversation_id: uuid.UUID | None,
        timeout_seconds: float | None,
    ) -> None:
        self._user = user
        self._terminal = terminal
        self._call = call
        self._conversation_id = conversation_id
        self._timeout_seconds = timeout_seconds
        self._asking = False
        self._interrupts = 0
        self._turn_id: uuid.UUID | None = None
        self._stop: Future[Any] | None = None
        self._reader = TextReader()
        self._activity = "waiting"
        self._began_at = self._silent_since = 0.0

    def begin(self) -> None:
        """Look up the conversation that is to be continued.

        Raises:
            NotFoundError: There is none, or not for this user.
        """
        if self._conversation_id is not None:
            self._call(in_database(read_conversation, self._conversation_id, self._user)).result()

    def talk(self) -> None:
        """Ask for questions and print the replies, until the person leaves."""
        self._terminal.note(_("Ctrl-C stops a reply and keeps its text. Ctrl-D leaves."))
        try:
            while self._interrupts < 2:
                text = input(PROMPT if sys.stdout.isatty() else "")
                if text.strip():
                    self.ask(text)
        except (EOFError, KeyboardInterrupt):
            self._terminal.note("", dim=False)
        if self._conversation_id is not None:
            self._terminal.note(_("Continue with: manage.py chat --conversation %s") % self._conversation_id)

    def ask(self, text: str) -> str:
        """Ask and print the reply; its status, or the code of the error if the question was refused.

        The turn is over afterwards, unless the person interrupted it a second time: then it has been told to stop.

        Raises:
            TerminalGoneError: Nobody reads; the turn was stopped.
        """
        self._interrupts, self._turn_id, self._stop = 0, None, None
        self._reader = TextReader()
        self._activity, self._began_at, self._silent_since = "waiting", time.monotonic(), 0.0
        self._asking = True
        try:
            return self._ask(text)
        except ChatError as error:
            self._terminal.note(f"{_(error.sentence) % error.params} ({error.code})", dim=False)
            return error.code
        except _Left:
            self._terminal.end_line()
            return "left"
        except TerminalGoneError:
            self._request_stop()
            raise
        finally:
            self._asking = False

    def interrupt(self, number: int, frame: object) -> None:
        """A signal: at the prompt it leaves; during a reply the first Ctrl-C stops it, and anything more leaves.

        It only counts here, because an exception could come between an event and its printing.

        Raises:
            KeyboardInterrupt: At the prompt.
        """
        self._interrupts += 1 if number == signal.SIGINT else 2
        if not self._asking:
            raise KeyboardInterrupt

    # ---------------------------------------------------------------- inside

    def _ask(self, text: str) -> str:
        stream = self._wait(
            turns.open_reply(self._user, text, conversation_id=self._conversation_id, timeout=self._timeout_seconds)
        )
        self._conversation_id, self._turn_id = stream.started.conversation_id, stream.started.id
        events = stream.events()
        turn: TurnForm | None = None
        while (event := self._wait(_next(events))) is not None:
            if event["type"] == "delta":
                for op in event["ops"]:
                    self._show(op)
            elif event["type"] == "progress":
                self._activity = event["activity"]
                self._began_at = time.monotonic() - event["elapsed_seconds"]
            elif event["type"] == "finished":
                turn = event["turn"]
        if turn is None:
            self._conversation_id = None
            self._terminal.note(_("The conversation was deleted."), dim=False)
            return "deleted"
        self._conclude(turn)
        return turn["status"]

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, with the spinner turning and the signals seen to until it comes."""
        future: Future[T] = self._call(work)
        while True:
            wait([future], TICK_SECONDS)
            if self._interrupts and self._stop is None:
                self._request_stop()
            if self._stop is not None and self._stop.done():
                self._stop.result()
            if future.done():
                return future.result()
            if self._interrupts > 1:
                raise _Left
            if time.monotonic() - self._silent_since >= QUIET_SECONDS:
                self._terminal.spin(_activity_label(self._activity), time.monotonic() - self._began_at)

    def _request_stop(self) -> None:
        if self._conversation_id is not None and self._turn_id is not None:
            self._stop = self._call(turns.stop_turn(self._user, self._conversation_id, self._turn_id))

    def _show(self, op: Op) -> None:
        words = self._reader.feed(op)
        thinking = _thinking_of(op)
        if words:
            self._activity = "writing"
            self._terminal.words(words)
        elif thinking:
            self._activity = "thinking"
            self._terminal.thinking(thinking)
        if words or thinking:
            self._silent_since = time.monotonic()

    def _conclude(self, turn: TurnForm) -> None:
        self._terminal.end_line()
        if turn["status"] == "stopped":
            self._terminal.note(_("stopped; what you see is saved"), dim=False)
        elif turn["error"] is not None:
            self._terminal.note(f"{turn['error']['detail']} ({turn['error']['code']})", dim=False)
        elif turn["stop_reason"] in STOP_REASONS:
            self._terminal.note(_(STOP_REASONS[turn["stop_reason"]]), dim=False)
        self._terminal.note(_account(turn))


class _Left(Exception):  # noqa: N818 - no error: the person has had enough
    """A second interruption during a reply."""


async def _next(events: AsyncIterator[dict[str, Any]]) -> dict[str, Any] | None:
    return await anext(events, None)


def _thinking_of(op: Op) -> str:
    text: object = ""
    if op["op"] == "start":
        text = op["block"].get("thinking")
    elif op["op"] == "append" and op["field"] == "thinking":
        text = op["text"]
    return text if isinstance(text, str) else ""


def _account(turn: TurnForm) -> str:
    """What the turn took, in one line."""
    parts = []
    usage = turn["usage"]
    if usage is not None:
        about = "" if usage["exact"] else "≈ "
        cached = usage["cache_read_input_tokens"]
        read = usage["input_tokens"] + cached + usage["cache_creation_input_tokens"]
        parts.append(about + ngettext("%s token in", "%s tokens in", read) % read)
        if cached:
            parts[0] += " " + _("(%s from the cache)") % cached
        parts[0] += ", " + _("%s out") % usage["output_tokens"]
    parts.append(f"{turn['elapsed_seconds']:.1f} s")
    if turn["model"]:
        parts.append(turn["model"])
    return " · ".join(parts)


def _activity_label(activity: str) -> str:
    labels = {
        "queued": _("waiting for a free place"),
        "waiting": _("waiting"),
        "thinking": _("thinking"),
        "tool": _("using a tool"),
        "writing": _("writing"),
    }
    return labels.get(activity, activity)


def seconds(text: str) -> float:
    """An option's value as a positive number of seconds; argparse names this function in its message."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


def _find_user(name: str | None) -> AnyUser:
    """The active user called ``name``; None means the only one.

    Raises:
        CommandError: There is no such user, or no way to tell.
    """
    users = get_user_model()._default_manager
    if name is not None:
        user = users.filter(**{get_user_model().USERNAME_FIELD: name}).first()
        if user is None or not user.is_active:
            raise CommandError(_("There is no active user “%s”.") % name)
        return user
    found = users.all()[:2]
    if not found:
        raise CommandError(_("There are no users yet. Make one with “manage.py createsuperuser”."))
    if len(found) > 1:
        raise CommandError(_("There are several users. Say who you are with --user NAME."))
    return found[0]


def _question(once: str | None) -> str | None:
    """The one question of a session that is not a talk; None if it is one.

    Raises:
        CommandError: Standard input is no text.
    """
    if once is not None or sys.stdin.isatty():
        return once
    try:
        return sys.stdin.read(get_settings().message_max_chars + 1)
    except UnicodeDecodeError:
        raise CommandError(_("What came on standard input is not text.")) from None


@contextlib.contextmanager
def _event_loop() -> Iterator[Call[Any]]:
    """An event loop in a thread of its own, and the function that runs a coroutine there.

    At the end running turns may finish within ``DRAIN_SECONDS``; Ctrl-C leaves them to recovery.
    """
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def live() -> None:
        over = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), over))
        await over.wait()
        await stop()

    thread = threading.Thread(target=asyncio.run, args=(live(),), name="streaming_chat-loop", daemon=True)
    thread.start()
    loop, over = started.result()
    try:
        yield lambda work: asyncio.run_coroutine_threadsafe(work, loop)
    finally:
        loop.call_soon_threadsafe(over.set)
        with contextlib.suppress(KeyboardInterrupt):
            thread.join()


@contextlib.contextmanager
def _signals(receive: Callable[[int, object], None]) -> Iterator[None]:
    """Ctrl-C, a polite kill and the closing of the terminal go to ``receive`` until the block ends."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), receive) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
