"""A recipe and its corpora as a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from torch import nn

from panterra import __version__
from panterra.data.olmoearth_h5 import Corpus, PretrainingBatches, read_tile_px
from panterra.errors import InputError
from panterra.files import write_whole
from panterra.models.normalize import normalize_olmoearth
from panterra.models.weights import save_model
from panterra.objectives.latent_mim import LatentMIM, Views
from panterra.objectives.masked_batches import MaskedBatches
from panterra.objectives.teacher import follow, momentum_at
from panterra.recipes.checks import Labelled, knn_check, loss_check
from panterra.recipes.olmoearth import OlmoEarthRecipe
from panterra.recipes.overrides import check
from panterra.recipes.plan import facts_of, num_steps
from panterra.train.loop import Check, Run, TrainResult
from panterra.train.monitors import collapse_check, latent_mim_vectors
from panterra.train.optim import Optimisation

WATCHED = 64
"""Samples that the checks look at where none are held out, at most."""


def make_run(
    recipe: OlmoEarthRecipe,
    corpora: Sequence[Corpus],
    *,
    check_every: int = 1000,
    labelled: Labelled | None = None,
    checks: Sequence[Check] = (),
) -> Run:
    """Make a recipe's run over some corpora.

    Every `check_every` steps the checks look at the loss of a batch that stays the same, for signs of collapse and,
    given labelled samples, at the accuracy of nearest neighbours; 0 leaves them out. `checks` come on top. Raises
    InputError for settings that do not go together.
    """
    check(recipe)
    training, held_out = hold_out(corpora, recipe)
    number = facts_of(training, recipe).samples
    if number < recipe.batch:
        raise InputError(
            f"{number} samples to train on do not fill a batch of {recipe.batch}; set batch smaller, such as "
            f"batch={max(1, number // 2)}"
        )
    optimisation = Optimisation(
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        steps=num_steps(recipe, number),
        betas=recipe.betas,
        eps=recipe.eps,
        warmup_steps=recipe.warmup_steps,
        final_share=recipe.final_share,
        clip_norm=recipe.clip_norm,
    )

    def batches(rank: int, world: int) -> MaskedBatches:
        return masked_batches(recipe, training, rank=rank, world=world)

    def move_teacher(objective: nn.Module, step: int) -> None:
        assert isinstance(objective, LatentMIM)
        start, end = recipe.teacher.momentum_start, recipe.teacher.momentum_end
        follow(objective.teacher, objective.encoder, momentum_at(step, optimisation.steps, start=start, end=end))

    def export(objective: nn.Module, folder: Path) -> None:
        assert isinstance(objective, LatentMIM)
        objective.encoder.name, objective.encoder.licence = recipe.name, recipe.licence
        save_model(objective.encoder, folder)
        write_card(folder, recipe, corpora)

    watched: list[Check] = []
    if check_every:
        views = watched_views(recipe, held_out or training)
        watched += [
            loss_check(views, every=check_every),
            collapse_check(latent_mim_vectors(views), every=check_every),
        ]
        if labelled is not None:
            watched.append(knn_check(labelled, every=check_every))
    moving = (recipe.teacher.momentum_start, recipe.teacher.momentum_end) != (1.0, 1.0)
    return Run(
        name=recipe.name,
        seed=recipe.data_seed,
        init_seed=recipe.init_seed,
        objective=lambda: LatentMIM(recipe.objective),
        batches=batches,
        optimisation=optimisation,
        before_step=move_teacher if moving else None,
        checks=(*watched, *checks),
        export=export,
        settings={"recipe": asdict(recipe), "corpora": [fingerprint(corpus) for corpus in corpora]},
    )


def masked_batches(
    recipe: OlmoEarthRecipe, corpora: Sequence[Corpus], *, rank: int = 0, world: int = 1
) -> MaskedBatches:
    """Give one rank's micro-batches of every step."""
    batches = PretrainingBatches(
        corpora,
        modalities=recipe.modalities,
        normalise=normalize_olmoearth,
        groups=recipe.encoder.groups,
        budget_groups=recipe.budget_groups,
        batch_size=recipe.batch,
        seed=recipe.data_seed,
        rank=rank,
        world=world,
        patch_px=recipe.patch_px,
        side_patches=recipe.side_patches,
        token_budget=recipe.token_budget,
        fraction=recipe.fraction,
    )
    return MaskedBatches(
        batches, recipe.masking, micro_batch=recipe.micro_batch, views=recipe.views, symmetries=recipe.symmetries
    )


