"""How good predictions are, with intervals that respect where the samples lie.

Metrics are functions of sums over samples: of a confusion matrix (classes) or of `moments` (values). A bootstrap then
only re-weights the sums of its units, and a thousand resamples are one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsFloat

import numpy as np
from jaxtyping import Bool, Float, Int

from panterra.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure and its 95 % percentile interval over resamples."""

    estimate: float
    """On the data as they are."""
    low: float
    high: float
    std: float
    """Standard deviation over the resamples."""

    @classmethod
    def of(cls, estimate: SupportsFloat, resampled: Float[np.ndarray, " r"]) -> Interval:
        """Summarise resampled figures; resamples in which the figure is undefined (NaN) are left out."""
        defined = resampled[np.isfinite(resampled)]
        if not len(defined):
            return cls(estimate=float(estimate), low=np.nan, high=np.nan, std=np.nan)
        low, high = np.percentile(defined, [2.5, 97.5])
        return cls(estimate=float(estimate), low=float(low), high=float(high), std=float(defined.std()))


def confusion(
    targets: np.ndarray,
    predictions: np.ndarray,
    num_classes: int | None = None,
    *,
    groups: Int[np.ndarray, " n"] | None = None,
) -> np.ndarray:
    """Count samples by true (row) and predicted (column) class: int64 [K, K], or [G, K, K] with groups 0 to G - 1.

    Samples with a negative target carry no label and are left out.
    """
    truth, guess = np.asarray(targets).reshape(-1), np.asarray(predictions).reshape(-1)
    if truth.shape != guess.shape:
        raise InputError(f"{truth.size} targets came with {guess.size} predictions; give one prediction per target")
    known = truth >= 0
    highest = max(truth[known].max(initial=0), guess[known].max(initial=0))
    k = int(highest) + 1 if num_classes is None else num_classes
    if highest >= k or guess[known].min(initial=0) < 0:
        raise InputError(f"class numbers reach beyond 0 to {k - 1}; give num_classes={highest + 1} or recode them")
    cell = truth[known].astype(np.int64) * k + guess[known]
    if groups is None:
        return np.bincount(cell, minlength=k * k).reshape(k, k)
    num_groups = int(groups.max(initial=-1)) + 1
    counts = np.bincount(groups[known] * (k * k) + cell, minlength=num_groups * k * k)
    return counts.reshape(num_groups, k, k)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide where the whole is not zero; NaN, meaning undefined, elsewhere."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    quotient = np.full(np.broadcast(part, whole).shape, np.nan)
    np.divide(part, whole, out=quotient, where=whole != 0)
    return quotient


