"""Answers that must have a form, from the real engine through all three APIs: the model is tiny, the form is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
import torch
from conftest import Server

from triptych.engine.api import AsyncEngine
from triptych.server.app import build_app
from triptych.server.options import ServerOptions
from triptych.tiny.bundle import ensure_checkpoint

pytest.importorskip("llguidance")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["color", "count"],
    "additionalProperties": False,
}
TOOL = {"name": "paint", "description": "Paint it.", "parameters": SCHEMA, "strict": True}
ASK = [{"role": "user", "content": "Paint it, and answer in json."}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    torch.set_num_threads(1)
    checkpoint = ensure_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    engine = AsyncEngine.load(checkpoint, kv_memory=96 * 2**20, max_running=4, threads=1)
    running = Server(build_app(engine, ServerOptions(served_model_name="tiny")))
    yield running
    running.stop()


@pytest.fixture
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=200) as client:
        yield client


def good(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"color", "count"} and value["color"] in ("red", "blue") and 0 <= value["count"] <= 99


def test_a_schema_in_every_api(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "paint", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, response_format=form, max_tokens=100, n=2, seed=1
    )
    assert all(good(choice.message.content) for choice in answer.choices)
    chunks = client.chat.completions.create(
        model="tiny", messages=ASK, response_format=form, max_tokens=100, stream=True, logprobs=True
    )
    assert good("".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices))
    text: Any = {"format": {"type": "json_schema", "name": "paint", "schema": SCHEMA, "strict": True}}
    with client.responses.stream(model="tiny", input=ASK, text=text, max_output_tokens=100) as stream:
        for _ in stream:
            pass
        assert good(stream.get_final_response().output_text)
    config: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    message = claude.messages.create(model="tiny", messages=ASK, output_config=config, max_tokens=100)
    assert good(message.content[0].text)


def test_a_call_that_must_be(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    named: Any = {"type": "function", "function": {"name": "paint"}}
    for choice in ("required", named):
        answer = client.chat.completions.create(
            model="tiny",
            messages=ASK,
            tools=[{"type": "function", "function": TOOL}],
            tool_choice=choice,
            max_tokens=200,
            parallel_tool_calls=False,
        )
        calls = answer.choices[0].message.tool_calls
        assert calls and calls[0].function.name == "paint" and good(calls[0].function.arguments)
    tool: Any = {"name": "paint", "description": "Paint it.", "input_schema": SCHEMA, "strict": True}
    with claude.messages.stream(
        model="tiny",
        messages=ASK,
        tools=[tool],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        max_tokens=200,
    ) as stream:
        message = stream.get_final_message()
    block = message.content[-1]
    assert block.type == "tool_use" and good(json.dumps(block.input))
    item: Any = {"type": "function", **TOOL}
    made = client.responses.create(
        model="tiny", input=ASK, tools=[item], tool_choice="required", max_output_tokens=200, parallel_tool_calls=False
    )
    [call] = [one for one in made.output if one.type == "function_call"]
    assert good(call.arguments)


def test_a_schema_that_is_none_is_a_400_with_its_path(client: openai.OpenAI) -> None:
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}, "strict": True}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=ASK, response_format=bad)
    assert str(caught.value.param).startswith("response_format")
