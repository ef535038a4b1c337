"""How often the ground was seen without clouds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import rasterio
from odc.geo.geobox import GeoBox
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError
from rasterio.vrt import WarpedVRT

from panterra.errors import InputError
from panterra.imagery.items import MASKS, SceneItem
from panterra.imagery.raster import REMOTE, Bools, crs_for_rasterio
from panterra.imagery.stac import Scene
from panterra.imagery.wish import Image

CLEAR_PX = 256
"""The longer side of the grid on which clear observations are counted."""
READERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Clear:
    """How often the ground was seen without cloud, shadow or gaps."""

    mean: float
    least: float | None = None
    """Nine in ten pixels have as many or more; None where only providers' figures for whole images are known."""
    never: float | None = None
    """The share of pixels that have none."""
    pixel_m: float | None = None
    """Of the grid on which it was counted."""


def clear_observations(scene: Scene, modality: str, box: GeoBox) -> Clear:
    """Count on how many dates each place was seen, by masks and nodata values, on a grid of `CLEAR_PX` at most.

    Reads one band and the mask of every item, from overviews where the files have them.
    """
    scale = max(1, -(-max(box.shape) // CLEAR_PX))
    coarse = box.zoom_out(scale) if scale > 1 else box
    items = [item for item in scene.items if item.modality == modality]
    with ThreadPoolExecutor(READERS) as pool:
        seen = list(pool.map(lambda item: _seen(scene, item, coarse), items))
    dates = sorted({item.date for item in items})
    counts = np.zeros(coarse.shape, int)
    for date in dates:
        counts += np.any([one for item, one in zip(items, seen, strict=True) if item.date == date], axis=0)
    return Clear(
        mean=float(counts.mean()),
        least=float(np.quantile(counts, 0.1, method="lower")),
        never=float((counts == 0).mean()),
        pixel_m=float(abs(coarse.affine.a)),
    )


def _seen(scene: Scene, item: SceneItem, grid: GeoBox) -> Bools:
    asset = item.assets[0]
    band = asset.bands[0]
    values, inside = _nearest(asset.href, band.index, grid)
    seen: Bools = inside & np.isfinite(values)
    if band.nodata is not None:
        seen &= values != band.nodata
    if item.mask is not None and scene.apply_masks:
        codes, known = _nearest(item.mask[0], 1, grid)
        seen &= MASKS[item.mask[1]](codes.astype(np.float32)) & known
    return seen


def _nearest(href: str, band: int, grid: GeoBox) -> tuple[np.ndarray, Bools]:
    """Read the nearest pixels of a band, and where the file has data; GDAL takes the overview that suffices."""
    try:
        with rasterio.Env(**(REMOTE if "://" in href else {})), rasterio.open(href) as file:
            placed = {"src_crs": file.gcps[1]} if file.crs is None and file.gcps[0] else {}
            masked = file.nodata is not None or ColorInterp.alpha in file.colorinterp
            with WarpedVRT(
                file,
                crs=crs_for_rasterio(grid.crs),
                transform=grid.affine,
                height=grid.shape[0],
                width=grid.shape[1],
                resampling=Resampling.nearest,
                add_alpha=not masked,
                **placed,
            ) as seen:
                return seen.read(band), seen.read_masks(band) > 0
    except RasterioError as error:
        raise InputError(f"cannot read {href}: {str(error).splitlines()[0]}") from error


def stated_clear(images: list[Image]) -> float:
    """Expect how often a place is seen without clouds, from what providers state for whole images."""
    return sum(_clear_share(image) for image in images)


def _clear_share(image: Image) -> float:
    total = 0.0
    for day in image.days:
        covered = sum(candidate.covers for candidate in day)
        clear = sum(candidate.covers * (1 - candidate.cloud / 100) for candidate in day)
        total += clear / max(covered, 1.0)
    return total
