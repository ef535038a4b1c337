"""Fine-tuning as the papers' evaluations do it, for comparisons of models (`evaluate.suite`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panterra.data.labelled import IGNORE, LabelledSample
from panterra.energy import measure_energy
from panterra.evaluate.anysat_protocol import merge_crops
from panterra.evaluate.benchmark import fit as fit_statistics
from panterra.evaluate.benchmark import normalised, own_statistics, show
from panterra.evaluate.cache import Advance, View, key_of
from panterra.evaluate.probes import ProbeClass
from panterra.evaluate.protocols import Outcome, metric_of, told_by_sums
from panterra.evaluate.published import OLMOEARTH, OlmoEarthTask
from panterra.evaluate.published_tuning import ANYSAT_TUNING, OLMOEARTH_TUNING, AnySatRun, AnySatTuning, OlmoEarthTuning
from panterra.evaluate.ranking import ScoreCounts
from panterra.evaluate.scoring import FIGURES, LOWER_IS_BETTER, Answers
from panterra.evaluate.tuning import Tuned, TunedTrial
from panterra.finetune.augment import NONE
from panterra.finetune.dealing import cut_at_random
from panterra.finetune.examples import Examples
from panterra.finetune.heads import HeadKind
from panterra.finetune.model import FineTuned
from panterra.finetune.run import Settings, State, fit
from panterra.finetune.score import score
from panterra.finetune.step import Plateau, Tuning
from panterra.finetune.tasks import Task, count_classes, task_of
from panterra.imagery.labels import distinct_colours
from panterra.modalities import MODALITIES
from panterra.models.anysat import AnySat, for_finetuning
from panterra.models.features import Encoder, Features
from panterra.sample import Batch

EPOCHS, FROZEN_SHARE = 50, 0.2
"""Of OlmoEarth's fine-tuning: all, and the share in which the head learns alone."""


