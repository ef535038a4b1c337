"""From examples and an encoder to a fine-tuned model, whatever interrupts it."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from panterra import __version__
from panterra.energy import EnergyReport, measure_energy
from panterra.errors import InputError, RunError
from panterra.evaluate.sweep import Recipe, rates_at
from panterra.files import claimed, clear, read_json, saving_tensors, unfinished
from panterra.finetune.augment import turn_sample, vary
from panterra.finetune.card import write_card
from panterra.finetune.dealing import classes_of, deal, draw_dates
from panterra.finetune.examples import Examples
from panterra.finetune.heads import HeadConfig, HeadKind
from panterra.finetune.look import Look, look_at, loss_options, show_pixels, standardised
from panterra.finetune.lora import merge_lora
from panterra.finetune.model import Base, FineTuned, Setup, check_free, load_finetuned, on_sub_patches
from panterra.finetune.pairs import PARTS
from panterra.finetune.score import PartReport, deciding_figure, report, score
from panterra.finetune.step import Plateau, Trained, Tuning, make_optimiser, peaks_of, prepare
from panterra.finetune.tasks import LossOptions
from panterra.modalities import MODALITIES
from panterra.models.features import Encoder
from panterra.models.sub_patches import divided
from panterra.models.weights import Model, load_model, weights_checksum
from panterra.sample import collate
from panterra.train import checkpoint
from panterra.train.logs import LOG_FILE, Progress, open_logs
from panterra.train.loop import clip, plain, seed_micro
from panterra.train.optim import Optimisation, learning_rate
from panterra.train.parallel import choose_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run puts onto an encoder, how it trains both, and where."""

    head: HeadKind = "linear"
    hidden: int = 256
    """Width of an mlp, and of the decoder (head "conv") at the patches' resolution."""
    skip: bool = False
    """Whether the decoder also looks at the raw pixels of the finest modality."""
    patch_m: float = 40
    sub_patches: bool | str = False
    """Whether the head looks at the encoder's sub-patches: of the modality that is named, or the finest that suits."""
    tuning: Tuning = field(default_factory=Tuning)
    device: str = "auto"
    country: str | None = None
    """Whose grid the carbon intensity is of."""
    overwrite: bool = False
    """Whether a model in the same place, or the state of another run, is replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run gave."""

    folder: Path
    model: FineTuned
    validation: PartReport
    test: PartReport
    epochs: int
    """Done until nothing got better, or all."""
    best_epoch: int
    """The one that was kept, counted from 1."""
    seconds: float
    """Over all resumes, as is energy."""
    kwh: float
    co2e_kg: float | None


