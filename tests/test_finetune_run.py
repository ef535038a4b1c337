"""From labels on a scene to a model folder, undisturbed or not."""

import json
import math
import re
import shutil
from dataclasses import replace

import geopandas as gpd
import numpy as np
import pytest
import shapely
import torch

from miniatures import sen1floods11, sickle
from panterra.cli import main
from panterra.cli.finetune import finetune as command
from panterra.errors import InputError
from panterra.finetune.augment import NONE
from panterra.finetune.examples import deal, examples_from_dataset, examples_from_scenes
from panterra.finetune.model import load_finetuned
from panterra.finetune.run import Settings, finetune
from panterra.finetune.score import report, score
from panterra.finetune.step import Tuning
from panterra.finetune.tasks import task_of
from panterra.imagery.stac import open_scene
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig
from panterra.models.weights import load_model
from panterra.planet import write_planet_scene

QUICK = Tuning(epochs=3, head_first=1, batch_size=4, patience=3, lr=1e-2, encoder_lr=1e-3)


def tiny_encoder():
    torch.manual_seed(0)
    config = OlmoEarthConfig(dim=32, depth=2, heads=2, position="rope_3d_mixed", pixel_hidden=(8,), convolution=False)
    return OlmoEarth(config, name="olmoearth-v1.2-nano").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planet") / "scene"
    return write_planet_scene(folder, seed=3, size_px=128, dates=("2023-06-09",), labels=60, clouds=0.0)


@pytest.fixture(scope="module")
def labels(scene):
    """Two classes everywhere, so that any split has both: what is green in June, and what is not."""
    from panterra.imagery.raster import read_onto

    box = open_scene(scene).geobox()
    rng = np.random.default_rng(0)
    pixels, _ = read_onto(next(scene.glob("sentinel2_l2a_*.tif")), box)
    names = list(open_scene(scene).batch(box[:8, :8]).observations)
    assert "sentinel2_l2a" in names
    row, col = rng.integers(0, 128, 300), rng.integers(0, 128, 300)
    red, infrared = (pixels[k, row, col].astype(float) for k in (2, 3))
    green = (infrared - red) / (infrared + red + 1)
    x, y = box.affine @ (col + 0.5, row + 0.5)
    frame = gpd.GeoDataFrame(
        {"class": np.where(green > np.median(green), "green", "other"), "value": green},
        geometry=shapely.points(x, y),
        crs=str(box.crs),
    )
    path = scene / "two.gpkg"
    frame.to_file(path)
    return path


def examples(scene, labels, **changes):
    options = {"column": "class", "modalities": ["sentinel2_l2a"], "window_px": 16, "cell_px": 4, "block_m": 160}
    return examples_from_scenes([open_scene(scene)], labels, **{**options, **changes})


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# Examples.


def test_windows_hold_each_label_once_and_blocks_are_never_shared(scene, labels):
    found = examples(scene, labels, cell_px=1)
    targets = [found[i].target for i in range(len(found))]
    assert sum(int((t >= 0).sum()) for t in targets) == found.about["labels"]
    assert 280 <= found.about["labels"] <= 300
    assert {tuple(t.shape) for t in targets} == {(1, 16, 16)}
    in_part = {part: set(found.blocks[found.of(part)]) for part in ("train", "val", "test")}
    assert all(in_part.values())
    assert not in_part["train"] & in_part["val"] | in_part["train"] & in_part["test"] | in_part["val"] & in_part["test"]


def test_a_window_shows_what_lies_under_its_labels(scene, labels):
    found = examples(scene, labels, cell_px=1, column="value", task="regression")
    sample = found[0]
    target, pixels = sample.target[0], sample.batch.observations["sentinel2_l2a"].pixels[0, 0].double()
    known = ~target.isnan()
    green = (pixels[3] - pixels[2]) / (pixels[3] + pixels[2] + 1)
    assert known.any()
    torch.testing.assert_close(green[known], target[known].double(), atol=1e-3, rtol=0)


