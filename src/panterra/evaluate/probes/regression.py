"""Ridge and softmax regression at every strength, for all training sets at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

_ITERATIONS = 1000
_EXCESS = 1e-6
"""Of an objective above its minimum, as a share of it."""
_STEEP = 1e-5
"""Of the largest entry of a gradient; a tenth of scikit-learn's default."""
_MEMORY = 10
_SHORTENINGS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """One training set's features standardised, and the principal axes of that."""

    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    axes: Float[Tensor, "d r"]
    variances: Float[Tensor, " r"]

    @classmethod
    def of(cls, rows: Float[Tensor, "m d"]) -> Basis:
        mean, scale = rows.mean(0), rows.std(0, correction=0)
        scale = torch.where(scale > 1e-10 * mean.abs(), scale, 1.0)
        z = (rows - mean) / scale
        m, d = z.shape
        if m >= d:
            variances, axes = torch.linalg.eigh(z.mT @ z / m)
            return cls(mean=mean, scale=scale, axes=axes, variances=variances.clamp_min(0))
        variances, weights = torch.linalg.eigh(z @ z.mT / m)
        kept = variances > 1e-12 * variances[-1]
        axes = z.mT @ (weights[:, kept] / (m * variances[kept]).sqrt())
        return cls(mean=mean, scale=scale, axes=axes, variances=variances[kept])


def ridge(
    x: Float[Tensor, "n d"],
    answers: Float[Tensor, "n k"],
    train: Bool[Tensor, " n"],
    basis: Basis,
    strengths: Float[Tensor, " s"],
) -> Float[Tensor, "s d+1 k"]:
    """Solve least squares with an L2 penalty at every strength from one set of principal axes; last row is the bias."""
    z, wanted = (x[train] - basis.mean) / basis.scale, answers[train]
    bias = wanted.mean(0)
    along = basis.axes.mT @ (z.mT @ (wanted - bias)) / len(z)
    shrunk = along / (basis.variances[:, None] + strengths[:, None, None] / len(z))
    return torch.cat([basis.axes @ shrunk, bias.expand(len(strengths), 1, -1)], dim=1)


