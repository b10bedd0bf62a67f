"""`triptych replay` as a user meets it: a table, JSON, plots, and one sentence for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_traces import mooncake_rows, write_lines

from triptych.cache.geometry import CacheGeometry
from triptych.cli import replay as command
from triptych.cli.main import main
from triptych.config import SHAPES
from triptych.words import Usage
from triptych.workload.replay import POLICIES, ReplayResult, ReplaySettings
from triptych.workload.replay_plot import draw

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "session-trace.jsonl"

PROMISED = {
    "policy",
    "requests",
    "prompt_tokens",
    "cached_tokens",
    "recomputed_tokens",
    "recomputed_token_equivalents",
    "computed_tokens",
    "hit_rate",
    "computed_share",
    "evictions",
    "bytes_by_kind",
    "peak_bytes",
    "bytes_moved_by_tier",
    "useful_bytes_share",
    "manager_seconds",
    "match_us_p50",
    "match_us_p99",
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Mooncake trace of 60 lines."""
    return str(write_lines(tmp_path_factory.mktemp("trace") / "mooncake.jsonl", mooncake_rows()))


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `triptych replay ARGV`."""
    status = main(["replay", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, out, err


def rows(capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    """What --json prints; no NaN, which other readers of JSON do not know."""
    status, out, err = run(capsys, *argv, "--json")
    assert (status, err) == (0, "")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(out, parse_constant=refuse)


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one sentence about what is wrong."""
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("triptych: ") and err.count("\n") == 1
    return err.removeprefix("triptych: ").rstrip("\n")


# ---- what it prints


def test_a_table_of_one_line_and_what_it_means(capsys: pytest.CaptureFixture[str], trace: str) -> None:
    status, out, err = run(capsys, trace, "--memory", "1GiB")
    assert (status, err) == (0, "")
    head, line, *rest = out.splitlines()
    assert head.split()[:2] == ["memory", "policy"] and line.split()[:3] == ["1", "GiB", "adaptive"]
    result = rows(capsys, trace, "--memory", "1GiB")
    assert f"{100 * result['hit_rate']:.2f}" in line.split()
    assert f"60 requests, {result['prompt_tokens']:,} prompt tokens; an infinite cache would hit" in "\n".join(rest)
    assert max(map(len, out.splitlines())) <= 100


def test_large_numbers_keep_to_the_width_of_the_table() -> None:
    settings = ReplaySettings(CacheGeometry.of(SHAPES["flash"], "fp8"), 1023 << 30, "periodic:131072")
    resumes = {"snapshot": 99_999, "trapezoid": 9_999, "cold": 999}
    result = ReplayResult("periodic:4096", hit_rate=1.0, evictions=9_999_999, manager_seconds=9999.0, resumes=resumes)
    lines = command._table([(settings, result)]).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines[0]) == len(lines[1]), "heads stand over their columns"


def test_json_is_one_flat_object_with_all_that_is_promised(capsys: pytest.CaptureFixture[str], trace: str) -> None:
    row = rows(capsys, trace, "--memory", "300MiB", "--in-flight", "4", "--chunk", "1000", "--model", "flash")
    assert row.keys() >= PROMISED
    context = {"model": "flash", "trace": "mooncake.jsonl", "tokens": "literal", "memory": 300 << 20, "host_memory": 0}
    context |= {"disk": 0, "in_flight": 4, "chunk": 1000, "policy": "adaptive", "requests": 60}
    assert {name: row[name] for name in context} == context
    assert row["cached_tokens"] + row["recomputed_tokens"] + row["computed_tokens"] == row["prompt_tokens"]
    nested = {name for name, value in row.items() if isinstance(value, dict | list)}
    assert nested == {"bytes_by_kind", "bytes_moved_by_tier", "cached_by_tier", "resumes"}


