"""GEO-Bench, first edition: images of one size and their labels, one HDF5 file each.

The publishers' package unpickles `task_specs.pkl` and an attribute of every sample, which runs whatever a file says,
and wants a pandas of before 2023. Here nothing is unpickled.
"""

from __future__ import annotations

import ast
import pickletools
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from panterra.data.labelled import UNDATED, DatasetCard, LabelledSample, LabelledSet, card_of, check_split
from panterra.data.stored_pixels import Array, load_json, nearest, observe, open_hdf5, parse_day
from panterra.errors import InputError
from panterra.sample import Batch, Observation

PUBLISHED_DAY = "2020-07-01"
"""Of all images in OlmoEarth's published evaluation."""

SENTINEL2 = {
    "01 - Coastal aerosol": "B01",
    "02 - Blue": "B02",
    "03 - Green": "B03",
    "04 - Red": "B04",
    "05 - Vegetation Red Edge": "B05",
    "06 - Vegetation Red Edge": "B06",
    "07 - Vegetation Red Edge": "B07",
    "08 - NIR": "B08",
    "08A - Vegetation Red Edge": "B8A",
    "09 - Water vapour": "B09",
    "10 - SWIR - Cirrus": "B10",
    "11 - SWIR": "B11",
    "12 - SWIR": "B12",
}
"""How files name the bands, where all images have one date; else the date follows."""

LANDSAT = {
    "02 - Blue": "B2",
    "03 - Green": "B3",
    "04 - Red": "B4",
    "05 - NIR": "B5",
    "06 - SWIR1": "B6",
    "07 - SWIR2": "B7",
}
LANDSAT_STAND_INS = {"B8": "B3", "B1": "B2", "B9": "B7", "B10": "B7", "B11": "B7"}
"""As in OlmoEarth's published evaluation."""


def open_geobench(
    root: str | Path, split: str, *, name: str, partition: str = "default", day: str | None = PUBLISHED_DAY
) -> LabelledSet:
    """Open a split of the data set `name`, a folder such as m-eurosat.

    `partition` may be one of fewer training samples, such as "0.10x_train". Without a `day` images have the date in
    their file, if any.
    """
    card = card_of(name)
    check_split(card, split)
    root = Path(root)
    listing = load_json(root / f"{partition}_partition.json")
    if split not in listing:
        raise InputError(f"{root / f'{partition}_partition.json'} lists no {split!r} but {', '.join(listing)}")
    return LabelledSet(
        card=card,
        split=split,
        task=card.task,
        class_names=card.class_names,
        ids=tuple(listing[split]),
        read=partial(_read, card, root, split, None if day is None else parse_day(day), _labels(card, root)),
        files=partial(_files, root),
    )


def _files(root: Path, id: str) -> tuple[Path]:
    return (root / f"{id}.hdf5",)


def _labels(card: DatasetCard, root: Path) -> Mapping[str, list[float]]:
    """Look up a vector over the classes for each sample, as far as a file of the data set holds them."""
    vectors, names = root / "label_stats.json", root / "label_map.json"
    if card.task == "segmentation":
        return {}
    if vectors.is_file():
        return dict(load_json(vectors))
    if names.is_file():
        eye = np.eye(len(card.class_names)).tolist()
        return {id: eye[code] for code, ids in enumerate(load_json(names).values()) for id in ids}
    return {}


def _read(
    card: DatasetCard, root: Path, split: str, day: int | None, labels: Mapping[str, list[float]], id: str
) -> LabelledSample:
    (path,) = _files(root, id)
    with open_hdf5(path) as file:
        stored = {key: np.asarray(file[key]) for key in file}
        pickled = file.attrs.get("pickle")
    (modality,) = card.modalities
    return LabelledSample(
        id=id,
        batch=Batch(observations={modality: _observe(card, modality, path, stored, day)}),
        target=_target(card, path, stored, labels.get(id), pickled),
        fold=split,
    )


def _observe(card: DatasetCard, modality: str, path: Path, stored: Mapping[str, Array], day: int | None) -> Observation:
    known = LANDSAT if modality == "landsat" else SENTINEL2
    bands: dict[str, Array] = {}
    for key, values in stored.items():
        name, dated = _split_date(key)
        if name in known:
            if known[name] in bands:
                raise InputError(f"{path} holds {name} of several dates; {card.title} has one")
            bands[known[name]] = values.squeeze()
            found = UNDATED if dated is None else parse_day(dated)
    if not bands:
        raise InputError(f"{path} holds none of the bands of {card.title}; it has {', '.join(stored)}")
    if modality == "landsat":
        bands |= {band: bands[source] for band, source in LANDSAT_STAND_INS.items() if source in bands}
    side = max(values.shape[0] for values in bands.values())
    pixels = np.stack([nearest(values, side) for values in bands.values()])
    return observe(
        modality,
        pixels[None],
        [found if day is None else day],
        bands=tuple(bands),
        unit="reflectance" if card.name == "m_so2sat" else None,
    )


def _split_date(key: str) -> tuple[str, str | None]:
    found = re.fullmatch(r"(.+)_(\d{4}-\d{2}-\d{2}).*", key)
    return (found[1], found[2]) if found else (key, None)


def _target(
    card: DatasetCard, path: Path, stored: Mapping[str, Array], vector: list[float] | None, pickled: str | None
) -> torch.Tensor:
    if card.task == "segmentation":
        masks = [values for key, values in stored.items() if key.startswith("label")]
        if not masks:
            raise InputError(f"{path} holds no label; download it again")
        return torch.from_numpy(masks[0].squeeze().astype(np.int64))[None]
    if vector is not None and len(vector) == len(card.class_names):
        return torch.tensor([vector]) if card.task == "multilabel" else torch.tensor([int(np.argmax(vector))])
    code = None if pickled is None or card.task == "multilabel" else number_of("label", pickled)
    if code is None:
        raise InputError(f"no label of {path} was found; put label_stats.json or label_map.json beside it")
    return torch.tensor([code])


def number_of(key: str, pickled: str) -> int | None:
    """Find the whole number that follows a key in a pickle written as text, without running the pickle."""
    follows = False
    for operation, argument, _ in pickletools.genops(ast.literal_eval(pickled)):
        if follows and operation.name in ("BININT", "BININT1", "BININT2"):
            return int(str(argument))
        if operation.name not in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            follows = argument == key
    return None