def softmax_regression(
    x: Float[Tensor, "n d"],
    label: Int[Tensor, " n"],
    num_classes: int,
    train: Bool[Tensor, "f n"],
    weight: Float[Tensor, "f n"],
    bases: Sequence[Basis],
    strengths: Float[Tensor, " s"],
) -> tuple[Float[Tensor, "f s d+1 k"], bool]:
    """Solve softmax regression for all training sets and strengths in one batched L-BFGS; last row is the bias.

    All problems share the features, so that a step of all of them is one matrix product. Each has its own line search,
    which runs on logits alone, and its own stopping test, and leaves the batch when it has converged.
    """
    problems = _Problems(
        x=x,
        label=label,
        weight=weight,
        bases=bases,
        variances=nn.utils.rnn.pad_sequence([b.variances for b in bases], batch_first=True),
        fold=torch.arange(len(train), device=x.device).repeat_interleave(len(strengths)),
        strength=(strengths / train.sum(1, keepdim=True)).flatten(),
    )
    num_problems = len(problems.fold)
    theta = x.new_zeros(num_problems, num_classes, problems.variances.shape[1] + 1)
    logits = x.new_zeros(len(x), num_classes, num_problems)
    fit = problems.fit(logits)
    gradient = problems.gradient(fit.residual, theta)
    solved, running = theta.clone(), torch.arange(num_problems, device=x.device)
    history: list[tuple[Tensor, Tensor]] = []
    for _ in range(_ITERATIONS):
        unsettled = problems.unsettled(theta, fit, gradient)
        if not unsettled.any():
            break
        if unsettled.double().mean() < 0.75:
            problems, fit, logits = problems.keep(unsettled), fit.keep(unsettled), logits[..., unsettled]
            running, theta, gradient = running[unsettled], theta[unsettled], gradient[unsettled]
            history = [(step[unsettled], change[unsettled]) for step, change in history]
        direction = _lbfgs_direction(problems, fit, gradient, history)
        step, logits, fit = _line_search(problems, theta, direction, logits, fit, gradient)
        theta = theta + step
        solved[running] = theta
        previous, gradient = gradient, problems.gradient(fit.residual, theta)
        history = [*history[1 - _MEMORY :], (step, gradient - previous)]
    settled = not problems.unsettled(theta, fit, gradient).any()
    by_fold = solved.unflatten(0, (len(train), len(strengths))).mT
    weights = [
        torch.cat([b.axes @ t[:, : b.axes.shape[1]], t[:, -1:]], dim=1) for b, t in zip(bases, by_fold, strict=True)
    ]
    return torch.stack(weights), settled


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """How P softmax regressions fit their training sets."""

    loss: Float[Tensor, " p"]
    """Mean cross-entropy."""
    residual: Float[Tensor, "n k p"]
    """Its derivative by the logits."""
    curvature: Float[Tensor, " p"]
    """Its second derivative by a logit, averaged over samples and classes."""

    def keep(self, which: Bool[Tensor, " p"]) -> _Fit:
        return _Fit(loss=self.loss[which], residual=self.residual[..., which], curvature=self.curvature[which])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problems:
    """P softmax regressions on the same features.

    Parameters [P, K, R + 1] belong to the principal axes of each training set's standardised features, with the bias
    last: there the penalty is the same and the curvature nearly diagonal. In what has a row per sample P stands last,
    which lets the processor take several problems at a time.
    """

    x: Float[Tensor, "n d"]
    label: Int[Tensor, " n"]
    weight: Float[Tensor, "f n"]
    """A sample's weight over the size of the training set, or zero outside it."""
    bases: Sequence[Basis]
    variances: Float[Tensor, "f r"]
    """Those of the bases, padded with zeros to one length."""
    fold: Int[Tensor, " p"]
    strength: Float[Tensor, " p"]
    """Of the penalty beside the mean loss."""

    def keep(self, which: Bool[Tensor, " p"]) -> _Problems:
        return replace(self, fold=self.fold[which], strength=self.strength[which])

    def logits(self, theta: Float[Tensor, "p k r+1"]) -> Float[Tensor, "n k p"]:
        slopes, bias = self.x.new_empty(*theta.shape[:2], self.x.shape[1]), theta[..., -1].clone()
        for f, basis in enumerate(self.bases):
            mine, rank = self.fold == f, len(basis.variances)
            slopes[mine] = theta[mine, :, :rank] @ (basis.axes.mT / basis.scale)
            bias[mine] -= slopes[mine] @ basis.mean
        product: Tensor = (self.x @ slopes.permute(2, 1, 0).flatten(1)).unflatten(1, bias.mT.shape)
        return product.add_(bias.mT)

    def fit(self, logits: Float[Tensor, "n k p"]) -> _Fit:
        sample, weight = torch.arange(len(logits), device=logits.device), self.weight[self.fold].mT
        highest = logits.amax(1, keepdim=True)
        share = (logits - highest).exp_()
        total = share.sum(1, keepdim=True)
        missed = (total.log() + highest)[:, 0] - logits[sample, self.label]
        share.div_(total)
        curvature = (1 - share.square().sum(1)) / logits.shape[1]
        share[sample, self.label] -= 1
        return _Fit(
            loss=(missed * weight).sum(0),
            residual=share.mul_(weight[:, None]),
            curvature=(curvature * weight).sum(0),
        )

    def gradient(self, residual: Float[Tensor, "n k p"], theta: Float[Tensor, "p k r+1"]) -> Float[Tensor, "p k r+1"]:
        product = (self.x.mT @ residual.flatten(1)).unflatten(1, residual.shape[1:]).permute(2, 1, 0)
        out = self.strength[:, None, None] * theta
        out[..., -1] = residual.sum(0).mT
        for f, basis in enumerate(self.bases):
            mine, rank = self.fold == f, len(basis.variances)
            centred = product[mine] - out[mine, :, -1:] * basis.mean
            out[mine, :, :rank] += centred @ (basis.axes / basis.scale[:, None])
        return out

    def penalty(self, a: Float[Tensor, "p k r+1"], b: Float[Tensor, "p k r+1"]) -> Float[Tensor, " p"]:
        return self.strength * _dot(a[..., :-1], b[..., :-1]).flatten()

    def unsettled(
        self, theta: Float[Tensor, "p k r+1"], fit: _Fit, gradient: Float[Tensor, "p k r+1"]
    ) -> Bool[Tensor, " p"]:
        """Say which problems may still be far from their minimum.

        An objective with penalty strength s is at most |gradient|^2 / 2 s above its minimum.
        """
        objective = fit.loss + self.penalty(theta, theta) / 2
        excess = self.penalty(gradient, gradient) / (2 * self.strength**2)
        return (excess > _EXCESS * objective) | (gradient.abs().amax((1, 2)) > _STEEP)

    def precondition(self, gradient: Float[Tensor, "p k r+1"], fit: _Fit) -> Float[Tensor, "p k r+1"]:
        """Apply the inverse Hessian as it would be, did every sample and class have the average curvature.

        It spares badly conditioned features, as embeddings are, hundreds of iterations.
        """
        average = fit.curvature.clamp_min(1e-12)[:, None]
        hessian = torch.cat([average * self.variances[self.fold] + self.strength[:, None], average], dim=1)
        return gradient / hessian[:, None]