def test_a_polygon_is_learned_or_tested_never_both(scene, tmp_path):
    box = open_scene(scene).geobox()
    left, top = box.affine @ (0, 0)
    squares, kinds = [], []
    for i in range(6):
        for j in range(6):
            x, y = left + 210 * j + 20, top - 210 * i - 20
            squares.append(shapely.box(x, y - 150, x + 150, y))
            kinds.append("ab"[(i + j) % 2])
    path = tmp_path / "squares.gpkg"
    gpd.GeoDataFrame({"class": kinds}, geometry=squares, crs=str(box.crs)).to_file(path)
    found = examples(scene, path, cell_px=1)
    owners = {}
    for i in range(len(found)):
        sample = found[i]
        lon, lat = sample.batch.lonlat[0].tolist()
        assert sample.fold == found.parts[i]
        cells = (sample.target[0] >= 0).nonzero()
        centre = gpd.GeoSeries([shapely.Point(lon, lat)], crs=4326).to_crs(str(box.crs))[0]
        for row, col in cells.tolist():
            point = shapely.Point(centre.x + (col - 7.5) * 10, centre.y - (row - 7.5) * 10)
            owner = next(n for n, square in enumerate(squares) if square.distance(point) < 2)
            owners.setdefault(owner, set()).add(sample.fold)
    assert len(owners) > 25
    for part in ("train", "val", "test"):
        targets = torch.cat([found[int(i)].target.flatten() for i in found.of(part)])
        assert set(targets.tolist()) == {-1, 0, 1}
    assert all(len(folds) == 1 for folds in owners.values())


def test_windows_around_points_have_one_target(scene, labels):
    found = examples(scene, labels, task="classification")
    assert {tuple(found[i].target.shape) for i in range(5)} == {(1,)}
    assert found[0].batch.observations["sentinel2_l2a"].pixels.shape[-2:] == (16, 16)
    valued = examples(scene, labels, column="value", task="scene_regression")
    assert valued[0].target.dtype == torch.float32


def test_multilabel_windows_have_the_labels_of_their_cells(scene, labels):
    dense, several = examples(scene, labels), examples(scene, labels, task="multilabel")
    for i in range(len(dense)):
        wanted = [float((dense[i].target == k).any()) for k in range(2)]
        assert several[i].target.tolist() == [wanted]


def test_whole_numbers_are_values_where_the_task_is_about_values(scene, labels, tmp_path):
    path = tmp_path / "storeys.gpkg"
    gpd.read_file(labels).assign(storeys=lambda frame: np.arange(len(frame)) % 4).to_file(path)
    assert examples(scene, path, column="storeys").task.name == "segmentation"
    counted = examples(scene, path, column="storeys", task="regression")
    known = torch.cat([counted[i].target.flatten() for i in range(len(counted))])
    assert (known.nan_to_num(0).min(), known.nan_to_num(0).max()) == (0, 3)
    assert counted.classes == ()


@pytest.mark.parametrize("seed", range(5))
def test_every_class_is_learned(seed):
    rng = np.random.default_rng(seed)
    blocks = np.arange(30) // 2
    targets = [rng.integers(0, 3, rng.integers(1, 6)) for _ in blocks]
    targets[0], targets[5] = np.array([3]), np.array([3, 0])
    parts = deal(blocks, targets, ["a", "b", "c", "rare"], seed)
    assert all(len(set(parts[blocks == b])) == 1 for b in blocks)
    learned = np.concatenate([t for t, p in zip(targets, parts, strict=True) if p == "train"])
    assert set(learned) == {0, 1, 2, 3}
    assert set(parts) == {"train", "val", "test"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "regression"}, "holds text"),
        ({"block_m": 1e5}, "three"),
        ({"window_px": 15}, "whole number of cells"),
        ({"task": "counting"}, "no task"),
        ({"task": "detection"}, "objects_from_scenes"),
    ],
)
def test_what_cannot_be_learned_is_refused(scene, labels, changes, said):
    with pytest.raises(InputError, match=said):
        examples(scene, labels, **changes)


# Runs.


