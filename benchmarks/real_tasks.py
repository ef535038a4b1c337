"""Held-out figures on small real sets: forest, probes and fine-tuning; every number of docs/real-tasks.md.

    python benchmarks/real_tasks.py run --out results.jsonl           # all sets, three seeds; goes on where it stopped
    python benchmarks/real_tasks.py run eurosat --out results.jsonl --model olmoearth-v1.2-nano
    python benchmarks/real_tasks.py table results.jsonl               # the page's tables

A line of the results is one method on one set with one seed: sums per spatial block of the test part, from which every
figure and interval follows. A seed sets the split into blocks, the random weights, the forest and the training. The
sets are found through PANTERRA_DATA or `--data`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from panterra.data.labelled import LabelledSample
from panterra.errors import InputError
from panterra.evaluate import metrics
from panterra.evaluate.embed import embed_samples, raw_band_statistics, raw_patch_statistics
from panterra.evaluate.metrics import Interval
from panterra.evaluate.probes import Kind, ProbeClass, fit_probe
from panterra.evaluate.scoring import sums_of
from panterra.finetune.augment import Augmentation
from panterra.finetune.examples import Examples, deal
from panterra.finetune.heads import HeadKind
from panterra.finetune.model import FineTuned
from panterra.finetune.run import Result, Settings, finetune
from panterra.finetune.step import Tuning
from panterra.finetune.tasks import task_of
from panterra.models.anysat import AnySat
from panterra.models.anysat_new_sensor import add_modality
from panterra.models.features import Encoder
from panterra.models.weights import load_model
from panterra.sample import collate
from real_task_sets import SETS, Material, View, as_target

FOREST = "random forest on bands"
ARCHITECTURES = {"olmoearth": "olmoearth-v1.2-nano", "anysat": "anysat-tiny"}
AT_MOST = 4_000
"""Cells that the forest learns from; probes take half at most."""
TOGETHER = 32
"""Samples that are embedded at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which samples are learned from and which are asked."""

    parts: np.ndarray
    seed: int

    def of(self, *parts: str) -> np.ndarray:
        return np.flatnonzero(np.isin(self.parts, parts))


def split(material: Material, seed: int) -> Split:
    """Deal whole blocks: three in five to learn from, one to validate, one to test."""
    known = [t[t >= 0].ravel() for t in material.targets] if material.names else None
    return Split(parts=deal(material.blocks, known, material.names, seed), seed=seed)


def random_encoder(family: str, seed: int, view: View) -> Encoder:
    """Draw a family's weights, with projectors for what AnySat does not know."""
    encoder = load_model(ARCHITECTURES[family], random=seed)
    if isinstance(encoder, AnySat):
        torch.manual_seed(seed)
        for modality in view.new:
            add_modality(encoder, modality, like=None)
    return encoder


# Features -------------------------------------------------------------------------------------------------------------


def embed(encoder: Encoder, material: Material, view: View, learn: np.ndarray) -> np.ndarray:
    """Embed all samples: [N, D] of whole samples, [N, h, w, D] of cells."""
    if isinstance(encoder, AnySat):
        batches = [view.batches[i] for i in learn]
        encoder = encoder.with_statistics(encoder.fit_statistics(batches))
    dense = task_of(material.task).dense
    if not material.two_dates:
        return _embed(encoder, view, dense=dense)
    first, second = (_embed(encoder, one_date(view, t), dense=dense) for t in (0, 1))
    return np.concatenate([first, second, np.abs(second - first)], axis=-1)


def _embed(encoder: Encoder, view: View, *, dense: bool) -> np.ndarray:
    groups = [view.batches[i : i + TOGETHER] for i in range(0, len(view.batches), TOGETHER)]
    batches = (collate(group) for group in groups)
    if not dense:
        return embed_samples(encoder, batches, patch_m=view.patch_m)
    # AnySat's cells are finer than its patches.
    if isinstance(encoder, AnySat) and view.new:
        with torch.inference_mode():
            found = [encoder.encode(b, patch_m=view.patch_m, dense=True).dense for b in batches]
        return torch.cat([f for f in found if f is not None]).numpy()
    return embed_samples(encoder, batches, patch_m=view.patch_m, what="patches")


def one_date(view: View, t: int) -> View:
    """Keep one date of each sample."""

    def keep(o: Any) -> Any:
        return replace(o, pixels=o.pixels[:, [t]], dates=o.dates[:, [t]], valid=o.valid[:, [t]])

    shown = [replace(b, observations={m: keep(o) for m, o in b.observations.items()}) for b in view.batches]
    return replace(view, batches=shown)