def test_all_policies_are_a_list_in_order(capsys: pytest.CaptureFixture[str], trace: str) -> None:
    found = rows(capsys, trace, "--memory", "1GiB", "--policy", "all")
    assert [row["policy"] for row in found] == list(POLICIES)
    assert len({row["prompt_tokens"] for row in found}) == len({row["ideal_hit_rate"] for row in found}) == 1
    assert len({row["hit_rate"] for row in found}) > 1


def test_several_memories_are_a_list_and_a_line_each(capsys: pytest.CaptureFixture[str], trace: str) -> None:
    argv = (trace, "--memory", "512MiB, 1GB,2GiB", "--policy", "lru")
    assert [row["memory"] for row in rows(capsys, *argv)] == [512 << 20, 10**9, 2 << 30]
    _, out, _ = run(capsys, *argv)
    assert [line.split()[2] for line in out.splitlines()[1:4]] == ["lru"] * 3


def test_token_modes_and_limits_reach_the_trace(capsys: pytest.CaptureFixture[str], trace: str) -> None:
    literal, session = (rows(capsys, trace, "--memory", "8GiB", "--tokens", mode) for mode in ("literal", "session"))
    assert (literal["tokens"], session["tokens"]) == ("literal", "session")
    assert literal["ideal_hit_rate"] < session["ideal_hit_rate"]
    assert rows(capsys, trace, "--limit", "7")["requests"] == 7


def test_formats_and_models_reach_the_geometry(capsys: pytest.CaptureFixture[str], trace: str) -> None:
    used = [rows(capsys, trace, "--memory", "8GiB", "--limit", "5", "--kv-format", f) for f in ("fp8", "bfloat16")]
    pro = rows(capsys, trace, "--memory", "8GiB", "--limit", "5", "--model", "pro")
    pages = [row["bytes_by_kind"]["pages"] for row in (*used, pro)]
    assert pages[0] < pages[1] and pages[0] < pages[2] and pro["model"] == "pro"


def test_a_checkpoint_directory_is_a_model(capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path) -> None:
    shape = replace(SHAPES["flash"], ratios=(0, 4, 128), num_hash_layers=1)
    (tmp_path / "config.json").write_text(json.dumps(shape.to_dict()))
    row = rows(capsys, trace, "--memory", "64MiB", "--model", tmp_path)
    page = CacheGeometry.of(shape, "fp8").page_bytes
    assert row["bytes_by_kind"]["pages"] % page == 0 and row["peak_bytes"] <= 64 << 20
    assert row["model"] == str(tmp_path)


def test_lower_tiers_are_told_of(capsys: pytest.CaptureFixture[str], trace: str) -> None:
    argv = (trace, "--memory", "256MiB", "--in-flight", "4", "--policy", "lru")
    argv += ("--host-memory", "64MiB", "--disk", "4GiB")
    row = rows(capsys, *argv)
    assert (row["host_memory"], row["disk"]) == (64 << 20, 4 << 30)
    assert set(row["bytes_moved_by_tier"]) == {"host", "disk"}
    _, out, _ = run(capsys, *argv)
    assert f"host {row['cached_by_tier']['host']:,}" in out and f"disk {row['cached_by_tier']['disk']:,}" in out
    assert f"per byte of new pages: {row['write_amplification']:.2f}." in out


def test_remarks_say_which_run_they_are_about(capsys: pytest.CaptureFixture[str], trace: str) -> None:
    """The small memory holds one slot and ten frames or so, less than the longest prompts."""
    _, out, _ = run(capsys, trace, "--memory", "24MiB,1GiB", "--in-flight", "1", "--policy", "lru")
    [remark] = [line for line in out.splitlines() if "longer than this memory" in line]
    assert remark.startswith("24 MiB, lru: ")
    unservable = rows(capsys, trace, "--memory", "24MiB", "--in-flight", "1", "--policy", "lru")["unservable"]
    assert f": {unservable} requests" in remark and unservable > 0