@pytest.mark.slow
def test_a_model_learns_more_than_the_commonest_class_and_is_what_it_says(scene, labels, tmp_path):
    found, encoder = examples(scene, labels), tiny_encoder()
    before = weights(encoder)
    tuning = replace(QUICK, epochs=15, patience=15, head_first=0, encoder_lr=3e-3, layer_decay=1.0)
    result = finetune(found, encoder, tmp_path / "model", Settings(tuning=tuning))
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert not any(p.requires_grad for p in encoder.parameters())
    accuracy = result.test.metrics["accuracy"]
    shares = np.bincount(torch.cat([found[int(i)].target[found[int(i)].target >= 0] for i in found.of("test")]))
    assert accuracy.estimate > 0.15 + shares.max() / shares.sum()
    assert accuracy.low <= accuracy.estimate <= accuracy.high
    # The saved model scores what the run reported.
    again = score(load_finetuned(tmp_path / "model"), found, "test", batch_size=3)
    names = tuple(c.name for c in found.classes)
    assert repr(report(found.task, again, names)) == repr(result.test)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "card.md",
        "config.json",
        "encoder",
        "log.jsonl",
        "model.safetensors",
    ]
    assert not (tmp_path / "model.training").exists()
    log = [json.loads(line) for line in (tmp_path / "model" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, result.epochs + 1))
    best = max(log, key=lambda line: line["val/mean_iou"])
    assert best["step"] == result.best_epoch
    card = (tmp_path / "model" / "card.md").read_text()
    assert f"| accuracy | {accuracy.estimate:.4g} |" in card
    assert "whole blocks of 160 m" in card
    assert "kWh" in card
    # The adapted encoder is a model folder of its own.
    assert load_model(tmp_path / "model" / "encoder").dim == 32


class KilledError(RuntimeError):
    pass


@pytest.mark.parametrize(
    "tuning",
    [
        QUICK,
        pytest.param(replace(QUICK, method="lora", rank=2, precision="bfloat16"), marks=pytest.mark.slow),
        pytest.param(replace(QUICK, method="head", class_weights="balanced"), marks=pytest.mark.slow),
    ],
    ids=["full", "lora", "head"],
)
def test_a_killed_run_ends_with_the_same_numbers(scene, labels, tmp_path, tuning):
    found = examples(scene, labels)
    undisturbed = finetune(found, tiny_encoder(), tmp_path / "a", Settings(tuning=tuning))

    def kill_at(last):
        def progress(step, total, rate):
            if step == last:
                raise KilledError

        return progress

    steps = -(-len(found.of("train")) // 4)
    for last in (steps + 2, 2 * steps + 1):
        with pytest.raises(KilledError):
            finetune(found, tiny_encoder(), tmp_path / "b", Settings(tuning=tuning), progress=kill_at(last))
    resumed = finetune(found, tiny_encoder(), tmp_path / "b", Settings(tuning=tuning))
    one, other = weights(undisturbed.model), weights(resumed.model)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert repr(resumed.test) == repr(undisturbed.test)  # NaN is not itself
    assert (tmp_path / "a/log.jsonl").read_text() == (tmp_path / "b/log.jsonl").read_text()


def test_a_run_of_other_settings_is_not_gone_on_with(scene, labels, tmp_path):
    found = examples(scene, labels)

    def stop(step, total, rate):
        raise KilledError

    with pytest.raises(KilledError):
        finetune(found, tiny_encoder(), tmp_path / "m", Settings(tuning=QUICK), progress=stop)
    note = tmp_path / "m.training" / "run.json"
    job = json.loads(note.read_text())
    del job["tuning"]["as_published"]  # as before there was such a setting
    note.write_text(json.dumps(job))
    with pytest.raises(KilledError):
        finetune(found, tiny_encoder(), tmp_path / "m", Settings(tuning=QUICK), progress=stop)
    with pytest.raises(InputError, match="another tuning"):
        finetune(found, tiny_encoder(), tmp_path / "m", Settings(tuning=replace(QUICK, seed=1)))


def test_a_model_is_not_overwritten_unasked(scene, labels, tmp_path):
    found = examples(scene, labels)
    quick = replace(QUICK, epochs=1, augmentation=NONE)
    finetune(found, tiny_encoder(), tmp_path / "m", Settings(tuning=quick))
    with pytest.raises(InputError, match="overwrite"):
        finetune(found, tiny_encoder(), tmp_path / "m", Settings(tuning=quick))
    finetune(found, tiny_encoder(), tmp_path / "m", Settings(tuning=quick, overwrite=True))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no fine-tuned model"):
        finetune(found, tiny_encoder(), tmp_path / "other", Settings(tuning=quick, overwrite=True))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(scene, labels, tmp_path, capsys):
    what = ["finetune", scene, "--labels", labels, "--column", "class", "--model", "olmoearth-v1.2-nano", "--random", 0]
    how = ["--window-px", 16, "--block-m", 160, "--method", "head", "--lr", 1e38, "--out", tmp_path / "m"]
    assert main(list(map(str, what + how))) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"panterra: the loss is (nan|inf) at step \d+, of the samples .+; a smaller lr or precision", last)


