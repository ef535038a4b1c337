"""The suite on small sets that the planet makes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score
from sklearn.neighbors import KNeighborsClassifier

import planet_benchmarks
from panterra.data.labelled import DATASETS
from panterra.errors import InputError
from panterra.evaluate import metrics, published
from panterra.evaluate.benchmark import (
    ASSUMED_DAY,
    band_statistics,
    normalised,
    open_benchmark,
    open_encoder,
    patch_for,
    seen_by,
    show,
)
from panterra.evaluate.cache import Store
from panterra.evaluate.protocols import fraction_of, standardised
from panterra.evaluate.published import ANYSAT, OLMOEARTH, AnySatProbe, OlmoEarthTask
from panterra.evaluate.scoring import FIGURES, Answers, sums_of
from panterra.evaluate.suite import ROWS, Plan, Row, evaluate, read_rows
from panterra.evaluate.sweep import Table
from panterra.models.features import Features
from panterra.models.weights import load_model
from panterra.sample import Batch, Observation

RATES = (1e-2, 1e-1)


pytestmark = pytest.mark.usefixtures("root")


class Colour:
    """Gives the mean of each band as features, and counts what it is asked."""

    modalities = ("sentinel2_l2a",)
    dim = 12
    name = "colour"

    def __init__(self):
        self.samples = 0

    def encode(self, batch, *, patch_m, dense=False):
        if dense:
            raise InputError("no sub-patches")
        o = batch.observations["sentinel2_l2a"]
        self.samples += len(batch)
        side = round(patch_m / batch.pixel_m)
        patches = o.pixels.mean(1).unflatten(3, (-1, side)).unflatten(2, (-1, side)).mean((3, 5)).permute(0, 2, 3, 1)
        valid = torch.ones(patches.shape[:3], dtype=torch.bool)
        return Features(patches=patches / 1e4, summary=patches.mean((1, 2)) / 1e4, valid=valid, patch_m=patch_m)


def plan_of(root, *names, models=("raw",), **options):
    settings = {"protocols": ("knn", "linear"), "rates": RATES, "epochs": 5} | options
    return Plan(models=models, benchmarks=tuple((name, root) for name in names), **settings)


def same(rows):
    """Give what must not depend on when and how often a row was computed."""
    return [replace(row, seconds=0, wh=0, embed_seconds=0, embed_wh=0, energy="") for row in rows]


def test_every_task_and_protocol_gives_rows_for_every_family(root, tmp_path):
    models = ("raw", "olmoearth-v1.2-nano@random:0", Colour())
    plan = plan_of(root, *planet_benchmarks.TASKS, models=models, protocols=("knn", "linear", "attention", "anysat"))
    plan = replace(plan, limit=16, epochs=2)
    rows = evaluate(plan, tmp_path)
    assert not [row.error for row in rows if row.error]
    assert len(rows) == 3 * (4 + 4 + 3 + 3)
    for row in rows:
        assert row.score is not None
        assert row.score.low <= row.score.estimate <= row.score.high or row.metric == "mean_iou"
        assert (row.labels, row.tested) == (16, 16)
        assert row.chosen["patch_m"] == 40
        assert row.embed_seconds > 0
        assert "at most 16" in row.note


def test_neighbours_vote_as_scikit_learns_do(root, tmp_path):
    (row,) = evaluate(plan_of(root, "planet_classes", models=(Colour(),), protocols=("knn",)), tmp_path)
    features = {}
    for split in ("train", "test"):
        labelled = planet_benchmarks.opened("planet_classes", root, split)
        samples = [labelled[i] for i in range(len(labelled))]
        x = np.stack([s.batch.observations["sentinel2_l2a"].pixels[0, 0].mean((1, 2)).numpy() for s in samples])
        features[split] = x / np.linalg.norm(x, axis=1, keepdims=True), np.array([int(s.target[0]) for s in samples])
    neighbours = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)).fit(*features["train"])
    wanted = accuracy_score(features["test"][1], neighbours.predict(features["test"][0]))
    assert row.figures["accuracy"].estimate == pytest.approx(wanted)


def test_a_second_run_embeds_nothing(root, tmp_path):
    encoder = Colour()
    plan = plan_of(root, "planet_classes", "planet_pixels", models=(encoder,))
    evaluate(plan, tmp_path / "first", cache=tmp_path / "cache")
    once = encoder.samples
    assert once == 2 * sum(planet_benchmarks.COUNTS.values())
    evaluate(plan, tmp_path / "again", cache=tmp_path / "cache")
    evaluate(replace(plan, protocols=("anysat",), fractions=(0.5, 1.0)), tmp_path / "more", cache=tmp_path / "cache")
    # Only to learn that it has no sub-patches is it asked, and refuses.
    assert encoder.samples == once
    evaluate(replace(plan, patch_m=20), tmp_path / "finer", cache=tmp_path / "cache")
    assert encoder.samples == 2 * once


def test_features_are_found_again_by_content(root, tmp_path):
    first, second = Colour(), Colour()
    evaluate(plan_of(root, "planet_classes", models=(first,)), tmp_path / "a", cache=tmp_path / "cache")
    path = root / "test" / "000.npz"
    path.touch()
    evaluate(plan_of(root, "planet_classes", models=(second,)), tmp_path / "b", cache=tmp_path / "cache")
    assert second.samples == planet_benchmarks.COUNTS["test"]


def test_a_stopped_run_goes_on_and_ends_with_the_same_table(root, tmp_path):
    plan = plan_of(root, "planet_classes", "planet_labels", models=("raw", Colour()), seeds=(0, 1))
    whole = evaluate(plan, tmp_path / "whole")
    seen = []

    def stop(text):
        seen.append(text)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(plan, tmp_path / "parts", note=stop)
    journal = tmp_path / "parts" / ROWS
    kept = read_rows(journal)
    assert 0 < len(kept) < len(whole)
    # As if the power had gone while a line was written.
    journal.write_text(journal.read_text() + '{"id": "half a li')
    resumed = evaluate(plan, tmp_path / "parts")
    assert same(resumed) == same(whole)
    assert resumed[: len(kept)] == kept
    assert read_rows(journal) == resumed
    assert [json.loads(line)["id"] for line in journal.read_text().splitlines()] == [row.id for row in resumed]


def test_a_kill_while_embedding_leaves_no_half_features(root, tmp_path):
    class Dying(Colour):
        def encode(self, batch, **options):
            if self.samples >= 48:
                raise KeyboardInterrupt
            return super().encode(batch, **options)

    plan = plan_of(root, "planet_classes", models=(Dying(),))
    with pytest.raises(KeyboardInterrupt):
        evaluate(plan, tmp_path)
    assert not list((tmp_path / "features").iterdir())
    left = tmp_path / "features" / ".0.npy.999999999.part"
    left.write_bytes(b"of a process that is gone")
    evaluate(plan_of(root, "planet_classes", models=(Colour(),)), tmp_path)
    assert not left.exists()


def test_what_is_wrong_with_one_benchmark_or_model_does_not_stop_the_rest(root, tmp_path):
    class Broken(Colour):
        name = "broken"

        def encode(self, batch, **options):
            raise ZeroDivisionError("in its depths")

    plan = plan_of(root, "planet_classes", models=("no-such-model", Broken(), "raw"), protocols=("knn",))
    plan = replace(plan, benchmarks=(("so2sat", tmp_path / "nowhere"), *plan.benchmarks))
    rows = evaluate(plan, tmp_path / "out")
    errors = {(row.model, row.benchmark): row.error for row in rows}
    assert f"there is no folder {tmp_path / 'nowhere'}" in errors["raw", "so2sat"]
    assert "no model or folder 'no-such-model'" in errors["no-such-model", "planet_classes"]
    assert errors["broken", "planet_classes"] == "ZeroDivisionError: in its depths"
    assert errors["raw", "planet_classes"] is None
    # Failures are tried again.
    mended = evaluate(replace(plan, models=(Colour(), "raw"), benchmarks=plan.benchmarks[1:]), tmp_path / "out")
    assert [row.error for row in mended] == [None, None]


def test_sweeps_are_chosen_by_validation(root, tmp_path):
    plan = plan_of(root, "planet_classes", models=("olmoearth-v1.2-nano@random:0",), epochs=2)
    sweep = replace(plan, normalisations=("model", "dataset"), poolings=("mean", "max"))
    rows = evaluate(sweep, tmp_path, cache=tmp_path / "cache")
    single = [
        evaluate(replace(plan, normalisations=(n,), poolings=(p,)), tmp_path / f"{n}{p}", cache=tmp_path / "cache")
        for n in ("model", "dataset")
        for p in ("mean", "max")
    ]
    for i, row in enumerate(rows):
        picked = row.chosen["normalisation"], row.chosen["pooling"]
        (alone,) = [r[i] for r in single if (r[i].chosen["normalisation"], r[i].chosen["pooling"]) == picked]
        assert row.figures == alone.figures
    assert len({str(r[0].figures) for r in single}) > 1


def test_an_encoder_with_statistics_of_its_own_fits_them_to_the_training_samples(root, tmp_path):
    plan = plan_of(root, "planet_pixels", models=("anysat-tiny@random:0",), protocols=("anysat",), limit=4, epochs=1)
    (row,) = evaluate(plan, tmp_path)
    assert row.error is None
    assert row.chosen["normalisation"] == "dataset"
    assert row.chosen["features"] == "dense"


def test_fractions_are_stratified_and_nested():
    y = torch.tensor(np.repeat([0, 1, 2, 5], [100, 50, 10, 1]))
    small, large = (fraction_of(y, f, 0) for f in (0.1, 0.5))
    assert np.bincount(y[small]).tolist() == [10, 5, 1, 0, 0, 1]
    assert np.bincount(y[large]).tolist() == [50, 25, 5, 0, 0, 1]
    assert set(small) <= set(large)
    assert set(small) != set(fraction_of(y, 0.1, 1))
    labels = torch.zeros(40, 3)
    labels[:, 0], labels[:4, 1] = 1, 1
    assert (fraction_of(labels, 0.25, 0) < 4).sum() == 1
    pixels = torch.full((30, 4, 4), 2)
    pixels[:5, 0, 0] = 0
    assert (fraction_of(pixels, 0.2, 0) < 5).sum() == 1
    values = torch.arange(50.0).reshape(50, 1, 1)
    values[0] = torch.nan
    assert len(fraction_of(values, 0.1, 0)) == 5


def test_level_1c_stands_in_for_2a_by_band_names():
    encoder = load_model("olmoearth-v1.2-nano", random=0)
    pixels = torch.arange(13.0)[None, None, :, None, None].expand(1, 1, 13, 8, 8)
    o = Observation(pixels=pixels, dates=torch.zeros(1, 1, dtype=torch.int64), valid=torch.ones(1, 1, 8, 8).bool())
    shown = seen_by(encoder, ("sentinel2", "sentinel1"))
    assert shown == {"sentinel1": "sentinel1", "sentinel2": "sentinel2_l2a"}
    seen = show(Batch(observations={"sentinel2": o}), shown).observations["sentinel2_l2a"]
    # B10, the last of level 1C, is not among the twelve.
    assert seen.pixels[0, 0, :, 0, 0].tolist() == list(range(12))
    assert seen.dates.tolist() == [[ASSUMED_DAY]]
    with pytest.raises(InputError, match="knows none of hls"):
        seen_by(encoder, ("hls",))


@pytest.mark.parametrize(("side", "wanted"), [(64, 40), (6, 30), (50, 20), (1, 10)])
def test_patches_divide_the_samples(side, wanted):
    assert patch_for(Batch(observations={"sentinel1": Observation.build(np.zeros((2, side, side)), [0])})) == wanted


def test_a_data_sets_own_statistics_span_zero_to_one():
    rng = np.random.default_rng(0)
    pixels = torch.tensor(rng.normal([[[[[100]], [[5000]]]]], 50, (6, 2, 2, 8, 8)), dtype=torch.float32)
    valid = torch.ones(6, 2, 8, 8, dtype=torch.bool)
    valid[0, 0] = False
    pixels[0, 0] = -9999
    batch = Batch(observations={"sentinel1": Observation(pixels=pixels, dates=torch.ones(6, 2).long(), valid=valid)})
    found = band_statistics([batch])
    seen = pixels.movedim(2, -1)[valid]
    torch.testing.assert_close(found["sentinel1"][0].float(), seen.mean(0), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(found["sentinel1"][1].float(), seen.std(0, correction=0), rtol=1e-3, atol=1e-2)
    scaled = normalised(batch, found).observations["sentinel1"].pixels.movedim(2, -1)[valid]
    torch.testing.assert_close(scaled.mean(0), torch.tensor([0.5, 0.5]), rtol=0, atol=1e-3)
    torch.testing.assert_close(scaled.std(0), torch.tensor([0.25, 0.25]), rtol=0, atol=1e-2)


def test_band_statistics_are_standardised_by_the_training_samples():
    x = torch.tensor([[1.0, 10, torch.nan], [3.0, 10, 5], [torch.nan, torch.nan, torch.nan]])
    table = Table(x=x, y=torch.zeros(3, dtype=torch.int64))
    found = standardised({"train": table, "test": table})["test"].x
    torch.testing.assert_close(found[:2], torch.tensor([[-1.0, 0, 0], [1, 0, 0]]))
    assert found[2].isnan().all()


def test_sets_without_a_split_for_something_say_what_stands_in(root, monkeypatch):
    card = DATASETS["planet_classes"]
    monkeypatch.setitem(DATASETS, "planet_classes", replace(card, splits={"train": None, "val": None}))
    opened = open_benchmark("planet_classes", root)
    assert opened.note == "tested on val; a fifth of the training samples validates"
    ids = {role: set(s.ids) for role, s in opened.splits.items()}
    assert len(ids["val"]) == 12
    assert not ids["val"] & ids["train"]
    monkeypatch.setitem(DATASETS, "planet_classes", replace(card, splits={"train": None}))
    with pytest.raises(InputError, match="no split to test on"):
        open_benchmark("planet_classes", root)


def test_multilabel_figures_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.random((80, 5)) < 0.3
    shares = np.clip(truth * 0.3 + rng.random((80, 5)) * 0.6, 0, 1)
    sums = sums_of("multilabel", shares > 0.5, truth.astype(np.float32), classes=5)
    figures = Answers(task="multilabel", sums=sums, scores=shares, truth=truth).figures(resamples=300)
    assert figures["macro_f1"].estimate == pytest.approx(f1_score(truth, shares > 0.5, average="macro"))
    assert figures["micro_f1"].estimate == pytest.approx(f1_score(truth, shares > 0.5, average="micro"))
    found = figures["average_precision"]
    assert found.estimate == pytest.approx(average_precision_score(truth, shares, average="micro"))
    rng = np.random.Generator(np.random.PCG64(42))
    counts = [rng.multinomial(80, np.full(80, 1 / 80)) for _ in range(300)]
    drawn = [metrics.average_precision(*(np.repeat(a, c, axis=0) for a in (truth, shares))) for c in counts]
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))


def test_values_are_scored_around_any_centre():
    rng = np.random.default_rng(0)
    y = rng.normal(300, 5, (20, 9))
    guess = y + rng.normal(0, 2, y.shape)
    y[0, :4] = np.nan
    sums = sums_of("regression", guess, y, classes=1, centre=290.0)
    known = np.isfinite(y)
    wanted = metrics.moments(y[known], guess[known])
    for figure in (metrics.rmse, metrics.mae, metrics.r2):
        assert float(figure(sums.sum(0))) == pytest.approx(float(figure(wanted)))


def test_rows_pass_through_json(root, tmp_path):
    (row,) = evaluate(plan_of(root, "planet_labels", protocols=("knn",)), tmp_path)
    assert Row.from_dict(json.loads(json.dumps(row.as_dict()))) == row


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fractions": (0.0,)}, "a fraction is 0"),
        ({"rates": (-1.0,)}, "a learning rate is -1"),
        ({"protocols": ("magic",)}, "no protocol 'magic'"),
        ({"models": ()}, "no model came"),
        ({"limit": 0}, "are counts"),
        ({"rates": ()}, "no learning rate came"),
        ({"rates": (np.inf,)}, "a learning rate is inf"),
        ({"seeds": ()}, "no seed came"),
        ({"seeds": (-1,)}, "a seed is -1"),
        ({"patch_m": 0.0}, "patch_m is 0; wanted a length"),
        ({"poolings": ("median",)}, "no pooling 'median'; known: mean, max"),
        ({"normalisations": ("z",)}, "no normalisation 'z'"),
        ({"loss": "focal"}, "no loss 'focal'"),
        ({"tuned_head": "big"}, "no head 'big'"),
        ({"device": "tpu"}, "device 'tpu' came; give auto, cpu"),
    ],
)
def test_plans_that_make_no_sense_are_refused_at_once(root, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        evaluate(plan_of(root, "planet_classes", **options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_seeds_are_whole_numbers():
    with pytest.raises(InputError, match="write NAME@random:SEED"):
        open_encoder("olmoearth-v1.2-nano@random:x", None)


def test_an_array_is_there_whole_or_not_at_all(tmp_path):
    store = Store(folder=tmp_path)
    about = {"what": "numbers"}
    writer = store.writer(about, 3)
    writer.add(torch.arange(4.0).reshape(2, 2))
    assert not store.has(about)
    writer.add(torch.ones(1, 2))
    writer.finish({"seconds": 1.0, "wh": 2.0})
    assert store.read(about).tolist() == [[0, 1], [2, 3], [1, 1]]
    assert store.cost(about) == {"seconds": 1.0, "wh": 2.0}
    assert not store.has({"what": "others"})


def test_published_tables_speak_of_data_sets_that_there_are():
    for table in (OLMOEARTH, ANYSAT):
        assert set(table) <= set(DATASETS)
    for name, task in OLMOEARTH.items():
        assert task.metric is None or task.metric in {*FIGURES[DATASETS[name].task], "average_precision"}
        assert {*(task.modalities or ()), *(task.highest_of or ())} <= set(DATASETS[name].modalities)
    for name, row in ANYSAT.items():
        assert {*row.modalities, row.dense or row.modalities[0]} <= set(DATASETS[name].modalities)


def test_a_row_of_the_published_table_decides(root, tmp_path, monkeypatch):
    task = OlmoEarthTask(metric="macro_f1", rate=0.03, batch=12, normalisation="dataset", patch_px=2, centre=True)
    monkeypatch.setitem(published.OLMOEARTH, "planet_classes", task)
    plan = plan_of(root, "planet_classes", models=("olmoearth-v1.2-nano@random:0",), protocols=("linear",))
    (row,) = evaluate(replace(plan, published_rate=True), tmp_path)
    chosen = {name: row.chosen[name] for name in ("rate", "batch", "normalisation", "patch_m", "features")}
    assert chosen == {"rate": 0.03, "batch": 12, "normalisation": "dataset", "patch_m": 20, "features": "centre"}
    assert row.metric == "macro_f1"


def test_where_no_rate_is_swept_validation_comes_at_the_end(root, tmp_path, monkeypatch):
    monkeypatch.setitem(published.OLMOEARTH, "planet_classes", OlmoEarthTask(metric="accuracy", rate=0.03))
    plan = plan_of(root, "planet_classes", protocols=("linear",), rates=(0.03,), epochs=12)
    (swept,) = evaluate(plan, tmp_path)
    (single,) = evaluate(replace(plan, published_rate=True), tmp_path)
    (longer,) = evaluate(replace(plan, published_rate=True, epochs=60), tmp_path)
    assert swept.chosen["epoch"] in (5, 10, 12)
    assert single.chosen["epoch"] == 12
    assert longer.chosen["epoch"] in (50, 60)


def test_a_row_may_pool_by_the_maximum(root, tmp_path, monkeypatch):
    plan = plan_of(root, "planet_classes", models=("olmoearth-v1.2-nano@random:0",), protocols=("knn",))
    pooled = []
    for modalities in (("sentinel2_l2a",), ("sentinel1",)):
        monkeypatch.setitem(published.OLMOEARTH, "planet_classes", OlmoEarthTask(highest_of=modalities))
        (row,) = evaluate(plan, tmp_path / modalities[0], cache=tmp_path / "cache")
        pooled.append(row.chosen["pooling"])
    assert pooled == ["max", "mean"]
    assert OLMOEARTH["pastis128"].highest_of == ("sentinel2_l2a",)
    (row,) = evaluate(replace(plan, poolings=("max",)), tmp_path / "asked", cache=tmp_path / "cache")
    assert row.chosen["pooling"] == "max"


def test_a_row_of_anysats_table_decides(root, tmp_path, monkeypatch):
    row = AnySatProbe(
        modalities=("sentinel2_l2a",),
        patch_m=80,
        dense="sentinel2_l2a",
        rate=0.002,
        schedule="epoch_cosine",
        batch=7,
        metric="accuracy",
    )
    monkeypatch.setitem(published.ANYSAT, "planet_pixels", row)
    plan = plan_of(root, "planet_pixels", models=("anysat-tiny@random:0",), protocols=("anysat",), limit=8)
    (found,) = evaluate(plan, tmp_path)
    chosen = {name: found.chosen[name] for name in ("rate", "batch", "patch_m", "features")}
    assert chosen == {"rate": 0.002, "batch": 7, "patch_m": 80, "features": "dense"}
    assert found.metric == "accuracy"


def test_one_value_per_sample_is_learned(root, tmp_path, monkeypatch):
    def opened(folder, split):
        labelled = planet_benchmarks.opened("planet_height", folder, split)
        return replace(labelled, read=lambda id: mean_of(labelled.read(id)))

    def mean_of(sample):
        return replace(sample, target=sample.target.mean((1, 2)))

    monkeypatch.setattr(planet_benchmarks, "open_planet_height", opened)
    plan = plan_of(root, "planet_height", protocols=("linear",), epochs=20, batch=8)
    (row,) = evaluate(plan, tmp_path)
    assert row.error is None
    heights = [opened(root, "test")[i].target.item() for i in range(planet_benchmarks.COUNTS["test"])]
    assert row.figures["rmse"].estimate < 1.3 * np.std(heights)
