"""BioMassters: above-ground biomass of Finnish forests in 2.56 km squares, from a year of Sentinel-1 and Sentinel-2."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from panterra.data.labelled import DATASETS, LabelledSample, LabelledSet, check_split
from panterra.data.stored_pixels import S2_BANDS, Array, column, load_rows, observe, read_image
from panterra.errors import InputError
from panterra.sample import Batch, to_days

CARD = DATASETS["biomassters"]
MONTHS = 12
NODATA = -9999
FIRST_YEAR = 2019
"""Of the September that stands for every sample's: the files do not tell the year."""


def open_biomassters(root: str | Path, split: str) -> LabelledSet:
    """Open a split, which `<split>_Data_list.csv` lists; months without an image are left out."""
    check_split(CARD, split)
    root = Path(root)
    listing = root / f"{split}_Data_list.csv"
    return LabelledSet(
        card=CARD,
        split=split,
        task=CARD.task,
        class_names=CARD.class_names,
        ids=column(load_rows(listing), "chip_id", listing),
        read=partial(_read, root, split),
        files=partial(_files, root, split),
    )


def _folder(root: Path, split: str, kind: str) -> Path:
    return root / f"{'test' if split == 'test' else 'train'}_{kind}"


def _label(root: Path, split: str, chip: str) -> Path:
    return _folder(root, split, "agbm") / f"{chip}_agbm.tif"


def _files(root: Path, split: str, chip: str) -> tuple[Path, ...]:
    """List the label and the radar images; optical ones may be missing for some months."""
    radar = (_folder(root, split, "features") / f"{chip}_S1_{month:02d}.tif" for month in range(MONTHS))
    return _label(root, split, chip), *radar


def _day(month: int) -> int:
    """Give the middle of a month counted from September."""
    year, index = divmod(month + 8, 12)
    return to_days(dt.date(FIRST_YEAR + year, index + 1, 15))


def _images(folder: Path, chip: str, sensor: str) -> Iterator[tuple[int, Array]]:
    for month in range(MONTHS):
        path = folder / f"{chip}_{sensor}_{month:02d}.tif"
        if path.is_file():
            yield _day(month), read_image(path).pixels


def _read(root: Path, split: str, chip: str) -> LabelledSample:
    folder = _folder(root, split, "features")
    radar, optical = (list(_images(folder, chip, sensor)) for sensor in ("S1", "S2"))
    if not radar and not optical:
        raise InputError(f"{folder} holds no image of {chip}; complete the download")
    observations = {}
    if optical:
        pixels = np.stack([image[: len(S2_BANDS)] for _, image in optical])  # the last band is cloud probability
        observations["sentinel2_l2a"] = observe(
            "sentinel2_l2a",
            pixels,
            [day for day, _ in optical],
            bands=S2_BANDS,
            valid=(pixels != 0).any(axis=1),
        )
    if radar:
        # Ascending VV and VH, then descending ones.
        pixels = np.concatenate([image.reshape(2, 2, *image.shape[1:]) for _, image in radar])
        observations["sentinel1"] = observe(
            "sentinel1",
            pixels,
            [day for day, _ in radar for _ in range(2)],
            bands=("vv", "vh"),
            valid=(pixels != NODATA).all(axis=1),
        )
    label = read_image(_label(root, split, chip))
    return LabelledSample(
        id=chip,
        batch=Batch(observations=observations, lonlat=label.lonlat),
        target=torch.from_numpy(label.pixels.astype(np.float32)),
        fold=split,
    )
