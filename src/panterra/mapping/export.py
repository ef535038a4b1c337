"""An encoder as a file that other engines run, published only where it gives what the encoder gives."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import panterra
from panterra.errors import InputError
from panterra.files import file_checksum, unfinished_folder
from panterra.mapping.export_graphs import graph_of
from panterra.mapping.export_int8 import quantise
from panterra.mapping.export_looks import Calibration, example_inputs, looks, planet_samples
from panterra.modalities import MODALITIES
from panterra.models.anysat import AnySat
from panterra.models.anysat_sensors import Sensor, sensor_of
from panterra.models.exported import (
    ENGINES,
    FILES,
    FORMAT,
    Engine,
    Exported,
    Precision,
    Signature,
    open_exported,
)
from panterra.models.features import Features
from panterra.models.olmoearth import OlmoEarth
from panterra.models.weights import MODELS, Model, passport

OPSET = 18
"""Of ONNX: old enough for every engine of the last years."""
MAX_DIFFERENCE = 1e-3
"""What float32 exports may differ from the encoder by, as a share of its features' root mean square."""
MIN_COSINE: Mapping[Precision, float] = {"float32": 0.99999, "bfloat16": 0.98, "int8": 0.95}
"""How similar each patch's vector must be to the encoder's."""

_NEEDS: Mapping[tuple[Engine, Precision], tuple[str, ...]] = {
    ("torch", "float32"): (),
    ("torch", "bfloat16"): (),
    ("onnx", "float32"): ("onnx", "onnxscript", "onnxruntime"),
    ("onnx", "int8"): ("onnx", "onnxscript", "onnxruntime"),
    ("openvino", "float32"): ("onnx", "onnxscript", "openvino"),
    ("openvino", "bfloat16"): ("onnx", "onnxscript", "openvino"),
    ("openvino", "int8"): ("onnx", "onnxscript", "openvino"),
}
"""What writing in a format and type takes; what is not listed cannot be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Equality:
    """How far an export is from the encoder it was made from."""

    max_difference: float
    """The largest, over all numbers of patches and summaries."""
    relative_difference: float
    """The same as a share of the root mean square of the encoder's features."""
    min_cosine: float
    """Of the patch that is least similar to the encoder's."""
    mean_cosine: float
    tolerance: Mapping[str, float]
    """What was allowed."""

    @property
    def passed(self) -> bool:
        """Whether the export may be used in place of the encoder."""
        allowed = self.tolerance.get("relative_difference", float("inf"))
        return self.relative_difference <= allowed and self.min_cosine >= self.tolerance["min_cosine"]


def export(
    model: Model,
    out: str | Path,
    *,
    engine: Engine,
    modalities: Sequence[str],
    dates: int = 4,
    window_px: int = 64,
    patch_m: float = 40,
    dtype: Precision = "float32",
    batch: int | None = None,
    calibration: Calibration | None = None,
    overwrite: bool = False,
    note: Callable[[str], None] | None = None,
) -> tuple[Exported, Equality]:
    """Write an encoder, its normalisation inside, as a folder that `load_model` opens; give it and how equal it is.

    Inputs are windows of `window_px` pixels of 10 m with up to `dates` images of each modality, `batch` of them at a
    time (None: any number). int8 for OpenVINO fits ranges to `calibration`, by default to imagery of the planet. The
    file is opened again and compared with the encoder on imagery of other places of the planet, with and without
    missing data; nothing appears under `out` unless it is whole and equal within the tolerance of its type.
    Raises InputError for what cannot be exported, and for an export that is not equal.
    """
    out, tell = Path(out), note or (lambda text: None)
    _check_request(engine, dtype, out, overwrite=overwrite)
    if calibration is not None and (engine, dtype) != ("openvino", "int8"):
        raise InputError(
            f"{engine} in {dtype} fits no ranges to images; leave calibration out, or write openvino in int8"
        )
    if min(dates, window_px, batch or 1) < 1 or not modalities:
        raise InputError(
            f"{dates} dates, {window_px} px, batch {batch} and modalities {list(modalities)} came; wanted 1 or more"
        )
    if unknown := [m for m in modalities if m not in MODALITIES]:
        raise InputError(f"no modality {unknown[0]!r}; {model.name} takes {', '.join(model.modalities)}")
    if isinstance(model, AnySat) and (missing := model.missing_statistics(modalities)):
        raise InputError(
            f"{model.name} has no statistics of {', '.join(missing)}, which an export needs inside; take them from a "
            "scene or a probe (--statistics)"
        )
    slots = isinstance(model, OlmoEarth) and model.encodings.slots
    signature = Signature(
        modalities=tuple(dict.fromkeys(modalities)),
        dates=dates,
        window_px=window_px,
        patch_m=patch_m,
        batch=batch,
        slots=slots,
    )
    tell("making imagery to compare on")
    samples = planet_samples(signature)
    config = _describe(model, signature, engine, dtype)
    model = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
    with torch.inference_mode():
        wanted = model.encode(samples, patch_m=patch_m)
    with unfinished_folder(out) as fresh:
        tell(f"writing {' and '.join(FILES[engine])}")
        with _quiet():
            _WRITERS[engine](model, signature, fresh / FILES[engine][0], dtype)
            if dtype == "int8":
                config["quantisation"] = _QUANTISERS[engine](model, signature, fresh, calibration)
        config["files"] = {name: file_checksum(fresh / name) for name in FILES[engine]}
        _save(fresh, config)
        tell("comparing it with the encoder")
        equality = compare(wanted, open_exported(fresh).encode(samples, patch_m=patch_m), dtype)
        if not equality.passed:
            raise InputError(
                f"the export differs too much from {model.name}: by {equality.relative_difference:.2g} of the size of "
                f"features, cosine {equality.min_cosine:.4f} at worst, where {dict(equality.tolerance)} is allowed; "
                "nothing was written: choose another dtype or format"
            )
        _save(fresh, config | {"equality": asdict(equality)})
    return open_exported(out), equality


