"""What an AnySat run will take, counted before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from panterra.errors import InputError
from panterra.objectives.jepa import JEPA
from panterra.objectives.jepa_batches import draw_turns
from panterra.recipes.anysat import AnySatRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """What one data set comes to."""

    name: str
    sensors: tuple[str, ...]
    samples: int
    batch: int
    steps: int
    """Of an epoch."""
    tokens: float
    """Patches of a sample over all sensors, in the mean over scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnySatPlan:
    """A run as it would be."""

    recipe: AnySatRecipe
    parameters: Mapping[str, int]
    sources: tuple[SourcePlan, ...]
    ranks: int
    epoch: int
    """Steps."""
    steps: int

    @property
    def samples_per_step(self) -> float:
        """Give the mean over an epoch's steps, for all ranks."""
        return self.ranks * sum(s.steps * s.batch for s in self.sources) / self.epoch

    @property
    def tokens_per_step(self) -> float:
        """Give the mean over an epoch's steps, for all ranks."""
        return self.ranks * sum(s.steps * s.batch * s.tokens for s in self.sources) / self.epoch

    @property
    def state_bytes(self) -> int:
        """Give a rank's memory of weights, gradients and AdamW's two moments in float32, without activations."""
        return 4 * (4 * (self.parameters["encoder"] + self.parameters["predictor"]) + self.parameters["teacher"])

    def as_dict(self) -> dict[str, Any]:
        """Give all of it as plain JSON."""
        return {
            **asdict(self),
            "samples_per_step": self.samples_per_step,
            "tokens_per_step": self.tokens_per_step,
            "state_bytes": self.state_bytes,
        }


def plan_anysat(recipe: AnySatRecipe, counts: Mapping[str, int], *, ranks: int = 1) -> AnySatPlan:
    """Count a run on data sets of so many samples. Raises InputError where no data set fills a batch."""
    turns = tuple(counts[source.name] // (source.batch * ranks) for source in recipe.sources)
    longest = recipe.epoch_steps(ranks)
    epoch = sum(turns) if longest is None else min(sum(turns), longest)
    if not epoch:
        raise InputError("no data set has samples enough for one batch; set its batch smaller, or give more samples")
    weights = tuple(source.weight for source in recipe.sources)
    drawn = np.bincount(draw_turns(turns, weights, epoch, recipe.data_seed, 0)[:, 0], minlength=len(turns)).tolist()
    with torch.device("meta"):
        objective = JEPA(recipe.objective)
    parts = {"encoder": objective.encoder, "predictor": objective.predictor, "teacher": objective.teacher}
    return AnySatPlan(
        recipe=recipe,
        parameters={name: sum(w.numel() for w in part.parameters()) for name, part in parts.items()},
        sources=tuple(
            SourcePlan(
                name=source.name,
                sensors=source.sensors,
                samples=counts[source.name],
                batch=source.batch,
                steps=steps,
                tokens=float(np.mean([(source.cells // scale) ** 2 * len(source.sensors) for scale in source.scales])),
            )
            for source, steps in zip(recipe.sources, drawn, strict=True)
        ),
        ranks=ranks,
        epoch=epoch,
        steps=recipe.steps or recipe.epochs * epoch,
    )
