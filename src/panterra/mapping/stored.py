"""The features of a map's tiles, read where they are stored."""

from __future__ import annotations

import datetime as dt
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from odc.geo.geobox import GeoBox

from panterra.imagery.stac import pixel_metres
from panterra.mapping.embeddings import EmbeddingStore
from panterra.mapping.parts import Failure, Parts
from panterra.mapping.passport import software
from panterra.mapping.reading import ahead, attempts
from panterra.mapping.sources import Canvases
from panterra.mapping.tiles import Borders, Tile, blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Features that `embed` stored."""

    store: EmbeddingStore
    workers: int
    encoder_seconds: float = 0.0

    @property
    def grid(self) -> GeoBox:
        return self.store.box

    @property
    def dim(self) -> int:
        return self.store.dim

    @property
    def about(self) -> Mapping[str, Any]:
        return self.store.about

    @property
    def job(self) -> dict[str, Any]:
        files = sorted(f for f in self.store.path.rglob("*") if f.is_file()) or [self.store.path]
        stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        digest = hashlib.sha256(repr(stats).encode()).hexdigest()
        return {"embeddings": str(self.store.path.absolute()), "files": digest, "software": software()}

    @property
    def origin(self) -> dict[str, Any]:
        return {
            "panterra:inputs": [{"id": self.store.path.name, "files": [str(self.store.path.absolute())]}],
            "panterra:model": self.about.get("model"),
            "panterra:options": {k: self.about.get(k) for k in ("patch_m", "window_px", "overlap_px", "modalities")},
        }

    @property
    def dates(self) -> list[dt.date]:
        return [dt.date.fromisoformat(date) for date in self.about.get("dates", ())]

    @property
    def licence(self) -> str | None:
        return self.about.get("licence")

    def tiles(self) -> Iterator[Tile]:
        height, width = self.grid.shape
        return blocks(height, width, rows=self.store.block[0], cols=self.store.block[1])

    def cost(self, tile: Tile) -> int:
        return 1

    @property
    def area_km2(self) -> float:
        return math.prod(self.grid.shape) * pixel_metres(self.grid) ** 2 / 1e6

    @property
    def borders(self) -> tuple[Borders, Borders]:
        """Return where a stored block begins, a tile of `embed`; a part of a store may begin inside of one."""
        store = self.store
        rows, cols = (
            Borders(middles=tuple(range(block - before, size, block)), lag=1)
            for block, before, size in zip(store.block, store.offset, self.grid.shape, strict=True)
        )
        return rows, cols

    def features(
        self, tiles: Iterable[Tile], parts: Parts, advance: Callable[[int], None], canvases: Canvases | None = None
    ) -> Iterator[tuple[Tile, np.ndarray | Failure]]:
        """Read the features of tiles in order, as `Encoding.features` makes them; there is nothing to paint."""
        for tile, features in ahead(lambda tile: attempts(lambda: self.store.read(tile.core)), tiles, self.workers):
            if isinstance(features, Failure):
                parts.fail(tile, features)
            yield tile, features
            advance(1)
