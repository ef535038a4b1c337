"""Products in int8: which, with what ranges, and how near to what they were."""

import ctypes
import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from panterra.commands.export import scene_windows
from panterra.errors import InputError
from panterra.mapping import export_int8
from panterra.mapping.export import export
from panterra.mapping.export_int8 import (
    Range,
    fit_range,
    input_ranges,
    products,
    quantise,
    replace_products,
    whole_numbers,
)
from panterra.mapping.export_looks import CALIBRATION, PIXELS, Calibration, _planet, planet_samples
from panterra.modalities import MODALITIES
from panterra.models.anysat_statistics import Moments
from panterra.models.exported import Signature, compile_openvino, open_exported
from panterra.models.weights import load_model
from panterra.planet import write_planet_scene
from test_export import SHAPE, one_date, small_olmoearth

needs_engine = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "openvino")),
    reason="onnx, onnxscript or openvino is not installed",
)


def test_weights_are_rounded_to_the_nearest_step_of_their_column():
    draw = np.random.default_rng(0)
    weight = draw.normal(size=(40, 6)).astype(np.float32) * np.array([1, 10, 1e-3, 0, 5, 1], np.float32)
    whole, scale = whole_numbers(weight)
    assert whole.dtype == np.int8
    assert (np.abs(whole * scale - weight) <= scale / 2 + 1e-9).all()
    assert (np.abs(whole).max(0)[[0, 1, 2, 4, 5]] == 127).all()


@pytest.fixture
def layers(tmp_path, monkeypatch):
    """Three products, the first of them before the only normalisation; their file and what they compute."""
    from onnx import TensorProto, helper, numpy_helper, save

    monkeypatch.setattr(export_int8, "NARROW", 64)
    draw = np.random.default_rng(1)
    weights = {
        "a": draw.normal(size=(64, 64)),
        "b": draw.normal(size=(64, 96)) / 8,
        "c": draw.normal(size=(80, 96)) / 10,
        "bias": draw.normal(size=80),
        "one": np.ones(64),
    }
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    node = helper.make_node
    stored = {"b transposed" if name == "b" else name: x.T.copy() if name == "b" else x for name, x in weights.items()}
    graph = helper.make_graph(
        [
            node("MatMul", ["x", "a"], ["first"]),
            node("LayerNormalization", ["first", "one"], ["normed"], axis=-1),
            # As exporters leave weights that several calls share.
            node("Transpose", ["b transposed"], ["b"], perm=[1, 0]),
            node("MatMul", ["normed", "b"], ["second"]),
            node("Gemm", ["second", "c", "bias"], ["y"], transB=1),
        ],
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 80])],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    path = tmp_path / "layers.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)

    def compute(x: np.ndarray) -> dict[str, np.ndarray]:
        first = x @ weights["a"]
        normed = (first - first.mean(1, keepdims=True)) / np.sqrt(first.var(1, keepdims=True) + 1e-5)
        second = normed @ weights["b"]
        return {"normed": normed, "second": second, "y": second @ weights["c"].T + weights["bias"]}

    return path, compute


@needs_engine
def test_products_behind_a_normalisation_are_quantised(layers, tmp_path):
    import onnx

    path, compute = layers
    x = np.random.default_rng(2).normal(size=(200, 64)).astype(np.float32)
    seen = [{"x": x[i : i + 50]} for i in range(0, 200, 50)]
    wanted = compute(x)
    model = onnx.load(path)
    ranges = input_ranges(model, products(model.graph), seen, tmp_path / "watched.onnx")
    assert ranges.keys() == {"normed", "second"}
    for name, found in ranges.items():
        taken = 0 if found.shift is None else wanted[name].mean(0)
        values = wanted[name] - taken
        np.testing.assert_allclose((found.low, found.high), (values.min(), values.max()), rtol=1e-4)
    assert quantise(path, seen, tmp_path / "int8.onnx") == 2
    graph = onnx.load(tmp_path / "int8.onnx").graph
    kinds = {t.name: t.data_type for t in graph.initializer if t.name in ("a", "b.quantised", "c.quantised", "b", "c")}
    assert kinds == {"a": 1, "b.quantised": 3, "c.quantised": 3}
    y = compile_openvino(tmp_path / "int8.onnx", {})({"x": x})[0]
    error = np.abs(y - wanted["y"]).max() / wanted["y"].std()
    assert 1e-4 < error < 0.1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["int8.onnx", "layers.onnx"]


def test_a_range_leaves_out_what_all_have_in_common_where_that_is_much():
    low, high, mean = np.array([[[0.0, 5], [-1, 4]], [[1.0, 7], [1, 6]], [[0.5, 6], [0, 5]]])
    found = fit_range(low, high, mean)
    np.testing.assert_array_equal(found.shift, [0.25, 5.5])
    assert (found.low, found.high) == (-1.5, 1.5)  # of the second channel, as the first spans -1.25 to 0.75
    # As ReLU gives: all start at 0, so taking the means off would only spread the ends.
    found = fit_range(np.zeros((1, 2)), np.array([[4.0, 4]]), np.array([[1.0, 2]]))
    assert (found.low, found.high, found.shift) == (0, 4, None)


