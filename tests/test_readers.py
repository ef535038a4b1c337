"""Values pass through readers exactly: bands, units, days, labels, splits."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader

import miniatures
import miniatures_benchmarks
import parity_anysat_readers
from panterra.data import hls_burn_scars, spacenet7
from panterra.data.labelled import DATASETS, IGNORE, UNDATED, open_labelled
from panterra.data.stored_pixels import S2_BANDS, nearest, observe, parse_day
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.sample import collate, to_days

GOLDEN = Path(__file__).parent.parent.parent / "shared" / "golden" / "anysat"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every miniature, written once: its folder and what is in it."""
    folders = {name: tmp_path_factory.mktemp(name) for name in DATASETS}
    return {name: (folder, miniatures_benchmarks.BUILDERS[name](folder)) for name, folder in folders.items()}


def bands(observation, modality, *names):
    """Pick bands by name: [T, C, H, W]."""
    order = MODALITIES[modality].band_names
    return observation.pixels[0][:, [order.index(name) for name in names]].numpy()


def days(*dates):
    return [[to_days(date) for date in dates]]


def test_every_data_set_has_a_miniature():
    assert DATASETS.keys() == miniatures_benchmarks.BUILDERS.keys()


@pytest.mark.parametrize("name", DATASETS)
def test_samples_are_as_the_card_says(made, name):
    card, folder = DATASETS[name], made[name][0]
    for split in card.splits:
        labelled = open_labelled(name, folder, split)
        sample = labelled[0]
        assert sample.id == labelled.ids[0]
        assert set(sample.batch.observations) == set(card.modalities)
        assert len(labelled.class_names) == len(card.class_names)
        assert all(file.is_file() for file in labelled.files(sample.id))
        assert len(sample.batch) == len(sample.target) == 1
        if card.task in ("segmentation", "classification"):
            assert sample.target.dtype == torch.int64
            assert sample.target.min() >= IGNORE
            assert sample.target.max() < len(card.class_names)
        for observation in sample.batch.observations.values():
            assert torch.isfinite(observation.pixels).all()
            assert observation.valid.any()
            assert (observation.dates.diff() >= 0).all()


@pytest.mark.parametrize("name", DATASETS)
def test_unknown_splits_are_refused(name, tmp_path):
    with pytest.raises(InputError, match="has no split 'dev'; choose one of"):
        open_labelled(name, tmp_path, "dev")


@pytest.mark.parametrize("name", DATASETS)
def test_empty_folders_are_refused_in_one_sentence(name, tmp_path):
    card = DATASETS[name]
    with pytest.raises(InputError, match=str(tmp_path)):
        open_labelled(name, tmp_path, next(iter(card.splits)))


def test_unknown_data_sets_are_refused(tmp_path):
    with pytest.raises(InputError, match="no data set 'eurosat'; known: treesatai_ts, "):
        open_labelled("eurosat", tmp_path, "train")


@pytest.mark.parametrize("name", DATASETS)
def test_sets_travel_to_workers(made, name):
    labelled = open_labelled(name, made[name][0], next(iter(DATASETS[name].splits)))
    there = pickle.loads(pickle.dumps(labelled))
    assert torch.equal(there[0].target.nan_to_num(), labelled[0].target.nan_to_num())


def test_data_loader_takes_a_set(made):
    labelled = open_labelled("so2sat", made["so2sat"][0], "training")
    (samples,) = DataLoader(labelled, batch_size=3, collate_fn=list)
    batch = collate([sample.batch for sample in samples])
    assert len(batch) == 3
    assert [int(s.target) for s in samples] == [0, 16, 4]


# Each data set