def hold_out(corpora: Sequence[Corpus], recipe: OlmoEarthRecipe) -> tuple[list[Corpus], list[Corpus]]:
    """Part the corpora into what is trained on and what is not, the latter empty where the recipe holds nothing out."""
    if not recipe.held_out:
        return list(corpora), []
    usable = [corpus.usable(recipe.modalities) for corpus in corpora]
    ends = np.cumsum([len(indices) for indices in usable])
    if recipe.held_out >= ends[-1]:
        raise InputError(f"{recipe.held_out} of {ends[-1]} samples cannot be held out; set held_out smaller")
    rng = np.random.Generator(np.random.PCG64([recipe.data_seed, recipe.held_out]))
    chosen = np.sort(rng.choice(ends[-1], recipe.held_out, replace=False))
    training, held_out = [], []
    for corpus, indices, end in zip(corpora, usable, ends, strict=True):
        mine = indices[chosen[(chosen >= end - len(indices)) & (chosen < end)] - (end - len(indices))]
        out = np.zeros((len(corpus), 1), dtype=bool)
        out[mine] = True
        # A sample that seems to have nothing is never read.
        training.append(replace(corpus, has=corpus.has & ~out))
        held_out.append(replace(corpus, has=corpus.has & out))
    return training, held_out


def watched_views(recipe: OlmoEarthRecipe, corpora: Sequence[Corpus]) -> Views:
    """Make the batch that the checks look at, always the same, of a middling patch and crop size."""
    number = recipe.held_out or min(WATCHED, recipe.batch)
    tile_px = read_tile_px(corpora[0].path(0))
    fitting = [(patch, side) for patch in recipe.patch_px for side in recipe.side_patches if patch * side <= tile_px]
    patch_px = _middle(sorted({patch for patch, _ in fitting}))
    same = replace(
        recipe,
        batch=number,
        micro_batch=number,
        patch_px=(patch_px,),
        side_patches=(_middle([side for patch, side in fitting if patch == patch_px]),),
        symmetries=False,
        fraction=1.0,
    )
    (views,) = masked_batches(same, corpora)[0]
    return views


def _middle(values: Sequence[int]) -> int:
    return values[(len(values) - 1) // 2]


def fingerprint(corpus: Corpus) -> dict[str, object]:
    """Describe a corpus so that another one is told from it, wherever it lies."""
    digest = hashlib.sha256(np.packbits(corpus.has).tobytes() + corpus.latlon.astype(np.float64).tobytes())
    return {"samples": len(corpus), "modalities": corpus.modalities, "sha256": digest.hexdigest()}


def write_card(
    folder: Path, recipe: OlmoEarthRecipe, corpora: Sequence[Corpus], result: TrainResult | None = None
) -> Path:
    """Write the card of an exported model: what it was trained on and how, and what that took where it is known."""
    coverage = facts_of(corpora, recipe).coverage
    encoder = recipe.encoder
    lines = [
        f"# {recipe.name}",
        "",
        f"An OlmoEarth encoder of width {encoder.dim}, depth {encoder.depth} and {encoder.heads} heads, trained with "
        f"Panterra {__version__}.",
        "",
        "## Trained on",
        "",
        *(f"- {len(corpus)} samples with {', '.join(corpus.modalities)}" for corpus in corpora),
        "",
        "| modality | share of samples | role |",
        "|---|---|---|",
        *(f"| {m} | {share:.1%} | {_role(recipe, m)} |" for m, share in coverage.items()),
        "",
        "Inputs are normalised with OlmoEarth's published statistics (Ai2, OlmoEarth Artifact License).",
        f"Licence of the weights: {recipe.licence or 'not stated; whoever trained them decides'}.",
    ]
    if result is not None:
        co2e = "" if result.co2e_kg is None else f", {result.co2e_kg:.3g} kg CO2e"
        lines += [
            "",
            "## What it took",
            "",
            f"{result.step} steps, {result.samples} samples, {result.seconds / 3600:.3g} hours, "
            f"{result.kwh:.3g} kWh{co2e}; loss of the last step {result.loss:.4g}.",
        ]
    lines += ["", "## Settings", "", "```json", json.dumps(asdict(recipe), indent=1), "```", ""]
    return write_whole(folder / "README.md", "\n".join(lines))


def _role(recipe: OlmoEarthRecipe, modality: str) -> str:
    return "seen and predicted" if modality in recipe.encoder.observed else "predicted"
