"""Cache managers of vLLM and SGLang beside ours: the same trace, the same bytes, the same order of events."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """python -m benchmarks peers TRACE --peers DIR [options]; see run.py."""
    from benchmarks.peers.run import main as run

    return run(argv)
