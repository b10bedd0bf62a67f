"""The server as clients see it: the official OpenAI client, a long real document, many at once, one that dies."""

from __future__ import annotations

import json
import sysconfig
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import Server, start_server, stop_server
from openai import OpenAI

DOCUMENT = 110_000  # characters: over 30,000 tokens of the bundled tokenizer


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=240)


def document(characters: int) -> str:
    """Real text: the beginning of Python's own library sources."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = ""
    for path in sources:
        if len(text) >= characters:
            break
        text += path.read_text(encoding="utf-8", errors="replace")
    return text[:characters]


def ask(client: OpenAI, messages: list[dict[str, str]], **options: Any) -> tuple[str, Any]:
    """(text, usage) of a streamed greedy answer."""
    stream = client.chat.completions.create(
        model="tiny",
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        **{"max_tokens": 16, **options},
    )
    text, usage = "", None
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    return text, usage


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_second_question_about_a_long_document_finds_it_cached(client: OpenAI) -> None:
    text = document(DOCUMENT)
    _, first = ask(client, user(text + "\n\nWhat is this?"))
    assert first.prompt_tokens > 30_000, "the document is as long as it should be"
    again, second = ask(client, user(text + "\n\nWho wrote it, and when?"))
    shared = first.prompt_tokens - 64
    cached = second.prompt_tokens_details.cached_tokens
    assert cached >= 0.99 * shared, (first, second)
    third, usage = ask(client, user(text + "\n\nWho wrote it, and when?"))
    assert third == again, "the cache does not change the answer"
    assert usage.prompt_tokens == second.prompt_tokens


def test_eight_clients_at_once_answer_as_if_alone_and_one_may_die(client: OpenAI, server: Server) -> None:
    prompts = [user(f"Story number {i}: " + document(600 + 397 * i)) for i in range(8)]
    alone = [ask(client, prompt, max_tokens=24)[0] for prompt in prompts[:7]]
    started = threading.Event()

    def dies(_: int) -> None:
        body = {"model": "tiny", "messages": prompts[7], "max_tokens": 2000, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=240) as response:
            for line in response.iter_lines():
                if line.startswith("data:"):
                    started.set()
                    return  # leaves the block: the connection is closed mid-stream

    def lives(i: int) -> str:
        return ask(client, prompts[i], max_tokens=24)[0]

    with ThreadPoolExecutor(8) as pool:
        victim = pool.submit(dies, 7)
        together = list(pool.map(lives, range(7)))
        victim.result()
    assert started.is_set()
    assert together == alone


def test_text_completions_and_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    done = client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=8, temperature=0)
    again = client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=8, temperature=0)
    assert done.choices[0].text == again.choices[0].text
    assert done.usage is not None and done.usage.completion_tokens <= 8


def test_the_curl_example_of_the_readme_works(server: Server, readme_curl: dict[str, Any]) -> None:
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=readme_curl, timeout=240) as response:
        assert response.status_code == 200
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    usage = json.loads(events[-2])["usage"]
    assert usage["completion_tokens"] >= 1 and "cached_tokens" in usage["prompt_tokens_details"]


@pytest.fixture(scope="session")
def readme_curl() -> dict[str, Any]:
    """The JSON body of the README's curl example."""
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    body = text.split(" -d '", 1)[1].split("}'", 1)[0] + "}"
    return dict(json.loads(body))


def test_errors_are_sentences_and_the_server_goes_on(server: Server, client: OpenAI) -> None:
    url = f"{server.url}/v1/chat/completions"
    good = {"model": "tiny", "messages": user("hello"), "max_tokens": 2}
    for body, status in [({**good, "model": "big"}, 404), ({**good, "max_tokens": -1}, 400), ({"model": "tiny"}, 400)]:
        answer = httpx.post(url, json=body)
        assert answer.status_code == status
        assert answer.json()["error"]["message"].endswith((".", "?"))
    assert ask(client, user("still there?"))[1].completion_tokens >= 1


def test_sigterm_lets_a_running_answer_end(environment: dict[str, str], tmp_path: Path) -> None:
    own = start_server(environment, tmp_path)
    body = {
        "model": "tiny",
        "messages": user("Tell me a story."),
        "max_tokens": 200,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    usage = None
    with httpx.stream("POST", f"{own.url}/v1/chat/completions", json=body, timeout=240) as response:
        lines = response.iter_lines()
        next(line for line in lines if line.startswith("data:"))
        stopping = threading.Thread(target=lambda: results.append(stop_server(own)))
        results: list[int] = []
        stopping.start()
        for line in lines:
            if line.startswith("data: {"):
                usage = json.loads(line.removeprefix("data: ")).get("usage") or usage
    stopping.join()
    assert results == [0], own.log.read_text()
    assert usage is not None and usage["completion_tokens"] == 200, "the answer came whole"


def test_start_tells_what_was_loaded_and_planned(server: Server) -> None:
    log = server.log.read_text()
    assert "tiny" in log and "tokens" in log


def test_a_second_server_on_the_same_port_says_so(server: Server, triptych: Callable[..., Any]) -> None:
    done = triptych("serve", "--port", server.url.rpartition(":")[2])
    assert done.returncode == 2
    assert done.stderr.startswith("triptych: Cannot listen on 127.0.0.1 port ") and "Traceback" not in done.stderr
