"""Triptych against Transformers on one CPU: same checkpoint, same tokens, same threads, one run, taking turns.

    python -m benchmarks cpu_vs_transformers            about ten minutes on an idle machine
    python -m benchmarks cpu_vs_transformers --short    seconds: does it work?

Transformers prefills in chunks through its cache (a whole prompt at once would allocate S x S scores). Chunk by chunk
and token by token the two sides alternate, so that both meet the same disturbances. Triptych's times are whole engine
steps: scheduling, cache management and sampling included.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow both sides down, unequally

import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.rows import Timed, ratio
from benchmarks.transformers_side import TransformersSide
from benchmarks.triptych_side import TriptychSide
from triptych.config import CSA_LAYER, HCA_LAYER, SWA_LAYER, ModelShape

NAME = "cpu_vs_transformers"

SHAPE = ModelShape(  # 26.2M parameters, all three layer kinds, one hash layer
    vocab_size=8192,
    hidden_size=256,
    ratios=(SWA_LAYER, SWA_LAYER, CSA_LAYER, HCA_LAYER, CSA_LAYER, HCA_LAYER),
    num_heads=8,
    head_dim=64,
    rope_dim=16,
    q_lora_rank=128,
    o_groups=4,
    o_lora_rank=64,
    index_heads=4,
    index_head_dim=32,
    index_topk=128,
    num_experts=16,
    experts_per_token=2,
    moe_intermediate_size=256,
    num_hash_layers=1,
    routed_scaling=1.5,
    num_mtp_layers=0,
)


def main(argv: list[str]) -> int:
    """Run, print a table, append a row."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    before = rows.load_average()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        _write_checkpoint(directory)
        values, kv_bytes = _measure(directory, args)
    values |= {
        "load_average": {"before": before, "after": rows.load_average()},
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "chunk": args.chunk,
        "decode_steps": args.decode,
    }
    _print(values)
    if args.short:
        print("\na smoke test is no measurement: no row written")
    else:
        path = rows.append(NAME, values, kv_bytes=kv_bytes, threads=args.threads)
        print(f"\nrow appended to {path}")
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {NAME}", description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="1024,8192,32768", help="prompt lengths in tokens, rising")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prefill chunk, both sides")
    parser.add_argument("--decode", type=int, default=32, help="greedy steps at each context")
    parser.add_argument("--batch", type=int, default=16, help="streams of the batched decode at the first context")
    parser.add_argument("--threads", type=int, default=1, help="threads of both sides")
    parser.add_argument("--short", action="store_true", help="a smoke test: contexts 300 and 700, 4 decode steps")
    args = parser.parse_args(argv)
    if args.short:
        args.contexts, args.decode, args.batch, args.chunk = "300,700", 4, 4, 128
    args.contexts = [int(part) for part in args.contexts.split(",")]
    if args.contexts != sorted(set(args.contexts)):
        parser.error("--contexts must rise")
    return args


def _write_checkpoint(directory: Path) -> None:
    from triptych.checkpoint import synthesize

    synthesize(directory, SHAPE, dialect="transformers", weights="fp32", seed=0)


def _measure(directory: Path, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, int]]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(2, SHAPE.vocab_size, (args.contexts[-1],), generator=generator)
    ours = TriptychSide(
        directory, threads=args.threads, chunk=args.chunk, kv_memory=512 << 20, max_running=max(args.batch, 1)
    )
    theirs = TransformersSide(directory)
    torch.set_num_threads(args.threads)
    _warm_up(ours, TransformersSide(directory), args.chunk)
    stretches: dict[str, Any] = {}
    decodes: dict[str, Any] = {}
    kv_bytes: dict[str, int] = {}
    start = 0
    for context in args.contexts:
        stretches[f"{start}-{context}"], request = _prefill(ours, theirs, text, (start, context), args.chunk)
        decodes[str(context)] = _decode(ours, theirs, args.decode)
        kv_bytes |= {f"triptych_{context}": ours.kv_bytes(context), f"transformers_{context}": theirs.kv_bytes()}
        ours.finish(request)
        start = context
    batch = _batched(ours, args.contexts[0], args)
    return {"prefill": stretches, "decode": decodes, "batched_decode": batch}, kv_bytes


