"""The features of a map's tiles, made from a scene."""

from __future__ import annotations

import ctypes
import datetime as dt
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio.warp
import torch
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.imagery.doctor import nothing_shared
from panterra.imagery.raster import crs_for_rasterio
from panterra.imagery.stac import Scene, pixel_metres
from panterra.mapping.areas import Area, Coverage, common_grid
from panterra.mapping.blend import Canvas, window_weight
from panterra.mapping.parts import Failure, Parts
from panterra.mapping.passport import software
from panterra.mapping.reading import ahead, attempt, attempts
from panterra.mapping.tiles import Borders, Lattice, Tile, Window
from panterra.modalities import MODALITIES
from panterra.models import weights
from panterra.models.exported import Exported
from panterra.models.features import Encoder
from panterra.sample import Batch, Observation

TILE_BYTES = 512 * 2**20
"""What pixels and features of the tiles in work may take together, where `tile_px` is not given."""
TILE_PX = 512
"""The largest tile, where `tile_px` is not given: little is read twice, and progress is saved often."""

Canvases = Callable[[Iterable[Tile], Callable[[int], None]], Iterator[tuple[Tile, Canvas | Failure]]]
"""Paints tiles, in order, and calls back with the steps that are done."""

Pixels = tuple[Window, Batch, tuple[Window, ...]]
"""What the windows of a tile that are to be encoded cover together, what is seen there, and these windows."""