def test_treesatai_ts(made):
    folder, truth = made["treesatai_ts"]
    labelled = open_labelled("treesatai_ts", folder, "train")
    assert labelled.ids == (truth["name"],)  # the other plot has no genus above 7 %
    sample = labelled[0]
    assert [name for name, there in zip(labelled.class_names, sample.target[0], strict=True) if there] == [
        "Abies",
        "Tilia",
    ]
    seen = sample.batch.observations
    np.testing.assert_array_equal(
        bands(seen["aerial"], "aerial", "NIR", "R", "G", "B")[0], truth["aerial"][:, 2:302, 2:302]
    )
    order = [1, 0, 2]
    np.testing.assert_array_equal(bands(seen["sentinel2_l2a"], "sentinel2_l2a", *S2_BANDS), truth["sen-2"][order])
    # Absent bands are stood in for by the nearest in wavelength.
    np.testing.assert_array_equal(
        bands(seen["sentinel2_l2a"], "sentinel2_l2a", "B01", "B09"), truth["sen-2"][order][:, [0, 7]]
    )
    assert seen["sentinel2_l2a"].dates.tolist() == days("2020-01-02", "2020-01-05", "2020-03-01")
    radar = seen["sentinel1_ascending"].pixels[0]
    np.testing.assert_allclose(radar, 10 * np.log10(truth["sen-1-asc"]), rtol=1e-5)
    assert sample.batch.lonlat[0].numpy() == pytest.approx(miniatures.WEST_EAST, abs=0.05)


@pytest.mark.parametrize(("name", "sensor"), [("treesatai_ts", "aerial"), ("flair", "aerial_flair")])
def test_images_come_whole_for_random_crops(made, name, sensor):
    folder, truth = made[name]
    sample = open_labelled(name, folder, "train", crop=False)[0]
    pixels = sample.batch.observations[sensor].pixels[0, 0]
    image = truth["aerial"] if name == "treesatai_ts" else truth["train"]["image"]
    np.testing.assert_array_equal(pixels.sum(0), image.astype("float32").sum(0))  # whatever the order of bands
    assert name == "treesatai_ts" or sample.target.shape == (1, 512, 512)


def test_treesatai_ts_orbits(made):
    folder, truth = made["treesatai_ts"]
    both = open_labelled("treesatai_ts", folder, "val", orbit="both")[0].batch.observations["sentinel1"]
    assert both.dates.tolist() == days("2020-01-03", "2020-01-06", "2020-01-09")
    stored = np.stack([truth["sen-1-asc"][0], truth["sen-1-des"][0], truth["sen-1-asc"][1]])
    np.testing.assert_allclose(both.pixels[0], 10 * np.log10(stored), rtol=1e-5)
    with pytest.raises(InputError, match="orbit is 'west'"):
        open_labelled("treesatai_ts", folder, "val", orbit="west")


def test_pastis_hd(made):
    folder, truth = made["pastis_hd"]
    assert open_labelled("pastis_hd", folder, "train").ids == ("10001", "10002", "10003")
    assert open_labelled("pastis_hd", folder, "train", folds=(2, 5)).ids == ("10002", "10005")
    (sample,) = open_labelled("pastis_hd", folder, "val")
    part, seen = truth["10004"], sample.batch.observations
    assert (sample.id, sample.fold) == ("10004", "4")
    optical, valid = seen["sentinel2_l2a"], np.ones((3, 8, 8), bool)
    valid[1, 2, 3] = False
    np.testing.assert_array_equal(bands(optical, "sentinel2_l2a", *S2_BANDS), part["S2"])
    np.testing.assert_array_equal(optical.valid[0], valid)
    assert optical.dates.tolist() == days("2018-09-24", "2019-10-03", "2019-10-10")
    np.testing.assert_array_equal(seen["sentinel1"].pixels[0], part["S1A"][:, :2])
    np.testing.assert_array_equal(seen["spot"].pixels[0, 0], part["SPOT"])
    codes = part["TARGET"][0].astype(int)
    np.testing.assert_array_equal(sample.target[0], np.where(codes == 19, IGNORE, codes))
    assert sample.batch.lonlat[0].numpy() == pytest.approx((3.0, 46.5), abs=0.1)


