"""Every kernel once at small sizes, for compute-sanitizer to look at: `make test-gpu SANITIZE=1`.

Nothing is compared here, that is what tests do; a kernel that reads or writes beyond its tensors, or whose threads race
in shared memory, is named by the tool. Names in the arguments choose parts. Tensors must be allocations of their own,
or the tool cannot see their ends: PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels")]
import packed_cases as cases  # noqa: E402
import test_gpu_released as released  # noqa: E402

from triptych.kernels import inputs  # noqa: E402
from triptych.kernels.attend import triton as attend  # noqa: E402
from triptych.kernels.attend_rows import triton as rows  # noqa: E402
from triptych.kernels.index import triton as index  # noqa: E402
from triptych.kernels.linear import portable as linears  # noqa: E402
from triptych.kernels.linear.triton import front_linear, grouped_linear, linear, quantize  # noqa: E402
from triptych.kernels.moe import portable as mixtures  # noqa: E402
from triptych.kernels.moe.triton import experts, moe_rows, route, shared_expert  # noqa: E402
from triptych.kernels.quant.formats import RowFormat  # noqa: E402
from triptych.kernels.quant.matrices import FrontMatrix  # noqa: E402
from triptych.kernels.quant.ref import fake_quant_fp8  # noqa: E402
from triptych.kernels.registry import FIXED, FOLDER, table  # noqa: E402
from triptych.kernels.select_rows import triton as select  # noqa: E402

VISIBLE = [700, 130, 3, 0]
ENTRY = RowFormat("entry", 512, 64)


def operations() -> None:
    """What the registry has, on the inputs of its tests, and what deterministic mode has of its own."""
    for row in table("auto", device="cuda"):
        folder = FOLDER[row.op]
        for file in ("triton", "fixed") if row.op in FIXED.get(folder, ()) else ("triton",):
            if row.backend == "triton":
                given = inputs.on_device(
                    inputs.MAKERS[row.op](17, torch.Generator().manual_seed(1)), torch.device("cuda")
                )
                getattr(importlib.import_module(f"triptych.kernels.{folder}.{file}"), row.op)(*given)


def packed() -> None:
    """Attention over packed caches, of decode rows and of a chunk's."""
    for kind in ("csa", "hca", "swa"):
        case = cases.decode_case(kind, VISIBLE, 64, ENTRY, 512, "cuda")
        rows.attend_rows(*case)
        rows.attend_rows(*case, tiling=rows.Tiling(16, 32, 96, 4, 3))
        rows.attend_rows_deterministic(*case)
        step = cases.step_case(kind, 20, 700, 64, ENTRY, 512, "cuda")
        attend.attend(*step)
        attend.attend_deterministic(*step)
        raw = cases.heads_case(kind, 150, 700, 64, ENTRY, 512, "cuda")
        rows.attend_heads(*raw)
        rows.attend_heads_deterministic(*raw)
        if rows.is_hopper(torch.device("cuda")):
            importlib.import_module("triptych.kernels.attend_rows.chunk").attend_chunk(*raw)


def selection() -> None:
    """Selection over packed keys, of decode rows and of a chunk's."""
    for kind in ("fp8", "mxfp4"):
        queries, keys = cases.index_case(kind, [2048, 600, 3, 0], 64, 128, "cuda")
        select.select_rows(queries, keys, 512)
        many = torch.arange(140, device="cuda")
        turns = torch.randn(140, 32, device="cuda")
        chunk = queries._replace(
            heads=torch.randn(140, 64 * 128, device="cuda").bfloat16(), angles=(turns.cos(), turns.sin()),
            weights=torch.randn(140, 64, device="cuda"),
        )  # fmt: skip
        select.select_rows(chunk, keys._replace(seq=many // 100, visible=many % 100 + 560, most=2048), 512)
        q = torch.randn(9, 64, 128, device="cuda", dtype=torch.bfloat16)
        seq, visible = torch.zeros(9, dtype=torch.int64, device="cuda"), torch.arange(600, 609, device="cuda")
        some = keys._replace(seq=seq, visible=visible, most=608)
        index.select_entries(q, torch.randn(9, 64, device="cuda"), some, 512)


def linears_of_released_weights() -> None:
    """Every size class of rows, Hopper's kernels and the portable ones."""
    weight, front = released.fp8(256, 256), FrontMatrix(released.fp8(256, 256), torch.randn(392, 256).cuda().bfloat16())
    grouped = released.fp8(4, 128, 128)
    for count in (3, 17, 70, 300):
        x = torch.randn(count, 256, device="cuda").bfloat16()
        groups = torch.randn(count, 4, 128, device="cuda").bfloat16()
        quantize(x)
        for kind in (linear, linears.linear):
            kind(x, weight)
        for kind in (front_linear, linears.front_linear):
            kind(x, front)
        for kind in (grouped_linear, linears.grouped_linear):
            kind(groups, grouped)


def mixtures_of_released_weights() -> None:
    """Few rows and many, learned and hashed routes."""
    for hashed in (False, True):
        router, moe, shared = released._layer("tiny", hashed)
        for count in (3, 40):
            x = torch.randn(count, 256, device="cuda").bfloat16()
            tokens = torch.randint(0, 50, (count,), device="cuda")
            moe_rows(x, tokens, router, released.tiled(moe), shared)
            ids, weights = route(x, tokens, router)
            mixtures.experts(x, ids, weights, moe)
            shared_expert(x, *shared, moe.limit)
    moe = moe._replace(w13=released.mxfp4(24, 512, 256), w2=released.mxfp4(24, 256, 256))
    x = torch.randn(200, 256, device="cuda").bfloat16()
    ids, weights = route(x, torch.randint(0, 50, (200,), device="cuda"), router)
    experts(x, ids, weights, released.tiled(moe), fake_quant_fp8)


PARTS: dict[str, Callable[[], None]] = {
    "operations": operations,
    "packed": packed,
    "selection": selection,
    "linears": linears_of_released_weights,
    "mixtures": mixtures_of_released_weights,
}


def main(names: list[str]) -> None:
    """Run the parts."""
    for name in names or PARTS:
        began = time.perf_counter()
        PARTS[name]()
        torch.cuda.synchronize()
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
