"""The benchmark of prefix policies: its traffic repeats what it says, its prices are those of the plans."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.cache.geometry import CacheGeometry
from triptych.config import SHAPES

RATES = 1e-5, 1e-11
FLASH = CacheGeometry.of(SHAPES["flash"], "fp8")


@pytest.fixture(scope="module")
def policy() -> Iterator[Any]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from benchmarks.prefix_policy import costs

    yield costs
    sys.path.pop(0)


def test_texts_come_back_to_the_token_and_end_anywhere(policy: Any) -> None:
    cell = policy.Cell("shared", 2048, 4, requests=40)
    traffic = policy.Traffic(cell)
    prompts = [request.prompt for request in traffic]
    assert traffic.again == [any(shared(one, other) > 1500 for other in prompts[:i]) for i, one in enumerate(prompts)]
    lengths = {len(prompt) - 512 for prompt in prompts}
    assert len(lengths) > 4 and all(1536 <= n <= 2560 for n in lengths) and any(n % 128 for n in lengths)
    again = [request.prompt for request in traffic]
    assert all(np.array_equal(a, b) for a, b in zip(prompts, again, strict=True))


def test_turns_repeat_the_whole_conversation(policy: Any) -> None:
    traffic = policy.Traffic(policy.Cell("turns", 2048, 3, requests=30))
    said: dict[str, Any] = {}
    for request, again in zip(list(traffic), traffic.again, strict=True):
        assert (request.session in said) == again
        if again:
            whole = said[request.session]
            assert np.array_equal(request.prompt[: len(whole)], whole) and len(whole) in request.marks
        said[request.session] = np.concatenate([request.prompt, request.output])


def shared(one: Any, other: Any) -> int:
    """Tokens that two prompts begin with alike."""
    same = min(len(one), len(other))
    equal = one[:same] == other[:same]
    return same if equal.all() else int(equal.argmin())


def test_with_memory_for_all_a_return_costs_its_question_and_the_rest_of_a_page(policy: Any) -> None:
    cell = policy.Cell("turns", 4096, 4, requests=60)
    full = policy.priced(policy.settings_of(FLASH, cell, "full", "device", 0.02), cell, "device", RATES)
    none = policy.priced(policy.settings_of(FLASH, cell, "none", "device", 0.02), cell, "device", RATES)
    assert 512 * RATES[0] < full.compute < (512 + 128 + 8) * 1.01 * RATES[0]
    rebuilt = none.compute - full.compute
    assert 0.9 * 2700 * RATES[0] < rebuilt < 1.1 * 2900 * RATES[0], "a trapezoid of 43 layers at each return"
    assert full.fetch == full.down == none.fetch == 0.0


@pytest.mark.parametrize("tier", ["host", "nvme", "objects"])
def test_below_the_device_a_return_waits_for_its_bytes(policy: Any, tier: str) -> None:
    cell = policy.Cell("turns", 4096, 40, requests=120)
    found = policy.priced(policy.settings_of(FLASH, cell, "adaptive", tier, 0.1), cell, tier, RATES)
    rate = policy.TIERS[tier]
    assert 0 <= found.fetch <= 2 * rate.latency + 2 * 6144 * 3850 / rate.bandwidth
    assert (found.fetch > 0) == (tier != "objects"), "a slow store is not asked where computing is quicker"
    assert (found.down > 0) == (tier == "host")