def test_pastis_hd_classes_and_orbits(made):
    folder, truth = made["pastis_hd"]
    (sample,) = labelled = open_labelled("pastis_hd", folder, "test", task="multilabel", orbit="both")
    part = truth["10005"]
    present = [code in part["TARGET"][0] for code in range(1, 19)]
    assert sample.target.tolist() == [[float(there) for there in present]]
    assert labelled.class_names[0] == "Meadow"
    radar = np.stack([part["S1A"], part["S1D"]], axis=1).reshape(6, 3, 8, 8)[:, :2]  # ascending first on equal days
    np.testing.assert_array_equal(sample.batch.observations["sentinel1"].pixels[0], radar)
    with pytest.raises(InputError, match="task is 'panoptic'"):
        open_labelled("pastis_hd", folder, "test", task="panoptic")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_flair(made, split):
    folder, truth = made["flair"]
    (sample,) = open_labelled("flair", folder, split)
    part, seen = truth[split], sample.batch.observations
    assert sample.id == part["name"]
    np.testing.assert_array_equal(seen["aerial_flair"].pixels[0, 0], part["image"][:, 6:506, 6:506])
    np.testing.assert_array_equal(
        bands(seen["sentinel2_l2a"], "sentinel2_l2a", *S2_BANDS), part["series"][:, :, 15:25, 22:32]
    )
    assert seen["sentinel2_l2a"].dates.tolist() == days("2021-01-14", "2021-05-09")
    codes = part["label"][0, 6:506, 6:506].astype(int)
    np.testing.assert_array_equal(sample.target[0], np.where(codes > 13, 13, codes) - 1)


def test_flair_crops_cover_the_image(made):
    folder, truth = made["flair"]
    corners = ((0, 0), (0, 12), (12, 0), (12, 12))
    labelled = open_labelled("flair", folder, "test", offsets=corners)
    assert labelled.ids[1] == "IMG_000002.tif@0,12"
    for (row, col), sample in zip(corners, labelled, strict=True):
        wanted = truth["test"]["image"][:, row : row + 500, col : col + 500]
        np.testing.assert_array_equal(sample.batch.observations["aerial_flair"].pixels[0, 0], wanted)
    with pytest.raises(InputError, match="wanted pairs from 0 to 12"):
        open_labelled("flair", folder, "test", offsets=((0, 13),))


def test_planted(made):
    folder, truth = made["planted"]
    sample = open_labelled("planted", folder, "val")[0]
    assert (sample.id, sample.target.tolist()) == ("val/17", [38])
    seen = sample.batch.observations
    assert seen["sentinel2"].dates.tolist() == [[16000, 16016, 16032]]
    valid = np.ones((3, 12, 12), bool)
    valid[-1] = valid[0, 0, 0] = False
    np.testing.assert_array_equal(seen["sentinel2"].valid[0], valid)
    stored = {key: truth["val", key].transpose(0, 3, 1, 2) for key in ("s2", "s1", "l7", "alos", "modis")}
    np.testing.assert_array_equal(bands(seen["sentinel2"], "sentinel2", *S2_BANDS), stored["s2"])
    np.testing.assert_array_equal(seen["sentinel1"].pixels[0], stored["s1"][:, :2])
    np.testing.assert_array_equal(seen["landsat7"].pixels[0], stored["l7"])
    np.testing.assert_array_equal(seen["modis"].pixels[0], stored["modis"])
    np.testing.assert_allclose(seen["alos2"].pixels[0], 20 * np.log10(stored["alos"][:, :2]) - 83, rtol=1e-4)
    as_stored = open_labelled("planted", folder, "val", alos_unit="db")[0].batch.observations["alos2"]
    np.testing.assert_array_equal(as_stored.pixels[0], stored["alos"][:, :2])


