"""MADOS: marine debris, oil spills and what looks like them, in sparsely labelled squares of Sentinel-2."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from panterra.data.labelled import DATASETS, UNDATED, LabelledSample, LabelledSet, check_split
from panterra.data.stored_pixels import Array, observe, read_image
from panterra.data.views import corners, cut
from panterra.errors import InputError
from panterra.sample import Batch

CARD = DATASETS["mados"]
SIDE_PX, TILE_PX = 240, 80

WAVELENGTHS = {
    "B01": (443, 442),
    "B02": (492,),
    "B03": (560, 559),
    "B04": (665,),
    "B05": (704,),
    "B06": (740, 739),
    "B07": (783, 780),
    "B08": (833,),
    "B8A": (865, 864),
    "B11": (1614, 1610),
    "B12": (2202, 2186),
}
"""Nanometres by which ACOLITE calls the bands of Sentinel-2A, and of 2B where they differ."""


def open_mados(
    root: str | Path, split: str, *, tile_px: int | None = TILE_PX, as_published: bool = False
) -> LabelledSet:
    """Open a split, in tiles of which those without any label are left out, or whole without `tile_px`.

    `as_published` puts the mean of B05 and B07 in the place of B06, as OlmoEarth's evaluation does.
    """
    check_split(CARD, split)
    root = Path(root)
    listing = root / "splits" / f"{split}_X.txt"
    if not listing.is_file():
        raise InputError(f"there is no file {listing}; it lists the squares of the split")
    squares = LabelledSet(
        card=CARD,
        split=split,
        task=CARD.task,
        class_names=CARD.class_names,
        ids=tuple(listing.read_text().split()),
        read=partial(_read, root, split, as_published),
        files=partial(_files, root),
    )
    return squares if tile_px is None else cut(squares, tile_px, partial(_labelled_tiles, root, tile_px))


def _path(root: Path, id: str, gsd: int, kind: str) -> Path:
    scene, crop = id.rsplit("_", 1)
    return root / scene / str(gsd) / f"{scene}_L2R_{kind}_{crop}.tif"


def _band(root: Path, id: str, band: str) -> Path:
    gsd = 60 if band == "B01" else 10 if band in ("B02", "B03", "B04", "B08") else 20
    paths = [_path(root, id, gsd, f"rhorc_{wavelength}") for wavelength in WAVELENGTHS[band]]
    return next((path for path in paths if path.is_file()), paths[0])


def _files(root: Path, id: str) -> tuple[Path, ...]:
    return _path(root, id, 10, "cl"), *(_band(root, id, band) for band in WAVELENGTHS)


def _codes(root: Path, id: str) -> Array:
    """Read the classes, 0 where there is no label."""
    return np.asarray(read_image(_path(root, id, 10, "cl")).pixels[0], np.int64)


def _labelled_tiles(root: Path, tile_px: int, id: str) -> list[tuple[int, int]]:
    codes = _codes(root, id)
    return [
        (row, col) for row, col in corners(len(codes), tile_px) if codes[row : row + tile_px, col : col + tile_px].any()
    ]


def _read(root: Path, split: str, as_published: bool, id: str) -> LabelledSample:
    label = read_image(_path(root, id, 10, "cl"))
    codes = label.pixels.astype(np.int64)
    bands = {band: _resized(read_image(_band(root, id, band)).pixels[0], codes.shape[1]) for band in WAVELENGTHS}
    if as_published:
        bands["B06"] = (bands["B05"] + bands["B07"]) / 2
    observation = observe(
        "sentinel2_l2a", np.stack(list(bands.values()))[None], [UNDATED], bands=tuple(bands), unit="reflectance"
    )
    return LabelledSample(
        id=id,
        batch=Batch(observations={"sentinel2_l2a": observation}, lonlat=label.lonlat),
        target=torch.from_numpy(codes - 1),
        fold=split,
    )


def _resized(pixels: Array, side: int) -> Array:
    stored = torch.from_numpy(pixels.astype(np.float32))[None, None]
    resized = F.interpolate(stored, size=(side, side), mode="bilinear", align_corners=False)
    return np.asarray(resized[0, 0])
