"""AnySat: one encoder for any mix of sensors, resolutions and tile sizes (Astruc et al., CVPR 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.modalities import MODALITIES
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
from panterra.models.anysat_projectors import CellProjector, Grid, Input, SeriesProjector
from panterra.models.anysat_sensors import (
    CELL_M,
    SENSORS,
    Sensor,
    day_of_year,
    declare,
    read_channels,
    sensor_of,
    to_pixel_size,
)
from panterra.models.anysat_statistics import Statistics, fit_statistics
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
        rows = [m for sensor in self.config.sensors for m in sensor.modalities if m in MODALITIES]
        return tuple(sorted(rows, key=lambda m: PREFERRED.index(m) if m in PREFERRED else len(PREFERRED)))

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
        """Embed a batch in declared units, with patches of any multiple of 10 m.

        `dense` adds a vector for each sub-patch of the modality it names, or of the one with the smallest; of several,
        the one it prefers.
        Where a tile is not a whole number of patches, or a sensor has no statistics, InputError says what to do.
        """
        chosen = self._sensors_of(batch)
        scale = self._scale(batch, chosen, patch_m)
        batch = on_own_pixels(batch, chosen)
        self._check_extent(batch, chosen, patch_m)
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

    def _scale(self, batch: Batch, chosen: Mapping[str, Sensor], patch_m: float) -> int:
        # A grid of another sensor's pixels will do where nothing else is on it.
        wrong = [m for m, s in chosen.items() if not s.whole and abs(MODALITIES[m].gsd - batch.pixel_m) > 1e-6]
        if abs(batch.pixel_m - CELL_M) > 1e-6 and wrong:
            raise InputError(f"the batch has pixels of {batch.pixel_m:g} m; AnySat wants a grid of 10 m, resample it")
        return whole_cells(patch_m)

    def _sensors_of(self, batch: Batch) -> dict[str, Sensor]:
        chosen: dict[str, Sensor] = {}
        for modality in batch.observations:
            sensor = sensor_of(modality, self.sensors)
            if sensor is None:
                known = ", ".join(self.modalities)
                raise InputError(f"{self.name} does not know {modality}; give any of {known}, or add it: add_modality")
            twin = next((m for m, s in chosen.items() if s == sensor), None)
            if twin is not None:
                raise InputError(f"{twin} and {modality} are both read by the projector of {sensor.name}; give one")
            chosen[modality] = sensor
        return chosen

    def _check_extent(self, batch: Batch, chosen: Mapping[str, Sensor], patch_m: float) -> None:
        extents = {
            m: tuple(n * MODALITIES[m].gsd for n in batch.observations[m].pixels.shape[-2:])
            for m, sensor in chosen.items()
            if not sensor.whole
        }
        if not extents:
            sensor = next(iter(chosen.values()))
            if abs(patch_m - sensor.cell_m) > 1e-6:
                raise InputError(f"{sensor.name} alone is one patch; ask for patch_m={sensor.cell_m:g} or add a sensor")
            return
        height, width = next(iter(extents.values()))
        if any(abs(h - height) + abs(w - width) > 1e-3 for h, w in extents.values()):
            named = ", ".join(f"{m} {h:g} x {w:g} m" for m, (h, w) in extents.items())
            raise InputError(f"modalities cover different ground ({named}); crop them to the same place")
        if any(abs(side / patch_m - round(side / patch_m)) > 1e-6 for side in (height, width)):
            raise InputError(
                f"a tile of {height:g} x {width:g} m is not a whole number of {patch_m:g} m patches; crop or pad it"
            )

    def _input(self, o: Observation, modality: str, sensor: Sensor) -> Input:
        """Bring an observation to what the projector of its sensor was trained on."""
        if not sensor.dated and o.pixels.shape[1] != 1:
            raise InputError(f"{modality} came with {o.pixels.shape[1]} dates; it is a still image, give one")
        pixels, valid = o.pixels, o.valid
        if not sensor.dated:
            pixels, valid = to_pixel_size(o, sensor, MODALITIES[modality].gsd)
        values = read_channels(pixels, sensor, modality)
        if not self.normalized_input:
            if sensor.name not in self.statistics:
                raise InputError(
                    f"{self.name} has no statistics of {modality} yet; fit them to your data with fit_statistics, "
                    "or pass normalized_input=True for values that are standardised already"
                )
            values = self.statistics[sensor.name].standardise(values)
        values = torch.where(valid[:, :, None], values, 0.0).to(self.class_token.dtype)
        days = day_of_year(o.dates) if sensor.dated else None
        if self.missing == "masked":
            return Input(values=values, days=days, valid=valid)
        if days is None:
            return Input(values=values)
        frame = valid.flatten(2).any(2)
        present = (valid | ~frame[:, :, None, None])[:, :, None].expand_as(values)
        return Input(values=values, days=torch.where(frame, days, 0), present=present)


def whole_cells(patch_m: float) -> int:
    """Count the 10 m squares along a patch's side. Raises InputError."""
    scale = round(patch_m / CELL_M)
    if scale < 1 or abs(scale * CELL_M - patch_m) > 1e-6:
        raise InputError(f"patch_m is {patch_m:g}; AnySat takes multiples of 10 m")
    return scale