def test_s2naip_urban(made):
    folder, truth = made["s2naip_urban"]
    sample = open_labelled("s2naip_urban", folder, "train")[0]
    part, seen = truth["train"], sample.batch.observations
    np.testing.assert_array_equal(seen["naip"].pixels[0, 0, :, ::2, 1::2], part["naip"])
    np.testing.assert_array_equal(seen["sentinel1"].pixels[0], part["sentinel1"].reshape(2, 2, 64, 64))
    assert seen["sentinel1"].dates.tolist() == days("2020-01-05", "2020-01-17")
    np.testing.assert_array_equal(
        bands(seen["sentinel2"], "sentinel2", "B02", "B03", "B04", "B08")[0], part["sentinel2_8"]
    )
    coarse = bands(seen["sentinel2"], "sentinel2", "B05", "B06", "B07", "B8A", "B11", "B12")[0]
    # Between four pixels the nearest weighs (3/4)^2; in the corner there is only one.
    stored = part["sentinel2_16"].astype(float)
    weights = np.outer([0.75, 0.25], [0.75, 0.25])
    np.testing.assert_allclose(coarse[:, 1, 1], (stored[:, :2, :2] * weights).sum((1, 2)), atol=0.51)
    np.testing.assert_array_equal(coarse[:, 0, 0], stored[:, 0, 0])
    np.testing.assert_array_equal(bands(seen["landsat"], "landsat", "B8")[0], part["landsat_8"])
    np.testing.assert_array_equal(
        bands(seen["landsat"], "landsat", "B11")[0, :, 63, 63], part["landsat_16"][9:, 31, 31]
    )
    assert not seen["sentinel2"].valid[0, 0, 0, 0]
    assert seen["sentinel2"].valid.sum() == 64 * 64 - 1
    assert not seen["landsat"].valid[0, 0, 10:12, 10:12].any()
    assert seen["landsat"].valid.sum() == 64 * 64 - 4


def test_s2naip_urban_labels(made):
    target = open_labelled("s2naip_urban", made["s2naip_urban"][0], "train")[0].target[0]
    wanted = np.zeros((512, 512), int)
    wanted[20:40, 10:30] = 3
    wanted[22:24, 12:14] = 1
    wanted[99:101] = 2
    wanted[400:405, 400:410] = 5
    wanted[300, 200] = 4
    around = np.s_[298:303, 198:203]
    assert (target[around] == 4).sum() in range(1, 6)
    wanted[around] = target[around]
    np.testing.assert_array_equal(target, wanted)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_bradd_s1ts_in_decibels_and_linear(made, split):
    folder, truth = made["bradd_s1ts"]
    (sample,) = open_labelled("bradd_s1ts", folder, split)
    seen = sample.batch.observations["sentinel1"]
    np.testing.assert_allclose(seen.pixels[0], truth[split]["image"], rtol=1e-4)
    assert seen.dates.tolist() == days("2019-01-05", "2019-01-17", "2019-01-29")
    np.testing.assert_array_equal(sample.target[0], truth[split]["label"][1])


def test_bradd_s1ts_opens_no_harmful_pickle(made, tmp_path):
    miniatures.bradd_s1ts(tmp_path)
    torch.save({"image": Path("/")}, tmp_path / "Samples" / "sample_0.pt")
    with pytest.raises(InputError, match=r"cannot read .*sample_0\.pt .*; download it again"):
        open_labelled("bradd_s1ts", tmp_path, "train")[0]


def test_sickle(made):
    folder, truth = made["sickle"]
    train, val = (open_labelled("sickle", folder, split) for split in ("train", "val"))
    assert (train.ids, val.ids) == (("7",), ("7", "8"))
    sample = train[0]
    wanted = np.full((32, 32), IGNORE)
    wanted[:4], wanted[4:8] = 0, 1
    np.testing.assert_array_equal(sample.target[0], wanted)
    assert (val[0].target[0][8:12] == 0).all()
    assert (val[0].target == IGNORE).sum() == 28 * 32
    seen = sample.batch.observations
    assert seen["sentinel2_l2a"].dates.tolist() == days("2018-01-01", "2018-01-06")
    stored = truth["S2", "20180106T050211_20180106T051254_T44PKS"]
    np.testing.assert_array_equal(
        bands(seen["sentinel2_l2a"], "sentinel2_l2a", "B8A", "B08")[1], [stored["B8A"], stored["B8"]]
    )
    assert seen["sentinel1"].dates.tolist() == days("2018-01-03")
    landsat, stored = seen["landsat"], truth["L8", "LC08_143052_20180110"]
    assert landsat.dates.tolist() == days("2018-01-10")
    reflectance = nearest(stored["SR_B4"], 32) * 2.75e-5 - 0.2
    np.testing.assert_allclose(bands(landsat, "landsat", "B4")[0, 0] * 2e-5 - 0.1, reflectance, atol=1e-5)
    # Back from digital numbers through radiance to the temperature that was stored.
    radiance = bands(landsat, "landsat", "B10")[0, 0] * 3.342e-4 + 0.1
    kelvin = 1321.0789 / np.log(774.8853 / radiance + 1)
    np.testing.assert_allclose(kelvin, nearest(stored["ST_B10"], 32) * 0.00341802 + 149, atol=0.01)
    assert landsat.pixels.shape == (1, 1, 11, 32, 32)