def bands(material: Material) -> np.ndarray:
    """Describe samples or cells without a model, by statistics of each band and its mean at each date."""
    view = next(iter(material.views.values()))
    groups = [view.batches[i : i + TOGETHER] for i in range(0, len(view.batches), TOGETHER)]
    # Series of several lengths are filled up to one, so all are joined at once.
    if material.forest_m is None:
        return np.concatenate([raw_band_statistics(collate(g)) for g in groups])
    if task_of(material.task).dense:
        return np.concatenate([raw_patch_statistics(collate(g), material.forest_m) for g in groups])
    return raw_patch_statistics(collate(view.batches), material.forest_m)[:, 0, 0]


# What learns ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Features with what is known of them; a row is a sample or a cell."""

    x: np.ndarray
    y: np.ndarray
    """One per row; NaN or -1 where unknown."""
    block: np.ndarray


def rows(material: Material, features: np.ndarray, index: np.ndarray, at_most: int, seed: int) -> Rows:
    """Take labelled rows of some samples, some of too many; a cell has its commonest class or mean."""
    y = np.stack([material.targets[i] for i in index])
    x = features[index]
    block = material.blocks[index]
    if x.ndim == 4:
        y = coarser(y, x.shape[1], classes=len(material.names))
        block = np.repeat(block, x.shape[1] * x.shape[2])
        x = x.reshape(-1, x.shape[-1])
    y = y.reshape(-1)
    known = np.flatnonzero((y >= 0) if material.names else np.isfinite(y))
    drawn = np.sort(np.random.default_rng(seed).permutation(known)[:at_most])
    return Rows(x=x[drawn], y=y[drawn], block=block[drawn])


def coarser(y: np.ndarray, side: int, *, classes: int) -> np.ndarray:
    """Bring targets [N, H, W] to cells [N, side, side]."""
    k = y.shape[1] // side
    cells = y.reshape(len(y), side, k, side, k)
    if not classes:
        return np.asarray(cells.mean((2, 4)))
    counts = np.stack([(cells == c).sum((2, 4)) for c in range(classes)], axis=-1)
    return np.where(counts.any(-1), counts.argmax(-1), -1)


Predict = Callable[[np.ndarray], np.ndarray]


def forest(material: Material, learn: Rows, seed: int) -> Predict:
    """Fit scikit-learn's forest on what is the same in no two columns."""
    _, kept = np.unique(np.nan_to_num(learn.x[:2000]), axis=1, return_index=True)
    if material.names:
        model: Any = RandomForestClassifier(100, min_samples_leaf=2, random_state=seed)
    else:
        model = RandomForestRegressor(100, min_samples_leaf=2, max_features=1 / 3, random_state=seed)
    model.fit(learn.x[:, kept], learn.y)
    return lambda x: np.asarray(model.predict(x[:, kept]))


def probe(material: Material, learn: Rows, kind: Kind, seed: int) -> Predict:
    """Fit a probe, whose strength is chosen on blocks that it has not learned from."""
    task: Literal["classes", "values"] = "classes" if material.names else "values"
    for folds in (3, 2):
        try:
            fitted, _ = fit_probe(
                learn.x,
                learn.y,
                kind=kind,
                task=task,
                groups=learn.block,
                folds=folds,
                strengths=(10.0, 1000.0),
                resamples=10,
                seed=seed,
            )
        except InputError:
            if folds == 2:
                raise
            continue
        return lambda x: np.asarray(fitted.predict(x))
    raise AssertionError


def ask(material: Material, features: np.ndarray, index: np.ndarray, predict: Predict) -> np.ndarray:
    """Predict some samples, each cell repeated to the targets' resolution: [n, ...] as the targets."""
    x = features[index]
    said = predict(x.reshape(-1, x.shape[-1])).reshape(x.shape[:-1])
    if x.ndim == 4:
        k = material.targets[0].shape[0] // x.shape[1]
        return said.repeat(k, axis=1).repeat(k, axis=2)
    return said[:, None]


def tally(material: Material, index: np.ndarray, said: np.ndarray) -> np.ndarray:
    """Count what figures are made of, per sample."""
    truth = np.stack([material.targets[i] for i in index])
    flat, guess = truth.reshape(len(truth), -1), said.reshape(len(said), -1)
    if material.names:
        return sums_of("segmentation", guess, flat, classes=len(material.names))
    return sums_of("regression", guess, flat.astype(np.float64), classes=1)


# Fine-tuning ----------------------------------------------------------------------------------------------------------


def examples(name: str, material: Material, view: View, dealt: Split) -> Examples:
    """Give samples to the library's fine-tuning."""
    task = task_of(material.task)

    def read(index: int) -> LabelledSample:
        return LabelledSample(
            id=f"{name}-{index}",
            batch=view.batches[index],
            target=as_target(material, index),
            fold=str(dealt.parts[index]),
        )

    return Examples(
        task=task,
        classes=tuple(ProbeClass(name=n, code=k) for k, n in enumerate(material.names, start=1)),
        read=read,
        parts=dealt.parts,
        blocks=material.blocks,
        block_m=None,
        window_px=round(material.window_m / view.batches[0].pixel_m),
        pixel_m=view.batches[0].pixel_m,
        cells=material.targets[0].shape[0] if task.dense else 0,
        about={"dataset": name, "seed": dealt.seed},
    )


