"""What stands on an encoder and answers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.evaluate.anysat_protocol import mlp_head
from panterra.models.features import Features

HeadKind = Literal["linear", "mlp", "attention", "conv", "plain", "nearest", "mean", "max", "batch_mlp"]
"""linear, mlp: of each patch or of the sample's summary; attention: of what a learned query picks among the patches;
conv: a decoder that refines patches to cells in steps. OlmoEarth's: plain, a linear map alone; nearest, a decoder that
repeats cells. AnySat's: mean and max, linear of the patches' mean or maximum; batch_mlp, an mlp with batch norm."""

DENSE: tuple[HeadKind, ...] = ("linear", "mlp", "conv", "plain", "nearest")
SCENE: tuple[HeadKind, ...] = ("linear", "mlp", "attention", "plain", "mean", "max", "batch_mlp")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """What a head is made of."""

    kind: HeadKind
    dense: bool
    """Whether it answers for every cell or once per sample."""
    dim: int
    """Width of the encoder's features."""
    outputs: int
    side: int = 1
    """Cells along the side of a patch."""
    hidden: int = 256
    """Width of an mlp, and of the decoder at the patches' resolution."""
    skip_bands: int = 0
    """Bands of raw pixels that the decoder also looks at."""
    convolutions: int = 1
    """Of each step of the decoder."""
    smooth: bool = False
    """Whether a plain head gives one answer per patch, which is interpolated between them."""

    def __post_init__(self) -> None:
        known = DENSE if self.dense else SCENE
        if self.kind not in known:
            what = "a task with a target per cell" if self.dense else "a task with one target per sample"
            raise InputError(f"head {self.kind!r} came for {what}; choose one of {', '.join(known)}")
        if self.skip_bands and self.kind != "conv":
            raise InputError(f"raw pixels as a further input need the conv head, not {self.kind!r}")
        if self.kind == "nearest" and self.side & (self.side - 1):
            raise InputError(f"head 'nearest' doubles; a patch of {self.side} cells is no power of two: change patch_m")


def build_head(config: HeadConfig) -> nn.Module:
    """Build a head: a module from `Features` and standardised pixels, if it takes them, to scores [B, K, ...]."""
    if not config.dense:
        return SceneHead(config)
    if config.kind == "nearest":
        return DoublingDecoder(config)
    if config.kind == "plain" and config.smooth:
        return SmoothHead(config)
    return Decoder(config) if config.kind == "conv" else CellHead(config)


def _layers(config: HeadConfig, outputs: int) -> nn.Module:
    """Stack what turns one vector into scores."""
    if config.kind == "plain":
        return nn.Linear(config.dim, outputs)
    if config.kind == "batch_mlp":
        return mlp_head(config.dim, outputs)
    if config.kind == "mlp":
        hidden = (nn.Linear(config.dim, config.hidden), nn.GELU(), nn.Linear(config.hidden, outputs))
        return nn.Sequential(nn.LayerNorm(config.dim), *hidden)
    return nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, outputs))


class SceneHead(nn.Module):
    """Scores of a sample as a whole."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.kind = config.kind
        self.pool = AttentionPool(config.dim) if config.kind == "attention" else None
        self.layers = _layers(config, config.outputs)

    def forward(self, features: Features, pixels: Tensor | None = None) -> Float[Tensor, "b k"]:
        vector = features.summary
        if self.kind == "mean":
            seen = features.valid.flatten(1)
            # Patches without data are zeros.
            vector = features.patches.flatten(1, 2).sum(1) / seen.sum(1).clamp(min=1)[:, None]
        elif self.kind == "max":
            lost = ~features.valid.flatten(1)[..., None]
            vector = features.patches.flatten(1, 2).masked_fill(lost, -torch.inf).amax(1)
            vector = vector.masked_fill(lost.all(1), 0.0)
        if self.pool is not None:
            vector = self.pool(features.patches.flatten(1, 2), features.valid.flatten(1))
        out: Tensor = self.layers(vector)
        return out


class AttentionPool(nn.Module):
    """The mean of a sample's patches, weighted by what a learned query finds in them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(dim))
        self.norm = nn.LayerNorm(dim)
        self.key = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"], valid: Bool[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        score = self.key(self.norm(x)) @ self.query / x.shape[-1] ** 0.5
        # A sample without data has equal, meaningless shares of zeros rather than NaN.
        share = score.masked_fill(~valid, torch.finfo(score.dtype).min).softmax(1)
        return torch.einsum("bn,bnd->bd", share, x)


