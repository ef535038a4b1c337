"""What names tell: dates, sensors, bands."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence
from dataclasses import dataclass

from panterra.modalities import MODALITIES, Modality

_YEAR = r"(?P<year>(?:19[7-9]|20[0-9])\d)"
# "2020_08_10m" is a month and a pixel size.
_DAY = re.compile(rf"(?<!\d){_YEAR}(?P<sep>[-_.:]?)(?P<month>\d\d)(?P=sep)(?P<day>\d\d)(?!\d|m(?![a-z]))")
_DAY_OF_YEAR = re.compile(
    rf"(?<![a-zA-Z0-9])A{_YEAR}(?P<day>\d{{3}})(?!\d)|(?<!\d)(?P<year_t>20\d\d)(?P<day_t>\d{{3}})(?=T\d)"
)
_MONTH = re.compile(rf"(?<!\d){_YEAR}[-_](?P<month>0[1-9]|1[0-2])(?![-_.]?\d\d(?![\dm])|\d)")
# Names of agencies' products, in which the first date is the acquisition and later ones tell of processing.
_PRODUCT = re.compile(r"^(S1[ABCD]_|S2[ABC]_MSI|T\d\d[A-Z]{3}_|L[COTE]0\d_|HLS\.|M[OY]D\d)")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedDate:
    """A date that a text gives."""

    date: dt.date
    how: str
    """What it stands for, in words."""


def read_date(text: str) -> NamedDate | None:
    """Read the acquisition date from a name or a tag; None where there is none, or several that do not make a period.

    A month or a period of at most 31 days stands for a composite, which takes its first day, as WorldCereal, openEO
    and numpy have it.
    """
    days = list(dict.fromkeys(_days(text)))
    if days:
        if len(days) == 1 or _PRODUCT.match(text):
            return NamedDate(date=days[0], how="the day in the name or tags")
        if len(days) == 2 and dt.timedelta(0) < days[1] - days[0] <= dt.timedelta(31):
            return NamedDate(date=days[0], how="the first day of the period in the name")
        return None
    months = list(dict.fromkeys((int(m["year"]), int(m["month"])) for m in _MONTH.finditer(text)))
    if len(months) == 1:
        (year, month), *_ = months
        return NamedDate(date=dt.date(year, month, 1), how="the first day of the month in the name or tags")
    return None


def _days(text: str) -> list[dt.date]:
    found = []
    for m in _DAY.finditer(text):
        try:
            found.append((m.start(), dt.date(int(m["year"]), int(m["month"]), int(m["day"]))))
        except ValueError:
            continue
    for m in _DAY_OF_YEAR.finditer(text):
        day = int(m["day"] or m["day_t"])
        if 1 <= day <= 366:
            found.append((m.start(), dt.date(int(m["year"] or m["year_t"]), 1, 1) + dt.timedelta(day - 1)))
    return [date for _, date in sorted(found)]


_S2 = ("sentinel2_l2a", "sentinel2")
_OPTICAL_L1 = ("sentinel2", "landsat")
_OPTICAL_L2 = ("sentinel2_l2a", "hls", "modis")

# Words in a name -> the modalities they leave possible.
_HINTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("s2", "s2a", "s2b", "s2c", "msi"), _S2),
    **dict.fromkeys(("l2a", "msil2a"), ("sentinel2_l2a",)),
    **dict.fromkeys(("l1c", "msil1c"), ("sentinel2",)),
    **dict.fromkeys(("s1", "s1a", "s1b", "s1c", "sigma0", "gamma0"), ("sentinel1",)),
    **dict.fromkeys(("l8", "l9", "lc08", "lc09", "oli"), ("landsat", "hls")),
    **dict.fromkeys(("l1", "l1tp", "l1gt", "toa"), _OPTICAL_L1),
    **dict.fromkeys(("sr", "boa", "l2", "l2sp"), _OPTICAL_L2),
    **dict.fromkeys(("l7", "le07", "etm"), ("landsat7",)),
    **dict.fromkeys(("hls", "l30", "s30"), ("hls",)),
    **dict.fromkeys(("modis", "mod09", "mod09a1", "mod09ga", "myd09", "mod13q1"), ("modis",)),
    **dict.fromkeys(("alos", "alos2", "palsar", "palsar2"), ("alos2",)),
    "naip": ("naip", "naip_10"),
    "aerial": ("aerial", "aerial_flair"),
    "flair": ("aerial", "aerial_flair"),
    **dict.fromkeys(("spot", "spot6", "spot7"), ("spot",)),
    **dict.fromkeys(("planet", "planetscope"), ("planet",)),
    **dict.fromkeys(("srtm", "dem", "elevation"), ("srtm",)),
    "worldcover": ("worldcover",),
    "cdl": ("cdl",),
    "worldpop": ("worldpop",),
    "eurocrops": ("eurocrops",),
    "ndvi": ("ndvi",),
}

_ALIASES: dict[str, tuple[str, ...]] = {
    "srtm": ("elevation", "dem", "dsm", "height", "altitude"),
}
_COMMON = {
    "n": "nir",
    "infrared": "nir",
    "r": "red",
    "g": "green",
    "b": "blue",
    "swir1": "swir16",
    "swir2": "swir22",
    "rededge1": "rededge071",
    "rededge2": "rededge075",
    "rededge3": "rededge078",
    "aerosol": "coastal",
}
# Words in the names of what comes beside imagery.
AUXILIARY = frozenset(
    ("scl", "aot", "wvp", "mask", "qa", "clouds", "clm", "clp", "label", "slope", "incidence", "angle", "launch")
)


def processing_baseline(path: str) -> tuple[int, int] | None:
    """Read the processing baseline, such as (5, 9) from N0509, out of the path of a Sentinel-2 product."""
    found = re.search(r"MSIL(?:1C|2A)_[^/]*_N(\d\d)(\d\d)_", path)
    return (int(found[1]), int(found[2])) if found else None


def words(text: str) -> frozenset[str]:
    """Split a name into lower-case words, sensors in their short form."""
    text = re.sub(r"sentinel[-_ ]?([12])", r"s\1", text.lower())
    text = re.sub(r"landsat[-_ ]?([789])", r"l\1", text)
    return frozenset(w for w in re.split(r"[^a-z0-9]+", text) if w)


def hinted(text: str) -> tuple[str, ...] | None:
    """Name the modalities that the words of a name leave possible; None where they say nothing or disagree."""
    sets = [set(_HINTS[w]) for w in words(text) if w in _HINTS]
    if not sets:
        return None
    both = set.intersection(*sets)
    return tuple(name for name in MODALITIES if name in both) or None


def match_band(raw: str, modality: Modality) -> str | None:
    """Find the band of `modality` that a file's name for it means ("S2-L2A-B02", "B2", "blue", "B02_blue")."""
    own = {_key(band.name): band.name for band in modality.bands}
    own |= {band.common: band.name for band in reversed(modality.bands) if band.common and band.common not in own}
    if "nir" not in own and "nir08" in own:
        own["nir"] = own["nir08"]
    own |= dict.fromkeys(_ALIASES.get(modality.name, ()), modality.bands[0].name)
    if _key(raw) in own:
        return own[_key(raw)]
    tokens = [_key(t) for t in re.split(r"[^A-Za-z0-9]+", raw) if t]
    found = {own[name] for t in tokens for name in (t, _COMMON.get(t, "")) if name in own}
    return found.pop() if len(found) == 1 else None


def match_bands(names: Sequence[str], modality: Modality) -> tuple[str | None, ...]:
    """Find what each of a file's bands is; None for those that `modality` does not have."""
    matched = [match_band(name, modality) for name in names]
    return tuple(m if m and matched.count(m) == 1 else None for m in matched)


ASKED_FOR = ("sentinel1_ascending",)
"""Modalities that a file is only where somebody says so: nothing in it tells them from another."""


def candidates(names: Sequence[str], text: str) -> tuple[str, ...]:
    """Name the modalities that a file can be, from its band names and the words of its name."""
    hints = hinted(text)
    scores = {}
    for name in hints or [name for name in MODALITIES if name not in ASKED_FOR]:
        modality = MODALITIES[name]
        found = sum(m is not None for m in match_bands(names, modality))
        # One matching band among many says little, and "B1" is the name of half of all single bands.
        telling = found >= 2 or (found == 1 and len(modality.bands) <= 2 and modality.band_names != ("B1",))
        if found and (hints or telling):
            scores[name] = found
    best = max(scores.values(), default=0)
    return tuple(name for name, score in scores.items() if score == best)


def _key(name: str) -> str:
    return re.sub(r"^b0+(?=\d)", "b", name.strip().lower())
