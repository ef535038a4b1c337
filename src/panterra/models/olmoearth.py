"""OlmoEarth: a transformer over patches of several sensors and dates (Ai2, 2025; v1, v1.1 and v1.2)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.features import Features, Tokens
from panterra.models.layers import Block, works_in_place
from panterra.models.normalize import olmoearth_range
from panterra.models.packed import Packed
from panterra.models.patches import to_patches
from panterra.models.pooling import instance_pool, patch_mean, spatial_pool
from panterra.models.positions import (
    TokenLine,
    axial_frequencies,
    days_since_2000,
    mixed_frequencies,
    month_table,
    sincos1d,
    sincos2d,
    token_coordinates,
)
from panterra.models.slots import align
from panterra.sample import Batch

OBSERVED = ("sentinel2_l2a", "sentinel1", "landsat")
"""What the released models were trained to look at."""
TARGET_ONLY = ("worldcover", "srtm", "openstreetmap_raster", "wri_canopy_height_map", "cdl", "worldcereal")
"""Maps that the released models only ever had to predict."""

SPATIAL_FACTOR = {"naip_10": 4}
"""Pixels per pixel of the common grid, along a side, where it is not 1."""
WIDEST = 2
"""Times the patch size that every patch is resized to: the widest that is embedded (OlmoEarth's fine-tuning)."""

Position = Literal["absolute", "rope", "rope_mixed", "rope_3d", "rope_3d_mixed", "none"]
Attend = Literal["masked", "published_eval", "published_fast"]
"""masked: only visible tokens take part, whatever else is in the batch (the default, and what training does).
published_eval: as the published evaluation code, in which shorter samples also attend to zero padding.
published_fast: as the published fast path, in which every token attends to every token, missing ones too."""

BandSets = tuple[tuple[str, ...], ...]

V1_BAND_SETS: Mapping[str, BandSets] = {
    "sentinel2_l2a": (("B02", "B03", "B04", "B08"), ("B05", "B06", "B07", "B8A", "B11", "B12"), ("B01", "B09")),
    "sentinel2": (("B02", "B03", "B04", "B08"), ("B05", "B06", "B07", "B8A", "B11", "B12"), ("B01", "B09", "B10")),
    "landsat": (("B8",), ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B9", "B10", "B11")),
}
"""How v1 groups bands into tokens; other modalities are one group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OlmoEarthConfig:
    """What an OlmoEarth encoder is made of; the defaults are those of v1."""

    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    modalities: tuple[str, ...] = OBSERVED + TARGET_ONLY
    observed: tuple[str, ...] = OBSERVED
    band_sets: Mapping[str, BandSets] = field(default_factory=dict)
    """Groups of bands that share a token, where they differ from `V1_BAND_SETS`."""
    base_patch_px: int = 8
    """The patch size that every patch is resized to."""
    convolution: bool = True
    """Order of a patch's features: (band, row, column), as in a convolution kernel, or else (row, column, band)."""
    pixel_hidden: tuple[int, ...] = ()
    """Widths of the layers that each pixel passes before its patch is formed."""
    post_hidden: tuple[int, ...] = ()
    """Widths of layers after the patch projection; the last one equals `dim`."""
    position: Position = "absolute"
    rope_base: float = 10000.0
    rope_scale: float = 1.0
    rope_mixed_base: float = 10000.0
    rope_time_fraction: float = 0.25
    rope_time_base: float | None = None
    rope_time_scale: float = 1.0
    """Multiplies days since 2000-01-01."""
    registers: int = 0
    qk_norm: bool = False
    drop_path: float = 0.1
    projection_layers: int = 1
    aggregate_first: bool = True
    output_dim: int | None = None

    def groups(self, modality: str) -> BandSets:
        """Bands per token of a modality."""
        whole = (MODALITIES[modality].band_names,)
        return self.band_sets.get(modality, V1_BAND_SETS.get(modality, whole))


def check_width(config: OlmoEarthConfig) -> None:
    """Refuse a width that the encodings or the heads cannot divide. Raises InputError.

    Each encoding has a quarter of the width, rounded down: sines and cosines, for places those of column and row.
    """
    dim, heads, turned = config.dim, config.heads, config.position.startswith("rope")
    parts = 4 if config.position == "absolute" else 2
    if min(dim, heads) < 1 or dim // 4 % parts or dim % (4 * heads if turned else heads):
        each = "4 per head" if turned else "the heads"
        raise InputError(f"a width of {dim} with {heads} heads; take a multiple of 16 and of {each}")


SIZES = {
    "nano": {"dim": 128, "depth": 4, "heads": 8},
    "tiny": {"dim": 192, "depth": 12, "heads": 3},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "large": {"dim": 1024, "depth": 24, "heads": 16},
}


def released_config(version: str, size: str) -> OlmoEarthConfig:
    """Give the configuration of a release: version "v1", "v1.1" or "v1.2", size as in `SIZES`."""
    config = OlmoEarthConfig(**SIZES[size])  # type: ignore[arg-type]
    if version == "v1":
        return config
    config = replace(
        config,
        convolution=False,
        pixel_hidden=(12 if size == "nano" else 64,),
        band_sets={name: (MODALITIES[name].band_names,) for name in ("sentinel2_l2a", "landsat")},
    )
    return config if version == "v1.1" else replace(config, position="rope_3d_mixed", rope_time_scale=1 / 30)


class PatchEmbedding(nn.Module):
    """Turn the pixels of one band set into one vector per patch and date."""

    def __init__(self, config: OlmoEarthConfig, modality: str, bands: tuple[str, ...]) -> None:
        super().__init__()
        names = MODALITIES[modality].band_names
        self.channels = [names.index(band) for band in bands]
        self.whole = self.channels == list(range(len(names)))
        self.spatial = MODALITIES[modality].kind in ("series", "still")
        self.factor = SPATIAL_FACTOR.get(modality, 1)
        self.size = config.base_patch_px * self.factor
        self.bands_last = not (self.spatial and config.convolution and not config.pixel_hidden)
        widths = (len(bands), *config.pixel_hidden) if self.spatial else (len(bands),)
        self.pixel = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.proj = nn.Linear(widths[-1] * (self.size**2 if self.spatial else 1), config.dim)
        post = (config.dim, *config.post_hidden) if self.spatial else (config.dim,)
        self.post = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(post))

    def forward(self, pixels: Float[Tensor, "b t c y x"], patch_px: int) -> Float[Tensor, "b h w t d"]:
        return rearrange(self.project(self.cut(pixels, patch_px)), "b t h w d -> b h w t d")

    def cut(self, pixels: Float[Tensor, "b t c y x"], patch_px: int) -> Float[Tensor, "b t h w features"]:
        """Cut images of the modality into resized patches, each a row of this band set's numbers."""
        if not self.whole:
            pixels = pixels[:, :, self.channels]
        if not self.spatial:
            return pixels[..., 0, 0][:, :, None, None]
        x = to_patches(pixels.flatten(0, 1), patch_px * self.factor, self.size, channels_last=self.bands_last)
        return rearrange(x, "(b t) h w f -> b t h w f", b=len(pixels))

    def project(self, x: Float[Tensor, "*b features"]) -> Float[Tensor, "*b d"]:
        """Embed patches."""
        if self.pixel:
            x = x.unflatten(-1, (self.size**2, -1))
            for layer in self.pixel:
                x = layer(x).relu_()
            x = x.flatten(-2)
        x = self.proj(x)
        for layer in self.post:
            x = layer(F.relu(x))
        return x

    def hide_bands(self, x: Float[Tensor, "n features"], kept: Bool[Tensor, "n bands"]) -> Float[Tensor, "n features"]:
        """Zero the bands of patches that are not among those kept of the modality."""
        kept = kept[:, self.channels]
        pixels = x.shape[1] // len(self.channels)
        return x * (kept.repeat(1, pixels) if self.bands_last else kept.repeat_interleave(pixels, dim=1))


def embed_patches(
    embeddings: nn.ModuleDict, inputs: Mapping[str, Float[Tensor, "b t c y x"]], patch_px: int
) -> dict[str, Float[Tensor, "b h w t s d"]]:
    """Embed the patches of normalised pixels by each modality's embeddings, one per band set, in their order."""
    return {
        m: torch.stack([embedding(inputs[m], patch_px) for embedding in sets.children()], dim=4)
        for m, sets in embeddings.items()
        if m in inputs
    }


Patches = Mapping[str, list[Float[Tensor, "b t _h _w _features"]]]
"""Resized patches of each modality, by band set."""


def cut_patches(embeddings: nn.ModuleDict, inputs: Mapping[str, Float[Tensor, "b t c y x"]], patch_px: int) -> Patches:
    """Cut normalised pixels into what the embeddings of each band set take."""
    return {
        m: [embedding.cut(inputs[m], patch_px) for embedding in _band_sets(embeddings, m)]
        for m in embeddings
        if m in inputs
    }


def _band_sets(embeddings: nn.ModuleDict, modality: str) -> Iterable[PatchEmbedding]:
    return cast(Iterable[PatchEmbedding], embeddings[modality])


def embed_chosen(
    embeddings: nn.ModuleDict,
    patches: Patches,
    chosen: Mapping[str, Bool[Tensor, "b _h _w _t _s"]],
    *,
    place: Int[Tensor, " b"] | None = None,
    kept: Mapping[str, Bool[Tensor, "b _bands"]] | None = None,
) -> Float[Tensor, "n d"]:
    """Embed the chosen tokens alone, in the order of `Packed.of` on the modalities in line.

    `place` says whose patches a sample has, if not its own, and `kept` which bands of some modalities it keeps.
    """
    line = torch.cat([mask.flatten(1) for mask in chosen.values()], dim=1)
    number = line.flatten().cumsum(0).view(line.shape).split([mask[0].numel() for mask in chosen.values()], dim=1)
    rows, order = [], []
    for (m, mask), numbers in zip(chosen.items(), number, strict=True):
        for s, (embedding, images) in enumerate(zip(_band_sets(embeddings, m), patches[m], strict=True)):
            b, h, w, t = mask[..., s].nonzero(as_tuple=True)
            image = b if place is None else place[b]
            _, dates, height, width, _ = images.shape
            x = images.flatten(0, 3).index_select(0, ((image * dates + t) * height + h) * width + w)
            if kept is not None and m in kept:
                x = embedding.hide_bands(x, kept[m][b])
            rows.append(embedding.project(x))
            order.append(numbers.view(mask.shape)[..., s][mask[..., s]])
    return torch.cat(rows).index_select(0, torch.cat(order).argsort())


class Encodings(nn.Module):
    """The additive part of a token's identity: channel, slot, month, place, a quarter of the width each (OlmoEarth)."""

    def __init__(self, config: OlmoEarthConfig, dim: int) -> None:
        super().__init__()
        self.dim, self.quarter = dim, dim // 4
        self.slots = config.position not in ("rope_3d", "rope_3d_mixed")
        self.places = config.position == "absolute"
        self.channel = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(len(config.groups(name)), self.quarter)) for name in config.modalities}
        )
        self.month = nn.Parameter(month_table(self.quarter), requires_grad=False)

    def add(
        self,
        tokens: Float[Tensor, "b h w t s d"],
        modality: str,
        month: Int[Tensor, "b t"],
        step: float,
    ) -> Float[Tensor, "b h w t s d"]:
        """Add the encodings in place to freshly made tokens; `step` is the distance of patches in 10 m times 1."""
        n, (_, rows, cols, steps, _, _) = self.quarter, tokens.shape
        kind = MODALITIES[modality].kind
        tokens[..., :n] += self.channel[modality]
        if kind in ("series", "weather"):
            if self.slots:
                tokens[..., n : 2 * n] += sincos1d(steps, n).to(tokens)[:, None]
            tokens[..., 2 * n : 3 * n] += self.month[month[:, :steps]][:, None, None, :, None]
        if self.places and kind in ("series", "still"):
            tokens[..., 3 * n : 4 * n] += sincos2d(rows, cols, n, step).to(tokens)[:, :, None, None]
        return tokens

    def of(self, line: TokenLine, packed: Packed, month: Int[Tensor, "b t"], step: float) -> Float[Tensor, "n d"]:
        """Give what `add` would add to some of the tokens in line."""
        token, n = packed.token, self.quarter
        channel = F.embedding(line.band_set[token], torch.cat([self.channel[m] for m in line.sizes]))
        date, place = line.date[token], line.place[token]
        rest = channel.new_zeros(len(token), self.dim - n)
        dated = date >= 0
        if self.slots:
            rest[:, :n] = sincos1d(line.dates, n).to(rest)[date] * dated[:, None]
        rest[:, n : 2 * n] = self.month[month[packed.sample, date]] * dated[:, None]
        if self.places:
            table = sincos2d(line.rows, line.cols, n, step).to(rest).flatten(0, 1)
            rest[:, 2 * n : 3 * n] = table[place] * (place >= 0)[:, None]
        return torch.cat([channel, rest], dim=1)


