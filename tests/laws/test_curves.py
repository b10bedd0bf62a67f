"""docs/curves.md, its pictures and docs/gpu.md are what the committed rows give."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from package_source import ROOT

from triptych.engine.profiles import PROFILES

matplotlib = pytest.importorskip("matplotlib", reason="the pictures are drawn with the extra `bench`")
DOCS = ROOT / "docs"
STALE = "run `make bench` and commit what it writes"


@pytest.fixture(scope="module")
def curves() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("benchmarks.curves")
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def drawn(curves: ModuleType) -> list[Any]:
    return [module.curve() for module in curves.CURVES]


def test_the_page_is_what_the_rows_give(curves: ModuleType, drawn: list[Any]) -> None:
    assert (DOCS / "curves.md").read_text(encoding="utf-8") == curves.page(drawn), f"docs/curves.md is old: {STALE}"


def test_the_pictures_are_what_the_rows_give(drawn: list[Any]) -> None:
    pictures = {f"{one.name}.svg": one.picture for one in drawn if one.picture is not None}
    assert set(pictures) == {path.name for path in (DOCS / "curves").iterdir()}
    for name, picture in pictures.items():
        committed = (DOCS / "curves" / name).read_text(encoding="utf-8")
        assert f"rows {picture.digest}" in committed, f"docs/curves/{name} shows other rows: {STALE}"
        if f"Matplotlib v{matplotlib.__version__}," in committed:  # another version may draw the same otherwise
            assert committed == picture.svg, f"docs/curves/{name} is old: {STALE}"


def test_every_picture_has_labels_units_origin_and_something_in_it(drawn: list[Any]) -> None:
    for one in drawn:
        if one.picture is None:
            assert "rows of" in one.text, "where nothing can be drawn the page says why"
            continue
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", one.picture.svg)
        assert any("commit" in text and "python -m benchmarks" in text for text in texts), one.name
        assert any(word in text for text in texts for word in ("tokens", "GiB", "pressure", "seconds")), one.name
        marks = len(re.findall(r"<use ", one.picture.svg))
        assert marks > 40, f"{one.name} shows next to nothing"


def test_pictures_name_no_machine_paths() -> None:
    for path in [DOCS / "curves.md", DOCS / "gpu.md", *(DOCS / "curves").iterdir()]:
        assert not re.search(r"/(home|root|tmp|work)/", path.read_text(encoding="utf-8")), path.name


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ((0.5, 0.5, 2.0, 4.0), "below **1.4**"),
        ((2.0, 1.01, 0.5, 0.25), "above **1**"),  # what is within 3 % decides nothing
        ((0.5, 0.6, 0.7, 0.8), "everywhere"),
        ((2.0, 2.0, 1.5, 1.2), "nowhere"),
        ((1.0, 1.01, 0.99, 1.0), "equal"),
        ((1.0, 0.5, 1.0, 1.0), "nowhere dearer, by most at 1"),
    ],
)
def test_a_crossing_is_named_where_costs_change_sides(
    curves: ModuleType, ratios: tuple[float, ...], words: str
) -> None:
    places = (0.5, 1.0, 2.0, 4.0)
    one, other = [(x, 3.0 * r) for x, r in zip(places, ratios, strict=True)], [(x, 3.0) for x in places]
    assert curves.prefixes.crossing(one, other) == words
    assert all(a < b for a, b in pairwise(places))


def test_a_curve_without_rows_says_so(curves: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = importlib.import_module("benchmarks.rows")
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    for module in (curves.hits, curves.prefixes, curves.profiles):
        found = module.curve()
        assert found.picture is None and "no rows of" in found.text.lower()


def test_profiles_are_compared_over_all_rounds_with_their_settings(
    curves: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.rows"), "RESULTS", tmp_path)
    made = [
        profile_row("2026-01-01", chat=[1.0, 1.1], mixed=[2.0, 2.1]),
        profile_row("2026-02-01", {"requests": 21}, chat=[1.0, 1.0], mixed=[9.0, 9.0]),  # another trial
        profile_row("2026-03-01", chat=[1.2, 1.3], mixed=[2.5, 2.4], research_agent=[None, 2.0]),
    ]
    renamed = profile_row("2026-02-02", chat=[1.0], mixed=[2.2])
    renamed["profiles"]["an older name"] = renamed["profiles"].pop("mixed")
    foreign = profile_row("2026-02-03", chat=[1.0], mixed=[7.0])
    foreign["profiles"]["mixed"]["options"]["step_tokens"] = 64  # settings that nobody ships any more
    made += [renamed, foreign]
    (tmp_path / "profiles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    found = curves.profiles.curve()
    [line] = [line for line in found.text.splitlines() if "| mixed |" in line]
    assert line.startswith("| chat | `chat` | mixed | 2.00 |") and line.endswith("| 5 | better |"), line
    assert "| research-agent |  | requests failed in 1 rounds of research-agent | 2 |  |" in found.text
    assert "| rl-rollout |  | rl-rollout cannot run in this memory |  |  |" in found.text
    assert "| coding-agent |  | not measured yet |  |  |" in found.text
    assert "Not measured yet: coding-agent, research-agent, rl-rollout." in found.text
    assert "times better" in found.picture.svg and "chat: profile chat" in found.picture.svg
    assert found.text.count("lower is better") == 1 and "20 requests" in found.text


def profile_row(time: str, other: dict[str, Any] | None = None, /, **rounds: list[float | None]) -> dict[str, Any]:
    """A row of `profiles` as that benchmark writes them: rounds of each profile by its name, with `_` for `-`."""
    trial = {"requests": 20, "scale": 0.02, "arrivals": "closed:4", "rounds": 2, "clock": "cpu"} | (other or {})
    objective = {"key": "t", "label": "SLO stretch", "meaning": "mean", "higher_is_better": False}
    profiles = {
        name: {"options": dict(PROFILES[name].on("cpu")), "objective": values}
        for name, values in ((name.replace("_", "-"), values) for name, values in rounds.items())
    }
    return {
        **{"benchmark": "profiles", "time": time, "command": "python -m benchmarks profiles", "commit": "abc"},
        **{"machine": {"cpu": "a processor", "cores": 2}, "workload": "chat", "trial": trial, "objective": objective},
        **{"profiles": profiles, "recommended": "chat", "refused": {"rl-rollout": "too small"}},
    }


# ---- docs/gpu.md


def test_the_page_of_kernels_is_what_the_rows_give(curves: ModuleType) -> None:
    assert (DOCS / "gpu.md").read_text(encoding="utf-8") == curves.kernels.page(), f"docs/gpu.md is old: {STALE}"


def test_without_rows_the_page_of_kernels_says_what_to_run(
    curves: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.rows"), "RESULTS", tmp_path)
    assert (
        "no rows of `gpu_table` yet" in curves.kernels.page()
        and "python -m benchmarks.gpu.table" in curves.kernels.page()
    )


def test_rows_of_one_commit_are_one_table(curves: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.rows"), "RESULTS", tmp_path)
    flash = {"model": "flash", "context": "any"}
    write(tmp_path / "gpu_table.jsonl", [
        table_row("2026-01-01", "old", [{**flash, "op": "linear o_b", "batch": 1, "us": 99.0, "floor_us": 7.6}]),
        table_row("2026-01-02", "new", [
            {**flash, "op": "attend csa", "batch": 1, "us": 15.0, "floor_us": 0.1, "by_flash_mla_us": 16.0},
            {**flash, "op": "attend csa", "batch": 64, "us": 50.0, "floor_us": 7.5, "by_flash_mla_us": 44.0},
        ], missing=["flash experts x 1", "flash attend csa x 128", "pro experts x 1"]),
        table_row("2026-01-03", "new", [
            {**flash, "op": "experts", "batch": 1, "us": 39.5, "floor_us": 24.8, "marlin_us": 59.4},
            {**flash, "op": "attend csa", "batch": 1, "us": 7.5, "floor_us": 0.1, "by_flash_mla_us": 16.0},
        ]),
    ])  # fmt: skip
    page = curves.kernels.page()
    assert "| CSA, window and chosen entries, any context | ours | **7.5** | – | – | 50.0 | – |" in page, (
        "the newest, bold if first"
    )
    assert "|  | floor | 1.2 (16%) | – | – | 7.5 (15%) | – |" in page, "nothing takes less than a launch"
    assert "|  | with FlashMLA | 16.0 | – | – | 44.0 | – |" in page
    assert "|  | FlashMLA's call alone | not in this run | – | – | not in this run | – |" in page
    assert "|  | goal | ≤ 8 |  |  | ≤ 22 |  |" in page
    assert "| router, routed and shared experts | ours | **39.5** |" in page
    assert "|  | Marlin, routed experts alone | 59.4 |" in page
    assert "2 of the 3 cases" in page and "2 of 3 goals" in page
    assert "Not measured: 2 cases, flash attend csa x 128, pro experts x 1." in " ".join(page.split())
    assert "99.0" not in page and "## V4-Pro\n\nNot measured at this commit" in page
    assert page.count("- one NVIDIA H200; commit new;") == 1


def test_a_run_of_some_groups_takes_nothing_off_the_page_of_kernels(
    curves: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.rows"), "RESULTS", tmp_path)
    attend = {"model": "flash", "context": "any", "op": "attend csa", "batch": 1, "floor_us": 0.1}
    whole = table_row("2026-01-01", "old", [{**attend, "us": 15.0}])
    some = table_row("2026-01-02", "new", [{**attend, "us": 7.5}, {**attend, "batch": 2, "us": 8.5}])
    write(tmp_path / "gpu_table.jsonl", [whole, {**some, "command": some["command"] + " --only attention"}])
    page = curves.kernels.page()
    assert "| CSA, window and chosen entries, any context | ours | 15.0 |" in page
    assert (
        "| Flash, CSA, window and chosen entries, any context | 1: 7.5, 2: 8.5 |"
        in page.partition("## Measured since")[2]
    )


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ({"op": "attend csa", "us": 75.0, "by_flash_mla_us": 61.0, "engine": "FlashMLA"}, "level"),
        ({"op": "attend csa", "us": 75.0, "by_flash_mla_us": 61.0, "engine": "ours"}, "behind"),
        ({"op": "attend csa", "us": 61.0, "by_flash_mla_us": 75.0, "engine": "FlashMLA"}, "level"),
        ({"op": "attend csa", "us": 61.0, "flash_mla_us": 40.0}, "alone"),
        ({"op": "select fp8", "us": 14.0, "by_deep_gemm_us": 13.7, "deep_gemm_us": 9.0}, "level"),
        ({"op": "select fp8", "us": 14.0, "by_deep_gemm_us": 13.5, "deep_gemm_us": 9.0}, "behind"),
        ({"op": "select mxfp4", "us": 14.0}, "alone"),
        ({"op": "experts", "us": 45.0, "marlin_us": 59.0}, "level"),
        ({"op": "linear o_b", "us": 45.0}, "alone"),
        ({"op": "linear o_b", "us": 45.0, "deep_gemm_us": 20.0}, "behind"),
        ({"op": "mhc_rows", "us": 45.0}, "alone"),
    ],
)
def test_cases_are_counted_by_what_the_engine_uses(curves: ModuleType, line: dict[str, Any], what: str) -> None:
    assert curves.kernels.is_behind(line) is {"level": False, "behind": True, "alone": None}[what]


def test_cases_in_which_a_vendor_takes_less_are_named(
    curves: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.rows"), "RESULTS", tmp_path)
    pro = {"model": "pro", "context": "8K", "floor_us": 1.0}
    parts = {"scores_us": 6.0, "topk_us": 9.0, "deep_gemm_scores_us": 4.0}
    keys, attend = {**pro, "op": "select fp8"}, {**pro, "op": "attend hca"}
    write(tmp_path / "gpu_table.jsonl", [
        table_row("2026-01-01", "new", [
            {**keys, "batch": 8, "us": 20.0, "by_deep_gemm_us": 10.0, "deep_gemm_us": 7.5, **parts, "agrees": 1.0},
            {**keys, "batch": 1, "us": 15.0, "by_deep_gemm_us": 10.0, "deep_gemm_us": 7.0, **parts, "agrees": 0.992},
            {**keys, "batch": 32, "us": 10.2, "by_deep_gemm_us": 10.0, "deep_gemm_us": 8.0},
            {**attend, "batch": 64, "us": 30.0, "by_flash_mla_us": 20.0, "flash_mla_us": 15.0, "engine": "FlashMLA"},
            {**attend, "batch": 32, "us": 18.0, "by_flash_mla_us": 19.0, "flash_mla_us": 15.0, "engine": "FlashMLA"},
        ]),
    ])  # fmt: skip
    page = curves.kernels.page()
    flat = " ".join(page.split())
    assert "| Pro, index, FP8 keys, 8K | 1: 15.0 / 10.0 (+50%), 8: 20.0 / 10.0 (+100%) |" in page
    assert "**Attention**" not in page, "reasons are given for what is behind"
    assert "in 1 of 2 cases, elsewhere at least 99.2% of them (Pro, index, FP8 keys, 8K, 1 rows)" in flat
    assert "our top-k takes 9.0 to 9.0 us of the time, vLLM's 3.0 to 3.5" in flat
    assert "| HCA, window and all entries, 8K | ours | – | – | 18.0 | 30.0 | – |" in page
    assert "|  | with FlashMLA | – | – | **19.0** | **20.0** | – |" in page, "bold is what the engine uses"
    assert (
        "though ours takes less, us of ours / of it: Pro, HCA, window and all entries, 8K, 32 rows: 18.0 / 19.0."
        in flat
    )
    assert "|  | with DeepGEMM and top-k | 10.0 | 10.0 | 10.0 | – | – |" in page
    assert "3 of the 5 cases" in flat


def table_row(time: str, commit: str, table: list[dict[str, Any]], missing: Sequence[str] = ()) -> dict[str, Any]:
    """A row of `gpu_table` as that benchmark writes them."""
    return {
        **{"benchmark": "gpu_table", "time": time, "command": "python -m benchmarks.gpu.table", "commit": commit},
        **{"card": "NVIDIA H200", "table": table, "missing": list(missing), "failed": {}},
    }


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