@needs_engine
def test_inputs_that_are_much_alike_lose_less(layers, tmp_path):
    import onnx

    path, compute = layers
    draw = np.random.default_rng(3)
    x = (draw.normal(size=64) + 0.05 * draw.normal(size=(200, 64))).astype(np.float32)
    seen = [{"x": x[:150]}]
    wanted = compute(x)["y"][150:]

    def error(file: Path) -> float:
        return float(np.square(compile_openvino(file, {})({"x": x[150:]})[0] - wanted).mean())

    quantise(path, seen, tmp_path / "int8.onnx")
    model = onnx.load(path)
    found = products(model.graph)
    ranges = input_ranges(model, found, seen, tmp_path / "watched.onnx")
    assert all(given.shift is not None for given in ranges.values())
    values = {"normed": compute(x[:150])["normed"], "second": compute(x[:150])["second"]}
    whole = {name: Range(low=float(v.min()), high=float(v.max())) for name, v in values.items()}
    replace_products(model.graph, found, whole)
    onnx.save(model, tmp_path / "whole.onnx")
    assert error(tmp_path / "int8.onnx") < 0.5 * error(tmp_path / "whole.onnx")


def test_the_planet_comes_in_units_of_the_data_that_a_model_knows():
    signature = Signature(modalities=("sentinel2_l2a", "sentinel1"), dates=4, window_px=1, patch_m=10, batch=8)
    model = load_model("anysat-tiny", random=0)
    statistics = model.fit_statistics([planet_samples(replace(signature, window_px=24))])
    at = statistics["s2"]["channels"].index("B08")
    statistics["s2"]["mean"][at], statistics["s2"]["std"][at] = 30_000.0, 70.0
    model = model.with_statistics(statistics)
    batches = _planet(model, signature)
    assert len(batches) == PIXELS
    moments = Moments(12)
    for batch in batches:
        moments.add(batch.observations["sentinel2_l2a"].pixels, batch.observations["sentinel2_l2a"].valid)
    found = moments.close(MODALITIES["sentinel2_l2a"].band_names)
    wanted = model.statistics_of("sentinel2_l2a")
    assert wanted["B08"] == (30_000.0, 70.0)
    for band, mean, std in zip(found.channels, found.mean, found.std, strict=True):
        if band in wanted:  # AnySat leaves out two
            assert (mean, std) == pytest.approx(wanted[band], rel=1e-3)


class SignalStack(ctypes.Structure):
    """What `sigaltstack` tells."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack():
    """Measure the stack of this thread for signals, 0 where it has none of its own."""
    stack = SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.sp, stack.size


@needs_engine
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_openvino_leaves_the_callers_signals_alone(tmp_path):
    """With its small stack a worker that ended, or Ctrl-C, killed the process."""
    before = signal_stack()
    exported, _ = export(small_olmoearth(), tmp_path / "out", engine="openvino", **SHAPE)
    exported.encode(planet_samples(exported.signature), patch_m=exported.signature.patch_m)
    assert signal_stack() == before


@needs_engine
@pytest.mark.slow
def test_openvino_in_int8(tmp_path, monkeypatch):
    monkeypatch.setattr(export_int8, "NARROW", 16)
    model, out = small_olmoearth(), tmp_path / "out"
    exported, equality = export(model, out, engine="openvino", dtype="int8", **SHAPE)
    assert equality.passed
    assert equality.relative_difference > 1e-4, "nothing was rounded"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.bin", "model.xml"]
    about = json.loads((out / "config.json").read_text())["quantisation"]
    assert about["seen"] == {"source": "planet", "windows": 2 * CALIBRATION}
    assert about["products"] >= 4
    assert open_exported(out).about["quantisation"] == about
    # Of one window and a batch of two, which is filled up.
    some = Calibration(source="here", batches=[one_date(planet_samples(exported.signature))] * 2)
    other, _ = export(model, out, engine="openvino", dtype="int8", batch=3, calibration=some, overwrite=True, **SHAPE)
    assert other.about["quantisation"]["seen"] == {"source": "here", "windows": 16}


def test_a_scene_gives_windows_to_fit_to(tmp_path):
    scene = write_planet_scene(
        tmp_path / "scene", size_px=40, dates=("2023-04-28", "2023-05-20", "2023-07-22"), labels=5
    )
    found = scene_windows(str(scene), ["sentinel2_l2a", "landsat"], dates=2, window_px=16)
    assert found.source == str(scene)
    batches = list(found.batches)
    assert len(batches) == 4
    days = batches[0].observations["sentinel2_l2a"].dates
    assert all(b.observations["sentinel2_l2a"].pixels.shape == (1, 2, 12, 16, 16) for b in batches)
    assert torch.equal(days[0, 1] - days[0, 0], torch.tensor(85))
    with pytest.raises(InputError, match="has 40 x 40 pixels, and windows have 64"):
        scene_windows(str(scene), ["sentinel2_l2a"], dates=2, window_px=64)
    with pytest.raises(InputError, match="has none of landsat"):
        scene_windows(str(scene), ["landsat"], dates=2, window_px=16)
    with pytest.raises(InputError, match="fits no ranges to images"):
        export(small_olmoearth(), tmp_path / "out", engine="torch", calibration=found, **SHAPE)
