"""What a camera sees of the ground, through air and clouds."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from panterra.modalities import MODALITIES, Band
from panterra.planet.chance import Array, add_octaves, draw, draw_normal, mix
from panterra.planet.ground import Grid, Ground, blend, compose, crop, number_pixels
from panterra.planet.sensors import Optics
from panterra.planet.surfaces import COVERS, SPECTRA, SURFACES, VARIANTS, WAVELENGTHS
from panterra.planet.year import Season, Sun, draw_weather, find_season, find_sun
from panterra.sample import to_date


def photograph(modality: str, sensor: Optics, ground: Ground, day: int, *, clouds: float) -> tuple[Array, Array]:
    """Look at a ground through the air on a day: pixels float32 [C, H, W] and valid bool [H, W].

    `clouds` is their share of the ground over many dates.
    """
    bands = MODALITIES[modality].bands
    grid = ground.grid
    sun = find_sun(day, sensor.hour)
    season = find_season(ground, day)
    sky = None if sensor.under_clouds else _clouds(clouds, ground, sun, day)
    light = _illumination(ground, sun)
    if sky is not None:
        light *= 1 - np.float32(0.62) * sky.shadow
    haze = 1 + 0.8 * draw_weather(ground.seed, day, "haze", days=3.0)
    scales, offsets = np.broadcast_to(sensor.scale, len(bands)), np.broadcast_to(sensor.offset, len(bands))
    ys, xs = number_pixels(grid)
    out = np.empty((len(bands), ground.box.height, ground.box.width), np.float32)
    for n, band in enumerate(bands):
        wavelength = band.wavelength
        assert wavelength is not None, f"{modality} {band.name} is no colour"
        thermal = wavelength > 3
        if thermal:
            field = compose(ground, _kelvin(ground, season, wavelength, day))
            field += np.float32(5) * (light - 1) - np.float32(0.006) * (ground.elevation - 240)
        else:
            field = compose(ground, _reflectance(ground, season, wavelength))
            diffuse = np.float32(1 - 0.25 * (0.45 / wavelength) ** 2)
            field *= 1 + diffuse * (light - 1)
        if sky is not None:
            # Thick clouds are whiter, and colder.
            top = 278 - 20 * sky.cover if thermal else _spectrum("cloud", wavelength) * (0.6 + 0.4 * sky.bulk)
            field += sky.cover * (top - field)
        # From here on a field has one value per cell of the instrument.
        cell = _cell(grid, band)
        field = blend(field, grid.per_pixel)
        field = _blur(field) if cell == 1 else blend(field, cell)
        grain = draw_normal(xs[::cell] // cell, ys[::cell] // cell, ground.seed, modality, band.name, day)
        if thermal:
            pixels = _radiance_counts(field + np.float32(0.08) * grain, band)
        else:
            if sensor.through_air:
                path, clear = _atmosphere(wavelength, max(haze, 0.0))
                field = np.float32(path) + np.float32(clear) * field
            if sensor.low_sun:
                field *= np.float32(sun.up)
            field += np.float32(sensor.noise) * (field + np.float32(0.1)) * grain
            if sensor.curve != 1:
                field = np.maximum(field, 0) ** np.float32(sensor.curve)
            pixels = np.float32(scales[n]) * field + np.float32(offsets[n])
        if cell > 1:
            pixels = pixels.repeat(cell, axis=0).repeat(cell, axis=1)
        out[n] = np.clip(crop(ground, pixels, blended=True), *sensor.limits)
    if MODALITIES[modality].unit == "dn":
        np.rint(out, out=out)
    if sky is None:
        return out, np.ones(out.shape[1:], bool)
    hidden = np.maximum(sky.cover, 0.45 * sky.shadow) > 0.1
    return out, crop(ground, blend(hidden.astype(np.float32), grid.per_pixel) < 0.1, blended=True)


class _Clouds(NamedTuple):
    """Opacity of clouds, how thick they are and how deep their shadows, float32 [H, W] in 0 to 1."""

    cover: Array
    bulk: Array
    shadow: Array


def _clouds(share: float, ground: Ground, sun: Sun, day: int) -> _Clouds | None:
    if share == 0:
        return None
    grid = ground.grid
    # A power of a uniform number: its mean is the share, and most dates are clearer.
    today = float(draw(mix(ground.seed, "clouds", day))) ** (1 / share - 1)
    if today < 1e-3:
        return None
    base = 900 + 1100 * float(draw(mix(ground.seed, "base", day)))
    away = base / max(sun.up, 0.2) * math.hypot(sun.east, sun.north)
    bearing = math.atan2(sun.east, sun.north)
    dx, dy = (round(away * f(bearing) / grid.step) * grid.step for f in (math.sin, math.cos))
    keys = (ground.seed, "cloud", day)
    thick = _thickness(grid.x, grid.y, today, *keys)
    above = _thickness(np.round(grid.x + dx, 4), np.round(grid.y + dy, 4), today, *keys)
    cover = 1 - np.exp(np.float32(-2.6) * thick)
    shadow = (1 - np.exp(np.float32(-2.6) * above)) * (1 - cover)
    return _Clouds(cover=cover, bulk=np.clip(thick, 0, 1.2) / np.float32(1.2), shadow=shadow)


def _thickness(x: Array, y: Array, share: float, *keys: int | str) -> Array:
    """Give the thickness of clouds, 0 where there are none, such that they cover the share of a wide country."""
    thick = add_octaves(x, y, {6500: 1, 2700: 0.65, 1150: 0.45, 480: 0.3, 200: 0.2, 85: 0.12}, *keys)
    return np.clip(thick - np.float32(NormalDist().inv_cdf(1 - min(share, 0.999))), 0, None)


def _atmosphere(wavelength: float, haze: float) -> tuple[float, float]:
    """Give the reflectance of the air and its transmission, down and up: about those of a clear to hazy summer day."""
    thin = (0.443 / wavelength) ** 3.7 * 0.095 + haze * (0.443 / wavelength) ** 1.3 * 0.022
    gas = np.interp(wavelength, (0.9, 0.945, 0.98, 1.34, 1.375, 1.41), (1, 0.62, 1, 1, 0.004, 1))
    return thin * float(min(1.0, gas + 0.1)), math.exp(-1.9 * thin - 0.03) * float(gas)


def _blur(field: Array) -> Array:
    """Spread each pixel a little into its neighbours, as optics do; the outermost stay."""
    wide = field.copy()
    wide[:, 1:-1] = 0.76 * field[:, 1:-1] + 0.12 * (field[:, :-2] + field[:, 2:])
    field = wide.copy()
    field[1:-1] = 0.76 * wide[1:-1] + 0.12 * (wide[:-2] + wide[2:])
    return field


def _illumination(ground: Ground, sun: Sun) -> Array:
    """Give the light on each sample against that on a plain in the open."""
    facing = (sun.up - sun.east * ground.east - sun.north * ground.north) / np.sqrt(
        1 + ground.east**2 + ground.north**2
    )
    light: Array = np.clip(0.25 + facing * np.float32(0.75 / max(sun.up, 0.15)), 0.2, 1.7)
    return light * ground.shade


def _spectrum(name: str, wavelength: float) -> float:
    return float(np.interp(wavelength, WAVELENGTHS, SPECTRA[name])) / 100


def _reflectance(ground: Ground, season: Season, wavelength: float) -> tuple[Array, Array, Array]:
    """Give the stands' reflectance and what vigour and wetness add to it."""
    surfaces = SURFACES.values()
    green, bloom, below = (
        np.array([_spectrum(getattr(s, part), wavelength) for s in surfaces])[ground.kind]
        for part in ("green", "bloom", "ground")
    )
    soil = np.array([s.ground == "loam" for s in surfaces])[ground.kind]
    variety = np.array([s.variety for s in surfaces])[ground.kind]
    damp = 1 - (0.3 + 0.12 * (wavelength > 1.3)) * season.moisture
    below = np.where(soil, below * season.soil * damp, below)
    # Stands differ in brightness, in the red against the infrared and in water content.
    hue = 0.34 * (draw(ground.key, "bright") - 0.5)
    for name, around, width, size in (
        ("visible", 0.5, 0.35, 0.34),
        ("infrared", 0.95, 0.25, 0.34),
        ("water", 1.9, 0.5, 0.44),
    ):
        hue = hue + size * math.exp(-(((wavelength - around) / width) ** 2)) * (draw(ground.key, name) - 0.5)
    mixed = (
        season.green * green + season.dry * _spectrum("straw", wavelength) + season.bloom * bloom + season.bare * below
    )
    mixed *= 1 + variety * hue
    # The covers are the last rows of the table, whatever the window.
    first = len(mixed) - len(COVERS) * VARIANTS
    guest = np.array([COVERS.index(s.mixed or "tree") * VARIANTS for s in surfaces])[ground.kind]
    hosts = np.array([bool(s.mixed) for s in surfaces])[ground.kind]
    other = mixed[first + guest + (ground.key % VARIANTS).astype(np.intp)]
    mixed += 0.55 * hosts * draw(ground.key, "mixed") ** 1.5 * (other - mixed)
    plants = 0.13 * season.green * (green - below)
    return mixed.astype(np.float32), plants.astype(np.float32), (-0.11 * season.bare * below * soil).astype(np.float32)


