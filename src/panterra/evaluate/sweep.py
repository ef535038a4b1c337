"""Probes at every learning rate, trained together in one pass over the features.

All members see the same batches, so what stands before their weights is computed once and their outputs are one matrix
product; gradients of a linear layer are written down rather than traced. Each member ends where it would end alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, Protocol, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from panterra.errors import InputError
from panterra.evaluate.ranking import ScoreCounts
from panterra.evaluate.readout import Readout
from panterra.evaluate.scoring import FIGURES, Answers, better
from panterra.train.optim import Plateau, Waited, wait

RATES = (1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1, 5e-1)
"""The published sweep (OlmoEarth)."""
FLOOR = 1e-5
"""Where the cosine ends."""
ALONE_EVERY = 50
"""Epochs between looks at the validation samples where no rate is swept (OlmoEarth)."""
WARM = 0.1
"""Share of the epochs in which the rate rises from 0."""
BETAS, EPS = (0.9, 0.999), 1e-8
MOMENTUM = 0.1
_ELEMENTS = 2**19
_READ = 2**18
_CACHED = 2**18
_PLATEAU = Plateau(figure="validation/loss", patience=10)
_RISE = 20
"""Epochs in which AnySat's cosine rises."""

Schedule = Literal["cosine", "epoch_cosine", "plateau"]
Standardise = Literal["batch", "layer", "none"]
Rate = TypeVar("Rate", float, Tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How probes are trained; as it stands, OlmoEarth's published sweep."""

    rates: tuple[float, ...] = RATES
    epochs: int = 50
    batch: int = 8
    weight_decay: float = 0.01
    schedule: Schedule = "cosine"
    check_every: int = 5
    """Epochs between looks at the validation samples; the best of these states is kept."""
    forget: bool = True
    """Whether AdamW's averages start anew after each look, as published."""
    patience: int | None = None
    """Looks without a better figure after which a member stops; None: never."""
    least_epochs: int = 0
    drop_last: bool = False
    """Whether an incomplete last batch is left out."""
    seed: int = 42


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """The features of some samples with their targets; `x` may lie on disk."""

    x: Tensor
    """Floating [N, D] or [N, h, w, D]; where a sample or cell has several vectors, [N, t, D] or [N, h, w, t, D]. NaN
    where there was no data."""
    y: Tensor
    """Integers [N] or [N, H, W], negative without a label; or float32 [N, K], [N] or [N, H, W], NaN without."""
    whole: bool = False
    """True where it is known that no number is missing."""

    def __len__(self) -> int:
        return len(self.y)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return (1, 1) if self.x.ndim < 4 else (self.x.shape[1], self.x.shape[2])

    def take(self, index: Int[np.ndarray, " k"]) -> Table:
        """Give some of the samples."""
        chosen = torch.as_tensor(np.asarray(index, np.int64))
        return replace(self, x=self.x[chosen], y=self.y[chosen])

    def to(self, device: torch.device | str) -> Table:
        """Move features and targets to a device."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def checked(self) -> Table:
        """Look once whether numbers are missing, instead of in every batch."""
        return replace(self, whole=not any(bool(part.isnan().any()) for part in self.x.split(1024)))

    def batches(self, dealt: tuple[Int[Tensor, " b"], ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """Give batch after batch to learn from, of which all but the last have as many samples; reads many at once."""
        size = len(dealt[0])
        some = max(1, _READ // (size * self.x[0].numel()))
        for start in range(0, len(dealt), some):
            x, y = self.batch(torch.cat(dealt[start : start + some]), learning=True)
            yield from zip(x.split(size), y.split(size), strict=True)

    def batch(self, index: Int[Tensor, " b"], *, learning: bool) -> tuple[Tensor, Tensor]:
        """Give some samples as grids of cells; of cells without data, whose numbers become 0, nothing is learned."""
        index = index.to(self.x.device)
        x, y = self.x.index_select(0, index), self.y.index_select(0, index)
        y = y if y.is_floating_point() else y.long()
        grid = x if x.ndim >= 4 else x[:, None, None]
        if self.whole:
            return grid, y
        lost = grid.isnan().any(-1)
        cells = lost.flatten(3).all(3) if lost.ndim > 3 else lost
        if learning and y.ndim == 3:
            under = F.interpolate(cells[:, None].float(), size=y.shape[1:])[:, 0] > 0
            y = y.masked_fill(under, torch.nan if y.is_floating_point() else -1)
        return (grid if lost.ndim > 3 else grid.masked_fill(lost[..., None], 0.0)), y


class Net(Protocol):
    """What is trained: M probes of one kind, whose parameters are the rows of a matrix."""

    def start(self, generator: torch.Generator) -> Float[Tensor, " p"]:
        """Draw the parameters that all members start from."""
        ...

    def outputs(self, theta: Float[Tensor, "m p"], x: Tensor, readout: Readout) -> Float[Tensor, "m o n"]:
        """Give the outputs for each cell, outside training; of a pair of classes their difference will do."""
        ...

    def gradient(self, theta: Float[Tensor, "m p"], x: Tensor, y: Tensor, readout: Readout) -> Float[Tensor, "m p"]:
        """Differentiate each member's loss on a batch."""
        ...

    def frozen(self) -> Self:
        """Give a copy that further training does not touch."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Linear:
    """A linear layer behind a standardisation with weights of its own (BatchNorm1d, LayerNorm) or none."""

    dim: int
    width: int
    """Outputs."""
    first: Standardise
    mean: Float[Tensor, " d"]
    variance: Float[Tensor, " d"]
    """What BatchNorm1d remembers; the same for all members, which see the same batches."""

    @classmethod
    def of(cls, table: Table, width: int, first: Standardise) -> Linear:
        """Make one for the features of a table that has seen nothing of them."""
        like = table.x[(0,) * (table.x.ndim - 1)]
        mean, variance = torch.zeros_like(like), torch.ones_like(like)
        return cls(dim=len(like), width=width, first=first, mean=mean, variance=variance)

    def start(self, generator: torch.Generator) -> Float[Tensor, " p"]:
        """Draw weights as torch's linear layer does; the standardisation starts at 1 and 0."""
        bound = 1 / math.sqrt(self.dim)
        drawn = torch.empty(self.width * (self.dim + 1)).uniform_(-bound, bound, generator=generator)
        plain = [] if self.first == "none" else [torch.ones(self.dim), torch.zeros(self.dim)]
        return torch.cat([drawn, *plain])

    def outputs(
        self, theta: Float[Tensor, "m p"], x: Float[Tensor, "b h w d"], readout: Readout
    ) -> Float[Tensor, "m o n"]:
        weight, bias = self._joined(theta, paired=readout.paired)
        return _read_off(weight, bias, self._standardise(x.flatten(0, 2), learning=False))

    @torch.inference_mode()
    def gradient(
        self, theta: Float[Tensor, "m p"], x: Float[Tensor, "b h w d"], y: Tensor, readout: Readout
    ) -> Float[Tensor, "m p"]:
        seen = self._standardise(x.flatten(0, 2), learning=True).view_as(x)
        weight, bias = self._joined(theta, paired=readout.paired)
        share = readout.share(y).to(x.dtype)
        # As many samples, then members, at a time as stay in the processor's cache; the Dice loss is of a whole batch.
        cells = max(x.shape[1:3].numel(), y[0].numel() // readout.side**2 if y.ndim == 3 else 1)
        one = weight.shape[1] * cells
        samples = len(x) if readout.dice is not None else min(len(x), max(1, _CACHED // one))
        members = max(1, _CACHED // (one * samples))
        slope, total = torch.zeros_like(weight), torch.zeros_like(bias)
        for part, labels in zip(seen.split(samples), y.split(samples), strict=True):
            aim, rows = readout.aim(labels, part.shape[:3], share), part.flatten(0, 2)
            for m in range(0, len(theta), members):
                some = slice(m, m + members)
                change = readout.residual(_read_off(weight[some], bias[some], rows), aim)
                slope[some].flatten(0, 1).addmm_(change.flatten(0, 1), rows)
                total[some] += change.sum(2)
        if readout.paired:
            slope, total = torch.cat([-slope, slope], dim=1), torch.cat([-total, total], dim=1)
        return self._shared_out(theta, slope, total)

    def _shared_out(
        self, theta: Float[Tensor, "m p"], slope: Float[Tensor, "m o d"], total: Float[Tensor, "m o"]
    ) -> Float[Tensor, "m p"]:
        """Turn the derivatives by the joined weights and biases into those by a member's own parameters."""
        if self.first == "none":
            return torch.cat([slope.flatten(1), total], dim=1)
        found = torch.empty_like(theta)
        (weight, _, gain, shift), (by_weight, by_bias, by_gain, by_shift) = self._parts(theta), self._parts(found)
        torch.mul(slope, gain[:, None], out=by_weight).addcmul_(total[..., None], shift[:, None])
        by_bias.copy_(total)
        torch.bmm(total[:, None], weight, out=by_shift[:, None])
        torch.sum(slope.mul_(weight), 1, out=by_gain)
        return found

    def frozen(self) -> Linear:
        return replace(self, mean=self.mean.clone(), variance=self.variance.clone())

    def _joined(
        self, theta: Float[Tensor, "m p"], *, paired: bool
    ) -> tuple[Float[Tensor, "m o d"], Float[Tensor, "m o"]]:
        """Take what stands before the layer into its weights and biases; of paired classes give the difference."""
        weight, bias, gain, shift = self._parts(theta)
        if paired:
            half = self.width // 2
            weight, bias = weight[:, half:] - weight[:, :half], bias[:, half:] - bias[:, :half]
        if self.first != "none":
            bias = torch.baddbmm(bias[..., None], weight, shift[..., None])[..., 0]
            weight = weight * gain[:, None]
        return weight, bias

    def _parts(self, theta: Float[Tensor, "m p"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        size, d = self.width * self.dim, self.dim
        weight, bias, rest = theta.tensor_split((size, size + self.width), dim=1)
        return weight.unflatten(1, (self.width, d)), bias, rest[:, :d], rest[:, d:]

    def _standardise(self, x: Float[Tensor, "n d"], *, learning: bool) -> Float[Tensor, "n d"]:
        if self.first == "layer":
            return F.layer_norm(x, (self.dim,))
        if self.first == "batch":
            if learning and len(x) < 2:
                raise InputError(
                    "a batch of one sample came to a probe behind a batch norm, which needs two; give more samples to "
                    "learn from, or a larger batch"
                )
            # Writes to mean and variance when learning.
            return F.batch_norm(x, self.mean, self.variance, training=learning, momentum=MOMENTUM)
        return x


def _read_off(
    weight: Float[Tensor, "m o d"], bias: Float[Tensor, "m o"], rows: Float[Tensor, "n d"]
) -> Float[Tensor, "m o n"]:
    out: Tensor = torch.addmm(bias.reshape(-1, 1), weight.flatten(0, 1), rows.mT).view(*bias.shape, len(rows))
    return out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """One trained probe."""

    rate: float
    epoch: int
    """After which it did best on the validation samples."""
    score: float
    """There; higher is better."""
    theta: Float[Tensor, "1 p"]
    net: Net


def train_together(train: Table, val: Table, net: Net, readout: Readout, metric: str, recipe: Recipe) -> list[Member]:
    """Train one probe per learning rate, each kept as it did best on the validation samples.

    Tables must lie where the computing is to be done.
    """
    if not len(train) or not len(val):
        raise InputError(f"{len(train)} samples to learn from and {len(val)} to validate with; wanted some of each")
    train, val = train.checked(), val.checked()
    generator = torch.Generator().manual_seed(recipe.seed)
    theta = net.start(generator).to(train.x).repeat(len(recipe.rates), 1)
    adam = Adam(theta, recipe.weight_decay)
    best: dict[int, Member] = {}
    waited = np.zeros(len(recipe.rates), np.int64)
    running = np.ones(len(recipe.rates), bool)
    fallen = [Waited() for _ in recipe.rates]
    for epoch in range(recipe.epochs):
        rates = [rate * last.share for rate, last in zip(recipe.rates, fallen, strict=True)]
        dealt = shuffled(len(train), recipe, generator)
        for number, (x, y) in enumerate(train.batches(dealt)):
            now = epoch + number / len(dealt)
            adam.step(net.gradient(theta, x, y, readout), [rates_at(now, rate, recipe) for rate in rates])
        if (epoch + 1) % recipe.check_every and epoch + 1 < recipe.epochs:
            continue
        scores, loss = judge(theta, net, val, readout, metric, with_loss=recipe.schedule == "plateau")
        if recipe.schedule == "plateau":
            fallen = [wait(last, figure, _PLATEAU) for last, figure in zip(fallen, loss.tolist(), strict=True)]
        for m in (int(m) for m in np.flatnonzero(running)):
            waited[m] += 1
            if m not in best or scores[m] > best[m].score:
                kept = theta[m : m + 1].clone()
                best[m] = Member(rate=recipe.rates[m], epoch=epoch + 1, score=scores[m], theta=kept, net=net.frozen())
                waited[m] = 0
        if recipe.patience is not None and epoch + 1 >= recipe.least_epochs:
            running &= waited < recipe.patience
        if not running.any():
            break
        if recipe.forget:
            adam = Adam(theta, recipe.weight_decay)
    return [best[m] for m in sorted(best)]


def answers(member: Member, table: Table, readout: Readout) -> Answers:
    """Give what a probe says of samples."""
    sums, shares, truths = [], [], []
    pixels = ScoreCounts(classes=readout.classes) if readout.task == "segmentation" else None
    for raw, y, grid in _read(member.theta, member.net, table, readout):
        (found,) = readout.sums(raw, y, grid)
        sums.append(found.sum(0, keepdims=True) if readout.task == "classification" else found)
        if readout.task == "multilabel":
            known = y.isfinite().all(1)
            shares.append(raw[0].mT[known].sigmoid().cpu().numpy())
            truths.append(y[known].cpu().numpy() > 0.5)
        elif readout.task == "classification":
            share, truth = (part[y >= 0].cpu() for part in readout.shares(raw, y, grid))
            shares.append(share.numpy())
            truths.append(F.one_hot(truth, readout.classes).numpy() > 0)
        elif pixels is not None:
            pixels.add(*readout.shares(raw, y, grid))
    return Answers(
        task=readout.task,
        sums=np.concatenate(sums),
        scores=np.concatenate(shares) if shares else None,
        truth=np.concatenate(truths) if truths else None,
        pixels=pixels,
    )


def judge(
    theta: Float[Tensor, "m p"], net: Net, table: Table, readout: Readout, metric: str, *, with_loss: bool = False
) -> tuple[list[float], Float[Tensor, " m"]]:
    """Score every member, higher is better, and give its mean loss where wanted."""
    total: np.ndarray | float = 0.0
    loss, count = theta.new_zeros(len(theta)), 0.0
    for raw, y, grid in _read(theta, net, table, readout):
        total = total + readout.totals(raw, y, grid)
        if with_loss:
            part, number = readout.loss(raw, y, grid)
            loss, count = loss + part, count + number
    figure = FIGURES[readout.task][metric]
    return [better(metric, float(figure(t))) for t in np.asarray(total)], loss / max(count, 1e-12)


def _read(
    theta: Float[Tensor, "m p"], net: Net, table: Table, readout: Readout
) -> Iterator[tuple[Tensor, Tensor, Sequence[int]]]:
    """Read off all members, as many samples at a time as memory allows."""
    rows, cols = table.grid
    pixels = table.y[0].numel() if table.y.ndim == 3 else 1
    width = len(theta) * readout.classes * max(pixels, rows * cols * readout.side**2)
    for index in torch.arange(len(table)).split(max(1, _ELEMENTS // width)):
        x, y = table.batch(index, learning=False)
        yield net.outputs(theta, x, readout), y, x.shape[:3]


class Adam:
    """AdamW over the rows of a matrix, each with its own rate, changed in place."""

    def __init__(self, theta: Float[Tensor, "m p"], weight_decay: float) -> None:
        self.rows = [torch.nn.Parameter(row, requires_grad=False) for row in theta.unbind()]
        self.means, self.squares = torch.zeros_like(theta).unbind(), torch.zeros_like(theta).unbind()
        self.weight_decay, self.steps = weight_decay, torch.zeros((), device=theta.device)
        self.public: torch.optim.Optimizer | None = None
        if not _has_fused_adamw():
            groups = [{"params": [row]} for row in self.rows]
            self.public = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, weight_decay=weight_decay, fused=True)

    @torch.inference_mode()
    def step(self, gradient: Float[Tensor, "m p"], rates: Sequence[float]) -> None:
        if self.public is not None:
            for group, row, slope, rate in zip(
                self.public.param_groups, self.rows, gradient.unbind(), rates, strict=True
            ):
                row.grad, group["lr"] = slope, rate
            self.public.step()
            return
        self.steps += 1
        state = zip(self.rows, gradient.unbind(), self.means, self.squares, rates, strict=True)
        for row, slope, mean, square, rate in state:
            _fused_adamw(row, slope, mean, square, self.steps, rate, self.weight_decay)


def _fused_adamw(
    row: Tensor, slope: Tensor, mean: Tensor, square: Tensor, steps: Tensor, rate: float, weight_decay: float
) -> None:
    """Make the step of torch.optim.AdamW(fused=True) without looking everything up anew, which takes as long again."""
    torch._fused_adamw_(
        [row],
        [slope],
        [mean],
        [square],
        [],
        [steps],
        lr=rate,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=weight_decay,
        eps=EPS,
        amsgrad=False,
        maximize=False,
    )


@lru_cache(maxsize=1)
def _has_fused_adamw() -> bool:
    """Say whether this torch's private function is there, and does what the public optimiser does."""
    row, slope = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    public = torch.nn.Parameter(row.clone())
    public.grad = slope.clone()
    torch.optim.AdamW([public], lr=0.1, betas=BETAS, eps=EPS, weight_decay=0.1, fused=True).step()
    try:
        _fused_adamw(row, slope, torch.zeros(2), torch.zeros(2), torch.ones(()), 0.1, 0.1)
    except (AttributeError, TypeError, RuntimeError):
        return False
    return torch.equal(row, public.detach())


def shuffled(count: int, recipe: Recipe, generator: torch.Generator) -> tuple[Int[Tensor, " b"], ...]:
    """Deal samples into batches anew; a single last sample, which has no statistics, is left out."""
    batches: tuple[Tensor, ...] = torch.randperm(count, generator=generator).split(recipe.batch)
    short = len(batches[-1]) < recipe.batch and (recipe.drop_last or len(batches[-1]) == 1)
    return batches[:-1] if short and len(batches) > 1 else batches


def rates_at(epoch: float, rates: Rate, recipe: Recipe) -> Rate:
    """Give a learning rate, or several, at a fractional epoch.

    cosine (OlmoEarth): from 0 over a tenth of the epochs, then down to `FLOOR` along half a cosine, batch by batch.
    epoch_cosine (AnySat): from 0 over the first 20 epochs, then down to 0, epoch by epoch; its first epoch has rate 0.
    """
    if recipe.schedule == "plateau":
        return rates
    if recipe.schedule == "epoch_cosine":
        whole = int(epoch)
        if whole < _RISE:
            return rates * (whole / (_RISE - 1))
        return rates * (0.5 * (1 + math.cos(math.pi * (whole - _RISE) / max(recipe.epochs - _RISE, 1))))
    warm = WARM * recipe.epochs
    if epoch < warm:
        return rates * (epoch / warm)
    return FLOOR + (rates - FLOOR) * (0.5 * (1 + math.cos(math.pi * (epoch - warm) / (recipe.epochs - warm))))
