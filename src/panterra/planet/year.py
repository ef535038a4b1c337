"""What a date brings: weather, growth and the height of the sun."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from panterra.planet.chance import Array, draw, make_noise
from panterra.planet.ground import Ground
from panterra.planet.surfaces import SURFACES
from panterra.sample import to_date

LATITUDE = 48.0
"""The sun stands over the whole planet as it does here, in degrees north."""


class Season(NamedTuple):
    """Shares of each stand's ground on a date, float32 [n], and what soil it has."""

    green: Array
    dry: Array
    bloom: Array
    bare: Array
    soil: Array
    """Brightness of its soil."""
    moisture: float
    """0 dry, 1 soaked; the same everywhere, as the last rain was."""


def draw_weather(seed: int, day: int, *keys: str, days: float) -> float:
    """Give a number around 0 that changes over some days."""
    return float(make_noise(np.array([float(day)]), np.zeros(1), days, seed, "weather", *keys)[0, 0])


@cache
def _parse_calendar(text: str) -> tuple[Array, Array]:
    """Turn a calendar into days [n] and shares [3, n] of green, dry and blooming."""
    knots = [knot.split(":") for knot in text.split()]
    values = [[float(part) / 100 for part in shares.split("+")] for _, shares in knots]
    return np.array([float(day) for day, _ in knots]), np.array([v + [0.0] * (3 - len(v)) for v in values]).T


def find_season(ground: Ground, day: int) -> Season:
    """Say what grows on each stand on a day."""
    date = to_date(day)
    shares = np.zeros((3, len(ground.kind)), np.float32)
    shift = 4 * draw_weather(ground.seed, day, "spring", days=200.0) + 30 * (draw(ground.key, "late") - 0.5)
    shift = shift + 16 * (draw(ground.key, "late", date.year) - 0.5)
    for number, surface in enumerate(SURFACES.values()):
        mine = np.flatnonzero(ground.kind == number)
        choice = (draw(ground.key[mine], "calendar") * len(surface.years)).astype(np.intp)
        when = date.timetuple().tm_yday - shift[mine] * surface.spread
        for n, calendar in enumerate(surface.years):
            followers = choice == n
            days, values = _parse_calendar(calendar)
            for share, value in zip(shares, values, strict=True):
                share[mine[followers]] = np.interp(when[followers], days, value, period=365)
    fallow = np.array([s.ground == "loam" for s in SURFACES.values()])[ground.kind]
    lush = 1.07 - np.where(fallow, 0.42, 0.2) * draw(ground.key, "lush")
    green, dry, bloom = np.clip(shares[0] * lush, 0, 0.98), shares[1], shares[2]
    return Season(
        green=green,
        dry=dry,
        bloom=bloom,
        bare=np.clip(1 - green - dry - bloom, 0, 1),
        soil=0.62 + 0.6 * draw(ground.key, "soil"),
        moisture=min(1.0, max(0.0, 0.45 + 0.3 * draw_weather(ground.seed, day, "rain", days=9.0))),
    )


class Sun(NamedTuple):
    """The direction of the sun, of length 1."""

    east: float
    north: float
    up: float


def find_sun(day: int, hour: float) -> Sun:
    """Point at the sun at a solar time."""
    year = 2 * math.pi * (to_date(day).timetuple().tm_yday - 81) / 365
    declination, latitude = math.radians(23.44) * math.sin(year), math.radians(LATITUDE)
    angle = math.radians(15 * (hour - 12))
    return Sun(
        east=-math.cos(declination) * math.sin(angle),
        north=math.sin(declination) * math.cos(latitude) - math.cos(declination) * math.sin(latitude) * math.cos(angle),
        up=math.sin(declination) * math.sin(latitude) + math.cos(declination) * math.cos(latitude) * math.cos(angle),
    )
