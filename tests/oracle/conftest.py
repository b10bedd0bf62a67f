"""References are computed once a session: Transformers is the slow part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from v4_choices import TOTAL
from v4_configs import CONFIGS, OracleConfig, write_checkpoint
from v4_driver import load
from v4_reference import Reference, compute_reference

from triptych.model.weights import ModelWeights

Case = tuple[ModelWeights, Reference]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """case(name): our weights and Transformers' results for that configuration, from one checkpoint directory."""
    known: dict[str, Case] = {}
    configs: dict[str, OracleConfig] = {config.name: config for config in CONFIGS}

    def get(name: str) -> Case:
        if name not in known:
            directory: Path = tmp_path_factory.mktemp(name)
            write_checkpoint(directory, configs[name])
            known[name] = load(directory), compute_reference(directory, configs[name])
        return known[name]

    return get


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Near-ties are never passed over silently."""
    if TOTAL.choices:
        t = TOTAL
        terminalreporter.write_line(
            f"oracle: {t.positions:,} positions, largest logit difference {t.error:.1g}; {t.choices:,} choices of "
            f"entries and experts, {t.ties} of them near-ties (widest gap {t.widest:.1g}) resolved as in Transformers"
        )
