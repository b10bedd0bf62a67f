"""Near-ties: where our kernels and Transformers choose differently between candidates of practically equal score.

Float32 noise of about 1e-6 decides such cases, and after one the hidden states differ by far more than noise. Nothing
is excused after the fact. Instead each choice that our kernels make is compared with Transformers' own:

 - equal: nothing happens;
 - different, and the candidates that differ score within TIE of each other in Transformers: counted, and the
   run goes on with Transformers' choice, so that everything after it is still compared at full precision;
 - different otherwise: the test fails on the spot, naming layer and position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from v4_reference import Choices, Reference

from triptych.kernels.registry import KernelSet

TIE = 5e-6  # noise seen in scores of size 1 is about 1e-6; the median gap at the boundary is 2e-2 to 2e-3


@dataclass
class Tally:
    """What was compared: choices made, how many were near-ties, the widest gap among those; logits and their error."""

    choices: int = 0
    ties: int = 0
    widest: float = 0.0
    positions: int = 0
    error: float = 0.0


TOTAL = Tally()
"""Over the whole test session; printed in its summary."""


class Arbiter:
    """Stands between the model and two of its kernels. `begin` says which reference rows the next step runs."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._csa = sorted(reference.entries)
        self._select_calls = 0
        self._route_calls = 0
        self._seq = torch.empty(0, dtype=torch.int64)
        self._pos = torch.empty(0, dtype=torch.int64)

    def begin(self, sequences: Tensor, positions: Tensor) -> None:
        """Rows [R] of the step as (reference sequence, position)."""
        self._seq, self._pos = sequences, positions
        self._select_calls = self._route_calls = 0

    def watch(self, kernels: KernelSet) -> KernelSet:
        """`kernels` with the two choosing operations under observation."""
        return replace(
            kernels,
            select_entries=lambda *args: self._select(kernels.select_entries, *args),
            route=lambda *args: self._route(kernels.route, *args),
        )

    def _select(self, kernel: Any, *args: Any) -> Tensor:
        ours: Tensor = kernel(*args)
        layer = self._csa[self._select_calls % len(self._csa)]
        self._select_calls += 1
        choices = self._reference.entries[layer]
        visible = (self._pos + 1) // 4
        rows = torch.nonzero(visible > choices.k).squeeze(1)
        few = torch.nonzero(visible <= choices.k).squeeze(1).tolist()
        for row in few:  # all visible ones, whatever the scores
            got = ours[row][ours[row] >= 0].sort().values
            assert torch.equal(got, torch.arange(int(visible[row]))), f"layer {layer}, position {int(self._pos[row])}"
        forced = self._resolve(ours[rows], choices, rows, f"entries of layer {layer}")
        out = ours.clone()
        out[rows] = forced.to(ours.dtype)
        return out

    def _route(self, kernel: Any, x: Tensor, token_ids: Tensor, router: Any) -> tuple[Tensor, Tensor]:
        layer = self._route_calls
        self._route_calls += 1
        ids, weights = kernel(x, token_ids, router)
        choices = self._reference.experts.get(layer)
        if choices is None:  # a hash layer chooses by table
            return ids, weights
        rows = torch.arange(len(ids))
        forced = self._resolve(ids, choices, rows, f"experts of layer {layer}")
        changed = (forced != ids.sort(dim=1).values).any(dim=1)
        if changed.any():  # the same router, choosing by table, weighs what Transformers chose
            table = router._replace(bias=None, tid2eid=torch.where(changed.unsqueeze(1), forced, ids))
            return kernel(x, rows, table)  # type: ignore[no-any-return]
        return ids, weights

    def _resolve(self, ours: Tensor, choices: Choices, rows: Tensor, what: str) -> Tensor:
        """Sorted choices [R, k]: ours, or Transformers' where the difference is a near-tie."""
        seq, pos = self._seq[rows], self._pos[rows]
        ids, scores = choices.ids[seq, pos].long(), choices.scores[seq, pos]
        want = choices.chosen[seq, pos].long().sort(dim=1).values
        got = ours.long().sort(dim=1).values
        assert got.shape == want.shape, (what, got.shape, want.shape)
        self._count(len(rows), 0, 0.0)
        for row in torch.nonzero((got != want).any(dim=1)).squeeze(1).tolist():
            gap = _gap(got[row], want[row], dict(zip(ids[row].tolist(), scores[row].tolist(), strict=True)))
            assert gap < TIE, f"{what}, position {int(pos[row])}: chosen score is {gap:.2g} below Transformers' choice"
            self._count(0, 1, gap)
        return want

    @staticmethod
    def _count(choices: int, ties: int, gap: float) -> None:
        TOTAL.choices += choices
        TOTAL.ties += ties
        TOTAL.widest = max(TOTAL.widest, gap)


def _gap(ours: Tensor, theirs: Tensor, scores: dict[int, float]) -> float:
    """How much lower the worst of our choices scores than the best one that we left out, by Transformers' scores."""
    mine, wanted = set(ours.tolist()), set(theirs.tolist())
    gained = min((scores.get(i, float("-inf")) for i in mine - wanted), default=float("-inf"))  # none: a repeated id
    lost = max(scores.get(i, float("inf")) for i in wanted - mine)
    return lost - gained
