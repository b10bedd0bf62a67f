"""Reasoning and tool calls through all three APIs and both official clients, streamed and whole; no markup anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from conftest import Server
from fake_engine import FakeEngine

from triptych.text.tools import DSML, OPENER, ToolCall, calls_block

PARAMETERS = {"type": "object", "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": PARAMETERS}}
    for name in ("read", "list")
]
CLAUDE_TOOLS: list[Any] = [{"name": name, "description": "d", "input_schema": PARAMETERS} for name in ("read", "list")]
ITEM_TOOLS = [
    {"type": "function", "name": name, "description": "d", "parameters": PARAMETERS} for name in ("read", "list")
]
ARGUMENTS = [{"path": 'a "quoted"\npath', "lines": 3}, {}]
CALLS = calls_block([ToolCall("", n, json.dumps(a)) for n, a in zip(("read", "list"), ARGUMENTS, strict=True)])
SAID = "I should look.</think>Let me look." + CALLS
ASK: dict[str, Any] = {
    "model": "fake",
    "messages": [{"role": "user", "content": "What is in it?"}],
    "tools": TOOLS,
    "reasoning_effort": "low",
}


@pytest.fixture
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def no_markup(text: str) -> bool:
    return DSML not in text and "think>" not in text


@pytest.mark.parametrize("stream", [False, True])
def test_chat(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    engine.script = [SAID]
    if stream:
        events = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
        deltas = [choice.delta for event in events for choice in event.choices]
        text = "".join(d.content or "" for d in deltas)
        reasoning = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
        pieces = [call for d in deltas for call in d.tool_calls or []]
        calls = [
            (c.id, c.function.name, "".join(p.function.arguments or "" for p in pieces if p.index == c.index))
            for c in pieces
            if c.id
        ]
        assert sum(p.index == 0 for p in pieces) > 4  # the arguments came in pieces
        finish = [c.finish_reason for e in events for c in e.choices if c.finish_reason]
        usage = events[-1].usage
    else:
        answer = client.chat.completions.create(**ASK)
        message = answer.choices[0].message
        text, reasoning = message.content, message.reasoning_content
        calls = [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls]
        finish, usage = [answer.choices[0].finish_reason], answer.usage
    assert (text, reasoning, finish) == ("Let me look.", "I should look.", ["tool_calls"])
    assert [(name, json.loads(arguments)) for _, name, arguments in calls] == list(
        zip(("read", "list"), ARGUMENTS, strict=True)
    )
    assert len({id for id, _, _ in calls}) == 2
    assert 3 <= usage.completion_tokens_details.reasoning_tokens <= 6


@pytest.mark.parametrize("stream", [False, True])
def test_messages(claude: anthropic.Anthropic, engine: FakeEngine, stream: bool) -> None:
    engine.script = [SAID]
    ask: dict[str, Any] = {
        **{"model": "fake", "max_tokens": 500, "messages": ASK["messages"], "tools": CLAUDE_TOOLS},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    if stream:
        with claude.messages.stream(**ask) as events:
            seen = list(events)
            answer = events.get_final_message()
        assert any(event.type == "input_json" for event in seen)
    else:
        answer = claude.messages.create(**ask)
    thinking, text, *calls = answer.content
    assert (thinking.thinking, text.text, answer.stop_reason) == ("I should look.", "Let me look.", "tool_use")
    assert thinking.signature and [(c.name, c.input) for c in calls] == list(
        zip(("read", "list"), ARGUMENTS, strict=True)
    )


@pytest.mark.parametrize("stream", [False, True])
def test_responses(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    engine.script = [SAID]
    ask: dict[str, Any] = {
        **{"model": "fake", "input": "What is in it?", "tools": ITEM_TOOLS, "reasoning": {"effort": "low"}}
    }
    if stream:
        events = list(client.responses.create(**ask, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        answer = events[-1].response
        assert "response.function_call_arguments.delta" in [event.type for event in events]
        assert "".join(e.delta for e in events if e.type == "response.reasoning_text.delta") == "I should look."
    else:
        answer = client.responses.create(**ask)
    reasoning, message, *calls = answer.output
    assert answer.status == "completed" and answer.output_text == "Let me look."
    assert reasoning.content[0].text == "I should look." and message.type == "message"
    assert [(c.name, json.loads(c.arguments)) for c in calls] == list(zip(("read", "list"), ARGUMENTS, strict=True))
    assert answer.usage.output_tokens_details.reasoning_tokens >= 3
    engine.script = ["</think>Done."]
    outputs = [{"type": "function_call_output", "call_id": c.call_id, "output": "ok"} for c in calls]
    second = client.responses.create(**ask | {"input": outputs}, previous_response_id=answer.id)
    assert second.output_text == "Done."


def test_a_turn_that_comes_back_is_the_tokens_that_were_sampled(client: openai.OpenAI, engine: FakeEngine) -> None:
    """The model wrote an odd spacing; the client sorts the keys and leaves the reasoning out."""
    odd = SAID.replace("I should look.", "I   should look .").replace('"read">\n', '"read">\n\n')
    for said in (SAID, odd):
        engine.script = [said, "</think>Done."]
        message = client.chat.completions.create(**ASK).choices[0].message
        calls = [
            {
                "id": c.id,
                "type": "function",
                "function": {
                    "name": c.function.name,
                    "arguments": json.dumps(json.loads(c.function.arguments), sort_keys=True, indent=2),
                },
            }
            for c in message.tool_calls
        ]
        results = [{"role": "tool", "tool_call_id": c["id"], "content": "ok"} for c in calls]
        said_back = {"role": "assistant", "content": message.content, "tool_calls": calls}
        client.chat.completions.create(**ASK | {"messages": [*ASK["messages"], said_back, *results]})
        first, second = engine.prompts[-2:]
        assert second[: len(first)].tolist() == first.tolist()
        text = engine.tokenizer.decode(second[len(first) :])
        assert text.startswith(said) and "<tool_result>ok</tool_result>" in text


def test_a_forced_call_begins_the_answer(client: openai.OpenAI, engine: FakeEngine) -> None:
    rest = calls_block([ToolCall("", "list", '{"path": "x"}')]).removeprefix(OPENER)
    ask = ASK | {"reasoning_effort": "none"}
    named = {"type": "function", "function": {"name": "list"}}
    for stream in (False, True):
        engine.script = [rest]
        answer = client.chat.completions.create(**ask, tool_choice=named, stream=stream)
        if stream:
            pieces = [c for e in answer for c in e.choices[0].delta.tool_calls or []]
            name, arguments = pieces[0].function.name, "".join(p.function.arguments or "" for p in pieces)
        else:
            [call] = answer.choices[0].message.tool_calls
            name, arguments = call.function.name, call.function.arguments
        assert (name, json.loads(arguments)) == ("list", {"path": "x"})
    engine.script = [rest.replace("list", "read")]
    [call] = client.chat.completions.create(**ask, tool_choice="required").choices[0].message.tool_calls
    assert call.function.name == "read"


def test_a_call_that_max_tokens_cut_off(client: openai.OpenAI, claude: anthropic.Anthropic, engine: FakeEngine) -> None:
    engine.script = [SAID]
    answer = client.chat.completions.create(**ASK, max_tokens=32)
    assert answer.choices[0].finish_reason == "length" and no_markup(answer.choices[0].message.content)
    [call] = answer.choices[0].message.tool_calls
    assert call.function.arguments.startswith("{") and no_markup(call.function.arguments)
    engine.script = [SAID]
    message = claude.messages.create(
        model="fake", max_tokens=32, messages=ASK["messages"], tools=CLAUDE_TOOLS, thinking={"type": "adaptive"}
    )
    assert message.stop_reason == "max_tokens" and isinstance(message.content[-1].input, dict)


def test_tools_that_may_not_be_called_are_not(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = [SAID]
    message = client.chat.completions.create(**ASK, tool_choice="none").choices[0].message
    assert not message.tool_calls and message.content == "Let me look."
    engine.script = [SAID]
    message = client.chat.completions.create(**ASK, parallel_tool_calls=False).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["read"]


def test_claude_sends_its_turn_back(claude: anthropic.Anthropic, engine: FakeEngine) -> None:
    engine.script = [SAID, "</think>Done."]
    ask: dict[str, Any] = {"model": "fake", "max_tokens": 200, "tools": CLAUDE_TOOLS, "thinking": {"type": "adaptive"}}
    first = claude.messages.create(**ask, messages=ASK["messages"])
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "ok"}]}
        for block in first.content
        if block.type == "tool_use"
    ]
    turns = [*ASK["messages"], {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = claude.messages.create(**ask, messages=turns)
    assert second.content[0].text == "Done." and second.stop_reason == "end_turn"
    before, after = engine.prompts[-2:]
    assert after[: len(before)].tolist() == before.tolist()
    assert engine.tokenizer.decode(after[len(before) :]).startswith(SAID)


def test_stop_strings_are_about_what_is_said(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = [SAID]
    choice = client.chat.completions.create(**ASK, stop=["look", "path"]).choices[0]
    assert choice.message.content == "Let me " and choice.finish_reason == "stop"
    assert choice.message.reasoning_content == "I should look."
    engine.script = [SAID]
    choice = client.chat.completions.create(**ASK, stop=["path", "invoke"]).choices[0]
    assert choice.message.content == "Let me look." and choice.finish_reason == "tool_calls"
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == ARGUMENTS


@pytest.mark.parametrize("effort", ["none", "low"])
def test_a_last_message_is_gone_on_with_and_remembered(client: openai.OpenAI, engine: FakeEngine, effort: str) -> None:
    begun: dict[str, Any] = {"role": "assistant", "content": "Once upon", "prefix": True}
    ask: dict[str, Any] = {"model": "fake", "reasoning_effort": effort, "tools": TOOLS}
    question = {"role": "user", "content": "A story"}
    engine.script = [" a time"]
    message = client.chat.completions.create(**ask, messages=[question, begun]).choices[0].message
    assert message.content == " a time" and not getattr(message, "reasoning_content", None)
    told = engine.prompts[-1].tolist() + engine.tokenizer.encode(" a time").tolist()
    engine.script = ["."]
    more = [question, {"role": "assistant", "content": "Once upon a time"}, {"role": "user", "content": "Go on"}]
    client.chat.completions.create(**ask, messages=more)
    assert engine.prompts[-1].tolist()[: len(told) + 1] == [*told, engine.tokenizer.eos_id]


@pytest.mark.parametrize("effort", ["none", "low"])
def test_without_grammars_a_forced_call_is_begun_for_the_model(
    client: openai.OpenAI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, effort: str
) -> None:
    for module in ("server.talk", "text.constraint"):
        monkeypatch.setattr(f"triptych.{module}.available", lambda: False)
    engine.script = [calls_block([ToolCall("", "list", "{}")]).split('invoke name="list">\n')[1]]
    named = {"type": "function", "function": {"name": "list"}}
    choice = client.chat.completions.create(**ASK | {"reasoning_effort": effort}, tool_choice=named).choices[0]
    [call] = choice.message.tool_calls
    assert (call.function.name, call.function.arguments, choice.finish_reason) == ("list", "{}", "tool_calls")
