"""FLAIR #2: land cover of 100 m squares in France at 20 cm, with a year of Sentinel-2."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from panterra.data.labelled import DATASETS, UNDATED, LabelledSample, LabelledSet, check_split
from panterra.data.stored_pixels import S2_BANDS, load_json, load_npy, observe, parse_day, read_image
from panterra.errors import InputError
from panterra.sample import Batch

CARD = DATASETS["flair"]
SIDE_PX, CROP_PX, S2_PX = 512, 500, 10
FOLDERS = {"train": ("flair_{}_train", "train"), "val": ("flair_{}_train", "val"), "test": ("flair_2_{}_test", "test")}
"""Where the images of a split lie, and its key in splits.json."""


@dataclass(frozen=True, slots=True)
class _Image:
    aerial: Path
    series: Path
    """The folder of the super-patch."""
    label: Path


def open_flair(
    root: str | Path, split: str, *, offsets: Sequence[tuple[int, int]] = ((6, 6),), crop: bool = True
) -> LabelledSet:
    """Open a split; `offsets` say at which (row, column) of each image its crops of 500 pixels begin.

    The published test covers the 512 pixels by ((0, 0), (0, 12), (12, 0), (12, 12)); the series is the same for all.
    `crop=False` leaves images and labels whole, of which the published training cuts 500 pixels at random.
    """
    check_split(CARD, split)
    if not offsets or any(not 0 <= o <= SIDE_PX - CROP_PX for pair in offsets for o in pair):
        raise InputError(f"offsets are {tuple(offsets)}; wanted pairs from 0 to {SIDE_PX - CROP_PX}")
    root = Path(root)
    folder, key = FOLDERS[split]
    domains = load_json(root / "splits.json")[key]
    centroids = load_json(root / "flair-2_centroids_sp_to_patch.json")
    found = {}
    for domain in domains:
        base = root / folder.format("aerial") / domain
        for area in sorted(p for p in base.iterdir() if p.is_dir()) if base.is_dir() else ():
            series, labels = (root / folder.format(kind) / domain / area.name for kind in ("sen", "labels"))
            label_folder = next((p for p in (labels / "msk", labels) if p.is_dir()), labels)
            for image in sorted(area.rglob("IMG_*.tif"), key=_number):
                label = label_folder / image.name.replace("IMG_", "MSK_")
                found[image.name] = _Image(image, series, label)
    if not found:
        raise InputError(
            f"{root} holds no image of {key}; wanted {folder.format('aerial')}/<domain>/<area>/**/IMG_*.tif"
        )
    several = crop and len(offsets) > 1
    ids = [f"{name}@{row},{col}" if several else name for name in found for row, col in offsets]
    return LabelledSet(
        card=CARD,
        split=split,
        task=CARD.task,
        class_names=CARD.class_names,
        ids=ids,
        read=partial(_read, split, found, centroids, offsets[0] if crop else None),
        files=partial(_files, found),
    )


def _number(path: Path) -> int:
    digits = re.search(r"(\d+)\.tif$", path.name)
    return int(digits[1]) if digits else 0


def _files(found: Mapping[str, _Image], id: str) -> tuple[Path, ...]:
    image = found[id.split("@")[0]]
    return image.aerial, image.label, *_series_files(image.series)


def _series_files(folder: Path) -> tuple[Path, Path]:
    """Find pixels and product names; where there are none, say what would have to be there."""
    pixels, names = (next(iter(sorted(folder.rglob(p))), folder / p) for p in ("*data.npy", "*products.txt"))
    return pixels, names


def _read(
    split: str,
    found: Mapping[str, _Image],
    centroids: Mapping[str, Sequence[int]],
    offset: tuple[int, int] | None,
    id: str,
) -> LabelledSample:
    name, _, place = id.partition("@")
    side = SIDE_PX if offset is None else CROP_PX
    row, col = map(int, place.split(",")) if place else offset or (0, 0)
    crop = np.s_[:, row : row + side, col : col + side]
    image = found[name]
    if name not in centroids:
        raise InputError(f"{name} has no place in flair-2_centroids_sp_to_patch.json; download it again")
    aerial = read_image(image.aerial)
    codes = read_image(image.label, bands=[1]).pixels[crop].astype(np.int64)
    pixels_file, names_file = _series_files(image.series)
    x, y = centroids[name]
    series = load_npy(pixels_file)[
        :, :, max(x - S2_PX // 2, 0) : x + S2_PX // 2, max(y - S2_PX // 2, 0) : y + S2_PX // 2
    ]
    if series.shape[-2:] != (S2_PX, S2_PX):
        raise InputError(f"the centre {x}, {y} of {name} lies too near the edge of {pixels_file}; download both again")
    days = [parse_day(line[11:19]) for line in names_file.read_text().splitlines() if line.strip()]
    observations = {
        "aerial_flair": observe(
            "aerial_flair", aerial.pixels[crop][None], [UNDATED], bands=("R", "G", "B", "NIR", "elevation")
        ),
        "sentinel2_l2a": observe("sentinel2_l2a", series, days, bands=S2_BANDS),
    }
    return LabelledSample(
        id=id,
        batch=Batch(observations=observations, lonlat=aerial.lonlat),
        target=torch.from_numpy(np.minimum(codes, len(CARD.class_names)) - 1),
        fold=split,
    )
