"""Products with weights in whole numbers of eight bits, the ranges of what they multiply fitted to images.

The graph says so in ONNX's own words (QuantizeLinear and DequantizeLinear around each product), from which an engine
takes its kernels. Weights have one symmetric scale per output channel, inputs one range each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panterra.models.exported import compile_openvino
from panterra.sample import Batch

CALIBRATION = 16
"""How many windows the ranges are fitted to."""
NARROW = 64
"""Products with fewer channels on either side stay as they are: turning their inputs takes as long as they do."""
NORMS = ("LayerNormalization", "InstanceNormalization", "GroupNormalization")

Ranges = dict[str, tuple[float, float]]
"""Of a tensor by its name, 0 inside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Images that ranges are fitted to, in windows of the export's size."""

    source: str
    """Where they are from, for the record."""
    batches: Iterable[Batch]


def quantise(path: Path, seen: Iterable[Mapping[str, np.ndarray]], out: Path) -> int:
    """Write the graph of a file with its products in int8, and say how many there are.

    Ranges span all that occurs in the inputs `seen`.
    """
    import onnx

    model = onnx.load(path)
    model.graph.ClearField("value_info")  # shapes that the exporter's own clean-up made untrue
    found = products(model.graph)
    replace_products(model.graph, found, input_ranges(model, {node.input[0] for node in found}, seen, out))
    onnx.save(model, out)
    return len(found)


def products(graph: Any) -> list[Any]:
    """List the products with weights behind the first normalisation.

    What is before it has the range of pixels, of which the next image may have brighter ones.
    """
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    behind, found = set[str](), []
    for node in graph.node:
        if node.op_type in NORMS or behind.intersection(node.input):
            behind.update(node.output)
        if node.op_type not in ("MatMul", "Gemm") or node.input[0] not in behind:
            continue
        shape = weights.get(node.input[1], ())
        if len(shape) == 2 and min(shape) >= NARROW:
            found.append(node)
    return found


def input_ranges(model: Any, names: Iterable[str], seen: Iterable[Mapping[str, np.ndarray]], beside: Path) -> Ranges:
    """Run a model on inputs and give the least and largest value of tensors; its graph goes to a file `beside`."""
    import onnx

    watched, names = onnx.ModelProto(), sorted(names)
    watched.CopyFrom(model)
    for name in names:
        for reduce, end in (("ReduceMin", "least"), ("ReduceMax", "largest")):
            output = f"{name}.{end}"
            watched.graph.node.append(onnx.helper.make_node(reduce, [name], [output], keepdims=0))
            watched.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, []))
    onnx.save(watched, beside)
    del watched
    run = compile_openvino(beside, {"INFERENCE_PRECISION_HINT": "f32"})
    beside.unlink()
    rows = []
    for inputs in seen:
        result = run(dict(inputs))
        rows.append([[float(result[f"{name}.{end}"]) for end in ("least", "largest")] for name in names])
    ends = np.array(rows)
    low, high = np.minimum(ends[..., 0].min(0), 0.0), np.maximum(ends[..., 1].max(0), 0.0)
    return dict(zip(names, zip(low.tolist(), high.tolist(), strict=True), strict=True))


def replace_products(graph: Any, found: Iterable[Any], ranges: Ranges) -> None:
    """Put each product's input and weights into int8 and back, which engines read as one product in int8."""
    from onnx.helper import make_node
    from onnx.numpy_helper import from_array, to_array

    weights = {tensor.name: tensor for tensor in graph.initializer}
    chosen, nodes, written = {node.output[0] for node in found}, list[Any](), set[str]()

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(from_array(value, name))
        return name

    def through(name: str, steps: Iterable[Any]) -> str:
        if name not in written:
            nodes.extend(steps)
            written.add(name)
        return f"{name}.dequantised"

    def of_input(name: str) -> Iterable[Any]:
        low, high = ranges[name]
        scale = max(high - low, 1e-12) / 255
        zero = round(-low / scale)
        kind = constant(f"{name}.scale", np.array(scale, "f4")), constant(f"{name}.zero", np.array(zero, "u1"))
        yield make_node("QuantizeLinear", [name, *kind], [f"{name}.quantised"], name=f"{name}.quantise")
        yield make_node("DequantizeLinear", [f"{name}.quantised", *kind], [f"{name}.dequantised"])

    def of_weight(name: str, flipped: bool) -> Iterable[Any]:
        value = to_array(weights[name])
        whole, scale = whole_numbers(value.T if flipped else value)
        kind = constant(f"{name}.quantised", whole), constant(f"{name}.scale", scale)
        yield make_node("DequantizeLinear", list(kind), [f"{name}.dequantised"], axis=1)

    for node in graph.node:
        if node.output[0] not in chosen:
            nodes.append(node)
            continue
        flipped = any(a.name == "transB" and a.i for a in node.attribute)
        x, weight = node.input[:2]
        both = [through(x, of_input(x)), through(weight, of_weight(weight, flipped))]
        bias = node.input[2:]
        product = f"{node.output[0]}.product" if bias else node.output[0]
        nodes.append(make_node("MatMul", both, [product], name=node.name))
        if bias:
            nodes.append(make_node("Add", [product, bias[0]], [node.output[0]]))
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def whole_numbers(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round a matrix [K, N] to int8 with a scale for each of its N columns; give both."""
    scale = np.abs(weight).max(0) / 127
    scale[scale == 0] = 1.0
    return np.rint(weight / scale).astype(np.int8), scale.astype(np.float32)
