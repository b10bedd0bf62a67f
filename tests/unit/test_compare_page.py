"""The page of profiles against each other: verdicts, labels, contenders that could not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from triptych.config import EngineConfig
from triptych.engine.profiles import PROFILES
from triptych.workload.clients import Counts
from triptych.workload.compare import SETUPS, Compared, requests_of
from triptych.workload.compare_page import write_comparison
from triptych.workload.load import Timing
from triptych.workload.load_report import Slo
from triptych.workload.objectives import objective_for
from triptych.workload.trials import Contender


def contender(name: str, slower: float) -> Contender:
    rounds = [
        [
            Timing(f"s{i}", 0.0, 0.0, [(f * slower, 1), (f * 2 * slower, 9)], f * 2 * slower, Counts(50, 10, 5, 10))
            for i in range(6)
        ]
        for f in (1.0, 1.1, 1.3)
    ]
    return Contender(name, {"max_running": 3, "kv_memory": 1 << 20}, rounds)


def compared() -> Compared:
    contenders = [contender("chat", 1.0), contender("<other>", 1.5), contender("same", 1.0)]
    return Compared("chat", objective_for("chat"), Slo(2.0, 0.2), "chat", contenders, {"large": "too large & wide"})


def test_data_says_who_is_better_and_is_json() -> None:
    found = json.loads(json.dumps(compared().to_dict()))
    assert found["recommended"] == "chat" and found["measured_best"] in ("chat", "same")
    assert found["gains"]["<other>"]["gain"] == pytest.approx(1.5)
    assert found["gains"]["<other>"]["verdict"] == "better" and found["gains"]["same"]["verdict"] == "equal"
    assert set(found["profiles"]) == {"chat", "<other>", "same"} and found["refused"] == {"large": "too large & wide"}
    assert len(found["profiles"]["chat"]["objective"]) == 3
    assert found["profiles"]["chat"]["figures"]["computed_tokens"] == 18 * 35


def test_the_page_labels_its_axes_and_names_everyone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "page.html"
    write_comparison(path, [compared()], {"command": "<x>"})
    text = path.read_text()
    for label in (
        "SLO stretch, 95th percentile (lower is better)",
        "times that chat is better (1: equal)",
        "seconds to the first token",
        "cannot run: too large",
        "chat is better",
        "chat is equal",
        "&lt;other&gt;",
    ):
        assert label in text, label
    assert "<script" not in text and "src=" not in text, "the page loads nothing"


def test_rounds_follow_each_other_when_they_are_pooled() -> None:
    one = contender("chat", 1.0)
    pooled = one.timings()
    assert len(pooled) == 18 and len({timing.session for timing in pooled}) == 18
    assert pooled[6].intended == pytest.approx(2.0) and pooled[12].intended == pytest.approx(2.0 + 2.2)
    assert [timing.first for timing in pooled[6:12]] == pytest.approx([1.1] * 6)


@pytest.mark.parametrize("name", SETUPS)
def test_setups_draw_other_requests_each_round_and_fit_their_own_profile(name: str) -> None:
    setup = SETUPS[name]
    first, again, other = (requests_of(name, setup, seed) for seed in (0, 0, 1))
    assert first == again != other and len(first) == setup.requests
    EngineConfig.from_options(**PROFILES[name].on("cpu"))
