"""From imagery and labels, or from a labelled data set, to a fine-tuned model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from panterra.errors import InputError
from panterra.finetune.examples import Examples, examples_from_dataset, examples_from_scenes
from panterra.finetune.heads import HeadKind
from panterra.finetune.run import Result, finetune
from panterra.finetune.step import Tuning
from panterra.imagery.labels import read_labels
from panterra.imagery.stac import open_scene, pixel_metres
from panterra.mapping.run import common_grid
from panterra.models.features import Encoder
from panterra.models.weights import load_model
from panterra.train.logs import progress_bar


def finetune_scenes(
    scenes: Sequence[str],
    labels: Path,
    out: Path,
    *,
    model: str,
    random: int | None,
    column: str | None,
    task: str | None,
    modalities: Sequence[str] | None,
    head: HeadKind,
    skip: bool,
    patch_m: float,
    output_m: float | None,
    window_px: int,
    block_m: float,
    tuning: Tuning,
    device: str,
    country: str | None,
    overwrite: bool,
) -> Result:
    """Fine-tune a model on labels that lie on scenes.

    The answer's cells are pixels of the common grid with the conv head, patches with the others, unless `output_m`.
    """
    encoder = load_model(model, random=random)
    opened = [open_scene(scene) for scene in scenes]
    absent = [name for name in modalities or () if not all(name in scene.modalities for scene in opened)]
    if absent:
        raise InputError(f"not every scene holds {', '.join(absent)}; leave it out, or give other scenes")
    shown = [m for m in encoder.modalities if any(m in s.modalities for s in opened) and m in (modalities or [m])]
    boxes = [common_grid(scene, encoder, modalities) for scene in opened]
    pixel_m = pixel_metres(boxes[0])
    cell_m = output_m if output_m is not None else pixel_m if head == "conv" else patch_m
    cell_px = round(cell_m / pixel_m)
    if cell_px < 1 or abs(cell_px * pixel_m - cell_m) > 1e-6:
        raise InputError(f"cells of {cell_m:g} m are no whole number of pixels of {pixel_m:g} m; choose another size")
    examples = examples_from_scenes(
        opened,
        read_labels(labels, column=column),
        boxes=boxes,
        task=task,
        modalities=shown,
        window_px=window_px,
        cell_px=cell_px,
        block_m=block_m,
        seed=tuning.seed,
    )
    return _finetune(examples, encoder, out, head, skip, patch_m, tuning, device, country, overwrite)


def finetune_dataset(
    dataset: str,
    root: Path,
    out: Path,
    *,
    model: str,
    random: int | None,
    modalities: Sequence[str] | None,
    head: HeadKind,
    skip: bool,
    patch_m: float,
    window_px: int | None,
    limit: int | None,
    tuning: Tuning,
    device: str,
    country: str | None,
    overwrite: bool,
) -> Result:
    """Fine-tune a model on a labelled data set with its own splits."""
    encoder = load_model(model, random=random)
    examples = examples_from_dataset(
        dataset,
        root,
        modalities=modalities or encoder.modalities,
        window_px=window_px,
        limit=limit,
        seed=tuning.seed,
    )
    return _finetune(examples, encoder, out, head, skip, patch_m, tuning, device, country, overwrite)


def _finetune(
    examples: Examples,
    encoder: Encoder,
    out: Path,
    head: HeadKind,
    skip: bool,
    patch_m: float,
    tuning: Tuning,
    device: str,
    country: str | None,
    overwrite: bool,
) -> Result:
    with progress_bar("fine-tuning") as progress:
        return finetune(
            examples,
            encoder,
            out,
            head=head,
            skip=skip,
            patch_m=patch_m,
            tuning=tuning,
            device=device,
            country=country,
            overwrite=overwrite,
            progress=progress,
        )
