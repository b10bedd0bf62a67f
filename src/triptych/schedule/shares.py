"""Max-min fair shares of a token budget."""

from __future__ import annotations

from collections.abc import Sequence


def fair_shares(budget: int, wanted: Sequence[int]) -> list[int]:
    """Divide `budget` so that nobody gets more than wanted and no share can grow at the cost of a larger one.

    Small wishes are filled first, the rest is level; a remainder goes to the earliest. So short prompts
    finish soon, and a long one always progresses.
    """
    shares = [0] * len(wanted)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    for place, index in enumerate(order):
        shares[index] = min(wanted[index], budget // (len(order) - place))
        budget -= shares[index]
    for index, want in enumerate(wanted):
        extra = min(budget, want - shares[index])
        shares[index] += extra
        budget -= extra
    return shares
