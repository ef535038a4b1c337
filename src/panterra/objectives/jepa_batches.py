"""Batches of a run over several data sets, masked and ready for the objective (AnySat)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Generator, Tensor
from torch.utils.data import Dataset

from panterra.data.labelled import LabelledSample
from panterra.errors import InputError
from panterra.models.anysat_inputs import read_input
from panterra.models.anysat_projectors import Grid, Input
from panterra.models.anysat_sensors import SENSORS, Sensor, sensor_of
from panterra.models.anysat_statistics import Statistics
from panterra.objectives.jepa import MaskedTiles, some_dates
from panterra.objectives.jepa_masks import BlockMasking, Dates, Masking, draw_dates, draw_scale, draw_tokens, leave_one
from panterra.sample import Batch

Sample = Mapping[str, Tensor] | Batch | LabelledSample
"""One tile: a batch of one in declared units, or standardised tensors by sensor.

Of these a series is [T, C, H, W] with its days of the year [T] under `<sensor>_dates`, and maybe a mask of its shape
under `<sensor>_mask`, not 0 where a value is data; a still image is [C, H, W].
"""


class Samples(Protocol):
    """What can be read by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """How a data set takes part in a run."""

    name: str
    sensors: tuple[str, ...]
    """In this order; what a sample has besides them is not read."""
    batch: int
    """Samples per rank and step."""
    cells: int
    """Side of its tiles in squares of 10 m."""
    scales: tuple[int, ...]
    """Sides that patches may have, in units of 10 m; one is drawn per step."""
    weight: float = 1.0
    """Of its steps among those of all data sets, while it lasts."""
    crop_px: Mapping[str, int] = field(default_factory=dict)
    """Side of the random crop that is taken of a sensor's images."""
    max_dates: int | None = None
    """Of a longer series that many random dates are read."""
    masked: bool = False
    """Whether the published code knows where its series have no data. It contrasts no patches without any then."""


