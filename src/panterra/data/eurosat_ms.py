"""EuroSAT, multispectral: scenes of 640 m in Europe and their land use, a folder of GeoTIFFs for each class."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from panterra.data.labelled import UNDATED, LabelledSample, LabelledSet, card_of, check_split
from panterra.data.stored_pixels import observe, read_image
from panterra.errors import InputError
from panterra.sample import Batch

BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
"""As stored: B8A stands last."""
LEARNED = 0.7
"""Of each class; there is no official split."""


def open_eurosat_ms(root: str | Path, split: str) -> LabelledSet:
    """Open a split: of each class the first seven in ten train by their numbers, the others test."""
    card = card_of("eurosat_ms")
    check_split(card, split)
    root = Path(root)
    ids: list[str] = []
    for name in card.class_names:
        numbered = sorted((root / name).glob(f"{name}_*.tif"), key=lambda path: (len(path.stem), path.stem))
        cut = round(LEARNED * len(numbered))
        ids += [f"{name}/{path.stem}" for path in (numbered[:cut] if split == "train" else numbered[cut:])]
    if not ids:
        raise InputError(f"{root} holds no folders such as AnnualCrop with AnnualCrop_1.tif; give the one that does")
    return LabelledSet(
        card=card,
        split=split,
        task=card.task,
        class_names=card.class_names,
        ids=tuple(ids),
        read=partial(_read, root, card.class_names, split),
        files=partial(_files, root),
    )


def _files(root: Path, id: str) -> tuple[Path]:
    return (root / f"{id}.tif",)


def _read(root: Path, names: tuple[str, ...], split: str, id: str) -> LabelledSample:
    (path,) = _files(root, id)
    image = read_image(path)
    observation = observe("sentinel2", image.pixels[None], [UNDATED], bands=BANDS)
    return LabelledSample(
        id=id,
        batch=Batch(observations={"sentinel2": observation}, lonlat=image.lonlat),
        target=torch.tensor([names.index(id.split("/")[0])]),
        fold=split,
    )
