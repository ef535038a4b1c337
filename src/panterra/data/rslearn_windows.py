"""rslearn data sets: windows of space and time, each a folder with its layers.

After rslearn's documentation (CoreConcepts, DatasetConfig, WindowDataStorageConfig): `config.json` names the layers;
`windows/GROUP/NAME/metadata.json` places a window; `layers/LAYER[.N]/BANDS/geotiff.tif` holds the N-th image of a layer
in one folder per set of bands; `layers/LAYER/data.geojson` holds shapes. Only the default storage, one folder per
image, is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from panterra.data.labelled import IGNORE, DatasetCard, LabelledSample, LabelledSet, Task, card_of, check_split
from panterra.data.stored_pixels import Array, load_json, nearest, observe, parse_day, read_image, to_lonlat
from panterra.errors import InputError
from panterra.sample import Batch, Observation, to_date, to_days

USUAL_LAYERS = {"sentinel2": "sentinel2_l2a", "sentinel1": "sentinel1", "landsat": "landsat"}
"""What layers hold whose name begins so."""
FILES = ("geotiff.tif", "image.png")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the windows of a data set are read."""

    root: Path
    split: str
    task: Task
    class_names: tuple[str, ...]
    layers: Mapping[str, str]
    """Layer -> modality."""
    target: str
    config: Mapping[str, Any]
    """Of each layer."""
    label: str
    """The property of a shape that is the label."""
    start: str | None
    radar_unit: str
    nodata: float | None


def open_rslearn(
    root: str | Path,
    split: str,
    *,
    name: str | None = None,
    task: Task | None = None,
    class_names: Sequence[str] | None = None,
    layers: Mapping[str, str] | None = None,
    target: str | None = None,
    label: str = "label",
    split_tag: str | None = "split",
    start: str | None = None,
    radar_unit: str = "linear",
    nodata: float | None = None,
) -> LabelledSet:
    """Open the windows of a split, of a known data set by `name` or of one's own by `task` and `class_names`.

    `layers` tells the modality of each layer of images, where names do not; `target` the layer of labels. The split is
    the window's option `split_tag`, or its group without one. The N-th image of a layer is dated the first of the N-th
    month of its window, or from `start` (such as "2022-09", which the published evaluation takes unless told). Pixels
    of `nodata` in a label raster are without label.
    """
    root = Path(root)
    card = _own_card(root, split, task, class_names) if name is None else card_of(name)
    check_split(card, split)
    config = load_json(root / "config.json").get("layers", {})
    layers = _image_layers(config) if layers is None else layers
    windows = _windows(root, split_tag)
    chosen = {id: window for id, (of, window) in windows.items() if of == split}
    if not chosen:
        found = ", ".join(sorted({str(of) for of, _ in windows.values()})) or "no windows at all"
        raise InputError(f"no window of {root} is in the split {split!r}; there are {found}")
    reading = Reading(
        root=root,
        split=split,
        task=card.task if task is None else task,
        class_names=card.class_names if class_names is None else tuple(class_names),
        layers=layers,
        target=_target_layer(config, layers) if target is None else target,
        config=config,
        label=label,
        start=start,
        radar_unit=radar_unit,
        nodata=nodata,
    )
    strangers = [layer for layer in (*reading.layers, reading.target) if layer not in config]
    if strangers:
        raise InputError(f"{root / 'config.json'} has no layer {strangers[0]!r} but {', '.join(config)}")
    return LabelledSet(
        card=card,
        split=split,
        task=reading.task,
        class_names=reading.class_names,
        ids=tuple(chosen),
        read=partial(_read, reading, chosen),
        files=partial(_files, reading),
    )


def _windows(root: Path, split_tag: str | None) -> dict[str, tuple[str | None, Mapping[str, Any]]]:
    """List the windows and the split of each."""
    found = {}
    for path in sorted(root.glob("windows/*/*/metadata.json")):
        window = load_json(path)
        if not {"projection", "bounds"} <= window.keys():
            raise InputError(f"{path} does not say where the window lies; wanted projection and bounds")
        group = path.parent.parent.name
        options = window.get("options") or {}
        found[f"{group}/{path.parent.name}"] = (group if split_tag is None else options.get(split_tag), window)
    return found


def _own_card(root: Path, split: str, task: Task | None, class_names: Sequence[str] | None) -> DatasetCard:
    if task is None or class_names is None:
        raise InputError("a data set of one's own wants a task and class_names; or give the name of a known one")
    return DatasetCard(
        name="rslearn",
        title=str(root),
        opener="panterra.data.rslearn_windows:open_rslearn",
        task=task,
        class_names=tuple(class_names),
        splits={split: None},
        modalities={},
        target_shape=(),
        layout=("config.json", "windows"),
        about="A data set of one's own.",
        licence=None,
        citation="",
    )


def _image_layers(config: Mapping[str, Any]) -> dict[str, str]:
    return {
        layer: modality
        for layer in config
        for start, modality in USUAL_LAYERS.items()
        if layer.lower().startswith(start)
    }


def _target_layer(config: Mapping[str, Any], layers: Mapping[str, str]) -> str:
    """Take the only layer that comes from no source of images, or the only one called label."""
    own = [layer for layer, about in config.items() if layer not in layers and "data_source" not in about]
    named = [layer for layer in own if layer.startswith("label")]
    for candidates in (own, named):
        if len(candidates) == 1:
            return candidates[0]
    raise InputError(f"which layer holds the labels is not clear; name one of {', '.join(config)} as target")


