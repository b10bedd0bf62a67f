"""python -m benchmarks tiny_paths: does a cache path or the numerics change what the bundled model answers?

The same questions through differently set engines; counts answers equal to those of the default one, token for token,
and right answers. Where an answer differs, how far the default's choice was ahead there tells a near-tie from damage.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triptych import Engine, SamplingParams
from triptych.engine.api import Output
from triptych.text.chat import Message, Role, render
from triptych.words import TokenIds
from triptych.workload.retrieval import InProcess, draw_case, standard_filler

PATHS: dict[str, dict[str, Any]] = {
    "default": {},
    "default, cache emptied before each question": {},
    "prefix cache off": {"prefix_cache": False},
    "96 rows a step": {"step_tokens": 96},
    "deterministic": {"deterministic": True},
    "bfloat16 cache": {"kv_format": "bfloat16"},
    "native numerics": {"numerics": "native"},
}
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, logprobs=2)
NEAR_TIE = 0.1  # nats between the best and the second token


def questions(engine: Engine, plan: list[tuple[int, int]]) -> Iterator[tuple[TokenIds, str]]:
    """Prompts and the values they ask for."""
    model = InProcess(engine)
    assert engine.tokenizer is not None
    filler = model.encode(standard_filler())
    for length, count in plan:
        for seed in range(500, 500 + count):
            case = draw_case(model, filler, length, seed)
            for fact in case.facts:
                text = f"{case.document}\n\n{fact.question}"
                yield render((Message(Role.USER, text),), engine.tokenizer).ids, fact.value


def margin(reference: Output, other: Output) -> float:
    """How far ahead the reference's token was where `other` first left it, in nats."""
    for mine, theirs, logprob in zip(reference.token_ids, other.token_ids, reference.logprobs, strict=False):
        if mine != theirs:
            return logprob.top[0][1] - logprob.top[1][1]
    return 0.0


def main(argv: list[str]) -> int:
    """Run all paths; one JSON line each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tiny_paths", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/tiny/paths.jsonl"))
    parser.add_argument("--plan", default="1024:4,4096:2", help="LENGTH:DOCUMENTS,...")
    args = parser.parse_args(argv)
    plan = [(int(a), int(b)) for a, b in (item.split(":") for item in args.plan.split(","))]
    reference: list[Output] = []
    lines = []
    for name, options in PATHS.items():
        engine = Engine.load("tiny", kv_memory=128 << 20, **options)
        outputs, right = [], 0
        for prompt, value in questions(engine, plan):
            if "emptied" in name:
                engine.reset_cache()
            outputs += engine.generate([prompt], GREEDY)
            right += outputs[-1].text == value
        reference = reference or outputs
        gaps = [margin(a, b) for a, b in zip(reference, outputs, strict=True) if a.token_ids != b.token_ids]
        row = {"path": name, "plan": args.plan, "questions": len(outputs), "right": right,
               "same": len(outputs) - len(gaps), "near_ties": sum(g < NEAR_TIE for g in gaps),
               "margins": [round(g, 2) for g in gaps]}  # fmt: skip
        lines.append(json.dumps(row))
        print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0
