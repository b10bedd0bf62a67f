"""The server over the real engine: the words of the engine alone, and nothing left by clients that leave."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from conftest import Server, wait_for

from triptych.engine.api import AsyncEngine, Engine
from triptych.server.app import build_app
from triptych.server.options import ServerOptions
from triptych.text.render import render_turns
from triptych.text.spell import Style
from triptych.text.turns import parse_turns
from triptych.tiny.bundle import ensure_checkpoint
from triptych.words import SamplingParams

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
MEMORY = 96 * 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return ensure_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Engine:
    """The engine in this thread, without server, scheduler company or prefix cache."""
    return Engine.load(checkpoint, kv_memory=MEMORY, prefix_cache=False, threads=1)


@pytest.fixture(scope="module")
def real(checkpoint: Path) -> AsyncEngine:
    return AsyncEngine.load(checkpoint, kv_memory=MEMORY, max_running=4, max_waiting=24, threads=1)


@pytest.fixture(scope="module")
def server(real: AsyncEngine) -> Iterator[Server]:
    running = Server(build_app(real, ServerOptions(served_model_name="real", keep_alive=0.2)))
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def nothing_left_behind(real: AsyncEngine, server: Server) -> Iterator[None]:
    """After each test the engine is idle and every page, slot and snapshot is accounted for."""
    yield
    wait_for(lambda: not real._routes and not real._loop.busy and not real._commands)
    real._loop.cache.check_integrity()
    assert real._loop.stats().cache["slots_free"] == 4


def chat_prompt(engine: Engine, text: str) -> list[int]:
    assert engine.tokenizer is not None
    turns = parse_turns([{"role": "user", "content": text}])
    return render_turns(turns, engine.tokenizer, Style(), limit=10**6).ids.tolist()


def ask(client: openai.OpenAI, text: str, **options: object) -> str:
    """A streamed greedy chat answer of 24 tokens."""
    pieces = client.chat.completions.create(
        model="real",
        messages=[{"role": "user", "content": text}],
        stream=True,
        **{"max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}, **options},  # type: ignore[call-overload]
    )
    return "".join(piece.choices[0].delta.content or "" for piece in pieces)


def test_many_clients_hear_what_each_would_hear_alone(server: Server, alone: Engine) -> None:
    texts = [f"Question {i}: " + "why? " * (37 * i) for i in range(10)]
    wanted = [out.text for text in texts for out in alone.generate([chat_prompt(alone, text)], GREEDY)]
    with server.client() as client, ThreadPoolExecutor(7) as pool:
        heard = list(pool.map(lambda text: ask(client, text), texts))
    assert heard == wanted


def test_the_async_client_too(server: Server, alone: Engine) -> None:
    texts = ["one", "two", "three"]
    wanted = [out.text for text in texts for out in alone.generate([chat_prompt(alone, text)], GREEDY)]

    async def one(client: openai.AsyncOpenAI, text: str) -> str:
        answer = await client.chat.completions.create(
            model="real",
            messages=[{"role": "user", "content": text}],
            max_tokens=24,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return answer.choices[0].message.content or ""

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, text) for text in texts))

    assert asyncio.run(everyone()) == wanted


def test_usage_tells_what_the_cache_saved(server: Server) -> None:
    document = "def f(x):\n    return x + 1\n" * 60
    with server.client() as client:
        usages = [
            client.chat.completions.create(
                model="real", messages=[{"role": "user", "content": document + question}], max_tokens=2
            ).usage
            for question in ("What?", "Why so?")
        ]
    cold, warm = [usage.prompt_tokens_details for usage in usages]  # type: ignore[union-attr]
    assert cold.cached_tokens == 0
    assert warm.cached_tokens >= usages[0].prompt_tokens - 2 * 128  # type: ignore[union-attr]
    assert warm.cached_tokens + warm.recomputed_tokens < usages[1].prompt_tokens  # type: ignore[union-attr]


def test_conversations_resume_at_the_end_of_a_system_prompt_they_share(server: Server) -> None:
    """The encoding knows where it ends, and the cache keeps that place resumable."""
    system = {"role": "system", "content": "Only facts, and none that you do not know. " * 40}
    with server.client() as client:
        for question in ("What is amber? " * 60, "Where is the falcon? " * 60):
            answer = client.chat.completions.create(
                model="real",
                messages=[system, {"role": "user", "content": question}],  # type: ignore[list-item]
                max_tokens=2,
            )
    details = answer.usage.prompt_tokens_details
    assert details.cached_tokens >= 256 - 4 and details.recomputed_tokens <= 128 + 4


def test_logprobs_and_samples_agree_with_the_engine(server: Server, alone: Engine) -> None:
    prompt = [5, 6, 7, 8]
    params = SamplingParams(max_tokens=12, temperature=0.9, seed=11, n=3, logprobs=2, ignore_eos=True)
    wanted = alone.generate([prompt], params)
    with server.client() as client:
        answer = client.completions.create(
            model="real",
            prompt=prompt,
            max_tokens=12,
            temperature=0.9,
            seed=11,
            n=3,
            logprobs=2,
            extra_body={"ignore_eos": True},
        )
    assert [choice.text for choice in answer.choices] == [out.text for out in wanted]
    for choice, out in zip(answer.choices, wanted, strict=True):
        assert choice.logprobs is not None and len(choice.logprobs.tokens or []) == 12
        assert choice.logprobs.token_logprobs == pytest.approx([one.logprob for one in out.logprobs], abs=1e-4)


def test_clients_that_leave_free_what_they_held(server: Server, real: AsyncEngine) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    bodies = [
        b'{"model":"real","prompt":[%d,5],"max_tokens":3000,"stream":%s,"ignore_eos":true}' % (i + 3, stream)
        for i, stream in enumerate([b"true", b"false"] * 4)
    ]
    connections = []
    for body in bodies:  # four run, four wait
        connection = socket.create_connection((host, int(port)))
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        connections.append(connection)
    wait_for(lambda: real.stats().running == 4 and real.stats().waiting == 4)
    for connection in connections:
        connection.close()
    wait_for(lambda: real.stats().running == 0 and real.stats().waiting == 0)


def test_a_full_queue_is_a_429_and_clears(server: Server, real: AsyncEngine) -> None:
    with server.http() as http:
        refused = http.post("/v1/completions", json={"model": "real", "prompt": [[5]] * 25})
        assert refused.status_code == 400  # can never fit the queue
        body = {"model": "real", "prompt": [[5]] * 24, "max_tokens": 20, "ignore_eos": True}
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda _: http.post("/v1/completions", json=body), range(3)))
    statuses = sorted(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)


def test_a_prompt_beyond_the_context_names_the_limit(server: Server, real: AsyncEngine) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", json={"model": "real", "prompt": [5] * (real.max_context + 1)})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert str(real.max_context) in answer.json()["error"]["message"]


def test_stopping_the_server_ends_streams_with_a_sentence(checkpoint: Path) -> None:
    engine = AsyncEngine.load(checkpoint, kv_memory=MEMORY, max_running=2, threads=1)
    own = Server(build_app(engine, ServerOptions(served_model_name="real")))
    try:
        with (
            own.http() as http,
            http.stream(
                "POST",
                "/v1/completions",
                json={"model": "real", "prompt": [5], "max_tokens": 5000, "stream": True, "ignore_eos": True},
            ) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            asyncio.run_coroutine_threadsafe(engine.stop(), engine._events).result(20)  # type: ignore[arg-type]
            *_, last = [line for line in lines if line]
        assert "the server stops" in last
        late = httpx.post(f"{own.url}/v1/completions", json={"model": "real", "prompt": [5]})
        assert late.status_code == 503 and late.headers["retry-after"]
    finally:
        own.stop()
