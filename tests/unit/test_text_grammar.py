"""Grammars: what a request asks for, what its tokens may be, and where the fault of a schema is."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from triptych.errors import RequestError, Unsupported
from triptych.text import grammar
from triptych.text.constraint import Wanted, answer_grammar
from triptych.text.grammar import GrammarCache, GrammarState
from triptych.text.tokenizer import Tokenizer
from triptych.text.tools import DSML, ToolCall, calls_block
from triptych.tiny.shape import TOKENIZER_FILE
from triptych.words import Grammar

JSON_OBJECT = {"type": "json_object"}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "string"},
        "b": {"type": "integer"},
        "c": {"enum": ["x", "y", 3]},
        "d": {"type": ["string", "null"]},
        "e": {"anyOf": [{"type": "string", "minLength": 2, "pattern": "^k"}, {"$ref": "#/$defs/P"}]},
    },
    "required": ["a", "c"],
    "$defs": {"P": {"type": "object", "properties": {"q": {"$ref": "#/$defs/P"}}, "additionalProperties": False}},
}
STRICT = {"name": "f", "strict": True, "parameters": PARAMETERS}
LOOSE = {"name": "g", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}, "s": {}}}}
FREE: dict[str, Any] = {"name": "h"}
FUNCTIONS = (STRICT, LOOSE, FREE)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(TOKENIZER_FILE.parent)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> GrammarCache:
    return GrammarCache(tokenizer, tokenizer.vocab_size + 40, [tokenizer.eos_id or 0])


def ids(text: str, tokenizer: Tokenizer) -> list[int]:
    parts = re.split(f"({DSML}|</think>)", text)
    return [
        token
        for i, part in enumerate(parts)
        for token in ([tokenizer.control_id(part)] if i % 2 else tokenizer.encode(part).tolist())
    ]


def allowed(mask: Any, token: int) -> bool:
    return mask is None or bool(int(mask[token // 32]) >> (token % 32) & 1)


def refused_at(state: GrammarState, tokens: list[int]) -> int | None:
    """The index of the first token that may not stand there."""
    for i, token in enumerate(tokens):
        if not allowed(state.mask(), token):
            return i
        state.accept(token)
    return None


def takes(wanted: Wanted, text: str, grammars: GrammarCache, tokenizer: Tokenizer) -> bool:
    """True if `text` may be the whole answer."""
    grammar = answer_grammar(wanted, grammars, tokenizer)
    return (
        grammar is None or refused_at(grammars.start(grammar), [*ids(text, tokenizer), tokenizer.eos_id or 0]) is None
    )


def call(name: str, /, **arguments: Any) -> str:
    return calls_block([ToolCall("", name, json.dumps(arguments))])


@pytest.mark.parametrize(
    ("response_format", "good", "bad"),
    [
        (JSON_OBJECT, ['{"a": 1}', '{\n "k": [1, {"z": null}]\n}'], ["[1]", "hi", '{"a": 1', '{"a":' + " " * 21]),
        ({"type": "regex", "regex": "a/b+\\d"}, ["a/bb7"], ["ab7", "a/bb7x"]),
        ({"type": "lark", "lark": 'start: "x" y\ny: /z+/'}, ["xzz"], ["x", "yz"]),
        (
            {"type": "json_schema", "json_schema": {"schema": {"type": "array", "items": {"enum": ["é", 2]}}}},
            ['["é", 2]', "[]"],
            ['["e"]', "{}"],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("thinking", [False, True])
def test_response_formats(
    response_format: Any, good: list[str], bad: list[str], thinking: bool, grammars: Any, tokenizer: Any
) -> None:
    wanted = Wanted(thinking=thinking, response_format=response_format)
    before = 'Hm, {"or not".</think>' if thinking else ""
    assert all(takes(wanted, before + text, grammars, tokenizer) for text in good)
    assert not any(takes(wanted, before + text, grammars, tokenizer) for text in bad)
    if thinking:
        assert not takes(wanted, "only thoughts", grammars, tokenizer)


GOOD = [
    call("f", a="x </b> \n</｜y", c="x"),
    call("f", a="", b=3, c=3, d=None, e={"q": {}}),
    call("f", a="1", c="y", d="null", e="kk"),
    call("g"),
    call("g", s="x", n=-2),
    call("g", s=[1, {"a": True}]),
    call("h", anything="goes", at=[1, 2]),
    calls_block([ToolCall("", "g", "{}"), ToolCall("", "h", "{}")]),
]
BAD = [
    call("f", c="x"),
    call("f", a="x", c="z"),
    call("f", a=1, c="x"),
    call("f", a="x", c="x", e="k"),
    call("f", a="x", c="x", z=1),
    call("g", n="three"),
    call("unknown"),
    call("g").replace(f"</{DSML}invoke>\n", ""),
]


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("thinking", [False, True])
def test_calls_have_the_structure_and_the_arguments_of_a_tool(
    choice: str, thinking: bool, grammars: GrammarCache, tokenizer: Tokenizer
) -> None:
    wanted = Wanted(thinking=thinking, functions=FUNCTIONS, choice=choice)
    before = "Hm.</think>" if thinking else ""
    for text in GOOD:
        assert takes(wanted, before + text, grammars, tokenizer), text
    for text in BAD:
        assert not takes(wanted, before + text, grammars, tokenizer), text
    assert takes(wanted, before + "I need none.", grammars, tokenizer) == (choice == "auto")
    assert takes(wanted, before + "First this:" + GOOD[0], grammars, tokenizer) == (choice == "auto")


def test_what_may_be_called(grammars: GrammarCache, tokenizer: Tokenizer) -> None:
    one = Wanted(functions=FUNCTIONS, choice="g")
    assert takes(one, call("g"), grammars, tokenizer) and not takes(one, call("h"), grammars, tokenizer)
    single = Wanted(functions=FUNCTIONS, choice="required", parallel=False)
    assert takes(single, call("g"), grammars, tokenizer) and not takes(single, GOOD[-1], grammars, tokenizer)
    opened = Wanted(functions=FUNCTIONS, choice="required", opened=True)
    assert takes(opened, call("g").removeprefix(f"\n\n<{DSML}tool_calls>\n"), grammars, tokenizer)
    either = Wanted(functions=FUNCTIONS, response_format=JSON_OBJECT)
    assert takes(either, call("g"), grammars, tokenizer) and takes(either, "{}", grammars, tokenizer)
    assert not takes(either, "words", grammars, tokenizer)
    nothing = Wanted(functions=FUNCTIONS, choice="none", response_format=JSON_OBJECT)
    assert takes(nothing, "{}", grammars, tokenizer) and not takes(nothing, call("g"), grammars, tokenizer)
    assert answer_grammar(Wanted(functions=FUNCTIONS, choice="none"), grammars, tokenizer) is None
    assert answer_grammar(Wanted(response_format={"type": "text"}), grammars, tokenizer) is None


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


def strict(parameters: Any) -> tuple[dict[str, Any], ...]:
    return (LOOSE, {"name": "f", "strict": True, "parameters": parameters})


WIDE = {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": i} for i in range(3000)}}
WRONG = {"type": "strin"}


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        (Wanted(response_format=3), "response_format.type"),
        (Wanted(response_format={"type": "xml"}), "response_format.type"),
        (Wanted(response_format={"type": "regex"}), "response_format.regex"),
        (Wanted(response_format={"type": "regex", "regex": "a("}), "response_format.regex"),
        (Wanted(response_format={"type": "lark", "lark": "begin: /a/"}), "response_format.lark"),
        (Wanted(response_format={"type": "regex", "regex": "a|" * 40_000 + "b"}), "response_format.regex"),
        (Wanted(response_format={"type": "json_schema"}), "response_format.json_schema"),
        (Wanted(response_format=schema_format({"$ref": "#"})), "response_format.json_schema.schema"),
        (Wanted(response_format=schema_format(3)), "response_format.json_schema.schema"),
        (
            Wanted(response_format=schema_format({"properties": {"a": {"items": WRONG}}})),
            "response_format.json_schema.schema.properties.a.items",
        ),
        (
            Wanted(response_format=schema_format({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/q"}]})),
            "response_format.json_schema.schema.anyOf[1]",
        ),
        (
            Wanted(functions=strict({"properties": {"a": {"properties": {"z": WRONG}}}})),
            "tools[1].function.parameters.properties.a.properties.z",
        ),
    ],
)
def test_faults_are_named_by_their_path(wanted: Wanted, param: str, grammars: Any, tokenizer: Any) -> None:
    with pytest.raises(RequestError) as caught:
        answer_grammar(wanted, grammars, tokenizer)
    assert caught.value.param == param and str(caught.value)


def test_thousands_of_optional_properties(grammars: GrammarCache, tokenizer: Tokenizer) -> None:
    wanted = Wanted(response_format=schema_format(WIDE))
    assert takes(wanted, '{"p7": "seven", "p2999": ""}', grammars, tokenizer)
    assert not takes(wanted, '{"p7": "seven and more"}', grammars, tokenizer)


def test_a_schema_that_cannot_be_followed_matters_only_where_it_is_strict(grammars: Any, tokenizer: Any) -> None:
    odd = {"name": "f", "parameters": {"properties": {"a": {"not": {"type": "string"}}}}}
    assert takes(Wanted(functions=(odd,)), call("f", a=1, b="x"), grammars, tokenizer)


def test_masks_are_as_wide_as_the_model_and_states_do_not_share(grammars: GrammarCache, tokenizer: Tokenizer) -> None:
    grammar = Grammar('start: "ab"')
    first, second = grammars.start(grammar), grammars.start(grammar)
    mask = first.mask()
    assert mask is not None and mask.dtype == np.int32 and len(mask) == (tokenizer.vocab_size + 40 + 31) // 32
    for token in ids("ab", tokenizer):
        first.accept(token)
    assert first.done and not second.done
    end = first.mask()
    assert end is not None and [i for i in range(tokenizer.vocab_size) if allowed(end, i)] == [tokenizer.eos_id]
    np.testing.assert_array_equal(second.mask(), mask)


def test_without_llguidance_what_needs_it_is_refused_by_name(
    grammars: GrammarCache, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triptych.text.grammar.importlib.util.find_spec", lambda name: None)
    assert answer_grammar(Wanted(functions=(LOOSE, FREE)), grammars, tokenizer) is None
    for wanted, param in (
        (Wanted(response_format=JSON_OBJECT), "response_format"),
        (Wanted(functions=(LOOSE,), choice="required"), "tool_choice"),
        (Wanted(functions=(STRICT,)), "tools"),
    ):
        with pytest.raises(Unsupported, match=r"triptych\[grammar\]") as caught:
            answer_grammar(wanted, grammars, tokenizer)
        assert caught.value.param == param


@pytest.mark.parametrize(("installed", "serves"), [("1.6.0", False), ("1.10.2", True), ("2.0.0rc1", True)])
def test_an_llguidance_that_is_too_old_is_named(installed: str, serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "_installed", lambda: installed)
    assert grammar.available() is serves
    if not serves:
        with pytest.raises(Unsupported, match=r"needs llguidance 1\.9 or newer; 1\.6\.0 is installed"):
            grammar.require("response_format")
