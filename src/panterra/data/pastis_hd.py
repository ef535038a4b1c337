"""PASTIS-HD: crops of 1.28 km squares in France, over a season."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from panterra.data.labelled import DATASETS, IGNORE, UNDATED, DatasetCard, LabelledSample, LabelledSet, check_split
from panterra.data.stored_pixels import S2_BANDS, load_json, load_npy, observe, parse_day, read_image, to_lonlat
from panterra.errors import InputError
from panterra.sample import Batch

CARD = DATASETS["pastis_hd"]
FOLDS = {"train": (1, 2, 3), "val": (4,), "test": (5,)}
VOID = 19
NODATA = -10000
"""Of the level 2A that the patches were cut from (Theia)."""

_ORBITS: dict[str, tuple[str, ...]] = {"ascending": ("S1A",), "descending": ("S1D",), "both": ("S1A", "S1D")}


def open_pastis_hd(
    root: str | Path,
    split: str,
    *,
    folds: Sequence[int] | None = None,
    task: Literal["segmentation", "multilabel"] = "segmentation",
    orbit: Literal["ascending", "descending", "both"] = "ascending",
    spot: bool = True,
    card: DatasetCard = CARD,
) -> LabelledSet:
    """Open a split, or the `folds` given in its place.

    "multilabel" asks which of the 18 crops occur in a patch. PASTIS-R is the same without `spot`.
    """
    check_split(card, split)
    if task not in ("segmentation", "multilabel") or orbit not in _ORBITS:
        raise InputError(
            f"task is {task!r} and orbit {orbit!r}; wanted segmentation or multilabel, and one of {', '.join(_ORBITS)}"
        )
    root = Path(root)
    metadata = load_json(root / "metadata.geojson")
    chosen = FOLDS[split] if folds is None else tuple(folds)
    crs = metadata.get("crs", {}).get("properties", {}).get("name", "EPSG:4326")
    patches = {
        str(feature["properties"]["ID_PATCH"]): feature
        for feature in metadata["features"]
        if int(feature["properties"]["Fold"]) in chosen
    }
    return LabelledSet(
        card=card,
        split=split,
        task=task,
        class_names=card.class_names if task == "segmentation" else card.class_names[1:],
        ids=tuple(patches),
        read=partial(_read, root, patches, crs, task, _ORBITS[orbit], spot),
        files=partial(_files, root, _ORBITS[orbit], spot),
    )


def _path(root: Path, kind: str, patch: str) -> Path:
    if kind == "SPOT":
        return root / "DATA_SPOT" / "PASTIS_SPOT6_RVB_1M00_2019" / f"SPOT6_RVB_1M00_2019_{patch}.tif"
    if kind == "TARGET":
        return root / "ANNOTATIONS" / f"TARGET_{patch}.npy"
    return root / f"DATA_{kind}" / f"{kind}_{patch}.npy"


def _files(root: Path, orbits: Sequence[str], spot: bool, patch: str) -> tuple[Path, ...]:
    kinds = ("SPOT", "S2", *orbits, "TARGET")
    return tuple(_path(root, kind, patch) for kind in kinds if spot or kind != "SPOT")


def _read(
    root: Path, patches: Mapping[str, Any], crs: str, task: str, orbits: Sequence[str], spot: bool, patch: str
) -> LabelledSample:
    feature = patches[patch]
    optical = load_npy(_path(root, "S2", patch))
    radar = [load_npy(_path(root, kind, patch))[:, :2] for kind in orbits]  # the third channel is their ratio
    radar_days = [day for kind in orbits for day in _days(feature, kind)]
    codes = load_npy(_path(root, "TARGET", patch))[0].astype(np.int64)
    observations = {
        "sentinel2_l2a": observe(
            "sentinel2_l2a",
            optical,
            _days(feature, "S2"),
            bands=S2_BANDS,
            valid=(optical != NODATA).all(axis=1),
        ),
        "sentinel1": observe("sentinel1", np.concatenate(radar), radar_days, bands=("vv", "vh")),
    }
    if spot:
        image = read_image(_path(root, "SPOT", patch))
        observations["spot"] = observe("spot", image.pixels[None], [UNDATED], bands=("R", "G", "B"))
    target = torch.from_numpy(np.where(codes == VOID, IGNORE, codes))[None]
    if task == "multilabel":
        target = torch.tensor([[float((codes == code).any()) for code in range(1, VOID)]])
    return LabelledSample(
        id=patch,
        batch=Batch(observations=observations, lonlat=_centre(feature["geometry"], crs)),
        target=target,
        fold=str(feature["properties"]["Fold"]),
    )


def _days(feature: Mapping[str, Any], kind: str) -> list[int]:
    dates = feature["properties"][f"dates-{kind}"]
    return [parse_day(dates[index]) for index in sorted(dates, key=int)]


def _centre(geometry: Mapping[str, Any], crs: str) -> torch.Tensor:
    """Take the middle of the outline's extent."""
    points = np.array(list(_points(geometry["coordinates"])))
    x, y = (points.min(axis=0) + points.max(axis=0)) / 2
    return to_lonlat(crs, x, y)


def _points(nested: Sequence[Any]) -> list[tuple[float, float]]:
    if isinstance(nested[0], int | float):
        return [(float(nested[0]), float(nested[1]))]
    return [point for part in nested for point in _points(part)]