def tune(name: str, material: Material, family: str, dealt: Split, encoder: Encoder, out: Path, epochs: int) -> Result:
    """Train an encoder and its head for a few epochs."""
    view = material.views[family]
    made = examples(name, material, view, dealt)
    dense = made.task.dense
    tuning = Tuning(
        epochs=epochs,
        batch_size=8 if dense else 16,
        encoder_lr=5e-4,
        head_first=1,
        layer_decay=1.0,
        augmentation=Augmentation(turns=dense, drop_dates=0.0 if material.two_dates else 0.1),
        seed=dealt.seed,
    )
    head: HeadKind = "conv" if dense else "linear"
    settings = Settings(head=head, hidden=64, skip=dense, patch_m=material.tune_m, tuning=tuning, overwrite=True)
    return finetune(made, encoder, out, settings)


def answer(model: FineTuned, material: Material, view: View, index: np.ndarray) -> np.ndarray:
    """Say the class number or value of each sample or cell."""
    said = []
    for i in range(0, len(index), TOGETHER):
        with torch.inference_mode():
            scores = model(collate([view.batches[j] for j in index[i : i + TOGETHER]]))
        said.append(scores.argmax(1).numpy() if material.names else scores[:, 0].numpy())
    joined = np.concatenate(said)
    return joined if joined.ndim == 3 else joined.reshape(-1, 1)


# Runs -----------------------------------------------------------------------------------------------------------------


def encoders(
    material: Material, seed: int, families: Sequence[str], models: Sequence[str]
) -> Iterator[tuple[str, str, Encoder]]:
    """Give the name of each encoder, its family and itself, for the views that the set has."""
    for family, view in material.views.items():
        if family not in families:
            continue
        yield f"random {ARCHITECTURES[family]}", family, random_encoder(family, seed, view)
    for model in models:
        encoder = load_model(model)
        family = "anysat" if isinstance(encoder, AnySat) else "olmoearth"
        if family in material.views:
            yield model, family, encoder


