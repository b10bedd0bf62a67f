"""Where a prompt comes from, and what is said when it does not come."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rich.console

from triptych.cli import generate as command
from triptych.cli.generate import Prompt, json_text, print_all, read_prompts, read_text, run_to_json, stream_to_terminal
from triptych.cli.reading import progress_line
from triptych.errors import ConfigError, RequestError
from triptych.words import Delta, FinishReason, SamplingParams, Usage


class Stdin(io.TextIOWrapper):
    """Standard input with given bytes, a terminal or not."""

    def __init__(self, data: bytes, *, tty: bool) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes, *, tty: bool = False) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(data, tty=tty))


def test_one_word_is_the_prompt_and_two_are_model_and_prompt() -> None:
    assert read_prompts(["Once"], []) == ("tiny", [Prompt("argument", "Once")])
    assert read_prompts(["some/dir", "Once"], []) == ("some/dir", [Prompt("argument", "Once")])


def test_files_are_prompts_and_the_word_is_the_model(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("first")
    two.write_text("zweite Ä")
    prompts = [Prompt(str(one), "first"), Prompt(str(two), "zweite Ä")]
    assert read_prompts([], [one, two]) == ("tiny", prompts)
    assert read_prompts(["model"], [one, two]) == ("model", prompts)
    with pytest.raises(ConfigError, match=r"prompt and a --file\. Give one"):
        read_prompts(["model", "prompt"], [one])


def test_standard_input_is_read_when_piped_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, model in (([], "tiny"), (["-"], "tiny"), (["m", "-"], "m")):
        pipe(monkeypatch, "piped ü".encode())
        assert read_prompts(words, []) == (model, [Prompt("stdin", "piped ü")])


def test_no_prompt_at_a_terminal_says_how_to_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"", tty=True)
    with pytest.raises(ConfigError, match="--file PATH"):
        read_prompts([], [])


def test_unusable_input_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe(monkeypatch, b"ab\xff")
    with pytest.raises(ConfigError, match=r"Standard input is no UTF-8 text: .* at byte 2"):
        read_prompts([], [])
    pipe(monkeypatch, b"")
    with pytest.raises(ConfigError, match="The prompt from stdin is empty"):
        read_prompts([], [])
    with pytest.raises(ConfigError, match=r"absent\.txt cannot be read: No such file"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_text(tmp_path)
    (tmp_path / "latin").write_bytes("Ä".encode("latin-1"))
    with pytest.raises(ConfigError, match="latin is no UTF-8 text"):
        read_text(tmp_path / "latin")


USAGE = Usage(prompt_tokens=1200, cached_tokens=1024, recomputed_tokens=4, completion_tokens=2)


class FakeEngine:
    """Answers every prompt with its own text reversed, in two deltas."""

    tokenizer = None

    def __init__(self, error: str | None = None) -> None:
        self.error = error

    @contextmanager
    def timed_steps(self) -> Iterator[list[Any]]:
        yield [SimpleNamespace(plan=SimpleNamespace(rows=2))]

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[Delta]:
        yield Delta(0, text=prompt[::-1], token_ids=(5,))
        reason = FinishReason.ERROR if self.error else FinishReason.LENGTH
        yield Delta(0, text="!", token_ids=(6,), finish_reason=reason, usage=USAGE, error=self.error)

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[Any]:
        def output(prompt: str, index: int) -> Any:
            text = f"{prompt[::-1]}{index}"
            return SimpleNamespace(
                text=text,
                token_ids=(5, 6),
                finish_reason=FinishReason.STOP,
                usage=USAGE,
                logprobs=(),
                prompt_logprobs=(),
            )

        return [output(prompt, index) for prompt in prompts for index in range(params.n)]


def test_streaming_shows_text_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    stream_to_terminal(FakeEngine(), Prompt("argument", "abc"), SamplingParams())  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == "cba!\n"
    assert err.startswith("prompt 1,200 | cached 1,024 | recomputed 4 | generated 2 | first token ")
    assert "tok/s" in err


def test_who_waits_at_a_terminal_sees_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = partial(rich.console.Console, force_terminal=True, width=80)
    monkeypatch.setattr("rich.console.Console", terminal)
    stream_to_terminal(FakeEngine(), Prompt("argument", "abc"), SamplingParams())  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == "cba!\n" and "Reading the prompt: 2 of 3 tokens, 0 s" in err
    assert progress_line("Running", 500, 2000, 10.0) == "Running: 500 of 2,000 tokens, 10 s, 30 s or more to go"
    assert progress_line("Running", 2500, 2000, 10.0) == "Running: 2,000 of 2,000 tokens, 10 s"


def test_a_failed_request_is_an_error_and_keeps_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match="NaN"):
        stream_to_terminal(FakeEngine("The logits were NaN."), Prompt("argument", "abc"), SamplingParams())  # type: ignore[arg-type]
    assert capsys.readouterr().out == "cba!\n"


def test_several_answers_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [Prompt("a.txt", "ab"), Prompt("b.txt", "cd")]
    print_all(FakeEngine(), prompts, SamplingParams(n=2))  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert out == "==> a.txt [0]\nba0\n==> a.txt [1]\nba1\n==> b.txt [0]\ndc0\n==> b.txt [1]\ndc1\n"


def test_json_is_one_object_with_everything() -> None:
    result = run_to_json(FakeEngine(), "tiny", [Prompt("a.txt", "ab")], SamplingParams())  # type: ignore[arg-type]
    result = json.loads(json.dumps(result))
    assert result["model"] == "tiny" and result["seconds"] >= 0
    [answer] = result["outputs"]
    assert (answer["source"], answer["index"], answer["text"]) == ("a.txt", 0, "ba0")
    assert (answer["token_ids"], answer["finish_reason"], answer["logprobs"]) == ([5, 6], "stop", None)
    assert answer["usage"]["cached_tokens"] == 1024


def test_json_survives_an_output_of_few_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, shown in (("utf-8", '"ü"'), ("latin-1", r'"\u00fc"')):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert json_text("ü") == shown


def test_the_command_is_registered() -> None:
    assert [info.callback.__name__ for info in command.app.registered_commands if info.callback] == ["generate"]