def test_timesen2crop(made):
    folder, truth = made["timesen2crop"]
    ids = {split: open_labelled("timesen2crop", folder, split).ids for split in ("train", "val", "test")}
    assert ids == {"train": ["32TNT/10/41.csv"], "val": ["33TWN/11/41.csv"], "test": ["33UVP/12/41.csv"]}
    (sample,) = open_labelled("timesen2crop", folder, "val")
    seen = sample.batch.observations["sentinel2_l2a"]
    stored = truth["33TWN"].astype("float32")
    names = ("B02", "B03", "B04", "B05", "B06", "B07", "B8A", "B11", "B12")
    np.testing.assert_array_equal(bands(seen, "sentinel2_l2a", *names)[..., 0, 0], stored)
    np.testing.assert_array_equal(bands(seen, "sentinel2_l2a", "B08", "B09")[..., 0, 0], stored[:, [6, 6]])
    assert seen.dates.tolist() == days("2017-09-06", "2017-09-13", "2017-10-02")
    assert sample.target.tolist() == [11]
    assert seen.valid.all()
    (clear,) = open_labelled("timesen2crop", folder, "val", clear_only=True)
    assert clear.batch.observations["sentinel2_l2a"].valid.flatten().tolist() == [True, False, False]


def test_sen1floods11(made):
    folder, truth = made["sen1floods11"]
    (sample,) = open_labelled("sen1floods11", folder, "train")
    part, seen = truth["train"], sample.batch.observations
    names = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
    np.testing.assert_array_equal(bands(seen["sentinel2"], "sentinel2", *names)[0], part["S2"])
    assert [seen[m].dates.tolist() for m in ("sentinel1", "sentinel2")] == [days("2018-09-18"), days("2018-09-19")]
    np.testing.assert_array_equal(seen["sentinel1"].pixels[0, 0], np.nan_to_num(part["S1"]))
    assert not seen["sentinel1"].valid[0, 0, 3, 3]
    assert not seen["sentinel2"].valid[0, 0, 4, 4]
    assert seen["sentinel2"].valid.sum() == seen["sentinel1"].valid.sum() == 255
    np.testing.assert_array_equal(sample.target, part["Label"])
    # Two floods of that name: no way to know which.
    (unknown,) = open_labelled("sen1floods11", folder, "valid")
    assert unknown.batch.observations["sentinel1"].dates.tolist() == [[UNDATED]]


def test_so2sat(made):
    folder, truth = made["so2sat"]
    sample = open_labelled("so2sat", folder, "testing")[2]
    part, seen = truth["testing"], sample.batch.observations
    optical = bands(seen["sentinel2"], "sentinel2", *S2_BANDS)[0]
    np.testing.assert_allclose(optical, part["sen2"][2].transpose(2, 0, 1) * 1e4, rtol=1e-5)
    intensity = part["sen1"][2][..., [5, 4]].transpose(2, 0, 1)
    np.testing.assert_allclose(seen["sentinel1"].pixels[0, 0], 10 * np.log10(intensity), rtol=1e-4)
    assert (sample.target.tolist(), sample.id) == ([4], "testing/2")


