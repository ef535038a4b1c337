"""How much work a map is, what such work took before, and how much of a budget it has used."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odc.geo.geobox import GeoBox

from panterra.energy import EnergyMeter, EnergyReport, measure_energy, record
from panterra.energy.impact import Figure, local_site
from panterra.energy.ledger import Entry, Note, Status, read_ledger, this_machine
from panterra.errors import InputError
from panterra.files import read_json, write_whole
from panterra.imagery.stac import pixel_metres
from panterra.mapping.parts import Parts
from panterra.mapping.sources import Encoding
from panterra.mapping.stored import Stored
from panterra.mapping.tiles import Tile

RECENT = 20
"""Earlier runs that are looked at, the newest."""
ONE_RUN = 2.0
"""With a single earlier run, the factor by which the next may well differ, either way."""
LEAST_SPREAD = 0.15
"""Two runs of the same job on the same machine rarely agree better than this."""


SMALL = 10
"""A run with fewer windows than the largest one by this factor says little: starting up weighs on it."""


class BudgetError(InputError):
    """A job would take more energy than it may, or has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What a window takes."""

    seconds: Figure
    kwh: Figure
    method: str
    """Whether the energy was measured or modelled; modelled where one of the runs was."""
    runs: int
    source: str
    core_seconds: float = 0.0
    peak_memory_gb: float | None = None
    """The most that any of the runs took."""


def settings_of(work: Encoding | Stored, on: str = "local") -> dict[str, Any]:
    """Return what the speed of a job depends on, besides the model and the device."""
    if isinstance(work, Stored):
        return {"stored": True, "dim": work.dim}
    return {
        "patch_m": work.patch_m,
        "window_px": [n * work.patch_px for n in work.lattice.window_shape],
        "batch_windows": work.batch_windows,
        "modalities": list(work.modalities),
        "images": num_images(work),
        **({} if on == "local" else {"on": on}),
    }


def num_images(work: Encoding) -> int:
    """Count the images that a window shows to the model: the dates of all modalities."""
    return sum(max(len(work.scene.dates(name)), 1) for name in work.modalities)


def device_of(work: Encoding | Stored) -> str:
    """Name what computes."""
    return str(work.device.type) if isinstance(work, Encoding) else "cpu"


def model_of(work: Encoding | Stored) -> str | None:
    """Name the model."""
    name = (work.about.get("model") or {}).get("name")
    return None if name is None else str(name)


def area_km2(grid: GeoBox, pixels: int) -> float:
    """Return the area of some pixels of a grid."""
    return pixels * pixel_metres(grid) ** 2 / 1e6


def known_speed(work: Encoding | Stored, entries: Sequence[Entry], on: str = "local") -> Speed | None:
    """Learn from earlier jobs what a window of this one takes; None where there was none like it.

    Alike are jobs on this machine and device, with the same model and settings, and as many workers. Where none of
    them had as many dates, others count in proportion to their dates.
    """
    wanted, device, model = settings_of(work, on), device_of(work), model_of(work)
    images = wanted.pop("images", 1)
    alike: list[tuple[Entry, float]] = []
    for entry in entries:
        settings = dict(entry.settings)
        had = settings.pop("images", 1)
        same = (entry.machine, entry.device, entry.model, settings) == (this_machine(), device, model, wanted)
        if same and entry.command in ("embed", "map", "detect") and entry.windows and entry.seconds > 0:
            alike.append((entry, images / had))
    exact = [(entry, scale) for entry, scale in alike if scale == 1]
    runs = (exact or alike)[-RECENT:]
    if not runs:
        return None
    largest = max(entry.windows or 0 for entry, _ in runs)
    runs = [(entry, scale) for entry, scale in runs if (entry.windows or 0) * SMALL > largest]
    scaled = "" if exact else ", in proportion to the dates"
    return Speed(
        seconds=spread([entry.seconds / (entry.windows or 1) * scale for entry, scale in runs]),
        kwh=joined([entry.kwh * (scale / (entry.windows or 1)) for entry, scale in runs]),
        method="modelled" if any(entry.method == "modelled" for entry, _ in runs) else "measured",
        runs=len(runs),
        source=f"{len(runs)} earlier {'run' if len(runs) == 1 else 'runs'} on this machine{scaled}",
        core_seconds=statistics.median(entry.core_seconds / (entry.windows or 1) * scale for entry, scale in runs),
        peak_memory_gb=max((e.peak_memory_gb for e, _ in runs if e.peak_memory_gb), default=None),
    )


def spread(values: Sequence[float]) -> Figure:
    """Return the median of positive values, and an interval in which the next may well lie.

    The interval is three robust standard deviations of the logarithms wide on either side (1.4826 times the median
    absolute deviation), at least `LEAST_SPREAD`; with a single value it is a factor of `ONE_RUN`.
    """
    middle = statistics.median(values)
    if len(values) == 1 or middle <= 0:
        factor = ONE_RUN
    else:
        away = [abs(math.log(max(value, 1e-300) / middle)) for value in values]
        factor = math.exp(max(3 * 1.4826 * statistics.median(away), math.log1p(LEAST_SPREAD)))
    return Figure(value=middle, low=middle / factor, high=middle * factor)


def joined(figures: Sequence[Figure]) -> Figure:
    """Return the median of quantities that have intervals of their own, and an interval that knows of both."""
    return Figure(
        value=statistics.median(figure.value for figure in figures),
        low=spread([figure.low for figure in figures]).low,
        high=spread([figure.high for figure in figures]).high,
    )


@dataclass(slots=True, kw_only=True)
class Account:
    """What a job uses in all its starts; kept beside its finished tiles, so that a killed job loses little."""

    command: str
    work: Encoding | Stored
    on: str
    parts: Parts
    meter: EnergyMeter
    num_tiles: int
    budget_kwh: float | None
    before: EnergyReport | None
    """Of earlier starts."""
    tiles: int = 0
    """Finished in this start, as are the windows and pixels."""
    windows: int = 0
    pixels: int = 0

    @property
    def energy(self) -> EnergyReport:
        """Of this start, when it has ended."""
        return self.meter.report

    @property
    def total(self) -> EnergyReport:
        """Of all starts, when this one has ended."""
        return self._with(self.meter.report)

    def finish(self, tile: Tile) -> None:
        """Book a tile, and stop the job where the budget is used up and tiles are left."""
        self.tiles += 1
        self.windows += self.work.cost(tile)
        self.pixels += tile.core.height * tile.core.width
        now = self.meter.so_far()
        used = self._with(now)
        # Whoever goes on with a job that is killed from here writes this start into the ledger.
        lost = {"energy": now.as_dict(), "windows": self.windows, "pixels": self.pixels, "on": self.on}
        self._keep(used, lost)
        left = self.num_tiles - len(self.parts) - self.tiles
        if left > 0 and self.budget_kwh is not None and used.kwh >= self.budget_kwh:
            raise BudgetError(
                f"stopped: {used.kwh:.3g} of {self.budget_kwh:g} kWh used ({used.method}), tiles left: {left}. "
                f"Finished ones are kept in {self.parts.folder}; repeat the job with a larger budget to go on"
            )

    def close(self, status: Status) -> None:
        """Write this start into the ledger, where it finished any tile."""
        if not self.tiles:
            return
        with contextlib.suppress(OSError):  # a full disk may be what stopped the job
            self._keep(self.total, None)
        _record(self.command, self.work, self.on, self.energy, status, windows=self.windows, pixels=self.pixels)

    def _with(self, report: EnergyReport) -> EnergyReport:
        return report if self.before is None else self.before + report

    def _keep(self, total: EnergyReport, unrecorded: Mapping[str, Any] | None) -> None:
        write_whole(_file(self.parts), json.dumps({"total": total.as_dict(), "unrecorded": unrecorded}), sync=True)


@contextlib.contextmanager
def accounted(
    command: str,
    work: Encoding | Stored,
    parts: Parts,
    *,
    on: str,
    country: str | None,
    budget_kwh: float | None,
    note: Note | None,
) -> Iterator[Account]:
    """Measure the block, hold it to a budget over all starts of the job, and write it into the ledger.

    Raises BudgetError beforehand where jobs like this one have taken more.
    """
    tiles = list(work.tiles())
    try:
        local_site()  # a mistake in the environment is told now, not when the job is done
        before = _earlier(command, work, parts)
        if budget_kwh is not None:
            windows, used = sum(work.cost(t) for t in tiles if not parts.has(t)), before.kwh if before else 0.0
            entries = read_ledger(note=note)
            # Who computes hardly matters for the electricity of a window.
            expect(windows, known_speed(work, entries, on) or known_speed(work, entries), budget_kwh, used=used)
    except InputError:
        if not len(parts):
            parts.remove()
        raise
    status: Status = "stopped"
    with contextlib.ExitStack() as later, measure_energy(country=country) as meter:
        account = Account(
            command=command,
            work=work,
            on=on,
            parts=parts,
            meter=meter,
            num_tiles=len(tiles),
            budget_kwh=budget_kwh,
            before=before,
        )
        later.callback(lambda: account.close(status))
        yield account
        status = "finished"


def _earlier(command: str, work: Encoding | Stored, parts: Parts) -> EnergyReport | None:
    """Return what earlier starts have used; one that was killed is written into the ledger now."""
    file = _file(parts)
    if not file.is_file():
        return None
    told = read_json(file, "remove it, and what earlier starts of the job have used is not counted")
    lost = told["unrecorded"]
    if lost is not None:
        _record(
            command,
            work,
            lost.get("on", "local"),
            EnergyReport.of(lost["energy"]),
            "stopped",
            windows=lost["windows"],
            pixels=lost["pixels"],
        )
        write_whole(file, json.dumps({**told, "unrecorded": None}), sync=True)
    return EnergyReport.of(told["total"])


def _record(
    command: str, work: Encoding | Stored, on: str, energy: EnergyReport, status: Status, *, windows: int, pixels: int
) -> None:
    record(
        command,
        energy,
        status=status,
        model=model_of(work),
        device=device_of(work),
        area_km2=area_km2(work.grid, pixels),
        pixels=pixels,
        windows=windows,
        settings=settings_of(work, on),
    )


def expect(windows: int, speed: Speed | None, budget_kwh: float, *, used: float) -> None:
    """Refuse work that, by what is known of such work, will take more than is left of a budget."""
    if not 0 < budget_kwh < math.inf:
        raise InputError(f"the budget is {budget_kwh:g} kWh; wanted more than 0")
    if speed is None:
        return
    needed = speed.kwh * windows
    if used + needed.value > budget_kwh:
        beside = f", of which {used:.3g} are used," if used else ""
        raise BudgetError(
            f"the budget of {budget_kwh:g} kWh{beside} does not suffice: {windows} windows take about "
            f"{needed.value:.3g} kWh ({needed.low:.3g} to {needed.high:.3g}, {speed.method}, by {speed.source}); give "
            "a larger budget, larger patches, or a smaller model or area"
        )


def _file(parts: Parts) -> Path:
    return parts.folder / "energy.json"
