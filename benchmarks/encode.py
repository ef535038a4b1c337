"""How fast the OlmoEarth encoder is, beside the plain version of it, with the same weights in one run.

    python benchmarks/encode.py                       # every case
    python benchmarks/encode.py --sizes nano --threads 1

One JSON line per case. "plain" is the specification's path for complete data, "plain_sorted" its general one, which
sorts tokens by their masks and hands a mask to the attention. Rates are medians over interleaved repeats; memory is the
growth of the process's peak while one call runs, each in a process of its own. The machine's matrix-product rate is
measured in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing as mp
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from olmoearth_plain import PlainOlmoEarth
from panterra.models.olmoearth import OlmoEarth
from panterra.models.weights import load_model

CASES: dict[str, dict[str, Any]] = {
    "s2 64px 1 date patch 8": {"modalities": {"sentinel2_l2a": 12}, "px": 64, "dates": 1, "patch": 8, "batch": 4},
    "s2 64px 1 date patch 4": {"modalities": {"sentinel2_l2a": 12}, "px": 64, "dates": 1, "patch": 4, "batch": 4},
    "s2+s1+landsat 32px 12 dates patch 4": {
        "modalities": {"sentinel2_l2a": 12, "sentinel1": 2, "landsat": 11},
        "px": 32,
        "dates": 12,
        "patch": 4,
        "batch": 2,
    },
    "s2 128px 4 dates patch 8": {"modalities": {"sentinel2_l2a": 12}, "px": 128, "dates": 4, "patch": 8, "batch": 4},
}


def make_inputs(case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (case["batch"], case["px"], case["px"], case["dates"])
    inputs = {m: torch.randn(*size, bands, generator=generator) for m, bands in case["modalities"].items()}
    months = torch.arange(case["dates"]) % 12
    stamps = torch.stack([torch.full_like(months, 15), months, torch.full_like(months, 2023)], dim=-1)
    return inputs, stamps.expand(case["batch"], -1, -1).contiguous()


def load(name: str, *, dtype: torch.dtype | None = None) -> OlmoEarth:
    model = load_model(name, random=0, dtype=dtype)
    assert isinstance(model, OlmoEarth)
    return model


def runners(name: str, case: dict[str, Any], which: str) -> Callable[[], Any]:
    dtype = torch.bfloat16 if which == "bfloat16" else None
    model = load(name, dtype=dtype)
    inputs, stamps = make_inputs(case)
    patch = case["patch"]
    if which in ("plain", "plain_sorted"):
        plain = PlainOlmoEarth(load(name))
        if which == "plain":
            return lambda: plain(inputs, stamps, patch_px=patch)
        grid = (case["batch"], case["px"] // patch, case["px"] // patch, case["dates"])
        visible = {m: torch.ones(*grid, len(model.config.groups(m)), dtype=torch.bool) for m in inputs}
        return lambda: plain(inputs, stamps, patch_px=patch, visible=visible)
    ours = {m: x.permute(0, 3, 4, 1, 2).contiguous().to(model.norm.weight.dtype) for m, x in inputs.items()}
    return lambda: model(ours, stamps, patch_px=patch, attention="published_fast")


def gigaflops(name: str, case: dict[str, Any]) -> float:
    """Count the multiply-adds of one call, two operations each: layers and attention."""
    model = load(name)
    c = model.config
    tokens, embedding = 0, 0.0
    patches = (case["px"] // case["patch"]) ** 2 * case["dates"]
    for m in case["modalities"]:
        for s, bands in enumerate(c.groups(m)):
            tokens += patches
            pixels = patches * c.base_patch_px**2
            for a, b in zip((len(bands), *c.pixel_hidden), c.pixel_hidden, strict=False):
                embedding += 2 * pixels * a * b
            weight = model.state_dict()[f"patch_embeddings.{m}.{s}.proj.weight"]
            embedding += 2 * patches * weight.numel()
    hidden = int(c.dim * c.mlp_ratio)
    layers = 2 * tokens * (4 * c.dim**2 + 2 * c.dim * hidden) + 4 * tokens**2 * c.dim
    return float(case["batch"] * (embedding + c.depth * layers) / 1e9)


def matrix_peak(dtype: torch.dtype) -> float:
    """Measure this machine's rate for the widest layer of base, in GFLOP/s."""
    x, w = torch.randn(2048, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
    times = [timed(lambda: torch.nn.functional.linear(x, w)) for _ in range(12)]
    return 2 * 2048 * 768 * 3072 / statistics.median(times[2:]) / 1e9


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_memory(name: str, case: dict[str, Any], which: str, threads: int) -> float:
    """MB by which one call raises the peak of a fresh process that already holds the model."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (name, case, which, threads))


def _memory(name: str, case: dict[str, Any], which: str, threads: int) -> float:
    torch.set_num_threads(threads)
    run = runners(name, case, which)
    with torch.inference_mode():
        run()  # the libraries' own pages and buffers
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start the peak anew
        before = _status("VmRSS")
        run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(name: str, label: str, case: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    kinds = ("plain", "plain_sorted", "float32", "bfloat16")
    calls = {kind: runners(name, case, kind) for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    peaks: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    with torch.inference_mode():
        for call in calls.values():
            call()
        begin = time.perf_counter()
        while len(times["plain"]) < 3 or (time.perf_counter() - begin < args.seconds and len(times["plain"]) < 200):
            for kind, call in calls.items():
                times[kind].append(timed(call))
            if len(times["plain"]) % 3 == 1:
                peaks["float32"].append(matrix_peak(torch.float32))
                peaks["bfloat16"].append(matrix_peak(torch.bfloat16))
    median = {kind: statistics.median(values) for kind, values in times.items()}
    work = gigaflops(name, case)
    row: dict[str, Any] = {"model": name, "case": label, "batch": case["batch"], "threads": args.threads}
    for kind in kinds:
        row[f"{kind}_samples_per_s"] = round(case["batch"] / median[kind], 2)
    for kind in ("float32", "bfloat16"):
        row[f"{kind}_speedup"] = round(
            statistics.median(a / b for a, b in zip(times["plain"], times[kind], strict=True)), 2
        )
        row[f"{kind}_speedup_over_sorted"] = round(
            statistics.median(a / b for a, b in zip(times["plain_sorted"], times[kind], strict=True)), 2
        )
        row[f"{kind}_gflops"] = round(work / median[kind], 1)
        row[f"{kind}_peak_fraction"] = round(work / median[kind] / statistics.median(peaks[kind]), 3)
    if args.memory:
        for kind in kinds:
            row[f"{kind}_peak_mb"] = round(peak_memory(name, case, kind, args.threads), 1)
    return row


def agree(name: str, case: dict[str, Any]) -> float:
    """The largest difference between the two, which must be rounding."""
    plain, ours = (runners(name, case, kind)() for kind in ("plain", "float32"))
    with torch.inference_mode():
        return max(float((ours.tokens[m] - x).abs().max()) for m, x in plain.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["nano", "tiny", "base"])
    parser.add_argument("--versions", nargs="+", default=["v1", "v1.2"])
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for size in args.sizes:
        for version in args.versions:
            for index in args.cases:
                label, case = list(CASES.items())[index]
                name = f"olmoearth-{version}-{size}"
                row = measure(name, label, case, args)
                if index == 0:
                    row["largest_difference"] = agree(name, case)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
