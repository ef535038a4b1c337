"""The command line: parse, one call, answer."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from panterra import __version__
from panterra.errors import InputError

if TYPE_CHECKING:
    from panterra.evaluate.area import Estimate
    from panterra.evaluate.metrics import Interval

DEMO_MODEL = "olmoearth-v1.2-nano"

app = App(
    name="panterra",
    help="From satellite imagery to a checked map with an Earth-observation foundation model.",
    help_epilogue="Start with: panterra demo. The --help of each command ends in an example.",
    help_format="plaintext",
    version=__version__,
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
)

Json = Annotated[bool, Parameter(name="--json", show_default=False, help="Print the result as JSON and nothing else.")]
SceneAddress = Annotated[str, Parameter(help="A scene: a folder with scene.json, or the address of an ItemCollection.")]
ModelName = Annotated[str, Parameter(name="--model", help="A name (see: panterra models), or a folder.")]
RandomSeed = Annotated[
    int | None,
    Parameter(name="--random", help="Draw the weights from this seed instead of loading them: trials and baselines."),
]
ModalityNames = Annotated[list[str], Parameter(consume_multiple=True, help="Which modalities to show the model.")]
PatchM = Annotated[float, Parameter(help="Side of a patch in metres: the pixel of the result.")]
WindowPx = Annotated[int, Parameter(help="Side of what the model sees at once, in pixels of the common grid.")]
OverlapPx = Annotated[int, Parameter(help="How far windows overlap; features are blended there.")]
TilePx = Annotated[int, Parameter(help="Side of a unit of work: bounds memory; the result does not depend on it.")]
Overwrite = Annotated[bool, Parameter(show_default=False, help="Replace what is there.")]
Country = Annotated[str, Parameter(help="ISO 3166 code, such as FRA: turns electricity into CO2 equivalents.")]
LabelColumn = Annotated[str, Parameter(help="Column with the class or value, where its name does not say it.")]
BlockM = Annotated[float, Parameter(help="Side of the spatial blocks that keep neighbours in one part.")]


@app.command(
    sort_key=1,
    help_epilogue="Example: panterra demo --scene my-scene --labels plots.gpkg --model olmoearth-v1.2-tiny",
)
def demo(
    *,
    out: Annotated[Path, Parameter(help="Folder for everything that is made.")] = Path("demo"),
    scene: Annotated[str | None, Parameter(help="A scene of your own instead of the procedural planet.")] = None,
    labels: Annotated[Path | None, Parameter(help="Its labels: points or polygons with a class.")] = None,
    column: LabelColumn | None = None,
    model: Annotated[str | None, Parameter(help="Name or folder; random weights if left out.")] = None,
    random: RandomSeed = None,
    patch_m: PatchM = 20,
    window_px: WindowPx | None = None,
    block_m: BlockM = 500,
    size_px: Annotated[int, Parameter(help="Side of the planet's scene in 10 m pixels.")] = 320,
    seed: Annotated[int, Parameter(help="Which planet.")] = 0,
    as_json: Json = False,
) -> None:
    """Make imagery, embed it, fit a probe on 200 labels, write a map and a report about it."""
    from panterra.commands.demo import open_in_browser, run_demo
    from panterra.commands.terminal import show_json

    result = run_demo(
        out,
        scene=scene,
        labels=labels,
        column=column,
        model=model or DEMO_MODEL,
        random=0 if model is None and random is None else random,
        patch_m=patch_m,
        window_px=window_px,
        block_m=block_m,
        size_px=size_px,
        seed=seed,
    )
    if as_json:
        show_json(result)
        return
    print(result["report"])
    open_in_browser(result["report"])


@app.command(sort_key=2, help_epilogue="Example: panterra models")
def models(*, as_json: Json = False) -> None:
    """List the models, their sizes and the licences of their weights."""
    from panterra.commands.terminal import show_json, show_table
    from panterra.models.weights import MODELS

    if as_json:
        show_json({name: asdict(card) for name, card in MODELS.items()})
        return
    show_table(
        ["name", "family", "parameters", "embedding", "licence", "weights from"],
        [
            (m.name, m.family, f"{m.parameters / 1e6:.1f} M", m.dim, m.licence or "-", m.address or "not published")
            for m in MODELS.values()
        ],
    )
    for terms in dict.fromkeys(m.terms for m in MODELS.values()):
        print(f"\n{terms}")


@app.command(sort_key=3, help_epilogue="Example: panterra doctor scene --model olmoearth-v1.2-nano --repair repaired")
def doctor(
    scene: SceneAddress,
    /,
    *,
    model: ModelName | None = None,
    probe: Annotated[Path | None, Parameter(help="A probe that is to map the scene, and its model.")] = None,
    repair: Annotated[Path | None, Parameter(help="Write a scene with the exact fixes applied to this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Compare what a scene holds with what a model or a probe expects; name each mismatch and its fix."""
    from panterra.commands.doctor import diagnose
    from panterra.commands.terminal import note, show_json, show_table
    from panterra.imagery.doctor import repair as write_repaired

    opened, findings = diagnose(scene, model=model, probe=probe)
    if as_json:
        show_json(
            [
                {"level": f.level, "modality": f.modality, "what": f.what, "fix": f.fix, "exact": f.exact}
                for f in findings
            ]
        )
    else:
        show_table(
            ["", "modality", "what", "what to do"],
            [(f.level, f.modality, f.what, f"{f.fix} (exact)" if f.exact and f.fix else f.fix) for f in findings],
        )
    if repair is not None:
        write_repaired(opened, findings, repair)
        note(f"The repaired scene is in {repair}; examine it once more with: panterra doctor {repair}")


