"""How embeddings spread over the space that they have, whatever they are used for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from panterra.train.monitors import effective_rank, uniformity

MOST_ROWS, MOST_PAIRED, MOST_IMAGES = 4096, 2048, 256
"""Vectors for the rank, vectors for what is told of pairs, and images that are looked at one by one (OlmoEarth)."""


def diagnose(x: Float[Tensor, "n *grid d"]) -> dict[str, float]:
    """Give rank, uniformity, cosines and norms of vectors evenly spread over those that have data.

    Where samples have several vectors, figures that begin with "image_" are of those of one sample, averaged over
    samples.
    """
    rows = x.reshape(-1, x.shape[-1])
    known = rows[torch.linspace(0, len(rows) - 1, min(len(rows), 4 * MOST_ROWS)).long()].float()
    known = known[known.isfinite().all(1)]
    found = _spread(known)
    if x.ndim > 2:
        images = [image.reshape(-1, x.shape[-1]).float() for image in _some(x, MOST_IMAGES)]
        each = [_spread(image[image.isfinite().all(1)]) for image in images]
        for name in ("effective_rank", "uniformity", "mean_cosine"):
            values = [figures[name] for figures in each if name in figures]
            if values:
                found[f"image_{name}"] = sum(values) / len(values)
    return found


def _spread(rows: Float[Tensor, "n d"]) -> dict[str, float]:
    if len(rows) < 2:
        return {}
    paired = _some(rows, MOST_PAIRED)
    unit = F.normalize(paired.double(), dim=-1)
    i, j = torch.triu_indices(len(unit), len(unit), offset=1)
    cosines, norms = (unit @ unit.mT)[i, j], rows.double().norm(dim=-1)
    return {
        "effective_rank": effective_rank(_some(rows, MOST_ROWS)),
        "uniformity": uniformity(paired),
        "mean_cosine": float(cosines.mean()),
        "std_cosine": float(cosines.std(correction=0)),
        "min_cosine": float(cosines.min()),
        "max_cosine": float(cosines.max()),
        "mean_norm": float(norms.mean()),
        "std_norm": float(norms.std(correction=0)),
        "min_norm": float(norms.min()),
        "max_norm": float(norms.max()),
    }


def _some(x: Tensor, most: int) -> Tensor:
    return x[torch.linspace(0, len(x) - 1, min(len(x), most)).long()]
