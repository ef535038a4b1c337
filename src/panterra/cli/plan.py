"""`panterra plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from panterra.cli.options import (
    Country,
    CrsCode,
    Device,
    Json,
    ModalityNames,
    OverlapPx,
    PatchM,
    RandomSeed,
    SceneAddress,
    TilePx,
    WindowPx,
)
from panterra.errors import InputError


def plan(
    scene: SceneAddress | None = None,
    /,
    *,
    aoi: Annotated[
        str | None,
        Parameter(
            allow_leading_hyphen=True,
            help="Vector file, or west,south,east,north in degrees: of the scene, or else of imagery to fetch.",
        ),
    ] = None,
    dates: Annotated[str | None, Parameter(help="To fetch: a span such as 2024-01/2024-12.")] = None,
    source: Annotated[
        list[str] | None,
        Parameter(consume_multiple=True, help="To fetch: as in panterra fetch; planetary-computer if left out."),
    ] = None,
    every: Annotated[
        Literal["month", "season", "year", "all"], Parameter(help="To fetch: the span that one image stands for.")
    ] = "month",
    model: Annotated[str | None, Parameter(help="A name (see: panterra models), or a folder.")] = None,
    probe: Annotated[
        Path | None, Parameter(help="Folder of a probe or a fine-tuned model: plan a map, not embeddings.")
    ] = None,
    random: RandomSeed = None,
    patch_m: PatchM | None = None,
    modalities: ModalityNames | None = None,
    dtype: Annotated[Literal["float32", "float16", "int8"], Parameter(help="How embeddings are stored.")] = "float32",
    probabilities: Annotated[bool, Parameter(show_default=False, help="The map has the share of each class.")] = False,
    window_px: WindowPx | None = None,
    overlap_px: OverlapPx | None = None,
    tile_px: TilePx | None = None,
    crs: CrsCode | None = None,
    country: Country | None = None,
    prices: Annotated[Path | None, Parameter(help="A price list in JSON: see docs/planning.md.")] = None,
    measure: Annotated[
        bool, Parameter(show_default=False, help="Try a few windows now, even where earlier runs tell the speed.")
    ] = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Say what a map or embeddings will take: imagery, bytes, hours, electricity, CO2 equivalents, water, money."""
    from panterra.commands.plan import find_imagery, show_plan
    from panterra.commands.terminal import note, show_json
    from panterra.mapping.plan import plan_map, read_prices
    from panterra.models.weights import load_model
    from panterra.train.parallel import choose_device

    if scene is None and aoi is None:
        raise InputError("say what to plan: a scene, or an area with --aoi")
    if scene is not None and (dates or source):
        raise InputError("--dates and --source choose imagery to fetch; leave them out, or the scene")
    where = choose_device(device)
    planned = plan_map(
        scene if scene is not None else find_imagery(str(aoi), dates, modalities or [], source or [], every),
        model=load_model(model, random=random, device=where) if model else None,
        device=where,
        probe=probe,
        crs=crs,
        aoi=aoi if scene is not None else None,
        patch_m=patch_m,
        modalities=modalities,
        window_px=window_px,
        overlap_px=overlap_px,
        tile_px=tile_px,
        dtype=dtype,
        probabilities=probabilities,
        country=country,
        prices=None if prices is None else read_prices(prices),
        measure=measure,
        note=note,
    )
    show_json(planned.as_dict()) if as_json else show_plan(planned)
