"""Which of the images that were found are worth fetching."""

from __future__ import annotations

import calendar
import datetime as dt
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import shapely
import shapely.geometry

from panterra.errors import InputError
from panterra.imagery.aoi import Area
from panterra.imagery.foreign_items import baseline_of
from panterra.imagery.grids import onto_globe, unwrapped
from panterra.imagery.items import SceneItem
from panterra.imagery.stac import parse_item

Every = Literal["month", "season", "year", "all"]

GAIN = 1e-3
"""Share of the area that an image must add to be fetched for its coverage."""

SEASONS = {12: "DJF", 1: "DJF", 2: "DJF", 3: "MAM", 4: "MAM", 5: "MAM"} | {
    month: ("JJA" if month < 9 else "SON") for month in range(6, 12)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An item that could be fetched."""

    item: SceneItem
    footprint: shapely.Geometry
    """The part of the area that it covers, in degrees."""
    covers: float
    """Share of the area."""
    cloud: float
    """Percentage that the provider states for the whole image; 0 for radar and maps."""
    scene: tuple[str, ...]
    """Equal for two versions of one image."""
    version: tuple[Any, ...]
    """The greater, the better."""
    collection: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """The images of one date that together cover as much of the area as all of that date do."""

    date: dt.date
    images: tuple[Candidate, ...]
    covers: float
    cloud: float

    @property
    def footprint(self) -> shapely.Geometry:
        """The part of the area that it covers."""
        return shapely.union_all([image.footprint for image in self.images])


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """A span of time that one image of the result stands for."""

    label: str
    first: dt.date
    last: dt.date

    @property
    def middle(self) -> dt.date:
        """Its middle day."""
        return self.first + (self.last - self.first) // 2


def as_candidates(
    found: Iterable[Mapping[str, Any]], modality: str, area: shapely.Geometry, *, orbit: str | None = None
) -> tuple[list[Candidate], list[str]]:
    """Understand what a search found; the second list says what cannot be used, one sentence each."""
    candidates, refused = [], []
    for raw in found:
        try:
            item = parse_item(raw, prefer=(modality,))
        except InputError as error:
            refused.append(str(error))
            continue
        properties = raw["properties"]
        if item.modality != modality or (orbit and properties.get("sat:orbit_state") != orbit):
            continue
        footprint = shapely.make_valid(_outline(raw)).intersection(area)
        if footprint.area == 0:
            continue
        candidates.append(
            Candidate(
                item=item,
                footprint=footprint,
                covers=footprint.area / area.area,
                cloud=float(properties.get("eo:cloud_cover") or 0),
                scene=_scene(raw),
                version=_version(raw),
                collection=str(raw.get("collection")),
            )
        )
    return sorted(candidates, key=lambda c: (c.item.date, c.item.id)), refused


def within(candidates: Iterable[Candidate], part: Area) -> list[Candidate]:
    """Keep what reaches into a part of the area, and of it what lies there; shares stay those of the whole area."""
    cut = []
    for candidate in candidates:
        footprint = candidate.footprint.intersection(part.geometry)
        if footprint.area > 0:
            covers = footprint.area / part.geometry.area * part.share
            cut.append(replace(candidate, footprint=footprint, covers=covers))
    return cut


def newest_versions(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Keep one version of each image: of the newest processing baseline, then the best tier, then the latest."""
    best: dict[tuple[str, ...], Candidate] = {}
    for candidate in candidates:
        known = best.get(candidate.scene)
        if known is None or candidate.version > known.version:
            best[candidate.scene] = candidate
    return sorted(best.values(), key=lambda c: (c.item.date, c.item.id))


def days_of(candidates: Iterable[Candidate], *, zone: str | None = None) -> list[Day]:
    """Put the images of each date together, leaving out those that add nothing to the others.

    Where two add the same, one that lies in UTM zone `zone` (such as EPSG:32633) is preferred: it need not be warped.
    """
    by_date: dict[dt.date, list[Candidate]] = {}
    for candidate in candidates:
        by_date.setdefault(candidate.item.date, []).append(candidate)

    def elsewhere(candidate: Candidate) -> bool:
        return candidate.item.grid is None or str(candidate.item.grid.crs) != zone

    days = []
    for date, images in sorted(by_date.items()):
        order = sorted(images, key=lambda c: (-round(c.covers, 3), elsewhere(c), c.item.id))
        kept, covered = covering(order)
        seen = sum(image.covers for image in kept)
        cloud = sum(image.cloud * image.covers for image in kept) / seen
        share = covered.area / (images[0].footprint.area / images[0].covers)
        days.append(Day(date=date, images=tuple(kept), covers=share, cloud=cloud))
    return days


def covering(candidates: Sequence[Candidate]) -> tuple[list[Candidate], shapely.Geometry]:
    """Take images in their order as long as each adds to the ground that is covered; return that ground, too."""
    kept: list[Candidate] = []
    covered: shapely.Geometry = shapely.Polygon()
    for candidate in candidates:
        new = candidate.footprint.difference(covered).area / candidate.footprint.area * candidate.covers
        if not kept or new > GAIN:
            kept.append(candidate)
            covered = covered.union(candidate.footprint)
    return kept, covered


def clearest(days: Sequence[Day], best: int | None) -> list[Day]:
    """Choose the `best` days by the share of the area that they show free of clouds, and more until it is covered.

    All of them where `best` is None. In order of date.
    """
    if best is None:
        return list(days)
    ranked = sorted(days, key=lambda day: (-round(day.covers * (1 - day.cloud / 100), 3), day.date))
    chosen = ranked[:best]
    covered = shapely.union_all([day.footprint for day in chosen])
    for day in ranked[best:]:
        more = covered.union(day.footprint)
        if (more.area - covered.area) * day.covers / day.footprint.area > GAIN:
            chosen.append(day)
            covered = more
    return sorted(chosen, key=lambda day: day.date)


def parse_dates(text: str) -> tuple[dt.date, dt.date]:
    """Read "2024-01/2024-12", "2024", "2024-05-03/2024-06": the first and the last day, both included."""
    first, _, last = text.partition("/")
    try:
        span = _days(first)[0], _days(last or first)[1]
    except (ValueError, TypeError):
        raise InputError(f"--dates {text!r} is no span of time; write it like 2024-01/2024-12 or 2024-05-03") from None
    if span[0] > span[1]:
        raise InputError(f"--dates {text!r} ends before it begins")
    return span


def periods(first: dt.date, last: dt.date, every: Every) -> list[Period]:
    """Cut a span of time at the ends of its months, meteorological seasons or years."""
    found: dict[str, list[dt.date]] = {}
    for number in range((last - first).days + 1):
        day = first + dt.timedelta(days=number)
        found.setdefault(_label(day, every), []).append(day)
    if every == "all":
        return [Period(label=f"{first}_{last}", first=first, last=last)]
    return [Period(label=label, first=days[0], last=days[-1]) for label, days in found.items()]


def _label(day: dt.date, every: Every) -> str:
    if every == "month":
        return f"{day:%Y-%m}"
    if every == "season":
        # December belongs to the winter of the next year.
        return f"{day.year + (day.month == 12)}-{SEASONS[day.month]}"
    return f"{day:%Y}" if every == "year" else "all"


def _days(text: str) -> tuple[dt.date, dt.date]:
    """Return the first and the last day of a year, a month or a day."""
    year, *rest = (int(part) for part in text.strip().split("-"))
    if not rest:
        return dt.date(year, 1, 1), dt.date(year, 12, 31)
    if len(rest) == 1:
        return dt.date(year, rest[0], 1), dt.date(year, rest[0], calendar.monthrange(year, rest[0])[1])
    day = dt.date(year, *rest)
    return day, day


def _outline(raw: Mapping[str, Any]) -> shapely.Geometry:
    """Read the outline of an item, whether or not it is cut at the antimeridian."""
    if raw.get("geometry"):
        return unwrapped(shapely.geometry.shape(raw["geometry"]))
    # With heights a bbox has six numbers.
    (west, south), (east, north) = raw["bbox"][:2], raw["bbox"][len(raw["bbox"]) // 2 :][:2]
    return onto_globe(shapely.box(west, south, east + 360 if west > east else east, north))


def _scene(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Tell images apart by platform, second of the recording and tile; versions of one image agree in all of them."""
    properties = raw["properties"]
    moment = str(properties.get("datetime") or properties.get("start_datetime"))[:19]
    landsat = [str(properties[key]).zfill(3) for key in ("landsat:wrs_path", "landsat:wrs_row") if key in properties]
    in_name = re.search(r"_T?(\d\d[A-Z]{3})_", raw["id"])
    box = ",".join(f"{edge:.2f}" for edge in raw.get("bbox") or ())
    tile = properties.get("grid:code") or properties.get("s2:mgrs_tile") or "".join(landsat)
    return str(properties.get("platform", "")).lower(), moment, str(tile or (in_name[1] if in_name else box))


def _version(raw: Mapping[str, Any]) -> tuple[Any, ...]:
    properties = raw["properties"]
    baseline = tuple(int(part) for part in (baseline_of(raw) or "0.0").split("."))
    tier = {"T1": 2, "T2": 1}.get(str(properties.get("landsat:collection_category")), 0)
    made = next((properties[k] for k in ("s2:generation_time", "created", "updated") if k in properties), "")
    return baseline, tier, str(made), raw["id"]
