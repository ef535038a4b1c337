"""AnySat written down as the specification reads, one sentence after another: the oracle and the baseline.

Nothing is merged, skipped, cached or cut into parts: one sensor goes through after another, every date of every pixel
through every layer whether it has data or not, tables of places and distances are made again where they are used,
every block computes all of its rows, and softmax is written out. Parts have the names of the published weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panterra.models.anysat import AnySat
from panterra.models.anysat_convert import published_anysat_state
from panterra.models.anysat_sensors import Sensor

HEADS, KEY_DIM = 16, 8
"""Of the attention over dates."""


class PlainMLP(nn.Module):
    """Two layers around an exact GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class PlainImage(nn.Module):
    """A convolution cuts the image into cells; cells make 10 m squares, squares make patches."""

    def __init__(self, sensor: Sensor, dim: int) -> None:
        super().__init__()
        self.sensor = sensor
        self.patch_embed = nn.Conv2d(sensor.channels, dim, sensor.kernel, sensor.kernel, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim),
            nn.LayerNorm(2 * dim),
            nn.ReLU(),
            nn.Linear(2 * dim, dim),
            nn.LayerNorm(dim),
            nn.ReLU(),
        )

    def forward(self, image: Tensor, scale: int) -> Tensor:
        """Turn [B, C, Y, X] into sub-patches [B, P, n, D], which run through squares, then through their cells."""
        x, c = self.patch_embed(image), self.sensor.cells
        b, d, rows, cols = x.shape
        rows, cols = rows // c // scale, cols // c // scale
        x = x[:, :, : rows * scale * c, : cols * scale * c]
        x = x.reshape(b, d, rows, scale, c, cols, scale, c).permute(0, 2, 5, 3, 6, 4, 7, 1)
        out: Tensor = self.mlp(x.reshape(b, rows * cols, scale * scale * c * c, d))
        return out


class PlainQuery(nn.Module):
    """One learned query for each head, and the keys of the dates."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.Q = nn.Parameter(torch.zeros(HEADS, KEY_DIM))
        self.fc1_k = nn.Linear(dim, HEADS * KEY_DIM)

    def forward(self, x: Tensor) -> Tensor:
        """Score dates [N, T, D] for each head [N, T, h]."""
        keys = self.fc1_k(x).reshape(*x.shape[:2], HEADS, KEY_DIM)
        out: Tensor = (keys * self.Q).sum(-1) / math.sqrt(KEY_DIM)
        return out


class PlainDates(nn.Module):
    """The temporal encoder of one pixel, which is one sequence."""

    def __init__(self, sensor: Sensor, dim: int) -> None:
        super().__init__()
        self.sensor = sensor
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise((sensor.channels, dim // 8, dim // 2, dim, 2 * dim, dim)):
            layers += [nn.Linear(a, b), nn.GroupNorm(4, b), nn.ReLU(), nn.Dropout(sensor.dropout)]
        self.inconv = nn.Sequential(*layers)
        if sensor.in_norm:
            self.in_norm = nn.GroupNorm(HEADS, dim)
        self.attention_heads = PlainQuery(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GroupNorm(4, dim), nn.ReLU(), nn.Dropout(sensor.dropout))
        self.out_norm = nn.GroupNorm(HEADS, dim)

    def forward(self, x: Tensor, days: Tensor, valid: Tensor | None) -> Tensor:
        """Turn sequences [N, T, C] with days [N, T] into [N, D]; only `valid` dates [N, T] count, where given."""
        n, t, _ = x.shape
        x = self.inconv(x.reshape(n * t, -1)).reshape(n, t, -1)
        if self.sensor.in_norm:
            x = self.in_norm(x.transpose(1, 2)).transpose(1, 2) if valid is None else self.norm_valid(x, valid)
        m = x.shape[-1] // HEADS
        i = torch.arange(m)
        angle = days[..., None].float() / self.sensor.period ** (2 * (i // 2) / m)
        x = x + torch.where(i % 2 == 0, angle.sin(), angle.cos()).repeat(1, 1, HEADS)
        logits = self.attention_heads(x)
        if valid is not None:
            logits = logits.masked_fill(~valid[..., None], -torch.inf)
        weights = F.dropout(logits.softmax(dim=1), 0.1, self.training)
        pooled = (weights[..., None] * x.reshape(n, t, HEADS, m)).sum(1).reshape(n, -1)
        out: Tensor = self.out_norm(self.mlp(pooled))
        return out

    def norm_valid(self, x: Tensor, valid: Tensor) -> Tensor:
        groups, seen = x.reshape(*x.shape[:2], HEADS, -1), valid[:, :, None, None]
        count = valid.sum(1)[:, None, None, None] * groups.shape[-1]
        mean = torch.where(seen, groups, 0.0).sum((1, 3), keepdim=True) / count
        variance = torch.where(seen, groups - mean, 0.0).square().sum((1, 3), keepdim=True) / count
        normed = ((groups - mean) / torch.sqrt(variance + self.in_norm.eps)).reshape(x.shape)
        return normed * self.in_norm.weight + self.in_norm.bias


class PlainSeries(nn.Module):
    """Every pixel by itself through the temporal encoder, then pixels make patches."""

    def __init__(self, sensor: Sensor, dim: int) -> None:
        super().__init__()
        self.sensor = sensor
        self.pad_parameter = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.patch_embed = PlainDates(sensor, dim)

    def forward(self, x: Tensor, days: Tensor, scale: int, valid: Tensor | None) -> Tensor:
        """Turn [B, T, C, Y, X] into sub-patches [B, P, n, D] in raster order."""
        b, t, c, height, width = x.shape
        pixels = x.permute(0, 3, 4, 1, 2).reshape(b * height * width, t, c)
        repeats = height * width
        if valid is not None:
            valid = valid.repeat_interleave(repeats, 0)
        x = self.patch_embed(pixels, days.repeat_interleave(repeats, 0), valid).reshape(b, height, width, -1)
        side = max(1, scale // max(1, int(self.sensor.cell_m // 10)))
        rows, cols = height // side, width // side
        x = x[:, : rows * side, : cols * side].reshape(b, rows, side, cols, side, -1).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(b, rows * cols, side * side, -1)


class PlainSpatialAttention(nn.Module):
    """All heads share a bias by distance, which comes from the query of the first."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rpe_k = PlainTable(dim // heads)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q = q / math.sqrt(d // self.heads)
        side = math.isqrt(n - 1)
        bias = self.rpe_k(q[:, 0], with_class(plain_buckets(side, side), 1, 1))
        weights = (q @ k.transpose(-1, -2) + bias[:, None]).softmax(dim=-1)
        out: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))
        return out


