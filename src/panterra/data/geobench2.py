"""GEO-Bench, second edition: tortillas of samples, each a tortilla of images and a label.

What the publishers' generation scripts write (geobenchv2 0.9): the files of a sample by position, bands by order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from panterra.data.labelled import IGNORE, LabelledSample, LabelledSet, card_of, check_split
from panterra.data.stored_pixels import S2_BANDS, Array, observe, parse_day, read_image
from panterra.data.tortilla import Entry, read_entries
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.sample import Batch, Observation

PUBLISHED_DAY = "2020-07-15"
"""Of all images in OlmoEarth's published evaluation."""

L2A_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
SLOTS = MODALITIES["sentinel2_l2a"].band_names
NODATA = -9999

Parts = Sequence[Entry]
Read = Callable[[Parts, int, bool], tuple[dict[str, Observation], torch.Tensor]]
"""What a sample's files, the day and whether to do as published make: what was seen, and the target."""


def open_geobench2(
    root: str | Path, split: str, *, name: str, day: str = PUBLISHED_DAY, as_published: bool = False
) -> LabelledSet:
    """Open a split of the data set `name`; a folder may hold several data sets.

    `as_published` fills the slots of Sentinel-1 and -2 as OlmoEarth's evaluation does, also from other sensors; bands
    that no sensor has are zero.
    """
    card = card_of(name)
    check_split(card, split)
    files = sorted(Path(root).glob(card.layout[0]))
    if not files:
        raise InputError(f"{root} holds no {card.layout[0]}; give the folder with the download of {card.title}")
    samples = {
        entry.id: entry
        for file in files
        for entry in read_entries(file)
        if entry.columns.get("tortilla:data_split") == split
    }
    return LabelledSet(
        card=card,
        split=split,
        task=card.task,
        class_names=card.class_names,
        ids=tuple(sorted(samples)),
        read=partial(_read, READERS[name], samples, split, parse_day(day), as_published),
        files=partial(_files, samples),
    )


def _files(samples: Mapping[str, Entry], id: str) -> tuple[Path]:
    return (samples[id].tortilla,)


def _read(
    reader: Read, samples: Mapping[str, Entry], split: str, day: int, as_published: bool, id: str
) -> LabelledSample:
    parts = samples[id].entries()
    observations, target = reader(parts, day, as_published)
    return LabelledSample(
        id=id, batch=Batch(observations=observations, lonlat=_lonlat(parts[0])), target=target, fold=split
    )


def _lonlat(part: Entry) -> torch.Tensor | None:
    point = re.match(r"POINT \((\S+) (\S+)\)", str(part.columns.get("stac:centroid")))
    lon, lat = point.groups() if point else (part.columns.get("lon"), part.columns.get("lat"))
    return None if lon is None or lat is None else torch.tensor([[float(lon), float(lat)]], dtype=torch.float64)


def _pixels(part: Entry) -> Array:
    return read_image(part.path).pixels


def _mask(part: Entry, *, shift: int = 0, ignored: int | None = None) -> torch.Tensor:
    """Read codes; `shift` is added to them, and `ignored` is a stored code that is no class."""
    codes = _pixels(part)[:1].astype(np.int64)
    moved = codes + shift
    return torch.from_numpy(np.where((moved < 0) | (codes == ignored), IGNORE, moved))


def _present(card: str, names: Sequence[str]) -> torch.Tensor:
    return torch.tensor([[float(name in names) for name in card_of(card).class_names]])


def _slots(modality: str, pixels: Array, bands: Sequence[str], day: int) -> Observation:
    """Put stored channels [T, C, H, W] into the named bands of a modality and zeros into the others."""
    order = MODALITIES[modality].band_names
    filled = np.zeros((len(pixels), len(order), *pixels.shape[2:]), np.float32)
    filled[:, [order.index(band) for band in bands]] = pixels
    return observe(modality, filled, [day] * len(pixels), bands=order)


def _benv2(parts: Parts, day: int, as_published: bool) -> tuple[dict[str, Observation], torch.Tensor]:
    # The files hold VH first; the publishers' reader, and with it the published evaluation, takes it for VV.
    radar = ("vv", "vh") if as_published else ("vh", "vv")
    observations = {
        "sentinel1": observe("sentinel1", _pixels(parts[0])[None], [day], bands=radar),
        "sentinel2_l2a": observe("sentinel2_l2a", _pixels(parts[1])[None], [day], bands=L2A_BANDS),
    }
    return observations, _present("gb2_benv2", parts[0].columns["labels"])


def _treesatai(parts: Parts, day: int, _: bool) -> tuple[dict[str, Observation], torch.Tensor]:
    optical = observe("sentinel2_l2a", _pixels(parts[2])[None], [day], bands=SLOTS)
    return {"sentinel2_l2a": optical}, _present("gb2_treesatai", parts[0].columns["species_labels"])


