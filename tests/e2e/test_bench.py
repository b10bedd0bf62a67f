"""`triptych bench` on the bundled checkpoint: an engine of its own process, and a server, with the same traffic."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from live_server import Server

from triptych.cli import bench as bench_command

Triptych = Callable[..., Any]
TRAFFIC = ("coding-agent", "--requests", "12", "--scale", "0.02", "--arrivals", "closed:3", "--speed", "1000")


def bench(triptych: Triptych, *argv: str) -> dict[str, Any]:
    done = triptych("bench", *TRAFFIC, "--json", *argv)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["requests"], found["failed"]) == (12, 0)
    cache = found["cache"]
    parts = cache["cached_tokens"] + cache["recomputed_tokens"] + cache["computed_tokens"]
    assert parts == cache["prompt_tokens"]
    return found


def test_in_process_lengths_are_the_traces_and_sessions_find_their_prefix(triptych: Triptych, tmp_path: Path) -> None:
    kept = tmp_path / "run.json"
    page = tmp_path / "page.html"
    found = bench(triptych, "--kv-memory", "256MiB", "--out", str(kept), "--price", "3.6", "--report", str(page))
    rows = json.loads(kept.read_text())["rows"]["engine tiny"]
    assert "<svg" in page.read_text() and "hit rate" in page.read_text()
    assert len(rows) == 12 and all(len(row["arrivals"]) >= 1 for row in rows)
    assert all(sum(tokens for _, tokens in row["arrivals"]) == row["output_tokens"] for row in rows)
    assert found["cache"]["hit_rate"] > 0.3, "three users share tools, and each goes on"
    assert found["cost"]["usd"] > 0


def test_a_server_gets_the_same_traffic_as_text(triptych: Triptych, server: Server) -> None:
    found = bench(triptych, "--url", server.url)
    assert found["cache"]["hit_rate"] > 0.3
    assert found["ttft_s"]["p50"] > 0 and found["output_tokens_per_s"] > 0


def test_a_server_against_itself_is_compared_request_by_request(triptych: Triptych, server: Server) -> None:
    """The second run finds in the cache what the first one left; how much sooner its tokens come is the machine's."""
    done = triptych("bench", *TRAFFIC, "--seed", "5", "--json", "--url", server.url, "--against", server.url + "/v1")
    found = json.loads(done.stdout)
    assert found["paired"]["pairs"] == 12
    assert found["paired"]["ttft_s"]["ratio"] > 0
    first, second = found["runs"].values()
    assert first["cache"]["hit_rate"] < second["cache"]["hit_rate"]


def test_a_server_that_is_not_there_is_one_sentence(triptych: Triptych) -> None:
    done = triptych("bench", "chat", "--url", "http://127.0.0.1:9")
    assert done.returncode == 2 and "lists no models" in done.stderr and done.stderr.count("\n") == 1
    done = triptych("bench", "chatt")
    assert done.returncode == 2 and "Did you mean 'chat'?" in done.stderr