def _dot(a: Float[Tensor, "p k r"], b: Float[Tensor, "p k r"]) -> Float[Tensor, "p 1 1"]:
    return (a * b).sum((1, 2), keepdim=True)


def _lbfgs_direction(
    problems: _Problems, fit: _Fit, gradient: Float[Tensor, "p k r"], history: Sequence[tuple[Tensor, Tensor]]
) -> Float[Tensor, "p k r"]:
    """Guess the way to each minimum from past steps and the changes of gradient that they brought."""
    rates = [_dot(step, change).clamp_min(1e-300).reciprocal() for step, change in history]
    rest, used = gradient, []
    for (step, change), rate in zip(reversed(history), reversed(rates), strict=True):
        used.append(rate * _dot(step, rest))
        rest = rest - used[-1] * change
    direction = problems.precondition(rest, fit)
    if history:
        change = history[-1][1]
        scale = rates[-1] * _dot(change, problems.precondition(change, fit))
        direction = direction / scale.clamp_min(1e-300)
    for (step, change), rate, u in zip(history, rates, reversed(used), strict=True):
        direction = direction + (u - rate * _dot(change, direction)) * step
    return -direction


def _line_search(
    problems: _Problems,
    theta: Float[Tensor, "p k r"],
    direction: Float[Tensor, "p k r"],
    logits: Float[Tensor, "n k p"],
    fit: _Fit,
    gradient: Float[Tensor, "p k r"],
) -> tuple[Float[Tensor, "p k r"], Float[Tensor, "n k p"], _Fit]:
    """Shorten each problem's step until its objective falls enough; give the steps, and logits and fit there."""
    along = problems.logits(direction)
    slope = _dot(gradient, direction).flatten()
    linear, square = problems.penalty(theta, direction), problems.penalty(direction, direction)
    size = torch.ones_like(slope)
    for _ in range(_SHORTENINGS):
        there = torch.addcmul(logits, along, size)
        found = problems.fit(there)
        change = found.loss - fit.loss + size * linear + size**2 * square / 2
        short = change > 1e-4 * size * slope + 1e-14 * fit.loss
        if not short.any():
            break
        # The minimum of the parabola through what is known.
        size = torch.where(short, size * (-slope * size / (2 * (change - slope * size))).clamp(0.1, 0.5), size)
    return size[:, None, None] * direction, there, found