@app.command(
    sort_key=4, help_epilogue="Example: panterra fetch --from-files s2_*.tif --out scene --modality sentinel2_l2a"
)
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


@app.command(
    sort_key=5,
    help_epilogue="Example: panterra embed scene --model olmoearth-v1.2-nano --out embeddings.zarr --dtype int8",
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
    overwrite: Overwrite = False,
    country: Country | None = None,
    as_json: Json = False,
) -> None:
    """Embed a scene: one vector per patch. A stopped run goes on where it was."""
    from panterra.commands.terminal import note, progress_bar, show_json
    from panterra.mapping import run
    from panterra.models.weights import load_model

    with progress_bar("embedding") as progress:
        store = run.embed(
            scene,
            load_model(model, random=random),
            out,
            patch_m=patch_m,
            modalities=modalities,
            window_px=window_px,
            overlap_px=overlap_px,
            tile_px=tile_px,
            dtype=dtype,
            overwrite=overwrite,
            country=country,
            progress=progress,
            note=note,
        )
    rows, cols = store.box.shape
    if as_json:
        show_json({"embeddings": str(out), "rows": rows, "cols": cols, "dim": store.dim, "patch_m": patch_m})
    else:
        print(f"{out}: {rows} x {cols} patches of {patch_m:g} m, {store.dim} numbers each")


@app.command(
    sort_key=6, help_epilogue="Example: panterra probe embeddings.zarr --labels plots.gpkg --out probe --column crop"
)
def probe(
    source: Annotated[str, Parameter(help="Embeddings that panterra embed wrote, or a scene to embed first.")],
    /,
    *,
    labels: Annotated[Path, Parameter(help="Points or polygons with a class or value column, or a raster of codes.")],
    out: Annotated[Path, Parameter(help="Folder of the probe.")],
    kind: Annotated[
        Literal["logistic", "knn", "ridge"], Parameter(help="Ridge and knn also know values.")
    ] = "logistic",
    column: LabelColumn | None = None,
    split: Annotated[Literal["blocks", "random"], Parameter(help="Random flatters: neighbours look alike.")] = "blocks",
    block_m: BlockM = 500,
    folds: Annotated[int, Parameter(help="Rounds of testing, each on other blocks.")] = 5,
    seed: int = 42,
    model: Annotated[str | None, Parameter(help="Where the source is a scene: the model to embed it with.")] = None,
    random: RandomSeed = None,
    patch_m: PatchM = 40,
    as_json: Json = False,
) -> None:
    """Fit a probe to labels and report what it scores where it has not been."""
    from panterra.commands.probe import as_embeddings, fit_to_labels
    from panterra.commands.terminal import show_json, show_table

    store = as_embeddings(source, beside=out, model=model, random=random, patch_m=patch_m)
    fitted = fit_to_labels(
        store, labels, column=column, kind=kind, split=split, block_m=block_m, folds=folds, seed=seed
    )
    fitted.probe.save(out)
    report = fitted.report
    if as_json:
        show_json({"probe": str(out), "left_out": fitted.left_out, **report.as_dict()})
        return
    show_table(["", "held out", "95 % interval"], [(name, *_figures(i)) for name, i in report.metrics.items()])
    if report.classes:
        print()
        show_table(
            ["class", "labels", "precision", "recall", "F1", "95 % interval"],
            [
                (c.name, c.support, _figures(c.precision)[0], _figures(c.recall)[0], *_figures(c.f1))
                for c in report.classes
            ],
        )
    print(f"\n{out}: {kind} probe on {report.num_samples} labelled patches in {report.num_groups} groups")


