"""From what a probe says of samples to figures with intervals, for every task of a labelled set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from panterra.evaluate import metrics
from panterra.evaluate.metrics import Interval
from panterra.evaluate.ranking import ScoreCounts, ranked

Task = Literal["classification", "multilabel", "segmentation", "regression"]
Figure = Callable[[np.ndarray], np.ndarray]

RESAMPLES = 1000


def _micro_f1(sums: Float[np.ndarray, "*r 3 k"]) -> np.ndarray:
    hit, support, guessed = (sums[..., i, :].sum(-1) for i in range(3))
    return np.asarray(2 * hit / np.maximum(support + guessed, 1))


def _macro_f1(sums: Float[np.ndarray, "*r 3 k"]) -> np.ndarray:
    """Average F1 over classes; one never met nor predicted counts 0, as `metrics.multilabel_f1` has it."""
    hit, support, guessed = (sums[..., i, :] for i in range(3))
    return np.asarray((2 * hit / np.maximum(support + guessed, 1)).mean(-1))


def _weighted_f1(sums: Float[np.ndarray, "*r 3 k"]) -> np.ndarray:
    """Average F1 over classes by how often each is met (AnySat's TreeSatAI)."""
    hit, support, guessed = (sums[..., i, :] for i in range(3))
    f1 = 2 * hit / np.maximum(support + guessed, 1)
    return np.asarray((f1 * support).sum(-1) / np.maximum(support.sum(-1), 1))


def _iou_but_last(conf: np.ndarray) -> np.ndarray:
    """Average IoU without what is, or was called, the last class (AnySat's FLAIR)."""
    kept = np.array(conf)
    kept[..., -1, :], kept[..., -1] = 0, 0
    return metrics.mean_iou(kept)


def _f1_of_class_1(conf: np.ndarray) -> np.ndarray:
    f1: np.ndarray = metrics.per_class(conf)["f1"][..., 1]
    return f1


FIGURES: Mapping[Task, Mapping[str, Figure]] = {
    "classification": {
        "accuracy": metrics.accuracy,
        "macro_f1": metrics.macro_f1,
        "macro_accuracy": metrics.macro_accuracy,
        "f1_class_1": _f1_of_class_1,
    },
    "segmentation": {
        "mean_iou": metrics.mean_iou,
        "macro_f1": metrics.macro_f1,
        "accuracy": metrics.accuracy,
        "macro_accuracy": metrics.macro_accuracy,
        "f1_class_1": _f1_of_class_1,
        "iou_but_last": _iou_but_last,
    },
    "multilabel": {"macro_f1": _macro_f1, "micro_f1": _micro_f1, "weighted_f1": _weighted_f1},
    "regression": {"rmse": metrics.rmse, "mae": metrics.mae, "r2": metrics.r2},
}
"""Of each task what can be told from sums over samples; the first is what probes are chosen by, unless told otherwise.
Multilabel sets have "average_precision" too, and all sets of classes "auroc", "prauc" and, where each sample or pixel
has one, "ece", which need every score; "f1_class_1" is of sets of two classes alone."""

LOWER_IS_BETTER = {"rmse", "mae", "ece"}


def better(metric: str, value: float) -> float:
    """Turn a figure round where less of it is better, so that the best is the highest; undefined ones are the worst."""
    if np.isnan(value):
        return -np.inf
    return -value if metric in LOWER_IS_BETTER else value


def sums_of(
    task: Task, predicted: np.ndarray, targets: np.ndarray, *, classes: int, centre: float = 0.0
) -> Float[np.ndarray, "n ..."]:
    """Count, for each of N samples, what `FIGURES` are made of.

    classification: codes [N]; segmentation: codes [N, P]; multilabel: bool [N, K]; regression: values [N, P]. Targets
    without a label (negative, or NaN) are left out. `centre`, a fixed number near the mean of the values, keeps squares
    exact; it must be the same for all that is summed.
    """
    if task in ("classification", "segmentation"):
        units = np.broadcast_to(np.arange(len(targets)).reshape(-1, *[1] * (targets.ndim - 1)), targets.shape)
        return metrics.confusion(targets, predicted, classes, groups=units.reshape(-1))
    if task == "multilabel":
        known = np.isfinite(targets)
        truth, guess = (targets > 0.5) & known, predicted & known
        return np.stack([truth & guess, truth, guess], axis=1).astype(np.float64)
    known = np.isfinite(targets)
    y, error = np.where(known, targets - centre, 0.0), np.where(known, predicted - targets, 0.0)
    columns = (known, y, y.astype(np.float64) ** 2, error.astype(np.float64) ** 2, np.abs(error))
    return np.stack([c.reshape(len(targets), -1).sum(1, dtype=np.float64) for c in columns], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a probe says of all test samples."""

    task: Task
    sums: np.ndarray
    """Of each sample (`sums_of`), or their one sum [1, K, K] where a sample is one pixel of a confusion matrix."""
    scores: Float[np.ndarray, "n k"] | None = None
    """Of each class, where samples as a whole have them: probabilities, or a vote's shares. Samples of which some
    label is not known are left out."""
    truth: Bool[np.ndarray, "n k"] | None = None
    """With the scores."""
    pixels: ScoreCounts | None = None
    """Scores of pixels' classes."""

    def figures(self, *, resamples: int = RESAMPLES, seed: int = 42, metric: str | None = None) -> dict[str, Interval]:
        """Score them; intervals come from drawing whole samples (images) with replacement.

        "iou_but_last" is there where it is the `metric` that the benchmark is judged by.
        """
        if self.task == "classification":
            drawn = metrics.resample_samples(self.sums.sum(0), n=resamples, seed=seed)
        else:
            drawn = metrics.resample(self.sums, n=resamples, seed=seed)
        total = self.sums.sum(0)
        special = {"f1_class_1": total.shape[-1] == 2, "iou_but_last": metric == "iou_but_last"}
        figures = {n: f for n, f in FIGURES[self.task].items() if special.get(n, True)}
        found = {name: Interval.of(float(f(total)), f(drawn)) for name, f in figures.items()}
        if self.scores is not None and self.truth is not None and len(self.truth):
            several = self.task == "multilabel"
            if several:
                found["average_precision"] = _average_precision(self.truth, self.scores, resamples, seed)
            found |= ranked(self.truth, self.scores, probabilities=not several, seed=seed)
        return found if self.pixels is None else found | self.pixels.figures()


def _average_precision(
    truth: Bool[np.ndarray, "n k"], scores: Float[np.ndarray, "n k"], resamples: int, seed: int
) -> Interval:
    """Score all labels as one ranking (micro mAP); a resample re-weights samples, which keeps the order."""
    order = np.argsort(-scores.reshape(-1), kind="stable")
    hit, ordered = truth.reshape(-1)[order], scores.reshape(-1)[order]
    sample = order // scores.shape[1]
    last_of_ties = np.append(np.diff(ordered) != 0, True)
    rng = np.random.Generator(np.random.PCG64(seed))
    shares = np.full(len(truth), 1 / len(truth))

    def figure(times: Int[np.ndarray, " n"]) -> float:
        weight = times[sample]
        true, every = np.cumsum(weight * hit)[last_of_ties], np.cumsum(weight)[last_of_ties]
        if true[-1] == 0:
            return np.nan
        return float((np.diff(true, prepend=0) * true / np.maximum(every, 1)).sum() / true[-1])

    drawn = np.array([figure(rng.multinomial(len(truth), shares)) for _ in range(resamples)])
    return Interval.of(figure(np.ones(len(truth), np.int64)), drawn)
