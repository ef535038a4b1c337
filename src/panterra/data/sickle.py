"""SICKLE: paddy and other crops on plots of the Cauvery Delta, in 320 m squares seen by three satellites."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from panterra.data.labelled import DATASETS, IGNORE, LabelledSample, LabelledSet, check_split
from panterra.data.stored_pixels import Array, column, load_rows, nearest, observe, parse_day, read_image
from panterra.errors import InputError
from panterra.sample import Batch, Observation

CARD = DATASETS["sickle"]
TABLE = "sickle_dataset_tabular.csv"
SIDE_PX = 32

S2_BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
L8_BANDS = ("SR_B1", "SR_B2", "SR_B3", "SR_B4", "SR_B5", "SR_B6", "SR_B7", "ST_B10")


def open_sickle(root: str | Path, split: str) -> LabelledSet:
    """Open a split; a square's plots are labelled in the split that the table gives them to, and void in the other."""
    check_split(CARD, split)
    root = Path(root)
    rows = load_rows(root / TABLE)
    splits, squares, plots = (column(rows, name, root / TABLE) for name in ("SPLIT", "UNIQUE_ID", "PLOT_ID"))
    labelled: dict[str, set[int]] = {}
    for of, square, plot in zip(splits, squares, plots, strict=True):
        if of == split:
            labelled.setdefault(square, set()).add(int(plot))
    return LabelledSet(
        card=CARD,
        split=split,
        task=CARD.task,
        class_names=CARD.class_names,
        ids=tuple(labelled),
        read=partial(_read, root, split, labelled),
        files=partial(_files, root),
    )


def _files(root: Path, square: str) -> tuple[Path, ...]:
    """List the label and all images; a sensor without images is stood for by the file that should be there."""
    images = []
    for sensor in ("S2", "L8", "S1"):
        folder = root / "images" / sensor / "npy" / square
        images += sorted(folder.glob("*.npz")) or [folder / "*.npz"]
    return root / "masks" / "10m" / f"{square}.tif", *images


def _read(root: Path, split: str, labelled: Mapping[str, set[int]], square: str) -> LabelledSample:
    label, *images = _files(root, square)
    series = {sensor: [p for p in images if p.parent.parent.parent.name == sensor] for sensor in ("S2", "L8", "S1")}
    s2 = _stack(series["S2"], S2_BANDS)
    s1 = _stack(series["S1"], ("VV", "VH"))
    observations: dict[str, Observation] = {
        "landsat": _landsat(series["L8"]),
        "sentinel2_l2a": observe(
            "sentinel2_l2a",
            s2,
            [_s2_day(path) for path in series["S2"]],
            bands=tuple(f"B0{name[1:]}" if len(name) == 2 else name for name in S2_BANDS),
            valid=(s2 != 0).any(axis=1),
        ),
        "sentinel1": observe(
            "sentinel1", s1, [parse_day(path.stem.split("_")[4][:8]) for path in series["S1"]], bands=("vv", "vh")
        ),
    }
    planes = read_image(label)
    return LabelledSample(
        id=square,
        batch=Batch(observations=observations, lonlat=planes.lonlat),
        target=torch.from_numpy(_target(nearest(planes.pixels, SIDE_PX), labelled[square]))[None],
        fold=split,
    )


def _target(planes: Array, plots: set[int]) -> Array:
    """Make classes of plot numbers and crop types: 1 is paddy, more are other crops, 0 is nothing (SICKLE)."""
    plot, crop = planes[0].astype(np.int64), planes[1].astype(np.int64)
    code = np.select([crop == 0, crop == 1, crop > 1], [IGNORE, 0, 1], default=0)
    return np.where(np.isin(plot, list(plots)), code, IGNORE)


def _s2_day(path: Path) -> int:
    first, second = path.stem.split("_")[:2]
    return parse_day((second if first.startswith("T") else first)[:8])


def _stack(paths: list[Path], bands: tuple[str, ...]) -> Array:
    """Read one file per date, one array per band: [T, C, 32, 32]."""
    return np.stack([_bands(path, bands) for path in paths])


def _bands(path: Path, bands: tuple[str, ...]) -> Array:
    if not path.is_file():
        raise InputError(f"there is no image {path}; complete the download")
    with np.load(path, allow_pickle=False) as file:
        missing = [band for band in bands if band not in file]
        if missing:
            raise InputError(f"{path} has no {', '.join(missing)}; download it again")
        return np.stack([nearest(np.asarray(file[band], np.float32), SIDE_PX) for band in bands])


def _landsat(paths: list[Path]) -> Observation:
    """Bring Collection 2 level 2 to the digital numbers of level 1 (USGS, Landsat 8 science product guides).

    The pan band is stood in for by green, the second thermal band by the first; there is no cirrus after correction.
    """
    stored = _stack(paths, L8_BANDS)
    reflectance = stored[:, :7] * 2.75e-5 - 0.2
    kelvin = stored[:, 7:] * 0.00341802 + 149.0
    radiance = 774.8853 / np.expm1(1321.0789 / kelvin)
    optical, thermal = (reflectance + 0.1) / 2e-5, (radiance - 0.1) / 3.342e-4
    cirrus = np.full_like(thermal, 0.1 / 2e-5)
    return observe(
        "landsat",
        np.concatenate([optical, thermal, optical[:, 2:3], cirrus, thermal], axis=1),
        [parse_day(path.stem.split("_")[2][:8]) for path in paths],
        bands=("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B10", "B8", "B9", "B11"),
        valid=(stored > 0).all(axis=1),
    )
