"""HLS Burn Scars: what wildfires left in 15 km squares of the United States."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from panterra.data.labelled import DATASETS, UNDATED, LabelledSample, LabelledSet, check_split
from panterra.data.stored_pixels import observe, read_image
from panterra.errors import InputError
from panterra.sample import Batch, to_days

CARD = DATASETS["hls_burn_scars"]
NODATA = 9999
SEED, VAL_SHARE = 23, 0.1


def open_hls_burn_scars(root: str | Path, split: str) -> LabelledSet:
    """Open a split: train and val are drawn from the training folder, test is the validation folder."""
    check_split(CARD, split)
    folder = Path(root) / ("validation" if split == "test" else "training")
    images = {path.name: path for path in sorted(folder.glob("*_merged.tif"))}
    if not images:
        raise InputError(f"{folder} holds no *_merged.tif; give the folder above training and validation")
    names = list(images)
    if split != "test":
        val, train = _draw(len(names))
        names = [names[i] for i in (val if split == "val" else train)]
    return LabelledSet(
        card=CARD,
        split=split,
        task=CARD.task,
        class_names=CARD.class_names,
        ids=names,
        read=partial(_read, split, images),
        files=partial(_files, images),
    )


def _draw(count: int) -> tuple[list[int], list[int]]:
    """Draw a tenth and give it with the rest, as scikit-learn's train_test_split does."""
    order = np.random.RandomState(SEED).permutation(count)
    taken = math.ceil(count * VAL_SHARE)
    return order[:taken].tolist(), order[taken:].tolist()


def _files(images: Mapping[str, Path], id: str) -> tuple[Path, Path]:
    stem = id.removesuffix("_merged.tif")
    masks = [images[id].with_name(f"{stem}{ending}") for ending in (".mask.tif", "_mask.tif")]
    return images[id], next((mask for mask in masks if mask.is_file()), masks[0])


def _day(name: str) -> int:
    """Read the year and the day of the year that follow the tile in names such as HLS.S30.T10SEH.2018190."""
    found = re.search(r"\.(\d{4})(\d{3})\.", name)
    return to_days(f"{found[1]}-01-01") + int(found[2]) - 1 if found else UNDATED


def _read(split: str, images: Mapping[str, Path], id: str) -> LabelledSample:
    image, mask = (read_image(path) for path in _files(images, id))
    pixels = image.pixels[None]
    observation = observe(
        "hls",
        pixels,
        [_day(id)],
        bands=("B2", "B3", "B4", "B5", "B6", "B7"),
        valid=(np.abs(pixels) != NODATA).all(axis=1),
        unit="reflectance",
    )
    return LabelledSample(
        id=id,
        batch=Batch(observations={"hls": observation}, lonlat=image.lonlat),
        target=torch.from_numpy(mask.pixels.astype(np.int64)),
        fold=split,
    )
