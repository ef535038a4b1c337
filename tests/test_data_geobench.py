"""GEO-Bench passes through its readers exactly: bands, units, days, labels, splits."""

import h5py
import numpy as np
import pytest
import torch

import miniatures_benchmarks
from miniatures import write_json
from panterra.data.geobench import LANDSAT, SENTINEL2, number_of
from panterra.data.labelled import DATASETS, IGNORE, open_labelled
from panterra.data.tortilla import read_entries
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.sample import to_days

BUILDERS = miniatures_benchmarks.BUILDERS


def bands(sample, modality, *names):
    """Pick bands by name: [T, C, H, W]."""
    order = MODALITIES[modality].band_names
    return sample.batch.observations[modality].pixels[0][:, [order.index(name) for name in names]].numpy()


# First edition


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_m_eurosat(tmp_path, split):
    truth = BUILDERS["m_eurosat"](tmp_path)[split]
    labelled = open_labelled("m_eurosat", tmp_path, split)
    (sample,) = labelled
    assert (sample.id, labelled.class_names[sample.target]) == (
        truth["id"],
        DATASETS["m_eurosat"].class_names[truth["code"]],
    )
    for key, band in SENTINEL2.items():
        np.testing.assert_array_equal(bands(sample, "sentinel2", band)[0, 0], truth["bands"][key])
    assert sample.batch.observations["sentinel2"].dates.tolist() == [[to_days("2020-07-01")]]


def test_m_so2sat_is_brought_to_ten_thousand_and_filled(tmp_path):
    truth = BUILDERS["m_so2sat"](tmp_path)["train"]["bands"]
    (sample,) = open_labelled("m_so2sat", tmp_path, "train")
    for band, key in (("B02", "02 - Blue"), ("B8A", "08A - Vegetation Red Edge"), ("B11", "11 - SWIR")):
        np.testing.assert_allclose(bands(sample, "sentinel2", band)[0, 0], truth[key] * 1e4, rtol=1e-6)
    stand_ins = (("B01", "B02"), ("B09", "B8A"), ("B10", "B11"))
    for absent, neighbour in stand_ins:
        np.testing.assert_array_equal(bands(sample, "sentinel2", absent), bands(sample, "sentinel2", neighbour))


def test_m_forestnet_bands_stand_in_as_published(tmp_path):
    truth = BUILDERS["m_forestnet"](tmp_path)["test"]
    (sample,) = open_labelled("m_forestnet", tmp_path, "test")
    assert sample.target.tolist() == [9]
    stored = {band: truth["bands"][key] for key, band in LANDSAT.items()}
    stored |= {"B1": stored["B2"], "B9": stored["B7"], "B10": stored["B7"], "B8": stored["B3"], "B11": stored["B7"]}
    for band, values in stored.items():
        np.testing.assert_array_equal(bands(sample, "landsat", band)[0, 0], values)


def test_m_bigearthnet_has_several_classes(tmp_path):
    BUILDERS["m_bigearthnet"](tmp_path)
    (sample,) = open_labelled("m_bigearthnet", tmp_path, "valid")
    assert torch.nonzero(sample.target[0]).flatten().tolist() == [0, 41]
    (tmp_path / "label_stats.json").unlink()
    with pytest.raises(InputError, match=r"no label of .*sample_1.hdf5 was found; put label_stats.json"):
        open_labelled("m_bigearthnet", tmp_path, "valid")[0]


def test_m_cashew_plant_masks_and_own_dates(tmp_path):
    truth = miniatures_benchmarks.geobench("m_cashew_plant", tmp_path, dated=True)["train"]
    (sample,) = open_labelled("m_cashew_plant", tmp_path, "train", day=None, partition="0.01x_train")
    np.testing.assert_array_equal(sample.target[0], truth["mask"])
    assert sample.batch.observations["sentinel2_l2a"].dates.tolist() == [[to_days("2019-11-05")]]
    np.testing.assert_array_equal(bands(sample, "sentinel2_l2a", "B09")[0, 0], truth["bands"]["09 - Water vapour"])


def test_classes_are_found_in_any_of_three_places(tmp_path):
    truth = BUILDERS["m_eurosat"](tmp_path)["train"]  # in the pickle

    def code():
        return open_labelled("m_eurosat", tmp_path, "train")[0].target.tolist()

    assert code() == [truth["code"]]
    names = DATASETS["m_eurosat"].class_names
    write_json(tmp_path / "label_map.json", {name: ["sample_0"] if name == "Forest" else [] for name in names})
    assert code() == [1]
    write_json(tmp_path / "label_stats.json", {"sample_0": np.eye(10)[4].tolist()})
    assert code() == [4]


