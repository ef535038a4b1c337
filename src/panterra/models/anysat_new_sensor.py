"""Teach a trained AnySat a sensor that it never saw."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from panterra.errors import InputError
from panterra.modalities import MODALITIES, Band, Modality
from panterra.models.anysat import AnySat, AnySatConfig, projector
from panterra.models.anysat_projectors import CellProjector, SeriesProjector
from panterra.models.anysat_sensors import NEW_SENSORS, Sensor, declare, new_sensor, sensor_of


def add_modality(
    model: AnySat,
    modality: Modality | str,
    *,
    like: str | None = "nearest",
    kernel: int | None = None,
    freeze: bool = False,
) -> Sensor:
    """Give a model a projector for a modality it does not know, in place.

    The projector starts as a copy of that of the sensor `like`, by default the nearest known one: each band takes the
    input weights of the band nearest in wavelength. With `like=None` it starts from random weights. `kernel` is the
    side of a still image's cells in pixels, where the default does not suit. `freeze` leaves the new projector alone
    trainable. Its statistics are still to be fitted. Raises InputError.
    """
    row = MODALITIES.get(modality) if isinstance(modality, str) else modality
    if row is None:
        raise InputError(f"no modality {modality!r} is declared; give a Modality with its bands, gsd and kind")
    if known := sensor_of(row.name, model.sensors):
        raise InputError(f"{model.name} reads {row.name} already, as {known.name}")
    published = sensor_of(row.name, NEW_SENSORS) if MODALITIES.get(row.name) == row else None
    sensor = new_sensor(row, kernel=kernel) if published is None or kernel else published
    if sensor.name in model.projectors:
        raise InputError(f"{model.name} has a sensor {sensor.name!r} already; give the modality another name")
    declare(sensor)
    source = nearest_sensor(sensor, model.config) if like == "nearest" else model.sensors.get(like or "")
    if like not in (None, "nearest") and (source is None or source.dated != sensor.dated):
        kind = "series" if sensor.dated else "still images"
        able = ", ".join(s.name for s in model.config.sensors if s.dated == sensor.dated)
        raise InputError(f"{sensor.name} cannot start like {like!r}; choose one that takes {kind}: {able or 'none'}")
    if source is not None:  # a sensor that starts like another normalises like it
        sensor = replace(sensor, in_norm=source.in_norm, period=source.period)
    reference = model.class_token
    part = fresh_projector(sensor, model.dim).to(device=reference.device, dtype=reference.dtype)
    if source is not None:
        copy_projector(part, model.projectors[source.name], sensor, source)  # type: ignore[arg-type]
    model.projectors[sensor.name] = part.train(model.training)
    model.config = replace(model.config, sensors=(*model.config.sensors, sensor))
    if freeze:
        train_only(model, [sensor.name])
    return sensor


def train_only(model: AnySat, sensors: Iterable[str]) -> None:
    """Freeze everything but the projectors of the named sensors."""
    model.requires_grad_(False)
    for name in sensors:
        if name not in model.projectors:
            raise InputError(f"{model.name} has no sensor {name!r}; it has {', '.join(model.sensors)}")
        for key, parameter in model.projectors[name].named_parameters():
            parameter.requires_grad_(key != "pad")


def nearest_sensor(sensor: Sensor, config: AnySatConfig) -> Sensor | None:
    """Find the known sensor most like a new one: its bands nearest in wavelength, then its cells nearest in size."""

    def distance(other: Sensor) -> tuple[float, float]:
        pairs = nearest_bands(bands_of(sensor), bands_of(other))
        return sum(far for _, far in pairs) / len(pairs), abs(math.log(other.cell_m / sensor.cell_m))

    able = [other for other in config.sensors if other.dated == sensor.dated and not other.whole]
    return min(able, key=distance, default=None)


def bands_of(sensor: Sensor) -> list[Band]:
    """Look up a sensor's bands, in its order."""
    row = next((MODALITIES[m] for m in sensor.modalities if m in MODALITIES), None)
    known = {band.name: band for band in row.bands} if row else {}
    return [known.get(name, Band(name=name, gsd=sensor.cell_m)) for name in sensor.bands]


def nearest_bands(wanted: list[Band], given: list[Band]) -> list[tuple[int, float]]:
    """For each wanted band the index of the most similar given one, and how far that is.

    Far is the logarithm of the ratio of wavelengths; without wavelengths 0 for the same name and otherwise 1.
    """

    def far(a: Band, b: Band) -> float:
        if a.wavelength and b.wavelength:
            return abs(math.log(a.wavelength / b.wavelength))
        if a.wavelength is None and b.wavelength is None and a.name.lower() == b.name.lower():
            return 0.0
        return 1.0 if a.wavelength is None and b.wavelength is None else 2.0

    return [min(((i, far(a, b)) for i, b in enumerate(given)), key=lambda pair: pair[1]) for a in wanted]


def fresh_projector(sensor: Sensor, dim: int) -> CellProjector | SeriesProjector:
    """Build a projector with random weights, drawn as in pretraining."""
    part = projector(sensor, dim)
    if isinstance(part, SeriesProjector):
        part.initialise()
    return part


@torch.no_grad()
def copy_projector(
    part: CellProjector | SeriesProjector, source: CellProjector | SeriesProjector, sensor: Sensor, like: Sensor
) -> None:
    """Copy a projector whose first layer sees other bands and other cells."""
    chosen = [index for index, _ in nearest_bands(bands_of(sensor), bands_of(like))]
    if sensor.ratio is not None:  # the source's ratio, or its last band
        chosen.append(like.channels - 1)
    share = torch.tensor([1.0 / chosen.count(index) for index in chosen])
    first = "embed.weight" if isinstance(part, CellProjector) else "stages.0.linear.weight"
    state = {key: value.clone() for key, value in source.state_dict().items()}
    weight = state[first]
    picked = weight[:, chosen] * share.to(weight).reshape(-1, *[1] * (weight.ndim - 2))
    if isinstance(part, CellProjector) and sensor.kernel != like.kernel:
        picked = resize_kernel(picked, sensor.kernel)
    state[first] = picked
    part.load_state_dict(state)


def resize_kernel(weight: Float[Tensor, "d c k k"], size: int) -> Float[Tensor, "d c m m"]:
    """Resample a kernel so that an even surface gives what it gave before."""
    ratio = weight.shape[-1] / size
    resized = F.interpolate(weight.float(), size=(size, size), mode="bilinear", antialias=True) * ratio**2
    lost = weight.float().sum((2, 3), keepdim=True) - resized.sum((2, 3), keepdim=True)
    return (resized + lost / size**2).to(weight.dtype)
