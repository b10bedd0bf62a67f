"""`triptych chat` as a person meets it: in a real terminal, with keys, pasted text and interrupts."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
readline = pytest.importorskip("readline", reason="this Python has no line editing")
needs_gnu = pytest.mark.skipif("libedit" in (readline.__doc__ or ""), reason="libedit knows no bracketed paste")

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A conversation in a pseudo-terminal. `screen` is all that was written so far."""

    def __init__(self, *arguments: str, term: str = "xterm", cwd: Path | None = None) -> None:
        self._ours, theirs = pty.openpty()
        environment = {"PATH": os.environ["PATH"], "TERM": term, "PYTHONPATH": str(SOURCE), "INPUTRC": os.devnull}
        command = [sys.executable, str(HERE / "chat_in_terminal.py"), *arguments]
        self._process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(theirs)
        self.screen = ""
        self._seen = 0

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._ours, keys.encode())

    def wait_for(self, text: str, seconds: float = 20.0) -> str:
        """Wait for `text` after what was waited for before; returns what came up to it."""
        deadline = time.monotonic() + seconds
        while (at := self.screen.find(text, self._seen)) < 0:
            assert time.monotonic() < deadline and self._read(deadline), f"no {text!r} in {self.screen[self._seen :]!r}"
        before, self._seen = self.screen[self._seen : at], at + len(text)
        return before

    def _read(self, deadline: float) -> bool:
        if not select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # Linux's way to say that the other side has closed
            return False
        self.screen += data.decode()
        return bool(data)

    def ended(self) -> int:
        """Wait for the end; the exit status."""
        deadline = time.monotonic() + 20
        while self._read(deadline):
            pass
        return self._process.wait(5)

    def close(self) -> None:
        """End it, however it stands."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._ours)


def _own_terminal() -> None:
    """Make the terminal the controlling one, so that Ctrl-C typed into it is a signal."""
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.default_int_handler)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_one(*arguments: str, **more: object) -> Terminal:
        opened.append(Terminal(*arguments, **more))  # type: ignore[arg-type]
        opened[-1].wait_for("> ")
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def test_a_conversation_from_hello_to_ctrl_d(terminal: Callable[..., Terminal]) -> None:
    chat = terminal()
    assert "Model    echo" in chat.screen and "Ctrl-C stops an answer, Ctrl-D leaves." in chat.screen
    chat.type("hello\r")
    chat.wait_for("heard 'hello' after 0")
    chat.wait_for("> ")
    chat.type("again\r")
    chat.wait_for("heard 'again' after 2")
    chat.wait_for("> ")
    chat.type("\x04")
    chat.wait_for("ended in order")
    assert chat.ended() == 0


def test_thoughts_are_dim_and_the_answer_is_not(terminal: Callable[..., Terminal]) -> None:
    chat = terminal()
    chat.type("think\r")
    chat.wait_for("\x1b[2m")
    assert chat.wait_for("\x1b[0m") == "hmm I see"
    assert chat.wait_for("heard 'think'") == "\r\n", "the answer begins a line"


def test_a_terminal_without_styles_gets_none(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(term="dumb")
    chat.type("think\r")
    chat.wait_for("(thinking) hmm I see\r\nheard 'think' after 0")
    chat.type("/stats\r")
    chat.wait_for("tok/s")
    assert "\x1b[2m" not in chat.screen


def test_a_model_cannot_steer_the_terminal(terminal: Callable[..., Terminal]) -> None:
    chat = terminal()
    chat.type("escape\r")
    chat.wait_for("heard 'escape' \ufffd[2J\ufffd over")
    assert "\x1b[2J" not in chat.screen


def test_ctrl_c_stops_the_answer_and_then_only_the_line(terminal: Callable[..., Terminal]) -> None:
    chat = terminal()
    chat.type("forever\r")
    chat.wait_for("and and")
    chat.type("\x03")
    chat.wait_for("(stopped)")
    chat.wait_for("> ")
    chat.type("half a li")
    chat.wait_for("half a li")
    time.sleep(0.1)  # Python misses a signal that comes just before it waits for a key; people are not that quick
    chat.type("\x03")
    chat.wait_for("(Ctrl-D or /quit leaves)")
    chat.wait_for("> ")
    chat.type("still there?\r")
    chat.wait_for("heard 'still there?' after 2")
    chat.wait_for("> ")
    chat.type("/quit\r")
    chat.wait_for("ended in order")
    assert chat.ended() == 0


def test_ctrl_c_before_the_first_word_takes_the_waiting_line_away(terminal: Callable[..., Terminal]) -> None:
    chat = terminal()
    chat.type("slowly\r")
    chat.wait_for("reading, ")
    chat.type("\x03")
    chat.wait_for("(stopped)")
    chat.wait_for("> ")
    chat.type("slowly 2\r")
    chat.wait_for("reading, ")
    between = chat.wait_for("heard 'slowly 2' after 0")
    assert between.endswith("\r\x1b[K"), "what waited is erased before the answer"


def test_lines_can_be_edited_and_called_back(terminal: Callable[..., Terminal]) -> None:
    chat = terminal()
    chat.type("wrold\x1b[D\x1b[D\x1b[D\x14\r")  # left, left, left, swap two letters
    chat.wait_for("heard 'world'")
    chat.wait_for("> ")
    chat.type("\x1b[A!\r")
    chat.wait_for("heard 'world!'")


@needs_gnu
def test_a_pasted_text_is_one_message(terminal: Callable[..., Terminal]) -> None:
    chat = terminal()
    chat.type("\x1b[200~def f():\n    return 1\n\nf()\x1b[201~")
    time.sleep(0.3)
    chat.type("\r")
    chat.wait_for(r"heard 'def f():\n    return 1\n\nf()' after 0")


def test_a_backslash_and_alt_enter_begin_a_new_line(terminal: Callable[..., Terminal]) -> None:
    chat = terminal()
    chat.type("one\\\r")
    chat.wait_for(". ")
    chat.type("two\r")
    chat.wait_for(r"heard 'one\ntwo' after 0")
    if "libedit" not in (readline.__doc__ or ""):
        chat.wait_for("> ")
        chat.type("three\x1b\rfour\r")
        chat.wait_for(r"heard 'three\nfour' after 2")


def test_tab_completes_commands_and_paths(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    (tmp_path / "harbour.txt").write_text("The boat is blue.")
    chat = terminal(cwd=tmp_path)
    chat.type("/fi\thar\t\r")
    chat.wait_for("17 characters of harbour.txt")
    chat.wait_for("> ")
    chat.type("colour?\r")
    chat.wait_for(r"heard 'The boat is blue.\n\ncolour?'")


def test_commands_answer_and_wrong_ones_name_the_nearest(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    chat = terminal(cwd=tmp_path)
    chat.type("hello\r")
    chat.wait_for("after 0")
    for typed, answer in (
        ("/stats", "cached 900 (700 on the device, 200 from disk) | recomputed 4 | generated 11 | first token"),
        ("/sve x", "There is no command '/sve'. Did you mean '/save'?"),
        ("/save talk.md", "(2 messages saved to talk.md)"),
        ("/system Be brief.", "(system message: Be brief.)"),
        ("/thinking", "(thinking: as the server likes)"),
        ("/retry", "after 1"),
        ("/clear", "(forgotten)"),
        ("/help", "Alt-Enter"),
    ):
        chat.wait_for("> ")
        chat.type(typed + "\r")
        chat.wait_for(answer)
    assert (tmp_path / "talk.md").read_text() == "## user\n\nhello\n\n## assistant\n\nheard 'hello' after 0\n"


def test_what_was_typed_is_there_next_time_if_asked_for(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    history = tmp_path / "history"
    for number in (1, 2):
        chat = terminal(str(history))
        chat.type("\x1b[Aremember me\r" if number == 1 else "\x1b[A\x1b[A!\r")
        chat.wait_for("heard 'remember me'" if number == 1 else "heard 'remember me!'")
        chat.wait_for("> ")
        chat.type("/quit\r")
        assert chat.ended() == 0
    assert history.stat().st_mode & 0o077 == 0, "for nobody else to read"


def test_in_a_pipe_there_are_no_escape_codes() -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "chat_in_terminal.py")],
        input="think\n/stats\n/nothing\n",
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": os.environ["PATH"], "TERM": "xterm", "PYTHONPATH": str(SOURCE)},
    )
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr and "hmm" not in done.stdout and "Model" not in done.stdout
    assert done.stdout.startswith("heard 'think' after 0\n1: prompt 1,000 | cached 900")
    assert done.stderr.startswith("triptych: There is no command '/nothing'.")
