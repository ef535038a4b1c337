"""TreeSatAI Time Series: tree genera of 60 m plots in Lower Saxony."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch

from panterra.data.labelled import DATASETS, UNDATED, LabelledSample, LabelledSet, check_split
from panterra.data.stored_pixels import S2_BANDS, Array, load_json, observe, parse_day, read_image
from panterra.errors import InputError
from panterra.sample import Batch, Observation

CARD = DATASETS["treesatai_ts"]
LABELS = "labels/TreeSatBA_v9_60m_multi_labels.json"
MIN_AREA = 0.07
"""Share of the plot above which a genus counts as present."""
SIDE_PX = 300

Orbit = Literal["ascending", "descending", "both"]
_ORBITS: dict[str, tuple[str, ...]] = {"ascending": ("asc",), "descending": ("des",), "both": ("asc", "des")}


def open_treesatai_ts(root: str | Path, split: str, *, orbit: Orbit = "ascending", crop: bool = True) -> LabelledSet:
    """Open a split; plots on which no genus covers 7 % are left out, as published.

    `crop=False` leaves aerial images the margin beyond the plot, of which the published runs cut 300 pixels at random.
    """
    check_split(CARD, split)
    if orbit not in _ORBITS:
        raise InputError(f"orbit is {orbit!r}; wanted one of {', '.join(_ORBITS)}")
    root = Path(root)
    areas = load_json(root / LABELS)
    listing = root / f"{split}_filenames.lst"
    if not listing.is_file():
        raise InputError(f"there is no file {listing}; it lists the images of the split, one name per line")
    names = [line.strip() for line in listing.read_text().splitlines() if line.strip()]
    present = {name: genera for name in names if (genera := _genera(areas, name, listing))}
    return LabelledSet(
        card=CARD,
        split=split,
        task=CARD.task,
        class_names=CARD.class_names,
        ids=tuple(present),
        read=partial(_read, root, split, present, orbit, crop),
        files=partial(_files, root),
    )


def _genera(areas: Mapping[str, Sequence[tuple[str, float]]], name: str, listing: Path) -> frozenset[str]:
    if name not in areas:
        raise InputError(f"{listing.name} names {name}, which has no labels in {LABELS}; download both again")
    return frozenset(genus for genus, area in areas[name] if area > MIN_AREA)


def _files(root: Path, name: str) -> tuple[Path, Path]:
    return root / "aerial" / name, root / "sentinel" / f"{Path(name).stem}.h5"


def _read(
    root: Path, split: str, present: Mapping[str, frozenset[str]], orbit: str, crop: bool, name: str
) -> LabelledSample:
    aerial, series = _files(root, name)
    image = read_image(aerial)
    plot = image.pixels[None]
    if crop:  # the image reaches 0.4 m beyond the 60 m of the series on each side
        top, left = ((side - SIDE_PX) // 2 for side in image.pixels.shape[1:])
        plot = plot[..., top : top + SIDE_PX, left : left + SIDE_PX]
    try:
        file = h5py.File(series, "r")
    except OSError as error:
        raise InputError(f"cannot read {series} ({error}); download it again") from None
    with file:
        pixels, days = _series(file, "sen-2", field=2)
        parts = [_series(file, f"sen-1-{name}", field=4) for name in _ORBITS[orbit]]
    radar = "sentinel1_ascending" if orbit == "ascending" else "sentinel1"
    observations: dict[str, Observation] = {
        "aerial": observe("aerial", plot, [UNDATED], bands=("NIR", "R", "G", "B")),
        "sentinel2_l2a": observe("sentinel2_l2a", pixels, days, bands=S2_BANDS),
        radar: observe(
            radar,
            np.concatenate([part for part, _ in parts]),
            [day for _, some in parts for day in some],
            bands=("vv", "vh"),
            unit="linear",
        ),
    }
    return LabelledSample(
        id=name,
        batch=Batch(observations=observations, lonlat=image.lonlat),
        target=torch.tensor([[float(genus in present[name]) for genus in CARD.class_names]]),
        fold=split,
    )


def _series(file: h5py.File, sensor: str, *, field: int) -> tuple[Array, list[int]]:
    products = file[f"{sensor}-products"].asstr()[:]
    return file[f"{sensor}-data"][:], [parse_day(product.split("_")[field][:8]) for product in products]
