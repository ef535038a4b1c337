"""How much each class counts while something is learned."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

ClassWeights = Literal["none", "balanced"]
"""balanced: rare classes count as much as common ones."""


def balanced_weights(counts: Int[np.ndarray, " k"], *, samples: int | None = None) -> Float[Tensor, " k"]:
    """Weigh classes by how rare they are, so that all weigh the same together; 0 for a class that never occurs.

    Of labels, of which each of `samples` may have several, the presence of one weighs as much as its absence.
    """
    present = counts > 0
    weights = np.zeros(len(counts))
    if samples is None:
        weights[present] = counts.sum() / (present.sum() * counts[present])
    else:
        weights[present] = (samples - counts[present]) / counts[present]
    return torch.tensor(weights, dtype=torch.float32)


def count_classes(y: Tensor, classes: int) -> Int[np.ndarray, " k"]:
    """Count the labels of each class: codes, negative without a label, or [N, K] of 0 and 1."""
    if y.is_floating_point():
        return (y > 0.5).sum(0).cpu().numpy()
    counts: np.ndarray = torch.bincount(y[y >= 0].flatten().long(), minlength=classes).cpu().numpy()
    return counts
