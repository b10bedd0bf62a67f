"""Two tenants over one real engine: same prompt, same stored names, and nothing shared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from conftest import Server

from triptych.engine.api import AsyncEngine
from triptych.server.app import build_app
from triptych.server.keys import load_keys
from triptych.server.options import ServerOptions
from triptych.tiny.bundle import ensure_checkpoint

KEYS = """
[[key]]
name = "alice"
key = "sk-alice-0001"
cache_share = 0.5
[[key]]
name = "alices-bot"
key = "sk-alice-0002"
tenant = "alice"
[[key]]
name = "bob"
key = "sk-bob-000001"
"""
PROMPT = "It was told again and again, and nobody knew why. " * 60


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tenants")
    (folder / "keys.toml").write_text(KEYS)
    keys = load_keys(str(folder / "keys.toml"))
    checkpoint: Path = ensure_checkpoint(folder)
    engine = AsyncEngine.load(checkpoint, kv_memory=96 * 2**20, max_running=4, threads=1, tenant_shares=keys.shares)
    running = Server(build_app(engine, ServerOptions(served_model_name="tiny"), keys))
    yield running
    running.stop()


def ask(server: Server, key: str, **change: Any) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=200) as client:
        wanted: dict[str, Any] = {"model": "tiny", "input": PROMPT, "max_output_tokens": 4, "temperature": 0}
        return client.responses.create(**wanted | change)


def test_tenants_share_no_cache_and_no_answers(server: Server) -> None:
    first = ask(server, "sk-alice-0001", prompt_cache_key="s")
    assert first.usage.input_tokens_details.cached_tokens == 0
    stranger = ask(server, "sk-bob-000001", prompt_cache_key="s")
    assert stranger.usage.input_tokens_details.cached_tokens == 0
    assert stranger.output_text == first.output_text
    again = ask(server, "sk-alice-0002")
    assert again.usage.input_tokens_details.cached_tokens >= 384
    assert ask(server, "sk-alice-0002", input="And?", previous_response_id=first.id).usage.input_tokens > 300
    with pytest.raises(openai.NotFoundError):
        ask(server, "sk-bob-000001", input="And?", previous_response_id=first.id)


def test_a_stranger_waits_as_long_as_for_a_prompt_nobody_sent(server: Server) -> None:
    """Steps, not seconds, so that the test cannot flicker: the work for a prompt that another tenant has cached."""
    engine = server.app.state.server.engine

    def rows(key: str, prompt: str) -> int:
        before = engine.stats()
        ask(server, key, input=prompt)
        after = engine.stats()
        return int((after.prompt_tokens - before.prompt_tokens) - (after.cached_tokens - before.cached_tokens))

    known, unknown = "Known to alice. " * 150, "Never sent yet. " * 150
    own = rows("sk-alice-0001", known)
    assert rows("sk-alice-0001", known) < own / 2
    assert abs(rows("sk-bob-000001", known) - own) == 0
    assert abs(rows("sk-bob-000001", unknown) - own) < 80