@app.command(sort_key=7, help_epilogue="Example: panterra map scene --probe probe --out map.tif --probabilities")
def map(
    source: Annotated[str, Parameter(help="A scene, or embeddings that panterra embed wrote.")],
    /,
    *,
    probe: Annotated[Path, Parameter(help="Folder that panterra probe wrote.")],
    out: Annotated[Path, Parameter(help="A GeoTIFF; its passport is written beside it.")],
    probabilities: Annotated[bool, Parameter(show_default=False, help="Also write the share of each class.")] = False,
    model: Annotated[str | None, Parameter(help="Instead of the encoder that the probe names.")] = None,
    random: RandomSeed = None,
    tile_px: TilePx | None = None,
    overwrite: Overwrite = False,
    country: Country | None = None,
    as_json: Json = False,
) -> None:
    """Map a scene with a probe. A stopped run goes on where it was and ends with the same bytes."""
    from panterra.commands.terminal import note, progress_bar, show_json
    from panterra.mapping import run
    from panterra.models.weights import load_model

    with progress_bar("mapping") as progress:
        result = run.map(
            source,
            probe,
            out,
            model=load_model(model, random=random) if model else None,
            probabilities=probabilities,
            tile_px=tile_px,
            overwrite=overwrite,
            country=country,
            progress=progress,
            note=note,
        )
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
            }
        )
        return
    print(f"{result.path}: {result.seconds:.0f} s, {energy.kwh * 1000:.3g} Wh ({energy.method}); {result.passport}")


