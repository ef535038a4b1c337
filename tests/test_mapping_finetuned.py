"""Maps that a fine-tuned model makes."""

import json

import numpy as np
import pytest
import rasterio
import torch

from panterra.errors import InputError
from panterra.evaluate.probes import ProbeClass
from panterra.finetune.heads import HeadConfig
from panterra.finetune.model import Base, FineTuned, Setup, load_finetuned
from panterra.finetune.tasks import TASKS
from panterra.imagery.stac import open_scene
from panterra.mapping import run
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig
from panterra.planet import write_planet_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """54 pixels are no whole number of patches of 40 m."""
    folder = tmp_path_factory.mktemp("planet") / "scene"
    dates = ("2023-06-09", "2023-07-22")
    return open_scene(write_planet_scene(folder, seed=3, size_px=54, dates=dates, labels=20))


def a_model(task="segmentation", kind="linear", side=4, skip=None):
    torch.manual_seed(0)
    config = OlmoEarthConfig(dim=32, depth=2, heads=2, position="rope_3d_mixed", pixel_hidden=(8,), convolution=False)
    encoder, row = OlmoEarth(config, name="olmoearth-v1.2-nano"), TASKS[task]
    encoder.licence = "OlmoEarth Artifact License"
    values = row.answer == "values"
    names = () if values else ("maize", "water", "forest")
    model = FineTuned(
        encoder,
        Setup(
            task=task,
            head=HeadConfig(
                kind=kind,
                dense=row.dense,
                dim=32,
                outputs=row.outputs(len(names)),
                side=side,
                hidden=16,
                skip_bands=12 if skip else 0,
            ),
            classes=tuple(ProbeClass(name=n, code=k, colour=(40 * k, 9, 9)) for k, n in enumerate(names, start=1)),
            modalities=("sentinel2_l2a", "sentinel1"),
            patch_m=40,
            window_px=32,
            centre=5.0 if values else 0.0,
            spread=2.0 if values else 1.0,
            skip=skip,
            base=Base.of(encoder),
        ),
    )
    if skip:
        model.skip_mean.fill_(1500)
        model.skip_std.fill_(900)
    return model.eval().requires_grad_(False)


def read(path):
    with rasterio.open(path) as file:
        return file.read()


@pytest.fixture
def saved(tmp_path):
    return a_model(kind="conv", skip="sentinel2_l2a").save(tmp_path / "model")


def test_a_saved_model_is_the_model(saved, scene):
    model, again = a_model(kind="conv", skip="sentinel2_l2a"), load_finetuned(saved)
    batch = scene.batch(scene.geobox()[:32, :32])
    one, other = (m.encode(batch, patch_m=10) for m in (model, again))
    torch.testing.assert_close(one.patches, other.patches, atol=0, rtol=0)
    assert again.setup == model.setup


def test_a_map_of_one_window_is_the_prediction(saved, scene, tmp_path):
    box = scene.geobox()[:32, :32]
    result = run.map(scene, saved, tmp_path / "map.tif", box=box, probabilities=True)
    with torch.inference_mode():
        features = load_finetuned(saved).encode(scene.batch(box, ["sentinel2_l2a", "sentinel1"]), patch_m=10)
    scores, valid = features.patches[0], features.valid[0].numpy()
    expected = np.where(valid, scores.argmax(-1).numpy() + 1, 0)
    np.testing.assert_array_equal(read(result.path)[0], expected)
    shares = np.where(valid, scores.softmax(-1).movedim(-1, 0).numpy(), np.nan)
    np.testing.assert_allclose(read(result.probabilities), shares, atol=1e-5)


def test_classes_come_with_names_colours_and_where_they_came_from(saved, scene, tmp_path):
    result = run.map(scene, saved, tmp_path / "map.tif")
    with rasterio.open(result.path) as file:
        assert (file.height, file.width) == (54, 54)
        assert file.nodata == 0
        assert file.colormap(1)[2][:3] == (80, 9, 9)
        assert "water" in json.dumps(file.tags(1))
    passport = json.loads(result.passport.read_text())["properties"]
    assert passport["panterra:probe"]["base"]["licence"] == "OlmoEarth Artifact License"
    assert "military" in passport["panterra:probe"]["base"]["terms"]
    assert passport["panterra:probe"]["sha256"] == passport["panterra:model"]["weights_sha256"]


def test_tiles_do_not_change_the_map(saved, scene, tmp_path):
    whole = run.map(scene, saved, tmp_path / "whole.tif", probabilities=True, tile_px=512)
    tiled = run.map(scene, saved, tmp_path / "tiled.tif", probabilities=True, tile_px=32, batch_windows=1)
    np.testing.assert_allclose(read(whole.probabilities), read(tiled.probabilities), atol=1e-4)


def test_a_killed_map_goes_on_with_the_same_bytes(saved, scene, tmp_path):
    def stop(done, total):
        if done > 1:
            raise KeyboardInterrupt

    one = run.map(scene, saved, tmp_path / "one.tif", tile_px=32, batch_windows=1)
    with pytest.raises(KeyboardInterrupt):
        run.map(scene, saved, tmp_path / "two.tif", tile_px=32, batch_windows=1, progress=stop)
    two = run.map(scene, saved, tmp_path / "two.tif", tile_px=32, batch_windows=1)
    assert one.path.read_bytes() == two.path.read_bytes()


def test_values_are_mapped_in_their_unit(scene, tmp_path):
    model, box = a_model("regression", side=1), scene.geobox()[:32, :32]
    result = run.map(scene, model, tmp_path / "map.tif", box=box)
    with torch.inference_mode():
        features = model.encode(scene.batch(box), patch_m=40)
    expected = np.where(features.valid[0], features.patches[0, ..., 0], np.nan)
    np.testing.assert_allclose(read(result.path)[0], expected, rtol=1e-5)
    with pytest.raises(InputError, match="no probabilities"):
        run.map(scene, model, tmp_path / "other.tif", probabilities=True)


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_scenes_are_classified_window_by_window(scene, tmp_path, task):
    model = a_model(task, kind="attention", side=1)
    result = run.map(scene, model, tmp_path / "map.tif", probabilities=True)
    shares = read(result.probabilities)
    assert shares.shape == (3, 2, 2)
    batch = scene.batch(scene.geobox()[:32, :32], ["sentinel2_l2a", "sentinel1"])
    with torch.inference_mode():
        scores = model(batch)[0]
    expected = scores.sigmoid() if task == "multilabel" else scores.softmax(0)
    np.testing.assert_allclose(shares[:, 0, 0], expected, atol=1e-5)


def test_what_a_fine_tuned_model_cannot_do_is_said(saved, scene, tmp_path):
    with pytest.raises(InputError, match="has its own encoder"):
        run.map(scene, saved, tmp_path / "map.tif", model="olmoearth-v1-nano")
    run.embed(scene, a_model().encoder, tmp_path / "e.zarr")
    with pytest.raises(InputError, match="not stored embeddings"):
        run.map(tmp_path / "e.zarr", saved, tmp_path / "map.tif")
    with pytest.raises(InputError, match="not a saved probe"):
        run.map(scene, tmp_path, tmp_path / "map.tif")
