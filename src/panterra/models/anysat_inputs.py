"""From a batch in declared units to what AnySat's projectors take."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.anysat_projectors import Input
from panterra.models.anysat_sensors import CELL_M, Sensor, day_of_year, read_channels, sensor_of, to_pixel_size
from panterra.models.anysat_statistics import Statistics
from panterra.sample import Batch, Observation

PREFERRED = ("sentinel2_l2a", "sentinel1", "landsat")


def preferred(sensors: Iterable[Sensor]) -> tuple[str, ...]:
    """List the rows of `MODALITIES` that sensors take, those without which AnySat is rarely used first."""
    rows = [m for sensor in sensors for m in sensor.modalities if m in MODALITIES]
    return tuple(sorted(rows, key=lambda m: PREFERRED.index(m) if m in PREFERRED else len(PREFERRED)))


def choose_sensors(batch: Batch, sensors: Mapping[str, Sensor], *, name: str) -> dict[str, Sensor]:
    """Find the sensor of each modality of a batch; `name` is what an InputError calls the model."""
    chosen: dict[str, Sensor] = {}
    for modality in batch.observations:
        sensor = sensor_of(modality, sensors)
        if sensor is None:
            known = ", ".join(preferred(sensors.values()))
            raise InputError(f"{name} does not know {modality}; give any of {known}, or add it: add_modality")
        twin = next((m for m, s in chosen.items() if s == sensor), None)
        if twin is not None:
            raise InputError(f"{twin} and {modality} are both read by the projector of {sensor.name}; give one")
        chosen[modality] = sensor
    return chosen


def whole_cells(patch_m: float) -> int:
    """Count the 10 m squares along a patch's side. Raises InputError."""
    scale = round(patch_m / CELL_M)
    if scale < 1 or abs(scale * CELL_M - patch_m) > 1e-6:
        raise InputError(f"patch_m is {patch_m:g}; AnySat takes multiples of 10 m")
    return scale


def fit_scale(chosen: Mapping[str, Sensor], patch_m: float) -> tuple[int, dict[str, Sensor]]:
    """Count the cells along a patch's side, and give the sensors with the cells that are meant. Raises InputError.

    A lone still image whose cells are not quite 10 m, as those of Planet, is cut along its own pixels where patches are
    multiples of these cells and not of 10 m: the published code takes each for a square of 10 m.
    """
    (modality, sensor), *others = chosen.items()
    own_m = sensor.kernel * MODALITIES[modality].gsd
    if not sensor.dated and not others and sensor.place_m == own_m != sensor.cell_m and patch_m % CELL_M:
        scale = round(patch_m / own_m)
        if scale and abs(scale * own_m - patch_m) < 1e-6:
            return scale, {modality: replace(sensor, cell_m=own_m)}
    return whole_cells(patch_m), dict(chosen)


def check_grid(batch: Batch, chosen: Mapping[str, Sensor]) -> None:
    """Refuse a grid of other than 10 m, unless it is that of another sensor's pixels and nothing else is on it."""
    wrong = [m for m, s in chosen.items() if not s.whole and abs(MODALITIES[m].gsd - batch.pixel_m) > 1e-6]
    if abs(batch.pixel_m - CELL_M) > 1e-6 and wrong:
        raise InputError(f"the batch has pixels of {batch.pixel_m:g} m; AnySat wants a grid of 10 m, resample it")


def check_extent(batch: Batch, chosen: Mapping[str, Sensor], patch_m: float) -> None:
    """Refuse modalities that cover different ground, and ground that is no whole number of patches."""
    extents = {
        m: tuple(n * MODALITIES[m].gsd for n in batch.observations[m].pixels.shape[-2:])
        for m, sensor in chosen.items()
        if not sensor.whole
    }
    if not extents:
        sensor = next(iter(chosen.values()))
        if abs(patch_m - sensor.cell_m) > 1e-6:
            raise InputError(f"{sensor.name} alone is one patch; ask for patch_m={sensor.cell_m:g} or add a sensor")
        return
    height, width = next(iter(extents.values()))
    if any(abs(h - height) + abs(w - width) > 1e-3 for h, w in extents.values()):
        named = ", ".join(f"{m} {h:g} x {w:g} m" for m, (h, w) in extents.items())
        raise InputError(f"modalities cover different ground ({named}); crop them to the same place")
    if any(abs(side / patch_m - round(side / patch_m)) > 1e-6 for side in (height, width)):
        raise InputError(
            f"a tile of {height:g} x {width:g} m is not a whole number of {patch_m:g} m patches; crop or pad it"
        )


