"""What can be learned: how a task's scores are compared with its targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from panterra.data.labelled import IGNORE
from panterra.errors import InputError
from panterra.evaluate import metrics
from panterra.evaluate.dice import dice_loss
from panterra.finetune import boxes, precision

Answer = Literal["classes", "labels", "values", "boxes"]
"""classes: one of several; labels: any of several; values: a number; boxes: objects with a class each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """What a loss needs to know beside scores and targets."""

    class_weights: Float[Tensor, " k"] | None = None
    label_smoothing: float = 0.0
    """Share of a target that is spread over all classes."""
    dice: Float[Tensor, " k"] | None = None
    """How much each class counts in a Dice loss beside the cross-entropy, if there is one."""
    spread: float = 1.0
    """Standard deviation of values in the training data; errors count in it."""


Loss = Callable[[Tensor, Tensor, LossOptions], Tensor]
"""From scores [B, K, ...], targets and options to the mean over what is labelled; zero where nothing is."""
Tally = Callable[[Tensor, Tensor], np.ndarray]
"""From scores [B, K, ...] and targets to one array of sums per sample, [B, ...]; of boxes to B times `Matches`."""
Figure = Callable[[Any], Any]
"""From sums added up, with any axes before their own, to a figure; of boxes from all `Matches`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One kind of question; a new one is a row in `TASKS`."""

    name: str
    answer: Answer
    dense: bool
    """Whether targets are [B, H, W], one per cell of a grid, or one per sample: [B], [B, K] for labels.

    Boxes are found on a grid too; their targets are [B, M, 5], see `detection_loss`.
    """
    loss: Loss
    tally: Tally
    figures: Mapping[str, Figure]
    """Computed from the tallies of all samples together."""
    best: str
    """The figure that decides which epoch is kept."""
    higher_is_better: bool = True

    def outputs(self, num_classes: int) -> int:
        """Count the scores per sample or cell."""
        return {"values": 1, "boxes": num_classes + boxes.SHAPE}.get(self.answer, num_classes)

    def figure(self, name: str, tallies: np.ndarray) -> float:
        """Compute a figure from the tallies of samples."""
        if self.answer == "boxes":
            return float(self.figures[name](list(tallies))[0])
        return float(self.figures[name](tallies.sum(0)))


def cross_entropy(scores: Float[Tensor, "b k *grid"], target: Int[Tensor, b * grid], options: LossOptions) -> Tensor:
    """Average the cross-entropy over labelled cells, each weighing as its class does; -1 is no label.

    The Dice loss of all labelled cells together is added where asked for.
    """
    labelled, weights = target != IGNORE, options.class_weights
    if not bool(labelled.any()):
        return scores.sum() * 0
    loss = F.cross_entropy(
        scores,
        target,
        weight=weights,
        ignore_index=IGNORE,
        label_smoothing=options.label_smoothing,
    )
    if weights is not None and not bool(weights[target[labelled]].any()):
        # Nothing that is labelled counts, and the mean over it would be 0 / 0.
        loss = scores.sum() * 0
    return loss if options.dice is None else loss + dice_loss(scores, target, options.dice)


def binary_cross_entropy(
    scores: Float[Tensor, "b k *grid"], target: Float[Tensor, "b k *grid"], options: LossOptions
) -> Tensor:
    """Average the binary cross-entropy over known labels; a class weight counts its presence; NaN is not known."""
    known = ~target.isnan()
    if not bool(known.any()):
        return scores.sum() * 0
    wanted = torch.where(known, target, 0.0)
    smooth = wanted * (1 - options.label_smoothing) + options.label_smoothing / 2
    weights = options.class_weights
    shape = (-1, *[1] * (scores.ndim - 2))
    loss = F.binary_cross_entropy_with_logits(
        scores, smooth, pos_weight=None if weights is None else weights.view(shape), reduction="none"
    )
    return loss[known].mean()


def squared_error(scores: Float[Tensor, "b 1 *grid"], target: Float[Tensor, b * grid], options: LossOptions) -> Tensor:
    """Average the squared error over finite values, in units of their spread; others are not known."""
    known = target.isfinite()
    if not bool(known.any()):
        return scores.sum() * 0
    return ((scores[:, 0][known] - target[known]) / options.spread).square().mean()


def find_objects(scores: Float[Tensor, "b k y x"], target: Float[Tensor, "b m 5"], options: LossOptions) -> Tensor:
    """Compare scores with boxes, see `detection_loss`."""
    return boxes.detection_loss(scores, target)


