"""Examples out of arrays: what came in comes out, dealt as asked for, and teaches."""

import datetime as dt
from dataclasses import replace

import numpy as np
import pytest
import torch

from panterra.errors import InputError
from panterra.finetune.arrays import examples_from_arrays
from panterra.finetune.run import Settings, finetune
from panterra.finetune.step import Tuning
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig
from panterra.sample import to_days

N = 24
PARTS = ["train"] * 14 + ["val"] * 4 + ["test"] * 6


def drawn(*, dates=2, side=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(100, 5000, (N, dates, 12, side, side)).astype(np.float32)


def codes(n=N, classes=3):
    return np.arange(n) % classes


def test_what_came_in_comes_out():
    pixels, radar = drawn(), np.random.default_rng(1).normal(-12, 3, (N, 2, 8, 8))
    pixels[3, 1, :, 2, 5] = np.nan
    valid = np.ones((N, 2, 8, 8), bool)
    valid[4, 0] = False
    lonlat = np.stack([np.arange(N), np.zeros(N)], axis=1)
    found = examples_from_arrays(
        {"sentinel2_l2a": pixels, "sentinel1": radar},
        codes(),
        dates={
            "sentinel2_l2a": ["2023-05-01", dt.date(2023, 6, 1)],
            "sentinel1": [[to_days("2023-05-02") + i] for i in range(N)],
        },
        valid={"sentinel2_l2a": valid},
        lonlat=lonlat,
        class_names=("oats", "rye", "peas"),
        parts=PARTS,
    )
    assert (found.task.name, found.window_px, found.pixel_m, found.cells) == ("classification", 8, 10.0, 0)
    assert [(c.name, c.code) for c in found.classes] == [("oats", 1), ("rye", 2), ("peas", 3)]
    assert [len(found.of(part)) for part in ("train", "val", "test")] == [14, 4, 6]
    for i in (0, 3, 4):
        sample = found[i]
        assert sample.target.tolist() == [i % 3]
        assert sample.batch.lonlat.tolist() == [[i, 0]]
        optical, o = sample.batch.observations["sentinel2_l2a"], sample.batch.observations["sentinel1"]
        np.testing.assert_array_equal(optical.pixels[0].nan_to_num().numpy(), np.nan_to_num(pixels[i]))
        assert optical.dates.tolist() == [[to_days("2023-05-01"), to_days("2023-06-01")]]
        assert o.dates.tolist() == [[to_days("2023-05-02") + i]]
        assert o.pixels.shape == (1, 1, 2, 8, 8)
    assert not found[3].batch.observations["sentinel2_l2a"].valid[0, 1, 2, 5]
    assert not found[4].batch.observations["sentinel2_l2a"].valid[0, 0].any()


@pytest.mark.parametrize(
    ("targets", "task", "cells", "classes"),
    [
        (codes(), "classification", 0, 3),
        (np.linspace(0, 1, N), "scene_regression", 0, 0),
        ((np.arange(N)[:, None] % 3 == np.arange(3)).astype(int), "multilabel", 0, 3),
        (np.broadcast_to(codes()[:, None, None], (N, 4, 4)), "segmentation", 4, 3),
        (np.random.default_rng(0).normal(size=(N, 8, 8)), "regression", 8, 0),
    ],
)
def test_targets_tell_the_task_and_groups_stay_whole(targets, task, cells, classes):
    groups = np.arange(N) // 3
    found = examples_from_arrays({"sentinel2_l2a": drawn()}, targets, groups=groups, block_m=500)
    assert (found.task.name, found.cells, len(found.classes), found.block_m) == (task, cells, classes, 500)
    for group in range(8):
        assert len(set(found.parts[groups == group])) == 1
    assert set(found.parts) == {"train", "val", "test"}
    target = found[0].target
    assert target.dtype == (torch.int64 if found.task.answer == "classes" else torch.float32)
    assert target.shape == (1, *np.shape(targets)[1:])


def test_series_may_differ_in_length_and_other_data_are_another_run():
    pixels = [drawn(dates=t, seed=i)[0] for i, t in enumerate([1, 3] * (N // 2))]
    days = [["2023-05-01", "2023-06-01", "2023-07-01"][: len(p)] for p in pixels]
    options = {"parts": PARTS, "dates": {"sentinel2_l2a": days}}
    found = examples_from_arrays({"sentinel2_l2a": pixels}, codes(), **options)
    assert [found[i].batch.observations["sentinel2_l2a"].pixels.shape[1] for i in (0, 1)] == [1, 3]
    again = examples_from_arrays({"sentinel2_l2a": pixels}, codes(), **options)
    assert found.about == again.about
    pixels[5] = pixels[5] + 1
    other = examples_from_arrays({"sentinel2_l2a": pixels}, codes(), **options)
    assert found.about != other.about


def test_unlabelled_samples_do_not_stop_the_dealing():
    targets = codes()
    targets[:3] = -1
    found = examples_from_arrays({"sentinel2_l2a": drawn()}, targets, groups=np.arange(N) // 3)
    assert set(found.parts[:3]) == {"train"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": codes(20)}, "20 targets came with samples of sentinel2_l2a: 24"),
        ({"parts": None}, "say how samples are dealt"),
        ({"groups": np.arange(N)}, "say how samples are dealt"),
        ({"parts": ["train"] * N}, "no sample is in val and test"),
        ({"parts": ["learn"] * N}, r"24 parts came \(learn\)"),
        ({"parts": None, "groups": np.arange(5)}, "5 groups came for 24 samples"),
        ({"class_names": ("oats",)}, "1 class names came for 3 classes"),
        ({"task": "regression"}, "regression was asked for, but codes of shape"),
        ({"targets": codes() - 3}, "a class code is -3"),
        ({"targets": np.array(["oats"] * N)}, "wanted numbers"),
        ({"dates": {"sentinel2_l2a": ["2023-05-01"]}}, "2 images came with 1 dates"),
    ],
)
def test_what_does_not_fit_is_refused(changes, said):
    options = {"targets": codes(), "parts": PARTS} | changes
    targets = options.pop("targets")
    with pytest.raises(InputError, match=said):
        examples_from_arrays({"sentinel2_l2a": drawn()}, targets, **options)


def test_arrays_are_learned(tmp_path):
    torch.manual_seed(0)
    config = OlmoEarthConfig(dim=32, depth=2, heads=2, position="rope_3d_mixed", pixel_hidden=(8,), convolution=False)
    encoder = OlmoEarth(config, name="olmoearth-v1.2-nano").eval().requires_grad_(False)
    pixels, targets = drawn(dates=1), np.zeros((N, 8, 8), int)
    targets[:, :, 4:] = 1
    pixels[:, :, :, :, 4:] += 6000
    examples = examples_from_arrays({"sentinel2_l2a": pixels}, targets, parts=PARTS, name="halves", licence="CC0")
    tuning = Tuning(method="head", epochs=6, batch_size=4, lr=3e-2, loss="dice")
    result = finetune(examples, encoder, tmp_path / "model", Settings(patch_m=40, tuning=tuning))
    assert result.test.metrics["accuracy"].estimate > 0.9
    assert result.model.summary["tuning"]["loss"] == "dice"
    card = (tmp_path / "model" / "card.md").read_text()
    assert "halves" in card
    assert "CC0" in card
    scenes = examples_from_arrays({"sentinel2_l2a": pixels}, codes(classes=2), parts=PARTS)
    with pytest.raises(InputError, match="the Dice loss is of a class per cell, not of classification"):
        finetune(scenes, encoder, tmp_path / "scenes", Settings(patch_m=40, tuning=tuning))
    with pytest.raises(InputError, match="loss is 'hinge'"):
        replace(tuning, loss="hinge")