def _biomassters(parts: Parts, day: int, _: bool) -> tuple[dict[str, Observation], torch.Tensor]:
    by_sensor = {
        sensor: [_pixels(part) for part in parts if part.columns["modality"] == sensor] for sensor in ("S1", "S2")
    }
    # Ascending VV and VH, then descending; their mean is taken, of one where the other is absent.
    passes = (
        np.stack(by_sensor["S1"]).astype(np.float32).reshape(len(by_sensor["S1"]), 2, 2, *by_sensor["S1"][0].shape[1:])
    )
    there = passes != NODATA
    count = there.sum(axis=1)
    radar = np.where(there, passes, 0).sum(axis=1) / np.maximum(count, 1)
    optical = np.stack([image[: len(S2_BANDS)] for image in by_sensor["S2"]])  # cloud probability may follow
    observations = {
        "sentinel1": observe("sentinel1", radar, [day] * len(radar), bands=("vv", "vh"), valid=(count > 0).all(axis=1)),
        "sentinel2_l2a": observe("sentinel2_l2a", optical, [day] * len(optical), bands=S2_BANDS),
    }
    return observations, torch.from_numpy(_pixels(parts[-1])[:1].astype(np.float32))


def _burn_scars(parts: Parts, day: int, as_published: bool) -> tuple[dict[str, Observation], torch.Tensor]:
    pixels, target = _pixels(parts[0])[None], _mask(parts[1])
    if as_published:
        bands = ("B02", "B03", "B04", "B8A", "B11", "B12")
        return {"sentinel2_l2a": _slots("sentinel2_l2a", pixels * 1e4, bands, day)}, target
    valid = (np.abs(pixels) != -NODATA).all(axis=1)
    hls = observe("hls", pixels, [day], bands=MODALITIES["hls"].band_names, valid=valid, unit="reflectance")
    return {"hls": hls}, target


def _caffe(parts: Parts, day: int, _: bool) -> tuple[dict[str, Observation], torch.Tensor]:
    grey = _slots("sentinel1", _pixels(parts[0])[None, :1], ("vv",), day)
    return {"sentinel1": grey}, _mask(parts[1], shift=-1)


def _cloudsen12(parts: Parts, day: int, _: bool) -> tuple[dict[str, Observation], torch.Tensor]:
    pixels = _pixels(parts[0])[None, : len(L2A_BANDS)]  # aerosol and water vapour follow
    return {"sentinel2_l2a": observe("sentinel2_l2a", pixels, [day], bands=L2A_BANDS)}, _mask(parts[1])


def _flair2(parts: Parts, day: int, as_published: bool) -> tuple[dict[str, Observation], torch.Tensor]:
    pixels, codes = _pixels(parts[0])[None], _mask(parts[1], shift=-1)
    target = codes.clamp(max=12)
    if as_published:  # red lands in the slot of blue
        return {"sentinel2_l2a": _slots("sentinel2_l2a", pixels * (1e4 / 255), SLOTS[:5], day)}, target
    bands = ("R", "G", "B", "NIR", "elevation")
    return {"aerial_flair": observe("aerial_flair", pixels, [day], bands=bands)}, target


def _fotw(parts: Parts, day: int, _: bool) -> tuple[dict[str, Observation], torch.Tensor]:
    windows = np.stack([_pixels(part) for part in parts[:2]])
    codes = _mask(parts[3])
    target = torch.where(codes > 2, torch.tensor(IGNORE), codes)
    return {"sentinel2_l2a": _slots("sentinel2_l2a", windows, ("B04", "B03", "B02", "B08"), day)}, target


def _kuro_siwo(parts: Parts, day: int, _: bool) -> tuple[dict[str, Observation], torch.Tensor]:
    radar = np.stack([_pixels(part) for part in parts[:3]])
    height = _pixels(parts[3])[None]
    usable = _pixels(parts[5])[0] == 1
    observations = {
        "sentinel1": observe("sentinel1", radar, [day] * 3, bands=("vv", "vh"), valid=usable, unit="linear"),
        "srtm": observe("srtm", np.maximum(height, -500), [day], bands=("srtm",), valid=usable),
    }
    return observations, _mask(parts[4], ignored=3)


def _spacenet2(parts: Parts, day: int, _: bool) -> tuple[dict[str, Observation], torch.Tensor]:
    pixels = np.concatenate([_pixels(parts[1]), _pixels(parts[0])])  # the panchromatic band first
    return {"sentinel2_l2a": _slots("sentinel2_l2a", pixels[None], SLOTS[:9], day)}, _mask(parts[2], shift=1)


def _spacenet7(parts: Parts, day: int, as_published: bool) -> tuple[dict[str, Observation], torch.Tensor]:
    pixels, target = _pixels(parts[0])[None], _mask(parts[1], shift=1)
    if as_published:  # the mask channel stands for infrared
        bands = ("B04", "B03", "B02", "B08")
        return {"sentinel2_l2a": _slots("sentinel2_l2a", pixels * (1e4 / 255), bands, day)}, target
    valid = pixels[:, 3] != 0 if pixels.shape[1] > 3 else None
    return {"planet": observe("planet", pixels[:, :3], [day], bands=("R", "G", "B"), valid=valid)}, target


READERS: dict[str, Read] = {
    "gb2_benv2": _benv2,
    "gb2_treesatai": _treesatai,
    "gb2_biomassters": _biomassters,
    "gb2_burn_scars": _burn_scars,
    "gb2_caffe": _caffe,
    "gb2_cloudsen12": _cloudsen12,
    "gb2_flair2": _flair2,
    "gb2_fotw": _fotw,
    "gb2_kuro_siwo": _kuro_siwo,
    "gb2_spacenet2": _spacenet2,
    "gb2_spacenet7": _spacenet7,
}
