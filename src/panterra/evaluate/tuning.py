"""What a comparison asks of fine-tuning, which it is handed: an encoder trained on a benchmark, not frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int

from panterra.evaluate.benchmark import Benchmark
from panterra.evaluate.cache import Advance, View
from panterra.evaluate.class_weights import ClassWeights
from panterra.evaluate.protocols import Loss, Outcome, TunedProtocol
from panterra.evaluate.published_tuning import RATES
from panterra.models.features import Encoder

TunedHead = Literal["published", "nearest", "naive", "mean", "max", "batch_mlp"]
"""published: that of the papers' tables. Pixels' classes also have nearest, OlmoEarth's decoder, and naive, AnySat's of
each patch alone; whole samples AnySat's of the mean or the maximum of the patches, and its MLP. One that is not for
a protocol or task is taken for published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedTrial:
    """One model on one benchmark, with the views that may be chosen among; poolings and kinds are not looked at."""

    protocol: TunedProtocol
    benchmark: Benchmark
    encoder: Encoder
    views: tuple[View, ...]
    index: Int[np.ndarray, " k"] | None = None
    """Which training samples, where not all."""
    seed: int
    folder: Path
    """Of the state from which a stopped trial goes on."""
    rates: tuple[float, ...] = RATES
    """Of OlmoEarth's protocol."""
    head: TunedHead = "published"
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    epochs: int | None = None
    batch: int | None = None
    """Instead of the published numbers."""
    loss: Loss = "cross_entropy"
    class_weights: ClassWeights = "none"
    as_published: bool = False
    """Whether AnySat's protocols keep what its code does and nobody would: validation figures that are never reset,
    incomplete batches that do not validate, stand-ins for masked pixels that learn."""
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What fine-tuning found, and what it took over all that was tried and all restarts."""

    outcome: Outcome
    seconds: float
    wh: float
    energy: str
    """measured or modelled (`panterra.energy`)."""


Tuner = Callable[[TunedTrial, Advance | None], Tuned]
