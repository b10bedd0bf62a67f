"""Weights of few rows in the registers in which the tensor cores want them, expanded on the way.

A product's columns may be summed in any order, as long as both operands agree on it. The order here is one in which
each thread's fragment of m16n8k16 is contiguous in memory: of 128 columns a thread holds 32 in a row. So each weight is
read once, by 16-byte loads:

    thread c of 4, columns 32c + 4t + 2h + j   ->   slot 16t + 8h + 2c + j of the 128

Both operands are f16, in which e4m3 values are exact. (Hopper has no e4m3 product of
this kind: the compiler would convert to f16 element by element.)
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ASM_FP8: Any = gl.constexpr(
    """
{
.reg .b16 l, h;
.reg .b32 a, b;
mov.b32 {l, h}, $4;
cvt.rn.f16x2.e4m3x2 a, l;
cvt.rn.f16x2.e4m3x2 b, h;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
}
"""
)
"""Four e4m3 ($4) to f16."""


@gluon.constexpr_function
def mma_layout(warps):
    """Accumulators [16 * warps.., N] of m16n8k16, the warps one above the other."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])


@gluon.constexpr_function
def weight_layout():
    """Words [64, 32], 128 columns of FP8 weights, in four warps: a thread has eight in a row of two rows."""
    mine = [[0, 1], [0, 2], [0, 4], [8, 0]]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(mine, lanes, [[16, 0], [32, 0]], [], [64, 32])


@gluon.jit
def from_fp8(packed, ROWS: gl.constexpr, MMA: gl.constexpr):
    """packed [ROWS, 4, 8] int32 -> the left operand, f16 [ROWS, 128]."""
    a, b, c, d = gl.inline_asm_elementwise(
        ASM_FP8, "=h,=h,=h,=h,r", [packed], dtype=(gl.float16,) * 4, is_pure=True, pack=1
    )
    parts = gl.join(gl.join(a, b), gl.join(c, d))  # row, thread, word, j, h
    slots = gl.reshape(gl.permute(parts, (0, 2, 4, 1, 3)), [ROWS, 128])
    return gl.convert_layout(slots, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def from_rows(x, N: gl.constexpr, MMA: gl.constexpr):
    """Activations x [N, 4, 32], f16 -> the right operand [128, N]."""
    slots = gl.reshape(gl.permute(gl.reshape(x, [N, 4, 8, 2, 2]), (2, 3, 1, 4, 0)), [128, N])
    return gl.convert_layout(slots, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)
