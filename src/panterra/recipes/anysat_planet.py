"""AnySat on the invented planet: four sensors over the same ground, whose land cover is known."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from affine import Affine
from jaxtyping import Bool, Float, Int, UInt8
from odc.geo.geobox import GeoBox
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.evaluate.probes import NEIGHBOURS, knn_scores
from panterra.modalities import MODALITIES
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.anysat_projectors import CellProjector, Input, SeriesProjector
from panterra.models.anysat_sensors import SENSORS, sensor_of
from panterra.models.anysat_statistics import Statistics, fit_statistics
from panterra.models.features import Encoder
from panterra.objectives.jepa import JEPA, MaskedTiles
from panterra.objectives.jepa_batches import MixedBatches, Source
from panterra.objectives.jepa_looks import JEPAWithLooks
from panterra.objectives.jepa_masks import BlockMasking
from panterra.planet import CLASSES, CRS, Planet
from panterra.recipes.anysat import AnySatRecipe, run_from
from panterra.sample import Batch, Observation, collate, to_days
from panterra.train.loop import Check, Run

DATES = {"aerial": 1, "sentinel2_l2a": 4, "sentinel1": 4, "landsat": 3}
"""How often each modality looks at a region in a year."""
SERIES = tuple(m for m in DATES if MODALITIES[m].kind == "series")
CELL_M = 10
CLOSE = range(128)
"""Planets of which 120 m are seen by all sensors; checks use planets from 9000."""
FAR = range(1000, 1400)
"""Planets of which 480 m are seen from space alone."""
CLOSE_M, FAR_M = 120, 480
_STORED = {"aerial": np.uint8, "sentinel2_l2a": np.uint16, "landsat": np.uint16, "sentinel1": np.float32}
_SAME_PLACE = 3
"""The bucket of no distance, see `anysat_attention.buckets`."""
_SEARCH_PX, _SEARCH_M, _SEARCHES = 128, 20, 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Regions:
    """Squares of ground, each on a planet of its own: what sensors saw in a year and what is there."""

    planets: Int[np.ndarray, " n"]
    """Their seeds."""
    pixels: Mapping[str, np.ndarray]
    """By modality [N, T, C, H, W], in declared units."""
    dates: Mapping[str, Int[np.ndarray, "n _t"]]
    """Days since 1970-01-01."""
    valid: Mapping[str, Bool[np.ndarray, "n _t _h _w"]]
    land_cover: UInt8[np.ndarray, "n y x"]
    """Codes of the planet's classes, at 10 m."""

    def __len__(self) -> int:
        return len(self.planets)

    @property
    def metres(self) -> int:
        """Give a region's side."""
        return CELL_M * int(self.land_cover.shape[1])

    def save(self, path: Path) -> None:
        """Write an .npz file, whole or not at all."""
        held = {"planets": self.planets, "land_cover": self.land_cover}
        for m, pixels in self.pixels.items():
            held |= {m: pixels, f"{m}.dates": self.dates[m], f"{m}.valid": self.valid[m]}
        part = path.with_name(f"{path.name}.part")
        with part.open("wb") as file:
            np.savez(file, **held)  # type: ignore[arg-type]
        part.replace(path)

    @classmethod
    def read(cls, paths: Iterable[Path]) -> Self:
        """Read files that `save` wrote, joined along N."""
        files = [dict(np.load(path)) for path in paths]
        held = {name: np.concatenate([file[name] for file in files]) for name in files[0]}
        seen = [name for name in held if name in MODALITIES]
        return cls(
            planets=held["planets"],
            pixels={m: held[m] for m in seen},
            dates={m: held[f"{m}.dates"] for m in seen},
            valid={m: held[f"{m}.valid"] for m in seen},
            land_cover=held["land_cover"],
        )


