"""What a worker is told, and what it does: tiles of one map, painted in another process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError

from panterra.energy.meter import Usage
from panterra.errors import InputError
from panterra.finetune.model import FineTuned, load_finetuned
from panterra.mapping.blend import Canvas
from panterra.mapping.detector import Detector
from panterra.mapping.parts import Failure
from panterra.mapping.sources import Encoding
from panterra.models import weights
from panterra.models.anysat import AnySat
from panterra.models.exported import Exported
from panterra.models.features import Encoder
from panterra.models.olmoearth import OlmoEarth


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """An encoder as files, and what of its set-up is not in them."""

    folder: Path
    """Where the files are; workers that may be on other machines get `content` instead."""
    tuned: bool
    about: Mapping[str, Any]
    """What the encoder is, so that a worker knows whether it has the same."""
    settings: Mapping[str, Any]
    """Arguments of `load_model`."""
    device: str
    dtype: str | None
    detects: bool = False
    content: Mapping[str, bytes] | None = None

    def carried(self) -> ModelFiles:
        """Take the files along; a worker on a cluster is given one GPU, which is the first that it sees."""
        files = (file for file in self.folder.rglob("*") if file.is_file())
        content = {file.relative_to(self.folder).as_posix(): file.read_bytes() for file in files}
        return replace(self, content=content, device=self.device.partition(":")[0])

    def load(self) -> Encoder:
        """Load the encoder."""
        if self.content is None:
            return self._load(self.folder)
        with tempfile.TemporaryDirectory(prefix="panterra-model-") as name:
            for file, content in self.content.items():
                path = Path(name) / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            return self._load(Path(name))

    def _load(self, folder: Path) -> Encoder:
        dtype = getattr(torch, self.dtype) if self.dtype else None
        if self.tuned:
            model = load_finetuned(folder, device=self.device).to(dtype=dtype)
            return Detector(model=model) if self.detects else model
        return cast(Encoder, weights.load_model(folder, device=self.device, dtype=dtype, **self.settings))


def saved(encoder: Encoder, folder: Path) -> ModelFiles:
    """Save an encoder for workers."""
    if isinstance(encoder, Detector):
        return replace(saved(encoder.model, folder), detects=True)
    about = weights.passport(encoder)
    if isinstance(encoder, Exported):
        return ModelFiles(folder=Path(encoder.name), tuned=False, about=about, settings={}, device="cpu", dtype=None)
    if isinstance(encoder, FineTuned):
        encoder.save(folder, overwrite=True)
        settings: dict[str, Any] = {}
    else:
        assert isinstance(encoder, OlmoEarth | AnySat), encoder.name
        try:
            weights.save_model(encoder, folder)
        except SafetensorError as error:  # what it says of a full disk
            raise OSError(str(error)) from error
        settings = {"normalized_input": encoder.normalized_input}
        if isinstance(encoder, OlmoEarth):
            settings["attention"] = encoder.attention
        else:
            settings["missing"] = encoder.missing
    first = next(encoder.parameters())
    dtype = None if first.dtype == torch.float32 else str(first.dtype).removeprefix("torch.")
    return ModelFiles(
        folder=folder,
        tuned=isinstance(encoder, FineTuned),
        about=about,
        settings=settings,
        device=str(first.device),
        dtype=dtype,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker needs to paint any tile: the plan without its encoder, and files to load that from."""

    work: Encoding
    model: ModelFiles
    threads: int
    """Part of the job: rounding depends on how many there are."""

    def open(self) -> Encoding:
        """Load the encoder, and check that it is the one that was planned with."""
        torch.set_num_threads(self.threads)
        encoder = self.model.load()
        planned = self.model.about
        loaded = weights.passport(encoder.model if isinstance(encoder, Detector) else encoder)
        other = sorted(k for k in {*planned, *loaded} - {"name", "source"} if planned.get(k) != loaded.get(k))
        if other:
            raise InputError(
                f"the encoder's {', '.join(other)} got lost on the way to a worker; leave out where to compute"
            )
        return replace(self.work, encoder=encoder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Painted:
    """A tile as a worker made it."""

    canvas: Canvas
    encoder_seconds: float


Answer = Painted | Failure | InputError
"""An InputError says that a worker cannot work at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a worker answers, and what it has used so far."""

    answer: Answer
    used: Usage


class Painter:
    """A worker: opens the job at its first tile."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._work: Encoding | None = None
        self._started = time.perf_counter()

    def paint(self, row: int, col: int) -> Reply:
        """Paint a tile, by its number along rows and columns."""
        answer = self._paint(row, col)
        return Reply(answer=answer, used=Usage.since(self._started))

    def _paint(self, row: int, col: int) -> Answer:
        try:
            self._work = work = self._work or self._job.open()
        except InputError as error:
            return error
        before = work.encoder_seconds
        canvas = work.canvas(work.lattice.tile(row, col))
        if isinstance(canvas, Failure):
            return canvas
        return Painted(canvas=canvas, encoder_seconds=work.encoder_seconds - before)
