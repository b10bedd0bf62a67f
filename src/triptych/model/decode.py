"""One decode step: a row of each of B sequences through all layers, in fixed shapes and without waiting for the device.

It computes what `Transformer.forward` computes for such rows, of coarser operations: each is a few launches, writes
the caches itself and works out from position, slot and page table where. So a CUDA graph can hold the whole step.
Streams and activations are bf16 in native numerics, float32 in exact ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.config import CSA_LAYER, CSA_RATIO, HCA_RATIO, SWA_LAYER, ModelShape
from triptych.kernels.attend_rows.ref import Queries, RingRows
from triptych.kernels.front.ref import DecodeRows, FrontCaches, FrontWeights
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.mhc.ref import Residual, Uncollapsed
from triptych.kernels.quant.matrices import BothRows, Fp8Matrix, Fp8Rows, FrontMatrix, Matrix, Mxfp4Matrix, Unnormed
from triptych.kernels.registry import KernelSet
from triptych.kernels.select_rows.ref import IndexQueries
from triptych.model.batch import DecodeBatch, LayerCache
from triptych.model.moe import moe
from triptych.model.numerics import NumericsRules
from triptych.model.rope import Angles, RopeTables
from triptych.model.weights import AttentionWeights, LayerWeights, ModelWeights


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of a step share: rows, rotations at them and at the first token of their groups, visibility."""

    batch: DecodeBatch
    rows: DecodeRows
    main: Angles
    compress: Angles
    first: dict[int, Angles]
    visible: dict[int, Tensor]
    each: Tensor


