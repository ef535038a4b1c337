"""What a run will take, counted before it starts."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from panterra.data.olmoearth_h5 import SOURCE, Corpus, num_dates, read_tile_px
from panterra.energy import CORE_W
from panterra.energy.grid import local_grid
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.layers import Block
from panterra.models.olmoearth import OlmoEarthConfig
from panterra.models.predictor import DECODE, VISIBLE
from panterra.models.reconstructor import patch_side
from panterra.objectives.latent_mim import LatentMIM
from panterra.objectives.masking import make_masks
from panterra.recipes.olmoearth import PUBLISHED_SAMPLES, OlmoEarthRecipe

DRAWS = 64
"""Samples that are masked to count tokens, for each number of patches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusFacts:
    """What a plan needs to know of the samples to train on."""

    samples: int
    tile_px: int
    modalities: tuple[str, ...]
    has: Bool[np.ndarray, "n m"]
    """Which sample, or which example of one, has which modality."""

    @property
    def coverage(self) -> dict[str, float]:
        """Give the share of samples that have each modality."""
        return dict(zip(self.modalities, self.has.mean(0).tolist(), strict=True))


def facts_of(corpora: Sequence[Corpus], recipe: OlmoEarthRecipe) -> CorpusFacts:
    """Count what a recipe can use of its corpora."""
    rows = []
    for corpus in corpora:
        kept = corpus.has[corpus.usable(recipe.modalities, fraction=recipe.fraction, seed=recipe.data_seed)]
        columns = {m: kept[:, i] for i, m in enumerate(corpus.modalities)}
        # Every sample has its place, which no table lists.
        absent = {m: np.full(len(kept), MODALITIES[m].kind == "constant") for m in recipe.modalities}
        rows.append(np.stack([columns.get(SOURCE.get(m, m), absent[m]) for m in recipe.modalities], axis=1))
    has = np.concatenate(rows)
    if not len(has):
        raise InputError(f"no sample has any series of {', '.join(recipe.modalities)}; give another corpus")
    first, *others = (read_tile_px(corpus.path(0)) for corpus in corpora)
    if others and min(others) < first:
        raise InputError(f"tiles of {first} px came before some of {min(others)} px; give the smallest ones first")
    return CorpusFacts(samples=len(has), tile_px=first, modalities=recipe.modalities, has=has)


def published_facts(recipe: OlmoEarthRecipe) -> CorpusFacts:
    """Describe the published corpus, whose coverage is not published: every sample counts as having everything."""
    has = np.ones((1, len(recipe.modalities)), dtype=bool)
    return CorpusFacts(samples=PUBLISHED_SAMPLES, tile_px=128, modalities=recipe.modalities, has=has)


