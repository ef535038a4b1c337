"""Encoders that `panterra export` wrote, run by another engine than the one that made them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from panterra.errors import InputError
from panterra.files import file_checksum
from panterra.modalities import MODALITIES
from panterra.models.anysat_convert import sensor_from
from panterra.models.anysat_sensors import declare
from panterra.models.features import Features
from panterra.models.slots import align
from panterra.sample import Batch, Observation

FORMAT = "panterra-export-1"

Engine = Literal["torch", "onnx", "openvino"]
"""torch: a `torch.export` program. onnx: for ONNX Runtime. openvino: OpenVINO's intermediate representation."""
Precision = Literal["float32", "bfloat16", "int8"]

ENGINES: tuple[Engine, ...] = get_args(Engine)
FILES: Mapping[Engine, tuple[str, ...]] = {
    "torch": ("model.pt2",),
    "onnx": ("model.onnx",),
    "openvino": ("model.xml", "model.bin"),
}
PACKAGES: Mapping[Engine, tuple[str, ...]] = {"torch": (), "onnx": ("onnxruntime",), "openvino": ("openvino",)}
"""What an engine needs to run an export."""

Run = Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The shapes that an export takes: they are part of it, unlike those of the model it was made from."""

    modalities: tuple[str, ...]
    dates: int
    """Of each series; fewer are filled up with dates without data, which changes nothing."""
    window_px: int
    patch_m: float
    pixel_m: float = 10.0
    batch: int | None = None
    """Samples at a time; None: any number."""
    slots: bool = False
    """Whether the graph wants each date's number on the time axis that the modalities share (OlmoEarth v1, v1.1)."""

    def shape(self, modality: str) -> tuple[int, int, int, int]:
        """Give T, C, H and W of a modality's pixels."""
        spec = MODALITIES[modality]
        side = round(self.window_px * max(1.0, self.pixel_m / spec.gsd)) if spec.kind in ("series", "still") else 1
        return self.dates if spec.kind in ("series", "weather") else 1, len(spec.bands), side, side

    def inputs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Give type and shape of every input, without the batch axis, in their order."""
        given: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for m in self.modalities:
            t, c, h, w = self.shape(m)
            given[f"{m}_pixels"] = torch.float32, (t, c, h, w)
            given[f"{m}_dates"] = torch.int64, (t,)
            given[f"{m}_valid"] = torch.bool, (t, h, w)
            if self.slots:
                given[f"{m}_slots"] = torch.int64, (t,)
        return given


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An encoder whose shapes, patch size and statistics were fixed when it was exported."""

    name: str
    """The folder it was opened from."""
    dim: int
    signature: Signature
    align_days: int | None
    """How far apart images of different modalities share a slot of the time axis; None for a model without one."""
    statistics: Mapping[str, Any]
    """What the graph standardises by, in the words of the exported model; empty where it has nothing to fit."""
    about: Mapping[str, Any]
    """What the passport of a map says of it."""
    run: Run

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it takes; any of them may be absent from a batch."""
        return self.signature.modalities

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False) -> Features:
        """Embed a batch of the shapes it was exported for. Raises InputError for others."""
        if dense:
            raise InputError(
                f"{self.name} was exported without sub-patch features; use the model itself for dense=True"
            )
        self.check_patches(patch_m)
        inputs = prepare(batch, self.signature, align_days=self.align_days, name=self.name)
        size = self.signature.batch or len(batch)
        parts = [self.run(_fill_up(inputs, start, size)) for start in range(0, len(batch), size)]
        patches, summary, valid = (torch.cat(values)[: len(batch)] for values in zip(*parts, strict=True))
        return Features(patches=patches, summary=summary, valid=valid, patch_m=patch_m)

    def check_patches(self, patch_m: float) -> None:
        """Raise InputError for patches of another size than it was exported for."""
        if abs(patch_m - self.signature.patch_m) > 1e-6:
            raise InputError(
                f"{self.name} was exported for patches of {self.signature.patch_m:g} m, not {patch_m:g} m; "
                f"ask for patch_m={self.signature.patch_m:g} or export the model again"
            )

    def check_windows(self, sides_px: Sequence[int], *, pixel_m: float) -> None:
        """Raise InputError for windows of another size than it was exported for."""
        wanted = self.signature.window_px * self.signature.pixel_m
        if any(abs(side * pixel_m - wanted) > 1e-6 for side in sides_px):
            height, width = (f"{side * pixel_m:g}" for side in sides_px)
            raise InputError(
                f"{self.name} was exported for windows of {wanted:g} x {wanted:g} m, not {height} x {width} m; choose "
                f"window_px={round(wanted / pixel_m)} and an area no smaller, or export the model again"
            )

    def missing_statistics(self, modalities: Iterable[str]) -> tuple[str, ...]:
        """Name nothing: what it standardises by is inside."""
        return ()

    def fit_statistics(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Give those that are inside, whatever the data."""
        return dict(self.statistics)

    def with_statistics(self, statistics: Mapping[str, Any]) -> Self:
        """Give itself, if these are the statistics inside. Raises InputError otherwise."""
        if any(self.statistics.get(key) != value for key, value in statistics.items()):
            raise InputError(
                f"{self.name} standardises by other statistics than those that were asked for; "
                "export the model again with the statistics of this probe"
            )
        return self

    def statistics_of(self, modality: str) -> dict[str, tuple[float, float]]:
        """Give mean and standard deviation of each channel by name, empty where there are none inside."""
        found = self.statistics.get(self.about["sensors"].get(modality))
        return dict(zip(found["channels"], zip(found["mean"], found["std"], strict=True), strict=True)) if found else {}


