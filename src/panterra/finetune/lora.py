"""Small changes to large matrices (LoRA, Hu et al. 2022)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from panterra.errors import InputError
from panterra.train.parallel import blocks


class LowRank(nn.Module):
    """A matrix plus the product of two thin ones, of which the second begins at zero."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        return weight + (self.scale * self.up @ self.down).to(weight.dtype)


def add_lora(encoder: nn.Module, *, rank: int, alpha: float) -> list[nn.Parameter]:
    """Put low-rank changes on every linear layer of the transformer blocks, attention and MLP; give their parameters.

    The weights themselves become reads through a parametrisation, so code that multiplies by `layer.weight` needs no
    change. Queries, keys and values of one product share the thin matrix that they begin with.
    """
    if rank < 1:
        raise InputError(f"LoRA of rank {rank} was asked for; wanted 1 or more")
    layers = [layer for layer in _linears(encoder) if not parametrize.is_parametrized(layer)]
    if not layers:
        raise InputError("the encoder has no transformer blocks with linear layers that LoRA could change")
    added: list[nn.Parameter] = []
    for layer in layers:
        change = LowRank(layer, rank, alpha)
        parametrize.register_parametrization(layer, "weight", change)
        added += [change.down, change.up]
    return added


def merge_lora(encoder: nn.Module) -> None:
    """Add the changes into the weights; the encoder has its own layout again."""
    for layer in _linears(encoder):
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def _linears(encoder: nn.Module) -> list[nn.Linear]:
    found = [layer for block in blocks(encoder) for layer in block.modules() if isinstance(layer, nn.Linear)]
    return list(dict.fromkeys(found))