class PlainTable(nn.Module):
    """Scores by distance, one per bucket."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, width, 8))

    def forward(self, q: Tensor, index: Tensor) -> Tensor:
        """Give the bias [B, n, m] of queries [B, n, e] for the buckets [n, m] of their keys."""
        return torch.gather(q @ self.lookup_table_weight[0], 2, index.expand(len(q), -1, -1))


class PlainAttention(nn.Module):
    """Attention over the tokens of a sample, or over the heads of each token."""

    def __init__(self, dim: int, heads: int, *, over_heads: bool) -> None:
        super().__init__()
        self.heads, self.over_heads = heads, over_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).unbind(2)
        if not self.over_heads:
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(d // self.heads)).softmax(dim=-1)
        mixed = weights @ v
        if not self.over_heads:
            mixed = mixed.transpose(1, 2)
        out: Tensor = self.proj(mixed.reshape(b, n, d))
        return out


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, dim: int, attn: nn.Module, *, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn, self.mlp = attn, PlainMLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PlainSpatialEncoder(nn.Module):
    """The blocks inside a patch."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.predictor_blocks = nn.ModuleList(
            PlainBlock(dim, PlainSpatialAttention(dim, heads), eps=1e-5) for _ in range(depth)
        )
        self.predictor_norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Turn sub-patches [N, n, D] into [N, 1 + n, D], the patch's row first."""
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + table
        for block in self.predictor_blocks:
            x = block(x)
        out: Tensor = self.predictor_norm(x)
        return out