def test_pickles_are_looked_at_and_not_run():
    assert number_of("label", str(b"cos\nsystem\n(S'label'\nI7\ntR.")) is None  # no whole number in binary follows
    with h5py.File("x", "w", driver="core", backing_store=False) as file:
        file.attrs["pickle"] = str(b"\x80\x04}(\x8c\x05label\x94K\x07u.")
        assert number_of("label", file.attrs["pickle"]) == 7


def test_geobench_says_what_is_wrong(tmp_path):
    BUILDERS["m_eurosat"](tmp_path)
    with pytest.raises(InputError, match=r"there is no file .*0.5x_train_partition.json"):
        open_labelled("m_eurosat", tmp_path, "train", partition="0.5x_train")
    with h5py.File(tmp_path / "sample_1.hdf5", "w") as file:
        file["Red"] = np.zeros((4, 4))
    with pytest.raises(InputError, match="holds none of the bands of GEO-Bench m-eurosat; it has Red"):
        open_labelled("m_eurosat", tmp_path, "valid")[0]
    with h5py.File(tmp_path / "sample_2.hdf5", "w") as file:
        file["04 - Red_2019-01-01"] = file["04 - Red_2019-02-01"] = np.zeros((4, 4))
    with pytest.raises(InputError, match="holds 04 - Red of several dates"):
        open_labelled("m_eurosat", tmp_path, "test")[0]


# Second edition


def opened(name, tmp_path, split="train", **options):
    truth = BUILDERS[name](tmp_path)[split]
    (sample,) = open_labelled(name, tmp_path, split, **options)
    return truth, sample


def test_gb2_benv2(tmp_path):
    truth, sample = opened("gb2_benv2", tmp_path, "validation")
    np.testing.assert_array_equal(bands(sample, "sentinel1", "vh", "vv")[0], truth["s1"])
    order = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
    np.testing.assert_array_equal(bands(sample, "sentinel2_l2a", *order)[0], truth["s2"])
    assert torch.nonzero(sample.target[0]).flatten().tolist() == [2, 18]
    assert sample.batch.lonlat.tolist() == [[9.5, 49.5]]
    swapped = open_labelled("gb2_benv2", tmp_path, "validation", as_published=True)[0]
    np.testing.assert_array_equal(bands(swapped, "sentinel1", "vv", "vh")[0], truth["s1"])


def test_gb2_treesatai(tmp_path):
    truth, sample = opened("gb2_treesatai", tmp_path)
    np.testing.assert_array_equal(sample.batch.observations["sentinel2_l2a"].pixels[0, 0], truth["s2"])
    names = DATASETS["gb2_treesatai"].class_names
    assert [name for name, there in zip(names, sample.target[0], strict=True) if there] == ["Abies", "Tilia"]


def test_gb2_biomassters(tmp_path):
    truth, sample = opened("gb2_biomassters", tmp_path)
    radar = sample.batch.observations["sentinel1"]
    stored = np.stack([truth[f"chip_S1_{i}"] for i in range(3)])
    both = (stored[:, :2] + stored[:, 2:]) / 2
    np.testing.assert_allclose(radar.pixels[0, :, :, 4, 5], both[:, :, 4, 5], rtol=1e-6)
    assert radar.pixels[0, 0, 0, 0, 0] == stored[0, 2, 0, 0]  # ascending is absent there
    assert not radar.valid[0, 1, 1, 1]
    assert radar.valid.sum() == 3 * 64 - 1
    optical = np.stack([truth[f"chip_S2_{i}"] for i in range(2)])
    wanted = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
    np.testing.assert_array_equal(bands(sample, "sentinel2_l2a", *wanted), optical[:, :10])
    np.testing.assert_array_equal(sample.target, truth["chip_AGBM"])


def test_gb2_burn_scars_in_either_sensor(tmp_path):
    truth, sample = opened("gb2_burn_scars", tmp_path)
    np.testing.assert_allclose(sample.batch.observations["hls"].pixels[0, 0], truth["image"] * 1e4, rtol=1e-6)
    np.testing.assert_array_equal(sample.target, np.where(truth["label"] < 0, IGNORE, truth["label"]))
    published = open_labelled("gb2_burn_scars", tmp_path, "train", as_published=True)[0]
    order = ("B02", "B03", "B04", "B8A", "B11", "B12")
    np.testing.assert_allclose(bands(published, "sentinel2_l2a", *order)[0], truth["image"] * 1e4, rtol=1e-6)
    assert not bands(published, "sentinel2_l2a", "B01", "B05", "B06", "B07", "B08", "B09").any()


def test_gb2_caffe(tmp_path):
    truth, sample = opened("gb2_caffe", tmp_path)
    np.testing.assert_array_equal(bands(sample, "sentinel1", "vv")[0], truth["img"])
    assert not bands(sample, "sentinel1", "vh").any()
    np.testing.assert_array_equal(sample.target, truth["mask"] - 1)  # 0 is without label


