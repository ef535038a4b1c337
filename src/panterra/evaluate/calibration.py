"""Probabilities that mean what they say: of the samples given 0.8, eight in ten are right."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from panterra.errors import InputError
from panterra.evaluate.probes import Probe

BINS = 15
_TINY = 1e-12
"""Probabilities below are taken for this, so that they have a logarithm."""
_HINT = 1e-6
"""Weight of a penalty that keeps classes which the samples tell apart perfectly from running off."""
_ITERATIONS = 100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scaling:
    """Log-probabilities times `scale` plus `shift`; temperature scaling divides all by one number, the temperature."""

    scale: Float[np.ndarray, " k"]
    shift: Float[np.ndarray, " k"]

    def __call__(self, probabilities: Float[np.ndarray, "... k"]) -> Float[np.ndarray, "... k"]:
        """Calibrate probabilities of the last axis."""
        logits = np.log(np.maximum(probabilities, _TINY)) * self.scale + self.shift
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        scaled: np.ndarray = shares / shares.sum(-1, keepdims=True)
        return scaled


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Isotonic:
    """For each class a rising curve from its probability to the share of samples that are it, then normalised."""

    knots: tuple[Float[np.ndarray, " m"], ...]
    heights: tuple[Float[np.ndarray, " m"], ...]

    def __call__(self, probabilities: Float[np.ndarray, "... k"]) -> Float[np.ndarray, "... k"]:
        """Calibrate probabilities of the last axis; what every curve calls impossible is left as it was."""
        curves = zip(np.moveaxis(np.asarray(probabilities), -1, 0), self.knots, self.heights, strict=True)
        raised = np.stack([np.interp(p, knots, heights) for p, knots, heights in curves], axis=-1)
        total = raised.sum(-1, keepdims=True)
        return np.where(total > 0, raised / np.where(total > 0, total, 1), probabilities)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reliability:
    """How often the likeliest class is right, by how sure the model is of it. Empty bins are left out."""

    confidence: Float[np.ndarray, " b"]
    """Mean probability of the likeliest class in each bin, rising."""
    accuracy: Float[np.ndarray, " b"]
    count: Int[np.ndarray, " b"]

    @property
    def expected_calibration_error(self) -> float:
        """The mean gap between confidence and accuracy, each bin weighted by its samples."""
        return float(np.average(np.abs(self.confidence - self.accuracy), weights=self.count))


def fit_temperature(probabilities: Float[np.ndarray, "n k"], targets: Int[np.ndarray, " n"]) -> Scaling:
    """Find the one temperature that makes held-out samples likeliest (Guo et al. 2017).

    Targets are columns of `probabilities`. The samples must not be those that the model was fitted on; the likeliest
    class of every sample stays the same.
    """
    return _fit_scaling(probabilities, targets, vector=False)


def fit_vector_scaling(probabilities: Float[np.ndarray, "n k"], targets: Int[np.ndarray, " n"]) -> Scaling:
    """Find a scale and a shift for each class that make held-out samples likeliest; wants tens of samples per class."""
    return _fit_scaling(probabilities, targets, vector=True)


def fit_isotonic(probabilities: Float[np.ndarray, "n k"], targets: Int[np.ndarray, " n"]) -> Isotonic:
    """Fit a rising curve per class against all others, by pooling adjacent violators; wants hundreds of samples."""
    shares, truth = _checked(probabilities, targets)
    curves = [_rising(shares[:, k], truth == k) for k in range(shares.shape[1])]
    return Isotonic(knots=tuple(c[0] for c in curves), heights=tuple(c[1] for c in curves))


def calibrated_probe(probe: Probe, temperature: Scaling) -> Probe:
    """Build a temperature into a logistic probe, so that maps made with it carry calibrated probabilities."""
    if probe.kind != "logistic":
        raise InputError(f"a {probe.kind} probe has no logits to scale; fit a logistic one")
    scale = temperature.scale
    # A probe's logits are log-probabilities only up to a constant, which scales that differ would not leave one.
    if len(scale) != len(probe.classes) or not (scale == scale[0]).all() or temperature.shift.any():
        raise InputError("only one temperature for all classes of the probe can be built in; use fit_temperature")
    scaled = {name: probe.tensors[name] * float(scale[0]) for name in ("weight", "bias")}
    return replace(probe, tensors={**probe.tensors, **scaled})


def reliability(
    probabilities: Float[np.ndarray, "n k"], targets: Int[np.ndarray, " n"], *, bins: int = BINS
) -> Reliability:
    """Compare confidence with accuracy in bins of about equally many samples."""
    shares, truth = _checked(probabilities, targets)
    if bins < 1:
        raise InputError(f"{bins} bins were asked for; wanted 1 or more")
    sure, right = shares.max(1), shares.argmax(1) == truth
    inner = np.quantile(sure, np.linspace(0, 1, bins + 1)[1:-1])
    bin_of = np.searchsorted(inner, sure)
    count = np.bincount(bin_of, minlength=bins)
    met = count > 0
    return Reliability(
        confidence=np.bincount(bin_of, sure, bins)[met] / count[met],
        accuracy=np.bincount(bin_of, right, bins)[met] / count[met],
        count=count[met],
    )


def expected_calibration_error(
    probabilities: Float[np.ndarray, "n k"], targets: Int[np.ndarray, " n"], *, bins: int = BINS
) -> float:
    """Give the mean gap between confidence and accuracy over bins of about equally many samples.

    It is above 0 by chance alone; compare it between models on the same samples.
    """
    return reliability(probabilities, targets, bins=bins).expected_calibration_error


def brier(probabilities: Float[np.ndarray, "n k"], targets: Int[np.ndarray, " n"]) -> float:
    """Give the mean squared distance between probabilities and the truth, summed over the classes: 0 to 2."""
    shares, truth = _checked(probabilities, targets)
    return float(((shares - np.eye(shares.shape[1])[truth]) ** 2).sum(1).mean())


def _fit_scaling(probabilities: np.ndarray, targets: np.ndarray, *, vector: bool) -> Scaling:
    """Minimise the mean cross-entropy by Newton's method; it is convex in scales and shifts."""
    shares, truth = _checked(probabilities, targets)
    num, num_classes = shares.shape
    logits, answers = np.log(np.maximum(shares, _TINY)), np.eye(num_classes)[truth]
    no_change = np.append(np.ones(num_classes), np.zeros(num_classes))
    # What may move: every scale and shift on its own, or all scales together.
    free = np.eye(2 * num_classes) if vector else no_change[:, None]

    def scaled(changes: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = no_change + free @ changes
        moved = logits * parameters[:num_classes] + parameters[num_classes:]
        moved = moved - moved.max(1, keepdims=True)
        logs = moved - np.log(np.exp(moved).sum(1, keepdims=True))
        return float(_HINT * changes @ changes - (logs * answers).sum() / num), np.exp(logs)

    changes = np.zeros(free.shape[1])
    loss, now = scaled(changes)
    for _ in range(_ITERATIONS):
        columns = np.concatenate([logits, np.ones_like(logits)], axis=1)
        twice = np.concatenate([now, now], axis=1)
        gradient = free.T @ (columns * (twice - np.tile(answers, 2))).mean(0) + 2 * _HINT * changes
        weighted = columns * twice
        # The covariance of the logits' derivatives: a class goes with itself alone, less the product of the means.
        own = np.tile(np.eye(num_classes), (2, 2)) * (weighted.T @ columns)
        curvature = free.T @ (own - weighted.T @ weighted) @ free / num + 2 * _HINT * np.eye(len(changes))
        step = np.linalg.solve(curvature, gradient)
        if gradient @ step < 1e-14:
            break
        shorter = (0.5**halvings for halvings in range(40))
        size = next((h for h in shorter if scaled(changes - h * step)[0] < loss), 0.0)
        if size == 0.0:
            break
        changes = changes - size * step
        loss, now = scaled(changes)
    scale, shift = np.split(no_change + free @ changes, 2)
    if not vector and scale[0] <= 0:
        raise InputError("the likelier a class was called the rarer it is; check that targets and columns go together")
    return Scaling(scale=scale, shift=shift - shift.mean())


def _rising(x: np.ndarray, hit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit the rising step curve nearest to hits, as the corners between which to interpolate."""
    knots, which, count = np.unique(x, return_inverse=True, return_counts=True)
    blocks: list[tuple[float, int, int]] = []
    """Mean, weight and number of knots of each flat part."""
    for mean, weight in zip(np.bincount(which, hit) / count, count.tolist(), strict=True):
        block = (float(mean), weight, 1)
        while blocks and blocks[-1][0] >= block[0]:
            before, heavy, number = blocks.pop()
            total = heavy + block[1]
            block = ((before * heavy + block[0] * block[1]) / total, total, number + block[2])
        blocks.append(block)
    return knots, np.repeat([b[0] for b in blocks], [b[2] for b in blocks])


def _checked(probabilities: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make float64 probabilities and int64 targets of what came."""
    shares, truth = np.asarray(probabilities, np.float64), np.asarray(targets, np.int64)
    if shares.ndim != 2 or truth.shape != shares.shape[:1] or not len(truth):
        raise InputError(
            f"probabilities are {list(shares.shape)} and targets {list(truth.shape)}; wanted [n, classes] and [n]"
        )
    if not np.isfinite(shares).all() or shares.min() < 0 or not np.allclose(shares.sum(1), 1, atol=1e-3):
        raise InputError("probabilities are not shares that sum to 1; leave out places without data, or apply softmax")
    if truth.min() < 0 or truth.max() >= shares.shape[1]:
        raise InputError(
            f"targets go from {truth.min()} to {truth.max()}; wanted columns 0 to {shares.shape[1] - 1} of the "
            "probabilities"
        )
    return shares, truth
