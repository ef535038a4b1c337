"""The sensors AnySat looks at: which bands, how large on the ground, and what its weights expect of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from panterra.errors import InputError
from panterra.modalities import MODALITIES, Modality
from panterra.plain import as_lists
from panterra.sample import Observation

CELL_M = 10.0
"""AnySat counts space in squares of 10 m."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensor:
    """One input of AnySat and the projector that reads it."""

    name: str
    """As in the published weights."""
    modalities: tuple[str, ...]
    """The rows of `MODALITIES` whose observations it can take."""
    bands: tuple[str, ...]
    """In the order that the weights expect."""
    dated: bool = True
    """True for series, which a temporal encoder reads; False for still images, which are cut into cells."""
    ratio: tuple[str, str] | None = None
    """Two bands in decibels whose difference, the logarithm of their ratio, is a last channel."""
    kernel: int = 1
    """Side of a cell in pixels; 1 for series."""
    cell_m: float = 10.0
    """Side of a cell on the ground, in metres."""
    place_m: float = 10.0
    """The distance of neighbouring cells in the table of places, in metres."""
    whole: bool = False
    """One value for the whole tile, as MODIS has."""
    period: int = 367
    """The constant of the encoding of dates."""
    dropout: float = 0.2
    in_norm: bool = False
    """Normalise over the dates of a pixel."""
    declared: Modality | None = None
    """The row of `MODALITIES` that a user declared for it."""

    @property
    def channels(self) -> int:
        return len(self.bands) + (self.ratio is not None)

    @property
    def channel_names(self) -> tuple[str, ...]:
        return self.bands if self.ratio is None else (*self.bands, "/".join(self.ratio))

    @property
    def cells(self) -> int:
        """Cells along the side of a 10 m square; 1 where cells are larger."""
        return max(1, round(CELL_M / self.cell_m))

    def side(self, scale: int) -> int:
        """Cells along the side of a patch of `scale` 10 m squares, at least one."""
        return 1 if self.whole else max(1, int(CELL_M * scale / self.cell_m + 1e-6))


_S2 = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
_RGB = ("R", "G", "B")

# The order is that of the published checkpoint. Aerial images were stored and fed as infrared first (TreeSatAI).
SENSORS: dict[str, Sensor] = {
    s.name: s
    for s in (
        Sensor(
            name="aerial",
            modalities=("aerial",),
            bands=("NIR", *_RGB),
            dated=False,
            kernel=10,
            cell_m=2,
            place_m=2,
        ),
        Sensor(
            name="aerial-flair",
            modalities=("aerial_flair",),
            bands=(*_RGB, "NIR", "elevation"),
            dated=False,
            kernel=10,
            cell_m=2,
            place_m=2,
        ),
        Sensor(name="spot", modalities=("spot",), bands=_RGB, dated=False, kernel=10),
        Sensor(name="naip", modalities=("naip", "naip_10"), bands=(*_RGB, "IR"), dated=False, kernel=8),
        Sensor(name="s2", modalities=("sentinel2_l2a", "sentinel2"), bands=_S2, dropout=0.0, in_norm=True),
        Sensor(name="s1-asc", modalities=("sentinel1_ascending",), bands=("vv", "vh")),
        Sensor(name="s1", modalities=("sentinel1",), bands=("vv", "vh"), ratio=("vv", "vh")),
        Sensor(name="alos", modalities=("alos2",), bands=("hh", "hv"), ratio=("hh", "hv"), cell_m=30, place_m=30),
        Sensor(name="l7", modalities=("landsat7",), bands=("B1", "B2", "B3", "B4", "B5", "B7"), cell_m=30, place_m=30),
        Sensor(
            name="l8",
            modalities=("landsat",),
            bands=("B8", "B1", "B2", "B3", "B4", "B5", "B6", "B7", "B9", "B10", "B11"),
            period=366,
            dropout=0.0,
        ),
        Sensor(
            name="modis",
            modalities=("modis",),
            bands=tuple(f"B{i}" for i in range(1, 8)),
            cell_m=250,
            place_m=250,
            whole=True,
        ),
    )
}
"""The eleven sensors of GeoPlex, as pretraining configures them."""

NEW_SENSORS: dict[str, Sensor] = {
    s.name: s
    for s in (
        Sensor(
            name="hls",
            modalities=("hls",),
            bands=("B2", "B3", "B4", "B5", "B6", "B7"),
            cell_m=30,
            place_m=30,
            period=366,
            dropout=0.0,
        ),
        Sensor(name="planet", modalities=("planet",), bands=_RGB, dated=False, kernel=4, place_m=12),
    )
}
"""Sensors that the published evaluation adds to the pretrained ones."""


def hub_sensors() -> tuple[Sensor, ...]:
    """Configure the sensors as the published hub model does, whose Landsat 7 and ALOS pixels count as 10 m."""
    changed = {name: replace(SENSORS[name], cell_m=10) for name in ("l7", "alos")}
    changed["l8"] = replace(SENSORS["l8"], dropout=0.2)
    return tuple(changed.get(name, sensor) for name, sensor in SENSORS.items())