def compare(wanted: Features, found: Features, dtype: Precision) -> Equality:
    """Measure how far features are from those that are wanted. Raises InputError where other patches have data."""
    if not torch.equal(wanted.valid, found.valid):
        raise InputError("the export finds data in other patches than the encoder does; nothing was written")
    a, b = (torch.cat([f.patches[wanted.valid], f.summary[wanted.valid.any(2).any(1)]]) for f in (wanted, found))
    difference = float((a - b).abs().max())
    cosine = F.cosine_similarity(a.double(), b.double(), dim=1)
    tolerance = {"min_cosine": MIN_COSINE[dtype]}
    if dtype == "float32":
        tolerance["relative_difference"] = MAX_DIFFERENCE
    return Equality(
        max_difference=difference,
        relative_difference=difference / float(a.square().mean().sqrt()),
        min_cosine=float(cosine.min()),
        mean_cosine=float(cosine.mean()),
        tolerance=tolerance,
    )


def _check_request(engine: Engine, dtype: Precision, out: Path, *, overwrite: bool) -> None:
    if engine not in ENGINES:
        raise InputError(f"no format {engine!r}; choose one of {', '.join(ENGINES)}")
    if (engine, dtype) not in _NEEDS:
        able = ", ".join(other for format, other in _NEEDS if format == engine)
        raise InputError(f"{engine} cannot be written in {dtype}; choose one of {able}, or another format")
    if absent := [name for name in _NEEDS[engine, dtype] if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"{engine} in {dtype} needs {', '.join(absent)}: pip install {' '.join(absent)}; install panterra[export]"
        )
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; choose another name, or overwrite it (--overwrite)")


def _describe(model: Model, signature: Signature, engine: Engine, dtype: Precision) -> dict[str, Any]:
    about, card = passport(model), MODELS.get(model.name)
    batch = signature.batch or "batch"
    inputs: list[dict[str, Any]] = []
    meaning: dict[str, dict[str, Any]]
    for name, (kind, shape) in signature.inputs().items():
        modality, what = name.rsplit("_", 1)
        spec = MODALITIES[modality]
        meaning = {
            "pixels": {"unit": spec.unit, "bands": list(spec.band_names)},
            "dates": {"unit": "days since 1970-01-01"},
            "valid": {"unit": "true where data"},
            "slots": {"unit": "number of the date on the axis that the modalities share"},
        }
        inputs.append(
            {"name": name, "dtype": str(kind).removeprefix("torch."), "shape": [batch, *shape], **meaning[what]}
        )
    rows = round(signature.window_px * signature.pixel_m / signature.patch_m)
    outputs = [
        {"name": "patches", "dtype": "float32", "shape": [batch, rows, rows, model.dim]},
        {"name": "summary", "dtype": "float32", "shape": [batch, model.dim]},
        {"name": "valid", "dtype": "bool", "shape": [batch, rows, rows]},
    ]
    sensors: dict[str, Sensor] = {}
    if isinstance(model, AnySat):
        sensors = {m: s for m in signature.modalities if (s := sensor_of(m, model.sensors)) is not None}
    packages = ("torch", *_NEEDS[engine, dtype])
    return {
        "format": FORMAT,
        "name": model.name,
        "family": about["family"],
        "dim": model.dim,
        "weights_sha256": about["weights_sha256"],
        "licence": model.licence,
        "terms": card.terms if card else None,
        "source": about["source"],
        "engine": engine,
        "opset": OPSET if engine == "onnx" else None,
        "dtype": dtype,
        "signature": asdict(signature),
        "inputs": inputs,
        "outputs": outputs,
        "normalized_input": model.normalized_input,
        "align_days": model.align_days if isinstance(model, OlmoEarth) else None,
        "statistics": about.get("statistics", {}),
        "sensors": {m: sensor.name for m, sensor in sensors.items()},
        "declared": [asdict(sensor) for sensor in sensors.values() if sensor.declared is not None],
        "versions": {"panterra": panterra.__version__, **{name: version(name) for name in packages}},
    }


