"""Boxes around tree crowns on held-out aerial plots: a baseline without a network, a frozen encoder, fine-tuning.

    python benchmarks/tree_boxes.py run --out trees.jsonl        # three seeds; goes on where it stopped
    python benchmarks/tree_boxes.py table trees.jsonl            # the table of docs/real-tasks.md
    python benchmarks/tree_boxes.py picture trees.jsonl          # docs/images/real-tasks/trees.png

A line of the results is one method with one seed: all boxes that it found in the plots it was tested on, and the score
from which they count, chosen on other plots. A seed sets the split into plots, the random weights and the training.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from panterra.data.labelled import LabelledSample
from panterra.data.stored_pixels import observe
from panterra.evaluate.metrics import Interval
from panterra.evaluate.probes import ProbeClass
from panterra.finetune import precision
from panterra.finetune.augment import Augmentation
from panterra.finetune.boxes import NO_OBJECT, find_boxes
from panterra.finetune.examples import Examples, deal
from panterra.finetune.precision import Matches
from panterra.finetune.run import Settings, finetune
from panterra.finetune.step import Method, Tuning
from panterra.finetune.tasks import task_of
from panterra.imagery.raster import grid_of, read_onto
from panterra.sample import Batch, collate
from real_task_sets import RGB, View
from real_tasks import Split, random_encoder, read_lines, written

PEAKS, HEAD, TUNED = "local maxima of colour", "head on frozen random anysat-tiny", "fine-tuned random anysat-tiny"
SIDE_M, SIDE_PX = 40.0, 160
CELLS, FINE_CELLS = 40, 80
"""Along the side of a plot: those that a head answers for, and those of colour."""
PARTLY = (
    *("HARV_024", "HARV_033", "HARV_035", "HARV_036", "HARV_040", "HARV_042"),
    *("TEAK_045", "TEAK_050", "TEAK_054"),
)
"""Plots with many crowns that nobody boxed, chosen by eye before anything was run; they are left out."""
METHODS: dict[str, tuple[Method, int]] = {HEAD: ("head", 110), TUNED: ("full", 40)}
"""What is trained, and the epochs, which take a minute and a half of one core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plots:
    """Aerial images of 40 m with all crowns."""

    names: tuple[str, ...]
    images: tuple[Tensor, ...]
    """Red, green and blue, [3, 400, 400] at 0.1 m."""
    batches: tuple[Batch, ...]
    """At 0.25 m."""
    boxes: tuple[np.ndarray, ...]
    """Left, top, right and bottom in metres from the upper left corner, [m, 4]."""

    def target(self, index: int) -> Tensor:
        """Give class, centre and size as fractions of the plot, [1, M, 5]."""
        rows = np.full((max(len(b) for b in self.boxes), 5), NO_OBJECT, np.float32)
        left, top, right, bottom = self.boxes[index].T / SIDE_M
        rows[: len(left)] = np.stack(
            [np.zeros_like(left), (left + right) / 2, (top + bottom) / 2, right - left, bottom - top], axis=1
        )
        return torch.from_numpy(rows)[None]


def read_plots(data: Path) -> Plots:
    """Read the plots whose crowns are all in boxes, as far as one can see."""
    folder = data / "neon_trees"
    table = pd.read_csv(folder / "tree_boxes_pixels.csv")
    names, images, batches, boxes = [], [], [], []
    for file, rows in table.groupby("file"):
        name = Path(str(file)).stem
        if name in PARTLY:
            continue
        grid = grid_of(folder / "rgb" / str(file))
        pixels = read_onto(folder / "rgb" / str(file), grid.zoom_to(shape=(SIDE_PX, SIDE_PX)))[0]
        names.append(name)
        images.append(torch.from_numpy(read_onto(folder / "rgb" / str(file), grid)[0]).float())
        seen = observe(RGB.name, pixels[None], [0], bands=("R", "G", "B"))
        batches.append(Batch(observations={RGB.name: seen}))
        boxes.append(rows[["xmin", "ymin", "xmax", "ymax"]].to_numpy(np.float64) * SIDE_M / int(grid.shape[0]))
    return Plots(names=tuple(names), images=tuple(images), batches=tuple(batches), boxes=tuple(boxes))


def split(plots: Plots, seed: int) -> Split:
    """Deal whole plots, those of each region to all parts where it has enough: three in five learn, one each tests."""
    # Florida (OSBS) has a single plot and goes with Massachusetts (HARV).
    regions = [name[:4].replace("OSBS", "HARV") for name in plots.names]
    sites, site = np.unique(regions, return_inverse=True)
    parts = deal(np.arange(len(site)), list(site.reshape(-1, 1)), [str(s) for s in sites], seed)
    return Split(parts=parts, seed=seed)


