"""How fast one step of OlmoEarth's pretraining is, beside the plain version of it, from the same weights in one run.

    python benchmarks/pretrain.py                          # every case and the loader
    python benchmarks/pretrain.py --models v1-nano --cases 0 --threads 1
    python benchmarks/pretrain.py --cases 2 3 --no-memory  # crops as the official recipes draw them
    python benchmarks/pretrain.py --cases 0 --batch 32     # samples of a step; the official micro-batch is 32 or 64

One JSON line per case. A step is forward pass, loss, backward pass and AdamW. Times are medians over interleaved steps,
as processor time and on the clock; speed-ups are medians of the ratios of neighbouring steps' processor times, which do
not mind what else the machine does. Memory is the growth of the process's peak over a process that holds the model, its
gradients and AdamW's moments, and the whole peak, each in a process of its own. Both versions then train on the same
batches, and the largest relative difference of their losses is given. The plain version's drop path and dropped bands
are left out, so ours are off.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from panterra.data.olmoearth_h5 import (
    LENGTH,
    TOKEN_BUDGET,
    PretrainingBatches,
    Sample,
    draw_crop_size,
    num_dates,
    open_corpus,
    write_corpus,
)
from panterra.modalities import MODALITIES
from panterra.models.normalize import normalize_olmoearth
from panterra.models.olmoearth import OlmoEarthConfig, released_config
from panterra.models.predictor import predictor_config
from panterra.objectives.latent_mim import MASKED_NEGATIVES_LOSS, V1_LOSS, LatentMIM, LatentMIMConfig, View, Views
from panterra.objectives.masked_batches import MaskedBatches
from panterra.objectives.masking import TIME_MASKING, V1_MASKING, make_masks
from panterra.train.optim import Optimisation, make_optimisers
from pretrain_plain import PlainLatentMIM

MODELS = ("v1-nano", "v1.2-nano", "v1-tiny", "v1.2-tiny")
KINDS = ("plain", "float32", "bfloat16")
PATCH_PX = 4
TILE_PX, TILES = 128, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Crops of nine modalities."""

    batch: int
    side_patches: int
    dates: int
    patch_px: int = PATCH_PX
    gaps: bool = False
    """Whether each date of a series is missing one time in six, and each map of a sample one time in four."""


def draw_cases(count: int, *, gaps: bool) -> tuple[Case, ...]:
    """Draw crops as the official recipes do: patches of 1 to 8 px, 1 to 12 a side, dates for 2,250 tokens of v1."""
    config, rng = released_config("v1", "nano"), np.random.default_rng(0)
    dates = partial(num_dates, budget=TOKEN_BUDGET, modalities=config.modalities, groups=config.groups)
    sizes = [
        draw_crop_size(rng, tile_px=TILE_PX, patch_px=range(1, 9), side_patches=range(1, 13), dates=dates)
        for _ in range(count)
    ]
    return tuple(
        Case(batch=4, side_patches=size.side_patches, dates=size.dates, patch_px=size.patch_px, gaps=gaps)
        for size in sizes
    )


CASES = {
    "4 x 4 patches, 6 dates": (Case(batch=4, side_patches=4, dates=6),),
    "6 x 6 patches, 9 dates": (Case(batch=8, side_patches=6, dates=9),),
    "crops as in the recipes, nothing missing": draw_cases(6, gaps=False),
    "crops as in the recipes, with gaps": draw_cases(6, gaps=True),
}


def make_model(name: str) -> LatentMIM:
    version, size = name.split("-")
    encoder = replace(released_config(version, size), drop_path=0.0)
    torch.manual_seed(0)
    return LatentMIM(
        LatentMIMConfig(
            encoder=encoder,
            predictor=predictor_config(encoder),
            loss=V1_LOSS if version == "v1" else MASKED_NEGATIVES_LOSS,
            contrast_weight=0.1 if version == "v1" else 0.05,
            band_dropout=0.0,
        )
    ).train()


def make_views(name: str, case: Case, seed: int) -> Views:
    """Draw a batch of noise and the version's masks."""
    g = torch.Generator().manual_seed(seed)
    config = released_config(*name.split("-"))
    masking = V1_MASKING if name.startswith("v1-") else TIME_MASKING
    dates = {m: case.dates if MODALITIES[m].kind == "series" else 1 for m in config.modalities}
    grid, side = (case.batch, case.side_patches, case.side_patches), case.side_patches * case.patch_px
    inputs = {
        m: torch.randn(case.batch, t, len(MODALITIES[m].bands), side, side, generator=g) for m, t in dates.items()
    }
    missing = {}
    for m, t in dates.items():
        share = (1 / 6 if MODALITIES[m].kind == "series" else 1 / 4) if case.gaps else 0.0
        gone = torch.rand(case.batch, t, generator=g) < share if share else torch.zeros(case.batch, t, dtype=torch.bool)
        missing[m] = gone[:, None, None, :, None].expand(*grid, t, len(config.groups(m)))
    stamps = torch.tensor([[15, i % 12, 2021] for i in range(case.dates)]).expand(case.batch, -1, -1)
    masks = [make_masks(missing, masking, generator=g) for _ in range(2)]
    return Views(tuple(View(inputs=inputs, timestamps=stamps, masks=m, patch_px=case.patch_px) for m in masks))