def _mean_where(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    return _ratio(np.where(where, values, 0).sum(-1), where.sum(-1))


def per_class(conf: np.ndarray) -> dict[str, np.ndarray]:
    """Give precision, recall, f1, iou and support of each class, [..., K]; NaN where a figure is undefined."""
    hit, support, guessed = np.diagonal(conf, axis1=-2, axis2=-1), conf.sum(-1), conf.sum(-2)
    return {
        "precision": _ratio(hit, guessed),
        "recall": _ratio(hit, support),
        "f1": _ratio(2 * hit, support + guessed),
        "iou": _ratio(hit, support + guessed - hit),
        "support": support,
    }


def accuracy(conf: np.ndarray) -> np.ndarray:
    """Give the share of samples whose class is right, [...]; equals micro F1 when each sample has one class."""
    return _ratio(np.trace(conf, axis1=-2, axis2=-1), conf.sum((-2, -1)))


def macro_accuracy(conf: np.ndarray) -> np.ndarray:
    """Average the recall over the classes present in the targets, [...]."""
    figures = per_class(conf)
    return _mean_where(figures["recall"], figures["support"] > 0)


def macro_f1(conf: np.ndarray) -> np.ndarray:
    """Average F1 over the classes present in the targets, [...]."""
    figures = per_class(conf)
    return _mean_where(figures["f1"], figures["support"] > 0)


def mean_iou(conf: np.ndarray) -> np.ndarray:
    """Average intersection over union over the classes present in targets or predictions, [...]."""
    iou = per_class(conf)["iou"]
    return _mean_where(iou, np.isfinite(iou))


def _sorted_by_score(positive: Bool[np.ndarray, " n"], score: Float[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """Count true and false positives above each distinct score, from the highest on."""
    order = np.argsort(-score, kind="stable")
    hits, score = positive[order], score[order]
    last_of_ties = np.append(np.diff(score) != 0, True)
    true = np.cumsum(hits)[last_of_ties]
    return true, np.flatnonzero(last_of_ties) + 1 - true


def average_precision(positive: Bool[np.ndarray, " n"], score: Float[np.ndarray, " n"]) -> float:
    """Sum precision over the steps of recall; NaN without positives. On flattened [n, K] arrays this is micro mAP."""
    if not positive.any():
        return np.nan
    true, false = _sorted_by_score(positive.reshape(-1), score.reshape(-1))
    return float((np.diff(true, prepend=0) * true / (true + false)).sum() / true[-1])


def _area_under_roc(positive: Bool[np.ndarray, " n"], score: Float[np.ndarray, " n"]) -> float:
    true, false = _sorted_by_score(positive, score)
    return float(np.trapezoid(np.append(0, true), np.append(0, false)) / (true[-1] * false[-1]))


def _one_vs_rest(
    figure: Callable[[np.ndarray, np.ndarray], float], targets: Int[np.ndarray, " n"], scores: Float[np.ndarray, "n k"]
) -> float:
    known = targets >= 0
    targets, scores = targets[known], scores[known]
    both = [k for k in range(scores.shape[1]) if 0 < (targets == k).sum() < len(targets)]
    return float(np.mean([figure(targets == k, scores[:, k]) for k in both])) if both else np.nan


def auroc(targets: Int[np.ndarray, " n"], scores: Float[np.ndarray, "n k"]) -> float:
    """Average the one-versus-rest area under the ROC curve over the classes that some samples have and some do not."""
    return _one_vs_rest(_area_under_roc, targets, scores)


def prauc(targets: Int[np.ndarray, " n"], scores: Float[np.ndarray, "n k"]) -> float:
    """Average the one-versus-rest average precision over the classes that some samples have and some do not."""
    return _one_vs_rest(average_precision, targets, scores)


def multilabel_f1(targets: Bool[np.ndarray, "n k"], predictions: Bool[np.ndarray, "n k"]) -> tuple[float, float]:
    """Give micro and macro F1 of samples that may have several classes; a class never met nor predicted counts 0."""
    hit, either = (targets & predictions).sum(0), targets.sum(0) + predictions.sum(0)
    micro, macro = np.nan_to_num(_ratio(2 * hit.sum(), either.sum())), np.nan_to_num(_ratio(2 * hit, either)).mean()
    return float(micro), float(macro)


def moments(targets: np.ndarray, predictions: np.ndarray, *, groups: Int[np.ndarray, " n"] | None = None) -> np.ndarray:
    """Sum what `r2`, `rmse` and `mae` need: float64 [5], or [G, 5] with groups 0 to G - 1.

    The sums are of 1, y, y^2, the squared and the absolute error, with y counted from the mean of all targets, which
    changes none of the three and keeps y^2 exact.
    """
    truth, guess = np.asarray(targets, np.float64).reshape(-1), np.asarray(predictions, np.float64).reshape(-1)
    if truth.shape != guess.shape:
        raise InputError(f"{truth.size} targets came with {guess.size} predictions; give one prediction per target")
    y, error = truth - truth.mean(), guess - truth
    group = np.zeros(len(y), np.int64) if groups is None else groups
    columns = (np.ones_like(y), y, y**2, error**2, np.abs(error))
    sums = np.stack([np.bincount(group, column) for column in columns], axis=1)
    return sums[0] if groups is None else sums


def r2(sums: np.ndarray) -> np.ndarray:
    """Give the share of the targets' variance that predictions explain, from `moments`, [...]."""
    spread = sums[..., 2] - _ratio(sums[..., 1] ** 2, sums[..., 0])
    # What rounding leaves of equal targets is no spread.
    unexplained: np.ndarray = _ratio(sums[..., 3], np.where(spread > 1e-12 * sums[..., 2], spread, 0))
    return 1 - unexplained


def rmse(sums: np.ndarray) -> np.ndarray:
    """Give the root mean squared error in the targets' unit, from `moments`, [...]."""
    root: np.ndarray = np.sqrt(_ratio(sums[..., 3], sums[..., 0]))
    return root


def mae(sums: np.ndarray) -> np.ndarray:
    """Give the mean absolute error in the targets' unit, from `moments`, [...]."""
    return _ratio(sums[..., 4], sums[..., 0])


def resample(
    statistics: np.ndarray, *, counts: Int[np.ndarray, " u"] | None = None, n: int = 1000, seed: int = 42
) -> np.ndarray:
    """Draw as many units as there are, with replacement, and sum their statistics: [U, ...] to float64 [n, ...].

    A unit is what is drawn as a whole: a spatial block, or a sample. `counts` says how many equal units each row stands
    for, so that a confusion matrix can be resampled sample by sample from its K * K cells.
    """
    rows = statistics.reshape(len(statistics), -1).astype(np.float64)
    times = np.ones(len(rows), np.int64) if counts is None else counts
    # Of nothing, nothing is drawn.
    shares = times / max(times.sum(), 1)
    rng = np.random.Generator(np.random.PCG64(seed))
    sums = np.empty((n, rows.shape[1]))
    step = max(1, 2**22 // len(rows))
    for start in range(0, n, step):
        size = min(step, n - start)
        sums[start : start + size] = rng.multinomial(times.sum(), shares, size=size) @ rows
    return sums.reshape(n, *statistics.shape[1:])


def resample_samples(conf: Int[np.ndarray, "k k"], *, n: int = 1000, seed: int = 42) -> Float[np.ndarray, "n k k"]:
    """Resample the samples behind one confusion matrix, each on its own."""
    cells = np.eye(conf.size).reshape(conf.size, *conf.shape)
    return resample(cells, counts=conf.reshape(-1), n=n, seed=seed)


def bootstrap(
    metric: Callable[[np.ndarray], np.ndarray], statistics: np.ndarray, *, n: int = 1000, seed: int = 42
) -> Interval:
    """Give a metric of statistics [U, ...] with its interval over resamples of the units U.

    >>> bootstrap(accuracy, confusion(targets, predictions, groups=blocks))  # doctest: +SKIP
    """
    return Interval.of(float(metric(statistics.sum(0))), metric(resample(statistics, n=n, seed=seed)))