# What finds boxes -----------------------------------------------------------------------------------------------------

Say = Callable[[int], Tensor]
"""Gives what a method says of a plot: a score for a crown's centre and the shape of its box, [5, cells, cells]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A crown is a square whose colour, on average, is higher than that of the square twice as wide around it."""

    colour: tuple[float, float, float]
    """Weights of red, green and blue."""
    relative: bool
    """Whether the colour is divided by the brightness."""
    sizes_m: tuple[float, ...]
    """Of each place the one that stands out most."""

    def say(self, plots: Plots, index: int) -> Tensor:
        pixels = plots.batches[index].observations[RGB.name].pixels[0, 0]
        signal = torch.einsum("c,cyx->yx", torch.tensor(self.colour), pixels)
        if self.relative:
            signal = signal / pixels.sum(0).clamp(min=1)
        signal = (signal - signal.mean()) / signal.std()
        cells, cell_m = F.adaptive_avg_pool2d(signal[None, None], FINE_CELLS)[0], SIDE_M / FINE_CELLS
        reach = [round((size / cell_m - 1) / 2) for size in self.sizes_m]
        contrast = torch.cat([_mean_around(cells, r) - _mean_around(cells, 2 * r) for r in reach])
        best, which = contrast.max(0)
        side = torch.tensor(self.sizes_m)[which] / cell_m
        nothing = torch.zeros_like(best)
        return torch.stack([4 * best, nothing, nothing, side.log(), side.log()])


def _mean_around(cells: Tensor, reach: int) -> Tensor:
    return F.avg_pool2d(cells, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)


COLOURS = {(-1.0, 2.0, -1.0), (0.0, 1.0, 0.0), (1.0, 1.0, 1.0), (-1.0, -1.0, -1.0), (1.0, 0.0, -1.0)}
"""Green in excess, green, bright, dark, warm."""
SIZES_M = ((2.5,), (3.5,), (4.5,), (5.5,), (7.5,), (2.5, 3.5, 4.5), (2.5, 3.5, 4.5, 6.5), (2.5, 4.5, 6.5, 9.5))


def peaks(plots: Plots, learn: np.ndarray) -> Say:
    """Choose colour and sizes as they do best on the plots that are learned from."""
    rules = [
        Rule(colour=colour, relative=relative, sizes_m=sizes)
        for colour, relative, sizes in product(sorted(COLOURS), (False, True), SIZES_M)
    ]

    def worth(rule: Rule) -> float:
        return float(precision.ap50([matched(plots, int(i), found(rule.say(plots, int(i)))) for i in learn])[0])

    best = max(rules, key=worth)
    print(f"  {best}: AP50 {worth(best):.2f} where it learned", flush=True)
    return lambda index: best.say(plots, index)


def tuned(plots: Plots, dealt: Split, method: Method, epochs: int) -> Say:
    """Train a decoder that also sees raw pixels, on an encoder that stays random or is trained with it."""

    def read(index: int) -> LabelledSample:
        return LabelledSample(
            id=plots.names[index],
            batch=plots.batches[index],
            target=plots.target(index),
            fold=str(dealt.parts[index]),
        )

    pixel_m = plots.batches[0].pixel_m
    examples = Examples(
        task=task_of("detection"),
        classes=(ProbeClass(name="crown", code=1),),
        read=read,
        parts=dealt.parts,
        blocks=np.arange(len(plots.names)),
        block_m=None,
        window_px=round(SIDE_M / pixel_m),
        pixel_m=pixel_m,
        cells=CELLS,
        about={"dataset": "neon_trees", "seed": dealt.seed},
    )
    encoder = random_encoder("anysat", dealt.seed, View(batches=plots.batches, patch_m=10, new=(RGB,)))
    tuning = Tuning(
        method=method,
        epochs=epochs,
        batch_size=3,
        lr=6e-3,
        encoder_lr=5e-4,
        head_first=0,
        layer_decay=1.0,
        patience=epochs,
        augmentation=Augmentation(),
        seed=dealt.seed,
    )
    settings = Settings(head="conv", hidden=64, skip=True, patch_m=10, tuning=tuning)
    with tempfile.TemporaryDirectory() as folder:
        model = finetune(examples, encoder, Path(folder) / "model", settings).model

    def say(index: int) -> Tensor:
        with torch.inference_mode():
            scores: Tensor = model(collate([plots.batches[index]]))[0]
        return scores

    return say


