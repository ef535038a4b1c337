"""The electricity of a stretch of work."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from panterra.energy.grid import Grid, local_grid

CORE_W = 12.0
"""Watts of one busy core: Green Algorithms' figure for a processor that is not known (Lannelongue et al. 2021,
doi:10.1002/advs.202100707, table TDP_cpu, row "Any")."""
CORE_W_RANGE = (6.1, 22.8)
"""The 5th and 95th percentile of the 79 processors in that table (version of 2024)."""
MEMORY_W_PER_GB = 0.3725
"""Watts of a gigabyte of memory (same source)."""
RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyReport:
    """Electricity of a stretch of work."""

    kwh: float
    seconds: float
    method: Literal["measured", "modelled"]
    """measured: counters of the whole machine, other jobs included; modelled: this process and the workers that told
    what they use, by constants. Where workers are on other machines, their part is modelled."""
    detail: str
    co2e_kg: float | None = None
    """Of this electricity alone; None where neither a country nor an intensity was given. See `impact_of` for more."""
    country: str | None = None
    grid: Grid | None = None
    kwh_range: tuple[float, float] | None = None
    """Where modelled: with cores that draw little and much, see `CORE_W_RANGE`."""
    core_seconds: float = 0.0
    """Processor time of this process, its finished children and the workers that told theirs."""
    gpus: int = 0
    """GPUs in use."""
    peak_memory_gb: float = 0.0
    """Of this process, since it started."""

    def __add__(self, later: EnergyReport) -> EnergyReport:
        """Join two stretches of one job; the electricity of all is that of the later one."""
        kwh, seconds = self.kwh + later.kwh, self.seconds + later.seconds
        ranges = [report.kwh_range or (report.kwh, report.kwh) for report in (self, later)]
        modelled = "modelled" in (self.method, later.method)
        return EnergyReport(
            kwh=kwh,
            seconds=seconds,
            method="modelled" if modelled else "measured",
            detail=f"{later.detail}; {self.kwh:.3g} kWh before that",
            co2e_kg=None if later.grid is None else kwh * later.grid.grams_per_kwh / 1000,
            country=later.country,
            grid=later.grid,
            kwh_range=(ranges[0][0] + ranges[1][0], ranges[0][1] + ranges[1][1]) if modelled else None,
            core_seconds=self.core_seconds + later.core_seconds,
            gpus=max(self.gpus, later.gpus),
            peak_memory_gb=max(self.peak_memory_gb, later.peak_memory_gb),
        )

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> EnergyReport:
        """Return the report that `as_dict` told of."""
        grid, bounds = told["grid"], told["kwh_range"]
        parts = {"grid": None if grid is None else Grid(**grid), "kwh_range": None if bounds is None else tuple(bounds)}
        return cls(**{**told, **parts})

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a worker, a process of its own, has used since it started."""

    machine: str
    process: int
    seconds: float
    core_seconds: float
    memory_gb: float

    @classmethod
    def since(cls, start: float) -> Usage:
        """Tell what this process has used, which works since a reading of `time.perf_counter`."""
        return cls(
            machine=platform.node(),
            process=os.getpid(),
            seconds=time.perf_counter() - start,
            core_seconds=sum(_cpu_seconds()),
            memory_gb=peak_memory_gb(),
        )


