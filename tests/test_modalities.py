import pytest

from panterra import MODALITIES
from panterra.models.normalize import olmoearth_tables


def test_band_names_are_unique():
    for modality in MODALITIES.values():
        assert len(set(modality.band_names)) == len(modality.bands), modality.name


@pytest.mark.parametrize("table", ["standard", "range"])
def test_bands_stand_in_the_order_of_the_published_statistics(table):
    for name, row in olmoearth_tables()[table].items():
        if "bands" in row:
            assert list(MODALITIES[name].band_names) == row["bands"], name


def test_wavelengths_agree_with_common_names():
    order = ("coastal", "blue", "green", "red", "nir", "nir08", "nir09", "cirrus", "swir16", "swir22")
    for modality in MODALITIES.values():
        known = [(order.index(b.common), b.wavelength) for b in modality.bands if b.common in order and b.wavelength]
        assert [w for _, w in sorted(known)] == sorted(w for _, w in known), modality.name
