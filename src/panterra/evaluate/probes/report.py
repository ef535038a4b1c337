"""How well a probe does on samples that it was not fitted on, in figures with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from panterra.evaluate import metrics
from panterra.evaluate.metrics import Interval
from panterra.evaluate.probes.probe import Kind, ProbeClass, Task
from panterra.plain import as_plain


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassReport:
    """How well one class is found; figures are NaN where undefined."""

    name: str
    support: int
    precision: Interval
    recall: Interval
    f1: Interval
    iou: Interval


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """What a probe scores on samples that it was not fitted on.

    Each sample is predicted by a probe fitted on the other folds, at the strength that did best on the other folds.
    Intervals come from resampling whole groups, or single samples when the split was random.
    """

    kind: Kind
    task: Task
    split: Literal["blocks", "random"]
    num_samples: int
    num_groups: int
    """Spatial blocks, or samples when the split was random."""
    block_m: float | None
    fold_sizes: tuple[int, ...]
    strengths: tuple[float, ...]
    """What was tried: weights of the L2 penalty, or numbers of neighbours."""
    losses: tuple[float, ...]
    """Mean out-of-fold loss at each strength: cross-entropy (logistic) or squared error, as classes weigh."""
    strength: float
    """What the final probe was fitted with, on all samples."""
    converged: bool
    """False where an optimisation stopped before its gradient vanished."""
    metrics: dict[str, Interval]
    classes: tuple[ClassReport, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Rows are the true classes, columns the predicted ones; empty for values."""
    resamples: int
    seed: int
    class_weights: tuple[float, ...] = ()
    """How much a sample of each class counted in the final fit; empty where all count alike."""
    predictions: np.ndarray = field(repr=False)
    """Out-of-fold prediction of each sample: a class code or a value."""
    folds: np.ndarray = field(repr=False)
    """The fold in which each sample was tested."""

    def as_dict(self) -> dict[str, Any]:
        """Give everything but the arrays per sample as plain JSON; undefined figures are None."""
        told = {name: value for name, value in asdict(self).items() if name not in ("predictions", "folds")}
        return {name: as_plain(value) for name, value in told.items()}


def figures_of(
    task: Task,
    label: np.ndarray,
    answers: np.ndarray,
    predicted: np.ndarray,
    classes: Sequence[ProbeClass],
    units: np.ndarray | None,
    resamples: int,
    seed: int,
) -> tuple[dict[str, Interval], tuple[ClassReport, ...], tuple[tuple[int, ...], ...]]:
    """Score out-of-fold predictions, with intervals over whole units (or single samples where there are none)."""
    if task == "values":
        rows = np.arange(len(label)) if units is None else units
        sums = metrics.moments(answers[:, 0], predicted, groups=rows)
        drawn = metrics.resample(sums, n=resamples, seed=seed)
        by_value = {"r2": metrics.r2, "rmse": metrics.rmse, "mae": metrics.mae}
        return {name: Interval.of(f(sums.sum(0)), f(drawn)) for name, f in by_value.items()}, (), ()
    conf = metrics.confusion(label, predicted, len(classes))
    if units is None:
        drawn = metrics.resample_samples(conf, n=resamples, seed=seed)
    else:
        blocks = metrics.confusion(label, predicted, len(classes), groups=units)
        drawn = metrics.resample(blocks, n=resamples, seed=seed)
    by_class = {
        "accuracy": metrics.accuracy,
        "macro_accuracy": metrics.macro_accuracy,
        "macro_f1": metrics.macro_f1,
        "mean_iou": metrics.mean_iou,
    }
    figures = {name: Interval.of(f(conf), f(drawn)) for name, f in by_class.items()}
    one, many = metrics.per_class(conf), metrics.per_class(drawn)
    table = tuple(
        ClassReport(
            name=c.name,
            support=int(one["support"][k]),
            **{f: Interval.of(one[f][k], many[f][:, k]) for f in ("precision", "recall", "f1", "iou")},
        )
        for k, c in enumerate(classes)
    )
    return figures, table, tuple(tuple(row) for row in conf.tolist())
