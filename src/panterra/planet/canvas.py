"""The ground while it is being painted."""

from __future__ import annotations

import numpy as np

from panterra.planet.chance import Array
from panterra.planet.ground import Grid, Layer
from panterra.planet.surfaces import COVERS, VARIANTS


class Canvas:
    """What all painters work on, sample by sample."""

    def __init__(self, seed: int, grid: Grid) -> None:
        self.seed, self.x, self.y, self.step = seed, grid.x, grid.y, grid.step
        shape = (len(grid.y), len(grid.x))
        self.kind = np.empty(shape, np.uint8)
        self.key = np.empty(shape, np.uint64)
        # Share of the ground under trees outside forests.
        self.trees = np.zeros(shape, np.float32)
        self.height = np.zeros(shape, np.float32)
        self.vigour = np.zeros(shape, np.float32)
        self.shade = np.ones(shape, np.float32)
        self.district = np.empty(shape, np.uint64)
        self.lake = np.zeros(shape, bool)
        # Water, marsh and bare ground; roads and roofs, where no tree grows.
        self.wild = np.zeros(shape, bool)
        self.built = np.zeros(shape, bool)
        self.layers: list[Layer] = []

    def lay(self, cover: Array, name: str, variant: Array, window: tuple[slice, slice] | None = None) -> None:
        """Lay a partly covering surface over a window (or all): nothing lies on lakes, few things on wild land."""
        away = self.wild if name in ("track", "margin") else self.lake
        where = np.flatnonzero((cover > 0.02) & ~away[window or ...])
        row = COVERS.index(name) * VARIANTS + np.broadcast_to(variant, cover.shape).ravel()[where] % VARIANTS
        covered = cover.ravel()[where]
        if window is not None:
            rows, cols = np.divmod(where, cover.shape[1])
            where = (rows + window[0].start) * len(self.x) + cols + window[1].start
        self.layers.append(Layer(where, covered, row.astype(np.intp)))
        if name not in ("margin", "tree"):
            self.built.ravel()[where] |= covered > 0.3
