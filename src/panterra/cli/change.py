"""`panterra change`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from panterra.cli.options import Country, Json, Overwrite
from panterra.errors import InputError


def change(
    before: Annotated[Path, Parameter(help="Embeddings that panterra embed wrote, or a map of classes.")],
    after: Annotated[Path, Parameter(help="The same of another time, on the same grid.")],
    /,
    *,
    out: Annotated[
        Path, Parameter(help="GeoTIFF of cosine distances, <out>_mask.tif tells what changed; of maps: of transitions.")
    ],
    threshold: Annotated[float | None, Parameter(help="Distance from which a patch has changed.")] = None,
    false_alarms: Annotated[
        float, Parameter(help="Otherwise: share of the stable places that may be taken for changed.")
    ] = 0.001,
    stable: Annotated[
        Path | None, Parameter(help="Points or polygons known to be stable; otherwise most of the area is.")
    ] = None,
    polygons: Annotated[Path | None, Parameter(help="GeoJSON of what changed.")] = None,
    min_patches: Annotated[int, Parameter(help="Patches that such a polygon has at least.")] = 1,
    overwrite: Overwrite = False,
    country: Country | None = None,
    as_json: Json = False,
) -> None:
    """Show how far places have moved between two times, and which more than chance explains.

    Of two maps of classes: which class each place had and has, and a table of hectares, <out>_table.csv.
    """
    from panterra.commands.search import run_change
    from panterra.commands.terminal import show_json
    from panterra.mapping.transitions import is_class_map

    if is_class_map(before) and is_class_map(after):
        if threshold is not None or stable is not None or polygons is not None:
            raise InputError("--threshold, --stable and --polygons are for embeddings; classes are the same or not")
        _show_transitions(before, after, out, overwrite=overwrite, country=country, as_json=as_json)
        return
    made = run_change(
        before,
        after,
        out,
        threshold=threshold,
        false_alarms=false_alarms,
        stable=stable,
        polygons=polygons,
        min_patches=min_patches,
        country=country,
        overwrite=overwrite,
    )
    if as_json:
        show_json(
            {
                "distance": str(made.distance),
                "mask": str(made.mask),
                "polygons": str(made.polygons) if made.polygons else None,
                "passport": str(made.passport),
                "threshold": made.threshold,
                "rule": made.rule,
                "share": made.share,
                "num_polygons": made.num_polygons,
            }
        )
        return
    print(f"{made.mask}: {made.share:.2%} changed, by {made.threshold:.3g} or more ({made.rule})")
    if made.polygons:
        print(f"{made.polygons}: {made.num_polygons:,} polygons")


def _show_transitions(
    before: Path, after: Path, out: Path, *, overwrite: bool, country: str | None, as_json: bool
) -> None:
    from dataclasses import asdict

    from panterra.commands.search import refuse_existing
    from panterra.commands.terminal import progress_bar, show_json, show_table
    from panterra.mapping.transitions import find_transitions

    refuse_existing([out], overwrite=overwrite)
    with progress_bar("comparing") as progress:
        made = find_transitions(before, after, out, country=country, progress=progress)
    if as_json:
        files = {"transitions": str(made.path), "table": str(made.table), "passport": str(made.passport)}
        show_json(
            {
                **files,
                "changed_hectares": made.changed_hectares,
                "rows": [asdict(transition) for transition in made.rows],
            }
        )
        return
    changed = sorted((row for row in made.rows if row.before != row.after), key=lambda row: -row.hectares)
    show_table(("before", "after", "hectares"), [(row.before, row.after, f"{row.hectares:,.1f}") for row in changed])
    print(f"{made.path}: {made.changed_hectares:,.1f} ha changed; all of it in {made.table}")
