"""Where and when a token is, as numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from panterra.modalities import MODALITIES

DAYS_BEFORE_MONTH = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def sincos1d(num: int, dim: int, step: float = 1.0) -> Float[Tensor, "n d"]:
    """Encode positions 0, step, 2 step, ... by sines, then cosines.

    The frequencies are 10000^(-k / 2d), not the usual 10000^(-2k / d), and all is computed in float32, which on large
    grids is more than rounding: OlmoEarth's weights were trained so.
    """
    omega = 1 / 10000 ** (torch.arange(dim // 2, dtype=torch.float32) / (2 * dim))
    angle = (torch.arange(num, dtype=torch.float32) * step)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def sincos2d(rows: int, cols: int, dim: int, step: float = 1.0) -> Float[Tensor, "rows cols d"]:
    """Encode the cells of a grid: the first half of the width is the column, the second the row (OlmoEarth)."""
    col = sincos1d(cols, dim // 2, step)[None, :, :].expand(rows, -1, -1)
    row = sincos1d(rows, dim // 2, step)[:, None, :].expand(-1, cols, -1)
    return torch.cat([col, row], dim=-1)


def month_table(dim: int) -> Float[Tensor, "12 d"]:
    """Encode the twelve months on a circle, each half of the width one coordinate (OlmoEarth)."""
    angle = torch.arange(12, dtype=torch.float32) / 12 * 2 * math.pi
    half = dim // 2
    return torch.cat([angle.sin()[:, None].expand(-1, half), angle.cos()[:, None].expand(-1, half)], dim=1)


def days_since_2000(day: Int[Tensor, "*b"], month: Int[Tensor, "*b"], year: Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Count days as OlmoEarth v1.2 does: years of 365.25 days, `month` from 0, no leap day."""
    before = torch.tensor(DAYS_BEFORE_MONTH, device=month.device)[month]
    return (year - 2000).float() * 365.25 + before.float() + (day - 1).float()


