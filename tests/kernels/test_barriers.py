"""Barriers in shared memory have it for themselves, as the compiler places them, until they are invalidated."""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

BYTES = {"i8": 1, "f8E4M3FN": 1, "bf16": 2, "f16": 2, "i32": 4, "f32": 4, "i64": 8}
KERNELS = Path(__file__).parents[2] / "src/triptych/kernels"
ALLOCATION = re.compile(r"ttg.local_alloc .*?allocation.offset = (\d+).*?memdesc<([\dx]+)x(\w+),")


@pytest.mark.parametrize(("levels", "wide", "together"), [(0, 2048, False), (1, 2048, False), (3, 4096, True)])
def test_nothing_lies_where_barriers_of_selection_are(levels: int, wide: int, together: bool) -> None:
    """A barrier that only programs that choose together wait for lay where all others count."""
    pytest.importorskip("triton")
    from triptych.kernels.attend_rows.triton import INTERPRETED

    if INTERPRETED:
        pytest.skip("the interpreter has taken the compiler's place")
    from triptych.kernels.select_rows.hopper import scores

    sizes = {"PER_PAGE": 32, "STAGES": 3, "ROUNDS": True, "ROPE": 64, "LEVELS": levels, "WIDE": wide}
    sizes |= {"TOGETHER": together, "WARPS": 8}
    types = {"q_ptr": "*bf16", "seq_ptr": "*i64", "visible_ptr": "*i64"}
    types |= dict.fromkeys(("cos_ptr", "sin_ptr", "weight_ptr"), "*fp32")
    copied = {"keys": ([1, 32, 128], 128, "u8"), "scales": ([1, 128], 0, "u8")}
    made = compiled(scores, sizes, types, copied, 168 if together else 80)
    barriers, others = placed(made)
    assert len(barriers) == 3 and len(others) >= 4
    assert not [(bar, other) for bar in barriers for other in others if overlap(bar, other)]
    assert given_back(made.asm["ptx"]) == ["fence.proxy.async", "bar.sync"]


def test_places_that_warps_load_from_are_given_back_behind_a_fence() -> None:
    """By products of rows that are not rounded; those of selection are looked at above."""
    pytest.importorskip("triton")
    from triptych.kernels.attend_rows.triton import INTERPRETED

    if INTERPRETED:
        pytest.skip("the interpreter has taken the compiler's place")
    from triptych.kernels.linear.whole import products

    sizes = {
        "K": 4096,
        "OUT": 8192,
        "GROUP": 1024,
        "SPLIT": 1,
        "TALL": 128,
        "ROUND": True,
        "N": 8,
        "KS": 2,
        "STAGES": 4,
    }
    types = {"f_ptr": "*fp32", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "part_ptr": "*fp32"}
    copied = {"w": ([64, 128], 128, "fp8e4nv"), "x": ([2, 8, 64], 128, "bf16")}
    made = compiled(products, sizes, types, copied, 255, warps=4)
    assert given_back(made.asm["ptx"]) == ["fence.proxy.async", "bar.sync"]


def given_back(ptx: str) -> list[str]:
    """What warps do before the arrival, or the copy, that lets others write where they have read."""
    found = re.findall(r"ld\.shared|fence\.proxy\.async|bar\.sync|mbarrier\.arrive|wgmma\.wait_group|mma\.sync", ptx)
    products = max(n for n, what in enumerate(found) if what in ("wgmma.wait_group", "mma.sync"))
    at = found.index("mbarrier.arrive", products)
    return found[at - 2 : at]


def test_who_initialises_barriers_invalidates_them() -> None:
    """In the same file; what stages() of stream.py gives away is up to those who asked for it."""
    found = 0
    for path in KERNELS.rglob("*.py"):
        source = path.read_text()
        for name in set(re.findall(r"mbarrier\.init\((\w+)", source)):
            found += 1
            if path.name in ("stream.py", "many.py"):
                continue
            assert re.search(rf"(forget|mbarrier\.invalidate)\({name}\b", source), f"{path.name}: {name}"
    assert found > 15
    for name, ends in {"moe/few.py": 2, "moe/joined.py": 2, "moe/many.py": 2}.items():
        source = (KERNELS / name).read_text()
        assert len(re.findall(r"= _?stages\(", source)) == len(re.findall(r" forget\(", source)) == ends


def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether half-open ranges meet."""
    return a[0] < b[1] and b[0] < a[1]


def compiled(
    kernel: Any,
    sizes: dict[str, Any],
    types: dict[str, str],
    copied: dict[str, tuple[list[int], int, str]],
    registers: int,
    warps: int = 8,
) -> Any:
    """A kernel compiled for Hopper. `copied`: blocks, swizzles and types of descriptors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    def of(name: str) -> str:
        if name in copied:
            block, swizzle, kind = copied[name]
            width = 16 if kind == "bf16" else 8
            return f"tensordesc<{kind}{block},{gl.NVMMASharedLayout(swizzle, width, rank=len(block))!r}>"
        return "constexpr" if name in sizes else types.get(name, "*i32" if name.endswith("_ptr") else "i32")

    source = GluonASTSource(kernel, {name: of(name) for name in kernel.arg_names}, sizes, {})
    options = {"num_warps": warps, "maxnreg": registers}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def placed(made: Any) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where a compiled kernel has barriers, and where everything else in shared memory: half-open ranges of bytes.

    Of scratch only the first four bytes are known.
    """
    from triton._C.libtriton import ir, nvidia, passes
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    context = ir.context()
    ir.load_dialects(context)
    CUDABackend(GPUTarget("cuda", 90, 32)).load_dialects(context)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ttgir"
        path.write_text(made.asm["ttgir"])
        module = ir.parse_mlir_module(str(path), context)
    manager = ir.pass_manager(context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, 90, 88)
    manager.run(module, "placed")
    return ranges(str(module))


def ranges(module: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Of barriers and of all else in a module whose shared memory is placed."""
    barriers, others = [], []
    for line in module.splitlines():
        found = ALLOCATION.search(line)
        if found:
            start = int(found[1])
            size = math.prod(map(int, found[2].split("x"))) * BYTES[found[3]]
            (barriers if found[3] == "i64" else others).append((start, start + size))
        elif scratch := re.search(r"allocation.offset = (\d+)", line):
            others.append((int(scratch[1]), int(scratch[1]) + 4))
    return barriers, others
