"""What is compared, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    poolings: tuple[Pooling, ...] = ("mean",)
    """To choose among by validation."""
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


def check_plan(plan: Plan) -> None:
    """Refuse what no benchmark could put right."""
    unknown = [p for p in plan.protocols if p not in PROTOCOLS]
    if unknown:
        raise InputError(f"no protocol {unknown[0]!r}; known: {', '.join(PROTOCOLS)}")
    for what, given in (("model", plan.models), ("benchmark", plan.benchmarks), ("protocol", plan.protocols)):
        if not given:
            raise InputError(f"no {what} came; give one at least")
    if len({name for name, _ in plan.benchmarks}) < len(plan.benchmarks):
        raise InputError("a benchmark was given twice; give each once")
    if wrong := [f for f in plan.fractions if not 0 < f <= 1]:
        raise InputError(f"a fraction is {wrong[0]:g}; wanted more than 0, at most 1")
    if plan.subsets == "published" and (wrong := [f for f in plan.fractions if f not in (*FRACTIONS, 1)]):
        known = ", ".join(f"{f:g}" for f in FRACTIONS)
        raise InputError(f"a fraction is {wrong[0]:g}; published subsets are of {known} and 1")
    for text in plan.compressions:
        parse_compression(text)
    if wrong := [r for r in (*plan.rates, *plan.tuning_rates) if not r > 0]:
        raise InputError(f"a learning rate is {wrong[0]:g}; wanted more than 0")
    if any(count is not None and count < 1 for count in (plan.epochs, plan.limit, plan.batch)):
        raise InputError("epochs, batch and limit are counts; wanted 1 or more")