def _warm_up(ours: TriptychSide, theirs: TransformersSide, chunk: int) -> None:
    """Compile kernels and touch memory on text that is not measured."""
    tokens = torch.randint(2, SHAPE.vocab_size, (2 * chunk,), generator=torch.Generator().manual_seed(2))
    request, ignored = ours.add(tokens), Timed()
    for part in tokens.split(chunk):
        theirs.prefill(part, ignored)
    while ours.live[request] < 3:
        ours.step(ignored)
    theirs.decode(ignored)
    ours.finish(request)


def _prefill(
    ours: TriptychSide, theirs: TransformersSide, text: Tensor, stretch: tuple[int, int], chunk: int
) -> tuple[dict[str, Any], str]:
    """Both sides run the stretch [start, end) of the text; Triptych finds what is before it in its prefix cache."""
    start, end = stretch
    mine, hers = Timed(), Timed()
    chunks: Iterator[Tensor] = iter(text[start:end].split(chunk))
    request = ours.add(text[:end])
    while True:
        part = next(chunks, None)
        if part is not None:
            theirs.prefill(part, hers)
        if not ours.live[request]:
            ours.step(mine)
        elif part is None:
            break
    values = {"triptych": mine.rate(end - start), "transformers": hers.rate(end - start)}
    values["ratio"] = ratio(values["triptych"], values["transformers"])
    values["steps"] = {"triptych": len(mine.wall), "transformers": len(hers.wall)}
    return values, request


def _decode(ours: TriptychSide, theirs: TransformersSide, steps: int) -> dict[str, Any]:
    """Greedy steps in turns, after the same prompt; both sides feed the token they chose."""
    mine, hers = Timed(), Timed()
    branch = theirs.branch()
    got, want = [], []
    for _ in range(steps):
        want.append(branch.decode(hers))
        got += ours.step(mine)
    values: dict[str, Any] = {"triptych": mine.median(), "transformers": hers.median()}
    values["ratio"] = ratio(values["triptych"], values["transformers"])
    # `want` holds the tokens fed, so it runs one behind
    values["same_tokens"] = sum(a == b for a, b in zip(got, want[1:], strict=False)), steps - 1
    return values


def _batched(ours: TriptychSide, context: int, args: argparse.Namespace) -> dict[str, Any]:
    """Decode of one stream against a batch of streams with different prompts, both ours."""
    generator = torch.Generator().manual_seed(3)
    out: dict[str, Any] = {"context": context, "streams": args.batch}
    for streams in (1, args.batch):
        prompts = torch.randint(2, SHAPE.vocab_size, (streams, context), generator=generator)
        requests = [ours.add(prompt) for prompt in prompts]
        while not all(ours.live[request] for request in requests):
            ours.step(Timed())
        timed = Timed()
        for _ in range(args.decode):
            assert len(ours.step(timed)) == streams
        out[f"batch_{streams}"] = timed.median() | timed.rate(streams * args.decode)
        for request in requests:
            ours.finish(request)
    many, single = out[f"batch_{args.batch}"], out["batch_1"]
    out["throughput_ratio"] = {kind: round(many[kind] / single[kind], 2) for kind in ("wall_tok_s", "cpu_tok_s")}
    return out


def _print(values: dict[str, Any]) -> None:
    for kind, unit in (("prefill", "tok_s"), ("decode", "ms")):
        print(f"\n{kind}: {unit}, wall (cpu)\n{'context':>14} {'triptych':>20} {'transformers':>20} {'ratio':>14}")
        for context, one in values[kind].items():
            mine, hers, by = one["triptych"], one["transformers"], one["ratio"]
            cells = [f"{side[f'wall_{unit}']:.1f} ({side[f'cpu_{unit}']:.1f})" for side in (mine, hers)]
            times = f"{by[f'wall_{unit}']} ({by[f'cpu_{unit}']})"
            print(f"{context:>14} {cells[0]:>20} {cells[1]:>20} {times:>14}")
    batch = values["batched_decode"]
    by = batch["throughput_ratio"]
    print(
        f"\nbatched decode: {batch['streams']} streams give {by['wall_tok_s']} ({by['cpu_tok_s']}) x the tokens of one"
    )
    print("load average", values["load_average"], " peak RSS", values["peak_rss_mib"], "MiB")
