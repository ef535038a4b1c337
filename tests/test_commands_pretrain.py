import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from panterra.commands.pretrain import (
    configured,
    dry_run,
    export_checkpoint,
    list_recipes,
    run_pretrain,
    show_plan,
    show_recipes,
)
from panterra.data.olmoearth_h5 import Sample, write_corpus
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.weights import load_model
from panterra.recipes import ABLATED, RECIPES
from panterra.sample import Batch, Observation
from panterra.train.loop import Options

SMALL = (
    "encoder.dim=32",
    "encoder.depth=1",
    "encoder.heads=2",
    "predictor_depth=1",
    "encoder.modalities=sentinel2_l2a,sentinel1,worldcover",
    "patch_px=2,4",
    "side_patches=1,2",
    "batch=4",
    "micro_batch=2",
    "steps=3",
    "warmup_steps=1",
)
OPTIONS = Options(workers=0, device="cpu", logs=("jsonl",), log_every=1, country="FRA")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    def sample(seed):
        rng = np.random.Generator(np.random.PCG64(seed))
        shapes = {"sentinel2_l2a": 12, "sentinel1": 12, "worldcover": 1}
        pixels = {
            m: rng.normal(1000, 500, (16, 16, dates, len(MODALITIES[m].bands))).astype(np.float32)
            for m, dates in shapes.items()
        }
        stamps = np.stack([np.full(12, 15), np.arange(12), np.full(12, 2021)], axis=1)
        return Sample(latlon=(seed, seed), timestamps=stamps, pixels=pixels)

    roots = [tmp_path_factory.mktemp("corpus") for _ in range(2)]
    for i, root in enumerate(roots):
        write_corpus(root, (sample(10 * i + j) for j in range(6)), compression=None)
    return roots


def settings(*changes, name="olmoearth-v1.2-nano"):
    return configured(name, [*SMALL, *changes], precision="float32")


def test_a_run_over_two_corpora_ends_in_a_model_that_loads(corpora, tmp_path):
    run = settings("held_out=2", "licence=CC-BY-4.0")
    first = run_pretrain(run, corpora, tmp_path / "run", options=replace(OPTIONS, steps_this_time=1))
    assert (first.step, first.finished, first.model) == (1, False, None)
    result = run_pretrain(run, corpora, tmp_path / "run", check_every=2, options=OPTIONS)
    assert result.finished
    model = load_model(result.model)
    assert model.modalities == ("sentinel2_l2a", "sentinel1")
    assert model.licence == "CC-BY-4.0"
    pixels = torch.rand(1, 2, 12, 8, 8) * 3000
    seen = Observation(
        pixels=pixels, dates=torch.tensor([[18000, 18100]]), valid=torch.ones(1, 2, 8, 8, dtype=torch.bool)
    )
    assert model.encode(Batch(observations={"sentinel2_l2a": seen}), patch_m=20).patches.shape == (1, 4, 4, 32)
    card = (result.model / "README.md").read_text()
    assert "3 steps, 12 samples" in card
    assert "kg CO2e" in card
    assert "| worldcover | 100.0% | predicted |" in card
    held = json.loads(card.split("```json\n")[1].split("```")[0])
    assert held["steps"] == 3
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"watched/loss", "collapse/summary_effective_rank", "collapse/similarity"} <= log[-1].keys()


def test_a_checkpoint_becomes_a_model(corpora, tmp_path):
    kept = replace(OPTIONS, keep_every=2)
    result = run_pretrain(settings(), corpora, tmp_path / "run", check_every=0, options=kept)
    last, second = (
        load_model(export_checkpoint(settings(), corpora, tmp_path / "run", tmp_path / f"at_{step}", step=step))
        for step in (None, 2)
    )
    final = load_model(result.model)
    assert torch.equal(last.norm.weight, final.norm.weight)
    assert not torch.equal(second.norm.weight, final.norm.weight)


def test_a_run_goes_on_with_its_own_settings_alone(corpora, tmp_path):
    stopped = replace(OPTIONS, steps_this_time=1)
    run_pretrain(settings(), corpora, tmp_path, check_every=0, options=stopped)
    with pytest.raises(InputError, match=r"lr was 0\.0002 and is 0\.1"):
        run_pretrain(settings("lr=0.1"), corpora, tmp_path, check_every=0, options=stopped)
    with pytest.raises(InputError, match="other settings"):
        run_pretrain(settings(), corpora[::-1], tmp_path, check_every=0, options=stopped)


def test_no_corpus_is_one_line(tmp_path):
    with pytest.raises(InputError, match="--data"):
        run_pretrain(settings(), [], tmp_path, options=OPTIONS)


def test_a_dry_run_counts_the_whole_run(corpora, capsys):
    plan = dry_run(settings("steps=null", "epochs=2"), corpora, ranks=2, tflops=0.5, watts=100, country="FRA")
    found = json.loads(json.dumps(plan.as_dict()))
    assert found["corpus"]["samples"] == 12
    assert found["corpus"]["coverage"] == {"sentinel2_l2a": 1.0, "sentinel1": 1.0, "worldcover": 1.0}
    assert (found["steps"], found["steps_per_epoch"], found["micro_batches_per_rank"]) == (6, 3, 1)
    assert found["seconds_per_step"] == pytest.approx(found["flops_per_step"] / 2 / 0.5e12)
    assert found["kwh"] == pytest.approx(6 * found["seconds_per_step"] / 3600 * 2 * 0.1)
    assert found["co2e_kg"] == pytest.approx(found["kwh"] * 0.056)
    # One patch or four, of twelve dates and two sensors, and the map's.
    assert found["tokens_per_sample"]["tokens"] == pytest.approx((25 + 100) / 2)
    show_plan(plan)
    out = capsys.readouterr().out
    for part in ("2 x 2", "Tokens a step: 250", "optimiser", "0.5 TFLOP/s (given)", "100 W a rank", "kg CO2e"):
        assert part in out


def test_a_dry_run_without_a_corpus_is_over_the_published_one(capsys):
    plan = dry_run(configured("olmoearth-v1.2-nano", ["side_patches=2"]), [], tflops=1)
    assert plan.steps == 667_200
    show_plan(plan)
    out = capsys.readouterr().out
    assert "1,138,828 samples" in out
    assert "--watts" in out


def test_a_dry_run_measures_this_machine(corpora, capsys):
    plan = dry_run(settings(), corpora, device="cpu")
    assert plan.rate.flops > 0
    assert plan.power.watts > 0
    show_plan(plan)
    assert "measured on this machine's cpu" in capsys.readouterr().out


def test_the_list_names_every_run_and_every_ablation(capsys):
    listed = list_recipes()
    assert [run["name"] for run in listed["runs"]] == [
        name for name in RECIPES if name not in ABLATED and name.startswith("olmoearth-")
    ]
    found = {f"-{row['name']}": row for row in listed["ablations"]}
    assert all(any(name.endswith(ending) for ending in found) for name in ABLATED)
    assert found["-no-contrast"]["about"].startswith("Without the contrast")
    assert found["-v1-masking"]["releases"] == ["v1.1", "v1.2"]
    assert json.loads(json.dumps(listed))["runs"][0]["recipe"]["lr"] == 1e-3
    show_recipes(listed)
    out = capsys.readouterr().out
    assert "olmoearth-v1.2-large " in out
    assert "\nno-pixel-layer " in out
