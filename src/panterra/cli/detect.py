"""`panterra detect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from panterra.cli.options import (
    INCOMPLETE,
    After,
    Aoi,
    Before,
    BudgetKwh,
    Country,
    CrsCode,
    Device,
    Json,
    On,
    Overwrite,
    SceneAddress,
    TilePx,
)


def detect(
    scene: SceneAddress,
    /,
    *,
    model: Annotated[Path, Parameter(help="Folder that panterra finetune --task detection wrote.")],
    out: Annotated[Path, Parameter(help="A GeoJSON of boxes; its passport is written beside it.")],
    threshold: Annotated[
        float | None, Parameter(help="Score from which objects count; otherwise the one that was best in validation.")
    ] = None,
    same: Annotated[float, Parameter(help="IoU from which two boxes of a class are one object.")] = 0.5,
    before: Before | None = None,
    after: After | None = None,
    tile_px: TilePx | None = None,
    crs: CrsCode | None = None,
    aoi: Aoi | None = None,
    on: On = "local",
    device: Device = "cpu",
    overwrite: Overwrite = False,
    country: Country | None = None,
    budget_kwh: BudgetKwh | None = None,
    as_json: Json = False,
) -> None:
    """List the objects in a scene, each once. A stopped run goes on where it was and ends with the same bytes."""
    from panterra.commands.terminal import despite_failures, note, show_json, show_table
    from panterra.finetune.model import at_periods, load_finetuned
    from panterra.mapping import detections
    from panterra.train.parallel import choose_device

    where = choose_device(device)
    found, failed = despite_failures(
        "detecting",
        lambda progress: detections.detect(
            scene,
            at_periods(load_finetuned(model, device=where), before, after),
            out,
            threshold=threshold,
            same=same,
            tile_px=tile_px,
            crs=crs,
            aoi=aoi,
            on=on,
            overwrite=overwrite,
            country=country,
            budget_kwh=budget_kwh,
            progress=progress,
            note=note,
        ),
    )
    if as_json:
        show_json(
            {
                "objects": str(found.path),
                "passport": str(found.passport),
                "threshold": found.threshold,
                "counts": found.counts,
                "areas_m2": found.areas_m2,
                "seconds": found.seconds,
                "energy": found.energy.as_dict(),
                "impact": found.impact.as_dict(area_km2=found.area_km2),
                "failed_tiles": failed,
            }
        )
    else:
        rows = [(name, number, f"{found.areas_m2[name]:.0f}") for name, number in found.counts.items()]
        show_table(["class", "objects", "boxes, m2"], rows)
        print(
            f"\n{found.path}: scores from {found.threshold:.3g} on; {found.seconds:.0f} s, "
            f"{found.energy.kwh * 1000:.3g} Wh ({found.energy.method}); {found.passport}"
        )
    if failed:
        raise SystemExit(INCOMPLETE)
