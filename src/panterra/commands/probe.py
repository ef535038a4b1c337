"""From imagery and labels to a probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from panterra.commands.terminal import note, progress_bar
from panterra.errors import InputError
from panterra.evaluate.class_weights import ClassWeights
from panterra.evaluate.probes import FeatureSource, Kind, Probe, Report, fit_probe
from panterra.evaluate.splits import spatial_blocks
from panterra.imagery.labels import LabelSamples, of_dates, read_labels, sample_labels
from panterra.imagery.raster import Colour
from panterra.imagery.stac import open_scene
from panterra.mapping import run
from panterra.mapping.embeddings import EmbeddingStore, dates_of, open_embeddings
from panterra.models.weights import load_model
from panterra.train.parallel import choose_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A probe, the labels that it was fitted on and what it scores."""

    probe: Probe
    report: Report
    samples: LabelSamples
    """Those that lie on the embeddings and have data."""
    left_out: int
    """Labelled patches without data."""
    other_dates: int
    """Labels left out because they are of other dates than the imagery."""


def as_embeddings(
    source: str, *, beside: Path, model: str | None, random: int | None, patch_m: float, device: str = "cpu"
) -> EmbeddingStore:
    """Open stored embeddings, or embed a scene into `<beside>-embeddings.zarr`."""
    where = choose_device(device)
    if Path(source).suffix.lower() in (".zarr", ".tif", ".tiff") or (Path(source) / "zarr.json").is_file():
        return open_embeddings(source)
    if model is None:
        open_scene(source)
        raise InputError(f"{source} is a scene; say with --model what to embed it with, or embed it first")
    out = beside.with_name(f"{beside.name}-embeddings.zarr")
    with progress_bar("embedding") as progress:
        encoder = load_model(model, random=random, device=where)
        return run.embed(source, encoder, out, patch_m=patch_m, overwrite=True, progress=progress, note=note)


def fit_to_labels(
    store: EmbeddingStore,
    labels: Path,
    *,
    column: str | None,
    kind: Kind,
    split: Literal["blocks", "random"],
    block_m: float,
    folds: int,
    seed: int,
    colours: Mapping[str, Colour] | None = None,
    class_weights: ClassWeights = "none",
) -> Fitted:
    """Fit a probe to the patches under labels; blocks of side `block_m` are learned or tested as a whole.

    `colours` by class name go before those of the labels.
    """
    about, tint = store.about, colours or {}
    dates = dates_of(about)
    known, others = of_dates(read_labels(labels, column=column), dates)
    if others:
        span = f"{dates[0]} to {dates[-1]}"
        if known.raster is None and known.frame.empty:
            raise InputError(f"all {others} labels of {labels} are of other dates than the imagery, {span}")
        note(f"{others} labels are of other dates than the imagery, {span}, and are left out")
    samples = sample_labels(known, store.box)
    if not len(samples):
        raise InputError(f"no label of {labels} lies on the area of {store.path}; check that both show the same place")
    features = store.sample(samples.row, samples.col)
    seen = np.isfinite(features).all(axis=1)
    if not seen.any():
        raise InputError(f"none of the {len(seen)} labelled patches has data in {store.path}; check dates and masks")
    # Codes start at 1, which leaves 0 for places without data.
    target = samples.target + 1 if known.kind == "classes" else samples.target
    kept = LabelSamples(
        row=samples.row[seen],
        col=samples.col[seen],
        target=target[seen],
        group=samples.group[seen],
        xy=samples.xy[seen],
        conflicts=samples.conflicts,
    )
    present = np.unique(kept.target) if known.kind == "classes" else ()
    if lost := [name for code, name in enumerate(known.names, start=1) if code not in present]:
        note(f"no patch with data is labelled {', '.join(lost)}, so the probe does not know what that is")
    probe, report = fit_probe(
        features[seen],
        kept.target,
        kind=kind,
        task=known.kind,
        groups=spatial_blocks(kept.xy, block_m, together=kept.group) if split == "blocks" else None,
        split=split,
        block_m=block_m if split == "blocks" else None,
        folds=folds,
        class_weights=class_weights,
        names={int(code): known.names[code - 1] for code in present},
        colours={int(code): tint.get(known.names[code - 1], known.colours[code - 1]) for code in present},
        source=FeatureSource(
            encoder=about["model"]["name"],
            patch_m=about["patch_m"],
            modalities=tuple(about["modalities"]),
            window_px=about["window_px"],
            statistics=about["model"].get("statistics") or {},
        ),
        seed=seed,
    )
    return Fitted(probe=probe, report=report, samples=kept, left_out=int((~seen).sum()), other_dates=others)


def unseen_mistakes(report: Report) -> str:
    """Say what a test without a mistake leaves open, as intervals cannot: drawing its blocks again shows none either.

    By the rule of three: of n cases without a mistake, at most 3 / n of all have one, with 95 % confidence.
    """
    accuracy = report.metrics.get("accuracy")
    if accuracy is None or accuracy.low < 1:
        return ""
    most, of = min(3 / report.num_groups, 1.0), "blocks" if report.split == "blocks" else "places"
    return (
        f" No mistake was seen; in {report.num_groups} {of} that leaves mistakes in up to {most:.0%} of {of} possible."
    )
