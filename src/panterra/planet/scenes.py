"""Squares of the planet as scenes on disk, with labels and the truth."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from rasterio.windows import Window

from panterra.errors import InputError
from panterra.files import write_whole
from panterra.imagery.raster import CogWriter
from panterra.imagery.stac import make_item, save_scene
from panterra.modalities import MODALITIES
from panterra.planet.chance import Array
from panterra.planet.ground import CRS, Ground
from panterra.planet.planet import Planet
from panterra.planet.sensors import MAPS, SENSORS, Optics
from panterra.planet.surfaces import CLASSES
from panterra.sample import to_date, to_days

_CHUNK = 1024
"""Samples along the side of what is worked out at a time: memory does not grow with a scene."""
_CENTRE = (478440.0, 5295740.0)
"""Where, with seed 0, all classes are near: a river bend with a pit, a wood, fields and the edge of a town."""


def write_planet_scene(
    folder: str | Path,
    *,
    seed: int = 0,
    size_px: int = 512,
    dates: Sequence[dt.date | str] = ("2023-04-28", "2023-06-09", "2023-07-22", "2023-09-14"),
    modalities: Sequence[str] = ("sentinel2_l2a", "sentinel1"),
    labels: int = 200,
    origin: tuple[float, float] | None = None,
    clouds: float = 0.12,
) -> Path:
    """Write a square of the planet as a scene, with `labels.geojson` and the truth as `truth.tif`; give the folder.

    `size_px` counts pixels of 10 m and `origin` is the north-west corner in metres of EPSG:32633. Each modality is
    written at its own GSD; maps and other stills are written once. Labels are points spread over the scene and over its
    classes, a pixel or more inside their patch.
    """
    planet, folder = Planet(seed, clouds), Path(folder)
    unknown = [name for name in modalities if name not in SENSORS and name not in MAPS]
    if unknown:
        raise InputError(f"the planet shows no {unknown[0]!r}; it has {', '.join((*SENSORS, *MAPS))}")
    if size_px < 8 or not dates or not modalities:
        raise InputError(
            f"a scene of {size_px} pixels, dates {list(dates)} and modalities {list(modalities)} came; "
            "wanted 8 pixels or more and at least one of each"
        )
    days = sorted({to_days(date) for date in dates})
    half = size_px // 2 * 10
    corner = origin or (_CENTRE[0] - half, _CENTRE[1] + half)
    folder.mkdir(parents=True, exist_ok=True)
    items, places = [], _Places(_square(corner, 10, size_px), 200 * labels)
    for pixel in sorted({10.0, *map(_pixel, modalities)}):
        box = _square(corner, pixel, max(1, int(size_px * 10 / pixel)))
        views = [
            (name, to_date(day), folder / f"{name}_{to_date(day)}.tif")
            for name in modalities
            if _pixel(name) == pixel
            for day in (days if MODALITIES[name].kind == "series" else days[:1])
        ]
        with ExitStack() as stack:
            writers = [stack.enter_context(_writer(path, box, name)) for name, _, path in views]
            truth = stack.enter_context(_truth_writer(folder / "truth.tif", box)) if pixel == 10 else None
            for window, part in _chunks(box):
                ground = planet.ground(part)
                for (name, date, _), writer in zip(views, writers, strict=True):
                    pixels, valid = planet.observe(name, ground, date)
                    if not valid.all():
                        pixels[:, ~valid] = MODALITIES[name].nodata
                    writer.write(window, _stored(pixels, name))
                if truth is not None:
                    truth.write(window, planet.truth(ground))
                    places.look(ground, window)
        items += [make_item(path.stem, name, date, box, {"pixels": path}) for name, date, path in views]
    write_whole(folder / "labels.geojson", json.dumps(places.features(labels), indent=1))
    save_scene(folder, items, f"Planet {seed}: imagery that the package made up", "CC0-1.0")
    return folder


def _square(corner: tuple[float, float], pixel: float, size: int) -> GeoBox:
    return GeoBox((size, size), Affine(pixel, 0, corner[0], 0, -pixel, corner[1]), CRS)


def _pixel(modality: str) -> float:
    """Give the pixel size of a modality's files: that of its sharpest band, or of a product made coarser."""
    spec = MODALITIES[modality]
    return max(spec.gsd, min(band.gsd for band in spec.bands))


