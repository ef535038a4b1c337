"""PASTIS-R: crops of 1.28 km squares in France, a mean image per month of two sensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from panterra.data.labelled import LabelledSet, card_of
from panterra.data.pastis_hd import open_pastis_hd
from panterra.data.views import corners, cut, monthly

SIDE_PX = 128


def open_pastis(root: str | Path, split: str, *, name: str, tile_px: int) -> LabelledSet:
    """Open a split of a download of PASTIS-R or PASTIS-HD; the square of 128 pixels is cut into tiles."""
    patches = monthly(open_pastis_hd(root, split, card=card_of(name), spot=False))
    return cut(patches, tile_px, lambda _: corners(SIDE_PX, tile_px)) if tile_px < SIDE_PX else patches


def open_pastis_crops(root: str | Path, split: str, *, name: str) -> LabelledSet:
    """Open a split of a download of PASTIS-HD to tell which of the 18 crops occur in each square."""
    return replace(open_pastis_hd(root, split, task="multilabel"), card=card_of(name))
