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


@pytest.mark.parametrize(("rows", "parts", "rest"), [(64, 1, 2624), (128, 1, 0), (64, 2, 0), (128, 2, 0)])
def test_products_of_dozens_of_rows_do_not_wait_for_each_other(rows: int, parts: int, rest: int) -> None:
    """And what they need of shared memory is there."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from triptych.kernels.attend_rows.triton import INTERPRETED
    from triptych.kernels.linear.dozens import products
    from triptych.kernels.linear.dozens_rows import GROUPED, planned, tiling_of

    if INTERPRETED:
        pytest.skip("the interpreter has taken the compiler's place")
    tiling = GROUPED if parts == 2 else tiling_of(rows, 4096)
    plan = planned(4096, 1536, 1536 + rest, 132, tiling)
    sizes = {"K": 4096, "OUT": 1536 + rest, "LATENT": 1536, "GROUP": 512, "N": rows, "PARTS": parts}
    sizes |= {"STAGES": plan.places(tiling, rows, parts), "SHARERS": plan.sharers}
    sizes |= dict(zip(("CHUNK", "CHUNKS"), plan.chunks(tiling, rows), strict=True))
    sizes |= {"TALL": tiling.tall, "DEEP": tiling.deep, "TURNED": tiling.turned, "ROUND": parts == 2}
    blocks = {"w": tiling.tall, "rest": tiling.tall, "x": rows, "wide": rows}
    signature = {name: _type(name, sizes) for name in products.arg_names}
    for name, tall in blocks.items():
        kind, wide, bits = ("bf16", 64, 16) if rest and name in ("rest", "wide") else ("fp8e4nv", 128, 8)
        signature[name] = f"tensordesc<{kind}[{tall}, {wide}],{gl.NVMMASharedLayout(128, bits)!r}>"
    signature |= {"out_ptr": "*fp8e4nv" if parts == 2 else "*fp32", "count_ptr": "*i32"}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(products.arg_names) if name.endswith("_ptr")}
    source = GluonASTSource(products, signature, sizes, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assembler = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-", "-o", "/dev/null"]
    said = subprocess.run(assembler, input=made.asm["ptx"], capture_output=True, text=True, check=True).stderr
    assert "Used" in said and "serialized" not in said, said
    assert made.metadata.shared <= 227 << 10


def _type(name: str, sizes: dict[str, int]) -> str:
    if name in sizes:
        return "constexpr"
    return "*" + POINTERS.get(name[:-4], "fp32") if name.endswith("_ptr") else "i32"
