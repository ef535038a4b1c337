from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from panterra.errors import InputError
from panterra.evaluate.quantise import dequantise, percentile_codes, percentile_levels, percentile_values, quantise


@pytest.fixture(scope="module")
def recorded():
    return load_file(Path(__file__).parent / "golden" / "olmoearth" / "eval_cases.safetensors")


def test_recorded_int8(recorded):
    np.testing.assert_array_equal(quantise(recorded["quant/embeddings"]), recorded["quant/int8"])
    np.testing.assert_array_equal(dequantise(recorded["quant/int8"]), recorded["quant/dequantized"])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_recorded_percentile_codes(recorded, bits):
    edges, midpoints = percentile_levels(recorded["quant/embeddings"], bits)
    np.testing.assert_allclose(edges, recorded[f"quant/p{bits}_quantiles"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(midpoints, recorded[f"quant/p{bits}_midpoints"], rtol=1e-6, atol=1e-7)
    codes = percentile_codes(recorded["quant/embeddings"], edges)
    np.testing.assert_array_equal(codes, recorded[f"quant/p{bits}_codes"])
    np.testing.assert_allclose(
        percentile_values(codes, midpoints), recorded[f"quant/p{bits}_dequantized"], rtol=1e-6, atol=1e-7
    )


def test_int8_error_is_half_a_level_of_the_square_root():
    values = np.linspace(-1, 1, 4001, dtype=np.float32)
    error = np.abs(dequantise(quantise(values)) - values)
    assert (error <= np.sqrt(np.abs(values)) / 127.5 + 0.25 / 127.5**2 + 1e-6).all()


def test_every_int8_code_survives_the_round_trip():
    codes = np.arange(-127, 128).astype(np.int8)
    np.testing.assert_array_equal(quantise(dequantise(codes)), codes)


def test_eight_bit_codes_use_all_of_int8():
    values = np.random.default_rng(0).normal(size=(5000, 2)).astype(np.float32)
    edges, midpoints = percentile_levels(values, 8)
    codes = percentile_codes(values, edges)
    assert codes.dtype == np.int8
    assert len(np.unique(codes)) == 256
    back = percentile_values(codes, midpoints)
    bins = codes.view(np.uint8).astype(int)
    for d in range(2):
        low, high = edges[d][bins[:, d]], edges[d][bins[:, d] + 1]
        for column in (values[:, d], back[:, d]):
            assert (low <= column).all()
            assert (column <= high).all()


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(InputError, match="NaN, which int8 cannot express"):
        quantise(np.array([0.1, np.nan]))
    with pytest.raises(InputError, match="9 bits"):
        percentile_levels(np.zeros((3, 2)), 9)
    for embeddings, lost in ((np.zeros((0, 2)), 0), (np.array([[0.1, np.nan], [1, 2]]), 1)):
        with pytest.raises(
            InputError, match=f"{len(embeddings)} embeddings came .*, {lost} of them with numbers missing"
        ):
            percentile_levels(embeddings, 4)
