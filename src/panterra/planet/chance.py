"""Random numbers and noise that depend on nothing but a seed and a place."""

from __future__ import annotations

import math
import zlib
from functools import cache
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


def mix(*keys: Array | int | str) -> Array:
    """Mix integers, arrays of them and names into uint64 of their common shape (splitmix64, once per key)."""
    mixed: Array = np.uint64(0x9E3779B97F4A7C15)  # type: ignore[assignment]
    with np.errstate(over="ignore"):
        for key in keys:
            number = zlib.crc32(key.encode()) if isinstance(key, str) else key
            mixed = mixed ^ np.asarray(number).astype(np.uint64)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def draw(*keys: Array | int | str) -> Array:
    """Draw uniform float32 in [0, 1) from what `mix` makes of the keys."""
    return (mix(*keys) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def hash_pixels(x: Array, y: Array, *keys: Array | int | str) -> Array:
    """Hash every pixel of integer columns x and rows y to 16 bits, for tables of quantiles."""
    across = mix(*keys, "across", x).astype(np.uint32)
    mixed = mix(*keys, "down", y).astype(np.uint32)[:, None] + across
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x7FEB352D)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x846CA68B)
    return mixed >> np.uint32(16)


@cache
def _normal_table() -> Array:
    inverse = NormalDist().inv_cdf
    coarse = np.array([inverse((i + 0.5) / 4096) for i in range(4096)], np.float32)
    return np.repeat(coarse, 16)


@cache
def exponential_table() -> Array:
    """List 65536 quantiles of the exponential distribution of mean 1."""
    return (-np.log((np.arange(65536) + 0.5) / 65536)).astype(np.float32)


def draw_normal(x: Array, y: Array, *keys: Array | int | str) -> Array:
    """Draw from the standard normal distribution for every pixel of integer columns x and rows y."""
    return _normal_table().take(hash_pixels(x, y, *keys))


def _spline(t: Array, wavelength: float, dtype: type) -> tuple[Array, list[Array]]:
    """Give the first knot of each place and the weights of its four knots (uniform cubic B-spline)."""
    scaled = t / wavelength
    knot = np.floor(scaled)
    f: Array = (scaled - knot).astype(dtype)
    g = 1 - f
    weights = [g * g * g / 6, (4 - 6 * f * f + 3 * f * f * f) / 6, (4 - 6 * g * g + 3 * g * g * g) / 6, f * f * f / 6]
    return knot.astype(np.int64) - 1, weights


def make_noise(x: Array, y: Array, wavelength: float, *keys: Array | int | str, dtype: type = np.float32) -> Array:
    """Make smooth noise [len(y), len(x)] of mean 0 and variance 1 with features of about the wavelength in metres."""
    (col, across), (row, down) = _spline(x, wavelength, dtype), _spline(y, wavelength, dtype)
    cols, rows = np.arange(col.min(), col.max() + 4), np.arange(row.min(), row.max() + 4)
    knots = draw(*keys, rows[:, None], cols) * 7.22 - 3.61  # a sum of knots has 0.277 of a knot's range
    col, row = col - cols[0], row - rows[0]
    lines = knots[row] * down[0][:, None]
    for k in (1, 2, 3):
        lines += knots[row + k] * down[k][:, None]
    noise: Array = lines.take(col, axis=1) * across[0]
    for k in (1, 2, 3):
        noise += lines.take(col + k, axis=1) * across[k]
    return noise


def add_octaves(
    x: Array, y: Array, weights: dict[float, float], *keys: Array | int | str, dtype: type = np.float32
) -> Array:
    """Add noise of several wavelengths to variance 1, leaving out what pixels cannot show."""
    total: Array = np.zeros((len(y), len(x)), dtype)
    for wavelength, weight in weights.items():
        if wavelength > 1.5 * round(float(x[1] - x[0]), 3):
            total += make_noise(x, y, wavelength, *keys, int(wavelength), dtype=dtype) * weight
    total /= math.hypot(*weights.values())
    return total
