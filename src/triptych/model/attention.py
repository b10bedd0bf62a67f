"""One attention block: front end, compressors, selection, attention, output projection.

Source: reference sections 2.3 to 2.6. The same code serves SWA, CSA and HCA layers and any mix of prefill chunks
and decode rows; entries of the step are written before they are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.config import CSA_LAYER, SWA_LAYER, ModelShape
from triptych.kernels.attend.ref import Attention, WindowRows
from triptych.kernels.attend_rows.ref import Queries
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import PackedRows, Rows, write_rows
from triptych.kernels.quant.matrices import Fp8Matrix, FrontMatrix, Matrix
from triptych.kernels.registry import KernelSet
from triptych.kernels.select_rows.ref import IndexQueries
from triptych.model.batch import Batch, EntryPlan, LayerCache
from triptych.model.numerics import NumericsRules
from triptych.model.rope import Angles
from triptych.model.weights import AttentionWeights, FrontLayout


class AttentionBlock:
    """Runs attention of layers of one ratio. `angles` are the rows' rotations; `entry_angles` those of new entries."""

    def __init__(self, shape: ModelShape, kernels: KernelSet, numerics: NumericsRules) -> None:
        self._shape = shape
        self._k = kernels
        self._n = numerics

    def forward(
        self,
        x: Tensor,
        weights: AttentionWeights,
        ratio: int,
        batch: Batch,
        cache: LayerCache,
        angles: tuple[Angles, Angles | None],
    ) -> Tensor:
        """x [R, d], the normed layer input -> the block's output [R, d]. Writes the layer's caches."""
        shape, n = self._shape, self._n
        k = self._k
        front = self._front(x, weights)
        norms = (weights.q_norm, weights.kv_norm)
        kind = torch.bfloat16 if n.narrow else None
        qr, kv = k.latent_rows(front, weights.layout.q_lora, norms, angles[0], shape.norm_eps, kind)
        qr, kv = n.activation(qr), self._latent(kv, cache.window)
        heads = self._linear(qr, weights.query)
        entries, selected = None, None
        if ratio != SWA_LAYER:
            plan = batch.csa if ratio == CSA_LAYER else batch.hca
            assert angles[1] is not None
            entries = self._compress(front, weights, plan, batch, cache, angles[1])
            if ratio == CSA_LAYER:
                selected = self._select(heads, front, weights.layout, entries, plan, cache, angles[0])
        rows = k.window_rows(kv, cache.window, batch.window)
        window = WindowRows(rows, batch.window.first, batch.window.count)
        out = self._attend(heads, window, entries, selected, weights.core, angles[0])
        k.keep_window(rows, cache.window, cache.frames, cache.layer, batch.window)
        grouped = n.activation(k.grouped_linear(out.view(out.shape[0], shape.o_groups, -1), weights.o_a))
        return self._linear(grouped, weights.o_b)

    def _attend(
        self,
        heads: Tensor,
        window: WindowRows,
        entries: PagedEntries | None,
        selected: Tensor | None,
        core: Attention,
        angles: Angles,
    ) -> Tensor:
        """Outputs [R, H, c] of the raw queries `heads`, rotated back."""
        shape, n, k = self._shape, self._n, self._k
        if n.narrow:
            queries = Queries(heads, shape.num_heads, shape.head_dim, angles, shape.norm_eps)
            return k.attend_heads(queries, window, entries, selected, core)  # type: ignore[no-any-return]
        q = n.activation(k.query_rows(heads, shape.num_heads, shape.head_dim, angles, shape.norm_eps))
        out = n.activation(k.attend(q, window, entries, selected, core))
        return n.activation(k.derotate(out, angles))

    def _linear(self, x: Tensor, weight: Matrix) -> Tensor:
        """A linear whose input the released model quantises; on a GPU the product does that itself."""
        n = self._n
        given = x if n.narrow and isinstance(weight, Fp8Matrix) else n.linear_input(x)
        return n.activation(self._k.linear(given, weight))

    def _latent(self, rows: Tensor, pool: Rows) -> Tensor:
        """Window rows or entries, rounded; where a packed pool rounds bf16 rows as it writes them, only to bf16."""
        if self._n.narrow and isinstance(pool, PackedRows):
            return self._n.activation(rows)
        return self._n.latent(rows, self._shape.rope_dim)

    def _front(self, x: Tensor, weights: AttentionWeights) -> Tensor:
        """All projections of x in one product, or in two where only the latent's input is quantised."""
        if isinstance(weights.front, FrontMatrix):
            return self._k.front_linear(x, weights.front)  # type: ignore[no-any-return]
        if self._n.fused_front:
            return self._k.linear(x, weights.front)  # type: ignore[no-any-return]
        cut = weights.layout.latent
        latent = self._n.activation(self._k.linear(self._n.linear_input(x), weights.front[:cut]))
        return torch.cat([latent, self._k.linear(x, weights.front[cut:])], dim=1)

    def _compress(
        self, front: Tensor, weights: AttentionWeights, plan: EntryPlan, batch: Batch, cache: LayerCache, angles: Angles
    ) -> PagedEntries:
        """Pool and store the entries (and index keys) that this step completes; returns what rows may see."""
        layout, steps = weights.layout, plan.compress
        assert cache.entries is not None and cache.state is not None
        new = self._k.compress(front, layout.compress[0], cache.state, steps, weights.compressor, angles)
        if len(new):
            write_rows(cache.entries, (steps.page, steps.offset), self._latent(new, cache.entries))
        if cache.index_keys is not None:
            column = layout.index_compress[0]
            keys = self._k.compress(front, column, cache.index_state, steps, weights.index_compressor, angles)
            if len(keys):
                write_rows(cache.index_keys, (steps.page, steps.offset), self._n.index(keys))
        return PagedEntries(cache.entries, batch.page_table, batch.seq, plan.visible, plan.max_visible)

    def _select(
        self,
        heads: Tensor,
        front: Tensor,
        layout: FrontLayout,
        entries: PagedEntries,
        plan: EntryPlan,
        cache: LayerCache,
        angles: Angles,
    ) -> Tensor | None:
        """Entries each row reads, or None while every row may read all it sees (visible <= top-k)."""
        shape = self._shape
        if plan.max_visible <= shape.index_topk:
            return None
        assert cache.index_keys is not None
        scale = shape.index_head_dim**-0.5 * shape.index_heads**-0.5
        head_weights = self._n.activation(front[:, slice(*layout.index_weights)]).to(front.dtype) * scale
        if self._n.narrow:
            queries = IndexQueries(heads, shape.index_heads, shape.index_head_dim, angles, head_weights, True)
            keys = entries._replace(pool=cache.index_keys)
            return self._k.select_rows(queries, keys, shape.index_topk)  # type: ignore[no-any-return]
        q = self._k.index_query_rows(heads, shape.index_heads, shape.index_head_dim, angles)
        keys = entries._replace(pool=cache.index_keys)
        return self._k.select_entries(self._n.index(q), head_weights, keys, shape.index_topk)  # type: ignore[no-any-return]
