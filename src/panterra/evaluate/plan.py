"""What is compared, and how."""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from panterra.errors import InputError
from panterra.evaluate.benchmark import Normalisation, Pooling
from panterra.evaluate.class_weights import ClassWeights
from panterra.evaluate.compress import parse_compression
from panterra.evaluate.protocols import PROTOCOLS, Loss, Protocol
from panterra.evaluate.published_tuning import RATES as TUNING_RATES
from panterra.evaluate.subsets import FRACTIONS, Subsets
from panterra.evaluate.sweep import RATES
from panterra.evaluate.tuning import TunedHead
from panterra.models.features import Encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Models, benchmarks and settings of a comparison."""

    models: tuple[str | Encoder, ...]
    """Names, folders, "raw" for band statistics, NAME@random:SEED for untrained weights; or encoders."""
    benchmarks: tuple[tuple[str, Path], ...]
    """Name and folder of each."""
    protocols: tuple[Protocol, ...] = ("knn", "linear")
    fractions: tuple[float, ...] = (1.0,)
    """Of the training samples."""
    subsets: Subsets = "stratified"
    """How a fraction is chosen: drawn with each seed, or as published."""
    seeds: tuple[int, ...] = (42,)
    """Each draws other training samples, first weights and batches."""
    normalisations: tuple[Normalisation, ...] = ()
    """To choose among by validation; empty: what the model is made for."""
    poolings: tuple[Pooling, ...] = ()
    """To choose among by validation; empty: what is published, which is the mean for all but one."""
    compressions: tuple[str, ...] = ("none",)
    """Of the features, each in rows of its own: see `compress.parse_compression`."""
    rates: tuple[float, ...] = RATES
    """Of probes."""
    tuning_rates: tuple[float, ...] = TUNING_RATES
    """Of OlmoEarth's fine-tuning."""
    tuned_head: TunedHead = "published"
    """Of fine-tuning."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of fine-tuning; probes are in float32."""
    published_rate: bool = False
    """Whether benchmarks of the published table have its one rate instead."""
    epochs: int | None = None
    batch: int | None = None
    """Of training, instead of the published numbers."""
    loss: Loss | None = None
    """Of probes of pixels' classes, instead of the published one."""
    class_weights: ClassWeights = "none"
    """Of trained probes."""
    as_published: bool = False
    """Whether bands are filled as OlmoEarth's evaluation does (`benchmark.open_benchmark`), and AnySat's fine-tuning
    validates as its code does (`tuning.TunedTrial`)."""
    patch_m: float | None = None
    """Instead of four pixels, or what divides the samples."""
    modalities: tuple[str, ...] | None = None
    """Of the benchmarks, where not all that a model knows."""
    diagnostics: bool = False
    """Whether rows say how features spread (`evaluate.diagnostics`)."""
    limit: int | None = None
    """Most samples of a split."""
    device: str = "cpu"
    """Or auto, which is a GPU where there is one."""


def check_plan(plan: Plan) -> None:
    """Refuse what no benchmark could put right."""
    choices: tuple[tuple[str, tuple[str | None, ...], tuple[str, ...]], ...] = (
        ("protocol", plan.protocols, PROTOCOLS),
        ("choice of subsets", (plan.subsets,), get_args(Subsets)),
        ("normalisation", plan.normalisations, get_args(Normalisation)),
        ("pooling", plan.poolings, get_args(Pooling)),
        ("head", (plan.tuned_head,), get_args(TunedHead)),
        ("precision", (plan.precision,), ("float32", "bfloat16")),
        ("loss", (plan.loss,), get_args(Loss)),
        ("choice of class weights", (plan.class_weights,), get_args(ClassWeights)),
    )
    for what, given, known in choices:
        if unknown := [name for name in given if name is not None and name not in known]:
            raise InputError(f"no {what} {unknown[0]!r}; known: {', '.join(known)}")
    wanted: tuple[tuple[str, Sized], ...] = (
        ("model", plan.models),
        ("benchmark", plan.benchmarks),
        ("protocol", plan.protocols),
        ("fraction", plan.fractions),
        ("seed", plan.seeds),
        ("compression", plan.compressions),
        ("learning rate", plan.rates),
        ("learning rate of fine-tuning", plan.tuning_rates),
    )
    for what, several in wanted:
        if not len(several):
            raise InputError(f"no {what} came; give one at least")
    if len({name for name, _ in plan.benchmarks}) < len(plan.benchmarks):
        raise InputError("a benchmark was given twice; give each once")
    if wrong := [f for f in plan.fractions if not 0 < f <= 1]:
        raise InputError(f"a fraction is {wrong[0]:g}; wanted more than 0, at most 1")
    if plan.subsets == "published" and (wrong := [f for f in plan.fractions if f not in (*FRACTIONS, 1)]):
        listed = ", ".join(f"{f:g}" for f in FRACTIONS)
        raise InputError(f"a fraction is {wrong[0]:g}; published subsets are of {listed} and 1")
    for text in plan.compressions:
        parse_compression(text)
    if wrong := [r for r in (*plan.rates, *plan.tuning_rates) if not 0 < r < math.inf]:
        raise InputError(f"a learning rate is {wrong[0]:g}; wanted a finite one of more than 0")
    if plan.patch_m is not None and not 0 < plan.patch_m < math.inf:
        raise InputError(f"patch_m is {plan.patch_m:g}; wanted a length in metres above 0")
    if min(plan.seeds) < 0:
        raise InputError(f"a seed is {min(plan.seeds)}; wanted 0 or more")
    if any(count is not None and count < 1 for count in (plan.epochs, plan.limit, plan.batch)):
        raise InputError("epochs, batch and limit are counts; wanted 1 or more")
