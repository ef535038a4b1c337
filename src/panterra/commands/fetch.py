"""Imagery from a catalogue or from files, and what is said about it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from panterra.commands.terminal import progress_bar, show_table
from panterra.energy import recorded
from panterra.errors import InputError
from panterra.imagery.aoi import Area
from panterra.imagery.providers import find_provider
from panterra.imagery.pull import Pulled, Stage, list_pull, pull
from panterra.imagery.stac import Scene
from panterra.imagery.wish import Plan, Wish


def split_names(names: Sequence[str]) -> tuple[str, ...]:
    """Take names that commas separate apart."""
    return tuple(part for name in names for part in name.split(",") if part)


def run_list(wish: Wish, sources: Sequence[str], *, replay: Path | None) -> Plan:
    """Find out what would be fetched."""
    return list_pull(wish, [find_provider(name) for name in split_names(sources)], replay=replay)


def run_fetch(
    wish: Wish,
    sources: Sequence[str],
    out: Path | None,
    *,
    cache: Path | None,
    record: Path | None,
    replay: Path | None,
    title: str | None,
    overwrite: bool,
) -> Pulled:
    """Fetch imagery into a scene, with a bar for each stage."""
    if out is None:
        raise InputError("say where the scene is to be written: --out FOLDER (or look first, with --list)")
    with recorded("fetch"), _bars() as stage:
        return pull(
            wish,
            [find_provider(name) for name in split_names(sources)],
            out,
            cache=cache,
            record=record,
            replay=replay,
            title=title,
            overwrite=overwrite,
            stage=stage,
        )


@contextmanager
def _bars() -> Iterator[Stage]:
    """Show one bar at a time."""
    with ExitStack() as shown:

        def begin(what: str) -> Any:
            shown.close()
            return shown.enter_context(progress_bar(what))

        yield begin


def dates_of(scene: Scene) -> dict[str, list[str]]:
    """List the dates of each modality."""
    return {name: [str(day) for day in scene.dates(name)] for name in scene.modalities}


def show_scene(scene: Scene, out: Path, decisions: Sequence[str]) -> None:
    """Say what a scene was made of, and what to do next."""
    for decision in decisions:
        print(decision)
    for name, seen in dates_of(scene).items():
        known = {item.date for item in scene.items if item.modality == name}
        newest = f", the newest of {len(known)} dates, and the one that is read" if len(known) > len(seen) else ""
        print(f"{name}: {len(seen)} dates, {seen[0]} to {seen[-1]}" if len(seen) > 1 else f"{name}: {seen[0]}{newest}")
    print(f"{out} is a scene; examine it with: panterra doctor {shlex.quote(str(out))}")


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """Say for machines what would be fetched."""
    images = [
        {
            "id": image.id,
            "modality": image.modality,
            "date": image.date,
            "source": image.provider.name,
            "grid": _grid(image.area),
            "bytes": plan.bytes_of(image),
            "items": [
                {"id": c.item.id, "date": c.item.date, "cloud": c.cloud, "covers": round(c.covers, 4)}
                for c in image.candidates
            ],
        }
        for image in plan.images
    ]
    total = sum(plan.bytes_of(image) for image in plan.images)
    return {"grid": _grid(plan.area), "images": images, "bytes": total, "decisions": plan.decisions}


def _grid(area: Area) -> dict[str, Any]:
    crs, (height, width) = area.box.crs, area.box.shape
    assert crs is not None
    name = f"EPSG:{crs.epsg}" if crs.epsg else crs.to_wkt()
    return {"crs": name, "bounds": tuple(area.box.boundingbox), "shape": [height, width]}


def show_plan(plan: Plan) -> None:
    """Say what would be fetched: one line per item."""
    for decision in plan.decisions:
        print(decision)
    rows = [
        (image.id, c.item.date, c.item.id, f"{c.cloud:.0f} %", f"{100 * c.covers:.0f} %")
        for image in plan.images
        for c in image.candidates
    ]
    show_table(["image", "date", "item", "clouds", "covers"], rows)
    total = sum(plan.bytes_of(image) for image in plan.images)
    grids = " and ".join(f"{p.box.shape.x} x {p.box.shape.y} pixels of 10 m in {p.box.crs}" for p in plan.area.parts)
    print(
        f"{len(rows)} items for {len(plan.images)} images of {grids}; "
        f"about {total / 1e6:,.1f} MB before compression. Nothing was fetched."
    )