def bands_last(views: Views) -> Views:
    """Lay images out as the plain version reads them."""
    inputs = {m: x.permute(0, 3, 4, 1, 2).contiguous() for m, x in views.views[0].inputs.items()}
    return Views(tuple(replace(view, inputs=inputs) for view in views))


def stepper(name: str, kind: str) -> Callable[[Views], float]:
    """Build a model and its optimiser; each call is a step and gives the loss before it."""
    model: nn.Module = make_model(name)
    if kind == "plain":
        model = PlainLatentMIM(model).train()  # type: ignore[arg-type]
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimiser: torch.optim.Optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.02)
    else:
        (optimiser,) = make_optimisers(model, Optimisation(lr=1e-4, weight_decay=0.02, steps=1, warmup_steps=0))

    def step(views: Views) -> float:
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
            out = model(views)
        loss: torch.Tensor = out if kind == "plain" else out.total
        loss.backward()
        optimiser.step()
        return loss.item()

    return step


def measure(name: str, label: str, cases: tuple[Case, ...], args: argparse.Namespace) -> dict[str, object]:
    kinds = ("plain", *(kind for kind in KINDS if kind in args.kinds))
    steps = {kind: stepper(name, kind) for kind in kinds}
    batches = [make_views(name, case, seed) for seed, case in enumerate(cases)]
    cpu: dict[str, list[float]] = {kind: [] for kind in kinds}
    wall: dict[str, list[float]] = {kind: [] for kind in kinds}
    for kind, step in steps.items():
        step(given(batches[0], kind))
    begin, least = time.perf_counter(), max(3, len(cases))
    for views in cycle(batches):
        turns = len(cpu["plain"])
        if turns % len(cases) == 0 and turns >= least and (time.perf_counter() - begin > args.seconds or turns >= 50):
            break
        for kind, step in steps.items():
            mine = given(views, kind)
            start = time.process_time(), time.perf_counter()
            step(mine)
            cpu[kind].append(time.process_time() - start[0])
            wall[kind].append(time.perf_counter() - start[1])
    batch = cases[0].batch
    row: dict[str, object] = {"model": name, "case": label, "batch": batch, "threads": args.threads}
    row["steps"] = turns
    for kind in kinds:
        row[f"{kind}_cpu_s"] = round(statistics.median(cpu[kind]), 3)
        row[f"{kind}_samples_per_s"] = round(batch / statistics.median(wall[kind]), 2)
        row[f"{kind}_samples_per_cpu_s"] = round(batch / statistics.median(cpu[kind]), 2)
        if kind != "plain":
            ratios = [a / b for a, b in zip(cpu["plain"], cpu[kind], strict=True)]
            row[f"{kind}_speedup"] = round(statistics.median(ratios), 2)
            row[f"{kind}_speedup_quartiles"] = [round(float(x), 2) for x in np.quantile(ratios, [0.25, 0.75])]
            row[f"{kind}_speedup_of_sums"] = round(sum(cpu["plain"]) / sum(cpu[kind]), 2)
    for kind in kinds if args.memory else ():
        with mp.get_context("spawn").Pool(1) as pool:
            figures = pool.apply(peak_memory, (name, cases[-1], kind, args.threads))
            row[f"{kind}_growth_mb"], row[f"{kind}_peak_mb"] = figures
    return row


def given(views: Views, kind: str) -> Views:
    """Lay a batch out as a version reads it."""
    return bands_last(views) if kind == "plain" else views


def peak_memory(name: str, case: Case, kind: str, threads: int) -> tuple[int, int]:
    """MB by which a second step raises this process's peak, and the peak itself."""
    torch.set_num_threads(threads)
    step, views = stepper(name, kind), given(make_views(name, case, 0), kind)
    step(views)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: start the peak anew
    before = _status("VmRSS")
    step(views)
    peak = _status("VmHWM")
    return round((peak - before) / 1024), round(peak / 1024)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def loss_curves(name: str, case: Case, *, length: int = 10) -> dict[str, object]:
    """Train both versions on the same batches, each new."""
    plain, ours = stepper(name, "plain"), stepper(name, "float32")
    batches = [make_views(name, case, seed) for seed in range(length)]
    pairs = [(plain(bands_last(views)), ours(views)) for views in batches]
    return {
        "loss": [round(loss, 5) for _, loss in pairs],
        "largest_relative_difference": float(f"{max(abs(a - b) / a for a, b in pairs):.2g}"),
    }


