"""AnySat's published pretraining runs, each with its lab note."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from panterra.errors import InputError
from panterra.evaluate.anysat_protocol import retrieval_accuracy
from panterra.models.anysat import AnySatConfig, anysat_config
from panterra.models.anysat_predictor import AnySatPredictorConfig
from panterra.models.anysat_sensors import SENSORS
from panterra.models.anysat_statistics import Statistics
from panterra.models.weights import save_model
from panterra.objectives.jepa import JEPA, JEPAConfig, MaskedTiles
from panterra.objectives.jepa_batches import MixedBatches, Samples, Source
from panterra.objectives.jepa_masks import BlockMasking, NaiveMasking
from panterra.objectives.teacher import follow, momentum_at
from panterra.train.loop import Check, Run
from panterra.train.optim import Optimisation, Plateau

TREESATAI_TS = Source(
    name="treesatai_ts",
    sensors=("aerial", "s2", "s1-asc"),
    batch=128,
    cells=6,
    scales=(1, 2),
    crop_px={"aerial": 300},
)
PASTIS_HD = Source(name="pastis_hd", sensors=("spot", "s2", "s1"), batch=1, cells=128, scales=(4, 8, 16), max_dates=20)
FLAIR = Source(
    name="flair", sensors=("aerial-flair", "s2"), batch=32, cells=10, scales=(1, 2), crop_px={"aerial-flair": 500}
)
PLANTED = Source(
    name="planted",
    sensors=("s2", "s1", "l7", "alos", "modis"),
    batch=256,
    cells=12,
    scales=(3,),
    weight=2,
    masked=True,
)
S2NAIP_URBAN = Source(
    name="s2naip_urban", sensors=("naip", "l8", "s2", "s1"), batch=2, cells=64, scales=(4, 8, 16), weight=4
)
GEOPLEX = (TREESATAI_TS, PASTIS_HD, FLAIR, PLANTED, S2NAIP_URBAN)
"""The data sets by the names that `panterra.data` opens them with, each with its batch for one device."""

S2NAIP_TRAIN = 359_046
"""Tiles of S2NAIP-URBAN that the published length of an epoch counts."""
S2NAIP_VAL = 82_140
"""Those that the published length of a validation counts."""
RETRIEVED_FROM = 256
"""Batches of a validation in which patches are found again; published: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnySatRecipe:
    """All that decides the numbers of a run but the samples; the defaults are what the published runs share."""

    name: str
    encoder: AnySatConfig
    predictor_depth: int = 4
    predictor_heads: int = 16
    sources: tuple[Source, ...]
    epoch_samples: int | None = None
    """An epoch has this number over 20 and the number of ranks as steps, or ends before with the samples."""
    validation_samples: int | None = None
    """A validation has this number over 20 as steps, or ends before with the samples."""
    epochs: int = 200
    steps: int | None = None
    """Instead of epochs."""
    micro_batch: int | None = None
    """Samples that are masked together; None: a data set's batch."""
    masking: Literal["blocks", "naive"] = "blocks"
    modality_dropout: float = 0.5
    """Share of the context's tokens that the student does without, besides one sensor kept at each position."""
    lone_sensors: float = 0.0
    """Share of samples of which the student sees one sensor alone."""
    date_dropout: float = 0.5
    targets: Literal["normalised", "standardised"] = "normalised"
    dropped: Literal["masked", "hidden"] = "masked"
    """See `JEPAConfig`."""
    prediction_weight: float = 1.0
    contrast_weight: float = 1.0
    contrast_temperature: float = 0.1
    published: bool = True
    """Do as the published code where it departs from the paper, see `JEPAConfig` and `MixedBatches`."""
    momentum_start: float = 0.996
    """Of the moving average by which the teacher follows the student."""
    momentum_end: float = 1.0

    method: Literal["adamw", "muon"] = "adamw"
    lr: float = 5e-5
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 0
    final_share: float = 1.0
    """Of the learning rate, at the end of a cosine; 1 leaves the rate as it is."""
    patience: int | None = 10
    """Epochs in a row without a lower validation loss, after which the learning rate falls tenfold; None: never."""
    clip_norm: float | None = None
    exported: Literal["best", "last"] = "best"
    """best: the model after the epoch with the lowest mean training loss."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Published: 16-bit floats, whose exponents are smaller."""
    data_seed: int = 32
    init_seed: int = 32
    licence: str | None = None
    """Of the weights that the run makes."""

    @property
    def objective(self) -> JEPAConfig:
        """Give what is trained and by which losses."""
        return JEPAConfig(
            encoder=self.encoder,
            predictor=AnySatPredictorConfig(
                dim=self.encoder.dim,
                depth=self.predictor_depth,
                heads=self.predictor_heads,
                layout=self.encoder.layout,
            ),
            prediction_weight=self.prediction_weight,
            contrast_weight=self.contrast_weight,
            contrast_temperature=self.contrast_temperature,
            targets=self.targets,
            dropped=self.dropped,
            published=self.published,
        )

    def epoch_steps(self, world: int) -> int | None:
        """Give the longest that an epoch may be with so many ranks."""
        return None if self.epoch_samples is None else self.epoch_samples // (20 * world)


