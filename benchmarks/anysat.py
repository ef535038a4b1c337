"""How fast the AnySat encoder is, beside the plain version of it, with the same weights in one run.

    python benchmarks/anysat.py                            # every case, base size, one thread
    python benchmarks/anysat.py --cases 0 1 --rounds 9     # two cases
    python benchmarks/anysat.py --work training            # a forward and a backward pass in training mode
    python benchmarks/anysat.py --kinds plain float32 int8 --cases 0 1 2 3 4    # exported in int8 too

One JSON line per case. Times are processor time, which minds less what else the machine does: medians over interleaved
rounds, and speed-ups are medians of the ratios of one round. Memory is the growth of the process's peak while one call
runs, each in a process of its own. "of_peak" is the rate of the operations that a variant needs over this machine's
rate of float32 matrix products (2,048 x 768 by 768 x 3,072), measured in the same rounds. "int8" is what
`panterra export --format openvino --dtype int8` writes for the case, ranges fitted to the planet; other exports are in
`benchmarks/export.py`.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import multiprocessing as mp
import statistics
import time
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anysat_plain import PlainAnySat
from panterra.mapping.export import export
from panterra.mapping.export_looks import planet_samples
from panterra.modalities import MODALITIES
from panterra.models.anysat import AnySat, Encoded, anysat_config
from panterra.models.anysat_projectors import Input
from panterra.models.anysat_sensors import SENSORS
from panterra.models.exported import Signature
from panterra.sample import Batch, Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Some tiles of random numbers."""

    sensors: Mapping[str, tuple[int, int]]
    """Number of dates and side in pixels."""
    scale: int
    """Side of a patch in units of 10 m."""
    batch: int
    padded: int = 0
    """How many of a series' dates are padding: zeros on day 0."""
    padding_counts: bool = False
    """Padding is attended to like data, as published; otherwise it takes no part."""

    def values(self) -> dict[str, Tensor]:
        """[B, T, C, Y, X] for each sensor."""
        generator = torch.Generator().manual_seed(0)
        values = {
            name: torch.randn(self.batch, dates, SENSORS[name].channels, side, side, generator=generator)
            for name, (dates, side) in self.sensors.items()
        }
        for name, days in self.days().items():
            values[name][days == 0] = 0
        return values

    def days(self) -> dict[str, Tensor]:
        """[B, T] for each series."""
        return {
            name: F.pad(torch.linspace(1, 360, dates - self.padded).long(), (0, self.padded)).expand(self.batch, -1)
            for name, (dates, _) in self.sensors.items()
            if SENSORS[name].dated
        }

    def valid(self) -> dict[str, Tensor]:
        """Say which dates count [B, T], where not all do."""
        return {name: days > 0 for name, days in self.days().items()} if self.padded and not self.padding_counts else {}

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Input]:
        days, valid = self.days(), self.valid()
        return {
            name: Input(
                values=x.to(dtype),
                days=days.get(name),
                valid=valid[name][:, :, None, None].expand(-1, -1, *x.shape[-2:]) if name in valid else None,
            )
            for name, x in self.values().items()
        }

    def patches(self) -> int:
        name, (_, side) = next(iter(self.sensors.items()))
        sensor = SENSORS[name]
        return int(side // (sensor.kernel * sensor.cells * self.scale)) ** 2


S2, TREES = {"s2": (24, 6)}, {"aerial": (1, 300), "s2": (24, 6), "s1-asc": (24, 6)}
CASES = {
    "s2 24 dates 6x6 patch 10": Case(sensors=S2, scale=1, batch=4),
    "s2 24 dates 6x6 patch 20": Case(sensors=S2, scale=2, batch=4),
    "aerial+s2+s1 60 m patch 10": Case(sensors=TREES, scale=1, batch=4),
    "aerial+s2+s1 60 m patch 20": Case(sensors=TREES, scale=2, batch=4),
    "s2 12 dates 32x32 patch 20": Case(sensors={"s2": (12, 32)}, scale=2, batch=2),
    "s2 24 dates, half of them padding, 6x6 patch 10": Case(sensors=S2, scale=1, batch=4, padded=12),
    "s2 24 dates, half of them padding that counts, 6x6 patch 10": Case(
        sensors=S2, scale=1, batch=4, padded=12, padding_counts=True
    ),
}
KINDS = ("plain", "float32", "tile", "bfloat16")
"""tile: float32 without the patches' vectors, in encoding alone."""
MODALITY = {"aerial": "aerial", "s2": "sentinel2_l2a", "s1-asc": "sentinel1"}
"""Of the cases' sensors."""


def make_model(size: str) -> AnySat:
    torch.manual_seed(0)
    return AnySat(anysat_config(size), normalized_input=True).eval()


def plain_forward(model: AnySat, case: Case) -> tuple[nn.Module, Callable[[], Tensor]]:
    plain = PlainAnySat(model)
    values, days = case.values(), case.days()
    stills = {name: x if name in days else x[:, 0] for name, x in values.items()}
    return plain, lambda: plain(stills, days, scale=case.scale, valid=case.valid())[0]


def rows(out: Encoded) -> Tensor:
    """The tile's vector and those of its patches [B, 1 + P, D]."""
    return torch.cat([out.tile[:, None], out.patches.flatten(1, 2)], dim=1)


def exported(model: AnySat, case: Case) -> Callable[[], Any]:
    """Write the model as OpenVINO's int8 for the case, and give a call of that."""
    images = tuple(MODALITY[name] for name in case.sensors)
    dates, side = max(dates for dates, _ in case.sensors.values()), min(side for _, side in case.sensors.values())
    signature = Signature(modalities=images, dates=dates, window_px=side, patch_m=10.0 * case.scale, batch=case.batch)
    model = copy(model)
    model.normalized_input = False
    model = model.with_statistics(model.fit_statistics([planet_samples(signature)]))
    shape = {name: getattr(signature, name) for name in ("modalities", "dates", "window_px", "patch_m", "batch")}
    with TemporaryDirectory() as folder:
        found, equality = export(model, Path(folder) / "int8", engine="openvino", dtype="int8", **shape)
    print(f"# least cosine {equality.min_cosine:.5f}", flush=True)
    observations = {}
    for m in images:
        pixels = torch.randn(case.batch, *signature.shape(m), generator=torch.Generator().manual_seed(0))
        for i, band in enumerate(MODALITIES[m].band_names):
            mean, std = model.statistics_of(m).get(band, (0.0, 1.0))
            pixels[:, :, i] = pixels[:, :, i] * std + mean
        days = torch.linspace(19480, 19840, pixels.shape[1]).long().expand(case.batch, -1)
        valid = torch.ones(pixels[:, :, 0].shape, dtype=torch.bool)
        observations[m] = Observation(pixels=pixels, dates=days, valid=valid)
    batch = Batch(observations=observations, pixel_m=signature.pixel_m)
    return lambda: found.encode(batch, patch_m=signature.patch_m)


def encoder(model: AnySat, case: Case, kind: str) -> Callable[[], Any]:
    """Give a call that encodes the case."""
    if kind == "plain":
        return plain_forward(model, case)[1]
    if kind == "int8":
        return exported(model, case)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    return partial(model.to(dtype), case.inputs(dtype), scale=case.scale, patches=kind != "tile")


def trainer(model: AnySat, case: Case, kind: str) -> Callable[[], None]:
    """Give a call that runs a forward and a backward pass in training mode."""
    model.train()
    if kind == "plain":
        return partial(step, *plain_forward(model, case), torch.float32)
    inputs = case.inputs()
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    return partial(step, model, lambda: rows(model(inputs, scale=case.scale)), dtype)


def step(model: nn.Module, forward: Callable[[], Tensor], dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = forward().square().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)


def gigaflops(size: str, case: Case, kind: str) -> float:
    """Count the operations of one forward pass, two for each multiplication in layers, attention and pooling."""
    config, plain = anysat_config(size), kind == "plain"
    d, h, p = config.dim, config.heads, case.patches()
    macs, tokens = 0, 1
    for name, (dates, side) in case.sensors.items():
        sensor = SENSORS[name]
        n = sensor.side(case.scale) ** 2
        if sensor.dated:
            widths = (sensor.channels, d // 8, d // 2, d, 2 * d, d)
            stages = sum(a * b for a, b in itertools.pairwise(widths))
            lifted = dates if plain else dates - case.padded
            macs += side**2 * (lifted * stages + dates * ((128 if plain else 16) + 2) * d + d**2)
        else:
            macs += p * n * (sensor.channels * sensor.kernel**2 * d + 4 * d**2)
        block = 12 * d**2 * (n + 1) + 2 * (n + 1) ** 2 * d
        class_row = 12 * d**2 + 2 * h * d * (n + 1)
        macs += p * (config.depth * block if plain else (config.depth - 1) * block + class_row)
        tokens += p
    macs += config.depth * (12 * d**2 * tokens + 2 * tokens**2 * d)
    queries = 1 if kind == "tile" else 1 + p
    macs += 2 * d**2 * tokens + queries * (9 * d**2 + 2 * tokens * d)
    return case.batch * 2 * macs / 1e9


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def product_rate(dtype: torch.dtype) -> float:
    """Measure matrix products, in billions of operations per second."""
    x, w = torch.randn(2048, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
    times = [seconds(lambda: F.linear(x, w)) for _ in range(6)]
    return 2 * 2048 * 768 * 3072 / statistics.median(times[1:]) / 1e9


def measure(label: str, args: argparse.Namespace) -> dict[str, Any]:
    case, training = CASES[label], args.work == "training"
    left_out = {"tile", "int8"} if training else {"int8"} if case.padded else set()
    kinds = [kind for kind in args.kinds if kind not in left_out]
    build = trainer if training else encoder
    calls: dict[str, Callable[[], Any]] = {kind: build(make_model(args.size), case, kind) for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    rates: list[float] = []
    with torch.inference_mode(not training):
        first = {kind: call() for kind, call in calls.items()}
        for _ in range(args.rounds):
            for kind, call in calls.items():
                rates.append(product_rate(torch.float32))
                times[kind].append(seconds(call))
    rate = statistics.median(rates)
    row: dict[str, Any] = {"model": f"anysat-{args.size}", "work": args.work, "case": label, "batch": case.batch}
    row |= {"threads": args.threads, "rounds": args.rounds, "float32_product_gflops": round(rate, 1)}
    row |= {"bfloat16_product_gflops": round(product_rate(torch.bfloat16), 1)}
    for kind in kinds:
        median = statistics.median(times[kind])
        row[f"{kind}_samples_per_processor_s"] = round(case.batch / median, 2)
        if kind != "plain":
            ratios = (a / b for a, b in zip(times["plain"], times[kind], strict=True))
            row[f"{kind}_speedup"] = round(statistics.median(ratios), 2)
        if not training and kind not in ("bfloat16", "int8"):
            work = gigaflops(args.size, case, kind)
            row |= {f"{kind}_gflop": round(work, 1), f"{kind}_of_peak": round(work / median / rate, 3)}
    if args.memory:
        row |= {f"{kind}_peak_mb": round(peak_memory(label, kind, args), 1) for kind in kinds}
    if not training:
        row["largest_difference"] = float((rows(first["float32"]) - first["plain"]).abs().max())
    return row


def peak_memory(label: str, kind: str, args: argparse.Namespace) -> float:
    """MB by which one call raises the peak of a fresh process that already holds the model."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (args.size, label, kind, args.work == "training", args.threads))


def _memory(size: str, label: str, kind: str, training: bool, threads: int) -> float:
    torch.set_num_threads(threads)
    call = (trainer if training else encoder)(make_model(size), CASES[label], kind)
    with torch.inference_mode(not training):
        call()  # the libraries' own pages and buffers
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start the peak anew
        before = _status("VmRSS")
        call()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=("encoding", "training"), default="encoding")
    parser.add_argument("--size", default="base")
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))))
    parser.add_argument(
        "--kinds", nargs="+", choices=(*KINDS, "int8"), default=list(KINDS), help="plain and float32 among them"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for index in args.cases:
        print(json.dumps(measure(list(CASES)[index], args)), flush=True)


if __name__ == "__main__":
    main()
