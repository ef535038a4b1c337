"""Sen1Floods11: hand-drawn surface water of 5 km squares during floods, seen by Sentinel-1 and Sentinel-2."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from panterra.data.labelled import DATASETS, UNDATED, DatasetCard, LabelledSample, LabelledSet, check_split
from panterra.data.stored_pixels import load_json, observe, parse_day, read_image
from panterra.errors import InputError
from panterra.sample import Batch

CARD = DATASETS["sen1floods11"]
BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")


def open_sen1floods11(root: str | Path, split: str, *, optical: bool = True, card: DatasetCard = CARD) -> LabelledSet:
    """Open a split of the hand-labelled chips, without Sentinel-2 where it is not wanted."""
    check_split(card, split)
    base = Path(root) / "v1.1"
    listing = base / "splits" / "flood_handlabeled" / f"flood_{split}_data.csv"
    if not listing.is_file():
        raise InputError(f"there is no file {listing}; it lists the chips of the split")
    with listing.open(newline="") as file:
        chips = {row[0].strip(): row[1].strip() for row in csv.reader(file) if row}
    floods = [f["properties"] for f in load_json(base / "Sen1Floods11_Metadata.geojson")["features"]]
    known = Counter(flood["location"] for flood in floods)
    days = {
        flood["location"]: (parse_day(flood["s1_date"]), parse_day(flood["s2_date"]))
        for flood in floods
        if known[flood["location"]] == 1
    }
    return LabelledSet(
        card=card,
        split=split,
        task=card.task,
        class_names=card.class_names,
        ids=tuple(chips),
        read=partial(_read, base, split, chips, days, optical),
        files=partial(_files, base, chips, optical),
    )


def _files(base: Path, chips: Mapping[str, str], optical: bool, id: str) -> tuple[Path, ...]:
    folder = base / "data" / "flood_events" / "HandLabeled"
    images = [folder / "S1Hand" / id] + [folder / "S2Hand" / id.replace("S1Hand", "S2Hand")] * optical
    return *images, folder / "LabelHand" / chips[id]


def _read(
    base: Path, split: str, chips: Mapping[str, str], days: Mapping[str, tuple[int, int]], optical: bool, id: str
) -> LabelledSample:
    radar, *seen, label = (read_image(path) for path in _files(base, chips, optical, id))
    s1_day, s2_day = days.get(id.split("_")[0], (UNDATED, UNDATED))
    observations = {"sentinel1": observe("sentinel1", radar.pixels[None], [s1_day], bands=("vv", "vh"))}
    for image in seen:
        pixels = image.pixels[None]
        observations["sentinel2"] = observe("sentinel2", pixels, [s2_day], bands=BANDS, valid=(pixels != 0).any(axis=1))
    return LabelledSample(
        id=id,
        batch=Batch(observations=observations, lonlat=radar.lonlat),
        target=torch.from_numpy(label.pixels.astype(np.int64)),
        fold=split,
    )