class Decoder:
    """Runs decode steps of one model. Holds no request state; the caches have all of it."""

    def __init__(self, weights: ModelWeights, kernels: KernelSet, numerics: NumericsRules, rope: RopeTables) -> None:
        self._w, self._k, self._n, self._rope = weights, kernels, numerics, rope
        self._shape: ModelShape = weights.shape
        # streams are copies of rows of this table, so its dtype is theirs
        self.embed = weights.embed.to(numerics.dtype)
        self._fronts = [_front_weights(layer.attention, weights.shape, numerics.native) for layer in weights.layers]
        native = numerics.native
        self._sites = [
            (
                layer.attn_site._replace(rounds=native and isinstance(layer.attention.front, FrontMatrix)),
                layer.ffn_site._replace(leaves=native and isinstance(layer.moe.experts.w13, Mxfp4Matrix)),
            )
            for layer in weights.layers
        ]

    def refresh(self) -> None:
        """Bring what was derived from weights up to date, in place, after the weights themselves were overwritten."""
        if self.embed is not self._w.embed:
            self.embed.copy_(self._w.embed)

    @torch.inference_mode()
    def __call__(self, batch: DecodeBatch, caches: Sequence[LayerCache], out: Tensor | None = None) -> Tensor:
        """Logits [B, V] float32 of every row, in `out` if it is given; writes the caches."""
        k, layers = self._k, self._w.layers
        step = self._step(batch)
        y: Tensor | None = None
        for at, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
            if y is None:
                x, *rest = k.mhc_first(batch.token_ids, self.embed, self._sites[at][0], layer.attn_norm)
            else:
                x, *rest = k.mhc_rows(y, Residual(*rest), self._sites[at][0], layer.attn_norm)
            y = self._attention(x, layer, self._fronts[at], cache, step)
            x, *rest = k.mhc_rows(y, Residual(*rest), self._sites[at][1], layer.ffn_norm)
            y = self._moe(x, batch.token_ids, layer)
        hidden = k.mhc_last(y, Residual(*rest), self._w.hc_head, self._w.norm)
        return self.logits(hidden, out)

    def _step(self, batch: DecodeBatch) -> _Step:
        at, ratios = batch.positions, (CSA_RATIO, HCA_RATIO)
        turns, visible = self._k.step_rows(at, self._rope.main, self._rope.compress, ratios)
        angles = [Angles(*turn.unbind()) for turn in turns.unbind()]
        return _Step(
            batch=batch,
            rows=DecodeRows(at, batch.slots, batch.page_table),
            main=angles[0],
            compress=angles[1],
            first=dict(zip(ratios, angles[2:], strict=True)),
            visible=dict(zip(ratios, visible.unbind(), strict=True)),
            each=_counting(batch.rows, at.device),
        )

    def _attention(
        self, x: Tensor | BothRows, layer: LayerWeights, front: FrontWeights, cache: LayerCache, step: _Step
    ) -> Tensor:
        """x [B, d], normed -> the attention block's output [B, d]. Writes the layer's caches."""
        k, shape, w = self._k, self._shape, layer.attention
        ratio = layer.ratio
        angles = step.main if ratio == SWA_LAYER else step.compress
        columns = self._front_product(x, w)
        qr, head_weights = k.front_rows(
            columns, front, _front_caches(cache), step.rows, (angles, step.first.get(ratio))
        )
        heads = self._linear(qr, w.query)
        entries, ids = None, None
        if ratio != SWA_LAYER:
            assert cache.entries is not None
            most = step.batch.max_csa if ratio == CSA_LAYER else step.batch.max_hca
            entries = PagedEntries(cache.entries, step.batch.page_table, step.each, step.visible[ratio], most)
            if ratio == CSA_LAYER and most > shape.index_topk:
                ids = self._select(heads, head_weights, entries, cache, angles)
        window = RingRows(
            cache.window, cache.window_stride, cache.ring, step.batch.positions, step.batch.slots, step.batch.lowest
        )
        queries = Queries(heads, shape.num_heads, shape.head_dim, angles, shape.norm_eps)
        out = k.attend_rows(queries, window, entries, ids, w.core)
        return self._out(out.view(step.batch.rows, shape.o_groups, -1), w)

    def _out(self, x: Tensor, w: AttentionWeights) -> Tensor:
        """Both output projections of the heads' outputs [B, groups, in], in their dtype."""
        if isinstance(w.o_a, Tensor):
            inner = self._k.grouped_linear(x.to(w.o_a.dtype), w.o_a).to(x.dtype)
        else:
            rounds = self._n.native and isinstance(w.o_b, Fp8Matrix)
            inner = self._k.grouped_linear(x, w.o_a, rounds=rounds)
        return self._linear(inner, w.o_b)

    def _linear(self, x: Tensor | Fp8Rows | Unnormed, weight: Matrix) -> Tensor:
        """A linear whose input the released model quantises, in its dtype; of rows that are or will be, in bf16."""
        if isinstance(weight, Fp8Matrix):
            return self._k.linear(x, weight)  # type: ignore[no-any-return]
        assert isinstance(x, Tensor)
        return self._k.linear(self._n.linear_input(x).to(weight.dtype), weight).to(x.dtype)  # type: ignore[no-any-return]

    def _front_product(self, x: Tensor | BothRows, w: AttentionWeights) -> Tensor:
        """The projections of x [B, total]: of quantised x for the latent columns, of x itself for the others."""
        n, cut = self._n, w.layout.latent
        if isinstance(w.front, FrontMatrix):
            return self._k.front_linear(x, w.front)  # type: ignore[no-any-return]
        assert isinstance(x, Tensor)
        if n.fused_front:
            return self._k.linear(x, w.front)  # type: ignore[no-any-return]
        latent = self._linear(x, w.front[:cut])
        return torch.cat([latent.float(), self._k.linear(x.float(), w.front[cut:])], dim=1)

    def _select(
        self, heads: Tensor, head_weights: Tensor, entries: PagedEntries, cache: LayerCache, angles: Angles
    ) -> Tensor:
        """The entries that each row reads, where some rows may see more than they may read."""
        assert cache.index_keys is not None
        shape = self._shape
        queries = IndexQueries(
            heads, shape.index_heads, shape.index_head_dim, angles, head_weights, rounds=self._n.native
        )
        keys = entries._replace(pool=cache.index_keys)
        return self._k.select_rows(queries, keys, shape.index_topk)  # type: ignore[no-any-return]

    def _moe(self, x: Tensor | Uncollapsed, token_ids: Tensor, layer: LayerWeights) -> Tensor:
        w = layer.moe
        if isinstance(w.experts.w13, Mxfp4Matrix):
            shared = (w.shared_w13, w.shared_w2)
            return self._k.moe_rows(x, token_ids, w.router, w.experts, shared)  # type: ignore[no-any-return]
        assert isinstance(x, Tensor)
        return moe(x.float(), token_ids, w, self._k, self._n).to(x.dtype)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits [S, V] in float32 of hidden states [S, d], in `out` if it is given."""
        return self._k.head_rows(hidden, self._w.head, out)  # type: ignore[no-any-return]


@functools.cache
def _counting(rows: int, device: torch.device) -> Tensor:
    """0, 1, .. rows - 1, which no step has to write again."""
    return torch.arange(rows, device=device)


def _front_weights(w: AttentionWeights, shape: ModelShape, native: bool) -> FrontWeights:
    layout = w.layout
    return FrontWeights(
        q_norm=w.q_norm,
        kv_norm=w.kv_norm,
        compressor=w.compressor,
        index_compressor=w.index_compressor,
        compress_at=layout.compress[0],
        index_at=layout.index_compress[0],
        heads=layout.index_weights,
        scale=shape.index_head_dim**-0.5 * shape.index_heads**-0.5,
        eps=shape.norm_eps,
        native=native,
        rounds=native and isinstance(w.query, Fp8Matrix),
    )


def _front_caches(cache: LayerCache) -> FrontCaches:
    return FrontCaches(
        window=cache.window,
        window_stride=cache.window_stride,
        ring=cache.ring,
        entries=cache.entries,
        index_keys=cache.index_keys,
        state=cache.state,
        index_state=cache.index_state,
        state_stride=cache.state_stride,
    )
