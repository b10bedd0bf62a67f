"""These tests need an NVIDIA GPU: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is marked gpu, and skipped where there is none."""
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="torch sees no NVIDIA GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Near-ties are never passed over silently."""
    from gpu_answers import TOTAL

    if TOTAL.tokens:
        terminalreporter.write_line(
            f"gpu: {TOTAL.tokens:,} greedy tokens compared with the processor's, {TOTAL.ties} near-ties "
            f"(widest gap {TOTAL.widest:.2g} nats)"
        )
