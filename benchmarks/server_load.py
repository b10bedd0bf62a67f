"""python -m benchmarks server_load: a real `triptych serve` under many streaming clients.

overhead  Decode throughput of `--streams` concurrent streams through HTTP, against the same prompts in the engine in
          process, in turns. Client and server share the processors, so the client's share is in the figure.
soak      `--clients` clients for `--seconds`: each asks for one of a few texts whose right answer is known, some leave
          in mid-stream, some read slowly. Nothing may leak, no answer may be wrong, nobody may starve.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import rows
from triptych.engine.api import Engine
from triptych.text.dsml import OutputParser
from triptych.text.pieces import Content
from triptych.text.render import Style, render_turns
from triptych.text.turns import parse_turns
from triptych.words import SamplingParams, TokenIds

_FLAGS = {"max_running": 32, "step_tokens": 512, "kv_memory": 1 << 30}
_SOAK_FLAGS = _FLAGS | {"kv_memory": 96 << 20}  # soon full: what grows after that is no frame used for the first time
_TEXTS = [
    f"Chapter {i}. The code for amber falcon {i} is {48213 + i}. " + "It was told again. " * (5 * i) for i in range(8)
]


def main(argv: list[str]) -> int:
    """Measure, print, write a row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks server_load", description=__doc__)
    parser.add_argument("part", choices=("overhead", "soak"))
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--short", action="store_true", help="does it work? writes no row")
    given = parser.parse_args(argv)
    if given.short:
        given.rounds, given.seconds, given.tokens = 1, 10.0, 32
    before = rows.load_average()
    values = overhead(given) if given.part == "overhead" else soak(given)
    print(json.dumps(values, indent=2))
    if not given.short:
        values |= {"load": [before, rows.load_average()]}
        rows.append("server_load", {"part": given.part, **values}, kv_bytes={"ours": _FLAGS["kv_memory"]}, threads=1)
    return 1 if values.get("wrong") or values.get("starved") else 0


@dataclass
class Server:
    """A server process."""

    process: subprocess.Popen[bytes]
    port: int

    def metrics(self) -> dict[str, float]:
        """Samples without labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and line[0] != "#" and "{" not in line)
        return {name: float(value) for name, value in pairs}

    def usage(self) -> dict[str, float]:
        """Memory, open files and processor time of the process."""
        folder = Path(f"/proc/{self.process.pid}")
        fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        rss = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("VmRSS"))
        ticks = os.sysconf("SC_CLK_TCK")
        return {
            "rss_mib": round(int(rss.split()[1]) / 1024, 1),
            "files": len(list((folder / "fd").iterdir())),
            "cpu_s": round((int(fields[11]) + int(fields[12])) / ticks, 2),
        }


@contextmanager
def serving(given: dict[str, int] = _FLAGS) -> Iterator[Server]:
    """A `triptych serve tiny` on a free port, stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    flags = [
        part for k, v in given.items() for part in (f"--{k.replace('_', '-')}", f"{v}B" if k == "kv_memory" else str(v))
    ]
    command = [sys.executable, "-m", "triptych", "serve", "tiny", "--port", str(port), "--log-level", "error", *flags]
    server = Server(subprocess.Popen(command, stderr=subprocess.DEVNULL), port)
    try:
        for _ in range(1200):
            try:
                server.metrics()
                break
            except OSError:
                time.sleep(0.1)
        yield server
    finally:
        server.process.terminate()
        server.process.wait(60)


@dataclass
class Seen:
    """What one client saw of one answer."""

    text: str = ""
    tokens: int = 0
    first: float = 0.0
    worst: float = 0.0  # longest silence between two events
    whole: bool = False


async def ask(port: int, text: str, tokens: int, *, leave_after: float = 1e9, pause: float = 0.0) -> Seen:
    """One streaming answer over its own socket. After `leave_after` events it hangs up; it may pause at each read."""
    messages = [{"role": "user", "content": text}]
    body: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": tokens, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True}
    data = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096 if pause else 2**16)
    seen, begin = Seen(), time.perf_counter()
    last = begin
    raw: list[bytes] = []
    try:
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
            % len(data)
        )
        writer.write(data)
        events = 0
        while piece := await reader.read(512 if pause else 2**16):
            now = time.perf_counter()
            if b"data: " in piece:
                if not seen.first:
                    seen.first, last = now - begin, now
                seen.worst, last = max(seen.worst, now - last), now
            raw.append(piece)
            events += piece.count(b"data: ")
            if events >= leave_after:
                return seen
            if pause:
                await asyncio.sleep(pause)
    finally:
        writer.close()
    _read(b"".join(raw), seen)
    return seen