def num_steps(recipe: OlmoEarthRecipe, samples: int) -> int:
    """Count a run's steps: the recipe's own number, or its epochs of whole batches."""
    return recipe.steps or recipe.epochs * (samples // recipe.batch)


# Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class CropTokens:
    """What a sample comes to at one number of patches per side; means over samples, and the most in a micro-batch."""

    side_patches: int
    share: float
    """Of the steps that draw it."""
    dates: int
    tokens: float
    """With data."""
    visible: float
    decoded: float
    shown: Mapping[str, float]
    """Visible tokens by modality."""
    predicted: Mapping[str, float]
    """Decoded tokens by modality."""
    taught: Mapping[str, float]
    """Tokens by modality that the teacher embeds for all views, which share what they both decode."""
    looks: float
    """Pairs of visible tokens of a sample."""
    cross_looks: float
    """Pairs of a decoded and a visible token of a sample."""
    decoded_most: Mapping[str, int]
    """By modality."""
    decoded_together: int
    """Most of a sample's tokens to decode, all modalities together."""


def crop_tokens(recipe: OlmoEarthRecipe, facts: CorpusFacts) -> list[CropTokens]:
    """Count tokens by drawing masks for samples that have what the corpus has, on every date."""
    shares: dict[int, float] = {}
    for patch in recipe.patch_px:
        sides = [side for side in recipe.side_patches if side * patch <= facts.tile_px]
        if not sides:
            raise InputError(f"patches of {patch} px do not fit into tiles of {facts.tile_px} px; set patch_px smaller")
        for side in sides:
            shares[side] = shares.get(side, 0.0) + 1 / len(sides) / len(recipe.patch_px)
    return [_draw_tokens(recipe, facts, side, share) for side, share in sorted(shares.items())]


def _draw_tokens(recipe: OlmoEarthRecipe, facts: CorpusFacts, side: int, share: float) -> CropTokens:
    dates = num_dates(side, recipe.token_budget, recipe.modalities, recipe.budget_groups)
    number = min(recipe.micro_batch, DRAWS)
    rng = np.random.Generator(np.random.PCG64(recipe.data_seed))
    has = facts.has[rng.integers(0, len(facts.has), number)]
    missing = {}
    for i, m in enumerate(recipe.modalities):
        kind, sets = MODALITIES[m].kind, len(recipe.encoder.groups(m))
        grid = (side, side) if _spatial(m) else (1, 1)
        steps = dates if kind in ("series", "weather") else 1
        gone = torch.from_numpy(~has[:, i])[:, None, None, None, None]
        missing[m] = gone.expand(-1, *grid, steps, sets).clone()
    generator = torch.Generator().manual_seed(recipe.data_seed)
    views = [make_masks(missing, recipe.masking, generator=generator) for _ in range(recipe.views)]
    present = torch.stack([(~gone).flatten(1).sum(1) for gone in missing.values()]).sum(0)
    shown = {m: torch.cat([(mask[m] == VISIBLE).flatten(1).sum(1) for mask in views]) for m in missing}
    wanted = {m: torch.stack([mask[m] == DECODE for mask in views]) for m in missing}
    decoded = {m: mask.flatten(2).sum(2).flatten() for m, mask in wanted.items()}
    # Turned views have images of their own.
    taught = {m: mask.flatten(2).sum() if recipe.symmetries else mask.any(0).sum() for m, mask in wanted.items()}
    visible, together = (torch.stack(list(counts.values())).sum(0).float() for counts in (shown, decoded))
    return CropTokens(
        side_patches=side,
        share=share,
        dates=dates,
        tokens=float(present.float().mean()),
        visible=float(visible.mean()),
        decoded=float(together.mean()),
        shown={m: float(count.float().mean()) for m, count in shown.items()},
        predicted={m: float(count.float().mean()) for m, count in decoded.items()},
        taught={m: int(count) / number for m, count in taught.items()},
        looks=float(visible.square().mean()),
        cross_looks=float((visible * together).mean()),
        decoded_most={m: int(count.max()) for m, count in decoded.items()},
        decoded_together=int(together.max()),
    )


# Arithmetic


def training_flops(recipe: OlmoEarthRecipe, crop: CropTokens) -> float:
    """Count the floating-point operations of matrix products, forward and backward, for one sample in all its views.

    Samples are not padded but where the loss compares tokens. A product costs twice as much backward as forward, or as
    much where its input needs no gradient.
    """
    config, predictor = recipe.encoder, recipe.objective.predictor
    embedding = [_embedding_flops(config, m, n) for m, n in crop.shown.items()]
    first, rest = (sum(flops[i] for flops in embedding) for i in (0, 1))
    n, k = crop.visible, crop.decoded
    encoder = config.depth * _block_flops(n, crop.looks, config.dim, config.mlp_ratio)
    output_dim = predictor.output_dim or predictor.dim
    cross = predictor.depth * _cross_flops(k, n, crop.cross_looks, predictor.dim, predictor.mlp_ratio)
    cross += 2 * predictor.dim * (n * config.dim + k * output_dim)
    if recipe.objective.pixels:
        made = sum(2 * output_dim * _patch_values(config, m) * count for m, count in crop.predicted.items())
        return recipe.views * (2 * first + 3 * (rest + encoder + cross + made))
    teacher = sum(sum(_embedding_flops(config, m, n)) for m, n in crop.taught.items())
    compared = sum(2 * size**2 * config.dim for size in _compared(recipe, crop))
    per_view = 2 * first + 3 * (rest + encoder + cross) + 2 * compared
    return recipe.views * per_view + teacher


def _patch_values(config: OlmoEarthConfig, modality: str, patch_px: int | None = None) -> float:
    """Count the values behind a token, averaged over the modality's band sets."""
    sets = config.groups(modality)
    side = patch_side(modality, patch_px or config.base_patch_px)
    return side**2 * sum(len(bands) for bands in sets) / len(sets)


def _compared(recipe: OlmoEarthRecipe, crop: CropTokens) -> list[int]:
    """List how many tokens are compared with each other, for each table of comparisons."""
    if recipe.objective.pixels:
        return []
    if str(recipe.loss["type"]).startswith("modality"):
        return list(crop.decoded_most.values())
    return [crop.decoded_together]


def _embedding_flops(config: OlmoEarthConfig, modality: str, tokens: float) -> tuple[float, float]:
    """Count a forward pass of a modality's patch embeddings: the first layer, and those after it."""
    sets = config.groups(modality)
    spatial, pixels = _spatial(modality), patch_side(modality, config.base_patch_px) ** 2
    counts = [0.0, 0.0]
    for bands in sets:
        widths = [len(bands), *(config.pixel_hidden if spatial else ())]
        layers = [2 * pixels * a * b for a, b in itertools.pairwise(widths)]
        layers.append(2 * pixels * widths[-1] * config.dim)
        post = [config.dim, *(config.post_hidden if spatial else ())]
        layers += [2 * a * b for a, b in itertools.pairwise(post)]
        counts[0] += layers[0] * tokens / len(sets)
        counts[1] += sum(layers[1:]) * tokens / len(sets)
    return counts[0], counts[1]


def _spatial(modality: str) -> bool:
    return MODALITIES[modality].kind in ("series", "still")


def _block_flops(n: float, looks: float, dim: int, mlp_ratio: float) -> float:
    return 2 * n * dim**2 * (4 + 2 * mlp_ratio) + 4 * looks * dim


def _cross_flops(queries: float, context: float, looks: float, dim: int, mlp_ratio: float) -> float:
    linear = queries * (2 + 2 * mlp_ratio) + context * 2
    return 2 * linear * dim**2 + 4 * looks * dim


# Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank."""

    parameters: float
    """The student's, the predictor's and the teacher's, in float32."""
    gradients: float
    optimiser: float
    """AdamW's two moments."""
    activations: float
    """Kept for the backward pass of the largest micro-batch, inputs included."""

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimiser + self.activations


def activation_bytes(recipe: OlmoEarthRecipe, crop: CropTokens, patch_px: int, *, samples: int, width: float) -> float:
    """Estimate what a micro-batch keeps for its backward pass, with `width` bytes per number.

    Per token and layer a block of width d keeps 7 d and its hidden width: its input, queries, keys, values, what
    attention gives, the sum after it and what goes into the GELU; 1 d more where queries and keys are rotated. A
    cross-attention block keeps 5 d for its queries, and 2 d for its context. Patch embeddings keep the resized
    pixels and each layer's input. The loss keeps six copies of what it compares and four tables of comparisons in
    float32; of pixels, six bytes a value. On small cases this is between 0.8 and 1.6 times what automatic
    differentiation keeps; a backward pass needs some more for a moment.
    """
    config, predictor = recipe.encoder, recipe.objective.predictor
    n, k = crop.visible, crop.decoded
    turned = 1 if config.position.startswith("rope") else 0
    block = (7 + turned + config.mlp_ratio) * config.dim
    cross = (5 + turned + predictor.mlp_ratio) * predictor.dim
    numbers = config.depth * n * block + predictor.depth * (k * cross + n * 2 * predictor.dim)
    numbers += sum(_embedding_numbers(config, m, count) for m, count in crop.shown.items())
    numbers += 2 * (n + k) * config.dim + 6 * k * config.dim
    inputs = sum(
        (crop.side_patches * patch_side(m, patch_px)) ** 2
        * len(MODALITIES[m].bands)
        * (crop.dates if MODALITIES[m].kind == "series" else 1)
        for m in config.modalities
        if _spatial(m)
    )
    compared = 16.0 * sum(size**2 for size in _compared(recipe, crop))
    if recipe.objective.pixels:
        compared = 6 * sum(count * _patch_values(config, m, patch_px) for m, count in crop.predicted.items())
    return samples * (recipe.views * (numbers * width + compared) + inputs * 4)


def _embedding_numbers(config: OlmoEarthConfig, modality: str, tokens: float) -> float:
    """Count what a modality's patch embeddings keep: each layer's input, the resized pixels first."""
    sets = config.groups(modality)
    pixels = patch_side(modality, config.base_patch_px) ** 2
    widths = [sum(len(bands) for bands in sets) / len(sets), *config.pixel_hidden]
    return tokens * (pixels * sum(widths) + sum(config.post_hidden) + 2 * config.dim)


# The whole run


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How fast one rank computes."""

    flops: float
    """Floating-point operations per second."""
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """What one rank draws."""

    watts: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run as it would be."""

    recipe: OlmoEarthRecipe
    facts: CorpusFacts
    parameters: Mapping[str, int]
    """Of the encoder, the predictor and the teacher."""
    steps: int
    steps_per_epoch: int
    crops: Sequence[CropTokens]
    flops_per_step: float
    """Of all ranks."""
    memory: Memory
    world: int
    rate: Rate | None
    power: Power | None
    grams_per_kwh: float | None = None

    @property
    def micro_batches(self) -> int:
        """Count a rank's passes in a step."""
        return math.ceil(self.recipe.batch // self.world / self.recipe.micro_batch)

    def mean(self, what: str) -> float:
        """Average a number of `CropTokens` over the crops that are drawn."""
        return sum(crop.share * float(getattr(crop, what)) for crop in self.crops)

    @property
    def seconds_per_step(self) -> float | None:
        return None if self.rate is None else self.flops_per_step / self.world / self.rate.flops

    @property
    def hours(self) -> float | None:
        return None if self.seconds_per_step is None else self.steps * self.seconds_per_step / 3600

    @property
    def kwh(self) -> float | None:
        return None if self.hours is None or self.power is None else self.hours * self.world * self.power.watts / 1000

    @property
    def co2e_kg(self) -> float | None:
        return None if self.kwh is None or self.grams_per_kwh is None else self.kwh * self.grams_per_kwh / 1000

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        batch = self.recipe.batch
        return {
            "recipe": asdict(self.recipe),
            "parameters": dict(self.parameters),
            "corpus": {
                "samples": self.facts.samples,
                "tile_px": self.facts.tile_px,
                "coverage": self.facts.coverage,
            },
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "samples_per_step": batch,
            "ranks": self.world,
            "micro_batches_per_rank": self.micro_batches,
            "tokens_per_sample": {what: self.mean(what) for what in ("tokens", "visible", "decoded")},
            "tokens_per_step": {what: batch * self.mean(what) for what in ("tokens", "visible", "decoded")},
            "crops": [asdict(crop) for crop in self.crops],
            "flops_per_step": self.flops_per_step,
            "memory_bytes_per_rank": {**asdict(self.memory), "total": self.memory.total},
            "rate": None if self.rate is None else asdict(self.rate),
            "power": None if self.power is None else asdict(self.power),
            "seconds_per_step": self.seconds_per_step,
            "hours": self.hours,
            "kwh": self.kwh,
            "co2e_kg": self.co2e_kg,
        }


def plan_run(
    recipe: OlmoEarthRecipe,
    facts: CorpusFacts,
    *,
    world: int = 1,
    sharded: bool = False,
    rate: Rate | None = None,
    power: Power | None = None,
    country: str | None = None,
) -> Plan:
    """Count what a recipe takes on `world` ranks; `sharded` spreads parameters over them as FSDP does."""
    if recipe.batch % world:
        raise InputError(f"a batch of {recipe.batch} cannot be shared by {world} ranks; take a multiple of {world}")
    grid = None if country is None else local_grid(country)
    samples = facts.samples - recipe.held_out
    if samples < recipe.batch:
        raise InputError(f"{samples} samples to train on do not fill a batch of {recipe.batch}; set batch smaller")
    crops = crop_tokens(recipe, facts)
    return Plan(
        recipe=recipe,
        facts=facts,
        parameters=count_parameters(recipe),
        steps=num_steps(recipe, samples),
        steps_per_epoch=samples // recipe.batch,
        crops=crops,
        flops_per_step=recipe.batch * sum(crop.share * training_flops(recipe, crop) for crop in crops),
        memory=estimate_memory(recipe, facts, crops, world=world, sharded=sharded),
        world=world,
        rate=rate,
        power=power,
        grams_per_kwh=None if grid is None else grid.grams_per_kwh,
    )


def count_parameters(recipe: OlmoEarthRecipe) -> dict[str, int]:
    """Count the parameters of each part, the tables of months included."""
    with torch.device("meta"):
        model = LatentMIM(replace(recipe.objective, teacher_seed=None))
    parts = {"encoder": model.encoder, "predictor": model.predictor, "teacher": model.teacher}
    if model.reconstructor is not None:
        parts["reconstructor"] = model.reconstructor
    return {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}


def estimate_memory(
    recipe: OlmoEarthRecipe, facts: CorpusFacts, crops: Sequence[CropTokens], *, world: int = 1, sharded: bool = False
) -> Memory:
    """Estimate one rank's memory: four bytes a parameter, as much for its gradient, twice for AdamW, and activations.

    In bfloat16 a further half is kept as the parameters' low-precision copies, and activations take 2.25 bytes a
    number, since normalisations stay in float32.
    """
    parameters = count_parameters(recipe)
    trained = sum(parameters.values()) - parameters["teacher"]
    low = recipe.precision == "bfloat16"
    share = world if sharded else 1
    samples = min(recipe.micro_batch, recipe.batch // world)
    return Memory(
        parameters=4 * sum(parameters.values()) / share + 2 * trained * low,
        gradients=4 * trained / share,
        optimiser=8 * trained / share,
        activations=max(
            activation_bytes(recipe, crop, patch, samples=samples, width=2.25 if low else 4)
            for crop in crops
            for patch in recipe.patch_px
            if crop.side_patches * patch <= facts.tile_px
        ),
    )


def measure_rate(recipe: OlmoEarthRecipe, crops: Sequence[CropTokens], *, device: str = "cpu") -> Rate:
    """Time one block of the encoder, forward and backward, on sequences as long as crops have in the mean.

    Takes more sequences at once until a pass takes a tenth of a second or a micro-batch is full.
    """
    config = recipe.encoder
    n = max(1, round(sum(crop.share * crop.visible for crop in crops)))
    block = Block(config.dim, config.heads, int(config.dim * config.mlp_ratio), qk_norm=config.qk_norm).to(device)

    def seconds_of(samples: int) -> float:
        x = torch.randn(samples, n, config.dim, device=device, requires_grad=True)
        started = time.perf_counter()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            out = block(x)
        out.float().sum().backward()
        assert x.grad is not None
        float(x.grad[0, 0, 0])  # waits for the device
        return time.perf_counter() - started

    samples, seconds = 1, min(seconds_of(1) for _ in range(2))
    while seconds < 0.1 and 2 * samples <= recipe.micro_batch:
        samples *= 2
        seconds = min(seconds_of(samples) for _ in range(2))
    return Rate(
        flops=3 * samples * _block_flops(n, n**2, config.dim, config.mlp_ratio) / seconds,
        source=f"measured on this machine's {device}: one block of the encoder, {samples} x {n} tokens, "
        f"{recipe.precision}",
    )


def local_power(device: str = "cpu") -> Power | None:
    """Say what this machine's processor or GPU draws when busy; None where nothing is known of it."""
    if device == "cpu":
        cores = torch.get_num_threads()
        return Power(watts=cores * CORE_W, source=f"{cores} cores at {CORE_W:g} W (Green Algorithms)")
    try:
        import pynvml  # type: ignore[import-untyped, unused-ignore]

        pynvml.nvmlInit()
        number = int(device.partition(":")[2] or 0)
        limit = pynvml.nvmlDeviceGetPowerManagementLimit(pynvml.nvmlDeviceGetHandleByIndex(number)) / 1000
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None
    return Power(watts=limit, source="the GPU's power limit")
