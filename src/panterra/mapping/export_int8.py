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

NARROW = 128
"""Products with fewer channels on either side stay as they are: turning their inputs takes as long as they do."""
NORMS = ("LayerNormalization", "InstanceNormalization", "GroupNormalization")


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Between what values a tensor is rounded."""

    low: float
    """0 or below."""
    high: float
    """0 or above."""
    shift: np.ndarray | None = None
    """Of each channel [C], taken from it before; None takes nothing."""


Ranges = Mapping[str, Range]
"""Of tensors by their names."""


def quantise(path: Path, seen: Iterable[Mapping[str, np.ndarray]], out: Path) -> int:
    """Write the graph of a file with its products in int8, and say how many there are.

    Ranges span all that occurs in the inputs `seen`, with the channels' means taken off where that is narrower: tokens
    are much alike, so most of what a norm or attention gives is the same for all (Wei et al. 2023, Outlier
    Suppression+).
    """
    import onnx

    model = onnx.load(path)
    model.graph.ClearField("value_info")  # shapes that the exporter's own clean-up made untrue
    found = products(model.graph)
    replace_products(model.graph, found, input_ranges(model, found, seen, out))
    onnx.save(model, out)
    return len(found)


def products(graph: Any) -> list[Any]:
    """List the products with weights behind the first normalisation.

    What is before it has the range of pixels, of which the next image may have brighter ones.
    """
    weights = matrices(graph)
    behind, found = set[str](), []
    for node in graph.node:
        if node.op_type in NORMS or behind.intersection(node.input):
            behind.update(node.output)
        if node.op_type not in ("MatMul", "Gemm") or node.input[0] not in behind:
            continue
        if (weight := weights.get(node.input[1])) and min(weight[0].dims) >= NARROW:
            found.append(node)
    return found


def matrices(graph: Any) -> dict[str, tuple[Any, bool]]:
    """Give the constant matrices by name, and whether the name stands for the transposed one.

    Exporters leave what several calls transpose, as of an encoder that several sensors share, as nodes.
    """
    found = {tensor.name: (tensor, False) for tensor in graph.initializer if len(tensor.dims) == 2}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in found:
            tensor, flipped = found[node.input[0]]
            found[node.output[0]] = tensor, not flipped
    return found


def input_ranges(model: Any, found: Iterable[Any], seen: Iterable[Mapping[str, np.ndarray]], beside: Path) -> Ranges:
    """Run a model on inputs and fit the ranges of what its products multiply; its graph goes to a file `beside`."""
    import onnx

    watched, helper = onnx.ModelProto(), onnx.helper
    watched.CopyFrom(model)
    weights = matrices(model.graph)
    sizes = {node.input[0]: weights[node.input[1]][0].dims[_flipped(node, weights)] for node in found}
    constants = {"rows": np.array([0])} | {f"{name}.shape": np.array([-1, size]) for name, size in sizes.items()}
    watched.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    for name in sizes:
        watched.graph.node.append(helper.make_node("Reshape", [name, f"{name}.shape"], [f"{name}.flat"]))
        for reduce in ("ReduceMin", "ReduceMax", "ReduceMean"):
            output = f"{name}.{reduce}"
            watched.graph.node.append(helper.make_node(reduce, [f"{name}.flat", "rows"], [output], keepdims=0))
            watched.graph.output.append(helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    onnx.save(watched, beside)
    del watched
    run = compile_openvino(beside, {"INFERENCE_PRECISION_HINT": "f32"})
    beside.unlink()
    rows = [
        [
            np.stack([result[f"{name}.{reduce}"] for reduce in ("ReduceMin", "ReduceMax", "ReduceMean")])
            for name in sizes
        ]
        for result in (run(dict(inputs)) for inputs in seen)
    ]
    return {name: fit_range(*np.stack(ends, 1)) for name, ends in zip(sizes, zip(*rows, strict=True), strict=True)}


def fit_range(low: np.ndarray, high: np.ndarray, mean: np.ndarray) -> Range:
    """Fit a range to the least, largest and mean values [looks, C] of channels."""
    shift = mean.mean(0)
    plain, shifted = ((float((low - x).min()), float((high - x).max())) for x in (np.zeros_like(shift), shift))
    narrower = shifted[1] - shifted[0] < plain[1] - plain[0]
    ends = shifted if narrower else plain
    return Range(low=min(ends[0], 0.0), high=max(ends[1], 0.0), shift=shift if narrower else None)


def replace_products(graph: Any, found: Iterable[Any], ranges: Ranges) -> None:
    """Put each product's input and weights into int8 and back, which engines read as one product in int8."""
    from onnx.helper import make_node
    from onnx.numpy_helper import from_array, to_array

    weights, biases = matrices(graph), {tensor.name: tensor for tensor in graph.initializer}
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
        given, scale = ranges[name], max(ranges[name].high - ranges[name].low, 1e-12) / 255
        zero = round(-given.low / scale)
        kind = constant(f"{name}.scale", np.array(scale, "f4")), constant(f"{name}.zero", np.array(zero, "u1"))
        x = name
        if given.shift is not None:
            x = f"{name}.shifted"
            yield make_node("Sub", [name, constant(f"{name}.shift", given.shift)], [x])
        yield make_node("QuantizeLinear", [x, *kind], [f"{name}.quantised"], name=f"{name}.quantise")
        yield make_node("DequantizeLinear", [f"{name}.quantised", *kind], [f"{name}.dequantised"])

    def of_weight(name: str, value: np.ndarray) -> Iterable[Any]:
        whole, scale = whole_numbers(value)
        kind = constant(f"{name}.quantised", whole), constant(f"{name}.scale", scale)
        yield make_node("DequantizeLinear", list(kind), [f"{name}.dequantised"], axis=1)

    for node in graph.node:
        if node.output[0] not in chosen:
            nodes.append(node)
            continue
        x, weight, *bias = node.input
        value = to_array(weights[weight][0])
        value = value.T if _flipped(node, weights) else value
        both = [through(x, of_input(x)), through(weight, of_weight(weight, value))]
        # What a shift takes from the input comes back behind the product, in full precision.
        back = None if (shift := ranges[x].shift) is None else (shift.astype("f8") @ value).astype("f4")
        added = [to_array(biases[name]) for name in bias] + ([] if back is None else [back])
        product = f"{node.output[0]}.product" if added else node.output[0]
        nodes.append(make_node("MatMul", both, [product], name=node.name))
        if added:
            nodes.append(make_node("Add", [product, constant(f"{product}.added", np.sum(added, 0))], [node.output[0]]))
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _flipped(node: Any, weights: Mapping[str, tuple[Any, bool]]) -> bool:
    """Say whether the constant behind a product's weights is [N, K]."""
    return weights[node.input[1]][1] != any(a.name == "transB" and a.i for a in node.attribute)


def whole_numbers(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round a matrix [K, N] to int8 with a scale for each of its N columns; give both."""
    scale = np.abs(weight).max(0) / 127
    scale[scale == 0] = 1.0
    return np.rint(weight / scale).astype(np.int8), scale.astype(np.float32)
