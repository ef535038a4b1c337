"""From pixels to AnySat's sub-patch tokens: one projector per sensor, for still images or for series."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.models.anysat_attention import chunk_rows
from panterra.models.anysat_sensors import CELL_M, Sensor

HEADS = 16
KEY_DIM = 8
WIDE = 512
"""From this width on, groups of channels are normalised as rows of a matrix, which is faster. Narrow ones keep the
published operation: groups of few channels blow up the smallest difference in rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The patches of a tile."""

    rows: int
    cols: int
    scale: int
    """Side of a patch in units of 10 m."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """Standardised values of one sensor."""

    values: Float[Tensor, "b t c y x"]
    """A still image has T = 1."""
    days: Tensor | None = None
    """[B, T] day of the year, for series."""
    valid: Bool[Tensor, "b t y x"] | None = None
    """False where values are no data: they take no part in anything, whatever they are."""
    present: Bool[Tensor, "b t c y x"] | None = None
    """The published mask: where False, values become the projector's `pad`, and count as data. For series alone."""


class CellProjector(nn.Module):
    """One vector per cell of a still image: a linear map of its pixels, then an MLP (AnySat)."""

    def __init__(self, sensor: Sensor, dim: int) -> None:
        super().__init__()
        self.sensor = sensor
        self.embed = nn.Conv2d(sensor.channels, dim, sensor.kernel, sensor.kernel, bias=False)
        self.expand = nn.Linear(dim, 2 * dim)
        self.norm1 = nn.LayerNorm(2 * dim)
        self.shrink = nn.Linear(2 * dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def size(self, height: int, width: int, scale: int) -> tuple[int, int]:
        """Count the whole patches along both sides of an image."""
        side = self.sensor.kernel * self.sensor.cells * scale
        return height // side, width // side

    def forward(self, given: Input, grid: Grid) -> tuple[Float[Tensor, "b p n d"], Bool[Tensor, "b p n"] | None]:
        """Embed the cells of each patch, and say which have data.

        Cells run through 10 m squares in raster order, then through the cells of a square, as in pretraining.
        """
        image = self._cells(given.values[:, 0], grid)
        seen = None
        if given.valid is not None and not bool(given.valid.all()):
            valid = self._cells(given.valid, grid)
            count = valid.sum(-1, keepdim=True)
            zeroed = torch.where(valid, image, 0.0)
            image = torch.where(valid, image, zeroed.sum(-1, keepdim=True) / count.clamp(min=1))
            seen = count[..., 0, 0] > 0
        return self._in_parts(image.flatten(-2)), seen

    def _cells(self, image: Tensor, grid: Grid) -> Tensor:
        """Cut an image [b, c, y, x] into pixels of cells of patches [b, p, n, c, pixels]."""
        c, k, s = self.sensor.cells, self.sensor.kernel, grid.scale
        image = image[..., : grid.rows * s * c * k, : grid.cols * s * c * k]
        order = "b C (R r i m) (Q q j n) -> b (R Q) (r q i j) C (m n)"
        return rearrange(image, order, r=s, i=c, m=k, q=s, j=c, n=k)

    def _in_parts(self, cells: Float[Tensor, "b p n f"]) -> Float[Tensor, "b p n d"]:
        if torch.is_grad_enabled():
            return self._embed(cells)
        parts = [self._embed(part) for part in cells.flatten(0, 2).split(chunk_rows(cells))]
        out: Tensor = torch.cat(parts).unflatten(0, cells.shape[:3])
        return out

    def _embed(self, cells: Float[Tensor, "*b f"]) -> Float[Tensor, "*b d"]:
        x = F.linear(cells, self.embed.weight.flatten(1))
        x = F.relu(self.norm1(self.expand(x)))
        out: Tensor = F.relu(self.norm2(self.shrink(x)))
        return out


class Stage(nn.Module):
    """Linear, normalisation over four groups of channels, ReLU, dropout."""

    def __init__(self, dim_in: int, dim_out: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(dim_in, dim_out)
        self.norm = nn.GroupNorm(4, dim_out)
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "n c"]) -> Float[Tensor, "n d"]:
        return F.dropout(F.relu_(normalise_groups(self.linear(x), self.norm)), self.dropout, self.training)


def normalise_groups(x: Float[Tensor, "n c"], norm: nn.GroupNorm) -> Float[Tensor, "n c"]:
    """Normalise the groups of each vector by themselves."""
    if x.shape[-1] < WIDE:
        return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    groups = x.unflatten(-1, (norm.num_groups, -1))
    rows = F.layer_norm(groups, groups.shape[-1:], eps=norm.eps).flatten(-2)
    return scale_and_shift(rows, norm)


