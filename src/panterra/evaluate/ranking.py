"""How well scores rank samples, and how far they can be taken for probabilities."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from panterra.evaluate.calibration import BINS, expected_calibration_error
from panterra.evaluate.metrics import Interval

RESAMPLES = 200
"""For intervals; each looks at every score again."""
_WORK = 2**31
"""Scores that resamples may look at in all; large sets have fewer resamples."""
_LEVELS = 0x3C00 + 1
"""Numbers of half precision from 0 to 1."""


def ranked(
    truth: Bool[np.ndarray, "n k"], scores: Float[np.ndarray, "n k"], *, probabilities: bool, seed: int = 42
) -> dict[str, Interval]:
    """Give "auroc" and "prauc", each class against all others, averaged over the classes that have both outcomes.

    With `probabilities`, scores of exactly one class per sample, also "ece", the expected calibration error.
    """
    resamples = int(np.clip(_WORK // max(scores.size, 1), 20, RESAMPLES))
    rng = np.random.Generator(np.random.PCG64(seed))
    times = rng.multinomial(len(truth), np.full(len(truth), 1 / len(truth)), size=resamples)
    # The first row is the samples as they are.
    weights = np.concatenate([np.ones((1, len(truth)), times.dtype), times])
    areas = np.stack([_areas(truth[:, k], scores[:, k], weights) for k in range(truth.shape[1])])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        roc, precision = np.nanmean(areas, axis=0)
    found = {"auroc": Interval.of(roc[0], roc[1:]), "prauc": Interval.of(precision[0], precision[1:])}
    if probabilities:
        estimate = expected_calibration_error(scores, truth.argmax(1))
        found["ece"] = Interval.of(estimate, _calibration_errors(truth, scores, times))
    return found


def _areas(hit: Bool[np.ndarray, " n"], score: Float[np.ndarray, " n"], weights: np.ndarray) -> np.ndarray:
    """Give the areas under the ROC and the precision-recall curve, [2, R]; NaN where only one outcome is met."""
    order = np.argsort(-score, kind="stable")
    last_of_ties = np.append(np.diff(score[order]) != 0, True)
    found = np.empty((2, len(weights)))
    for r, weight in enumerate(weights):
        own = weight[order]
        true, every = np.cumsum(own * hit[order])[last_of_ties], np.cumsum(own)[last_of_ties]
        found[:, r] = _under_curves(true, every - true)
    return found


def _under_curves(true: np.ndarray, false: np.ndarray) -> tuple[float, float]:
    """Integrate both curves from true and false positives above falling scores."""
    if not true[-1] or not false[-1]:
        return np.nan, np.nan
    roc = np.trapezoid(np.append(0, true), np.append(0, false)) / (float(true[-1]) * float(false[-1]))
    precision = (np.diff(true, prepend=0) * true / np.maximum(true + false, 1)).sum() / true[-1]
    return float(roc), float(precision)


def _calibration_errors(truth: np.ndarray, scores: np.ndarray, times: np.ndarray) -> Float[np.ndarray, " r"]:
    """Resample the calibration error within the bins of all samples."""
    sure, right = scores.max(1).astype(np.float64), scores.argmax(1) == truth.argmax(1)
    edges = np.quantile(sure, np.linspace(0, 1, BINS + 1)[1:-1])
    gaps = np.zeros((len(sure), BINS))
    gaps[np.arange(len(sure)), np.searchsorted(edges, sure)] = sure - right
    errors: np.ndarray = np.abs(times @ gaps).sum(1) / times.sum(1)
    return errors


@dataclass(slots=True, kw_only=True)
class ScoreCounts:
    """Scores of the classes of pixels, counted level by level of half precision, since there are too many to keep."""

    classes: int
    counts: Int[np.ndarray, "k 2 levels"] = field(init=False)
    """Pixels that are not and that are of a class, by its score."""
    sure: Int[np.ndarray, "2 levels"] = field(init=False)
    """Pixels whose likeliest class is wrong and right, by its score."""

    def __post_init__(self) -> None:
        self.counts = np.zeros((self.classes, 2, _LEVELS), np.int64)
        self.sure = np.zeros((2, _LEVELS), np.int64)

    def add(self, shares: Float[Tensor, "n k"], truth: Int[Tensor, " n"]) -> None:
        """Count pixels; those with a negative class have no label."""
        known = truth >= 0
        shares, truth = shares[known], truth[known].long()
        level = shares.clamp(0, 1).half().view(torch.int16).long()
        for k in range(self.classes):
            place = (truth == k) * _LEVELS + level[:, k]
            self.counts[k] += torch.bincount(place, minlength=2 * _LEVELS).cpu().numpy().reshape(2, -1)
        highest, likeliest = level.max(1)
        place = (likeliest == truth) * _LEVELS + highest
        self.sure += torch.bincount(place, minlength=2 * _LEVELS).cpu().numpy().reshape(2, -1)

    def figures(self) -> dict[str, Interval]:
        """Give what `ranked` does, without intervals."""
        both = [k for k in range(self.classes) if self.counts[k].sum(1).all()]
        curves = [_under_curves(*(np.cumsum(self.counts[k, side, ::-1]) for side in (1, 0))) for k in both]
        roc, precision = np.mean(curves, axis=0) if curves else (np.nan, np.nan)
        return {
            name: Interval(estimate=float(value), low=np.nan, high=np.nan, std=np.nan)
            for name, value in (("auroc", roc), ("prauc", precision), ("ece", self._calibration_error()))
        }

    def _calibration_error(self) -> float:
        count = self.sure.sum(0)
        if not count.any():
            return np.nan
        level = np.arange(_LEVELS, dtype=np.int16).view(np.float16).astype(np.float64)
        # A level belongs to the bin that the middle of its pixels lies in.
        middle = (np.cumsum(count) - count / 2) / count.sum()
        bin_of = np.minimum((middle * BINS).astype(np.int64), BINS - 1)
        gap = np.bincount(bin_of, count * level - self.sure[1], BINS)
        return float(np.abs(gap).sum() / count.sum())
