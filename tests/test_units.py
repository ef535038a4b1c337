import numpy as np
import pytest

from panterra.errors import InputError
from panterra.imagery.units import file_unit, file_units, plausible_units, to_declared
from panterra.modalities import MODALITIES


def numbers(low, high):
    return np.random.default_rng(0).uniform(low, high, 5000)


def test_packed_amplitude_is_20_log_dn_minus_83():
    dn = np.array([1.0, 251.0, 3425.0, 65534.0])
    expected = 20 * np.log10(dn) - 83
    got = to_declared("sentinel1", dn, file_unit("sentinel1", "jaxa_dn"))
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_linear_power_is_10_log():
    power = np.array([1e-4, 0.05, 1.0])
    got = to_declared("sentinel1", power, file_unit("sentinel1", "linear"))
    np.testing.assert_allclose(got, 10 * np.log10(power), atol=1e-5)


@pytest.mark.parametrize(
    ("modality", "low", "high", "unit"),
    [
        ("sentinel2_l2a", 200, 5000, "reflectance_1e4"),
        ("sentinel2_l2a", 0.01, 0.6, "reflectance"),
        ("sentinel2_l2a", 0, 80, None),
        ("sentinel2_l2a", -2, 2, None),
        ("sentinel1", -25, -5, "db"),
        ("sentinel1", -2500, -500, "db_1e2"),
        ("sentinel1", -250_000, -50_000, "db_1e4"),
        ("sentinel1", 0.002, 0.3, "linear"),
        ("sentinel1", 700, 6000, "jaxa_dn"),
        ("sentinel1", 60, 250, None),
        ("sentinel1", -2, 2, None),
        ("alos2", 250, 3000, "jaxa_dn"),
        ("landsat", 6000, 20000, "dn"),
        ("landsat", 200, 4000, None),
        ("naip_10", 10, 230, "dn"),
        ("naip_10", 10, 2000, None),
        ("ndvi", -0.2, 0.9, "index"),
        ("ndvi", -2000, 9000, "index_1e4"),
        ("srtm", -5, 800, "metres"),
    ],
)
def test_units_told_by_the_numbers(modality, low, high, unit):
    assert plausible_units(modality, numbers(low, high)) == (() if unit is None else (unit,))


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_declared_unit_comes_first(modality):
    units = file_units(modality)
    first = next(iter(units.values()))
    assert next(iter(units)) == MODALITIES[modality].unit
    assert (first.scale, first.offset, first.unit) == (1, 0, None)


def test_an_unknown_unit_says_which_there_are():
    with pytest.raises(InputError, match=r"sentinel1 cannot come in unit 'watts'; give --unit one of: db, db_1e2"):
        file_unit("sentinel1", "watts")