def found(scores: Tensor) -> np.ndarray:
    """Read boxes off: left, top, right and bottom in metres and the score, best first, [n, 5]."""
    boxes, score, _ = find_boxes(scores)
    return np.concatenate([boxes * SIDE_M / scores.shape[-1], score[:, None]], axis=1)


def matched(plots: Plots, index: int, rows: np.ndarray) -> Matches:
    """Match boxes with the crowns of a plot."""
    kind, truth = np.zeros(len(rows), np.int64), plots.boxes[index]
    return precision.match(rows[:, :4], rows[:, 4], kind, truth, np.zeros(len(truth), np.int64), 1)


def run(data: Path, out: Path, seeds: Sequence[int], methods: Sequence[str]) -> None:
    """Run each method with each seed, and write a line for each that is not there yet."""
    plots, done = read_plots(data), {(line["method"], line["seed"]) for line in read_lines(out)}
    for method, seed in product(methods, seeds):
        if (method, seed) in done:
            continue
        dealt, wall, began = split(plots, seed), time.perf_counter(), time.process_time()
        say = peaks(plots, dealt.of("train")) if method == PEAKS else tuned(plots, dealt, *METHODS[method])
        boxes = {part: {int(i): found(say(int(i))) for i in dealt.of(part)} for part in ("val", "test")}
        line = {
            "method": method,
            "seed": seed,
            "processor_seconds": round(time.process_time() - began, 1),
            "seconds": round(time.perf_counter() - wall, 1),
            "threshold": precision.best_threshold([matched(plots, i, rows) for i, rows in boxes["val"].items()]),
            "plots": [plots.names[i] for i in boxes["test"]],
            "found": [rows.round(4).tolist() for rows in boxes["test"].values()],
        }
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        row = gather(plots, [line])[method]
        print(f"{method} seed {seed}: { {n: written(i) for n, i in row.intervals().items()} }", end=" ")
        print(f"in {line['processor_seconds']} s of the processor", flush=True)


# Tables ---------------------------------------------------------------------------------------------------------------

