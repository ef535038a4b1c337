"""What a radar hears of the ground."""

from __future__ import annotations

import numpy as np

from panterra.planet.chance import Array, draw, exponential_table, hash_pixels
from panterra.planet.ground import Ground, blend, compose, crop, number_pixels
from panterra.planet.sensors import Radar
from panterra.planet.surfaces import SURFACES
from panterra.planet.year import draw_weather, find_season


def listen(sensor: Radar, ground: Ground, day: int) -> Array:
    """Hear the echo of a ground on a day: float32 [2, H, W], dB, co- and cross-polarised."""
    season, grid = find_season(ground, day), ground.grid
    surfaces = SURFACES.values()
    look = 1 if (day // sensor.revisit_days) % 2 else -1
    # Slopes that face the radar return more; it looks west or east, a bit northwards.
    tilt = np.clip(look * ground.east + np.float32(0.18) * ground.north, -0.5, 0.5)
    geometry = np.float32(10) ** (np.float32(-0.45) * tilt)
    plants = np.clip(season.green + 0.45 * season.dry + 0.8 * season.bloom, 0, 1)
    rough = 2.6 * (draw(ground.key, "rough") - 0.5) + 1.4 * (draw(ground.key, "rough", day // 20) - 0.5)
    wind = 1.5 * draw_weather(ground.seed, day, "wind", days=2.0)
    still = np.array([surface.ground.endswith("water") for surface in surfaces])[ground.kind]
    ys, xs = number_pixels(grid)
    out = []
    for channel in (0, 1):
        ends = [(s.l_bare, s.l_full) if sensor.long_wave else (s.c_bare, s.c_full) for s in surfaces]
        bare, full = (np.array([pair[k][channel] for pair in ends])[ground.kind] for k in (0, 1))
        db = bare + (full - bare) * plants
        db += (1 - plants) * (5 * (season.moisture - 0.5) + rough) * ~still
        db += 1.2 * (draw(ground.key, "echo", channel) - 0.5) + wind * still
        mean = (10 ** (db / 10)).astype(np.float32)
        power = compose(ground, (mean, 0.10 * mean * plants, 0.12 * mean * season.bare))
        power = blend(np.maximum(power, 1e-4) * geometry, grid.per_pixel)
        speckle = _speckle(ground.seed, xs, ys, sensor.looks, day, channel)
        out.append(crop(ground, 10 * np.log10(power * speckle + np.float32(3e-4 if channel else 6e-4)), blended=True))
    return np.stack(out)


def _speckle(seed: int, xs: Array, ys: Array, looks: int, day: int, channel: int) -> Array:
    """Average independent echoes, each shared with the next pixel, as oversampled images have it."""
    xs, ys = np.append(xs, xs[-1] + 1), np.append(ys, ys[-1] - 1)
    table = exponential_table()
    echo: Array = np.zeros((len(ys), len(xs)), np.float32)
    for look in range(looks):
        echo += table.take(hash_pixels(xs, ys, seed, "speckle", day, channel, look))
    return (echo[1:, 1:] + echo[1:, :-1] + echo[:-1, 1:] + echo[:-1, :-1]) / np.float32(4 * looks)