def draw_regions(planets: Sequence[int], *, metres: int, modalities: Sequence[str] = tuple(DATES)) -> Regions:
    """Look at one region of each planet; a region depends on its planet, its size and the modalities alone.

    Planets take turns in the class that a region has to hold, where one is found, so that rare ones occur.
    """
    pixels: dict[str, list[np.ndarray]] = {m: [] for m in modalities}
    dates: dict[str, list[list[int]]] = {m: [] for m in modalities}
    valid: dict[str, list[np.ndarray]] = {m: [] for m in modalities}
    land_cover = []
    for seed in planets:
        rng, planet = np.random.default_rng([seed, metres]), Planet(seed=seed, clouds=0.1)
        left, top = find_place(planet, CLASSES[seed % len(CLASSES)].code, metres, rng)
        grounds = {}
        first = dt.date(2016, 1, 1) + dt.timedelta(days=int(rng.integers(7 * 365)))
        for m in modalities:
            gsd = MODALITIES[m].gsd
            if gsd not in grounds:
                side = round(metres / gsd)
                grounds[gsd] = planet.ground(GeoBox((side, side), Affine(gsd, 0, left, 0, -gsd, top), CRS))
            days = np.sort(rng.choice(365, DATES[m], replace=False))
            when = [first + dt.timedelta(days=int(day)) for day in days]
            looks = [planet.observe(m, grounds[gsd], day) for day in when]
            x = np.stack([look for look, _ in looks])
            whole = np.issubdtype(_STORED[m], np.integer)
            pixels[m].append((np.rint(x) if whole else x).astype(_STORED[m]))
            valid[m].append(np.stack([seen for _, seen in looks]))
            dates[m].append([to_days(day) for day in when])
        side = metres // CELL_M
        box = GeoBox((side, side), Affine(CELL_M, 0, left, 0, -CELL_M, top), CRS)
        land_cover.append(planet.truth(grounds.get(float(CELL_M)) or box))
    return Regions(
        planets=np.array(planets),
        pixels={m: np.stack(x) for m, x in pixels.items()},
        dates={m: np.array(days) for m, days in dates.items()},
        valid={m: np.stack(seen) for m, seen in valid.items()},
        land_cover=np.stack(land_cover),
    )


