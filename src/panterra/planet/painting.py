"""The ground, painted from the country down to single trees."""

from __future__ import annotations

import math

import numpy as np
from odc.geo.geobox import GeoBox

from panterra.planet.canvas import Canvas
from panterra.planet.chance import Array, add_octaves, draw_normal, make_noise, mix
from panterra.planet.country import paint_country
from panterra.planet.ground import SHADOW_REACH, Ground, Layer, make_grid, number_along
from panterra.planet.shapes import (
    differentiate,
    distance_from_lines,
    smooth_step,
)
from panterra.planet.surfaces import COVERS, KIND, SURFACES, VARIANTS
from panterra.planet.towns import paint_motorways, paint_roads, paint_towns
from panterra.planet.trees import paint_trees
from panterra.planet.water import find_water, paint_water

# The sun that casts the shadows of trees and houses, whatever the date: half past ten in early summer.
_SHADOW_AZIMUTH, _SHADOW_SLOPE = math.radians(152.0), math.tan(math.radians(53.0))


def paint_ground(seed: int, box: GeoBox, *, south: float = 0.0, motorways: bool = False) -> Ground:
    """Work out what lies where on the planet of a seed."""
    grid = make_grid(box)
    x, y, step = grid.x, grid.y, grid.step
    river = distance_from_lines(grid, {11000: 1, 3600: 0.34, 1400: 0.1, 600: 0.02}, seed, "river")
    stream = distance_from_lines(grid, {4200: 1, 1500: 0.3, 520: 0.07, 190: 0.012}, seed, "stream")
    valley = river / (river + 1000)
    hills = add_octaves(x, y, {9000: 1, 3600: 0.45, 1500: 0.2, 600: 0.08, 250: 0.03}, seed, "hills")
    rolling = 0.62 + 0.42 * hills
    relief = 0.5 * (rolling + np.sqrt(rolling * rolling + np.float32(0.04))) * valley
    elevation = 240 + 30 * make_noise(x, y, 40000, seed, "plain") + 430 * relief
    elevation += valley * 3 * add_octaves(x, y, {400: 1, 130: 0.4, 40: 0.12}, seed, "bumps") + 4 * smooth_step(
        stream, 0, 60
    )
    east, north = differentiate(elevation, step)

    canvas = Canvas(seed, grid)
    wet = find_water(canvas, relief, river, stream)
    paint_country(canvas, relief, river, stream, south)
    paint_water(canvas, wet, stream)
    paint_roads(canvas)
    if motorways:
        paint_motorways(canvas)
    paint_towns(canvas)
    paint_trees(canvas)

    texture = np.array([surface.texture for surface in SURFACES.values()], np.float32)
    speck = draw_normal(number_along(x, step), number_along(y, step), seed, "texture")
    speck *= np.float32(min(1, 0.2 + step / 12))
    canvas.shade *= 1 + texture.take(canvas.kind) * (
        0.75 * speck + 0.8 * make_noise(x, y, max(45.0, 3 * step), seed, "texture")
    )
    canvas.shade *= _cast(canvas.height, step)
    canvas.vigour += (
        0.9 * add_octaves(x, y, {420: 1, 140: 0.7, 50: 0.45, 16: 0.35, 5: 0.3, 1.6: 0.3}, seed, "vigour") + 0.18 * speck
    )
    damp = add_octaves(x, y, {600: 1, 230: 0.8, 90: 0.5, 30: 0.25}, seed, "wet")

    # Tables: stands of this window, then the surfaces that lie over others.
    keys, first, stand = np.unique(mix(canvas.key, canvas.kind), return_index=True, return_inverse=True)
    covers = np.repeat([KIND[name] for name in COVERS], VARIANTS)
    cover_keys = mix(seed, "cover", np.arange(len(covers)))
    layers = tuple(Layer(layer.where, layer.cover, layer.row + len(keys)) for layer in canvas.layers)
    codes = np.array([surface.code for surface in SURFACES.values()], np.uint8)
    kind = np.concatenate([canvas.kind.ravel()[first].astype(np.intp), covers])
    code = codes.take(canvas.kind)
    for layer in layers:
        name = kind[layer.row]
        seen = (layer.cover > 0.5) & np.isin(name, [KIND[seen] for seen in ("road", "motorway", "tree", "stream")])
        flat, where = code.ravel(), layer.where[seen]
        flat[where] = np.where(flat[where] == codes[KIND["road"]], flat[where], codes[name[seen]])
    return Ground(
        seed=seed,
        box=box,
        grid=grid,
        stand=stand.reshape(canvas.key.shape),
        kind=kind,
        key=np.concatenate([keys, cover_keys]),
        layers=layers,
        vigour=canvas.vigour,
        wet=damp,
        elevation=elevation,
        east=east,
        north=north,
        shade=canvas.shade,
        height=canvas.height,
        code=code,
    )


def _cast(height: Array, step: float) -> Array:
    """Give the light that trees and houses leave: their sunny sides are brighter, their shadows dark."""
    east, north = math.sin(_SHADOW_AZIMUTH), math.cos(_SHADOW_AZIMUTH)
    rows, cols = height.shape
    light = np.ones_like(height)
    blocked = np.full_like(height, -1e6)
    stride = max(step, 0.4)
    for n in range(1, math.ceil(SHADOW_REACH / stride) + 1):
        down, right = round(-north * n * stride / step), round(east * n * stride / step)
        if down >= rows or right >= cols:
            break
        lower = height[down:, right:] - np.float32(n * stride * _SHADOW_SLOPE)
        target = blocked[: rows - down, : cols - right]
        np.maximum(target, lower, out=target)
        if n == 1:
            rise = height[: rows - down, : cols - right] - height[down:, right:]
            light[: rows - down, : cols - right] += np.clip(rise * np.float32(0.3 / stride), -0.35, 0.35)
    return light * (1 - np.float32(0.62) * np.clip((blocked - height) / np.float32(1.2 + 0.6 * step), 0, 1))
