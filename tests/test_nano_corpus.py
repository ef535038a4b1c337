import numpy as np
import pytest

from panterra.data.olmoearth_h5 import open_corpus, read_item, write_corpus
from panterra.errors import InputError
from panterra.imagery.stac import open_scene
from panterra.modalities import MODALITIES
from panterra.planet import write_planet_scene
from panterra.recipes.nano_corpus import DATES, SIDE_PX, planet_samples, scene_samples, starts

S2 = MODALITIES["sentinel2_l2a"].band_names


def test_places_follow_from_the_seed_alone():
    first, second = planet_samples(2, seed=3)
    again = next(planet_samples(1, seed=3))
    assert first.pixels.keys() == again.pixels.keys()
    assert all(np.array_equal(x, again.pixels[m]) for m, x in first.pixels.items())
    assert not np.array_equal(first.pixels["sentinel2_l2a"][..., :1, :], second.pixels["sentinel2_l2a"][..., :1, :])


def test_samples_are_read_back_as_a_corpus(tmp_path):
    made = list(planet_samples(3, seed=1))
    corpus = open_corpus(write_corpus(tmp_path, made))
    for i, sample in enumerate(made):
        item = read_item(corpus.path(i), ("sentinel2_l2a", "worldcover"), rng=np.random.default_rng(0))
        seen = item.inputs["sentinel2_l2a"][0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(seen, sample.pixels["sentinel2_l2a"][:, :, 0].astype(np.float32))
        assert set(np.unique(item.inputs["worldcover"])) <= {10, 30, 40, 50, 60, 80, 90}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    dates = ("2023-05-02", "2023-06-11", "2023-07-05", "2023-08-14", "2023-09-01")
    write_planet_scene(folder, size_px=96, dates=dates, modalities=("sentinel2", "sentinel1"), labels=3)
    return open_scene(folder)


def test_a_scene_is_cut_into_crops_of_its_clear_dates(scene):
    samples = list(scene_samples(scene, modalities=("sentinel2", "sentinel1"), stride_px=32, series=2, clear=0.0))
    assert len(samples) == 2 * len(starts(96, 32)) ** 2
    window = scene.geobox()[:SIDE_PX, :SIDE_PX]
    seen = scene.read("sentinel2", window)
    order = [MODALITIES["sentinel2"].band_names.index(band) for band in S2]
    sample = samples[0]
    assert sample.present["sentinel2_l2a"].sum() == DATES
    stamp = [(d.day, d.month - 1, d.year) for d in scene.dates("sentinel2")]
    places = [stamp.index(tuple(row)) for row in sample.timestamps[:DATES].tolist()]
    assert places == sorted(set(places))
    expected = seen.pixels[0, places][:, order].permute(2, 3, 0, 1).numpy()
    np.testing.assert_array_equal(sample.pixels["sentinel2_l2a"], expected.round())
    assert sample.pixels["sentinel1"].dtype == np.float32


def test_crops_reach_the_end_of_a_scene_and_no_further():
    assert starts(100, 24) == [0, 24, 36]
    assert starts(64, 24) == [0]
    with pytest.raises(InputError, match="63 pixels wide came; wanted 64"):
        starts(63, 24)
