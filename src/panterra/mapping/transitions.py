"""From which class to which the ground went between two maps."""

from __future__ import annotations

import csv
import datetime as dt
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from odc.geo.geobox import GeoBox

from panterra.energy import measure_energy
from panterra.errors import InputError
from panterra.evaluate.area import BLOCK_PX, MAX_CLASSES, class_areas, ground_hectares, read_classes
from panterra.files import unfinished
from panterra.imagery.raster import CogWriter, Colour, grid_of, read_legend
from panterra.mapping.embeddings import is_tif
from panterra.mapping.passport import data_asset, passport_of, write_passport

Progress = Callable[[int, int], None]

NO_DATA = 0
MOST_CLASSES = 255
PALE = (236, 236, 230)
"""Towards this colour goes what did not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """Ground that went from one class to another, or stayed."""

    before: str
    after: str
    code: int
    pixels: int
    hectares: float
    """On the ellipsoid, in whatever projection the maps are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transitions:
    """What `find_transitions` wrote."""

    path: Path
    table: Path
    passport: Path
    rows: tuple[Transition, ...]
    """Those that occur, in the order of their codes."""

    @property
    def changed_hectares(self) -> float:
        return sum(row.hectares for row in self.rows if row.before != row.after)


def is_class_map(path: Path) -> bool:
    """Tell whether a file is a GeoTIFF with one band of whole numbers."""
    if not is_tif(path) or not path.is_file():
        return False
    with rasterio.open(path) as file:
        return bool(file.count == 1 and np.issubdtype(np.dtype(file.dtypes[0]), np.integer))


def find_transitions(
    before: str | Path,
    after: str | Path,
    out: str | Path,
    *,
    country: str | None = None,
    progress: Progress | None = None,
) -> Transitions:
    """Write which class each pixel had in one map and has in another: `out`, and `<out>_table.csv` with hectares.

    With the K classes of both maps in the order of their codes, what went from the i-th to the j-th has the code
    i * K + j + 1, counted from 0; the file carries the names. Where either map has no data, neither has the result.
    Errors of both maps add up in it: hectares of change are to be checked against a sample, see `panterra accuracy`.
    """
    before, after, out = Path(before), Path(after), Path(out)
    if not is_tif(out):
        raise InputError(f"transitions are written as a GeoTIFF; let the name {out.name!r} end in .tif")
    box = _common_box(before, after)
    table = out.with_name(f"{out.stem}_table.csv")
    with measure_energy(country=country) as meter:
        names, colours = _legend(before, after)
        codes = sorted(names)
        legend = {_code(i, j, len(codes)): (codes[i], codes[j]) for i, j in np.ndindex(len(codes), len(codes))}
        labels = {c: names[a] if a == b else f"{names[a]} to {names[b]}" for c, (a, b) in legend.items()}
        small = len(legend) < 256
        palette = {c: _tint(colours[b], changed=a != b) for c, (a, b) in legend.items() if b in colours}
        with CogWriter(
            out,
            box,
            1,
            np.uint8 if small else np.uint16,
            nodata=NO_DATA,
            band_names=("transition",),
            palette=palette if small else None,
            categories=labels,
        ) as writer:
            pixels, hectares = _write(before, after, codes, writer, progress)
    rows = tuple(
        Transition(before=names[a], after=names[b], code=c, pixels=int(pixels[c]), hectares=float(hectares[c]))
        for c, (a, b) in legend.items()
        if pixels[c]
    )
    _write_table(table, rows)
    classes = [{"value": row.code, "name": labels[row.code]} for row in rows]
    assets = {
        "transitions": data_asset(
            out,
            data_type="uint8" if small else "uint16",
            nodata=NO_DATA,
            **{"classification:classes": classes},
        ),
        "table": data_asset(table, "text/csv"),
    }
    made = Transitions(path=out, table=table, passport=passport_of(out), rows=rows)
    write_passport(
        made.passport,
        box,
        sorted({*_dates(before), *_dates(after)}),
        assets,
        energy=meter.report,
        licence=None,
        properties={
            "panterra:inputs": [{"id": p.name, "files": [str(p.absolute())]} for p in (before, after)],
            "panterra:transitions": {"changed_hectares": round(made.changed_hectares, 4)},
        },
    )
    return made