def _read(raw: bytes, seen: Seen) -> None:
    if not raw.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(raw[:300].decode("utf-8", "replace"))
    lines = raw.split(b"\r\n\r\n", 1)[1].split(b"data: ")
    parts = []
    for line in lines[1:]:
        event = line.split(b"\n\n")[0]
        if event == b"[DONE]":
            seen.whole = True
            continue
        value = json.loads(event)
        parts += [choice["delta"].get("content") or "" for choice in value["choices"]]
        if value.get("usage"):
            seen.tokens = value["usage"]["completion_tokens"]
    seen.text = "".join(parts)


def rendered(text: str, engine: Engine) -> TokenIds:
    """The prompt that the server makes of one user message."""
    assert engine.tokenizer is not None
    turns = parse_turns([{"role": "user", "content": text}])
    return render_turns(turns, engine.tokenizer, Style(), limit=engine.max_context).ids


def said(text: str) -> str:
    """What a chat shows of `text`."""
    parser = OutputParser()
    pieces = parser.push(text) + parser.finish()
    return "".join(piece.text for piece in pieces if isinstance(piece, Content))


# ---- overhead


def overhead(given: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second through HTTP and in process, round by round in turns."""
    params = SamplingParams(max_tokens=given.tokens, temperature=0.0, ignore_eos=True)
    prompts = [f"{i} bottles stand on the wall. " * 3 for i in range(given.streams)]
    engine = Engine.load("tiny", **_FLAGS)
    ids = [rendered(prompt, engine) for prompt in prompts]
    total = given.streams * given.tokens
    through: list[dict[str, float]] = []
    inside: list[dict[str, float]] = []
    with serving() as server:
        for round_ in range(given.rounds + 1):
            begin, used, mine = time.perf_counter(), server.usage()["cpu_s"], time.process_time()
            seen = asyncio.run(_crowd(server.port, prompts, given.tokens))
            http = time.perf_counter() - begin
            cpu, client = server.usage()["cpu_s"] - used, time.process_time() - mine
            begin, mine = time.perf_counter(), time.process_time()
            outputs = engine.generate(ids, params)
            alone, alone_cpu = time.perf_counter() - begin, time.process_time() - mine
            assert [s.text for s in seen] == [said(out.text) for out in outputs], "answers differ"
            assert sum(s.tokens for s in seen) == total
            if round_:  # the first warms both up
                through.append({"tok_s": total / http, "cpu_s": cpu, "client_cpu_s": client})
                inside.append({"tok_s": total / alone, "cpu_s": alone_cpu})
    engine.close()
    table = {
        "http": {k: round(statistics.median(r[k] for r in through), 3) for k in through[0]},
        "in_process": {k: round(statistics.median(r[k] for r in inside), 3) for k in inside[0]},
    }
    pairs = zip(through, inside, strict=True)
    ratios = sorted(1 - a["tok_s"] / b["tok_s"] for a, b in pairs)
    return {
        **{"streams": given.streams, "tokens": given.tokens, "rounds": given.rounds, **table},
        "overhead_percent": round(100 * statistics.median(ratios), 2),
        "overhead_percent_range": [round(100 * ratios[0], 2), round(100 * ratios[-1], 2)],
        "overhead_cpu_percent": round(100 * (table["http"]["cpu_s"] / table["in_process"]["cpu_s"] - 1), 2),
    }


async def _crowd(port: int, prompts: list[str], tokens: int) -> list[Seen]:
    return list(await asyncio.gather(*(ask(port, prompt, tokens) for prompt in prompts)))


# ---- soak


@dataclass
class Tally:
    """What the clients of a soak saw together."""

    right: int = 0
    left: int = 0
    slow: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: int = 0
    firsts: list[float] = field(default_factory=list)
    silences: list[float] = field(default_factory=list)
    by_client: dict[int, int] = field(default_factory=dict)


def soak(given: argparse.Namespace) -> dict[str, Any]:
    """Clients come and go; then everything must be as before."""
    engine = Engine.load("tiny", **_SOAK_FLAGS)
    params = SamplingParams(max_tokens=given.tokens, temperature=0.0, ignore_eos=True)
    outputs = engine.generate([rendered(text, engine) for text in _TEXTS], params)
    right = {text: said(out.text) for text, out in zip(_TEXTS, outputs, strict=True)}
    engine.close()
    tally = Tally()
    with serving(_SOAK_FLAGS) as server:
        asyncio.run(_clients(server.port, given, right, tally, 3.0, clients=20))  # warm: pools, threads, caches
        time.sleep(2)
        before, tally = server.usage(), Tally()
        memory: list[float] = []
        asyncio.run(_watched(server, given, right, tally, memory))
        time.sleep(3)
        after, metrics = server.usage(), server.metrics()
    quantile = statistics.quantiles(tally.firsts, n=100) if len(tally.firsts) > 1 else [0.0] * 99
    silence = statistics.quantiles(tally.silences, n=100) if len(tally.silences) > 1 else [0.0] * 99
    return {
        **{"clients": given.clients, "seconds": given.seconds, "tokens": given.tokens},
        **{"right": tally.right, "left": tally.left, "slow": tally.slow, "wrong": len(tally.wrong)},
        **{"refused": tally.refused, "examples": tally.wrong[:3]},
        "starved": sum(1 for i in range(given.clients) if not tally.by_client.get(i)),
        "answers_per_client": [min(tally.by_client.values(), default=0), max(tally.by_client.values(), default=0)],
        "first_token_s": {"p50": round(quantile[49], 3), "p99": round(quantile[98], 3)},
        "longest_silence_s": {"p50": round(silence[49], 3), "p99": round(silence[98], 3)},
        **{"before": before, "after": after, "rss_mib_by_tenths": memory},
        "left_behind": {
            name: metrics[name]
            for name in ("triptych_running_requests", "triptych_waiting_requests", "triptych_requests_in_flight")
        },
        "slots_free": metrics.get("triptych_cache_slots_free"),
    }


async def _watched(
    server: Server, given: argparse.Namespace, right: dict[str, str], tally: Tally, memory: list[float]
) -> None:
    """The clients, and the server's memory after each tenth of their time."""
    crowd = asyncio.create_task(_clients(server.port, given, right, tally, given.seconds, clients=given.clients))
    for _ in range(10):
        await asyncio.sleep(given.seconds / 10)
        memory.append(server.usage()["rss_mib"])
    await crowd


async def _clients(
    port: int, given: argparse.Namespace, right: dict[str, str], tally: Tally, seconds: float, *, clients: int
) -> None:
    end = time.monotonic() + seconds
    await asyncio.gather(*(_client(i, port, given.tokens, right, tally, end) for i in range(clients)))


async def _client(i: int, port: int, tokens: int, right: dict[str, str], tally: Tally, end: float) -> None:
    """Every fourth answer is left in the middle; one client in twenty reads slowly."""
    dice = random.Random(i)
    slow = i % 20 == 19
    while time.monotonic() < end:
        text = dice.choice(_TEXTS)
        leave = dice.randint(1, tokens) if dice.random() < 0.25 and not slow else 1e9
        try:
            seen = await ask(port, text, tokens, leave_after=leave, pause=0.05 if slow else 0.0)
        except (RuntimeError, OSError) as error:
            tally.refused += 1
            tally.wrong.append(str(error)[:200]) if "429" not in str(error) else None
            await asyncio.sleep(0.5)
            continue
        tally.by_client[i] = tally.by_client.get(i, 0) + 1
        if leave < 1e9 and not seen.whole:
            tally.left += 1
        elif seen.whole and seen.text == right[text] and seen.tokens == tokens:
            tally.right += 1
            tally.slow += slow
            if not slow:
                tally.firsts.append(seen.first)
                tally.silences.append(seen.worst)
        else:
            tally.wrong.append(f"{text[:30]!r}: {seen.text[-60:]!r} {seen.tokens} {seen.whole}")
