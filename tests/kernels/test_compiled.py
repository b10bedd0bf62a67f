"""What the compiler makes of kernels for a GPU that need not be there."""

from __future__ import annotations

import subprocess

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


@pytest.mark.parametrize(("mode", "flat", "whole"), [(1, False, False), (2, True, True)])
def test_products_of_attention_on_hopper_do_not_wait_for_each_other(mode: int, flat: bool, whole: bool) -> None:
    """The assembler says so where registers do not suffice; the kernel then takes twice as long."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from triptych.kernels.attend_rows.hopper import partial
    from triptych.kernels.attend_rows.triton import INTERPRETED

    if INTERPRETED:
        pytest.skip("the interpreter has taken the compiler's place")
    sizes = {"MODE": mode, "FLAT": flat, "RAW": True, "WHOLE": whole, "PER_PAGE": 32, "RING": 255, "REACH": 128}
    signature = {name: _type(name, sizes) for name in partial.arg_names} | {"heads_ptr": "*bf16", "scale": "fp32"}
    signature |= {
        "eps": "fp32",
        "ring_ptr": "*u8",
        "pool_ptr": "*u8",
        "ring_scales_ptr": "*u8",
        "pool_scales_ptr": "*u8",
    }
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(partial.arg_names) if name.endswith("_ptr")}
    source = GluonASTSource(partial, signature, sizes, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assembler = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-", "-o", "/dev/null"]
    said = subprocess.run(assembler, input=made.asm["ptx"], capture_output=True, text=True, check=True).stderr
    assert "Used" in said and "serialized" not in said, said


def _type(name: str, sizes: dict[str, int]) -> str:
    if name in sizes:
        return "constexpr"
    return "*" + POINTERS.get(name[:-4], "fp32") if name.endswith("_ptr") else "i32"
