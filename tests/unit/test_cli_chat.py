"""The terminal conversation against an engine that records what it is asked."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from triptych.cli.chat import Conversation
from triptych.cli.talker import LocalTalker, Piece
from triptych.errors import Unavailable
from triptych.text.tokenizer import Tokenizer
from triptych.tiny.shape import TOKENIZER_FILE
from triptych.words import CacheHints, Delta, FinishReason, SamplingParams, TokenIds, Usage


class FakeEngine:
    """Answers "A1", "A2", ...; `interrupt_at` names an answer during which Ctrl-C is pressed."""

    max_context = 10_000

    def __init__(self, *, interrupt_at: int = 0, error_at: int = 0) -> None:
        self.tokenizer = Tokenizer.from_directory(TOKENIZER_FILE.parent)
        self.prompts: list[str] = []
        self.calls: list[str] = []
        self.aborted: list[str] = []
        self.hints: list[CacheHints] = []
        self._interrupt_at = interrupt_at
        self._error_at = error_at

    async def start(self) -> None:
        self.calls.append("start")

    async def stop(self) -> None:
        self.calls.append("stop")

    async def stream(
        self, ids: TokenIds, params: SamplingParams, *, request_id: str, hints: CacheHints
    ) -> AsyncIterator[Delta]:
        self.prompts.append(self.tokenizer.decode(ids))
        self.hints.append(hints)
        number = len(self.prompts)
        ended = False
        try:
            yield Delta(0, "A", self._tokens("A"))
            if number == self._interrupt_at:
                signal.raise_signal(signal.SIGINT)
                yield Delta(0, "(still said)", self._tokens("(still said)"))
                await _forever()
            ended = True
            error = "Out of luck." if number == self._error_at else None
            usage = Usage(prompt_tokens=len(ids), cached_tokens=number, completion_tokens=2)
            yield Delta(
                0, str(number), self._tokens(str(number)), finish_reason=FinishReason.STOP, usage=usage, error=error
            )
        finally:
            if not ended:
                self.aborted.append(request_id)

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text).tolist())


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
    Conversation(LocalTalker(engine), SamplingParams(), "Be brief.").run()  # type: ignore[arg-type]


def test_the_history_grows_turn_by_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    converse(monkeypatch, engine, ["first", "   ", "second"])
    assert engine.calls == ["start", "stop"]
    assert len(engine.prompts) == 2, "an empty line asks nothing"
    assert "Be brief." in engine.prompts[0] and "first" in engine.prompts[0]
    for part in ("Be brief.", "first", "A1", "second"):
        assert part in engine.prompts[1]
    assert capsys.readouterr().out == "A1\nA2\n"


def test_clear_keeps_only_the_system_message(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    converse(monkeypatch, engine, ["first", "/clear", "second"])
    assert "first" not in engine.prompts[1] and "A1" not in engine.prompts[1]
    assert "Be brief." in engine.prompts[1]


@pytest.mark.parametrize("word", ["/quit", "/exit", " /QUIT "])
def test_quit_leaves_before_the_input_ends(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    engine = FakeEngine()
    converse(monkeypatch, engine, [word, "never asked"])
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
        ("/claer", "There is no command '/claer'. Did you mean '/clear'?"),
        ("/SAVE", "/save needs a path."),
        ("/save", "/save needs a path."),
        ("/save early.md", "There is nothing to save yet."),
        ("/retry", "There is no answer to take back."),
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


def test_the_system_message_can_be_changed_shown_and_removed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine()
    converse(monkeypatch, engine, ["/system", "a", "/system Speak like a pirate.", "b", "/system none", "c", "/system"])
    assert "Be brief." in engine.prompts[0]
    assert "Speak like a pirate." in engine.prompts[1] and "Be brief." not in engine.prompts[1]
    assert "pirate" not in engine.prompts[2] and "A1" in engine.prompts[2]
    out = capsys.readouterr().out
    assert out.startswith("(system message: Be brief.)\n") and out.endswith("(system message: none)\n")


def test_retry_asks_again_without_the_old_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    converse(monkeypatch, engine, ["first", "second", "/retry", "third"])
    assert engine.prompts[2] == engine.prompts[1]
    assert "A3" in engine.prompts[3] and "A2" not in engine.prompts[3] and engine.prompts[3].count("second") == 1


def test_a_retry_that_fails_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mute(FakeEngine):
        async def stream(self, *arguments: Any, **more: Any) -> AsyncIterator[Delta]:
            if len(self.prompts) == 1:
                self.prompts.append("")
                raise Unavailable("Not now.")
            async for delta in super().stream(*arguments, **more):
                yield delta

    engine = Mute()
    converse(monkeypatch, engine, ["first", "/retry", "second"])
    assert "A1" in engine.prompts[2] and "second" in engine.prompts[2]


def test_a_file_stays_attached_until_something_was_answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notes = tmp_path / "my notes.txt"
    notes.write_text("The boat is blue.")
    engine = FakeEngine()
    converse(monkeypatch, engine, [f"/file '{notes}'", "x " * 20_000, "what colour?"])
    assert "The boat is blue." in engine.prompts[0]


@pytest.mark.parametrize("name", ["talk.md", "talk.json"])
def test_a_conversation_is_saved_and_nothing_overwritten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    where = tmp_path / name
    converse(
        monkeypatch, FakeEngine(), ["wörld", f"/save {where}", "more", f"/save {where}", f"/save {tmp_path}/no/{name}"]
    )
    text = where.read_text(encoding="utf-8")
    if name.endswith(".json"):
        roles = [entry["role"] for entry in json.loads(text)["messages"]]
        assert roles == ["system", "user", "assistant"]
    else:
        assert text == "## system\n\nBe brief.\n\n## user\n\nwörld\n\n## assistant\n\nA1\n"
    err = capsys.readouterr().err
    assert "is there already. Choose another name." in err and "cannot be written" in err


def test_text_that_only_looks_like_a_command_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    lines = ["/usr/bin/env python", "// a comment", " /stats", "/file: is a command"]
    converse(monkeypatch, engine, list(lines))
    assert [line.strip() in prompt for line, prompt in zip(lines, engine.prompts, strict=True)] == [True] * 4


def test_the_engine_is_told_what_may_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    converse(monkeypatch, engine, ["first", "second"])
    assert engine.hints[0].session == engine.hints[1].session is not None
    assert len(engine.hints[1].marks) == 4


def test_stats_sum_up_by_tier(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Tiered(FakeEngine):
        async def stream(self, *arguments: Any, **more: Any) -> AsyncIterator[Delta]:
            async for delta in super().stream(*arguments, **more):
                usage = delta.usage and replace(delta.usage, cached_tokens=30, cached_by_tier={"disk": 20})
                yield replace(delta, usage=usage)

    converse(monkeypatch, Tiered(), ["a", "b", "/stats"])
    out = capsys.readouterr().out
    assert "cached 30 (10 on the device, 20 from disk)" in out
    assert re.search(
        r"^all: prompt \d+ \| cached 60 \(20 on the device, 40 from disk\) .* generated 4", out, re.MULTILINE
    )


def test_a_pipe_gets_no_escape_codes_and_no_thoughts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Speaker(LocalTalker):
        async def answer(self, messages: Any, params: SamplingParams) -> AsyncGenerator[Piece, None]:
            yield Piece("Let me see.", thinking=True)
            yield Piece("Yes\x1b[31m.")

    typed = iter(["a"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(typed, None) or _end())
    Conversation(Speaker(FakeEngine()), SamplingParams()).run()  # type: ignore[arg-type]
    assert capsys.readouterr().out == "Yes\x1b[31m.\n", "what a model writes into a pipe is not ours to change"


def _end() -> str:
    raise EOFError


class Thinker(FakeEngine):
    """Thinks, then answers; every token is one character."""

    def __init__(self, *answers: str) -> None:
        super().__init__()
        self.answers = list(answers)
        self.ids: list[TokenIds] = []

    async def stream(
        self, ids: TokenIds, params: SamplingParams, *, request_id: str, hints: CacheHints
    ) -> AsyncIterator[Delta]:
        self.prompts.append(self.tokenizer.decode(ids))
        self.ids.append(ids)
        text = self.answers.pop(0)
        tokens = [int(token) for letter in text for token in self.tokenizer.encode(letter)]
        yield Delta(0, text[: len(text) // 2])
        usage = Usage(prompt_tokens=len(ids), completion_tokens=2)
        yield Delta(0, text[len(text) // 2 :], tuple(tokens), finish_reason=FinishReason.STOP, usage=usage)


def think(monkeypatch: pytest.MonkeyPatch, engine: Thinker, lines: list[str], thinking: str) -> None:
    typed = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt="": next(typed, None) or _end())
    Conversation(LocalTalker(engine, thinking), SamplingParams()).run()  # type: ignore[arg-type]


def test_thoughts_are_not_part_of_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    engine = Thinker("let me see</think>yes", "and now</think>no")
    think(monkeypatch, engine, ["a", "b", f"/save {tmp_path}/talk.json"], "high")
    assert capsys.readouterr().out.startswith("yes\nno\n")
    assert engine.prompts[0].endswith("<think>") and "Reasoning Effort" in engine.prompts[0]
    assert "let me see" not in engine.prompts[1] and "yes" in engine.prompts[1], "thoughts of earlier turns are dropped"
    saved = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert saved[1] == {"role": "assistant", "content": "yes", "reasoning_content": "let me see"}


def test_thinking_can_be_changed_between_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Thinker("yes", "hm</think>no")
    think(monkeypatch, engine, ["a", "/thinking", "/thinking low", "b", "/thinking lwo"], "off")
    out, err = capsys.readouterr()
    assert out == "yes\n(thinking: off)\n(thinking: low)\nno\n"
    assert err == "triptych: /thinking is one of off, low, high, max, not 'lwo'. Did you mean 'low'?\n"


def test_an_answer_comes_back_as_the_tokens_that_were_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Letter by letter is not how a tokenizer would spell it, but it is what the cache holds."""
    engine = Thinker("indeed", "so")
    think(monkeypatch, engine, ["a", "b"], "off")
    sampled = [int(token) for letter in "indeed" for token in engine.tokenizer.encode(letter)]
    first = engine.ids[0].tolist()
    assert engine.ids[1].tolist()[: len(first) + len(sampled)] == first + sampled


def test_thinking_that_takes_all_tokens_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Thinker("let me see and see", "fine</think>yes")
    think(monkeypatch, engine, ["a", "b"], "low")
    assert "no answer: all tokens went into thinking" in capsys.readouterr().out
    assert "a" in engine.prompts[0] and engine.prompts[1].count("User") == 1, "what was not answered is not kept"
