"""The dashboard: its figures, that they hold nobody's words, and the page as a browser shows it."""

from __future__ import annotations

import asyncio
import html
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from browser import needs_chromium, visit
from conftest import Server, wait_for
from fake_engine import FakeEngine

from triptych.server import dashboard
from triptych.server.app import build_app
from triptych.server.keys import load_keys
from triptych.server.options import ServerOptions
from triptych.text.tokenizer import Tokenizer
from triptych.words import EngineStats, Facts, Panels, RequestFacts, SessionFacts

SECRET = "a secret nobody may see"
PANELS = Panels({"csa": 60, "index": 30, "hca": 10}, 800, 2000, {"device": 58_000, "host": 10_000, "disk": 0})
CACHE = {
    **{"pages_held": 100, "pages_cached": 200, "frames_free": 20, "frames_loading": 5, "frames_evictable": 150},
    **{"slots": 4, "slots_free": 1, "snapshot_bytes_used": 8 * 800, "frames": 500},
    **{"host_pages": 30, "host_snapshots": 2, "host_frames_free": 50, "disk_bytes_used": 7_000},
    **{"cached_tokens": 700, "recomputed_tokens": 100, "admitted_tokens": 1000, "host_tokens_found": 200},
    **{"snapshot_resumes": 6, "trapezoid_resumes": 3, "cold_starts": 1, "preemptions": 2},
}
REQUESTS = (
    RequestFacts("chatcmpl-aaaa1111.0", "decode", 9000, 9020, 20, 9100, 8000, 4, "snapshot", seconds=3.0),
    RequestFacts("chatcmpl-bbbb2222.0", "prefill", 1_000_000, 250_000, 0, 1_000_500, 128_000, 0, "trapezoid", 1),
    RequestFacts("chatcmpl-cccc3333.0", "fetching", 50_000, 0, 0, 50_100, tenant="7f00aa11", seconds=0.4),
    RequestFacts("chatcmpl-dddd4444.0", "waiting", 600, 0, 0, 700, seconds=0.1),
)
SESSIONS = (
    SessionFacts("5e55i0n1", "", 7, 131_072, {"device": 131_072}, 131_072, "device", 0, 12.0, ttl=300.0),
    SessionFacts("5e55i0n2", "7f00aa11", 3, 65_536, {"device": 32_768, "host": 16_384}, 49_152, "host", 0, 900.0),
    SessionFacts("5e55i0n3", "", 1, 12_800, {"disk": 12_800}, 0, "", 5_400, 90_000.0, pin=60.0),
)


