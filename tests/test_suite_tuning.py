"""The suite's protocols that train encoders."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import miniatures
import planet_benchmarks
from panterra.data.labelled import DATASETS
from panterra.errors import InputError
from panterra.evaluate import published_tuning
from panterra.evaluate.suite import Plan, evaluate
from panterra.finetune import protocol
from panterra.finetune.protocol import tune
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.anysat_sensors import SENSORS
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig

pytestmark = pytest.mark.usefixtures("root")


def olmoearth():
    torch.manual_seed(0)
    config = OlmoEarthConfig(dim=32, depth=2, heads=2, position="rope_3d_mixed", pixel_hidden=(8,), convolution=False)
    return OlmoEarth(config, name="small").eval().requires_grad_(False)


def plan_of(root, *names, **options):
    settings = {
        "models": (olmoearth(),),
        "protocols": ("finetune",),
        "tuning_rates": (1e-3,),
        "epochs": 2,
        "batch": 8,
        "limit": 8,
        "precision": "float32",
    }
    return Plan(benchmarks=tuple((name, root) for name in names), **(settings | options))


def same(rows):
    return [replace(row, seconds=0, wh=0) for row in rows]


def test_every_task_is_fine_tuned(root, tmp_path):
    rows = evaluate(plan_of(root, *planet_benchmarks.TASKS), tmp_path, tuner=tune)
    assert not [row.error for row in rows if row.error]
    assert [row.metric for row in rows] == ["accuracy", "macro_f1", "mean_iou", "rmse"]
    for row in rows:
        assert row.protocol == "finetune"
        assert np.isfinite(row.score.estimate)
        assert row.seconds > 0
        assert (row.labels, row.tested) == (8, 8)
        assert (row.chosen["rate"], row.chosen["batch"], row.chosen["head"]) == (1e-3, 8, "plain")
    assert "average_precision" in rows[1].figures
    assert not list((tmp_path / "tuning").iterdir())


def test_a_stopped_trial_goes_on_and_ends_with_the_same_row(root, tmp_path):
    plan = plan_of(root, "planet_classes", epochs=3, tuning_rates=(1e-4, 1e-2))
    whole = evaluate(plan, tmp_path / "whole", tuner=tune)
    steps = []

    def stop(done, total):
        steps.append((done, total))
        if len(steps) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(plan, tmp_path / "stopped", tuner=tune, progress=stop)
    steps.append((0, 0))
    again = evaluate(plan, tmp_path / "stopped", tuner=tune, progress=lambda done, total: steps.append((done, total)))
    assert same(again) == same(whole)
    # The first rate was finished, of the second the epoch that was stopped is done again.
    assert steps == [(n, 6) for n in (1, 2, 3, 4, 5)] + [(0, 0), (5, 6), (6, 6)]
    assert again[0].chosen["rate"] in (1e-4, 1e-2)
    assert not list((tmp_path / "stopped" / "tuning").iterdir())


def test_what_is_trained_is_the_published_recipe(root):
    names = {}

    def look(trial, progress):
        names[trial.benchmark.name] = trial
        raise InputError("seen")

    plan = plan_of(
        root, "planet_pixels", epochs=None, batch=None, tuning_rates=published_tuning.RATES, precision="bfloat16"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            published_tuning.OLMOEARTH_TUNING,
            "planet_pixels",
            published_tuning.OlmoEarthTuning(batch=2, accumulate=4, patch_px=8),
        )
        evaluate(plan, root / "seen", tuner=look)
        trial = names["planet_pixels"]
        recipes = protocol._recipes(trial, trial.views[0], published_tuning.AnySatTuning())
    shutil.rmtree(root / "seen")
    assert [r.tuning.lr for r in recipes] == [1e-4, 5e-4, 1e-3]
    assert trial.views[0].patch_m == 80
    for r in recipes:
        t = r.tuning
        assert (t.epochs, t.frozen_epochs, t.after_head, t.patience) == (50, 10, 0.1, 50)
        assert (t.batch_size, t.accumulate, t.precision, t.seed) == (8, 4, "bfloat16", 42)
        assert (t.schedule.factor, t.schedule.patience, t.schedule.cooldown) == (0.2, 2, 10)
        assert (t.encoder_lr, t.layer_decay, t.weight_decay, t.clip_norm) == (t.lr, 1.0, 0.01, None)
        assert r.head == "plain"


def test_fractions_and_seeds_choose_samples(root, tmp_path):
    plan = plan_of(root, "planet_labels", epochs=1, fractions=(0.5, 1.0), seeds=(0, 1), compressions=("none", "int8"))
    rows = evaluate(plan, tmp_path, tuner=tune)
    assert [(r.fraction, r.seed, r.compression) for r in rows] == [(f, s, "none") for f in (0.5, 1.0) for s in (0, 1)]
    assert [r.labels for r in rows if r.fraction == 1] == [8, 8]
    assert all(r.labels < 8 and r.subset == "stratified" for r in rows if r.fraction < 1)


def test_what_cannot_be_trained_has_no_row_and_a_tuner_is_wanted(root, tmp_path):
    plan = plan_of(root, "planet_classes", models=("raw",))
    assert evaluate(plan, tmp_path, tuner=tune) == []
    assert evaluate(replace(plan, models=(olmoearth(),), protocols=("anysat_plus",)), tmp_path, tuner=tune) == []
    with pytest.raises(InputError, match="finetune trains encoders; hand evaluate tuner="):
        evaluate(plan, tmp_path)


# AnySat


def anysat():
    torch.manual_seed(0)
    sensors = tuple(s for s in AnySatConfig(dim=32, depth=1, heads=2).sensors if s.name in ("s2", "aerial"))
    return AnySat(AnySatConfig(dim=32, depth=1, heads=2, sensors=sensors), name="any").eval().requires_grad_(False)


def test_anysats_experiments_give_rows(root, tmp_path):
    protocols = ("anysat_finetune", "anysat_plus", "anysat_scratch")
    plan = plan_of(root, "planet_classes", "planet_pixels", models=(anysat(),), protocols=protocols, epochs=1)
    rows = evaluate(plan, tmp_path, tuner=tune)
    assert not [row.error for row in rows if row.error]
    assert [r.protocol for r in rows] == [*protocols, *protocols]
    assert [r.chosen["features"] for r in rows] == ["summary"] * 3 + ["dense"] * 3
    assert {r.chosen["rate"] for r in rows} == {5e-5}


def test_only_projectors_and_head_move_for_a_new_sensor(root, tmp_path, monkeypatch):
    models, fit = [], protocol.fit

    def kept(*given, **options):
        model, state = fit(*given, **options)
        models.append(model)
        return model, state

    monkeypatch.setattr(protocol, "fit", kept)
    before = anysat()
    plan = plan_of(root, "planet_classes", models=(before,), protocols=("anysat_plus", "anysat_scratch"), epochs=1)
    assert not [r.error for r in evaluate(plan, tmp_path, tuner=tune) if r.error]
    after, scratch = (dict(m.encoder.named_parameters()) for m in models)
    moved = {name for name, p in before.named_parameters() if not torch.equal(p, after[name])}
    assert moved
    assert all(name.startswith("projectors.s2") for name in moved)
    anew = {name for name, p in before.named_parameters() if not torch.equal(p, scratch[name])}
    assert any(name.startswith("fusion") or "blocks" in name for name in anew)
    for model in models:
        assert {(s.period, s.dropout) for s in model.encoder.config.sensors} == {(366, 0.0)}
    assert {s.period for s in before.config.sensors} == {367}
    # The library's default, 1 / sqrt(3 * 32), and not the 0.02 of pretraining.
    assert scratch["patch_encoder.blocks.0.attn.qkv.weight"].detach().std().item() == pytest.approx(0.102, abs=0.01)


def test_other_heads_can_be_asked_for(root, tmp_path):
    asked = {"nearest": ("finetune", "planet_pixels"), "naive": ("anysat_finetune", "planet_pixels")}
    asked |= dict.fromkeys(("max", "batch_mlp"), ("anysat_finetune", "planet_classes"))
    heads = {}
    for head, (name, benchmark) in asked.items():
        model = olmoearth() if name == "finetune" else anysat()
        plan = plan_of(root, benchmark, models=(model,), protocols=(name,), tuned_head=head, epochs=1)
        (row,) = evaluate(plan, tmp_path / head, tuner=tune)
        assert row.error is None
        heads[head] = row.chosen["head"], row.chosen["features"]
    assert heads == {
        "nearest": ("nearest", "patches"),
        "naive": ("linear", "patches"),
        "max": ("max", "summary"),
        "batch_mlp": ("batch_mlp", "summary"),
    }


def test_images_are_tested_in_overlapping_crops(root, monkeypatch):
    seen = []
    card = DATASETS["planet_pixels"]

    def opened(folder, split, *, offsets=((1, 1),)):
        """Crops of 12 of 16 pixels."""
        whole = planet_benchmarks.opened("planet_pixels", folder, split)

        def read(id):
            name, _, place = id.partition("@")
            row, col = map(int, place.split(",")) if place else offsets[0]
            sample, cut = whole.read(name), (..., slice(row, row + 12), slice(col, col + 12))
            o = sample.batch.observations["sentinel2_l2a"]
            o = replace(o, pixels=o.pixels[cut], valid=o.valid[cut])
            batch = replace(sample.batch, observations={"sentinel2_l2a": o})
            seen.append(id)
            return replace(sample, id=id, batch=batch, target=sample.target[cut])

        ids = [f"{id}@{r},{c}" for id in whole.ids for r, c in offsets] if len(offsets) > 1 else whole.ids
        return replace(whole, card=replace(card, opener="planet_benchmarks:open_crops"), ids=ids, read=read)

    monkeypatch.setattr(planet_benchmarks, "open_crops", opened, raising=False)
    monkeypatch.setitem(DATASETS, "planet_pixels", replace(card, opener="planet_benchmarks:open_crops"))
    crops = ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2))
    row = published_tuning.AnySatTuning(metric="iou_but_last", last_class_counts=False, crops=crops, patch_m=40)
    monkeypatch.setitem(published_tuning.ANYSAT_TUNING, "planet_pixels", row)
    plan = plan_of(root, "planet_pixels", models=(anysat(),), protocols=("anysat_finetune",), epochs=1, limit=4)
    (found,) = evaluate(plan, root.parent / "crops", tuner=tune)
    assert found.error is None
    assert found.metric == "iou_but_last"
    assert found.chosen["class_weights"] == "last class 0"
    assert len([id for id in seen if "@" in id]) == 4 * 5
    assert np.isfinite(found.figures["auroc"].estimate)


def test_aerial_images_are_cut_anew_each_time_they_are_learned_from(tmp_path, monkeypatch):
    truth = miniatures.flair(tmp_path / "flair")
    kept, fit = [], protocol.fit

    def looked(examples, *given, **options):
        kept.append(examples)
        return fit(examples, *given, **options)

    monkeypatch.setattr(protocol, "fit", looked)
    sensors = tuple(SENSORS[name] for name in ("aerial-flair", "s2"))
    torch.manual_seed(0)
    model = AnySat(AnySatConfig(dim=32, depth=1, heads=2, sensors=sensors), name="any").eval().requires_grad_(False)
    plan = plan_of(None, models=(model,), protocols=("anysat_finetune",), epochs=1, limit=None)
    (row,) = evaluate(replace(plan, benchmarks=(("flair", tmp_path / "flair"),)), tmp_path / "out", tuner=tune)
    assert row.error is None
    (examples,) = kept
    image, label = (torch.from_numpy(truth["train"][key].astype("float32")) for key in ("image", "label"))
    label = torch.where(label > 13, 13, label) - 1
    corners = set()
    for seed in range(12):
        sample = examples.to_learn_from(0, torch.Generator().manual_seed(seed))
        seen = sample.batch.observations["aerial_flair"].pixels[0, 0]
        assert seen.shape == (5, 500, 500)
        near = [
            (r, c) for r in range(13) for c in range(13) if torch.equal(seen[0], image[0, r : r + 500, c : c + 500])
        ]
        ((r, c),) = near
        assert torch.equal(sample.target[0].float(), label[0, r : r + 500, c : c + 500])
        corners.add((r, c))
    assert len(corners) > 6
    assert examples.to_learn_from(0, torch.Generator()).batch.observations["sentinel2_l2a"].pixels.shape[-1] == 10
    assert examples[0].target.shape == (1, 500, 500)  # in the middle
