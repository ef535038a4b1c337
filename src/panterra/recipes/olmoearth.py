"""OlmoEarth's published pretraining runs, each with its lab note."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from panterra.models.olmoearth import TARGET_ONLY, OlmoEarthConfig, released_config
from panterra.models.predictor import predictor_config
from panterra.objectives.latent_mim import MASKED_NEGATIVES_LOSS, V1_LOSS, LatentMIMConfig
from panterra.objectives.masking import TIME_MASKING, V1_MASKING

PUBLISHED_SAMPLES = 1_138_828
"""Samples of the published corpus, of 128 pixels a side: quarters of 285,288 tiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSettings:
    """Where targets come from: a copy of the student's patch embeddings at the start, unless said otherwise.

    The published teacher holds the whole encoder or, to save memory, these embeddings alone; targets are the same.
    """

    seed: int | None = None
    """Draws weights of the teacher's own."""
    momentum_start: float = 1.0
    """Of the moving average by which the teacher follows the student; 1 leaves it as it is."""
    momentum_end: float = 1.0

    @property
    def follows(self) -> bool:
        """Say whether it is the student's moving average from the start, without weights of its own."""
        return self.seed is None and (self.momentum_start, self.momentum_end) != (1.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class OlmoEarthRecipe:
    """All that decides the numbers of a run but the corpus; the defaults are what the official runs share."""

    name: str
    encoder: OlmoEarthConfig
    predictor_depth: int = 4
    predictor_dim: int | None = None
    """As wide as the encoder where it is None."""
    predictor_heads: int | None = None
    masking: Mapping[str, Any]
    """A published configuration, see `masking.make_masks`."""
    loss: Mapping[str, Any]
    """A published configuration, see `losses.token_loss`."""
    regulariser: Mapping[str, Any] | None = None
    """A published configuration, see `losses.regularise`; no official run has any."""
    views: int = 2
    contrast_weight: float
    contrast_temperature: float = 0.1
    across_ranks: bool = False
    """Whether losses are those of all processes' batches together; the published code treats each by itself."""
    band_dropout: float
    """Highest share of bands that the student does without."""
    band_dropout_modalities: tuple[str, ...] = ("sentinel2_l2a", "landsat")
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    symmetries: bool
    """Whether each view of a micro-batch is turned or mirrored."""

    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 8000
    final_share: float = 0.1
    """Of the learning rate, at the end of the cosine."""
    clip_norm: float = 1.0
    batch: int = 512
    """Samples per step, all ranks together."""
    micro_batch: int
    """Samples that a rank takes at once."""
    epochs: int = 300
    steps: int | None = None
    """Instead of epochs."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"

    patch_px: tuple[int, ...] = tuple(range(1, 9))
    """One is drawn for each step and rank."""
    side_patches: tuple[int, ...] = tuple(range(1, 13))
    token_budget: int = 2250
    """Tokens per sample that decide how many dates a crop has."""
    budget_band_sets: Literal["v1", "model"] = "v1"
    """Whose tokens the budget counts: v1's in all releases, also where the model makes fewer."""
    fraction: float = 1.0
    """Share of the corpus to train on."""
    held_out: int = 0
    """Samples kept from training for the checks during the run; without any, these look at some that are trained on."""
    data_seed: int = 3622
    init_seed: int = 12536
    licence: str | None = None
    """Of the weights that the run makes."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Name what is read, seen and predicted."""
        return self.encoder.modalities

    @property
    def objective(self) -> LatentMIMConfig:
        """Give what is trained and by which losses."""
        return LatentMIMConfig(
            encoder=self.encoder,
            predictor=predictor_config(
                self.encoder, depth=self.predictor_depth, dim=self.predictor_dim, heads=self.predictor_heads
            ),
            loss=self.loss,
            regulariser=self.regulariser,
            contrast_weight=self.contrast_weight,
            contrast_temperature=self.contrast_temperature,
            across_ranks=self.across_ranks,
            band_dropout=self.band_dropout,
            band_dropout_modalities=self.band_dropout_modalities,
            teacher_seed=self.teacher.seed,
        )

    @property
    def budget_groups(self) -> Callable[[str], tuple[tuple[str, ...], ...]]:
        """Say which bands of a modality the token budget counts as one token."""
        return released_config("v1", "nano").groups if self.budget_band_sets == "v1" else self.encoder.groups


def _v1(size: str, *, lr: float, weight_decay: float) -> OlmoEarthRecipe:
    """Give what the runs of v1 share: a symmetry drawn for each view, no band dropout, micro-batches of 32."""
    return OlmoEarthRecipe(
        name=f"olmoearth-v1-{size}",
        encoder=released_config("v1", size),
        masking=V1_MASKING,
        loss=V1_LOSS,
        contrast_weight=0.1,
        band_dropout=0.0,
        symmetries=True,
        lr=lr,
        weight_decay=weight_decay,
        micro_batch=32,
    )


def _v1_1(size: str, *, lr: float, weight_decay: float, version: str = "v1.1") -> OlmoEarthRecipe:
    """Give what the runs of v1.1 and v1.2 share.

    That no symmetries are drawn is inferred: masking moved into the data loader, whose configuration names none.
    """
    return OlmoEarthRecipe(
        name=f"olmoearth-{version}-{size}",
        encoder=released_config(version, size),
        masking=TIME_MASKING,
        loss=MASKED_NEGATIVES_LOSS,
        contrast_weight=0.05,
        band_dropout=0.2,
        symmetries=False,
        lr=lr,
        weight_decay=weight_decay,
        micro_batch=64,
    )


_v1_2 = partial(_v1_1, version="v1.2")


def v1_nano() -> OlmoEarthRecipe:
    """OlmoEarth v1 nano, the smallest of the first release.

    Published: all values, from the training scripts. The learning rate and the weight decay come from a sweep over
    1e-4, 5e-4, 1e-3 and 0.2, 0.02, 0.002. The released checkpoint is that of step 370,000 of 667,200. Hardware given:
    4 GPUs with at least 16 GB. The symmetries are the default of the training code of that time.
    """
    return _v1("nano", lr=1e-3, weight_decay=0.002)


def v1_tiny() -> OlmoEarthRecipe:
    """OlmoEarth v1 tiny: twelve thin blocks.

    Published: all values. Swept: learning rates 1e-4, 2e-4, 5e-4, weight decays 0.2, 0.02, 0.002. Released: step
    360,000 of 667,200. Hardware given: 4 to 8 GPUs with at least 24 GB.
    """
    return _v1("tiny", lr=2e-4, weight_decay=0.02)


def v1_base() -> OlmoEarthRecipe:
    """OlmoEarth v1 base, what most published figures are about.

    Published: all values. Swept: learning rates 1e-4, 2e-4, 3e-4, weight decays 0.2, 0.02, 0.002. Released: the last
    step, 667,200. Hardware given: 8 GPUs with at least 40 GB.
    """
    return _v1("base", lr=1e-4, weight_decay=0.02)


def v1_large() -> OlmoEarthRecipe:
    """OlmoEarth v1 large.

    Published: all values. Swept as base. Released: step 560,000 of 667,200. Hardware given: 8 GPUs with 80 GB.
    """
    return _v1("large", lr=1e-4, weight_decay=0.002)


def v1_1_nano() -> OlmoEarthRecipe:
    """OlmoEarth v1.1 nano: one token for all bands of an image, twelve features per pixel, masking by dates.

    Published: all values but the step of the released checkpoint; the absence of symmetries is inferred.
    """
    return _v1_1("nano", lr=2e-4, weight_decay=0.02)


def v1_1_tiny() -> OlmoEarthRecipe:
    """OlmoEarth v1.1 tiny: as nano, with 64 features per pixel.

    Published: all values but the step of the released checkpoint; the absence of symmetries is inferred.
    """
    return _v1_1("tiny", lr=2e-4, weight_decay=0.002)


def v1_1_base() -> OlmoEarthRecipe:
    """OlmoEarth v1.1 base.

    Published: all values but the step of the released checkpoint; the absence of symmetries is inferred.
    """
    return _v1_1("base", lr=1e-4, weight_decay=0.02)


def v1_1_large() -> OlmoEarthRecipe:
    """OlmoEarth v1.1 large, for which a script but no weights were published.

    Published: learning rate and weight decay, together with base; the rest is that of the other sizes.
    """
    return _v1_1("large", lr=1e-4, weight_decay=0.02)


def v1_2_nano() -> OlmoEarthRecipe:
    """OlmoEarth v1.2 nano: v1.1 with learned rotations by date, row and column.

    Published: all values but the step of the released checkpoint; the absence of symmetries is inferred. Ours leaves
    the coordinates of the rotations in float32; the published training may have rounded them to bfloat16.
    """
    return _v1_2("nano", lr=2e-4, weight_decay=0.02)


def v1_2_tiny() -> OlmoEarthRecipe:
    """OlmoEarth v1.2 tiny.

    Published: all values but the step of the released checkpoint; see nano for what is inferred.
    """
    return _v1_2("tiny", lr=2e-4, weight_decay=0.002)


def v1_2_small() -> OlmoEarthRecipe:
    """OlmoEarth v1.2 small, a size that only this release has.

    Published: all values but the step of the released checkpoint; see nano for what is inferred.
    """
    return _v1_2("small", lr=2e-4, weight_decay=0.02)


def v1_2_base() -> OlmoEarthRecipe:
    """OlmoEarth v1.2 base.

    Published: all values but the step of the released checkpoint; see nano for what is inferred. Published speed on
    eight H100: 0.636 s per step with sharded parameters, 0.465 s with replicated ones, a teacher of patch embeddings
    alone and a fused AdamW, at the same loss.
    """
    return _v1_2("base", lr=1e-4, weight_decay=0.02)


def v1_2_large() -> OlmoEarthRecipe:
    """OlmoEarth v1.2 large, for which a script but no weights were published.

    Published: learning rate and weight decay, together with base; the rest is that of the other sizes.
    """
    return _v1_2("large", lr=1e-4, weight_decay=0.02)


RUNS: dict[str, Callable[[], OlmoEarthRecipe]] = {
    "olmoearth-v1-nano": v1_nano,
    "olmoearth-v1-tiny": v1_tiny,
    "olmoearth-v1-base": v1_base,
    "olmoearth-v1-large": v1_large,
    "olmoearth-v1.1-nano": v1_1_nano,
    "olmoearth-v1.1-tiny": v1_1_tiny,
    "olmoearth-v1.1-base": v1_1_base,
    "olmoearth-v1.1-large": v1_1_large,
    "olmoearth-v1.2-nano": v1_2_nano,
    "olmoearth-v1.2-tiny": v1_2_tiny,
    "olmoearth-v1.2-small": v1_2_small,
    "olmoearth-v1.2-base": v1_2_base,
    "olmoearth-v1.2-large": v1_2_large,
}
"""The official runs."""


def random_masking(run: OlmoEarthRecipe) -> OlmoEarthRecipe:
    """Tokens of every modality dealt at random, half to see and half to predict.

    An ablation of v1. Inferred: the ratios, those of the official run; and that maps are seen too, since this strategy
    hides no modality as a whole.
    """
    return replace(run, masking={"type": "random", "encode_ratio": 0.5, "decode_ratio": 0.5})


def fixed_modality_masking(run: OlmoEarthRecipe) -> OlmoEarthRecipe:
    """The maps always predicted whole, the tokens of the sensors dealt at random.

    An ablation of v1. Inferred: the ratios, and that the fixed modalities are the six maps.
    """
    ratios = {"encode_ratio": 0.5, "decode_ratio": 0.5}
    return replace(run, masking={"type": "random_fixed_modality", "decoded_modalities": TARGET_ONLY, **ratios})


def no_contrast(run: OlmoEarthRecipe) -> OlmoEarthRecipe:
    """Without the contrast of the two views, which are still both trained on.

    An ablation of v1.
    """
    return replace(run, contrast_weight=0.0)


def patch_discrimination(run: OlmoEarthRecipe) -> OlmoEarthRecipe:
    """Patch discrimination among a sample's tokens of all modalities together, instead of each modality's own.

    An ablation of v1. Inferred: its temperature, that of the official run.
    """
    return replace(run, loss={"type": "patch_discrimination", "tau": 0.1})


def mae(run: OlmoEarthRecipe) -> OlmoEarthRecipe:
    """Pixels of masked patches predicted instead of embeddings under a teacher.

    An ablation of v1. Inferred: one linear layer per band set from what the predictor gives to the patch, the mean
    absolute error of the normalised values that are there, summed over modalities as the official loss is; and that
    masking and contrast stay.
    """
    return replace(run, loss={"type": "mae"})


def reinitialised_targets(run: OlmoEarthRecipe) -> OlmoEarthRecipe:
    """Targets by random weights of the teacher's own instead of a copy of the student's first ones.

    An ablation of v1. Inferred: the seed.
    """
    return replace(run, teacher=TeacherSettings(seed=run.init_seed + 1))


def moving_targets(run: OlmoEarthRecipe) -> OlmoEarthRecipe:
    """Targets by a teacher that follows the student: a moving average whose momentum goes from 0.996 to 1.

    An ablation of v1, as published.
    """
    return replace(run, teacher=TeacherSettings(momentum_start=0.996, momentum_end=1.0))


def sentinel2_only(run: OlmoEarthRecipe) -> OlmoEarthRecipe:
    """Sentinel-2 alone to look at; the maps are still predicted.

    v1 has ablations with fewer modalities, without saying which in what is at hand; this one is inferred.
    """
    modalities = ("sentinel2_l2a", *TARGET_ONLY)
    return replace(run, encoder=replace(run.encoder, modalities=modalities, observed=("sentinel2_l2a",)))


def no_band_dropout(run: OlmoEarthRecipe) -> OlmoEarthRecipe:
    """The student always gets all bands.

    An ablation of v1.1.
    """
    return replace(run, band_dropout=0.0)


def no_pixel_layer(run: OlmoEarthRecipe) -> OlmoEarthRecipe:
    """Patches projected straight from their pixels, without a layer that each pixel passes first.

    An ablation of v1.1. Inferred: the projection is a matrix over (row, column, band), not v1's convolution.
    """
    return replace(run, encoder=replace(run.encoder, pixel_hidden=()))


def v1_loss(run: OlmoEarthRecipe) -> OlmoEarthRecipe:
    """The loss of v1: equal targets of maps count as each other's negatives.

    An ablation of v1.1. The weight of the contrast stays.
    """
    return replace(run, loss=V1_LOSS)


def v1_masking(run: OlmoEarthRecipe) -> OlmoEarthRecipe:
    """The masking of v1: random patches and dates of some band sets.

    An ablation of v1.1.
    """
    return replace(run, masking=V1_MASKING)


ABLATIONS: dict[str, Callable[[OlmoEarthRecipe], OlmoEarthRecipe]] = {
    "random-masking": random_masking,
    "fixed-modality-masking": fixed_modality_masking,
    "no-contrast": no_contrast,
    "patch-discrimination": patch_discrimination,
    "mae": mae,
    "reinitialised-targets": reinitialised_targets,
    "moving-targets": moving_targets,
    "sentinel2-only": sentinel2_only,
    "no-band-dropout": no_band_dropout,
    "no-pixel-layer": no_pixel_layer,
    "v1-loss": v1_loss,
    "v1-masking": v1_masking,
}
"""The published ablations, and each one's name at the end of a recipe's. They go with any run that they change."""


def ablated(run: Callable[[], OlmoEarthRecipe], ablation: str) -> OlmoEarthRecipe:
    """Give a run with an ablation."""
    recipe = run()
    return replace(ABLATIONS[ablation](recipe), name=f"{recipe.name}-{ablation}")


ABLATED: dict[str, Callable[[], OlmoEarthRecipe]] = {
    f"{name}-{ablation}": partial(ablated, run, ablation)
    for name, run in RUNS.items()
    for ablation, change in ABLATIONS.items()
    if change(run()) != run()
}
