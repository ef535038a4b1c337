"""What a job cost in electricity."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from panterra.errors import InputError

CORE_W = 12.0
"""Watts of one busy core: Green Algorithms' figure for a processor that is not known (Lannelongue et al. 2021,
doi:10.1002/advs.202100707, table TDP_cpu, row "Any")."""
MEMORY_W_PER_GB = 0.3725
"""Watts of a gigabyte of memory (same source)."""
RAPL = Path("/sys/class/powercap")

GRID_G_PER_KWH = {
    "ARG": (354, 2023), "AUS": (549, 2023), "AUT": (111, 2023), "BEL": (138, 2023), "BGD": (691, 2023),
    "BRA": (98, 2023), "CAN": (170, 2023), "CHE": (35, 2023), "CHL": (291, 2023), "CHN": (582, 2023),
    "COL": (260, 2023), "CZE": (450, 2023), "DEU": (381, 2023), "DNK": (152, 2023), "EGY": (570, 2023),
    "ESP": (174, 2023), "ETH": (25, 2022), "FIN": (79, 2023), "FRA": (56, 2023), "GBR": (238, 2023),
    "GHA": (484, 2022), "GRC": (337, 2023), "HUN": (204, 2023), "IDN": (676, 2022), "IND": (713, 2023),
    "IRL": (291, 2023), "ITA": (331, 2023), "JPN": (485, 2023), "KEN": (70, 2023), "KOR": (431, 2023),
    "MEX": (507, 2023), "MYS": (606, 2022), "NGA": (523, 2023), "NLD": (268, 2023), "NOR": (30, 2023),
    "NZL": (113, 2023), "PER": (266, 2023), "PHL": (611, 2023), "POL": (662, 2023), "PRT": (166, 2023),
    "ROU": (241, 2023), "RWA": (316, 2022), "SEN": (512, 2022), "SGP": (471, 2023), "SWE": (41, 2023),
    "THA": (550, 2023), "TUR": (465, 2023), "TZA": (339, 2022), "UGA": (45, 2022), "UKR": (260, 2022),
    "USA": (369, 2023), "VNM": (475, 2023), "ZAF": (708, 2023), "ZMB": (112, 2022),
}  # fmt: skip
"""Grams of CO2 equivalent per kWh of a country's mean electricity (ISO 3166 alpha-3), and the year: Our World in Data
after Ember and the Energy Institute (CC BY 4.0), as collected by codecarbon 3.3.2 in `global_energy_mix.json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyReport:
    """Electricity of a stretch of work."""

    kwh: float
    seconds: float
    method: Literal["measured", "modelled"]
    """measured: counters of the whole machine, other jobs included; modelled: this process alone, by constants."""
    detail: str
    co2e_kg: float | None = None
    """None where neither a country nor an intensity was given."""
    country: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)


class EnergyMeter:
    """Holds the report once the measured block has ended."""

    def __init__(self) -> None:
        self._report: EnergyReport | None = None

    @property
    def report(self) -> EnergyReport:
        assert self._report is not None, "the report is there when the measured block has ended"
        return self._report


@contextlib.contextmanager
def measure_energy(*, country: str | None = None, grams_per_kwh: float | None = None) -> Iterator[EnergyMeter]:
    """Measure the electricity of the block by the processor's counters where readable, otherwise model it.

    `country` (ISO 3166 alpha-3) or `grams_per_kwh` turn it into CO2 equivalents; the latter wins. Nothing is counted
    for cooling or networks.
    """
    source = ""
    if grams_per_kwh is None and country is not None:
        if country not in GRID_G_PER_KWH:
            known = ", ".join(GRID_G_PER_KWH)
            raise InputError(f"no grid intensity known for country {country!r} (known: {known}); give grams_per_kwh")
        grams_per_kwh, year = GRID_G_PER_KWH[country]
        source = f"; {grams_per_kwh} g CO2e/kWh ({country} {year}, Our World in Data)"
    meter, start, cpu, gpu = EnergyMeter(), time.perf_counter(), _cpu_seconds(), _gpu_joules()
    counters = _Rapl()
    try:
        yield meter
    finally:
        seconds = time.perf_counter() - start
        joules, method, detail = counters.stop(), "measured", "RAPL counters of the whole machine"
        if joules is None:
            busy, memory_gb = _cpu_seconds() - cpu, _peak_memory_gb()
            joules, method = busy * CORE_W + seconds * memory_gb * MEMORY_W_PER_GB, "modelled"
            detail = f"{busy:.1f} core-seconds at {CORE_W:g} W, {memory_gb:.2f} GB at {MEMORY_W_PER_GB} W/GB"
        if _uses_gpu():
            after = _gpu_joules()
            if gpu is None or after is None:
                detail += "; the GPU is not counted: its energy counter cannot be read"
            else:
                joules += after - gpu
                detail += f"; NVIDIA counters of all GPUs {(after - gpu) / 3.6e6:.6f} kWh"
        kwh = joules / 3.6e6
        meter._report = EnergyReport(
            kwh=kwh,
            seconds=seconds,
            method="measured" if method == "measured" else "modelled",
            detail=detail + source,
            co2e_kg=None if grams_per_kwh is None else kwh * grams_per_kwh / 1000,
            country=country,
        )


class _Rapl:
    """Adds up the packages' and memories' counters, reading often enough that none wraps around unseen."""

    def __init__(self, folder: Path | None = None, period_s: float = 20.0) -> None:
        self._joules = 0.0
        self._last = _rapl_microjoules(folder or RAPL)
        self._folder, self._period_s = folder or RAPL, period_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._last:
            self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(self._period_s):
            self._update()

    def _update(self) -> None:
        now = _rapl_microjoules(self._folder)
        for zone, (value, largest) in now.items():
            if zone in self._last:
                passed = value - self._last[zone][0]
                self._joules += (passed if passed >= 0 else passed + largest) / 1e6
        self._last = now

    def stop(self) -> float | None:
        """Return the joules since the start; None where no counter can be read."""
        if not self._thread.is_alive():
            return None
        self._stopped.set()
        self._thread.join()
        self._update()
        return self._joules


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


def _uses_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def _cpu_seconds() -> float:
    """Return the processor time of this process, all threads, and of its finished children."""
    return sum(os.times()[:4])


def _peak_memory_gb() -> float:
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
