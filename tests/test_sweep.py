"""Probes trained together are those that torch's modules, autograd and AdamW give one after another."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from panterra.errors import InputError
from panterra.evaluate import metrics, sweep
from panterra.evaluate.readout import Readout
from panterra.evaluate.sweep import Linear, Recipe, answers, rates_at, train_together

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from probe_sweep import alone, made

RATES = (1e-3, 1e-2, 1e-1)
RECIPE = Recipe(rates=RATES, epochs=4, batch=8, check_every=2)
# task, classes, cells along a side, label pixels along a side of a cell, metric, what stands before
CASES = [
    ("classification", 5, 1, 1, "accuracy", "batch"),
    ("classification", 5, 1, 1, "macro_f1", "layer"),
    ("classification", 2, 1, 1, "accuracy", "batch"),
    ("multilabel", 4, 1, 1, "macro_f1", "batch"),
    ("segmentation", 3, 4, 2, "mean_iou", "none"),
    ("segmentation", 2, 4, 2, "mean_iou", "none"),
    ("segmentation", 3, 4, 2, "mean_iou", "layer"),
    ("regression", 1, 4, 1, "rmse", "none"),
]


def tables(task, classes, grid, side, samples=45):
    made_ = [made(task, n, grid, side, 12, classes, "cpu", seed) for seed, n in enumerate((samples, 30))]
    return [double(t) for t in made_]


def double(table):
    return as_type(table, torch.float64)


def as_type(table, dtype):
    return replace(table, x=table.x.to(dtype), y=table.y.to(dtype) if table.y.is_floating_point() else table.y)


def unlabelled(table):
    """Take some labels away, and the data of one cell."""
    empty = torch.nan if table.y.is_floating_point() else -1
    y, x = table.y.clone(), table.x.clone()
    y[1, :3] = empty
    x[2, 1, 2] = torch.nan
    return replace(table, x=x, y=y)


@pytest.mark.parametrize(("task", "classes", "grid", "side", "metric", "first"), CASES)
def test_members_end_where_they_end_alone(task, classes, grid, side, metric, first):
    train, val = tables(task, classes, grid, side)
    if grid > 1:
        train = unlabelled(train)
    readout = Readout(task=task, classes=classes, side=side, centre=10.0 if task == "regression" else 0.0)
    net = Linear.of(train, readout.outputs, first)
    together = train_together(train, val, net, readout, metric, RECIPE)
    assert [m.rate for m in together] == list(RATES)
    for member in together:
        single = alone(member.rate, train, val, Linear.of(train, readout.outputs, first), readout, metric, RECIPE)
        torch.testing.assert_close(member.theta, single.theta, rtol=1e-7, atol=1e-9)
        assert (member.epoch, member.score) == (single.epoch, pytest.approx(single.score, rel=1e-9))


@pytest.mark.parametrize(("task", "classes", "grid", "side", "metric", "first"), CASES)
def test_single_precision_is_enough(task, classes, grid, side, metric, first):
    train, val = tables(task, classes, grid, side)
    readout = Readout(task=task, classes=classes, side=side, centre=10.0 if task == "regression" else 0.0)
    recipe = replace(RECIPE, epochs=2, rates=(1e-3, 1e-2))
    found = []
    for dtype in (torch.float32, torch.float64):
        learned, kept = as_type(train, dtype), as_type(val, dtype)
        net = Linear.of(learned, readout.outputs, first)
        found.append(train_together(learned, kept, net, readout, metric, recipe))
    for single, exact in zip(*found, strict=True):
        torch.testing.assert_close(single.theta.double(), exact.theta, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [8, 13, 5])
@pytest.mark.parametrize("classes", [2, 3])
def test_labels_of_other_sizes_are_met_by_resizing_as_torch_does(size, classes):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(3, classes * 4, 2 * 4 * 4, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randint(-1, classes, (2, size, size), generator=generator)
    readout = Readout(task="segmentation", classes=classes, side=2)
    found = readout.residual(raw.detach(), readout.aim(y, (2, 4, 4), readout.share(y).to(raw.dtype)))
    codes, sums = readout.answer(raw.detach(), y, (2, 4, 4)), readout.sums(raw.detach(), y, (2, 4, 4))
    totals = readout.totals(raw.detach(), y, (2, 4, 4))
    for m in range(3):
        image = rearrange(raw[m], "(k i j) (b h w) -> b k (h i) (w j)", i=2, j=2, h=4, w=4)
        image = F.interpolate(image, size=(size, size), mode="bilinear", align_corners=True)
        (wanted,) = torch.autograd.grad(F.cross_entropy(image, y, ignore_index=-1), raw)
        torch.testing.assert_close(found[m], wanted[m], rtol=1e-6, atol=1e-9)
        assert torch.equal(codes[m].long(), image.argmax(1))
        conf = metrics.confusion(y.numpy(), image.argmax(1).numpy(), classes)
        assert (totals[m] == conf).all()
        assert (sums[m].sum(0) == conf).all()


def test_a_positive_quantity_is_learned_through_softplus():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(1, 1, 6, generator=generator, requires_grad=True)
    y = torch.rand(6, 1, 1, generator=generator) * 5
    (wanted,) = torch.autograd.grad(F.mse_loss(F.softplus(raw)[0, 0], y[:, 0, 0]), raw)
    readout = Readout(task="regression", classes=1, softplus=True)
    torch.testing.assert_close(
        readout.residual(raw.detach(), readout.aim(y, (6, 1, 1), readout.share(y).to(raw.dtype))), wanted
    )
    assert (readout.answer(raw.detach(), y, (6, 1, 1)) > 0).all()


def test_rates_follow_the_published_curves():
    base = torch.tensor([[0.1], [0.001]])
    recipe = Recipe(epochs=50)
    at = {e: rates_at(e, base, recipe)[:, 0].tolist() for e in (0, 2.5, 5, 27.5, 50)}
    assert at[0] == [0, 0]
    assert at[2.5] == pytest.approx([0.05, 0.0005])
    assert at[5] == pytest.approx([0.1, 0.001])
    assert at[27.5] == pytest.approx([(0.1 + 1e-5) / 2, (0.001 + 1e-5) / 2])
    assert at[50] == pytest.approx([1e-5, 1e-5])
    by_epoch = replace(recipe, schedule="epoch_cosine", epochs=200)
    curve = [rates_at(e + 0.5, base, by_epoch)[0].item() / 0.1 for e in range(200)]
    assert curve[:21:10] == pytest.approx([0, 10 / 19, 1])
    assert curve[110] == pytest.approx(0.5)
    assert curve[199] < 1e-3


def test_members_fall_on_a_plateau_as_torch_has_it(monkeypatch):
    """Each member by its own validation losses, which are given here; what learns takes the rates down."""
    losses = np.random.default_rng(0).uniform(0.9, 1.1, (60, 3)).round(2)
    seen, looks = [], iter(torch.from_numpy(losses))
    monkeypatch.setattr(sweep, "judge", lambda theta, *_, **__: ([0.0] * len(theta), next(looks)))
    monkeypatch.setattr(sweep.Adam, "step", lambda _, __, rates: seen.append(rates))
    train, val = tables("classification", 4, 1, 1, samples=8)
    recipe = Recipe(rates=RATES, epochs=60, batch=8, check_every=1, forget=False, schedule="plateau")
    train_together(
        train, val, Linear.of(train, 4, "layer"), Readout(task="classification", classes=4), "accuracy", recipe
    )
    assert len(seen) == 60
    for m, rate in enumerate(RATES):
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, "min", factor=0.1, patience=10, eps=0)
        for rates, loss in zip(seen, losses[:, m], strict=True):
            assert rates[m] == pytest.approx(optimiser.param_groups[0]["lr"])
            optimiser.step()
            scheduler.step(loss)


def test_a_member_that_waits_too_long_stops_alone():
    train, val = tables("classification", 4, 1, 1)
    readout = Readout(task="classification", classes=4)
    recipe = Recipe(rates=(0.0, 1e-2), epochs=12, batch=8, check_every=1, patience=3, forget=False, schedule="plateau")
    still, moving = train_together(train, val, Linear.of(train, 4, "layer"), readout, "accuracy", recipe)
    assert still.epoch == 1
    assert moving.score > still.score


def missing(*_):
    raise AttributeError("module 'torch' has no attribute '_fused_adamw_'")


@pytest.mark.parametrize("other", [missing, lambda *_: None])
def test_without_the_private_function_the_public_optimiser_steps(monkeypatch, other):
    """Another torch may lack it, or have another one under its name."""
    train, val = tables("multilabel", 4, 1, 1)
    readout, net = Readout(task="multilabel", classes=4), Linear.of(train, 4, "layer")
    wanted = train_together(train, val, net, readout, "macro_f1", RECIPE)
    sweep._has_fused_adamw.cache_clear()
    monkeypatch.setattr(sweep, "_fused_adamw", other)
    try:
        found = train_together(train, val, net, readout, "macro_f1", RECIPE)
        assert not sweep._has_fused_adamw()
    finally:
        sweep._has_fused_adamw.cache_clear()
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.theta, two.theta)


def test_the_best_member_predicts():
    train, val = tables("multilabel", 4, 1, 1, samples=200)
    readout = Readout(task="multilabel", classes=4)
    recipe = Recipe(rates=RATES, epochs=10, batch=16)
    members = train_together(train, val, Linear.of(train, 4, "batch"), readout, "macro_f1", recipe)
    best = max(members, key=lambda m: m.score)
    figures = answers(best, val, readout).figures(resamples=50)
    assert figures["macro_f1"].estimate == pytest.approx(best.score)
    assert figures["average_precision"].low < figures["average_precision"].estimate <= 1


def test_there_must_be_something_to_learn_from():
    train, val = tables("classification", 4, 1, 1)
    with pytest.raises(InputError, match="0 samples to learn from and 30"):
        train_together(
            train.take(np.array([], int)),
            val,
            Linear.of(train, 4, "none"),
            Readout(task="classification", classes=4),
            "accuracy",
            RECIPE,
        )