class SubPatches(nn.Module):
    """An encoder that gives each sub-patch, side by side with its patch, in place of the patches (AnySat)."""

    def __init__(self, encoder: Encoder, modality: str | None, patch_m: float) -> None:
        super().__init__()
        assert isinstance(encoder, nn.Module)
        self.encoder, self.modality, self.patch_m = encoder, modality, patch_m
        self.name, self.modalities = encoder.name, encoder.modalities
        self.dim = int(getattr(encoder, "dense_dim", 2 * encoder.dim))

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False) -> Features:
        """Embed a batch; `patch_m` is the side of a sub-patch, which follows from that of the patches."""
        assert not dense
        asked: Any = self.modality or True
        out = cast(Encoder, self.encoder).encode(batch, patch_m=self.patch_m, dense=asked)
        assert out.dense is not None
        rows, cols = (a // b for a, b in zip(out.dense.shape[1:3], out.valid.shape[1:], strict=True))
        valid = out.valid.repeat_interleave(rows, 1).repeat_interleave(cols, 2)
        return Features(patches=out.dense, summary=out.summary, valid=valid, patch_m=patch_m)


def from_scratch(model: AnySat, *, seed: int) -> AnySat:
    """Draw a model's weights anew as published fine-tuning does: patch encoder and all by the library's defaults."""
    torch.manual_seed(seed)
    fresh = for_finetuning(AnySat(model.config, name=model.name))
    for layer in fresh.patch_encoder.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return fresh


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """One way of training that is tried."""

    view: View
    head: HeadKind
    tuning: Tuning


def tune(trial: TunedTrial, progress: Advance | None = None) -> Tuned:
    """Fine-tune by each learning rate and view, and test what validates best.

    A stopped trial goes on from `trial.folder`, from the last epoch of the recipe that it was at.
    """
    row = ANYSAT_TUNING.get(trial.benchmark.name, AnySatTuning())
    metric = metric_of(trial.benchmark.name, trial.benchmark.task)
    if trial.protocol != "finetune":
        metric = row.metric or metric
    recipes = [recipe for view in trial.views for recipe in _recipes(trial, view, row)]
    shown_as: dict[View, _Shown] = {}
    seconds = wh = 0.0
    best: tuple[State, FineTuned, _Shown, _Recipe] | None = None
    for number, recipe in enumerate(recipes):
        if recipe.view not in shown_as:
            shown_as[recipe.view] = _show(trial, recipe.view, metric)
        shown = shown_as[recipe.view]
        model, state = _fit(trial, recipe, shown, _counted(progress, number, len(recipes)))
        seconds, wh = seconds + state.seconds, wh + 1000 * state.kwh
        if best is None or state.best > best[0].best:
            best = state, model, shown, recipe
    assert best is not None
    state, model, shown, recipe = best
    with measure_energy() as meter:
        if row.crops and trial.protocol != "finetune":
            answers = _answers_of_crops(trial, model, shown, row.crops)
        else:
            answers = _answers(model, shown.examples, recipe.tuning)
    tuning = recipe.tuning
    chosen = {
        "rate": tuning.lr,
        "epoch": state.best_epoch,
        "batch": tuning.batch_size,
        "head": recipe.head,
        "class_weights": tuning.class_weights if isinstance(tuning.class_weights, str) else "last class 0",
        "precision": tuning.precision,
        **({"loss": tuning.loss} if trial.benchmark.task == "segmentation" else {}),
    }
    return Tuned(
        outcome=Outcome(metric=metric, figures=answers.figures(metric=metric), view=recipe.view, chosen=chosen),
        seconds=seconds + meter.report.seconds,
        wh=wh + 1000 * meter.report.kwh,
        energy=meter.report.method,
    )


def _counted(progress: Advance | None, number: int, of: int) -> Any:
    if progress is None:
        return None
    return lambda done, total, _: progress(number * total + done, of * total)


def _recipes(trial: TunedTrial, view: View, row: AnySatTuning) -> list[_Recipe]:
    common: dict[str, Any] = {
        "layer_decay": 1.0,
        "decay_all": True,
        "clip_norm": None,
        "augmentation": NONE,
        "precision": trial.precision,
        "seed": trial.seed,
    }
    dense_task = trial.benchmark.task == "segmentation"
    if trial.protocol == "finetune":
        table = OLMOEARTH_TUNING.get(trial.benchmark.name)
        probe = OLMOEARTH.get(trial.benchmark.name, OlmoEarthTask())
        table = table or OlmoEarthTuning(batch=probe.batch)
        epochs = trial.epochs or EPOCHS
        batch = trial.batch or table.batch * table.accumulate
        tunings = [
            Tuning(
                **common,
                epochs=epochs,
                batch_size=batch,
                accumulate=1 if trial.batch else table.accumulate,
                lr=rate,
                encoder_lr=rate,
                head_first=math.ceil(FROZEN_SHARE * epochs),
                after_head=0.1,
                frozen_drop_path=True,
                weight_decay=0.01,
                schedule=Plateau(factor=0.2, patience=2, cooldown=10),
                patience=epochs,
                class_weights=trial.class_weights if trial.benchmark.task != "regression" else "none",
                loss=trial.loss if dense_task else "cross_entropy",
            )
            for rate in trial.rates
        ]
        head: HeadKind = "nearest" if dense_task and trial.head == "nearest" else "plain"
        return [_Recipe(view=view, head=head, tuning=tuning) for tuning in tunings]
    runs: Mapping[str, AnySatRun] = {
        "anysat_finetune": row.full,
        "anysat_plus": row.projector,
        "anysat_scratch": row.scratch,
    }
    run = runs[trial.protocol]
    weights: Any = "none" if row.last_class_counts else {trial.benchmark.class_names[-1]: 0.0}
    tuning = Tuning(
        **common,
        method="projector" if trial.protocol == "anysat_plus" else "full",
        epochs=trial.epochs or run.epochs,
        batch_size=trial.batch or row.batch,
        lr=run.rate,
        encoder_lr=run.rate,
        head_first=0,
        weight_decay=run.weight_decay,
        schedule=Plateau(factor=0.1, patience=10, watches="loss") if run.schedule == "plateau" else "epoch_cosine",
        patience=10,
        least_epochs=50,
        drop_last=True,
        as_published=trial.as_published,
        class_weights=weights,
        draw=row.draw,
        date_shares=row.date_shares,
        most_dates=row.most_dates,
    )
    head = "linear"
    if view.kind == "summary":
        head = trial.head if trial.head in ("mean", "max", "batch_mlp") else run.head
    return [_Recipe(view=view, head=head, tuning=tuning)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """A benchmark as an encoder is shown it."""

    encoder: Encoder
    examples: Examples
    see: Callable[[LabelledSample], LabelledSample]


def _show(trial: TunedTrial, view: View, metric: str) -> _Shown:
    """Make a benchmark's splits what an encoder is trained on, as it is shown them."""
    benchmark, shown = trial.benchmark, dict(view.shown)
    train = benchmark.splits["train"]
    index = np.arange(len(train)) if trial.index is None else trial.index
    published = own_statistics(benchmark, shown) if view.normalisation == "published" else None
    some = (show(train[int(i)].batch, shown) for i in index)
    start = trial.encoder
    if trial.protocol == "anysat_scratch":
        assert isinstance(start, AnySat)
        start = from_scratch(start, seed=trial.seed)
    elif trial.protocol != "finetune" and isinstance(start, AnySat):
        start = for_finetuning(start)
    encoder, statistics = fit_statistics(start, view.normalisation, some, published)
    places = [("train", int(i)) for i in index]
    places += [(part, i) for part in ("val", "test") for i in range(len(benchmark.splits[part]))]

    def seen(sample: LabelledSample) -> LabelledSample:
        batch = show(sample.batch, shown)
        if statistics is not None:
            batch = normalised(batch, statistics, keep_zeros=view.normalisation == "published")
        return replace(sample, batch=batch)

    def read(number: int) -> LabelledSample:
        part, i = places[number]
        return seen(benchmark.splits[part][i])  # type: ignore[index]

    def anew(number: int, generator: torch.Generator) -> LabelledSample:
        _, i = places[number]
        return seen(cut_at_random(whole.read(train.ids[i]), generator, crop))

    row = ANYSAT_TUNING.get(benchmark.name, AnySatTuning())
    crop = {} if trial.protocol == "finetune" else row.random_crop
    whole = train.card.open(benchmark.root, train.split, crop=False) if crop else train
    first = read(0)
    task = _task(trial, first, metric)
    names = () if task.answer == "values" else benchmark.class_names
    window = max(o.pixels.shape[-1] * min(MODALITIES[m].gsd, 10.0) / 10 for m, o in first.batch.observations.items())
    coded = zip(names, distinct_colours(len(names)), strict=True)
    examples = Examples(
        task=task,
        classes=tuple(ProbeClass(name=name, code=k + 1, colour=colour) for k, (name, colour) in enumerate(coded)),
        read=read,
        parts=np.array([part for part, _ in places]),
        blocks=np.arange(len(places)),
        block_m=None,
        window_px=round(window),
        pixel_m=first.batch.pixel_m,
        cells=first.target.shape[-2] if task.dense else 0,
        about={"dataset": benchmark.name, "contents": dict(benchmark.contents), "view": asdict(view), "metric": metric},
        anew=anew if crop else None,
    )
    return _Shown(encoder=encoder, examples=examples, see=seen)


def _task(trial: TunedTrial, sample: LabelledSample, metric: str) -> Task:
    """Let the figure that the benchmark is judged by decide which epoch is kept."""
    name = trial.benchmark.task
    known = task_of("scene_regression" if name == "regression" and sample.target.ndim == 1 else name)
    told = told_by_sums(metric, name)
    figure = FIGURES[name][told]
    if name == "multilabel":
        # Counts of a label stand in a column there, in a row here.
        return replace(known, figures={told: lambda sums: figure(sums.swapaxes(-1, -2))}, best=told)
    return replace(known, figures={told: figure}, best=told, higher_is_better=told not in LOWER_IS_BETTER)


def _fit(trial: TunedTrial, recipe: _Recipe, shown: _Shown, progress: Any) -> tuple[FineTuned, State]:
    patch_m, encoder, examples = recipe.view.patch_m, shown.encoder, shown.examples
    if recipe.view.kind == "dense":
        encoder = cast(Encoder, SubPatches(encoder, recipe.view.dense, patch_m))
        with torch.no_grad():
            rows = encoder.encode(examples[0].batch.to(trial.device), patch_m=patch_m).patches.shape[1]
        patch_m = examples.window_px * examples.pixel_m / rows
    name = key_of({"view": asdict(recipe.view), "tuning": asdict(recipe.tuning)})[:12]
    settings = Settings(head=recipe.head, patch_m=patch_m, tuning=recipe.tuning, device=trial.device)
    return fit(examples, encoder, trial.folder / name, settings, progress=progress)


def _answers(model: FineTuned, examples: Examples, tuning: Tuning) -> Answers:
    task = examples.task
    shares: list[np.ndarray] = []
    truths: list[np.ndarray] = []
    pixels = ScoreCounts(classes=len(examples.classes)) if task.name == "segmentation" else None

    def keep(scores: Tensor, target: Tensor) -> None:
        if task.answer == "labels":
            known = target.isfinite().all(1)
            shares.append(scores[known].sigmoid().cpu().numpy())
            truths.append((target[known] > 0.5).cpu().numpy())
        elif pixels is not None:
            pixels.add(scores.softmax(1).movedim(1, -1).flatten(0, 2), target.flatten())
        elif task.answer == "classes":
            known = target >= 0
            shares.append(scores[known].softmax(1).cpu().numpy())
            truths.append(F.one_hot(target[known], scores.shape[1]).cpu().numpy() > 0)

    tallies = score(model, examples, "test", batch_size=tuning.batch_size, watch=keep).tallies
    if task.answer == "labels":
        tallies = tallies.swapaxes(-1, -2).astype(np.float64)
    name: Any = "regression" if task.answer == "values" else task.name
    return Answers(
        task=name,
        sums=tallies.sum(0, keepdims=True) if name == "classification" else tallies,
        scores=np.concatenate(shares) if shares else None,
        truth=np.concatenate(truths) if truths else None,
        pixels=pixels,
    )


@torch.no_grad()
def _answers_of_crops(trial: TunedTrial, model: FineTuned, shown: _Shown, crops: Sequence[tuple[int, int]]) -> Answers:
    """Test on whole images, of which the model sees overlapping crops."""
    benchmark = trial.benchmark
    test = benchmark.splits["test"]
    opened = test.card.open(benchmark.root, test.split, offsets=crops)
    kept = {id: [i for i, own in enumerate(opened.ids) if own.split("@")[0] == id] for id in test.ids}
    model.eval()
    tallies, pixels = [], ScoreCounts(classes=len(benchmark.class_names))
    for places in kept.values():
        samples = [shown.see(opened[i]) for i in places]
        raw = [model(s.batch.to(trial.device))[0].cpu() for s in samples]
        labels = [s.target[0] for s in samples]
        side = max(row for row, _ in crops) + labels[0].shape[-1]
        merged = merge_crops(torch.stack(raw), crops, side)
        truth = torch.full((side, side), IGNORE, dtype=torch.int64)
        for (row, col), part in zip(crops, labels, strict=True):
            truth[row : row + part.shape[0], col : col + part.shape[1]] = part
        tallies.append(count_classes(merged[None], truth[None]))
        pixels.add(merged.softmax(0).flatten(1).mT, truth.flatten())
    return Answers(task="segmentation", sums=np.concatenate(tallies), pixels=pixels)
