"""How well stored vectors answer a query."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32

from panterra.mapping.embeddings import NO_BYTE, Block

STEP = 8192
"""Vectors that are expanded to float32 together: they stay in the processor's cache."""


def directional_products(weights: Float32[np.ndarray, "q d"], codes: np.ndarray) -> Float32[np.ndarray, "q n"]:
    """Multiply weights with the directions of stored vectors [D, n]; NaN where there are no data.

    Codes of int8 are expanded a step at a time; the scale of a patch has no part in its direction.
    """
    products = np.empty((len(weights), codes.shape[1]), np.float32)
    for first in range(0, codes.shape[1], STEP):
        part = expand(codes[:, first : first + STEP])
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            products[:, first : first + STEP] = (weights @ part) / np.sqrt(np.einsum("dn,dn->n", part, part))
    return products


def expand(codes: np.ndarray) -> np.ndarray:
    """Turn stored numbers [D, n] into float32 vectors of the same direction; NaN where there are no data."""
    vectors = codes.astype(np.float32)
    if codes.dtype == np.int8:
        vectors *= np.abs(vectors)
        vectors[:, codes[0] == NO_BYTE] = np.nan
    return vectors


def units_of(block: Block) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Return vectors of length 1 [n, D] and their cells, a step at a time, without those that have no data."""
    for first in range(0, len(block.cells), STEP):
        vectors = expand(block.codes[:, first : first + STEP]).T
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        seen = np.isfinite(vectors).all(1)
        yield np.ascontiguousarray(vectors[seen]), block.cells[first : first + STEP][seen]


class Best:
    """The best `most` of the candidates seen; equal scores go to the earlier store and cell."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.full = False
        """Whether candidates were turned away."""
        self._floor = -math.inf
        self._held: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._count = 0

    def promising(self, scores: np.ndarray) -> np.ndarray:
        """Return where scores could still be among the best."""
        return np.flatnonzero(scores >= self._floor)

    def add(self, scores: np.ndarray, source: int, cells: np.ndarray) -> None:
        self._held.append((scores, np.full(len(scores), source, np.int64), cells))
        self._count += len(scores)
        if self._count > 2 * self.most:
            self._held = [self.sorted()]
            self._count, self.full = self.most, True
            self._floor = float(self._held[0][0][-1])

    def sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return scores, sources and cells, best first."""
        if not self._held:
            return np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int64)
        score, source, cell = (np.concatenate(column) for column in zip(*self._held, strict=True))
        order = np.lexsort((cell, source, -score))
        self.full |= len(order) > self.most
        order = order[: self.most]
        return score[order], source[order], cell[order]
