"""rslearn windows pass through their reader exactly: bands, units, days, labels, splits."""

import json

import numpy as np
import pytest
import torch

import miniatures_benchmarks
from miniatures import write_json, write_tif
from panterra.data.labelled import DATASETS, IGNORE, open_labelled
from panterra.data.rslearn_windows import open_rslearn
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


def test_nandi(tmp_path):
    truth = BUILDERS["nandi_crop_map"](tmp_path)["val"]
    (sample,) = open_labelled("nandi_crop_map", tmp_path, "val")
    assert (sample.id, sample.fold) == ("default/window_1", "val")
    optical = sample.batch.observations["sentinel2_l2a"]
    assert optical.dates.tolist() == days("2021-11-01", "2021-12-01")
    for step in range(2):
        fine, coarse = truth["sentinel2_l2a", step, 0], truth["sentinel2_l2a", step, 1]
        np.testing.assert_array_equal(bands(sample, "sentinel2_l2a", "B02", "B03", "B04", "B08")[step], fine)
        found = bands(sample, "sentinel2_l2a", "B05", "B06", "B07", "B8A", "B11", "B12")[step]
        np.testing.assert_array_equal(found, coarse.repeat(2, axis=1).repeat(2, axis=2))
    codes = truth["label"].astype(int)
    np.testing.assert_array_equal(sample.target, np.where(codes == 255, IGNORE, codes))
    # 50,004 pixels of 10 m east, which is 500,040 m, and 5,499,960 m north in zone 32.
    assert sample.batch.lonlat[0].numpy() == pytest.approx((9.0006, 49.6512), abs=1e-3)


def test_published_start_and_own_months(tmp_path):
    BUILDERS["awf_lulc_map"](tmp_path)
    sample = open_labelled("awf_lulc_map", tmp_path, "train", start="2022-09")[0]
    assert sample.batch.observations["sentinel2_l2a"].dates.tolist() == days("2022-09-01", "2022-10-01")


def test_radar_power_becomes_decibels_and_values_stay_values(tmp_path):
    truth = BUILDERS["lfmc_woody_3k_s1_s2"](tmp_path)["test"]
    (sample,) = open_labelled("lfmc_woody_3k_s1_s2", tmp_path, "test")
    np.testing.assert_allclose(
        bands(sample, "sentinel1", "vv", "vh")[1], 10 * np.log10(truth["sentinel1", 1, 0]), rtol=1e-5
    )
    wanted = np.where(truth["label"] == 255, np.nan, truth["label"].astype(np.float32))
    np.testing.assert_array_equal(sample.target, wanted)
    stored = open_labelled("lfmc_woody_3k_s1_s2", tmp_path, "test", radar_unit="db", nodata=-1)[0]
    np.testing.assert_array_equal(bands(stored, "sentinel1", "vv", "vh")[1], truth["sentinel1", 1, 0])
    assert stored.target[0, 0, 0] == 255


def test_vessels_have_a_class_or_a_length(tmp_path):
    BUILDERS["small_landsat_vessel_type"](tmp_path / "type")
    BUILDERS["small_landsat_vessel_length"](tmp_path / "length")
    kind = open_labelled("small_landsat_vessel_type", tmp_path / "type", "train")[0]
    length = open_labelled("small_landsat_vessel_length", tmp_path / "length", "train")[0]
    assert (kind.target.dtype, kind.target.tolist()) == (torch.int64, [3])
    assert (length.target.dtype, length.target.tolist()) == (torch.float32, [41.5])
    assert bands(kind, "landsat", "B8").shape == (2, 1, 8, 8)


def test_classes_may_be_names(tmp_path):
    BUILDERS["forest_loss_driver"](tmp_path)
    path = tmp_path / "windows/default/window_0/layers/label_raster/data.geojson"
    shapes = json.loads(path.read_text())
    shapes["features"][0]["properties"] = {"driver": "mining"}
    path.write_text(json.dumps(shapes))
    names = ("agriculture", "mining", *(f"other {i}" for i in range(8)))
    labelled = open_labelled("forest_loss_driver", tmp_path, "train", class_names=names, label="driver")
    assert labelled.class_names[labelled[0].target] == "mining"
    with pytest.raises(InputError, match="has the class 'mining'; give class_names"):
        open_labelled("forest_loss_driver", tmp_path, "train", label="driver")[0]
    with pytest.raises(InputError, match="has no shape with a 'label'; give the label's property"):
        open_labelled("forest_loss_driver", tmp_path, "train")[0]


