"""The sets that stand alone pass through their readers exactly, and views of them show what they should."""

import h5py
import numpy as np
import pytest
import torch

import miniatures
import miniatures_benchmarks
from panterra.data.labelled import IGNORE, open_labelled
from panterra.data.pastis_hd import open_pastis_hd
from panterra.data.stored_pixels import S2_BANDS
from panterra.data.verify import verify
from panterra.data.views import as_level_2a, corners, cut, monthly
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.sample import to_days

BUILDERS = miniatures_benchmarks.BUILDERS


def bands(sample, modality, *names):
    """Pick bands by name: [T, C, H, W]."""
    order = MODALITIES[modality].band_names
    return sample.batch.observations[modality].pixels[0][:, [order.index(name) for name in names]].numpy()


def days(*dates):
    return [[to_days(date) for date in dates]]


def test_pastis_shows_quarters_column_after_column(tmp_path):
    part = BUILDERS["pastis"](tmp_path)["10004"]
    labelled = open_labelled("pastis", tmp_path, "val")
    assert labelled.ids == ["10004@0,0", "10004@64,0", "10004@0,64", "10004@64,64"]
    sample = labelled[1]
    window = np.s_[..., 64:, :64]
    codes = part["TARGET"][0].astype(int)[window]
    np.testing.assert_array_equal(sample.target[0], np.where(codes == 19, IGNORE, codes))
    assert sample.fold == "4"
    # Two of the three images are of October 2019.
    optical = sample.batch.observations["sentinel2_l2a"]
    assert optical.dates.tolist() == days("2018-09-01", "2019-10-01")
    stored = part["S2"].astype(float)[window]
    np.testing.assert_array_equal(bands(sample, "sentinel2_l2a", *S2_BANDS)[0], stored[0])
    np.testing.assert_allclose(bands(sample, "sentinel2_l2a", *S2_BANDS)[1], stored[1:].mean(0), rtol=1e-6)
    radar = part["S1A"][:, :2][window]
    np.testing.assert_allclose(sample.batch.observations["sentinel1"].pixels[0, 1], radar[1:].mean(0), rtol=1e-5)


def test_pastis128_means_are_over_what_is_valid(tmp_path):
    part = BUILDERS["pastis128"](tmp_path)["10005"]
    (sample,) = open_labelled("pastis128", tmp_path, "test")
    # The first of the two images of October lacks a pixel.
    np.testing.assert_array_equal(bands(sample, "sentinel2_l2a", *S2_BANDS)[1, :, 2, 3], part["S2"][2, :, 2, 3])
    assert sample.batch.observations["sentinel2_l2a"].valid.all()
    assert sample.target.shape == (1, 128, 128)


def test_pastis_wants_no_spot(tmp_path):
    BUILDERS["pastis128"](tmp_path)
    labelled = open_labelled("pastis128", tmp_path, "test")
    assert [file.parent.name for file in labelled.files(labelled.ids[0])] == ["DATA_S2", "DATA_S1A", "ANNOTATIONS"]
    assert open_pastis_hd(tmp_path, "test").files("10005")[0].parent.parent.name == "DATA_SPOT"


@pytest.mark.parametrize("split", ["train", "val"])
def test_mados(tmp_path, split):
    truth = BUILDERS["mados"](tmp_path)[split]
    labelled = open_labelled("mados", tmp_path, split)
    scene = {"train": "Scene_0_10", "val": "Scene_1_11"}[split]
    assert labelled.ids == [f"{scene}@80,80", f"{scene}@0,160"]
    sample = labelled[0]
    for band in ("B02", "B03", "B04", "B08"):
        np.testing.assert_allclose(bands(sample, "sentinel2_l2a", band)[0, 0], truth[band][0, 80:160, 80:160] * 1e4)
    # A pixel of 20 m lies between four of 10 m, whose nearest weighs (3/4)^2.
    stored = truth["B12"][0, 40:42, 40:42].astype(float) * 1e4
    weights = np.outer([0.75, 0.25], [0.75, 0.25])
    assert bands(sample, "sentinel2_l2a", "B12")[0, 0, 1, 1] == pytest.approx((stored * weights).sum(), rel=1e-5)
    np.testing.assert_array_equal(bands(sample, "sentinel2_l2a", "B09"), bands(sample, "sentinel2_l2a", "B8A"))
    assert (sample.target >= 0).sum() == 1
    assert labelled.class_names[sample.target[0, 20, 30]] == "Oil Spill"
    assert labelled.class_names[labelled[1].target[0, 5, 79]] == "Sea snot"


