"""The Dice loss: how little what is predicted and what is there overlap, class by class.

Sudre et al. 2017, "Generalised Dice overlap as a deep learning loss function for highly unbalanced segmentations",
with one term per class: the loss is the mean over classes, each weighing by how rare it is, of
1 - (2 sum(p y) + 1) / (sum(p) + sum(y) + 1), over all labelled pixels of a batch. It stands beside the cross-entropy.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

SMOOTHING = 1.0
"""Added above and below the line (OlmoEarth), so that a class that is nowhere costs nothing."""


def rarity(counts: Int[np.ndarray, " k"]) -> Float[Tensor, " k"]:
    """Weigh classes by the inverse of their frequency, in sum 1 (OlmoEarth); 0 for a class that never occurs."""
    present = counts > 0
    weights = np.zeros(len(counts))
    weights[present] = 1 / counts[present]
    return torch.tensor(weights / max(weights.sum(), 1e-300), dtype=torch.float32)


def dice_loss(
    scores: Float[Tensor, "b k *grid"], target: Int[Tensor, b * grid], weights: Float[Tensor, " k"]
) -> Float[Tensor, ""]:
    """Give the weighted Dice loss of class scores; negative targets are no label."""
    known = (target >= 0)[:, None]
    share = scores.softmax(1) * known
    truth = torch.zeros_like(share).scatter_(1, target.clamp(min=0)[:, None], 1.0) * known
    over = (0, *range(2, scores.ndim))
    sums = torch.stack([(share * truth).sum(over), share.sum(over), truth.sum(over)])
    return dice_of(sums, weights)


def dice_of(sums: Float[Tensor, "3 *m k"], weights: Float[Tensor, " k"]) -> Float[Tensor, "*m"]:
    """Give the loss from sums over labelled pixels: of p y, of p and of y."""
    both, guessed, there = sums
    overlap = (2 * both + SMOOTHING) / (guessed + there + SMOOTHING)
    loss: Tensor = (weights * (1 - overlap)).sum(-1)
    return loss


def dice_slopes(
    sums: Float[Tensor, "3 *m k"], weights: Float[Tensor, " k"]
) -> tuple[Float[Tensor, "*m k"], Float[Tensor, "*m k"]]:
    """Differentiate the loss by the share p of one pixel: where the pixel is of the class, and where it is not."""
    both, guessed, there = sums
    whole = guessed + there + SMOOTHING
    elsewhere = weights * (2 * both + SMOOTHING) / whole.square()
    return elsewhere - 2 * weights / whole, elsewhere
