"""Examples out of arrays in memory, for data that are neither scenes nor a data set that is known here."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float

from panterra.data.labelled import IGNORE, UNDATED, LabelledSample
from panterra.errors import InputError
from panterra.evaluate.probes import ProbeClass
from panterra.finetune.examples import PARTS, Examples, deal
from panterra.finetune.tasks import Task, task_of
from panterra.imagery.labels import distinct_colours
from panterra.modalities import MODALITIES
from panterra.sample import Batch, Observation, to_days

Day = dt.date | str | int | np.datetime64
"""A date, "2023-06-15", or days since 1970-01-01."""


def examples_from_arrays(
    pixels: Mapping[str, np.ndarray | Sequence[np.ndarray]],
    targets: np.ndarray,
    *,
    dates: Mapping[str, Sequence[Day] | Sequence[Sequence[Day]]] | None = None,
    valid: Mapping[str, np.ndarray | Sequence[np.ndarray]] | None = None,
    lonlat: Float[np.ndarray, "n 2"] | None = None,
    pixel_m: float = 10.0,
    task: str | None = None,
    class_names: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
    groups: npt.ArrayLike | None = None,
    block_m: float | None = None,
    name: str = "arrays in memory",
    licence: str | None = None,
    seed: int = 42,
) -> Examples:
    """Make examples of N samples: pixels of each modality by its name, and what is known of each sample.

    Pixels are [N, T, C, H, W], or [N, C, H, W] of one date, or one array per sample where numbers of dates differ.
    Bands and units are those that `MODALITIES` declares; NaN, or False in `valid` [N, T, H, W], is where no data are.
    `dates` are those of all samples [T], or of each; images without are undated. Targets are class codes from 0, -1
    without a label, [N] or [N, H, W]; values, NaN without, [N] or [N, H, W]; or several labels of 0 and 1, [N, K].

    `parts` says of each sample whether it is in "train", "val" or "test". Or they are dealt, three in five, one and
    one, in whole `groups`, such as `splits.spatial_blocks(xy, block_m)`: what lies close together belongs in one.
    """
    known = np.array(targets)
    chosen = _task(task, known)
    count = len(known)
    if not pixels or any(len(values) != count for values in pixels.values()):
        sizes = ", ".join(f"{m}: {len(values)}" for m, values in pixels.items()) or "none"
        raise InputError(f"{count} targets came with samples of {sizes}; give each modality the same samples")
    batches = [_batch(i, pixels, dates or {}, valid or {}, lonlat, pixel_m) for i in range(count)]
    names = _names(chosen, known, class_names)
    if (parts is None) == (groups is None):
        raise InputError(
            "say how samples are dealt: either parts (train, val or test of each), or groups that stay together, such "
            "as spatial_blocks(xy, block_m)"
        )
    blocks = np.arange(count) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    if len(blocks) != count:
        raise InputError(f"{len(blocks)} groups came for {count} samples; give each sample its own")
    dealt = _given(parts, count) if parts is not None else _dealt(chosen, known, blocks, names, seed)

    def read(index: int) -> LabelledSample:
        target = torch.as_tensor(known[index : index + 1])
        whole = chosen.answer == "classes"
        return LabelledSample(
            id=str(index),
            batch=batches[index],
            target=target.to(torch.int64 if whole else torch.float32),
            fold=str(dealt[index]),
        )

    digest = hashlib.sha256(np.ascontiguousarray(known).tobytes() + "".join(dealt).encode())
    for batch in batches:
        for modality, o in batch.observations.items():
            digest.update(modality.encode() + o.pixels.numpy().tobytes() + o.dates.numpy().tobytes())
            digest.update(o.valid.numpy().tobytes())
    window = max(o.pixels.shape[-1] * min(MODALITIES[m].gsd, 10.0) / 10 for m, o in batches[0].observations.items())
    colours = distinct_colours(len(names))
    return Examples(
        task=chosen,
        classes=tuple(
            # Codes start at 1, which leaves 0 for places without data.
            ProbeClass(name=n, code=code, colour=colour)
            for code, (n, colour) in enumerate(zip(names, colours, strict=True), start=1)
        ),
        read=read,
        parts=dealt,
        blocks=blocks,
        block_m=block_m,
        window_px=int(window),
        pixel_m=pixel_m,
        cells=known.shape[1] if chosen.dense else 0,
        about={"dataset": name, "licences": [licence], "seed": seed, "sha256": digest.hexdigest()},
    )


def _task(asked: str | None, targets: np.ndarray) -> Task:
    """Tell the task by type and shape of the targets, and check that they fit the one asked for."""
    kinds = {
        1: ("classification", "scene_regression"),
        2: ("multilabel", "multilabel"),
        3: ("segmentation", "regression"),
    }
    if targets.dtype.kind not in "iubf" or targets.ndim not in kinds or not len(targets):
        raise InputError(
            f"targets are {targets.dtype} {list(targets.shape)}; wanted numbers [N], [N, K] or [N, H, W] (see the "
            "docstring)"
        )
    told = kinds[targets.ndim][targets.dtype.kind == "f"]
    if asked is not None and asked != told:
        what = "values" if targets.dtype.kind == "f" else "codes"
        raise InputError(f"{asked} was asked for, but {what} of shape {list(targets.shape)} are for {told}")
    return task_of(told)


def _names(task: Task, targets: np.ndarray, names: Sequence[str] | None) -> tuple[str, ...]:
    if task.answer == "values":
        return ()
    highest = targets.shape[1] if task.answer == "labels" else int(targets.max()) + 1
    if task.answer == "classes" and targets.min() < IGNORE:
        raise InputError(f"a class code is {targets.min()}; wanted codes from 0, and {IGNORE} where there is no label")
    if names is None:
        return tuple(f"class {k}" for k in range(highest))
    if len(names) < highest or (task.answer == "labels" and len(names) > highest):
        raise InputError(f"{len(names)} class names came for {highest} classes; name them all, in order of their codes")
    return tuple(names)


def _batch(
    index: int,
    pixels: Mapping[str, np.ndarray | Sequence[np.ndarray]],
    dates: Mapping[str, Sequence[Day] | Sequence[Sequence[Day]]],
    valid: Mapping[str, np.ndarray | Sequence[np.ndarray]],
    lonlat: np.ndarray | None,
    pixel_m: float,
) -> Batch:
    observations = {}
    for modality, values in pixels.items():
        own = np.asarray(values[index], np.float32)
        own = own[None] if own.ndim == 3 else own
        seen = None if modality not in valid else np.asarray(valid[modality][index], bool)
        days = _days(dates[modality], index) if modality in dates else [UNDATED] * len(own)
        if seen is not None:
            seen = seen[None] if seen.ndim == 2 else seen
        observations[modality] = Observation.build(own, days, seen)
    place = None if lonlat is None else torch.as_tensor(np.asarray(lonlat, np.float64)[index : index + 1])
    return Batch(observations=observations, lonlat=place, pixel_m=pixel_m)


def _days(dates: Sequence[Day] | Sequence[Sequence[Day]], index: int) -> list[int]:
    """Give the days of one sample, of dates that all share or that each has its own."""
    own = dates
    if len(dates) and not isinstance(dates[0], (str, dt.date, int, np.integer, np.datetime64)):
        own = dates[index]  # type: ignore[assignment]
    return [_day(day) for day in own]  # type: ignore[arg-type]


def _day(day: Day) -> int:
    if isinstance(day, np.datetime64):
        return int(day.astype("datetime64[D]").astype(np.int64))
    return to_days(day) if isinstance(day, (str, dt.date)) else int(day)


def _given(parts: Sequence[str], count: int) -> np.ndarray:
    given = np.array([str(part) for part in parts])
    if len(given) != count or set(given.tolist()) - set(PARTS):
        came = ", ".join(sorted(set(given.tolist())))
        raise InputError(f"{len(given)} parts came ({came}); wanted train, val or test for each of {count} samples")
    if missing := [part for part in PARTS if part not in given]:
        raise InputError(f"no sample is in {' and '.join(missing)}; each part needs some")
    return given


def _dealt(task: Task, targets: np.ndarray, blocks: np.ndarray, names: Sequence[str], seed: int) -> np.ndarray:
    if task.answer == "values":
        return deal(blocks, None, names, seed)
    if task.answer == "labels":
        held = [np.flatnonzero(row > 0.5) for row in targets]
    else:
        held = [row[row >= 0].reshape(-1).astype(np.int64) for row in targets.reshape(len(targets), -1)]
    labelled = np.array([len(codes) > 0 for codes in held])
    dealt = np.full(len(targets), "train", dtype="<U5")
    # What has no label teaches nothing wherever it is.
    dealt[labelled] = deal(blocks[labelled], [codes for codes in held if len(codes)], names, seed)
    return dealt
