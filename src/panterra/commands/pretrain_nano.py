"""Pretraining of `panterra-nano` as a person starts it: a folder and some hours."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from panterra.commands.terminal import note, progress_bar, show_table
from panterra.models.olmoearth import OlmoEarth
from panterra.recipes.nano import NanoRecipe
from panterra.train.loop import Options, TrainResult, export, train


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoPlan:
    """A run counted before it starts."""

    recipe: NanoRecipe
    parameters: int
    """Of the encoder."""
    places: int
    disk_bytes: int
    """That the places take in the folder of the run."""

    def as_dict(self) -> dict[str, Any]:
        """Give it as JSON."""
        return asdict(self)


def run_nano(settings: NanoRecipe, out: Path, options: Options) -> TrainResult:
    """Draw the places where they are not there yet, then train; an earlier start is gone on with."""
    # Planets bring libraries of imagery, which no other recipe loads.
    from panterra.recipes.nano_run import nano_run

    note(f"Drawing {settings.places_in_all:,} places on invented planets, where {out} does not have them yet")
    with progress_bar("places") as progress:
        run = nano_run(settings, out, progress=progress)
    return train(run, out, options)


def export_nano(settings: NanoRecipe, out: Path, folder: Path, *, step: int | None) -> Path:
    """Write the model of a run's newest checkpoint, or of that after `step`, to a folder."""
    from panterra.recipes.nano_run import nano_run

    return export(nano_run(settings, out), out, folder, step=step)


def dry_run_nano(settings: NanoRecipe) -> NanoPlan:
    """Count a run."""
    from panterra.recipes.nano_places import PLACE_BYTES

    places = settings.places_in_all
    parameters = sum(weight.numel() for weight in OlmoEarth(settings.encoder).parameters())
    return NanoPlan(recipe=settings, parameters=parameters, places=places, disk_bytes=places * PLACE_BYTES)


def list_nano() -> list[dict[str, Any]]:
    """Describe the run."""
    recipe = NanoRecipe()
    about = "a v1.2 nano encoder that learns on invented planets, without --data; its weights come with Panterra"
    return [{"name": recipe.name, "about": about, "recipe": asdict(recipe)}]


def show_nano_plan(plan: NanoPlan) -> None:
    """Print a run as it would be."""
    recipe = plan.recipe
    print(f"{recipe.name}\n")
    show_table(
        ["part", "width", "depth", "heads", "parameters"],
        [("encoder", recipe.encoder.dim, recipe.encoder.depth, recipe.encoder.heads, f"{plan.parameters:,}")],
    )
    print(
        f"\nPlaces: {plan.places:,}, {plan.disk_bytes / 1e9:.2g} GB in the folder of the run\n"
        f"Steps: {recipe.steps:,} of at most {recipe.tokens:,} tokens and {recipe.batch} samples\n"
        "Time: not estimated; start with --steps-now 20 and look at samples_per_s in log.jsonl"
    )
