"""What a person types and sees: lines with editing, history, completion and pasted text; dimmed asides; no escape codes
where nobody would see them."""

from __future__ import annotations

import asyncio
import glob
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import ModuleType

from rich.console import Console

from triptych.errors import ConfigError

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
_HISTORY = 1000  # lines kept in a history file
_QUIET = 0.7  # seconds without a word after which the wait is shown
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Screen:
    """Standard output. On a terminal what a model says cannot move the cursor or change colours, and asides are dim."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        console = Console(file=sys.stdout)  # knows NO_COLOR and terminals that cannot do it
        self._styled = self.live and not console.is_dumb_terminal and not console.no_color
        self._dim = False
        self._thinking = False
        self._waiting = False
        self._column = 0

    def say(self, text: str) -> None:
        """A part of an answer."""
        if self._thinking:
            self.end_line()
        self._style(False)
        self._write(text)

    def think(self, text: str) -> None:
        """A part of what comes before an answer; shown to people only, a pipe gets answers."""
        if not self.live:
            return
        if not self._thinking:
            self._style(True)
            self._write("" if self._styled else "(thinking) ")
            self._thinking = True
        self._write(text)

    def note(self, text: str) -> None:
        """A line of our own."""
        self.end_line()
        self._style(True)
        self._write(text)
        self.end_line()

    def end_line(self) -> None:
        """Plain text from here on, and a new line unless this is one."""
        self._style(False)
        self._thinking = False
        if self._column:
            self._write("\n")

    def calm(self) -> None:
        """Nothing waits any more and nothing is dim, whatever was interrupted."""
        self._clear_wait()
        self._style(False)
        sys.stdout.flush()

    def _style(self, dim: bool) -> None:
        if self._styled and dim is not self._dim:
            self._clear_wait()
            sys.stdout.write(DIM if dim else PLAIN)
        self._dim = dim

    def _write(self, text: str) -> None:
        if not text:
            return
        self._clear_wait()
        if self.live:
            text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))
        self._column = len(text) - text.rfind("\n") - 1 if "\n" in text else self._column + len(text)
        sys.stdout.write(text)
        sys.stdout.flush()

    def _clear_wait(self) -> None:
        if self._waiting:
            self._waiting = False
            sys.stdout.write("\r\x1b[K")

    @asynccontextmanager
    async def waiting(self, what: str) -> AsyncIterator[asyncio.Event]:
        """Show how long nothing has come, until the event is set; only to people, and only if it takes a while."""
        heard = asyncio.Event()
        task = asyncio.create_task(self._wait(what, heard)) if self._styled else None
        try:
            yield heard
        finally:
            heard.set()
            if task is not None:
                await task

    async def _wait(self, what: str, heard: asyncio.Event) -> None:
        begin, pause = time.perf_counter(), _QUIET
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(heard.wait(), pause)
            if heard.is_set():
                return
            self._clear_wait()
            sys.stdout.write(f"{DIM}{what}, {time.perf_counter() - begin:.0f} s{PLAIN}")
            sys.stdout.flush()
            self._waiting, pause = True, 0.2


class Keyboard:
    """Standard input, line by line. On a terminal: editing, history, completion of `commands` and of paths after them.

    Text that is pasted stays one message, Alt-Enter begins a new line, and so does a line that ends in a backslash.
    `history`: a file that keeps what was typed.
    """

    def __init__(self, commands: Sequence[str], history: Path | None = None) -> None:
        self.live = sys.stdin.isatty()
        self._commands = commands
        self._history = history
        self._readline = self._prepare() if self.live else None

    def read(self) -> str | None:
        """The next message; None at the end of the input."""
        lines: list[str] = []
        prompt = "> " if self.live else ""
        while True:
            try:
                line = input(prompt)
            except EOFError:
                return "\n".join(lines) if lines else None
            if not self.live or not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])
            prompt = ". "

    def close(self) -> None:
        """Write the history file. A file that cannot be written is no reason to fail at the end."""
        if self._readline is None or self._history is None:
            return
        self._readline.set_history_length(_HISTORY)
        with suppress(OSError):
            self._history.touch(mode=0o600)
            self._readline.write_history_file(self._history)

    def _prepare(self) -> ModuleType | None:
        try:
            import readline
        except ImportError:
            return None
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
            readline.parse_and_bind(r'"\e\C-m": "\C-v\n"')
        readline.set_completer_delims(" \t\n")
        readline.set_completer(self._complete)
        if self._history is not None and self._history.exists():
            try:
                readline.read_history_file(self._history)
            except OSError as error:
                raise ConfigError(f"The history {self._history} cannot be read: {error.strerror}.") from None
        return readline

    def _complete(self, word: str, number: int) -> str | None:
        assert self._readline is not None
        line = self._readline.get_line_buffer()
        found = completions(line, word, self._commands)
        return found[number] if number < len(found) else None


def completions(line: str, word: str, commands: Sequence[str]) -> list[str]:
    """What `word`, the last one of `line`, may become: a command at the beginning, a path after one."""
    if line.lstrip() == word and word.startswith("/"):
        return [name + " " for name in commands if name.startswith(word)]
    if not line.startswith(("/file ", "/save ")):
        return []
    home = os.path.expanduser("~")
    paths = sorted(glob.glob(glob.escape(os.path.expanduser(word)) + "*"))
    return [
        (path if not word.startswith("~") else "~" + path.removeprefix(home)) + ("/" if os.path.isdir(path) else "")
        for path in paths
    ]
