"""What the compiler makes of kernels for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from types import ModuleType

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
    said = _assembler_says(triton, made.asm["ptx"])
    assert "Used" in said and "serialized" not in said, said


@pytest.mark.parametrize("most", [128, 192, 640, 1152, 2176, 8320])
def test_few_rows_of_attention_ask_for_all_of_their_keys_at_once(most: int) -> None:
    """The assembler would ask for the last of them when the first have come; and programs have room side by side."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from triptych.kernels.attend_rows import together
    from triptych.kernels.attend_rows.triton import INTERPRETED

    if INTERPRETED:
        pytest.skip("the interpreter has taken the compiler's place")
    kernel, mode = together.attend, {128: 0, 640: 1}.get(most, 2)
    tilings = [together.tiling_for(rows, 64, most, 132) for rows in range(1, 9)]
    for rows, tiling in enumerate(tilings, 1):
        if tiling is not None:
            splits = max(tiling.slices, -(-most // tiling.keys))
            assert splits * 64 // tiling.heads * rows <= 132
            together.shape_of(tiling, most)
    assert tilings[0] is not None
    sizes = together.shape_of(tilings[0], most) | {"MODE": mode, "PER_PAGE": 32 if mode == 1 else 1, "RING": 260}
    signature = {name: _type(name, sizes) for name in kernel.arg_names} | {"scale": "fp32", "eps": "fp32"}
    signature |= dict.fromkeys(("heads_ptr", "out_ptr"), "*bf16")
    signature |= dict.fromkeys(("sums_ptr", "shares_ptr"), "*i32")
    signature |= dict.fromkeys(("ring_ptr", "pool_ptr", "ring_scales_ptr", "pool_scales_ptr"), "*u8")
    names = [n for n, name in enumerate(kernel.arg_names) if name.endswith("_ptr") or name == "heads_row"]
    source = GluonASTSource(kernel, signature, sizes, {(n,): [["tt.divisibility", 16]] for n in names})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    said = _assembler_says(triton, made.asm["ptx"])
    assert "0 bytes spill stores" in said and "serialized" not in said, said
    code = _disassembled(triton, made.asm["ptx"])
    # of each key 9 pieces, and the queries and their angles
    asked = tilings[0].keys // 64 * 9 + tilings[0].heads // 8 * 2
    assert code[: code.index("HGMMA")].count("LDG.E.128") >= asked
    waits = code.index("BAR.SYNC")
    assert code[waits : code.index("HGMMA")].count("LDG") == 0


@pytest.mark.parametrize(("pairs", "blocks", "stages", "registers", "programs"), [(1, 2, 5, 128, 4), (2, 4, 2, 96, 5)])
def test_many_programs_of_experts_fit_a_multiprocessor(
    pairs: int, blocks: int, stages: int, registers: int, programs: int
) -> None:
    """With the tilings of one row and of a few: what is on its way for all of them hides the memory's latency."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from triptych.kernels.attend_rows.triton import INTERPRETED
    from triptych.kernels.moe.joined import experts

    if INTERPRETED:
        pytest.skip("the interpreter has taken the compiler's place")
    sizes = {"DIM": 4096, "INNER": 2048, "TOPK": 6, "PAIRS": pairs, "TALL": pairs, "KS": blocks}
    sizes |= {"STAGES": stages, "PARTS": 2, "SHARED_STAGES": stages * blocks // 2}
    signature = {name: _type(name, sizes) for name in experts.arg_names} | {"limit": "fp32", "out_ptr": "*bf16"}
    signature |= {f"{name}_ptr": "*u8" for name in ("x", "top13", "top2")}
    signature |= {f"{name}_ptr": "*i32" for name in ("tile", "order", "ready", "count")}
    deep = {rank: gl.NVMMASharedLayout(128, 8, rank=rank) for rank in (2, 3, 4)}
    narrow = deep[3] if blocks == 4 else gl.NVMMASharedLayout(0, 8, rank=3)
    for matrix in ("13", "2"):
        signature[f"values{matrix}"] = f"tensordesc<u8[1, {blocks * 32}, 128],{deep[3]!r}>"
        signature[f"scales{matrix}"] = f"tensordesc<u8[1, {blocks * 2}, 128],{narrow!r}>"
    signature["shared13"] = f"tensordesc<fp8e4nv[4, 2, 8, 128],{deep[4]!r}>"
    signature["shared2"] = f"tensordesc<fp8e4nv[64, 128],{deep[2]!r}>"
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(experts.arg_names) if name.endswith("_ptr")}
    options = {"num_warps": 4, "maxnreg": registers}
    made = triton.compile(GluonASTSource(experts, signature, sizes, aligned), GPUTarget("cuda", 90, 32), options)
    assert programs * (made.metadata.shared + 1024) <= 228 * 1024
    said = _assembler_says(triton, made.asm["ptx"])
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled and int(spilled[1]) <= 32, said


def test_all_products_with_mxfp4_keys_are_made_and_none_waits_for_another() -> None:
    """An assembler has dropped products before whose left operands are registers; the kernel was fast, and wrong."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from triptych.kernels.attend_rows.triton import INTERPRETED
    from triptych.kernels.select_rows.mxfp4 import scores

    if INTERPRETED:
        pytest.skip("the interpreter has taken the compiler's place")
    sizes = {"PER_PAGE": 32, "ROUNDS": True, "ROPE": 64, "LEVELS": 3, "WIDE": 4096, "WARPS": 8}
    signature = {name: _type(name, sizes) for name in scores.arg_names} | {"q_ptr": "*bf16"}
    whole = ("words_ptr", "codes_ptr", "out_ptr", "tops_ptr", "done_ptr", "scratch_ptr")
    signature |= dict.fromkeys(whole, "*i32") | {"seq_ptr": "*i64"}
    aligned = {
        (n,): [["tt.divisibility", 16]]
        for n, name in enumerate(scores.arg_names)
        if name.endswith("_ptr") and name != "codes_ptr"
    }
    source = GluonASTSource(scores, signature, sizes, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "maxnreg": 128})
    said = _assembler_says(triton, made.asm["ptx"])
    assert "0 bytes spill stores" in said and "serialized" not in said, said
    products = made.asm["ptx"].count("wgmma.mma_async")
    assert products == 8 and made.asm["sass"].count("QGMMA") == products


def test_a_site_asks_for_all_weights_before_it_waits() -> None:
    """The assembler would put off loads to save registers: then each waits for the memory anew."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from triptych.kernels.attend_rows.triton import INTERPRETED
    from triptych.kernels.moe.together import site_and_router

    if INTERPRETED:
        pytest.skip("the interpreter has taken the compiler's place")
    sizes = {"ITERS": 20, "HASHED": False, "COUNT": 256, "EXPERTS": 256, "EACH": 16, "TOPK": 6, "SLICES": 8}
    signature = {name: _type(name, sizes) for name in site_and_router.arg_names}
    kinds = {"*bf16": ("y", "before", "streams"), "*i64": ("meet", "table", "token"), "*fp8e4nv": ("values",)}
    kinds["*i32"] = ("launch", "tile", "order")
    signature |= {f"{name}_ptr": kind for kind, names in kinds.items() for name in names}
    signature |= {"scaling": "fp32", "eps": "fp32", "norm_eps": "fp32"}
    names = [n for n, name in enumerate(site_and_router.arg_names) if name.endswith("_ptr") or name == "dim"]
    source = GluonASTSource(site_and_router, signature, sizes, {(n,): [["tt.divisibility", 16]] for n in names})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    code = _disassembled(triton, made.asm["ptx"])
    maps, gate = 2 * 4, 16 * 512 // (128 * 4)
    assert code[: code.index("ATOMG")].count("LDG.E.128") >= maps + gate


def _assembler_says(triton: ModuleType, ptx: str) -> str:
    """Registers, spills and warnings of `ptx`."""
    assembler = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-", "-o", "/dev/null"]
    return subprocess.run(assembler, input=ptx, capture_output=True, text=True, check=True).stderr


def _disassembled(triton: ModuleType, ptx: str) -> str:
    """What the assembler makes of `ptx`."""
    with tempfile.TemporaryDirectory() as folder:
        made = f"{folder}/made.cubin"
        subprocess.run(
            [triton.knobs.nvidia.ptxas.path, "--gpu-name=sm_90a", "-", "-o", made], input=ptx, text=True, check=True
        )
        read = [triton.knobs.nvidia.cuobjdump.path, "-sass", made]
        return subprocess.run(read, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("rows", "rest"), [(64, 2624), (128, 0)])
def test_products_of_dozens_of_rows_do_not_wait_for_each_other(rows: int, rest: int) -> None:
    """And what they need of shared memory is there."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from triptych.kernels.attend_rows.triton import INTERPRETED
    from triptych.kernels.linear.dozens import products
    from triptych.kernels.linear.dozens_rows import planned, tiling_of

    if INTERPRETED:
        pytest.skip("the interpreter has taken the compiler's place")
    tiling = tiling_of(rows, (1536, 4096), 1536 + rest, 132)
    plan = planned(4096, 1536, 1536 + rest, 132, tiling)
    sizes = {"K": 4096, "OUT": 1536 + rest, "LATENT": 1536, "N": rows}
    sizes |= {"STAGES": plan.places(tiling, rows), "SHARERS": plan.sharers}
    sizes |= dict(zip(("CHUNK", "CHUNKS"), plan.chunks(tiling, rows), strict=True))
    sizes |= {"TALL": tiling.tall, "DEEP": tiling.deep, "TURNED": tiling.turned}
    blocks = {"w": tiling.tall, "rest": tiling.tall, "x": rows, "wide": rows}
    signature = {name: _type(name, sizes) for name in products.arg_names}
    for name, tall in blocks.items():
        kind, wide, bits = ("bf16", 64, 16) if rest and name in ("rest", "wide") else ("fp8e4nv", 128, 8)
        signature[name] = f"tensordesc<{kind}[{tall}, {wide}],{gl.NVMMASharedLayout(128, bits)!r}>"
    signature |= {"out_ptr": "*fp32", "count_ptr": "*i32"}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(products.arg_names) if name.endswith("_ptr")}
    source = GluonASTSource(products, signature, sizes, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    said = _assembler_says(triton, made.asm["ptx"])
    assert "Used" in said and "serialized" not in said, said
    assert made.metadata.shared <= 227 << 10


@pytest.mark.parametrize(("rows", "split"), [(32, 2), (64, 1), (128, 2)])
def test_all_products_of_rows_that_are_not_rounded_are_made_and_none_waits_for_another(rows: int, split: int) -> None:
    """Their left operands are registers, as those of MXFP4 keys above."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from triptych.kernels.attend_rows.triton import INTERPRETED
    from triptych.kernels.linear.grouped import products
    from triptych.kernels.linear.grouped_rows import stages

    if INTERPRETED:
        pytest.skip("the interpreter has taken the compiler's place")
    sizes = {"K": 4096, "OUT": 8192, "GROUP": 1024, "SPLIT": split, "N": rows, "STAGES": stages(rows), "ROUND": True}
    signature = {name: _type(name, sizes) for name in products.arg_names}
    signature |= {"out_ptr": "*fp8e4nv", "count_ptr": "*i32"}
    signature["w"] = f"tensordesc<fp8e4nv[128, 128],{gl.NVMMASharedLayout(128, 8)!r}>"
    signature["x"] = f"tensordesc<bf16[{rows}, 128],{gl.NVMMASharedLayout(128, 16)!r}>"
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(products.arg_names) if name.endswith("_ptr")}
    source = GluonASTSource(products, signature, sizes, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    said = _assembler_says(triton, made.asm["ptx"])
    assert "0 bytes spill stores" in said and "serialized" not in said, said
    asked = made.asm["ptx"].count("wgmma.mma_async")
    assert asked == 2 * 2 * 8 and made.asm["sass"].count("HGMMA") == asked
    assert made.metadata.shared <= 227 << 10


@pytest.mark.parametrize(("rows", "outputs", "columns"), [(64, 40960, 1024), (128, 40960, 1024), (64, 65536, 1536)])
def test_products_of_rows_at_hand_do_not_wait_for_each_other(rows: int, outputs: int, columns: int) -> None:
    """And what they need of shared memory is there."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from triptych.kernels.attend_rows.triton import INTERPRETED
    from triptych.kernels.linear.wide import products
    from triptych.kernels.linear.wide_rows import planned

    if INTERPRETED:
        pytest.skip("the interpreter has taken the compiler's place")
    plan = planned(outputs, columns, rows, 132)
    sizes = {"K": columns, "OUT": outputs, "N": rows, "STAGES": plan.stages, "MANY": plan.many}
    signature = {name: _type(name, sizes) for name in products.arg_names} | {"out_ptr": "*bf16"}
    for name, tall in (("w", 64), ("x", rows)):
        signature[name] = f"tensordesc<fp8e4nv[{tall}, 128],{gl.NVMMASharedLayout(128, 8)!r}>"
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(products.arg_names) if name.endswith("_ptr")}
    source = GluonASTSource(products, signature, sizes, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    said = _assembler_says(triton, made.asm["ptx"])
    assert "0 bytes spill stores" in said and "serialized" not in said, said
    assert made.asm["sass"].count("QGMMA") == made.asm["ptx"].count("wgmma.mma_async") == 2 * 2 * 4
    assert made.asm["sass"].count("STG.E.128") == 2 * rows // 16
    assert made.metadata.shared <= 227 << 10


def test_frames_come_up_by_sixteen_bytes_and_leave_most_registers_to_others() -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from triptych.kernels.attend_rows.triton import INTERPRETED
    from triptych.kernels.frames import triton as frames

    if INTERPRETED:
        pytest.skip("the interpreter has taken the compiler's place")
    words = 492_832 // 8
    sizes = {"WORDS": words, "SOURCE": words, "TARGET": words, "LINE": 16, "BLOCK": frames._BLOCK // 8, "EVEN": 2}
    kernel = frames._bring_up
    signature = {name: "constexpr" if name in sizes else "*i64" for name in kernel.arg_names} | {"count": "i32"}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
    options = {"num_warps": frames._WARPS}
    made = triton.compile(ASTSource(kernel, signature, sizes, aligned), GPUTarget("cuda", 90, 32), options)
    code = _disassembled(triton, made.asm["ptx"])
    asked = frames._BLOCK // (frames._WARPS * 32 * 16)
    assert code.count("LDG.E.128.STRONG.GPU") == code.count("STG.E.128") == asked
    assert code[: code.index("STG.E.128")].count("LDG.E.128.STRONG.GPU") == asked, "all are on their way at once"
    said = _assembler_says(triton, made.asm["ptx"])
    used = re.search(r"Used (\d+) registers", said)
    assert used and int(used[1]) * frames._WARPS * 32 <= 65536 // 8


def _type(name: str, sizes: dict[str, int]) -> str:
    if name in sizes:
        return "constexpr"
    return "*" + POINTERS.get(name[:-4], "fp32") if name.endswith("_ptr") else "i32"
