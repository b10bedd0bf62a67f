"""The commands as a user types them, on the bundled checkpoint."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Triptych = Callable[..., Any]
SMALL = ("--kv-memory", "64MiB", "--max-running", "2")
GREEDY = (*SMALL, "--max-tokens", "12", "--temperature", "0")


def test_generate_says_the_same_by_every_way_in(triptych: Triptych, tmp_path: Path) -> None:
    text = "Once upon a time there was a lighthouse."
    path = tmp_path / "prompt.txt"
    path.write_text(text)
    greedy = (*GREEDY, "--ignore-eos")
    shown = triptych("generate", text, *greedy)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^prompt \d+ \| cached 0 \| recomputed 0 \| generated 12 \|", shown.stderr, re.MULTILINE)
    assert triptych("generate", "tiny", "-", *greedy, stdin=text).stdout == shown.stdout
    done = triptych("generate", "--json", "--logprobs", "2", "--file", str(path), "--file", str(path), *greedy)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [answer["text"] for answer in result["outputs"]] == [shown.stdout[:-1]] * 2
    for answer in result["outputs"]:
        assert len(answer["token_ids"]) == len(answer["logprobs"]) == 12
        assert answer["finish_reason"] == "length"
        assert all(len(one["top"]) == 2 and one["logprob"] <= 0 for one in answer["logprobs"])


def test_sampling_with_a_seed_can_be_repeated(triptych: Triptych) -> None:
    draws = [triptych("generate", "The sea", *SMALL, "--max-tokens", "16", "--seed", "7").stdout for _ in range(2)]
    assert draws[0] == draws[1] != ""


def test_a_missing_model_and_too_little_memory_are_sentences(triptych: Triptych) -> None:
    for argv, sentence in [
        (("generate", "no/such/model", "hello"), "no/such/model"),
        (("generate", "hello", "--kv-memory", "1KiB"), "--kv-memory"),
        (("chat", "tinny"), "tiny"),
    ]:
        done = triptych(*argv)
        assert done.returncode == 2, done.stderr
        assert done.stdout == "" and done.stderr.startswith("triptych: ") and done.stderr.count("\n") == 1
        assert sentence in done.stderr


def test_chat_answers_what_is_piped_in(triptych: Triptych) -> None:
    done = triptych("chat", *GREEDY, stdin="Hello.\n/stats\nAnd now?\n/stats\n/quit\nnever\n")
    assert done.returncode == 0, done.stderr
    costs = [line for line in done.stdout.splitlines() if re.match(r"\d: prompt ", line)]
    assert len(costs) == 3, done.stdout
    assert "\x1b" not in done.stdout
    assert costs[0] == costs[1], "the first answer's cost is shown twice"


def test_chat_finds_a_long_first_turn_cached(triptych: Triptych, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text(" ".join(f"Line {i} of the notes." for i in range(200)))
    done = triptych("chat", *GREEDY, stdin=f"/file {notes}\nWhat is it?\nAnd then?\n/stats\n")
    assert done.returncode == 0, done.stderr
    cached = [int(n.replace(",", "")) for n in re.findall(r"^\d: prompt .*cached ([\d,]+)", done.stdout, re.MULTILINE)]
    assert len(cached) == 2 and cached[0] == 0 and cached[1] >= 512


def test_doctor_tells_of_this_machine(triptych: Triptych) -> None:
    done = triptych("doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    versions = {package["name"]: package["version"] for package in report["packages"]}
    assert versions["torch"] and report["machine"]["cores"] >= 1
    assert report["machine"]["memory_free"] <= report["machine"]["memory_total"]
    assert {row["op"] for row in report["kernels"]} >= {"attend", "select_entries", "experts"}
    by_reference = json.loads(triptych("doctor", "--json", "--kernel-backend", "ref").stdout)
    assert {row["backend"] for row in by_reference["kernels"]} == {"ref"}
    assert "Kernels" in triptych("doctor").stdout


def test_the_library_example_of_the_readme_runs(environment: dict[str, str]) -> None:
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = [line for line in example.splitlines() if line.strip()]
    assert len(code) <= 6, "the example stays as short as it is said to be"
    done = subprocess.run([sys.executable, "-c", example], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    usage = done.stdout.splitlines()[-1].split()
    assert int(usage[0]) > 0 and usage[1:] == ["0", "0"], "a first prompt finds nothing cached"


def test_the_lazy_exports_are_the_real_things() -> None:
    import triptych
    from triptych.engine.api import AsyncEngine, Engine
    from triptych.errors import TriptychError
    from triptych.words import SamplingParams

    assert (triptych.Engine, triptych.AsyncEngine) == (Engine, AsyncEngine)
    assert (triptych.SamplingParams, triptych.TriptychError) == (SamplingParams, TriptychError)
    assert set(triptych.__all__) <= set(dir(triptych))
    assert not hasattr(triptych, "Enginee")


def test_checkpoint_commands_are_mounted(triptych: Triptych, tmp_path: Path) -> None:
    listed = triptych("checkpoint", "--help")
    assert listed.returncode == 0 and "inspect" in listed.stdout and "synthesize" in listed.stdout
    lost = triptych("checkpoint", "inspect", str(tmp_path / "lost"))
    assert lost.returncode == 2 and "lost" in lost.stderr


def test_the_command_runs_in_a_process_of_its_own(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "triptych", "generate", *GREEDY, "--seed", "1"]
    done = subprocess.run(command, env=environment, input="The sea", capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n") and done.stderr.startswith("prompt ")


def test_a_reader_that_leaves_early_causes_no_traceback(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "triptych", "generate", *SMALL, "--max-tokens", "400", "--ignore-eos", "The sea"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
