"""What somebody wants to have seen, and which images will show it."""

from __future__ import annotations

import datetime as dt
import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from panterra.errors import InputError
from panterra.imagery.aoi import Area, read_area
from panterra.imagery.choose import (
    Candidate,
    Every,
    Period,
    as_candidates,
    clearest,
    covering,
    days_of,
    newest_versions,
    parse_dates,
    periods,
    within,
)
from panterra.imagery.composite import How
from panterra.imagery.declared import DECLARED
from panterra.imagery.download import save_json
from panterra.imagery.foreign_items import DECLARED_SOURCES
from panterra.imagery.providers import Provider, serving
from panterra.imagery.search import search
from panterra.imagery.signing import Access
from panterra.imagery.web import Web
from panterra.modalities import MODALITIES

Connect = Callable[[Provider, Access], Web]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What to fetch and what to make of it."""

    aoi: str | Path
    """A vector file, or west,south,east,north in degrees; over the antimeridian west > east."""
    dates: str
    """Like 2024-01/2024-12."""
    modalities: tuple[str, ...]
    every: Every = "month"
    best: int | None = None
    """Dates per period, more where they do not cover the area; None for all."""
    max_cloud: float = 60.0
    """Percentage of clouds beyond which an image is not worth fetching."""
    composite: How = "median"
    mask_clouds: bool = True
    grow_m: float = 0.0
    """How far from clouds and shadows pixels are hidden as well."""
    s2cloudless: bool = False
    """Whether s2cloudless looks for clouds in Sentinel-2 level 1C, which has no mask."""
    orbit: Literal["ascending", "descending"] | None = None

    def __post_init__(self) -> None:
        if self.best is not None and self.best < 1:
            raise InputError(f"the best {self.best} dates were asked for; wanted 1 or more")
        if not 0 <= self.max_cloud <= 100:
            raise InputError(f"at most {self.max_cloud:g} % of clouds were asked for; wanted 0 to 100")
        if not 0 <= self.grow_m < math.inf:
            raise InputError(f"clouds cannot grow by {self.grow_m:g} m; wanted 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image of the result: one modality at one date or of one period."""

    id: str
    modality: str
    date: dt.date
    area: Area
    """What it shows, and on which grid."""
    provider: Provider
    days: tuple[tuple[Candidate, ...], ...]
    """What it is made of, in order of preference: the images of each date."""
    first: dt.date
    last: dt.date

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The images of all dates."""
        return tuple(candidate for day in self.days for candidate in day)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be fetched, and what was decided on the way, one sentence each."""

    wish: Wish
    area: Area
    images: tuple[Image, ...]
    decisions: tuple[str, ...]

    @property
    def job(self) -> dict[str, Any]:
        """All that the bytes of the result depend on, but for what the providers answer."""
        sources = {image.modality: image.provider.api for image in self.images}
        job = asdict(self.wish) | {"aoi": self.area.geometry.wkt, "sources": sources}
        declared = {m: [DECLARED[m], asdict(DECLARED_SOURCES[m])] for m in sources if m in DECLARED_SOURCES}
        job |= {"declared": declared} if declared else {}
        return dict(json.loads(json.dumps(job)))

    def bytes_of(self, image: Image) -> int:
        """Estimate what an image takes to fetch: its pixels as they are stored, before compression."""
        spec = MODALITIES[image.modality]
        height, width = image.area.box.shape
        square_metres = 100 * height * width
        pixels = sum(square_metres / band.gsd**2 for band in spec.bands)
        masked = self.wish.mask_clouds and any(c.item.mask for c in image.candidates)
        stored = pixels * (4 if spec.unit == "db" else 2) + (square_metres / 400 if masked else 0)
        return round(sum(c.covers for c in image.candidates) / image.area.share * stored)


def connect(provider: Provider, access: Access) -> Web:
    """Make the client for a provider."""
    return Web(access.sign, per_second=provider.per_second)