def test_generated_traffic_needs_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("agents", "--memory", "2GiB", "--limit", "20")
    row = rows(capsys, *argv)
    assert (row["trace"], row["requests"]) == ("agents-0", 20)
    other = rows(capsys, *argv, "--seed", "3")
    assert (other["trace"], other["requests"]) == ("agents-3", 20)
    assert other["prompt_tokens"] != row["prompt_tokens"]


def test_the_shipped_example_hits_what_its_users_share(capsys: pytest.CaptureFixture[str]) -> None:
    """Every request but the first resumes from a snapshot, and nearly all that an infinite cache would find is hit."""
    row = rows(capsys, EXAMPLE, "--memory", "1GiB")
    assert row["resumes"] == {"cold": 1, "snapshot": 11}
    assert 0.99 * row["ideal_hit_rate"] < row["hit_rate"] < row["ideal_hit_rate"]
    assert rows(capsys, EXAMPLE, "--memory", "1GiB", "--policy", "none")["hit_rate"] < 0.8


def test_what_replay_counts_is_called_what_the_server_calls_it() -> None:
    names = ("prompt_tokens", "cached_tokens", "recomputed_tokens", "computed_tokens", "cached_by_tier")
    assert all(hasattr(Usage(), name) and hasattr(ReplayResult("p"), name) for name in names)


# ---- plots


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_plot_beside_the_table(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path, suffix: str, magic: bytes
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot{suffix}"
    argv = ("--memory", "512MiB,512MiB,1GiB", "--policy", "all", "--limit", "20", "--plot", path)
    status, out, err = run(capsys, trace, *argv)
    assert (status, err) == (0, f"Plot in {path}.\n")
    assert path.read_bytes().startswith(magic)
    assert len(out.splitlines()) > 3 * len(POLICIES)
    if suffix == ".svg":
        assert all(f"<!-- {policy} -->" in path.read_text() for policy in (*POLICIES, "infinite cache"))


def test_a_plot_that_fails_takes_no_numbers_with_it(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = run(capsys, trace, "--limit", "3", "--plot", tmp_path / "plot.png")
    assert status == 2 and "3 requests" in out
    assert err == "triptych: Plots need matplotlib. Install it with: pip install 'triptych[bench]'.\n"


def test_a_plot_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from triptych.errors import ConfigError

    (tmp_path / "plot.png").mkdir()
    with pytest.raises(ConfigError, match=r"plot.png cannot be written: Is a directory"):
        draw(tmp_path / "plot.png", "title", [(1.0, ReplayResult("lru").to_dict())])


# ---- what is wrong


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--policy", "adptive"], "--policy 'adptive' is not known. Did you mean 'adaptive'?"),
        (["--policy", "beladi"], "--policy 'beladi' is not known. Did you mean 'belady'?"),
        (["--policy", "periodic:100"], "'periodic:100': the period is a multiple of 128 tokens."),
        (["--memory", "lots"], "--memory 'lots' is no size. Write it as 512MiB, 2GiB or 1.5GB."),
        (["--memory", "1GiB,"], "--memory '' is no size."),
        (["--memory", "1GiB,2GX"], "--memory '2GX' has an unknown unit 'GX'."),
        (["--host-memory", "1Gb/s"], "--host-memory '1Gb/s' is no size."),
        (["--disk", "0"], "--disk must be at least one byte, not '0'."),
        (["--in-flight", "0"], "--in-flight must be at least 1, not 0."),
        (["--chunk", "-5"], "--chunk must be at least 1, not -5."),
        (["--limit", "0"], "--limit must be at least 1, not 0."),
        (["--model", "flsh"], "--model 'flsh' is neither flash nor pro nor a directory. Did you mean 'flash'?"),
        (["--plot", "plot.jpg"], "--plot plot.jpg must end in .png or .svg."),
        (["--plot", "no/such/plot.png"], "--plot no/such/plot.png cannot be written: there is no directory no/such."),
        (["--tokens", "both"], "'both' is not one of 'literal', 'session'"),
        (["--kv-format", "fp4"], "'fp4' is not one of 'float32', 'bfloat16', 'fp8'"),
        (["--memroy", "1GiB"], "triptych replay has no option --memroy. Did you mean --memory?"),
    ],
)
def test_wrong_flags_end_before_anything_is_replayed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trace: str, argv: list[str], sentence: str
) -> None:
    monkeypatch.setattr("triptych.workload.replay.replay", lambda *_: pytest.fail("replayed"))
    assert sentence in refused(capsys, trace, *argv)


