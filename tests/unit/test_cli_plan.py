"""`triptych plan` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from triptych.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(["plan", *argv])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_the_table_shows_the_arithmetic_and_the_ceiling(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--model", "pro", "--hardware", "hgx-b200", "--kv-policy", "full")
    assert status == 0
    assert "* full                  41,136     1.25M" in out
    assert "GB / 41,136" in out and "The ceiling, when snapshots cost nothing: 9." in out
    assert "With MXFP4 index keys, which published figures assume: 2.0% of" in out
    assert "10.5% of deepseek-v3.2's and 26.8% of its operations" in out
    assert max(len(line) for line in out.splitlines()[:-2]) <= 110


def test_json_is_data_and_agrees_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--model", "flash", "--gpus", "4", "--json", "--lengths", "8K,1M")
    found = json.loads(out)
    assert status == 0 and found["devices"] == 4
    assert [row["tokens"] for row in found["lengths"]] == [8192, 1 << 20]
    assert found["token_bytes"]["sum"] == found["page_bytes"] / 128


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--hardware", "h200"), "the weights take 159.6 GB of each device"),
        (("--hardware", "hgx-b20"), "Did you mean 'hgx-b200'?"),
        (("--model", "por"), "Did you mean 'pro'?"),
        (("--mix", "coding"), "Did you mean 'coding-agent'?"),
        (("--kv-policy", "ful"), "Did you mean 'full'?"),
        (("--kv-policy", "periodic:100"), "multiple of 128"),
        (("--lengths", "8Q"), "--lengths '8Q' is no length."),
        (("--lengths", "2M"), "--lengths 1048576"),
        (("--tp", "0"), "--tp 0 is impossible: a group has one device or more. The nearest that works is --tp 1."),
        (("--tp", "3"), "--tp 3 is impossible: 8 devices are no multiple of it."),
        (("--hardware-file", "no.toml"), "Hardware file no.toml cannot be read: No such file or directory."),
        (("--price", "nan"), "--price must be a number of dollars an hour, not nan."),
        (("--gpus", "0"), "--gpus must be at least 1"),
        (("--utilisation", "2"), "--utilisation must be a share"),
        (("--plot", "x.pdf"), "must end in .png or .svg"),
        (("--hadware", "h200"), "Did you mean --hardware?"),
    ],
)
def test_wrong_input_is_one_sentence_with_the_nearest(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], sentence: str
) -> None:
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert sentence in err and err.count("\n") == 1


def test_models_come_from_files_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from triptych.planner.models import TINY_CONFIG

    (tmp_path / "config.json").write_text(TINY_CONFIG.read_text())
    argv = ("--hardware", "rtx-4090", "--json")
    by_name, by_directory, by_file = (
        json.loads(run(capsys, "--model", name, *argv)[1])
        for name in ("tiny", str(tmp_path), str(tmp_path / "config.json"))
    )
    assert by_name["fits"] == by_directory["fits"] == by_file["fits"]


def test_the_catalogue_is_listed_with_sources(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--list")
    assert status == 0 and "data sheet" in out and "hgx-b300" in out


def test_a_plot_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    status, _, err = run(capsys, "--plot", str(tmp_path / "plan.svg"))
    assert status == 0 and "Plot in" in err
    assert "tokens that fit" in (tmp_path / "plan.svg").read_text()


def test_nothing_heavy_is_loaded() -> None:
    program = "import sys; from triptych.cli.main import main; sys.exit(main(['plan']) or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0
