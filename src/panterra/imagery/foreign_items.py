"""How other people's collections spell modalities."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from panterra.errors import InputError
from panterra.imagery.items import CONVERSIONS, MASKS, MODALITY, SceneAsset, SceneBand, SceneItem, date_of, resolve
from panterra.modalities import MODALITIES, Modality


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """How a provider's collections spell a modality."""

    collections: tuple[str, ...]
    modalities: tuple[str, ...]
    """What it can serve, the default first."""
    assets: Mapping[str, str | tuple[str, ...]]
    """Asset key, in lower case -> band, or the bands of a file in its order."""
    platforms: tuple[str, ...] = ()
    unit: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    nodata: float | None = None
    """Where the item does not say; None: as `MODALITIES` says."""
    mask: tuple[str, str] | None = None
    """Asset key and which of `MASKS`."""
    licence: str | None = None
    """Of a declared modality."""


def _keys(bands: str, keys: str) -> dict[str, str | tuple[str, ...]]:
    return dict(zip(keys.lower().split(), bands.split(), strict=True))


_S2_BANDS = "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B11 B12"
_S2_KEYS = _keys(_S2_BANDS, "coastal blue green red rededge1 rededge2 rededge3 nir nir08 nir09 swir16 swir22") | _keys(
    _S2_BANDS, _S2_BANDS
)
_S2_CDSE = _keys(
    _S2_BANDS,
    "B01_60m B02_10m B03_10m B04_10m B05_20m B06_20m B07_20m B08_10m B8A_20m B09_60m B11_20m B12_20m",
)
_OLI_SR = "B2 B3 B4 B5 B6 B7"
_OLI = "B1 B2 B3 B4 B5 B6 B7 B8 B9 B10 B11"
_ETM = "B1 B2 B3 B4 B5 B7"
_LANDSAT_8_9 = ("landsat-8", "landsat-9")

SOURCES = (
    Source(
        collections=("sentinel-2-l2a", "sentinel-2-c1-l2a", "sentinel-s2-l2a-cogs"),
        modalities=("sentinel2_l2a",),
        assets=_S2_KEYS | _S2_CDSE,
        mask=("scl", "scl"),
    ),
    Source(
        collections=("sentinel-2-l1c", "sentinel-s2-l1c"),
        modalities=("sentinel2",),
        assets=_S2_KEYS | {"cirrus": "B10", "b10": "B10"},
    ),
    Source(
        # Collection 2 surface reflectance (USGS, Landsat 8-9 C2 L2 product guide: 2.75e-5 DN - 0.2). It is what HLS L30
        # starts from, before the adjustment to nadir view.
        collections=("landsat-c2-l2", "landsat-8-c2-l2", "landsat-c2l2-sr"),
        platforms=_LANDSAT_8_9,
        modalities=("hls",),
        assets=_keys(_OLI_SR, "blue green red nir08 swir16 swir22")
        | _keys(_OLI_SR, "SR_B2 SR_B3 SR_B4 SR_B5 SR_B6 SR_B7"),
        scale=0.275,
        offset=-2000.0,
        nodata=0,
        mask=("qa_pixel", "qa_pixel"),
    ),
    Source(
        collections=("ga_ls8c_ard_3", "ga_ls9c_ard_3"),
        modalities=("hls",),
        assets=_keys(_OLI_SR, "nbart_blue nbart_green nbart_red nbart_nir nbart_swir_1 nbart_swir_2"),
        nodata=-999,
        mask=("oa_fmask", "fmask"),
    ),
    Source(
        collections=("landsat-c2-l1", "landsat-c2l1"),
        platforms=_LANDSAT_8_9,
        modalities=("landsat",),
        assets=_keys(_OLI, "coastal blue green red nir08 swir16 swir22 pan cirrus lwir11 lwir12"),
        mask=("qa_pixel", "qa_pixel"),
    ),
    Source(
        collections=("landsat-c2-l1", "landsat-c2l1"),
        platforms=("landsat-7",),
        modalities=("landsat7",),
        assets=_keys(_ETM, "blue green red nir08 swir16 swir22"),
        mask=("qa_pixel", "qa_pixel"),
    ),
    Source(
        collections=("sentinel-1-rtc",),
        modalities=("sentinel1",),
        assets=_keys("vv vh", "vv vh"),
        unit="linear",
    ),
    Source(
        # JAXA: gamma0 in dB = 20 log10(DN) - 83.
        collections=("alos-palsar-mosaic",),
        modalities=("alos2",),
        assets=_keys("hh hv", "HH HV"),
        unit="amplitude",
        scale=10 ** (-83 / 20),
        mask=("mask", "palsar"),
    ),
    Source(collections=("naip",), modalities=("naip_10", "naip"), assets={"image": ("R", "G", "B", "IR")}),
    Source(collections=("esa-worldcover",), modalities=("worldcover",), assets={"map": "B1"}),
    Source(
        collections=("cop-dem-glo-30", "cop-dem-glo-90", "nasadem"),
        modalities=("srtm",),
        assets={"data": "srtm", "elevation": "srtm"},
    ),
    Source(
        collections=("modis-13Q1-061",),
        modalities=("modis",),
        assets=_keys(
            "B1 B2 B3 B7",
            "250m_16_days_red_reflectance 250m_16_days_NIR_reflectance "
            "250m_16_days_blue_reflectance 250m_16_days_MIR_reflectance",
        ),
        nodata=-1000,
    ),
    Source(
        collections=("modis-09A1-061",),
        modalities=("modis",),
        assets=_keys("B1 B2 B3 B4 B5 B6 B7", " ".join(f"sur_refl_b0{i}" for i in range(1, 8))),
    ),
)