def test_settings_of_this_process_are_compared_in_turns(triptych: Triptych, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    argv = ("rl-rollout", "--requests", "8", "--scale", "0.001", "--clock", "cpu", "--rounds", "2", "--json")
    settings = ("--kv-memory", "64MiB", "--max-running", "8", "--against", "profile=chat,max_running=1")
    done = triptych("bench", *argv, *settings, "--report", str(page))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first, second = found["runs"]
    assert (first, second) == ("kv-memory 64MiB max-running 8", "profile=chat,max_running=1")
    assert found["runs"][first]["requests"] == found["runs"][second]["requests"] == 16
    assert found["paired"]["pairs"] == 16
    objective = found["objective"]
    assert objective["key"] == "rollouts_per_s" and [len(one) for one in objective["rounds"].values()] == [2, 2]
    gain = objective["gains_of_first"][second]
    assert gain["gain"] > 0 and gain["gain_95"][0] <= gain["gain"] <= gain["gain_95"][1]
    assert "<svg" in page.read_text() and second in page.read_text()


@pytest.fixture
def interrupted_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Ctrl-C as soon as so many requests have ended, also where a shell made the tests ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def arm(wanted: int) -> None:
        ended = 0

        @contextmanager
        def progress(total: int) -> Iterator[Callable[[], None]]:
            def advance() -> None:
                nonlocal ended
                ended += 1
                if ended == wanted:
                    signal.raise_signal(signal.SIGINT)

            yield advance

        monkeypatch.setattr(bench_command, "_progress", progress)

    yield arm
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_keeps_what_was_measured(
    triptych: Triptych, server: Server, tmp_path: Path, interrupted_after: Callable[[int], None]
) -> None:
    kept, page = tmp_path / "run.json", tmp_path / "page.html"
    for number, side in enumerate((("--kv-memory", "256MiB"), ("--url", server.url))):
        interrupted_after(4)
        done = triptych("bench", *TRAFFIC, *side, "--seed", str(number), "--out", str(kept), "--report", str(page))
        assert (done.returncode, done.stderr) == (130, "triptych: Interrupted.\n")
        found = json.loads(kept.read_text())
        [rows] = found["rows"].values()
        ended = found["requests"]
        assert 4 <= ended == len(rows) < 12, "answers that came with the fourth are kept too"
        assert all(row["output_tokens"] > 0 and row["error"] is None for row in rows)
        sentence = f"Interrupted; these figures are of the {ended} of 12 requests that had ended."
        assert found["cut_short"] == sentence
        assert done.stdout.startswith(sentence) and f"{ended} requests of" in done.stdout
        assert f"<p class=cut>{sentence}" in page.read_text()


def test_an_interrupt_before_the_first_answer_leaves_nothing_to_show(
    triptych: Triptych, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(trial: object, contenders: object, requests: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_command, "run_with_progress", interrupt)
    done = triptych("bench", *TRAFFIC, "--out", str(tmp_path / "run.json"))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "triptych: Interrupted.\n")
    assert not (tmp_path / "run.json").exists()


def test_an_interrupt_among_settings_keeps_the_rounds_that_all_have_run(
    triptych: Triptych, interrupted_after: Callable[[int], None]
) -> None:
    argv = ("rl-rollout", "--requests", "4", "--scale", "0.001", "--rounds", "3", "--json", "--kv-memory", "64MiB")
    settings = (*argv, "--max-running", "4", "--against", "max_running=1")
    interrupted_after(2 * 4 + 2)  # in the second round
    done = triptych("bench", *settings)
    assert done.returncode == 130, done.stderr
    found = json.loads(done.stdout)
    assert "of the 1 of 3 rounds" in found["cut_short"]
    assert [one["requests"] for one in found["runs"].values()] == [4, 4] and found["paired"]["pairs"] == 4
    assert all(len(one) == 1 for one in found["objective"]["rounds"].values())
    interrupted_after(2)  # in the first round: there is no objective, but what was answered is shown
    found = json.loads(triptych("bench", *settings).stdout)
    [only] = found["runs"].values()
    assert 2 <= only["requests"] <= 4 and "of 24 requests" in found["cut_short"]
    assert "objective" not in found


def test_a_contender_of_the_same_name_is_refused(triptych: Triptych, server: Server) -> None:
    done = triptych("bench", "chat", "--url", server.url, "--against", server.url)
    assert done.returncode == 2 and f"{server.url} would run twice" in done.stderr


def test_settings_that_cannot_be_are_refused_before_anything_runs(triptych: Triptych) -> None:
    done = triptych("bench", "chat", "--against", "stp_tokens=3")
    assert done.returncode == 2 and "Did you mean 'step_tokens'" in done.stderr
    done = triptych("bench", "chat", "--url", "http://127.0.0.1:9", "--rounds", "2")
    assert done.returncode == 2 and "engines of this process" in done.stderr
    done = triptych("profile", "compare", "chats")
    assert done.returncode == 2 and "Did you mean 'chat'" in done.stderr
