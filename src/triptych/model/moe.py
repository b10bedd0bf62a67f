"""The mixture of experts of one layer. Source: reference section 2.7."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels.quant.matrices import Mxfp4Matrix
from triptych.kernels.registry import KernelSet
from triptych.model.numerics import NumericsRules
from triptych.model.weights import MoeWeights


def moe(x: Tensor, token_ids: Tensor, weights: MoeWeights, kernels: KernelSet, numerics: NumericsRules) -> Tensor:
    """x [R, d], the normed layer input, and its token ids [R] (hash layers route by them) -> [R, d]."""
    if numerics.narrow and isinstance(weights.experts.w13, Mxfp4Matrix):
        beside = (weights.shared_w13, weights.shared_w2)
        return kernels.moe_rows(x, token_ids, weights.router, weights.experts, beside)  # type: ignore[no-any-return]
    if numerics.narrow:
        x = x.float()
    ids, gates = kernels.route(x, token_ids, weights.router)
    x = numerics.linear_input(x)
    rounding = numerics.expert_rounding
    routed = kernels.experts(x, ids, gates, weights.experts, rounding)
    shared = kernels.shared_expert(x, weights.shared_w13, weights.shared_w2, weights.experts.limit, rounding)
    return numerics.activation(routed + shared)