def test_gb2_cloudsen12(tmp_path):
    truth, sample = opened("gb2_cloudsen12", tmp_path)
    np.testing.assert_array_equal(bands(sample, "sentinel2_l2a", "B01", "B8A", "B12")[0], truth["s2l2a"][[0, 8, 11]])
    np.testing.assert_array_equal(sample.target, truth["target"])


def test_gb2_flair2_in_either_sensor(tmp_path):
    truth, sample = opened("gb2_flair2", tmp_path)
    order = ("R", "G", "B", "NIR", "elevation")
    np.testing.assert_array_equal(bands(sample, "aerial_flair", *order)[0], truth["aerial"])
    np.testing.assert_array_equal(sample.target, np.minimum(truth["mask"] - 1, 12))
    published = open_labelled("gb2_flair2", tmp_path, "train", as_published=True)[0]
    slots = ("B02", "B03", "B04", "B08", "B05")
    np.testing.assert_allclose(bands(published, "sentinel2_l2a", *slots)[0], truth["aerial"] * (1e4 / 255), rtol=1e-6)


def test_gb2_fotw(tmp_path):
    truth, sample = opened("gb2_fotw", tmp_path)
    stored = np.stack([truth["win_a"], truth["win_b"]])
    np.testing.assert_array_equal(bands(sample, "sentinel2_l2a", "B04", "B03", "B02", "B08"), stored)
    codes = truth["semantic_3class_mask"]
    np.testing.assert_array_equal(sample.target, np.where(codes > 2, IGNORE, codes))


def test_gb2_kuro_siwo(tmp_path):
    truth, sample = opened("gb2_kuro_siwo", tmp_path)
    usable = truth["invalid_data"][0] == 1
    stored = np.stack([truth[key] for key in ("pre_1", "pre_2", "post")])
    np.testing.assert_allclose(bands(sample, "sentinel1", "vv", "vh"), 10 * np.log10(stored), rtol=1e-5)
    heights = sample.batch.observations["srtm"]
    np.testing.assert_array_equal(heights.pixels[0, 0], np.maximum(truth["dem"], -500))
    for observation in sample.batch.observations.values():
        assert (observation.valid[0] == torch.from_numpy(usable)).all()
    np.testing.assert_array_equal(sample.target, np.where(truth["mask"] == 3, IGNORE, truth["mask"]))


def test_gb2_spacenet2(tmp_path):
    truth, sample = opened("gb2_spacenet2", tmp_path)
    slots = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11")
    np.testing.assert_array_equal(
        bands(sample, "sentinel2_l2a", *slots)[0], np.concatenate([truth["pan"], truth["ps-ms"]])
    )
    np.testing.assert_array_equal(sample.target, truth["semantic_mask"] + 1)


def test_gb2_spacenet7_in_either_sensor(tmp_path):
    truth, sample = opened("gb2_spacenet7", tmp_path)
    np.testing.assert_array_equal(sample.batch.observations["planet"].pixels[0, 0], truth["images"][:3])
    assert (sample.batch.observations["planet"].valid[0, 0].numpy() == (truth["images"][3] != 0)).all()
    published = open_labelled("gb2_spacenet7", tmp_path, "train", as_published=True)[0]
    order = ("B04", "B03", "B02", "B08")
    np.testing.assert_allclose(bands(published, "sentinel2_l2a", *order)[0], truth["images"] * (1e4 / 255), rtol=1e-6)


def test_tortillas_name_what_is_in_them(tmp_path):
    file = tmp_path / "letters.tortilla"
    inner = miniatures_benchmarks.tortilla([b"abc", b"de"], {"tortilla:id": ["one", "two"], "colour": ["red", "blue"]})
    file.write_bytes(miniatures_benchmarks.tortilla([b"first", inner], {"tortilla:id": ["plain", "nested"]}))
    content = file.read_bytes()
    first, nested = read_entries(file)
    assert content[first.offset : first.offset + first.length] == b"first"
    two = nested.entries()[1]
    assert (two.id, two.columns["colour"]) == ("two", "blue")
    assert content[two.offset : two.offset + two.length] == b"de"


def test_what_is_no_tortilla_is_refused(tmp_path):
    file = tmp_path / "geobench_caffe.tortilla"
    file.write_bytes(b"PK\3\4 and more")
    with pytest.raises(InputError, match=r"geobench_caffe.tortilla is no tortilla; it starts with b'PK'"):
        open_labelled("gb2_caffe", tmp_path, "train")
    file.write_bytes(b"#y" + (18).to_bytes(8, "little") + (4).to_bytes(8, "little") + b"junk")
    with pytest.raises(InputError, match=r"cannot read .*geobench_caffe.tortilla as a tortilla"):
        open_labelled("gb2_caffe", tmp_path, "train")