def check_memory(batch: Batch, chosen: Mapping[str, Sensor], patch_m: float, device: torch.device) -> None:
    """Refuse more patches than all of a device's memory holds the distances of. Raises InputError."""
    extents = [(m, batch.observations[m].pixels) for m, sensor in chosen.items() if not sensor.whole]
    if not extents:
        return
    modality, pixels = extents[0]
    rows, cols = (round(n * MODALITIES[modality].gsd / patch_m) for n in pixels.shape[-2:])

    def needed(patches: int) -> int:
        # Distances between patches, from patches to all tokens, and for each sample how these are scored.
        tokens = patches * len(extents)
        return 8 * patches**2 + 8 * patches * tokens + 4 * len(pixels) * patches * tokens

    wanted, held = needed(rows * cols), memory_of(device)
    if wanted <= held:
        return
    larger = (k for k in range(2, min(rows, cols) + 1) if not rows % k and not cols % k)
    fits = next((f"patch_m={k * patch_m:g} or " for k in larger if needed(rows * cols // k**2) <= held), "")
    raise InputError(
        f"tiles of {rows} x {cols} patches of {patch_m:g} m came; the distances of so many take "
        f"{wanted / 1e9:,.0f} GB, and {device} has {held / 1e9:,.0f} GB of memory: take {fits}smaller tiles"
    )


def memory_of(device: torch.device) -> float:
    """Give the bytes of memory that a device has, used or not; infinity where that is not known."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return math.inf
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def on_own_pixels(batch: Batch, chosen: Mapping[str, Sensor]) -> Batch:
    """Take modalities coarser than 10 m back from the common grid, on which scenes are read, to pixels of their own.

    Of the grid's pixels inside one of theirs the middle one counts; a sensor that sees the tile as a whole gets the
    mean of what is valid. Raises InputError where the tile is not a whole number of their pixels.
    """
    fine = [m for m, s in chosen.items() if not s.whole and MODALITIES[m].gsd <= CELL_M]
    size = batch.observations[fine[0]].pixels.shape[-2:] if fine else None
    taken = dict(batch.observations)
    for modality, sensor in chosen.items():
        o, gsd = batch.observations[modality], MODALITIES[modality].gsd
        if sensor.whole:
            taken[modality] = tile_mean(o)
        elif size is not None and gsd > CELL_M:
            ground = [n * MODALITIES[fine[0]].gsd for n in size]
            here, step = o.pixels.shape[-2:], round(gsd / batch.pixel_m)
            if [n * batch.pixel_m for n in here] == ground:
                if any(n % step for n in here):
                    raise InputError(
                        f"a tile of {ground[0]:g} x {ground[1]:g} m is not a whole number of {modality}'s pixels of "
                        f"{gsd:g} m; choose patches and windows that are, or leave {modality} out"
                    )
                rows = cols = slice(step // 2, None, step)
                taken[modality] = replace(o, pixels=o.pixels[..., rows, cols], valid=o.valid[..., rows, cols])
    return replace(batch, observations=taken)


def tile_mean(o: Observation) -> Observation:
    """Average what is valid of each date into one pixel."""
    if o.pixels.shape[-2:] == (1, 1):
        return o
    seen = o.valid[:, :, None]
    total = torch.where(seen, o.pixels, 0.0).sum((-2, -1), keepdim=True)
    count = seen.sum((-2, -1), keepdim=True)
    return replace(o, pixels=total / count.clamp(min=1), valid=count[:, :, 0] > 0)


def read_input(
    o: Observation, modality: str, sensor: Sensor, statistics: Statistics | None, *, dtype: torch.dtype
) -> Input:
    """Bring an observation to what the projector of its sensor was trained on; None: it is standardised already."""
    if not sensor.dated and o.pixels.shape[1] != 1:
        raise InputError(f"{modality} came with {o.pixels.shape[1]} dates; it is a still image, give one")
    pixels, valid = (o.pixels, o.valid) if sensor.dated else to_pixel_size(o, sensor, MODALITIES[modality].gsd)
    values = read_channels(pixels, sensor, modality)
    if statistics is not None:
        values = statistics.standardise(values)
    return Input(
        values=torch.where(valid[:, :, None], values, 0.0).to(dtype),
        days=day_of_year(o.dates) if sensor.dated else None,
        valid=valid,
    )


def as_published(given: Input) -> Input:
    """Take what is not valid for data, as the published code does: dates without any are zeros on day 0."""
    if given.days is None or given.valid is None:
        return Input(values=given.values)
    frame = given.valid.flatten(2).any(2)
    present = (given.valid | ~frame[:, :, None, None])[:, :, None].expand_as(given.values)
    return Input(values=given.values, days=torch.where(frame, given.days, 0), present=present)
