"""Matrices as released stand for what the formats say, and products over them for what native numerics say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from triptych.kernels.linear import cpu, ref
from triptych.kernels.moe import ref as moe_ref
from triptych.kernels.moe.ref import Experts, Router
from triptych.kernels.norm.ref import rms_norm
from triptych.kernels.quant.matrices import (
    BothRows,
    Fp8Matrix,
    Fp8Rows,
    FrontMatrix,
    Mxfp4Matrix,
    Unnormed,
    quantize_rows,
)
from triptych.kernels.quant.ref import (
    dequantize_fp8,
    dequantize_mxfp4,
    e8m0_decode,
    fake_quant_fp8,
    quantize_fp8,
    quantize_mxfp4,
)
from triptych.kernels.quant.tiles import tile_values


def fp8(rows: int, columns: int, seed: int = 0) -> Fp8Matrix:
    values, codes = quantize_fp8(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    return Fp8Matrix(values, e8m0_decode(codes))


def mxfp4(count: int, rows: int, columns: int, seed: int = 0) -> Mxfp4Matrix:
    dense = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed)) * columns**-0.5
    values, codes = quantize_mxfp4(dense)
    return Mxfp4Matrix(values.view(torch.uint8), codes)


@pytest.mark.parametrize("size", [(128, 128), (200, 300), (64, 96)])
def test_fp8_matrices_are_their_blocks(size: tuple[int, int]) -> None:
    matrix = fp8(*size)
    assert torch.equal(matrix.dequantize(), dequantize_fp8(matrix.values, matrix.scales))
    assert matrix.shape == size


def test_rows_of_an_fp8_matrix_keep_their_scales() -> None:
    matrix = fp8(400, 256)
    part = matrix.rows(128, 300)
    assert torch.equal(part.dequantize(), matrix.dequantize()[128:300])


def test_mxfp4_matrices_are_their_groups() -> None:
    stack = mxfp4(3, 20, 64)
    assert stack.shape == (3, 20, 64)
    assert torch.equal(stack.dequantize()[1], dequantize_mxfp4(stack.values[1], stack.scales[1]))
    assert torch.equal(stack.one(2).dequantize(), stack.dequantize()[2])


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("size", [(64, 128), (192, 384), (128, 512)])
def test_tiles_hold_what_was_put_into_them(size: tuple[int, int], paired: bool) -> None:
    stack = mxfp4(2, *size)
    stack.scales[1, 3] = torch.randint(0, 254, (size[1] // 32,), dtype=torch.uint8)
    want = stack.dequantize()
    tiled = stack.in_tiles(paired)
    assert tiled.shape == stack.shape
    assert torch.equal(tiled.dequantize(), want)
    assert torch.equal(tiled.one(1).dequantize(), want[1])


def test_a_tile_is_what_threads_multiply() -> None:
    """Word i of thread (warp w, row r, scale c) of a half of rows, against the columns that tiles.py says it has."""
    values = torch.randint(0, 256, (64, 64), dtype=torch.uint8)
    codes = torch.stack([values & 15, values >> 4], -1).view(64, 128).int()
    words = tile_values(values, paired=False).flatten().view(torch.int32)
    for half, w, r, c, i in ((0, 0, 0, 0, 0), (1, 2, 5, 3, 1), (0, 3, 7, 1, 3)):
        word = int(words[(half * 128 + w * 32 + r * 4 + c) * 4 + i]) & 0xFFFFFFFF
        for h in range(2):
            for place in range(4):
                magnitude = word >> (16 * h + 4 * place) & 7
                sign = word >> (8 * place + (3 if h else 7)) & 1
                assert codes[16 * w + 8 * half + r, 32 * c + 8 * i + 4 * h + place] == 8 * sign + magnitude


@pytest.mark.parametrize("width", [64, 128, 300])
def test_quantised_rows_are_native_inputs_to_the_bit(width: int) -> None:
    x = torch.randn(9, width) * torch.logspace(-8, 6, 9)[:, None]
    x[3] = 0.0
    assert torch.equal(quantize_rows(x).dequantize(), fake_quant_fp8(x))


def test_an_fp8_linear_rounds_its_input_once() -> None:
    x, matrix = torch.randn(5, 256), fp8(64, 256)
    want = fake_quant_fp8(x) @ matrix.dequantize().T
    for linear in (ref.linear, cpu.linear, cpu.linear_deterministic):
        torch.testing.assert_close(linear(x, matrix), want)
        torch.testing.assert_close(linear(fake_quant_fp8(x), matrix), want)
    rows: Fp8Rows = quantize_rows(x)
    assert ref.linear(rows, matrix).dtype == torch.bfloat16


def test_the_front_rounds_only_what_the_latent_reads() -> None:
    x = torch.randn(3, 256)
    front = FrontMatrix(fp8(128, 256), torch.randn(40, 256).to(torch.bfloat16))
    got = ref.front_linear(x, front)
    assert torch.equal(got[:, :128], ref.linear(x, front.latent).to(torch.bfloat16).float())
    torch.testing.assert_close(got[:, 128:], x @ front.rest.float().T)


def test_the_grouped_linear_rounds_nothing() -> None:
    matrix = fp8(3 * 128, 256)
    grouped = Fp8Matrix(matrix.values.view(3, 128, 256), matrix.scales.view(3, 1, 2))
    x = torch.randn(4, 3, 256)
    want = torch.einsum("rgi,goi->rgo", x, grouped.dequantize()).flatten(1)
    torch.testing.assert_close(ref.grouped_linear(x, grouped), want)


def test_products_of_rounded_rows_are_those_of_rows_that_they_round() -> None:
    x = torch.randn(3, 256).to(torch.bfloat16)
    front = FrontMatrix(fp8(128, 256), torch.randn(40, 256).to(torch.bfloat16))
    assert torch.equal(ref.front_linear(BothRows(x, quantize_rows(x)), front), ref.front_linear(x, front))
    assert torch.equal(ref.linear(quantize_rows(x), front.latent), ref.linear(x, front.latent))


def test_a_product_norms_a_row_that_was_left_to_it() -> None:
    columns, norm, weight = torch.randn(1, 256), torch.rand(256) + 0.5, fp8(128, 256)
    normed = rms_norm(columns.to(torch.bfloat16).float(), norm, 1e-6).to(torch.bfloat16)
    assert torch.equal(ref.normed(Unnormed(columns, norm, 1e-6)), normed)
    assert torch.equal(ref.linear(Unnormed(columns, norm, 1e-6), weight), ref.linear(normed, weight))


@pytest.mark.parametrize("run", [ref.grouped_linear, cpu.grouped_linear])
def test_the_grouped_linear_rounds_its_result_for_who_would_round_it(run: Callable[..., Tensor | Fp8Rows]) -> None:
    matrix = fp8(3 * 128, 256)
    grouped = Fp8Matrix(matrix.values.view(3, 128, 256), matrix.scales.view(3, 1, 2))
    x = torch.randn(4, 3, 256).to(torch.bfloat16)
    got, plain = run(x, grouped, rounds=True), run(x, grouped)
    assert isinstance(got, Fp8Rows) and isinstance(plain, Tensor)
    assert torch.equal(got.dequantize(), fake_quant_fp8(plain.float()))


@pytest.mark.parametrize("hashed", [False, True])
def test_a_mixture_of_few_rows_is_its_parts(hashed: bool) -> None:
    g = torch.Generator().manual_seed(4)
    table = torch.stack([torch.randperm(5, generator=g)[:2] for _ in range(11)])
    router = Router(
        torch.randn(5, 128, generator=g), None if hashed else torch.zeros(5), table if hashed else None, 2, 1.5
    )
    w13, w2 = mxfp4(5, 256, 128, 1), mxfp4(5, 128, 128, 2)
    shared = (fp8(256, 128), fp8(128, 128))
    x, tokens = torch.randn(6, 128, generator=g).to(torch.bfloat16), torch.randint(0, 11, (6,), generator=g)
    got = moe_ref.moe_rows(x, tokens, router, Experts(w13, w2, 10.0), shared)
    dense = Experts(w13.dequantize(), w2.dequantize(), 10.0)
    rounded = fake_quant_fp8(x.float())
    ids, weights = moe_ref.route(x.float(), tokens, router)
    want = moe_ref.experts(rounded, ids, weights, dense, fake_quant_fp8)
    want += moe_ref.shared_expert(rounded, shared[0].dequantize(), shared[1].dequantize(), 10.0, fake_quant_fp8)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.02, rtol=0.01)
