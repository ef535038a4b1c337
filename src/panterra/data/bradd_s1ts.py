"""BraDD-S1TS: deforestation in Brazil from Sentinel-1 series of 480 m squares."""

from __future__ import annotations

import datetime as dt
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from panterra.data.labelled import DATASETS, LabelledSample, LabelledSet, check_split
from panterra.data.stored_pixels import column, load_rows, observe, parse_day
from panterra.errors import InputError
from panterra.sample import Batch

CARD = DATASETS["bradd_s1ts"]

HARMLESS: list[Any] = [
    np.ndarray,
    np.dtype,
    np.array(0).__reduce__()[0],  # how arrays are put together again
    *(type(np.dtype(code)) for code in ("f4", "f8", "i2", "i4", "i8", "u1", "u2", "?", "M8", "U", "O")),
    dt.date,
    dt.datetime,
]
"""What a sample may hold besides tensors and plain values."""


def open_bradd_s1ts(root: str | Path, split: str) -> LabelledSet:
    """Open a split of the closed set, as the column `close_set` of meta.csv says."""
    check_split(CARD, split)
    root = Path(root)
    rows = load_rows(root / "meta.csv")
    names, sets = (column(rows, name, root / "meta.csv") for name in ("file", "close_set"))
    return LabelledSet(
        card=CARD,
        split=split,
        task=CARD.task,
        class_names=CARD.class_names,
        ids=tuple(name for name, of in zip(names, sets, strict=True) if of == split),
        read=partial(_read, root, split),
        files=partial(_files, root),
    )


def _files(root: Path, name: str) -> tuple[Path]:
    return (root / "Samples" / name,)


def _read(root: Path, split: str, name: str) -> LabelledSample:
    sample = _load(*_files(root, name))
    pixels = np.asarray(sample["image"], np.float32)
    observation = observe(
        "sentinel1",
        pixels,
        _days(sample["image_dates"]),
        bands=("vv", "vh"),
        # Power is never negative, and decibels of land nearly always are.
        unit=None if np.nanmin(pixels) < 0 else "linear",
    )
    return LabelledSample(
        id=name,
        batch=Batch(observations={"sentinel1": observation}),
        target=torch.from_numpy(np.asarray(sample["label"])[1].astype(np.int64))[None],
        fold=split,
    )


def _days(dates: Any) -> list[int]:
    stored = np.asarray(dates)
    return [parse_day(date) for date in (stored.astype("M8[D]") if stored.dtype.kind == "M" else stored).tolist()]


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            sample: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot read {path} ({reason}); download it again") from None
    return sample
