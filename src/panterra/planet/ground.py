"""What lies where in a box, for any date and sensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.planet.chance import Array

CRS = "EPSG:32633"
CROWN = 5.0
"""Metres from the stem of a tree to the end of its longest branch, at most."""
SHADOW_REACH = 15.0
"""Metres, at most, from a tree or house to the end of its shadow."""


class Grid(NamedTuple):
    """Where a box is sampled: a margin around it for shadows, and several samples in a coarse pixel."""

    x: Array
    """float64 [columns], metres, west to east."""
    y: Array
    """float64 [rows], metres, north to south."""
    step: float
    per_pixel: int
    """Samples along a pixel's side."""
    margin: tuple[int, int, int, int]
    """Pixels added west, north, east and south, such that blocks of six absolute pixels are whole."""


def make_grid(box: GeoBox) -> Grid:
    """Lay samples over a box. Raises InputError for other than square north-up pixels in EPSG:32633."""
    affine = box.affine
    north_up = affine.b == 0 and affine.d == 0 and affine.a > 0 and affine.e < 0
    if box.crs is None or box.crs.epsg != 32633 or not north_up or abs(affine.a + affine.e) > 1e-9 * affine.a:
        raise InputError(
            f"a box in {box.crs} with {tuple(affine)[:6]} came; the planet needs square north-up pixels in {CRS}"
        )
    pixel = affine.a
    per_pixel = max(1, math.ceil(pixel / 25))
    step = pixel / per_pixel
    around = 6 * math.ceil(((SHADOW_REACH + CROWN) / pixel + 2) / 6)
    left, bottom = math.floor(affine.c / pixel + 1e-6), math.floor(affine.f / pixel + 1e-6) - box.height
    west, south = around + left % 6, around + bottom % 6
    east, north = around + -(left + box.width) % 6, around + -(bottom + box.height) % 6
    cols = np.arange(-west * per_pixel, (box.width + east) * per_pixel) + 0.5
    rows = np.arange(-north * per_pixel, (box.height + south) * per_pixel) + 0.5
    # Rounding makes a place the same number whatever box it is counted from.
    x, y = np.round(affine.c + cols * step, 4), np.round(affine.f - rows * step, 4)
    return Grid(x=x, y=y, step=step, per_pixel=per_pixel, margin=(west, north, east, south))


class Layer(NamedTuple):
    """Something over part of some pixels."""

    where: Array
    """int64 [n], flat indices of samples."""
    cover: Array
    """float32 [n], the share of each sample under it."""
    row: Array
    """int64 [n], its row in the table of stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What lies where in a box, for any date and sensor; arrays are on the sample grid, margin included."""

    seed: int
    box: GeoBox
    grid: Grid
    stand: Array
    """intp [H, W], the row in `kind` and `key` of the field, forest stand, garden ... that a sample belongs to."""
    kind: Array
    """intp [n], number of the stand's surface in `SURFACES`."""
    key: Array
    """uint64 [n], the stand's own number: the seed of whatever is particular to it."""
    layers: tuple[Layer, ...]
    """Roads, roofs, trees: each lies over the ones before."""
    vigour: Array
    """float32 [H, W], how well plants grow compared with their stand; mean 0."""
    wet: Array
    """float32 [H, W], darkness of the soil compared with its stand; mean 0."""
    elevation: Array
    east: Array
    """float32 [H, W], rise of the terrain per metre eastwards."""
    north: Array
    shade: Array
    """float32 [H, W], light that texture and the shadows of trees and houses leave."""
    height: Array
    """float32 [H, W], metres of trees and houses above the terrain."""
    code: Array
    """uint8 [H, W], class codes."""


def number_along(t: Array, step: float) -> Array:
    """Number pixels from the origin of the coordinates."""
    return np.floor(t / step).astype(np.int64)


def number_pixels(grid: Grid) -> tuple[Array, Array]:
    """Number the rows and the columns of a grid's pixels, margin included."""
    rows, cols = (number_along(t[:: grid.per_pixel], grid.step * grid.per_pixel) for t in (grid.y, grid.x))
    return rows, cols


def crop(ground: Ground, field: Array, *, blended: bool = False) -> Array:
    """Take the margin off; `blended` fields have one value per pixel already."""
    size = 1 if blended else ground.grid.per_pixel
    west, north = ground.grid.margin[:2]
    box = ground.box
    return field[north * size : (north + box.height) * size, west * size : (west + box.width) * size]


def blend(field: Array, size: int) -> Array:
    """Average blocks of size x size."""
    total = field[::size, ::size].copy()
    for i in range(size):
        for j in range(size):
            if i or j:
                total += field[i::size, j::size]
    return total / np.float32(size * size)


def compose(ground: Ground, stands: tuple[Array, Array, Array]) -> Array:
    """Spread the stands' values over the samples: mean, plus vigour, plus wetness, then the layers above."""
    mean, vigour, wet = stands
    field = mean.take(ground.stand)
    field += vigour.take(ground.stand) * ground.vigour
    field += wet.take(ground.stand) * ground.wet
    flat = field.ravel()
    for layer in ground.layers:
        flat[layer.where] += layer.cover * (mean[layer.row] - flat[layer.where])
    return field
