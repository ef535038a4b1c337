"""Pictures of a scene and of maps, for people."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8
from odc.geo.geobox import GeoBox

from panterra.imagery.stac import Scene
from panterra.mapping.report import stretch
from panterra.modalities import MODALITIES

OVERVIEW_PX = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Imagery as a person would see it."""

    pixels: UInt8[np.ndarray, "h w 4"]
    about: str
    """Sensor, date and how bands became colours."""


def picture_of(scene: Scene, box: GeoBox) -> Picture:
    """Show the scene's date with the most data on a box: true colour where a sensor sees it, else its first bands."""
    modality = min(scene.modalities, key=lambda name: (_colours(name) is None, MODALITIES[name].kind != "series"))
    date = _clearest(scene, modality, box)
    day = replace(scene, items=tuple(i for i in scene.items if i.modality == modality and i.date == date))
    seen = day.read(modality, box)
    bands = seen.pixels[0, 0].numpy()
    valid = seen.valid[0, 0].numpy()
    colours = _colours(modality)
    chosen = colours or tuple(range(len(bands)))[:3]
    shown = bands[list(chosen + chosen[-1:] * (3 - len(chosen)))]
    names = ", ".join(MODALITIES[modality].band_names[i] for i in chosen)
    look = "true colour" if colours else f"bands {names}"
    return Picture(pixels=stretch(shown, valid), about=f"{MODALITIES[modality].title}, {date}, {look}")


def _colours(modality: str) -> tuple[int, ...] | None:
    common = [band.common for band in MODALITIES[modality].bands]
    wanted = ("red", "green", "blue")
    return tuple(common.index(name) for name in wanted) if set(wanted) <= set(common) else None


def _clearest(scene: Scene, modality: str, box: GeoBox) -> dt.date:
    """Choose among dates by an overview, so that no date is read at full size but the chosen one."""
    dates = scene.dates(modality)
    if len(dates) == 1:
        return dates[0]
    valid = scene.read(modality, box.zoom_to(OVERVIEW_PX) if max(box.shape) > OVERVIEW_PX else box).valid[0]
    return dates[int(valid.flatten(1).sum(1).argmax())]
