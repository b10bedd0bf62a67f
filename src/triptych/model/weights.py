"""Where every tensor of a checkpoint goes: allocated once by shape, then filled in any order.

Projections that read the same input share one matrix, so that one product serves them all:

    front  [ wq_a | wkv | compressor wkv | wgate | indexer wkv | wgate | weights_proj ]   of the normed layer input
    query  [ wq_b | indexer wq_b ]                                                        of the low-rank query
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from triptych.config import CSA_LAYER, HCA_RATIO, SWA_LAYER, ModelShape
from triptych.errors import CheckpointError, ConfigError
from triptych.kernels.attend.ref import Attention
from triptych.kernels.compress.ref import Compressor
from triptych.kernels.mhc.ref import MhcHead, MhcSite
from triptych.kernels.moe.ref import Experts, Router
from triptych.kernels.quant.matrices import Fp8Matrix, FrontMatrix, Matrix, Mxfp4Matrix
from triptych.kernels.quant.ref import (
    FP8_BLOCK,
    MX_GROUP,
    dequantize_fp8,
    e8m0_decode,
    quantize_fp8,
    quantize_mxfp4,
)

Storage = torch.dtype | Literal["released"]
"""Dtype of all matrices, or as they are released: FP8 and MXFP4 with scales, bf16 for the rest."""


@dataclass(frozen=True, slots=True)
class FrontLayout:
    """Column ranges of the front matrix. compress and index_compress are [C | Z] rows of the two compressors."""

    latent: int  # wq_a and wkv together: the columns whose input native numerics quantises
    q_lora: int
    compress: tuple[int, int]
    index_compress: tuple[int, int]
    index_weights: tuple[int, int]
    total: int


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """One attention block. q_norm [q_lora], kv_norm [c]; o_a [G, rank, in]; o_b [d, G*rank]."""

    layout: FrontLayout
    front: Tensor | FrontMatrix
    query: Matrix
    q_norm: Tensor
    kv_norm: Tensor
    o_a: Matrix
    o_b: Matrix
    core: Attention
    compressor: Compressor | None
    index_compressor: Compressor | None


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """Router, routed experts and the shared expert (w13 [2I, d], w2 [d, I])."""

    router: Router
    experts: Experts
    shared_w13: Matrix
    shared_w2: Matrix


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block of the backbone (or of MTP, with ratio 0). `ratio` is 0, 4 or 128."""

    ratio: int
    attn_norm: Tensor
    ffn_norm: Tensor
    attn_site: MhcSite
    ffn_site: MhcSite
    attention: AttentionWeights
    moe: MoeWeights


@dataclass(frozen=True, slots=True)
class MtpWeights:
    """The multi-token prediction block (reference section 2.8); e_proj and h_proj [d, d]."""

    block: LayerWeights
    e_proj: Matrix
    h_proj: Matrix
    enorm: Tensor
    hnorm: Tensor
    norm: Tensor
    head: MhcHead


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Everything a forward pass multiplies. embed and head [V, d]."""

    shape: ModelShape
    embed: Tensor
    head: Tensor
    norm: Tensor
    hc_head: MhcHead
    layers: tuple[LayerWeights, ...]
    mtp: tuple[MtpWeights, ...]


class _Place(NamedTuple):
    """Where a tensor goes: values in their stored form and, if they have scales, those."""

    values: Tensor
    scales: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Logical shape: packed values count twice."""
        rows, *columns = self.values.shape
        packed = self.values.dtype == torch.uint8
        return torch.Size((rows, 2 * columns[0])) if packed else self.values.shape


