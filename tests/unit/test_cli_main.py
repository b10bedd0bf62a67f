"""The command line as a frame: help, unknown names, exit codes, one sentence per error."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from triptych import __version__
from triptych.cli.main import COMMANDS, main


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `triptych ARGV`."""
    status = main(list(argv))
    out, err = capsys.readouterr()
    return status, out, err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        status, out, err = run(capsys, *argv)
        assert (status, err) == (0, "")
        for name, text in COMMANDS.items():
            assert f"{name} " in out and text in out


def test_ctrl_c_ends_a_command_with_one_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("triptych.cli.replay._trace", interrupted)
    assert run(capsys, "replay", "chat") == (130, "", "triptych: Interrupted.\n")


def test_output_of_few_letters_gets_question_marks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('purpose = "für 日本"', encoding="utf-8")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1", write_through=True))
    assert main(["profile", "show", str(tmp_path / "own.toml")]) == 0
    assert 'purpose = "für ??"'.encode("latin-1") in written.getvalue()


def test_closed_output_swallows_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["replay", "chat", "--memory", "1"]) == 2
    with sys.stdout as swallowing:
        swallowing.write("nobody reads this")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_output_that_cannot_be_written_is_one_sentence() -> None:
    """In a process of its own: what Python still holds for standard output would fail again at its end."""
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "triptych", "plan"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "triptych: No space left on device.\n")


@pytest.mark.parametrize("name", ["checkpoint", "eval", "profile"])
def test_a_command_of_commands_lists_them_whole(capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, out, err = run(capsys, name)
    assert (status, err) == (0, "")
    listed = out[out.index("Commands:") :]
    assert listed.count("\n  ") >= 1
    assert "..." not in listed, "a line that does not fit is cut off"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"triptych {__version__}\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_that_opens_with_its_listed_line(capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, out, err = run(capsys, name, "--help")
    assert (status, err) == (0, "")
    assert f"Usage: triptych {name}" in out
    assert COMMANDS[name] in " ".join(out.split())


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["srve"], "There is no command 'srve'. Did you mean 'serve'?"),
        (["--versoin"], "triptych has no option --versoin. Did you mean --version?"),
        (["serve", "--prot", "9"], "triptych serve has no option --prot. Did you mean --port?"),
        (["serve", "--kv-memroy", "2GiB"], "triptych serve has no option --kv-memroy. Did you mean --kv-memory?"),
        (["chat", "--ignore-eos"], "triptych chat has no option --ignore-eos. See: triptych chat --help."),
        (["doctor", "--kernel-backend", "cuda"], "'cuda' is not one of 'auto', 'ref', 'cpu'"),
        (["serve", "--port", "many"], "'--port'"),
        (["generate", "tiny", "one", "two"], "two"),
        (["generate", "--model", "tiny", "x"], "Write its value without it: triptych generate"),
    ],
)
def test_usage_errors_are_one_sentence_with_a_remedy(
    capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert err.startswith("triptych: ") and err.count("\n") == 1
    assert sentence in err
    assert "Did you mean" in err or "See: triptych " in err or "Write its value" in err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["generate", "--temperature", "-1", "x"], "temperature must be a number in [0, 100], not -1.0."),
        (["generate", "--max-tokens", "0", "x"], "max_tokens must be an integer from 1"),
        (["generate", "--kv-memory", "2 GiBs", "x"], "--kv-memory '2 GiBs' has an unknown unit 'GiBs'."),
        (["chat", "--top-p", "nan"], "top_p must be a number in (0, 1], not nan."),
        (["bench", "chat", "--out", "."], "--out . cannot be written: it is a directory. Name a file in it."),
        (["bench", "chat", "--report", "no/such/page.html"], "--report no/such/page.html cannot be written: there is"),
        (["bench", "chat", "--ttft", "0"], "--ttft must be a positive number of seconds, not 0.0."),
        (["bench", "chat", "--ttft", "inf"], "--ttft must be a positive number of seconds, not inf."),
        (["bench", "chat", "--price", "nan"], "--price must be a number of dollars an hour, not nan."),
        (["plan", "--price", "inf"], "--price must be a number of dollars an hour, not inf."),
        (["profile", "fit", "chat", "--price", "-1"], "--price must be a number of dollars an hour, not -1.0."),
        (["bench", "chat", "--scale", "1e300"], "--scale must be above 0 and at most 1000, not 1e+300."),
        (["bench", "chat", "--speed", "inf"], "--speed must be above 0 and at most 1e+12, not inf."),
        (["bench", "chat", "--url", "127.0.0.1:9"], "http://127.0.0.1:9 lists no models: Connection refused. Start it"),
        (["bench", "chat", "--url", "http://[::1"], "'http://[::1' is no address of a server. For instance:"),
        (["bench", "chat", "--url", "http://127.0.0.1:99999"], "'http://127.0.0.1:99999' is no address of a server."),
        (["eval", "retrieval", "--url", ""], "'' is no address of a server."),
        (["chat", "http://[::1"], "'http://[::1' is no address of a server."),
        (["eval", "retrieval", "--heat-map", "no/such/map.png"], "there is no directory no/such."),
        (["profile", "compare", "--out", "."], "--out . cannot be written: it is a directory."),
        (["profile", "fit", "chat", "--tpot", "-1"], "--tpot must be a positive number of seconds, not -1.0."),
        (["profile", "fit", "chat", "--plot", "front.pdf"], "--plot front.pdf must end in .png or .svg."),
        (["replay", "chat", "--save", "."], "--save . cannot be written: it is a directory."),
    ],
)
def test_wrong_values_end_before_any_model_is_loaded(
    capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert err.startswith("triptych: ") and sentence in err
