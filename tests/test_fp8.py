"""The E4M3 numerics against a table written from the format's definition, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from octavo import fp8

# 4 exponent bits with bias 7, 3 mantissa bits, exponent 0 is subnormal; the all-ones pattern,
# index 127, is NaN and left out. The code of a negative value has its top bit set as well.
MAGNITUDES = np.array(
    [
        mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent in range(16)
        for mantissa in range(8)
    ][:127]
)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALL_FINITE_CODES = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = st.lists(floats, min_size=1, max_size=40).map(torch.tensor)
scales = st.floats(2.0**-60, 2.0**60, width=32).map(torch.tensor)


def nearest_even_codes(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Codes of the table's closest entries; of two equally close, the one with the even code."""
    clipped = np.minimum(np.abs(values), MAGNITUDES[-1])
    distance = np.abs(clipped[..., None] - MAGNITUDES)
    odd = np.arange(len(MAGNITUDES)) % 2
    order = np.lexsort((np.broadcast_to(odd, distance.shape), distance))
    codes: NDArray[np.uint8] = (order[..., 0] | np.signbit(values) << 7).astype(np.uint8)
    return codes


def expected_codes(tensor: torch.Tensor, scale: torch.Tensor) -> NDArray[np.uint8]:
    """Divided once, in float32, as the scheme says; everything else in float64."""
    with np.errstate(over="ignore", under="ignore"):
        quotient = tensor.float().numpy() / scale.numpy()
    return nearest_even_codes(quotient.astype(np.float64))


def codes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    codes: NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
    return codes


def values_of(codes: torch.Tensor) -> NDArray[np.float64]:
    raw = codes.numpy()
    values: NDArray[np.float64] = np.where(raw < 128, 1.0, -1.0) * MAGNITUDES[raw & 0x7F]
    return values


def test_the_largest_magnitude_is_448() -> None:
    assert MAGNITUDES[-1] == fp8.E4M3_MAX == 448


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@given(tensor=vectors, scale=scales)
def test_quantize_rounds_to_nearest_even_and_saturates(
    dtype: torch.dtype, tensor: torch.Tensor, scale: torch.Tensor
) -> None:
    limit = torch.finfo(dtype).max
    tensor = tensor.clamp(-limit, limit).to(dtype)
    np.testing.assert_array_equal(
        codes_of(fp8.quantize(tensor, scale)), expected_codes(tensor, scale)
    )


@given(scale=st.integers(1, 2**16))
def test_quantize_breaks_every_tie_towards_the_even_code(scale: int) -> None:
    # Exact in float32, and so is the division; multiplying by 1 / scale would miss the tie.
    midpoints = torch.tensor((MAGNITUDES[:-1] + MAGNITUDES[1:]) / 2 * scale, dtype=torch.float32)
    lower = np.arange(126)
    for sign in (1.0, -1.0):
        codes = codes_of(fp8.quantize(sign * midpoints, torch.tensor(float(scale))))
        np.testing.assert_array_equal(codes & 0x7F, lower + lower % 2)


def test_quantize_rounds_only_once() -> None:
    # One float32 step off a tie: a rounding to BF16 on the way would fall back onto it.
    midpoints = torch.tensor((MAGNITUDES[:-1] + MAGNITUDES[1:]) / 2, dtype=torch.float32)
    for limit, expected in ((0.0, np.arange(126)), (torch.inf, np.arange(1, 127))):
        values = midpoints.nextafter(torch.tensor(limit))
        codes = codes_of(fp8.quantize(values, torch.tensor(1.0)))
        np.testing.assert_array_equal(codes, expected)


@given(exponent=st.integers(-60, 60))
def test_representable_values_are_exact(exponent: int) -> None:
    scale = torch.tensor(2.0**exponent)
    values = torch.tensor(values_of(ALL_FINITE_CODES) * 2.0**exponent, dtype=torch.float32)
    codes = fp8.quantize(values, scale)
    np.testing.assert_array_equal(codes_of(codes), ALL_FINITE_CODES)
    assert torch.equal(fp8.dequantize(codes, scale), values)


