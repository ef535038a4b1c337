"""Pretraining of AnySat as a person starts it: a recipe by name, its data sets, a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from panterra.commands.terminal import show_table
from panterra.data.labelled import card_of
from panterra.errors import InputError
from panterra.recipes.anysat import RUNS, AnySatRecipe, run_from
from panterra.recipes.anysat_data import kept_statistics, open_sets, parse_folders
from panterra.recipes.anysat_plan import AnySatPlan, plan_anysat
from panterra.recipes.start import Start, begin_from
from panterra.train.loop import Options, Run, TrainResult, export, train

PUBLISHED_COUNTS = {
    "treesatai_ts": 38520,
    "pastis_hd": 2433,
    "flair": 49230,
    "planted": 1075701,
    "s2naip_urban": 359046,
}
"""Samples that are trained on (AnySat, table 1 and the data sets' papers)."""


def make_run(settings: AnySatRecipe, data: Sequence[str], out: Path, *, world: int | None = None) -> Run:
    """Open a recipe's data sets and make its run; the statistics of the first start are kept in `out`."""
    folders = parse_folders(settings, data)
    samples, held_out = open_sets(folders, "train"), open_sets(folders, "val")
    statistics = kept_statistics(settings, samples, out)
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if world is None else world
    return run_from(settings, samples, statistics=statistics, held_out=held_out, world=ranks)


def run_anysat(
    settings: AnySatRecipe, data: Sequence[str], out: Path, options: Options, *, start: Start | None = None
) -> TrainResult:
    """Train, going on from where an earlier start of the same run was; at the end, export the teacher."""
    run = make_run(settings, data, out)
    try:
        return train(run if start is None else begin_from(run, start), out, options)
    except FloatingPointError as error:
        raise InputError(f"{error}; a smaller lr or precision=float32 may help, in another folder") from error


def export_anysat(settings: AnySatRecipe, data: Sequence[str], out: Path, folder: Path, *, step: int | None) -> Path:
    """Write the teacher of a run's newest checkpoint, or of that after `step`, to a folder."""
    return export(make_run(settings, data, out), out, folder, step=step)


def dry_run_anysat(settings: AnySatRecipe, data: Sequence[str], *, ranks: int) -> AnySatPlan:
    """Count a run; without data, one over the published data sets."""
    if not data:
        return plan_anysat(settings, PUBLISHED_COUNTS, ranks=ranks)
    samples = open_sets(parse_folders(settings, data), "train")
    return plan_anysat(settings, {name: len(found) for name, found in samples.items()}, ranks=ranks)


def list_anysat() -> list[dict[str, Any]]:
    """Describe the runs without their variants."""
    variants = ("-naive-masking", "-corrected")
    runs = {name: make() for name, make in RUNS.items() if not name.endswith(variants)}
    return [
        {
            "name": name,
            "about": ", ".join(card_of(source.name).title for source in recipe.sources),
            "variants": [suffix[1:] for suffix in variants],
            "recipe": asdict(recipe),
        }
        for name, recipe in runs.items()
    ]


def show_anysat_plan(plan: AnySatPlan) -> None:
    """Print a run as it would be."""
    print(f"{plan.recipe.name}\n")
    encoder = plan.recipe.encoder
    show_table(
        ["part", "width", "depth", "heads", "parameters"],
        [
            ("encoder", encoder.dim, encoder.depth, encoder.heads, f"{plan.parameters['encoder']:,}"),
            (
                "predictor",
                encoder.dim,
                plan.recipe.predictor_depth,
                plan.recipe.predictor_heads,
                f"{plan.parameters['predictor']:,}",
            ),
            ("teacher (follows)", encoder.dim, encoder.depth, encoder.heads, f"{plan.parameters['teacher']:,}"),
        ],
    )
    print()
    show_table(
        ["data set", "sensors", "samples", "batch of a rank", "steps an epoch", "patches of a sample"],
        [
            (s.name, ", ".join(s.sensors), f"{s.samples:,}", s.batch, f"{s.steps:,}", f"{s.tokens:g}")
            for s in plan.sources
        ],
    )
    print(
        f"\nSteps: {plan.steps:,}, {plan.epoch:,} an epoch, each of one data set, on {plan.ranks} ranks; in the mean "
        f"{plan.samples_per_step:,.1f} samples and {plan.tokens_per_step:,.0f} patches a step\n"
        f"Memory of a rank: {plan.state_bytes / 1e9:.3g} GB of weights, gradients and moments; activations on top\n"
        "Time: not estimated; start with --steps-now 20 and look at samples_per_s in log.jsonl"
    )
