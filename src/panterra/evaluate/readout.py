"""What the outputs of a probe mean: which classes or values, of which pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from panterra.evaluate.dice import dice_slopes
from panterra.evaluate.scoring import Task, sums_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Readout:
    """How M probes' outputs for the cells of a sample, class by class and then pixel by pixel, are read.

    Where the labels are no whole number of pixels per cell, outputs are resized to them bilinearly with aligned corners
    (OlmoEarth).
    """

    task: Task
    classes: int
    """Of what is told apart; 1 for values."""
    side: int = 1
    """Pixels that a cell says something of, along a side."""
    softplus: bool = False
    """Whether values are the softplus of outputs (AnySat's biomass)."""
    centre: float = 0.0
    spread: float = 1.0
    """Mean and standard deviation of the values learned from, which outputs are counted in."""
    class_weights: Float[Tensor, " k"] | None = None
    """How much a label of each class counts; of several labels, the presence of each."""
    dice: Float[Tensor, " k"] | None = None
    """How much each class counts in a Dice loss beside the cross-entropy of a segmentation, if there is one."""

    @property
    def outputs(self) -> int:
        """Outputs of a probe for one cell."""
        return self.classes * self.side**2

    def residual(
        self,
        raw: Float[Tensor, "n m o"],
        y: Tensor,
        grid: Sequence[int],
        share: Float[Tensor, ""] | None = None,
        overlap: Float[Tensor, "3 m k"] | None = None,
    ) -> Float[Tensor, "n m o"]:
        """Differentiate each probe's mean loss over what is labelled by its outputs; `grid` is samples, rows, columns.

        Cross-entropy for classes, the binary one for each of several labels, squared error for values. `share` is that
        of one label in the mean, and `overlap` sums up the batch, where these samples are a part of it.
        """
        z, truth = self._at_labels(raw, y, grid)
        if self.dice is not None and overlap is None:
            overlap = self._overlap(z, truth)
        return self._back(self._loss_gradient(z, truth, self.share(y) if share is None else share, overlap), y, grid)

    def share(self, y: Tensor) -> Float[Tensor, ""]:
        """Give the share of one label, of a class that counts once, in a mean over all there are."""
        return self._weight(y).sum(dtype=torch.float64).clamp(min=1e-12).reciprocal()

    def overlap(self, raw: Float[Tensor, "n m o"], y: Tensor, grid: Sequence[int]) -> Float[Tensor, "3 m k"]:
        """Sum what the Dice loss is made of (`dice.dice_of`) over labelled pixels."""
        return self._overlap(*self._at_labels(raw, y, grid))

    def loss(self, raw: Float[Tensor, "n m o"], y: Tensor, grid: Sequence[int]) -> tuple[Float[Tensor, " m"], float]:
        """Sum each probe's loss over what is labelled, and what the labels weigh; without the Dice loss."""
        z, truth = self._at_labels(raw, y, grid)
        weight = self._weight(truth)
        if self.task in ("classification", "segmentation"):
            picked = z.log_softmax(2).gather(2, _index(truth).expand(-1, z.shape[1], -1, -1))[:, :, 0]
            return -(picked * weight[:, None]).sum((0, 2)), float(weight.sum())
        y_ = truth.nan_to_num()[:, None]
        if self.task == "multilabel":
            more = None if self.class_weights is None else self.class_weights.to(z)[:, None]
            each = F.binary_cross_entropy_with_logits(z, y_.expand_as(z), pos_weight=more, reduction="none")
        else:
            each = (self._values(z) - (y_ - self.centre) / self.spread).square()
        return (each * weight[:, None]).sum((0, 2, 3)), float(weight.sum())

    def answer(self, raw: Float[Tensor, "n m o"], y: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Give codes [b, m, p], labels [b, m, k] or values [b, m, p], and the targets in the same order."""
        z, truth = self._at_labels(raw, y, (*grid,))
        samples = grid[0]
        if self.task == "multilabel":
            return z[..., 0] > 0, truth[..., 0]
        said = _highest(z) if self.task != "regression" else self._values(z)[:, :, 0] * self.spread + self.centre
        truth = truth[:, 0] if self.task == "regression" else truth
        if len(said) == samples:
            return said, truth
        cells = len(said) // samples
        return rearrange(said, "(b c) m p -> b m (c p)", c=cells), rearrange(truth, "(b c) p -> b (c p)", c=cells)

    def shares(self, raw: Float[Tensor, "n 1 o"], y: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Give one probe's probabilities of the classes [s, k] of samples or pixels, and their classes [s]."""
        z, truth = self._at_labels(raw, y, grid)
        return z[:, 0].softmax(1).movedim(1, -1).flatten(0, 1), truth.flatten()

    def sums(self, raw: Float[Tensor, "n m o"], y: Tensor, grid: Sequence[int]) -> list[np.ndarray]:
        """Count for each probe what figures are made of (`scoring.sums_of`), sample by sample."""
        said, truth = (t.cpu().numpy() for t in self.answer(raw, y, grid))
        shape = truth.shape if self.task != "classification" else truth.shape[:1]
        return [
            sums_of(self.task, s.reshape(shape), truth.reshape(shape), classes=self.classes, centre=self.centre)
            for s in said.swapaxes(0, 1)
        ]

    def _at_labels(
        self, raw: Float[Tensor, "n m o"], y: Tensor, grid: Sequence[int]
    ) -> tuple[Float[Tensor, "u m k p"], Tensor]:
        """Bring outputs and targets together: units are cells, or whole samples where outputs are resized."""
        (b, h, w), m, k, r = grid, raw.shape[1], self.classes, self.side
        if y.ndim < 3:
            truth = y[:, :, None] if self.task == "multilabel" else y[:, None]
            return raw.unflatten(2, (k, 1)), truth if self.task != "regression" else truth[:, None]
        if y.shape[1:] == (h * r, w * r):
            z, truth = raw.unflatten(2, (k, r * r)), rearrange(y, "b (h i) (w j) -> (b h w) (i j)", i=r, j=r)
        else:
            rows, cols = _resizing(h * r, y.shape[1], raw), _resizing(w * r, y.shape[2], raw)
            image = rearrange(raw, "(b h w) m (k i j) -> b m k (h i) (w j)", b=b, h=h, k=k, i=r)
            z, truth = (rows @ image @ cols.mT).flatten(3), y.flatten(1)
        assert z.shape[1] == m
        return z, truth if self.task != "regression" else truth[:, None]

    def _back(self, change: Float[Tensor, "u m k p"], y: Tensor, grid: Sequence[int]) -> Float[Tensor, "n m o"]:
        (_, h, w), r = grid, self.side
        if y.ndim < 3 or y.shape[1:] == (h * r, w * r):
            return change.flatten(2)
        rows, cols = _resizing(h * r, y.shape[1], change), _resizing(w * r, y.shape[2], change)
        image = rows.mT @ change.unflatten(3, y.shape[1:]) @ cols
        laid: Tensor = rearrange(image, "b m k (h i) (w j) -> (b h w) m (k i j)", i=r, j=r)
        return laid

    def _known(self, y: Tensor) -> Tensor:
        return y >= 0 if self.task in ("classification", "segmentation") else y.isfinite()

    def _weight(self, y: Tensor) -> Tensor:
        """Tell how much each label counts: nothing where there is none."""
        if self.class_weights is None or self.task not in ("classification", "segmentation"):
            return self._known(y).float()
        return self.class_weights[y.clamp(min=0)] * self._known(y)

    def _overlap(self, z: Float[Tensor, "u m k p"], truth: Tensor) -> Float[Tensor, "3 m k"]:
        share = z.softmax(2).mul_(self._known(truth)[:, None, None])
        there = _one_hot(truth, self.classes).to(z) * self._known(truth)[:, None, None]
        both = torch.einsum("umkp,ukp->mk", share, there[:, 0])
        return torch.stack([both, share.sum((0, 3)), there.sum((0, 3)).expand_as(both)])

    def _loss_gradient(
        self,
        z: Float[Tensor, "u m k p"],
        truth: Tensor,
        share: Float[Tensor, ""],
        overlap: Float[Tensor, "3 m k"] | None,
    ) -> Float[Tensor, "u m k p"]:
        weight = self._weight(truth).to(z.dtype) * share.to(z.dtype)
        if self.task in ("classification", "segmentation"):
            wanted = _one_hot(truth, self.classes).to(z)
            p = z.softmax(2)
            if self.dice is None:
                return p.sub_(wanted).mul_(weight[:, None, None])
            assert overlap is not None
            here, elsewhere = (part[..., None] for part in dice_slopes(overlap, self.dice.to(z)))
            slope = torch.where(wanted > 0, here, elsewhere) * self._known(truth)[:, None, None]
            through = p * (slope - (p * slope).sum(2, keepdim=True))
            return p.sub_(wanted).mul_(weight[:, None, None]).add_(through)
        weight = weight[:, None]
        wanted = truth.nan_to_num()[:, None]
        if self.task == "multilabel":
            if self.class_weights is None:
                return z.sigmoid().sub_(wanted).mul_(weight)
            more = wanted * (self.class_weights.to(z)[:, None] - 1)
            return z.sigmoid().mul_(1 + more).sub_(wanted + more).mul_(weight)
        change = 2 * (self._values(z) - (wanted - self.centre) / self.spread) * weight
        return change * z.sigmoid() if self.softplus else change

    def _values(self, z: Tensor) -> Tensor:
        return F.softplus(z) if self.softplus else z


def _highest(z: Float[Tensor, "u m k p"]) -> Tensor:
    """Find the highest class, the first of equals; many times faster than argmax along an inner axis."""
    if z.shape[3] == 1:
        return z.argmax(2)
    top, code = z[:, :, 0].clone(), torch.zeros_like(z[:, :, 0], dtype=torch.int16)
    for k in range(1, z.shape[2]):
        code.masked_fill_(z[:, :, k] > top, k)
        torch.maximum(top, z[:, :, k], out=top)
    return code


def _one_hot(truth: Tensor, classes: int) -> Float[Tensor, "u 1 k p"]:
    """Mark the class of each label, [u, p]; where there is none, the first."""
    zeros = torch.zeros(len(truth), 1, classes, *truth.shape[1:], device=truth.device)
    return zeros.scatter_(2, _index(truth), 1.0)


def _index(truth: Tensor) -> Tensor:
    return truth.clamp(min=0)[:, None, None]


def _resizing(before: int, after: int, like: Tensor) -> Float[Tensor, "after before"]:
    return _interpolation(before, after, like.device, like.dtype)


@lru_cache(maxsize=16)
def _interpolation(before: int, after: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "after before"]:
    """Write bilinear interpolation with aligned corners along one axis as a matrix."""
    if after == 1 or before == 1:
        # What interpolate does with a single row: it takes the first.
        matrix = torch.zeros(after, before, device=device, dtype=dtype)
        matrix[:, 0] = 1
        return matrix
    each = torch.eye(before, device=device, dtype=dtype)[:, None]
    return F.interpolate(each, size=after, mode="linear", align_corners=True)[:, 0].mT.contiguous()
