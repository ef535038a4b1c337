"""How well a fine-tuned model does on a part of its examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from panterra.evaluate import metrics
from panterra.evaluate.metrics import Interval
from panterra.finetune import precision
from panterra.finetune.examples import Examples, Part
from panterra.finetune.model import FineTuned
from panterra.finetune.tasks import LossOptions, Task
from panterra.sample import collate


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a part of the examples gives: the mean loss, and sums per sample."""

    loss: float
    tallies: np.ndarray
    """As the task's tally makes them, [n, ...]."""
    blocks: np.ndarray
    """Of each sample, [n]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport:
    """Figures of one part, with 95 % intervals over resampled blocks."""

    num_samples: int
    num_blocks: int
    num_targets: int
    """Labelled cells, samples or objects."""
    metrics: dict[str, Interval]
    classes: dict[str, dict[str, float]]
    """Support, precision, recall, f1 and iou of each class by name; NaN where undefined. Of boxes those that are like
    an object by half count as found, and iou is their mean."""
    intervals: dict[str, dict[str, Interval]] = field(default_factory=dict)
    """Of each class by name: f1 and iou."""
    threshold: float | None = None
    """Of boxes: the score from which they count."""
    confusion: tuple[tuple[int, ...], ...] = ()
    """Rows are the true classes, columns the predicted ones; empty unless each target has one class."""

    def as_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)


def score(
    model: FineTuned,
    examples: Examples,
    part: Part,
    *,
    batch_size: int,
    options: LossOptions | None = None,
    whole_batches: bool = False,
    advance: Callable[[int], None] | None = None,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Scores:
    """Predict a part of the examples, in float32 and without augmentation; `watch` is shown all scores and targets.

    With `whole_batches` an incomplete last batch is left out, unless it is the only one.
    """
    task, index = examples.task, examples.of(part)
    if whole_batches and len(index) > batch_size:
        index = index[: len(index) // batch_size * batch_size]
    device = next(model.parameters()).device
    tallies, losses, weights = [], 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(index), batch_size):
            some = [examples[int(i)] for i in index[start : start + batch_size]]
            target = torch.cat([sample.target for sample in some]).to(device)
            scores = model(collate([sample.batch for sample in some]).to(device))
            tallies.append(task.tally(scores, target))
            if watch:
                watch(scores, target)
            if options is not None:
                losses += float(task.loss(scores, target, options)) * len(some)
                weights += len(some)
            if advance:
                advance(len(some))
    return Scores(
        loss=losses / weights if weights else float("nan"),
        tallies=np.concatenate(tallies),
        blocks=examples.blocks[index],
    )


def deciding_figure(task: Task, tallies: np.ndarray) -> float:
    """Give the figure that decides which epoch is best, so that higher is better; undefined ones are worst."""
    value = task.figure(task.best, tallies)
    value = value if task.higher_is_better else -value
    return value if np.isfinite(value) else -np.inf


def report(
    task: Task,
    scores: Scores,
    names: tuple[str, ...],
    *,
    threshold: float | None = None,
    resamples: int = 1000,
    seed: int = 42,
) -> PartReport:
    """Sum up a part: the task's figures with intervals over blocks, and each class on its own.

    Boxes count from `threshold` on, by default from the one that is best for the part. A single block tells nothing of
    others, so intervals are NaN then.
    """
    if task.answer == "boxes":
        told = _report_boxes(scores, names, threshold, resamples, seed)
    else:
        told = _report_sums(task, scores, names, resamples, seed)
    if told.num_blocks > 1:
        return told
    alone = {"low": math.nan, "high": math.nan, "std": math.nan}
    return replace(
        told,
        metrics={name: replace(i, **alone) for name, i in told.metrics.items()},
        intervals={k: {f: replace(i, **alone) for f, i in own.items()} for k, own in told.intervals.items()},
    )


def _report_sums(task: Task, scores: Scores, names: tuple[str, ...], resamples: int, seed: int) -> PartReport:
    _, block = np.unique(scores.blocks, return_inverse=True)
    by_block = np.zeros((block.max() + 1, *scores.tallies.shape[1:]), scores.tallies.dtype)
    np.add.at(by_block, block.reshape(-1), scores.tallies)
    total, classes = by_block.sum(0), dict[str, dict[str, float]]()
    intervals: dict[str, dict[str, Interval]] = {}
    confusion: tuple[tuple[int, ...], ...] = ()
    if task.answer == "classes":
        per_class = metrics.per_class(total)
        drawn = metrics.per_class(metrics.resample(by_block, n=resamples, seed=seed))
        intervals = {
            name: {f: Interval.of(per_class[f][k], drawn[f][:, k]) for f in ("f1", "iou")}
            for k, name in enumerate(names)
        }
        classes = {name: {f: float(v[k]) for f, v in per_class.items()} for k, name in enumerate(names)}
        confusion = tuple(tuple(int(n) for n in row) for row in total)
    elif task.answer == "labels":
        classes = {name: _label_figures(*(int(n) for n in total[k])) for k, name in enumerate(names)}
    return PartReport(
        num_samples=len(scores.tallies),
        num_blocks=len(by_block),
        num_targets=int({"classes": total.sum(), "values": total.flat[0], "labels": len(scores.tallies)}[task.answer]),
        metrics={
            name: metrics.bootstrap(figure, by_block, n=resamples, seed=seed) for name, figure in task.figures.items()
        },
        classes=classes,
        intervals=intervals,
        confusion=confusion,
    )


def _report_boxes(
    scores: Scores, names: tuple[str, ...], threshold: float | None, resamples: int, seed: int
) -> PartReport:
    found = list(scores.tallies)
    threshold = precision.best_threshold(found) if threshold is None else threshold
    total = precision.counts_at(found, threshold).sum(0)
    classes = {}
    for name, (hit, support, guessed, iou) in zip(names, total.tolist(), strict=True):
        figures = _label_figures(int(hit), int(support), int(guessed))
        # Of boxes it is how well those that were found fit.
        classes[name] = {**figures, "iou": iou / hit if hit else float("nan")}
    return PartReport(
        num_samples=len(found),
        num_blocks=len(np.unique(scores.blocks)),
        num_targets=int(total[:, 1].sum()),
        metrics=precision.figures_with_intervals(found, scores.blocks, threshold, resamples=resamples, seed=seed),
        classes=classes,
        threshold=threshold,
    )


def _label_figures(hit: int, support: int, guessed: int) -> dict[str, float]:
    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else float("nan")

    return {
        "precision": ratio(hit, guessed),
        "recall": ratio(hit, support),
        "f1": ratio(2 * hit, support + guessed),
        "iou": ratio(hit, support + guessed - hit),
        "support": float(support),
    }
