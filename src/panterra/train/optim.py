"""How parameters are updated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

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
    """The optimiser and its schedule; the defaults are those of all published runs (OlmoEarth)."""

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
    restart_step: int | None = None
    """After which the cosine begins once more (Loshchilov and Hutter 2017), at `restart_share` of the peak."""
    restart_share: float = 0.5
    clip_norm: float | None = 1.0
    """Of all gradients together; None leaves them as they are."""
    plateau: Plateau | None = None
    method: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of transformer blocks by Muon (Jordan et al. 2024) with steps as large as AdamW's (Liu et al.
    2025), everything else by AdamW. Needs torch 2.9, and whole matrices: not FSDP."""

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.warmup_steps <= self.steps:
            raise InputError(
                f"{self.steps} steps with {self.warmup_steps} of warm-up came; give one step or more, and warmup_steps"
                " from 0 to steps"
            )
        if self.restart_step is not None and not self.warmup_steps <= self.restart_step < self.steps:
            raise InputError(
                f"restart_step={self.restart_step} came; give one from warmup_steps ({self.warmup_steps}) to below"
                f" steps ({self.steps})"
            )


def learning_rate(step: int, optimisation: Optimisation) -> float:
    """Give the learning rate of a step, counted from 1: linear from 0 to the peak, then half a cosine, or two."""
    first, last, high = optimisation.warmup_steps, optimisation.steps, 1.0
    if step < first:
        return optimisation.lr * step / first
    restart = optimisation.restart_step
    if restart is not None and step <= restart:
        last = restart
    elif restart is not None:
        first, high = restart, optimisation.restart_share
    progress = (step - first) / max(last - first, 1)
    low = optimisation.final_share
    return optimisation.lr * (low + (high - low) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)


def wait(waited: Waited, figure: float, plateau: Plateau) -> Waited:
    """Take in the figure of one more check."""
    if waited.best is None or figure < waited.best * (1 - plateau.margin):
        return replace(waited, best=figure, times=0)
    if waited.times < plateau.patience:
        return replace(waited, times=waited.times + 1)
    return replace(waited, times=0, share=waited.share * plateau.factor)


def make_optimisers(module: nn.Module, optimisation: Optimisation) -> tuple[torch.optim.Optimizer, ...]:
    """Make an AdamW of all trainable parameters, one fused kernel where the device has it; for muon, one of each kind.

    Raises InputError where Muon cannot be had.
    """
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    matrices = {}
    if optimisation.method == "muon":
        matrices = {name: weight for name, weight in weights.items() if ".blocks." in name and weight.ndim == 2}
        if not hasattr(torch.optim, "Muon"):
            raise InputError(f"Muon came with torch 2.9; this is {torch.__version__}: install a newer one")
        if any(isinstance(weight, DTensor) for weight in matrices.values()):
            raise InputError("Muon needs whole matrices, which FSDP cuts; use --parallel ddp")
    others = [weight for name, weight in weights.items() if name not in matrices]
    adamw = torch.optim.AdamW(
        others,
        lr=optimisation.lr,
        betas=optimisation.betas,
        eps=optimisation.eps,
        weight_decay=optimisation.weight_decay,
        fused=all(weight.device.type in ("cpu", "cuda") for weight in others),
    )
    if not matrices:
        return (adamw,)
    muon = torch.optim.Muon(
        matrices.values(),
        lr=optimisation.lr,
        weight_decay=optimisation.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return adamw, muon
