"""Where a model has seen the like, and where it guesses.

The dissimilarity index and the area of applicability of Meyer and Pebesma (2021,
https://doi.org/10.1111/2041-210X.13650), in the space of embeddings: how far a place is from the nearest places that
were learned from, against how far those are from each other across spatial blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from panterra.errors import InputError
from panterra.files import saving_tensors, unfinished

Metric = Literal["euclidean", "cosine", "mahalanobis"]

_DISTANCES = 2**24
"""How many are held at a time."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Applicability:
    """What a model was trained on, as points in the space of its features."""

    metric: Metric
    neighbours: int
    mean: Float[np.ndarray, " d"]
    whiten: Float[np.ndarray, "d d"]
    """Standardises features that the mean was taken from."""
    examples: Float[np.ndarray, "n d"]
    """Standardised; of length 1 with cosine."""
    unit: float
    """The mean distance between any two examples, which the index counts in."""
    threshold: float
    """The index beyond which a place is outside."""

    @property
    def dim(self) -> int:
        return len(self.mean)

    def index(self, features: Float[np.ndarray, "... d"]) -> Float[np.ndarray, " ..."]:
        """Give the dissimilarity index of places, float32: 0 is the same as an example; NaN where there is no data."""
        given = np.asarray(features)
        if given.ndim == 0 or given.shape[-1] != self.dim:
            raise InputError(f"features are {list(given.shape)}; wanted [..., {self.dim}], of the encoder trained with")
        rows = given.reshape(-1, self.dim)
        seen = np.isfinite(rows).all(1)
        index = np.full(len(rows), np.nan, np.float32)
        placed = _placed(rows[seen], self.mean, self.whiten, self.metric)
        nearest = [
            part.topk(self.neighbours, largest=False).values.mean(1)
            for part in _distances(placed, torch.from_numpy(self.examples), self.metric)
        ]
        if nearest:
            index[seen] = torch.cat(nearest).numpy() / self.unit
        return index.reshape(given.shape[:-1])

    def inside(self, index: Float[np.ndarray, " ..."]) -> Bool[np.ndarray, " ..."]:
        """Mark where a dissimilarity index lies in the area of applicability; False without data."""
        within: np.ndarray = np.asarray(index) <= self.threshold
        return within

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file."""
        path = Path(path)
        about = {
            "metric": self.metric,
            "neighbours": self.neighbours,
            "unit": self.unit,
            "threshold": self.threshold,
        }
        arrays = {"mean": self.mean, "whiten": self.whiten, "examples": self.examples}
        with unfinished(path) as partial, saving_tensors(path):
            save_file(arrays, partial, metadata={"applicability": json.dumps(about)})
        return path


def load_applicability(path: str | Path) -> Applicability:
    """Read what `Applicability.save` wrote."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["applicability"])
            arrays = {name: file.get_tensor(name) for name in ("mean", "whiten", "examples")}
        return Applicability(**about, **arrays)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds no area of applicability; fit and save it again") from error


def fit_applicability(
    features: Float[np.ndarray, "n d"],
    groups: Int[np.ndarray, " n"],
    *,
    metric: Metric = "euclidean",
    neighbours: int = 1,
) -> Applicability:
    """Learn from training features, and their spatial blocks, how dissimilar is still alike.

    Features are standardised each on its own ("euclidean", and "cosine", which looks at directions from their mean
    alone) or together with what they share ("mahalanobis": the covariance is shrunk by Ledoit and Wolf's formula, so
    that fewer samples than features are enough). The distance of a place is the mean of those to its `neighbours`
    nearest examples.

    The threshold is the largest index of an example against those of other blocks that is no outlier: within the third
    quartile plus 1.5 times the distance between the quartiles. It takes two blocks or more.
    """
    given, block = np.asarray(features, np.float64), np.asarray(groups)
    if given.ndim != 2 or block.shape != given.shape[:1]:
        raise InputError(f"features are {list(given.shape)} and groups {list(block.shape)}; wanted [n, d] and [n]")
    if not np.isfinite(given).all():
        raise InputError("features hold NaN or infinity; leave out samples without data")
    if metric not in get_args(Metric):
        raise InputError(f"there is no metric {metric!r}; known: {', '.join(get_args(Metric))}")
    _, group, size = np.unique(block, return_inverse=True, return_counts=True)
    if len(size) < 2 or not 0 < neighbours <= len(given) - size.max():
        raise InputError(
            f"{len(given)} samples in {len(size)} groups came for {neighbours} neighbours in other groups; "
            "give samples of two groups or more, and ask for fewer neighbours"
        )
    mean = given.mean(0)
    whiten = _whitening(given - mean, metric)
    examples = _placed(given, mean, whiten, metric)
    groups_of = torch.from_numpy(group)
    total, across, start = 0.0, [], 0
    for part in _distances(examples, examples, metric):
        total += float(part.sum(dtype=torch.float64))
        own = groups_of[start : start + len(part), None] == groups_of
        start += len(part)
        across.append(part.masked_fill_(own, torch.inf).topk(neighbours, largest=False).values.mean(1))
    unit = total / (len(given) * (len(given) - 1))
    if not unit > 0:
        raise InputError("all training features are the same; there is nothing to be like or unlike")
    index = torch.cat(across).numpy() / unit
    lower, upper = np.quantile(index, [0.25, 0.75])
    threshold = float(index[index <= upper + 1.5 * (upper - lower)].max())
    return Applicability(
        metric=metric,
        neighbours=neighbours,
        mean=mean.astype(np.float32),
        whiten=whiten.astype(np.float32),
        examples=examples.numpy(),
        unit=unit,
        threshold=threshold,
    )


def _whitening(centred: Float[np.ndarray, "n d"], metric: Metric) -> Float[np.ndarray, "d d"]:
    if metric != "mahalanobis":
        spread = centred.std(0)
        return np.diag(1 / np.where(spread > 0, spread, 1))
    values, vectors = np.linalg.eigh(_shrunk_covariance(centred))
    root: np.ndarray = vectors / np.sqrt(values)
    return root


def _shrunk_covariance(centred: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "d d"]:
    """Draw the sample covariance towards a multiple of the identity (Ledoit and Wolf 2004)."""
    num, dim = centred.shape
    covariance = centred.T @ centred / num
    level = np.trace(covariance) / dim
    if level == 0:
        return np.eye(dim)
    away = (covariance**2).sum() - dim * level**2
    noise = ((centred**2).T @ (centred**2) / num - covariance**2).sum() / num
    # A floor keeps the result invertible where a few features say all that the others say.
    share = np.clip(noise / away if away > 0 else 1.0, 1e-6, 1)
    shrunk: np.ndarray = (1 - share) * covariance + share * level * np.eye(dim)
    return shrunk


def _placed(rows: np.ndarray, mean: np.ndarray, whiten: np.ndarray, metric: Metric) -> Float[Tensor, "n d"]:
    """Standardise features, as float32: what distances are measured between."""
    rows = (rows - mean) @ whiten
    if metric == "cosine":
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return torch.from_numpy(np.ascontiguousarray(rows, np.float32))


def _distances(
    rows: Float[Tensor, "m d"], examples: Float[Tensor, "n d"], metric: Metric
) -> Iterator[Float[Tensor, "part n"]]:
    """Measure from rows to examples, some rows at a time."""
    for part in rows.split(max(1, _DISTANCES // len(examples))):
        if not len(part):
            return
        if metric == "cosine":
            yield (1 - part @ examples.T).clamp_min_(0)
        else:
            yield torch.cdist(part, examples)
