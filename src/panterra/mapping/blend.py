"""How overlapping windows become one map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def window_weight(height: int, width: int, overlap: int) -> np.ndarray:
    """Weigh the patches of a window: one in the middle, rising smoothly across the overlap; float32 [height, width].

    Never zero, so every patch is somebody's. Neighbours on the regular lattice add up to one (sin² + cos²), so that
    no seam shows; where they do not (borders, the shifted last window), `Canvas.mean` divides by the sum.
    """
    rows, cols = _ramps(height, overlap), _ramps(width, overlap)
    return np.outer(rows, cols).astype(np.float32)


def _ramps(size: int, overlap: int) -> np.ndarray:
    weight = np.ones(size)
    length = min(overlap, size)
    rise = np.sin(np.pi / 2 * (np.arange(length) + 0.5) / max(overlap, 1)) ** 2
    weight[:length] *= rise
    weight[size - length :] *= rise[::-1]
    return weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """Weighted sums of features over an area, and their weights."""

    total: np.ndarray
    """float32 [H, W, D]."""
    weight: np.ndarray
    """float32 [H, W]; zero where nothing was seen."""

    @classmethod
    def blank(cls, height: int, width: int, dim: int) -> Canvas:
        """Make a canvas on which nothing was seen."""
        return cls(
            total=np.zeros((height, width, dim), dtype=np.float32), weight=np.zeros((height, width), dtype=np.float32)
        )

    def part(self, rows: slice, cols: slice) -> Canvas:
        """View a part of the canvas."""
        return Canvas(total=self.total[rows, cols], weight=self.weight[rows, cols])

    def copy(self) -> Canvas:
        """Copy a part, so that the whole may go."""
        return Canvas(total=self.total.copy(), weight=self.weight.copy())

    def paint(self, features: np.ndarray, valid: np.ndarray, weight: np.ndarray) -> None:
        """Add features [H, W, D] of the canvas's size where they are valid [H, W]; others' values do not matter."""
        weight = np.where(valid, weight, 0).astype(np.float32)
        seen = np.where(valid[..., None], features, 0)
        self.total[...] += weight[..., None] * seen
        self.weight[...] += weight

    def add(self, other: Canvas) -> None:
        """Add the sums of another canvas to the upper left corner of this one, as far as it reaches."""
        height = min(self.weight.shape[0], other.weight.shape[0])
        width = min(self.weight.shape[1], other.weight.shape[1])
        self.total[:height, :width] += other.total[:height, :width]
        self.weight[:height, :width] += other.weight[:height, :width]

    def forget(self, where: np.ndarray) -> None:
        """Take what was added at some patches, bool [H, W], for unseen."""
        self.total[where] = 0
        self.weight[where] = 0

    def mean(self) -> np.ndarray:
        """Return the blended features, float32 [H, W, D]; NaN where nothing was seen."""
        with np.errstate(invalid="ignore"):
            mean: np.ndarray = self.total / self.weight[..., None]
        return mean
