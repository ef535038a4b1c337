"""Fine-tuning on sub-patches: from labels on a scene to a map of cells that are finer than patches."""

import json
from dataclasses import replace

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
import torch

from panterra.cli import main
from panterra.errors import InputError
from panterra.evaluate.probes import ProbeClass
from panterra.finetune.examples import examples_from_scenes
from panterra.finetune.heads import HeadConfig
from panterra.finetune.model import Base, FineTuned, Setup, load_finetuned, on_sub_patches
from panterra.finetune.run import Settings, finetune
from panterra.finetune.step import Tuning
from panterra.finetune.tasks import TASKS
from panterra.imagery.stac import open_scene
from panterra.mapping.detections import detect
from panterra.mapping.detector import NO_OBJECT, Detector
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig
from panterra.models.weights import save_model
from panterra.planet import write_planet_scene
from panterra.sample import Batch, Observation

QUICK = Tuning(epochs=2, head_first=1, batch_size=4, patience=3, lr=1e-2, encoder_lr=1e-3)


def an_anysat(**options):
    torch.manual_seed(0)
    return AnySat(AnySatConfig(dim=32, depth=1, heads=2), name="small", **options).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(an_anysat(), tmp_path_factory.mktemp("anysat") / "model")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    where = tmp_path_factory.mktemp("planet") / "scene"
    return write_planet_scene(where, seed=3, size_px=96, dates=("2023-06-09",), labels=60, clouds=0.0)


@pytest.fixture(scope="module")
def labels(scene):
    """What is green in June and what is not, pixel by pixel, so that patches of 40 m hold both."""
    box = open_scene(scene).geobox()
    pixels = open_scene(scene).read("sentinel2_l2a", box).pixels[0, 0].numpy()
    rng = np.random.default_rng(0)
    row, col = rng.integers(0, 96, 900), rng.integers(0, 96, 900)
    red, infrared = (pixels[k, row, col].astype(float) for k in (2, 3))
    green = (infrared - red) / (infrared + red + 1)
    x, y = box.affine @ (col + 0.5, row + 0.5)
    kinds = np.where(green > np.median(green), "green", "other")
    path = scene / "two.gpkg"
    gpd.GeoDataFrame({"class": kinds}, geometry=shapely.points(x, y), crs=str(box.crs)).to_file(path)
    return path


def examples(scene, labels):
    shown = {"modalities": ["sentinel2_l2a"], "window_px": 16, "cell_px": 1, "block_m": 160}
    return examples_from_scenes([open_scene(scene)], labels, column="class", **shown)


def command(scene, labels, folder, out, *more):
    return [
        *("finetune", str(scene), "--labels", str(labels), "--model", str(folder), "--out", str(out)),
        *("--column", "class", "--modalities", "sentinel2_l2a", "--window-px", "16", "--block-m", "160"),
        *("--epochs", "2", "--head-first", "2", "--lr", "1e-2", "--device", "cpu", *more),
    ]