def scale_and_shift(rows: Float[Tensor, "*n c"], norm: nn.GroupNorm) -> Float[Tensor, "*n c"]:
    """Apply the weights of a normalisation, without gradients in place."""
    return torch.addcmul(norm.bias, rows, norm.weight, out=None if torch.is_grad_enabled() else rows)


class SeriesProjector(nn.Module):
    """One vector per pixel of a series: each date through an MLP, then attention over the dates (L-TAE).

    After Garnot and Landrieu, "Lightweight temporal self-attention" (2020), as AnySat has it.
    """

    def __init__(self, sensor: Sensor, dim: int) -> None:
        super().__init__()
        self.sensor = sensor
        self.pad = nn.Parameter(torch.zeros(()), requires_grad=False)  # the published code never trains it either
        widths = (sensor.channels, dim // 8, dim // 2, dim, 2 * dim, dim)
        self.stages = nn.ModuleList(Stage(a, b, sensor.dropout) for a, b in itertools.pairwise(widths))
        self.in_norm = nn.GroupNorm(HEADS, dim) if sensor.in_norm else None
        self.query = nn.Parameter(torch.zeros(HEADS, KEY_DIM))
        self.key = nn.Linear(dim, HEADS * KEY_DIM)
        self.output = Stage(dim, dim, sensor.dropout)
        self.out_norm = nn.GroupNorm(HEADS, dim)

    def initialise(self) -> None:
        """Draw query and keys from a normal distribution (L-TAE)."""
        nn.init.normal_(self.query, std=math.sqrt(2 / KEY_DIM))
        nn.init.normal_(self.key.weight, std=math.sqrt(2 / KEY_DIM))

    def size(self, height: int, width: int, scale: int) -> tuple[int, int]:
        """Count the whole patches along both sides of an image."""
        patch_m = CELL_M * scale
        return int(height * self.sensor.cell_m / patch_m + 1e-6), int(width * self.sensor.cell_m / patch_m + 1e-6)

    def forward(self, given: Input, grid: Grid) -> tuple[Float[Tensor, "b p n d"], Bool[Tensor, "b p n"] | None]:
        """Embed the pixels of each patch in raster order, and say which have data.

        Where pixels do not tile a patch, each sub-patch takes the pixel at its centre.
        """
        if given.days is None:
            raise InputError(f"{self.sensor.name} came without dates; a series needs one day of the year per image")
        values = given.values
        if given.present is not None:
            values = torch.where(given.present, values, self.pad)
        used, back = (z.to(values.device) for z in pixel_order(self.sensor, grid, *values.shape[-2:]))
        x = values.flatten(3)[..., used].permute(0, 3, 1, 2)
        valid = None
        if given.valid is not None and not bool(given.valid.all()):
            valid = given.valid.flatten(2)[..., used].transpose(1, 2)
        tokens = self._in_parts(x, given.days, valid)
        seen = None if valid is None else valid.any(2)
        if len(back) != len(used):
            tokens, seen = tokens[:, back], None if seen is None else seen[:, back]
        n = self.sensor.side(grid.scale) ** 2
        return tokens.unflatten(1, (-1, n)), None if seen is None else seen.unflatten(1, (-1, n))

    def _in_parts(
        self, x: Float[Tensor, "b n t c"], days: Tensor, valid: Bool[Tensor, "b n t"] | None
    ) -> Float[Tensor, "b n d"]:
        """Embed sequences, in inference a few pixels at a time, so that memory does not grow with the image."""
        b, n, t, _ = x.shape
        codes = encode_days(days, self.out_norm.num_channels // HEADS, self.sensor.period).to(x.dtype)
        sample = torch.arange(b, device=x.device).repeat_interleave(n)
        x, valid = x.flatten(0, 1), None if valid is None else valid.flatten(0, 1)
        size = b * n if torch.is_grad_enabled() else max(1, chunk_rows(x) // t)
        parts = [
            self.embed(x[i : i + size], codes[sample[i : i + size]], None if valid is None else valid[i : i + size])
            for i in range(0, b * n, size)
        ]
        out: Tensor = torch.cat(parts).unflatten(0, (b, n))
        return out

    def embed(
        self, x: Float[Tensor, "n t c"], codes: Float[Tensor, "n t m"], valid: Bool[Tensor, "n t"] | None = None
    ) -> Float[Tensor, "n d"]:
        """Embed sequences of pixels by their valid dates alone."""
        lifted = self.normalise_dates(self.lift(x, valid), valid).unflatten(-1, (HEADS, -1))
        dated = torch.add(lifted, codes[:, :, None], out=None if torch.is_grad_enabled() else lifted)
        weights = F.dropout(self.attend_dates(dated.flatten(2), valid), 0.1, self.training)  # at any `dropout` (AnySat)
        pooled = torch.einsum("hnt,nthm->nhm", weights, dated).flatten(1)
        out: Tensor = self.output(pooled)
        return normalise_groups(out, self.out_norm)

    def lift(self, x: Float[Tensor, "n t c"], valid: Bool[Tensor, "n t"] | None = None) -> Float[Tensor, "n t d"]:
        """Pass each valid date of each pixel through the MLP; the others are zeros."""
        if valid is None:
            return self._lift_all(x)
        rows = self._through_stages(x[valid])
        out = rows.new_zeros(*x.shape[:2], rows.shape[-1])
        out[valid] = rows
        return out

    def _lift_all(self, x: Float[Tensor, "n t c"]) -> Float[Tensor, "n t d"]:
        """Pass every date through the MLP; in inference the zeros of padded dates, which are all alike, only once."""
        given = None if self.training or torch.is_grad_enabled() else x.any(-1)
        if given is None or bool(given.all()):
            lifted: Tensor = self._through_stages(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return lifted
        rows = self._through_stages(torch.cat([x[given], x.new_zeros(1, x.shape[-1])]))
        out = rows[-1].expand(*x.shape[:2], -1).clone()
        out[given] = rows[:-1]
        return out

    def _through_stages(self, rows: Float[Tensor, "m c"]) -> Float[Tensor, "m d"]:
        for stage in self.stages:
            rows = stage(rows)
        return rows

    def normalise_dates(
        self, x: Float[Tensor, "n t d"], valid: Bool[Tensor, "n t"] | None = None
    ) -> Float[Tensor, "n t d"]:
        """Normalise groups of channels over the valid dates of a pixel, where the sensor asks for it."""
        if self.in_norm is None:
            return x
        norm = self.in_norm
        if valid is None and x.shape[-1] < WIDE:
            return F.group_norm(x.mT, norm.num_groups, norm.weight, norm.bias, norm.eps).mT.contiguous()
        groups = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        if valid is None:
            rows = F.layer_norm(groups, groups.shape[2:], eps=norm.eps)
        else:
            here, count = valid[:, None, :, None], valid.sum(1).clamp(min=1)[:, None, None, None] * groups.shape[-1]
            centred = torch.where(here, groups - groups.sum((2, 3), keepdim=True) / count, 0.0)
            rows = centred * torch.rsqrt(centred.square().sum((2, 3), keepdim=True) / count + norm.eps)
        return scale_and_shift(rows.transpose(1, 2).flatten(2), norm)

    def attend_dates(
        self, x: Float[Tensor, "n t d"], visible: Bool[Tensor, "n t"] | None = None
    ) -> Float[Tensor, "h n t"]:
        """Weigh the visible dates for each head; a pixel without any gets equal weights."""
        # One query serves all pixels, so it and the keys are one matrix; rounded once, since logits can be large.
        key_weight = self.key.weight.double().unflatten(0, (HEADS, KEY_DIM))
        key_bias = self.key.bias.double().unflatten(0, (HEADS, KEY_DIM))
        query = self.query.double() / math.sqrt(KEY_DIM)
        weight = torch.einsum("hk,hkd->hd", query, key_weight).to(self.key.weight.dtype)
        bias = (query * key_bias).sum(1).to(self.key.weight.dtype)
        logits = F.linear(x, weight, bias).permute(2, 0, 1)
        if visible is not None:
            logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
        weights: Tensor = logits.softmax(dim=-1)
        return weights


def encode_days(days: Tensor, dim: int, period: int) -> Float[Tensor, "b t m"]:
    """Encode days by alternating sines and cosines, without wrapping (L-TAE)."""
    channel = torch.arange(dim, device=days.device)
    divisor = torch.pow(float(period), 2 * (channel // 2) / dim)
    angle = days.float()[..., None] / divisor
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def pixel_order(sensor: Sensor, grid: Grid, height: int, width: int) -> tuple[Int[Tensor, " u"], Int[Tensor, " n"]]:
    """List the pixels that patches are made of, and for each sub-patch of each patch its place in that list."""
    side, patch_m = sensor.side(grid.scale), CELL_M * grid.scale
    if sensor.whole:
        if (height, width) != (1, 1):
            raise InputError(f"{sensor.name} came with {height} x {width} pixels; it is one value for the whole tile")
        zero = torch.zeros(1, dtype=torch.int64)
        return zero, zero
    inside = (torch.arange(side, dtype=torch.float64) + 0.5) * patch_m / side

    def pixels(patches: int, size: int) -> Tensor:
        centre = torch.arange(patches, dtype=torch.float64)[:, None] * patch_m + inside
        return (centre / sensor.cell_m).long().clamp(max=size - 1)

    row, col = pixels(grid.rows, height), pixels(grid.cols, width)
    index = (row[:, None, :, None] * width + col[None, :, None, :]).flatten()
    used, back = torch.unique(index, return_inverse=True)
    return (index, torch.arange(len(index))) if len(used) == len(index) else (used, back)
