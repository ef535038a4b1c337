"""TESSERA as its users have it: tiles of embeddings that geotessera downloaded, read where a sample lies.

After geotessera's documentation (0.7.5): a tile is 0.1 degrees wide and named by its middle; `grid_0.15_52.05.npy`,
int8 [rows, columns, 128], times `grid_0.15_52.05_scales.npy`, float32 [rows, columns] or [rows, columns, 128], is the
embedding; `grid_0.15_52.05.tiff`, the land mask, says where its pixels of 10 m lie. GeoTIFFs that `geotessera download`
writes hold all of this. An embedding sums up a calendar year.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.adapters.pixels import grid_of
from panterra.models.features import Features
from panterra.sample import Batch

if TYPE_CHECKING:
    from rasterio.transform import Affine

DIM = 128
PIXEL_M = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One tile and the grid that its pixels lie on."""

    values: Path
    scales: Path | None
    """None: `values` is a GeoTIFF of embeddings."""
    crs: Any
    transform: Affine
    shape: tuple[int, int]
    box: tuple[float, float, float, float]
    """West, south, east, north in degrees."""


class TesseraTiles:
    """An `Encoder` that looks embeddings up by place instead of computing them; what was observed plays no part.

    A sample's rows are taken to run along the projection of the tile under its middle (UTM). A patch has the mean of
    the pixels in it, and is no data where there is no tile or a number is missing. The embeddings stay on disk.
    """

    dim = DIM
    modalities = tuple(name for name, spec in MODALITIES.items() if spec.kind in ("series", "still"))

    def __init__(self, tiles: Sequence[Tile], *, name: str) -> None:
        self.tiles, self.name = tuple(tiles), name

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False) -> Features:
        """Look up the embeddings of samples that say where they lie. Raises InputError."""
        if dense:
            raise InputError(f"{self.name} has no sub-patch features; ask for a smaller patch_m instead of dense=True")
        if batch.lonlat is None:
            raise InputError(f"{self.name} wants to know where a sample lies; give the batch its lonlat")
        rows, cols = grid_of(batch, patch_m)
        fine = max(1, round(patch_m / PIXEL_M))
        found = [
            self._around(lon, lat, (rows * fine, cols * fine), patch_m / fine) for lon, lat in batch.lonlat.tolist()
        ]
        pixels = rearrange(torch.stack(found), "b (h i) (w j) d -> b h w (i j) d", i=fine, j=fine)
        known = pixels.isfinite().all(-1, keepdim=True)
        total, count = pixels.where(known, 0.0).sum(3), known.sum(3)
        patches = total / count.clamp(min=1)
        summary = total.sum((1, 2)) / count.sum((1, 2)).clamp(min=1)
        device = batch.lonlat.device
        return Features(
            patches=patches.to(device),
            summary=summary.to(device),
            valid=(count[..., 0] > 0).to(device),
            patch_m=patch_m,
        )

    def _around(self, lon: float, lat: float, size: tuple[int, int], step_m: float) -> Float[Tensor, "y x d"]:
        """Read the nearest pixels to points `step_m` apart around a place; NaN where there are none."""
        from rasterio.warp import transform

        out = torch.full((size[0] * size[1], DIM), torch.nan)
        under = [tile for tile in self.tiles if _holds(tile, lon, lat)]
        if under:
            crs = under[0].crs
            (x,), (y,) = transform("EPSG:4326", crs, [lon], [lat])
            east = x + (np.arange(size[1]) - (size[1] - 1) / 2) * step_m
            north = y - (np.arange(size[0]) - (size[0] - 1) / 2) * step_m
            xs, ys = (part.ravel() for part in np.meshgrid(east, north))
            lons, lats = (np.array(part) for part in transform(crs, "EPSG:4326", xs, ys))
            open_ = np.ones(len(xs), bool)
            for tile in [*under, *(t for t in self.tiles if t not in under)]:
                west, south, e, n = tile.box
                near = open_ & (lons >= west) & (lons <= e) & (lats >= south) & (lats <= n)
                if near.any():
                    index = np.flatnonzero(near)
                    own = (xs[index], ys[index]) if tile.crs == crs else transform(crs, tile.crs, xs[index], ys[index])
                    inside, values = _pixels(tile, np.asarray(own[0]), np.asarray(own[1]))
                    out[torch.from_numpy(index[inside])] = values
                    open_[index[inside]] = False
        return out.view(*size, DIM)


