"""Kernels of vLLM 0.26 beside ours: DeepGEMM's index scores, vLLM's top-k and its Marlin experts.

    pip install --no-deps --target DIR vllm==0.26.0
    python -m benchmarks.gpu.table --peers DIR

They are called straight from the libraries in DIR, whose Python is not imported, but for DeepGEMM's few modules. That
compiles a kernel with nvcc when it is first used, ten seconds each, and keeps it in DG_JIT_CACHE_DIR.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.timing import Figures, timed
from triptych.kernels.gpu import multiprocessors
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import PackedRows
from triptych.kernels.quant.matrices import BothRows, Fp8Matrix, Fp8Rows, FrontMatrix, quantize_rows
from triptych.kernels.select_rows import triton as select
from triptych.kernels.select_rows.queries import rounded_queries
from triptych.kernels.select_rows.ref import IndexQueries

VERSION = "0.26.0"
_LIBRARIES = ("_C_stable_libtorch.abi3.so", "_moe_C_stable_libtorch.abi3.so")
_DEEP_GEMM = "third_party"
_PAGE = 64
"""Keys of a page, as DeepGEMM wants it on compute capability 9.0."""
_FEW = 32
"""Up to so many rows vLLM shares each among programs."""
_E2M1 = 2 | 1 << 8 | 1 << 16 | 1 << 49
"""How vLLM names a number format to its kernels: bits of exponent and of mantissa, a sign, finite only."""


class Peers(NamedTuple):
    """What was loaded: DeepGEMM's module, and vLLM's operations for everything and for experts."""

    deep_gemm: Any
    ops: Any
    moe: Any


def load(folder: Path) -> Peers:
    """FileNotFoundError naming what `folder` lacks; OSError or ImportError where a library does not fit this torch."""
    inside = folder.absolute() / "vllm"
    for path in (*(inside / name for name in _LIBRARIES), inside / _DEEP_GEMM / "deep_gemm"):
        if not path.exists():
            made = f"pip install --no-deps --target {folder} vllm=={VERSION}"
            raise FileNotFoundError(f"{path} is not there: {made} puts it there")
    for name in _LIBRARIES:
        torch.ops.load_library(str(inside / name))
    sys.path.insert(0, str(inside / _DEEP_GEMM))
    return Peers(importlib.import_module("deep_gemm"), torch.ops._C, torch.ops._moe_C)


# ---- index scores and top-k


def selection(peers: Peers, sets: Sequence[tuple[IndexQueries, PagedEntries]], topk: int) -> Figures:
    """The same queries and FP8 keys by DeepGEMM and vLLM's top-k; keys lie in pages of 64 for it.

    `deep_gemm_us`: from rounded queries. `by_deep_gemm_us`: with our launch before it that rotates and rounds them;
    the powers of two that they lack are in the weights beforehand, which a launch made for it would do in passing.
    `agrees`: how much of what it chooses we choose, too.
    """
    calls = [_selection(peers, queries, keys, topk) for queries, keys in sets]
    queries, keys = sets[0]
    ours = select.select_rows(queries, keys, topk)
    return {
        "deep_gemm_us": round(timed([one.whole for one in calls]), 2),
        "deep_gemm_scores_us": round(timed([one.scores for one in calls]), 2),
        "by_deep_gemm_us": round(timed([one.from_raw for one in calls]), 2),
        "agrees": round(in_common(ours, calls[0].whole(), int(keys.visible.max())), 4),
    }


class _Calls(NamedTuple):
    scores: Callable[[], Tensor]
    whole: Callable[[], Tensor]
    from_raw: Callable[[], Tensor]


def _selection(peers: Peers, queries: IndexQueries, keys: PagedEntries, topk: int) -> _Calls:
    rows, most = len(queries.heads), keys.most
    assert most is not None
    device = queries.heads.device
    rounded, power = rounded_queries(queries, 1)
    weights = torch.ldexp(queries.weights, power)
    view, table = in_pages(keys, _PAGE)
    lengths = keys.visible.to(torch.int32).view(rows, 1)
    plan = peers.deep_gemm.get_paged_mqa_logits_metadata(lengths, _PAGE, multiprocessors(device))
    space = torch.zeros(1 << 20, dtype=torch.uint8, device=device)
    chosen = torch.empty(rows, topk, dtype=torch.int32, device=device)
    narrow = peers.ops.cooperative_topk if rows <= _FEW else peers.ops.persistent_topk

    def scores(q: Tensor = rounded) -> Tensor:
        q = q.view(torch.float8_e4m3fn).view(rows, 1, queries.count, queries.dim)
        found: Tensor = peers.deep_gemm.fp8_fp4_paged_mqa_logits(
            (q, None), view, weights, lengths, table, plan, most, clean_logits=False
        )
        return found

    def whole(q: Tensor = rounded) -> Tensor:
        found = scores(q)
        narrow(found, lengths, chosen, space, topk, most if rows <= _FEW else found.shape[1])
        return chosen

    return _Calls(scores, whole, lambda: whole(rounded_queries(queries, 1)[0]))


def in_pages(keys: PagedEntries, size: int) -> tuple[Tensor, Tensor]:
    """The same keys in pages of `size`: uint8 [pages, size, 1, bytes], values before scales, and page tables int32.

    Pages lie in random order. `size` is a multiple of what `keys` has, and so is what a sequence has of its pages.
    """
    pool, table = keys.pool, keys.page_table
    assert isinstance(pool, PackedRows)
    joined = size // pool.shape[1]
    parts = table.view(-1, joined).long()
    pages = len(parts)
    place = torch.randperm(pages, device=table.device)
    value, scale = pool.format.value_bytes, pool.format.scale_bytes
    memory = torch.empty(pages, size * (value + scale), dtype=torch.uint8, device=table.device)
    memory[place, : size * value] = pool.values[parts].view(pages, size * value)
    memory[place, size * value :] = pool.scales[parts].view(pages, size * scale)
    return memory.view(pages, size, 1, value + scale), place.to(torch.int32).view(len(table), -1)


def in_common(ours: Tensor, theirs: Tensor, most: int) -> float:
    """The share of ids [B, k] below `most`, -1 behind, that are among both, of the larger number of them."""
    found = []
    for ids in (ours, theirs):
        marks = torch.zeros(len(ids), most + 1, dtype=torch.bool, device=ids.device)
        found.append(marks.scatter_(1, torch.where(ids < 0, most, ids).long(), True)[:, :most])
    return float((found[0] & found[1]).sum() / max(1, *(int(marks.sum()) for marks in found)))


# ---- products


Parts = tuple[Tensor, ...]
"""Columns of a result [B, N], first ones first."""


def product(peers: Peers, x: Fp8Rows | BothRows | Tensor, weight: Fp8Matrix | FrontMatrix) -> Callable[[], Parts]:
    """A call of DeepGEMM for the product of rows and a matrix as benchmarks.gpu.linears has them.

    Scales of rows lie as it reads them beforehand. Columns of bfloat16 weights are cuBLAS's; rows [B, G, K] of a
    grouped product are rounded beforehand, since it takes no others.
    """
    if isinstance(weight, FrontMatrix):
        assert isinstance(x, BothRows)
        latent, plain, rest = product(peers, x.rounded, weight.latent), x.plain, weight.rest.T
        return lambda: (*latent(), torch.mm(plain, rest, out_dtype=torch.float32))
    if isinstance(x, Tensor):
        return _grouped(peers, x, weight)
    assert isinstance(x, Fp8Rows)
    rows = (x.values, peers.deep_gemm.get_mn_major_tma_aligned_tensor(x.scales.contiguous()))
    out = torch.empty(len(x.values), weight.shape[0], dtype=torch.bfloat16, device=x.values.device)

    def call() -> Parts:
        peers.deep_gemm.fp8_gemm_nt(rows, (weight.values, weight.scales), out, disable_ue8m0_cast=True)
        return (out,)

    return call


def _grouped(peers: Peers, x: Tensor, weight: Fp8Matrix) -> Callable[[], Parts]:
    rows, groups, depth = x.shape
    rounded = quantize_rows(x.transpose(0, 1).reshape(-1, depth))
    values = rounded.values.view(groups, rows, depth).transpose(0, 1)
    scales = torch.zeros(groups, depth // 128, -(-rows // 4) * 4, device=x.device)[:, :, :rows]
    scales.copy_(rounded.scales.view(groups, rows, -1).transpose(1, 2))
    out = torch.empty(rows, groups, weight.shape[1], dtype=torch.bfloat16, device=x.device)

    def call() -> Parts:
        given = (values, scales.permute(2, 0, 1)), (weight.values, weight.scales)
        peers.deep_gemm.fp8_einsum("bhr,hdr->bhd", *given, out, recipe=(1, 128, 128))
        return (out.flatten(1),)

    return call


# ---- experts


class Marlin:
    """The routed experts of one layer in Marlin's order, of random weights: their values do not matter."""

    def __init__(self, peers: Peers, dim: int, inner: int, experts: int) -> None:
        self._peers, self._experts, self._dim, self._inner = peers, experts, dim, inner
        self._up, self._down = _words(experts, dim, 2 * inner), _words(experts, inner, dim)
        self._up_scales, self._down_scales = _exponents(experts, dim, 2 * inner), _exponents(experts, inner, dim)
        self._locks = torch.zeros(4 * multiprocessors(self._up.device), dtype=torch.int32, device="cuda")

    def figures(self, inputs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Figures:
        """`marlin_us` of rows, the ids of their experts and their weights, input after input."""
        calls = [partial(self, *one) for one in inputs]
        return {"marlin_us": round(timed(calls, launches=len(calls)), 2)}

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum [B, d] over the experts of rows x [B, d] bfloat16; ids [B, k] int32, weights float32."""
        rows, top = ids.shape
        block = block_of(rows * top, self._experts)
        order, owners, padded = _plan(ids.numel(), self._experts, block)
        self._peers.moe.moe_align_block_size(ids, self._experts, block, order, owners, padded, None)
        plan = (order, owners, padded, weights, block)
        both = x.new_empty(rows * top, 2 * self._inner)
        self._product(x, both, (self._up, self._up_scales), plan, top)
        hidden = x.new_empty(rows * top, self._inner)
        self._peers.ops.silu_and_mul_with_clamp(hidden, both, 10.0, 1.0, 0.0)
        out = x.new_empty(rows * top, self._dim)
        self._product(hidden, out, (self._down, self._down_scales), plan, 1)
        return out.view(rows, top, self._dim).sum(1)

    def _product(self, x: Tensor, out: Tensor, matrix: tuple[Tensor, Tensor], plan: tuple[Any, ...], top: int) -> None:
        """x [M, K] by the experts of its rows, `top` for each; where that is one, their weights multiply it."""
        values, scales = matrix
        order, owners, padded, weights, block = plan
        whole_rows, atomic, wide, float_zeros, chosen = True, False, True, False, -1
        self._peers.moe.moe_wna16_marlin_gemm(
            *(x, out, values, None, scales, None, None, None, None, None, self._locks),
            *(order, owners, padded, weights, block, top, top == 1, _E2M1, len(x), out.shape[1], x.shape[1]),
            *(whole_rows, atomic, wide, float_zeros, chosen, chosen, chosen),
        )


def block_of(pairs: int, experts: int) -> int:
    """Rows of a block of one expert, as vLLM chooses it: the least that the mean expert leaves a tenth of empty."""
    sizes = (8, 16, 32, 48, 64)
    return next((size for size in sizes if pairs / experts / size < 0.9), sizes[-1])


def _plan(pairs: int, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for a plan: rows in the order of their experts, the expert of each block of them, how many there are."""
    most = min(pairs * block, pairs + experts * (block - 1))
    sizes = (most, -(-most // block), 1)
    order, owners, padded = (torch.empty(size, dtype=torch.int32, device="cuda") for size in sizes)
    return order, owners, padded


def _words(experts: int, k: int, n: int) -> Tensor:
    """Sixteen rows of k times n numbers of four bits, in int32 of any value."""
    return torch.randint(-(1 << 31), 1 << 31, (experts, k // 16, 2 * n), dtype=torch.int32, device="cuda")


def _exponents(experts: int, k: int, n: int) -> Tensor:
    """Scales of groups of 32, which bring values to where ours are."""
    made = torch.randint(116, 121, (experts, k // 32, n), dtype=torch.uint8, device="cuda")
    return made.view(torch.float8_e8m0fnu)