def count_classes(scores: Float[Tensor, "b k *grid"], target: Int[Tensor, b * grid]) -> np.ndarray:
    """Count cells by true and predicted class: int64 [B, K, K]."""
    guess, truth = scores.argmax(1).cpu().numpy(), target.cpu().numpy()
    return np.stack([metrics.confusion(t, g, scores.shape[1]) for t, g in zip(truth, guess, strict=True)])


def count_labels(scores: Float[Tensor, "b k *grid"], target: Float[Tensor, "b k *grid"]) -> np.ndarray:
    """Count hits, occurrences and predictions of each label: int64 [B, K, 3]."""
    known = ~target.isnan()
    truth, guess = (target > 0.5) & known, (scores > 0) & known
    columns = (truth & guess, truth, guess)
    counts = torch.stack([column.reshape(*target.shape[:2], -1).sum(2) for column in columns], dim=2)
    return counts.cpu().numpy()


def sum_errors(scores: Float[Tensor, "b 1 *grid"], target: Float[Tensor, b * grid]) -> np.ndarray:
    """Sum 1, y, y², squared and absolute error over finite values, as `metrics.moments` does: float64 [B, 5]."""
    truth, guess = target.double().reshape(len(target), -1), scores[:, 0].double().reshape(len(target), -1)
    known = truth.isfinite()
    y = torch.where(known, truth, 0.0)
    error = torch.where(known, guess - y, 0.0)
    columns = (known.double(), y, y.square(), error.square(), error.abs())
    return torch.stack([column.sum(1) for column in columns], dim=1).cpu().numpy()


def micro_f1(sums: np.ndarray) -> np.ndarray:
    """Give F1 over all labels together, from `count_labels`, [...]."""
    hit, either = sums[..., 0].sum(-1), sums[..., 1:].sum((-2, -1))
    f1: np.ndarray = np.divide(2.0 * hit, either, out=np.full(np.shape(either), np.nan), where=either > 0)
    return f1


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Average F1 over labels, from `count_labels`, [...]; one that is never met nor predicted counts 0."""
    either = sums[..., 1:].sum(-1)
    f1: np.ndarray = np.divide(2.0 * sums[..., 0], either, out=np.zeros(either.shape), where=either > 0)
    mean: np.ndarray = f1.mean(-1)
    return mean


_CLASS_FIGURES = {"accuracy": metrics.accuracy, "macro_f1": metrics.macro_f1, "mean_iou": metrics.mean_iou}
_VALUE_FIGURES = {"rmse": metrics.rmse, "mae": metrics.mae, "r2": metrics.r2}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="classification",
            answer="classes",
            dense=False,
            loss=cross_entropy,
            tally=count_classes,
            figures=_CLASS_FIGURES,
            best="macro_f1",
        ),
        Task(
            name="multilabel",
            answer="labels",
            dense=False,
            loss=binary_cross_entropy,
            tally=count_labels,
            figures={"micro_f1": micro_f1, "macro_f1": macro_f1},
            best="micro_f1",
        ),
        Task(
            name="segmentation",
            answer="classes",
            dense=True,
            loss=cross_entropy,
            tally=count_classes,
            figures=_CLASS_FIGURES,
            best="mean_iou",
        ),
        Task(
            name="regression",
            answer="values",
            dense=True,
            loss=squared_error,
            tally=sum_errors,
            figures=_VALUE_FIGURES,
            best="rmse",
            higher_is_better=False,
        ),
        Task(
            name="scene_regression",
            answer="values",
            dense=False,
            loss=squared_error,
            tally=sum_errors,
            figures=_VALUE_FIGURES,
            best="rmse",
            higher_is_better=False,
        ),
        Task(
            name="detection",
            answer="boxes",
            dense=True,
            loss=find_objects,
            tally=precision.match_windows,
            figures={"ap50": precision.ap50, "ap": precision.ap},
            best="ap50",
        ),
    )
}


def kind_of(task: str | None) -> Literal["classes", "values"] | None:
    """Tell what whole numbers in labels are for a task; None: classes while they are few."""
    answer = task_of(task).answer if task else None
    return "values" if answer == "values" else "classes" if answer == "boxes" else None


def task_of(name: str) -> Task:
    """Look a task up by its name."""
    if name not in TASKS:
        raise InputError(f"no task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]