def test_it_stops_when_nothing_gets_better(scene, labels, tmp_path):
    tuning = replace(QUICK, epochs=30, patience=2, method="head", lr=1e-9)
    result = finetune(examples(scene, labels), tiny_encoder(), tmp_path / "m", Settings(tuning=tuning))
    assert result.epochs == result.best_epoch + 2


@pytest.mark.parametrize(
    ("task", "column", "head"),
    [
        ("classification", "class", "attention"),
        ("multilabel", "class", "mlp"),
        ("regression", "value", "conv"),
        ("scene_regression", "value", "linear"),
    ],
)
def test_all_tasks_run(scene, labels, tmp_path, task, column, head):
    found = examples(scene, labels, task=task, column=column)
    result = finetune(
        found, tiny_encoder(), tmp_path / "m", Settings(head=head, tuning=replace(QUICK, epochs=1, batch_size=16))
    )
    assert set(result.test.metrics) == set(task_of(task).figures)
    assert all(np.isfinite(i.estimate) for i in result.test.metrics.values())


@pytest.mark.slow
def test_anysat_keeps_the_statistics_of_its_training_data(scene, labels, tmp_path):
    torch.manual_seed(0)
    encoder = AnySat(AnySatConfig(dim=96, depth=1, heads=4), name="anysat-tiny").eval().requires_grad_(False)
    found = examples(scene, labels)
    result = finetune(
        found, encoder, tmp_path / "m", Settings(tuning=replace(QUICK, epochs=2, method="lora", precision="bfloat16"))
    )
    kept = load_finetuned(tmp_path / "m").encoder.statistics_of("sentinel2_l2a")
    assert not encoder.statistics_of("sentinel2_l2a")
    train = found.of("train")
    blue = torch.cat([found[int(i)].batch.observations["sentinel2_l2a"].pixels[:, :, 0].flatten() for i in train])
    assert kept["B02"][0] == pytest.approx(float(blue.double().mean()), rel=1e-5)
    assert result.epochs == 2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:100]), "damaged"),
        (lambda m: (m / "encoder" / "model.safetensors").write_bytes(b"no"), "cannot be read"),
        (lambda m: (m / "config.json").write_text("{"), "damaged"),
        (lambda m: (m / "model.safetensors").unlink(), "missing"),
        (lambda m: shutil.rmtree(m / "encoder"), "encoder"),
    ],
)
def test_a_damaged_folder_is_named(small_model, tmp_path, damage, said):
    folder = tmp_path / "m"
    shutil.copytree(small_model, folder)
    damage(folder)
    with pytest.raises(InputError, match=said) as raised:
        load_finetuned(folder)
    assert "\n" not in str(raised.value)


def test_what_is_no_fine_tuned_model_is_told_apart(small_model, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(small_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"kind": "logistic", "task": "classes"}))
    with pytest.raises(InputError, match=r"seems to be a probe; give a folder that panterra finetune wrote"):
        load_finetuned(folder)
    (folder / "config.json").write_text(json.dumps({**config, "format": "panterra-finetuned-99"}))
    with pytest.raises(InputError, match=r"m holds 'panterra-finetuned-99', which this version cannot read"):
        load_finetuned(folder)