@dataclass(slots=True, kw_only=True)
class State:
    """How far a run is."""

    epoch: int = 0
    """Epochs done."""
    best: float = -math.inf
    best_epoch: int = 0
    watched: list[float] = field(default_factory=list)
    """What the schedule waits for, epoch by epoch; higher is better."""
    mixed: Any = 0
    """Sums over the validation samples of all epochs, where these are never reset."""
    seconds: float = 0.0
    kwh: float = 0.0
    co2e_kg: float | None = None
    energy: str = ""

    def charge(self, spent: EnergyReport) -> None:
        """Add the time and energy of a stretch."""
        self.seconds, self.kwh, self.energy = self.seconds + spent.seconds, self.kwh + spent.kwh, spent.detail
        if spent.co2e_kg is not None:
            self.co2e_kg = (self.co2e_kg or 0.0) + spent.co2e_kg

    def facts(self) -> dict[str, Any]:
        """Return plain JSON."""
        best = self.best if math.isfinite(self.best) else None
        return {**asdict(self), "best": best, "step": self.epoch}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Undo `facts`."""
        for name, value in facts.items():
            if name in State.__dataclass_fields__:
                setattr(self, name, -math.inf if name == "best" and value is None else value)


def finetune(
    examples: Examples,
    encoder: Encoder | str | Path,
    out: str | Path,
    settings: Settings | None = None,
    *,
    progress: Progress | None = None,
) -> Result:
    """Train an encoder with a head on examples, keep the epoch that validates best and write it to the folder `out`.

    While it runs, its state lies in `<out>.training`: after any interruption the same call goes on from the last epoch,
    with the numbers of a run that never stopped. Raises InputError where `out` is a model or the state is of another
    run, unless `overwrite`.
    """
    out, settings = Path(out), settings or Settings()
    check_free(out, overwrite=settings.overwrite)
    encoder = load_model(encoder) if isinstance(encoder, str | Path) else encoder
    if not isinstance(encoder, Model):
        raise InputError(f"{encoder.name} is of a family that cannot be saved with its weights; fit a probe instead")
    folder, tuning = out.with_name(f"{out.name}.training"), settings.tuning
    with claimed(folder, str(out)):
        model, state = fit(examples, encoder, folder, settings, progress=progress)
        names = tuple(c.name for c in examples.classes)
        with measure_energy(country=settings.country) as meter:
            validation, test = (score(model, examples, p, batch_size=tuning.batch_size) for p in ("val", "test"))
            parts = {"val": report(examples.task, validation, names)}
            # A threshold for boxes is chosen on one part and judged on the other.
            parts["test"] = report(examples.task, test, names, threshold=parts["val"].threshold)
        state.charge(meter.report)
        model.cpu().requires_grad_(False).eval()
        model.summary = {
            "examples": {**examples.about, **_sizes(examples)},
            "tuning": plain(tuning),
            "epochs": state.epoch,
            "best_epoch": state.best_epoch,
            "validation": parts["val"].as_dict(),
            "test": parts["test"].as_dict(),
            "energy": {k: getattr(state, k) for k in ("kwh", "co2e_kg", "seconds", "energy")},
        }
        files = {"card.md": write_card(model), LOG_FILE: (folder / LOG_FILE).read_text(encoding="utf-8")}
        model.save(out, files=files, overwrite=settings.overwrite)
        shutil.rmtree(folder)
    return Result(
        folder=out,
        model=load_finetuned(out),
        validation=parts["val"],
        test=parts["test"],
        epochs=state.epoch,
        best_epoch=state.best_epoch,
        seconds=state.seconds,
        kwh=state.kwh,
        co2e_kg=state.co2e_kg,
    )


def fit(
    examples: Examples,
    encoder: Encoder,
    folder: Path,
    settings: Settings,
    *,
    progress: Progress | None = None,
) -> tuple[FineTuned, State]:
    """Train a copy of an encoder with a head, as `finetune` does, and give it as it validated best.

    All that stays is the state in `folder`, from which the same call goes on, or ends at once.
    """
    where, tuning = choose_device(settings.device), settings.tuning
    if settings.sub_patches:
        divided(encoder)  # before anything is read
    if tuning.as_published and examples.task.answer == "boxes":
        raise InputError("AnySat's published way of training is of classes and values, not of boxes; leave it out")
    with measure_energy(country=settings.country) as looking:
        look, seen = look_at(examples, encoder, tuning)
        encoder = deepcopy(standardised(examples, encoder, seen))
    torch.manual_seed(tuning.seed)
    setup = _setup(examples, encoder, look, seen, settings)
    model = FineTuned(encoder, setup)
    assert isinstance(model.encoder, nn.Module)
    job = {
        "panterra": __version__,
        "setup": plain(setup),
        "tuning": plain(tuning),
        "examples": examples.about,
        "encoder": weights_checksum(model.encoder),
    }
    _begin(folder, plain(job), overwrite=settings.overwrite)
    show_pixels(model, look)
    trained = prepare(model, tuning)
    model.to(where)
    work = _Work(
        model=model,
        trained=trained,
        optimiser=make_optimiser(trained, tuning),
        examples=examples,
        tuning=tuning,
        look=look,
        options=loss_options(examples, look, tuning, where),
    )
    state = _train(work, folder, settings.country, progress)
    _load_best(model, trained, folder)
    merge_lora(model.encoder)
    state.charge(looking.report)
    return model, state


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What every update of a run has to do with."""

    model: FineTuned
    trained: Trained
    optimiser: torch.optim.AdamW
    examples: Examples
    tuning: Tuning
    look: Look
    options: LossOptions


