"""Modalities that a person declares for sensors of their own."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from panterra.errors import InputError
from panterra.modalities import MODALITIES, Band, Modality, Unit

COMMON_NAMES = frozenset(
    (
        *("coastal", "blue", "green", "yellow", "red", "rededge", "nir", "nir08", "nir09", "cirrus", "swir16"),
        *("swir22", "pan", "lwir", "lwir11", "lwir12"),
    )
)
"""STAC's common names of bands; a declared band of such a name has it as its common name too."""

DECLARED: dict[str, dict[str, Any]] = {}
"""What was declared in this program, by name: the options of `declare_modality` as plain JSON.

A scene carries those of its modalities, so that other programs know them too.
"""
_KEYS = ("bands", "gsd", "dated", "unit", "title", "nodata", "plausible")
_STAC = "stac"
"""The table of a declaration that says how catalogues have the modality, see `foreign_items.declare_source`."""


def declare_modality(
    name: str,
    *,
    bands: Sequence[str] | Mapping[str, float | None],
    gsd: float,
    dated: bool = True,
    unit: Unit = "dn",
    title: str | None = None,
    nodata: float | None = None,
    plausible: tuple[float, float] | None = None,
) -> Modality:
    """Make a sensor of your own known: from now on, `MODALITIES` of this program has it.

    `bands` are names in the order of the files, with wavelengths in micrometres where they are known; `gsd` is the
    pixel in metres; `dated` says whether there are images of several dates, or one. `plausible` is where nearly all
    values lie. The same declaration may be repeated. Raises InputError for what cannot be, and for a name that is
    taken.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InputError(f"a modality cannot be called {name!r}; take small letters, digits and underscores")
    names = list(bands) if isinstance(bands, Sequence | Mapping) and not isinstance(bands, str) else []
    if not names or not all(isinstance(b, str) for b in names) or len(set(names)) != len(names):
        raise InputError(f"{name} has the bands {bands!r}; give a list of different names, or names with wavelengths")
    waves = dict(bands) if isinstance(bands, Mapping) else dict.fromkeys(names)
    if wrong := [b for b, w in waves.items() if w is not None and not (_is_number(w) and 0 < w < 100)]:
        raise InputError(f"band {wrong[0]} of {name} has the wavelength {waves[wrong[0]]!r}; give micrometres")
    if not _is_number(gsd) or gsd <= 0:
        raise InputError(f"{name} has pixels of {gsd!r}; give their side in metres")
    if unit not in get_args(Unit):
        raise InputError(f"{name} has the unit {unit!r}; choose one of {', '.join(get_args(Unit))}")
    ends = tuple(plausible) if isinstance(plausible, Sequence) else ()
    if plausible is not None and not (len(ends) == 2 and all(map(_is_number, ends)) and ends[0] < ends[1]):
        raise InputError(f"plausible values of {name} are {plausible!r}; give the least and the greatest")
    if not isinstance(dated, bool) or not (nodata is None or _is_number(nodata)):
        raise InputError(f"{name} came with dated {dated!r} and nodata {nodata!r}; give true or false, and a number")
    row = Modality(
        name=name,
        title=title or name.replace("_", " ").capitalize(),
        bands=tuple(
            Band(name=b, gsd=gsd, wavelength=w, common=b.lower() if b.lower() in COMMON_NAMES else None)
            for b, w in waves.items()
        ),
        unit=unit,
        gsd=gsd,
        kind="series" if dated else "still",
        nodata=nodata,
        plausible=None if plausible is None else (ends[0], ends[1]),
    )
    known = MODALITIES.setdefault(name, row)
    if other := [f.name for f in fields(Modality) if getattr(known, f.name) != getattr(row, f.name)]:
        raise InputError(f"a modality {name!r} with another {', '.join(other)} is known already; choose another name")
    told: dict[str, Any] = {
        "title": row.title,
        "bands": waves if any(waves.values()) else list(waves),
        "gsd": gsd,
        "dated": dated,
        "unit": unit,
        "nodata": nodata,
        "plausible": None if plausible is None else list(ends),
    }
    DECLARED[name] = {key: value for key, value in told.items() if value is not None}
    return known


def declare_modalities(path: str | Path) -> tuple[Modality, ...]:
    """Declare what a TOML or JSON file describes: a table for each modality, with the options of `declare_modality`.

    Its table `stac`, if it has one, says how catalogues have the modality, see `foreign_items.declare_source`. Raises
    InputError.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        tables = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read as a declaration ({reason}); write TOML, or JSON as .json") from None
    return declare_tables(tables, source=str(path))


def declare_tables(tables: Any, *, source: str) -> tuple[Modality, ...]:
    """Declare what tables by name describe; `source` is where messages say that they came from."""
    if not isinstance(tables, dict) or not tables or not all(isinstance(table, dict) for table in tables.values()):
        raise InputError(
            f"{source} declares no modality; write a table for each, such as [drone], with its bands and gsd"
        )
    return tuple(_declared(source, name, table) for name, table in tables.items())


def _declared(source: str, name: str, table: Mapping[str, Any]) -> Modality:
    known = (*_KEYS, _STAC)
    if unknown := [key for key in table if key not in known]:
        raise InputError(f"{source} says {unknown[0]} of {name}, which nothing knows; known: {', '.join(known)}")
    if absent := [key for key in ("bands", "gsd") if key not in table]:
        raise InputError(f"{source} does not say the {' and '.join(absent)} of {name}; add it")
    try:
        row = declare_modality(name, **{key: value for key, value in table.items() if key != _STAC})
        if _STAC in table:
            # It brings libraries of imagery, which a declaration alone does without.
            from panterra.imagery.foreign_items import declare_source

            declare_source(row, table[_STAC])
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return row


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
