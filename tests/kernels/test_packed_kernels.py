"""Kernels that read packed caches, in Triton's interpreter; tests/gpu has them on a GPU at true sizes."""

from __future__ import annotations

from in_interpreter import rows_of


def test_kernels_over_packed_caches_equal_their_references_in_the_interpreter() -> None:
    results = rows_of("packed_cases.py")
    assert len(results) > 12
    assert not [result for result in results if not result["ok"]]
