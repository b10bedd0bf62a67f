"""A server with a disk tier that is killed without warning, and the one that is started after it."""

from __future__ import annotations

import argparse
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import Server, start_server

# real text, 2,000 to 3,000 tokens of the bundled tokenizer
DOCUMENT = Path(argparse.__file__).read_text(encoding="utf-8")[:9000]
Start = Callable[[], Server]


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Starts servers over one directory; each must have been killed before the next."""
    servers: list[Server] = []

    def begin() -> Server:
        folder = tmp_path / f"run{len(servers)}"
        folder.mkdir()
        server = start_server(environment, folder, "--disk", str(tmp_path / "disk"), "--deterministic")
        servers.append(server)
        return server

    yield begin
    for server in servers:
        kill(server)
        assert "Traceback" not in server.log.read_text()


def kill(server: Server) -> None:
    """As kill -9 does: no handler runs, nothing is flushed."""
    server.process.kill()
    server.process.wait(60)


def body(prompt: str, tokens: int, **options: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **options}


def ask(server: Server, prompt: str) -> tuple[str, dict[str, Any]]:
    """(text, usage) of a greedy answer."""
    answer = httpx.post(f"{server.url}/v1/completions", json=body(prompt, 24), timeout=240)
    assert answer.status_code == 200, answer.text
    done = answer.json()
    return done["choices"][0]["text"], done["usage"]


@contextmanager
def generating(server: Server, prompt: str) -> Iterator[None]:
    """The block runs while a long answer is being generated; what becomes of it nobody asks."""
    url, options = f"{server.url}/v1/completions", body(prompt, 20_000, stream=True)
    begun = threading.Event()

    def read() -> None:
        try:
            with httpx.stream("POST", url, json=options, timeout=240) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {") and json.loads(line.removeprefix("data: "))["choices"][0]["text"]:
                        begun.set()
        except httpx.TransportError:
            pass  # killed

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(120), server.log.read_text()
    yield
    reader.join(60)


def stored(server: Server) -> int:
    """Objects on the disk."""
    found = re.search(r"^triptych_cache_disk_objects (\S+)", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    return int(float(found[1])) if found else 0


def wait_for_saves(server: Server, objects: int) -> None:
    """Until so many objects are on the disk."""
    for _ in range(1200):
        if stored(server) >= objects:
            return
        time.sleep(0.05)
    raise AssertionError(f"{stored(server)} objects were saved:\n{server.log.read_text()}")


def from_disk(usage: dict[str, Any]) -> int:
    details = usage["prompt_tokens_details"]
    assert details["cached_tokens"] >= details.get("cached_by_tier", {}).get("disk", 0)
    return int(details.get("cached_by_tier", {}).get("disk", 0))


def test_a_session_outlives_a_killed_server(start: Start) -> None:
    server = start()
    text, first = ask(server, DOCUMENT)
    assert first["prompt_tokens"] > 2000 and not from_disk(first)
    pages = first["prompt_tokens"] // 128
    wait_for_saves(server, pages + 1)  # and a snapshot
    kill(server)
    server = start()
    again, usage = ask(server, DOCUMENT)
    assert again == text
    assert from_disk(usage) == 128 * pages - 4, usage


def test_a_server_killed_while_it_generates_and_saves(start: Start) -> None:
    """One answer has just ended and is being saved, another goes on: whatever was lost, no answer changes."""
    server = start()
    with generating(server, DOCUMENT[:2000] + "Once upon a time"):
        text, first = ask(server, DOCUMENT)
        kill(server)
    server = start()
    again, usage = ask(server, DOCUMENT)
    assert again == text and usage["prompt_tokens"] == first["prompt_tokens"]
    pages = first["prompt_tokens"] // 128
    wait_for_saves(server, pages)
    with generating(server, DOCUMENT + "Once upon a time"):
        kill(server)
    server = start()
    again, usage = ask(server, DOCUMENT)
    details = usage["prompt_tokens_details"]
    assert again == text and from_disk(usage) == details["cached_tokens"] > 0
    assert details["cached_tokens"] + details["recomputed_tokens"] == 128 * pages, "no page was computed"
