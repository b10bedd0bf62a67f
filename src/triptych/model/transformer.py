"""The DeepSeek-V4 forward pass over one Batch. Source: reference section 2.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.config import CSA_LAYER, HCA_LAYER, SWA_LAYER, Numerics
from triptych.kernels.mhc.ref import Residual
from triptych.kernels.registry import KernelSet
from triptych.model.attention import AttentionBlock
from triptych.model.batch import Batch, DecodeBatch, LayerCache
from triptych.model.decode import Decoder
from triptych.model.moe import moe
from triptych.model.numerics import Exact, NarrowNative, Native, NumericsRules
from triptych.model.rope import Angles, RopeTables
from triptych.model.weights import LayerWeights, ModelWeights


@dataclass(frozen=True, slots=True)
class Last:
    """What the last layer left of the rows of `batch`, the narrowest of the step: all that the head needs.

    parts: streams [R, n, d]; in bf16 tensors the last block's output and what its residual is made of.
    """

    parts: tuple[Tensor, ...]
    batch: Batch


class Transformer:
    """A backbone ready to run. Holds weights, kernels and rounding rules; all request state is in the caches.

    `layer_rows` counts rows times layers that have run.
    """

    def __init__(self, weights: ModelWeights, kernels: KernelSet, numerics: Numerics = "exact") -> None:
        self.shape = weights.shape
        self._weights = weights
        self._numerics = numerics
        self._rope = RopeTables(weights.shape, weights.embed.device)
        self.layer_rows = 0
        self.use_kernels(kernels)

    def use_kernels(self, kernels: KernelSet) -> None:
        """Run with these kernels from the next step on."""
        self.kernels = kernels
        self._n = _rules(self._numerics, kernels, on_gpu=self._weights.embed.is_cuda)
        self._attention = AttentionBlock(self.shape, kernels, self._n)
        self._decoder = Decoder(self._weights, kernels, self._n, self._rope)

    def refresh(self) -> None:
        """The weights were overwritten: whatever was derived from them follows, at the addresses it had."""
        self._decoder.refresh()

    def decode(self, batch: DecodeBatch, caches: Sequence[LayerCache], out: Tensor | None = None) -> Tensor:
        """Run one row of each sequence through all layers, writing the caches. Returns logits [B, V], float32, in `out`
        if it is given.

        Nothing in it depends on values that the host would have to wait for, so a CUDA graph may record it.
        """
        return self._decoder(batch, caches, out)

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: Sequence[LayerCache]) -> Tensor:
        """Run all rows through all layers, writing the caches. Returns logits [S, V] of the sampled rows, float32.

        Where the batch narrows, rows that only deeper windows would have needed do not go on.
        """
        last = self.run(batch, caches)
        return self.head(last, last.batch.sampled)

    @torch.inference_mode()
    def run(self, batch: Batch, caches: Sequence[LayerCache]) -> Last:
        """As `forward`, without the head."""
        if self._n.narrow:
            return self._run_narrow(batch, caches)
        streams = self._embed(batch.token_ids)
        angles = self._angles(batch)
        narrow = batch.narrow
        for layer, cache in zip(self._weights.layers, caches, strict=True):
            if cache.layer in narrow:
                keep, batch = narrow[cache.layer].keep, narrow[cache.layer].batch
                streams, angles = streams[keep], self._angles(batch)
            if not batch.rows:
                break
            self.layer_rows += batch.rows
            streams = self._layer(streams, layer, batch, cache, angles[layer.ratio])
        return Last((streams,), batch)

    @torch.inference_mode()
    def head(self, last: Last, rows: Tensor) -> Tensor:
        """Logits [S, V], float32, of some rows [S] of what `run` left."""
        parts = [part[rows] for part in last.parts]
        if not self._n.narrow:
            return self._head(*parts)
        if not len(rows):
            return torch.empty(0, self.shape.vocab_size, device=rows.device)
        y, *rest = parts
        return self._decoder.logits(
            self.kernels.mhc_last(y, Residual(*rest), self._weights.hc_head, self._weights.norm)
        )

    def _run_narrow(self, batch: Batch, caches: Sequence[LayerCache]) -> Last:
        """`run` in bf16 tensors: a site between two blocks is one operation, as in decode steps."""
        k, w, table, narrow = self.kernels, self._weights, self._decoder.embed, batch.narrow
        angles = self._angles(batch)
        y: Tensor | None = None
        for layer, cache in zip(w.layers, caches, strict=True):
            if y is None:
                x, *rest = k.mhc_first(batch.token_ids, table, layer.attn_site, layer.attn_norm)
            else:
                if cache.layer in narrow:
                    keep, batch = narrow[cache.layer].keep, narrow[cache.layer].batch
                    y, rest, angles = y[keep], [part[keep] for part in rest], self._angles(batch)
                if not batch.rows:
                    break
                x, *rest = k.mhc_rows(y, Residual(*rest), layer.attn_site, layer.attn_norm)
            self.layer_rows += batch.rows
            y = self._attention.forward(x, layer.attention, layer.ratio, batch, cache, angles[layer.ratio])
            x, *rest = k.mhc_rows(y, Residual(*rest), layer.ffn_site, layer.ffn_norm)
            y = moe(x, batch.token_ids, layer.moe, k, self._n)
        assert y is not None
        return Last((y, *rest), batch)

    def _embed(self, token_ids: Tensor) -> Tensor:
        """Residual streams [R, n, d]: n identical copies of the embedding."""
        rows = self._n.activation(self._weights.embed[token_ids].float())
        return rows.unsqueeze(1).repeat(1, self.shape.hc_mult, 1)

    def _angles(self, batch: Batch) -> dict[int, tuple[Angles, Angles | None]]:
        """Rotations of rows and of new entries for each layer ratio, computed once a step."""
        main = self._rope.main_angles(batch.positions)
        compress = self._rope.compress_angles(batch.positions)
        return {
            SWA_LAYER: (main, None),
            CSA_LAYER: (compress, self._rope.compress_angles(batch.csa.first)),
            HCA_LAYER: (compress, self._rope.compress_angles(batch.hca.first)),
        }

    def _layer(
        self,
        streams: Tensor,
        layer: LayerWeights,
        batch: Batch,
        cache: LayerCache,
        angles: tuple[Angles, Angles | None],
    ) -> Tensor:
        n = self._n
        x, post, comb = self.kernels.mhc_pre(streams, layer.attn_site, layer.attn_norm)
        y = self._attention.forward(n.activation(x), layer.attention, layer.ratio, batch, cache, angles)
        streams = n.activation(self.kernels.mhc_post(y, streams, post, comb))
        x, post, comb = self.kernels.mhc_pre(streams, layer.ffn_site, layer.ffn_norm)
        y = moe(n.activation(x), batch.token_ids, layer.moe, self.kernels, n)
        return n.activation(self.kernels.mhc_post(y, streams, post, comb))

    def _head(self, streams: Tensor) -> Tensor:
        """Logits [S, V] in float32 from the last streams [S, n, d]."""
        w = self._weights
        hidden = self._n.activation(self.kernels.mhc_head(streams, w.hc_head))
        hidden = self._n.activation(self.kernels.rms_norm(hidden, w.norm, self.shape.norm_eps))
        return self.kernels.linear(hidden, w.head).float()  # type: ignore[no-any-return]


def _rules(numerics: Numerics, kernels: KernelSet, *, on_gpu: bool) -> NumericsRules:
    if numerics == "exact":
        return Exact()
    return NarrowNative(kernels) if on_gpu else Native()