def _stored(pixels: Array, modality: str) -> Array:
    """Turn pixels into the type in which such files come."""
    spec, sensor = MODALITIES[modality], SENSORS.get(modality)
    if spec.unit == "db":
        return pixels.astype(np.float32)
    if spec.categorical or (isinstance(sensor, Optics) and sensor.limits[1] <= 255):
        return np.rint(pixels).astype(np.uint8)
    return np.rint(pixels).astype(np.int16 if spec.nodata is not None and spec.nodata < 0 else np.uint16)


def _writer(path: Path, grid: GeoBox, modality: str) -> CogWriter:
    spec = MODALITIES[modality]
    dtype = _stored(np.zeros(1), modality).dtype
    nodata = None if spec.unit == "db" else spec.nodata
    return CogWriter(path, grid, len(spec.bands), dtype, nodata=nodata, band_names=spec.band_names)


def _chunks(box: GeoBox) -> Iterator[tuple[Window, GeoBox]]:
    """Cut a box into parts of bounded work."""
    side = max(1, int(_CHUNK / math.ceil(box.resolution.x / 25)))
    for row in range(0, box.height, side):
        for col in range(0, box.width, side):
            height, width = min(side, box.height - row), min(side, box.width - col)
            yield Window(col, row, width, height), box[row : row + height, col : col + width]


def _truth_writer(path: Path, box: GeoBox) -> CogWriter:
    palette, names = {c.code: c.colour for c in CLASSES}, {c.code: c.name for c in CLASSES}
    return CogWriter(path, box, 1, np.uint8, nodata=0, band_names=("class",), palette=palette, categories=names)


class _Places:
    """Candidates for labels, spread over a box however few are taken from the start."""

    def __init__(self, box: GeoBox, count: int) -> None:
        # The R2 sequence (Roberts 2018), the plane's golden ratio.
        spots = np.mod(np.outer(np.arange(1, count + 1), (0.7548776662466927, 0.5698402909980532)) + 0.5, 1)
        self.rows, self.cols = (spots * box.height).astype(np.intp).T
        self.code = np.zeros(count, np.uint8)
        self.box = box

    def look(self, ground: Ground, window: Window) -> None:
        """Note the class of the places in a window, where their neighbours are of the same."""
        row, col = self.rows - window.row_off, self.cols - window.col_off
        here = np.flatnonzero((row >= 0) & (row < window.height) & (col >= 0) & (col < window.width))
        west, north = ground.grid.margin[:2]
        near = np.lib.stride_tricks.sliding_window_view(ground.code, (3, 3))
        around = near[row[here] + north - 1, col[here] + west - 1]
        pure = (around == around[:, 1:2, 1:2]).all(axis=(1, 2))
        self.code[here] = np.where(pure, around[:, 1, 1], 0)

    def features(self, count: int) -> dict[str, Any]:
        """Take the first place of each class, then the second of each, and so on, as GeoJSON points."""
        turn = np.full(len(self.code), len(self.code))
        for c in CLASSES:
            turn[self.code == c.code] = np.arange((self.code == c.code).sum())
        chosen = np.argsort(turn, kind="stable")[: min(count, int((self.code > 0).sum()))]
        x = self.box.affine.c + self.box.affine.a * (self.cols[chosen] + 0.5)
        y = self.box.affine.f + self.box.affine.e * (self.rows[chosen] + 0.5)
        lon, lat = Transformer.from_crs(CRS, "EPSG:4326", always_xy=True).transform(x, y)
        names = {c.code: c.name for c in CLASSES}
        points = [
            {
                "type": "Feature",
                "properties": {"class": names[int(self.code[n])]},
                "geometry": {"type": "Point", "coordinates": [round(float(a), 7), round(float(b), 7)]},
            }
            for n, a, b in zip(chosen, lon, lat, strict=True)
        ]
        return {"type": "FeatureCollection", "name": "labels", "features": points}