class EnergyMeter:
    """Measures from when it is made; holds the report once the measured block has ended."""

    def __init__(self, grid: Grid | None = None) -> None:
        self._grid = grid
        self._start, self._cpu, self._gpu = time.perf_counter(), _cpu_seconds(), _gpu_joules()
        self._counters = _Rapl()
        self._workers: dict[tuple[str, int], Usage] = {}
        self._report: EnergyReport | None = None

    @property
    def report(self) -> EnergyReport:
        assert self._report is not None, "the report is there when the measured block has ended"
        return self._report

    def tell(self, used: Usage) -> None:
        """Count what a worker has used; the last that it told stands for all before."""
        self._workers[used.machine, used.process] = used

    def so_far(self) -> EnergyReport:
        """Report on the block until now."""
        seconds, memory_gb = time.perf_counter() - self._start, peak_memory_gb()
        own, children = (now - before for now, before in zip(_cpu_seconds(), self._cpu, strict=True))
        workers, here = list(self._workers.values()), platform.node()
        away = [worker for worker in workers if worker.machine != here]
        elsewhere = sum(worker.core_seconds for worker in away)
        # Workers that were started from here are among the children once they have ended.
        busy = own + max(children, sum(worker.core_seconds for worker in workers) - elsewhere) + elsewhere
        counters = self._counters.joules()
        measured = counters is not None
        modelled = away if measured else workers
        cores = elsewhere if measured else busy
        held = sum(worker.memory_gb for worker in modelled) + (0 if measured else memory_gb)
        gb_seconds = sum(worker.memory_gb * worker.seconds for worker in modelled)
        memory = (gb_seconds + (0 if measured else memory_gb * seconds)) * MEMORY_W_PER_GB
        known = counters or 0.0
        joules, bounds = known + cores * CORE_W + memory, None
        detail = "RAPL counters of the whole machine" if measured else "this process"
        if modelled:
            detail += f" and {len(modelled)} {'worker' if len(modelled) == 1 else 'workers'}"
            detail += " on other machines" if measured else ""
        if modelled or not measured:
            bounds = [known + cores * watts + memory for watts in CORE_W_RANGE]
            detail += f": {cores:.1f} core-seconds at {CORE_W:g} W, {held:.2f} GB at {MEMORY_W_PER_GB} W/GB"
        gpu = 0.0
        gpus = _num_gpus()
        if gpus:
            after = _gpu_joules()
            if self._gpu is None or after is None:
                detail += "; the GPU is not counted: its energy counter cannot be read"
            else:
                gpu = after - self._gpu
                detail += f"; NVIDIA counters of all GPUs {gpu / 3.6e6:.6f} kWh"
        kwh, grid = (joules + gpu) / 3.6e6, self._grid
        if grid is not None:
            detail += f"; {grid.grams_per_kwh:g} g CO2e/kWh ({grid.source})"
        return EnergyReport(
            kwh=kwh,
            seconds=seconds,
            method="measured" if bounds is None else "modelled",
            detail=detail,
            co2e_kg=None if grid is None else kwh * grid.grams_per_kwh / 1000,
            country=None if grid is None else grid.country,
            grid=grid,
            kwh_range=None if bounds is None else ((bounds[0] + gpu) / 3.6e6, (bounds[1] + gpu) / 3.6e6),
            core_seconds=busy,
            gpus=gpus,
            peak_memory_gb=memory_gb,
        )

    def _stop(self) -> None:
        self._report = self.so_far()
        self._counters.stop()


@contextlib.contextmanager
def measure_energy(*, country: str | None = None, grams_per_kwh: float | None = None) -> Iterator[EnergyMeter]:
    """Measure the electricity of the block by the processor's counters where readable, otherwise model it.

    `country` (ISO 3166 alpha-3) or `grams_per_kwh` turn it into CO2 equivalents; the latter wins. Where neither is
    given, the environment's PANTERRA_COUNTRY and PANTERRA_GRAMS_PER_KWH count. Nothing is added for cooling or
    networks.
    """
    meter = EnergyMeter(local_grid(country, grams_per_kwh))
    try:
        yield meter
    finally:
        meter._stop()


class _Rapl:
    """Adds up the packages' and memories' counters, reading often enough that none wraps around unseen."""

    def __init__(self, folder: Path | None = None, period_s: float = 20.0) -> None:
        self._joules = 0.0
        self._folder, self._period_s = folder or RAPL, period_s
        self._last = _rapl_microjoules(self._folder)
        self._readable = bool(self._last)
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._readable:
            self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(self._period_s):
            self.joules()

    def joules(self) -> float | None:
        """Return the joules since the start; None where no counter can be read."""
        if not self._readable:
            return None
        with self._lock:
            now = _rapl_microjoules(self._folder)
            for zone, (value, largest) in now.items():
                if zone in self._last:
                    passed = value - self._last[zone][0]
                    self._joules += (passed if passed >= 0 else passed + largest) / 1e6
            self._last = self._last | now
            return self._joules

    def stop(self) -> None:
        """Read no more."""
        self._stopped.set()


def _rapl_microjoules(folder: Path) -> dict[str, tuple[int, int]]:
    """Read each package's and memory's counter and the value at which it wraps; `psys` would count twice."""
    readings = {}
    for zone in sorted(folder.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if name == "dram" or name.startswith("package"):
                value, largest = (int((zone / f).read_text()) for f in ("energy_uj", "max_energy_range_uj"))
                readings[zone.name] = (value, largest)
        except OSError:
            return {}
    return readings


def _gpu_joules() -> float | None:
    """Add up the energy counters of all NVIDIA GPUs."""
    if not Path("/dev/nvidiactl").exists():
        return None
    try:
        import pynvml  # type: ignore[import-untyped, unused-ignore]

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return float(sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles)) / 1000
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None


def _num_gpus() -> int:
    """Count the GPUs that the NVIDIA counters add up, where any is in use."""
    torch = sys.modules.get("torch")
    return int(torch.cuda.device_count()) if torch is not None and torch.cuda.is_initialized() else 0


def _cpu_seconds() -> tuple[float, float]:
    """Return the processor time of this process, all threads, and of its finished children."""
    user, system, children_user, children_system, _ = os.times()
    return user + system, children_user + children_system


def peak_memory_gb() -> float:
    """Return the most memory that this process has taken; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
