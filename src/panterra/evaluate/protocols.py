"""How frozen features are judged: the evaluation protocols of OlmoEarth and of AnySat."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from panterra.errors import InputError
from panterra.evaluate.attention_probe import Attention
from panterra.evaluate.benchmark import Role
from panterra.evaluate.cache import View
from panterra.evaluate.class_weights import ClassWeights, balanced_weights, count_classes
from panterra.evaluate.dice import rarity
from panterra.evaluate.metrics import Interval
from panterra.evaluate.probes import NEIGHBOURS, knn_scores
from panterra.evaluate.published import ANYSAT, OLMOEARTH, OlmoEarthTask
from panterra.evaluate.readout import Readout
from panterra.evaluate.scoring import FIGURES, Answers, Task, better, sums_of
from panterra.evaluate.sweep import (
    ALONE_EVERY,
    Linear,
    Member,
    Net,
    Recipe,
    Standardise,
    Table,
    answers,
    train_together,
)

FrozenProtocol = Literal["knn", "linear", "interpolate", "attention", "anysat"]
TunedProtocol = Literal["finetune", "anysat_finetune", "anysat_plus", "anysat_scratch"]
"""Those that train encoders; they are carried out by what `suite.evaluate` is handed (`evaluate.tuning`)."""
Protocol = FrozenProtocol | TunedProtocol
FROZEN: tuple[FrozenProtocol, ...] = ("knn", "linear", "interpolate", "attention", "anysat")
TUNED: tuple[TunedProtocol, ...] = ("finetune", "anysat_finetune", "anysat_plus", "anysat_scratch")
PROTOCOLS: tuple[Protocol, ...] = (*FROZEN, *TUNED)
Loss = Literal["cross_entropy", "dice"]
"""Of pixels' classes; dice: both the Dice loss and the cross-entropy."""
_SIMILARITIES = 2**25
_ROWS = 1024
_WIDE = (torch.float32, torch.float64)
_DO: Mapping[Role, str] = {"train": "learn from", "val": "validate with", "test": "test on"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One model on one benchmark: the features that a protocol may choose among, each with all splits."""

    benchmark: str
    task: Task
    classes: int
    tables: Callable[[View], Mapping[Role, Table]]
    recipe: Recipe
    batch: int | None = None
    """Samples per step of a probe, instead of the published number."""
    epochs: int | None = None
    """Instead of the published number."""
    published_rate: bool = False
    """Whether a probe has the one rate of the published table, where that has the data set."""
    class_weights: ClassWeights = "none"
    """Of probes that are trained on classes."""
    loss: Loss | None = None
    """Of probes that are trained on pixels' classes; None: that of OlmoEarth's published table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a protocol found."""

    metric: str
    """What the benchmark is judged by."""
    figures: Mapping[str, Interval]
    view: View
    chosen: Mapping[str, Any] = field(default_factory=dict)


def run(protocol: FrozenProtocol, trial: Trial, views: tuple[View, ...]) -> Outcome:
    """Carry a protocol out; where several views are given the one that validates best is tested.

    Features of half precision are taken as float32. Raises InputError where no sample of a split that is needed has a
    label, or one has a class that there is not.
    """
    needed: tuple[Role, ...] = ("train", "test") if protocol == "knn" and len(views) == 1 else ("train", "val", "test")

    def tables(view: View) -> Mapping[Role, Table]:
        given = trial.tables(view)
        for role in needed:
            y = given[role].y
            if not bool((y.isfinite() if y.is_floating_point() else y >= 0).any()):
                raise InputError(f"no sample to {_DO[role]} has a label; check the labels")
            if not y.is_floating_point() and int(y.max()) >= trial.classes:
                raise InputError(
                    f"a sample to {_DO[role]} has class {int(y.max())}, but there are classes 0 to {trial.classes - 1} "
                    "only; recode the labels, negative where there is none"
                )
        return {role: t if t.x.dtype in _WIDE else replace(t, x=t.x.float()) for role, t in given.items()}

    return _RUNS[protocol](replace(trial, tables=tables), views)


def allowed(protocol: Protocol, task: Task) -> bool:
    """Say whether a protocol is defined for a task: neighbours are for whole samples' classes.

    A linear probe of values per pixel interpolates already.
    """
    if protocol == "interpolate":
        return task == "segmentation"
    return protocol != "knn" or task in ("classification", "multilabel")


def _knn(trial: Trial, views: tuple[View, ...]) -> Outcome:
    """Let the 20 nearest samples by cosine vote, weighted by exp(cosine / 0.07) (OlmoEarth); nothing is trained."""
    metric = metric_of(trial.benchmark, trial.task)
    found = {}
    for view in views:
        tables = trial.tables(view)
        train = _with_data(tables["train"], every_label=True)
        found[view] = train, tables
    scores = {}
    if len(views) > 1:
        for view, (train, tables) in found.items():
            told = _vote(train, tables["val"], trial)
            scores[view] = better(metric, told.figures(resamples=1)[metric].estimate)
    best = max(scores, key=lambda v: scores[v]) if scores else views[0]
    train, tables = found[best]
    chosen = {"neighbours": min(NEIGHBOURS, len(train))}
    return Outcome(metric=metric, figures=_vote(train, tables["test"], trial).figures(), view=best, chosen=chosen)


def _vote(train: Table, table: Table, trial: Trial) -> Answers:
    multilabel = trial.task == "multilabel"
    truth = table.y if multilabel else table.y.long()
    answers = train.y if multilabel else torch.nn.functional.one_hot(train.y.long(), trial.classes)
    examples, queries = train.x, table.x.nan_to_num()
    parts = [
        knn_scores(examples, answers.to(examples.dtype), part, neighbours=min(NEIGHBOURS, len(train)))
        for part in queries.split(max(1, min(2000, _SIMILARITIES // len(train))))
    ]
    shares = torch.cat(parts).cpu().numpy()
    if multilabel:
        there, known = truth.cpu().numpy() > 0.5, truth.isfinite().all(1).cpu().numpy()
        sums = sums_of("multilabel", shares > 0.5, truth.cpu().numpy(), classes=trial.classes)
        return Answers(task="multilabel", sums=sums, scores=shares[known], truth=there[known])
    sums = sums_of(trial.task, shares.argmax(1), truth.cpu().numpy(), classes=trial.classes)
    labelled = (truth >= 0).cpu().numpy()
    there = torch.nn.functional.one_hot(truth.clamp(min=0), trial.classes).cpu().numpy() > 0
    return Answers(task=trial.task, sums=sums.sum(0, keepdims=True), scores=shares[labelled], truth=there[labelled])


def _linear(trial: Trial, views: tuple[View, ...]) -> Outcome:
    """Sweep a linear map's learning rates (OlmoEarth): behind a BatchNorm for whole samples, patch to pixels else."""
    return _sweep(trial, views, lambda table, width: Linear.of(table, width, _first(table)))


def _interpolate(trial: Trial, views: tuple[View, ...]) -> Outcome:
    """Sweep a linear map of patches brought to the labels' grid by bilinear interpolation (OlmoEarth).

    Interpolation and a linear map may change places, so that it is the outputs that are interpolated.
    """
    net = lambda table, width: Linear.of(table, width, "none")  # noqa: E731
    return _sweep(trial, views, net, interpolated=True)


def _attention(trial: Trial, views: tuple[View, ...]) -> Outcome:
    """Sweep the learning rates of attention pooling with a linear map behind it (OlmoEarth)."""
    return _sweep(trial, views, lambda table, width: Attention(dim=table.x.shape[-1], width=width))


def _sweep(
    trial: Trial, views: tuple[View, ...], net: Callable[[Table, int], Net], *, interpolated: bool = False
) -> Outcome:
    row = OLMOEARTH.get(trial.benchmark, OlmoEarthTask())
    recipe = replace(trial.recipe, batch=trial.batch or row.batch, epochs=trial.epochs or trial.recipe.epochs)
    if trial.published_rate and row.rate is not None:
        recipe = replace(recipe, rates=(row.rate,), check_every=ALONE_EVERY)
    trial = replace(trial, loss=trial.loss or row.loss)
    return _best(trial, views, net, metric_of(trial.benchmark, trial.task), recipe, interpolated=interpolated)


def metric_of(benchmark: str, task: Task) -> str:
    """Name the figure that OlmoEarth judges a benchmark by, or else the first of its task."""
    row = OLMOEARTH.get(benchmark)
    return row.metric if row is not None and row.metric is not None else next(iter(FIGURES[task]))


def told_by_sums(metric: str, task: Task) -> str:
    """Name the figure by which models are judged while they are trained: average precision cannot be told then."""
    return metric if metric in FIGURES[task] else next(iter(FIGURES[task]))


def _anysat(trial: Trial, views: tuple[View, ...]) -> Outcome:
    """Train LayerNorm and a linear map on the tile's vector, or on each patch's and sub-patch's (AnySat).

    Data sets of the published table have its learning rate, schedule and batch; others sweep the rates on a plateau.
    """
    row = ANYSAT.get(trial.benchmark)
    metric = row.metric if row else metric_of(trial.benchmark, trial.task)
    recipe = replace(
        trial.recipe,
        rates=(row.rate,) if row else trial.recipe.rates,
        epochs=trial.epochs or ANYSAT_EPOCHS,
        batch=trial.batch or (row.batch if row else trial.recipe.batch),
        schedule=row.schedule if row else "plateau",
        weight_decay=0.0,
        check_every=1,
        forget=False,
        patience=10,
        least_epochs=50,
        drop_last=True,
    )
    trial, softplus = replace(trial, loss="cross_entropy"), trial.task == "regression"
    return _best(trial, views, lambda table, width: Linear.of(table, width, "layer"), metric, recipe, softplus=softplus)


ANYSAT_EPOCHS = 200

_RUNS: Mapping[FrozenProtocol, Callable[[Trial, tuple[View, ...]], Outcome]] = {
    "knn": _knn,
    "linear": _linear,
    "interpolate": _interpolate,
    "attention": _attention,
    "anysat": _anysat,
}


def _best(
    trial: Trial,
    views: tuple[View, ...],
    net: Callable[[Table, int], Net],
    metric: str,
    recipe: Recipe,
    *,
    softplus: bool = False,
    interpolated: bool = False,
) -> Outcome:
    """Train every view's members, and test the one that validates best of all."""
    judged_by = told_by_sums(metric, trial.task)
    best: tuple[Member, View, Readout] | None = None
    for view in views:
        tables = trial.tables(view)
        train = tables["train"] if tables["train"].y.ndim == 3 else _with_data(tables["train"])
        readout = _readout(trial, train, softplus=softplus, interpolated=interpolated)
        members = train_together(train, tables["val"], net(train, readout.outputs), readout, judged_by, recipe)
        top = max(members, key=lambda m: m.score)
        if best is None or top.score > best[0].score:
            best = top, view, readout
    assert best is not None
    member, view, readout = best
    told = answers(member, trial.tables(view)["test"].checked(), readout)
    weights = "none" if readout.class_weights is None else trial.class_weights
    chosen: dict[str, Any] = {
        "rate": member.rate,
        "epoch": member.epoch,
        "batch": recipe.batch,
        "class_weights": weights,
    }
    if trial.task == "segmentation":
        chosen["loss"] = trial.loss
    return Outcome(metric=metric, figures=told.figures(), view=view, chosen=chosen)


def _readout(trial: Trial, train: Table, *, softplus: bool, interpolated: bool) -> Readout:
    """Find how many label pixels a cell has; values are learned in standard deviations from their mean."""
    if trial.task != "regression":
        side, counts = 1, count_classes(train.y, trial.classes)
        if train.y.ndim == 3 and not interpolated:
            (rows, cols), (height, width) = train.grid, train.y.shape[1:]
            side = max(1, int(math.sqrt(height * width / (rows * cols))))
        weights = None
        if trial.class_weights == "balanced":
            weights = balanced_weights(counts, samples=len(train) if trial.task == "multilabel" else None)
        dice = rarity(counts) if trial.task == "segmentation" and trial.loss == "dice" else None
        return Readout(
            task=trial.task,
            classes=trial.classes,
            side=side,
            class_weights=None if weights is None else weights.to(train.y.device),
            dice=None if dice is None else dice.to(train.y.device),
        )
    known = train.y[train.y.isfinite()]
    if softplus:
        return Readout(task="regression", classes=1, softplus=True)
    spread = float(known.double().std(correction=0)) or 1.0
    return Readout(task="regression", classes=1, centre=float(known.double().mean()), spread=spread)


def _first(table: Table) -> Standardise:
    return "none" if table.y.ndim == 3 else "batch"


def _with_data(table: Table, *, every_label: bool = False) -> Table:
    """Leave out samples without data or label; with `every_label` also those of which some label is not known."""
    every = table.x.ndim > 2
    parts = (part.flatten(1).isnan() for part in table.x.split(_ROWS))
    lost = torch.cat([part.all(1) if every else part.any(1) for part in parts])
    if table.y.ndim == 1:
        lost = lost | (table.y.isnan() if table.y.is_floating_point() else table.y < 0)
    elif table.y.ndim == 2:
        lost = lost | (table.y.isnan().any(1) if every_label else table.y.isnan().all(1))
    if bool(lost.all()):
        raise InputError(f"none of {len(table)} samples to learn from has both data and a label; check both")
    return table.take(np.flatnonzero(~lost.cpu().numpy())) if bool(lost.any()) else table


def fraction_of(y: Tensor, fraction: float, seed: int) -> Int[np.ndarray, " k"]:
    """Draw a share of the samples, stratified by class, and one of each class at least.

    Samples with several classes count as the rarest that they hold; with values, as their fifth of all. Smaller
    fractions of a seed are parts of larger ones.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"a fraction is {fraction:g}; wanted more than 0, at most 1")
    strata = _strata(y)
    order = np.random.default_rng(seed).permutation(len(strata))
    kept = []
    for stratum in np.unique(strata):
        members = order[strata[order] == stratum]
        kept.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(kept))


def _strata(y: Tensor) -> Int[np.ndarray, " n"]:
    if y.ndim == 1 and not y.is_floating_point():
        return y.cpu().numpy().astype(np.int64)
    if y.ndim == 2:
        return _rarest((y > 0.5).cpu().numpy())
    if not y.is_floating_point():
        classes = int(y.max()) + 1
        held = np.zeros((len(y), max(classes, 1)), bool)
        for n, labels in enumerate(y):
            present = labels[labels >= 0].unique().long()
            held[n, present.cpu().numpy()] = True
        return _rarest(held)
    means = y.reshape(len(y), -1).double().nanmean(1).nan_to_num().cpu().numpy()
    fifth: np.ndarray = np.searchsorted(np.quantile(means, [0.2, 0.4, 0.6, 0.8]), means)
    return fifth


def _rarest(held: np.ndarray) -> Int[np.ndarray, " n"]:
    """Name the rarest class of each sample; the number of classes where it has none."""
    count = np.where(held, held.sum(0), len(held) + 1)
    rarest: np.ndarray = np.where(held.any(1), count.argmin(1), held.shape[1])
    return rarest


def standardised(tables: Mapping[Role, Table]) -> dict[Role, Table]:
    """Bring features that no encoder made to mean 0 and deviation 1 over the training samples, missing ones to 0."""
    train = tables["train"].x
    flat = train.reshape(-1, train.shape[-1]).double()
    known = flat.isfinite()
    count = known.sum(0).clamp(min=1)
    mean = flat.nan_to_num().sum(0) / count
    std = (((flat - mean).nan_to_num() ** 2).sum(0) / count).sqrt()
    std = torch.where(std > 1e-10 * mean.abs(), std, 1.0)

    def scaled(x: Float[Tensor, "n *grid d"]) -> Float[Tensor, "n *grid d"]:
        empty = x.isnan().all(-1, keepdim=True)
        return ((x.double() - mean) / std).nan_to_num().float().masked_fill(empty, torch.nan)

    return {role: replace(table, x=scaled(table.x)) for role, table in tables.items()}
