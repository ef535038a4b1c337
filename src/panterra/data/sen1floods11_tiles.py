"""Sen1Floods11 as OlmoEarth's evaluation sees it: radar alone, in tiles of 640 m with water in them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from panterra.data.labelled import LabelledSet, card_of
from panterra.data.sen1floods11 import open_sen1floods11
from panterra.data.views import Corner, corners, cut

TILE_PX = 64


def open_sen1floods11_tiles(root: str | Path, split: str, *, tile_px: int = TILE_PX) -> LabelledSet:
    """Open a split; every chip is read once to see which tiles hold water and radar everywhere."""
    chips = open_sen1floods11(root, split, optical=False, card=card_of("sen1floods11_tiles"))
    return cut(chips, tile_px, partial(_flooded_tiles, chips, tile_px))


def _flooded_tiles(chips: LabelledSet, tile_px: int, id: str) -> list[Corner]:
    chip = chips.read(id)
    water, seen = chip.target[0] > 0, chip.batch.observations["sentinel1"].valid[0, 0]
    return [
        (row, col)
        for row, col in corners(len(water), tile_px)
        if water[row : row + tile_px, col : col + tile_px].any()
        and seen[row : row + tile_px, col : col + tile_px].all()
    ]
