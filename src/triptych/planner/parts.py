"""Weights of a model by part: bytes, how they are divided over devices, and what a token multiplies with.

Source of shapes and formats: DeepSeek-V4 reference sections 2.11 (what tensor parallelism divides), 5.1 and 5.2. A test
compares the sums with the checkpoint's own table of tensors, to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from triptych.config import CSA_LAYER, CSA_RATIO, HCA_LAYER, HCA_RATIO, SWA_LAYER, ModelShape
from triptych.planner.hardware import Numeric

WeightFormat = Literal["float32", "bfloat16", "released"]
"""released: dense layers FP8 with a scale per 128 x 128, experts MXFP4, the rest BF16 and FP32."""

Division = Literal["experts", "heads", "copied"]
"""Over which devices a part is divided: those of expert parallelism, those of tensor parallelism, or none."""

_BLOCK, _GROUP = 128, 32  # FP8 scales per block, MXFP4 scales per group


@dataclass(frozen=True, slots=True)
class Part:
    """Weights with one fate. `active`: parameters that one token multiplies with; `numeric`: in which format.

    `mtp`: of the draft block, which no token needs that the backbone computes.
    """

    name: str
    bytes: int
    active: int
    division: Division
    numeric: Numeric
    mtp: bool = False


def parts_of(shape: ModelShape, weights: WeightFormat = "released", mtp: bool = True) -> tuple[Part, ...]:
    """The parts of a DeepSeek-V4 shape, with or without its MTP blocks."""
    sums: dict[tuple[str, Division, Numeric, bool], list[int]] = {}
    layers = [(ratio, shape.is_hash_layer(i), False) for i, ratio in enumerate(shape.ratios)]
    layers += [(SWA_LAYER, False, True)] * (shape.num_mtp_layers if mtp else 0)
    counter = _Counter(shape, weights, sums)
    counter.top()
    for ratio, hashed, is_mtp in layers:
        counter.layer(ratio, hashed, is_mtp)
    return tuple(
        Part(name, size, 0 if is_mtp else active, division, numeric, is_mtp)
        for (name, division, numeric, is_mtp), (size, active) in sums.items()
    )


@dataclass(slots=True)
class _Counter:
    """Adds up tensors by part."""

    shape: ModelShape
    weights: WeightFormat
    sums: dict[tuple[str, Division, Numeric, bool], list[int]]

    def top(self) -> None:
        """Embedding, head and what lies between the last layer and the head."""
        s = self.shape
        self._matrix("embedding", s.vocab_size, s.hidden_size, "heads", used=0)
        self._matrix("head", s.vocab_size, s.hidden_size, "heads")
        self._vector("norms", s.hidden_size)
        self._head_maps(False)

    def layer(self, ratio: int, hashed: bool, mtp: bool) -> None:
        """One block; an MTP block has two projections, three norms and head maps of its own beside."""
        s, d, c = self.shape, self.shape.hidden_size, self.shape.head_dim
        low_rank, site = s.o_groups * s.o_lora_rank, (2 + s.hc_mult) * s.hc_mult
        for _ in range(2):
            self._float("mhc", site * s.hc_mult * d + site + 3, mtp, used=site * s.hc_mult * d)
            self._vector("norms", d, mtp)
        self._linear("attention, copied", s.q_lora_rank + c, d, "copied", mtp, split=(s.q_lora_rank, c))
        self._linear("attention", s.num_heads * c, s.q_lora_rank, "heads", mtp)
        self._linear("attention", low_rank, s.num_heads * c // s.o_groups, "heads", mtp)
        self._linear("attention", d, low_rank, "heads", mtp)
        self._vector("norms", s.q_lora_rank + c, mtp)
        self._float("norms", s.num_heads, mtp)
        if ratio in (CSA_LAYER, HCA_LAYER):
            self._compressor("compressors", c, ratio)
        if ratio == CSA_LAYER:
            self._linear("indexer", s.index_heads * s.index_head_dim, s.q_lora_rank, "copied")
            self._matrix("indexer", s.index_heads, d, "copied")
            self._compressor("indexer", s.index_head_dim, ratio)
        self._moe(hashed, mtp)
        if mtp:
            for _ in range(2):
                self._linear("attention, copied", d, d, "copied", True)
            self._vector("norms", 3 * d, True)
            self._head_maps(True)

    def _moe(self, hashed: bool, mtp: bool) -> None:
        s, d, wide = self.shape, self.shape.hidden_size, self.shape.moe_intermediate_size
        self._matrix("router", s.num_experts, d, "copied", mtp)
        if hashed:
            self._add("router", "copied", "fp32", mtp, 8 * s.vocab_size * s.experts_per_token, 0)
        else:
            self._float("router", s.num_experts, mtp)
        for rows, columns in ((wide, d), (wide, d), (d, wide)):
            self._linear("shared experts", rows, columns, "heads", mtp)
            size = rows * columns
            held = size // 2 + size // _GROUP if self.weights == "released" else size * self._wide()
            numeric = "fp8" if self.weights == "released" else self._numeric()  # MXFP4 times FP8 runs at FP8's rate
            self._add("experts", "experts", numeric, mtp, held * s.num_experts, size * s.experts_per_token)

    def _compressor(self, name: str, dim: int, ratio: int) -> None:
        wide = dim if ratio == HCA_RATIO else 2 * dim
        self._matrix(name, 2 * wide, self.shape.hidden_size, "copied")
        self._float(name, (CSA_RATIO if ratio == CSA_LAYER else HCA_RATIO) * wide, False)
        self._vector("norms", dim)

    def _head_maps(self, mtp: bool) -> None:
        n = self.shape.hc_mult
        self._float("mhc", n * n * self.shape.hidden_size + n + 1, mtp, used=n * n * self.shape.hidden_size)

    def _linear(
        self,
        name: str,
        rows: int,
        columns: int,
        division: Division,
        mtp: bool = False,
        split: tuple[int, ...] | None = None,
    ) -> None:
        """A matrix that the release stores in FP8; `split`: rows of the matrices that are counted together."""
        size = rows * columns
        if self.weights == "released":
            blocks = sum(-(-part // _BLOCK) for part in split or (rows,)) * -(-columns // _BLOCK)
            self._add(name, division, "fp8", mtp, size + blocks, size)
        else:
            self._add(name, division, self._numeric(), mtp, size * self._wide(), size)

    def _matrix(
        self, name: str, rows: int, columns: int, division: Division, mtp: bool = False, used: int | None = None
    ) -> None:
        """A matrix that the release stores in BF16."""
        size = rows * columns
        self._add(name, division, self._numeric(), mtp, size * self._wide(), size if used is None else used)

    def _vector(self, name: str, length: int, mtp: bool = False) -> None:
        self._add(name, "copied", self._numeric(), mtp, length * self._wide(), 0)

    def _float(self, name: str, size: int, mtp: bool, used: int = 0) -> None:
        """What is FP32 in every format."""
        self._add(name, "copied", "fp32", mtp, 4 * size, used)

    def _wide(self) -> int:
        return 4 if self.weights == "float32" else 2

    def _numeric(self) -> Numeric:
        return "fp32" if self.weights == "float32" else "bf16"

    def _add(self, name: str, division: Division, numeric: Numeric, mtp: bool, size: int, active: int) -> None:
        total = self.sums.setdefault((name, division, numeric, mtp), [0, 0])
        total[0] += size
        total[1] += active
