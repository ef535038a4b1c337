"""Finding objects: boxes, their loss, their figures, and models that learn them."""

import datetime as dt
import json
from dataclasses import replace

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
import torch
import torch.nn.functional as F
from torch import nn

from panterra.cli.finetune import finetune as command
from panterra.data.labelled import LabelledSample
from panterra.errors import InputError
from panterra.finetune import precision
from panterra.finetune.augment import turn_sample
from panterra.finetune.boxes import (
    SHAPE,
    boxes_of,
    detection_loss,
    find_boxes,
    first_guess,
    iou_matrix,
    overlap,
    suppress,
    turn_boxes,
)
from panterra.finetune.heads import HeadConfig, build_head
from panterra.finetune.model import load_finetuned
from panterra.finetune.objects import objects_from_scenes
from panterra.finetune.run import Settings, finetune
from panterra.finetune.score import report, score
from panterra.finetune.step import Tuning
from panterra.imagery.items import SceneAsset, SceneBand, SceneItem
from panterra.imagery.raster import grid_of
from panterra.imagery.stac import Scene, open_scene
from panterra.mapping import run
from panterra.modalities import MODALITIES
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.features import Features
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig
from panterra.planet import write_planet_scene
from panterra.sample import Batch, Observation

# Boxes.


def some_boxes(generator, n, side=20.0):
    corner = generator.random((n, 2)) * side
    return np.concatenate([corner, corner + generator.random((n, 2)) * side / 3 + 0.5], axis=1)