def prepare(batch: Batch, signature: Signature, *, align_days: int | None, name: str) -> dict[str, Tensor]:
    """Bring a batch to the inputs of a graph: dates and modalities that are absent become invalid.

    `align_days` is that of `Exported`, `name` what an InputError calls it.
    """
    if unknown := [m for m in batch.observations if m not in signature.modalities]:
        raise InputError(f"{name} was exported without {unknown[0]}; it takes {', '.join(signature.modalities)}")
    if abs(batch.pixel_m - signature.pixel_m) > 1e-6:
        raise InputError(
            f"{name} was exported for pixels of {signature.pixel_m:g} m, not {batch.pixel_m:g} m; resample them"
        )
    on_axis = None if align_days is None else time_axis(batch.observations, tolerance_days=align_days)
    inputs: dict[str, Tensor] = {}
    for m in signature.modalities:
        t, c, h, w = signature.shape(m)
        pixels, valid = torch.zeros(len(batch), t, c, h, w), torch.zeros(len(batch), t, h, w, dtype=torch.bool)
        dates, slots = torch.zeros(2, len(batch), t, dtype=torch.int64)
        if (o := batch.observations.get(m)) is not None:
            _check(o, m, signature, name)
            steps = o.pixels.shape[1]
            pixels[:, :steps], valid[:, :steps], dates[:, :steps] = o.pixels, o.valid, o.dates
            if on_axis is not None:
                dates[:, :steps], slots[:, :steps] = on_axis[m]
        inputs |= {f"{m}_pixels": pixels, f"{m}_dates": dates, f"{m}_valid": valid}
        if signature.slots:
            inputs[f"{m}_slots"] = slots
    return inputs


def _check(o: Observation, modality: str, signature: Signature, name: str) -> None:
    t, _, h, w = signature.shape(modality)
    steps, (height, width) = o.pixels.shape[1], o.pixels.shape[-2:]
    if (height, width) != (h, w):
        raise InputError(
            f"{name} was exported for windows of {h} x {w} pixels of {modality}, not {height} x {width}; choose "
            f"window_px={signature.window_px} and an area no smaller, or export the model again"
        )
    if steps > t:
        raise InputError(
            f"{name} was exported for {t} dates of {modality}, and {steps} came; leave some out, or export the model "
            f"again with dates={steps}"
        )


def _fill_up(inputs: Mapping[str, Tensor], start: int, size: int) -> dict[str, Tensor]:
    """Take `size` samples, behind the last one such without any data."""
    parts = {name: x[start : start + size] for name, x in inputs.items()}
    return {name: torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])]) for name, x in parts.items()}


def time_axis(
    observations: Mapping[str, Observation], *, tolerance_days: int
) -> dict[str, tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]]:
    """Give the date and the number of the slot that each image has on the axis of `align`.

    Where an image has no slot, since it has no data, both mean nothing.
    """
    numbered = {}
    for m, o in observations.items():
        number = torch.arange(o.pixels.shape[1], dtype=torch.float32)[:, None, None, None].expand(
            len(o.dates), -1, 1, 1, 1
        )
        some = o.valid.flatten(2).any(2)[..., None, None]
        numbered[m] = Observation(pixels=number, dates=o.dates, valid=some)
    aligned = align(numbered, tolerance_days=tolerance_days)
    days = _to_days(aligned.timestamps)
    found = {}
    for m, o in aligned.observations.items():
        images = observations[m].dates.shape[1]
        source = torch.where(o.valid[:, :, 0, 0], o.pixels[:, :, 0, 0, 0].long(), images)
        slots = source.new_zeros(len(source), images + 1)
        slots = slots.scatter(1, source, torch.arange(source.shape[1]).expand_as(source))[:, :images]
        found[m] = days.gather(1, slots), slots
    return found


