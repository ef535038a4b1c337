"""Sets of classes and ranges of values that hold the truth as often as they promise.

Split conformal prediction: how badly a model's answers fit the truth of held-out samples says how much room to leave
for new ones. The promise, of at least 1 - alpha on average over draws of the held-out and the new samples together,
holds for any model and any number of samples, so long as the new ones are exchangeable with the held-out ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from panterra.errors import InputError

Score = Literal["lac", "aps", "raps"]
PENALTY = 0.1
FREE_RANKS = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ConformalSets:
    """Thresholds that turn class probabilities into sets of classes."""

    alpha: float
    score: Score
    thresholds: Float[np.ndarray, " k"]
    """The largest score with which a class is in the set; infinite where there are too few samples to leave it out."""
    penalty: float = PENALTY
    free_ranks: int = FREE_RANKS

    def __call__(
        self, probabilities: Float[np.ndarray, "... k"], *, generator: np.random.Generator | None = None
    ) -> Bool[np.ndarray, "... k"]:
        """Mark the classes in the set of each sample; sets may be empty, where nothing fits, or hold every class.

        `generator` breaks ties as in `calibrate_sets`, and goes with one there.
        """
        scores = class_scores(
            probabilities, self.score, penalty=self.penalty, free_ranks=self.free_ranks, generator=generator
        )
        inside: np.ndarray = scores <= self.thresholds
        return inside


@dataclass(frozen=True, slots=True, kw_only=True)
class ConformalIntervals:
    """A radius that turns predicted values into ranges."""

    alpha: float
    radius: float
    """In the unit of the values, or in multiples of the spread that was given."""

    def __call__(
        self, predictions: Float[np.ndarray, " ..."], *, spread: Float[np.ndarray, " ..."] | None = None
    ) -> tuple[Float[np.ndarray, " ..."], Float[np.ndarray, " ..."]]:
        """Give the low and the high end of each range; `spread` as in `calibrate_intervals`."""
        reach = self.radius * (np.ones_like(predictions) if spread is None else spread)
        return predictions - reach, predictions + reach


def calibrate_sets(
    probabilities: Float[np.ndarray, "n k"],
    targets: Int[np.ndarray, " n"],
    *,
    alpha: float = 0.1,
    score: Score = "lac",
    by_class: bool = False,
    groups: Int[np.ndarray, " n"] | None = None,
    penalty: float = PENALTY,
    free_ranks: int = FREE_RANKS,
    generator: np.random.Generator | None = None,
) -> ConformalSets:
    """Find the thresholds at which the sets of held-out samples miss the truth in a share alpha.

    Targets are columns of `probabilities`, of samples that the model was not fitted on. Scores are "lac" (one minus the
    probability: the smallest sets; Sadinle et al. 2019), "aps" (the probability of all that is at least as likely: sets
    that grow where the model is unsure; Romano et al. 2020) and "raps" (the same with a `penalty` per class beyond the
    first `free_ranks`, against long tails; Angelopoulos et al. 2021). With a `generator` "aps" and "raps" count a
    random part of the class's own probability, which makes the sets smaller.

    `by_class` keeps the promise for the samples of each class alone (Mondrian), which takes 1 / alpha samples of each.
    `groups` are spatial blocks: the promise is then for a sample of a block that nobody has looked at, whose
    neighbours are no proof; it takes 1 / alpha blocks.
    """
    scores = class_scores(probabilities, score, penalty=penalty, free_ranks=free_ranks, generator=generator)
    truth = np.asarray(targets, np.int64)
    num_classes = scores.shape[-1]
    if scores.ndim != 2 or truth.shape != scores.shape[:1] or truth.min(initial=0) < 0 or truth.max() >= num_classes:
        raise InputError(
            f"probabilities are {list(scores.shape)} and targets {list(truth.shape)}; wanted [n, classes] and [n], "
            "with the columns of the true classes"
        )
    own = scores[np.arange(len(truth)), truth]
    if not by_class:
        thresholds = np.full(num_classes, conformal_quantile(own, alpha, groups=groups))
    else:
        of_class = [truth == k for k in range(num_classes)]
        thresholds = np.array(
            [conformal_quantile(own[k], alpha, groups=None if groups is None else groups[k]) for k in of_class]
        )
    return ConformalSets(alpha=alpha, score=score, thresholds=thresholds, penalty=penalty, free_ranks=free_ranks)


def calibrate_intervals(
    predictions: Float[np.ndarray, " n"],
    targets: Float[np.ndarray, " n"],
    *,
    alpha: float = 0.1,
    spread: Float[np.ndarray, " n"] | None = None,
    groups: Int[np.ndarray, " n"] | None = None,
) -> ConformalIntervals:
    """Find the radius at which ranges around held-out predictions miss the truth in a share alpha.

    `spread` is a guess of each sample's error (of an ensemble, of a second model), by which ranges are wider or
    narrower (Lei et al. 2018). `groups` as in `calibrate_sets`.
    """
    guess, truth = np.asarray(predictions, np.float64), np.asarray(targets, np.float64)
    if guess.ndim != 1 or guess.shape != truth.shape or not np.isfinite(guess).all() or not np.isfinite(truth).all():
        raise InputError(
            f"predictions are {list(guess.shape)} and targets {list(truth.shape)}; wanted finite values, one per sample"
        )
    errors = np.abs(truth - guess)
    if spread is not None:
        if not (np.asarray(spread) > 0).all():
            raise InputError("some of the spreads are not above 0; add a small number to them")
        errors = errors / spread
    return ConformalIntervals(alpha=alpha, radius=conformal_quantile(errors, alpha, groups=groups))


def conformal_quantile(
    scores: Float[np.ndarray, " n"], alpha: float, *, groups: Int[np.ndarray, " n"] | None = None
) -> float:
    """Give the score that a new one does not exceed with a chance of at least 1 - alpha.

    That is the ceil((n + 1)(1 - alpha))-th smallest of n, and infinite where n is smaller than that. With `groups`,
    whole groups are exchangeable instead of samples: each group weighs 1 / (groups + 1) in total, and the new one's
    share is at infinity (Lee, Barber and Willett 2023, https://arxiv.org/abs/2306.06342).
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha is {alpha}; wanted the share of misses to allow, more than 0 and less than 1")
    values = np.asarray(scores, np.float64)
    if np.isnan(values).any():
        raise InputError("some scores are NaN; leave out samples without data")
    if not len(values):
        return math.inf
    order = np.argsort(values, kind="stable")
    _, group, size = np.unique(
        np.arange(len(values)) if groups is None else groups, return_inverse=True, return_counts=True
    )
    mass = np.cumsum((1 / size[group])[order]) / (len(size) + 1)
    # Sums of shares that are to be equal to 1 - alpha may be so but for rounding.
    reached = np.flatnonzero(mass >= 1 - alpha - 1e-9)
    return float(values[order][reached[0]]) if len(reached) else math.inf


def class_scores(
    probabilities: Float[np.ndarray, "... k"],
    score: Score,
    *,
    penalty: float = PENALTY,
    free_ranks: int = FREE_RANKS,
    generator: np.random.Generator | None = None,
) -> Float[np.ndarray, "... k"]:
    """Score how badly each class fits each sample; see `calibrate_sets`."""
    shares = np.asarray(probabilities, np.float64)
    if score == "lac":
        return 1 - shares
    order = np.argsort(-shares, axis=-1, kind="stable")
    ranked = np.take_along_axis(shares, order, axis=-1)
    part = 1.0 if generator is None else generator.random((*shares.shape[:-1], 1))
    scores = np.cumsum(ranked, axis=-1) - (1 - part) * ranked
    if score == "raps":
        scores = scores + penalty * np.maximum(0, np.arange(1, shares.shape[-1] + 1) - free_ranks)
    placed = np.empty_like(scores)
    np.put_along_axis(placed, order, scores, axis=-1)
    return placed
