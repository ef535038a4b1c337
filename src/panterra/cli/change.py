"""`panterra change`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from panterra.cli.options import Country, Json, Overwrite


def change(
    before: Annotated[Path, Parameter(help="Embeddings that panterra embed wrote.")],
    after: Annotated[Path, Parameter(help="Embeddings of the same area at another time, on the same grid.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="GeoTIFF of cosine distances; <out>_mask.tif tells what changed.")],
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
    """Show how far places have moved between two times, and which more than chance explains."""
    from panterra.commands.search import run_change
    from panterra.commands.terminal import show_json

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