PREFERRED = ("sentinel2_l2a", "sentinel1", "landsat")


def on_own_pixels(batch: Batch, chosen: Mapping[str, Sensor]) -> Batch:
    """Take modalities coarser than 10 m back from the common grid, on which scenes are read, to pixels of their own.

    Of the grid's pixels inside one of theirs the middle one counts; a sensor that sees the tile as a whole gets the
    mean of what is valid. Raises InputError where the tile is not a whole number of their pixels.
    """
    fine = [m for m, s in chosen.items() if not s.whole and MODALITIES[m].gsd <= CELL_M]
    size = batch.observations[fine[0]].pixels.shape[-2:] if fine else None
    taken = dict(batch.observations)
    for modality, sensor in chosen.items():
        o, gsd = batch.observations[modality], MODALITIES[modality].gsd
        if sensor.whole:
            taken[modality] = tile_mean(o)
        elif size is not None and gsd > CELL_M:
            ground = [n * MODALITIES[fine[0]].gsd for n in size]
            here, step = o.pixels.shape[-2:], round(gsd / batch.pixel_m)
            if [n * batch.pixel_m for n in here] == ground:
                if any(n % step for n in here):
                    raise InputError(
                        f"a tile of {ground[0]:g} x {ground[1]:g} m is not a whole number of {modality}'s pixels of "
                        f"{gsd:g} m; choose patches and windows that are, or leave {modality} out"
                    )
                rows = cols = slice(step // 2, None, step)
                taken[modality] = replace(o, pixels=o.pixels[..., rows, cols], valid=o.valid[..., rows, cols])
    return replace(batch, observations=taken)


def tile_mean(o: Observation) -> Observation:
    """Average what is valid of each date into one pixel."""
    if o.pixels.shape[-2:] == (1, 1):
        return o
    seen = o.valid[:, :, None]
    total = torch.where(seen, o.pixels, 0.0).sum((-2, -1), keepdim=True)
    count = seen.sum((-2, -1), keepdim=True)
    return replace(o, pixels=total / count.clamp(min=1), valid=count[:, :, 0] > 0)


def as_json(statistics: Statistics) -> dict[str, Any]:
    """Turn statistics into plain JSON."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(statistics).items()}


def statistics_from_json(saved: Mapping[str, Any]) -> Statistics:
    """Undo `as_json`."""
    return Statistics(
        channels=tuple(saved["channels"]), mean=tuple(saved["mean"]), std=tuple(saved["std"]), count=saved["count"]
    )


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
