"""FlashMLA behind attend_rows, against float64 and inside CUDA graphs; outputs start as NaN."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import test_gpu_decode as decode
import torch
from test_gpu_packed import ENTRY, MODELS, VISIBLE, poison

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import packed_cases as cases

from triptych.kernels.registry import select

vendor: Any = pytest.importorskip("triptych.kernels.attend_rows.vendor")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("flash_mla") is None, reason="sgl-flash-mla is not installed")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["csa", "hca", "swa"])
@pytest.mark.parametrize("rows", [1, 5, 70, 140])
def test_decode_attention(model: str, kind: str, rows: int) -> None:
    heads, topk = MODELS[model]
    case = cases.decode_case(kind, (VISIBLE * 28)[:rows], heads, ENTRY, topk, "cuda")
    assert vendor.serves(*case[:2])
    poison()
    assert cases.decode_error(vendor.attend_rows_forced(*case), case) < 4e-3


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["csa", "hca", "swa"])
@pytest.mark.parametrize("places", [1 << 24, 1 << 16])
def test_prefill_attention(model: str, kind: str, places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step rows of two sequences; with few places alive at once in slices."""
    heads, topk = MODELS[model]
    case = cases.heads_case(kind, 300, 1100, heads, ENTRY, topk, "cuda")
    assert vendor.serves_step(*case[:3])
    monkeypatch.setattr(vendor.vendor_chunks, "_PLACES", places)
    poison()
    assert cases.heads_error(vendor.attend_heads_forced(*case), case) < 4e-3


def test_decode_steps_are_those_of_our_own_kernels() -> None:
    start = decode.prompted("fp8")
    runners = {name: decode.runner_on("cuda", "released", "fp8", "fp8") for name in ("triton", "vendor")}
    for name, runner in runners.items():
        runner.model.use_kernels(select(name, device="cuda", capability=torch.cuda.get_device_capability()))  # type: ignore[arg-type]
        decode.copy_pools(start, runner)
    rows, seen = len(decode.LENGTHS), {name: [] for name in runners}
    for step in range(5):
        for name, runner in runners.items():
            logits = runner.model.decode(decode.batch(step, 2, decode.CUDA), runner.pools.layers)
            seen[name].append(logits[:rows].clone())
    assert runners["vendor"].model.kernels.attend_rows is vendor.attend_rows_forced
    decode.near(seen["vendor"], [logits.cpu() for logits in seen["triton"]])


@pytest.mark.parametrize("kind", ["csa", "hca", "swa"])
def test_a_graph_follows_lengths_and_places(kind: str) -> None:
    """A graph that was captured for some rows computes others that are put into its tensors."""
    first = cases.decode_case(kind, [1500, 40, 3, 900], 64, ENTRY, 512, "cuda", seed=1)
    second = cases.decode_case(kind, [70, 1500, 700, 0], 64, ENTRY, 512, "cuda", seed=2)
    vendor.attend_rows_forced(*first)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = vendor.attend_rows_forced(*first)
    for case in (first, second):
        for ours, theirs in zip(tensors(first), tensors(case), strict=True):
            ours.copy_(theirs)
        out.fill_(float("nan"))
        graph.replay()
        assert cases.decode_error(out, case) < 4e-3


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors inside tuples, packed rows by their bytes."""
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "scales"):
        return [value.values, value.scales]
    return [found for part in value for found in tensors(part)] if isinstance(value, tuple) else []