def _code(before: int, after: int, num_classes: int) -> int:
    return before * num_classes + after + 1


def _common_box(before: Path, after: Path) -> GeoBox:
    one, other = grid_of(before), grid_of(after)
    if one.shape != other.shape or one.crs != other.crs or not one.affine.almost_equals(other.affine, 1e-6):
        raise InputError(
            f"{before} and {after} lie on different grids; map both periods with the same aoi, crs and patch size"
        )
    return one


def _legend(before: Path, after: Path) -> tuple[dict[int, str], dict[int, Colour]]:
    """Unite the names and colours of two maps, and the codes that have none."""
    names: dict[int, str] = {}
    colours: dict[int, Colour] = {}
    for path in (before, after):
        stated, tints = read_legend(path)
        for code, name in stated.items():
            if names.setdefault(code, name) != name:
                raise InputError(
                    f"class {code} is {names[code]!r} in {before} and {name!r} in {after}; map both with the same probe"
                )
        colours = tints | colours
    for path in (before, after):
        names |= {area.code: area.name for area in class_areas(path) if area.code not in names}
    if len(names) > MOST_CLASSES:
        raise InputError(f"the maps have {len(names)} classes; transitions between at most {MOST_CLASSES} can be told")
    return names, colours


def _tint(colour: Colour, *, changed: bool) -> Colour:
    """Give what changed the colour of the new class, and what stayed a pale one."""
    if changed:
        return colour
    red, green, blue = (round(0.25 * c + 0.75 * p) for c, p in zip(colour, PALE, strict=True))
    return red, green, blue


def _write(
    before: Path, after: Path, codes: list[int], writer: CogWriter, progress: Progress | None
) -> tuple[np.ndarray, np.ndarray]:
    """Write the transitions, and count the pixels and hectares of each code."""
    place = np.zeros(MAX_CLASSES, np.int64)
    place[codes] = np.arange(len(codes))
    size = _code(len(codes) - 1, len(codes) - 1, len(codes)) + 1
    pixels, hectares = np.zeros(size, np.int64), np.zeros(size)
    height, width = grid_of(before).shape
    blocks = -(-height // BLOCK_PX) * -(-width // BLOCK_PX)
    for number, (one, other) in enumerate(zip(read_classes(before), read_classes(after), strict=True), start=1):
        window, part, was, seen = one
        _, _, became, also = other
        code = np.where(seen & also, _code(place[was], place[became], len(codes)), NO_DATA)
        pixels += np.bincount(code.ravel(), minlength=size)
        hectares += np.bincount(code.ravel(), ground_hectares(part).ravel(), minlength=size)
        writer.write(window, code.astype(np.uint8 if size <= 256 else np.uint16))
        if progress:
            progress(number, blocks)
    return pixels, np.where(np.arange(size) == NO_DATA, 0, hectares)


def _write_table(path: Path, rows: tuple[Transition, ...]) -> None:
    with unfinished(path) as fresh, fresh.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("code", "before", "after", "pixels", "hectares"))
        table.writerows((row.code, row.before, row.after, row.pixels, f"{row.hectares:.4f}") for row in rows)


def _dates(path: Path) -> list[dt.date]:
    """Return the first and the last date that the passport of a map tells."""
    passport = passport_of(path)
    if not passport.is_file():
        return []
    told = json.loads(passport.read_text(encoding="utf-8"))["properties"]
    moments = [told.get("start_datetime"), told.get("end_datetime")]
    return [dt.datetime.fromisoformat(moment).date() for moment in moments if moment]
