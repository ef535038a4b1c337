"""Features on disk, found again by what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from panterra.energy import measure_energy
from panterra.errors import InputError
from panterra.evaluate.benchmark import (
    BATCH,
    Benchmark,
    Kind,
    Normalisation,
    Pooling,
    Role,
    batches_of,
    extract,
    fit,
    normalised,
    own_statistics,
)
from panterra.evaluate.published_statistics import Statistics
from panterra.evaluate.sweep import Table
from panterra.files import alive, file_checksum, open_array, write_whole
from panterra.models.features import Encoder
from panterra.models.weights import passport

Advance = Callable[[int, int], None]
KEY_LENGTH = 32
INCIDENTAL = ("name", "device", "licence", "source")
"""What a model says of itself that changes no number where its weights have a checksum."""


def key_of(about: Mapping[str, Any]) -> str:
    """Name something by all that it was made from."""
    text = json.dumps(about, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A folder of arrays, each beside a JSON file that says what it is and what it cost."""

    folder: Path

    def has(self, about: Mapping[str, Any]) -> bool:
        """Say whether an array is there as it was written; one that is damaged is to be made again."""
        path = self._path(about)
        try:
            told = json.loads(path.with_suffix(".json").read_text("utf-8"))
            return path.is_file() and "cost" in told and told.get("sha256") in (None, file_checksum(path))
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return False

    def read(self, about: Mapping[str, Any]) -> Tensor:
        """Open an array; its numbers are read from disk as they are used."""
        # Copy on write: torch wants memory that it might write to.
        return torch.from_numpy(np.load(self._path(about), mmap_mode="c"))

    def cost(self, about: Mapping[str, Any]) -> dict[str, float]:
        """Give the seconds and watt hours of the pass that made an array, and perhaps others beside it."""
        cost: dict[str, float] = json.loads(self._path(about).with_suffix(".json").read_text("utf-8"))["cost"]
        return cost

    def writer(self, about: Mapping[str, Any], count: int) -> Writer:
        """Start an array of `count` rows, which is there once it is finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*.part"):
            if not alive(int(left.name.split(".")[-2])):
                left.unlink(missing_ok=True)
        return Writer(self._path(about), about, count)

    def _path(self, about: Mapping[str, Any]) -> Path:
        return self.folder / f"{key_of(about)}.npy"


class Writer:
    """An array that grows on disk row by row under a temporary name."""

    def __init__(self, path: Path, about: Mapping[str, Any], count: int) -> None:
        self.path, self.about, self.count, self.done = path, about, count, 0
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._array: np.memmap[Any, Any] | None = None

    def add(self, rows: Tensor) -> None:
        """Append rows, which must be of one shape."""
        values = rows.cpu().numpy()
        if self._array is None:
            shape = (self.count, *values.shape[1:])
            self._array = open_array(self._temporary, values.dtype, shape)
        self._array[self.done : self.done + len(values)] = values
        self.done += len(values)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of a row; None before the first."""
        return None if self._array is None else self._array.shape[1:]

    def finish(self, cost: Mapping[str, float]) -> None:
        """Put the array in its place."""
        assert self._array is not None
        assert self.done == self.count
        self._array.flush()
        self._array = None
        told = {"about": self.about, "cost": cost, "sha256": file_checksum(self._temporary)}
        write_whole(self.path.with_suffix(".json"), json.dumps(told, indent=1, default=str) + "\n")
        self._temporary.replace(self.path)

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._array = None
        self._temporary.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Which features of a sample are meant."""

    kind: Kind
    pooling: Pooling
    normalisation: Normalisation
    patch_m: float
    shown: tuple[tuple[str, str], ...]
    """The data set's modalities, and what the model takes them for (`benchmark.seen_by`)."""
    dense: str | None = None
    """The modality whose sub-patches are meant, as the model calls it; None: the model's choice."""

    @property
    def pass_key(self) -> tuple[Any, ...]:
        """What views share that one pass of the encoder gives."""
        return self.normalisation, self.patch_m, self.shown, self.dense or ""

    def about(self) -> dict[str, Any]:
        """Give plain values; those of views that leave the choice to the model name what they always did."""
        plain = asdict(self)
        return plain if self.dense is not None else {k: v for k, v in plain.items() if k != "dense"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Features of a benchmark by a model, made where they are not on disk already."""

    encoder: Encoder
    model: Mapping[str, Any]
    """What the numbers depend on (`identity`)."""
    benchmark: Benchmark
    store: Store
    device: str = "cpu"

    def prepare(self, views: Sequence[View], progress: Advance | None = None) -> None:
        """Embed every split for views that are not on disk, with as few passes of the encoder as possible."""
        fitted: dict[tuple[Any, ...], tuple[Encoder, Statistics | None]] = {}
        for role in self.benchmark.splits:
            missing = [v for v in dict.fromkeys(views) if not self.store.has(self._about(role, v))]
            if not self.store.has(self._about(role, None)) and not missing:
                missing = list(views[:1])
            ordered = sorted(missing, key=lambda v: repr(v.pass_key))
            for _, group in groupby(ordered, key=lambda v: v.pass_key):
                self._embed(role, tuple(group), fitted, progress)

    def table(self, role: Role, view: View) -> Table:
        """Open features and targets of a split."""
        x, y = (self.store.read(self._about(role, v)) for v in (view, None))
        return Table(x=x, y=y)

    def cost(self, view: View) -> dict[str, float]:
        """Add up what embedding all splits took, when it was done."""
        parts = [self.store.cost(self._about(role, view)) for role in self.benchmark.splits]
        return {name: sum(part[name] for part in parts) for name in ("seconds", "wh")}

    def published(self, view: View) -> dict[str, list[list[float]]]:
        """Give the published statistics that a view is normalised by, as plain numbers."""
        found = own_statistics(self.benchmark, dict(view.shown))
        return {m: [part.tolist() for part in pair] for m, pair in found.items()}

    def _about(self, role: Role, view: View | None) -> dict[str, Any]:
        """Say what an array is made from; without a view, that of the targets."""
        data = {"panterra": version("panterra"), "data": self.benchmark.contents[role]}
        if view is None:
            return {**data, "kind": "targets"}
        fitted_on: Any = self.benchmark.contents["train"] if view.normalisation == "dataset" else None
        if view.normalisation == "published":
            fitted_on = self.published(view)
        return {**data, **view.about(), "model": self.model, "fitted_on": fitted_on}

    def _embed(
        self,
        role: Role,
        views: Sequence[View],
        fitted: dict[tuple[Any, ...], tuple[Encoder, Statistics | None]],
        progress: Advance | None,
    ) -> None:
        first, labelled = views[0], self.benchmark.splits[role]
        shown, place = dict(first.shown), (first.normalisation, first.shown)
        writers = {v: self.store.writer(self._about(role, v), len(labelled)) for v in views}
        about = self._about(role, None)
        targets = None if self.store.has(about) else self.store.writer(about, len(labelled))
        try:
            with measure_energy() as meter:
                if place not in fitted:
                    train = (batch for _, batch in batches_of(self.benchmark.splits["train"], shown))
                    published = own_statistics(self.benchmark, shown) if first.normalisation == "published" else None
                    fitted[place] = fit(self.encoder, first.normalisation, _moved(train, self.device), published)
                encoder, statistics = fitted[place]
                for number, (samples, batch) in enumerate(batches_of(labelled, shown)):
                    given = batch.to(self.device)
                    if statistics is not None:
                        given = normalised(given, statistics, keep_zeros=first.normalisation == "published")
                    found = extract(encoder, given, [(v.kind, v.pooling) for v in views], first.patch_m, first.dense)
                    for view, writer in writers.items():
                        writer.add(_alike(found[view.kind, view.pooling].float(), writer))
                    if targets is not None:
                        targets.add(_targets([s.target for s in samples], targets))
                    if progress is not None:
                        progress(min((number + 1) * BATCH, len(labelled)), len(labelled))
            cost = {"seconds": meter.report.seconds, "wh": meter.report.kwh * 1000}
            for writer in (*writers.values(), *([targets] if targets is not None else [])):
                writer.finish(cost)
        except BaseException:
            for writer in (*writers.values(), *([targets] if targets is not None else [])):
                writer.abandon()
            raise


def identity(encoder: Encoder) -> dict[str, Any]:
    """Say what an encoder's features depend on, besides what they are made from."""
    about = passport(encoder)
    if "weights_sha256" in about:
        return {name: value for name, value in about.items() if name not in INCIDENTAL}
    return about | {"type": type(encoder).__name__, "by_date": getattr(encoder, "by_date", None)}


def _moved(batches: Iterable[Any], device: str) -> Iterable[Any]:
    return (batch.to(device) for batch in batches)


def _alike(rows: Tensor, writer: Writer) -> Tensor:
    if writer.shape is not None and rows.shape[1:] != writer.shape:
        raise InputError(
            f"samples differ in the shape of their features ({list(writer.shape)} and {list(rows.shape[1:])}); "
            "crop them to one size"
        )
    return rows


def _targets(targets: Sequence[Tensor], writer: Writer) -> Tensor:
    shapes = {tuple(t.shape[1:]) for t in targets} | ({writer.shape} if writer.shape is not None else set())
    if len(shapes) > 1:
        raise InputError(f"samples differ in the shape of their labels ({sorted(map(str, shapes))}); crop to one size")
    rows = torch.cat(list(targets))
    # Class codes fit into two bytes; they are most of what a segmentation set holds.
    return rows.float() if rows.is_floating_point() else rows.to(torch.int16)