def test_too_little_memory_says_how_much_is_enough_in_flags_of_this_command(
    capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    sentence = refused(capsys, trace, "--memory", "1GiB,1MiB")
    assert sentence.startswith("1.0 MiB of cache memory cannot hold 16 window slots")
    remedy = sentence.partition("Raise --memory to at least ")[2]
    enough, _, rest = remedy.partition(" or ")
    assert rest == "lower --in-flight."
    assert rows(capsys, trace, "--memory", enough)["requests"] == 60


def test_a_trace_that_is_not_there_is_named_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    remedy = "Name a JSON Lines file, or a workload such as chat or coding-agent."
    expected = f"Trace nosuch.jsonl cannot be read: No such file or directory. {remedy}"
    assert refused(capsys, "nosuch.jsonl") == expected
    assert refused(capsys, "agent") == "'agent' is neither a file nor a workload. Did you mean 'agents'?"


def test_a_broken_trace_names_its_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [*mooncake_rows(3), {"timestamp": 1}])
    assert refused(capsys, path).startswith(f"{path}, line 4: input_length must be a number")


def test_a_directory_without_a_model_says_so(capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path) -> None:
    assert refused(capsys, trace, "--model", tmp_path).startswith(f"There is no config.json in {tmp_path}.")


def test_policies_that_are_offered_are_those_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for policy in POLICIES:
        assert policy.partition(":")[0] in out
    for option in (
        "--model",
        "--memory",
        "--host-memory",
        "--disk",
        "--in-flight",
        "--tokens",
        "--kv-format",
        "--json",
    ):
        assert option in out


@pytest.mark.parametrize(
    "argv", [["--help"], [str(EXAMPLE), "--policy", "all", "--host-memory", "1GiB", "--disk", "1GB"]]
)
def test_neither_help_nor_a_replay_loads_torch(argv: list[str]) -> None:
    code = "import sys; from triptych.cli.main import main; status = main(['replay', *sys.argv[1:]])\n"
    code += "print('\\n'.join(sys.modules), file=sys.stderr); sys.exit(status)"
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.split("\n"))
    assert "triptych.cli.replay" in loaded and done.stdout
    assert not {"torch", "numba", "starlette", "matplotlib"} & loaded


@pytest.mark.parametrize("name", ["chat", "coding-agent", "research-agent", "rl-rollout", "mixed"])
def test_every_workload_is_replayed_by_name_and_from_what_was_saved(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "saved.jsonl"
    common = ("--memory", "4GiB", "--json")
    assert main(["replay", name, "--limit", "12", "--arrivals", "closed:3", "--save", str(saved), *common]) == 0
    made = json.loads(capsys.readouterr().out)
    assert main(["replay", str(saved), *common]) == 0
    read = json.loads(capsys.readouterr().out)
    assert made["requests"] == 12 and made["prompt_tokens"] == read["prompt_tokens"]
    assert made["cached_tokens"] == read["cached_tokens"]


def test_workloads_are_not_taken_for_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "reserch-agent"]) == 2
    assert "Did you mean 'research-agent'?" in capsys.readouterr().err
    assert main(["replay", "docs/examples/session-trace.jsonl", "--save", "x.jsonl"]) == 2
    assert "for generated traffic" in capsys.readouterr().err