def _train(work: _Work, folder: Path, country: str | None, progress: Progress | None) -> State:
    """Go through the epochs, from the last checkpoint if there is one, until nothing gets better."""
    model, trained, optimiser, examples, tuning = work.model, work.trained, work.optimiser, work.examples, work.tuning
    peaks, state = peaks_of(optimiser), State()
    weights: nn.Module = nn.ParameterList(trained.parameters.values())
    if list(model.head.buffers()):
        weights = nn.ModuleList([weights, model.head])
    found = checkpoint.newest(folder / "checkpoints")
    if found is not None:
        state.restore(checkpoint.load(found, weights, [optimiser]))
    samples = len(examples.of("train"))
    steps = samples // tuning.batch_size if tuning.drop_last else -(-samples // tuning.batch_size)
    steps = max(steps, 1)
    classes = classes_of(examples) if tuning.draw == "root" else None
    with open_logs(("jsonl",), folder, step=state.epoch, run="finetune", settings={"tuning": plain(tuning)}) as log:
        while state.epoch < tuning.epochs and not _enough(state, tuning):
            with measure_energy(country=country) as meter:
                frozen = state.epoch < tuning.frozen_epochs
                for p in trained.encoder():
                    p.requires_grad_(not frozen)
                model.train()
                # A frozen encoder is the pretrained one as it is used: no drop path, unless asked for.
                model.encoder.train(not frozen or tuning.frozen_drop_path)
                rng = np.random.default_rng([tuning.seed, state.epoch])
                order = deal(examples.of("train"), rng, classes=classes)
                losses = []
                for i in range(steps):
                    began, done = time.perf_counter(), state.epoch * steps + i
                    share = _share_of_rate(done, steps, state, tuning) * (1.0 if frozen else tuning.after_head)
                    for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                        group["lr"] = peak * share
                    some = order[i * tuning.batch_size : (i + 1) * tuning.batch_size]
                    losses.append(_step(work, some, done, frozen=frozen))
                    if progress:
                        progress(done + 1, steps * tuning.epochs, len(some) / (time.perf_counter() - began))
                checked = score(
                    model,
                    examples,
                    "val",
                    batch_size=tuning.batch_size,
                    options=work.options,
                    whole_batches=tuning.as_published,
                )
            if examples.task.answer in ("classes", "values") and not checked.tallies.any():
                raise InputError("the validation samples hold no label to choose an epoch by; label more places")
            if tuning.as_published:
                state.mixed = (np.asarray(state.mixed) + checked.tallies.sum(0)).tolist()
            value = deciding_figure(examples.task, np.array([state.mixed]) if tuning.as_published else checked.tallies)
            state.epoch += 1
            if value > state.best or state.best_epoch == 0:
                state.best, state.best_epoch = value, state.epoch
                _save_best(model, trained, folder)
            watches_loss = isinstance(tuning.schedule, Plateau) and tuning.schedule.watches == "loss"
            state.watched.append(-checked.loss if watches_loss else max(value, -sys.float_info.max))
            state.charge(meter.report)
            figures = {f"val/{k}": examples.task.figure(k, checked.tallies) for k in examples.task.figures}
            log(state.epoch, {"loss": float(np.mean(losses)), "val/loss": checked.loss, **figures})
            checkpoint.save(folder / "checkpoints", weights, [optimiser], state.facts(), permanent=False)
    return state


def _step(work: _Work, index: np.ndarray, step: int, *, frozen: bool) -> float:
    """Make one update and give its loss."""
    model, examples, tuning = work.model, work.examples, work.tuning
    # Everything random follows from the place in the run, so nothing random needs a checkpoint.
    generator = seed_micro(tuning.seed, step, 0, 0)
    samples = [examples.to_learn_from(int(i), generator) for i in index]
    if tuning.date_shares or tuning.most_dates:
        shares, most = tuning.date_shares, tuning.most_dates
        samples = [draw_dates(sample, generator, shares=shares, most=most) for sample in samples]
    if tuning.augmentation.turns:
        boxes = examples.task.answer == "boxes"
        samples = [turn_sample(sample, generator, dense=examples.task.dense, boxes=boxes) for sample in samples]
    device = next(model.head.parameters()).device
    work.optimiser.zero_grad()
    parts, total = np.array_split(np.arange(len(samples)), min(tuning.accumulate, len(samples))), 0.0
    for part in parts:
        some = [samples[i] for i in part]
        batch = vary(collate([s.batch for s in some]), generator, tuning.augmentation, work.look.spreads).to(device)
        target = torch.cat([s.target for s in some]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=tuning.precision == "bfloat16"):
            # Without gradients the encoder works in place, which autocast does not know; frozen, it builds no graph.
            with torch.set_grad_enabled(not frozen or tuning.precision == "bfloat16"):
                features = model.features(batch)
            scores = model.scores(batch, features)
        loss = examples.task.loss(scores, target, work.options)
        value = float(loss.detach())  # the one look at the device
        if not math.isfinite(value):
            raise RunError(
                f"the loss is {value} at step {step}, of the samples {', '.join(s.id for s in some)};"
                " a smaller lr or precision float32 may help, in another folder"
            )
        (loss / len(parts)).backward()
        total += value / len(parts)
    clip([p for p in work.trained.parameters.values() if p.grad is not None], tuning.clip_norm)
    work.optimiser.step()
    return total


def _share_of_rate(step: int, steps: int, state: State, tuning: Tuning) -> float:
    """Tell what the peaks of the learning rates are multiplied by at a step, counted from 0, by the schedule."""
    if isinstance(tuning.schedule, Plateau):
        return tuning.schedule.share(state.watched)
    if tuning.schedule == "epoch_cosine":
        recipe = Recipe(epochs=tuning.epochs, schedule="epoch_cosine")
        return float(rates_at(state.epoch, torch.ones(1, 1, dtype=torch.float64), recipe))
    every = steps * tuning.epochs
    schedule = Optimisation(lr=1.0, weight_decay=0, steps=every, warmup_steps=int(tuning.warmup * every))
    return learning_rate(step + 1, schedule)