def _kelvin(ground: Ground, season: Season, wavelength: float, day: int) -> tuple[Array, Array, Array]:
    """Give the stands' brightness temperature and what vigour and wetness add to it."""
    summer = 0.5 - 0.5 * math.cos(2 * math.pi * (to_date(day).timetuple().tm_yday - 20) / 365)
    air = 273 + 22 * summer + 3 * draw_weather(ground.seed, day, "heat", days=8.0)
    heat = np.array([s.heat for s in SURFACES.values()])[ground.kind] + 7 * season.bare + 4 * season.dry
    kelvin = air + (0.25 + 0.75 * summer) * heat + (draw(ground.key, "heat") - 0.5)
    below = 0.4 if wavelength > 11.5 else 0.0
    flat = np.full(len(kelvin), -0.5, np.float32)
    return (kelvin - below).astype(np.float32), flat, flat


def _cell(grid: Grid, band: Band) -> int:
    """Count the pixels along the side of what a band sees as one."""
    pixel = grid.step * grid.per_pixel
    return max(n for n in (1, 2, 3, 6) if n == 1 or n * pixel <= band.gsd * 1.001)


def _radiance_counts(kelvin: Array, band: Band) -> Array:
    """Turn brightness temperature into the level-1 counts of Landsat 8's thermal bands (USGS constants)."""
    k1, k2 = (774.8853, 1321.0789) if band.wavelength is not None and band.wavelength < 11.5 else (480.8883, 1201.1442)
    return (np.float32(k1) / (np.exp(np.float32(k2) / kelvin) - 1) - np.float32(0.1)) / np.float32(3.342e-4)
