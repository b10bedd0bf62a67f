"""Conversations made at random, as bodies of chat requests: what clients send, and what they should not."""

from __future__ import annotations

import json
import random
from typing import Any

WORDS = [
    *("Hi", "naïve", "猫がいる", "🙂", "x = {'a': 1}\n", " s ", "\n\n", "", "123456", "it's", "ｆｕｌｌ", "\t"),
    *(
        "<think>",
        "</think>",
        "<｜User｜>",
        "｜DSML｜",
        "</｜DSML｜parameter>",
        "<｜end▁of▁sentence｜>",
        "<tool_result>",
    ),
    *("</tool_result>", "<｜DSML｜tool_calls>", "<｜Assistant｜>", "<｜latest_reminder｜>"),
]
VALUES: list[Any] = [
    *(3, 2.5, None, True, [], "x", -5, -0.0, 1.0, 0.1 + 0.2, 1e5, 1e15, 1e16, 1e21, 1e22, 1e300, 5e-324),
    *(1e-4, 1e-5, 1.234e-5, -1e-5, 1e-6, 1.5e-7, 2**63, 2**64, -(2**63), -(2**63) - 1, 123456789012345678),
    *("q\"\n\\", "\u2028\u007f\u0001", {"k": [1, "ü"], "a": 1e22, "b": {}}, {"z": 1, "a": {"y": 2}}),
]  # fmt: skip
ODD_ARGUMENTS = ["nojson", "[1]", "", '{"a":1,"a":2}', " {} ", '{"n":1E400}', '{"n":NaN}', '"s"', '{"a":"\\ud800"}']
ODD_ARGUMENTS += ['{"x": 1.10, "y": 1E2}', '{"e": "\\u00e9\\/"}', "null"]


def conversation(seed: int) -> dict[str, Any]:
    """A random body: some have tools, calls, results, thoughts, reminders, a last message to go on with."""
    dice = random.Random(seed)

    def words() -> str:
        return "".join(dice.choices(WORDS, k=dice.randint(0, 4)))

    messages: list[dict[str, Any]] = []
    for _ in range(dice.randint(1, 7)):
        role = dice.choices(["system", "latest_reminder", "user", "assistant"], [3, 2, 7, 8])[0]
        message: dict[str, Any] = {"role": role, "content": words()}
        messages.append(message)
        if role == "assistant":
            if dice.random() < 0.5:
                message["reasoning_content"] = words()
            if dice.random() < 0.4:
                messages += _called(message, len(messages), dice, words)
    if dice.random() < 0.2:
        messages.append({"role": "assistant", "content": words() or "z", "prefix": True})
        if dice.random() < 0.5:
            messages[-1]["reasoning_content"] = words()
    if all(message["role"] == "system" for message in messages):
        messages.append({"role": "user", "content": "u"})
    body: dict[str, Any] = {"model": "DeepSeek-V4-Pro", "messages": messages}
    if dice.random() < 0.5:
        body["thinking"] = {"type": "disabled"}
    else:
        body["reasoning_effort"] = dice.choice(["low", "high", "max"])
    _wishes(body, dice, words)
    return body


def _wishes(body: dict[str, Any], dice: random.Random, words: Any) -> None:
    """Gives `body` tools, a tool that must be called, a response format."""
    if dice.random() < 0.5:
        body["tools"] = [{"type": "function", "function": _function(name, dice, words)} for name in "fg"]
        if "thinking" in body and dice.random() < 0.4:
            body["tool_choice"] = "required"
            return
    if dice.random() < 0.15:
        schema = {"type": "object", "description": words(), "x": dice.choice(VALUES)}
        asked = [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}]
        body["response_format"] = dice.choice(asked)
        body["messages"].insert(0, {"role": "user", "content": "json"})


def _called(message: dict[str, Any], at: int, dice: random.Random, words: Any) -> list[dict[str, Any]]:
    """Gives `message` calls; their results, in any order."""
    names = [f"c{at}_{i}" for i in range(dice.randint(1, 3))]
    message["tool_calls"] = [
        {"id": name, "type": "function", "function": {"name": dice.choice("fg"), "arguments": _arguments(dice)}}
        for name in names
    ]
    dice.shuffle(names)
    results = [{"role": "tool", "tool_call_id": name, "content": words()} for name in names]
    return [*results, *[{"role": "user", "content": words()}] * (dice.random() < 0.4)]


def _arguments(dice: random.Random) -> str:
    if dice.random() < 0.3:
        return dice.choice(ODD_ARGUMENTS)
    chosen = {key: dice.choice(VALUES) for key in dice.sample("abcdé", dice.randint(0, 3))}
    return json.dumps(chosen, ensure_ascii=dice.random() < 0.5)


def _function(name: str, dice: random.Random, words: Any) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name, "description": words()}
    if dice.random() < 0.8:
        function["parameters"] = {"type": "object", "properties": {"a": {"type": "string"}}, "x": dice.choice(VALUES)}
    return function