def run(
    name: str,
    data: Path,
    out: Path,
    *,
    seeds: Sequence[int],
    families: Sequence[str],
    models: Sequence[str],
    tuned: bool,
    epochs: int,
) -> None:
    """Run every method on one set, and write a line for each that is not there yet."""
    material, done = SETS[name](data), {(r["set"], r["method"], r["seed"]) for r in read_lines(out)}

    def write(method: str, seed: int, index: np.ndarray, said: np.ndarray, began: float) -> None:
        sums = tally(material, index, said)
        if material.task == "segmentation":
            folder = out.with_suffix("")
            folder.mkdir(exist_ok=True)
            np.savez_compressed(folder / f"{name}, {method}, {seed}.npz", index=index, said=said.astype(np.uint8))
        block, member = np.unique(material.blocks[index], return_inverse=True)
        total = np.zeros((len(block), *sums.shape[1:]))
        np.add.at(total, member.reshape(-1), sums)
        line = {
            "set": name,
            "task": material.task,
            "method": method,
            "seed": seed,
            "samples": len(index),
            "seconds": round(time.perf_counter() - began, 1),
            "names": material.names,
            "blocks": block.tolist(),
            "sums": total.round(6).tolist(),
        }
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name} seed {seed} {method}: {shown(material.task, total.sum(0))} in {line['seconds']} s", flush=True)

    for seed in seeds:
        dealt = split(material, seed)
        learn, test = dealt.of("train", "val"), dealt.of("test")
        if (name, FOREST, seed) not in done:
            began, x = time.perf_counter(), bands(material)
            predict = forest(material, rows(material, x, learn, AT_MOST, seed), seed)
            write(FOREST, seed, test, ask(material, x, test, predict), began)
        kinds: tuple[Kind, ...] = ("logistic", "knn") if material.names else ("ridge", "knn")
        for label, family, encoder in encoders(material, seed, families, models):
            wanted = [kind for kind in kinds if (name, f"{kind} on {label}", seed) not in done]
            if wanted:
                began = time.perf_counter()
                x = embed(encoder, material, material.views[family], learn)
                some = rows(material, x, learn, AT_MOST // 2, seed)
                for kind in wanted:
                    predict = probe(material, some, kind, seed)
                    write(f"{kind} on {label}", seed, test, ask(material, x, test, predict), began)
            method = f"fine-tuned {label}"
            if tuned and family == next(iter(material.views)) and (name, method, seed) not in done:
                began = time.perf_counter()
                with tempfile.TemporaryDirectory() as folder:
                    model = tune(name, material, family, dealt, encoder, Path(folder) / "model", epochs).model
                write(method, seed, test, answer(model, material, material.views[family], test), began)


def shown(task: str, sums: np.ndarray) -> dict[str, float]:
    return {name: round(float(figure(sums)), 3) for name, figure in task_of(task).figures.items()}


def read_lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# Tables ---------------------------------------------------------------------------------------------------------------

FIGURES = {
    "classification": ("macro_f1", "accuracy"),
    "segmentation": ("mean_iou", "macro_f1"),
    "regression": ("rmse", "r2"),
    "scene_regression": ("rmse", "r2"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method on one set."""

    tests: dict[int, dict[int, np.ndarray]]
    """By seed and tested block: sums."""

    def by_block(self, seeds: Collection[int] | None = None) -> dict[int, np.ndarray]:
        """Add up the tests of each block, over all seeds or some."""
        found: dict[int, np.ndarray] = {}
        for seed in self.tests if seeds is None else seeds:
            for block, sums in self.tests[seed].items():
                found[block] = found[block] + sums if block in found else sums
        return dict(sorted(found.items()))


def gather(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Row]]:
    """Sort lines by set and method."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for line in lines:
        row = found[line["set"]].setdefault(line["method"], Row(tests={}))
        row.tests[line["seed"]] = dict(zip(line["blocks"], np.array(line["sums"]), strict=True))
    return found


def interval(row: Row, task: str, figure: str) -> Interval:
    """Give a figure over the tests of all seeds, with an interval over blocks, each drawn with all its tests."""
    return metrics.bootstrap(task_of(task).figures[figure], np.stack(list(row.by_block().values())))


def against(row: Row, other: Row, task: str, figure: str) -> Interval:
    """Give a figure less that of another method, of the seeds of both, over the same resamples of the same blocks."""
    f, seeds = task_of(task).figures[figure], row.tests.keys() & other.tests.keys()
    sums = [np.stack(list(r.by_block(seeds).values())) for r in (row, other)]
    one, two = (f(metrics.resample(s)) for s in sums)
    return Interval.of(float(f(sums[0].sum(0)) - f(sums[1].sum(0))), one - two)


TITLES = {"macro_f1": "macro F1", "mean_iou": "mean IoU", "rmse": "RMSE", "r2": "R²", "accuracy": "accuracy"}


def tables(lines: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Write a table per set, in Markdown."""
    text, tasks = {}, {line["set"]: line["task"] for line in lines}
    for name, methods in gather(lines).items():
        task = tasks[name]
        main, second = FIGURES[task]
        heads = ("method", "seeds", TITLES[main], TITLES[second], f"{TITLES[main]}, less the forest's")
        made = ["| " + " | ".join(heads) + " |", "|---|---|---|---|---|"]
        for method, row in methods.items():
            each = [float(task_of(task).figures[main](sum(sums.values()))) for sums in row.tests.values()]
            one, two = (written(interval(row, task, figure)) for figure in (main, second))
            if len(each) > 1:
                one += f" ({', '.join(f'{value:.2f}' for value in each)})"
            less = "" if method == FOREST else written(against(row, methods[FOREST], task, main), signed=True)
            made.append(f"| {method} | {len(each)} | {one} | {two} | {less} |")
        text[name] = "\n".join(made)
    return text


def written(i: Interval, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{i.estimate:{sign}.2f} [{i.low:{sign}.2f}, {i.high:{sign}.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("sets", nargs="*", help=f"of {', '.join(SETS)}; all unless given")
    runs.add_argument("--out", type=Path, default=Path("real_tasks.jsonl"))
    runs.add_argument("--model", action="append", default=[], help="released name or folder; may be repeated")
    runs.add_argument("--families", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    runs.add_argument("--seeds", type=int, default=3)
    runs.add_argument("--tune", action="store_true", help="fine-tune too")
    runs.add_argument("--epochs", type=int, default=8)
    commands.add_parser("table").add_argument("results", type=Path)
    for one in commands.choices.values():
        one.add_argument("--data", type=Path, default=Path(os.environ.get("PANTERRA_DATA", "../shared/data")))
    args = parser.parse_args()
    if args.command == "table":
        for name, text in tables(read_lines(args.results)).items():
            print(f"### {name}\n\n{text}\n")
        return
    for name in args.sets or SETS:
        run(
            name,
            args.data.resolve(),
            args.out,
            seeds=range(args.seeds),
            families=args.families,
            models=args.model,
            tuned=args.tune,
            epochs=args.epochs,
        )


if __name__ == "__main__":
    main()