def test_hls_burn_scars(made):
    folder, truth = made["hls_burn_scars"]
    sample = open_labelled("hls_burn_scars", folder, "test")[1]
    pixels, mask = truth["validation", sample.id]
    seen = sample.batch.observations["hls"]
    assert not seen.valid[0, 0, 1, 1]
    keep = seen.valid[0, 0].numpy()
    np.testing.assert_allclose(seen.pixels[0, 0][:, keep], pixels[:, keep] * 1e4, rtol=1e-6)
    assert seen.dates.tolist() == days("2018-07-10")  # day 191
    np.testing.assert_array_equal(sample.target, mask)


@pytest.mark.parametrize("count", [10, 11, 19, 540])
def test_hls_burn_scars_draws_as_scikit_learn_does(count):
    train, val = train_test_split(list(range(count)), test_size=0.1, random_state=23)
    assert hls_burn_scars._draw(count) == (val, train)


def test_hls_burn_scars_splits_share_nothing(made):
    folder, _ = made["hls_burn_scars"]
    train, val = (set(open_labelled("hls_burn_scars", folder, split).ids) for split in ("train", "val"))
    assert (len(train), len(val), train & val) == (9, 2, set())


def test_spacenet7(made):
    folder, truth = made["spacenet7"]
    (sample,) = open_labelled("spacenet7", folder, "val")
    area = spacenet7.AREAS["val"][0]
    image, label = truth[area]
    assert sample.id == f"{area}/2018_07"
    seen = sample.batch.observations["planet"]
    np.testing.assert_array_equal(seen.pixels[0, 0][:, ::16, ::16], image[:3])
    np.testing.assert_array_equal(seen.valid[0, 0][::16, ::16], image[3] != 0)
    assert seen.dates.tolist() == days("2018-07-15")
    np.testing.assert_array_equal(sample.target[0, ::16, ::16], label[0] > 0)


def test_biomassters(made):
    folder, truth = made["biomassters"]
    (sample,) = open_labelled("biomassters", folder, "val")
    seen = sample.batch.observations
    optical, radar = seen["sentinel2_l2a"], seen["sentinel1"]
    assert optical.dates[0, :4].tolist() == days("2019-09-15", "2019-10-15", "2019-11-15", "2020-02-15")[0]
    np.testing.assert_array_equal(bands(optical, "sentinel2_l2a", *S2_BANDS)[3], truth["val", "S2", 5][:10])
    assert radar.dates[0, [0, 1, -1]].tolist() == days("2019-09-15", "2019-09-15", "2020-08-15")[0]
    np.testing.assert_array_equal(radar.pixels[0, 2], truth["val", "S1", 1][:2])
    np.testing.assert_array_equal(
        radar.valid[0, :2, 2, 2], [True, False]
    )  # descending VH of September is missing there
    np.testing.assert_array_equal(sample.target, truth["val", "label"])


# What readers share


def test_bands_without_stand_in_are_refused():
    with pytest.raises(InputError, match="landsat7 is stored without B7, for which no other band may stand in"):
        observe("landsat7", np.ones((1, 5, 2, 2)), [0], bands=("B1", "B2", "B3", "B4", "B5"))


def test_images_and_dates_must_agree():
    with pytest.raises(InputError, match="spot has 2 images and 1 dates"):
        observe("spot", np.ones((2, 3, 2, 2)), [0], bands=("R", "G", "B"))


@pytest.mark.parametrize(
    "text", ["20200229", 20200229, "2020-02-29", "2020/02/29", "20200229T101010", np.datetime64("2020-02-29T10")]
)
def test_days_are_read_however_they_are_written(text):
    assert parse_day(text) == to_days("2020-02-29")


def test_what_is_not_a_day_is_refused():
    with pytest.raises(InputError, match="'2020-13-01' is not a date"):
        parse_day("2020-13-01")


@pytest.mark.parametrize("size", [3, 8, 32])
def test_nearest_is_what_torch_does(size):
    pixels = torch.arange(121.0).reshape(1, 1, 11, 11)
    wanted = torch.nn.functional.interpolate(pixels, size=(size, size), mode="nearest")
    np.testing.assert_array_equal(nearest(pixels.numpy(), size), wanted)


