"""Where values are rounded: nowhere (`exact`) or where the released model rounds them (`native`).

Source: reference section 2.9. Native values stay in float32 tensors but lie on the bf16, e4m3 or e2m1 grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from triptych.kernels.quant import ref as quant
from triptych.kernels.registry import KernelSet


class NumericsRules(Protocol):
    """The rounding points of a forward pass. `expert_rounding` is None when experts round nothing."""

    @property
    def expert_rounding(self) -> Callable[[Tensor], Tensor] | None:
        """What experts do to their input of W2, if anything."""

    @property
    def native(self) -> bool:
        """True where values are rounded as the released model rounds them."""

    @property
    def narrow(self) -> bool:
        """True where activations of any batch are bf16 tensors, not float32 ones with bf16 values."""

    @property
    def dtype(self) -> torch.dtype:
        """Of streams and activations in decode steps."""

    @property
    def fused_front(self) -> bool:
        """True if all projections of the layer input read the same bits."""

    def linear_input(self, x: Tensor) -> Tensor:
        """Input of an FP8 or FP4 linear."""

    def activation(self, x: Tensor) -> Tensor:
        """Output of a linear, norm or residual update."""

    def latent(self, kv: Tensor, rope_dim: int) -> Tensor:
        """A window row or main entry, after rope: all dims but the rotated tail."""

    def index(self, x: Tensor) -> Tensor:
        """Index queries and keys, after rope."""


class NarrowNative:
    """As Native, on a GPU: values are bf16 tensors, and kernels round what they read and write themselves.

    A linear of released weights quantises its own input. Only what no kernel does yet is done here.
    """

    fused_front = False
    native = True
    narrow = True
    dtype = torch.bfloat16

    def __init__(self, kernels: KernelSet) -> None:
        self._k = kernels
        self.expert_rounding: Callable[[Tensor], Tensor] | None = Native().linear_input

    def linear_input(self, x: Tensor) -> Tensor:
        """e4m3 in groups of 128 along the last dim."""
        return quant.fake_quant_fp8(x, 128)

    def activation(self, x: Tensor) -> Tensor:
        """bf16; the tensor itself if it is."""
        return x.to(torch.bfloat16)

    def latent(self, kv: Tensor, rope_dim: int) -> Tensor:
        """e4m3 in groups of 64 for the unrotated dims, bf16 for the rotated tail."""
        return Native().latent(kv.float(), rope_dim).to(torch.bfloat16)

    def index(self, x: Tensor) -> Tensor:
        """Hadamard rotation, then e2m1 in groups of 32."""
        return self._k.index_round(x)  # type: ignore[no-any-return]


class Exact:
    """No rounding anywhere: comparable with Transformers in float32."""

    expert_rounding = None
    fused_front = True
    native = False
    narrow = False
    dtype = torch.float32

    def linear_input(self, x: Tensor) -> Tensor:
        """x as it is."""
        return x

    def activation(self, x: Tensor) -> Tensor:
        """x as it is."""
        return x

    def latent(self, kv: Tensor, rope_dim: int) -> Tensor:
        """kv as it is."""
        return kv

    def index(self, x: Tensor) -> Tensor:
        """x as it is: the Hadamard rotation is orthogonal and changes nothing without rounding."""
        return x


class Native:
    """The released model's quantisation points (it was trained with them)."""

    fused_front = False
    native = True
    narrow = False
    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.expert_rounding: Callable[[Tensor], Tensor] | None = self.linear_input

    def linear_input(self, x: Tensor) -> Tensor:
        """e4m3 in groups of 128 along the last dim."""
        return quant.fake_quant_fp8(x, 128)

    def activation(self, x: Tensor) -> Tensor:
        """bf16."""
        rounded: Tensor = x.to(torch.bfloat16).to(x.dtype)
        return rounded

    def latent(self, kv: Tensor, rope_dim: int) -> Tensor:
        """e4m3 in groups of 64 for the unrotated dims, bf16 for the rotated tail."""
        nope = quant.fake_quant_fp8(self.activation(kv[..., :-rope_dim]), 64)
        return torch.cat([nope, self.activation(kv[..., -rope_dim:])], dim=-1)

    def index(self, x: Tensor) -> Tensor:
        """Hadamard rotation, then e2m1 in groups of 32."""
        return quant.fake_quant_fp4(self.activation(quant.hadamard(self.activation(x))), 32)
