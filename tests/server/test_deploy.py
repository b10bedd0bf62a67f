"""The Grafana dashboard and the alert rules: every metric and label they name is one that a server exposes."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from triptych.engine.api import AsyncEngine
from triptych.server.app import build_app
from triptych.server.record import Record
from triptych.words import SamplingParams

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
GRAFANA = json.loads((DEPLOY / "grafana" / "triptych.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text(encoding="utf-8"))
FROM_PROMETHEUS = {"up"}  # what Prometheus itself says of a target
SERVER_LABELS = {"instance", "job"}  # what Prometheus adds to every sample

Samples = dict[str, dict[str, set[str]]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Sample name -> label -> values, of the real engine with all tiers, after one request."""
    disk = tmp_path_factory.mktemp("disk")
    engine = AsyncEngine.load(
        "tiny", kv_memory=32 << 20, host_memory=16 << 20, disk=str(disk), disk_memory=1 << 30, canary=1.0, threads=1
    )

    async def one_request() -> None:
        await engine.start()
        prompt = np.arange(300, dtype=np.int32) + 50
        async for _ in engine.stream(prompt, SamplingParams(max_tokens=3, ignore_eos=True), request_id="r"):
            pass
        await engine.stop()

    asyncio.run(one_request())
    state = build_app(engine).state.server
    for status in (200, 429, 500):
        record = Record("r", "POST", "/v1/completions", state.metrics, status=status)
        record.finish()
    found: Samples = {}
    for family in text_string_to_metric_families(state.metrics.text().decode()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every panel, variable and rule."""
    for panel in GRAFANA["panels"]:
        for target in panel.get("targets", []):
            yield f"panel {panel['title']}", target["expr"]
    for variable in GRAFANA["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["query"]["query"]
    for group in RULES["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


ALL = list(expressions())


@pytest.mark.parametrize(("where", "expression"), ALL, ids=[where for where, _ in ALL])
def test_every_metric_and_label_is_there(where: str, expression: str, samples: Samples) -> None:
    bare = re.sub(r'"[^"]*"', '""', expression)
    names = set(re.findall(r"\btriptych_\w+", bare))
    assert names or re.findall(r"\w+", bare)[0] in FROM_PROMETHEUS, f"{where} asks for no metric"
    assert names <= set(samples), f"{where} names {sorted(names - set(samples))}"
    known = SERVER_LABELS.union(*(samples[name] for name in names))
    asked = {label for group in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", bare) for label in group.split(",")}
    asked |= {label for group in re.findall(r"\{([^}]*)\}", bare) for label in re.findall(r"(\w+)\s*[=!]", group)}
    assert {label.strip() for label in asked} <= known, f"{where} asks for labels that its metrics lack"


def test_labels_are_compared_with_values_that_occur(samples: Samples) -> None:
    """A misspelled label value is never wrong and never there."""
    for where, expression in ALL:
        for name, matchers in re.findall(r"(\btriptych_\w+)\{([^}]*)\}", expression):
            for label, pattern in re.findall(r'(\w+)\s*(?:=|!=|=~|!~)\s*"([^"]*)"', matchers):
                if label in SERVER_LABELS or "$" in pattern:
                    continue
                for alternative in pattern.split("|"):
                    values = samples[name][label]
                    assert any(re.fullmatch(alternative, value) for value in values), f"{where}: {label}={alternative}"


def test_tiers_kinds_plans_and_sources_are_told(samples: Samples) -> None:
    assert samples["triptych_tier_bytes"]["tier"] == {"device", "host", "disk"}
    assert {"csa", "index", "hca", "snapshot", "window", "free"} <= samples["triptych_tier_bytes"]["kind"]
    assert samples["triptych_resumes_total"]["plan"] == {"snapshot", "trapezoid", "bounded", "cold"}
    assert {"device", "recomputed", "computed"} <= samples["triptych_prompt_source_tokens_total"]["source"]


def test_the_grafana_dashboard_is_well_formed() -> None:
    panels: list[dict[str, Any]] = GRAFANA["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }  # the grid is 24 wide
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        assert panel["type"] == "row" or panel["targets"]


def test_alerts_say_what_is_wrong_and_how_bad() -> None:
    rules = [rule for group in RULES["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 8
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here: the alerts were not evaluated")
def test_alerts_fire_on_what_they_are_for_and_on_nothing_else() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", str(Path(__file__).parent / "alerts.yml")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