def token_coordinates(
    shapes: Mapping[str, torch.Size], days: Float[Tensor, "b t"], step: float
) -> Float[Tensor, "b n 3"]:
    """Give days since 2000, row and column of every token, for modalities shaped (b, h, w, t, s, ...) in this order.

    `step` is the distance of patches in units of 10 m. A map carries the time of the first date (OlmoEarth). The batch
    axis is 1 where all samples share their dates.
    """
    if bool((days == days[:1]).all()):
        days = days[:1]
    parts = []
    for m, (_, rows, cols, steps, sets, *_) in shapes.items():
        kind = MODALITIES[m].kind
        grid = torch.zeros(len(days), rows, cols, steps, sets, 3, device=days.device)
        if kind != "constant":
            grid[..., 0] = days[:, None, None, :steps, None]
        if kind in ("series", "still"):
            grid[..., 1] = (torch.arange(rows, device=days.device) * step)[:, None, None, None]
            grid[..., 2] = (torch.arange(cols, device=days.device) * step)[:, None, None]
        parts.append(grid.flatten(1, 4))
    return torch.cat(parts, dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLine:
    """What, when and where a sample's tokens are, modality after modality, each by (row, column, date, band set)."""

    sizes: Mapping[str, int]
    """Number of tokens of each modality."""
    band_set: Int[Tensor, " n"]
    """Counted over all modalities in line."""
    date: Int[Tensor, " n"]
    """-1 without one."""
    place: Int[Tensor, " n"]
    """Of the patch in raster order, -1 without one."""
    dates: int
    rows: int
    cols: int

    @classmethod
    def of(cls, shapes: Mapping[str, torch.Size], device: torch.device) -> TokenLine:
        """Line up modalities shaped (b, h, w, t, s, ...)."""
        return _line(tuple((m, tuple(shape[1:5])) for m, shape in shapes.items()), device)

    def coordinates(
        self, sample: Int[Tensor, " k"], token: Int[Tensor, " k"], timestamps: Int[Tensor, "b t 3"], step: float
    ) -> Float[Tensor, "k 3"]:
        """Give days since 2000, row and column of some tokens of some samples, as `token_coordinates` does."""
        days = days_since_2000(timestamps[..., 0], timestamps[..., 1], timestamps[..., 2])
        date, place = self.date[token], self.place[token]
        # A map carries the time of the first date (OlmoEarth), a constant no time at all.
        when = days[sample, date.clamp(min=0)] * ((date >= 0) | (place >= 0))
        where = place.clamp(min=0)
        return torch.stack([when, where // self.cols * step, where % self.cols * step], dim=1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _line(shapes: tuple[tuple[str, tuple[int, ...]], ...], device: torch.device) -> TokenLine:
    rows, cols, dates = (max(shape[i] for _, shape in shapes) for i in range(3))
    parts, first = [], 0
    for m, (h, w, t, s) in shapes:
        kind = MODALITIES[m].kind
        place = torch.arange(h)[:, None] * cols + torch.arange(w) if kind in ("series", "still") else -torch.ones(1, 1)
        date = torch.arange(t) if kind in ("series", "weather") else -torch.ones(1)
        grid = (first + torch.arange(s), date[:, None], place[:, :, None, None])
        parts.append(torch.stack([x.long().expand(h, w, t, s).flatten() for x in grid]))
        first += s
    band_set, date, place = torch.cat(parts, dim=1).to(device)
    sizes = {m: math.prod(shape) for m, shape in shapes}
    return TokenLine(sizes=sizes, band_set=band_set, date=date, place=place, dates=dates, rows=rows, cols=cols)


# A rotation takes coordinates [..., 3] (time, row, column) and gives one angle per head and pair of channels,
# [..., heads or 1, head_dim / 2]; pairs are neighbours.
Rotation = Callable[[Float[Tensor, "*b 3"]], Float[Tensor, "*b heads pairs"]]


def axial_frequencies(
    head_dim: int, *, base: float, time_fraction: float = 0.0, time_base: float | None = None
) -> Float[Tensor, "3 1 pairs"]:
    """Frequencies of an axial rotation: a share of the pairs turns with time, the rest with rows, then columns."""
    time_dim = 2 * round(head_dim * time_fraction / 2)
    row_dim = (head_dim - time_dim) // 2
    parts = ((time_dim, time_base or base), (row_dim, base), (head_dim - time_dim - row_dim, base))
    table = torch.zeros(3, 1, head_dim // 2)
    start = 0
    for axis, (dim, axis_base) in enumerate(parts):
        pairs = dim // 2
        table[axis, 0, start : start + pairs] = axis_base ** (-2.0 * torch.arange(pairs) / max(dim, 1))
        start += pairs
    return table


def mixed_frequencies(
    axes: int, heads: int, head_dim: int, *, base: float, generator: torch.Generator | None = None
) -> Float[Tensor, "axes heads pairs"]:
    """Draw the initial value of learnable frequencies: two random orthogonal directions per head (OlmoEarth)."""
    quarter = head_dim // 4
    size = base ** (-4.0 * torch.arange(quarter) / head_dim)
    if axes == 2:
        phi = torch.rand(heads, generator=generator) * 2 * math.pi
        first = torch.stack([phi.cos(), phi.sin()])
        second = torch.stack([-phi.sin(), phi.cos()])
    else:
        first = torch.nn.functional.normalize(torch.randn(heads, axes, generator=generator), dim=-1)
        other = torch.randn(heads, axes, generator=generator)
        other = other - (other * first).sum(-1, keepdim=True) * first
        first, second = first.T, torch.nn.functional.normalize(other, dim=-1).T
    return torch.cat([first[:, :, None] * size, second[:, :, None] * size], dim=-1)


def unit(angle: Float[Tensor, "*b"]) -> Tensor:
    """Give unit complex numbers."""
    return torch.complex(angle.cos(), angle.sin())


def turn_heads(
    x: Float[Tensor, "*b c h d"], angle: Float[Tensor, "*b _h pairs"], number: int
) -> tuple[Float[Tensor, "*b h d"], ...]:
    """Part each token's vectors; neighbouring pairs of channels of the first `number` are turned, in float32."""
    out: tuple[Tensor, ...] = _TurnHeads.apply(x, angle, number)  # type: ignore[no-untyped-call]
    return out


class _TurnHeads(torch.autograd.Function):
    """A rotation whose backward pass needs its results, which attention keeps anyway, and not what came in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angle: Tensor, number: int) -> tuple[Tensor, ...]:
        turn, parts = unit(angle), x.unbind(-3)
        turned = tuple(rotate(part, turn) for part in parts[:number])
        ctx.save_for_backward(turn, *turned)
        return (*turned, *(part.clone(memory_format=torch.contiguous_format) for part in parts[number:]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        turn, *turned = ctx.saved_tensors
        back = turn.conj().resolve_conj()
        d_x = torch.stack(gradients, dim=-3)
        rotate_(d_x[..., : len(turned), :, :], back.unsqueeze(-3))
        d_angle: Tensor | None = None
        if ctx.needs_input_grad[1]:
            for g, y in zip(gradients, turned, strict=False):
                (a, b), (c, d) = (z.float().unflatten(-1, (-1, 2)).unbind(-1) for z in (g, y))
                across = torch.addcmul(b * c, a, d, value=-1)  # the imaginary part of g times y's conjugate
                d_angle = across if d_angle is None else d_angle.add_(across)
        return d_x, d_angle, None


def rotate(x: Float[Tensor, "*b d"], turn: Tensor) -> Float[Tensor, "*b d"]:
    """Turn neighbouring pairs of channels by unit complex numbers `turn` [..., d / 2], broadcast over the rest."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def rotate_(x: Float[Tensor, "*b d"], turn: Tensor) -> Float[Tensor, "*b d"]:
    """Rotate in place where the precision allows it."""
    if x.dtype != torch.float32:
        return x.copy_(rotate(x, turn))
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turn)
    return x
