"""Mean and standard deviation of each sensor's channels, fitted once to the data a model is used on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from panterra.errors import InputError
from panterra.models.anysat_sensors import SENSORS, Sensor, read_channels, sensor_of
from panterra.plain import as_lists, as_tuples
from panterra.sample import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What standardises one sensor's channels."""

    channels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """1 for a channel that never varies."""
    count: int
    """Pixels seen, over all dates."""

    def standardise(self, pixels: Float[Tensor, "b t c y x"]) -> Float[Tensor, "b t c y x"]:
        """Bring channels to mean 0 and standard deviation 1."""
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std


class Moments:
    """Count, mean and sum of squared deviations of a stream of pixels, in float64."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, pixels: Float[Tensor, "b t c y x"], valid: Bool[Tensor, "b t y x"]) -> None:
        """Take in the valid pixels (Chan, Golub and LeVeque, 1983: stable and in one pass)."""
        values = pixels.movedim(2, -1)[valid].double().cpu()
        if not len(values):
            return
        mean = values.mean(0)
        count, delta = self.count + len(values), mean - self.mean
        self.squares += (values - mean).square().sum(0) + delta.square() * (self.count * len(values) / count)
        self.mean += delta * (len(values) / count)
        self.count = count

    def close(self, channels: tuple[str, ...]) -> Statistics:
        """Give the statistics of all that was added."""
        return _statistics(channels, self.mean, (self.squares / max(self.count, 1)).sqrt(), self.count)


class SampleMoments:
    """Means over samples of each one's own mean and unbiased standard deviation, in float64 (published readers)."""

    def __init__(self, channels: int) -> None:
        self.count = self.samples = self.spreads = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.std = torch.zeros(channels, dtype=torch.float64)

    def add(self, pixels: Float[Tensor, "b t c y x"], valid: Bool[Tensor, "b t y x"]) -> None:
        """Take in the samples' valid pixels; one pixel alone has no spread."""
        for sample, seen in zip(pixels.movedim(2, -1), valid, strict=True):
            values = sample[seen].double().cpu()
            self.count += len(values)
            if len(values):
                self.samples += 1
                self.mean += (values.mean(0) - self.mean) / self.samples
            if len(values) > 1:
                self.spreads += 1
                self.std += (values.std(0) - self.std) / self.spreads

    def close(self, channels: tuple[str, ...]) -> Statistics:
        """Give the statistics of all that was added."""
        return _statistics(channels, self.mean, self.std, self.count)


def _statistics(channels: tuple[str, ...], mean: Tensor, std: Tensor, count: int) -> Statistics:
    std = torch.where(std > 0, std, 1.0)
    return Statistics(channels=channels, mean=tuple(mean.tolist()), std=tuple(std.tolist()), count=count)


def fit_statistics(
    batches: Iterable[Batch], sensors: Mapping[str, Sensor] = SENSORS, *, by_sample: bool = False
) -> dict[str, Statistics]:
    """Fit the statistics of every sensor that occurs, in one pass over batches in declared units.

    `by_sample` averages what samples have by themselves, as published. The result does not depend on how the data is
    cut into batches, up to rounding. Invalid pixels do not count. Raises InputError for a modality that no sensor
    takes, for values that are not finite and where nothing is valid.
    """
    moments: dict[str, Moments | SampleMoments] = {}
    kind = SampleMoments if by_sample else Moments
    for batch in batches:
        for modality, o in batch.observations.items():
            sensor = sensor_of(modality, sensors)
            if sensor is None:
                raise InputError(f"AnySat has no sensor for {modality}; leave it out or add it with add_modality")
            pixels = read_channels(o.pixels, sensor, modality)
            moments.setdefault(sensor.name, kind(sensor.channels)).add(pixels, o.valid)
    fitted = {name: m.close(sensors[name].channel_names) for name, m in moments.items()}
    for name, found in fitted.items():
        if not found.count:
            raise InputError(f"no pixel of {name} is valid, so it has no statistics; give data or leave it out")
        if not all(map(torch.isfinite, torch.tensor([found.mean, found.std]).flatten())):
            raise InputError(f"valid pixels of {name} hold NaN or infinity; mark them as not valid")
    return fitted


def as_json(statistics: Statistics) -> dict[str, Any]:
    """Turn statistics into plain JSON."""
    plain: dict[str, Any] = as_lists(asdict(statistics))
    return plain


def statistics_from_json(saved: Mapping[str, Any]) -> Statistics:
    """Undo `as_json`. Raises TypeError for other fields."""
    return Statistics(**as_tuples(saved))
