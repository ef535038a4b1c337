"""TimeSen2Crop: crops of Austria, each sample the season of a single Sentinel-2 pixel."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from panterra.data.labelled import DATASETS, LabelledSample, LabelledSet, check_split
from panterra.data.stored_pixels import column, load_rows, observe, parse_day
from panterra.errors import InputError
from panterra.sample import Batch

CARD = DATASETS["timesen2crop"]
VAL_TILE, TEST_TILE = "33TWN", "33UVP"
LEFT_OUT = "2019_33UVP"
COLUMNS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B11", "B12")
BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B8A", "B11", "B12")


def open_timesen2crop(root: str | Path, split: str, *, clear_only: bool = False) -> LabelledSet:
    """Open a split; `clear_only` marks dates under cloud, shadow or snow as invalid."""
    check_split(CARD, split)
    root = Path(root)
    tiles = sorted(path.parent.name for path in root.glob("*/dates.csv"))
    chosen = {
        "train": [tile for tile in tiles if tile not in (VAL_TILE, TEST_TILE, LEFT_OUT)],
        "val": [VAL_TILE],
        "test": [TEST_TILE],
    }[split]
    ids = [
        f"{tile}/{code}/{path.name}"
        for tile in chosen
        for code in range(len(CARD.class_names))
        for path in sorted((root / tile / str(code)).glob("*.csv"))
    ]
    if not ids:
        raise InputError(f"{root} holds no pixels of the split {split}; wanted <tile>/<class>/<pixel>.csv")
    return LabelledSet(
        card=CARD,
        split=split,
        task=CARD.task,
        class_names=CARD.class_names,
        ids=ids,
        read=partial(_read, root, split, clear_only),
        files=partial(_files, root),
    )


def _files(root: Path, id: str) -> tuple[Path, Path]:
    return root / id, root / id.split("/")[0] / "dates.csv"


def _read(root: Path, split: str, clear_only: bool, id: str) -> LabelledSample:
    path, dates = _files(root, id)
    rows = load_rows(path)
    values = [[float(value) for value in column(rows, name, path)] for name in COLUMNS]
    pixels = np.array(values, np.float32).T[:, :, None, None]
    # 0 clear, 1 cloud, 2 shadow, 3 snow.
    condition = np.array([float(value) for value in column(rows, "flag", path)])
    observation = observe(
        "sentinel2_l2a",
        pixels,
        _days(dates),
        bands=BANDS,
        valid=(condition == 0)[:, None, None] if clear_only else None,
    )
    return LabelledSample(
        id=id,
        batch=Batch(observations={"sentinel2_l2a": observation}),
        target=torch.tensor([int(id.split("/")[1])]),
        fold=split,
    )


@lru_cache(maxsize=64)
def _days(path: Path) -> tuple[int, ...]:
    return tuple(parse_day(date) for date in column(load_rows(path), "acquisition_date", path))
