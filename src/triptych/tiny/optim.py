"""Muon for the matrices, AdamW for everything else.

Muon (Jordan et al., 2024) replaces a matrix's momentum by the nearest orthogonal matrix, so that all directions learn
at one pace: with few thousand steps to spend that is worth more than its cost.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from triptych.tiny.net import Net

_MATRICES = re.compile(
    r"(wq_a|wq_b|wkv|wgate|wo_a|wo_b|e_proj|h_proj)\.weight$|ffn\.w[123]$",
)
_QUINTIC = (3.4445, -4.7750, 2.0315)


def is_matrix(name: str) -> bool:
    """True for parameters that Muon trains."""
    return bool(_MATRICES.search(name))


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """About the nearest (semi-)orthogonal matrices of a stack g [N, R, C], by Newton-Schulz iteration in bfloat16."""
    a, b, c = _QUINTIC
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = x.mT if tall else x
    return out


class Muon:
    """Momentum SGD with orthogonalised updates; parameters of one shape are updated as one stack."""

    def __init__(self, params: list[nn.Parameter], groups: dict[int, int], momentum: float = 0.95) -> None:
        """`groups` maps the id of a parameter that is several matrices on top of each other to their number."""
        self.momentum, self.groups = momentum, groups
        self.stacks: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for p in params:
            self.stacks.setdefault(tuple(self._matrices(p, p).shape[1:]), []).append(p)
        self.buffers = {
            shape: torch.cat([torch.zeros_like(self._matrices(p, p)) for p in same])
            for shape, same in self.stacks.items()
        }

    def _matrices(self, p: nn.Parameter, values: Tensor) -> Tensor:
        values = values.detach()
        if values.ndim == 3:
            return values
        return values.view(self.groups.get(id(p), 1), -1, values.shape[-1])

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update from the gradients."""
        for shape, params in self.stacks.items():
            grad = torch.cat([self._matrices(p, p.grad) for p in params if p.grad is not None])
            buffer = self.buffers[shape]
            buffer.lerp_(grad, 1 - self.momentum)
            update = orthogonal(grad.lerp(buffer, self.momentum)).float()
            update *= -rate * max(1.0, shape[0] / shape[1]) ** 0.5
            at = 0
            for p in params:
                view = self._matrices(p, p)
                view += update[at : at + len(view)]
                at += len(view)


class Optimizer:
    """Both optimizers of a net, with one learning-rate factor."""

    def __init__(self, net: Net, *, matrix_rate: float, other_rate: float) -> None:
        groups = {id(p): net.shape.o_groups for n, p in net.named_parameters() if n.endswith("wo_a.weight")}
        matrices = [p for n, p in net.named_parameters() if is_matrix(n)]
        others = [p for n, p in net.named_parameters() if not is_matrix(n)]
        self.params = [*matrices, *others]
        self.matrix_rate, self.other_rate = matrix_rate, other_rate
        self.muon = Muon(matrices, groups)
        fused = others[0].is_cuda
        self.adam = torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0, fused=fused)

    def step(self, factor: float, clip: float = 1.0) -> Tensor:
        """Update with rates times `factor`, clear the gradients; returns the gradients' norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.params, clip)
        self.muon.step(self.matrix_rate * factor)
        for group in self.adam.param_groups:
            group["lr"] = self.other_rate * factor
        self.adam.step()
        for p in self.params:
            p.grad = None
        return norm

    def state(self) -> dict[str, object]:
        """What a later `load` needs."""
        return {"muon": self.muon.buffers, "adam": self.adam.state_dict()}

    def load(self, state: dict[str, object]) -> None:
        """Continue from `state`."""
        for key, value in state["muon"].items():  # type: ignore[attr-defined]
            self.muon.buffers[key].copy_(value)
        self.adam.load_state_dict(state["adam"])  # type: ignore[arg-type]
