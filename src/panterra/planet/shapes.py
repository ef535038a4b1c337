"""Cells, blocks, lines and sites in the plane, which look the same from every window."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from panterra.planet.chance import Array, add_octaves, draw, mix
from panterra.planet.ground import Grid


class Voronoi(NamedTuple):
    """Cells around jittered sites: straight borders, no two alike."""

    key: Array
    """uint64 [H, W]"""
    pair: Array
    """uint64 [H, W], one number for the nearest border, the same from both sides."""
    u: Array
    """float32 [H, W], metres along the cell's own direction."""
    v: Array
    edge: Array
    """float32 [H, W], metres to the nearest border."""
    cos: Array
    """float32 [H, W], of the angle from east to u."""
    sin: Array
    cell: Array
    """intp [H, W], index into tables with a row per lattice cell."""
    sites: Array
    """uint64 [rows, columns], that table of keys."""
    centres: tuple[Array, Array]
    """Columns and rows of the lattice, in metres."""

    def draw(self, name: str) -> Array:
        """Draw a number per cell and spread it over the pixels."""
        return draw(self.sites, name).take(self.cell)


def make_voronoi(x: Array, y: Array, size: float, *keys: Array | int | str) -> Voronoi:
    """Divide a window into cells around `size` metres wide."""
    col, row = np.floor(x / size), np.floor(y / size)
    cols, rows = np.arange(col.min() - 1, col.max() + 2), np.arange(row.min() - 1, row.max() + 2)
    key = mix(*keys, rows[:, None].astype(np.int64), cols.astype(np.int64))
    site_x, site_y = (0.1 + 0.8 * draw(key, "x")) * np.float32(size), (0.1 + 0.8 * draw(key, "y")) * np.float32(size)
    in_x, in_y = (x - col * size).astype(np.float32), (y - row * size).astype(np.float32)[:, None]
    base = (row - rows[0]).astype(np.intp)[:, None] * len(cols) + (col - cols[0]).astype(np.intp)
    first = np.full(base.shape, np.inf, np.float32)
    second, u, v = first.copy(), first.copy(), first.copy()
    nearest, other = base.copy(), base.copy()
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            at = base + (i * len(cols) + j)
            dx, dy = in_x - (site_x.take(at) + j * size), in_y - (site_y.take(at) + i * size)
            distance = dx * dx + dy * dy
            closer = distance < first
            runner = ~closer & (distance < second)
            np.copyto(other, at, where=runner)
            np.copyto(other, nearest, where=closer)
            np.copyto(second, distance, where=runner)
            np.copyto(second, first, where=closer)
            for target, value in ((first, distance), (nearest, at), (u, dx), (v, dy)):
                np.copyto(target, value, where=closer)
    place_x = (cols * size + site_x).astype(np.float64)
    place_y = (rows[:, None] * size + site_y).astype(np.float64)
    apart = np.hypot(place_x.take(nearest) - place_x.take(other), place_y.take(nearest) - place_y.take(other))
    angle = draw(key, "angle") * np.float32(np.pi)
    cos, sin = np.cos(angle).take(nearest), np.sin(angle).take(nearest)
    mine, theirs = key.take(nearest), key.take(other)
    return Voronoi(
        key=mine,
        pair=mine ^ theirs,
        u=u * cos + v * sin,
        v=v * cos - u * sin,
        edge=((second - first) / (2 * apart)).astype(np.float32),
        cos=cos,
        sin=sin,
        cell=nearest,
        sites=key,
        centres=((cols + 0.5) * size, (rows + 0.5) * size),
    )


def _cut(t: Array, size: Array | float, *keys: Array | int | str) -> tuple[Array, Array, Array]:
    """Cut a line into pieces of irregular length around `size`; give each place its piece's number, start and end."""
    number = np.floor(t / size)
    start = (number + 0.7 * draw(*keys, number.astype(np.int64))) * size
    before = t < start
    neighbour = np.where(before, number - 1, number + 1)
    bound = (neighbour + 0.7 * draw(*keys, neighbour.astype(np.int64))) * size
    number = (number - before).astype(np.int64)
    return number, np.where(before, bound, start), np.where(before, start, bound)


def divide(t: Array, start: Array, end: Array, count: Array) -> tuple[Array, Array, Array]:
    """Divide pieces of a line evenly."""
    width = (end - start) / count
    number = np.clip(np.floor((t - start) / width), 0, count - 1)
    return number.astype(np.int64), start + number * width, start + (number + 1) * width


class Block(NamedTuple):
    """Rectangles between parallel rows of straight ways."""

    key: Array
    row: Array
    u0: Array
    u1: Array
    v0: Array
    v1: Array


def make_blocks(u: Array, v: Array, length: Array, width: Array, key: Array) -> Block:
    """Find the rectangle, of irregular size around length x width metres, in which each place lies."""
    row, v0, v1 = _cut(v, width, key, "row")
    strip = mix(key, row)
    col, u0, u1 = _cut(u, length, strip, "column")
    return Block(key=mix(strip, col), row=row, u0=u0, u1=u1, v0=v0, v1=v1)


def cover_line(distance: Array, half_width: Array | float, step: float) -> Array:
    """Give the share of samples of size `step` that a line of some width covers, by their distance from its middle."""
    inside = np.minimum(half_width, distance + step / 2) - np.maximum(-half_width, distance - step / 2)
    return np.clip(inside / step, 0, 1).astype(np.float32)


def smooth_step(t: Array, low: float, high: float) -> Array:
    """Rise from 0 at `low` to 1 at `high` without corners."""
    f = np.clip((t - low) / np.float32(high - low), 0, 1)
    return f * f * (3 - 2 * f)


def differentiate(field: Array, step: float) -> tuple[Array, Array]:
    """Differentiate eastwards and northwards; the outermost samples are left at zero."""
    east, north = np.zeros_like(field), np.zeros_like(field)
    east[:, 1:-1] = (field[:, 2:] - field[:, :-2]) / (2 * step)
    north[1:-1] = (field[:-2] - field[2:]) / (2 * step)
    return east, north


def distance_from_lines(grid: Grid, weights: dict[float, float], *keys: Array | int | str) -> Array:
    """Give the distance in metres from the winding lines along which noise is zero."""
    # Differences between near pixels are far below float32's precision.
    field = add_octaves(grid.x, grid.y, weights, *keys, dtype=np.float64)
    east, north = differentiate(field, grid.step)
    distance: Array = np.abs(field) / np.sqrt(np.maximum(east * east + north * north, 1e-8))
    return distance.astype(np.float32)


class Site(NamedTuple):
    """One point of a jittered lattice: a town, a lake, a pit."""

    key: Array
    col: int
    row: int
    x: float
    y: float


def list_sites(x: Array, y: Array, size: float, reach: float, *keys: Array | int | str) -> Iterator[Site]:
    """List the sites of a jittered lattice that lie within `reach` metres of a window, in a fixed order."""
    for row in range(math.floor((y.min() - reach) / size), math.floor((y.max() + reach) / size) + 1):
        for col in range(math.floor((x.min() - reach) / size), math.floor((x.max() + reach) / size) + 1):
            key = mix(*keys, col, row)
            along, aside = (0.15 + 0.7 * float(draw(key, axis)) for axis in "xy")
            yield Site(key, col, row, (col + along) * size, (row + aside) * size)


def find_span(t: Array, low: float, high: float) -> slice:
    """Find the samples of a monotonous axis between two coordinates."""
    inside = np.flatnonzero((t >= low) & (t <= high))
    return slice(inside[0], inside[-1] + 1) if len(inside) else slice(0, 0)
