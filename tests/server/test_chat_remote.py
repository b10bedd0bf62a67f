"""`triptych chat URL`: the conversation of the terminal with a server instead of an engine of its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from conftest import Server, wait_for
from fake_engine import FakeEngine

from triptych.cli.main import main
from triptych.cli.talker import Piece, RemoteTalker, _pieces_of, messages_of
from triptych.errors import ConfigError, RequestError, TriptychError
from triptych.server.app import build_app
from triptych.server.keys import load_keys
from triptych.server.options import ServerOptions
from triptych.text.turns import System, Turn, User
from triptych.words import SamplingParams

HELLO: list[Turn] = [System("Be brief."), User(["hello " * 300])]
TEN = SamplingParams(max_tokens=10, seed=1, stop=("never said",), temperature=0.5)


async def answer(talker: RemoteTalker, params: SamplingParams = TEN) -> list[Piece]:
    await talker.start()
    async with aclosing(talker.answer(HELLO, params)) as pieces:
        return [piece async for piece in pieces]


def test_it_says_what_the_server_says_and_what_it_cost(server: Server, engine: FakeEngine) -> None:
    with server.client() as client:
        messages: Any = messages_of(HELLO)
        said = client.chat.completions.create(model="fake", messages=messages, max_tokens=10, seed=1, temperature=0.5)
    for url in (server.url, server.url + "/", server.url + "/v1"):
        pieces = asyncio.run(answer(RemoteTalker(url)))
        assert "".join(piece.text for piece in pieces) == said.choices[0].message.content
        usage = pieces[-1].usage
        assert usage is not None and said.usage is not None
        assert usage.prompt_tokens == said.usage.prompt_tokens and usage.completion_tokens == 10
        assert usage.cached_tokens > 128, "the same prompt was asked before"
    assert RemoteTalker(server.url, model="an-alias").describe() == f"Model    an-alias at {server.url}"


def test_leaving_in_mid_answer_ends_it_on_the_server(server: Server, engine: FakeEngine) -> None:
    engine.token_delay = 0.01

    async def leave() -> None:
        talker = RemoteTalker(server.url)
        await talker.start()
        async with aclosing(talker.answer(HELLO, SamplingParams(max_tokens=3000))) as pieces:
            async for piece in pieces:
                if piece.text:
                    break

    asyncio.run(leave())
    wait_for(lambda: bool(engine.aborted))


def test_what_goes_wrong_is_one_sentence(server: Server, engine: FakeEngine) -> None:
    with pytest.raises(RequestError, match="There is no model 'nope' here"):
        asyncio.run(answer(RemoteTalker(server.url, model="nope")))
    with pytest.raises(TriptychError, match=r"No server answers at http://127.0.0.1:1: .*Is it running"):
        asyncio.run(answer(RemoteTalker("http://127.0.0.1:1")))
    with pytest.raises(TriptychError, match="There is nothing at"):
        asyncio.run(answer(RemoteTalker(server.url + "/elsewhere")))
    engine.fail_after = 3
    with pytest.raises(RequestError, match="The logits of this request are not finite"):
        asyncio.run(answer(RemoteTalker(server.url)))


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://host:port", "http://host:99999"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a server"):
        RemoteTalker(url)


def test_a_key_is_sent_and_its_lack_is_said(engine: FakeEngine) -> None:
    running = Server(build_app(engine, ServerOptions(), load_keys(None, ("sk-long-enough",))))
    try:
        with pytest.raises(RequestError, match=r"needs an API key.*--api-key"):
            asyncio.run(answer(RemoteTalker(running.url)))
        assert asyncio.run(answer(RemoteTalker(running.url, "sk-long-enough")))[-1].usage is not None
    finally:
        running.stop()


def test_thoughts_are_told_from_answers() -> None:
    event = {"choices": [{"delta": {"reasoning_content": "hm", "content": "yes"}}, {"delta": {}}], "usage": None}
    assert list(_pieces_of(event)) == [Piece("hm", thinking=True), Piece("yes")]


def test_thoughts_come_as_thoughts_over_the_wire(server: Server, engine: FakeEngine) -> None:
    engine.script = ["let me see</think>yes"]
    pieces = asyncio.run(answer(RemoteTalker(server.url, thinking="high")))
    assert "".join(piece.text for piece in pieces if piece.thinking) == "let me see"
    assert "".join(piece.text for piece in pieces if not piece.thinking) == "yes"
    engine.script = ["no"]
    assert "no" in [piece.text for piece in asyncio.run(answer(RemoteTalker(server.url, thinking="off")))]


def test_the_command_talks_to_a_server(server: Server) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "triptych", "chat", server.url, "--max-tokens", "5", "--seed", "1"],
        input="hello\nand?\n/stats\n",
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).resolve().parents[2] / "src",
    )
    assert done.returncode == 0, done.stderr
    assert "2: prompt" in done.stdout and "generated 5" in done.stdout and "tok/s" in done.stdout


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["chat", "http://127.0.0.1:1", "--kv-memory", "1GiB"], "--kv-memory says how an engine here runs"),
        (["chat", "tiny", "--api-key", "sk-1"], "--api-key is for a server"),
        (["chat", "tiny", "--served-model", "x"], "--served-model is for a server"),
        (
            ["chat", "tiny", "--thinking", "hgh"],
            "--thinking is one of off, low, high, max, not 'hgh'. Did you mean 'high'?",
        ),
        (["chat", "http://127.0.0.1:1"], "No server answers at http://127.0.0.1:1"),
    ],
)
def test_flags_that_say_nothing_are_refused(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
