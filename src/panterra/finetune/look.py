"""What the training part of examples looks like, which a model has to know before it learns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from panterra.errors import InputError
from panterra.evaluate.class_weights import balanced_weights
from panterra.evaluate.dice import rarity
from panterra.finetune.examples import Examples
from panterra.finetune.model import FineTuned
from panterra.finetune.step import Tuning
from panterra.finetune.tasks import LossOptions
from panterra.models.features import Encoder, Fitted

E = TypeVar("E", bound=Encoder)
LOOK_AT = 1000
"""Training samples from which class counts and the statistics of bands and values are taken."""


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


def look_at(examples: Examples, encoder: Encoder, tuning: Tuning) -> tuple[Look, tuple[str, ...]]:
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
    if examples.task.answer == "classes" and not counts.any():
        raise InputError("the training samples hold no label; label more places")
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


def standardised(examples: Examples, encoder: E, modalities: Sequence[str]) -> E:
    """Give an encoder that standardises by its data those of the training part, where it has none yet."""
    missing = encoder.missing_statistics(modalities) if isinstance(encoder, Fitted) else ()
    if not isinstance(encoder, Fitted) or not missing:
        return encoder
    batches = (examples[int(i)].batch for i in examples.of("train")[:LOOK_AT])
    shown = (replace(b, observations={m: b.observations[m] for m in missing if m in b.observations}) for b in batches)
    return cast(E, encoder.with_statistics(encoder.fit_statistics(shown)))


def show_pixels(model: FineTuned, look: Look) -> None:
    """Standardise what the head sees of the pixels."""
    if model.setup.skip is not None:
        mean, std = look.means[model.setup.skip], look.spreads[model.setup.skip]
        times = 2 if model.setup.pairs else 1
        model.skip_mean.copy_(mean.repeat(times))
        model.skip_std.copy_(torch.where(std > 0, std, 1.0).repeat(times))


def loss_options(examples: Examples, look: Look, tuning: Tuning, device: torch.device) -> LossOptions:
    """Tell a loss what the training part is like."""
    weights, dice = _class_weights(examples, look, tuning), _dice_weights(examples, look, tuning)
    return LossOptions(
        class_weights=None if weights is None else weights.to(device),
        label_smoothing=tuning.label_smoothing,
        spread=look.spread,
        dice=None if dice is None else dice.to(device),
    )


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
