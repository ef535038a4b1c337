"""`panterra fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from panterra.cli.options import Json, Overwrite
from panterra.errors import InputError


def fetch(
    *,
    out: Annotated[Path | None, Parameter(help="Folder of the scene.")] = None,
    aoi: Annotated[
        str | None,
        Parameter(
            allow_leading_hyphen=True,
            help="What to cover: vector file, or west,south,east,north in degrees; over the antimeridian west > east.",
        ),
    ] = None,
    dates: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True,
            help="With --aoi a span such as 2024-01/2024-12; else YYYY-MM-DD per file, or a text file of them.",
        ),
    ] = None,
    modalities: Annotated[list[str] | None, Parameter(consume_multiple=True, help="What to fetch.")] = None,
    declare: Annotated[
        Path | None,
        Parameter(help="TOML or JSON that declares modalities of your own, and how catalogues have them."),
    ] = None,
    source: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True,
            help="planetary-computer (the default), earth-search, cdse, usgs or the address of a STAC API. Of several, "
            "each modality comes from the first that has it.",
        ),
    ] = None,
    every: Annotated[
        Literal["month", "season", "year", "all"], Parameter(help="The span of time that one image stands for.")
    ] = "month",
    best: Annotated[int | None, Parameter(help="Use only that many of the clearest dates of each span.")] = None,
    max_cloud: Annotated[float, Parameter(help="Leave out images with more clouds than this, in percent.")] = 60,
    composite: Annotated[
        Literal["median", "medoid", "best", "none"],
        Parameter(help="How the dates of a span become one image; none keeps each date."),
    ] = "median",
    keep_clouds: Annotated[bool, Parameter(show_default=False, help="Do not mask clouds and their shadows.")] = False,
    grow_clouds_m: Annotated[float, Parameter(help="Mask what is that near to clouds and shadows as well.")] = 0,
    s2cloudless: Annotated[
        bool, Parameter(show_default=False, help="Look for clouds in Sentinel-2 L1C with the package s2cloudless.")
    ] = False,
    orbit: Annotated[
        Literal["ascending", "descending"] | None, Parameter(help="Take images of such orbits only.")
    ] = None,
    show_list: Annotated[
        bool, Parameter(name="--list", show_default=False, help="Show what would be fetched, and fetch nothing.")
    ] = False,
    cache: Annotated[Path | None, Parameter(help="Folder in which pixels stay for other runs.")] = None,
    record: Annotated[Path | None, Parameter(help="Folder in which everything stays that --replay needs.")] = None,
    replay: Annotated[Path | None, Parameter(help="Repeat a recorded run, without a network.")] = None,
    from_files: Annotated[
        list[Path] | None, Parameter(consume_multiple=True, help="GeoTIFFs, NetCDFs, folders of bands of your own.")
    ] = None,
    modality: Annotated[str | None, Parameter(help="What the files are, where their names do not say it.")] = None,
    bands: Annotated[
        list[str] | None, Parameter(consume_multiple=True, help="Name of each band in file order.")
    ] = None,
    unit: Annotated[str | None, Parameter(help="Unit of the numbers, such as reflectance or db.")] = None,
    link: Annotated[bool, Parameter(show_default=False, help="Leave rasters where they are.")] = False,
    title: Annotated[str | None, Parameter(help="Title of the scene.")] = None,
    licence: Annotated[str | None, Parameter(help="Licence of your files; it travels with every output.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fetch imagery of an area from a STAC catalogue, or turn your own rasters into a scene.

    A stopped run goes on where it was. What your files do not tell is asked for, never guessed.
    """
    if (aoi is None) == (from_files is None):
        raise InputError("say what to fetch: an area with --aoi, or files of your own with --from-files")
    if declare is not None:
        from panterra.imagery.declared import declare_modalities

        declare_modalities(declare)
    if from_files is not None:
        others = {
            "--modalities": modalities,
            "--source": source,
            "--overwrite": overwrite,
            "--every": every != "month",
            "--best": best,
            "--max-cloud": max_cloud != 60,
            "--composite": composite != "median",
            "--keep-clouds": keep_clouds,
            "--grow-clouds-m": grow_clouds_m != 0,
            "--s2cloudless": s2cloudless,
            "--orbit": orbit,
            "--list": show_list,
        }
        _refuse(others | {"--cache": cache, "--record": record, "--replay": replay}, "--aoi")
        if out is None:
            raise InputError("say where the scene is to be written: --out FOLDER")
        _from_files(from_files, out, modality, dates, bands, unit, link, title, licence, as_json)
        return
    _refuse(
        {"--modality": modality, "--bands": bands, "--unit": unit, "--link": link, "--licence": licence}, "--from-files"
    )

    from panterra.commands import fetch as command
    from panterra.commands.terminal import note, show_json
    from panterra.imagery.wish import Wish

    if not modalities:
        raise InputError("say what to fetch, such as --modalities sentinel2_l2a sentinel1")
    if dates is None or len(dates) != 1:
        raise InputError("say when: --dates with one span, such as 2024-01/2024-12")
    wish = Wish(
        aoi=str(aoi),
        dates=dates[0],
        modalities=command.split_names(modalities),
        every=every,
        best=best,
        max_cloud=max_cloud,
        composite=composite,
        mask_clouds=not keep_clouds,
        grow_m=grow_clouds_m,
        s2cloudless=s2cloudless,
        orbit=orbit,
    )
    sources = source or ["planetary-computer"]
    if show_list:
        plan = command.run_list(wish, sources, replay=replay)
        show_json(command.plan_as_dict(plan)) if as_json else command.show_plan(plan)
        return
    pulled = command.run_fetch(
        wish, sources, out, cache=cache, record=record, replay=replay, title=title, overwrite=overwrite
    )
    for failure in pulled.failures:
        note(f"lost: {failure}")
    if as_json:
        show_json(
            {
                "scene": str(out),
                "dates": command.dates_of(pulled.scene),
                "licence": pulled.scene.licence,
                "decisions": pulled.decisions,
                "failures": pulled.failures,
                "received_bytes": pulled.received,
            }
        )
        return
    command.show_scene(pulled.scene, Path(str(out)), pulled.decisions)


def _refuse(given: dict[str, object], mode: str) -> None:
    """Refuse options that would do nothing."""
    idle = [name for name, value in given.items() if value not in (None, False)]
    if idle:
        raise InputError(f"{idle[0]} goes with {mode}, which was not given")


def _from_files(
    files: list[Path],
    out: Path,
    modality: str | None,
    dates: list[str] | None,
    bands: list[str] | None,
    unit: str | None,
    link: bool,
    title: str | None,
    licence: str | None,
    as_json: bool,
) -> None:
    from panterra.commands.fetch import dates_of, show_scene
    from panterra.commands.terminal import show_json
    from panterra.imagery.files import scene_from_files

    made = scene_from_files(
        files,
        out,
        modality=modality,
        dates=dates,
        bands=bands,
        unit=unit,
        copy=not link,
        title=title,
        licence=licence,
    )
    if as_json:
        show_json({"scene": str(out), "dates": dates_of(made.scene), "decisions": made.decisions})
        return
    show_scene(made.scene, out, made.decisions)
