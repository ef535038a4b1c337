"""From examples and an encoder to a fine-tuned model, whatever interrupts it."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from panterra import __version__
from panterra.energy import EnergyReport, measure_energy
from panterra.errors import InputError
from panterra.evaluate.class_weights import balanced_weights
from panterra.evaluate.dice import rarity
from panterra.finetune.augment import turn_sample, vary
from panterra.finetune.card import write_card
from panterra.finetune.examples import Examples
from panterra.finetune.heads import HeadConfig, HeadKind
from panterra.finetune.lora import merge_lora
from panterra.finetune.model import Base, FineTuned, Setup, check_free, load_finetuned
from panterra.finetune.pairs import PARTS
from panterra.finetune.score import PartReport, deciding_figure, report, score
from panterra.finetune.step import Trained, Tuning, make_optimiser, peaks_of, prepare
from panterra.finetune.tasks import LossOptions
from panterra.modalities import MODALITIES
from panterra.models.features import Encoder, Fitted
from panterra.models.weights import Model, load_model, weights_checksum
from panterra.sample import collate
from panterra.train import checkpoint
from panterra.train.logs import LOG_FILE, Progress, open_logs
from panterra.train.loop import clip, plain, seed_micro
from panterra.train.optim import Optimisation, learning_rate
from panterra.train.parallel import choose_device

LOOK_AT = 1000
"""Training samples from which class counts and the statistics of bands and values are taken."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the training part looks like."""

    samples: int
    counts: np.ndarray
    """Cells of each class, or samples with each label; empty for values."""
    centre: float = 0.0
    spread: float = 1.0
    """Mean and standard deviation of values; of boxes those of the logarithm of their side in cells."""
    means: dict[str, Tensor] = field(default_factory=dict)
    spreads: dict[str, Tensor] = field(default_factory=dict)
    """Of each modality's bands, where valid."""


