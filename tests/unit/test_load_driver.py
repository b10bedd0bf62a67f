"""The load driver against answering sides that stall, fail, and talk HTTP badly."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.errors import ConfigError
from triptych.words import TokenIds
from triptych.workload.address import Address, address_of
from triptych.workload.clients import AnswerError, Counts, OverHttp, Piece
from triptych.workload.load import Load, LoadSettings, Timing, scaled
from triptych.workload.load_page import write_page
from triptych.workload.load_pairs import pair_lines, paired
from triptych.workload.load_report import Slo, spread, summary, table
from triptych.workload.named import workload
from triptych.workload.sessions import Part, SessionRequest, as_sessions
from triptych.workload.texts import Texts
from triptych.workload.trace_files import read_trace


def encode(text: str) -> TokenIds:
    return np.frombuffer(text[:4000].encode(), np.uint8).astype(np.int32)


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts(encode)


class Fake:
    """Answers one token at once and the others after `seconds`; one at a time, like a server of one slot."""

    name = "fake"

    def __init__(self, seconds: float = 0.0, fail: str = "") -> None:
        self._seconds, self._fail = seconds, fail
        self._slot = asyncio.Lock()
        self.asked: list[tuple[str, list[Any]]] = []
        self.running = self.most = 0

    def content(self, ids: TokenIds) -> Any:
        return ids

    async def ask(self, contents: Sequence[Any], output: int, session: str) -> AsyncIterator[Piece]:
        self.asked.append((session, list(contents)))
        if session == self._fail:
            raise AnswerError("no")
        async with self._slot:
            self.running += 1
            self.most = max(self.most, self.running)
            yield Piece(np.full(1, 7, np.int32), 1)
            await asyncio.sleep(self._seconds)
            yield Piece(np.full(output - 1, 8, np.int32), output - 1)
            self.running -= 1
        total = sum(len(part) for part in contents)
        yield Piece(counts=Counts(total, total // 2, 1, output, {"host": 3}))


def request(time: float, session: str, *parts: str, output: str = "o") -> SessionRequest:
    return SessionRequest(time, session, "", tuple(Part(p, 40, "user") for p in parts), Part(f"{session}{output}", 5))


def drive(client: Any, texts: Texts, requests: list[SessionRequest], **settings: Any) -> list[Timing]:
    return asyncio.run(Load(client, texts, LoadSettings(**settings)).run(requests))


def test_a_stall_is_charged_to_everyone_who_had_to_wait(texts: Texts) -> None:
    """Five requests are due together at a server that takes them one by one: the last waited for all."""
    timings = drive(Fake(0.05), texts, [request(0.0, f"s{i}", f"p{i}") for i in range(5)])
    assert all(one.sent < 0.05 for one in timings), "an open loop sends although nothing was answered"
    firsts = sorted(one.first for one in timings)
    assert firsts[0] < 0.05 and firsts[-1] > 0.18


def test_requests_are_sent_when_they_are_due(texts: Texts) -> None:
    timings = drive(Fake(), texts, [request(0.4 * i, f"s{i}", "p") for i in range(4)], speed=4.0)
    assert [one.intended for one in timings] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert all(one.sent >= one.intended for one in timings)


def test_a_next_turn_waits_for_its_answer_and_repeats_what_was_said(texts: Texts) -> None:
    client = Fake(0.1)
    first = request(0.0, "s", "p", output="1")
    second = SessionRequest(0.01, "s", "", (*first.prompt, first.output, Part("q", 9, "user")), Part("s2", 3))
    timings = drive(client, texts, [first, second])
    assert timings[1].intended >= timings[0].end - 0.01
    assert client.asked[1][1][1].tolist() == [7, 8, 8, 8, 8]
    assert np.array_equal(client.asked[0][1][0], client.asked[1][1][0])


def test_a_closed_loop_runs_so_many_sessions_and_pauses_after_answers(texts: Texts) -> None:
    client = Fake(0.0)
    requests = [request(0.0, f"s{i}", "p") for i in range(6)]
    requests += [request(0.05, f"s{i}", "p", "q") for i in range(6)]
    timings = drive(client, texts, sorted(requests, key=lambda one: one.time), closed=2)
    assert len(timings) == 12 and timings[-1].end > 3 * 0.05
    assert all(one.sent - one.intended < 0.05 for one in timings)


def test_a_failed_answer_ends_its_session_and_no_other(texts: Texts) -> None:
    requests = [request(0.0, name, "p") for name in ("a", "b")] + [request(0.01, name, "p", "q") for name in ("a", "b")]
    timings = drive(Fake(fail="a"), texts, requests)
    assert [(one.session, one.error) for one in timings if one.error] == [("a", "no")]
    assert len(timings) == 3
    found = summary(timings, Slo())
    assert (found["requests"], found["failed"], found["errors"]) == (3, 1, {"no": 1})
    assert "1 x no" in table(found)


def test_figures_add_up(texts: Texts) -> None:
    timings = drive(Fake(0.02), texts, [request(0.0, f"s{i}", "p") for i in range(4)])
    found = summary(timings, Slo(ttft=0.03, tpot=1.0), hourly=3600.0)
    cache = found["cache"]
    assert (
        cache["cached_tokens"] + cache["recomputed_tokens"] + cache["computed_tokens"] == cache["prompt_tokens"] == 160
    )
    assert cache["cached_by_tier"] == {"device": 80 - 12, "host": 12}
    assert found["goodput"]["share"] == pytest.approx(0.5, abs=0.26)
    assert found["cost"]["usd"] == pytest.approx(found["seconds"])
    assert found["cost"]["usd_per_session"] == pytest.approx(found["seconds"] / 4)
    assert json.loads(json.dumps(found)) == found
    for one in timings:
        assert one.per_token == pytest.approx((one.arrivals[-1][0] - one.arrivals[0][0]) / 4)


def test_rollouts_are_counted_timed_and_priced(texts: Texts) -> None:
    requests = scaled(workload("rl-rollout", 48).requests, 0.002)
    found = summary(drive(Fake(0.001), texts, requests), Slo(), hourly=3600.0)
    told = found["rollouts"]
    assert (told["trajectories"], told["prompts"]) == (48, 3)
    assert told["trajectories_per_s"] == pytest.approx(48 / found["seconds"])
    assert told["usd_per_trajectory"] == pytest.approx(found["seconds"] / 48)
    assert told["tokens_per_trajectory"] == pytest.approx(sum(one.output.tokens for one in requests) / 48)
    assert 0 < told["half_done_s"] < told["all_done_s"] <= found["seconds"]
    assert "48 trajectories of 3 prompts" in table(found)
    chat = summary(drive(Fake(), texts, [request(0.0, f"s{i}", f"p{i}") for i in range(4)]), Slo())
    assert "rollouts" not in chat and "trajectories" not in table(chat)


def test_intervals_hold_the_percentile_and_shrink_with_the_sample() -> None:
    few, many = (spread(np.random.default_rng(1).lognormal(size=n).tolist()) for n in (30, 3000))
    assert few is not None and many is not None
    for found in (few, many):
        assert found["p50_95"][0] <= found["p50"] <= found["p50_95"][1]
    assert many["p50_95"][1] - many["p50_95"][0] < few["p50_95"][1] - few["p50_95"][0]
    assert spread([float("nan")]) is None


def test_texts_are_real_exact_and_part_at_once(texts: Texts, tmp_path: Path) -> None:
    one, other = (texts.ids(Part(name, 300, "tool")) for name in ("a", "b"))
    assert len(one) == len(other) == 300 and (one[:4] != other[:4]).any()
    assert np.array_equal(one, Texts(encode).ids(Part("a", 300, "tool")))
    assert np.array_equal(one[:200], texts.ids(Part("a", 200, "tool")))
    (tmp_path / "mine.md").write_text("Only this. " * 20)
    mine = Texts(encode, tmp_path).ids(Part("a", 60, "tool"))
    assert "nly this." in bytes(mine.astype(np.uint8)).decode()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="There is no prose"):
        Texts(encode, empty).ids(Part("a", 60, "user"))


def test_scaling_keeps_the_shape_of_the_traffic() -> None:
    requests = workload("chat", 20, 1).requests
    for before, after in zip(requests, scaled(requests, 0.1), strict=True):
        assert [part.id for part in after.prompt] == [part.id for part in before.prompt]
        assert all(b.tokens == max(1, round(a.tokens * 0.1)) for a, b in zip(before.prompt, after.prompt, strict=True))
    assert scaled(requests, 1.0) == requests


def test_a_mooncake_trace_becomes_parts_that_share_what_its_blocks_share(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1000, "output_length": 7, "hash_ids": [1, 2]},
        {"timestamp": 500, "input_length": 1100, "output_length": 8, "hash_ids": [1, 2, 3]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = as_sessions(read_trace(path))
    assert [sum(part.tokens for part in one.prompt) for one in (first, second)] == [1000, 1100]
    assert first.prompt[0] == second.prompt[0] and first.prompt[1] != second.prompt[1]
    assert second.time == 0.5


def served(reply: bytes) -> list[Piece]:
    """What OverHttp makes of a server that answers anything with `reply`."""

    async def run() -> list[Piece]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split()[0])
            body = json.loads(await reader.readexactly(length))
            assert body["prompt"] == "ab" and body["max_tokens"] == 2 and body["stream"] is True
            writer.write(reply)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            client = OverHttp(f"http://127.0.0.1:{port}/v1", "m", decode=None)
            return [piece async for piece in client.ask(["a", "b"], 2, "s")]

    return asyncio.run(run())


def events(*rows: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(row).encode() + b"\n\n" for row in rows) + b"data: [DONE]\n\n"


STREAM = events(
    {"choices": [{"text": "x"}]},
    {"choices": [{"text": "y"}]},
    {
        "choices": [],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
    },
)
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_streams_are_read_whole_or_in_chunks_of_any_size(size: int) -> None:
    pieces = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    whole = served(OK + b"\r\n" + STREAM)
    assert served(OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked) == whole
    assert [piece.content for piece in whole] == ["x", "y", None]
    assert whole[-1].counts == Counts(9, 4, 0, 2)


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (b"HTTP/1.1 429 Too Many\r\n\r\nslow down", "answered 429: slow down"),
        (OK + b"\r\n" + events({"error": {"message": "broke"}}), "broke"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nff\r\nshort", "did not answer: it closed the connection."),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", "did not answer: it closed the connection."),
        (OK, "did not answer: it closed the connection."),
        (b"", "did not answer: it closed the connection."),
        (b"nonsense\r\n\r\n", "did not answer: what it sent is no HTTP."),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "did not answer: what it sent is no HTTP."),
    ],
)
def test_what_is_no_answer_is_said(reply: bytes, sentence: str) -> None:
    with pytest.raises(AnswerError) as refused:
        served(reply)
    assert sentence in str(refused.value)


def test_a_server_that_is_gone_is_said() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def ask() -> None:
        async for _ in OverHttp(f"127.0.0.1:{port}", "m", decode=None).ask(["a"], 2, "s"):
            pass

    with pytest.raises(AnswerError, match=rf"^127.0.0.1:{port} did not answer: Connection refused\.$"):
        asyncio.run(ask())


def test_an_open_stream_that_ends_without_an_end_is_no_answer() -> None:
    """Where neither length nor chunks say what is missing, its last event does."""
    with pytest.raises(AnswerError, match="did not answer: it closed the connection"):
        served(OK + b"\r\n" + events({"choices": [{"text": "x"}]}).removesuffix(b"data: [DONE]\n\n"))


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("localhost:8000/v1/", Address(False, "localhost", 8000, "")),
        ("https://x.org/api/v1", Address(True, "x.org", None, "/api")),
        ("http://[::1]:80", Address(False, "::1", 80, "")),
    ],
)
def test_addresses_as_people_type_them(url: str, found: Address) -> None:
    assert address_of(url) == found
    assert address_of(found.base) == found
    assert found.here is (found.host != "x.org")


@pytest.mark.parametrize("url", ["ftp://x", "", "http://", "http://[::1", "x:y", "http://x:99999", "http://x:-1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a server"):
        OverHttp(url, "m", decode=None)


def timing(session: str, first: float, total: float, error: str | None = None) -> Timing:
    arrivals = [(first, 1), (total, 4)]
    return Timing(session, 0.0, 0.0, arrivals, total, Counts(10, 0, 0, 5), error)


def test_pairs_compare_each_request_with_itself() -> None:
    one = [timing(f"s{i // 2}", 0.1 * (i + 1), 1.0 * (i + 2)) for i in range(10)]
    other = [timing(f"s{i // 2}", 0.05 * (i + 1), 0.9 * (i + 2)) for i in range(10)]
    found = paired(one, other)
    assert found["pairs"] == 10
    assert found["ttft_s"]["ratio"] == pytest.approx(0.5)
    assert found["ttft_s"]["ratio_95"] == pytest.approx([0.5, 0.5])
    assert found["end_to_end_s"]["ratio"] == pytest.approx(0.9)
    assert "0.500" in pair_lines(found, "first", "second")
    other[3] = timing("s1", 9.0, 9.0, "no")
    assert paired(one, other)["pairs"] == 9
    assert paired([], [])["ttft_s"] is None


def test_a_page_names_its_axes_and_settings_and_escapes_what_it_was_given(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    timings = [timing(f"s{i}", 0.1 * (i + 1), 1.0 + i) for i in range(8)]
    path = tmp_path / "page.html"
    found = summary(timings, Slo(), hourly=3.0)
    runs = {"<a>": (found, timings), "b": (found, timings)}
    write_page(path, runs, {"workload": "chat", "command": "<x>"}, ["b over <a>"])
    text = path.read_text()
    assert "&lt;a&gt;" in text and "&lt;x&gt;" in text and "<x>" not in text
    assert "<pre>b over &lt;a&gt;</pre>" in text, "what runs say of each other is on the page too"
    for label in ("seconds to the first token", "share of requests", "prompt tokens, by where they came from"):
        assert label in text
    assert "http" not in text.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", ""), "the page loads nothing"
    with pytest.raises(ConfigError, match="cannot be written"):
        write_page(tmp_path / "no" / "page.html", {"a": (found, timings)}, {})