def run_from(
    recipe: AnySatRecipe,
    samples: Mapping[str, Samples],
    *,
    statistics: Mapping[str, Mapping[str, Statistics]] | None = None,
    held_out: Mapping[str, Samples] | None = None,
    world: int = 1,
    checks: Sequence[Check] = (),
) -> Run:
    """Make the run of a recipe on samples of each of its data sets, for so many ranks.

    `statistics` standardise each data set's samples where these are in declared units. After each epoch the losses on
    `held_out` decide whether the learning rate falls; without these it stays. The exported model is the teacher, with
    the statistics of the last data set that has each sensor. Raises InputError.
    """
    mix = partial(
        MixedBatches,
        seed=recipe.data_seed,
        masking=BlockMasking() if recipe.masking == "blocks" else NaiveMasking(),
        micro_batch=recipe.micro_batch,
        modality_dropout=recipe.modality_dropout,
        lone_sensors=recipe.lone_sensors,
        date_dropout=recipe.date_dropout,
        statistics=statistics,
        sensors={sensor.name: sensor for sensor in recipe.encoder.sensors},
        published=recipe.published,
    )

    def batches(rank: int, ranks: int) -> MixedBatches:
        if ranks != world:
            raise InputError(f"the run was made for {world} ranks and starts with {ranks}; give world={ranks}")
        return mix(recipe.sources, samples, rank=rank, world=world, epoch_steps=recipe.epoch_steps(world))

    epoch = len(batches(0, world))
    steps = recipe.steps or recipe.epochs * epoch
    plateau = None
    if held_out is not None:
        # Published: series are cut to so many dates in training alone.
        sources = [replace(source, max_dates=None) for source in recipe.sources]
        longest = None if recipe.validation_samples is None else recipe.validation_samples // 20
        others = mix(sources, held_out, epoch_steps=longest)
        checks = (*checks, validation(others, every=epoch), retrieval(others, every=epoch, steps=RETRIEVED_FROM))
        if recipe.patience is not None:
            plateau = Plateau(figure="validation/loss", patience=recipe.patience)

    def follow_student(objective: nn.Module, step: int) -> None:
        momentum = momentum_at(step, steps, start=recipe.momentum_start, end=recipe.momentum_end)
        follow(cast(JEPA, objective).teacher, cast(JEPA, objective).encoder, momentum)

    def export(objective: nn.Module, folder: Path) -> None:
        teacher = cast(JEPA, objective).teacher
        teacher.name, teacher.licence = recipe.name, recipe.licence
        teacher.statistics = {name: s for found in (statistics or {}).values() for name, s in found.items()}
        save_model(teacher, folder)

    return Run(
        name=recipe.name,
        seed=recipe.data_seed,
        objective=lambda: JEPA(recipe.objective),
        batches=batches,
        optimisation=Optimisation(
            method=recipe.method,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            steps=steps,
            betas=recipe.betas,
            eps=recipe.eps,
            warmup_steps=recipe.warmup_steps,
            final_share=recipe.final_share,
            clip_norm=recipe.clip_norm,
            plateau=plateau,
        ),
        init_seed=recipe.init_seed,
        before_update=follow_student,
        checks=checks,
        export=export,
        best_of=epoch if recipe.exported == "best" else None,
        settings={**asdict(recipe), "samples": {source.name: len(samples[source.name]) for source in recipe.sources}},
    )


def validation(batches: MixedBatches, *, every: int, steps: int | None = None, name: str = "validation") -> Check:
    """Make a check that averages the losses over batches of other samples, drawn and masked as in training."""

    def figures(objective: nn.Module, tiles: MaskedTiles, _: Source) -> dict[str, float]:
        loss = objective(tiles)
        return {key: float(value) for key, value in {"loss": loss.total, **loss.terms}.items()}

    return _averaged(figures, batches, every=every, steps=steps, name=name)


def retrieval(batches: MixedBatches, *, every: int, steps: int | None = None, name: str = "retrieval") -> Check:
    """Make a check that finds patches again: `retrieval_accuracy` of each data set's sensors, averaged over batches.

    Tokens are the student's, before places are added. Sensors that see the tile as a whole take no part.
    """

    def figures(objective: nn.Module, tiles: MaskedTiles, source: Source) -> dict[str, float]:
        seen = cast(JEPA, objective).look(tiles).patches
        if len(seen) < 2:
            return {}
        tokens = F.normalize(torch.stack(list(seen.values())).float().flatten(0, 2), dim=-1)
        found = retrieval_accuracy(tokens @ tokens.mT, list(seen))
        return {f"{source.name}/{sensor}": share for sensor, share in found.items()}

    return _averaged(figures, batches, every=every, steps=steps, name=name)


