"""The head of a step for the CPU: the compiled product of few rows."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels.linear import cpu


def head_rows(hidden: Tensor, head: Tensor, out: Tensor | None = None) -> Tensor:
    """See ref.head_rows."""
    logits = cpu.linear(hidden.float(), head)
    return logits if out is None else out.copy_(logits)


def head_rows_deterministic(hidden: Tensor, head: Tensor, out: Tensor | None = None) -> Tensor:
    """See ref.head_rows; rows are independent of each other."""
    logits = cpu.linear_deterministic(hidden.float(), head)
    return logits if out is None else out.copy_(logits)