def test_mados_whole_and_as_published(tmp_path):
    truth = BUILDERS["mados"](tmp_path)["train"]
    (whole,) = open_labelled("mados", tmp_path, "train", tile_px=None)
    (published,) = open_labelled("mados", tmp_path, "train", tile_px=None, as_published=True)
    assert whole.target.shape == (1, 240, 240)
    assert bands(whole, "sentinel2_l2a", "B06")[0, 0, 0, 0] == pytest.approx(truth["B06"][0, 0, 0] * 1e4)
    mean = bands(whole, "sentinel2_l2a", "B05", "B07").mean(axis=1)
    np.testing.assert_allclose(bands(published, "sentinel2_l2a", "B06")[:, 0], mean, rtol=1e-6)


def test_mados_says_what_is_missing(tmp_path):
    BUILDERS["mados"](tmp_path)
    with pytest.raises(InputError, match="a square of 240 pixels cannot be cut into tiles of 100; give a divisor"):
        open_labelled("mados", tmp_path, "train", tile_px=100)
    gone = tmp_path / "Scene_0/20/Scene_0_L2R_rhorc_704_10.tif"
    gone.unlink()
    with pytest.raises(InputError, match=f"cannot read {gone}"):
        open_labelled("mados", tmp_path, "train")[0]


def test_sen1floods11_tiles_hold_water_and_no_gap(tmp_path):
    truth = BUILDERS["sen1floods11_tiles"](tmp_path)["test"]
    labelled = open_labelled("sen1floods11_tiles", tmp_path, "test")
    # The first tile has a gap in the radar.
    assert labelled.ids == [f"Spain_3_S1Hand.tif@{corner}" for corner in ("64,0", "0,64", "64,64")]
    sample = labelled[1]
    assert list(sample.batch.observations) == ["sentinel1"]
    assert [file.parent.name for file in labelled.files(sample.id)] == ["S1Hand", "LabelHand"]
    np.testing.assert_array_equal(sample.batch.observations["sentinel1"].pixels[0, 0], truth["S1"][:, :64, 64:])
    np.testing.assert_array_equal(sample.target, truth["Label"][:, :64, 64:])


def test_sen1floods11_tiles_without_water_are_left_out(tmp_path):
    truth = BUILDERS["sen1floods11_tiles"](tmp_path)["train"]
    dry = np.zeros_like(truth["Label"])
    dry[0, 100, 100] = 1
    miniatures.write_tif(tmp_path / "v1.1/data/flood_events/HandLabeled/LabelHand/Ghana_1_LabelHand.tif", dry)
    assert open_labelled("sen1floods11_tiles", tmp_path, "train").ids == ["Ghana_1_S1Hand.tif@64,64"]


