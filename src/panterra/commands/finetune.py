"""From imagery and labels, or from a labelled data set, to a fine-tuned model."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from panterra.commands.terminal import note
from panterra.data.labelled import card_of
from panterra.energy import recorded
from panterra.errors import InputError
from panterra.finetune.examples import Examples, examples_from_dataset, examples_from_scenes
from panterra.finetune.objects import objects_from_scenes
from panterra.finetune.pairs import Periods
from panterra.finetune.run import Result, Settings, finetune
from panterra.finetune.tasks import kind_of, task_of
from panterra.imagery.doctor import nothing_shared
from panterra.imagery.labels import Labels, read_labels
from panterra.imagery.stac import open_scene, pixel_metres
from panterra.mapping.areas import common_grid
from panterra.models.features import Encoder
from panterra.models.sub_patches import divided
from panterra.models.weights import load_model
from panterra.train.logs import progress_bar
from panterra.train.parallel import choose_device


def finetune_scenes(
    scenes: Sequence[str],
    labels: Path,
    out: Path,
    *,
    model: str,
    random: int | None,
    column: str | None,
    task: str | None,
    before: str | None,
    after: str | None,
    size_m: float | None,
    area: Path | None,
    modalities: Sequence[str] | None,
    output_m: float | None,
    window_px: int,
    block_m: float,
    settings: Settings,
) -> Result:
    """Fine-tune a model on labels that lie on scenes.

    The answer's cells are sub-patches where the head looks at these, else pixels of the common grid with the conv head
    and patches with the others, unless `output_m`. Of tasks with one answer per window they are pixels.
    """
    choose_device(settings.device)  # before scenes are read
    encoder = load_model(model, random=random)
    patch_m = settings.patch_m
    sides = divided(encoder).sub_patches_m(patch_m) if settings.sub_patches else {}
    opened = [open_scene(scene) for scene in scenes]
    absent = [name for name in modalities or () if not all(name in scene.modalities for scene in opened)]
    if absent:
        raise InputError(f"not every scene holds {', '.join(absent)}; leave it out, or give other scenes")
    shown = [m for m in encoder.modalities if any(m in s.modalities for s in opened) and m in (modalities or [m])]
    if not shown:
        held = list(dict.fromkeys(m for scene in opened for m in scene.modalities))
        raise InputError(f"{model} cannot be shown the scenes: {'; '.join(nothing_shared(held, encoder.modalities))}")
    boxes = [common_grid(scene, encoder, modalities) for scene in opened]
    pixel_m = pixel_metres(boxes[0])
    if output_m is None and settings.sub_patches:
        finest = min((sides[m] for m in shown if m in sides), default=patch_m)
        # Objects alone may be looked for on cells that are finer than the common grid.
        output_m = finest if task == "detection" else max(finest, pixel_m)
    # Where a window has one answer, cells only tell which labels it holds: small ones should not slip through.
    fine = settings.head == "conv" or (task is not None and not task_of(task).dense)
    cell_m = output_m if output_m is not None else pixel_m if fine else patch_m
    known = read_labels(labels, column=column, kind=kind_of(task))
    periods = _periods(known, before, after)
    shared: dict[str, Any] = {
        "boxes": boxes,
        "modalities": shown,
        "window_px": window_px,
        "block_m": block_m,
        "seed": settings.tuning.seed,
    }
    if task == "detection":
        pair = _one_pair(periods)
        examples = objects_from_scenes(opened, known, size_m=size_m, area=area, periods=pair, cell_m=cell_m, **shared)
        return _finetune(examples, encoder, out, settings)
    if size_m is not None or area is not None:
        raise InputError("a size and an area of labels are for detection; add --task detection, or leave them out")
    cell_px = round(cell_m / pixel_m)
    if cell_px < 1 or abs(cell_px * pixel_m - cell_m) > 1e-6:
        raise InputError(f"cells of {cell_m:g} m are no whole number of pixels of {pixel_m:g} m; choose another size")
    examples = examples_from_scenes(opened, known, task=task, periods=periods, cell_px=cell_px, **shared)
    return _finetune(examples, encoder, out, settings)


def _periods(labels: Labels, before: str | None, after: str | None) -> Periods | list[Periods] | None:
    """Read two periods, or of each label its own where they are the names of columns."""
    if before is None and after is None:
        return None
    if before is None or after is None:
        raise InputError("a comparison needs two periods; give both --before and --after")
    columns = [str(name) for name in labels.frame.columns]
    if before not in columns or after not in columns:
        return Periods(before=before, after=after)
    pairs = zip(labels.frame[before], labels.frame[after], strict=True)
    return [Periods(before=_date_text(one), after=_date_text(other)) for one, other in pairs]


def _one_pair(periods: Periods | list[Periods] | None) -> Periods | None:
    if isinstance(periods, list):
        raise InputError(
            "objects are known all over a window, so they share two periods; give these instead of columns"
        )
    return periods


def _date_text(value: object) -> str:
    """Write what a column holds as text: files give dates as text, numbers or timestamps."""
    return str(value.date()) if isinstance(value, dt.datetime) else str(value)


def finetune_dataset(
    dataset: str,
    root: Path,
    out: Path,
    *,
    model: str,
    random: int | None,
    modalities: Sequence[str] | None,
    window_px: int | None,
    limit: int | None,
    settings: Settings,
) -> Result:
    """Fine-tune a model on a labelled data set with its own splits."""
    choose_device(settings.device)
    encoder = load_model(model, random=random)
    held, wanted = card_of(dataset).modalities, modalities or encoder.modalities
    if not set(held) & set(wanted):
        raise InputError(f"{model} cannot be shown {dataset}: {'; '.join(nothing_shared(held, wanted))}")
    examples = examples_from_dataset(
        dataset,
        root,
        modalities=modalities or encoder.modalities,
        window_px=window_px,
        limit=limit,
        seed=settings.tuning.seed,
    )
    return _finetune(examples, encoder, out, settings)


def _finetune(examples: Examples, encoder: Encoder, out: Path, settings: Settings) -> Result:
    if others := examples.about.get("other_dates"):
        note(f"{others} labels are of other dates than the imagery, and are left out")
    job = recorded("finetune", model=encoder.name, country=settings.country)
    with job, progress_bar("fine-tuning") as progress:
        return finetune(examples, encoder, out, settings, progress=progress)
