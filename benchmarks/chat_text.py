"""python -m benchmarks chat_text: what it costs on the host to render, constrain and read a chat.

With DeepSeek's own vocabulary. Render: 100 messages with 20 tools to token ids, by both encodings. Grammars: compiling,
and one mask per token of an answer that matches. Reading: the parser, token by token. Wall clock of one
thread. Decode: the bundled model, constrained and not.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import rows
from triptych.engine.api import Engine
from triptych.engine.sampler import apply_mask
from triptych.text import recipe
from triptych.text.constraint import Wanted, answer_grammar
from triptych.text.dsml import OutputParser
from triptych.text.grammar import GrammarCache
from triptych.text.history import History
from triptych.text.render import render_turns
from triptych.text.spell import PlainEncoding, Style
from triptych.text.tokenizer import Tokenizer
from triptych.text.tools import DSML, ToolCall, calls_block, parse_tools
from triptych.text.turns import parse_turns
from triptych.words import SamplingParams

VOCABULARY = 129_280
WORDS = (
    "the",
    "cat",
    "sat",
    "while",
    "rain",
    "fell",
    "12",
    "times,",
    "naïve",
    "«Nord»",
    "(why",
    "not?)",
    "went\n",
    "home",
)
EDIT = {"type": "object", "properties": {"old": {"type": "string"}, "new": {"type": "string"}}, "required": ["old"]}
PARAMETERS = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "lines": {"type": "integer"},
        "edits": {"type": "array", "items": EDIT | {"additionalProperties": False}},
    },
    "required": ["path"],
}
FUNCTIONS: tuple[dict[str, Any], ...] = tuple(
    {"name": f"tool_{i}", "strict": True, "parameters": PARAMETERS} for i in range(20)
)
ITEM = {
    "type": "object",
    "properties": {"id": {"type": "integer"}, "name": {"type": "string", "maxLength": 200}},
    "required": ["id", "name"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {"title": {"type": "string"}, "items": {"type": "array", "items": ITEM}},
    "required": ["title", "items"],
    "additionalProperties": False,
}


def main(argv: list[str]) -> int:
    """Measure, print, write a row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks chat_text", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args(argv)
    tokenizer = Tokenizer.deepseek()
    values: dict[str, Any] = {"rounds": given.rounds, "load": rows.load_average()}
    values["render"] = rendering(tokenizer, given.rounds)
    values["grammars"] = grammars(tokenizer)
    values["reading_us_a_token"] = reading(tokenizer)
    values["decode_tok_s"] = decoding()
    print(json.dumps(values, indent=1))
    rows.append("chat_text", values, kv_bytes={}, threads=1)
    return 0


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    """Median wall time."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return round(statistics.median(taken) * 1e3, 3)


def words(dice: random.Random, count: int) -> str:
    """Something to say."""
    return " ".join(dice.choices(WORDS, k=count))


def messages() -> list[dict[str, Any]]:
    """A hundred: an agent that calls a tool in every turn."""
    dice = random.Random(0)
    out: list[dict[str, Any]] = [{"role": "system", "content": words(dice, 500)}]
    for i in range(33):
        arguments = json.dumps({"path": words(dice, 3), "lines": 3})
        call = {"id": f"c{i}", "type": "function", "function": {"name": "tool_1", "arguments": arguments}}
        said = {"role": "assistant", "content": words(dice, 40), "reasoning_content": words(dice, 80)}
        out += [{"role": "user", "content": words(dice, 60)}, said | {"tool_calls": [call]}]
        out.append({"role": "tool", "tool_call_id": f"c{i}", "content": words(dice, 200)})
    return out


def rendering(tokenizer: Tokenizer, rounds: int) -> dict[str, Any]:
    """Milliseconds from messages to ids, and of what little is not tokenizing."""
    raw = messages()
    style = Style(True, "low", parse_tools([{"type": "function", "function": function} for function in FUNCTIONS]))
    turns = parse_turns(raw)
    ids = render_turns(turns, tokenizer, style, limit=10**6, encoding=PlainEncoding()).ids
    out: dict[str, Any] = {
        "messages": len(raw),
        "tokens": len(ids),
        "parse_ms": milliseconds(lambda: parse_turns(raw), rounds),
    }
    encodings = {"plain": PlainEncoding(), **({"recipe": recipe.RecipeEncoding()} if recipe.available() else {})}
    for name, encoding in encodings.items():
        out[f"{name}_spell_ms"] = milliseconds(lambda e=encoding: e.spell(turns, style), rounds)
        out[f"{name}_ms"] = milliseconds(
            lambda e=encoding: render_turns(turns, tokenizer, style, limit=10**6, encoding=e), rounds
        )
    history = History()
    out["with_history_ms"] = milliseconds(
        lambda: render_turns(turns, tokenizer, style, limit=10**6, history=history, encoding=PlainEncoding()), rounds
    )
    return out


def answers() -> dict[str, tuple[Wanted, str]]:
    """What is asked for, and an answer that matches."""
    dice = random.Random(1)
    items = [{"id": i, "name": f"Station {i} — «Nord»"} for i in range(24)]
    document = json.dumps({"title": "A report about the weather", "items": items}, ensure_ascii=False)
    edit = {"old": words(dice, 120), "new": words(dice, 200)}
    calls = calls_block([ToolCall("", "tool_3", json.dumps({"path": "a.py", "lines": 3, "edits": [edit]}))])
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    return {
        "json_object": (Wanted(response_format={"type": "json_object"}), document),
        "json_schema": (Wanted(response_format=schema), document),
        "strict_tools": (Wanted(functions=FUNCTIONS, choice="required"), calls),
        "regex": (
            Wanted(response_format={"type": "regex", "regex": r"(\d{4}-\d\d-\d\d, )+x"}),
            "2026-11-24, " * 60 + "x",
        ),
    }


def grammars(tokenizer: Tokenizer) -> dict[str, Any]:
    """Microseconds a mask; milliseconds to compile, first and from the cache."""
    cache = GrammarCache(tokenizer, VOCABULARY, [1])
    out: dict[str, Any] = {"vocabulary_ms": milliseconds(lambda: cache.fault('start: "a"'), 1)}
    for name, (wanted, text) in answers().items():
        compiled = [milliseconds(lambda w=wanted: answer_grammar(w, cache, tokenizer), 1) for _ in range(2)]
        grammar = answer_grammar(wanted, cache, tokenizer)
        assert grammar is not None
        state, taken = cache.start(grammar), []
        for token in spelled(text, tokenizer):
            started = time.perf_counter()
            mask = state.mask()
            taken.append((time.perf_counter() - started) * 1e6)
            assert mask is not None and int(mask[token // 32]) >> (token % 32) & 1
            state.accept(token)
        taken.sort()
        out[name] = {
            "tokens": len(taken),
            "compile_ms": compiled,
            "mask_us": [round(taken[int(len(taken) * share)], 1) for share in (0.5, 0.99)] + [round(taken[-1], 1)],
        }
    row, mask = np.zeros(VOCABULARY), np.full(VOCABULARY // 32, 0x55555555, np.int32)
    out["apply_us"] = milliseconds(lambda: apply_mask(row, mask), 99) * 1e3
    return out


def reading(tokenizer: Tokenizer) -> float:
    """Microseconds to parse one token of thoughts, text and a call."""
    text = "I think. " * 200 + "</think>" + "Word and word, " * 300 + answers()["strict_tools"][1]
    chunks = [tokenizer.token_bytes(token).decode("utf-8", "replace") for token in spelled(text, tokenizer)]

    def read() -> None:
        parser = OutputParser(thinking=True, tools=("tool_3",))
        for chunk in chunks:
            parser.push(chunk)
        parser.finish()

    return round(milliseconds(read, 5) * 1e3 / len(chunks), 1)


def decoding() -> dict[str, float]:
    """Tokens per second of 16 streams of the bundled model, free and under a schema, taking turns; medians of 5."""
    engine = Engine.load("tiny", kv_memory=64 << 20, max_running=16)
    assert engine.grammars is not None and engine.tokenizer is not None
    schema = {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 400}
    wanted = Wanted(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
    # a bias, so that both rows leave the quick way of plain greedy decoding
    free = SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True, logit_bias={5: 0.1})
    bound = replace(free, grammar=answer_grammar(wanted, engine.grammars, engine.tokenizer))
    taken: dict[str, list[float]] = {"free": [], "grammar": []}
    for _ in range(5):
        for name, params in (("free", free), ("grammar", bound)):
            started = time.perf_counter()
            outs = engine.generate(["Say: "] * 16, params)
            taken[name].append(sum(len(out.token_ids) for out in outs) / (time.perf_counter() - started))
    engine.close()
    return {name: round(statistics.median(rates), 1) for name, rates in taken.items()}


def spelled(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of what a model writes: control tokens in it are such."""
    ids: list[int] = []
    for i, part in enumerate(re.split(f"({DSML}|</think>)", text)):
        ids += [tokenizer.control_id(part)] if i % 2 else tokenizer.encode(part).tolist()
    return ids
