"""So2Sat LCZ42: local climate zones of 320 m squares in cities, seen by Sentinel-1 and Sentinel-2."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from panterra.data.labelled import DATASETS, UNDATED, LabelledSample, LabelledSet, check_split
from panterra.data.stored_pixels import S2_BANDS, observe, open_hdf5
from panterra.sample import Batch

CARD = DATASETS["so2sat"]
VV, VH = 5, 4
"""The channels with the intensity after a refined Lee filter."""


def open_so2sat(root: str | Path, split: str) -> LabelledSet:
    """Open a split, which is one file."""
    check_split(CARD, split)
    path = Path(root) / f"{split}.h5"
    with open_hdf5(path) as file:
        count = len(file["label"])
    return LabelledSet(
        card=CARD,
        split=split,
        task=CARD.task,
        class_names=CARD.class_names,
        ids=[f"{split}/{i}" for i in range(count)],
        read=partial(_read, path, split),
        files=partial(_files, path),
    )


def _files(path: Path, _: str) -> tuple[Path]:
    return (path,)


def _read(path: Path, split: str, id: str) -> LabelledSample:
    number = int(id.split("/")[1])
    with open_hdf5(path) as file:
        radar, optical, one_hot = (file[key][number] for key in ("sen1", "sen2", "label"))
    observations = {
        "sentinel2": observe(
            "sentinel2", optical.transpose(2, 0, 1)[None], [UNDATED], bands=S2_BANDS, unit="reflectance"
        ),
        "sentinel1": observe(
            "sentinel1", radar[..., [VV, VH]].transpose(2, 0, 1)[None], [UNDATED], bands=("vv", "vh"), unit="linear"
        ),
    }
    return LabelledSample(
        id=id,
        batch=Batch(observations=observations),
        target=torch.tensor([int(one_hot.argmax())]),
        fold=split,
    )