def test_the_command_makes_a_model_whose_map_is_finer_than_its_patches(scene, labels, folder, tmp_path, capsys):
    assert main(command(scene, labels, folder, tmp_path / "fine", "--sub-patches", "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    model = load_finetuned(tmp_path / "fine")
    assert (model.setup.patch_m, model.setup.sub_patches, model.setup.parts) == (40, "sentinel2_l2a", 4)
    assert (model.setup.output_m, model.setup.head.dim, model.setup.head.side) == (10, 64, 1)
    assert 0 < told["test"]["metrics"]["accuracy"]["estimate"] < 1
    assert "patches of 40 m by sub-patches of sentinel2_l2a, 10 m each" in (tmp_path / "fine" / "card.md").read_text()

    assert main(["map", str(scene), "--probe", str(tmp_path / "fine"), "--out", str(tmp_path / "map.tif")]) == 0
    with rasterio.open(tmp_path / "map.tif") as file:
        codes, side = file.read(1), file.res[0]
    assert (side, codes.shape) == (10, (96, 96))
    blocks = codes.reshape(24, 4, 24, 4).swapaxes(1, 2).reshape(-1, 16)
    assert (blocks.min(1) != blocks.max(1)).mean() > 0.1  # many patches hold both classes


def test_a_killed_run_on_sub_patches_ends_with_the_same_numbers(scene, labels, tmp_path):
    found = examples(scene, labels)
    whole = finetune(found, an_anysat(), tmp_path / "a", Settings(tuning=QUICK, sub_patches=True))

    class KilledError(RuntimeError):
        """Stands for a kill."""

    def kill(step, total, rate):
        if step == -(-len(found.of("train")) // 4) + 1:
            raise KilledError

    with pytest.raises(KilledError):
        finetune(found, an_anysat(), tmp_path / "b", Settings(tuning=QUICK, sub_patches=True), progress=kill)
    with pytest.raises(InputError, match="holds a run with another setup"):
        finetune(found, an_anysat(), tmp_path / "b", Settings(tuning=QUICK))
    resumed = finetune(found, an_anysat(), tmp_path / "b", Settings(tuning=QUICK, sub_patches="sentinel2_l2a"))
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert repr(resumed.test) == repr(whole.test)


def test_what_has_no_sub_patches_is_refused_in_one_sentence(scene, labels, folder, tmp_path, capsys):
    olmoearth = OlmoEarth(OlmoEarthConfig(dim=32, depth=1, heads=2), name="olmoearth-v1.2-nano")
    without = save_model(olmoearth, tmp_path / "olmoearth")
    assert main(command(scene, labels, without, tmp_path / "m", "--sub-patches")) == 2
    said = capsys.readouterr().err
    assert "has no sub-patch features; ask for a smaller patch_m instead" in said
    assert said.count("\n") == 1
    with pytest.raises(InputError, match="has no sub-patch features"):
        finetune(examples(scene, labels), olmoearth, tmp_path / "m", Settings(sub_patches=True))
    for more, words in (
        (("--task", "classification"), "one answer per sample, so it needs no sub-patches"),
        (("--output-m", "20"), "cells of 20 m came for the sub-patches of sentinel2_l2a of 10 m"),
        (("--head", "conv", "--skip"), "the sub-patches themselves, so no step of the decoder would look"),
    ):
        assert main(command(scene, labels, folder, tmp_path / "m", "--sub-patches", *more)) == 2
        assert words in capsys.readouterr().err


# Objects


def a_setup(encoder, task, side=4):
    row = TASKS[task]
    names = ("a",) if task == "detection" else ("a", "b")
    return Setup(
        task=task,
        head=HeadConfig(kind="linear", dense=True, dim=encoder.dim, outputs=row.outputs(len(names)), side=side),
        classes=tuple(ProbeClass(name=n, code=k) for k, n in enumerate(names, 1)),
        modalities=("sentinel2_l2a",),
        patch_m=40,
        window_px=16,
        base=Base.of(encoder),
    )


def test_a_detector_on_sub_patches_gives_each_cell_its_own_scores():
    encoder = an_anysat(normalized_input=True)
    model = FineTuned(encoder, on_sub_patches(a_setup(encoder, "detection"), encoder)).eval()
    detector = Detector(model=model)
    generator = torch.Generator().manual_seed(0)
    series = Observation(
        pixels=torch.randn(1, 2, 12, 8, 8, generator=generator),
        dates=torch.tensor([[19000, 19060]]),
        valid=torch.ones(1, 2, 8, 8, dtype=torch.bool),
    )
    series.valid[:, :, 1, 2], series.valid[:, :, 4:, 4:] = False, False
    batch = Batch(observations={"sentinel2_l2a": series})
    assert (detector.side, detector.dim) == (4, 16 * model.dim)
    with torch.inference_mode():
        given, cells = detector.encode(batch, patch_m=40), model.encode(batch, patch_m=10)
    scores = given.patches.reshape(1, 2, 2, 4, 4, model.dim)
    torch.testing.assert_close(scores[0, 1, 0, 3, 2], cells.patches[0, 7, 2])
    assert (scores[0, 0, 0, 1, 2] == NO_OBJECT).all()  # a cell without data in a patch with some
    assert given.valid.tolist() == [[[True, True], [True, False]]]


def test_objects_are_found_on_sub_patches(scene, tmp_path):
    encoder, opened = an_anysat(), open_scene(scene)
    encoder = encoder.with_statistics(encoder.fit_statistics([opened.batch(opened.geobox(), ["sentinel2_l2a"])]))
    planned = replace(a_setup(encoder, "detection"), centre=float(np.log(2)))
    model = FineTuned(encoder, on_sub_patches(planned, encoder)).eval().requires_grad_(False)
    with torch.no_grad():
        model.head.layers[-1].bias[0] = 6.0  # nearly every cell is a centre
    found = detect(opened, model, tmp_path / "objects.geojson", threshold=0.5)
    assert found.counts["a"] > 0
