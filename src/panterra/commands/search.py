"""From a place to places like it, to chips and to change."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import pandas as pd
import pystac

from panterra.commands.terminal import note, progress_bar
from panterra.energy import measure_energy
from panterra.errors import InputError
from panterra.mapping.changes import Change, find_change
from panterra.mapping.chips import Chips, write_chips
from panterra.mapping.embeddings import open_embeddings
from panterra.mapping.passport import write_passport
from panterra.mapping.search import Found, search, similarity_map, write_found
from panterra.mapping.search_index import Index, build_index, open_index
from panterra.mapping.search_query import (
    Examples,
    Method,
    Polygons,
    Vectors,
    check_comparable,
    gather_examples,
    make_query,
    open_together,
    place_at,
    read_places,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """What was found, where and how."""

    found: Found
    stores: list[Vectors]
    about: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain JSON."""
        columns = zip(*self.found.columns(), strict=True)
        places = [
            {
                "score": round(float(score), 6),
                "lon": float(lon),
                "lat": float(lat),
                "store": str(self.stores[source].path),
                "row": int(row),
                "col": int(col),
            }
            for score, source, row, col, (lon, lat) in columns
        ]
        return {**self.about, "found": places}


def build_indexes(paths: Sequence[Path], *, recall: float) -> list[Index]:
    """Build the index of each store."""
    built = []
    for store in open_together(paths):
        with progress_bar(f"indexing {store.path.name}") as progress:
            built.append(build_index(store, recall=recall, progress=progress))
        if built[-1].recall < recall:
            note(f"{store.path}: the index reaches a recall of {built[-1].recall:.3f}, not {recall:g}")
    return built


def run_search(
    paths: Sequence[Path],
    *,
    like: Path | None,
    at: Sequence[float],
    unlike: Path | None,
    like_stores: Sequence[Path],
    polygons: Polygons,
    method: Method,
    unlike_weight: float,
    top: int,
    apart_m: float,
    keep_examples: bool,
    approximate: bool,
    out: Path | None,
    similarity: Path | None,
    overwrite: bool,
) -> Searched:
    """Search stores for places like some and unlike others, and write what was asked for."""
    refuse_existing([out, similarity], overwrite=overwrite)
    if approximate and similarity is not None:
        raise InputError("a similarity map compares every patch; leave out --approximate, or the map")
    if similarity is not None and len(paths) != 1:
        raise InputError(f"a similarity map shows one store and {len(paths)} were given; search them one by one")
    stores = open_together(paths)
    sources = open_together(like_stores) if like_stores else stores
    check_comparable(stores[0], sources[0])
    indexes = [open_index(store) for store in stores] if approximate else []
    wanted = _examples(_places(like, at), sources, polygons, "example")
    unwanted = _examples(read_places(unlike), sources, polygons, "counter-example") if unlike is not None else None
    query = make_query(wanted, unwanted, method=method, unlike_weight=unlike_weight, background=stores)
    about: dict[str, Any] = {
        "stores": [str(path) for path in paths],
        "model": (stores[0].about.get("model") or {}).get("name"),
        "licence": sorted({str(s.about["licence"]) for s in stores if s.about.get("licence")}),
        "examples": len(wanted.vectors),
        "counter_examples": len(unwanted.vectors) if unwanted is not None else 0,
        "method": method,
        "top": top,
        "apart_m": apart_m,
        "exact": not approximate,
        **({"recall": [index.recall for index in indexes]} if approximate else {}),
    }
    with contextlib.ExitStack() as stack, measure_energy() as meter:
        progress = stack.enter_context(progress_bar("searching"))
        found = search(
            stores,
            query,
            top=top,
            apart_m=apart_m,
            leave_out=None if keep_examples else wanted,
            indexes=indexes,
            similarity=stack.enter_context(similarity_map(similarity, stores[0].box)) if similarity else None,
            progress=progress,
        )
    if len(found) < top:
        far = f"{apart_m:g} m apart" + ("" if keep_examples else " and from the examples (or give --keep-examples)")
        note(f"{len(found)} places were found, not {top}: the stores show no more that lie {far}")
    if similarity is not None:
        asset = pystac.Asset(
            str(similarity.absolute()),
            media_type=pystac.MediaType.COG,
            roles=["data"],
            extra_fields={"data_type": "float32", "nodata": "nan"},
        )
        write_passport(
            similarity.with_name(f"{similarity.name}.json"),
            stores[0].box,
            stores[0].dates,
            {"similarity": asset},
            energy=meter.report,
            licence=stores[0].about.get("licence"),
            properties={"panterra:search": about, "panterra:model": stores[0].about.get("model")},
        )
    if out is not None:
        write_found(out, found, stores, about)
    return Searched(found=found, stores=stores, about=about)


def run_chips(path: Path, out: Path, *, side: int, country: str | None, overwrite: bool) -> Chips:
    """Write stored embeddings as a table of chips."""
    refuse_existing([out], overwrite=overwrite)
    with progress_bar("writing chips") as progress:
        return write_chips(open_embeddings(path), out, side=side, country=country, progress=progress)


def run_change(
    before: Path,
    after: Path,
    out: Path,
    *,
    threshold: float | None,
    false_alarms: float,
    stable: Path | None,
    polygons: Path | None,
    min_patches: int,
    country: str | None,
    overwrite: bool,
) -> Change:
    """Compare two stores of the same ground."""
    refuse_existing([out, polygons], overwrite=overwrite)
    with progress_bar("comparing") as progress:
        return find_change(
            open_embeddings(before),
            open_embeddings(after),
            out,
            threshold=threshold,
            false_alarms=false_alarms,
            stable=read_places(stable) if stable is not None else None,
            polygons=polygons,
            min_patches=min_patches,
            country=country,
            progress=progress,
        )


def refuse_existing(paths: Sequence[Path | None], *, overwrite: bool) -> None:
    """Refuse to write over what is there."""
    for path in paths:
        if path is not None and path.exists() and not overwrite:
            raise InputError(f"{path} exists; choose another name, or replace it with --overwrite")


def _places(like: Path | None, at: Sequence[float]) -> gpd.GeoSeries:
    if like is None and not at:
        raise InputError("like what? give examples with --like FILE, or a place with --at LON LAT")
    if len(at) % 2:
        raise InputError(f"--at was given {len(at)} numbers; wanted pairs of longitude and latitude")
    places = [place_at(lon, lat) for lon, lat in zip(at[::2], at[1::2], strict=True)]
    if like is not None:
        places.append(read_places(like).to_crs("EPSG:4326"))
    return gpd.GeoSeries(pd.concat(places, ignore_index=True), crs="EPSG:4326")


def _examples(places: gpd.GeoSeries, stores: Sequence[Vectors], polygons: Polygons, what: str) -> Examples:
    examples = gather_examples(places, stores, polygons=polygons)
    if examples.unseen:
        note(f"{examples.unseen} of {len(places)} {what}s lie on no patch with data and are left out")
    return examples
