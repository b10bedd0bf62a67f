"""Every kernel once at small sizes, for compute-sanitizer to look at: under_sanitizer.py, `make test-gpu SANITIZE=1`.

Nothing is compared here, that is what tests do; a kernel that reads or writes beyond its tensors, or whose threads race
in shared memory, is named by the tool. Arguments are parts (`--list` names them); without any, kernels that no part
launched are an error. Tensors must be allocations of their own, or the tool cannot see their ends:
PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels")]
import frames_cases  # noqa: E402
import packed_cases as cases  # noqa: E402
import test_gpu_chunks as chunks  # noqa: E402
import test_gpu_released as released  # noqa: E402
from gpu_launches import Launches  # noqa: E402

from triptych.kernels import inputs  # noqa: E402
from triptych.kernels.attend import triton as attend  # noqa: E402
from triptych.kernels.attend_rows import triton as rows  # noqa: E402
from triptych.kernels.compress.triton import compress  # noqa: E402
from triptych.kernels.frames import engines  # noqa: E402
from triptych.kernels.frames import triton as frames  # noqa: E402
from triptych.kernels.index import triton as index  # noqa: E402
from triptych.kernels.linear import fixed as fixed_linears  # noqa: E402
from triptych.kernels.linear import portable as linears  # noqa: E402
from triptych.kernels.linear.triton import front_linear, grouped_linear, linear, quantize  # noqa: E402
from triptych.kernels.mhc import triton as mhc  # noqa: E402
from triptych.kernels.mhc.ref import MhcHead, MhcSite, Residual  # noqa: E402
from triptych.kernels.moe import fixed as fixed_mixtures  # noqa: E402
from triptych.kernels.moe import portable as mixtures  # noqa: E402
from triptych.kernels.moe.triton import experts, moe_rows, route, shared_expert  # noqa: E402
from triptych.kernels.norm.triton import query_rows  # noqa: E402
from triptych.kernels.quant.formats import RowFormat  # noqa: E402
from triptych.kernels.quant.matrices import FrontMatrix, Unnormed  # noqa: E402
from triptych.kernels.quant.ref import fake_quant_fp8  # noqa: E402
from triptych.kernels.registry import FIXED, FOLDER, table  # noqa: E402
from triptych.kernels.select_rows import highest, narrow  # noqa: E402
from triptych.kernels.select_rows import triton as select  # noqa: E402

VISIBLE = [700, 130, 3, 0]
ENTRY = RowFormat("entry", 512, 64)
KINDS = ("csa", "hca", "swa")


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
    turns = torch.randn(17, 32, device="cuda")
    query_rows(_normal(17, 8 * 128), 8, 128, (turns.cos(), turns.sin()), 1e-6)
    compress(*chunks.long_groups(None))


def decode_attention() -> None:
    """Rows of a decode step over packed caches: in one launch and two, keys in parts and whole, as on any GPU too."""
    for kind in KINDS:
        case = cases.decode_case(kind, VISIBLE, 64, ENTRY, 512, "cuda")
        rows.attend_rows(*case)
        rows.attend_rows(*case, tiling=rows.Tiling(64, 64, 64, 0, 0))
        if kind != "swa":
            rows.attend_rows(*case, tiling=rows.Tiling(16, 32, 96, 4, 3))
    for long in ([2100], [2100, 3]):  # which tell averages
        rows.attend_rows(*cases.decode_case("hca", long, 64, ENTRY, 512, "cuda"))
    rows.attend_rows(*cases.decode_case("swa", VISIBLE * 35, 64, ENTRY, 512, "cuda"))
    rows.attend_rows_deterministic(*cases.decode_case("csa", VISIBLE, 64, ENTRY, 512, "cuda"))


def chunk_attention() -> None:
    """Rows of a chunk over packed caches, few of them and many."""
    for kind in KINDS:
        step = cases.step_case(kind, 20, 700, 64, ENTRY, 512, "cuda")
        attend.attend(*step)
        rows.attend_heads(*cases.heads_case(kind, 150, 700, 64, ENTRY, 512, "cuda"))
    few = cases.heads_case("csa", 20, 700, 64, ENTRY, 512, "cuda")
    rows.attend_heads(*few)
    rows.attend_heads_deterministic(*few)
    attend.attend_deterministic(*cases.step_case("hca", 20, 700, 64, ENTRY, 512, "cuda"))


def selection() -> None:
    """Selection over packed keys: of decode rows in one launch, of a chunk's, and of rows that are not rounded."""
    for kind in ("fp8", "mxfp4"):
        queries, keys = cases.index_case(kind, [2048, 600, 3, 0], 64, 128, "cuda")
        select.select_rows(queries, keys, 512)
        queries, keys = cases.index_case(kind, [2048, 600], 64, 128, "cuda")
        select.ordered_scores(queries._replace(rounds=False), keys)
        select.select_rows(*_chunk_of(queries, keys, 140), 512)
    select.select_rows(*cases.index_case("fp8", [17000, 2049], 64, 128, "cuda"), 512)
    q = torch.randn(9, 64, 128, device="cuda", dtype=torch.bfloat16)
    seq, visible = torch.zeros(9, dtype=torch.int64, device="cuda"), torch.arange(600, 609, device="cuda")
    index.select_entries(q, torch.randn(9, 64, device="cuda"), keys._replace(seq=seq, visible=visible, most=608), 512)