def _enough(state: State, tuning: Tuning) -> bool:
    """Tell whether validation has not become better for long enough; the head's own epochs do not count."""
    since = max(state.best_epoch, 0 if tuning.method == "head" else tuning.frozen_epochs)
    return state.epoch >= tuning.least_epochs and state.epoch - since >= tuning.patience


def _setup(
    examples: Examples,
    encoder: Encoder,
    look: Look,
    modalities: Sequence[str],
    settings: Settings,
) -> Setup:
    """Put the head onto the encoder's patches or sub-patches; refuse sizes that do not fit."""
    task, side, head, patch_m = examples.task, 1, settings.head, settings.patch_m
    window_m = examples.window_px * examples.pixel_m
    patches = window_m / patch_m
    if abs(patches - round(patches)) > 1e-6 or round(patches) < 1:
        raise InputError(f"samples of {window_m:g} m are no whole number of patches of {patch_m:g} m; change either")
    if task.dense:
        side = examples.cells // round(patches)
        if side < 1 or side * round(patches) != examples.cells:
            raise InputError(
                f"samples of {examples.cells} target cells and {round(patches)} patches along a side do not fit; "
                "choose a patch_m that is a whole number of cells"
            )
    finest = max(modalities, key=lambda m: (1 / MODALITIES[m].gsd, modalities.index(m) == 0)) if settings.skip else None
    setup = Setup(
        task=task.name,
        head=HeadConfig(
            kind=head,
            dense=task.dense,
            dim=encoder.dim * (PARTS if examples.pairs else 1),
            outputs=task.outputs(len(examples.classes)),
            side=side,
            hidden=settings.hidden,
            # Where the middle of an object is shows in what surrounds it, which is wider than one convolution sees.
            convolutions=2 if task.answer == "boxes" else 1,
            skip_bands=len(MODALITIES[finest].bands) * (2 if examples.pairs else 1) if finest else 0,
            smooth=head == "plain" and task.dense and task.answer == "values",
        ),
        classes=examples.classes,
        modalities=tuple(modalities),
        patch_m=patch_m,
        window_px=examples.window_px,
        pixel_m=examples.pixel_m,
        centre=look.centre,
        spread=look.spread,
        skip=finest,
        pairs=examples.pairs,
        periods=examples.periods,
        base=Base.of(encoder),
    )
    if not settings.sub_patches:
        return setup
    return on_sub_patches(setup, encoder, modality=None if settings.sub_patches is True else settings.sub_patches)


def _sizes(examples: Examples) -> dict[str, Any]:
    parts: tuple[Literal["train", "val", "test"], ...] = ("train", "val", "test")
    return {
        "samples": {part: len(examples.of(part)) for part in parts},
        "blocks": {part: len(np.unique(examples.blocks[examples.of(part)])) for part in parts},
        "block_m": examples.block_m,
        "window_px": examples.window_px,
    }


def _begin(folder: Path, job: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make the folder of the run's state, or find it again; refuse that of another run."""
    note = folder / "run.json"
    try:
        before = read_json(note, f"remove {folder} to start afresh") if note.is_file() else None
    except InputError:
        if not overwrite:
            raise
        before = None
    if before is not None:
        # What could not be chosen when that run began was as it is by default.
        before["tuning"] = {**plain(Tuning()), **before.get("tuning", {})}
    if before is not None and before != job and not overwrite:
        keys = sorted(key for key in {*before, *job} if before.get(key) != job.get(key))
        raise InputError(
            f"{folder} holds a run with another {', '.join(keys)}; repeat that one to go on with it, or start afresh "
            "with overwrite"
        )
    if before != job:
        folder.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        clear(folder)
        checkpoint.write_json(note, job)


def _learned(model: FineTuned, trained: Trained) -> dict[str, Tensor]:
    """Name what training changes: parameters, and what norms of the head remember."""
    return {**trained.parameters, **{f"head.{name}": b for name, b in model.head.named_buffers()}}


def _save_best(model: FineTuned, trained: Trained, folder: Path) -> None:
    with unfinished(folder / "best.safetensors", sync=True) as part, saving_tensors(folder):
        save_file({name: p.detach().cpu().contiguous() for name, p in _learned(model, trained).items()}, part)


@torch.no_grad()
def _load_best(model: FineTuned, trained: Trained, folder: Path) -> None:
    learned = _learned(model, trained)
    try:
        best = load_file(folder / "best.safetensors")
    except (FileNotFoundError, SafetensorError) as error:
        raise InputError(
            f"{folder / 'best.safetensors'} is damaged ({error}); remove {folder} to start afresh"
        ) from None
    for name, value in best.items():
        learned[name].copy_(value)
