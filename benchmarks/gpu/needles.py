"""The bundled checkpoint on a GPU with a million tokens: does it find the facts hidden in them, and how fast?

    PYTHONPATH=src python -m benchmarks.gpu.needles [--tokens 1048576] [--facts 4]

The first question runs the whole document, the others resume from it. `triptych eval retrieval` asks the same.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks import rows
from benchmarks.gpu.sessions import answer
from triptych.engine.api import Engine
from triptych.text.chat import Message, Role, render
from triptych.workload.retrieval import InProcess, draw_case, standard_filler


def main() -> None:
    """Print each answer, and append a row to results/gpu_needles.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--facts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    began = time.perf_counter()
    engine = Engine.load("tiny", device="cuda", max_running=1, kv_memory=4 << 30)
    print(f"loaded in {time.perf_counter() - began:.1f} s", flush=True)
    assert engine.tokenizer is not None
    model = InProcess(engine)
    laid = time.perf_counter()
    case = draw_case(model, model.encode(standard_filler()), given.tokens, given.seed)
    asked: list[dict[str, Any]] = []
    step = max(1, len(case.facts) // given.facts)
    print(f"text made in {time.perf_counter() - laid:.1f} s", flush=True)
    for fact, depth in list(zip(case.facts, case.depths, strict=True))[::step][: given.facts]:
        prompt = render((Message(Role.USER, f"{case.document}\n\n{fact.question}"),), engine.tokenizer).ids
        print(f"asking with {len(prompt)} tokens at {time.perf_counter() - began:.1f} s", flush=True)
        first, _, tokens, usage = answer(engine, prompt, 12, ignore_eos=False)
        said = engine.tokenizer.decode(tokens).strip()
        right = said == fact.value.strip()
        asked.append({"depth": depth, "prompt": usage.prompt_tokens, "cached": usage.cached_tokens})
        asked[-1] |= {"first_s": round(first, 3), "right": right}
        print(asked[-1], repr(said), repr(fact.value), flush=True)
    engine.check_integrity()
    engine.close()
    out = {"card": torch.cuda.get_device_name(), "tokens": given.tokens, "right": sum(one["right"] for one in asked)}
    values = {"command": rows.command_of("gpu.needles"), "table": [out | {"asked": asked}]}
    print(out, flush=True)
    rows.append("gpu_needles", values, kv_bytes={"entry": 256}, threads=1)


if __name__ == "__main__":
    main()