def _save(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _trace(
    model: Model, signature: Signature, inputs: Mapping[str, Tensor], *, in_steps: bool
) -> torch.export.ExportedProgram:
    """Record the graph of an encoder."""
    graph = graph_of(model, signature, in_steps=in_steps).eval()
    size = {0: torch.export.Dim("batch", min=1, max=4096)} if signature.batch is None else None
    shapes = dict.fromkeys(inputs, size)
    # Where gradients are on, layers do not cut their work into parts that fit a cache, which the graph would keep.
    with torch.enable_grad():
        graph(dict(inputs))  # tables are made and kept at the first call; they must not be made of traced tensors
        return torch.export.export(graph, (dict(inputs),), dynamic_shapes=(shapes,), strict=False)


def _write_torch(model: Model, signature: Signature, path: Path, dtype: Precision) -> None:
    inputs = example_inputs(model, signature)
    if dtype == "bfloat16":
        model = copy.deepcopy(model).to(torch.bfloat16)
    torch.export.save(_trace(model, signature, inputs, in_steps=False), path)


def _write_onnx(model: Model, signature: Signature, path: Path, dtype: Precision) -> None:
    inputs = example_inputs(model, signature)
    torch.onnx.export(
        _trace(model, signature, inputs, in_steps=True),
        f=path,
        input_names=list(inputs),
        output_names=["patches", "summary", "valid"],
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _write_openvino(model: Model, signature: Signature, path: Path, dtype: Precision) -> None:
    beside = path.with_suffix(".onnx")
    _write_onnx(model, signature, beside, dtype)
    if dtype != "int8":
        _convert(beside, path)


def _convert(onnx: Path, path: Path) -> None:
    """Turn an ONNX file into OpenVINO's two."""
    import openvino

    # The reader of ONNX files is used since the converter of models reports its use over the network.
    found = openvino.Core().read_model(onnx)
    openvino.save_model(found, path, compress_to_fp16=False)
    del found
    onnx.unlink()


def _quantise_onnx(model: Model, signature: Signature, folder: Path, calibration: Calibration | None) -> dict[str, Any]:
    """Put what multiplies weights into int8 as it comes: ONNX Runtime is no faster with ranges fitted beforehand."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / FILES["onnx"][0]
    exact = onnx.load(path)
    exact.graph.ClearField("value_info")  # shapes that the exporter's own clean-up made untrue
    # Only products with weights: scores and means of attention stay as they are.
    quantize_dynamic(
        exact,
        path,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )
    return {"weights": WEIGHTS, "inputs": "uint8, one range per tensor, that of each call"}


def _quantise_openvino(
    model: Model, signature: Signature, folder: Path, calibration: Calibration | None
) -> dict[str, Any]:
    path = folder / FILES["openvino"][0]
    exact, whole = path.with_suffix(".onnx"), path.with_suffix(".int8.onnx")
    windows = 0

    def seen() -> Iterator[dict[str, np.ndarray]]:
        nonlocal windows
        for inputs, real in looks(model, signature, calibration):
            windows += real
            yield {name: x.numpy() for name, x in inputs.items()}

    num = quantise(exact, seen(), whole)
    exact.unlink()
    _convert(whole, path)
    return {
        "weights": WEIGHTS,
        "inputs": "uint8, one range per tensor of all values seen, less their channels' means where that is narrower",
        "products": num,
        "seen": {"source": calibration.source if calibration else "planet", "windows": windows},
    }


_WRITERS: Mapping[Engine, Callable[[Model, Signature, Path, Precision], None]] = {
    "torch": _write_torch,
    "onnx": _write_onnx,
    "openvino": _write_openvino,
}
_QUANTISERS: Mapping[Engine, Callable[[Model, Signature, Path, Calibration | None], dict[str, Any]]] = {
    "onnx": _quantise_onnx,
    "openvino": _quantise_openvino,
}
WEIGHTS = "int8, one scale per output channel"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what exporters tell their own developers from the person in front of the terminal."""
    loggers = [logging.getLogger(name) for name in ("", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