@functools.cache
def _trim() -> Callable[[int], int]:
    """Find the C library's function that returns free memory to the system, which glibc alone has."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda keep: 0
    return trim


@dataclass(slots=True, kw_only=True)
class Encoding:
    """Features that an encoder makes of a scene's windows."""

    scene: Scene
    encoder: Encoder
    device: torch.device
    box: GeoBox
    """The common grid, a whole number of patches."""
    grid: GeoBox
    modalities: tuple[str, ...]
    patch_m: float
    patch_px: int
    lattice: Lattice
    coverage: Coverage
    weight: np.ndarray
    batch_windows: int
    workers: int
    about: dict[str, Any]
    job: dict[str, Any]
    origin: dict[str, Any]
    encoder_seconds: float = 0.0

    @classmethod
    def plan(
        cls,
        scene: Scene,
        encoder: Encoder,
        *,
        box: GeoBox | None,
        patch_m: float,
        modalities: Sequence[str] | None,
        window_px: int,
        overlap_px: int,
        tile_px: int | None,
        batch_windows: int,
        workers: int,
        crs: str | None = None,
        area: Area | None = None,
    ) -> Encoding:
        """Check what was asked for, and lay the lattice over the box; see `embed` for the arguments."""
        if box is not None and crs is not None:
            raise InputError("a box has its own CRS; leave out crs, or give an aoi instead of the box")
        names = _modalities(scene, encoder, modalities)
        box = box if box is not None else common_grid(scene, encoder, names, crs=crs, area=area)
        pixel_m = pixel_metres(box)
        a = box.affine
        if a.b or a.d or a.a <= 0 or a.e >= 0 or not math.isclose(a.a, -a.e, rel_tol=1e-9):
            raise InputError(f"the box has the transform {tuple(a)[:6]}; wanted square pixels, north up")
        patch_px = round(patch_m / pixel_m) if math.isfinite(patch_m) else 0
        if patch_px < 1 or not math.isclose(patch_px * pixel_m, patch_m, rel_tol=1e-6):
            raise InputError(
                f"patches of {patch_m:g} m are not a whole number of {pixel_m:g} m pixels; "
                f"let --patch-m (patch_m in Python) be a multiple of {pixel_m:g}"
            )
        for name, value in (("window_px", window_px), ("overlap_px", overlap_px)):
            if value % patch_px:
                near = ", ".join(str(n * patch_px) for n in (value // patch_px, value // patch_px + 1) if n)
                raise InputError(f"{name} is {value}, not a whole number of patches of {patch_px} px; give {near}")
        if batch_windows < 1 or workers < 1:
            raise InputError(f"batch_windows is {batch_windows} and workers {workers}; both must be 1 or more")
        if tile_px is not None and tile_px < 1:
            raise InputError(f"tile_px is {tile_px}; give 1 or more, or leave it out")
        height, width = (-(-int(n) // patch_px) for n in box.shape)
        box = GeoBox((height * patch_px, width * patch_px), a, box.crs)
        tile_px = tile_px if tile_px is not None else _tile_px(scene, names, encoder.dim / patch_px**2, workers)
        lattice = Lattice.cut(
            height, width, window=window_px // patch_px, overlap=overlap_px // patch_px, tile=tile_px // patch_px
        )
        if isinstance(encoder, Exported):
            encoder.check_patches(patch_m)
            encoder.check_windows([n * patch_px for n in lattice.window_shape], pixel_m=pixel_m)
        model = weights.passport(encoder)
        options = {"patch_m": patch_m, "window_px": window_px, "overlap_px": overlap_px}
        dates = sorted({date for name in names for date in scene.dates(name)})
        about = {
            **options,
            "modalities": list(names),
            "model": model,
            "dates": [date.isoformat() for date in dates],
        }
        grid = GeoBox((height, width), a @ Affine.scale(patch_px), box.crs)
        # Interpolation reaches a pixel beyond an image's edge; another one is for the bend of the edge.
        coverage = Coverage.of(scene, grid, modalities=names, reach=2 * pixel_m, area=area)
        within: dict[str, Any] = {} if area is None else {"area": coverage.fingerprint}
        cut = {"tile_px": [axis.tile * patch_px for axis in (lattice.rows, lattice.cols)]}
        return cls(
            scene=scene,
            encoder=encoder,
            device=_device(encoder),
            box=box,
            grid=grid,
            modalities=names,
            patch_m=patch_m,
            patch_px=patch_px,
            lattice=lattice,
            coverage=coverage,
            weight=window_weight(*lattice.window_shape, overlap_px // patch_px),
            batch_windows=batch_windows,
            workers=workers,
            about=about,
            job={
                **about,
                **cut,
                **within,
                "batch_windows": batch_windows,
                "box": [str(box.crs), *box.shape, *tuple(a)[:6]],
                "scene": _scene_fingerprint(scene, names),
                "software": software(),
            },
            origin={
                "panterra:inputs": [
                    {
                        "id": item.id,
                        "modality": item.modality,
                        "date": item.date.isoformat(),
                        "files": [asset.href for asset in item.assets],
                    }
                    for item in scene.items
                    if item.modality in names
                ],
                "panterra:model": model,
                "panterra:options": {**options, **cut, **within, "batch_windows": batch_windows},
            },
        )

    @property
    def dim(self) -> int:
        return self.encoder.dim

    @property
    def dates(self) -> list[dt.date]:
        return [dt.date.fromisoformat(date) for date in self.about["dates"]]

    @property
    def licence(self) -> str | None:
        return self.scene.licence

    def tiles(self) -> Iterator[Tile]:
        return self.lattice.tiles()

    def cost(self, tile: Tile) -> int:
        """Count the steps of a tile."""
        return len(self.coverage.windows(tile))

    @property
    def area_km2(self) -> float:
        """Return the size of what is to be mapped."""
        return self.coverage.area_km2

    @property
    def borders(self) -> tuple[Borders, Borders]:
        """Return where windows give way to each other along rows and columns."""
        return self.lattice.rows.borders(), self.lattice.cols.borders()

    def features(
        self, tiles: Iterable[Tile], parts: Parts, advance: Callable[[int], None], canvases: Canvases | None = None
    ) -> Iterator[tuple[Tile, np.ndarray | Failure]]:
        """Make the features of tiles in order, float32 [h, w, D], NaN where there is no data.

        `canvases` paints the tiles elsewhere. A tile that cannot be made leaves its neighbours without what it adds.
        """
        for tile, canvas in (canvases or self._canvases)(tiles, advance):
            if isinstance(canvas, Failure):
                parts.fail(tile, canvas)
                yield tile, canvas
                continue
            rows, cols = slice(0, tile.core.height), slice(0, tile.core.width)
            core = canvas.part(rows, cols)
            parts.hold(
                tile,
                (
                    canvas.part(slice(None), slice(tile.core.width, None)).copy(),
                    canvas.part(slice(tile.core.height, None), cols).copy(),
                ),
            )
            if tile.col and (left := parts.edges(tile.row, tile.col - 1)):
                core.add(left[0])
            if tile.row and (above := parts.edges(tile.row - 1, tile.col)):
                core.add(above[1])
            if tile.row and tile.col and (corner := parts.edges(tile.row - 1, tile.col - 1)):
                height = self.lattice.rows.core(tile.row - 1)[1]
                core.add(corner[0].part(slice(height, None), slice(None)))
            if self.coverage.area is not None:
                core.forget(~self.coverage.inside(tile.core))
            yield tile, core.mean()

    def _canvases(
        self, tiles: Iterable[Tile], advance: Callable[[int], None]
    ) -> Iterator[tuple[Tile, Canvas | Failure]]:
        for tile, pixels in ahead(lambda tile: attempts(lambda: self._read(tile)), tiles, self.workers):
            if isinstance(pixels, Failure):
                advance(self.cost(tile))
                yield tile, pixels
            else:
                yield tile, self._painted(tile, pixels, advance)

    def canvas(self, tile: Tile) -> Canvas | Failure:
        """Paint one tile; what is wrong with it is told, not raised."""
        pixels = attempt(lambda: self._read(tile))
        return pixels if isinstance(pixels, Failure) else self._painted(tile, pixels, lambda steps: None)

    def _painted(self, tile: Tile, pixels: Pixels | None, advance: Callable[[int], None]) -> Canvas | Failure:
        canvas = Canvas.blank(tile.reach.height, tile.reach.width, self.dim)
        try:
            if pixels is not None:
                self._paint(canvas, tile, pixels, advance)
        except InputError as error:  # the encoder cannot take what it is shown
            return Failure(reason=str(error))
        finally:
            # glibc keeps what was freed, tens of megabytes for every thread that reads, and seldom finds a use for it.
            _trim()(0)
        return canvas

    def _read(self, tile: Tile) -> Pixels | None:
        """Read what those windows of a tile cover together in which there may be something to map."""
        windows = self.coverage.windows(tile)
        if not windows:
            return None
        row, col = min(w.row for w in windows), min(w.col for w in windows)
        height, width = max(w.row + w.height for w in windows) - row, max(w.col + w.width for w in windows) - col
        cover = Window(row=row, col=col, height=height, width=width)
        batch = self.scene.batch(self.box[cover.scaled(self.patch_px).slices], self.modalities)
        for name, o in batch.observations.items():
            if not _placeless(name) and (o.pixels.shape[-2] % height or o.pixels.shape[-1] % width):
                raise InputError(
                    f"a patch of {self.patch_m:g} m is not a whole number of {name}'s pixels of "
                    f"{MODALITIES[name].gsd:g} m; choose another patch_m, or leave {name} out"
                )
        return cover, batch, windows

    def _paint(self, canvas: Canvas, tile: Tile, read: Pixels, advance: Callable[[int], None]) -> None:
        """Encode the windows of a tile, in batches of fixed composition; windows without any data are left out."""
        cover, pixels, wanted = read
        placed = [(name, o) for name, o in pixels.observations.items() if not _placeless(name)]
        windows = [w for w in wanted if any(bool(_crop(n, o, cover, w).valid.any()) for n, o in placed)]
        advance(len(wanted) - len(windows))
        for start in range(0, len(windows), self.batch_windows):
            some = windows[start : start + self.batch_windows]
            patches, valid = self._encode(self._cut(pixels, cover, some))
            for window, one, seen in zip(some, patches, valid, strict=True):
                canvas.part(*window.within(tile.reach).slices).paint(one, seen, self.weight)
            advance(len(some))

    def _encode(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        began = time.perf_counter()
        with torch.inference_mode():
            features = self.encoder.encode(batch.to(self.device), patch_m=self.patch_m)
            patches = features.patches.to("cpu", torch.float32).numpy()
            valid = features.valid.cpu().numpy()
        self.encoder_seconds += time.perf_counter() - began
        assert patches.shape == (len(batch), *self.lattice.window_shape, self.dim), patches.shape
        if not np.isfinite(patches[valid]).all():
            raise InputError(
                f"{self.encoder.name} returned NaN or infinity; load it in float32, and see what `panterra doctor` says"
            )
        return patches, valid

    def _cut(self, pixels: Batch, cover: Window, windows: Sequence[Window]) -> Batch:
        """Cut windows out of a tile's pixels, one sample each."""
        observations = {}
        for name, o in pixels.observations.items():
            crops = [_crop(name, o, cover, window) for window in windows]
            observations[name] = Observation(
                pixels=torch.cat([crop.pixels for crop in crops]),
                dates=torch.cat([crop.dates for crop in crops]),
                valid=torch.cat([crop.valid for crop in crops]),
            )
        return Batch(observations=observations, lonlat=self._centres(windows), pixel_m=pixels.pixel_m)

    def _centres(self, windows: Sequence[Window]) -> torch.Tensor:
        """Longitude and latitude of each window, float64 [n, 2]."""
        middles = [self.grid.affine @ (w.col + w.width / 2, w.row + w.height / 2) for w in windows]
        x, y = zip(*middles, strict=True)
        lon, lat = rasterio.warp.transform(crs_for_rasterio(self.box.crs), "EPSG:4326", x, y)[:2]
        return torch.tensor([lon, lat], dtype=torch.float64).T


def _crop(name: str, o: Observation, cover: Window, window: Window) -> Observation:
    """View a window of what was read over `cover`; weather is the same everywhere in it."""
    if _placeless(name):
        return o
    rows, cols = window.within(cover).scaled(o.pixels.shape[-1] // cover.width).slices
    return Observation(pixels=o.pixels[..., rows, cols], dates=o.dates, valid=o.valid[..., rows, cols])


def _placeless(modality: str) -> bool:
    return MODALITIES[modality].kind in ("weather", "constant")


def _modalities(scene: Scene, encoder: Encoder, wanted: Sequence[str] | None) -> tuple[str, ...]:
    usable = [name for name in scene.modalities if name in encoder.modalities]
    absent = [name for name in wanted or () if name not in usable]
    if absent:
        raise InputError(
            f"cannot use {', '.join(absent)}: the scene holds {', '.join(scene.modalities)}, and "
            f"{encoder.name} looks at {', '.join(encoder.modalities)}"
        )
    if not usable:
        why = "; ".join(nothing_shared(scene.modalities, encoder.modalities))
        raise InputError(f"{encoder.name} cannot be shown the scene: {why}")
    return tuple(name for name in usable if wanted is None or name in wanted)


def _tile_px(scene: Scene, modalities: Sequence[str], features_per_px: float, workers: int) -> int:
    """Choose the largest tile for which the tiles in work stay within `TILE_BYTES`."""
    read = 0.0
    for spec in (MODALITIES[name] for name in modalities):
        if not _placeless(spec.name):
            finer = max(10.0 / spec.gsd, 1.0)
            read += len(scene.dates(spec.name)) * finer**2 * (4 * len(spec.bands) + 1)
    # Pixels: the tile in work, those read ahead and one being put together; features: in work, blended, being written.
    per_px = (workers + 2) * read + 3 * 4 * features_per_px
    return min(TILE_PX, int(math.sqrt(TILE_BYTES / per_px)))


def _device(encoder: Encoder) -> torch.device:
    first = next(encoder.parameters(), None) if isinstance(encoder, torch.nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def _scene_fingerprint(scene: Scene, modalities: Sequence[str]) -> str:
    """Hash what would be read: the items, how bands and masks are treated, and the local files' size and age."""
    digest = hashlib.sha256(repr((scene.fill_missing_bands, scene.apply_masks)).encode())
    for item in scene.items:
        if item.modality in modalities:
            digest.update(repr(item).encode())
            for href in [asset.href for asset in item.assets] + ([item.mask[0]] if item.mask else []):
                if Path(href).is_file():
                    stat = Path(href).stat()
                    digest.update(repr((stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()