def open_tessera(folder: str | Path, *, name: str | None = None) -> TesseraTiles:
    """Open a folder, of any depth, with tiles of one year as geotessera has them.

    `name` is what evaluation keeps features by; that of the folder unless given. Raises InputError.
    """
    folder = Path(folder)
    stored = [path for path in sorted(folder.rglob("grid_*.npy")) if not path.stem.endswith("_scales")]
    masks = {path.stem: path for path in sorted(folder.rglob("grid_*.tif*"))}
    tiles = [_stored(path, masks) for path in stored]
    used = {path.stem for path in stored}
    tiles += [
        tile
        for path in sorted(folder.rglob("*.tif*"))
        if path.stem not in used and path.suffix in (".tif", ".tiff") and (tile := _exported(path)) is not None
    ]
    if not tiles:
        raise InputError(
            f"{folder} has no tiles of TESSERA; wanted grid_*.npy with grid_*_scales.npy and grid_*.tiff, or GeoTIFFs "
            f"of {DIM} bands, as geotessera downloads them"
        )
    places: dict[Any, Path] = {}
    for tile in tiles:
        other = places.setdefault((str(tile.crs), tile.transform), tile.values)
        if other != tile.values:
            raise InputError(f"{other} and {tile.values} are of the same place; give a folder with one year")
    return TesseraTiles(tiles, name=name or f"tessera ({folder.name})")


def _stored(path: Path, masks: dict[str, Path]) -> Tile:
    scales = path.with_name(f"{path.stem}_scales.npy")
    if not scales.is_file():
        raise InputError(
            f"{path} has no {scales.name} beside it, without which its numbers mean nothing; download both"
        )
    if path.stem not in masks:
        raise InputError(
            f"{path} has no land mask {path.stem}.tiff in the folder, which says where it lies; download it"
        )
    shape = np.load(path, mmap_mode="r").shape
    tile = _on_grid_of(masks[path.stem], values=path, scales=scales)
    if shape != (*tile.shape, DIM):
        raise InputError(
            f"{path} is {shape} and its land mask {tile.shape}; wanted the same rows and columns, {DIM} deep"
        )
    return tile


def _exported(path: Path) -> Tile | None:
    import rasterio

    with rasterio.open(path) as file:
        whole = file.count == DIM
    return _on_grid_of(path, values=path, scales=None) if whole else None


def _on_grid_of(raster: Path, *, values: Path, scales: Path | None) -> Tile:
    import rasterio
    from rasterio.warp import transform_bounds

    with rasterio.open(raster) as file:
        if file.crs is None:
            raise InputError(f"{raster} does not say where it lies; download it again")
        return Tile(
            values=values,
            scales=scales,
            crs=file.crs,
            transform=file.transform,
            shape=file.shape,
            box=transform_bounds(file.crs, "EPSG:4326", *file.bounds),
        )


def _holds(tile: Tile, lon: float, lat: float) -> bool:
    from rasterio.warp import transform

    west, south, east, north = tile.box
    if not (west <= lon <= east and south <= lat <= north):
        return False
    (x,), (y,) = transform("EPSG:4326", tile.crs, [lon], [lat])
    return bool(_places(tile, np.array([x]), np.array([y]))[0][0])


def _places(
    tile: Tile, x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
) -> tuple[Bool[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Say which points lie in a tile, and in which row and column."""
    col, row = (np.floor(part).astype(np.int64) for part in ~tile.transform * (x, y))
    inside: np.ndarray = (row >= 0) & (row < tile.shape[0]) & (col >= 0) & (col < tile.shape[1])
    return inside, row, col


def _pixels(
    tile: Tile, x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
) -> tuple[Bool[np.ndarray, " n"], Float[Tensor, "k d"]]:
    """Read the pixels that points in a tile's projection fall into."""
    inside, row, col = _places(tile, x, y)
    row, col = row[inside], col[inside]
    if not len(row):
        return inside, torch.empty(0, DIM)
    if tile.scales is not None:
        numbers, scales = (np.load(path, mmap_mode="r")[row, col] for path in (tile.values, tile.scales))
        values = numbers.astype(np.float32) * scales.reshape(len(row), -1)
        return inside, torch.from_numpy(values.astype(np.float32))
    import rasterio
    from rasterio.windows import Window

    top, left = int(row.min()), int(col.min())
    window = Window(left, top, int(col.max()) - left + 1, int(row.max()) - top + 1)
    with rasterio.open(tile.values) as file:
        image = file.read(window=window, masked=True).astype(np.float32).filled(np.nan)
    return inside, torch.from_numpy(image[:, row - top, col - left].T.copy())