def finetuning_sensors(sensors: Iterable[Sensor]) -> tuple[Sensor, ...]:
    """Configure sensors as the published fine-tuning does: a period of 366 and no dropout."""
    return tuple(replace(sensor, period=366, dropout=0.0) for sensor in sensors)


def changed_settings(sensors: Iterable[Sensor]) -> dict[str, dict[str, Any]]:
    """Tell as plain JSON, by sensor, what is not as published, but for dropout, which matters in training alone."""
    known = {**SENSORS, **NEW_SENSORS}
    changed = {}
    for sensor in sensors:
        usual = as_lists(asdict(known[sensor.name])) if sensor.name in known else {}
        own = as_lists(asdict(sensor))
        changed[sensor.name] = {k: v for k, v in own.items() if v != usual.get(k) and k != "dropout"}
    return {name: settings for name, settings in changed.items() if settings}


def declare(sensor: Sensor) -> None:
    """Make the modality that a user declared for a sensor known to batches. Raises InputError."""
    row = sensor.declared
    if row is None:
        return
    known = MODALITIES.setdefault(row.name, row)
    if (known.band_names, known.gsd, known.kind) != (row.band_names, row.gsd, row.kind):
        raise InputError(f"a different modality {row.name!r} is known already; give the new sensor another name")


def new_sensor(modality: Modality, *, kernel: int | None = None) -> Sensor:
    """Describe a declared modality to AnySat.

    Series keep their pixels. Still images are cut into cells of 10 m, or of 2 m where pixels are 0.5 m or finer;
    `kernel` sets the pixels along a cell's side otherwise.
    """
    name, bands = modality.name.replace(".", "_"), modality.band_names
    if modality.kind == "series":
        return Sensor(
            name=name,
            modalities=(modality.name,),
            bands=bands,
            cell_m=modality.gsd,
            place_m=modality.gsd,
            dropout=0.0,
            declared=modality,
        )
    if modality.kind != "still":
        raise InputError(f"{modality.name} is of kind {modality.kind!r}; AnySat takes series and still images")
    cell_m = 2.0 if modality.gsd <= 0.5 else CELL_M
    return Sensor(
        name=name,
        modalities=(modality.name,),
        bands=bands,
        dated=False,
        kernel=kernel or max(1, round(cell_m / modality.gsd)),
        cell_m=cell_m,
        place_m=cell_m,
        dropout=0.0,
        declared=modality,
    )


def read_channels(pixels: Float[Tensor, "b t c y x"], sensor: Sensor, modality: str) -> Float[Tensor, "b t k y x"]:
    """Pick a sensor's bands out of a modality's, in its order, and add the ratio where it has one."""
    names = MODALITIES[modality].band_names
    index = [_index(names, band, sensor, modality) for band in sensor.bands]
    chosen = pixels if index == list(range(len(names))) else pixels[:, :, index]
    if sensor.ratio is None:
        return chosen
    above, below = (chosen[:, :, [sensor.bands.index(band)]] for band in sensor.ratio)
    return torch.cat([chosen, above - below], dim=2)


def _index(names: tuple[str, ...], band: str, sensor: Sensor, modality: str) -> int:
    if band not in names:
        raise InputError(f"{modality} has no band {band}, which sensor {sensor.name} needs; it has {', '.join(names)}")
    return names.index(band)


def to_pixel_size(o: Observation, sensor: Sensor, gsd: float) -> tuple[Float[Tensor, "b t c y x"], Tensor]:
    """Bring a still image of `gsd` metres per pixel, and what is valid of it, to the pixels that the cells are made of.

    Larger pixels are averages of what is valid in them; smaller ones repeat.
    """
    wanted = sensor.cell_m / sensor.kernel
    if abs(gsd / wanted - 1) < 1e-6:
        return o.pixels, o.valid
    height, width = o.pixels.shape[-2:]
    size = round(height * gsd / wanted), round(width * gsd / wanted)
    if wanted < gsd:
        rows, cols = (_nearest(n, m, o.pixels.device) for n, m in zip((height, width), size, strict=True))
        return o.pixels[..., rows[:, None], cols], o.valid[..., rows[:, None], cols]
    weight = o.valid[:, :, None].to(o.pixels.dtype)
    filled = torch.where(o.valid[:, :, None], o.pixels, 0.0)
    total, seen = (F.adaptive_avg_pool2d(x.flatten(0, 1), size).unflatten(0, x.shape[:2]) for x in (filled, weight))
    return total / seen.clamp(min=1e-6), seen[:, :, 0] > 0


def _nearest(num_in: int, num_out: int, device: torch.device) -> Int[Tensor, " n"]:
    return (((torch.arange(num_out, device=device) + 0.5) * num_in) / num_out).long()


def day_of_year(days: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Turn days since 1970-01-01 into 1 to 366, as AnySat's pretraining data counts them."""
    date = days.cpu().numpy().astype("datetime64[D]")
    first = date.astype("datetime64[Y]").astype("datetime64[D]")
    return torch.from_numpy((date - first).astype(np.int64) + 1).to(days.device)


def sensor_of(modality: str, sensors: Mapping[str, Sensor]) -> Sensor | None:
    """Find the sensor that takes a modality's observations."""
    return next((sensor for sensor in sensors.values() if modality in sensor.modalities), None)