class MixedBatches(Dataset[list[MaskedTiles]]):
    """One rank's micro-batches of each step, all of one data set; they depend on (seed, step, rank) alone.

    Data set, scale and block sizes are the same for all ranks, so that ranks run the same layers and wait little.
    An epoch shuffles each data set, ends when all are exhausted, or after `epoch_steps`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        samples: Mapping[str, Samples],
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        masking: Masking | None = None,
        micro_batch: int | None = None,
        epoch_steps: int | None = None,
        modality_dropout: float = 0.5,
        lone_sensors: float = 0.0,
        date_dropout: float = 0.5,
        statistics: Mapping[str, Mapping[str, Statistics]] | None = None,
        sensors: Mapping[str, Sensor] = SENSORS,
        published: bool = False,
    ) -> None:
        """Mix data sets, given the samples and, for those in declared units, the statistics of each source by name.

        A batch is cut into micro-batches of at most `micro_batch` samples, each masked by itself, with longer contexts
        the smaller they are. Masks are blocks unless told otherwise. Of the share `lone_sensors` of samples the student
        sees one sensor alone. `published` takes padded dates for data, zeros on day 0. Raises InputError.
        """
        lost = [source.name for source in sources if source.name not in samples]
        if lost or not sources:
            raise InputError(f"no samples of {lost or 'any data set'} came; give those of each data set in the recipe")
        for source in sources:
            if min(source.cells // scale for scale in source.scales) < 2:
                raise InputError(f"{source.name} has fewer than 2 x 2 patches at scale {max(source.scales)}; lower it")
        self.sources, self.samples = tuple(sources), samples
        self.seed, self.rank, self.world = seed, rank, world
        self.masking, self.micro_batch = masking or BlockMasking(), micro_batch
        self.modality_dropout, self.date_dropout = modality_dropout, date_dropout
        self.lone_sensors = lone_sensors
        self.statistics, self.sensors, self.published = statistics or {}, sensors, published
        self.counts = tuple(len(samples[source.name]) // (source.batch * world) for source in sources)
        """Steps that each data set lasts."""
        self.steps = sum(self.counts) if epoch_steps is None else min(epoch_steps, sum(self.counts))
        if not self.steps:
            raise InputError("no data set has samples enough for one batch; lower batch, or give more samples")

    def __len__(self) -> int:
        """Count the steps of an epoch; steps beyond it belong to later epochs."""
        return self.steps

    def source(self, step: int) -> Source:
        """Say of which data set a step's batch is."""
        return self.sources[self._turn(step)[1]]

    def _turn(self, step: int) -> tuple[int, int, int]:
        """Find the epoch of a step, the number of its data set, and how many batches of that came before."""
        epoch, position = divmod(step, self.steps)
        weights = tuple(source.weight for source in self.sources)
        chosen, turn = (int(x) for x in draw_turns(self.counts, weights, self.steps, self.seed, epoch)[position])
        return epoch, chosen, turn

    def __getitem__(self, step: int) -> list[MaskedTiles]:
        epoch, chosen, turn = self._turn(step)
        source, batch = self.sources[chosen], self.sources[chosen].batch
        order = shuffled(len(self.samples[source.name]), self.seed, epoch, chosen)
        mine = order[(turn * self.world + self.rank) * batch :][:batch]
        shared, own = seeded(self.seed, step), seeded(self.seed, step, self.rank)
        scale = draw_scale(source.scales, shared)
        size = self.micro_batch or batch
        return [self._tiles(source, mine[i : i + size], scale, shared, own) for i in range(0, batch, size)]

    def _tiles(
        self, source: Source, indices: Int[np.ndarray, " b"], scale: int, shared: Generator, own: Generator
    ) -> MaskedTiles:
        samples = [self._read(source, int(index), own) for index in indices]
        inputs = join(samples, source.sensors, published=self.published)
        extent = [name for name in inputs if not self.sensors[name].whole]
        side, batch = source.cells // scale, len(indices)
        masks = self.masking(side, batch, sizes=shared, places=own)
        dates = {
            name: draw_dates(dates_present(given), own, dropped=self.date_dropout)
            for name, given in inputs.items()
            if self.sensors[name].dated
        }
        positions = masks.context.shape[1]
        kept = draw_tokens(len(extent), positions, batch, own, dropped=self.modality_dropout)
        if self.lone_sensors:
            kept = leave_one(kept, len(extent), own, share=self.lone_sensors)
        return MaskedTiles(
            inputs=inputs,
            grid=Grid(rows=side, cols=side, scale=scale),
            masks=masks,
            kept=kept,
            dates=dates,
        )

    def _read(self, source: Source, index: int, generator: Generator) -> dict[str, Input]:
        sample = self.samples[source.name][index]
        if isinstance(sample, LabelledSample):
            sample = sample.batch
        if isinstance(sample, Batch):
            if source.name not in self.statistics:
                raise InputError(f"{source.name} is in declared units and has no statistics; fit them (fit_statistics)")
            inputs = standardise(sample, self.statistics[source.name], self.sensors)
            if self.published and source.masked:
                inputs = {name: with_mask(given) for name, given in inputs.items()}
        else:
            inputs = as_inputs(sample)
        chosen = {name: inputs[name] for name in source.sensors if name in inputs}
        for name, given in chosen.items():
            if name in source.crop_px:
                chosen[name] = crop(given, source.crop_px[name], generator)
            if source.max_dates and given.days is not None:
                chosen[name] = limit_dates(given, source.max_dates, generator)
        return chosen


def seeded(*numbers: int) -> Generator:
    """Make a generator that depends on some numbers."""
    return Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


@lru_cache(maxsize=8)
def draw_turns(
    counts: tuple[int, ...], weights: tuple[float, ...], steps: int, seed: int, epoch: int
) -> Int[np.ndarray, "n 2"]:
    """Draw for each step of an epoch a data set, by weight among those not exhausted, and count its batches."""
    shares = np.random.default_rng([seed, epoch]).random(steps)
    left, turns = np.array(counts), np.empty((steps, 2), np.int64)
    ends = np.cumsum(np.where(left > 0, weights, 0.0))
    for step, share in enumerate(shares):
        chosen = int(np.searchsorted(ends, share * ends[-1], side="right"))
        turns[step] = chosen, counts[chosen] - left[chosen]
        left[chosen] -= 1
        if not left[chosen]:
            ends = np.cumsum(np.where(left > 0, weights, 0.0))
    return turns


@lru_cache(maxsize=16)
def shuffled(count: int, seed: int, epoch: int, source: int) -> Int[np.ndarray, " n"]:
    """Draw the order of a data set's samples in an epoch."""
    return np.random.default_rng([seed, epoch, source]).permutation(count)


