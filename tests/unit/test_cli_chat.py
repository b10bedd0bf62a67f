"""The terminal conversation against an engine that records what it is asked."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from triptych.cli.chat import Conversation
from triptych.text.tokenizer import Tokenizer
from triptych.tiny.shape import TOKENIZER_FILE
from triptych.words import Delta, FinishReason, SamplingParams, TokenIds, Usage


class FakeEngine:
    """Answers "A1", "A2", ...; `interrupt_at` names an answer during which Ctrl-C is pressed."""

    max_context = 10_000

    def __init__(self, *, interrupt_at: int = 0, error_at: int = 0) -> None:
        self.tokenizer = Tokenizer.from_directory(TOKENIZER_FILE.parent)
        self.prompts: list[str] = []
        self.calls: list[str] = []
        self.aborted: list[str] = []
        self._interrupt_at = interrupt_at
        self._error_at = error_at

    async def start(self) -> None:
        self.calls.append("start")

    async def stop(self) -> None:
        self.calls.append("stop")

    async def stream(self, ids: TokenIds, params: SamplingParams, *, request_id: str) -> AsyncIterator[Delta]:
        self.prompts.append(self.tokenizer.decode(ids))
        number = len(self.prompts)
        ended = False
        try:
            yield Delta(0, text="A", token_ids=(5,))
            if number == self._interrupt_at:
                signal.raise_signal(signal.SIGINT)
                yield Delta(0, text="(still said)", token_ids=(6,))
                await _forever()
            ended = True
            error = "Out of luck." if number == self._error_at else None
            usage = Usage(prompt_tokens=len(ids), cached_tokens=number, completion_tokens=2)
            yield Delta(0, str(number), (6,), finish_reason=FinishReason.STOP, usage=usage, error=error)
        finally:
            if not ended:
                self.aborted.append(request_id)


async def _forever() -> None:
    import asyncio

    await asyncio.Event().wait()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, also where the tests run in the background and a shell made them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def converse(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine, lines: list[str | type[BaseException]]) -> None:
    """Type `lines` into a conversation; an exception class is raised in place of a line. Then the input ends."""
    typed: Iterator[Any] = iter(lines)

    def read(prompt: str = "") -> str:
        line = next(typed, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    Conversation(engine, SamplingParams(), "Be brief.").run()  # type: ignore[arg-type]


def test_the_history_grows_turn_by_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    converse(monkeypatch, engine, ["first", "   ", "second"])
    assert engine.calls == ["start", "stop"]
    assert len(engine.prompts) == 2, "an empty line asks nothing"
    assert "Be brief." in engine.prompts[0] and "first" in engine.prompts[0]
    for part in ("Be brief.", "first", "A1", "second"):
        assert part in engine.prompts[1]
    assert capsys.readouterr().out == "A1\nA2\n"


def test_reset_keeps_only_the_system_message(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    converse(monkeypatch, engine, ["first", "/reset", "second"])
    assert "first" not in engine.prompts[1] and "A1" not in engine.prompts[1]
    assert "Be brief." in engine.prompts[1]


def test_quit_leaves_before_the_input_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    converse(monkeypatch, engine, ["/quit", "never asked"])
    assert engine.prompts == [] and engine.calls == ["start", "stop"]


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_the_answer_and_not_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine(interrupt_at=1)
    converse(monkeypatch, engine, ["first", "second"])
    assert engine.aborted == ["chat-1"], "the engine was told to stop"
    assert len(engine.prompts) == 2
    assert "first" in engine.prompts[1] and "A" in engine.prompts[1], "what was said stays in the history"
    out = capsys.readouterr().out
    assert "(stopped)" in out and out.endswith("A2\n")


def test_ctrl_c_at_the_prompt_says_how_to_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine()
    converse(monkeypatch, engine, [KeyboardInterrupt, "first"])
    assert len(engine.prompts) == 1
    assert "/quit leaves" in capsys.readouterr().out


def test_files_go_in_front_of_the_next_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("The boat is blue.")
    engine = FakeEngine()
    converse(monkeypatch, engine, [f"/file {notes}", "what colour?", "and now?"])
    assert "The boat is blue.\n\nwhat colour?" in engine.prompts[0]
    assert engine.prompts[1].count("The boat is blue.") == 1, "attached once, then part of the history"
    assert "17 characters" in capsys.readouterr().out


def test_stats_show_each_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    converse(monkeypatch, FakeEngine(), ["/stats", "first", "second", "/stats"])
    out = capsys.readouterr().out
    assert "Nothing was answered yet." in out
    assert "cached 1 |" in out and "cached 2 |" in out


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/rest", "There is no command '/rest'. Did you mean '/reset'?"),
        ("/file", "/file needs a path."),
        ("/file absent.txt", "absent.txt cannot be read"),
        ("x " * 20_000, "9999 tokens"),
    ],
)
def test_errors_are_said_and_the_conversation_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, sentence: str
) -> None:
    engine = FakeEngine()
    converse(monkeypatch, engine, [line, "first"])
    assert sentence in capsys.readouterr().err
    assert len(engine.prompts) == 1 and "first" in engine.prompts[0] and "x x" not in engine.prompts[0]


def test_a_failed_answer_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    converse(monkeypatch, FakeEngine(error_at=1), ["first", "second"])
    out, err = capsys.readouterr()
    assert err == "triptych: Out of luck.\n" and out.endswith("A2\n")
