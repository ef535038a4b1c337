"""`panterra data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from panterra.cli.options import Json
from panterra.errors import InputError

app = App(
    name="data",
    help="Make a pretraining corpus from scenes, look at one, check one or a data set.",
    help_epilogue="Example: panterra data inspect corpus",
    sort_key=100,
)


@app.command(
    help_epilogue="Example: panterra data build scene --out corpus --osm austria.osm.pbf --split train=0.95 val=0.05"
)
def build(
    scenes: Annotated[list[str], Parameter(help="Scenes: folders with scene.json, or addresses of ItemCollections.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="Folder of the corpus; a build that was stopped goes on there.")],
    places: Annotated[
        str | None,
        Parameter(help="Points or polygons to show (CSV with lon and lat, GeoJSON, ...); a date is optional."),
    ] = None,
    osm: Annotated[
        str | None,
        Parameter(help="OpenStreetMap extract or GeoParquet of tags: balances the places and is burned into a raster."),
    ] = None,
    most_per_category: Annotated[
        int, Parameter(help="Cells to draw of each category of OpenStreetMap, at most.")
    ] = 10_000,
    modalities: Annotated[
        list[str] | None, Parameter(consume_multiple=True, help="All of the scenes if left out.")
    ] = None,
    first: Annotated[
        str | None, Parameter(help="Earliest centre of a year, YYYY-MM-DD; as the imagery allows.")
    ] = None,
    last: Annotated[str | None, Parameter(help="Latest centre of a year, YYYY-MM-DD.")] = None,
    tile_px: Annotated[int, Parameter(help="Side of a sample; windows of 256 px are cut into them.")] = 128,
    min_dates: Annotated[int, Parameter(help="Months that a sample must have, of its longest series.")] = 12,
    min_valid: Annotated[float, Parameter(help="Share of a mosaic that must be data for its month to count.")] = 1.0,
    required: Annotated[list[str] | None, Parameter(consume_multiple=True, help="What each sample must have.")] = None,
    near_days: Annotated[int | None, Parameter(help="Sentinel-2 must be within so many days of the centre.")] = None,
    mask_clouds: Annotated[
        bool, Parameter(show_default=False, help="Leave pixels under clouds to other images.")
    ] = False,
    first_pixel: Annotated[
        bool, Parameter(show_default=False, help="Thin OpenStreetMap's raster as published; most points get lost.")
    ] = False,
    split: Annotated[
        list[str] | None, Parameter(consume_multiple=True, help="Splits and their shares: train=0.9 val=0.1.")
    ] = None,
    block_cells: Annotated[int, Parameter(help="Side of the blocks that stay in one split, in cells of 2.56 km.")] = 16,
    compression: Annotated[Literal["zstd", "gzip", "none"], Parameter(help="Published: zstd.")] = "zstd",
    workers: Annotated[int, Parameter(help="Windows that are read side by side.")] = 4,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Make a pretraining corpus: windows of 2.56 km, one mosaic per 30 days, in the published layout."""
    from panterra.commands.data import parse_day, parse_shares, run_build
    from panterra.commands.terminal import show_json
    from panterra.data.corpus_plan import Choice, Job, Rules, Splits

    built = run_build(
        out,
        Job(
            scenes=tuple(scenes),
            modalities=tuple(modalities or ()),
            choice=Choice(
                places=places,
                osm=osm,
                most_per_category=most_per_category,
                first=parse_day(first),
                last=parse_day(last),
            ),
            rules=Rules(
                tile_px=tile_px,
                min_dates=min_dates,
                min_valid=min_valid,
                required=tuple(required or ()),
                near_days=near_days,
                mask_clouds=mask_clouds,
                keep_all=not first_pixel,
            ),
            splits=Splits(shares=parse_shares(split or ["train=1"]), block_cells=block_cells),
            seed=seed,
            compression=None if compression == "none" else compression,
        ),
        workers=workers,
    )
    if as_json:
        show_json({"corpus": str(out), **built.report})
        return
    for name, folder in built.corpora.items():
        print(f"{name}: {built.report['samples'][name]:,} samples in {folder}")
    for why, count in built.report["dropped"].items():
        print(f"dropped {count:,} {why}")
    print(
        f"{out}: {built.report['windows_kept']:,} of {built.report['windows']:,} windows; see windows.csv, dropped.csv"
    )


@app.command(help_epilogue="Example: panterra data inspect corpus")
def inspect(
    corpus: Annotated[
        Path, Parameter(help="A folder that panterra data build wrote, or one with sample_metadata.csv.")
    ],
    /,
    *,
    samples: Annotated[int, Parameter(help="How many to open, evenly spread, for dates, tokens and ranges.")] = 64,
    patch_px: Annotated[int, Parameter(help="Side of the patches that tokens are counted for.")] = 4,
    as_json: Json = False,
) -> None:
    """Show what a pretraining corpus holds, and its values beside those that the normalisation expects."""
    from panterra.commands.data import find_corpora, inspect_corpus, range_row, summary_lines
    from panterra.commands.terminal import show_json, show_table

    found = {n: inspect_corpus(c, samples=samples, patch_px=patch_px) for n, c in find_corpora(corpus).items()}
    if as_json:
        show_json(found)
        return
    for name, about in found.items():
        print("\n".join(summary_lines(name, about)))
        show_table(
            ["modality", "samples", "dates", "values (2-98 %)", "expected", "outside"],
            [range_row(modality, row) for modality, row in about["modalities"].items()],
        )
        print()


@app.command(help_epilogue="Example: panterra data verify corpus")
def verify(
    target: Annotated[str, Parameter(help="Folder of a corpus, or the name of a data set.")],
    path: Annotated[Path | None, Parameter(help="Where the data set lies.")] = None,
    /,
    *,
    samples: Annotated[
        int | None, Parameter(help="Samples to open: of a corpus all, of each split 8 if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a corpus, or a downloaded data set by its name; the exit status is 2 where something is wrong."""
    from panterra.commands.data import run_verify
    from panterra.commands.terminal import show_json, show_table

    findings = run_verify(target, path, samples=samples)
    if as_json:
        show_json([{"level": f.level, "what": f.what} for f in findings])
    else:
        show_table(["", "what"], [(f.level, f.what) for f in findings])
    wrong = sum(f.level == "error" for f in findings)
    if wrong:
        raise InputError(f"{wrong} of {len(findings)} findings are errors")
