"""`panterra fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from panterra.cli.options import Json


def fetch(
    *,
    from_files: Annotated[list[Path], Parameter(consume_multiple=True, help="GeoTIFFs, NetCDFs, folders of bands.")],
    out: Annotated[Path, Parameter(help="Folder of the scene.")],
    modality: Annotated[str | None, Parameter(help="What the files are, where their names do not say it.")] = None,
    dates: Annotated[
        list[str] | None, Parameter(consume_multiple=True, help="YYYY-MM-DD per file or time step.")
    ] = None,
    bands: Annotated[
        list[str] | None, Parameter(consume_multiple=True, help="Name of each band in file order.")
    ] = None,
    unit: Annotated[str | None, Parameter(help="Unit of the numbers, such as reflectance or db.")] = None,
    link: Annotated[bool, Parameter(show_default=False, help="Leave rasters where they are.")] = False,
    title: Annotated[str | None, Parameter(help="Title of the scene.")] = None,
    licence: Annotated[str | None, Parameter(help="Licence of the imagery; it travels with every output.")] = None,
    as_json: Json = False,
) -> None:
    """Turn your own rasters into a scene; what cannot be told from the files is asked for, never guessed."""
    from panterra.commands.terminal import show_json
    from panterra.imagery.files import scene_from_files

    made = scene_from_files(
        from_files,
        out,
        modality=modality,
        dates=dates,
        bands=bands,
        unit=unit,
        copy=not link,
        title=title,
        licence=licence,
    )
    days = {name: [str(day) for day in made.scene.dates(name)] for name in made.scene.modalities}
    if as_json:
        show_json({"scene": str(out), "dates": days, "decisions": made.decisions})
        return
    for decision in made.decisions:
        print(decision)
    for name, seen in days.items():
        print(f"{name}: {len(seen)} dates, {seen[0]} to {seen[-1]}" if len(seen) > 1 else f"{name}: {seen[0]}")
    print(f"{out} is a scene; examine it with: panterra doctor {out}")