def _images(reading: Reading, id: str, layer: str) -> dict[int, Path]:
    """Find the folders of a layer's images by their number."""
    folder = reading.root / "windows" / id / "layers"
    numbered = {0: folder / layer}
    for path in folder.glob(f"{layer}.*"):
        if path.suffix[1:].isdigit() and path.stem == layer:
            numbered[int(path.suffix[1:])] = path
    return {number: numbered[number] for number in sorted(numbered) if number == 0 or numbered[number].is_dir()}


def _rasters(reading: Reading, layer: str, folder: Path) -> list[tuple[Path, list[str]]]:
    """Name the file of each set of bands, and its bands."""
    sets = reading.config[layer].get("band_sets", [])
    return [
        (_raster(folder, [str(band) for band in each["bands"]], alone=len(sets) == 1), each["bands"]) for each in sets
    ]


def _raster(folder: Path, bands: Sequence[str], *, alone: bool) -> Path:
    """Find a set of bands; a long list of bands is a folder of another name, which is known where it is alone."""
    named = folder / "_".join(bands)
    folders = [path for path in folder.glob("*") if path.is_dir()] if alone and not named.is_dir() else []
    place = folders[0] if len(folders) == 1 else named
    return next((place / file for file in FILES if (place / file).is_file()), place / FILES[0])


def _files(reading: Reading, id: str) -> tuple[Path, ...]:
    target = reading.root / "windows" / id / "layers" / reading.target
    shapes = reading.config[reading.target].get("type") == "vector"
    labels = [target / "data.geojson"] if shapes else [path for path, _ in _rasters(reading, reading.target, target)]
    images = [
        path
        for layer in reading.layers
        for folder in _images(reading, id, layer).values()
        for path, _ in _rasters(reading, layer, folder)
    ]
    return *labels, *images


def _read(reading: Reading, windows: Mapping[str, Mapping[str, Any]], id: str) -> LabelledSample:
    window = windows[id]
    observations = {
        modality: _observe(reading, id, modality, window) for modality in dict.fromkeys(reading.layers.values())
    }
    return LabelledSample(
        id=id,
        batch=Batch(observations=observations, lonlat=_centre(window)),
        target=_target(reading, id),
        fold=reading.split,
    )


def _observe(reading: Reading, id: str, modality: str, window: Mapping[str, Any]) -> Observation:
    """Stack the images of a modality; those of a second layer follow those of the first."""
    stacked: list[Array] = []
    days: list[int] = []
    bands: list[str] = []
    for layer in (layer for layer, of in reading.layers.items() if of == modality):
        taken, before = len(days), bands
        for number, folder in _images(reading, id, layer).items():
            rasters = _rasters(reading, layer, folder)
            images = [read_image(path).pixels for path, _ in rasters]
            side = max(image.shape[-1] for image in images)
            stacked.append(np.concatenate([nearest(image, side) for image in images]).astype(np.float32))
            days.append(_day(reading, window, taken + number))
            bands = [band for _, names in rasters for band in names]
        if before not in ([], bands):
            raise InputError(f"{layer} has other bands than the layers before it: {', '.join(bands)}; read them apart")
    pixels = np.stack(stacked)
    radar = modality.startswith("sentinel1")
    missing = (pixels == -32768).any(axis=1) if radar else (pixels == 0).all(axis=1)
    return observe(
        modality,
        pixels,
        days,
        bands=[band.lower() for band in bands] if radar else bands,
        valid=~missing,
        unit=reading.radar_unit if radar else None,
    )


def _day(reading: Reading, window: Mapping[str, Any], number: int) -> int:
    if reading.start is None and not window.get("time_range"):
        raise InputError(f"window {window.get('name')} has no time range; give start, such as 2022-09")
    text = window["time_range"][0] if reading.start is None else f"{reading.start}-01"
    first = to_date(parse_day(text))
    months = first.year * 12 + first.month - 1 + number
    return to_days(f"{months // 12}-{months % 12 + 1:02d}-01")


def _centre(window: Mapping[str, Any]) -> torch.Tensor:
    """Bring the middle of a window to longitude and latitude; its bounds count pixels."""
    grid, (west, north, east, south) = window["projection"], window["bounds"]
    x, y = (west + east) / 2 * grid["x_resolution"], (north + south) / 2 * grid["y_resolution"]
    return to_lonlat(grid["crs"], x, y)


def _target(reading: Reading, id: str) -> torch.Tensor:
    (path, *_) = _files(reading, id)
    if path.suffix == ".geojson":
        return _shape_target(reading, path)
    values: Array = read_image(path).pixels[:1]
    about = reading.config[reading.target]["band_sets"][0]
    nodata = reading.nodata if reading.nodata is not None else (about.get("nodata_vals") or [None])[0]
    empty = values == nodata if nodata is not None else np.zeros(values.shape, bool)
    if reading.task == "regression":
        return torch.from_numpy(np.where(empty, np.nan, values.astype(np.float32)))
    return torch.from_numpy(np.where(empty, IGNORE, values.astype(np.int64)))


def _shape_target(reading: Reading, path: Path) -> torch.Tensor:
    """Take the label of a window's first shape."""
    shapes = load_json(path)["features"]
    if not shapes or reading.label not in shapes[0]["properties"]:
        raise InputError(f"{path} has no shape with a {reading.label!r}; give the label's property")
    value = shapes[0]["properties"][reading.label]
    if reading.task == "regression":
        return torch.tensor([float(value)])
    if value in reading.class_names:
        return torch.tensor([reading.class_names.index(value)])
    if not str(value).isdigit():
        raise InputError(f"{path} has the class {value!r}; give class_names, which are in the order of the codes")
    return torch.tensor([int(value)])
