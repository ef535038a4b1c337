"""AnySat: one encoder for any mix of sensors, resolutions and tile sizes (Astruc et al., CVPR 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.models.anysat_attention import (
    Combiner,
    Layout,
    PatchBlock,
    PatchEncoder,
    buckets,
    check_width,
    fusion_block,
    places,
)
from panterra.models.anysat_inputs import (
    as_published,
    check_extent,
    check_grid,
    check_memory,
    choose_sensors,
    fit_scale,
    on_own_pixels,
    preferred,
    read_input,
    whole_cells,
)
from panterra.models.anysat_projectors import CellProjector, Grid, Input, SeriesProjector
from panterra.models.anysat_sensors import CELL_M, SENSORS, Sensor, declare, finetuning_sensors, sensor_of
from panterra.models.anysat_statistics import Statistics, as_json, fit_statistics, statistics_from_json
from panterra.models.features import Features
from panterra.models.layers import Block, works_in_place
from panterra.sample import Batch, Observation

Missing = Literal["masked", "published"]
"""masked: what is not valid takes no part (the default). published: as the published code, in which dates without data
are zeros on day 0, other missing values become a constant, all are attended like data, and dense features of cells
finer than 10 m are out of order inside a patch larger than 10 m."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnySatConfig:
    """What an AnySat encoder is made of."""

    dim: int
    """A multiple of 32 and of the heads."""
    depth: int
    """Blocks inside a patch, and as many between patches."""
    heads: int
    sensors: tuple[Sensor, ...] = field(default_factory=lambda: tuple(SENSORS.values()))
    layout: Layout = "tokens"
    """What attends to what between patches."""


SIZES = {
    "tiny": {"dim": 192, "depth": 6, "heads": 3},
    "small": {"dim": 384, "depth": 6, "heads": 6},
    "base": {"dim": 768, "depth": 6, "heads": 12},
    "hub-tiny": {"dim": 256, "depth": 2, "heads": 4},
    "hub-small": {"dim": 512, "depth": 4, "heads": 8},
}
"""tiny, small and base are those of the published training; the published hub has a tiny and a small of its own."""


def anysat_config(size: str) -> AnySatConfig:
    """Give the configuration of a size in `SIZES`. Raises InputError."""
    if size not in SIZES:
        raise InputError(f"AnySat has no size {size!r}; known: {', '.join(SIZES)}")
    return AnySatConfig(**SIZES[size])  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What the sensors say of each patch, before they are brought together."""

    tokens: dict[str, Float[Tensor, "b p d"]]
    """One vector per patch in raster order for each sensor with an extent, without its place."""
    visible: dict[str, Bool[Tensor, "b _p"] | None]
    """Which patches have data of each sensor, whole ones included; None where all have."""
    whole: Float[Tensor, "b w d"]
    """One vector for each sensor that sees the tile as a whole, such as MODIS; w may be 0."""
    grid: Grid
    cells: Float[Tensor, "b p n d"] | None
    """Sub-patches of the sensor that was asked for."""
    cells_visible: Bool[Tensor, "b p n"] | None

    def seen(self) -> Bool[Tensor, "b l"] | None:
        """Line up what is visible in the order whole, then sensor by sensor; None where all is."""
        if all(seen is None for seen in self.visible.values()):
            return None
        b, device = len(self.whole), self.whole.device
        ones = {name: torch.ones(b, x.shape[1], dtype=torch.bool, device=device) for name, x in self.tokens.items()}
        whole = [name for name in self.visible if name not in self.tokens]
        ones |= {name: torch.ones(b, 1, dtype=torch.bool, device=device) for name in whole}
        found = {name: seen if (seen := self.visible[name]) is not None else ones[name] for name in ones}
        return torch.cat([found[name] for name in (*whole, *self.tokens)], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What the encoder gives back."""

    tile: Float[Tensor, "b d"]
    patches: Float[Tensor, "b h w d"]
    """Empty where only the tile was asked for."""
    whole: Float[Tensor, "b w d"]
    """The rows of sensors that see the tile as a whole, which published fine-tuning keeps between tile and patches."""
    dense: Float[Tensor, "b y x e"] | None
    """Patch and sub-patch vector side by side for each cell of the sensor that was asked for; zeros without data."""
    embedded: Embedded


