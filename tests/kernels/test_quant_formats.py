"""FP8, MXFP4 and their scales against exact arithmetic: grids, ties, ends of the range, ragged shapes, round trips."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from triptych.kernels.quant import ref

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [v for v in torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist() if not math.isnan(v)]
FLOATS = st.floats(-(2.0**127), 2.0**127, width=32)  # rounding up must not leave float32
SIZES = [1, 3, 31, 32, 33, 63, 64, 127, 128, 129, 200]


def nearest_on(grid: list[float], x: Fraction) -> list[float]:
    """The grid values nearest to x >= 0: one, or two on a tie."""
    best = min(abs(Fraction(g) - x) for g in grid)
    return [g for g in grid if abs(Fraction(g) - x) == best]


def seeded(*size: int, seed: int = 0) -> Tensor:
    """Normal values whose magnitudes range over many powers of two."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-20, 8, size, generator=generator)
    return torch.randn(size, generator=generator) * 2.0**exponents


# -- scales


def test_e8m0_codes_are_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = ref.e8m0_decode(codes)
    assert torch.equal(values[:255], codes[:255].view(torch.float8_e8m0fnu).float())
    assert torch.isnan(values[255])
    assert torch.equal(ref.e8m0_encode(values), codes)
    assert values[0].item() == 2.0**-127 and values[254].item() == 2.0**127


@pytest.mark.parametrize("value", [0.0, -1.0, 3.0, math.inf, math.nan, 2.0**-128])
def test_what_is_no_power_of_two_has_no_e8m0_code(value: float) -> None:
    assert ref.e8m0_encode(torch.tensor([value])).item() == ref.E8M0_NAN


@given(amax=st.floats(0, width=32, allow_infinity=False), top=st.sampled_from([ref.FP8_MAX, ref.FP4_MAX]))
def test_a_scale_is_the_smallest_power_of_two_that_fits(amax: float, top: float) -> None:
    scale = Fraction(ref.e8m0_decode(ref.scale_codes(torch.tensor([amax]), top)).item())
    assert Fraction(amax) <= Fraction(top) * scale
    assert scale == Fraction(2.0**-126) or Fraction(amax) > Fraction(top) * scale / 2


@pytest.mark.parametrize("top", [ref.FP8_MAX, ref.FP4_MAX])
@pytest.mark.parametrize("power", [-126, -22, -1, 0, 1, 17, 100])
def test_scales_are_exact_at_the_boundary(top: float, power: int) -> None:
    """log2 and ceil in floating point get some of these wrong."""
    limit = torch.tensor([top * 2.0**power])
    above, below = (torch.nextafter(limit, torch.tensor([side])) for side in (math.inf, 0.0))
    assert [ref.scale_codes(x, top).item() - 127 for x in (below, limit, above)] == [power, power, power + 1]


def test_small_activations_share_a_floor() -> None:
    """1e-4 / 448 lies between 2^-23 and 2^-22."""
    codes = ref.scale_codes(torch.tensor([0.0, 1e-30, 1e-4]), ref.FP8_MAX, ref.ACTIVATION_FLOOR)
    assert codes.tolist() == [127 - 22] * 3


# -- fake quantisation


@given(st.lists(FLOATS, min_size=1, max_size=9))
def test_fp8_rounds_to_the_nearest_grid_value(values: list[float]) -> None:
    x = torch.tensor(values)
    scale = Fraction(ref.e8m0_decode(ref.scale_codes(x.abs().amax().view(1), ref.FP8_MAX, ref.ACTIVATION_FLOOR)).item())
    for given_value, rounded in zip(x.tolist(), ref.fake_quant_fp8(x, 128).tolist(), strict=True):
        expected = nearest_on(E4M3, abs(Fraction(given_value)) / scale)
        assert abs(Fraction(rounded)) / scale in [Fraction(g) for g in expected]
        assert math.copysign(1, rounded) == math.copysign(1, given_value)


@given(st.lists(FLOATS, min_size=1, max_size=9))
def test_fp4_rounds_to_the_nearest_grid_value(values: list[float]) -> None:
    x = torch.tensor(values)
    scale = Fraction(ref.e8m0_decode(ref.scale_codes(x.abs().amax().view(1), ref.FP4_MAX)).item())
    for given_value, rounded in zip(x.tolist(), ref.fake_quant_fp4(x, 32).tolist(), strict=True):
        expected = nearest_on(E2M1, abs(Fraction(given_value)) / scale)
        assert abs(Fraction(rounded)) / scale in [Fraction(g) for g in expected]


