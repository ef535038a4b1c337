"""PLANTED: species of planted forests all over the world, in 120 m squares seen by five satellites."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from panterra.data.labelled import DATASETS, LabelledSample, LabelledSet, check_split
from panterra.data.stored_pixels import S2_BANDS, Array, load_json, observe
from panterra.errors import InputError
from panterra.sample import Batch

CARD = DATASETS["planted"]
MS_PER_DAY = 86_400_000

SENSORS = {
    "s2": ("sentinel2", S2_BANDS),
    "s1": ("sentinel1", ("vv", "vh")),
    "l7": ("landsat7", ("B1", "B2", "B3", "B4", "B5", "B7")),
    "alos": ("alos2", ("hh", "hv")),
    "modis": ("modis", tuple(f"B{i}" for i in range(1, 8))),
}
"""File key -> modality, and which bands come first in the file."""


def open_planted(root: str | Path, split: str, *, alos_unit: Literal["jaxa_dn", "db"] = "jaxa_dn") -> LabelledSet:
    """Open a split; `alos_unit` says how the files hold ALOS-2 backscatter."""
    check_split(CARD, split)
    root = Path(root)
    classes = {f"{split}/{id}": int(code) for id, code in load_json(root / split / "labels2.json").items()}
    return LabelledSet(
        card=CARD,
        split=split,
        task=CARD.task,
        class_names=CARD.class_names,
        ids=tuple(classes),
        read=partial(_read, root, split, classes, alos_unit),
        files=partial(_files, root),
    )


def _files(root: Path, id: str) -> tuple[Path, ...]:
    return tuple(path for key in SENSORS for path in _sensor_files(root, id, key))


def _sensor_files(root: Path, id: str, key: str) -> tuple[Path, Path, Path]:
    """Name the files with pixels, masks and times."""
    stem = f"{Path(id).name}_{key}"
    return root / id / f"{stem}.npz", root / id / f"{stem}_mask.npz", root / id / f"{stem}_timestamp.npz"


def _read(root: Path, split: str, classes: Mapping[str, int], alos_unit: str, id: str) -> LabelledSample:
    observations = {}
    for key, (modality, bands) in SENSORS.items():
        pixels, mask, times = (_array(path) for path in _sensor_files(root, id, key))
        observations[modality] = observe(
            modality,
            # Radar files go on with the incidence angle.
            pixels[..., : len(bands)].transpose(0, 3, 1, 2),
            [int(t) // MS_PER_DAY for t in np.ravel(times)],
            bands=bands,
            valid=mask[..., : len(bands)].astype(bool).all(axis=-1),
            unit=alos_unit if key == "alos" else None,
        )
    return LabelledSample(id=id, batch=Batch(observations=observations), target=torch.tensor([classes[id]]), fold=split)


def _array(path: Path) -> Array:
    if not path.is_file():
        raise InputError(f"there is no file {path}; complete the download")
    with np.load(path, allow_pickle=False) as file:
        return np.asarray(file["arr_0"])