def _chunk_of(queries: Any, keys: Any, count: int) -> tuple[Any, Any]:
    """`count` rows of two sequences that see 560 keys and more."""
    many, turns = torch.arange(count, device="cuda"), torch.randn(count, 32, device="cuda")
    chunk = queries._replace(
        heads=torch.randn(count, 64 * 128, device="cuda").bfloat16(),
        angles=(turns.cos(), turns.sin()),
        weights=torch.randn(count, 64, device="cuda"),
    )
    return chunk, keys._replace(seq=many // 100, visible=many % 100 + 560, most=2048)


def highest_scores() -> None:
    """The k highest at one to three levels, among equal scores too, and by the portable kernel."""
    for total, k in ((2048, 512), (8192, 1024), (262144, 512)):
        scores = torch.randint(-(1 << 30), 1 << 30, (3, total), dtype=torch.int32, device="cuda")
        scores[1] = 7
        tops = scores.view(3, -1, 8).amax(2).contiguous()
        visible = torch.tensor([total, total - 5, 700], device="cuda")
        narrow.highest(scores, tops, visible, k)
        _portably(scores, tops, visible, k)


def _portably(*given: Any) -> None:
    """highest.highest as on another GPU than Hopper."""
    usual = highest.is_hopper
    try:
        highest.is_hopper = lambda device: False  # type: ignore[assignment]
        highest.highest(*given)
    finally:
        highest.is_hopper = usual


def products() -> None:
    """Every size class of rows, Hopper's kernels and the portable ones."""
    weight, front = released.fp8(256, 1024), FrontMatrix(released.fp8(256, 256), _normal(392, 256))
    for count in (3, 17, 40, 70, 300):
        x, narrow_x = _normal(count, 1024), _normal(count, 256)
        quantize(x)
        for kind in (linear, linears.linear):
            kind(x, weight)
        for kind in (front_linear, linears.front_linear):
            kind(narrow_x, front)
    for kind in (fixed_linears.linear, linear):
        kind(_normal(70, 256), released.fp8(128, 256))
    linear(Unnormed(_normal(1, 1024).float(), _normal(1024).float(), 1e-6), weight)
    linear(_normal(40, 256), released.fp8(17280, 256))  # enough outputs for all rows to be kept at hand
    for count in (40, 100):  # rows long enough for copies to run ahead, also of a front's columns in bf16
        linear(_normal(count, 4096), released.fp8(256, 4096))
        front_linear(_normal(count, 4096), FrontMatrix(released.fp8(128, 4096), _normal(72, 4096)))


def grouped_products() -> None:
    """The same of matrices of groups, with results as they come and rounded."""
    for size in ((4, 64, 128), (2, 128, 1024)):
        weight = released.fp8(*size)
        for count in (3, 9, 20, 40, 100, 300, 1100):
            x = _normal(count, size[0], size[2])
            grouped_linear(x, weight)
            grouped_linear(x, weight, rounds=True)
            linears.grouped_linear(x, weight)


def sites() -> None:
    """Hyper-connections of few rows and many, in bfloat16 and float32, first, between and last."""
    dim = 512
    site, norm = _site(rounds=True)
    head = MhcHead(*(torch.randn(size, device="cuda") for size in ((4, 4 * dim), 4, 1)), 1e-6, 1e-6)
    for dtype, counts in ((torch.bfloat16, (2, 17, 300, 600)), (torch.float32, (17,))):
        embed = torch.randn(99, dim, device="cuda").to(dtype)
        for count in counts:
            mhc.mhc_first(torch.randint(0, 99, (count,), device="cuda"), embed, site, norm)
            y, before = torch.randn(count, dim, device="cuda").to(dtype), _residual(count, dim, dtype)
            mhc.mhc_rows(y, before, site, norm)
            mhc.mhc_last(y, before, head, norm)


def _residual(count: int, dim: int, dtype: torch.dtype) -> Residual:
    streams = torch.randn(count, 4, dim, device="cuda").to(dtype)
    return Residual(streams, torch.rand(count, 4, device="cuda"), torch.rand(count, 4, 4, device="cuda") / 4)


def few_mixtures() -> None:
    """Experts of up to some hundred rows; learned and hashed routes."""
    for hashed in (False, True):
        router, moe, shared = released._layer("tiny", hashed)
        fast, dim = released.tiled(moe), released.DIMS["tiny"][0]
        for count in (3,) if hashed else (1, 3, 40, 200):
            tokens = torch.randint(0, 50, (count,), device="cuda")
            moe_rows(_normal(count, dim), tokens, router, fast, shared)


def alone() -> None:
    """A single row's sites, each in one launch: the first, one between, and one with the router behind it."""
    site, norm = _site(rounds=True)
    token, embed = torch.tensor([7], device="cuda"), _normal(99, 512)
    mhc.mhc_first(token, embed, site, norm)
    mhc.mhc_rows(_normal(1, 512), _residual(1, 512, torch.bfloat16), site, norm)
    for hashed in (False, True):
        router, moe, shared = released.layer_of(512, 128, hashed=hashed)
        site, norm = _site(leaves=True)
        halfway = mhc.mhc_rows(_normal(1, 512), _residual(1, 512, torch.bfloat16), site, norm)[0]
        moe_rows(halfway, token, router, released.tiled(moe), shared)


def _site(**options: bool) -> tuple[MhcSite, torch.Tensor]:
    """A site of 512 dims, and its norm's weights."""
    given = (torch.randn(size, device="cuda") for size in ((24, 4 * 512), 24, 3))
    return MhcSite(*given, 20, 1e-6, 1e-6, **options), torch.randn(512, device="cuda")


def many_mixtures() -> None:
    """Experts of many rows, Hopper's kernels and the portable ones."""
    router, moe, shared = released._layer("tiny", hashed=False)
    moe = moe._replace(w13=released.mxfp4(24, 512, 256), w2=released.mxfp4(24, 256, 256))
    shared = released.fp8(512, 256), released.fp8(256, 256)
    fast = released.tiled(moe)
    for count in (40, 600):
        x, tokens = _normal(count, 256), torch.randint(0, 50, (count,), device="cuda")
        ids, weights = route(x, tokens, router)
        mixtures.experts(x, ids, weights, moe)
        experts(x, ids, weights, fast, fake_quant_fp8)
        shared_expert(x, *shared, moe.limit)
        moe_rows(x, tokens, router, fast, shared)
        fixed_mixtures.moe_rows(x, tokens, router, moe, shared)


def tiers() -> None:
    """Frames that come up from the host, of every size of words."""
    for size in frames_cases.SIZES:
        for way in (engines, frames):
            frames_cases.comes_up(way.bring_up, size, 4, "cuda")


def steps() -> None:
    """Prompts and decode steps of a small model in the released formats, as an engine runs them."""
    decode = importlib.import_module("test_gpu_decode")
    for kind in ("fp8", "mxfp4"):
        runner = decode.prompted(kind)
        for step in range(2):
            runner.model.decode(decode.batch(step, 2, decode.CUDA), runner.pools.layers)


def vendor() -> None:
    """What surrounds FlashMLA, where that is installed."""
    if importlib.util.find_spec("flash_mla") is None:
        return
    flash = importlib.import_module("triptych.kernels.attend_rows.vendor")
    for kind in KINDS:
        flash.attend_rows_forced(*cases.decode_case(kind, VISIBLE, 64, ENTRY, 512, "cuda"))
        flash.attend_heads_forced(*cases.heads_case(kind, 300, 1100, 64, ENTRY, 512, "cuda"))


def _normal(*size: int) -> torch.Tensor:
    return torch.randn(*size, device="cuda").bfloat16()


PARTS: dict[str, Callable[[], None]] = {
    "operations": operations,
    "decode": decode_attention,
    "chunk": chunk_attention,
    "selection": selection,
    "highest": highest_scores,
    "products": products,
    "grouped": grouped_products,
    "sites": sites,
    "few": few_mixtures,
    "alone": alone,
    "many": many_mixtures,
    "tiers": tiers,
    "steps": steps,
    "vendor": vendor,
}


def main(names: list[str]) -> int:
    """Run the parts; 1 if all were asked for and a kernel was in none."""
    if names == ["--list"]:
        print(*PARTS)
        return 0
    launches = Launches()
    for name in names or PARTS:
        began = time.perf_counter()
        PARTS[name]()
        torch.cuda.synchronize()
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    if names:
        print("launched", *sorted(launches.seen))
        return 0
    around = (
        {"attend_rows.vendor_chunks", "attend_rows.vendor_rows"} if not importlib.util.find_spec("flash_mla") else {}
    )
    missing = [name for name in launches.missing() if name.rpartition(".")[0] not in around]
    for name in missing:
        print(f"{name} was not launched: give it a part")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
