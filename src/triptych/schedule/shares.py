"""Max-min fair shares of a token budget."""

from __future__ import annotations

from collections.abc import Sequence


def fair_shares(budget: int, wanted: Sequence[int]) -> list[int]:
    """Divide `budget` so that nobody gets more than wanted and no share can grow at the cost of a larger one.

    Small wishes are filled first, the rest is level; a remainder goes to the earliest. So short prompts
    finish soon, and a long one always progresses.
    """
    level, left = 0, budget
    for place, want in enumerate(sorted(wanted)):
        level = left // (len(wanted) - place)
        if want > level:
            break
        left -= want
    else:
        return list(wanted)
    shares = [min(want, level) for want in wanted]
    spare = budget - sum(shares)
    for index, want in enumerate(wanted):
        if spare and want > level:
            shares[index] += 1
            spare -= 1
    return shares
