"""How far the borders of windows and tiles show in a result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panterra.mapping.tiles import Borders, Tile

VISIBLE = 1.2
"""A score above which borders show: see docs/any-area.md for what was measured."""
CHANNELS = 32
"""Of the features at most so many, evenly spread, are looked at: the borders of all tiles are kept until the end."""
LARGEST = 1000.0
"""The score where nothing changes but at the borders."""

PROPERTY = "panterra:seams"
KEYS = ("seams", "seam_top", "seam_left", "seam_bottom", "seam_right")
"""What the parts keep of each tile: its sums, and the patches that those of the next tiles are compared to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeamScore:
    """How much features differ between patches that different windows made, and between those of one window.

    Blending spreads a step over the overlap. So patches on either side of it are compared, and patches as far apart
    within a window. A difference is the mean absolute difference over the features.
    """

    ratio: float | None
    """Of `across` to `within`: 1 where nothing shows; None where there is nothing to compare."""
    across: float
    within: float
    num_across: int
    num_within: int

    @property
    def visible(self) -> bool:
        """Tell whether the borders show."""
        return self.ratio is not None and self.ratio > VISIBLE

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "threshold": VISIBLE}


def tile_seams(features: np.ndarray, tile: Tile, borders: tuple[Borders, Borders]) -> dict[str, np.ndarray]:
    """Sum up the differences inside a tile, features [h, w, D], and keep what its neighbours are compared to."""
    some = features[..., :: -(-features.shape[-1] // CHANNELS)]
    rows, cols = borders
    turned = np.swapaxes(some, 0, 1)
    sums = _inside(some, tile.core.row, rows) + _inside(turned, tile.core.col, cols)
    top, left = _first(some, tile.core.row, rows), _first(turned, tile.core.col, cols)
    return {key: np.array(value) for key, value in zip(KEYS, (sums, top, left, some[-1], some[:, -1]), strict=True)}


def _inside(features: np.ndarray, begin: int, borders: Borders) -> np.ndarray:
    """Sum up the differences down the rows of a tile that begins at a row of the map."""
    lag, middles = borders.lag, np.array(borders.middles, np.int64)
    if len(features) <= lag:
        return np.zeros(4)
    start = begin + np.arange(len(features) - lag)
    across = np.isin(start, middles - (lag + 1) // 2)
    within = np.searchsorted(middles, start + lag, "right") == np.searchsorted(middles, start, "right")
    return _sums(_steps(features[:-lag], features[lag:]), across[:, None], within[:, None])


def _first(features: np.ndarray, begin: int, borders: Borders) -> np.ndarray:
    """Return the row that the last one of the tile before is compared to; NaN where windows do not change there."""
    compared = begin - 1 + (borders.lag + 1) // 2 in borders.middles and len(features) >= borders.lag
    return features[borders.lag - 1] if compared else np.full_like(features[0], np.nan)


def seam_score(tiles: Iterable[Tile], load: Callable[[Tile], Mapping[str, np.ndarray] | None]) -> SeamScore:
    """Add up what `tile_seams` found in all tiles, which come by rows, and the differences between tiles.

    `load` returns None where a tile failed.
    """
    total = np.zeros(4)
    above: dict[int, np.ndarray] = {}
    left: np.ndarray | None = None
    for tile in tiles:
        kept, up = load(tile), above.pop(tile.col, None)
        if kept is None:
            left = None
            continue
        total += kept["seams"]
        if tile.col and left is not None:
            total += _sums(_steps(left, kept["seam_left"]), np.array(True), np.array(False))
        if up is not None:
            total += _sums(_steps(up, kept["seam_top"]), np.array(True), np.array(False))
        left, above[tile.col] = kept["seam_right"], kept["seam_bottom"]
    across, within = (float(s / n) if n else 0.0 for s, n in (total[:2], total[2:]))
    comparable = total[1] > 0 and total[3] > 0 and (across > 0 or within > 0)
    return SeamScore(
        ratio=min(across / within, LARGEST) if comparable and within else LARGEST if comparable else None,
        across=across,
        within=within,
        num_across=int(total[1]),
        num_within=int(total[3]),
    )


def read_seams(passport: Path) -> SeamScore | None:
    """Read the score that a passport tells; None where it tells none."""
    told = json.loads(passport.read_text(encoding="utf-8"))["properties"].get(PROPERTY)
    return None if told is None else SeamScore(**{key: told[key] for key in SeamScore.__slots__})


def warning_of(score: SeamScore | None) -> str | None:
    """Say what to do where borders show."""
    if score is None or not score.visible:
        return None
    return (
        f"borders of windows show: features differ {score.ratio:.2f} times as much across them as within; let "
        "windows overlap more or be larger"
    )


def _steps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the differences of patches [..., D] to their neighbours; NaN where one has no data."""
    steps: np.ndarray = np.abs(other - one).mean(-1, dtype=np.float64)
    return steps


def _sums(steps: np.ndarray, across: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Sum and number of the steps across borders, then of those within windows."""
    seen = np.isfinite(steps)
    there, elsewhere = (seen & np.broadcast_to(where, steps.shape) for where in (across, within))
    return np.array([steps[there].sum(), there.sum(), steps[elsewhere].sum(), elsewhere.sum()], np.float64)
