"""What a decode step's kernels take, operation by operation, against floors and vendors' kernels in the same run.

    python -m benchmarks.gpu.table [--models flash pro] [--batches 1 64 ...] [--contexts 8K 128K 1M] [--only GROUP ...]
                                   [--peers DIR]

Runs the cases of attention, experts, linears and front that a layer has, those of 1 and 64 rows first, and appends one
row to results/gpu_table.jsonl: also when `--seconds` are over or it is interrupted, with the cases that are missing.
`make bench` draws docs/gpu.md from it. Rows of one commit are shown as one, so a table can be made in several runs;
those of runs with --only are shown behind the newest others.

FlashMLA is measured where it is installed. `--peers` names a folder with the libraries of vLLM 0.26.0, whose index
scores, top-k and experts are then measured in the same run: see benchmarks/gpu/peers.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import rows
from benchmarks.gpu import attention, experts, front, linears, peers
from benchmarks.gpu.timing import READ, Figures, ceilings
from triptych.config import SHAPES

BATCHES = (1, 64, 8, 128, 32)
CONTEXTS = ("1M", "8K", "128K")
GROUPS = ("attention", "index", "experts", "linears", "sites")
KV_BYTES = {"entry": 584, "fp8 index key": 132, "mxfp4 index key": 68}
ANY = "any"
"""The context of what takes as long for each."""


class Case(NamedTuple):
    """One operation of a layer of a model, for `batch` rows that are each `context` into their sequence."""

    model: str
    op: str
    context: str
    batch: int
    measure: Callable[[], Figures]

    def __str__(self) -> str:
        return f"{self.model} {self.op}{'' if self.context == ANY else f' at {self.context}'} x {self.batch}"


def main() -> int:
    """Print a line for each case and append the row; 1 where a case could not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.table", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=["flash", "pro"])
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--contexts", nargs="+", choices=CONTEXTS, default=CONTEXTS)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--peers", type=Path, metavar="DIR", help="where vLLM 0.26.0's libraries were unpacked")
    parser.add_argument("--seconds", type=float, default=600.0, help="after these no case is begun")
    parser.add_argument("--dry", action="store_true", help="print only: does it run, and are kernels compiled?")
    given = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(0)
    torch.zeros(1, device="cuda")
    copy, rate = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s, bf16 {rate / 1e12:.0f} TFLOP/s", flush=True)
    beside = peers.load(given.peers) if given.peers else None
    asked = list(cases(given.models, given.batches, given.contexts, given.only, beside))
    table, failed = run(asked, began + given.seconds)
    missing = [str(case) for case in asked[len(table) + len(failed) :]]
    print(f"{len(table)} cases in {time.monotonic() - began:.1f} s, {len(failed)} failed, {len(missing)} missing")
    if table and not given.dry:
        values = {"copy_tb_s": round(copy / 1e12, 3), "bf16_tflop_s": round(rate / 1e12, 1)}
        values["vllm"] = peers.VERSION if beside else "not in this run"
        keep(table, values | {"failed": failed, "missing": missing, "seconds": round(time.monotonic() - began, 1)})
    return 1 if failed else 0


def cases(
    models: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[str],
    only: Sequence[str],
    beside: peers.Peers | None = None,
) -> Iterator[Case]:
    """What is asked for: batch by batch, models one after the other; `beside` it peers where they have a kernel."""
    for batch in batches:
        for model in models:
            for group in only:
                for op, context, measure in _GROUPS[group](model, batch, contexts, beside):
                    yield Case(model, op, context, batch, measure)


def run(asked: Sequence[Case], until: float) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The lines of the cases in turn until `until` or an interrupt, and what was wrong with those that failed."""
    table: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for case in asked:
        began = time.monotonic()
        if began >= until:
            break
        try:
            found = case.measure()
        except KeyboardInterrupt:
            break
        except Exception as error:
            failed[str(case)] = f"{type(error).__name__}: {error}"[:200]
            print(f"{case}: {failed[str(case)]}", flush=True)
            continue
        table.append({"model": case.model, "op": case.op, "context": case.context, "batch": case.batch, **found})
        figures = " ".join(f"{key}={value}" for key, value in found.items())
        print(f"{case}: {figures} ({time.monotonic() - began:.2f} s)", flush=True)
    return table, failed


def keep(table: list[dict[str, Any]], values: dict[str, Any]) -> None:
    """Append the row."""
    values |= {"command": rows.command_of("gpu.table")}
    values |= {"card": torch.cuda.get_device_name(), "versions": _versions(), "table": table}
    rows.append("gpu_table", values, kv_bytes=KV_BYTES, threads=1)


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__}
    for name in ("triton", "sgl-flash-mla"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


# ---- the groups: operation, context and how it is measured

Group = Iterator[tuple[str, str, Callable[[], Figures]]]
Beside = peers.Peers | None


def _attention(model: str, batch: int, contexts: Sequence[str], beside: Beside) -> Group:
    for kind in ("csa", "hca", "swa"):
        for context in contexts if kind == "hca" else (ANY,):
            tokens = attention.CONTEXTS["1M" if context == ANY else context]
            yield f"attend {kind}", context, partial(attention.attention, SHAPES[model], kind, tokens, batch)


def _index(model: str, batch: int, contexts: Sequence[str], beside: Beside) -> Group:
    for kind in ("fp8", "mxfp4"):
        for context in contexts:
            tokens = attention.CONTEXTS[context]
            yield f"select {kind}", context, partial(attention.selection, SHAPES[model], kind, tokens, batch, beside)


def _experts(model: str, batch: int, contexts: Sequence[str], beside: Beside) -> Group:
    def measure() -> Figures:
        return experts.decode_rows(model, batch, *_mixture(model), beside and _marlin(beside, model))

    yield "experts", ANY, measure


def _linears(model: str, batch: int, contexts: Sequence[str], beside: Beside) -> Group:
    for name, product in linears.products(SHAPES[model]).items():
        yield f"linear {name}", ANY, partial(product.figures, batch, beside)


def _sites(model: str, batch: int, contexts: Sequence[str], beside: Beside) -> Group:
    for case in front.cases(SHAPES[model], batch, rounds=True):
        yield case.op, ANY, partial(front.figures, case, READ)


_GROUPS = {"attention": _attention, "index": _index, "experts": _experts, "linears": _linears, "sites": _sites}


@cache
def _mixture(model: str) -> tuple[Any, ...]:
    """Weights of one layer, which all batches share: 3 GB of Flash, 14 GB of Pro."""
    router, moe, shared = experts.layer(model)
    return router, moe, experts.shared_copies(shared)


@cache
def _marlin(beside: peers.Peers, model: str) -> peers.Marlin:
    """As many weights again."""
    return peers.Marlin(beside, *experts.SHAPES[model])


if __name__ == "__main__":
    raise SystemExit(main())
