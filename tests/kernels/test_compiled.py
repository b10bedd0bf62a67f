"""What the compiler makes of kernels for a GPU that need not be there."""

from __future__ import annotations

import pytest

POINTERS = {"slots": "i64", "positions": "i64", "lowest": "i64", "table": "i32", "visible": "i64", "chosen": "i32"}


@pytest.mark.parametrize(("width", "splits", "taken"), [(128, 16, 16), (128, 128, 16), (512, 2, 2)])
def test_splits_are_weighed_without_shared_memory(width: int, splits: int, taken: int) -> None:
    """Threads that hold copies of a value would all write it to one place, which racecheck takes for a race."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from triptych.kernels.attend_rows.triton import INTERPRETED, _combine

    if INTERPRETED:
        pytest.skip("the interpreter has taken the compiler's place")
    sizes = {"MODE": 1, "FLAT": False, "RAW": True, "REACH": 128, "DIM": 512, "ROPE": 64}
    sizes |= {"WIDTH": width, "SPLITS": splits, "TAKEN": taken, "EARLY": True}
    signature = {name: _type(name, sizes) for name in _combine.arg_names}
    source = ASTSource(_combine, signature, sizes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    assert made.metadata.shared == 0


def _type(name: str, sizes: dict[str, int]) -> str:
    if name in sizes:
        return "constexpr"
    return "*" + POINTERS.get(name[:-4], "fp32") if name.endswith("_ptr") else "i32"