def test_breizhcrops(tmp_path):
    truth = BUILDERS["breizhcrops"](tmp_path)
    train = open_labelled("breizhcrops", tmp_path, "train", monthly=False)
    assert train.ids == ("frh01/40", "frh02/41")
    sample = train[1]
    assert (sample.fold, train.class_names[sample.target]) == ("frh02", "temporary meadows")
    assert sample.batch.observations["sentinel2"].dates.tolist() == days("2017-01-03", "2017-01-13", "2017-03-02")
    order = ("B01", "B10", "B11", "B12", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09")
    np.testing.assert_array_equal(bands(sample, "sentinel2", *order)[..., 0, 0], truth["frh02"][:, :13])
    (test,) = open_labelled("breizhcrops", tmp_path, "test")
    assert test.batch.observations["sentinel2"].dates.tolist() == days("2017-01-01", "2017-03-01")
    wanted = [truth["frh04"][:2, :13].mean(0), truth["frh04"][2, :13]]
    np.testing.assert_allclose(bands(test, "sentinel2", *order)[..., 0, 0], wanted, rtol=1e-6)


def test_breizhcrops_times_are_checked(tmp_path):
    BUILDERS["breizhcrops"](tmp_path)
    with h5py.File(tmp_path / "2017/L1C/frh03.h5", "r+") as file:
        file["2017/L1C/frh03/csv/42.csv"][:, 16] /= 1000
    with pytest.raises(InputError, match=r"the times of .*42.csv in .*frh03.h5 are not nanoseconds of 2017"):
        open_labelled("breizhcrops", tmp_path, "valid")[0]


def test_cropharvest_togo(tmp_path):
    truth = BUILDERS["cropharvest_togo"](tmp_path)
    train, test = (open_labelled("cropharvest_togo", tmp_path, split) for split in ("train", "test"))
    assert {sample.id: int(sample.target) for sample in train} == {"6_togo": 1, "7_togo": 0}
    assert {sample.id: int(sample.target) for sample in test} == {"togo-eval/0": 1, "togo-eval/2": 0}  # -1: no label
    sample, stored = train[0], truth["6_togo"]
    assert sample.batch.lonlat.tolist() == [[1.0, 8.0]]
    np.testing.assert_allclose(bands(sample, "sentinel1", "vv", "vh")[..., 0, 0], stored[:, :2], rtol=1e-6)
    order = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
    np.testing.assert_allclose(bands(sample, "sentinel2", *order)[..., 0, 0], stored[:, 2:13], rtol=1e-6)
    assert sample.batch.observations["srtm"].pixels.flatten().tolist() == [stored[0, 15]]
    # Twelve steps of 30 days before 2020-02-01.
    assert sample.batch.observations["sentinel2"].dates[0, [0, -1]].tolist() == days("2019-02-06", "2020-01-02")[0]
    np.testing.assert_allclose(bands(test[1], "sentinel1", "vv")[:, 0, 0, 0], truth["togo-eval"][2, :, 0], rtol=1e-6)


def test_cropharvest_crops_of_a_country(tmp_path):
    BUILDERS["cropharvest_kenya"](tmp_path)
    kenya = open_labelled("cropharvest_kenya", tmp_path, "train")
    # An unknown crop may be maize; what has no imagery is no sample.
    assert {sample.id: int(sample.target) for sample in kenya} == {
        "1_kenya": 1,
        "2_kenya": 0,
        "4_geowiki-landcover-2017": 0,
    }
    brazil = open_labelled("cropharvest_brazil", tmp_path, "test")
    assert brazil.ids == ("Brazil_coffee_2021_0/0", "Brazil_coffee_2021_0/2")
    assert brazil[0].batch.observations["sentinel1"].dates[0, 0] == to_days("2020-02-07")


def test_cropharvest_says_what_is_wrong(tmp_path):
    BUILDERS["cropharvest_togo"](tmp_path)
    with h5py.File(tmp_path / "features/arrays/6_togo.h5", "w") as file:
        file["array"] = np.zeros((12, 17))
    with pytest.raises(InputError, match=r"6_togo.h5 holds \[12, 17\]; wanted 12 steps of 18 channels"):
        open_labelled("cropharvest_togo", tmp_path, "train")[0]


# Views


def test_corners_cover_a_square_once():
    seen = np.zeros((12, 12), int)
    for row, col in corners(12, 4):
        seen[row : row + 4, col : col + 4] += 1
    assert (seen == 1).all()


def test_tiles_put_together_are_the_whole(tmp_path):
    miniatures.pastis_hd(tmp_path)
    whole = open_pastis_hd(tmp_path, "val", spot=False)
    tiles = cut(whole, 4, lambda _: corners(8, 4))
    rebuilt = torch.full((1, 8, 8), -9)
    for (row, col), tile in zip(corners(8, 4), tiles, strict=True):
        rebuilt[:, row : row + 4, col : col + 4] = tile.target
    assert torch.equal(rebuilt, whole[0].target)


def test_months_are_limited_and_gaps_stay_invalid(tmp_path):
    part = miniatures.pastis_hd(tmp_path)["10004"]
    whole = open_pastis_hd(tmp_path, "val", spot=False)
    part["S2"][1:, :, 2, 3] = -10000
    miniatures.write_npy(tmp_path / "DATA_S2/S2_10004.npy", part["S2"])
    means = monthly(whole)[0].batch.observations["sentinel2_l2a"]
    assert not means.valid[0, 1, 2, 3]
    assert means.valid.sum() == 2 * 64 - 1
    assert monthly(whole, months=1)[0].batch.observations["sentinel1"].pixels.shape[1] == 1


def test_level_1c_passes_for_2a_without_cirrus(tmp_path):
    BUILDERS["m_eurosat"](tmp_path)
    labelled = open_labelled("m_eurosat", tmp_path, "train")
    before, after = labelled[0], as_level_2a(labelled)[0]
    assert list(after.batch.observations) == ["sentinel2_l2a"]
    for band in MODALITIES["sentinel2_l2a"].band_names:
        np.testing.assert_array_equal(bands(after, "sentinel2_l2a", band), bands(before, "sentinel2", band))


# The real sample


@pytest.mark.data
def test_real_sen1floods11_in_tiles(data_dir, tmp_path):
    """A chip whose west half is there, laid out as the set is."""
    chip, base = "Spain_7370579", tmp_path / "v1.1"
    for ours, theirs in (("S1Hand", "S1"), ("S2Hand", "S2"), ("LabelHand", "label")):
        folder = base / "data/flood_events/HandLabeled" / ours
        folder.mkdir(parents=True)
        (folder / f"{chip}_{ours}.tif").symlink_to(data_dir / "sen1floods11_spain" / f"{chip}_west_{theirs}.tif")
    listing = base / "splits/flood_handlabeled/flood_test_data.csv"
    miniatures.write_text(listing, f"{chip}_S1Hand.tif,{chip}_LabelHand.tif\n")
    miniatures.write_json(base / "Sen1Floods11_Metadata.geojson", {"features": []})
    (whole,) = open_labelled("sen1floods11", tmp_path, "test")
    labelled = open_labelled("sen1floods11_tiles", tmp_path, "test")
    codes = whole.target[0].numpy()
    power = bands(whole, "sentinel1", "vv", "vh")[0]
    wanted = [
        f"{chip}_S1Hand.tif@{row},{col}"
        for col in range(0, 256, 64)
        for row in range(0, 512, 64)
        if (codes[row : row + 64, col : col + 64] > 0).any()
    ]
    assert list(labelled.ids) == wanted
    assert 0 < len(wanted) < 32
    tile = labelled[3]
    row, col = (int(part) for part in tile.id.split("@")[1].split(","))
    np.testing.assert_array_equal(bands(tile, "sentinel1", "vv", "vh")[0], power[:, row : row + 64, col : col + 64])


def test_eurosat_ms(tmp_path):
    truth = BUILDERS["eurosat_ms"](tmp_path)
    train, test = (open_labelled("eurosat_ms", tmp_path, split) for split in ("train", "test"))
    assert {id.rsplit("_", 1)[1] for id in train.ids} == {"1", "2"}
    assert test.ids == tuple(f"{name}/{name}_10" for name in test.class_names)
    for code, sample in enumerate(test):
        assert sample.target.tolist() == [code]
    found = test[3].batch.observations["sentinel2"].pixels[0, 0]
    stored = truth[test.ids[3]]
    order = MODALITIES["sentinel2"].band_names
    for band, index in (("B02", 1), ("B10", 9), ("B12", 11), ("B8A", 12)):
        np.testing.assert_array_equal(found[order.index(band)], stored[index])


def test_other_images_of_eurosat(tmp_path):
    """Some classes, another number of images, names that end in no number."""
    for name, ends in {"Forest": ("7", "12", "12b", "north"), "River": ("100",)}.items():
        for end in ends:
            pixels = miniatures.numbers(len(end), 13, 64, 64, dtype="uint16")
            miniatures.write_tif(tmp_path / name / f"{name}_{end}.tif", pixels)
    train, test = (open_labelled("eurosat_ms", tmp_path, split) for split in ("train", "test"))
    assert train.ids == ("Forest/Forest_7", "Forest/Forest_12", "Forest/Forest_12b", "River/River_100")
    assert test.ids == ("Forest/Forest_north",)
    assert [sample.target.item() for sample in train] == [
        train.class_names.index(n) for n in ["Forest"] * 3 + ["River"]
    ]


@pytest.mark.data
def test_eurosat_as_it_is(data_dir):
    root = data_dir / "eurosat_ms"
    findings = verify("eurosat_ms", root)
    assert not [f.what for f in findings if f.level == "error"]
    train, test = (open_labelled("eurosat_ms", root, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (90, 40)
    sample = train[train.ids.index("SeaLake/SeaLake_3")]
    pixels = dict(
        zip(MODALITIES["sentinel2"].band_names, sample.batch.observations["sentinel2"].pixels[0, 0], strict=True)
    )
    # Water is darker in the infrared than in the green; Europe lies where it does.
    assert pixels["B8A"].mean() < pixels["B03"].mean()
    lon, lat = sample.batch.lonlat[0].tolist()
    assert -12 < lon < 35
    assert 34 < lat < 72
