"""What the outputs of a probe mean: which classes or values, of which pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from panterra.evaluate.dice import dice_slopes
from panterra.evaluate.scoring import Task, sums_of

Grid = Sequence[int]
"""Samples, rows and columns of cells."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Aim:
    """The labels of a batch as its loss sees them, which is the same for all probes.

    By an output a loss rises by `scale` times what the probe says (a share of a class, or a value) plus `shift`.
    """

    y: Tensor
    grid: Grid
    scale: Float[Tensor, "#k s"]
    shift: Float[Tensor, "k s"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Readout:
    """How M probes' outputs for N cells, class by class and then pixel by pixel of a cell, are read.

    Cells stand last, and so do the S labels that outputs are brought to, so that all classes of many labels are gone
    through without strides. Where the labels are no whole number of pixels per cell, outputs are resized to them
    bilinearly with aligned corners (OlmoEarth).
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

    @property
    def paired(self) -> bool:
        """Whether there are two classes, so that how much higher the second stands may come instead of both."""
        return self._exclusive and self.classes == 2

    def share(self, y: Tensor) -> Float[Tensor, ""]:
        """Give the share of one label, of a class that counts once, in a mean over all there are."""
        weight = self._weight(y)
        # Counting is many times faster than adding ones up.
        total = weight.double().sum() if weight.is_floating_point() else weight.sum().double()
        return total.clamp(min=1e-12).reciprocal()

    def aim(self, y: Tensor, grid: Grid, share: Float[Tensor, ""]) -> Aim:
        """Prepare labels for `residual`; `share` is that of one of them, which may be a part of a batch."""
        truth = self._laid(y, grid)
        weight = self._weight(truth).to(share.dtype) * share
        if self._exclusive:
            zeros = weight.new_zeros(self.classes, weight.shape[1])
            return Aim(y=y, grid=grid, scale=weight, shift=zeros.scatter_(0, truth.clamp(min=0), -weight))
        wanted = truth.nan_to_num()
        if self.task == "multilabel":
            more = 0.0 if self.class_weights is None else wanted * (self.class_weights.to(weight)[:, None] - 1)
            return Aim(y=y, grid=grid, scale=weight * (1 + more), shift=-weight * (wanted + more))
        return Aim(y=y, grid=grid, scale=2 * weight, shift=-2 * weight * (wanted - self.centre) / self.spread)

    def residual(self, raw: Float[Tensor, "m o n"], aim: Aim) -> Float[Tensor, "m o n"]:
        """Differentiate each probe's mean loss over what is labelled by its outputs.

        Cross-entropy for classes, the binary one for each of several labels, squared error for values.
        """
        z = self._at_labels(raw, aim.y, aim.grid)
        given = z.shape[1]
        if self.dice is not None:
            z = self._both(z)
        # Of two classes one share says all.
        alone = self.task == "multilabel" or (self.paired and z.shape[1] == 1)
        said = z.sigmoid() if alone else z.softmax(1) if self._exclusive else self._values(z)
        again = None if said is z or self.dice is not None else said
        change = torch.addcmul(aim.shift[-z.shape[1] :], said, aim.scale, out=again)
        if self.softplus:
            change *= z.sigmoid()
        if self.dice is not None:
            change = (change + self._dice_change(said, self._laid(aim.y, aim.grid), self.dice.to(z)))[:, -given:]
        return self._back(change, aim.y, aim.grid)

    def loss(self, raw: Float[Tensor, "m o n"], y: Tensor, grid: Grid) -> tuple[Float[Tensor, " m"], float]:
        """Sum each probe's loss over what is labelled, and what the labels weigh; without the Dice loss."""
        z, truth = self._at_labels(raw, y, grid), self._laid(y, grid)
        weight = self._weight(truth)
        if self._exclusive:
            index = truth.clamp(min=0).long().expand(len(z), 1, -1)
            each = -self._both(z).log_softmax(1).gather(1, index)
        elif self.task == "multilabel":
            more = None if self.class_weights is None else self.class_weights.to(z)[:, None]
            wanted = truth.nan_to_num().to(z).expand_as(z)
            each = F.binary_cross_entropy_with_logits(z, wanted, pos_weight=more, reduction="none")
        else:
            each = (self._values(z) - (truth.nan_to_num() - self.centre) / self.spread).square()
        return (each * weight).sum((1, 2)), float(weight.sum())

    def answer(self, raw: Float[Tensor, "m o n"], y: Tensor, grid: Grid) -> Tensor:
        """Give codes, labels or values of each probe in the shape of the targets, [m, *y.shape]."""
        z = self._at_labels(raw, y, grid)
        if self.task == "multilabel":
            return (z > 0).mT
        said = _highest(z) if self._exclusive else self._values(z)[:, 0] * self.spread + self.centre
        if y.ndim < 3:
            return said
        if self._fits(y, grid):
            size = dict(zip("bhw", grid, strict=True))
            return rearrange(said, "m (i j b h w) -> m b (h i) (w j)", i=self.side, j=self.side, **size)
        return rearrange(said, "m (y b x) -> m b y x", y=y.shape[1], x=y.shape[2])

    def shares(self, raw: Float[Tensor, "1 o n"], y: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Give one probe's probabilities of the classes [s, k] of samples or pixels, and their classes [s]."""
        z = self._both(self._at_labels(raw, y, grid))
        return z[0].softmax(0).mT, self._laid(y, grid)[0]

    def sums(self, raw: Float[Tensor, "m o n"], y: Tensor, grid: Grid) -> list[np.ndarray]:
        """Count for each probe what figures are made of (`scoring.sums_of`), sample by sample."""
        said, truth = self.answer(raw, y, grid).cpu().numpy(), y.cpu().numpy()
        return [sums_of(self.task, s, truth, classes=self.classes, centre=self.centre) for s in said]

    def totals(self, raw: Float[Tensor, "m o n"], y: Tensor, grid: Grid) -> np.ndarray:
        """Count the same over all samples, [m, ...]."""
        if not self._exclusive:
            return np.stack([each.sum(0) for each in self.sums(raw, y, grid)])
        k = self.classes
        z, truth = self._at_labels(raw, y, grid), self._laid(y.int(), grid)
        if z.shape[1] < k:
            there = (truth == torch.arange(2, device=y.device)[:, None]).float()
            second = (z[:, 0] > 0).float() @ there.mT
            return torch.stack([there.sum(1) - second, second], dim=2).long().cpu().numpy()
        code = _highest(z)
        # What has no label is counted in a row of its own, which is left out.
        first = torch.where(truth < 0, k, truth) * k
        member = torch.arange(len(code), dtype=torch.int32, device=y.device)[:, None] * (k * (k + 1))
        counts = torch.bincount((first + member + code).flatten(), minlength=len(code) * (k + 1) * k)
        found: np.ndarray = counts.view(len(code), k + 1, k)[:, :k].cpu().numpy()
        return found

    @property
    def _exclusive(self) -> bool:
        return self.task in ("classification", "segmentation")

    def _both(self, z: Float[Tensor, "m k s"]) -> Float[Tensor, "m k s"]:
        """Give outputs for both classes where their difference came."""
        return F.pad(z, (0, 0, 1, 0)) if self.paired and z.shape[1] == 1 else z

    def _fits(self, y: Tensor, grid: Grid) -> bool:
        """Tell whether labels are a whole number of pixels per cell."""
        return y.shape[1:] == (grid[1] * self.side, grid[2] * self.side)

    def _laid(self, y: Tensor, grid: Grid) -> Tensor:
        """Lay targets out as outputs are at the labels: [1, s], or [k, s] of several labels."""
        if y.ndim < 3:
            return y.mT if self.task == "multilabel" else y[None]
        if self._fits(y, grid):
            laid: Tensor = rearrange(y, "b (h i) (w j) -> 1 (i j b h w)", i=self.side, j=self.side)
            return laid
        return y.movedim(0, 1).reshape(1, -1)

    def _at_labels(self, raw: Float[Tensor, "m o n"], y: Tensor, grid: Grid) -> Float[Tensor, "m k s"]:
        """Bring outputs to the labels."""
        (b, h, w), r = grid, self.side
        if y.ndim < 3:
            return raw
        if self._fits(y, grid):
            fitting: Tensor = raw.unflatten(1, (-1, r * r)).flatten(2)
            return fitting
        rows, cols = _resizing(h * r, y.shape[1], raw), _resizing(w * r, y.shape[2], raw)
        image = rearrange(raw, "m (k i j) (b h w) -> m k (h i) b (w j)", b=b, h=h, i=r, j=r)
        return torch.flatten(rows @ (image @ cols.mT).flatten(3), 2)

    def _back(self, change: Float[Tensor, "m k s"], y: Tensor, grid: Grid) -> Float[Tensor, "m o n"]:
        (b, h, w), r = grid, self.side
        if y.ndim < 3:
            return change
        if self._fits(y, grid):
            fitting: Tensor = change.unflatten(2, (r * r, -1)).flatten(1, 2)
            return fitting
        rows, cols = _resizing(h * r, y.shape[1], change), _resizing(w * r, y.shape[2], change)
        image = rows.mT @ (change.unflatten(2, (y.shape[1], b, y.shape[2])) @ cols).flatten(3)
        laid: Tensor = rearrange(image, "m k (h i) (b w j) -> m (k i j) (b h w)", b=b, i=r, j=r, w=w)
        return laid

    def _known(self, y: Tensor) -> Tensor:
        return y >= 0 if self._exclusive else y.isfinite()

    def _weight(self, y: Tensor) -> Tensor:
        """Tell how much each label counts: nothing where there is none."""
        if self.class_weights is None or not self._exclusive:
            return self._known(y)
        return self.class_weights[y.clamp(min=0)] * self._known(y)

    def _dice_change(
        self, share: Float[Tensor, "m k s"], truth: Tensor, weights: Float[Tensor, " k"]
    ) -> Float[Tensor, "m k s"]:
        """Differentiate the Dice loss of a batch by the outputs at the labels."""
        known = self._known(truth).to(share)
        there = torch.zeros_like(share[0]).scatter_(0, truth.clamp(min=0).long(), known)
        both, found = torch.einsum("mks,ks->mk", share, there), torch.einsum("mks,s->mk", share, known[0])
        here, elsewhere = dice_slopes(torch.stack([both, found, there.sum(1).expand_as(both)]), weights)
        slope = torch.where(there > 0, here[..., None], elsewhere[..., None]) * known
        return share * (slope - (share * slope).sum(1, keepdim=True))

    def _values(self, z: Tensor) -> Tensor:
        return F.softplus(z) if self.softplus else z


def _highest(z: Float[Tensor, "m k s"]) -> Int[Tensor, "m s"]:
    """Find the highest class, the first of equals; many times faster than argmax along an inner axis."""
    if z.shape[1] == 1:
        return (z[:, 0] > 0).byte()
    last = z.shape[1] - 1
    after = torch.arange(last, -1, -1, dtype=torch.uint8 if last < 256 else torch.int32, device=z.device)
    return last - ((z == z.amax(1, keepdim=True)) * after[:, None]).amax(1)


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