TITLES = {"ap50": "AP50", "ap": "AP", "f1": "F1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method: its tests with all seeds."""

    tests: list[Matches]
    """Scores as shares of the threshold of their seed, so that those of several models can be ranked together."""
    plot: list[int]
    seed: list[int]

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Give figures with each test counted `weights` [R, n] times."""
        each = precision.average_precision(self.tests, weights)[:, 0]
        counts = precision.counts_at(self.tests, 1.0).sum(1)
        return {"ap50": each[:, 0], "ap": each.mean(1), "f1": precision.f1(weights @ counts)}

    def drawn(self, n: int = 1000) -> dict[str, np.ndarray]:
        """Give figures of resampled plots, each drawn with all its tests."""
        _, member = np.unique(self.plot, return_inverse=True)
        number = int(member.max()) + 1
        times = np.random.default_rng(42).multinomial(number, np.full(number, 1 / number), size=n)
        return self.figures(times[:, member.reshape(-1)].astype(np.float64))

    def together(self) -> dict[str, float]:
        return {name: float(value[0]) for name, value in self.figures(np.ones((1, len(self.tests)))).items()}

    def intervals(self) -> dict[str, Interval]:
        drawn = self.drawn()
        return {name: Interval.of(value, drawn[name]) for name, value in self.together().items()}

    def by_seed(self, name: str) -> list[float]:
        seeds = np.array(self.seed)
        return [float(self.figures((seeds == seed).astype(float)[None])[name][0]) for seed in np.unique(seeds)]

    def of(self, seeds: Collection[int]) -> Row:
        """Keep the tests with some seeds."""
        kept = [n for n, seed in enumerate(self.seed) if seed in seeds]
        return Row(
            tests=[self.tests[n] for n in kept], plot=[self.plot[n] for n in kept], seed=[self.seed[n] for n in kept]
        )

    def against(self, other: Row, name: str) -> Interval:
        """Give a figure less another method's, of the seeds of both, over the same resamples of the same plots."""
        one, two = self.of(other.seed), other.of(self.seed)
        assert (one.plot, one.seed) == (two.plot, two.seed)
        return Interval.of(one.together()[name] - two.together()[name], one.drawn()[name] - two.drawn()[name])


def gather(plots: Plots, lines: Sequence[dict[str, Any]]) -> dict[str, Row]:
    """Sort lines by method and seed, and match their boxes."""
    rows: dict[str, Row] = {}
    for line in sorted(lines, key=lambda line: int(line["seed"])):
        row = rows.setdefault(line["method"], Row(tests=[], plot=[], seed=[]))
        for name, boxes in zip(line["plots"], line["found"], strict=True):
            index = plots.names.index(name)
            own = matched(plots, index, np.array(boxes).reshape(-1, 5))
            row.tests.append(replace(own, score=own.score / line["threshold"]))
            row.plot.append(index)
            row.seed.append(line["seed"])
    return {name: rows[name] for name in (PEAKS, *METHODS) if name in rows}


def table(plots: Plots, lines: Sequence[dict[str, Any]]) -> str:
    """Write the table, in Markdown."""
    rows = gather(plots, lines)
    heads = ("method", "seeds", *TITLES.values(), "AP50, less the baseline's")
    made = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method, row in rows.items():
        cells = {name: written(i) for name, i in row.intervals().items()}
        each = row.by_seed("ap50")
        cells["ap50"] += f" ({', '.join(f'{value:.2f}' for value in each)})"
        less = "" if method == PEAKS else written(row.against(rows[PEAKS], "ap50"), signed=True)
        made.append(f"| {method} | {len(each)} | {' | '.join(cells.values())} | {less} |")
    return "\n".join(made)


# Picture --------------------------------------------------------------------------------------------------------------

TRUE, RIGHT, WRONG = "#ffe14d", "#39e0ff", "#ff3b30"


def picture(plots: Plots, lines: Sequence[dict[str, Any]], out: Path, *, most: int = 3) -> None:
    """Draw the boxes of the first seed's tests from the threshold on, the plots with most crowns first."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch, Rectangle
    from PIL import Image

    first = min(line["seed"] for line in lines)
    shown = {line["method"]: line for line in lines if line["seed"] == first}
    methods = [name for name in (PEAKS, *METHODS) if name in shown]
    tested = [plots.names.index(name) for name in next(iter(shown.values()))["plots"]]
    tested = sorted(tested, key=lambda i: -len(plots.boxes[i]))[:most]
    width, columns = 11.0, 1 + len(methods)
    size = (width, width / columns * len(tested) + 0.7)
    figure, axes = plt.subplots(len(tested), columns, squeeze=False, figsize=size, layout="constrained")
    for row, index in zip(axes, tested, strict=True):
        drawn: list[tuple[str, np.ndarray, list[str]]] = []
        drawn.append((f"{plots.names[index]}: truth", plots.boxes[index], [TRUE] * len(plots.boxes[index])))
        for method in methods:
            line = shown[method]
            rows = np.array(line["found"][line["plots"].index(plots.names[index])]).reshape(-1, 5)
            rows = rows[rows[:, 4] >= line["threshold"]]
            hits = matched(plots, index, rows).hit[:, 0]
            drawn.append((method.replace(" on ", "\non "), rows[:, :4], [RIGHT if hit else WRONG for hit in hits]))
        for ax, (title, boxes, colours) in zip(row, drawn, strict=True):
            ax.imshow(plots.images[index].permute(1, 2, 0).byte().numpy(), extent=(0, SIDE_M, SIDE_M, 0))
            ax.axis("off")
            if row[0] is axes[0, 0] or ax is row[0]:
                ax.set_title(title, fontsize=8)
            for (left, top, right, bottom), colour in zip(boxes, colours, strict=True):
                ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=1.2))
    labels = {TRUE: "crown", RIGHT: "found, overlaps a crown by half or more", WRONG: "found, overlaps none so"}
    entries = [Patch(facecolor="none", edgecolor=colour, label=label) for colour, label in labels.items()]
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), fontsize=8, frameon=False)
    figure.savefig(out, dpi=75)
    plt.close(figure)
    # Photographs in all colours would take a megabyte.
    with Image.open(out) as full:
        full.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--out", type=Path, default=Path("trees.jsonl"))
    runs.add_argument("--seeds", type=int, default=3)
    runs.add_argument("--methods", nargs="+", default=[PEAKS, *METHODS], choices=[PEAKS, *METHODS])
    commands.add_parser("table").add_argument("results", type=Path)
    pictures = commands.add_parser("picture")
    pictures.add_argument("results", type=Path)
    pictures.add_argument("--out", type=Path, default=Path("docs/images/real-tasks/trees.png"))
    for one in commands.choices.values():
        one.add_argument("--data", type=Path, default=Path(os.environ.get("PANTERRA_DATA", "../shared/data")))
    args = parser.parse_args()
    if args.command == "run":
        run(args.data.resolve(), args.out, range(args.seeds), args.methods)
        return
    plots, lines = read_plots(args.data.resolve()), read_lines(args.results)
    if args.command == "table":
        print(table(plots, lines))
    else:
        picture(plots, lines, args.out)


if __name__ == "__main__":
    main()