DECLARED_SOURCES: dict[str, Source] = {}
"""How collections have the modalities that somebody declared, by their names."""

REFUSED = {
    "sentinel-1-grd": "is uncalibrated amplitude on a slanted grid; take sentinel-1-rtc, or calibrate it to dB",
    "landsat-c2-l2": "is surface reflectance of an older Landsat, which no modality declares; take level 1",
    "landsat-c2l2-sr": "is surface reflectance of an older Landsat, which no modality declares; take level 1",
}
"""Collections that look usable and are not -> why, and what to take instead."""


def declare_source(spec: Modality, table: Mapping[str, Any]) -> Source:
    """Say how catalogues have a declared modality; from now on it can be fetched.

    `collections` are their names. `assets` tells the key of each asset and its band, or its bands in the file's order;
    without, bands are assets of their own names. Numbers of files times `scale` plus `offset` are in the declared unit,
    or in `unit`, which `CONVERSIONS` knows; `nodata` marks missing ones. `mask` is the key of an asset and which of
    `MASKS` reads its codes. `platforms` and `licence` are as STAC has them. Raises InputError.
    """
    _check_source(spec, table)
    assets, mask = table.get("assets", {band: band for band in spec.band_names}), table.get("mask")
    source = Source(
        **{
            **table,
            "modalities": (spec.name,),
            "collections": tuple(table["collections"]),
            "platforms": tuple(table.get("platforms", ())),
            "assets": {key.lower(): bands if isinstance(bands, str) else tuple(bands) for key, bands in assets.items()},
            "mask": None if mask is None else (mask[0].lower(), mask[1]),
        }
    )
    DECLARED_SOURCES[spec.name] = source
    return source


def _check_source(spec: Modality, table: Any) -> None:
    """Refuse what no catalogue can have."""
    name, known = spec.name, sorted({f.name for f in fields(Source)} - {"modalities"})
    if not isinstance(table, Mapping) or (unknown := sorted(set(table) - set(known))):
        said = unknown[0] if isinstance(table, Mapping) else repr(table)
        raise InputError(f"how catalogues have {name} is told by {', '.join(known)}; {said} came")
    for key, given in (("collections", table.get("collections")), ("platforms", table.get("platforms", []))):
        if not _are_names(given) or (key == "collections" and not given):
            raise InputError(f"the {key} of {name} are {given!r}; give a list of names")
    assets = table.get("assets", {band: band for band in spec.band_names})
    files = [[b] if isinstance(b, str) else b for b in assets.values()] if isinstance(assets, Mapping) else [None]
    if not all(map(_are_names, files)):
        raise InputError(f"the assets of {name} are {assets!r}; give each asset its band or list of bands")
    if sorted(held := [band for bands in files for band in bands or ()]) != sorted(spec.band_names):
        raise InputError(f"the assets of {name} hold {', '.join(held)}; wanted {', '.join(spec.band_names)}, each once")
    unit, mask = table.get("unit"), table.get("mask")
    if unit not in (None, spec.unit) and (unit, spec.unit) not in CONVERSIONS:
        able = ", ".join([spec.unit, *(a for a, b in CONVERSIONS if b == spec.unit)])
        raise InputError(f"files of {name} are in {unit!r}; choose one of {able}")
    if mask is not None and not (_are_names(mask) and len(mask) == 2 and mask[1] in MASKS):
        raise InputError(f"the mask of {name} is {mask!r}; give the key of its asset and one of {', '.join(MASKS)}")
    if wrong := [key for key in ("scale", "offset", "nodata") if not isinstance(table.get(key, 0), int | float)]:
        raise InputError(f"the {wrong[0]} of {name} is {table[wrong[0]]!r}; give a number")
    if spec.gsd < 10 and abs(10 / spec.gsd - round(10 / spec.gsd)) > 1e-6:
        raise InputError(
            f"{name} has pixels of {spec.gsd:g} m, of which 10 m is no whole number; to fetch it, declare a gsd such "
            f"as {10 / round(10 / spec.gsd):g}"
        )


