"""Encoders as graphs: from pixels in declared units, dates and masks to features, without a step that depends on data.

The encoders themselves leave out what is missing, which is faster but gives every input a graph of its own. Here all
tokens stay, and masks keep the missing ones from taking part; results are equal up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.anysat import AnySat
from panterra.models.anysat_attention import HeadAttention, PatchBlock, PatchEncoder, buckets, places
from panterra.models.anysat_inputs import tile_mean
from panterra.models.anysat_projectors import (
    HEADS,
    CellProjector,
    Grid,
    SeriesProjector,
    encode_days,
    normalise_groups,
    pixel_order,
)
from panterra.models.anysat_sensors import CELL_M, Sensor, read_channels, sensor_of, to_pixel_size
from panterra.models.exported import Signature
from panterra.models.layers import MLP, Attention, Block, attend
from panterra.models.normalize import olmoearth_range
from panterra.models.olmoearth import SPATIAL_FACTOR, OlmoEarth, PatchEmbedding
from panterra.models.patches import to_patches
from panterra.models.positions import days_since_2000, sincos1d, sincos2d
from panterra.sample import Observation

Inputs = dict[str, Tensor]
"""Tensors by the names of `panterra.models.exported.Signature.inputs`."""
Outputs = tuple[Float[Tensor, "b h w d"], Float[Tensor, "b d"], Bool[Tensor, "b h w"]]
"""patches, summary and valid, as in `Features`; float32 whatever the precision inside."""

NOWHERE = -1e9
"""A score that leaves a key no share of attention, yet is a number where all keys have it."""


def graph_of(model: OlmoEarth | AnySat, signature: Signature, *, in_steps: bool = False) -> nn.Module:
    """Build the graph of an encoder for inputs of one shape, `in_steps` for engines other than torch.

    Raises InputError for what has no such graph.
    """
    graph: OlmoEarthGraph | AnySatGraph
    graph = OlmoEarthGraph(model, signature) if isinstance(model, OlmoEarth) else AnySatGraph(model, signature)
    graph.in_steps = in_steps
    return graph


class OlmoEarthGraph(nn.Module):
    """OlmoEarth on images of one size, any of which may be missing."""

    in_steps = False
    side: Tensor
    slot: Tensor
    place: Tensor

    def __init__(self, model: OlmoEarth, signature: Signature) -> None:
        super().__init__()
        if model.attention != "masked":
            raise InputError(f"attention={model.attention!r} cannot be exported; load the model without it")
        if odd := [m for m in signature.modalities if MODALITIES[m].kind != "series"]:
            raise InputError(f"{odd[0]} is no series of images, which an export of OlmoEarth takes; leave it out")
        self.model, self.modalities = model, signature.modalities
        self.patch_px = round(signature.patch_m / signature.pixel_m)
        rows = signature.window_px // self.patch_px
        step, quarter = signature.patch_m / 10, model.encodings.quarter
        side = torch.arange(rows) * step
        self.register_buffer("side", side.float())
        self.register_buffer("slot", sincos1d(signature.dates * len(self.modalities), quarter))
        self.register_buffer("place", sincos2d(rows, rows, quarter, step))
        self.ranges = nn.ParameterDict()
        for m in self.modalities:
            low, high = olmoearth_range(m)
            table = torch.stack([1 / (high - low), -low / (high - low)]).float()[..., None, None]
            self.ranges[m] = nn.Parameter(table, requires_grad=False)

    def forward(self, inputs: Inputs) -> Outputs:
        """Encode pixels [B, T, C, H, W], dates [B, T] in days since 1970 and valid [B, T, H, W] of each modality."""
        tokens, seen, where = {}, {}, {}
        for m in self.modalities:
            pixels, valid = inputs[f"{m}_pixels"], inputs[f"{m}_valid"]
            if not self.model.normalized_input:
                scale, shift = self.ranges[m].unbind()
                pixels = torch.addcmul(shift, pixels, scale)
            filled, visible = fill(pixels, valid, self.patch_px * SPATIAL_FACTOR.get(m, 1))
            sets = cast(Iterable[PatchEmbedding], self.model.patch_embeddings[m])
            dtype = self.model.norm.weight.dtype
            x = torch.stack([embed(embedding, filled.to(dtype), self.patch_px) for embedding in sets], dim=4)
            day, month, year = calendar(inputs[f"{m}_dates"])
            tokens[m] = x + self._encodings(m, x, month, inputs.get(f"{m}_slots")).to(dtype)
            seen[m] = rearrange(visible, "b t h w -> b h w t 1").expand(x.shape[:5])
            where[m] = self._coordinates(days_since_2000(day, month, year), x)
        out = self._trunk(*(torch.cat([z.flatten(1, 4) for z in part.values()], 1) for part in (tokens, seen, where)))
        parts = out.split([math.prod(x.shape[1:5]) for x in tokens.values()], dim=1)
        laid = {m: part.unflatten(1, tokens[m].shape[1:5]) for m, part in zip(tokens, parts, strict=True)}
        means = [masked_mean(laid[m].flatten(3, 4), seen[m].flatten(3)) for m in laid]
        found = torch.stack([count > 0 for _, count in means])
        patches = torch.stack([mean for mean, _ in means]).sum(0) / found.sum(0).clamp(min=1)[..., None]
        summary, _ = masked_mean(out, torch.cat([v.flatten(1) for v in seen.values()], dim=1))
        return patches.float(), summary.float(), found.any(0)

    def _encodings(
        self, m: str, x: Float[Tensor, "b h w t s d"], month: Int[Tensor, "b t"], slots: Int[Tensor, "b t"] | None
    ) -> Float[Tensor, "b h w t s d"]:
        encodings, grid = self.model.encodings, (*x.shape[:5], -1)
        blank = encodings.channel[m].new_zeros(1)
        channel = encodings.channel[m].expand(grid)
        slot = blank if slots is None else self.slot[slots][:, None, None, :, None]
        date = encodings.month[month][:, None, None, :, None]
        place = self.place[:, :, None, None] if encodings.places else blank
        rest = x.shape[-1] - 4 * encodings.quarter  # widths that are no multiple of four keep zeros at the end
        parts = [part.expand(*x.shape[:5], encodings.quarter) for part in (channel, slot, date, place)]
        return F.pad(torch.cat(parts, dim=-1), (0, rest))

    def _coordinates(self, days: Float[Tensor, "b t"], x: Float[Tensor, "b h w t s d"]) -> Float[Tensor, "b h w t s 3"]:
        parts = days[:, None, None, :, None], self.side[:, None, None, None], self.side[:, None, None]
        return torch.stack([part.expand(x.shape[:5]) for part in parts], dim=-1)

    def _trunk(
        self, x: Float[Tensor, "b n d"], seen: Bool[Tensor, "b n"], where: Float[Tensor, "b n 3"]
    ) -> Float[Tensor, "b n e"]:
        model, extra = self.model, self.model.config.registers
        if model.registers is not None:
            x = torch.cat([model.registers.expand(x.shape[0], -1, -1), x], dim=1)
            seen, where = F.pad(seen, (extra, 0), value=True), F.pad(where, (0, 0, extra, 0))
        # A sample without data looks at everything, since softmax over nothing is not a number; nobody looks at it.
        keys = seen | ~seen.any(1, keepdim=True)
        if model.rotary is not None:
            where = (where * torch.tensor(model.rotary.scale))[..., model.rotary.axes]
        for i, block in enumerate(cast(Iterable[Block], model.blocks)):
            angle = None
            if model.rotary is not None:
                angle = torch.einsum("bna,ahp->bnhp", where, model.rotary.frequencies[i].float())
            x = x + attention(block.attn, block.norm1(x), angle, keys, in_steps=self.in_steps)
            x = x + feed_forward(block.mlp, block.norm2(x))
        x = model.norm(x[:, extra:])
        return x if model.output is None else model.output(x)


def embed(part: PatchEmbedding, pixels: Float[Tensor, "b t c y x"], patch_px: int) -> Float[Tensor, "b h w t d"]:
    """Embed the patches of one band set."""
    bands = pixels if part.whole else pixels[:, :, part.channels]
    cut = to_patches(bands.flatten(0, 1), patch_px * part.factor, part.size, channels_last=part.bands_last)
    return part.project(cut.unflatten(0, (-1, pixels.shape[1]))).permute(0, 2, 3, 1, 4)


def attention(
    part: Attention,
    x: Float[Tensor, "b n d"],
    angle: Float[Tensor, "b n _h pairs"] | None,
    keys: Bool[Tensor, "b n"],
    *,
    in_steps: bool,
) -> Float[Tensor, "b n d"]:
    """Attend to the keys that take part, queries and keys turned by real arithmetic alone.

    `in_steps` leaves out torch's own kernel, which other engines spell out with twice as many passes over all pairs.
    """
    q, k, v = part.qkv(x).unflatten(-1, (3, part.heads, -1)).unbind(2)
    if part.q_norm is not None and part.k_norm is not None:
        q, k = part.q_norm(q), part.k_norm(k)
    if angle is not None:
        q, k = turn(q, angle), turn(k, angle)
    if not in_steps:
        found = attend(q, k, v, visible=keys)
    else:
        nowhere = torch.zeros_like(keys, dtype=q.dtype).masked_fill(~keys, NOWHERE)[:, :, None, None]
        # As one more channel it costs no pass of its own over all pairs.
        q = torch.cat([q * q.shape[-1] ** -0.5, torch.ones_like(q[..., :1])], dim=-1)
        k = torch.cat([k, nowhere.expand_as(k[..., :1])], dim=-1)
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
        found = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
    out: Tensor = part.proj(found.flatten(2))
    return out


def turn(x: Float[Tensor, "b n h d"], angle: Float[Tensor, "b n _h pairs"]) -> Float[Tensor, "b n h d"]:
    """Turn neighbouring pairs of channels, in float32 (graphs have no complex numbers)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def fill(
    pixels: Float[Tensor, "b t c h w"], valid: Bool[Tensor, "b t h w"], side: int
) -> tuple[Float[Tensor, "b t c h w"], Bool[Tensor, "b t y x"]]:
    """Give invalid pixels the mean of their patch's valid ones, 0.5 where it has none, and say which patches have."""
    cut = "b t c (h p) (w q) -> b t c h w (p q)"
    part, seen = rearrange(pixels, cut, p=side, q=side), rearrange(valid[:, :, None], cut, p=side, q=side)
    mean, count = masked_mean(part[..., None], seen)
    other = torch.where(count[..., None] > 0, mean, 0.5)
    filled = torch.where(seen, part, other)
    whole = rearrange(filled, "b t c h w (p q) -> b t c (h p) (w q)", p=side, q=side)
    return whole, count[:, :, 0] > 0


