"""`panterra evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from panterra.cli.options import Json, ModalityNames


def evaluate(
    *,
    models: Annotated[
        list[str],
        Parameter(
            consume_multiple=True,
            help="Names or folders; NAME@random:SEED for untrained weights, raw for band statistics.",
        ),
    ],
    benchmarks: Annotated[
        list[str], Parameter(consume_multiple=True, help="NAME=FOLDER of each labelled data set (see docs/data.md).")
    ],
    out: Annotated[Path, Parameter(help="Folder for tables and report; a repeated run goes on in it.")],
    protocols: Annotated[
        list[
            Literal[
                "knn",
                "linear",
                "interpolate",
                "attention",
                "anysat",
                "finetune",
                "anysat_finetune",
                "anysat_plus",
                "anysat_scratch",
            ]
        ],
        Parameter(consume_multiple=True, help="How features are judged; from finetune on, encoders are trained."),
    ] = ["knn", "linear"],  # noqa: B006  (cyclopts copies it)
    fractions: Annotated[
        list[float], Parameter(consume_multiple=True, help="Shares of the training samples, for curves over labels.")
    ] = [1.0],  # noqa: B006
    subsets: Annotated[
        Literal["stratified", "published"],
        Parameter(help="Shares drawn by class with each seed, or the lists that come with a data set."),
    ] = "stratified",
    seeds: Annotated[
        list[int], Parameter(consume_multiple=True, help="Each draws other samples, first weights and batches.")
    ] = [42],  # noqa: B006
    compress: Annotated[
        list[str] | None,
        Parameter(consume_multiple=True, help="Rows of their own for features as none, int8, percentile4, pca64, …"),
    ] = None,
    normalisation: Annotated[
        list[Literal["model", "dataset", "published"]] | None,
        Parameter(consume_multiple=True, help="By whose statistics; of several the one that validates best."),
    ] = None,
    sweep: Annotated[
        list[Literal["normalisation", "pooling"]] | None,
        Parameter(consume_multiple=True, help="Also choose these by validation, besides the learning rate."),
    ] = None,
    rates: Annotated[
        list[float] | None, Parameter(consume_multiple=True, help="Learning rates instead of the published eight.")
    ] = None,
    published_rate: Annotated[
        bool, Parameter(show_default=False, help="Take the one rate of the published table, where it has a set.")
    ] = False,
    tuning_rates: Annotated[
        list[float] | None,
        Parameter(consume_multiple=True, help="Learning rates of finetune instead of the published three."),
    ] = None,
    tuned_head: Annotated[
        Literal["published", "nearest", "naive", "mean", "max", "batch_mlp"],
        Parameter(help="Of encoders that are trained, where it is for the task (see docs/evaluating.md)."),
    ] = "published",
    precision: Annotated[Literal["bfloat16", "float32"], Parameter(help="In which encoders are trained.")] = "bfloat16",
    epochs: Annotated[int | None, Parameter(help="Of training, not the published number.")] = None,
    batch: Annotated[int | None, Parameter(help="Samples per step, not the published number.")] = None,
    loss: Annotated[
        Literal["cross_entropy", "dice"] | None,
        Parameter(help="Of pixels' classes; dice: both. As published if left out."),
    ] = None,
    class_weights: Annotated[
        Literal["none", "balanced"], Parameter(help="balanced: rare classes count as much as common ones.")
    ] = "none",
    as_published: Annotated[
        bool,
        Parameter(
            show_default=False,
            help="Fill bands as OlmoEarth's evaluation does, and validate as AnySat's fine-tuning does.",
        ),
    ] = False,
    patch_m: Annotated[float | None, Parameter(help="Side of a patch in metres; four pixels if left out.")] = None,
    modalities: ModalityNames | None = None,
    diagnostics: Annotated[
        bool, Parameter(show_default=False, help="Also say how features spread: rank, uniformity, cosines, norms.")
    ] = False,
    limit: Annotated[int | None, Parameter(help="At most so many samples of each split, for a first look.")] = None,
    cache: Annotated[Path | None, Parameter(help="Folder of features; inside --out if left out.")] = None,
    device: Annotated[str, Parameter(help="Where to compute, such as cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Compare models on labelled data sets, frozen or fine-tuned. A stopped run goes on where it was."""
    from panterra.commands.evaluate import HEADINGS, parse_benchmarks, refuse_failures, run_evaluate, table_of
    from panterra.commands.terminal import note, show_json, show_table
    from panterra.errors import InputError
    from panterra.evaluate.published_tuning import RATES as TUNING_RATES
    from panterra.evaluate.suite import Plan, Row
    from panterra.evaluate.sweep import RATES

    sweep = sweep or []
    if normalisation and "normalisation" in sweep:
        raise InputError("--sweep normalisation chooses between model and dataset; leave it or --normalisation out")
    plan = Plan(
        models=tuple(models),
        benchmarks=parse_benchmarks(benchmarks),
        protocols=tuple(protocols),
        fractions=tuple(fractions),
        subsets=subsets,
        seeds=tuple(seeds),
        normalisations=("model", "dataset") if "normalisation" in sweep else tuple(normalisation or ()),
        compressions=tuple(compress) if compress else ("none",),
        poolings=("mean", "max") if "pooling" in sweep else (),
        rates=tuple(rates) if rates else RATES,
        published_rate=published_rate,
        tuning_rates=tuple(tuning_rates) if tuning_rates else TUNING_RATES,
        tuned_head=tuned_head,
        precision=precision,
        epochs=epochs,
        batch=batch,
        loss=loss,
        class_weights=class_weights,
        as_published=as_published,
        patch_m=patch_m,
        modalities=tuple(modalities) if modalities else None,
        diagnostics=diagnostics,
        limit=limit,
        device=device,
    )
    result = run_evaluate(plan, out, cache=cache)
    rows = [Row.from_dict(row) for row in result["rows"]]
    if as_json:
        show_json(result)
    else:
        show_table(HEADINGS, table_of(rows))
        note(f"The report is {result['report']}")
    refuse_failures(rows)
