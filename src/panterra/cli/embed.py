"""`panterra embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from panterra.cli.options import (
    INCOMPLETE,
    Aoi,
    BudgetKwh,
    Country,
    CrsCode,
    Device,
    Json,
    ModalityNames,
    ModelName,
    On,
    OverlapPx,
    Overwrite,
    PatchM,
    RandomSeed,
    SceneAddress,
    TilePx,
    WindowPx,
)


def embed(
    scene: SceneAddress,
    /,
    *,
    model: ModelName,
    out: Annotated[Path, Parameter(help="A Zarr store, or a GeoTIFF where the name ends in .tif.")],
    random: RandomSeed = None,
    patch_m: PatchM = 40,
    modalities: ModalityNames | None = None,
    dtype: Annotated[Literal["float32", "float16", "int8"], Parameter(help="How numbers are stored.")] = "float32",
    window_px: WindowPx = 64,
    overlap_px: OverlapPx = 16,
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
    """Embed a scene: one vector per patch. A stopped run goes on where it was."""
    from panterra.commands.terminal import despite_failures, note, show_json
    from panterra.mapping import run
    from panterra.mapping.seams import read_seams, warning_of
    from panterra.models.weights import load_model
    from panterra.train.parallel import choose_device

    where = choose_device(device)
    store, failed = despite_failures(
        "embedding",
        lambda progress: run.embed(
            scene,
            load_model(model, random=random, device=where),
            out,
            patch_m=patch_m,
            modalities=modalities,
            window_px=window_px,
            overlap_px=overlap_px,
            tile_px=tile_px,
            crs=crs,
            aoi=aoi,
            dtype=dtype,
            on=on,
            overwrite=overwrite,
            country=country,
            budget_kwh=budget_kwh,
            progress=progress,
            note=note,
        ),
    )
    seams = read_seams(store.passport)
    if warning := warning_of(seams):
        note(warning)
    rows, cols = store.box.shape
    if as_json:
        told = {"embeddings": str(out), "rows": rows, "cols": cols, "dim": store.dim, "patch_m": patch_m}
        show_json({**told, "seams": seams.as_dict() if seams else None, "failed_tiles": failed})
    else:
        print(f"{out}: {rows} x {cols} patches of {patch_m:g} m, {store.dim} numbers each")
    if failed:
        raise SystemExit(INCOMPLETE)