@given(value=st.floats(448, width=32, allow_infinity=False))
def test_values_beyond_the_range_saturate(value: float) -> None:
    codes = codes_of(fp8.quantize(torch.tensor([value, -value]), torch.tensor(1.0)))
    assert codes.tolist() == [0x7E, 0xFE]


@given(tensor=vectors, scale=scales)
def test_quantize_is_monotonic(tensor: torch.Tensor, scale: torch.Tensor) -> None:
    codes = fp8.quantize(tensor.sort().values, scale).view(torch.uint8)
    assert (np.diff(values_of(codes)) >= 0).all()


@given(scale=scales)
def test_quantize_undoes_dequantize(scale: torch.Tensor) -> None:
    codes = ALL_FINITE_CODES.view(fp8.E4M3)
    again = fp8.quantize(fp8.dequantize(codes, scale), scale)
    np.testing.assert_array_equal(codes_of(again), codes_of(codes))


@given(scale=scales)
def test_dequantize_is_the_rounded_product(scale: torch.Tensor) -> None:
    # A product of 4 and 24 significant bits is exact in float64.
    expected = (values_of(ALL_FINITE_CODES) * scale.double().item()).astype(np.float32)
    actual = fp8.dequantize(ALL_FINITE_CODES.view(fp8.E4M3), scale)
    np.testing.assert_array_equal(actual.numpy(), expected)


def test_dequantize_broadcasts_a_scale_for_each_row() -> None:
    codes = torch.tensor([[1.0, 2.0], [1.0, 2.0]]).to(fp8.E4M3)
    rows = fp8.dequantize(codes, torch.tensor([[1.0], [0.5]]))
    assert rows.tolist() == [[1.0, 2.0], [0.5, 1.0]]


@pytest.mark.parametrize("chunk", [1, 7, 45, 1000])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "expanded"])
def test_quantize_any_layout_in_chunks(
    chunk: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fp8._STRIP, "cpu", chunk)
    values = torch.linspace(-500, 500, 45).reshape(5, 9)
    tensor = {
        "contiguous": values,
        "transposed": values.T,
        "strided": values[:, ::2],
        "expanded": values[:1].expand(5, 9),
    }[layout]
    scale = torch.tensor(1.0)
    codes = fp8.quantize(tensor, scale)
    assert codes.shape == tensor.shape
    np.testing.assert_array_equal(codes_of(codes), expected_codes(tensor, scale))


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_quantize_keeps_unusual_shapes(shape: tuple[int, ...]) -> None:
    codes = fp8.quantize(torch.ones(shape), torch.tensor(1.0))
    assert (codes.shape, codes.dtype) == (shape, fp8.E4M3)


@given(amax=st.floats(448 * 2.0**-126, width=32, allow_infinity=False, allow_nan=False))
def test_scale_is_amax_over_448_in_float32(amax: float) -> None:
    scale = fp8.scale_from_amax(torch.tensor(amax))
    assert scale.dtype == torch.float32
    assert scale.item() == np.float32(amax) / np.float32(448)


def test_scale_of_zero_is_one() -> None:
    assert fp8.scale_from_amax(torch.tensor([0.0, 448.0])).tolist() == [1.0, 1.0]


@given(steps=st.lists(st.integers(-1000, 1000)))
def test_subnormal_tensors_never_become_nan(steps: list[int]) -> None:
    # A zero among them would turn into 0 / 0 if the scale became 0.
    tensor = torch.tensor([0, *steps], dtype=torch.float32) * 2.0**-149
    scale = fp8.scale_from_amax(fp8.amax(tensor))
    codes = codes_of(fp8.quantize(tensor, scale))
    assert scale > 0
    assert not (codes & 0x7F == 0x7F).any()
    np.testing.assert_array_equal(codes, expected_codes(tensor, scale))


