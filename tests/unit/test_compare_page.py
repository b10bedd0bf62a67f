"""The page of profiles against each other: verdicts, labels, contenders that could not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from triptych.cache.geometry import CacheGeometry
from triptych.config import EngineConfig, ModelShape
from triptych.engine.profiles import PROFILES
from triptych.planner.models import TINY_CONFIG
from triptych.workload import compare as comparison
from triptych.workload.clients import Counts
from triptych.workload.compare import SETUPS, Compared, Plan, Setup, compare, requests_of
from triptych.workload.compare_page import write_comparison
from triptych.workload.load import Timing
from triptych.workload.load_report import Slo
from triptych.workload.objectives import objective_for
from triptych.workload.simulate import MachineCosts, StepCosts
from triptych.workload.trials import Contender, Trial, keep_whole_rounds


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


def test_after_an_interrupt_only_rounds_that_all_have_run_are_compared() -> None:
    whole, torn, late = (contender(name, 1.0) for name in ("whole", "torn", "late"))
    torn.torn, late.rounds = True, late.rounds[:2]
    assert keep_whole_rounds([whole, torn, late]) == 2
    assert [len(one.rounds) for one in (whole, torn, late)] == [2, 2, 2] and not torn.torn
    alone = contender("alone", 1.0)
    alone.rounds, alone.torn = alone.rounds[:1], True
    assert keep_whole_rounds([alone, contender("other", 1.0)]) == 0
    assert len(alone.rounds) == 1 and alone.torn, "nothing is dropped where no round is whole"


@pytest.mark.parametrize("rounds", [0, 2])
def test_an_interrupted_comparison_keeps_its_whole_rounds(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(trial: Trial, contenders: list[Contender], on_done: object) -> None:
        for one in contenders:
            one.rounds = contender(one.name, 1.0).rounds[:rounds]
        contenders[0].rounds.append([])
        contenders[0].torn = True
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "run_trial", interrupted)
    costs = MachineCosts(StepCosts(step=0.01, decode=0.001, prompts=0.02, prompt=0.0, prefill=0.0005, context=0.02))
    plan = Plan("tiny", costs, {"chat": {}, "mixed": {"max_running": 4}}, rounds=5)
    geometry = CacheGeometry.of(ModelShape.from_file(TINY_CONFIG))
    setup = Setup(8, 0.02, "closed:2", "28MiB", "")
    if not rounds:
        with pytest.raises(KeyboardInterrupt):
            compare("chat", setup, plan, geometry)
        return
    found = compare("chat", setup, plan, geometry)[1].to_dict()
    assert found["cut_short"] is True
    assert [len(one["objective"]) for one in found["profiles"].values()] == [2, 2]


@pytest.mark.parametrize("name", SETUPS)
def test_setups_draw_other_requests_each_round_and_fit_their_own_profile(name: str) -> None:
    setup = SETUPS[name]
    first, again, other = (requests_of(name, setup, seed) for seed in (0, 0, 1))
    assert first == again != other and len(first) == setup.requests
    EngineConfig.from_options(**PROFILES[name].on("cpu"))