class PlainCombinerAttention(nn.Module):
    """Attention from learned queries, which nothing projects; the first head's gives the bias by distance."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_learned = nn.Parameter(torch.zeros(1, 1, dim))
        self.wk, self.wv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.rpe_k = PlainTable(dim // heads)

    def forward(self, y: Tensor, table: Tensor, index: Tensor) -> Tensor:
        b, d = len(y), y.shape[-1]
        q = (self.q_learned + table).expand(b, -1, -1)
        q, k, v = (z.reshape(b, -1, self.heads, d // self.heads).transpose(1, 2) for z in (q, self.wk(y), self.wv(y)))
        bias = self.rpe_k(q[:, 0], index)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(d // self.heads) + bias[:, None]).softmax(dim=-1)
        out: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(b, -1, d))
        return out


class PlainCombiner(nn.Module):
    """Queries that know their places alone, without a residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = PlainCombinerAttention(dim, heads), PlainMLP(dim)

    def forward(self, x: Tensor, table: Tensor, index: Tensor) -> Tensor:
        x = self.attn(self.norm1(x), table, index)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PlainAnySat(nn.Module):
    """The same function as `AnySat.forward` with complete pixels, in the published order of dense features."""

    def __init__(self, model: AnySat) -> None:
        super().__init__()
        c = model.config
        self.sensors, self.dim = model.sensors, c.dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        for sensor in c.sensors:
            part = PlainSeries(sensor, c.dim) if sensor.dated else PlainImage(sensor, c.dim)
            self.add_module(f"projector_{sensor.name}", part)
        self.spatial_encoder = PlainSpatialEncoder(c.dim, c.depth, c.heads)
        over_heads = c.layout == "heads"
        self.blocks = nn.ModuleList(
            PlainBlock(c.dim, PlainAttention(c.dim, c.heads, over_heads=over_heads), eps=1e-6) for _ in range(c.depth)
        )
        self.blocks.append(PlainCombiner(c.dim, c.heads))
        self.load_state_dict(published_anysat_state(model.state_dict(), c))
        self.train(model.training)

    def forward(
        self,
        values: Mapping[str, Tensor],
        days: Mapping[str, Tensor],
        *,
        scale: int,
        valid: Mapping[str, Tensor] | None = None,
        dense: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode square tiles: images [B, C, Y, X], series [B, T, C, Y, X] with their days [B, T].

        Only the dates that are `valid` [B, T] count, where given. Gives one row for the tile and one for each patch
        [B, 1 + P, D], and of the sensor `dense` patch and sub-patch side by side [B, Y, X, 2 D].
        """
        tokens, whole, table, cells = [], [], torch.empty(0), None
        for name, x in values.items():
            sensor = self.sensors[name]
            part = self.get_submodule(f"projector_{name}")
            seen = None if valid is None else valid.get(name)
            x = part(x, days[name], scale, seen) if sensor.dated else part(x, scale)
            b, patches, n, _ = x.shape
            grid, side = math.isqrt(patches), max(1, int(10 * scale / sensor.place_m))
            x = self.spatial_encoder(x.flatten(0, 1), after_zeros(plain_places(side, sensor.place_m, self.dim), 1))
            x = x.reshape(b, patches, 1 + n, -1)
            if sensor.whole:
                whole.append(x[:, :, 0])
                continue
            table = plain_places(grid, scale, self.dim)
            tokens.append(x[:, :, 0] + table)
            if name == dense:
                cells = x[:, :, 1:]
        extra = 1 + len(whole)
        x = torch.cat([self.cls_token.expand(b, -1, -1), *whole, *tokens], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        side = math.isqrt(len(table))
        index = with_class(plain_buckets(side, side).repeat(1, len(tokens)), extra, extra)
        x = self.blocks[-1](x, after_zeros(table, extra), index)
        x = torch.cat([x[:, :1], x[:, extra:]], dim=1)
        if cells is None:
            return x, None
        both = torch.cat([x[:, 1:, None].expand_as(cells), cells], dim=-1)
        q = math.isqrt(both.shape[2])
        image = both.reshape(b, side, side, q, q, -1).permute(0, 1, 3, 2, 4, 5)
        return x, image.reshape(b, side * q, side * q, -1)


def plain_places(side: int, step: float, dim: int) -> Tensor:
    """Encode a grid of cells `step` apart [side * side, D], column first."""
    cell = torch.arange(side * side)
    column, row = step * (cell % side), step * (cell // side)
    return torch.cat([encode_place(column, dim // 2), encode_place(row, dim // 2)], dim=1)


def encode_place(place: Tensor, width: int) -> Tensor:
    omega = 10000.0 ** (-torch.arange(width // 2) / (width / 2))
    angle = place[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def after_zeros(table: Tensor, rows: int) -> Tensor:
    return torch.cat([table.new_zeros(rows, table.shape[1]), table])


def plain_buckets(rows: int, cols: int) -> Tensor:
    """Sort the distances between the cells of a grid into buckets."""
    row, col = torch.arange(rows).repeat_interleave(cols), torch.arange(cols).repeat(rows)
    difference = (row[:, None] - row) ** 2 + (col[:, None] - col) ** 2
    d = difference.float().sqrt().round()
    far = (1.9 + torch.log(d.clamp(min=1) / 1.9) / math.log(15.2 / 1.9) * 1.9).round().clamp(max=3.8)
    return torch.where(d <= 1.9, d, far).long() + 3


def with_class(index: Tensor, rows: int, cols: int) -> Tensor:
    """Put tokens without a place in front, whose bucket is the last."""
    return F.pad(index, (cols, 0, rows, 0), value=7)