@app.command(
    sort_key=8,
    help_epilogue="Example: panterra sample map.tif --out points.geojson --users-accuracy water=0.95",
)
def sample(
    map: Annotated[Path, Parameter(help="A map of classes, or any other raster of strata.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="GeoJSON of points to look at, with an empty column `reference`.")],
    size: Annotated[int | None, Parameter(help="How many points; otherwise as many as the error needs.")] = None,
    standard_error: Annotated[
        float | None, Parameter(help="Of overall accuracy, to be reached; 0.02 if left out.")
    ] = None,
    users_accuracy: Annotated[
        list[str] | None,
        Parameter(consume_multiple=True, help="What you expect of classes: water=0.95 maize=0.7; 0.8 otherwise."),
    ] = None,
    allocation: Annotated[
        Literal["proportional", "equal", "neyman"], Parameter(help="How points are dealt to the classes.")
    ] = "proportional",
    minimum: Annotated[int, Parameter(help="Points in each class at least.")] = 50,
    seed: int = 42,
    as_json: Json = False,
) -> None:
    """Draw a stratified random sample of a map: points to look at, to learn how good it is."""
    from panterra.commands.accuracy import draw_points
    from panterra.commands.terminal import show_json, show_table

    design = draw_points(
        map,
        out,
        size=size,
        standard_error=standard_error,
        users_accuracy=users_accuracy or [],
        allocation=allocation,
        minimum=minimum,
        seed=seed,
    )
    strata = list(zip(design.strata, design.shares, design.points, design.users_accuracy, strict=True))
    if as_json:
        show_json(
            {
                "points": str(out),
                "standard_error": design.standard_error,
                "strata": [{**asdict(s), "share": w, "points": n, "users_accuracy": u} for s, w, n, u in strata],
            }
        )
        return
    show_table(
        ["class", "hectares", "share", "expected user's accuracy", "points"],
        [(s.name, f"{s.hectares:,.1f}", f"{w:.1%}", f"{u:g}", n) for s, w, n, u in strata],
    )
    print(
        f"\n{out}: {sum(design.points)} points; fill in `reference`, then: panterra accuracy {map} --reference {out}\n"
        f"Overall accuracy will have a standard error of about {design.standard_error:.3f}, if the expectations hold."
    )


@app.command(sort_key=9, help_epilogue="Example: panterra accuracy map.tif --reference points.geojson")
def accuracy(
    map: Annotated[Path, Parameter(help="A map of classes.")],
    /,
    *,
    reference: Annotated[Path, Parameter(help="Points with the true class, drawn by panterra sample or at random.")],
    column: Annotated[
        str, Parameter(help="Column with the true class, as the map names it or its code.")
    ] = "reference",
    confidence: Annotated[float, Parameter(help="Of the intervals.")] = 0.95,
    interval: Annotated[
        Literal["wilson", "normal"], Parameter(help="Normal is the papers' own, too short for rare classes.")
    ] = "wilson",
    simple: Annotated[
        bool, Parameter(show_default=False, help="Do not stratify points drawn at random by the map's classes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Estimate a map's accuracy and the area of its classes from reference points, with confidence intervals."""
    from panterra.commands.accuracy import assess
    from panterra.commands.terminal import note, show_json, show_table

    found = assess(map, reference, column=column, confidence=confidence, interval=interval, simple=simple)
    if found.unlabelled:
        note(f"{found.unlabelled} points of {reference} have no {column} and are left out, as if at random")
    if as_json:
        show_json(found.as_dict())
        return
    report, percent = found.report, f"{confidence:.0%} interval"
    show_table(["", "estimate", percent], [("overall accuracy", *_share(report.overall))])
    print()
    show_table(
        [
            "class",
            "points",
            "user's accuracy",
            percent,
            "producer's accuracy",
            percent,
            "mapped ha",
            "area ha",
            percent,
        ],
        [
            (
                found.names[c.code],
                c.mapped_points,
                *_share(c.users),
                *_share(c.producers),
                f"{found.mapped.get(c.code, 0):,.1f}",
                *_hectares(found.hectares_of(c.code)),
            )
            for c in report.classes
        ],
    )
    design = "stratified" if found.stratified else "simple random"
    print(f"\n{report.num_points} points of a {design} sample of {found.hectares:,.1f} ha")


@app.command(
    sort_key=10,
    help_epilogue="Example: panterra pretrain olmoearth-v1.2-nano --data corpus --out run --set batch=64",
)
def pretrain(
    name: Annotated[str | None, Parameter(help="A recipe, see --list.")] = None,
    /,
    *,
    data: Annotated[
        list[Path] | None,
        Parameter(consume_multiple=True, help="Corpora: folders with sample_metadata.csv and sample_*.h5."),
    ] = None,
    out: Annotated[Path | None, Parameter(help="Folder of the run; one that is there goes on.")] = None,
    changes: Annotated[
        list[str] | None,
        Parameter(name="--set", consume_multiple=True, help="Settings: lr=1e-4 loss.tau=0.2 steps=500."),
    ] = None,
    show_list: Annotated[bool, Parameter(name="--list", show_default=False, help="List the recipes.")] = False,
    dry_run: Annotated[bool, Parameter(show_default=False, help="Count tokens, memory, time and energy only.")] = False,
    steps_now: Annotated[int | None, Parameter(help="Stop after so many steps, with a checkpoint.")] = None,
    parallel: Annotated[
        Literal["auto", "none", "ddp", "fsdp"], Parameter(help="How processes that torchrun started share the work.")
    ] = "auto",
    precision: Annotated[
        Literal["float32", "bfloat16"] | None, Parameter(help="The same as --set precision=...")
    ] = None,
    compile: Annotated[bool, Parameter(show_default=False, help="Compile the transformer blocks.")] = False,
    device: Annotated[str, Parameter(help="auto, cpu, cuda or cuda:N.")] = "auto",
    workers: Annotated[int, Parameter(help="Processes that read samples, for each rank.")] = 2,
    report_to: Annotated[
        list[Literal["jsonl", "tensorboard", "wandb", "mlflow"]] | None,
        Parameter(consume_multiple=True, help="Where numbers go; jsonl and tensorboard if left out."),
    ] = None,
    labelled: Annotated[
        Path | None, Parameter(help="Labelled samples (.npz) for nearest neighbours on the way.")
    ] = None,
    check_every: Annotated[int, Parameter(help="Steps between checks for collapse; 0 leaves them out.")] = 1000,
    export: Annotated[Path | None, Parameter(help="Only make a model folder of a checkpoint of --out.")] = None,
    step: Annotated[
        int | None, Parameter(help="For --export: of the checkpoint after this step, not the newest.")
    ] = None,
    save_every: Annotated[int, Parameter(help="Steps between checkpoints.")] = 250,
    ranks: Annotated[int, Parameter(help="For --dry-run: processes that share a step.")] = 1,
    tflops: Annotated[
        float | None, Parameter(help="For --dry-run: TFLOP/s of a rank; measured here if left out.")
    ] = None,
    watts: Annotated[float | None, Parameter(help="For --dry-run: what a rank draws.")] = None,
    country: Country | None = None,
    as_json: Json = False,
) -> None:
    """Pretrain a model by a recipe. A stopped run goes on where it was, with the numbers of one that never stopped."""
    from panterra.commands import pretrain as command
    from panterra.commands.terminal import show_json
    from panterra.train.loop import Options

    if show_list:
        listed = command.list_recipes()
        show_json(listed) if as_json else command.show_recipes(listed)
        return
    if name is None:
        raise InputError("which recipe? give its name, such as olmoearth-v1.2-nano; --list shows all")
    settings = command.configured(name, changes or [], precision=precision)
    if dry_run:
        plan = command.dry_run(
            settings,
            data or [],
            ranks=ranks,
            sharded=parallel == "fsdp",
            device=device,
            tflops=tflops,
            watts=watts,
            country=country,
        )
        show_json(plan.as_dict()) if as_json else command.show_plan(plan)
        return
    if out is None:
        raise InputError("give the folder of the run with --out, or count the run with --dry-run")
    if export is not None:
        folder = command.export_checkpoint(settings, data or [], out, export, step=step)
        show_json({"model": str(folder)}) if as_json else print(f"The model is in {folder}")
        return
    result = command.run_pretrain(
        settings,
        data or [],
        out,
        labelled=labelled,
        check_every=check_every,
        options=Options(
            device=device,
            parallel=parallel,
            precision=settings.precision,
            compile=compile,
            workers=workers,
            save_every=save_every,
            logs=tuple(report_to or ("jsonl", "tensorboard")),
            country=country,
            steps_this_time=steps_now,
        ),
    )
    if command.is_first_rank():
        show_json(asdict(result)) if as_json else command.show_result(result)


data = App(
    name="data",
    help="Make a pretraining corpus from scenes, look at one, check one or a data set.",
    help_epilogue="Example: panterra data inspect corpus",
    sort_key=11,
)
app.command(data)


@data.command(
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
    from panterra.data.build import Choice, Job, Rules, Splits

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


@data.command(help_epilogue="Example: panterra data inspect corpus")
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


@data.command(help_epilogue="Example: panterra data verify corpus")
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


def _share(figure: Estimate) -> tuple[str, str]:
    if math.isnan(figure.value):
        return "-", "-"
    return f"{figure.value:.3f}", f"{figure.low:.3f} to {figure.high:.3f}"


def _hectares(area: Estimate) -> tuple[str, str]:
    return f"{area.value:,.1f}", f"{area.low:,.1f} to {area.high:,.1f}"


def _figures(interval: Interval) -> tuple[str, str]:
    return f"{interval.estimate:.3f}", f"{interval.low:.3f} to {interval.high:.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for what a person can put right, 130 after Ctrl-C."""
    # Threads that wait for each other by spinning take several times as long where other programs want the cores too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(
            sys.argv[1:] if arguments is None else list(arguments),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        sys.stdout.flush()
    except (CycloptsError, InputError) as error:
        return _fail(str(error), 2)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("panterra"):
            raise
        return _fail(f"this command needs {error.name}; install it with: pip install 'panterra[all]'", 2)
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "stopped", 130)
    except BrokenPipeError:  # the reader left, as `head` does; nothing more can be said on stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _fail(message: str, status: int) -> int:
    print(f"panterra: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