class WeightStore:
    """Allocates all weights of `shape` and remembers where each official tensor name goes.

    Matrices are `dtype`; norms, mHC, sinks, biases and ape are float32, as in the checkpoint. With "released" linears
    are Fp8Matrix, routed experts Mxfp4Matrix, and embedding, head, compressors and indexer weights bf16. All are on
    `device`; on "meta" they take no memory, which tells `nbytes` beforehand.
    """

    def __init__(
        self,
        shape: ModelShape,
        dtype: Storage = torch.float32,
        *,
        mtp: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self._shape = shape
        self.has_mtp = mtp
        self._storage = dtype
        self._released = dtype == "released"
        self._dtype = torch.bfloat16 if isinstance(dtype, str) else dtype
        self._targets: dict[str, _Place] = {}
        self._placed: set[str] = set()
        self._tiled = False
        if self._released:
            _check_blocks(shape)
        with torch.device(device):
            self.weights = self._model(mtp)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights with their scales; tensors that share a matrix are counted by their own rows."""
        tensors = (tensor for place in self._targets.values() for tensor in place if tensor is not None)
        return sum(tensor.nbytes for tensor in tensors)

    def place(self, name: str, tensor: Tensor, scale: Tensor | None = None) -> None:
        """Copy `tensor` to where `name` belongs. Raises CheckpointError for unknown names and wrong shapes.

        With `scale` (e8m0 codes or float32) it is as stored in a file: float8_e4m3fn, or packed e2m1. Whatever is not
        in the form in which it is kept is brought into it.
        """
        assert not self._tiled, name
        target = self._targets.get(name)
        if target is None:
            raise CheckpointError(f"Tensor {name} has no place in this model.")
        packed = scale is not None and tensor.dtype in (torch.int8, torch.uint8)
        shape = torch.Size((tensor.shape[0], 2 * tensor.shape[1])) if packed else tensor.shape
        if target.shape != shape:
            raise CheckpointError(f"Tensor {name} is {list(shape)}, expected {list(target.shape)}.")
        if target.scales is None:
            target.values.copy_(tensor if scale is None else _dense(tensor, scale))
        elif target.values.dtype == torch.uint8:
            if scale is not None and packed:
                values, codes = tensor, scale
            else:
                values, codes = quantize_mxfp4(_dense(tensor, scale))
            target.values.copy_(values.view(torch.uint8))
            target.scales.copy_(codes.view(torch.uint8))
        else:
            if scale is not None and tensor.dtype == torch.float8_e4m3fn:
                values, codes = tensor, scale
            else:
                values, codes = quantize_fp8(_dense(tensor, scale))
            target.values.copy_(values)
            factors = e8m0_decode(codes) if codes.element_size() == 1 else codes
            # matrices of fewer rows than a block share its scale
            times = target.scales.shape[0] // factors.shape[0]
            target.scales.copy_(factors.repeat_interleave(times, 0) if times > 1 else factors)
        self._placed.add(name)

    def blank(self, device: torch.device | str = "cpu") -> WeightStore:
        """A store of the same tensors in the same forms on `device`, with nothing placed."""
        return WeightStore(self._shape, self._storage, mtp=self.has_mtp, device=device)

    def overwrite(self, other: WeightStore) -> None:
        """Put what was placed in `other`, a filled blank of this one, into this one's tensors: no address changes."""
        for name in other.placed:
            mine, theirs = self._targets[name], other._targets[name]
            mine.values.copy_(theirs.values)
            if mine.scales is not None and theirs.scales is not None:
                mine.scales.copy_(theirs.scales)
        if self._tiled:
            again = self.weights.mtp if any(name.startswith("mtp.") for name in other.placed) else ()
            for layer in (*self.weights.layers, *(block.block for block in again)):
                for matrix in (layer.moe.experts.w13, layer.moe.experts.w2):
                    if isinstance(matrix, Mxfp4Matrix):
                        matrix.tile()

    def put_in_tiles(self) -> None:
        """Arrange MXFP4 experts as a GPU's kernels read them; nothing may be placed after it, only overwritten."""
        self.weights = in_tiles(self.weights)
        self._tiled = True

    @property
    def released(self) -> bool:
        """True if matrices are kept in the formats in which they are released."""
        return self._released

    @property
    def placed(self) -> list[str]:
        """Names placed so far, sorted."""
        return sorted(self._placed)

    def stored(self, name: str) -> tuple[Tensor, ...]:
        """The tensors behind `name`: values in their stored form and, if they have scales, those."""
        return tuple(tensor for tensor in self._targets[name] if tensor is not None)

    def sizes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Logical shape and stored dtype of every tensor that has a place, by official name."""
        return {name: (target.shape, target.values.dtype) for name, target in self._targets.items()}

    def missing(self) -> list[str]:
        """Names not placed yet, sorted. MTP tensors count only once one of them was placed."""
        absent = self._targets.keys() - self._placed
        if not any(name.startswith("mtp.") for name in self._placed):
            absent = {name for name in absent if not name.startswith("mtp.")}
        return sorted(absent)

    # -- allocation: each call makes a tensor and files views of it under their official names

    def _new(self, name: str, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        tensor = torch.empty(*size, dtype=dtype or self._dtype)
        self._targets[name] = _Place(tensor)
        return tensor

    def _f32(self, name: str, *size: int) -> Tensor:
        return self._new(name, *size, dtype=torch.float32)

    def _stack(self, width: int, parts: list[tuple[str, int]]) -> Tensor:
        """One matrix [sum of rows, width] whose row ranges are the named tensors."""
        whole = torch.empty(sum(rows for _, rows in parts), width, dtype=self._dtype)
        at = 0
        for name, rows in parts:
            self._targets[name] = _Place(whole[at : at + rows])
            at += rows
        return whole

    def _linear(self, width: int, parts: list[tuple[str, int]]) -> Matrix:
        """As `_stack`, of tensors that are released as FP8."""
        if not self._released:
            return self._stack(width, parts)
        whole = _fp8(sum(rows for _, rows in parts), width)
        at = 0
        for name, rows in parts:
            mine = whole.rows(at, at + rows)
            self._targets[name] = _Place(mine.values, mine.scales)
            at += rows
        return whole

    def _front(self, width: int, latent: list[tuple[str, int]], rest: list[tuple[str, int]]) -> Tensor | FrontMatrix:
        if not self._released:
            return self._stack(width, latent + rest)
        matrix = self._linear(width, latent)
        assert isinstance(matrix, Fp8Matrix)
        return FrontMatrix(matrix, self._stack(width, rest))

    def _out(self, name: str, groups: int, rank: int, width: int) -> Matrix:
        """The first, grouped output projection [groups, rank, width]."""
        if not self._released:
            dense = torch.empty(groups, rank, width, dtype=self._dtype)
            self._targets[name] = _Place(dense.view(groups * rank, width))
            return dense
        matrix = _fp8(groups, rank, width)
        self._targets[name] = _Place(matrix.values.view(groups * rank, width), matrix.scales.flatten(0, 1))
        return matrix

    def _experts(self, names: list[list[str]], rows: int, width: int) -> Tensor | Mxfp4Matrix:
        """A stack [experts, parts * rows, width]; names[expert] are those of its parts."""
        count, parts = len(names), len(names[0])
        if self._released:
            packed = torch.empty(count, parts * rows, width // 2, dtype=torch.uint8)
            matrix = Mxfp4Matrix(packed, torch.empty(count, parts * rows, width // MX_GROUP, dtype=torch.uint8))
            values, scales = matrix.values, matrix.scales
        else:
            values = torch.empty(count, parts * rows, width, dtype=self._dtype)
        for expert, own in enumerate(names):
            for part, name in enumerate(own):
                mine = slice(part * rows, (part + 1) * rows)
                self._targets[name] = _Place(values[expert, mine], scales[expert, mine] if self._released else None)
        return matrix if self._released else values

    def _model(self, mtp: bool) -> ModelWeights:
        s = self._shape
        return ModelWeights(
            shape=s,
            embed=self._new("embed.weight", s.vocab_size, s.hidden_size),
            head=self._new("head.weight", s.vocab_size, s.hidden_size),
            norm=self._f32("norm.weight", s.hidden_size),
            hc_head=self._mhc_head(""),
            layers=tuple(self._layer(f"layers.{i}.", r, s.is_hash_layer(i)) for i, r in enumerate(s.ratios)),
            mtp=tuple(self._mtp(f"mtp.{i}.") for i in range(s.num_mtp_layers)) if mtp else (),
        )

    def _mtp(self, at: str) -> MtpWeights:
        d = self._shape.hidden_size
        return MtpWeights(
            block=self._layer(at, SWA_LAYER, False),
            e_proj=self._linear(d, [(at + "e_proj.weight", d)]),
            h_proj=self._linear(d, [(at + "h_proj.weight", d)]),
            enorm=self._f32(at + "enorm.weight", d),
            hnorm=self._f32(at + "hnorm.weight", d),
            norm=self._f32(at + "norm.weight", d),
            head=self._mhc_head(at),
        )

    def _mhc_head(self, at: str) -> MhcHead:
        s = self._shape
        n = s.hc_mult
        return MhcHead(
            self._f32(at + "hc_head_fn", n, n * s.hidden_size),
            self._f32(at + "hc_head_base", n),
            self._f32(at + "hc_head_scale", 1),
            s.hc_eps,
            s.norm_eps,
        )

    def _site(self, at: str) -> MhcSite:
        s = self._shape
        maps = (2 + s.hc_mult) * s.hc_mult
        return MhcSite(
            self._f32(at + "_fn", maps, s.hc_mult * s.hidden_size),
            self._f32(at + "_base", maps),
            self._f32(at + "_scale", 3),
            s.hc_sinkhorn_iters,
            s.hc_eps,
            s.norm_eps,
        )

    def _layer(self, at: str, ratio: int, hashed: bool) -> LayerWeights:
        d = self._shape.hidden_size
        return LayerWeights(
            ratio=ratio,
            attn_norm=self._f32(at + "attn_norm.weight", d),
            ffn_norm=self._f32(at + "ffn_norm.weight", d),
            attn_site=self._site(at + "hc_attn"),
            ffn_site=self._site(at + "hc_ffn"),
            attention=self._attention(at + "attn.", ratio),
            moe=self._moe(at + "ffn.", hashed),
        )

    def _attention(self, at: str, ratio: int) -> AttentionWeights:
        s = self._shape
        c, d, di = s.head_dim, s.hidden_size, s.index_head_dim
        wide = 2 * c if ratio == CSA_LAYER else c
        latent, parts = [(at + "wq_a.weight", s.q_lora_rank), (at + "wkv.weight", c)], []
        queries = [(at + "wq_b.weight", s.num_heads * c)]
        if ratio != SWA_LAYER:
            parts += [(at + "compressor.wkv.weight", wide), (at + "compressor.wgate.weight", wide)]
        if ratio == CSA_LAYER:
            parts += [(at + f"indexer.compressor.{w}.weight", 2 * di) for w in ("wkv", "wgate")]
            parts.append((at + "indexer.weights_proj.weight", s.index_heads))
            queries.append((at + "indexer.wq_b.weight", s.index_heads * di))
        low = s.o_groups * s.o_lora_rank
        return AttentionWeights(
            layout=_front_layout(s, ratio),
            front=self._front(d, latent, parts),
            query=self._linear(s.q_lora_rank, queries),
            q_norm=self._f32(at + "q_norm.weight", s.q_lora_rank),
            kv_norm=self._f32(at + "kv_norm.weight", c),
            o_a=self._out(at + "wo_a.weight", s.o_groups, s.o_lora_rank, s.num_heads * c // s.o_groups),
            o_b=self._linear(low, [(at + "wo_b.weight", d)]),
            core=Attention(self._f32(at + "attn_sink", s.num_heads), c**-0.5),
            compressor=self._compressor(at + "compressor.", ratio, c) if ratio != SWA_LAYER else None,
            index_compressor=self._compressor(at + "indexer.compressor.", ratio, di) if ratio == CSA_LAYER else None,
        )

    def _compressor(self, at: str, ratio: int, dim: int) -> Compressor:
        overlap = ratio != HCA_RATIO
        ape = self._f32(at + "ape", ratio, dim * (2 if overlap else 1))
        return Compressor(ape, self._f32(at + "norm.weight", dim), overlap, self._shape.norm_eps)

    def _moe(self, at: str, hashed: bool) -> MoeWeights:
        s = self._shape
        e, i, d, k = s.num_experts, s.moe_intermediate_size, s.hidden_size, s.experts_per_token
        router = Router(
            gate=self._f32(at + "gate.weight", e, d),  # float32: a bf16 router flips experts
            bias=None if hashed else self._f32(at + "gate.bias", e),
            tid2eid=self._new(at + "gate.tid2eid", s.vocab_size, k, dtype=torch.int64) if hashed else None,
            experts_per_token=k,
            scaling=s.routed_scaling,
        )
        name = at + "experts.{}.w{}.weight"
        w13 = self._experts([[name.format(x, 1), name.format(x, 3)] for x in range(e)], i, d)
        w2 = self._experts([[name.format(x, 2)] for x in range(e)], d, i)
        shared = self._linear(d, [(at + "shared_experts.w1.weight", i), (at + "shared_experts.w3.weight", i)])
        shared_w2 = self._linear(i, [(at + "shared_experts.w2.weight", d)])
        return MoeWeights(router, Experts(w13, w2, s.swiglu_limit), shared, shared_w2)


def _fp8(*size: int) -> Fp8Matrix:
    *outer, rows, columns = size
    scales = torch.empty(*outer, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK), dtype=torch.float32)
    return Fp8Matrix(torch.empty(*size, dtype=torch.float8_e4m3fn), scales)


def _dense(tensor: Tensor, scale: Tensor | None) -> Tensor:
    """float32 values of a tensor as stored; one without scale is its values."""
    if scale is None:
        return tensor.float()
    if tensor.dtype == torch.float8_e4m3fn:
        return dequantize_fp8(tensor, scale)
    return Mxfp4Matrix(tensor, scale).dequantize()


def in_tiles(weights: ModelWeights) -> ModelWeights:
    """`weights` with MXFP4 experts as a GPU's kernels read them, in the same memory: `weights` are none any more."""
    return replace(
        weights,
        layers=tuple(_layer_in_tiles(layer) for layer in weights.layers),
        mtp=tuple(replace(mtp, block=_layer_in_tiles(mtp.block)) for mtp in weights.mtp),
    )


def _layer_in_tiles(layer: LayerWeights) -> LayerWeights:
    w13, w2, limit = layer.moe.experts
    if not isinstance(w13, Mxfp4Matrix) or not isinstance(w2, Mxfp4Matrix):
        return layer
    experts = Experts(w13.in_tiles(paired=True), w2.in_tiles(paired=False), limit)
    return replace(layer, moe=replace(layer.moe, experts=experts))


def _check_blocks(s: ModelShape) -> None:
    """ConfigError where matrices that share one in memory would share a scale block too."""
    rank = s.o_lora_rank
    for name, rows, fits in (
        ("q_lora_rank", s.q_lora_rank, s.q_lora_rank % FP8_BLOCK == 0),
        ("num_heads * head_dim", s.num_heads * s.head_dim, s.num_heads * s.head_dim % FP8_BLOCK == 0),
        ("o_lora_rank", rank, rank % FP8_BLOCK == 0 or FP8_BLOCK % rank == 0),
        ("hidden_size", s.hidden_size, s.hidden_size % FP8_BLOCK == 0),
        ("moe_intermediate_size", s.moe_intermediate_size, s.moe_intermediate_size % FP8_BLOCK == 0),
    ):
        if not fits:
            raise ConfigError(
                f"Released weight formats come in blocks of {FP8_BLOCK}, which {name} {rows} does not fit.",
                "Use --weight-dtype bfloat16 or float32.",
            )


def _front_layout(s: ModelShape, ratio: int) -> FrontLayout:
    latent = s.q_lora_rank + s.head_dim
    wide = {SWA_LAYER: 0, CSA_LAYER: 4 * s.head_dim}.get(ratio, 2 * s.head_dim)
    index_wide = 4 * s.index_head_dim if ratio == CSA_LAYER else 0
    heads = s.index_heads if ratio == CSA_LAYER else 0
    compress = (latent, latent + wide)
    index = (compress[1], compress[1] + index_wide)
    weights = (index[1], index[1] + heads)
    return FrontLayout(latent, s.q_lora_rank, compress, index, weights, weights[1])