def test_overlaps_are_those_of_shapely():
    rng = np.random.default_rng(0)
    one, other = some_boxes(rng, 40), some_boxes(rng, 30)
    shapes = [shapely.box(*boxes.T) for boxes in (one, other)]
    shared = shapely.area(shapely.intersection(shapes[0][:, None], shapes[1]))
    union = shapely.area(shapes[0])[:, None] + shapely.area(shapes[1]) - shared
    np.testing.assert_allclose(iou_matrix(one, other), shared / union, atol=1e-12)
    hull = shapely.area(shapely.envelope(shapely.union(shapes[0][:30], shapes[1])))
    union = shapely.area(shapely.union(shapes[0][:30], shapes[1]))
    _, generalised = overlap(torch.from_numpy(one[:30].T.copy()), torch.from_numpy(other.T.copy()))
    expected = np.diagonal(shared[:30]) / union - (hull - union) / hull
    np.testing.assert_allclose(generalised, expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_boxes_turn_with_the_image(seed):
    rng = np.random.default_rng(seed)
    image, rows = torch.zeros(1, 1, 2, 12, 12), []
    for n in range(2):
        x, y = rng.integers(0, 8, 2)
        w, h = rng.integers(1, 5, 2)
        image[0, 0, n, y : y + h, x : x + w] = 1
        rows.append([n, (x + w / 2) / 12, (y + h / 2) / 12, w / 12, h / 12])
    still = Observation(
        pixels=image, dates=torch.zeros(1, 1, dtype=torch.int64), valid=torch.ones(1, 1, 12, 12, dtype=torch.bool)
    )
    sample = LabelledSample(
        id="a", batch=Batch(observations={"sentinel1": still}), target=torch.tensor([rows]), fold="train"
    )
    turned = turn_sample(sample, torch.Generator().manual_seed(seed), dense=True, boxes=True)
    pixels = turned.batch.observations["sentinel1"].pixels[0, 0]
    for kind, x, y, w, h in turned.target[0].tolist():
        row, col = pixels[int(kind)].nonzero().unbind(1)
        expected = [col.min(), row.min(), col.max() + 1, row.max() + 1]
        found = [(x - w / 2) * 12, (y - h / 2) * 12, (x + w / 2) * 12, (y + h / 2) * 12]
        assert found == pytest.approx([float(v) for v in expected], abs=1e-4)


def test_four_quarters_and_two_flips_are_nothing():
    boxes = torch.rand(2, 3, 5)
    torch.testing.assert_close(turn_boxes(boxes, 4, flip=False), boxes)
    torch.testing.assert_close(turn_boxes(turn_boxes(boxes, 0, flip=True), 0, flip=True), boxes)


def perfect(target, classes, side):
    """Scores that say exactly what the boxes of a target are, in every cell near a centre."""
    scores = torch.full((len(target), classes + SHAPE, side, side), -12.0)
    scores[:, -SHAPE:] = 0.0
    for n, rows in enumerate(target):
        for kind, x, y, w, h in rows[rows[:, 0] >= 0].tolist():
            col, row = int(x * side), int(y * side)
            scores[n, int(kind), row, col] = 12.0
            for i in range(max(row - 4, 0), min(row + 5, side)):
                for j in range(max(col - 4, 0), min(col + 5, side)):
                    shape = [x * side - j - 0.5, y * side - i - 0.5, np.log(w * side), np.log(h * side)]
                    scores[n, -SHAPE:, i, j] = torch.tensor(shape)
    return scores


TARGET = torch.tensor(
    [
        [[0, 0.2, 0.3, 0.21, 0.1], [1, 0.7, 0.71, 0.3, 0.33], [0, 0.8, 0.1, 0.05, 0.04]],
        [[1, 0.5, 0.5, 0.3, 0.4], [-1, 0, 0, 0, 0], [-1, 0, 0, 0, 0]],
        [[-1, 0, 0, 0, 0], [-1, 0, 0, 0, 0], [-1, 0, 0, 0, 0]],
    ]
)


def test_perfect_scores_cost_nothing_and_give_the_boxes_back():
    scores = perfect(TARGET, 2, 32)
    assert float(detection_loss(scores, TARGET)) < 1e-3
    matches = precision.match_windows(scores, TARGET)
    assert [len(m.kind) for m in matches] == [3, 1, 0]
    assert all(m.hit.all() for m in matches)
    assert precision.ap(list(matches)) == pytest.approx([1.0])
    boxes, _, kind = find_boxes(scores[1])
    np.testing.assert_allclose(boxes, [[11.2, 9.6, 20.8, 22.4]], atol=1e-4)
    assert kind.tolist() == [1]


def test_the_loss_pulls_centres_and_boxes_to_where_they_are():
    torch.manual_seed(0)
    raw = (0.1 * torch.randn(3, 2 + SHAPE, 16, 16)).requires_grad_()
    optimiser = torch.optim.Adam([raw], lr=0.1)
    for _ in range(100):
        optimiser.zero_grad()
        loss = detection_loss(first_guess(raw, 3.0), TARGET)
        loss.backward()
        optimiser.step()
    found = list(precision.match_windows(first_guess(raw, 3.0).detach(), TARGET))
    assert precision.ap50(found)[0] == pytest.approx(1.0)
    assert precision.ap(found)[0] > 0.9


def test_windows_without_objects_teach_what_is_not_there():
    scores = torch.zeros(1, 1 + SHAPE, 4, 4, requires_grad=True)
    detection_loss(scores, TARGET[2:]).backward()
    assert (scores.grad[0, 0] > 0).all()
    assert not scores.grad[0, 1:].any()


@pytest.mark.parametrize("seed", range(5))
def test_suppression_is_greedy_whatever_the_order(seed):
    rng = np.random.default_rng(seed)
    boxes, score, kind = some_boxes(rng, 60), rng.permutation(60) / 60, rng.integers(0, 2, 60)
    kept: list[int] = []
    for n in np.argsort(-score):
        near = iou_matrix(boxes[[n]], boxes[kept])[0] if kept else np.zeros(0)
        if not (near[kind[kept] == kind[n]] >= 0.3).any():
            kept.append(int(n))
    found = suppress(boxes, score, kind, same=0.3)
    assert found.tolist() == kept
    order = rng.permutation(60)
    assert order[suppress(boxes[order], score[order], kind[order], same=0.3)].tolist() == kept
    assert len(suppress(boxes[:0], score[:0], kind[:0])) == 0


def test_shapes_are_centre_and_logarithm_of_size():
    shape = torch.tensor([0.25, -0.5, np.log(4), np.log(2)])
    assert boxes_of(shape, torch.tensor(3.0), torch.tensor(5.0)).tolist() == pytest.approx([3.75, 2, 7.75, 4])


# Figures.


def matches(score, hit, truths):
    """Boxes of one class, as like the object as any of `LIKE` asks, or not at all."""
    hit = np.array(hit, bool)
    return precision.Matches(
        kind=np.zeros(len(score), int),
        score=np.array(score, float),
        hit=np.repeat(hit[:, None], 10, axis=1),
        iou=hit * 0.8,
        truths=np.array([truths]),
    )


def test_average_precision_of_cases_done_by_hand():
    # Right, wrong, right, of two objects: precision 1 up to recall 1/2, then 2/3. 51 of 101 recalls reach 1/2.
    found = [matches([0.9, 0.8], [1, 0], 1), matches([0.7], [1], 1)]
    assert precision.ap50(found)[0] == pytest.approx((51 + 50 * 2 / 3) / 101)
    # An object that is never found leaves the recalls above 1/2 empty.
    assert precision.ap50([matches([0.9], [1], 2)])[0] == pytest.approx(51 / 101)
    assert precision.ap50([matches([0.9], [0], 1)])[0] == 0
    assert np.isnan(precision.ap50([matches([0.9], [0], 0)])[0])
    # At the score 0.7 three boxes are said, of which two are right.
    assert precision.best_threshold(found) == pytest.approx(0.7)
    counts = precision.counts_at(found, 0.75)
    assert counts.sum((0, 1)).tolist() == [1, 2, 2, 0.8]
    assert precision.f1(counts.sum((0, 1))) == pytest.approx(0.5)


def test_each_object_is_found_once_and_the_best_box_has_it():
    truth, kind = np.array([[0, 0, 10, 10], [20, 0, 30, 10.0]]), np.array([0, 1])
    boxes = np.array([[0, 0, 10, 8], [0, 0, 10, 10], [20, 0, 30, 6.5], [20, 0, 30, 10.0]])
    found = precision.match(boxes, np.array([0.9, 0.8, 0.7, 0.6]), np.array([0, 0, 1, 0]), truth, kind, 2)
    # The best score takes the object up to an IoU of 0.8; beyond, the second one has it.
    assert found.hit[0].tolist() == [True] * 7 + [False] * 3
    assert found.hit[1].tolist() == [False] * 7 + [True] * 3
    assert found.hit[2].tolist() == [True] * 4 + [False] * 6
    assert not found.hit[3].any()
    assert found.iou.tolist() == pytest.approx([0.8, 0, 0.65, 0])
    assert found.truths.tolist() == [1, 1]


def test_weights_count_windows_as_often():
    rng = np.random.default_rng(0)
    found = [matches(rng.random(4), rng.random(4) < 0.5, 4) for _ in range(6)]
    weights = rng.integers(0, 3, (5, 6)).astype(float)
    repeated = [[m for m, n in zip(found, row, strict=True) for _ in range(int(n))] for row in weights]
    # Repeated windows have equal scores, of which the order is free: theirs is by window, as that of weights is.
    expected = [precision.ap50(some)[0] for some in repeated]
    np.testing.assert_allclose(precision.ap50(found, weights), expected, atol=0.05)
    assert precision.ap50(found, np.ones((1, 6))) == precision.ap50(found)


def test_intervals_hold_the_figure():
    rng = np.random.default_rng(1)
    found = [matches(rng.random(4), rng.random(4) < 0.6, 4) for _ in range(30)]
    figures = precision.figures_with_intervals(found, np.arange(30) // 2, 0.5, resamples=200, seed=0)
    assert set(figures) == {"ap50", "ap", "f1"}
    assert all(i.low <= i.estimate <= i.high and i.std > 0 for i in figures.values())


# Ships on the planet.


def tiny_encoder():
    torch.manual_seed(0)
    config = OlmoEarthConfig(dim=32, depth=1, heads=2, position="rope_3d_mixed", pixel_hidden=(8,), convolution=False)
    return OlmoEarth(config, name="olmoearth-v1.2-nano").eval().requires_grad_(False)


def plant_ships(folder, *, size_px, number, seed=0):
    """Write dark water with bright ships of 3 to 7 pixels; give their true boxes as a file."""
    write_planet_scene(
        folder, seed=3, size_px=size_px, dates=("2023-06-09",), modalities=("sentinel2_l2a",), labels=10, clouds=0.0
    )
    rng, taken = np.random.default_rng(seed), np.zeros((size_px, size_px), bool)
    path = next(folder.glob("sentinel2_l2a_*.tif"))
    with rasterio.open(path) as file:
        pixels, profile = file.read(), file.profile
    pixels[:] = 200 + 30 * rng.standard_normal(pixels.shape)
    ships = []
    while len(ships) < number:
        height, width = rng.integers(3, 8, 2)
        row, col = rng.integers(1, size_px - 8, 2)
        if not taken[row - 1 : row + height + 1, col - 1 : col + width + 1].any():
            taken[row - 1 : row + height + 1, col - 1 : col + width + 1] = True
            pixels[:, row : row + height, col : col + width] = 5000
            ships.append((col, row, col + width, row + height))
    with rasterio.open(path, "w", **{**profile, "driver": "GTiff", "compress": "deflate"}) as file:
        file.write(pixels)
    box = open_scene(folder).geobox()
    corners = np.array(ships, float)
    left, top = box.affine @ (corners[:, 0], corners[:, 1])
    right, bottom = box.affine @ (corners[:, 2], corners[:, 3])
    frame = gpd.GeoDataFrame(
        {"class": ["ship"] * number}, geometry=shapely.box(left, bottom, right, top), crs=str(box.crs)
    )
    frame.to_file(folder / "ships.gpkg")
    return folder / "ships.gpkg"


@pytest.fixture(scope="module")
def harbour(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harbour") / "scene"
    plant_ships(folder, size_px=160, number=90)
    return folder


def known(harbour, **changes):
    options = {"window_px": 32, "block_m": 320, "cell_m": 10}
    return objects_from_scenes([open_scene(harbour)], harbour / "ships.gpkg", **{**options, **changes})


def test_every_object_is_in_the_window_that_holds_its_centre(harbour):
    examples = known(harbour)
    assert len(examples) == 25
    assert examples.about["labels"] == 90
    frame, count = gpd.read_file(harbour / "ships.gpkg"), 0
    grid = open_scene(harbour).geobox()
    for i in range(len(examples)):
        rows = examples[i].target[0]
        rows = rows[rows[:, 0] >= 0]
        assert ((rows[:, 1:3] >= 0) & (rows[:, 1:3] < 1)).all()
        count += len(rows)
        pixels = examples[i].batch.observations["sentinel2_l2a"].pixels[0, 0, 0]
        for _, x, y, w, h in (rows * 32).tolist():
            inside = pixels[max(round(y - h / 2), 0) : round(y + h / 2), max(round(x - w / 2), 0) : round(x + w / 2)]
            assert (inside == 5000).all()
    assert count == len(frame) == 90
    assert grid.shape == (160, 160)
    blocks = {part: set(examples.blocks[examples.of(part)]) for part in ("train", "val", "test")}
    assert blocks["train"].isdisjoint(blocks["test"] | blocks["val"])


def test_points_have_a_size_and_areas_a_limit(harbour, tmp_path):
    frame = gpd.read_file(harbour / "ships.gpkg")
    points = frame.set_geometry(frame.centroid)
    points.to_file(tmp_path / "points.gpkg")
    with pytest.raises(InputError, match="not how large"):
        objects_from_scenes([open_scene(harbour)], tmp_path / "points.gpkg")
    found = objects_from_scenes([open_scene(harbour)], tmp_path / "points.gpkg", size_m=50, window_px=32, block_m=320)
    rows = torch.cat([found[i].target[0] for i in range(len(found))])
    torch.testing.assert_close(rows[rows[:, 0] >= 0][:, 3:], torch.full((90, 2), 50 / 320))
    points.dissolve().to_file(tmp_path / "together.gpkg")
    assert set(gpd.read_file(tmp_path / "together.gpkg").geom_type) == {"MultiPoint"}
    again = objects_from_scenes([open_scene(harbour)], tmp_path / "together.gpkg", size_m=50, window_px=32, block_m=320)
    assert again.about["labels"] == 90
    left, top = open_scene(harbour).geobox().affine @ (0, 0)
    area = gpd.GeoDataFrame(geometry=[shapely.box(left, top - 1300, left + 960, top)], crs=frame.crs)
    area.to_crs(4326).to_file(tmp_path / "area.geojson")
    assert len(known(harbour, area=tmp_path / "area.geojson")) == 12
    with pytest.raises(InputError, match="whole number of cells"):
        known(harbour, cell_m=15)


def test_windows_with_objects_of_other_dates_are_left_out(harbour, tmp_path):
    whole, frame = known(harbour), gpd.read_file(harbour / "ships.gpkg")
    frame["start_time"], frame["end_time"] = "2023-06-01", "2023-06-30"
    frame.loc[:0, ["start_time", "end_time"]] = ["2019-06-01", "2019-06-30"]
    frame.to_file(tmp_path / "timed.gpkg")
    options = {"window_px": 32, "block_m": 320, "cell_m": 10}
    found = objects_from_scenes([open_scene(harbour)], tmp_path / "timed.gpkg", **options)
    assert found.about["other_dates"] == 1
    assert len(found) == len(whole) - 1
    assert 80 < found.about["labels"] < 90
    frame.assign(start_time="2019-06-01", end_time="2019-06-30").to_file(tmp_path / "old.gpkg")
    with pytest.raises(InputError, match="all 90 labels are of other dates"):
        objects_from_scenes([open_scene(harbour)], tmp_path / "old.gpkg", **options)


def crowns(count=2, cells=40):
    """Flat discs of 3 to 8 cells side by side, as pixels [B, 1, 40, 40] and boxes [B, 16, 5]."""
    rng = np.random.default_rng(0)
    pixels, target = torch.zeros(count, 1, cells, cells), torch.zeros(count, 16, 5)
    y, x = np.mgrid[:cells, :cells] + 0.5
    for b in range(count):
        for n, (row, col) in enumerate(np.ndindex(4, 4)):
            size = rng.uniform(3, 8)
            cx, cy = (10 * k + 5 + rng.uniform(-1, 1) for k in (col, row))
            disc = np.hypot(x - cx, y - cy) < size / 2
            pixels[b, 0] = torch.maximum(pixels[b, 0], torch.from_numpy(disc).float())
            target[b, n, 1:] = torch.tensor([cx, cy, size, size]) / cells
    return pixels, target


def test_a_decoder_that_sees_beyond_an_object_finds_what_it_was_shown():
    pixels, target = crowns()
    valid = torch.ones(len(pixels), 4, 4, dtype=torch.bool)
    blank = Features(patches=torch.zeros(*valid.shape, 8), summary=torch.zeros(len(pixels), 8), valid=valid, patch_m=10)
    found = {}
    for convolutions in (1, 2):
        torch.manual_seed(0)
        config = {"kind": "conv", "dense": True, "dim": 8, "outputs": 1 + SHAPE, "side": 10, "hidden": 32}
        head = build_head(HeadConfig(**config, skip_bands=1, convolutions=convolutions))
        optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2)
        for _ in range(80):
            scores = first_guess(head(blank, pixels), 5.0)
            loss = detection_loss(scores, target)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimiser.step()
        found[convolutions] = precision.ap50(list(precision.match_windows(scores.detach(), target)))[0]
    assert found[2] > 0.9 > found[1]


QUICK = Tuning(epochs=10, head_first=0, batch_size=4, patience=10, lr=1e-2, encoder_lr=1e-3, method="head")


def test_ships_are_found(harbour, tmp_path):
    examples = known(harbour)
    options = {"head": "conv", "skip": True, "hidden": 32}
    result = finetune(examples, tiny_encoder(), tmp_path / "m", Settings(tuning=QUICK, **options))
    assert result.test.metrics["ap50"].estimate > 0.6
    assert result.test.metrics["f1"].estimate > 0.6
    assert result.test.classes["ship"]["support"] == result.test.num_targets
    assert result.test.threshold == result.validation.threshold
    again = score(load_finetuned(tmp_path / "m"), examples, "test", batch_size=4)
    assert repr(report(examples.task, again, ("ship",), threshold=result.test.threshold)) == repr(result.test)
    card = (tmp_path / "m" / "card.md").read_text()
    assert "panterra detect" in card
    assert "Boxes count from a score" in card
    with pytest.raises(InputError, match="panterra detect"):
        run.map(open_scene(harbour), tmp_path / "m", tmp_path / "map.tif")
    with pytest.raises(InputError, match="without class weights"):
        finetune(
            examples,
            tiny_encoder(),
            tmp_path / "n",
            Settings(tuning=replace(QUICK, class_weights="balanced"), **options),
        )


def test_the_command_learns_objects(harbour, tmp_path, capsys):
    sizes = {"window_px": 32, "block_m": 320, "epochs": 1, "batch_size": 16, "method": "head"}
    labels = {"labels": harbour / "ships.gpkg", "model": "olmoearth-v1.2-nano", "random": 0}
    command(str(harbour), out=tmp_path / "m", task="detection", output_m=20, as_json=True, **labels, **sizes)
    told = json.loads(capsys.readouterr().out)
    assert 0 <= told["test"]["metrics"]["ap50"]["estimate"] <= 1
    assert load_finetuned(tmp_path / "m").setup.output_m == 20
    with pytest.raises(InputError, match="for detection"):
        command(str(harbour), out=tmp_path / "n", size_m=20, **labels, **sizes)


# Real trees.


def neon(data_dir, folder):
    """Aerial plots of 40 m with boxes around tree crowns (NEON; Weinstein et al. 2019), centres on cells of a metre."""
    source = data_dir / "neon_trees"
    table = pd.read_csv(source / "tree_boxes_pixels.csv")
    scenes, parts = [], []
    for name, rows in table.groupby("file"):
        grid = grid_of(source / "rgb" / name)
        # There is no infrared; red stands in for it.
        order = {"R": 1, "G": 2, "B": 3, "NIR": 1}
        bands = tuple(SceneBand(name=b, index=order[b]) for b in MODALITIES["aerial"].band_names)
        asset = SceneAsset(href=str(source / "rgb" / name), bands=bands)
        item = SceneItem(id=name, modality="aerial", date=dt.date(2018, 6, 1), assets=(asset,), grid=grid)
        scenes.append(Scene(items=(item,), licence="CC0-1.0"))
        left, top = grid.affine @ (rows[["xmin"]].to_numpy()[:, 0], rows["ymin"].to_numpy())
        right, bottom = grid.affine @ (rows["xmax"].to_numpy(), rows["ymax"].to_numpy())
        boxes = shapely.box(left, bottom, right, top)
        frame = gpd.GeoDataFrame({"class": ["tree"] * len(rows)}, geometry=boxes, crs=str(grid.crs))
        parts.append(frame.to_crs(4326))
    pd.concat(parts).to_file(folder / "trees.gpkg")
    grids = [scene.geobox()[:4, :4] for scene in scenes]
    return objects_from_scenes(scenes, folder / "trees.gpkg", boxes=grids, window_px=4, cell_m=1, block_m=40)


def green_peaks(examples, size):
    """AP50 of the same square on every cell where green exceeds red and blue more than around it."""
    found = []
    for i in examples.of("test"):
        sample = examples[int(i)]
        red, green, blue, _ = sample.batch.observations["aerial"].pixels[0, 0]
        excess = F.avg_pool2d((2 * green - red - blue)[None, None], 25, stride=5, padding=12)
        scores = torch.zeros(1, 1 + SHAPE, *excess.shape[2:])
        scores[:, :1] = excess / 10
        scores[:, -2:] = np.log(size)
        found += list(precision.match_windows(scores, sample.target))
    return precision.ap50(found)[0]


@pytest.mark.data
@pytest.mark.slow
def test_real_trees_are_found_better_than_by_colour(data_dir, tmp_path):
    """Cells finer than the common grid of 10 m, on a model of aerial images."""
    examples = neon(data_dir, tmp_path)
    torch.manual_seed(0)
    encoder = AnySat(AnySatConfig(dim=96, depth=1, heads=4), name="anysat-tiny").eval().requires_grad_(False)
    tuning = replace(QUICK, epochs=60, patience=30, lr=6e-3)
    options = {"head": "conv", "skip": True, "hidden": 64, "patch_m": 10}
    result = finetune(examples, encoder, tmp_path / "m", Settings(tuning=tuning, **options))
    assert result.model.setup.output_m == 1
    assert result.test.metrics["ap50"].estimate > max(green_peaks(examples, size) for size in (3, 4, 5, 6))
