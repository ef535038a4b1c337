"""AnySat's predictor: says what the teacher sees where the student did not look. Only pretraining needs it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from panterra.models.anysat_attention import Layout, check_width, fusion_block
from panterra.models.layers import Block


@dataclass(frozen=True, slots=True, kw_only=True)
class AnySatPredictorConfig:
    """Sizes of the predictor; the published one is as wide as its encoder."""

    dim: int
    depth: int = 4
    heads: int = 16
    layout: Layout = "tokens"


class AnySatPredictor(nn.Module):
    """Self-attention over the context and one mask token per wanted place."""

    def __init__(self, config: AnySatPredictorConfig, encoder_dim: int) -> None:
        super().__init__()
        check_width(config.dim, config.heads, "predictor")
        self.config = config
        self.input = nn.Linear(encoder_dim, config.dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.blocks = nn.ModuleList(
            fusion_block(config.dim, config.heads, eps=1e-5, layout=config.layout) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.output = nn.Linear(config.dim, encoder_dim)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Draw weights with a standard deviation of 0.02; what writes to the residual is smaller the deeper it is."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for depth, block in enumerate(cast(Iterable[Block], self.blocks), start=1):
            block.attn.proj.weight.div_(math.sqrt(2 * depth))
            block.mlp.fc2.weight.div_(math.sqrt(2 * depth))

    def forward(
        self,
        context: Float[Tensor, "b k e"],
        context_places: Float[Tensor, "b k d"],
        target_places: Float[Tensor, "s b n d"],
    ) -> Float[Tensor, "s b n e"]:
        """Predict each set of targets from the same context; places are codes as wide as the predictor."""
        sets, batch, wanted = target_places.shape[:3]
        seen = (self.input(context) + context_places).repeat(sets, 1, 1)
        masked = self.mask_token + target_places.flatten(0, 1)
        x = torch.cat([self.class_token.expand(sets * batch, -1, -1), seen, masked], dim=1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.output(self.norm(x[:, -wanted:])).unflatten(0, (sets, batch))
        return out