def _to_days(timestamps: Int[Tensor, "b t 3"]) -> Int[Tensor, "b t"]:
    day, month, year = timestamps.numpy().transpose(2, 0, 1)
    first = ((year - 1970) * 12 + month).astype("datetime64[M]").astype("datetime64[D]")
    return torch.from_numpy(first.astype(np.int64) + day - 1)


def open_exported(folder: str | Path) -> Exported:
    """Open an encoder that `panterra export` wrote. Raises InputError."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no export of an encoder ({error}); give a folder of panterra export") from None
    if config.get("format") != FORMAT:
        raise InputError(f"{folder} holds {config.get('format')!r}, not {FORMAT!r}; give a folder of panterra export")
    try:
        return _open(folder, config)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'} is incomplete ({error}); export the model again") from None


def _open(folder: Path, config: Mapping[str, Any]) -> Exported:
    for name, checksum in config["files"].items():
        if not (folder / name).is_file() or file_checksum(folder / name) != checksum:
            raise InputError(f"{folder / name} is absent or damaged; copy the folder or export the model again")
    if absent := [name for name in PACKAGES[config["engine"]] if importlib.util.find_spec(name) is None]:
        raise InputError(f"{folder} is run by {absent[0]}, which is not installed: pip install {absent[0]}")
    for sensor in config.get("declared", ()):
        declare(sensor_from(sensor))
    signature = Signature(**{**config["signature"], "modalities": tuple(config["signature"]["modalities"])})
    first = folder / next(iter(config["files"]))
    kept = ("family", "weights_sha256", "licence", "source", "statistics", "sensors", "engine", "dtype")
    about = {key: config[key] for key in kept} | {"exported_from": config["name"], "files": config["files"]}
    return Exported(
        name=str(folder.resolve()),
        dim=config["dim"],
        signature=signature,
        align_days=config["align_days"],
        statistics=config["statistics"],
        about=about | {key: config[key] for key in ("quantisation",) if key in config},
        run=OPENERS[config["engine"]](first, config["dtype"]),
    )


def _open_torch(path: Path, dtype: Precision) -> Run:
    module = torch.export.load(path).module()

    def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            patches, summary, valid = module(dict(inputs))
        return patches, summary, valid

    return run


def _open_onnx(path: Path, dtype: Precision) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its softmax leaves masked keys the smallest number there is, with which products take many times as long.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    # That changes the arithmetic of the thread which calls, so that the thread is one of its own.
    thread = ThreadPoolExecutor(1, thread_name_prefix="onnxruntime")
    session = thread.submit(onnxruntime.InferenceSession, path, options, providers=["CPUExecutionProvider"]).result()

    def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        feed = {wanted.name: inputs[wanted.name].numpy() for wanted in session.get_inputs()}
        patches, summary, valid = thread.submit(session.run, None, feed).result()
        return torch.from_numpy(patches), torch.from_numpy(summary), torch.from_numpy(valid)

    return run


def _open_openvino(path: Path, dtype: Precision) -> Run:
    # Without the hint the processor's fastest type is taken, which is less exact than what was asked for.
    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = compile_openvino(path, hints)

    def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        result = compiled({name: x.numpy() for name, x in inputs.items()})
        patches, summary, valid = (torch.from_numpy(np.array(result[i])) for i in range(3))
        return patches, summary, valid

    return run


def compile_openvino(path: Path, hints: Mapping[str, Any]) -> Callable[[dict[str, np.ndarray]], Any]:
    """Compile a model for the processor, in a thread of its own that also runs it.

    OpenVINO leaves the thread that compiles a small stack for signals, which a handler of Python's overflows: a worker
    that ends, or Ctrl-C, would kill the process.
    """
    import openvino

    thread = ThreadPoolExecutor(1, thread_name_prefix="openvino")
    compiled = thread.submit(lambda: openvino.Core().compile_model(path, "CPU", dict(hints))).result()
    return lambda inputs: thread.submit(compiled, inputs).result()


OPENERS: Mapping[Engine, Callable[[Path, Precision], Run]] = {
    "torch": _open_torch,
    "onnx": _open_onnx,
    "openvino": _open_openvino,
}