def find_place(planet: Planet, code: int, metres: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the upper left corner of a square that holds a class; of any square where ten looks did not find it."""
    for _ in range(_SEARCHES):
        left, top = 500000 + 20 * int(rng.integers(-10000, 10000)), 5300000 + 20 * int(rng.integers(-10000, 10000))
        across = Affine(_SEARCH_M, 0, left, 0, -_SEARCH_M, top)
        rows, cols = np.nonzero(planet.truth(GeoBox((_SEARCH_PX, _SEARCH_PX), across, CRS)) == code)
        if len(rows):
            chosen = rng.integers(len(rows))
            away = CELL_M * rng.integers(metres // CELL_M, size=2)
            left += _SEARCH_M * int(cols[chosen]) - int(away[0])
            top += int(away[1]) - _SEARCH_M * int(rows[chosen])
            break
    return left, top


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tiles:
    """Regions cut into tiles, each a batch of one; sources of a run read them by number.

    What is left of a region on the right and at the bottom is not used.
    """

    regions: Regions
    metres: int
    """Side of a tile."""
    modalities: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.regions.metres < self.metres:
            raise InputError(f"regions of {self.regions.metres} m have no tiles of {self.metres} m; draw larger ones")

    def __len__(self) -> int:
        return len(self.regions) * self.side**2

    @property
    def side(self) -> int:
        """Count the tiles along a region's side."""
        return self.regions.metres // self.metres

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        region, row, col = self._place(index)
        observations = {}
        for m in self.modalities:
            px = round(self.metres / MODALITIES[m].gsd)
            part = (..., slice(row * px, (row + 1) * px), slice(col * px, (col + 1) * px))
            observations[m] = Observation(
                pixels=torch.from_numpy(self.regions.pixels[m][region][part].astype(np.float32))[None],
                dates=torch.from_numpy(self.regions.dates[m][region])[None],
                valid=torch.from_numpy(self.regions.valid[m][region][part])[None],
            )
        return Batch(observations=observations)

    def planet(self, index: int) -> int:
        """Name the planet that a tile is on."""
        return int(self.regions.planets[self._place(index)[0]])

    def land_cover(self, index: int) -> UInt8[np.ndarray, "y x"]:
        """Give the class codes of a tile, at 10 m."""
        region, row, col = self._place(index)
        px = self.metres // CELL_M
        return self.regions.land_cover[region, row * px : (row + 1) * px, col * px : (col + 1) * px]

    def batches(self, size: int) -> Iterator[Batch]:
        """Give all tiles in order, several at a time."""
        for start in range(0, len(self), size):
            yield collate([self[i] for i in range(start, min(start + size, len(self)))])

    def _place(self, index: int) -> tuple[int, int, int]:
        region, inside = divmod(index, self.side**2)
        return region, *divmod(inside, self.side)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledPatches:
    """What an encoder says of patches that hold one class alone."""

    features: Float[np.ndarray, "n d"]
    codes: Int[np.ndarray, " n"]
    planets: Int[np.ndarray, " n"]
    """Seeds; patches of a planet belong on the same side of a split."""


def pure_patches(
    land_cover: UInt8[np.ndarray, "y x"], patch_m: int, rng: np.random.Generator, *, most: int = 2
) -> list[tuple[int, int, int]]:
    """Draw up to `most` patches of each class, of those that hold nothing else: their rows, columns and codes."""
    cells = patch_m // CELL_M
    blocks = land_cover.reshape(len(land_cover) // cells, cells, -1, cells).swapaxes(1, 2).reshape(-1, cells**2)
    pure = np.flatnonzero((blocks == blocks[:, :1]).all(1))
    columns = land_cover.shape[1] // cells
    drawn: list[tuple[int, int, int]] = []
    for code in np.unique(blocks[pure, 0]):
        mine = rng.permutation(pure[blocks[pure, 0] == code])[:most]
        drawn += [(*divmod(int(i), columns), int(code)) for i in mine]
    return drawn


def embed_patches(encoder: Encoder, tiles: Tiles, *, patch_m: int, size: int = 8) -> LabelledPatches:
    """Embed the pure patches of tiles, a tile's class twice at most; those without data are left out."""
    grids = []
    # Not in inference mode: what an encoder caches there cannot be trained with afterwards.
    with torch.no_grad():
        for batch in tiles.batches(size):
            features = encoder.encode(batch, patch_m=patch_m)
            grids.append(features.patches.masked_fill(~features.valid[..., None], torch.nan).numpy())
    return choose_patches(np.concatenate(grids), tiles, patch_m=patch_m)


def choose_patches(grids: Float[np.ndarray, "n h w d"], tiles: Tiles, *, patch_m: int) -> LabelledPatches:
    """Take from features of all patches of tiles those of pure patches, without those that hold NaN."""
    rows, codes, planets = [], [], []
    for i in range(len(tiles)):
        for row, col, code in pure_patches(tiles.land_cover(i), patch_m, np.random.default_rng([7, i])):
            if np.isfinite(grids[i, row, col]).all():
                rows.append(grids[i, row, col])
                codes.append(code)
                planets.append(tiles.planet(i))
    if not rows:
        raise InputError(f"no patch of {patch_m} m holds one class alone and data; give more tiles or smaller patches")
    return LabelledPatches(features=np.stack(rows), codes=np.array(codes), planets=np.array(planets))


def land_cover_check(tiles: Mapping[str, Tiles], *, every: int, patch_m: int = 20) -> Check:
    """Watch how often the nearest patches on every other planet know the class of a patch, for each set of tiles."""

    def run(objective: nn.Module, step: int) -> dict[str, float]:
        found = {}
        for name, given in tiles.items():
            patches = embed_patches(cast(JEPA, objective).teacher, given, patch_m=patch_m)
            rows, codes = torch.from_numpy(patches.features), torch.from_numpy(patches.codes)
            learned = torch.from_numpy(patches.planets % 2 == 0)
            answers = F.one_hot(codes[learned]).float()
            neighbours = min(NEIGHBOURS, len(answers))
            votes = knn_scores(rows[learned], answers, rows[~learned], neighbours=neighbours)
            found[name] = float((votes.argmax(1) == codes[~learned]).float().mean())
        return found

    return Check(name="knn", every=every, run=run)


SENSORS_HERE = tuple(sensor.name for m in DATES if (sensor := sensor_of(m, SENSORS)))
_FROM_SPACE = tuple(name for name in SENSORS_HERE if SENSORS[name].dated)
SOURCES = (
    Source(name="close-20m", sensors=SENSORS_HERE, batch=12, cells=2, scales=(1,), weight=2),
    Source(name="close-40m", sensors=SENSORS_HERE, batch=8, cells=4, scales=(1, 2), weight=2),
    Source(name="far-20m", sensors=_FROM_SPACE, batch=32, cells=2, scales=(1,), weight=2),
    Source(name="far-40m", sensors=_FROM_SPACE, batch=16, cells=4, scales=(1, 2), weight=3),
    Source(name="far-120m", sensors=_FROM_SPACE, batch=4, cells=12, scales=(2, 4), weight=1),
)
"""Tiles with and without aerial images. Small ones cost little and let a batch hold many places."""

MASKING = BlockMasking(target_area=(0.15, 0.5), target_blocks=2)
"""Smaller and fewer blocks than published: those leave one patch of context on tiles as small as these."""

LOOKS_WEIGHT, CELLS_WEIGHT = 5.0, 2.0
"""Of what linear layers tell of what sensors saw, and among that of the cells of still images, see `jepa_looks`."""


def planet_tiny() -> AnySatRecipe:
    """AnySat of tiny's width on the planet: whether pretraining finds land cover that random weights do not.

    Departs from the published run to learn from minutes: the start is calibrated, Muon trains the blocks, the teacher
    follows faster, targets are standardised by channel, dropped tokens are hidden, the contrast counts less and half of
    the samples show the student one sensor alone.
    """
    return AnySatRecipe(
        name="anysat-planet-tiny",
        encoder=AnySatConfig(
            dim=192,
            depth=2,
            heads=3,
            # A run as short as this one learns slowly through dropout.
            sensors=tuple(replace(SENSORS[name], dropout=0.0) for name in SENSORS_HERE),
        ),
        predictor_depth=2,
        sources=SOURCES,
        steps=900,
        epoch_samples=20 * 300,
        lone_sensors=0.5,
        targets="standardised",
        dropped="hidden",
        contrast_weight=0.3,
        published=False,
        momentum_start=0.99,
        momentum_end=0.999,
        method="muon",
        lr=1e-3,
        betas=(0.9, 0.95),
        warmup_steps=30,
        final_share=0.02,
        clip_norm=1.0,
        exported="last",
        precision="float32",
    )


_CALIBRATION, _VIEWS = 10**5, 16
"""Batches from this number on calibrate the start and are not trained on, and how many there are."""


@torch.no_grad()
def calibrate(encoder: AnySat, views: Sequence[MaskedTiles]) -> None:
    """Set first layers and scales from data, so that what sensors saw, and not constants, is most of a token.

    First layers become random directions across whitened spectra (of still images: across the main components of a
    cell's pixels). What series projectors, the patch encoder and the combiner give has no mean and unit variance in
    each channel. The combiner starts by handing on what is at its own place, since it has no residual from there.
    """
    training = encoder.training
    encoder.eval()
    generator = torch.Generator().manual_seed(_CALIBRATION)
    for name, part in encoder.projectors.items():
        given = [view.inputs[name] for view in views if name in view.inputs]
        if isinstance(part, SeriesProjector):
            rows = torch.cat([g.values.permute(0, 1, 3, 4, 2)[_data(g)] for g in given])
            linear = first_layer(part)
            assert linear.bias is not None
            linear.weight.copy_(weight := directions(rows, len(linear.weight), generator))
            linear.bias.copy_(torch.randn(len(weight), generator=generator) - weight @ rows.mean(0))
            grids = [view.grid for view in views if name in view.inputs]
            tokens = [part(g, grid)[0].flatten(0, 2) for g, grid in zip(given, grids, strict=True)]
            standardise_output(part.out_norm, torch.cat(tokens))
        elif isinstance(part, CellProjector):
            size = part.sensor.kernel
            cells = [g.values[:, 0].unfold(2, size, size).unfold(3, size, size) for g in given]
            rows = torch.cat([c.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)[::3] for c in cells])
            weight = first_layer(part).weight
            weight.copy_(directions(rows, len(weight), generator).view_as(weight))
            part.expand.bias.normal_(std=0.5, generator=generator)
    tokens = [x for view in views for x in encoder.embed(view.inputs, scale=view.grid.scale).tokens.values()]
    standardise_output(encoder.patch_encoder.norm, torch.cat([x.flatten(0, 1) for x in tokens]))

    # Low frequencies among the first head's places, which hardly differ within a tile, carry the look at home.
    combiner, end = encoder.combiner, encoder.dim // max(4, encoder.config.heads)
    low = slice(end - 8, end)
    combiner.query[..., low], combiner.distance[:, low, _SAME_PLACE] = 1.0, 5 / 8
    for layer in (combiner.value, combiner.proj):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(combiner.mlp.fc2.weight)
    nn.init.zeros_(combiner.mlp.fc2.bias)
    out = [encoder(view.inputs, scale=view.grid.scale).patches.flatten(0, 2) for view in views]
    std, mean = torch.std_mean(torch.cat(out), 0)
    combiner.proj.weight.div_(std[:, None])
    combiner.proj.bias.sub_(mean).div_(std)
    encoder.train(training)


def first_layer(part: nn.Module) -> nn.Linear | nn.Conv2d:
    """Find the layer of a projector that reads pixels."""
    name = "embed" if isinstance(part, CellProjector) else "stages.0.linear"
    layer = part.get_submodule(name)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer


def freeze_first_layers(encoder: AnySat) -> None:
    """Keep the first layers as calibrated (Chen, Xie and He 2021, on patch projections of vision transformers).

    An optimiser that moves each weight as far would move them too fast: one direction across the 400 values of an
    aerial cell, a hundredth in each, outweighs most of what calibration set. The rest of what reads a cell, a layer
    further on, is kept as well: it is what the student has to tell, see `jepa_looks`.
    """
    for part in encoder.projectors.values():
        kept = part if isinstance(part, CellProjector) else first_layer(part)
        kept.requires_grad_(False)


def directions(
    rows: Float[Tensor, "n c"], units: int, generator: torch.Generator, *, most: int = 48
) -> Float[Tensor, "units c"]:
    """Draw directions across at most so many whitened components of rows, along each of which rows vary by one.

    Components with less than a ten-thousandth of the strongest one's variance are raised no further.
    """
    values, vectors = torch.linalg.eigh(torch.cov(rows.double().T))
    count = min(most, len(values), units)
    values, vectors = values[-count:], vectors[:, -count:]
    white = (vectors / values.clamp_min(values.max() * 1e-4).sqrt()).T
    drawn = torch.randn(units, count, generator=generator, dtype=torch.float64)
    found: Tensor = (F.normalize(drawn, dim=1) @ white).float()
    return found


def standardise_output(norm: nn.GroupNorm | nn.LayerNorm, out: Float[Tensor, "n d"]) -> None:
    """Change a normalisation's weights so that of what it gave each channel has no mean and unit variance."""
    std, mean = torch.std_mean(out, 0)
    std = std.clamp_min(1e-3)
    norm.weight.div_(std)
    norm.bias.sub_(mean).div_(std)


def _data(given: Input) -> Tensor:
    if given.valid is None:
        return torch.ones_like(given.values[:, :, 0], dtype=torch.bool)
    return given.valid


def planet_samples(close: Regions, far: Regions) -> dict[str, Tiles]:
    """Cut regions into the tiles of the recipe's sources."""
    return {
        source.name: Tiles(regions=close, metres=CELL_M * source.cells, modalities=tuple(DATES))
        if source.sensors == SENSORS_HERE
        else Tiles(regions=far, metres=CELL_M * source.cells, modalities=SERIES)
        for source in SOURCES
    }


def planet_statistics(close: Regions, far: Regions) -> dict[str, Statistics]:
    """Fit the statistics of all sensors, once, to everything that is trained on."""
    return fit_statistics(
        batch
        for regions in (close, far)
        for batch in Tiles(regions=regions, metres=regions.metres, modalities=tuple(regions.pixels)).batches(8)
    )


def planet_run(
    recipe: AnySatRecipe,
    close: Regions,
    far: Regions,
    *,
    statistics: Mapping[str, Statistics] | None = None,
    checks: Sequence[Check] = (),
) -> Run:
    """Make the run of a recipe whose sources are all or some of `SOURCES`; statistics are fitted unless given."""
    statistics = statistics or planet_statistics(close, far)
    samples = planet_samples(close, far)
    run = run_from(recipe, samples, statistics=dict.fromkeys(samples, statistics), checks=checks)

    def batches(rank: int, world: int) -> MixedBatches:
        mixed = cast(MixedBatches, run.batches(rank, world))
        mixed.masking = MASKING
        return mixed

    def objective() -> nn.Module:
        jepa = JEPAWithLooks(recipe.objective, looks_weight=LOOKS_WEIGHT, cells_weight=CELLS_WEIGHT)
        mixed = batches(0, 1)
        views = [mixed[_CALIBRATION + i][0] for i in range(_VIEWS)]
        calibrate(jepa.encoder, views)
        freeze_first_layers(jepa.encoder)
        jepa.standardise_looks(views)
        jepa.teacher.load_state_dict(jepa.encoder.state_dict())
        jepa.teacher.statistics = dict(statistics)  # the checks encode what is in declared units
        return jepa

    ours = {"masking": asdict(MASKING), "looks_weight": LOOKS_WEIGHT, "cells_weight": CELLS_WEIGHT}
    return replace(run, objective=objective, batches=batches, settings={**run.settings, **ours})