def _are_names(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(name, str) for name in given)


def foreign_item(raw: Mapping[str, Any], base: str | None, prefer: Sequence[str]) -> SceneItem:
    """Understand an item of a known collection; `prefer` chooses where it can serve several modalities."""
    properties = raw["properties"]
    collection = raw.get("collection") or properties.get("odc:product")
    platform = str(properties.get("platform", "")).lower().replace("_", "-")
    able = [
        s
        for s in (*SOURCES, *DECLARED_SOURCES.values())
        if collection in s.collections and (not s.platforms or platform in s.platforms)
    ]
    source = next((s for s in able if set(s.modalities) & set(prefer)), able[0] if able else None)
    if source is None:
        if collection in REFUSED:
            raise InputError(f"item {raw['id']}: {collection} {REFUSED[collection]}")
        raise InputError(
            f"item {raw['id']} is of collection {collection!r}, which is not known; "
            f"give it the property {MODALITY} and the band names of one of {', '.join(MODALITIES)}"
        )
    modality = next((name for name in source.modalities if name in prefer), source.modalities[0])
    term, decisions = _sentinel2_offset(raw) if modality.startswith("sentinel2") else (source.offset, ())
    assets: list[SceneAsset] = []
    taken: set[str] = set()
    for key, asset in raw["assets"].items():
        names = source.assets.get(key.lower(), ())
        names = (names,) if isinstance(names, str) else names
        if not names or taken & set(names):
            continue
        taken |= set(names)
        notes = asset.get("raster:bands") or asset.get("bands") or []
        bands = tuple(
            SceneBand(
                name=name,
                index=i + 1,
                nodata=_foreign_nodata(notes[i] if i < len(notes) else {}, source, MODALITIES[modality]),
                scale=source.scale,
                offset=term,
                unit=source.unit,
            )
            for i, name in enumerate(names)
        )
        assets.append(SceneAsset(href=resolve(asset["href"], base), bands=bands))
    if not assets:
        raise InputError(
            f"item {raw['id']} of {collection} has none of the assets {', '.join(source.assets)}; "
            "ask the catalogue for them"
        )
    mask = None
    if source.mask is not None:
        found = [a for key, a in raw["assets"].items() if key.lower().removesuffix("_20m") == source.mask[0]]
        mask = (resolve(found[0]["href"], base), source.mask[1]) if found else None
    return SceneItem(
        id=raw["id"],
        modality=modality,
        date=date_of(raw),
        assets=tuple(assets),
        mask=mask,
        decisions=decisions,
    )


def _foreign_nodata(note: Mapping[str, Any], source: Source, spec: Modality) -> float | None:
    given = note.get("nodata")
    if given is not None:
        return float(given)
    return source.nodata if source.nodata is not None else spec.nodata


def _sentinel2_offset(raw: Mapping[str, Any]) -> tuple[float, tuple[str, ...]]:
    """Decide what to add to the digital numbers: -1000 from processing baseline 04.00 on, unless already done.

    The offset in band metadata (`raster:offset`) is not asked: providers state it whether or not they applied it.
    """
    properties = raw["properties"]
    applied = next((properties[k] for k in properties if k.endswith(":boa_offset_applied")), False)
    baseline = baseline_of(raw)
    if applied:
        return 0.0, (f"baseline {baseline or 'unknown'}: the provider has already taken the offset of 1000 away",)
    if baseline is None:
        if date_of(raw) >= dt.date(2022, 1, 25):
            raise InputError(
                f"item {raw['id']} does not say its processing baseline, so its offset is unknown; "
                'add the property "s2:processing_baseline", the 05.11 of N0511 in the name of the product'
            )
        return 0.0, ("baseline unknown, date before 2022-01-25: no offset",)
    if tuple(int(n) for n in baseline.split(".")) >= (4, 0):
        return -1000.0, (f"baseline {baseline}: 1000 is taken away",)
    return 0.0, (f"baseline {baseline}: no offset",)


def baseline_of(raw: Mapping[str, Any]) -> str | None:
    """Find the processing baseline of a Sentinel-2 item, such as 05.11."""
    properties = raw["properties"]
    for key in ("s2:processing_baseline", "processing:version", "sentinel:processing_baseline"):
        if re.fullmatch(r"\d+\.\d+", str(properties.get(key, ""))):
            return str(properties[key])
    for text in (properties.get("s2:product_uri"), properties.get("sentinel:product_id"), raw["id"]):
        found = re.search(r"_N(\d\d)(\d\d)_", str(text))
        if found:
            return f"{found[1]}.{found[2]}"
    return None