def as_inputs(sample: Mapping[str, Tensor]) -> dict[str, Input]:
    """Read standardised tensors of one sample."""
    inputs = {}
    for name, values in sample.items():
        if name.endswith(("_dates", "_mask")):
            continue
        days, mask = sample.get(f"{name}_dates"), sample.get(f"{name}_mask")
        present = None if mask is None else mask[None] != 0
        inputs[name] = Input(
            values=values[None] if values.ndim == 4 else values[None, None],
            days=None if days is None else days[None],
            valid=None if present is None else present.any(2),
            present=present,
        )
    return inputs


def standardise(
    batch: Batch, statistics: Mapping[str, Statistics], sensors: Mapping[str, Sensor] = SENSORS
) -> dict[str, Input]:
    """Bring observations in declared units to what the encoder takes; modalities that no sensor takes are left out."""
    inputs = {}
    for modality, o in batch.observations.items():
        sensor = sensor_of(modality, sensors)
        if sensor is None:
            continue
        if sensor.name not in statistics:
            raise InputError(f"there are no statistics of {sensor.name}; fit them to the data set (fit_statistics)")
        inputs[sensor.name] = read_input(o, modality, sensor, statistics[sensor.name], dtype=torch.float32)
    return inputs


def with_mask(given: Input) -> Input:
    """Say in the published way where a series has data."""
    if given.days is None or given.valid is None:
        return given
    return replace(given, present=given.valid[:, :, None].expand_as(given.values))


def crop(given: Input, side: int, generator: Generator) -> Input:
    """Cut a square out at random; an image that is no larger stays."""
    height, width = given.values.shape[-2:]
    row, col = (int(torch.randint(max(n - side, 0) + 1, (), generator=generator)) for n in (height, width))

    def cut(x: Tensor | None) -> Any:
        return None if x is None else x[..., row : row + side, col : col + side]

    return replace(given, values=cut(given.values), valid=cut(given.valid), present=cut(given.present))


def limit_dates(given: Input, most: int, generator: Generator) -> Input:
    """Take that many random dates of a longer series, in random order."""
    count = given.values.shape[1]
    if count <= most:
        return given
    return some_dates(given, Dates(index=torch.randperm(count, generator=generator)[None, :most]))


def dates_present(given: Input) -> Tensor:
    """Say which dates of each sample have data [B, T]."""
    if given.valid is None:
        return torch.ones(given.values.shape[:2], dtype=torch.bool)
    return given.valid.flatten(2).any(2)


def join(samples: Sequence[Mapping[str, Input]], names: Sequence[str], *, published: bool = False) -> dict[str, Input]:
    """Line up samples along B, each sensor's shorter series padded; a sample that lacks a sensor gets no data of it.

    A sensor that no sample has is left out. `published` takes what was padded for data, zeros on day 0.
    """
    joined = {}
    for name in names:
        found = [sample[name] for sample in samples if name in sample]
        if found:
            joined[name] = _join(name, [sample.get(name) for sample in samples], found, published)
    if not joined:
        raise InputError(f"samples have none of the sensors {', '.join(names)}; check the names of what they hold")
    return joined


def _join(name: str, samples: Sequence[Input | None], found: Sequence[Input], published: bool) -> Input:
    sizes = {tuple(given.values.shape[2:]) for given in found}
    if len(sizes) > 1:
        raise InputError(f"{name} comes in several sizes ({sorted(sizes)}); crop its tiles to one, or set crop_px")
    shape = (len(samples), max(given.values.shape[1] for given in found), *sizes.pop())
    values, valid = found[0].values.new_zeros(shape), torch.zeros(*shape[:2], *shape[3:], dtype=torch.bool)
    days = None if found[0].days is None else torch.zeros(shape[:2], dtype=found[0].days.dtype)
    present = None if all(given.present is None for given in found) else torch.zeros(shape, dtype=torch.bool)
    for i, given in enumerate(samples):
        if given is None:
            continue
        here = (i, slice(given.values.shape[1]))
        values[here] = given.values[0]
        valid[here] = True if given.valid is None else given.valid[0]
        if days is not None and given.days is not None:
            days[here] = given.days[0]
        if present is not None:
            present[here] = True if given.present is None else given.present[0]
    return Input(values=values, days=days, valid=None if published or bool(valid.all()) else valid, present=present)