def make_plan(
    wish: Wish, providers: Sequence[Provider], kept: Path, *, offline: bool = False, connect: Connect = connect
) -> Plan:
    """Search for what a wish needs and choose among what is found.

    The answers of the searches are kept in a folder, from which the same search is answered the next time.
    """
    first, last = parse_dates(wish.dates)
    if wish.s2cloudless and "sentinel2" not in wish.modalities:
        raise InputError("s2cloudless looks at Sentinel-2 level 1C (sentinel2), which is not asked for; leave it out")
    if wish.s2cloudless and importlib.util.find_spec("s2cloudless") is None:
        raise InputError("there is no s2cloudless here; install it with: pip install s2cloudless")
    chosen = {modality: serving(modality, providers) for modality in dict.fromkeys(wish.modalities)}
    area = read_area(wish.aoi, chosen)
    images: list[Image] = []
    decisions = list(area.decisions)
    for modality, provider in chosen.items():
        found = _search(provider, modality, area, first, last, kept, None if offline else connect)
        usable, refused = as_candidates(found, modality, area.geometry, orbit=wish.orbit)
        newest = newest_versions(usable)
        decisions.append(
            f"{modality}: {provider.name} has {len(found)} items, of which {len(newest)} can be used "
            f"({len(refused)} are of another kind, {len(usable) - len(newest)} older versions)"
        )
        decisions += [f"{modality}: left out: {reason}" for reason in list(dict.fromkeys(refused))[:3]]
        for part in area.parts:
            there = within(newest, part) if area.cut else newest
            place = f"_{str(part.box.crs).lower().replace(':', '')}" if area.cut else ""
            if MODALITIES[modality].kind == "still":
                images += _map(modality, provider, there, part, place)
                continue
            for period in periods(first, last, wish.every):
                made = _images(wish, modality, provider, there, part, period, place)
                images += made
                if not made:
                    clouds = f" with {wish.max_cloud:g} % of clouds or less" if modality != "sentinel1" else ""
                    where = f" in {part.box.crs}" if area.cut else ""
                    decisions.append(f"{modality}: no image in {period.label}{where}{clouds}")
    if not images:
        raise InputError(f"nothing to fetch; {'; '.join(decisions)}")
    return Plan(wish=wish, area=area, images=tuple(images), decisions=tuple(decisions))


def _search(
    provider: Provider,
    modality: str,
    area: Area,
    first: dt.date,
    last: dt.date,
    kept: Path,
    connect: Connect | None,
) -> list[dict[str, Any]]:
    """Search, or look up what the same search found before; what two searches find counts once."""
    found: dict[tuple[Any, Any], dict[str, Any]] = {}
    for bounds in area.searched:
        asked = [provider.api, modality, list(bounds), str(first), str(last)]
        if modality in DECLARED_SOURCES:
            asked.append(list(DECLARED_SOURCES[modality].collections))
        path = kept / f"search-{modality}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}.json"
        if path.is_file():
            answer = list(json.loads(path.read_text("utf-8"))["features"])
        elif connect is None:
            raise InputError(
                f"{kept} holds no search for {modality} at {provider.name} in that place and time; "
                "replay what was recorded: the same --aoi, --dates, --modalities and --source"
            )
        else:
            access = provider.access()
            with connect(provider, access) as web:
                answer = search(provider, modality, bounds, first, last, web)
            answer = [_at_alternate(item, access.alternate) for item in answer]
            save_json(path, {"type": "FeatureCollection", "asked": asked, "features": answer})
        for item in answer:
            found.setdefault((item.get("collection"), item["id"]), item)
    return list(found.values())


def _at_alternate(item: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Use another address of each asset, where it has one of that name."""
    if name is None:
        return item
    assets = {
        key: {**asset, "href": asset.get("alternate", {}).get(name, asset)["href"]}
        for key, asset in item["assets"].items()
    }
    return {**item, "assets": assets}


def _map(modality: str, provider: Provider, candidates: Sequence[Candidate], area: Area, place: str) -> list[Image]:
    """Cover the area with the newest images of something that has no dates."""
    newest, _ = covering(sorted(candidates, key=lambda c: (-c.item.date.toordinal(), c.item.id)))
    if not newest:
        return []
    dates = [candidate.item.date for candidate in newest]
    return [
        Image(
            id=f"{modality}{place}",
            modality=modality,
            date=max(dates),
            area=area,
            provider=provider,
            days=tuple((candidate,) for candidate in newest),
            first=min(dates),
            last=max(dates),
        )
    ]


def _images(
    wish: Wish,
    modality: str,
    provider: Provider,
    candidates: Sequence[Candidate],
    area: Area,
    period: Period,
    place: str,
) -> list[Image]:
    """Choose the dates of a period: one image of all of them, or one of each; `place` ends their names."""
    inside = [c for c in candidates if period.first <= c.item.date <= period.last and c.cloud <= wish.max_cloud]
    chosen = clearest(days_of(inside, zone=str(area.box.crs)), wish.best)
    if wish.composite == "none":
        return [
            Image(
                id=f"{modality}_{day.date}{place}",
                modality=modality,
                date=day.date,
                area=area,
                provider=provider,
                days=(day.images,),
                first=day.date,
                last=day.date,
            )
            for day in chosen
        ]
    if not chosen:
        return []
    ranked = sorted(chosen, key=lambda day: (round(day.cloud, 1), day.date))
    return [
        Image(
            id=f"{modality}_{period.label}{place}",
            modality=modality,
            date=period.middle,
            area=area,
            provider=provider,
            days=tuple(day.images for day in ranked),
            first=period.first,
            last=period.last,
        )
    ]
