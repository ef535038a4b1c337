"""Rivers, lakes and streams, and what they leave: wet land, gravel banks and pits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from panterra.planet.canvas import Canvas
from panterra.planet.chance import Array, draw, make_noise, mix
from panterra.planet.shapes import (
    cover_line,
    find_span,
    list_sites,
)
from panterra.planet.surfaces import KIND


class Wet(NamedTuple):
    """Where water and what it leaves lies, bool [H, W]."""

    marsh: Array
    bare: Array
    water: Array
    owner: Array
    """uint64 [H, W], the number of the lake or river."""


def find_water(canvas: Canvas, relief: Array, river: Array, stream: Array) -> Wet:
    """Find rivers, lakes, wet land, gravel banks, pits and rock."""
    x, y, seed = canvas.x, canvas.y, canvas.seed
    wander = make_noise(x, y, 900, seed, "wander")
    ragged = wander + 0.6 * make_noise(x, y, 170, seed, "ragged") + 0.25 * make_noise(x, y, 45, seed, "ragged")
    half = 27 + 9 * wander
    lake = np.full(canvas.kind.shape, 1e6, np.float32)
    pit, owner = lake.copy(), np.full(canvas.kind.shape, mix(seed, "river"))
    for target, size, odds, least, most, name in (
        (lake, 5200.0, 0.62, 130, 560, "lake"),
        (pit, 3100.0, 0.6, 80, 230, "pit"),
    ):
        for site in list_sites(x, y, size, 1200, seed, name):
            if float(draw(site.key, "odds")) > odds:
                continue
            radius = least + (most - least) * float(draw(site.key, "radius")) ** 2
            rows, cols = find_span(y, site.y - 1200, site.y + 1200), find_span(x, site.x - 1200, site.x + 1200)
            away = np.hypot((x[cols] - site.x), 1.4 * (y[rows, None] - site.y)).astype(np.float32)
            away += (0.22 * radius + 6) * ragged[rows, cols] - radius
            np.copyto(owner[rows, cols], site.key, where=away < 0)
            np.minimum(target[rows, cols], away, out=target[rows, cols])
    lake = np.where(relief < 0.62, lake, 1e6)
    wet = np.minimum(lake, river - half)
    marsh = (wet < 45 + 55 * ragged) & (make_noise(x, y, 1500, seed, "marsh") > 0.15)
    marsh |= (stream < 14 + 9 * ragged) & (relief < 0.3) & (make_noise(x, y, 2600, seed, "fen") > 0.9)
    bare = (pit < 0) | ((river - half < 6 + 13 * ragged) & (ragged > 0.75)) | (relief + 0.08 * ragged > 1.3)
    pond = pit < -26 - 12 * ragged
    water = (wet < 0) | pond
    canvas.lake |= (lake < 0) | pond
    canvas.wild |= marsh | bare | water
    return Wet(marsh=marsh, bare=bare, water=water, owner=owner)


def paint_water(canvas: Canvas, wet: Wet, stream: Array) -> None:
    """Paint wet land, bare ground and water over the country, and streams."""
    one, other = (np.floor(make_noise(canvas.x, canvas.y, size, canvas.seed, "patch")) for size in (420, 260))
    patch = mix(canvas.district, one.astype(np.int64), other.astype(np.int64))
    for mask, name, key in (
        (wet.marsh, "wetland", patch),
        (wet.bare, "bare", patch),
        (wet.water, "water", wet.owner),
    ):
        canvas.kind[mask] = KIND[name]
        canvas.key[mask] = key[mask]
        canvas.trees[mask] = 0
        canvas.vigour[mask] = 0
    canvas.lay(cover_line(stream, 2.2, canvas.step), "stream", np.zeros(1, np.uint64))