class CellHead(nn.Module):
    """Scores of a patch's cells, from the patch alone."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.side = config.side
        self.layers = _layers(config, config.outputs * config.side**2)

    def forward(self, features: Features, pixels: Tensor | None = None) -> Float[Tensor, "b k y x"]:
        order = "b h w (k r c) -> b k (h r) (w c)"
        out: Tensor = rearrange(self.layers(features.patches), order, r=self.side, c=self.side)
        return out


class SmoothHead(nn.Module):
    """Scores of patches, interpolated bilinearly to the cells with aligned corners (OlmoEarth's values)."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.side = config.side
        self.layers = nn.Linear(config.dim, config.outputs)

    def forward(self, features: Features, pixels: Tensor | None = None) -> Float[Tensor, "b k y x"]:
        coarse = self.layers(features.patches).movedim(-1, 1)
        rows, cols = (n * self.side for n in coarse.shape[2:])
        return F.interpolate(coarse, size=(rows, cols), mode="bilinear", align_corners=True)


class DoublingDecoder(nn.Module):
    """Patches refined to cells by repeating each and convolving, over and over, at one width (OlmoEarth)."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        steps = config.side.bit_length()
        self.steps = nn.ModuleList(nn.Conv2d(config.dim, config.dim, 3, padding=1) for _ in range(steps))
        self.scores = nn.Conv2d(config.dim, config.outputs, 3, padding=1)

    def forward(self, features: Features, pixels: Tensor | None = None) -> Float[Tensor, "b k y x"]:
        x = features.patches.movedim(-1, 1)
        for number, step in enumerate(self.steps):
            x = F.relu(step(x if number == 0 else F.interpolate(x, scale_factor=2.0, mode="nearest")))
        out: Tensor = self.scores(x)
        return out


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each cell, so that no cell depends on how large the image is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        out: Tensor = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return out


def _convolve(inputs: int, outputs: int, times: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, *[outputs] * (times - 1)):
        layers += [nn.Conv2d(width, outputs, 3, padding=1), ChannelNorm(outputs), nn.GELU()]
    return nn.Sequential(*layers)


class Decoder(nn.Module):
    """Patches refined to cells: each step doubles the resolution, halves the width and may look at raw pixels.

    It is the upward half of a U-Net (Ronneberger et al. 2015) whose bottom is the encoder; what an encoder of patches
    has nothing of, detail inside a patch, comes from the pixels themselves.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.factors = _factors(config.side)
        widths = [max(config.hidden >> step, 32) for step in range(len(self.factors) + 1)]
        self.enter = nn.Sequential(ChannelNorm(config.dim), nn.Conv2d(config.dim, widths[0], 1))
        self.mix = _convolve(widths[0], widths[0])
        self.steps = nn.ModuleList(
            _convolve(before + config.skip_bands, after, config.convolutions)
            for before, after in itertools.pairwise(widths)
        )
        self.scores = nn.Conv2d(widths[-1], config.outputs, 1)

    def forward(self, features: Features, pixels: Float[Tensor, "b c _y _x"] | None = None) -> Float[Tensor, "b k y x"]:
        seen = features.valid[:, None]
        x = self.enter(features.patches.movedim(-1, 1)) * seen
        x = x + self.mix(x)
        for factor, step in zip(self.factors, self.steps, strict=True):
            x = F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)
            if pixels is not None:
                x = torch.cat([x, F.adaptive_avg_pool2d(pixels, (x.shape[2], x.shape[3]))], dim=1)
            x = step(x)
        out: Tensor = self.scores(x)
        return out


def _factors(side: int) -> list[int]:
    """Split a factor into twos and what is left: 8 is 2 2 2, 12 is 2 2 3."""
    factors = []
    while side % 2 == 0:
        factors.append(2)
        side //= 2
    return [*factors, side] if side > 1 else factors