def test_fp4_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert ref.round_e2m1(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert ref.round_e2m1(-ties).tolist() == [-0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]


def test_fp8_ties_go_to_the_even_mantissa() -> None:
    x = torch.tensor([448.0, 17.0, 19.0, 0.5 + 2.0**-5, 3 * 2.0**-10, 2.0**-10])
    assert ref.fake_quant_fp8(x, 8).tolist() == [448.0, 16.0, 20.0, 0.5, 2.0**-8, 0.0]


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize(
    ("quantise", "group"), [(ref.fake_quant_fp8, 128), (ref.fake_quant_fp8, 64), (ref.fake_quant_fp4, 32)]
)
def test_fake_quantisation_is_idempotent_by_group(quantise: object, group: int, columns: int) -> None:
    assert callable(quantise)
    x = seeded(3, columns)
    once = quantise(x, group)
    assert once.shape == x.shape and torch.equal(quantise(once, group), once)
    for start in range(0, columns, group):
        alone = quantise(x[:, start : start + group], group)
        assert torch.equal(once[:, start : start + group], alone), "a group depends on itself only"
    assert torch.equal(quantise(x.bfloat16(), group).float(), quantise(x.bfloat16().float(), group)), "bf16 holds it"


def test_zero_groups_stay_zero() -> None:
    for quantise in (ref.fake_quant_fp8, ref.fake_quant_fp4):
        assert torch.equal(quantise(torch.zeros(2, 40), 32), torch.zeros(2, 40))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_spreads_over_its_group_and_no_further(poison: float) -> None:
    x = torch.ones(64)
    x[3] = poison
    for quantise in (ref.fake_quant_fp8, ref.fake_quant_fp4):
        out = quantise(x, 32)
        assert torch.isnan(out[:32]).all() and torch.equal(out[32:], x[32:])


# -- Hadamard


@pytest.mark.parametrize("n", [1, 2, 4, 32, 128])
def test_hadamard_is_the_sylvester_matrix(n: int) -> None:
    expected = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) / math.sqrt(n)
    matrix = ref.hadamard(torch.eye(n))
    assert torch.allclose(matrix, expected, atol=0, rtol=1e-6)
    x = torch.randn(5, 3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    assert torch.allclose(ref.hadamard(ref.hadamard(x)), x)


def test_hadamard_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="power of two"):
        ref.hadamard(torch.ones(48))


# -- weights


@pytest.mark.parametrize("block", [(128, 128), (1, 128)])
@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("rows", [1, 127, 128, 129])
def test_fp8_blocks_of_any_shape(rows: int, columns: int, block: tuple[int, int]) -> None:
    w = seeded(rows, columns)
    data, codes = ref.quantize_fp8(w, block)
    assert data.shape == w.shape and codes.shape == (-(-rows // block[0]), -(-columns // block[1]))
    back = ref.dequantize_fp8(data, codes, block)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            step = ref.e8m0_decode(codes[i, j])
            assert (back[part] - w[part]).abs().max() <= 16 * step, "half of the largest step of the grid"
            assert (w[part] / step).abs().max() <= 448
    again, codes_again = ref.quantize_fp8(back, block)
    assert torch.equal(ref.dequantize_fp8(again, codes_again, block), back)
    assert torch.equal(back.bfloat16().float(), back), "bf16 holds every value exactly"


def test_fp8_with_float32_scales() -> None:
    """As in the -Base releases: any positive scale, not only powers of two."""
    data, _ = ref.quantize_fp8(seeded(130, 140))
    scale = torch.tensor([[0.3, 1.7], [2.9, 0.01]])
    back = ref.dequantize_fp8(data, scale)
    assert torch.equal(back[:128, 128:], data.float()[:128, 128:] * 1.7)
    assert torch.equal(back[128:, :128], data.float()[128:, :128] * 2.9)


def test_fp8_reaches_the_ends_of_float32() -> None:
    w = torch.tensor([[2.0**127, -1e38], [1e-36, 0.0]])
    data, codes = ref.quantize_fp8(w, (1, 128))
    back = ref.dequantize_fp8(data, codes, (1, 128))
    assert torch.allclose(back[0], w[0], rtol=1 / 16) and torch.allclose(back[1], w[1], rtol=1 / 16, atol=0)


def test_packed_nibbles_put_the_even_column_low() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    packed = ref.pack_nibbles(codes)
    assert packed.tolist() == [[0x21, 0x0F]]
    assert torch.equal(ref.unpack_nibbles(packed), codes)
    assert torch.equal(ref.unpack_nibbles(packed.view(torch.int8)), codes)


def test_e2m1_codes_and_values_are_inverse() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = ref.e2m1_values(codes)
    assert values.tolist() == E2M1 + [-v for v in E2M1]
    assert torch.equal(ref.e2m1_codes(values), codes)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3))
def test_mxfp4_is_its_fake_quantisation(seed: int, rows: int, groups: int) -> None:
    w = seeded(rows, 32 * groups, seed=seed)
    packed, codes = ref.quantize_mxfp4(w)
    assert packed.dtype == torch.int8 and packed.shape == (rows, 16 * groups) and codes.shape == (rows, groups)
    back = ref.dequantize_mxfp4(packed, codes)
    assert torch.equal(back, ref.fake_quant_fp4(w, 32))
    repacked, recoded = ref.quantize_mxfp4(back)
    assert torch.equal(ref.dequantize_mxfp4(repacked, recoded), back)
    assert torch.equal(back.bfloat16().float(), back)


@given(st.binary(min_size=16, max_size=16), st.integers(1, 252))
def test_any_mxfp4_bytes_survive_a_round_trip_of_their_values(data: bytes, code: int) -> None:
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)[None]
    values = ref.dequantize_mxfp4(packed, torch.tensor([[code]], dtype=torch.uint8))
    assert torch.equal(ref.dequantize_mxfp4(*ref.quantize_mxfp4(values)), values)


def test_mxfp4_refuses_ragged_groups() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        ref.quantize_mxfp4(torch.ones(2, 48))