class AnySat(nn.Module):
    """The AnySat encoder."""

    def __init__(
        self,
        config: AnySatConfig,
        *,
        name: str = "anysat",
        missing: Missing = "masked",
        normalized_input: bool = False,
        statistics: Mapping[str, Statistics] | None = None,
    ) -> None:
        super().__init__()
        if config.sensors:  # whose projectors group channels; blocks alone take any width that heads divide
            check_width(config.dim, config.heads, "encoder")
        self.name, self.missing, self.normalized_input = name, missing, normalized_input
        self.licence: str | None = None
        self.statistics = dict(statistics or {})
        self.config = config
        self.dim = config.dim
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.projectors = nn.ModuleDict({sensor.name: projector(sensor, config.dim) for sensor in config.sensors})
        self.patch_encoder = PatchEncoder(config.dim, config.depth, config.heads)
        self.blocks = nn.ModuleList(
            fusion_block(config.dim, config.heads, layout=config.layout) for _ in range(config.depth)
        )
        self.combiner = Combiner(config.dim, config.heads)
        for sensor in config.sensors:
            declare(sensor)
        initialise(self)

    @property
    def sensors(self) -> dict[str, Sensor]:
        """The sensors by name."""
        return {sensor.name: sensor for sensor in self.config.sensors}

    @property
    def modalities(self) -> tuple[str, ...]:
        """The rows of `MODALITIES` it takes, those without which AnySat is rarely used first."""
        return preferred(self.config.sensors)

    @property
    def dense_dim(self) -> int:
        """Width of a sub-patch's vector, which begins with that of its patch."""
        return 2 * self.dim

    def sub_patches_m(self, patch_m: float) -> dict[str, float]:
        """Give the side of the sub-patches in metres, for each modality that has them, in order of preference."""
        scale = whole_cells(patch_m)
        sensors = {m: sensor_of(m, self.sensors) for m in self.modalities}
        return {m: patch_m / s.side(scale) for m, s in sensors.items() if s is not None and not s.whole}

    def forward(
        self,
        inputs: Mapping[str, Input],
        *,
        scale: int,
        dense: str | None = None,
        patches: bool = True,
        published_order: bool = False,
    ) -> Encoded:
        """Encode standardised inputs, keyed by sensor, with patches of `scale` times 10 m.

        Sides that are no multiple of the patch lose the rest, at the bottom and on the right. `dense` names the sensor
        whose sub-patches are wanted. `patches=False` computes the tile's vector alone, never with `dense`.
        Raises InputError.
        """
        assert patches or dense is None
        embedded = self.embed(inputs, scale=scale, dense=dense)
        grid = embedded.grid
        place = self.places(grid).to(embedded.whole)
        tokens = [x + place for x in embedded.tokens.values()]
        placed = torch.cat(tokens, dim=1) if tokens else embedded.whole[:, :0]
        out = self.combine(placed, embedded.whole, grid, visible=embedded.seen(), patches=patches)
        extra = 1 + embedded.whole.shape[1]
        image = out[:, extra:].unflatten(1, (grid.rows, grid.cols) if patches else (0, 0))
        cells = None
        if dense is not None and embedded.cells is not None:
            both = torch.cat([out[:, extra:, None].expand_as(embedded.cells), embedded.cells], dim=-1)
            if embedded.cells_visible is not None:
                both = torch.where(embedded.cells_visible[..., None], both, 0.0)
            cells = cells_to_image(both, grid, self.sensors[dense], published=published_order)
        return Encoded(tile=out[:, 0], patches=image, whole=out[:, 1:extra], dense=cells, embedded=embedded)

    def embed(self, inputs: Mapping[str, Input], *, scale: int, dense: str | None = None) -> Embedded:
        """Turn each sensor's patches into one vector each, without the places that distinguish them."""
        grid = self._grid(inputs, scale)
        if dense is not None and (dense not in inputs or self.sensors[dense].whole):
            raise InputError(
                f"dense features of {dense!r} were asked for; choose one of {', '.join(inputs)} with patches"
            )
        cells, seen = {}, {}
        for name, given in inputs.items():
            sensor = self.sensors[name]
            side = sensor.side(scale)
            tokens, seen[name] = self.projectors[name](given, grid)
            cells[name] = tokens + places(side, side, sensor.place_m, self.dim).to(tokens)
        encoded = self._encode_patches(cells, seen, dense)
        rows = {name: x[:, :, 0] for name, x in encoded.items()}
        whole = [x for name, x in rows.items() if self.sensors[name].whole]
        first = next(iter(rows.values()))
        return Embedded(
            tokens={name: x for name, x in rows.items() if not self.sensors[name].whole},
            visible={name: None if v is None else v.any(2) for name, v in seen.items()},
            whole=torch.cat(whole, dim=1) if whole else first.new_zeros(len(first), 0, self.dim),
            grid=grid,
            cells=None if dense is None else encoded[dense][:, :, 1:],
            cells_visible=None if dense is None else seen[dense],
        )

    def _encode_patches(
        self,
        cells: Mapping[str, Float[Tensor, "b _p _n d"]],
        seen: Mapping[str, Bool[Tensor, "b _p _n"] | None],
        dense: str | None,
    ) -> dict[str, Float[Tensor, "b _p _m d"]]:
        """Run the patch encoder, once for all sensors whose patches are alike."""
        groups: dict[tuple[int, bool, bool], list[str]] = {}
        for name, x in cells.items():
            groups.setdefault((x.shape[2], seen[name] is None, name == dense), []).append(name)
        encoded = {}
        for (_, all_seen, is_dense), names in groups.items():
            flat = [cells[name].flatten(0, 1) for name in names]
            keys = None if all_seen else torch.cat([v.flatten(0, 1) for n in names if (v := seen[n]) is not None])
            out = self.patch_encoder(torch.cat(flat), visible=keys, dense=is_dense)
            for name, part in zip(names, out.split([len(x) for x in flat]), strict=True):
                encoded[name] = part.unflatten(0, cells[name].shape[:2])
        return {name: encoded[name] for name in cells}

    def places(self, grid: Grid) -> Float[Tensor, "p d"]:
        """Encode where the patches of a tile are, in units of 10 m."""
        return places(grid.rows, grid.cols, grid.scale, self.dim)

    def combine(
        self,
        tokens: Float[Tensor, "b m d"],
        whole: Float[Tensor, "b w d"],
        grid: Grid,
        *,
        context: Int[Tensor, "b k"] | None = None,
        visible: Bool[Tensor, "b l"] | None = None,
        patches: bool = True,
        published_places: bool = False,
    ) -> Float[Tensor, "b n d"]:
        """Bring all tokens together: one row for the tile, one for each whole sensor, one for each patch.

        `tokens` run sensor by sensor and carry their places. `context` says which patches they are, in the same order
        for each sensor; None: all. `published_places` asks for a context patch at the place of the one before it where
        there is a whole sensor, as published pretraining does.
        """
        x = torch.cat([self.class_token.expand(len(whole), -1, -1), whole, tokens], dim=1)
        keys = None if visible is None else F.pad(visible, (1, 0), value=True)
        in_place = not self.training and works_in_place(x)
        for block in cast(Iterable[Block], self.blocks):
            if in_place:
                block.update(x, visible=keys)
            else:
                x = block(x, visible=keys)
        extra = 1 + whole.shape[1]
        index = buckets(grid.rows, grid.cols, extra).to(x.device)
        place = F.pad(self.places(grid), (0, 0, extra, 0)).to(x)
        if context is None:
            repeats = tokens.shape[1] // (grid.rows * grid.cols)
            index = torch.cat([index[:, :extra], index[:, extra:].repeat(1, repeats)], dim=1)[None]
            place = place[None]
        else:
            front = torch.arange(extra, device=x.device).expand(len(x), -1)
            rows = torch.cat([front, context + extra], dim=1)
            cols = torch.cat([front, (context + extra).repeat(1, tokens.shape[1] // context.shape[1])], dim=1)
            index = index[rows[:, :, None], cols[:, None, :]]
            shift = int(published_places and extra > 1)
            place = place[torch.cat([front, context + extra - shift], dim=1)]
        if not patches:
            place, index = place[:, :extra], index[:, :extra]
        out: Tensor = self.combiner(x, place, index, visible=keys)
        return out

    def _grid(self, inputs: Mapping[str, Input], scale: int) -> Grid:
        unknown = [name for name in inputs if name not in self.projectors]
        if unknown or not inputs:
            raise InputError(f"inputs are {sorted(inputs)}; give any of {', '.join(self.sensors)}")
        sizes: dict[str, tuple[int, int]] = {}
        for name, given in inputs.items():
            if not self.sensors[name].whole:
                height, width = given.values.shape[-2:]
                sizes[name] = cast(CellProjector, self.projectors[name]).size(height, width, scale)
        if not sizes:
            return Grid(rows=1, cols=1, scale=scale)
        if len(set(sizes.values())) > 1:
            raise InputError(f"sensors cover different ground, in patches: {sizes}; crop them to the same place")
        rows, cols = next(iter(sizes.values()))
        if not rows or not cols:
            raise InputError(f"the tile is smaller than one patch of {CELL_M * scale:g} m; choose a smaller patch")
        return Grid(rows=rows, cols=cols, scale=scale)

    def encode(self, batch: Batch, *, patch_m: float, dense: bool | str = False) -> Features:
        """Embed a batch in declared units, with patches of any multiple of 10 m; of Planet alone, of 12 m too.

        `dense` adds a vector for each sub-patch of the modality it names, or of the one with the smallest; of several,
        the one it prefers.
        Where a tile is not a whole number of patches, or a sensor has no statistics, InputError says what to do.
        """
        chosen = choose_sensors(batch, self.sensors, name=self.name)
        check_grid(batch, chosen)
        scale, chosen = fit_scale(chosen, patch_m)
        batch = on_own_pixels(batch, chosen)
        check_extent(batch, chosen, patch_m)
        check_memory(batch, chosen, patch_m, self.class_token.device)
        inputs = {s.name: self._input(batch.observations[m], m, s) for m, s in chosen.items()}
        fine = None
        if dense:
            able = {m: s for m, s in chosen.items() if not s.whole}
            if not able or (isinstance(dense, str) and dense not in able):
                raise InputError(f"dense features need one of {', '.join(able) or 'the sensors with an extent'}")
            finest = max((m for m in self.modalities if m in able), key=lambda m: able[m].side(scale))
            fine = able[dense if isinstance(dense, str) else finest]
        published = self.missing == "published"
        out = self(inputs, scale=scale, dense=fine and fine.name, published_order=published)
        return self._features(out, inputs, patch_m)

    def _features(self, out: Encoded, inputs: Mapping[str, Input], patch_m: float) -> Features:
        """Put zeros where there was no data."""
        embedded, grid = out.embedded, out.embedded.grid
        extent = [name for name in inputs if not self.sensors[name].whole] or list(inputs)
        every = torch.ones(len(out.tile), grid.rows * grid.cols, dtype=torch.bool, device=out.tile.device)
        found = [seen if (seen := embedded.visible[name]) is not None else every for name in extent]
        valid = torch.stack(found).any(0).unflatten(1, (grid.rows, grid.cols))
        seen = embedded.seen()
        return Features(
            patches=torch.where(valid[..., None], out.patches, 0.0),
            summary=out.tile if seen is None else torch.where(seen.any(1, keepdim=True), out.tile, 0.0),
            valid=valid,
            patch_m=patch_m,
            dense=out.dense,
        )

    def missing_statistics(self, modalities: Iterable[str]) -> tuple[str, ...]:
        """Name the modalities that it cannot standardise yet."""
        sensors = {m: sensor_of(m, self.sensors) for m in modalities if not self.normalized_input}
        return tuple(m for m, sensor in sensors.items() if sensor is not None and sensor.name not in self.statistics)

    def fit_statistics(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Fit the statistics of every sensor that occurs, in one pass; give them as plain JSON."""
        return {name: as_json(found) for name, found in fit_statistics(batches, self.sensors).items()}

    def with_statistics(self, statistics: Mapping[str, Any]) -> Self:
        """Give the same encoder, sharing its weights, that standardises by these where it knew others or none."""
        if unknown := [name for name in statistics if name not in self.sensors]:
            raise InputError(f"{self.name} has no sensor {unknown[0]!r}, of which statistics came; use their encoder")
        try:
            given = {name: statistics_from_json(saved) for name, saved in statistics.items()}
        except (KeyError, TypeError) as error:
            raise InputError(f"the statistics are damaged ({error}); fit them again") from None
        if wrong := [name for name, found in given.items() if found.channels != self.sensors[name].channel_names]:
            raise InputError(f"the statistics of {wrong[0]} are of other channels; fit them again with {self.name}")
        same = copy(self)
        same.statistics = {**self.statistics, **given}
        return same

    def statistics_of(self, modality: str) -> dict[str, tuple[float, float]]:
        """Give mean and standard deviation of each channel by name, empty where they are not known."""
        sensor = sensor_of(modality, self.sensors)
        found = self.statistics.get(sensor.name) if sensor else None
        return dict(zip(found.channels, zip(found.mean, found.std, strict=True), strict=True)) if found else {}

    def _input(self, o: Observation, modality: str, sensor: Sensor) -> Input:
        statistics = None
        if not self.normalized_input:
            if sensor.name not in self.statistics:
                raise InputError(
                    f"{self.name} has no statistics of {modality} yet; fit them to your data with fit_statistics, "
                    "or pass normalized_input=True for values that are standardised already"
                )
            statistics = self.statistics[sensor.name]
        given = read_input(o, modality, sensor, statistics, dtype=self.class_token.dtype)
        return given if self.missing == "masked" else as_published(given)


def for_finetuning(model: AnySat) -> AnySat:
    """Give the same model, sharing its weights, with the sensors as published fine-tuning configures them."""
    config = replace(model.config, sensors=finetuning_sensors(model.config.sensors))
    with torch.device("meta"):
        same = AnySat(
            config,
            name=model.name,
            missing=model.missing,
            normalized_input=model.normalized_input,
            statistics=model.statistics,
        )
    same.load_state_dict(model.state_dict(), assign=True)
    for mine, theirs in zip(same.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    same.licence = model.licence
    return same.train(model.training)


def projector(sensor: Sensor, dim: int) -> CellProjector | SeriesProjector:
    """Build the projector that a sensor needs."""
    return SeriesProjector(sensor, dim) if sensor.dated else CellProjector(sensor, dim)


def cells_to_image(
    cells: Float[Tensor, "b p n e"], grid: Grid, sensor: Sensor, *, published: bool = False
) -> Float[Tensor, "b y x e"]:
    """Lay cells where they are on the ground.

    `published` takes the cells of a patch for raster order, which they are not where a 10 m square has several.
    """
    inner = 1 if sensor.dated or published else sensor.cells
    outer = sensor.side(grid.scale) // inner
    order = "b (R C) (r c i j) e -> b (R r i) (C c j) e"
    return rearrange(cells, order, R=grid.rows, C=grid.cols, r=outer, c=outer, i=inner, j=inner)


@torch.no_grad()
def initialise(model: AnySat) -> None:
    """Draw the weights as AnySat does where it departs from the library's defaults."""
    nn.init.trunc_normal_(model.class_token, std=0.02)
    nn.init.trunc_normal_(model.combiner.distance, std=0.02)
    for part in model.projectors.values():
        if isinstance(part, SeriesProjector):
            part.initialise()
    for layer in model.patch_encoder.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    for depth, block in enumerate(cast(Iterable[PatchBlock], model.patch_encoder.blocks), start=1):
        nn.init.trunc_normal_(block.attn.distance, std=0.02)
        block.attn.proj.weight.div_((2 * depth) ** 0.5)
        block.mlp.fc2.weight.div_((2 * depth) ** 0.5)
