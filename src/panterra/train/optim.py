"""How parameters are updated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from panterra.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Plateau:
    """Lower the learning rate where a figure has stopped falling."""

    figure: str
    """Of a check, as "validation/loss"."""
    patience: int
    """How often in a row it may be no better than the best."""
    factor: float = 0.1
    """What the learning rate is multiplied by then."""
    margin: float = 1e-4
    """By which share of the best it must be lower to count as better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waited:
    """What is known of a plateau."""

    best: float | None = None
    times: int = 0
    """How often in a row the figure was no better."""
    share: float = 1.0
    """Of the learning rate that is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimisation:
    """AdamW and its schedule; the defaults are those of all published runs (OlmoEarth)."""

    lr: float
    """The peak."""
    weight_decay: float
    """Of every trainable parameter, biases and norms included."""
    steps: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 8000
    final_share: float = 0.1
    """Of the peak, reached with the last step."""
    clip_norm: float | None = 1.0
    """Of all gradients together; None leaves them as they are."""
    plateau: Plateau | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.warmup_steps <= self.steps:
            raise InputError(
                f"{self.steps} steps with {self.warmup_steps} of warm-up came; give one step or more, and warmup_steps"
                " from 0 to steps"
            )


def learning_rate(step: int, optimisation: Optimisation) -> float:
    """Give the learning rate of a step, counted from 1: linear from 0 to the peak, then half a cosine."""
    warmup = optimisation.warmup_steps
    if step < warmup:
        return optimisation.lr * step / warmup
    progress = (step - warmup) / max(optimisation.steps - warmup, 1)
    share = optimisation.final_share
    return optimisation.lr * (share + (1 - share) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)


def wait(waited: Waited, figure: float, plateau: Plateau) -> Waited:
    """Take in the figure of one more check."""
    if waited.best is None or figure < waited.best * (1 - plateau.margin):
        return replace(waited, best=figure, times=0)
    if waited.times < plateau.patience:
        return replace(waited, times=waited.times + 1)
    return replace(waited, times=0, share=waited.share * plateau.factor)


def make_optimiser(module: nn.Module, optimisation: Optimisation) -> torch.optim.AdamW:
    """Make an AdamW of all trainable parameters, one fused kernel where the device has it."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    return torch.optim.AdamW(
        weights,
        lr=optimisation.lr,
        betas=optimisation.betas,
        eps=optimisation.eps,
        weight_decay=optimisation.weight_decay,
        fused=all(weight.device.type in ("cpu", "cuda") for weight in weights),
    )
