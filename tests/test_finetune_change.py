"""Models that tell what changed between two periods."""

import datetime as dt
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
from panterra.evaluate import metrics
from panterra.finetune.examples import examples_from_scenes
from panterra.finetune.heads import HeadConfig
from panterra.finetune.model import Base, FineTuned, Setup, at_periods, load_finetuned
from panterra.finetune.pairs import Periods, compare, pair_up
from panterra.finetune.run import Settings, finetune
from panterra.finetune.step import Tuning
from panterra.imagery.items import SceneAsset, SceneBand, SceneItem
from panterra.imagery.raster import grid_of
from panterra.imagery.stac import Scene, open_scene
from panterra.mapping import run
from panterra.modalities import MODALITIES
from panterra.models.features import Features
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig
from panterra.planet import write_planet_scene
from panterra.sample import collate

YEARS = Periods(before="2022", after="2023")
DATES = ("2022-06-09", "2022-07-22", "2023-06-12", "2023-08-01")


def tiny_encoder():
    torch.manual_seed(0)
    config = OlmoEarthConfig(dim=32, depth=2, heads=2, position="rope_3d_mixed", pixel_hidden=(8,), convolution=False)
    return OlmoEarth(config, name="olmoearth-v1.2-nano").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Two years of the planet; in the second, squares of eight pixels have become bright and dry."""
    folder = tmp_path_factory.mktemp("planet") / "scene"
    write_planet_scene(folder, seed=3, size_px=96, dates=DATES, modalities=("sentinel2_l2a",), labels=10, clouds=0.0)
    rng = np.random.default_rng(0)
    changed = np.kron(rng.random((12, 12)) < 0.25, np.ones((8, 8), bool))
    for path in folder.glob("sentinel2_l2a_2023*.tif"):
        with rasterio.open(path) as file:
            pixels, profile = file.read(), file.profile
        pixels[:, changed] = np.clip(pixels[:, changed] // 2 + 2500, 1, 10000)
        with rasterio.open(path, "w", **{**profile, "driver": "GTiff", "compress": "deflate"}) as file:
            file.write(pixels)
    box = open_scene(folder).geobox()
    row, col = np.divmod(np.arange(144), 12)
    x, y = box.affine @ (col * 8.0, row * 8.0)
    frame = gpd.GeoDataFrame(
        {
            "class": np.where(changed[row * 8, col * 8], "built", "same"),
            "one": np.where(np.arange(144) % 2, "2022-06", "2022-06/2022-07"),
            "other": "2023",
        },
        geometry=shapely.box(x, y - 80, x + 80, y),
        crs=str(box.crs),
    )
    frame.to_file(folder / "change.gpkg")
    return folder


def found(planted, **changes):
    options = {"column": "class", "periods": YEARS, "window_px": 16, "cell_px": 4, "block_m": 160}
    return examples_from_scenes([open_scene(planted)], planted / "change.gpkg", **{**options, **changes})


def a_model(kind="conv", skip=True, periods=YEARS):
    encoder = tiny_encoder()
    head = HeadConfig(kind=kind, dense=True, dim=96, outputs=2, side=4, hidden=16, skip_bands=24 if skip else 0)
    setup = Setup(
        task="segmentation",
        head=head,
        classes=(),
        modalities=("sentinel2_l2a",),
        patch_m=40,
        window_px=16,
        skip="sentinel2_l2a" if skip else None,
        pairs=True,
        periods=periods,
        base=Base.of(encoder),
    )
    torch.manual_seed(1)
    return FineTuned(encoder, setup).eval()


# Pairs.


def test_a_pair_shows_each_period_alone(planted):
    scene = open_scene(planted)
    batch = collate([scene.batch(scene.geobox()[k : k + 16, :16]) for k in (0, 16)])
    pairs = pair_up(batch, YEARS).observations["sentinel2_l2a"]
    whole = batch.observations["sentinel2_l2a"]
    assert pairs.pixels.shape[:2] == (4, 2)
    for sample in (0, 1):
        for half, steps in ((0, slice(0, 2)), (1, slice(2, 4))):
            torch.testing.assert_close(pairs.pixels[2 * sample + half], whole.pixels[sample, steps])
            torch.testing.assert_close(pairs.dates[2 * sample + half], whole.dates[sample, steps])
    uneven = pair_up(batch, Periods(before="2022-06", after="2023")).observations["sentinel2_l2a"]
    assert uneven.valid.flatten(2).any(2).tolist() == [[True, False], [True, True]] * 2
    assert uneven.dates[0, 0] == whole.dates[0, 0]


def test_a_comparison_is_both_and_their_difference_where_both_are_seen():
    patches, valid = torch.randn(4, 2, 2, 3), torch.ones(4, 2, 2, dtype=torch.bool)
    valid[1, 0, 0] = valid[2, 1, 1] = False
    joined = compare(Features(patches=patches, summary=patches.mean((1, 2)), valid=valid, patch_m=40))
    assert joined.valid.sum() == 6
    assert not joined.valid[0, 0, 0]
    assert not joined.valid[1, 1, 1]
    assert not joined.patches[~joined.valid].any()
    before, after = patches[2, 0, 0], patches[3, 0, 0]
    torch.testing.assert_close(joined.patches[1, 0, 0], torch.cat([before, after, (before - after).abs()]))


def test_other_dates_do_not_matter(planted):
    scene, model = open_scene(planted), a_model()
    batch = scene.batch(scene.geobox()[:16, :16])
    o = batch.observations["sentinel2_l2a"]
    pixels = o.pixels.clone()
    pixels[:, 1] = 5000.0
    touched = replace(batch, observations={"sentinel2_l2a": replace(o, pixels=pixels)})
    for periods, same in ((Periods(before="2022-06", after="2023"), True), (YEARS, False)):
        with torch.inference_mode():
            one, other = (model.over(periods).encode(b, patch_m=10).patches for b in (batch, touched))
        assert torch.equal(one, other) == same


def test_what_is_learned_is_what_is_mapped(planted):
    """The pairs of training and those of a map are put together the same way."""
    examples, model = found(planted, cell_px=1), a_model()
    scene = open_scene(planted)
    with torch.inference_mode():
        trained = model(collate([examples[0].batch, examples[1].batch])).movedim(1, -1)
        mapped = model.encode(scene.batch(scene.geobox()[:16, 16:32]), patch_m=10).patches
    torch.testing.assert_close(trained[1:2], mapped, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [("2023", "2022", "must end before"), ("2022", "2022-12/2023", "must end before"), ("once", "2022", "no span")],
)
def test_periods_that_cannot_be_compared_are_refused(before, after, said):
    with pytest.raises(InputError, match=said):
        Periods(before=before, after=after)


def test_periods_without_images_are_named(planted):
    with pytest.raises(InputError, match="no image of 2021"):
        found(planted, periods=Periods(before="2021", after="2023"))
    scene = open_scene(planted)
    with pytest.raises(InputError, match="no image of 2024"):
        a_model(periods=Periods(before="2022", after="2024")).encode(scene.batch(scene.geobox()[:16, :16]), patch_m=10)
    with pytest.raises(InputError, match="say which"):
        run.map(scene, a_model(periods=None), planted / "no.tif")


def test_labels_bring_their_own_periods(planted):
    frame = gpd.read_file(planted / "change.gpkg")
    own = [Periods(before=b, after=a) for b, a in zip(frame["one"], frame["other"], strict=True)]
    examples, shared = found(planted, periods=own), found(planted)
    assert examples.pairs
    assert examples.periods is None
    assert examples.about["labels"] == shared.about["labels"]
    steps = {int(examples[i].batch.observations["sentinel2_l2a"].valid.flatten(2).any(2)[0].sum()) for i in range(40)}
    assert steps == {1, 2}
    assert set(examples.blocks[examples.of("train")]).isdisjoint(examples.blocks[examples.of("test")])
    with pytest.raises(InputError, match="give each its own"):
        found(planted, periods=own[:3])


# Runs.


QUICK = Tuning(epochs=3, head_first=0, batch_size=4, lr=1e-2, method="head")


def test_planted_change_is_found_and_mapped(planted, tmp_path):
    options = {"head": "conv", "hidden": 32, "skip": True}
    result = finetune(found(planted, cell_px=2), tiny_encoder(), tmp_path / "m", Settings(tuning=QUICK, **options))
    built = result.test.intervals["built"]["f1"]
    assert built.estimate > 0.8
    assert built.low <= built.estimate <= built.high
    made = run.map(open_scene(planted), tmp_path / "m", tmp_path / "map.tif")
    with rasterio.open(made.path) as file:
        mapped = file.read(1)
    frame = gpd.read_file(planted / "change.gpkg")
    truth = np.where(frame["class"] == "built", 1, 2).reshape(12, 12).repeat(4, 0).repeat(4, 1)
    assert (mapped == truth).mean() > 0.9
    passport = json.loads(made.passport.read_text())["properties"]["panterra:probe"]
    assert passport["periods"] == {"before": "2022", "after": "2023"}
    # The periods are given at map time; without change between them, little is found.
    still = load_finetuned(tmp_path / "m").over(Periods(before="2022-06", after="2022-07"))
    other = run.map(open_scene(planted), still, tmp_path / "still.tif")
    with rasterio.open(other.path) as file:
        assert (file.read(1) == 1).mean() < 0.15


@pytest.mark.parametrize(
    ("task", "column", "head", "options"),
    [("classification", "class", "attention", {}), ("segmentation", "class", "conv", {"skip": True})],
)
@pytest.mark.parametrize("method", ["lora", "head"])
def test_other_heads_compare_too(planted, tmp_path, task, column, head, options, method):
    examples = found(planted, task=task, column=column, window_px=8 if task == "classification" else 16)
    tuning = replace(QUICK, epochs=1, method=method, batch_size=16)
    result = finetune(examples, tiny_encoder(), tmp_path / "m", Settings(head=head, tuning=tuning, **options))
    again = load_finetuned(tmp_path / "m")
    assert again.setup.head.dim == 96
    assert again.setup.periods == YEARS
    assert np.isfinite(result.test.metrics["accuracy"].estimate)


def test_the_commands_take_periods(planted, tmp_path, capsys):
    sizes = ["--window-px", "16", "--block-m", "160", "--epochs", "1", "--batch-size", "16", "--method", "head"]
    labels = ["--labels", str(planted / "change.gpkg"), "--column", "class"]
    start = ["finetune", str(planted), *labels, "--model", "olmoearth-v1.2-nano", "--random", "0", *sizes]
    out = tmp_path / "m"
    assert main([*start, "--out", str(out), "--before", "one"]) == 2
    assert "both --before and --after" in capsys.readouterr().err
    assert main([*start, "--out", str(out), "--before", "one", "--after", "other", "--json"]) == 0
    assert load_finetuned(out).setup.periods is None
    mapping = ["map", str(planted), "--probe", str(out), "--out", str(tmp_path / "map.tif")]
    assert main(mapping) == 2
    assert main([*mapping, "--before", "2022"]) == 2
    assert main([*mapping, "--before", "2022-06", "--after", "2023-08"]) == 0
    with pytest.raises(InputError, match="one period"):
        at_periods("a probe", "2022", "2023")


# Real change.


def oscd(data_dir):
    """Two dates of Dubai, and what was built between them (OSCD, Daudt et al. 2018)."""
    source = data_dir / "oscd_change" / "dubai_west"
    items = []
    for day, name in (("2015-12-11", "t1_20151211"), ("2018-03-30", "t2_20180330")):
        path = source / f"dubai_west_{name}.tif"
        with rasterio.open(path) as file:
            names = [text.split(":")[0] for text in file.descriptions]
        known = MODALITIES["sentinel2_l2a"].band_names
        bands = tuple(SceneBand(name=b, index=names.index(b) + 1) for b in known)
        asset = SceneAsset(href=str(path), bands=bands)
        date = dt.date.fromisoformat(day)
        items.append(SceneItem(id=name, modality="sentinel2_l2a", date=date, assets=(asset,), grid=grid_of(path)))
    return examples_from_scenes(
        [Scene(items=tuple(items), licence="CC-BY-4.0")],
        source / "dubai_west_change.tif",
        periods=Periods(before="2015", after="2018"),
        window_px=32,
        block_m=960,
    )


def spectral_baseline(examples):
    """F1 and IoU of change where bands differ by more than a threshold, which training and validation choose."""
    counts = {part: [] for part in ("train", "val", "test")}
    steps = np.linspace(100, 6000, 60)
    for i in range(len(examples)):
        sample = examples[i]
        o = sample.batch.observations["sentinel2_l2a"]
        seen, target = o.valid.all(0)[0].numpy(), sample.target[0].numpy()
        size = (o.pixels[1, 0] - o.pixels[0, 0]).square().mean(0).sqrt().numpy()
        rows = [metrics.confusion(np.where(seen, target, -1), (size > step).astype(int), 2) for step in steps]
        counts[str(examples.parts[i])].append(rows)
    learned = np.array(counts["train"] + counts["val"]).sum(0)
    best = int(np.nanargmax(metrics.per_class(learned)["f1"][:, 1]))
    _, block = np.unique(examples.blocks[examples.of("test")], return_inverse=True)
    tested = np.zeros((block.max() + 1, 2, 2), int)
    np.add.at(tested, block, np.array(counts["test"])[:, best])
    return {f: metrics.bootstrap(lambda c, f=f: metrics.per_class(c)[f][..., 1], tested) for f in ("f1", "iou")}


@pytest.mark.data
@pytest.mark.slow
def test_real_change_is_found_better_than_by_a_threshold(data_dir, tmp_path):
    examples = oscd(data_dir)
    tuning = replace(QUICK, epochs=6, batch_size=8, lr=3e-3)
    result = finetune(
        examples, tiny_encoder(), tmp_path / "m", Settings(head="conv", hidden=64, skip=True, tuning=tuning)
    )
    change = result.test.intervals["2"]
    assert change["f1"].estimate > spectral_baseline(examples)["f1"].estimate
