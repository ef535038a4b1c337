"""What `panterra-nano` learns from: invented planets, and crops of people's own scenes."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from affine import Affine
from jaxtyping import Bool, Float
from odc.geo.geobox import GeoBox

from panterra.data.olmoearth_h5 import LENGTH, Sample
from panterra.errors import InputError
from panterra.imagery.stac import Scene
from panterra.modalities import MODALITIES
from panterra.planet import CRS, Ground, Planet
from panterra.sample import Observation, to_date

SIDE_PX = 64
DATES = 4
TRAINING_SEEDS = range(5000)
"""Planets to learn from; the checks use seeds from 9000."""
MAPS = ("worldcover", "srtm", "wri_canopy_height_map")
_LEVEL_1C = [MODALITIES["sentinel2"].band_names.index(band) for band in MODALITIES["sentinel2_l2a"].band_names]


def planet_samples(count: int, *, seed: int = 0) -> Iterator[Sample]:
    """Look at `count` places of 640 m on as many planets, on four dates of a year each.

    Sentinel-2 is there always, Sentinel-1 and Landsat each with three of four places, two to four dates each. Half of
    the Sentinel-2 images keep their air (level 1C, in the bands of level 2A), and most have gains of their own, per
    image and per band: what people feed to a model differs in both.
    """
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        planet = Planet(seed=int(rng.choice(TRAINING_SEEDS)), clouds=0.1)
        x, y = 500000 + 10 * rng.integers(-20000, 20000), 5300000 + 10 * rng.integers(-20000, 20000)
        zoom = float(rng.choice((7.5, 10.0, 10.0, 10.0, 14.0)))
        box = GeoBox((SIDE_PX, SIDE_PX), Affine(zoom, 0, x - x % zoom, 0, -zoom, y - y % zoom), CRS)
        yield planet_sample(planet, planet.ground(box), rng)


def planet_sample(planet: Planet, ground: Ground, rng: np.random.Generator) -> Sample:
    """Photograph a place on dates drawn from a year."""
    start = dt.date(2016, 6, 1) + dt.timedelta(days=int(rng.integers(8 * 365)))
    gaps = rng.integers(20, 95, DATES - 1)
    days = [start + dt.timedelta(days=int(d)) for d in np.concatenate([[0], gaps.cumsum()])]
    pixels, present = {}, {}
    for m in ("sentinel2_l2a", "sentinel1", "landsat"):
        if m != "sentinel2_l2a" and rng.random() < 0.25:
            continue
        which = np.zeros(DATES, dtype=bool)
        which[rng.permutation(DATES)[: rng.integers(2, DATES + 1)]] = True
        air = m == "sentinel2_l2a" and rng.random() < 0.5
        shots = [planet.observe("sentinel2" if air else m, ground, days[i])[0] for i in np.flatnonzero(which)]
        x = np.stack([shot[_LEVEL_1C] if air else shot for shot in shots])
        pixels[m] = to_layout(jitter(x, m, rng), m)
        present[m] = which
    for m in MAPS:
        pixels[m] = to_layout(planet.observe(m, ground, start)[0][None], m)
    return Sample(latlon=(48.0, 15.0), timestamps=stamps(days), pixels=pixels, present=padded(present))


def jitter(x: Float[np.ndarray, "t c h w"], modality: str, rng: np.random.Generator) -> Float[np.ndarray, "t c h w"]:
    """Give two of three samples another brightness and other gains per band, the same on all dates."""
    if rng.random() < 1 / 3:
        return x
    bands = (x.shape[1], 1, 1)
    if modality == "sentinel1":
        louder: np.ndarray = x + rng.normal(0, 1.0) + rng.normal(0, 0.5, bands)
        return louder
    dark = 5000 if modality == "landsat" else 0
    brighter: np.ndarray = (x - dark) * np.exp(rng.normal(0, 0.2) + rng.normal(0, 0.08, bands)) + dark
    return brighter


def scene_samples(
    scene: Scene, *, modalities: Sequence[str], stride_px: int, seed: int = 0, series: int = 1, clear: float = 0.95
) -> Iterator[Sample]:
    """Cut a scene into overlapping squares, `series` times each with up to four dates drawn from those that are clear.

    Level 1C of Sentinel-2 is passed on in the bands of level 2A.
    """
    box = scene.geobox()
    rows, cols = (starts(side, stride_px) for side in box.shape)
    for row, col in ((r, c) for r in rows for c in cols):
        window = box[row : row + SIDE_PX, col : col + SIDE_PX]
        batch = scene.batch(window, modalities)
        seen = {("sentinel2_l2a" if m == "sentinel2" else m): o for m, o in batch.observations.items()}
        if "sentinel2" in batch.observations:
            o = seen["sentinel2_l2a"]
            seen["sentinel2_l2a"] = Observation(pixels=o.pixels[:, :, _LEVEL_1C], dates=o.dates, valid=o.valid)
        assert batch.lonlat is not None
        lon, lat = batch.lonlat[0].tolist()
        rng = np.random.default_rng([seed, row, col])
        for _ in range(series):
            sample = scene_sample(seen, (lat, lon), rng, clear)
            if sample is not None:
                yield sample


def scene_sample(
    seen: Mapping[str, Observation], latlon: tuple[float, float], rng: np.random.Generator, clear: float
) -> Sample | None:
    """Draw up to four clear dates of Sentinel-2 and what the other sensors saw within ten days of each."""
    usable = {m: o.valid[0].float().mean((1, 2)).numpy() >= clear for m, o in seen.items()}
    days = {m: o.dates[0].numpy() for m, o in seen.items()}
    candidates = np.flatnonzero(usable["sentinel2_l2a"])
    if not len(candidates):
        return None
    chosen = np.sort(rng.permutation(candidates)[:DATES])
    anchor = days["sentinel2_l2a"][chosen]
    pixels, present = {}, {}
    for m, o in seen.items():
        away = np.where(usable[m], np.abs(days[m] - anchor[:, None]), 10**6)
        near, which = away.argmin(1), away.min(1) <= 10
        if which.any():
            padded_which = np.zeros(DATES, dtype=bool)
            padded_which[: len(which)] = which
            pixels[m] = to_layout(o.pixels[0, near[which]].numpy(), m)
            present[m] = padded_which
    dates = [to_date(int(day)) for day in anchor]
    return Sample(latlon=latlon, timestamps=stamps(dates), pixels=pixels, present=padded(present))


def starts(side: int, stride: int) -> list[int]:
    """Place squares along a side so that the last one ends with it."""
    if side < SIDE_PX:
        raise InputError(f"a scene {side} pixels wide came; wanted {SIDE_PX} or more")
    return sorted({*range(0, side - SIDE_PX + 1, stride), side - SIDE_PX})


def to_layout(x: Float[np.ndarray, "t c h w"], modality: str) -> np.ndarray:
    """Store a modality as the corpus does: [H, W, T, C], whole numbers for optical sensors and maps."""
    whole = modality != "sentinel1"
    x = x.transpose(2, 3, 0, 1)
    return np.ascontiguousarray(np.rint(x.clip(0, 65535)).astype(np.uint16) if whole else x.astype(np.float32))


def stamps(days: Sequence[dt.date]) -> np.ndarray:
    """Write dates as day 1-31, month 0-11, year; a sample has twelve, the last one repeated."""
    rows = [(day.day, day.month - 1, day.year) for day in days]
    return np.array(rows + [rows[-1]] * (LENGTH - len(rows)), dtype=np.int64)


def padded(present: Mapping[str, Bool[np.ndarray, " t"]]) -> dict[str, Bool[np.ndarray, " 12"]]:
    """Say that a sample has nothing after its last date."""
    return {m: np.concatenate([which, np.zeros(LENGTH - len(which), dtype=bool)]) for m, which in present.items()}
