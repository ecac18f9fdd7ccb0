"""What ``manage.py chat`` prints: the reply's words, its thinking, notes, and a spinner while nothing comes."""

from __future__ import annotations

import os
import shutil
import time
import unicodedata
from typing import Final

from django.core.management.base import OutputWrapper

FRAMES: Final = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
FRAMES_PER_SECOND: Final = 10
TAB_COLUMNS: Final = 8

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
ERASE_TO_END_OF_LINE: Final = "\x1b[K"
# Without automatic wrapping the spinner stays on the line where the words end, so the way back is exact.
SAVE_CURSOR, RESTORE_CURSOR = "\x1b7\x1b[?7l", "\x1b[?7h\x1b8"

VISIBLE: Final = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
)
"""Control characters as pictures: a model's words must not steer the terminal."""


class TerminalGoneError(Exception):
    """Nobody reads what is written: the pipe or the terminal was closed."""


class Terminal:
    """Words go to ``out``, everything else to ``err``, so that a pipe gets the words alone, exactly as they came.

    Thinking and the spinner are shown only where ``err`` is a terminal. Every method may raise
    :class:`TerminalGoneError`.
    """

    def __init__(self, out: OutputWrapper, err: OutputWrapper, *, color: bool = True) -> None:
        self._out, self._err = out, err
        self._out_shows, self._err_shows = out.isatty(), err.isatty()
        self._animates = self._err_shows and os.environ.get("TERM") != "dumb"
        self._dims = color and self._animates
        self._spins = False
        self._thinks = False
        self._column = 0
        """Cells of the terminal's current line that hold words; more than its width if they wrap."""
        self._line_is_open = False
        for stream in (out, err):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")

    def words(self, text: str) -> None:
        """Add words to the reply."""
        self._erase_spinner()
        if self._thinks:
            self._thinks = False
            self._write_err("\n\n")
        self._write(self._out, text.translate(VISIBLE) if self._out_shows else text)
        self._line_is_open = not text.endswith("\n")
        if self._out_shows:
            self._advance(text)

    def thinking(self, text: str) -> None:
        """Add to what the model thinks before it answers."""
        if not self._err_shows:
            return
        self._erase_spinner()
        if not self._thinks and self._out_shows:
            self.end_line()
        self._thinks = True
        text = text.translate(VISIBLE)
        self._write_err(f"{DIM}{text}{PLAIN}" if self._dims else text, cells=text)

    def note(self, line: str, *, dim: bool = True) -> None:
        """A line beside the conversation."""
        self.end_line()
        line = line.translate(VISIBLE)
        self._write_err((f"{DIM}{line}{PLAIN}" if dim and self._dims else line) + "\n", cells="\n")

    def end_line(self) -> None:
        """Close what was begun, so that the next thing starts a line."""
        self._erase_spinner()
        if self._thinks:
            self._thinks = False
            self._write_err("\n")
        if self._line_is_open:
            self.words("\n")

    def spin(self, activity: str, seconds: float) -> None:
        """Show that something is under way, behind the words; anything else that is printed takes its place."""
        if not self._animates:
            return
        width = shutil.get_terminal_size().columns
        if self._column and self._column % width == 0:
            # A full line: the next word would begin the next one anyway.
            self._write_err("\r\n")
        frame = FRAMES[int(time.monotonic() * FRAMES_PER_SECOND) % len(FRAMES)]
        gap = " " if self._column else ""
        spinner = f"{gap}{frame} {activity} {int(seconds)} s{ERASE_TO_END_OF_LINE}"
        self._write(self._err, f"{SAVE_CURSOR}{spinner}{RESTORE_CURSOR}")
        self._spins = True

    # ---------------------------------------------------------------- inside

    def _erase_spinner(self) -> None:
        if self._spins:
            self._spins = False
            self._write(self._err, ERASE_TO_END_OF_LINE)

    def _write_err(self, text: str, *, cells: str | None = None) -> None:
        self._write(self._err, text)
        if self._err_shows:
            self._advance(text if cells is None else cells)

    def _write(self, stream: OutputWrapper, text: str) -> None:
        try:
            stream.write(text, style_func=_as_it_is, ending="")
            stream.flush()
        except OSError:
            raise TerminalGoneError from None

    def _advance(self, text: str) -> None:
        _, newline, line = text.rpartition("\n")
        if newline:
            self._column = 0
        for char in line:
            if char == "\t":
                self._column += TAB_COLUMNS - self._column % TAB_COLUMNS
            elif unicodedata.category(char) not in ("Mn", "Me", "Cf"):
                self._column += 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _as_it_is(text: str) -> str:
    return text
