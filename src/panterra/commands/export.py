"""What `panterra export` does: load, standardise, export."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from panterra.errors import InputError
from panterra.evaluate.probes import load_probe
from panterra.imagery.stac import open_scene
from panterra.mapping.areas import common_grid
from panterra.mapping.export import export as export_encoder
from panterra.mapping.export_looks import CALIBRATION, Calibration
from panterra.mapping.standards import in_blocks
from panterra.models.exported import Engine, Exported, Precision
from panterra.models.features import Fitted
from panterra.models.weights import Model, load_model
from panterra.sample import Batch, Observation


def export(
    model: str | Path,
    out: Path,
    *,
    engine: Engine,
    modalities: Sequence[str],
    dates: int,
    window_px: int,
    patch_m: float,
    dtype: Precision,
    batch: str = "dynamic",
    statistics: str | None = None,
    calibration: str | None = None,
    random: int | None = None,
    overwrite: bool = False,
    note: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Export a model by its name; give what was written, and how equal it is, as plain JSON. Raises InputError."""
    encoder = load_model(model, random=random)
    if isinstance(encoder, Exported):
        raise InputError(f"{model} is an export already; give the model that it was made from")
    if not isinstance(encoder, Model):
        raise InputError(f"{model} is a network of another package; export takes OlmoEarth and AnySat models")
    if batch != "dynamic" and not (batch.isdecimal() and int(batch)):
        raise InputError(f"batch is {batch!r}; wanted a number from 1, or dynamic")
    exported, equality = export_encoder(
        standardised(encoder, modalities, statistics),
        out,
        engine=engine,
        modalities=modalities,
        dates=dates,
        window_px=window_px,
        patch_m=patch_m,
        dtype=dtype,
        batch=None if batch == "dynamic" else int(batch),
        calibration=None if calibration is None else scene_windows(calibration, modalities, dates, window_px),
        overwrite=overwrite,
        note=note,
    )
    return {**asdict(exported.signature), **exported.about}, asdict(equality)


def scene_windows(source: str, modalities: Sequence[str], dates: int, window_px: int) -> Calibration:
    """Cut windows out of a scene, spread over it, with as many of its dates as an export takes, spread over time."""
    scene = open_scene(source)
    if not (names := [name for name in modalities if name in scene.modalities]):
        raise InputError(f"{source} has none of {', '.join(modalities)} to fit ranges to; give another scene")
    box = scene.geobox(10.0)
    height, width = box.shape
    if min(height, width) < window_px:
        raise InputError(f"{source} has {height} x {width} pixels, and windows have {window_px}; give a larger scene")
    places = [(y, x) for y in _spread(height, window_px) for x in _spread(width, window_px)]

    def read() -> Iterator[Batch]:
        for y, x in places:
            batch = scene.batch(box[y : y + window_px, x : x + window_px], names)
            yield replace(batch, observations={m: _some_dates(o, dates) for m, o in batch.observations.items()})

    return Calibration(source=source, batches=read())


def _spread(size: int, window: int) -> list[int]:
    """Place as many windows along a side as make a square of CALIBRATION, or as many as there is room for."""
    count = min(math.isqrt(CALIBRATION), size // window)
    return [round(i * (size - window) / max(1, count - 1)) for i in range(count)]


def _some_dates(o: Observation, dates: int) -> Observation:
    steps = o.dates.shape[1]
    chosen = torch.linspace(0, steps - 1, min(steps, dates)).round().long()
    return Observation(pixels=o.pixels[:, chosen], dates=o.dates[:, chosen], valid=o.valid[:, chosen])


def standardised(encoder: Model, modalities: Sequence[str], source: str | None) -> Model:
    """Give an encoder the statistics that it lacks, from a probe that carries them or from a scene."""
    if source is None:
        return encoder
    if not isinstance(encoder, Fitted):
        raise InputError(f"{encoder.name} has statistics of its own; leave out those of {source}")
    if (Path(source) / "model.safetensors").is_file():
        return encoder.with_statistics(_of_probe(source))
    scene = open_scene(source)
    seen = [name for name in modalities if name in scene.modalities]
    if absent := [name for name in encoder.missing_statistics(modalities) if name not in seen]:
        raise InputError(f"{source} has no {absent[0]}; fit the statistics to a scene that has all of {modalities}")
    return encoder.with_statistics(encoder.fit_statistics(in_blocks(scene, common_grid(scene, encoder, seen), seen)))


def _of_probe(folder: str) -> Mapping[str, Any]:
    source = load_probe(folder).source
    if source is None or not source.statistics:
        raise InputError(f"the probe in {folder} carries no statistics; fit them to a scene instead")
    return source.statistics