def masked_mean(
    x: Float[Tensor, "*b n d"], seen: Bool[Tensor, "*b n"]
) -> tuple[Float[Tensor, "*b d"], Int[Tensor, "*b"]]:
    """Average what is seen, zero where nothing is, and count it."""
    count = seen.sum(-1)
    return torch.where(seen[..., None], x, 0.0).sum(-2) / count.clamp(min=1)[..., None], count


def calendar(days: Int[Tensor, "b t"]) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Split days since 1970-01-01 into day 1-31, month 0-11 and year, by whole numbers alone.

    Years start in March, so that the leap day is the last (Howard Hinnant, "chrono-compatible low-level date
    algorithms").
    """
    shifted = days + 719468
    era = _whole(shifted, 146097)
    day_of_era = shifted - era * 146097
    leaps = _whole(day_of_era, 1460) - _whole(day_of_era, 36524) + _whole(day_of_era, 146096)
    year_of_era = _whole(day_of_era - leaps, 365)
    day = day_of_era - (365 * year_of_era + _whole(year_of_era, 4) - _whole(year_of_era, 100))
    march = _whole(5 * day + 2, 153)
    month = (march + 2) % 12
    return day - _whole(153 * march + 2, 5) + 1, month, year_of_era + era * 400 + (month < 2).long()


def day_of_year(days: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Turn days since 1970-01-01 into 1 to 366."""
    before = calendar(days)[2] - 1
    first = 365 * before + _whole(before, 4) - _whole(before, 100) + _whole(before, 400) - 719162
    return days - first + 1


def _whole(x: Tensor, by: int) -> Tensor:
    return torch.div(x, by, rounding_mode="floor")


class AnySatGraph(nn.Module):
    """AnySat on tiles of one size, of which any dates, pixels and sensors may be missing."""

    in_steps = False

    def __init__(self, model: AnySat, signature: Signature) -> None:
        super().__init__()
        if model.missing != "masked":
            raise InputError(f"missing={model.missing!r} cannot be exported; load the model without it")
        chosen = {m: sensor_of(m, model.sensors) for m in signature.modalities}
        self.sensors = {m: sensor for m, sensor in chosen.items() if sensor is not None}
        self.model, self.signature = model, signature
        if all(sensor.whole for sensor in self.sensors.values()):
            raise InputError("no modality has an extent, so there are no patches; add one that has")
        rows = round(signature.window_px * signature.pixel_m / signature.patch_m)
        self.grid = Grid(rows=rows, cols=rows, scale=round(signature.patch_m / CELL_M))

    def forward(self, inputs: Inputs) -> Outputs:
        """Encode pixels [B, T, C, H, W], dates [B, T] in days since 1970 and valid [B, T, H, W] of each modality."""
        model, grid = self.model, self.grid
        rows, seen = {}, {}
        for m, sensor in self.sensors.items():
            o = Observation(pixels=inputs[f"{m}_pixels"], dates=inputs[f"{m}_dates"], valid=inputs[f"{m}_valid"])
            cells, visible = self._cells(self._on_own_pixels(o, m, sensor), m, sensor)
            side = sensor.side(grid.scale)
            cells = cells + places(side, side, sensor.place_m, model.dim).to(cells)
            flat = cells.flatten(0, 1), visible.flatten(0, 1)
            vectors = patch_vectors(model.patch_encoder, *flat, in_steps=self.in_steps)
            rows[m], seen[m] = vectors.unflatten(0, cells.shape[:2]), visible.any(2)
        order = sorted(self.sensors, key=lambda m: not self.sensors[m].whole)
        extent = [m for m in order if not self.sensors[m].whole]
        alone = [rows[m] for m in order if self.sensors[m].whole]
        first = rows[extent[0]]
        whole = torch.cat(alone, dim=1) if alone else first[:, :0]
        placed = torch.cat([rows[m] + model.places(grid).to(first) for m in extent], dim=1)
        keys = torch.cat([seen[m] for m in order], dim=1)
        combined = self._combine(placed, whole, keys).float()
        valid = torch.stack([seen[m] for m in extent]).any(0).unflatten(1, (grid.rows, grid.cols))
        image = combined[:, 1 + len(alone) :].unflatten(1, (grid.rows, grid.cols))
        patches = torch.where(valid[..., None], image, 0.0)
        return patches, torch.where(keys.any(1, keepdim=True), combined[:, 0], 0.0), valid

    def _on_own_pixels(self, o: Observation, modality: str, sensor: Sensor) -> Observation:
        """Do what `panterra.models.anysat.on_own_pixels` does."""
        if sensor.whole:
            return tile_mean(o)
        step = round(MODALITIES[modality].gsd / self.signature.pixel_m)
        if step <= 1:
            return o
        middle = slice(step // 2, None, step)
        return replace(o, pixels=o.pixels[..., middle, middle], valid=o.valid[..., middle, middle])

    def _combine(
        self, tokens: Float[Tensor, "b m d"], whole: Float[Tensor, "b w d"], seen: Bool[Tensor, "b l"]
    ) -> Float[Tensor, "b n d"]:
        """Do what `AnySat.combine` does with every patch."""
        model, grid, extra = self.model, self.grid, 1 + whole.shape[1]
        x = torch.cat([model.class_token.expand(whole.shape[0], -1, -1), whole, tokens], dim=1)
        keys = F.pad(seen, (1, 0), value=True)
        for block in cast(Iterable[Block], model.blocks):
            if isinstance(block.attn, HeadAttention):
                x = x + block.attn(block.norm1(x))
            else:
                x = x + attention(block.attn, block.norm1(x), None, keys, in_steps=self.in_steps)
            x = x + feed_forward(block.mlp, block.norm2(x))
        index, part = buckets(grid.rows, grid.cols, extra), model.combiner
        index = torch.cat([index[:, :extra], index[:, extra:].repeat(1, tokens.shape[1] // len(index[extra:]))], dim=1)
        y, place = part.norm1(x), F.pad(model.places(grid), (0, 0, extra, 0)).to(x)[None]
        q, k, v = (
            z.unflatten(-1, (part.heads, -1)).transpose(1, 2)
            for z in ((part.query + place).expand(x.shape[0], -1, -1), part.key(y), part.value(y))
        )
        mixed = attend_by_distance(q, k, v, q[:, 0], part.distance, index, keys, in_steps=self.in_steps)
        out: Tensor = part.proj(mixed)
        return out + feed_forward(part.mlp, part.norm2(out))

    def _cells(
        self, o: Observation, modality: str, sensor: Sensor
    ) -> tuple[Float[Tensor, "b p n d"], Bool[Tensor, "b p n"]]:
        pixels, valid = o.pixels, o.valid
        if not sensor.dated:
            pixels, valid = to_pixel_size(o, sensor, MODALITIES[modality].gsd)
        values = read_channels(pixels, sensor, modality)
        if not self.model.normalized_input:
            values = self.model.statistics[sensor.name].standardise(values)
        values = torch.where(valid[:, :, None], values, 0.0).to(self.model.class_token.dtype)
        part = self.model.projectors[sensor.name]
        if isinstance(part, SeriesProjector):
            return embed_series(part, values, day_of_year(o.dates), valid, self.grid)
        return embed_cells(cast(CellProjector, part), values, valid, self.grid)


def patch_vectors(
    part: PatchEncoder, tokens: Float[Tensor, "b n d"], visible: Bool[Tensor, "b n"], *, in_steps: bool
) -> Float[Tensor, "b d"]:
    """Encode the sub-patches of each patch into one vector."""
    index = buckets(math.isqrt(tokens.shape[1]), math.isqrt(tokens.shape[1]))
    x = torch.cat([part.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    keys = F.pad(visible, (1, 0), value=True)
    *blocks, last = cast(Sequence[PatchBlock], part.blocks)
    for block in blocks:
        y = block.norm1(x)
        q, k, v = block.attn.qkv(y).unflatten(-1, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        query = q[:, 0] / math.sqrt(q.shape[-1])
        mixed = attend_by_distance(q, k, v, query, block.attn.distance, index, keys, in_steps=in_steps)
        x = x + block.attn.proj(mixed)
        x = x + feed_forward(block.mlp, block.norm2(x))
    first = x[:, 0] + last.attn.first(last.norm1(x), visible=keys)[:, 0]
    out: Tensor = part.norm(first + feed_forward(last.mlp, last.norm2(first)))
    return out


def attend_by_distance(
    q: Float[Tensor, "b h n e"],
    k: Float[Tensor, "b h m e"],
    v: Float[Tensor, "b h m e"],
    query: Float[Tensor, "b n e"],
    table: Float[Tensor, "1 e k"],
    index: Int[Tensor, "n m"],
    keys: Bool[Tensor, "b m"],
    *,
    in_steps: bool,
) -> Float[Tensor, "b n d"]:
    """Attend with the score of each key's bucket added, which is one gather with indices that are known beforehand."""
    scores = (query @ table[0]).flatten(1)
    first = torch.arange(len(index))[:, None] * table.shape[2]
    bias = scores[:, (first + index).flatten()].unflatten(1, index.shape)[:, None]
    nowhere = torch.zeros_like(keys, dtype=q.dtype).masked_fill(~keys, NOWHERE)[:, None, None]
    if not in_steps:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias + nowhere).transpose(1, 2).flatten(2)
    pairs = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + (bias + nowhere)
    out: Tensor = (pairs.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out


def feed_forward(part: MLP, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """Apply an MLP in plain operations."""
    out: Tensor = part.fc2(F.gelu(part.fc1(x)))
    return out


def embed_series(
    part: SeriesProjector,
    values: Float[Tensor, "b t c y x"],
    days: Int[Tensor, "b t"],
    valid: Bool[Tensor, "b t y x"],
    grid: Grid,
) -> tuple[Float[Tensor, "b p n d"], Bool[Tensor, "b p n"]]:
    """Embed the pixels of each patch with all their dates, of which the invalid ones get no weight."""
    used, back = pixel_order(part.sensor, grid, *values.shape[-2:])
    x = values.flatten(3)[..., used].permute(0, 3, 1, 2)
    seen = valid.flatten(2)[..., used].transpose(1, 2)
    width, (b, n) = part.out_norm.num_channels // HEADS, seen.shape[:2]
    codes = encode_days(days, width, part.sensor.period).to(x.dtype)[:, None].expand(-1, n, -1, -1)
    keys = seen.flatten(0, 1)
    dated = normalise_dates(part, part.lift(x.flatten(0, 1)), keys) + codes.flatten(0, 1)[:, :, None]
    weights = part.attend_dates(dated.flatten(2), keys)
    pooled = torch.einsum("hnt,nthm->nhm", weights, dated).flatten(1)
    tokens = normalise_groups(part.output(pooled), part.out_norm).unflatten(0, (b, n))
    found = seen.any(2)
    if len(back) != len(used):
        tokens, found = tokens[:, back], found[:, back]
    side = part.sensor.side(grid.scale) ** 2
    return tokens.unflatten(1, (-1, side)), found.unflatten(1, (-1, side))


def normalise_dates(
    part: SeriesProjector, x: Float[Tensor, "n t d"], keys: Bool[Tensor, "n t"]
) -> Float[Tensor, "n t h m"]:
    """Do what `SeriesProjector.normalise_dates` does, to `keys` alone: masks touch sums over channels, not channels."""
    groups: Tensor = x.unflatten(-1, (HEADS, -1))
    if (norm := part.in_norm) is None:
        return groups
    here, count = keys[..., None], keys.sum(1)[:, None, None] * groups.shape[-1]
    mean = torch.where(here, groups.sum(-1), 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    centred = groups - mean[..., None]
    squares = torch.where(here, torch.linalg.vector_norm(centred, dim=-1).square(), 0.0).sum(1, keepdim=True)
    # A pixel without data has no variance; 1 keeps what nobody looks at of the size of the rest, as int8 needs it.
    variance = torch.where(count > 0, squares / count.clamp(min=1), 1.0)
    weight, bias = (z.unflatten(0, (HEADS, -1)) for z in (norm.weight, norm.bias))
    out: Tensor = centred * (torch.rsqrt(variance + norm.eps)[..., None] * weight) + bias
    return out


def embed_cells(
    part: CellProjector, values: Float[Tensor, "b 1 c y x"], valid: Bool[Tensor, "b 1 y x"], grid: Grid
) -> tuple[Float[Tensor, "b p n d"], Bool[Tensor, "b p n"]]:
    """Embed the cells of each patch, whose invalid pixels take the mean of their cell."""
    c, k, s = part.sensor.cells, part.sensor.kernel, grid.scale
    order = "b C (R r i m) (Q q j n) -> b (R Q) (r q i j) C (m n)"
    image, seen = (
        rearrange(x[..., : grid.rows * s * c * k, : grid.cols * s * c * k], order, r=s, i=c, m=k, q=s, j=c, n=k)
        for x in (values[:, 0], valid)
    )
    mean, count = masked_mean(image[..., None], seen)
    filled = torch.where(seen, image, mean).flatten(-2)
    embedded = part.norm1(part.expand(F.linear(filled, part.embed.weight.flatten(1))))
    return F.relu(part.norm2(part.shrink(F.relu(embedded)))), count[..., 0] > 0