class Busy(FakeEngine):
    """An engine that has much to tell."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.panels = PANELS
        self.told = Facts(REQUESTS, SESSIONS, 2, 2, 40, 0.0004)
        self.ticks = 0
        self.looks = 0
        self.slow = False

    def stats(self) -> EngineStats:
        self.ticks += 1
        more = {"admitted_tokens": 1000 + 500 * self.ticks, "cached_tokens": 700 + 400 * self.ticks}
        moving = {"snapshot_resumes": 6 + self.ticks, **more}
        return EngineStats(
            2, 2, 9, generated_tokens=80 * self.ticks, prefill_rows=900 * self.ticks, cache=CACHE | moving
        )

    async def facts(self) -> Facts:
        self.looks += 1
        if self.slow:
            await asyncio.Event().wait()
        return self.told


@pytest.fixture
def busy(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Busy:
    monkeypatch.setattr(dashboard, "EVERY", 0.05)
    return Busy(tokenizer)


@pytest.fixture
def site(busy: Busy) -> Iterator[Server]:
    running = Server(build_app(busy, ServerOptions()))
    yield running
    running.stop()


def figures(http: httpx.Client, since: str = "0") -> dict[str, Any]:
    answer = http.get("/dashboard/data", params={"since": since})
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    return dict(answer.json())


def test_memory_by_tier_and_kind_adds_up_to_the_room(site: Server) -> None:
    with site.http() as http:
        data = figures(http)
    device = data["memory"]["device"]
    assert device == {
        **{"csa": 300 * 60, "index": 300 * 30, "hca": 300 * 10, "snapshot": 6400, "window": 6000, "loading": 500},
        **{"padding": 58_000 - 30_000 - 6400 - 6000 - 500 - 4000, "free": 20 * 100 + 2000},
    }
    host = {"csa": 1800, "index": 900, "hca": 300, "snapshot": 1600, "padding": 400, "free": 5000}
    assert data["memory"]["host"] == host
    assert data["memory"]["disk"] == {"object": 7000, "free": 0}, "a store whose room is unknown"
    assert data["evictable"] == 15_000
    for tier in ("device", "host"):
        assert sum(data["memory"][tier].values()) == data["room"][tier]


def test_prompt_tokens_and_plans_are_told_whole(site: Server) -> None:
    with site.http() as http:
        data = figures(http)
    assert sum(data["sources"].values()) % 500 == 0, "found + recomputed + computed are all that were admitted"
    assert data["sources"]["host"] == 200 and data["sources"]["recomputed"] == 100
    assert data["plans"]["trapezoid"] == 3 and data["plans"]["cold"] == 1 and data["plans"]["bounded"] == 0
    assert data["totals"]["preemptions"] == 2


def test_requests_and_conversations_are_listed(site: Server) -> None:
    with site.http() as http:
        facts = figures(http)["facts"]
    assert [one["state"] for one in facts["requests"]] == ["decode", "prefill", "fetching", "waiting"]
    assert facts["requests"][1]["processed"] == 250_000 and facts["requests"][1]["prompt_tokens"] == 1_000_000
    assert facts["sessions"][1]["by_tier"] == {"device": 32_768, "host": 16_384}
    assert facts["sessions"][0]["ttl"] == 300.0 and facts["sessions"][2]["pin"] == 60.0
    assert facts["remembered"] == 40


def test_the_past_is_there_when_someone_looks_and_only_what_is_new_after_that(site: Server, busy: Busy) -> None:
    with site.http() as http:
        wait_for(lambda: len(figures(http)["history"]) >= 3)
        first = figures(http)["history"]
        assert [row["number"] for row in first] == list(range(1, len(first) + 1))
        last = first[-1]
        assert last["decode"] % 80 == 0 and last["prefill"] % 900 == 0 and last["decode"] > 0
        assert last["from_device"] > 0 and last["from_host"] == last["plan_cold"] == 0 < last["plan_snapshot"]
        assert last["running"] == 2 and last["used"] == 54_000
        wait_for(lambda: bool(figures(http, str(last["number"]))["history"]))
        assert figures(http, str(last["number"]))["history"][0]["number"] == last["number"] + 1
        for nonsense in ("-1", "x", "9" * 40, "²"):
            assert figures(http, nonsense)["history"][0]["number"] == 1


def test_the_past_is_bounded(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    state = build_app(busy).state.server
    past = dashboard.History(state)
    for second in range(dashboard.KEPT + 20):
        past.sample(float(second))
    rows = past.since(0)
    assert len(rows) == dashboard.KEPT and rows[-1]["number"] == dashboard.KEPT + 19
    assert {row["seconds"] for row in rows} == {1.0}


def test_many_who_look_cost_the_engine_one_look(site: Server, busy: Busy) -> None:
    def look(_: int) -> int:
        with site.http() as http:
            return len(figures(http)["facts"]["requests"])

    begin = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(look, range(40))) == {4}
    assert busy.looks <= 8 + 2 * (time.monotonic() - begin) / dashboard._FRESH


def test_a_long_step_holds_nobody_up(site: Server, busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "_PATIENCE", 0.1)
    monkeypatch.setattr(dashboard, "_FRESH", 0.0)
    with site.http() as http:
        figures(http)
        busy.slow = True
        busy.told = Facts()
        data = figures(http)
        assert len(data["facts"]["requests"]) == 4 and data["facts_age"] >= 0.1, "the last ones, and how old they are"


def test_nothing_that_anyone_said_is_told(client: openai.OpenAI, http: httpx.Client, engine: FakeEngine) -> None:
    said = client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": SECRET}],
        max_tokens=12,
        user=SECRET,
        extra_headers={"x-request-id": "abc"},
    )
    told = http.get("/dashboard/data").text + http.get("/metrics").text
    assert SECRET not in told and str(said.choices[0].message.content) not in told


def test_the_wait_for_a_first_token_is_told(client: openai.OpenAI, http: httpx.Client, engine: FakeEngine) -> None:
    assert figures(http)["first_token"] == {"count": 0}
    engine.prefill_delay = 0.05
    for _ in range(3):
        client.completions.create(model="fake", prompt=[1, 2], max_tokens=2)
    told = figures(http)["first_token"]
    assert told["count"] == 3 and 0.05 <= told["p50"] <= told["p95"] < 5


def test_an_engine_that_tells_little_is_no_error(http: httpx.Client) -> None:
    data = figures(http)
    assert data["memory"]["device"]["padding"] == 1 << 20 and data["facts"]["requests"] == []


def test_the_page_loads_nothing_from_elsewhere_and_runs_nothing_inline(http: httpx.Client) -> None:
    kinds = {"/dashboard": "text/html", "/dashboard/style.css": "text/css", "/dashboard/page.js": "text/javascript"}
    for path in dashboard.STATIC:
        answer = http.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kinds.get(path, "image/svg+xml"))
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert not re.search(r"https?://(?!www\.w3\.org/)|//cdn", answer.text), f"{path} names another place"
    page = http.get("/dashboard").text
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", page)
    assert "innerHTML" not in http.get("/dashboard/page.js").text
    for target in re.findall(r'(?:href|src)="([^"]+)"', page):
        assert f"/{target}" in dashboard.STATIC
    assert http.post("/dashboard/data").status_code == 405


def text_of(markup: str) -> str:
    """The words of a page, without tags and with single spaces."""
    words = html.unescape(re.sub(r"<[^>]+>", " ", markup.partition("<body>")[2]))
    return re.sub(r"\s+", " ", words)


@needs_chromium
def test_a_browser_shows_an_idle_server(server: Server, tmp_path: Path) -> None:
    seen = visit(f"{server.url}/dashboard", tmp_path)
    words = text_of(seen.markup)
    assert not seen.console, seen.console
    assert "fake" in words and "live" in words and "Found in the cache – no prompt yet" in words
    for empty in ("No request is running or waiting.", "No conversation has ended", "No request was admitted yet."):
        assert empty in words
    assert "No tokens in the last" in words and "NaN" not in words and "undefined" not in words
    assert seen.picture.stat().st_size > 20_000


@needs_chromium
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_a_browser_shows_a_busy_server(site: Server, tmp_path: Path, colours: str) -> None:
    with site.http() as http:
        wait_for(lambda: len(figures(http)["history"]) >= 20)
    seen = visit(f"{site.url}/dashboard#{colours}", tmp_path)
    words = text_of(seen.markup)
    assert not seen.console, seen.console
    assert f'data-theme="{colours}"' in seen.markup
    for shown in (
        *("Running 2 of", "Waiting 2 of", "tokens/s", "CSA entries 17.6 KiB", "SWA snapshots 6.25 KiB"),
        *("250,000 of 1,000,000 rows", "20 of 100", "8,000 + 4 again", "fetching", "rebuild", "preempted 1×"),
        *("32,768 device · 16,384 host · 16,384 gone", "at 49,152 from host", "no window stored; 5,400 run again"),
        *("pinned 60 s more", "for 5 min more", "25.0 h", "37 more are remembered", "2 preemptions"),
    ):
        assert shown in words, shown
    assert "NaN" not in words and "undefined" not in words and "Infinity" not in words
    assert seen.markup.count('class="line') == 2
    assert seen.picture.stat().st_size > 40_000


@needs_chromium
def test_a_name_that_is_markup_stays_text(busy: Busy, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    busy.told = replace(busy.told, requests=(replace(REQUESTS[0], request_id=evil, state=evil, tenant=evil),))
    running = Server(build_app(busy, ServerOptions(served_model_name=evil)))
    try:
        seen = visit(f"{running.url}/dashboard", tmp_path)
    finally:
        running.stop()
    assert "<img" not in seen.markup and evil in html.unescape(seen.markup)


def test_figures_are_json_that_others_can_read(site: Server) -> None:
    with site.http() as http:
        data = json.loads(http.get("/dashboard/data").content, parse_constant=lambda name: pytest.fail(name))
    assert data["limits"]["running"] > 0


@pytest.fixture
def guarded(busy: Busy, tmp_path: Path) -> Iterator[Server]:
    file = tmp_path / "keys.toml"
    file.write_text(
        '[[key]]\nname = "operator"\nkey = "sk-operator"\nadmin = true\n\n[[key]]\nname = "guest"\nkey = "sk-guest-1"\n'
    )
    running = Server(build_app(busy, ServerOptions(), load_keys(str(file))))
    yield running
    running.stop()


def test_with_keys_the_figures_need_one_with_admin_rights(guarded: Server) -> None:
    with guarded.http() as http:
        assert http.get("/dashboard/data").status_code == 401
        for key, status in (("sk-wrong-one", 401), ("sk-guest-1", 403), ("sk-operator", 200)):
            answer = http.get("/dashboard/data", headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == status
            assert ("facts" in answer.json()) == (status == 200)
        for path in dashboard.STATIC:
            assert http.get(path).status_code == 200, "the page holds nothing, and a browser cannot send a key for it"
        for path in ("/dashboard/data/", "/dashboard//data", "/dashboard/other"):
            assert http.get(path).status_code in (401, 403, 404)


@needs_chromium
def test_a_browser_asks_for_a_key(guarded: Server, tmp_path: Path) -> None:
    seen = visit(f"{guarded.url}/dashboard", tmp_path)
    assert "needs a key" in text_of(seen.markup)
    assert re.search(r'<form id="key">', seen.markup), "the form is shown"
    assert "chatcmpl-" not in seen.markup


@needs_chromium
def test_a_browser_says_when_no_step_begins(engine: FakeEngine, server: Server, tmp_path: Path) -> None:
    engine.updates += [("a directory", "drain", None)] * 3
    for state, sentence in (("paused", "paused: no step begins"), ("updating", "new weights wait for requests to end")):
        engine.state = state
        seen = visit(f"{server.url}/dashboard", tmp_path)
        words = text_of(seen.markup)
        assert not seen.console, seen.console
        assert sentence in words and "weights replaced 3×" in words