# What is recorded, and what is real


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the recorded numbers are not here")
@pytest.mark.parametrize("case", parity_anysat_readers.CHECKS)
def test_recorded_facts_hold(case):
    parity_anysat_readers.CHECKS[case](GOLDEN / f"{case}.json")


@pytest.mark.data
def test_real_treesatai_ts(data_dir, tmp_path):
    stem = "Abies_alba_1_1005_WEFL_NLF"
    for folder, ending in (("aerial", "tif"), ("sentinel", "h5")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{stem}.{ending}").symlink_to(data_dir / "treesatai_ts_sample" / f"{stem}.{ending}")
    (tmp_path / "train_filenames.lst").write_text(f"{stem}.tif\n")
    miniatures.write_json(tmp_path / "labels/TreeSatBA_v9_60m_multi_labels.json", {f"{stem}.tif": [["Abies", 1.0]]})
    (sample,) = open_labelled("treesatai_ts", tmp_path, "train", orbit="both")
    seen = sample.batch.observations
    assert {name: tuple(o.pixels.shape[1:]) for name, o in seen.items()} == {
        "aerial": (1, 4, 300, 300),
        "sentinel2_l2a": (146, 12, 6, 6),
        "sentinel1": (146, 2, 6, 6),
    }
    assert seen["sentinel2_l2a"].dates[0, 0] == to_days("2020-01-02")
    # Vegetation is brightest in the infrared, and the radar's cross polarisation is the weaker one.
    colours = seen["aerial"].pixels.mean((0, 1, 3, 4))
    assert MODALITIES["aerial"].band_names[int(colours.argmax())] == "NIR"
    vv, vh = seen["sentinel1"].pixels.mean((0, 1, 3, 4))
    assert -12 < vv < -6
    assert 3 < vv - vh < 9
    with h5py.File(data_dir / "treesatai_ts_sample" / f"{stem}.h5") as file:
        np.testing.assert_array_equal(bands(seen["sentinel2_l2a"], "sentinel2_l2a", *S2_BANDS), file["sen-2-data"][:])
    assert sample.batch.lonlat[0].numpy() == pytest.approx((9.95, 52.08), abs=0.05)


@pytest.mark.data
def test_real_sen1floods11(data_dir, tmp_path):
    chip = "Spain_7370579"
    hand = tmp_path / "v1.1/data/flood_events/HandLabeled"
    for ours, theirs in (("S1Hand", "S1"), ("S2Hand", "S2"), ("LabelHand", "label")):
        (hand / ours).mkdir(parents=True)
        (hand / ours / f"{chip}_{ours}.tif").symlink_to(data_dir / "sen1floods11_spain" / f"{chip}_west_{theirs}.tif")
    listing = tmp_path / "v1.1/splits/flood_handlabeled/flood_test_data.csv"
    miniatures.write_text(listing, f"{chip}_S1Hand.tif,{chip}_LabelHand.tif\n")
    flood = {"properties": {"location": "Spain", "s1_date": "2019/09/17", "s2_date": "2019/09/18"}}
    miniatures.write_json(tmp_path / "v1.1/Sen1Floods11_Metadata.geojson", {"features": [flood]})
    (sample,) = open_labelled("sen1floods11", tmp_path, "test")
    seen = sample.batch.observations
    assert seen["sentinel2"].dates.tolist() == days("2019-09-18")
    assert sample.target.unique().tolist() == [-1, 0, 1]
    # Open water is dark in the near infrared and to the radar.
    water, land = (sample.target[0] == code for code in (1, 0))
    for modality, band in (("sentinel2", "B08"), ("sentinel1", "vh")):
        pixels = torch.from_numpy(bands(seen[modality], modality, band)[0, 0])
        assert pixels[water].median() < pixels[land].median()
    assert sample.batch.lonlat[0].numpy() == pytest.approx((-0.77, 38.1), abs=0.05)