def test_layers_of_one_modality_follow_each_other(tmp_path):
    """Before and after are two layers of the same sensor."""
    BUILDERS["yemen_crop"](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = ["B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12"]
    # A long list of bands is a folder of another name.
    after = tmp_path / "windows/default/window_0/layers/after/4fe1c2/geotiff.tif"
    write_tif(after, np.full((10, 8, 8), 700, "uint16"))
    config["layers"]["after"] = {"type": "raster", "band_sets": [{"bands": names}]}
    write_json(tmp_path / "config.json", config)
    layers = {"sentinel2_l2a": "sentinel2_l2a", "after": "sentinel2_l2a"}
    sample = open_labelled("yemen_crop", tmp_path, "train", layers=layers, target="label_raster")[0]
    seen = sample.batch.observations["sentinel2_l2a"]
    assert seen.dates.tolist() == days("2021-11-01", "2021-12-01", "2022-01-01")
    assert (seen.pixels[0, 2] == 700).all()
    config["layers"]["after"]["band_sets"] = [{"bands": names[::-1]}]
    write_json(tmp_path / "config.json", config)
    with pytest.raises(InputError, match="after has other bands than the layers before it"):
        open_labelled("yemen_crop", tmp_path, "train", layers=layers, target="label_raster")[0]


def test_ones_own_data_set(tmp_path):
    truth = miniatures_benchmarks.rslearn(DATASETS["descals"], tmp_path)
    labelled = open_rslearn(tmp_path, "train", task="segmentation", class_names=("a", "b", "c"))
    assert labelled.class_names == ("a", "b", "c")
    assert (labelled[0].target.numpy()[truth["train"]["label"] < 255] < 3).all()
    groups = open_rslearn(tmp_path, "default", task="segmentation", class_names=("a", "b", "c"), split_tag=None)
    assert len(groups) == 3
    with pytest.raises(InputError, match="wants a task and class_names"):
        open_rslearn(tmp_path, "train")


def test_missing_pixels_are_not_valid(tmp_path):
    BUILDERS["descals"](tmp_path)
    for folder in (tmp_path / "windows/default/window_0/layers/sentinel2_l2a").iterdir():
        size = 8 if "B02" in folder.name else 4
        pixels = np.full((len(folder.name.split("_")), size, size), 500, "uint16")
        pixels[:, 0] = 0
        write_tif(folder / "geotiff.tif", pixels)
    valid = open_labelled("descals", tmp_path, "train")[0].batch.observations["sentinel2_l2a"].valid[0]
    assert not valid[0, 0].any()
    assert valid[0, 2:].all()
    assert valid[1].all()


def test_rslearn_says_what_is_wrong(tmp_path):
    BUILDERS["descals"](tmp_path)
    with pytest.raises(InputError, match="has no layer 'planet' but sentinel2_l2a, label_raster"):
        open_labelled("descals", tmp_path, "train", layers={"planet": "planet"}, target="label_raster")
    with pytest.raises(InputError, match=r"no window of .* is in the split 'test'; there are None"):
        open_labelled("descals", tmp_path, "test", split_tag="fold")
    (tmp_path / "windows/default/window_0/layers/sentinel2_l2a/B02_B03_B04_B08/geotiff.tif").unlink()
    with pytest.raises(InputError, match=r"cannot read .*B02_B03_B04_B08/geotiff.tif"):
        open_labelled("descals", tmp_path, "train")[0]
    write_json(tmp_path / "windows/other/window_9/metadata.json", {"name": "window_9"})
    with pytest.raises(InputError, match=r"window_9/metadata.json does not say where the window lies"):
        open_labelled("descals", tmp_path, "train")
    (tmp_path / "windows/other/window_9/metadata.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config["layers"]["other"] = {"type": "vector"}
    config["layers"]["crops"] = config["layers"].pop("label_raster")
    write_json(tmp_path / "config.json", config)
    with pytest.raises(InputError, match="which layer holds the labels is not clear; name one of"):
        open_labelled("descals", tmp_path, "train")
