"""One image out of several dates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from odc.geo.geobox import GeoBox
from rasterio.windows import Window

from panterra.imagery.clouds import S2CLOUDLESS_REACH_PX, detect_clouds, near_clouds
from panterra.imagery.items import SceneItem
from panterra.imagery.stac import Scene, modality_grid
from panterra.modalities import MODALITIES, Modality

How = Literal["median", "medoid", "best", "none"]
"""median: of each band. medoid: the date whose spectrum is nearest to those of the others. best: the first date that
shows the pixel. none: every date by itself."""

BLOCK_PX = 256
"""Side of what is composed at a time, in pixels of the result: with the number of dates it bounds memory."""

Pixels = Float[np.ndarray, "t c h w"]
Valid = Bool[np.ndarray, "t h w"]


def blocks(spec: Modality, box: GeoBox) -> Iterator[tuple[GeoBox, Window]]:
    """Cut a box of the common grid into blocks, and say where each lies in the modality's own pixels."""
    finer = modality_grid(spec, box).shape.x // box.shape.x
    side = max(BLOCK_PX // finer, 1)
    for row in range(0, box.shape.y, side):
        for col in range(0, box.shape.x, side):
            part = box[row : min(row + side, box.shape.y), col : min(col + side, box.shape.x)]
            height, width = (finer * n for n in part.shape)
            yield part, Window(finer * col, finer * row, width, height)


def compose_block(
    scene: Scene,
    days: Sequence[Sequence[SceneItem]],
    box: GeoBox,
    how: How,
    *,
    grow_px: int = 0,
    s2cloudless: bool = False,
) -> tuple[Float[np.ndarray, "c h w"], Bool[np.ndarray, "h w"]]:
    """Read the items of each day over a box and make one image of them; `days` stand in order of preference.

    Of the items of one day the first valid pixel counts. With `grow_px` pixels that near to a cloud count as hidden;
    with `s2cloudless` so do the clouds that it finds in Sentinel-2 level 1C.
    """
    layers = [_mosaic(scene, items, box, grow_px, s2cloudless) for items in days]
    return reduce_dates(np.stack([p for p, _ in layers]), np.stack([v for _, v in layers]), how)


def reduce_dates(pixels: Pixels, valid: Valid, how: How) -> tuple[Float[np.ndarray, "c h w"], Bool[np.ndarray, "h w"]]:
    """Make one image of several dates; 0 where none is valid."""
    seen = np.asarray(valid.any(axis=0))
    if how == "median":
        chosen = _median(pixels, valid)
    else:
        date = _medoid(pixels, valid) if how == "medoid" else valid.argmax(axis=0)
        chosen = np.take_along_axis(pixels, date[None, None], axis=0)[0]
    return np.where(seen, chosen, np.float32(0)), seen


def _median(pixels: Pixels, valid: Valid) -> Float[np.ndarray, "c h w"]:
    ordered = np.sort(np.where(valid[:, None], pixels, np.float32(np.inf)), axis=0)
    count = np.maximum(valid.sum(axis=0), 1)[None, None]
    low, high = (np.take_along_axis(ordered, at, axis=0)[0] for at in ((count - 1) // 2, count // 2))
    # Halved first: no overflow, and exact for numbers of this size.
    middle: np.ndarray = low / 2 + high / 2
    return middle


def _medoid(pixels: Pixels, valid: Valid) -> np.ndarray:
    """Find the valid date with the smallest sum of distances to the others (Flood 2013), the first of equals."""
    total = np.full(valid.shape, np.inf, np.float32)
    for date in range(len(pixels)):
        distance = np.sqrt(((pixels - pixels[date]) ** 2).sum(axis=1))
        total[date] = np.where(valid[date], (distance * valid).sum(axis=0), np.inf)
    nearest: np.ndarray = total.argmin(axis=0)
    return nearest


def _mosaic(
    scene: Scene, items: Sequence[SceneItem], box: GeoBox, grow_px: int, s2cloudless: bool
) -> tuple[Float[np.ndarray, "c h w"], Bool[np.ndarray, "h w"]]:
    spec = MODALITIES[items[0].modality]
    grid = modality_grid(spec, box)
    pixels = np.zeros((len(spec.bands), *grid.shape), np.float32)
    valid = np.zeros(grid.shape, np.bool_)
    for item in items:
        alone = replace(scene, items=(item,))
        seen = alone.read(item.modality, box)
        fresh = seen.valid[0, 0].numpy() & ~valid
        if item.mask is not None and scene.apply_masks and grow_px:
            fresh &= ~near_clouds(item.mask, grid, grow_px)
        if s2cloudless and item.modality == "sentinel2":
            reach = S2CLOUDLESS_REACH_PX
            around = alone.read(item.modality, box.pad(reach)).pixels[0, 0].numpy()
            fresh &= ~detect_clouds(around, spec.band_names)[reach:-reach, reach:-reach]
        np.copyto(pixels, seen.pixels[0, 0].numpy(), where=fresh)
        valid |= fresh
    return pixels, valid
