"""Answers under a grammar: always valid, whatever the model would rather say, alone and in company."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest

from triptych.engine.api import Engine
from triptych.engine.async_engine import AsyncEngine
from triptych.engine.load import LoadedEngine
from triptych.engine.sampler import apply_mask
from triptych.errors import RequestError
from triptych.text.constraint import Wanted, answer_grammar
from triptych.text.dsml import OutputParser
from triptych.text.pieces import CallBegin, CallText
from triptych.words import FinishReason, Grammar, SamplingParams

PROMPT = "The weather report as JSON: "


def random_schema(dice: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose values are short."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum"] + (["object", "array", "anyOf"] * 2) * (
        depth < 3
    )
    kind = dice.choice(kinds) if depth else "object"
    if kind == "object":
        names = dice.sample(["name", "größe", "a b", "x", "list", 'q"'], dice.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(dice, depth + 1) for name in names},
            "required": dice.sample(names, dice.randint(0, len(names))),
            "additionalProperties": False,
        }
    if kind == "array":
        return {"type": "array", "items": random_schema(dice, depth + 1), "minItems": dice.randint(0, 1), "maxItems": 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(dice, depth + 1) for _ in range(2)]}
    if kind == "enum":
        return {"enum": dice.sample(["red", "grün", 3, None, True, "a\nb"], 2)}
    plain: dict[str, dict[str, Any]] = {
        "string": {"maxLength": dice.randint(0, 8)},
        "integer": {"minimum": -dice.randint(0, 50), "maximum": dice.randint(1, 1000)},
    }
    return {"type": kind, **plain.get(kind, {})}


def grammar_for(engine: Engine, **wanted: Any) -> Grammar:
    assert engine.grammars is not None and engine.tokenizer is not None
    grammar = answer_grammar(Wanted(**wanted), engine.grammars, engine.tokenizer)
    assert grammar is not None
    return grammar


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


def test_fifty_random_schemas_together(engine: Engine) -> None:
    schemas = [random_schema(random.Random(seed)) for seed in range(50)]
    params = [
        SamplingParams(
            max_tokens=700,
            temperature=seed % 3 * 0.5,
            seed=seed,
            repetition_penalty=1.3,
            presence_penalty=0.5,
            logprobs=2 if seed % 4 == 0 else None,
            grammar=grammar_for(engine, response_format=schema_format(schema)),
        )
        for seed, schema in enumerate(schemas)
    ]
    for schema, one, out in zip(schemas, params, engine.generate([PROMPT] * 50, params), strict=True):
        assert out.finish_reason is FinishReason.STOP, (schema, out.text)
        jsonschema.validate(json.loads(out.text), schema)
        assert len(out.logprobs) == (len(out.token_ids) if one.logprobs else 0)


def test_samples_of_one_request_keep_their_places_apart(engine: Engine) -> None:
    schema = {"type": "array", "items": {"enum": ["one", "two", 3]}, "minItems": 1, "maxItems": 4}
    params = SamplingParams(
        max_tokens=60, n=4, seed=1, grammar=grammar_for(engine, response_format=schema_format(schema))
    )
    outs = engine.generate([PROMPT], params)
    assert len({out.text for out in outs}) > 1
    for out in outs:
        jsonschema.validate(json.loads(out.text), schema)


def test_a_grammar_changes_no_neighbour_and_no_logprob(engine: Engine) -> None:
    plain = SamplingParams(max_tokens=24, temperature=0.0, logprobs=0)
    bound = SamplingParams(max_tokens=24, temperature=0.0, logprobs=0, grammar=Grammar('start: "{" /[a-z ]*/ "}"'))
    [alone] = engine.generate([PROMPT], plain)
    beside, held = engine.generate([PROMPT] * 2, [plain, bound])
    assert beside.token_ids == alone.token_ids and held.text.startswith("{")
    # the model's own distribution, which knows nothing of the grammar
    assert held.logprobs[0].logprob <= alone.logprobs[0].logprob
    free = SamplingParams(max_tokens=24, temperature=0.0, logprobs=0, grammar=Grammar(r"start: /(?s:.*)/"))
    [same] = engine.generate([PROMPT], free)
    assert same.text == alone.text


def test_thoughts_are_free_and_must_end(engine: Engine) -> None:
    assert engine.tokenizer is not None
    end = engine.tokenizer.control_id("</think>")
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    grammar = grammar_for(engine, thinking=True, response_format=schema_format(schema))
    assert grammar.after == end
    # thoughts of a few tokens, then pushed to their end
    [thinks] = engine.generate([PROMPT], SamplingParams(max_tokens=12, seed=3, grammar=grammar))
    assert end not in thinks.token_ids and thinks.finish_reason is FinishReason.LENGTH
    [out] = engine.generate([PROMPT], SamplingParams(max_tokens=64, seed=3, logit_bias={end: 100.0}, grammar=grammar))
    jsonschema.validate(json.loads(out.text.split("</think>")[1]), schema)


def test_forced_calls_have_valid_arguments(engine: Engine) -> None:
    functions = tuple(
        {"name": name, "strict": True, "parameters": random_schema(random.Random(seed))}
        for seed, name in enumerate(("look", "say", "run"))
    )
    params = SamplingParams(
        max_tokens=900, seed=5, n=8, grammar=grammar_for(engine, functions=functions, choice="required")
    )
    called = set()
    for out in engine.generate([PROMPT], params):
        if out.finish_reason is not FinishReason.STOP:
            continue  # it called on and on
        parser = OutputParser(tools=("look", "say", "run"))
        pieces = [*parser.push(out.text), *parser.finish()]
        names = {piece.index: piece.name for piece in pieces if isinstance(piece, CallBegin)}
        assert names and all(isinstance(piece, CallBegin | CallText) for piece in pieces)
        for index, name in names.items():
            arguments = "".join(p.text for p in pieces if isinstance(p, CallText) and p.index == index)
            [function] = [one for one in functions if one["name"] == name]
            jsonschema.validate(json.loads(arguments), function["parameters"])
            called.add(name)
    assert called


def test_streaming_with_grammars_beside_free_answers(loaded: LoadedEngine, engine: Engine) -> None:
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 5}
    bound = SamplingParams(max_tokens=80, seed=2, grammar=grammar_for(engine, response_format=schema_format(schema)))
    free = SamplingParams(max_tokens=40, temperature=0.0)
    [expected] = engine.generate([PROMPT], free)
    serving = AsyncEngine(loaded)
    engine.reset_cache()

    async def text(i: int, params: SamplingParams) -> str:
        ids = serving.tokenizer.encode(PROMPT)
        parts = [delta.text async for delta in serving.stream(ids, params, request_id=f"r{i}")]
        return "".join(parts)

    async def all_of_them() -> list[str]:
        await serving.start()
        try:
            return await asyncio.gather(*(text(i, free if i % 2 else bound) for i in range(10)))
        finally:
            assert await serving.drain(10.0)

    texts = asyncio.run(all_of_them())
    assert all(one == expected.text for one in texts[1::2])
    for one in texts[::2]:
        jsonschema.validate(json.loads(one), schema)


def test_what_is_no_grammar_is_refused_before_it_runs(engine: Engine) -> None:
    with pytest.raises(RequestError, match="cannot be followed"):
        engine.generate([PROMPT], SamplingParams(max_tokens=4, grammar=Grammar("start: nothing")))


def test_a_mask_hides_what_its_bits_leave_out() -> None:
    logits = np.arange(70, dtype=np.float64)
    mask = np.zeros(3, np.int32)
    mask[0], mask[1], mask[2] = 1 << 3, -(1 << 31), 0b100001
    apply_mask(logits, mask)
    assert np.flatnonzero(np.isfinite(logits)).tolist() == [3, 63, 64, 69]