class Rotary(nn.Module):
    """Angles by which queries and keys turn with time, row and column; learnable or fixed (OlmoEarth)."""

    frequencies: Tensor

    def __init__(self, config: OlmoEarthConfig) -> None:
        super().__init__()
        depth, heads, head_dim = config.depth, config.heads, config.dim // config.heads
        self.axes = slice(0, 3) if config.position in ("rope_3d", "rope_3d_mixed") else slice(1, 3)
        self.scale = (config.rope_time_scale, config.rope_scale, config.rope_scale)
        if config.position in ("rope_mixed", "rope_3d_mixed"):
            axes = 3 if config.position == "rope_3d_mixed" else 2
            drawn = [mixed_frequencies(axes, heads, head_dim, base=config.rope_mixed_base) for _ in range(depth)]
            self.frequencies = nn.Parameter(torch.stack(drawn))
        else:
            fraction = config.rope_time_fraction if config.position == "rope_3d" else 0.0
            table = axial_frequencies(
                head_dim, base=config.rope_base, time_fraction=fraction, time_base=config.rope_time_base
            )
            self.register_buffer("frequencies", table[self.axes].expand(depth, -1, -1, -1).clone(), persistent=False)

    def turns(
        self, coordinates: Float[Tensor, "*b 3"], layers: slice = slice(None)
    ) -> Float[Tensor, "layers *b _heads pairs"]:
        """Give the angles of some layers, in float32 whatever the precision."""
        places = coordinates * torch.tensor(self.scale, device=coordinates.device)
        with torch.autocast(coordinates.device.type, enabled=False):
            return torch.einsum("...a,lahp->l...hp", places[..., self.axes], self.frequencies[layers].float())