@given(tensor=vectors)
def test_the_largest_element_gets_the_largest_code(tensor: torch.Tensor) -> None:
    amax = fp8.amax(tensor)
    codes = codes_of(fp8.quantize(tensor, fp8.scale_from_amax(amax)))
    if amax >= 448 * torch.finfo(torch.float32).tiny:
        assert (codes & 0x7F).max() == 0x7E


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@given(tensor=vectors)
def test_amax_is_exact(dtype: torch.dtype, tensor: torch.Tensor) -> None:
    tensor = tensor.clamp(-6e4, 6e4).to(dtype)
    amax = fp8.amax(tensor)
    assert (amax.dtype, amax.shape) == (torch.float32, ())
    assert amax.item() == max(abs(value) for value in tensor.double().tolist())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 17, 99])
def test_amax_hands_on_what_is_not_finite(dtype: torch.dtype, bad: float, position: int) -> None:
    tensor = torch.ones(100, dtype=dtype)
    tensor[position] = bad
    assert np.array_equal(fp8.amax(tensor).item(), abs(bad), equal_nan=True)


@pytest.mark.parametrize("scale", [1.0, 0.0123, 3.7e-5, 2.0**-20, 1e-38, 117.0])
def test_the_cpu_kernel_casts_every_bfloat16_as_torch_does(scale: float) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = every[every.isfinite()]
    ours = fp8.quantize(finite, torch.tensor(scale))
    theirs = (finite.float() / torch.tensor(scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rounding_error_is_measured(dtype: torch.dtype) -> None:
    tensor = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[::3] *= 1e-5
    tensor[1] = 0
    scale = fp8.scale_from_amax(fp8.amax(tensor))
    codes, error = fp8.quantize_and_measure(tensor, scale)
    exact, restored = tensor.double(), codes.double() * scale.double()
    expected = 10 * torch.log10((exact**2).sum() / ((exact - restored) ** 2).sum())
    assert error.sqnr_db == pytest.approx(expected.item(), abs=1e-3)
    lost = ((restored == 0) & (exact != 0)).double().mean().item()
    assert error.underflow == pytest.approx(lost)
    assert lost > 0.1


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 5), (129, 1), (40, 400)])
def test_tiles_are_quantized_each_with_its_own_scale(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[0, 0] = 40.0
    for amax_of, height, width in (
        (fp8.amax_by_channel, 1, shape[1]),
        (fp8.amax_by_block, 128, 128),
    ):
        amax = amax_of(tensor)
        scale = fp8.scale_from_amax(amax)
        codes, error = fp8.quantize_and_measure(tensor, scale)
        restored = fp8.dequantize(codes, scale)
        noise = signal = 0.0
        for i in range(0, shape[0], height):
            for j in range(0, shape[1], width):
                part = tensor[i : i + height, j : j + width].double()
                place = (i // height, j // width)
                assert amax[place] == part.abs().max().float()
                one = (part.abs().max().float() / 448).reshape(())
                alone = fp8.quantize(tensor[i : i + height, j : j + width], one)
                assert torch.equal(
                    codes[i : i + height, j : j + width].view(torch.uint8), alone.view(torch.uint8)
                )
                exact = alone.double() * one.double()
                assert torch.equal(restored[i : i + height, j : j + width], exact.float())
                noise += float(((exact - part) ** 2).sum())
                signal += float((part**2).sum())
        # Above 100 dB there is nothing but the rounding of the sums.
        expected = min(10 * math.log10(signal / noise) if noise else 100, 100)
        found = min(100 if error.sqnr_db is None else error.sqnr_db, 100)
        assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_amax_of_tiles_hands_on_what_is_not_finite(bad: float) -> None:
    tensor = torch.ones(200, 300, dtype=torch.bfloat16)
    tensor[150, 7] = bad
    expected = torch.ones(2, 3)
    expected[1, 0] = bad
    assert torch.equal(fp8.amax_by_block(tensor).nan_to_num(), expected.nan_to_num())


def test_what_is_exact_has_no_noise() -> None:
    tensor = torch.tensor([448.0, -2.0, 0.0], dtype=torch.bfloat16)
    assert fp8.quantize_and_measure(tensor, torch.tensor(1.0))[1] == (None, 0.0)