def write_tiles(root: Path, *, chunk_px: int | None = None) -> Path:
    """Write a corpus in the published layout: tiles of 128 pixels, twelve dates, zstd; in one piece or in squares."""

    def samples() -> Iterator[Sample]:
        rng = np.random.default_rng(0)
        months = np.stack([np.full(LENGTH, 15), np.arange(LENGTH), np.full(LENGTH, 2021)], axis=-1)
        for _ in range(TILES):
            pixels = {m: draw_tile(m, rng) for m in released_config("v1", "nano").modalities}
            yield Sample(latlon=(1.0, 2.0), timestamps=months, pixels=pixels)

    return write_corpus(root, samples(), chunk_px=chunk_px)


def draw_tile(modality: str, rng: np.random.Generator) -> np.ndarray:
    """Draw smooth ground, seasons and noise, of the type and about the compressibility of the real thing."""
    bands, dates = len(MODALITIES[modality].bands), LENGTH if MODALITIES[modality].kind == "series" else 1
    knots = torch.from_numpy(rng.standard_normal((1, bands, 17, 17)))
    ground = torch.nn.functional.interpolate(knots, (TILE_PX, TILE_PX), mode="bilinear")[0].permute(1, 2, 0).numpy()
    if dates == 1:
        kind = np.int32 if modality == "srtm" else np.uint8
        return np.asarray(np.floor(np.abs(ground) * 4)[:, :, None], dtype=kind)
    season = np.sin(np.arange(dates) / dates * 2 * np.pi)[:, None] / 2
    x: np.ndarray = ground[:, :, None] + season + rng.standard_normal((TILE_PX, TILE_PX, dates, bands)) / 10
    if modality == "sentinel1":
        return np.asarray(x - 12, dtype=np.float32)
    return np.asarray((1500 + 400 * x).clip(0), dtype=np.uint16)


def loader(folder: Path, config: OlmoEarthConfig, case: Case) -> MaskedBatches:
    batches = PretrainingBatches(
        [open_corpus(folder)],
        modalities=config.modalities,
        normalise=normalize_olmoearth,
        groups=config.groups,
        budget_groups=released_config("v1", "nano").groups,
        batch_size=case.batch,
        seed=0,
        patch_px=(PATCH_PX,),
        side_patches=(case.side_patches,),
    )
    return MaskedBatches(batches, TIME_MASKING, micro_batch=case.batch)


def deliver_alone(batches: MaskedBatches, *, steps: int = 16) -> float:
    """Count the samples that one process makes in a second of its processor's time."""
    torch.set_num_threads(1)
    len(batches[0])  # files and tables are warm
    begin = time.process_time()
    count = sum(int(views.samples) for step in range(1, steps + 1) for views in batches[step])
    return count / (time.process_time() - begin)


def deliver(batches: MaskedBatches, workers: int, *, steps: int = 16) -> float:
    """Count the samples per second that arrive where nobody computes."""
    torch.set_num_threads(1)
    numbers = range(steps + 2 * max(workers, 1))
    stream = iter(DataLoader(batches, batch_size=None, sampler=numbers, num_workers=workers))
    for _ in range(2 * max(workers, 1)):
        next(stream)  # the workers have started
    begin = time.perf_counter()
    count = sum(int(views.samples) for micros in stream for views in micros)
    return count / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--cases", nargs="*", type=int, default=list(range(len(CASES))))
    parser.add_argument("--batch", type=int, help="samples of a step instead of the case's")
    parser.add_argument("--kinds", nargs="+", default=KINDS[1:], choices=KINDS[1:], help="beside the plain version")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20.0, help="of interleaved steps per case, three at least")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--curves", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--loader", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    say = partial(print, flush=True)
    for index in args.cases:
        label, cases = list(CASES.items())[index]
        cases = tuple(replace(case, batch=args.batch or case.batch) for case in cases)
        fastest = 0.0
        for name in args.models:
            torch.set_num_threads(args.threads)
            row = measure(name, label, cases, args)
            fastest = max(fastest, *(float(str(row[f"{kind}_samples_per_s"])) for kind in args.kinds))
            if args.curves and index == 0:
                row |= loss_curves(name, cases[0])
            say(json.dumps(row))
        if args.loader and len(cases) == 1:
            for chunk_px in (None, 32):
                with tempfile.TemporaryDirectory() as root:
                    folder = write_tiles(Path(root), chunk_px=chunk_px)
                    batches = loader(folder, released_config("v1.2", "nano"), cases[0])
                    row = {"loader": label, "chunk_px": chunk_px, "fastest_model_samples_per_s": fastest}
                    row["samples_per_cpu_s"] = round(deliver_alone(batches), 1)
                    row["samples_per_s"] = {f"{n}_workers": round(deliver(batches, n), 1) for n in (0, 1, 2)}
                    say(json.dumps(row))


if __name__ == "__main__":
    main()
