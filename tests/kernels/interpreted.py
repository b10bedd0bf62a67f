"""Runs in a process of its own, with Triton's interpreter: every Triton kernel against its reference, as JSON lines."""

from __future__ import annotations

import json

import torch

from triptych.kernels.index.triton import highest
from triptych.kernels.registry import table
from triptych.kernels.verify import verify


def main() -> None:
    """One line for each operation and size, and one for the tie rule of the selection."""
    for row in table("auto", device="cuda"):
        if row.backend == "triton":
            for rows in (1, 3, 17):
                result = verify(row.op, "triton", rows, rows)
                print(json.dumps({"what": f"{row.op} {rows}", "ok": result.ok, "error": result.error}))
    scores = torch.randint(0, 4, (5, 5000), generator=torch.Generator().manual_seed(0)).float()
    visible = torch.tensor([5000, 4999, 2049, 30, 0])
    scores.masked_fill_(torch.arange(5000) >= visible.unsqueeze(1), float("-inf"))
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :600]
    order = torch.where(order < visible.unsqueeze(1), order, 9999).sort(dim=1).values
    want = torch.where(order < 9999, order, -1)
    got = highest(scores, visible, 600)
    print(json.dumps({"what": "ties", "ok": bool((got == want).all()), "error": 0.0}))


if __name__ == "__main__":
    main()
