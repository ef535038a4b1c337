"""BreizhCrops: crops of Brittany, each sample a field's mean reflectance over 2017."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from panterra.data.labelled import DATASETS, LabelledSample, LabelledSet, check_split
from panterra.data.stored_pixels import column, load_rows, observe, open_hdf5
from panterra.data.views import monthly as monthly_means
from panterra.errors import InputError
from panterra.sample import Batch, to_days

CARD = DATASETS["breizhcrops"]
REGIONS = {"train": ("frh01", "frh02"), "valid": ("frh03",), "test": ("frh04",)}
BANDS = ("B01", "B10", "B11", "B12", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09")
"""Level 1C, in the alphabetical order of their published names (B1, B10, ...); quality bands and the time follow."""
TIME = 16
DAY_NS = 86_400 * 10**9


def open_breizhcrops(
    root: str | Path, split: str, *, regions: Sequence[str] | None = None, monthly: bool = True
) -> LabelledSet:
    """Open a split, or the `regions` given in its place; `monthly` takes a mean of each month."""
    check_split(CARD, split)
    root = Path(root)
    mapping = load_rows(root / "classmapping.csv")
    codes, numbers = (column(mapping, name, root / "classmapping.csv") for name in ("code", "id"))
    classes = {code: int(number) for code, number in zip(codes, numbers, strict=True)}
    fields: dict[str, tuple[str, str, int]] = {}
    for region in REGIONS[split] if regions is None else regions:
        table = root / "2017" / "L1C" / f"{region}.csv"
        rows = load_rows(table)
        paths, crops, lengths = (column(rows, name, table) for name in ("path", "CODE_CULTU", "sequencelength"))
        for path, crop, length in zip(paths, crops, lengths, strict=True):
            if crop in classes and int(length) > 0:
                fields[f"{region}/{Path(path).stem}"] = region, path, classes[crop]
    labelled = LabelledSet(
        card=CARD,
        split=split,
        task=CARD.task,
        class_names=CARD.class_names,
        ids=tuple(fields),
        read=partial(_read, root, fields),
        files=partial(_files, root),
    )
    return monthly_means(labelled) if monthly else labelled


def _files(root: Path, id: str) -> tuple[Path]:
    return (root / "2017" / "L1C" / f"{id.split('/')[0]}.h5",)


def _read(root: Path, fields: Mapping[str, tuple[str, str, int]], id: str) -> LabelledSample:
    region, inside, code = fields[id]
    (path,) = _files(root, id)
    with open_hdf5(path) as file:
        if inside not in file:
            raise InputError(f"{path} holds no {inside}; download it again")
        stored = np.asarray(file[inside], np.float64)
    if stored.ndim != 2 or stored.shape[1] <= TIME:
        raise InputError(f"{path} holds {list(stored.shape)} as {inside}; wanted 17 columns, the time last")
    days = (stored[:, TIME] // DAY_NS).astype(int).tolist()
    if not to_days("2016-01-01") < min(days) <= max(days) < to_days("2019-01-01"):
        raise InputError(f"the times of {inside} in {path} are not nanoseconds of 2017; download it again")
    pixels = stored[:, : len(BANDS), None, None]
    return LabelledSample(
        id=id,
        batch=Batch(observations={"sentinel2": observe("sentinel2", pixels, days, bands=BANDS)}),
        target=torch.tensor([code]),
        fold=region,
    )