def _averaged(
    figures: Callable[[nn.Module, MaskedTiles, Source], Mapping[str, float]],
    batches: MixedBatches,
    *,
    every: int,
    steps: int | None,
    name: str,
) -> Check:
    """Make a check that averages figures over batches, each over those that have it."""

    @torch.no_grad()
    def run(objective: nn.Module, step: int) -> dict[str, float]:
        device = next(objective.parameters()).device
        found: dict[str, list[float]] = {}
        for i in range(min(len(batches), steps or len(batches))):
            source = batches.source(i)
            for tiles in batches[i]:
                for key, value in figures(objective, tiles.to(device), source).items():
                    found.setdefault(key, []).append(value)
        return {key: sum(values) / len(values) for key, values in found.items()}

    return Check(name=name, every=every, run=run)


def geoplex(size: str = "base") -> AnySatRecipe:
    """AnySat on GeoPlex: five data sets and eleven sensors in one model.

    Published: all values; base is what was released, small and tiny are the sizes of the training configurations. Each
    step takes one data set, drawn by weight, and one scale. An epoch has 17,952 steps on one device; the smaller sets
    are seen about once in it and the rest is S2NAIP-URBAN. Published hardware: one GPU in the last revision, three in
    an earlier one, with 16-bit mixed precision.
    """
    suffix = "" if size == "base" else f"-{size}"
    return AnySatRecipe(
        name=f"anysat-geoplex{suffix}",
        encoder=anysat_config(size),
        sources=GEOPLEX,
        epoch_samples=S2NAIP_TRAIN,
        validation_samples=S2NAIP_VAL,
    )


def _alone(source: Source, *, size: str = "base", **changes: Any) -> AnySatRecipe:
    """Give what the runs on one data set share: its own sensors alone."""
    encoder = replace(anysat_config(size), sensors=tuple(SENSORS[name] for name in source.sensors))
    name = source.name.replace("_", "-")
    return AnySatRecipe(name=f"anysat-{name}", encoder=encoder, sources=(replace(source, weight=1),), **changes)


def treesatai_ts() -> AnySatRecipe:
    """AnySat on TreeSatAI-TS alone: aerial images, Sentinel-2 and ascending Sentinel-1.

    Published: the batch of 64 and the learning rate. Inferred: the size, base; scales, crops and the rest are those of
    the run on GeoPlex.
    """
    return _alone(replace(TREESATAI_TS, batch=64))


def pastis_hd() -> AnySatRecipe:
    """AnySat on PASTIS-HD alone: SPOT, Sentinel-2 and Sentinel-1, all five folds.

    Published: folds, 40 dates of a series and the learning rate. Inferred: batch and scales, those of the run on
    GeoPlex.
    """
    return _alone(replace(PASTIS_HD, max_dates=40))


def flair() -> AnySatRecipe:
    """AnySat on FLAIR alone: aerial images with elevation, and Sentinel-2.

    Published: the batch of 16 and the learning rate; the published configuration cannot start as released (it names a
    file that is not there). Inferred: the rest, as in the run on GeoPlex.
    """
    return _alone(replace(FLAIR, batch=16))


def planted() -> AnySatRecipe:
    """AnySat on PLANTED alone: Sentinel-2, Sentinel-1, Landsat 7, ALOS-2 and MODIS.

    Published: the batch of 256 and the learning rate. Inferred: the rest, as in the run on GeoPlex.
    """
    return _alone(PLANTED)


def s2naip_urban() -> AnySatRecipe:
    """AnySat on S2NAIP-URBAN alone: NAIP, Landsat 8, Sentinel-2 and Sentinel-1.

    Published: the batch of 2, the learning rate and 8,976 steps per epoch. Inferred: half as many steps of validation
    as on GeoPlex, like those of an epoch, and the rest, as there.
    """
    return _alone(S2NAIP_URBAN, epoch_samples=S2NAIP_TRAIN // 2, validation_samples=S2NAIP_VAL // 2)


def naive_masking(recipe: AnySatRecipe) -> AnySatRecipe:
    """Predict random patches from a random fifth of the patches.

    A published ablation.
    """
    return replace(recipe, name=f"{recipe.name}-naive-masking", masking="naive")


def corrected(recipe: AnySatRecipe) -> AnySatRecipe:
    """Do as the paper says where the published code departs from it.

    Ours. Context and predicted patches are where they say they are, and dates without data take no part.
    """
    return replace(recipe, name=f"{recipe.name}-corrected", published=False)


_SETS: dict[str, Callable[[], AnySatRecipe]] = {
    "anysat-geoplex": geoplex,
    "anysat-geoplex-small": partial(geoplex, "small"),
    "anysat-geoplex-tiny": partial(geoplex, "tiny"),
    "anysat-treesatai-ts": treesatai_ts,
    "anysat-pastis-hd": pastis_hd,
    "anysat-flair": flair,
    "anysat-planted": planted,
    "anysat-s2naip-urban": s2naip_urban,
}


def changed(run: Callable[[], AnySatRecipe], change: Callable[[AnySatRecipe], AnySatRecipe]) -> AnySatRecipe:
    """Give a run with a change."""
    return change(run())


RUNS: dict[str, Callable[[], AnySatRecipe]] = {
    **_SETS,
    **{f"{name}-naive-masking": partial(changed, run, naive_masking) for name, run in _SETS.items()},
    **{f"{name}-corrected": partial(changed, run, corrected) for name, run in _SETS.items()},
}
"""The published runs, with their published ablation and with corrections of ours."""
