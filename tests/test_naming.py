import datetime as dt

import pytest

from panterra.imagery.naming import candidates, match_band, match_bands, read_date
from panterra.modalities import MODALITIES

S2_ALL = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12"]


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("S2A_MSIL2A_20170617T113321_36_85_B01", "2017-06-17"),
        ("S2B_MSIL2A_20220105T105339_N0301_R051_T31UFS_20220106T120000", "2022-01-05"),
        ("T31UFS_20200101T105431_B02_10m", "2020-01-01"),
        ("LC08_L1TP_195026_20200515_20200526_02_T1_B4", "2020-05-15"),
        ("HLS.L30.T10TEK.2020123T184512.v2.0.B04", "2020-05-02"),
        ("MOD09A1.A2019001.h18v03", "2019-01-01"),
        ("naip_5m_20090818", "2009-08-18"),
        ("TERRA_MODIS_012010_NDVI_2013-09-14", "2013-09-14"),
        ("S2_2020-08", "2020-08-01"),
        ("S2_2020-08_10m", "2020-08-01"),
        ("scene_2020_08_10m", "2020-08-01"),
        ("s2_2024-03-04_2024-03-10", "2024-03-04"),
        ("2017-08-24T10:52:40", "2017-08-24"),
        ("2018:07:16 06:06:23", "2018-07-16"),
        ("N23W161_2020_sl_HH", None),
        ("a_20180101_b_20200505", None),
        ("AnnualCrop_1", None),
        ("x_20201345", None),
        ("patch_64_128", None),
    ],
)
def test_dates_in_names(text, date):
    found = read_date(text)
    assert (found and found.date) == (date and dt.date.fromisoformat(date))


@pytest.mark.parametrize("names", [m.band_names for m in MODALITIES.values()], ids=list(MODALITIES))
def test_every_modality_knows_its_own_bands(names):
    modality = next(m for m in MODALITIES.values() if m.band_names == names)
    assert match_bands(names, modality) == names


@pytest.mark.parametrize(
    ("raw", "modality", "band"),
    [
        ("S2-L2A-B02", "sentinel2_l2a", "B02"),
        ("B2", "sentinel2_l2a", "B02"),
        ("b8a", "sentinel2_l2a", "B8A"),
        ("B08", "sentinel2_l2a", "B08"),
        ("nir", "sentinel2_l2a", "B08"),
        ("B10", "sentinel2_l2a", None),
        ("SCL", "sentinel2_l2a", None),
        ("B02_blue", "hls", "B2"),
        ("B05_nir", "hls", "B5"),
        ("B07_swir2", "hls", "B7"),
        ("S1-SIGMA0-VH", "sentinel1", "vh"),
        ("Gamma0_VV", "sentinel1", "vv"),
        ("HH_dn", "alos2", "hh"),
        ("elevation", "srtm", "srtm"),
        ("N", "naip_10", "IR"),
        ("NIR", "naip_10", "IR"),
        ("red", "aerial", "R"),
        ("B02_red", "sentinel2_l2a", None),
    ],
)
def test_band_names(raw, modality, band):
    assert match_band(raw, MODALITIES[modality]) == band


@pytest.mark.parametrize(
    ("names", "text", "expected"),
    [
        (S2_ALL, "Forest_1", ("sentinel2",)),
        (["B02", "B03", "B04", "B08"], "S2_20170824_10m", ("sentinel2_l2a", "sentinel2")),
        (["B02", "B03", "B04", "B08"], "S2_L2A_x", ("sentinel2_l2a",)),
        (["B1", "B2", "B3", "B4", "B5", "B7"], "L7_ETM_olinda", ("landsat7",)),
        (["B02", "B03", "B04", "B05", "B06", "B07", "B10", "pixel_qa"], "L8_SR_10m", ("hls",)),
        (["VH", "VV"], "S1_2020-08", ("sentinel1",)),
        (["VV"], "whatever", ("sentinel1",)),
        (["elevation", "slope"], "dem_slope", ("srtm",)),
        (["R", "G", "B", "NIR"], "naip_5m", ("naip", "naip_10")),
        (["label"], "label_croptype_CT", ()),
        (["B1"], "something", ()),
        (["B1"], "ESA_WorldCover_10m", ("worldcover",)),
    ],
)
def test_what_a_file_can_be(names, text, expected):
    assert candidates(names, text) == expected


def test_unnamed_colours_stay_doubtful():
    assert len(candidates(["R", "G", "B", "NIR"], "orthophoto")) > 1
    assert len(candidates(["B1", "B2", "B3", "B4"], "image")) > 1
