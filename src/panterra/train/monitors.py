"""Signs that a representation collapses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from panterra.models.predictor import VISIBLE
from panterra.objectives.latent_mim import LatentMIM, Views
from panterra.train.loop import Check

MOST_ROWS = 2048
"""How many vectors are looked at, evenly spread over those that there are."""


def effective_rank(x: Float[Tensor, "n d"]) -> float:
    """Give the exponential of the entropy of the singular values, from 1 to min(n, d).

    Roy and Vetterli 2007; on embeddings it is known as RankMe (Garrido et al. 2023).
    """
    values = torch.linalg.svdvals(x.double())
    share = values / values.sum().clamp(min=1e-30)
    return float(torch.special.entr(share).sum().exp())


def uniformity(x: Float[Tensor, "n d"], t: float = 2.0) -> float:
    """Give the log of the mean of exp(-t d²) over pairs of different unit vectors (Wang and Isola 2020).

    0 where all are equal; the lower, the more evenly they cover the sphere.
    """
    distances = F.pdist(F.normalize(x.double(), dim=-1))
    return float((-t * distances.square()).exp().mean().log())


def mean_cosine(x: Float[Tensor, "n d"]) -> float:
    """Average the cosine over pairs of different vectors."""
    unit = F.normalize(x.double(), dim=-1)
    pairs = len(x) * (len(x) - 1)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / pairs)


def signs_of_collapse(x: Float[Tensor, "n d"]) -> dict[str, float]:
    """Say how far vectors are from being all the same, or all in a few directions."""
    rows = x[torch.linspace(0, len(x) - 1, min(len(x), MOST_ROWS)).long()]
    return {"effective_rank": effective_rank(rows), "uniformity": uniformity(rows), "mean_cosine": mean_cosine(rows)}


def collapse_check(
    vectors: Callable[[nn.Module], Mapping[str, Float[Tensor, "_n _d"]]], *, every: int, name: str = "collapse"
) -> Check:
    """Watch named sets of vectors that a function takes from the objective.

    Where there are a "prediction" and a "target", row for row, their mean cosine is watched as "similarity".
    """

    @torch.no_grad()
    def run(objective: nn.Module, step: int) -> dict[str, float]:
        found = vectors(objective)
        signs = {f"{what}_{sign}": v for what, x in found.items() for sign, v in signs_of_collapse(x).items()}
        if "prediction" in found and "target" in found:
            cosines = F.cosine_similarity(found["prediction"].float(), found["target"].float(), dim=-1)
            signs["similarity"] = float(cosines.mean())
        return signs

    return Check(name=name, every=every, run=run)


def latent_mim_vectors(views: Views) -> Callable[[nn.Module], dict[str, Tensor]]:
    """Take from Latent MIM its summaries of samples and its predictions beside their targets, on the first of views.

    Targets are left out where pixels are predicted.
    """
    (view, *_) = views

    @torch.no_grad()
    def vectors(objective: nn.Module) -> dict[str, Tensor]:
        assert isinstance(objective, LatentMIM)
        (here,) = Views((view,)).to(next(objective.parameters()).device)
        visible = {m: mask == VISIBLE for m, mask in here.masks.items()}
        inputs = {m: here.inputs[m] for m in objective.config.encoder.modalities if m in visible}
        out = objective.encoder(inputs, here.timestamps, patch_px=here.patch_px, visible=visible)
        predictions = objective.predictor(out.tokens, here.masks, here.timestamps, patch_px=here.patch_px)
        chosen = predictions.chosen
        found = {"summary": out.aggregated, "prediction": predictions.tokens[chosen.valid]}
        if objective.config.pixels:
            return found
        target = objective.teacher(here.inputs, here.patch_px)
        wanted = chosen.take(torch.cat([target[m].flatten(1, 4) for m in predictions.sizes], dim=1))
        return {**found, "target": wanted[chosen.valid]}

    return vectors
