"""Who serves imagery, and what one has to know about each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from panterra.errors import InputError
from panterra.imagery.declared import DECLARED
from panterra.imagery.foreign_items import DECLARED_SOURCES, SOURCES
from panterra.imagery.signing import Access, copernicus_access, sign_planetary_computer, sign_s3
from panterra.modalities import MODALITIES

LICENCE = "panterra:licence"
"""The property that holds a licence in words."""

_COPERNICUS = "Copernicus Sentinel data, free and open (Sentinel Data Legal Notice)"
_USGS = "public domain (U.S. Geological Survey)"

LICENCES: Mapping[str, str] = {
    "sentinel2_l2a": _COPERNICUS,
    "sentinel2": _COPERNICUS,
    "sentinel1": _COPERNICUS,
    "landsat": _USGS,
    "landsat7": _USGS,
    "hls": _USGS,
    "modis": "public domain (NASA LP DAAC)",
    "naip": "public domain (USDA)",
    "naip_10": "public domain (USDA)",
    "alos2": "JAXA PALSAR mosaic, free with attribution (https://earth.jaxa.jp/policy/en.html)",
    "worldcover": "CC-BY-4.0 (ESA WorldCover)",
    "srtm": "Copernicus DEM, free with attribution (ESA, Airbus)",
}
"""Whoever serves them, the terms are those of who made them."""


def licence_of(modality: str) -> str:
    """Tell in words the licence of a modality, wherever it comes from."""
    declared = DECLARED_SOURCES.get(modality)
    return LICENCES.get(modality) or (declared and declared.licence) or "unknown"


def licence_fields(words: str) -> dict[str, str]:
    """State a licence in a STAC item: as an SPDX identifier where it is one, else as "other", with the words beside."""
    return {"license": words} if re.fullmatch(r"[\w.+-]+", words) else {"license": "other", LICENCE: words}


def _open_access() -> Access:
    return Access(sign=sign_s3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A STAC API and how to get at its files."""

    name: str
    api: str
    collections: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Modality -> collections that hold it; none for an API that is asked what it has."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Modality -> why what the provider has under that name is not that, and where to go instead."""
    access: Callable[[], Access] = _open_access
    page: int = 100
    """Items that one page of a search may hold."""
    per_second: float = 50.0
    """Requests to each of its hosts."""
    readers: int = 8
    """Files read at a time."""


_GRD_ONLY = "serves Sentinel-1 as uncalibrated GRD only; take it from planetary-computer (sentinel-1-rtc)"
_LEVEL_2_ONLY = (
    "serves Landsat 8/9 as surface reflectance (level 2) only, which is modality hls; "
    "the digital numbers of level 1 come from usgs"
)

PROVIDERS: Mapping[str, Provider] = {
    p.name: p
    for p in (
        Provider(
            name="planetary-computer",
            api="https://planetarycomputer.microsoft.com/api/stac/v1",
            collections={
                "sentinel2_l2a": ("sentinel-2-l2a",),
                "sentinel1": ("sentinel-1-rtc",),
                "hls": ("landsat-c2-l2",),
                "modis": ("modis-09A1-061",),
                "alos2": ("alos-palsar-mosaic",),
                "naip_10": ("naip",),
                "naip": ("naip",),
                "worldcover": ("esa-worldcover",),
                "srtm": ("cop-dem-glo-30",),
            },
            lacks={"landsat": _LEVEL_2_ONLY},
            access=lambda: Access(sign=sign_planetary_computer),
            page=250,
        ),
        Provider(
            name="earth-search",
            api="https://earth-search.aws.element84.com/v1",
            collections={
                "sentinel2_l2a": ("sentinel-2-l2a",),
                "sentinel2": ("sentinel-2-l1c",),
                "hls": ("landsat-c2-l2",),
                "naip_10": ("naip",),
                "naip": ("naip",),
                "srtm": ("cop-dem-glo-30",),
            },
            lacks={"sentinel1": _GRD_ONLY, "landsat": _LEVEL_2_ONLY},
        ),
        Provider(
            name="cdse",
            api="https://stac.dataspace.copernicus.eu/v1",
            collections={"sentinel2_l2a": ("sentinel-2-l2a",), "sentinel2": ("sentinel-2-l1c",)},
            lacks={"sentinel1": _GRD_ONLY},
            access=copernicus_access,
            # An account may have 4 connections at a time (documentation.dataspace.copernicus.eu, Quotas).
            per_second=10.0,
            readers=4,
        ),
        Provider(
            name="usgs",
            api="https://landsatlook.usgs.gov/stac-server",
            collections={
                "landsat": ("landsat-c2l1",),
                "landsat7": ("landsat-c2l1",),
                "hls": ("landsat-c2l2-sr",),
            },
            # Its own addresses ask for a login by browser; the same files lie in a bucket where the reader pays.
            access=lambda: Access(sign=sign_s3, alternate="s3"),
        ),
    )
}


def find_provider(name: str) -> Provider:
    """Look a provider up by its name, or take the address of any STAC API."""
    if name in PROVIDERS:
        return PROVIDERS[name]
    if name.startswith(("http://", "https://")):
        return Provider(name=name.rstrip("/"), api=name.rstrip("/"))
    raise InputError(f"no source {name!r}; known: {', '.join(PROVIDERS)}, or the address of a STAC API")


def serving(modality: str, providers: Sequence[Provider]) -> Provider:
    """Return the first provider that has a modality; one that is an address may have any.

    A declared modality is looked for at the first address, else at the first provider.
    """
    if modality not in MODALITIES:
        raise InputError(f"no modality {modality!r}; known: {', '.join(sorted(MODALITIES))}")
    if modality in DECLARED_SOURCES and providers:
        return next((provider for provider in providers if not provider.collections), providers[0])
    if modality in DECLARED:
        raise InputError(
            f"nothing says which collections hold {modality}; add a table [{modality}.stac] to its declaration"
        )
    for provider in providers:
        if modality in provider.collections or not provider.collections:
            return provider
    reasons = [f"{p.name} {p.lacks[modality]}" for p in providers if modality in p.lacks]
    others = [p.name for p in PROVIDERS.values() if modality in p.collections]
    elsewhere = f"it comes from: {', '.join(others)}" if others else "no known source has it"
    raise InputError("; ".join(reasons) or f"{', '.join(p.name for p in providers)}: no {modality} there; {elsewhere}")


def collections_of(modality: str) -> tuple[str, ...]:
    """List the collections, anywhere, whose items can be read as a modality."""
    sources = (*SOURCES, *DECLARED_SOURCES.values())
    return tuple(dict.fromkeys(c for source in sources if modality in source.modalities for c in source.collections))