def finetune(
    examples: Examples,
    encoder: Encoder | str | Path,
    out: str | Path,
    *,
    head: HeadKind = "linear",
    hidden: int = 256,
    skip: bool = False,
    patch_m: float = 40,
    tuning: Tuning | None = None,
    device: str = "auto",
    country: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Train an encoder with a head on examples, keep the epoch that validates best and write it to the folder `out`.

    `skip` shows the decoder (head "conv") the raw pixels of the finest modality. While it runs, its state lies in
    `<out>.training`: after any interruption the same call goes on from the last epoch, with the numbers of a run that
    never stopped. Raises InputError where `out` is a model or the state is of another run, unless `overwrite`.
    """
    out, tuning = Path(out), tuning or Tuning()
    check_free(out, overwrite=overwrite)
    encoder = load_model(encoder) if isinstance(encoder, str | Path) else encoder
    if not isinstance(encoder, Model):
        raise InputError(f"{encoder.name} is of a family that cannot be saved with its weights; fit a probe instead")
    where, folder = choose_device(device), out.with_name(f"{out.name}.training")
    with measure_energy(country=country) as looking:
        look, seen = _look(examples, encoder, tuning)
        encoder = deepcopy(_standardised(examples, encoder, seen))
    torch.manual_seed(tuning.seed)
    setup = _setup(examples, encoder, look, seen, head=head, hidden=hidden, skip=skip, patch_m=patch_m)
    job = {
        "panterra": __version__,
        "setup": plain(setup),
        "tuning": plain(tuning),
        "examples": examples.about,
        "encoder": weights_checksum(encoder),
    }
    _begin(folder, plain(job), overwrite=overwrite)
    model = FineTuned(encoder, setup)
    _look_at_pixels(model, look)
    trained = prepare(model, tuning)
    model.to(where)
    options = LossOptions(
        class_weights=_class_weights(examples, look, tuning),
        label_smoothing=tuning.label_smoothing,
        spread=setup.spread,
        dice=_dice_weights(examples, look, tuning),
    )
    options = replace(
        options,
        class_weights=None if options.class_weights is None else options.class_weights.to(where),
        dice=None if options.dice is None else options.dice.to(where),
    )
    state = _train(model, trained, examples, tuning, options, look, folder, country, progress)
    _load_best(trained, folder)
    merge_lora(model.encoder)
    names = tuple(c.name for c in examples.classes)
    with measure_energy(country=country) as meter:
        validation, test = (score(model, examples, p, batch_size=tuning.batch_size) for p in ("val", "test"))
        parts = {"val": report(examples.task, validation, names)}
        # A threshold for boxes is chosen on one part and judged on the other.
        parts["test"] = report(examples.task, test, names, threshold=parts["val"].threshold)
    for spent in (looking.report, meter.report):
        state.charge(spent)
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
    model.save(out, files=files, overwrite=overwrite)
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


def _train(
    model: FineTuned,
    trained: Trained,
    examples: Examples,
    tuning: Tuning,
    options: LossOptions,
    look: Look,
    folder: Path,
    country: str | None,
    progress: Progress | None,
) -> State:
    """Go through the epochs, from the last checkpoint if there is one, until nothing gets better."""
    optimiser = make_optimiser(trained, tuning)
    peaks, state = peaks_of(optimiser), State()
    weights = nn.ParameterList(trained.parameters.values())
    found = checkpoint.newest(folder / "checkpoints")
    if found is not None:
        state.restore(checkpoint.load(found, weights, [optimiser]))
    steps = -(-len(examples.of("train")) // tuning.batch_size)
    schedule = Optimisation(
        lr=1.0, weight_decay=0, steps=steps * tuning.epochs, warmup_steps=int(tuning.warmup * steps * tuning.epochs)
    )
    settings = {"tuning": plain(tuning)}
    with open_logs(("jsonl",), folder, step=state.epoch, run="finetune", settings=settings) as log:
        while state.epoch < tuning.epochs and not _enough(state, tuning):
            with measure_energy(country=country) as meter:
                frozen = state.epoch < tuning.frozen_epochs
                for p in trained.encoder():
                    p.requires_grad_(not frozen)
                model.train()
                # A frozen encoder is the pretrained one as it is used: no drop path.
                model.encoder.train(not frozen)
                order = np.random.default_rng([tuning.seed, state.epoch]).permutation(examples.of("train"))
                losses = []
                for i in range(steps):
                    began, done = time.perf_counter(), state.epoch * steps + i
                    share = learning_rate(done + 1, schedule)
                    for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                        group["lr"] = peak * share
                    some = order[i * tuning.batch_size : (i + 1) * tuning.batch_size]
                    losses.append(_step(model, trained, optimiser, examples, some, tuning, options, look, done, frozen))
                    if progress:
                        progress(done + 1, steps * tuning.epochs, len(some) / (time.perf_counter() - began))
                checked = score(model, examples, "val", batch_size=tuning.batch_size, options=options)
            value = deciding_figure(examples.task, checked)
            state.epoch += 1
            if value > state.best or state.best_epoch == 0:
                state.best, state.best_epoch = value, state.epoch
                _save_best(trained, folder)
            state.charge(meter.report)
            figures = {f"val/{k}": examples.task.figure(k, checked.tallies) for k in examples.task.figures}
            log(state.epoch, {"loss": float(np.mean(losses)), "val/loss": checked.loss, **figures})
            checkpoint.save(folder / "checkpoints", weights, [optimiser], state.facts(), permanent=False)
    return state


def _step(
    model: FineTuned,
    trained: Trained,
    optimiser: torch.optim.AdamW,
    examples: Examples,
    index: np.ndarray,
    tuning: Tuning,
    options: LossOptions,
    look: Look,
    step: int,
    frozen: bool,
) -> float:
    """Make one update and give its loss."""
    # Everything random follows from the place in the run, so nothing random needs a checkpoint.
    generator = seed_micro(tuning.seed, step, 0, 0)
    samples = [examples[int(i)] for i in index]
    if tuning.augmentation.turns:
        boxes = examples.task.answer == "boxes"
        samples = [turn_sample(sample, generator, dense=examples.task.dense, boxes=boxes) for sample in samples]
    batch = vary(collate([s.batch for s in samples]), generator, tuning.augmentation, look.spreads)
    device = next(model.head.parameters()).device
    batch, target = batch.to(device), torch.cat([s.target for s in samples]).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=tuning.precision == "bfloat16"):
        # Without gradients the encoder works in place, which autocast does not know; frozen, it builds no graph anyway.
        with torch.set_grad_enabled(not frozen or tuning.precision == "bfloat16"):
            features = model.features(batch)
        scores = model.scores(batch, features)
    loss = examples.task.loss(scores, target, options)
    if not bool(loss.isfinite()):
        raise FloatingPointError(f"the loss is {loss.item()} at step {step}, of samples {[s.id for s in samples]}")
    optimiser.zero_grad()
    loss.backward()
    clip([p for p in trained.parameters.values() if p.grad is not None], tuning.clip_norm)
    optimiser.step()
    return float(loss.detach())


def _enough(state: State, tuning: Tuning) -> bool:
    """Tell whether validation has not become better for long enough; the head's own epochs do not count."""
    since = max(state.best_epoch, 0 if tuning.method == "head" else tuning.frozen_epochs)
    return state.epoch - since >= tuning.patience


def _setup(
    examples: Examples,
    encoder: Encoder,
    look: Look,
    modalities: Sequence[str],
    *,
    head: HeadKind,
    hidden: int,
    skip: bool,
    patch_m: float,
) -> Setup:
    """Put the head onto the encoder's patches; refuse sizes that do not fit."""
    task, side = examples.task, 1
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
    finest = max(modalities, key=lambda m: (1 / MODALITIES[m].gsd, modalities.index(m) == 0)) if skip else None
    return Setup(
        task=task.name,
        head=HeadConfig(
            kind=head,
            dense=task.dense,
            dim=encoder.dim * (PARTS if examples.pairs else 1),
            outputs=task.outputs(len(examples.classes)),
            side=side,
            hidden=hidden,
            skip_bands=len(MODALITIES[finest].bands) * (2 if examples.pairs else 1) if finest else 0,
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


def _look(examples: Examples, encoder: Encoder, tuning: Tuning) -> tuple[Look, tuple[str, ...]]:
    """Go once through the training part, or through samples drawn from it; name the modalities that the encoder sees.

    Samples that fit into memory stay there, so that each is read once.
    """
    train = examples.of("train")
    drawn = np.sort(np.random.default_rng(tuning.seed).permutation(train)[:LOOK_AT])
    counts, values = np.zeros(len(examples.classes), np.int64), np.zeros(3)
    sums: dict[str, Tensor] = {}
    for index in drawn:
        sample = examples[int(index)]
        target = sample.target.numpy()
        if examples.task.answer == "values":
            known = target[np.isfinite(target)].astype(np.float64)
            values += (len(known), known.sum(), (known**2).sum())
        elif examples.task.answer == "boxes":
            kind, side = target[..., 0], np.sqrt(target[..., 3] * target[..., 4])
            side = np.log(side[kind >= 0] * examples.cells)
            values += (len(side), side.sum(), (side**2).sum())
            counts += np.bincount(kind[kind >= 0].astype(np.int64), minlength=len(counts))
        elif examples.task.answer == "classes":
            counts += np.bincount(target[target >= 0].reshape(-1), minlength=len(counts))
        else:
            counts += np.nan_to_num(target[0]).astype(np.int64)
        for name, o in sample.batch.observations.items():
            if name in encoder.modalities:
                pixels = o.pixels.movedim(2, -1)[o.valid].double()
                ones = pixels.new_full((1, pixels.shape[1]), len(pixels))
                moments = torch.cat([ones, pixels.sum(0)[None], pixels.square().sum(0)[None]])
                sums[name] = sums[name] + moments if name in sums else moments
    if not sums:
        raise InputError(f"the samples hold nothing that {encoder.name} looks at: {', '.join(encoder.modalities)}")
    if examples.task.answer == "values" and not values[0]:
        raise InputError("the training samples hold no value; label more places")
    if examples.task.answer == "boxes" and not values[0]:
        raise InputError("the training samples hold no object; label more places")
    count, total, squares = values if values[0] else (1.0, 0.0, 1.0)
    spread = math.sqrt(max(squares / count - (total / count) ** 2, 0.0))
    means = {name: (s[1] / s[0].clamp(min=1)) for name, s in sums.items()}
    variances = {name: (s[2] / s[0].clamp(min=1) - means[name].square()).clamp(min=0) for name, s in sums.items()}
    look = Look(
        samples=len(drawn),
        counts=counts,
        centre=float(total / count),
        spread=spread or 1.0,
        means={name: mean.float() for name, mean in means.items()},
        spreads={name: v.sqrt().float() for name, v in variances.items()},
    )
    return look, tuple(name for name in encoder.modalities if name in sums)


def _standardised(examples: Examples, encoder: Model, modalities: Sequence[str]) -> Model:
    """Give an encoder that standardises by its data those of the training part, where it has none yet."""
    missing = encoder.missing_statistics(modalities) if isinstance(encoder, Fitted) else ()
    if not isinstance(encoder, Fitted) or not missing:
        return encoder
    batches = (examples[int(i)].batch for i in examples.of("train")[:LOOK_AT])
    shown = (replace(b, observations={m: b.observations[m] for m in missing if m in b.observations}) for b in batches)
    return cast(Model, encoder.with_statistics(encoder.fit_statistics(shown)))


def _look_at_pixels(model: FineTuned, look: Look) -> None:
    """Standardise what the head sees of the pixels."""
    if model.setup.skip is not None:
        mean, std = look.means[model.setup.skip], look.spreads[model.setup.skip]
        times = 2 if model.setup.pairs else 1
        model.skip_mean.copy_(mean.repeat(times))
        model.skip_std.copy_(torch.where(std > 0, std, 1.0).repeat(times))


def _class_weights(examples: Examples, look: Look, tuning: Tuning) -> Tensor | None:
    asked, names = tuning.class_weights, [c.name for c in examples.classes]
    if asked == "none":
        return None
    if examples.task.answer in ("values", "boxes"):
        raise InputError(f"{examples.task.name} is about {examples.task.answer}, without class weights; leave them out")
    if isinstance(asked, str):
        return balanced_weights(look.counts, samples=look.samples if examples.task.answer == "labels" else None)
    if unknown := [name for name in asked if name not in names]:
        raise InputError(f"a weight came for {unknown[0]!r}; the classes are {', '.join(names)}")
    return torch.tensor([float(asked.get(name, 1.0)) for name in names])


def _dice_weights(examples: Examples, look: Look, tuning: Tuning) -> Tensor | None:
    if tuning.loss == "cross_entropy":
        return None
    if examples.task.name != "segmentation":
        raise InputError(f"the Dice loss is of a class per cell, not of {examples.task.name}; leave it out")
    return rarity(look.counts)


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
    before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
    if before is not None and before != job and not overwrite:
        keys = sorted(key for key in {*before, *job} if before.get(key) != job.get(key))
        raise InputError(
            f"{folder} holds a run with another {', '.join(keys)}; repeat that one to go on with it, or start afresh "
            "with overwrite"
        )
    if before != job:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        checkpoint.write_json(note, job)


def _save_best(trained: Trained, folder: Path) -> None:
    part = folder / "best.safetensors.part"
    save_file({name: p.detach().cpu().contiguous() for name, p in trained.parameters.items()}, part)
    part.replace(folder / "best.safetensors")


@torch.no_grad()
def _load_best(trained: Trained, folder: Path) -> None:
    for name, value in load_file(folder / "best.safetensors").items():
        trained.parameters[name].copy_(value)
