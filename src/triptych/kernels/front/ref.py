"""The attention front end of decode rows, between its two products, in plain PyTorch.

One row a sequence. From the projections of a row come the low-rank query, the weights of the indexer's heads, a window
row, compressor rows, and for a row that completes a group the group's entry and index key. All but the first two go
straight into the caches. Composed of prefill's operations; source: reference sections 2.3, 2.5, 2.9 and 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triptych.config import PAGE
from triptych.kernels.compress.ref import ABSENT, Compressor, CompressPlan, compress
from triptych.kernels.norm.ref import latent_rows
from triptych.kernels.quant import ref as quant
from triptych.kernels.quant.formats import Rows, write_rows
from triptych.kernels.quant.matrices import Fp8Rows, quantize_rows

Angles = tuple[Tensor, Tensor]
"""cos and sin [R, rope/2], float32."""


class FrontWeights(NamedTuple):
    """What a layer's front end multiplies with. Columns are those of the product `front` [R, total]:

        [ query q_lora | window c | compressor from compress_at: C, Z | indexer's from index_at: C, Z | heads ]

    q_norm [q_lora], kv_norm [c]. `native`: round where the released model does. scale: of the head weights [count].
    `rounds`, native only: the query's product reads rounded rows, as which the query may come; or as a single row
    that its product norms.
    """

    q_norm: Tensor
    kv_norm: Tensor
    compressor: Compressor | None
    index_compressor: Compressor | None
    compress_at: int
    index_at: int
    heads: tuple[int, int]
    scale: float
    eps: float
    native: bool
    rounds: bool = False


class FrontCaches(NamedTuple):
    """Where a layer's rows go. window: flat rows, `window_stride` from slot to slot, `ring` of them used by position;
    state and index_state [N, width] float32: flat rows, `state_stride` from slot to slot."""

    window: Rows
    window_stride: int
    ring: int
    entries: Rows | None
    index_keys: Rows | None
    state: Tensor | None
    index_state: Tensor | None
    state_stride: int


class DecodeRows(NamedTuple):
    """Where the rows stand: positions, slots [R] int64; page_table [R, P] of any integer type."""

    positions: Tensor
    slots: Tensor
    page_table: Tensor


def step_rows(positions: Tensor, main: Tensor, compress: Tensor, ratios: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What all layers of a step ask about its rows, from positions [R] int64 and the two rotations [rope/2] float32.

    Returns cos and sin [2 + len(ratios), 2, R, rope/2]: of the main rotation at the positions, of the compress rotation
    there and at the first token of each row's group of every ratio; and visible [len(ratios), R] int64 entries.
    """
    turns = [positions.float().unsqueeze(1) * main, positions.float().unsqueeze(1) * compress]
    turns += [(positions - positions % ratio).float().unsqueeze(1) * compress for ratio in ratios]
    angles = torch.stack([torch.stack([turn.cos(), turn.sin()]) for turn in turns])
    return angles, torch.stack([(positions + 1) // ratio for ratio in ratios])


def front_rows(
    front: Tensor,
    weights: FrontWeights,
    caches: FrontCaches,
    rows: DecodeRows,
    angles: tuple[Angles, Angles | None],
) -> tuple[Tensor | Fp8Rows, Tensor]:
    """front [R, total] -> the low-rank query [R, q_lora] and head weights [R, Hi] float32 (scaled); writes the caches.

    angles: at the rows' positions, and at the first token of the group that each row is in. In native numerics the
    query is bf16.
    """
    front = front.float()
    q_lora, dim = len(weights.q_norm), len(weights.kv_norm)
    narrow = _bf16(front, weights.native)
    qr, kv = latent_rows(narrow[:, : q_lora + dim], q_lora, (weights.q_norm, weights.kv_norm), angles[0], weights.eps)
    rope = 2 * angles[0][0].shape[1]
    flat = rows.slots * caches.window_stride + rows.positions % caches.ring
    write_rows(caches.window, flat, _latent(kv, rope, weights.native))
    if weights.compressor is not None:
        assert caches.entries is not None and caches.state is not None and angles[1] is not None
        plan, done = _plan(rows, weights.compressor, caches.state_stride)
        late = (angles[1][0][done], angles[1][1][done])
        new = compress(front, weights.compress_at, caches.state, plan, weights.compressor, late)
        if len(new):
            write_rows(caches.entries, (plan.page, plan.offset), _latent(new, rope, weights.native))
        if weights.index_compressor is not None:
            assert caches.index_keys is not None and caches.index_state is not None
            keys = compress(front, weights.index_at, caches.index_state, plan, weights.index_compressor, late)
            if len(keys):
                write_rows(caches.index_keys, (plan.page, plan.offset), _key(keys, weights.native))
    heads = narrow[:, slice(*weights.heads)] * weights.scale
    qr = qr.to(torch.bfloat16) if weights.native else qr
    return quantize_rows(qr) if weights.rounds else qr, heads


def _plan(rows: DecodeRows, compressor: Compressor, stride: int) -> tuple[CompressPlan, Tensor]:
    """What prefill would be told for these rows, and which of them complete a group."""
    ratio = len(compressor.ape)
    reach = 2 * ratio if compressor.overlap else ratio
    done = ((rows.positions + 1) % ratio == 0).nonzero().flatten()
    every = torch.arange(len(rows.positions), device=done.device)
    position = rows.positions[done].unsqueeze(1) + torch.arange(1 - reach, 1, device=done.device)
    kept = -1 - (rows.slots[done].unsqueeze(1) * stride + position % reach)
    src = torch.where(position >= 0, kept, ABSENT)
    src[:, -1] = done
    group = rows.positions[done] // ratio
    page = rows.page_table[done, group * ratio // PAGE].long()
    into = rows.slots * stride + rows.positions % reach
    return CompressPlan(src, page, group % (PAGE // ratio), rows.positions % ratio, every, into), done


def _bf16(x: Tensor, native: bool) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype) if native else x


def _latent(x: Tensor, rope: int, native: bool) -> Tensor:
    """A window row or entry as the released model rounds it."""
    if not native:
        return x
    x = _bf16(x, native)
    return torch.cat([quant.fake_quant_fp8(x[:, :-rope], 64), x[:, -rope:]], dim=1)


def _key(x: Tensor, native: bool) -> Tensor:
    """An index key as the released model rounds it."""
    return quant.fake_quant_fp4(_bf16(quant.hadamard(_bf16(x, native)), native)) if native else x