class OlmoEarth(nn.Module):
    """The OlmoEarth encoder."""

    def __init__(
        self,
        config: OlmoEarthConfig,
        *,
        name: str = "olmoearth",
        attention: Attend = "masked",
        normalized_input: bool = False,
        align_days: int = 15,
    ) -> None:
        super().__init__()
        check_width(config)
        self.config, self.name = config, name
        self.licence: str | None = None
        self.attention, self.normalized_input, self.align_days = attention, normalized_input, align_days
        self.modalities = tuple(m for m in config.observed if m in config.modalities)
        self.dim = config.output_dim or config.dim
        self.patch_embeddings = nn.ModuleDict(
            {
                m: nn.ModuleList(PatchEmbedding(config, m, bands) for bands in config.groups(m))
                for m in config.modalities
            }
        )
        self.encodings = Encodings(config, config.dim)
        hidden = int(config.dim * config.mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, hidden, qk_norm=config.qk_norm, drop_path=config.drop_path)
            for _ in range(config.depth)
        )
        self.rotary = Rotary(config) if config.position.startswith("rope") else None
        self.norm = nn.LayerNorm(config.dim)
        self.registers = nn.Parameter(torch.zeros(config.registers, config.dim)) if config.registers else None
        self.output = nn.Linear(config.dim, config.output_dim) if config.output_dim else None
        self.projection = nn.ModuleList(nn.Linear(self.dim, self.dim) for _ in range(config.projection_layers))
        self._initialise()

    def _initialise(self) -> None:
        """Xavier for every linear layer but the patch projections, which keep the library's default (OlmoEarth)."""
        for part in (self.blocks, self.projection, self.output):
            for layer in part.modules() if part is not None else ():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        for m, sets in self.patch_embeddings.items():
            if MODALITIES[m].kind not in ("series", "still"):
                for layer in sets.modules():
                    if isinstance(layer, nn.Linear):
                        nn.init.xavier_uniform_(layer.weight)
                        nn.init.zeros_(layer.bias)
        for name, weight in self.blocks.named_parameters():
            if name.endswith("qkv.weight"):  # queries, keys and values are three layers to Xavier, one product to us
                for part_of_qkv in weight.chunk(3):
                    nn.init.xavier_uniform_(part_of_qkv)
        if self.registers is not None:
            nn.init.normal_(self.registers, std=0.02)

    def embed_patches(
        self, inputs: Mapping[str, Float[Tensor, "b t c y x"]], patch_px: int
    ) -> dict[str, Float[Tensor, "b h w t s d"]]:
        """Embed the patches of normalised pixels, without encodings."""
        return embed_patches(self.patch_embeddings, inputs, patch_px)

    def forward(
        self,
        inputs: Mapping[str, Float[Tensor, "b _t _c _y _x"]],
        timestamps: Int[Tensor, "b _T 3"],
        *,
        patch_px: int,
        pixel_m: float = 10.0,
        visible: Mapping[str, Bool[Tensor, "b _h _w _t _s"]] | None = None,
        attention: Attend = "masked",
    ) -> Tokens:
        """Encode normalised pixels [B, T, C, H, W] whose dates are the first T of `timestamps`.

        Timestamps hold (day 1-31, month 0-11, year). H and W are multiples of the patch. `visible` marks the tokens to
        look at, all of them where it is None.
        """
        embedded = self.embed_patches(inputs, patch_px)
        step = pixel_m * patch_px / 10
        month = timestamps[..., 1]
        days = days_since_2000(timestamps[..., 0], month, timestamps[..., 2])
        parts = {m: self.encodings.add(x, m, month, step) for m, x in embedded.items()}
        shapes = {m: x.shape for m, x in parts.items()}
        x = torch.cat([part.flatten(1, 4) for part in parts.values()], dim=1)
        place = token_coordinates(shapes, days, step) if self.rotary is not None else None
        seen = None if visible is None else torch.cat([visible[m].flatten(1) for m in parts], dim=1)
        if attention == "published_fast" or seen is None or bool(seen.all()):
            x = self._trunk(x, place, None)
        elif attention == "published_eval":
            x = self._leak(x, place, seen)
        else:
            x = self._pack(x, place, seen)
        if self.output is not None:
            x = self.output(x)
        aggregated = None
        if attention != "published_fast":
            aggregated = self._aggregate(x, seen)
        pieces = torch.split(x, [math.prod(s[1:5]) for s in shapes.values()], dim=1)
        tokens = {m: piece.reshape(*shapes[m][:5], -1) for m, piece in zip(shapes, pieces, strict=True)}
        if visible is None:
            visible = {m: x.new_ones((), dtype=torch.bool).expand(s[:5]) for m, s in shapes.items()}
        return Tokens(tokens=tokens, visible={m: visible[m] for m in shapes}, aggregated=aggregated)

    def encode_packed(
        self, x: Float[Tensor, "n d"], line: TokenLine, packed: Packed, timestamps: Int[Tensor, "b _T 3"], step: float
    ) -> tuple[Float[Tensor, "n e"], Float[Tensor, "b e"]]:
        """Encode embedded tokens of several samples in one row; the second result is what `Tokens.aggregated` is."""
        x = x + self.encodings.of(line, packed, timestamps[..., 1], step)
        place = None if self.rotary is None else line.coordinates(packed.sample, packed.token, timestamps, step)
        x = self._run(x, place, packed)
        if self.output is not None:
            x = self.output(x)
        if self.config.aggregate_first:
            return x, self._project(packed.mean(x))
        return x, packed.mean(self._project(x))

    def _pack(
        self, x: Float[Tensor, "b n d"], place: Tensor | None, seen: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b n d"]:
        """Run the trunk on visible tokens alone and put the results back among zeros."""
        packed = Packed.of(seen)
        if place is not None:
            place = place.expand(len(x), -1, -1)[seen]
        out = self._run(x[seen], place, packed)
        whole = out.new_zeros(x.shape)  # of the result's type, which is not that of x under autocast on a GPU
        whole[seen] = out
        return whole

    def _leak(
        self, x: Float[Tensor, "b n d"], place: Tensor | None, seen: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b n d"]:
        """Do the same with shorter samples filled up by zeros, at which all look (the published evaluation)."""
        packed = Packed.of(seen)
        short = packed.pad(x[seen]) * packed.valid[..., None]
        if place is not None:
            place = packed.pad(place.expand(len(x), -1, -1)[seen]) * packed.valid[..., None]
        out = self._trunk(short, place, None)
        whole = out.new_zeros(x.shape)
        whole[seen] = out[packed.valid]
        return whole

    def _run(self, x: Float[Tensor, "n d"], place: Float[Tensor, "n 3"] | None, packed: Packed) -> Float[Tensor, "n d"]:
        """Run the trunk on packed tokens; registers stand before each sample's."""
        extra, samples = self.config.registers, len(packed.lengths)
        if self.registers is None:
            out = self._trunk(x[None], None if place is None else place[None], packed)
            return out[0]
        sample = torch.cat([torch.arange(samples, device=x.device).repeat_interleave(extra), packed.sample])
        order = sample.argsort(stable=True)
        x = torch.cat([self.registers.repeat(samples, 1), x])[order]
        if place is not None:
            place = F.pad(place, (0, 0, extra * samples, 0))[order][None]
        out = self._trunk(x[None], place, Packed.build(sample[order], order, samples=samples))
        return out[0][order >= extra * samples]

    def _trunk(self, x: Float[Tensor, "b n d"], place: Tensor | None, packed: Packed | None) -> Float[Tensor, "b n d"]:
        if self.registers is not None and packed is None:
            extra = len(self.registers)
            x = torch.cat([self.registers.expand(len(x), -1, -1), x], dim=1)
            place = None if place is None else F.pad(place, (0, 0, extra, 0))
        in_place = not self.training and works_in_place(x)
        turns: Iterable[Tensor | None] = itertools.repeat(None)
        if self.rotary is not None and place is not None:
            layers = (slice(i, i + 1) for i in range(len(self.blocks)))
            turns = (self.rotary.turns(place, i)[0] for i in layers) if in_place else self.rotary.turns(place)
        for block, turn in zip(cast(Iterable[Block], self.blocks), turns, strict=False):
            if in_place:
                block.update(x, turn=turn, packed=packed)
            else:
                x = block(x, turn=turn, packed=packed)
        out: Tensor = self.norm(x if packed is not None else x[:, self.config.registers :])
        return out

    def _aggregate(self, x: Float[Tensor, "b n e"], seen: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b e"]:
        if not self.config.aggregate_first:
            x = self._project(x)
        if seen is None:
            pooled = x.mean(1)
        else:
            pooled = torch.where(seen[..., None], x, 0.0).sum(1) / seen.sum(1, keepdim=True).clamp(min=1)
        return self._project(pooled) if self.config.aggregate_first else pooled

    def _project(self, x: Float[Tensor, "*b e"]) -> Float[Tensor, "*b e"]:
        for i, layer in enumerate(self.projection):
            x = layer(F.relu(x) if i else x)
        return x

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False, tokens: bool = False) -> Features:
        """Embed a batch in declared units; patches are 1 to 8 pixels of the common grid (10 to 80 m at 10 m).

        Up to 16 work, on which no released model was trained.
        `patches` is the mean over dates and band sets of each modality, then over modalities; `summary` the mean over
        all tokens (OlmoEarth). Raises InputError for modalities or sizes that the model cannot take.
        """
        if dense:
            raise InputError("OlmoEarth has no sub-patch features; ask for a smaller patch_m instead of dense=True")
        pixel_m = self._grid_m(batch)
        patch_px = self._patch_px(pixel_m, patch_m)
        aligned = align(
            {m: batch.observations[m] for m in self._usable(batch, patch_px)}, tolerance_days=self.align_days
        )
        inputs, visible = {}, {}
        for m, o in aligned.observations.items():
            factor = SPATIAL_FACTOR.get(m, 1)
            pixels = o.pixels if self.normalized_input else _normalise(o.pixels, m)
            side = patch_px * factor if MODALITIES[m].kind in ("series", "still") else 1
            filled, any_valid = _fill(pixels, o.valid, side)
            if self.attention != "masked":  # the published code looks at the first pixel of a patch alone
                any_valid = o.valid[:, :, ::side, ::side]
            inputs[m] = filled.to(self.norm.weight.dtype)
            seen = rearrange(any_valid, "b t h w -> b h w t 1")
            visible[m] = seen.expand(*seen.shape[:4], len(self.config.groups(m)))
        out = self(
            inputs,
            aligned.timestamps,
            patch_px=patch_px,
            pixel_m=pixel_m,
            visible=visible,
            attention=self.attention,
        )
        patches, valid = patch_mean(out)
        return Features(
            patches=patches if self.attention == "masked" else spatial_pool(out),
            summary=instance_pool(out),
            valid=valid,
            patch_m=patch_m,
            tokens=out.tokens if tokens else None,
        )

    def _grid_m(self, batch: Batch) -> float:
        """Measure the pixels that patches are counted in: as a rule those of the common grid."""
        sizes = {
            m: batch.pixel_m * (MODALITIES[m].gsd * SPATIAL_FACTOR.get(m, 1) / 10)
            for m in batch.observations
            if m in self.modalities and MODALITIES[m].kind in ("series", "still")
        }
        if len({*sizes.values()}) > 1:
            listed = ", ".join(f"{m} ({size:g} m)" for m, size in sizes.items())
            raise InputError(f"patches cannot be the same pixels of {listed}; give those of one size at a time")
        return next(iter(sizes.values()), batch.pixel_m)

    def _patch_px(self, pixel_m: float, patch_m: float) -> int:
        patch_px, base = round(patch_m / pixel_m) if math.isfinite(patch_m) else 0, self.config.base_patch_px
        if abs(patch_px * pixel_m - patch_m) > 1e-6 or not 1 <= patch_px <= WIDEST * base:
            sizes = ", ".join(f"{n * pixel_m:g}" for n in range(1, base + 1))
            raise InputError(
                f"patch_m is {patch_m:g}; for {pixel_m:g} m pixels choose one of {sizes}, or a multiple of "
                f"{pixel_m:g} up to {WIDEST * base * pixel_m:g}, on which it was not trained"
            )
        return patch_px

    def _usable(self, batch: Batch, patch_px: int) -> list[str]:
        for m, o in batch.observations.items():
            if m not in self.config.modalities:
                raise InputError(f"{self.name} does not know {m}; it takes {', '.join(self.modalities)}")
            if m not in self.modalities:
                raise InputError(
                    f"{self.name} was trained to predict {m}, not to look at it; "
                    f"leave it out and give any of {', '.join(self.modalities)}"
                )
            side = patch_px * SPATIAL_FACTOR.get(m, 1)
            height, width = o.pixels.shape[-2:]
            if MODALITIES[m].kind in ("series", "still") and (height % side or width % side):
                raise InputError(
                    f"{m} of {height} x {width} pixels is not a whole number of {side}-pixel patches; crop or pad it"
                )
        return [m for m in self.config.modalities if m in batch.observations]


def _normalise(pixels: Float[Tensor, "b t c h w"], modality: str) -> Float[Tensor, "b t c h w"]:
    low, high = olmoearth_range(modality)
    scale = (1 / (high - low)).float().to(pixels.device)[:, None, None]
    shift = (-low / (high - low)).float().to(pixels.device)[:, None, None]
    return torch.addcmul(shift, pixels, scale)


def _fill(
    pixels: Float[Tensor, "b t c h w"], valid: Bool[Tensor, "b t h w"], side: int
) -> tuple[Float[Tensor, "b t c h w"], Bool[Tensor, "b t y x"]]:
    """Give invalid pixels the mean of their patch's valid ones (0.5, the overall mean, where it has none)."""
    if bool(valid.all()):
        return pixels, valid[:, :, ::side, ::side]
    cut = "b t c (h p) (w q) -> b t c h p w q"
    part = rearrange(torch.where(valid[:, :, None], pixels, 0.0), cut, p=side, q=side)
    seen = rearrange(valid[:, :, None], cut, p=side, q=side)
    count = seen.sum((4, 6), keepdim=True)
    mean = part.sum((4, 6), keepdim=True) / count.clamp(min=1)
    filled = torch.where(seen, part, torch.where(count > 0, mean, 0.5))
    return rearrange(filled, "b t c h p w q -> b t c (h p) (w q)"), (count > 0)[:, :, 0, :, 0, :, 0]