def test_a_head_of_another_width_is_named(small_model, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(small_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["setup"]["head"]["outputs"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json wants"):
        load_finetuned(folder)


@pytest.fixture(scope="module")
def small_model(scene, labels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "m"
    finetune(examples(scene, labels), tiny_encoder(), folder, Settings(tuning=replace(QUICK, epochs=1)))
    return folder


def test_a_class_weight_of_an_unknown_class_is_refused(scene, labels, tmp_path):
    with pytest.raises(InputError, match="the classes are green, other"):
        finetune(
            examples(scene, labels),
            tiny_encoder(),
            tmp_path / "m",
            Settings(tuning=replace(QUICK, class_weights={"blue": 2.0})),
        )


def test_patches_that_do_not_fit_the_cells_are_refused(scene, labels, tmp_path):
    with pytest.raises(InputError, match="whole number of cells"):
        finetune(
            examples(scene, labels, cell_px=16), tiny_encoder(), tmp_path / "m", Settings(patch_m=40, tuning=QUICK)
        )
    with pytest.raises(InputError, match="whole number of patches"):
        finetune(examples(scene, labels), tiny_encoder(), tmp_path / "m", Settings(patch_m=30, tuning=QUICK))


def test_examples_are_read_once(scene, labels):
    found = examples(scene, labels)
    assert found[0] is found[0]


def test_scenes_of_one_place_share_its_blocks(scene, labels):
    one = examples(scene, labels)
    both = examples_from_scenes([open_scene(scene)] * 2, labels, column="class", window_px=16, cell_px=4, block_m=160)
    assert len(both) == 2 * len(one)
    half = len(both) // 2
    assert (both.blocks[:half] == both.blocks[half:]).all()
    assert (both.parts[:half] == both.parts[half:]).all()


def test_without_a_test_split_that_for_validation_is_tested_on(tmp_path):
    sickle(tmp_path)
    with pytest.raises(InputError, match="leaves no sample for train"):
        examples_from_dataset("sickle", tmp_path)
    with (tmp_path / "sickle_dataset_tabular.csv").open("a") as table:
        table.write("train,8,1\n")
    found = examples_from_dataset("sickle", tmp_path)
    assert [int((found.parts == part).sum()) for part in ("train", "val", "test")] == [1, 1, 2]


def test_a_labelled_data_set_brings_its_splits(tmp_path):
    sen1floods11(tmp_path / "data", side=16)
    found = examples_from_dataset("sen1floods11", tmp_path / "data", modalities=["sentinel1"], window_px=8)
    assert [int((found.parts == part).sum()) for part in ("train", "val", "test")] == [4, 4, 4]
    whole = examples_from_dataset("sen1floods11", tmp_path / "data", modalities=["sentinel1"])
    first = found.of("train")
    quarters = [found[int(i)].target[0] for i in first]
    pieces = torch.cat([torch.cat(quarters[:2], dim=1), torch.cat(quarters[2:], dim=1)])
    assert torch.equal(pieces, whole[int(whole.of("train")[0])].target[0])
    result = finetune(found, tiny_encoder(), tmp_path / "m", Settings(tuning=replace(QUICK, epochs=1)))
    # One image says nothing of others.
    assert result.test.num_blocks == 1
    assert math.isnan(result.test.metrics["accuracy"].low)
    assert "there are no intervals" in (tmp_path / "m" / "card.md").read_text()
    assert load_finetuned(tmp_path / "m").modalities == ("sentinel1",)
    assert "CC-BY-4.0" in (tmp_path / "m" / "card.md").read_text()


# The command.


def test_the_command_trains_and_tells(scene, labels, tmp_path, capsys):
    options = {"model": "olmoearth-v1.2-nano", "random": 0, "column": "class", "labels": labels}
    sizes = {"window_px": 16, "block_m": 160, "epochs": 1, "batch_size": 16, "modalities": ["sentinel2_l2a"]}
    command(str(scene), out=tmp_path / "m", as_json=True, method="head", **options, **sizes)
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == str(tmp_path / "m")
    assert 0 <= told["test"]["metrics"]["accuracy"]["estimate"] <= 1
    assert load_finetuned(tmp_path / "m").setup.output_m == 40


def dated(labels, path, old):
    """Write labels of 2023, but for the first `old`, which are of 2019."""
    frame = gpd.read_file(labels)
    frame["start_time"], frame["end_time"] = "2023-01-01", "2023-12-31"
    frame.loc[frame.index[:old], ["start_time", "end_time"]] = ["2019-01-01", "2019-12-31"]
    frame.to_file(path)
    return path


def test_labels_count_on_scenes_of_their_dates_alone(scene, labels, tmp_path):
    timed = dated(labels, tmp_path / "timed.gpkg", 40)
    both = gpd.read_file(labels).iloc[40:]
    both.to_file(tmp_path / "kept.gpkg")
    found, wanted = examples(scene, timed, cell_px=1), examples(scene, tmp_path / "kept.gpkg", cell_px=1)
    assert found.about == {**wanted.about, "other_dates": 40}
    assert all(torch.equal(found[i].target, wanted[i].target) for i in range(len(wanted)))
    known = examples(scene, labels, cell_px=1)
    assert "other_dates" not in known.about
    older = open_scene(scene)
    older = replace(older, items=tuple(replace(i, date=i.date.replace(year=2019)) for i in older.items))
    options = {"column": "class", "modalities": ["sentinel2_l2a"], "window_px": 16, "block_m": 160}
    together = examples_from_scenes([open_scene(scene), older], timed, **options)
    assert together.about["labels"] == known.about["labels"]
    assert "other_dates" not in together.about
    with pytest.raises(InputError, match="300 labels are of other dates than the scenes"):
        examples(scene, dated(labels, tmp_path / "old.gpkg", 300))


def test_the_command_counts_labels_of_other_dates(scene, labels, tmp_path, capsys):
    timed = dated(labels, tmp_path / "timed.gpkg", 3)
    options = {"model": "olmoearth-v1.2-nano", "random": 0, "column": "class", "labels": timed, "method": "head"}
    sizes = {"window_px": 16, "block_m": 160, "epochs": 1, "batch_size": 16, "modalities": ["sentinel2_l2a"]}
    command(str(scene), out=tmp_path / "m", as_json=True, **options, **sizes)
    told = capsys.readouterr()
    assert json.loads(told.out)["examples"]["other_dates"] == 3
    assert "3 labels are of other dates than the imagery, and are left out" in told.err
    assert "3 labels of other dates were left out." in (tmp_path / "m" / "card.md").read_text()


def test_windows_of_several_labels_miss_no_small_polygon(scene, tmp_path, capsys):
    box = open_scene(scene).geobox()
    left, top = box.affine @ (0, 0)
    middles = [(left + 80 * i + 40, top - 80 * j - 40) for i in range(16) for j in range(16)]
    squares = [shapely.box(x - 12, y - 12, x + 12, y + 12) for x, y in middles]
    kinds = ["barn", "shed", "shed"] * 85 + ["barn"]
    gpd.GeoDataFrame({"class": kinds}, geometry=squares, crs=str(box.crs)).to_file(tmp_path / "small.gpkg")
    options = {"model": "olmoearth-v1.2-nano", "random": 0, "labels": tmp_path / "small.gpkg", "method": "head"}
    sizes = {"window_px": 16, "block_m": 160, "epochs": 1, "batch_size": 32, "modalities": ["sentinel2_l2a"]}
    command(str(scene), out=tmp_path / "m", task="multilabel", as_json=True, **options, **sizes)
    told = json.loads(capsys.readouterr().out)
    assert sum(told["examples"]["samples"].values()) == 64
    assert told["test"]["num_blocks"] > 5


@pytest.mark.parametrize(
    ("scenes", "changes", "said"),
    [
        ((), {}, "needs a scene and --labels"),
        (("scene",), {"dataset": "sen1floods11"}, "both --dataset and --root"),
        (("scene",), {"dataset": "sen1floods11", "root": "data"}, "leave out scenes"),
    ],
)
def test_the_command_says_what_it_misses(tmp_path, scenes, changes, said):
    with pytest.raises(InputError, match=said):
        command(*scenes, model="olmoearth-v1.2-nano", random=0, out=tmp_path / "m", **changes)
