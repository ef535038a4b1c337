"""`panterra map`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    RandomSeed,
    TilePx,
)

if TYPE_CHECKING:
    from panterra.mapping.run import MapResult


def map(
    source: Annotated[str, Parameter(help="A scene, or embeddings that panterra embed wrote.")],
    /,
    *,
    probe: Annotated[Path, Parameter(help="Folder that panterra probe or panterra finetune wrote.")],
    out: Annotated[Path, Parameter(help="A GeoTIFF; its passport is written beside it.")],
    before: Before | None = None,
    after: After | None = None,
    probabilities: Annotated[bool, Parameter(show_default=False, help="Also write the share of each class.")] = False,
    model: Annotated[str | None, Parameter(help="Instead of the encoder that the probe names.")] = None,
    random: RandomSeed = None,
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
    """Map a scene with a probe. A stopped run goes on where it was and ends with the same bytes."""
    from panterra.commands.terminal import despite_failures, note, show_json
    from panterra.finetune.model import at_periods
    from panterra.mapping import run
    from panterra.mapping.probing import as_probe
    from panterra.mapping.seams import warning_of
    from panterra.models.weights import load_model
    from panterra.train.parallel import choose_device

    where = choose_device(device)
    result, failed = despite_failures(
        "mapping",
        lambda progress: run.map(
            source,
            at_periods(as_probe(probe), before, after),
            out,
            model=load_model(model, random=random, device=where) if model else None,
            device=where,
            probabilities=probabilities,
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
    if warning := warning_of(result.seams):
        note(warning)
    energy = result.energy
    if as_json:
        show_json(
            {
                "map": str(result.path),
                "probabilities": str(result.probabilities) if result.probabilities else None,
                "passport": str(result.passport),
                "seconds": result.seconds,
                "encoder_seconds": result.encoder_seconds,
                "energy": energy.as_dict(),
                "impact": result.impact.as_dict(area_km2=result.area_km2),
                "seams": result.seams.as_dict(),
                "failed_tiles": failed,
            }
        )
    else:
        _tell(result)
    if failed:
        raise SystemExit(INCOMPLETE)


def _tell(result: MapResult) -> None:
    energy = result.energy
    gases = result.impact.co2e_kg
    told = (
        ""
        if gases is None
        else f", {gases.value * 1000:.3g} g CO2e ({gases.low * 1000:.3g} to {gases.high * 1000:.3g})"
    )
    print(
        f"{result.path}: {result.seconds:.0f} s, {energy.kwh * 1000:.3g} Wh ({energy.method}){told}; {result.passport}"
    )
