"""What electricity and machines stand for: greenhouse gases and water."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from panterra.energy.grid import Grid, local_grid, number_of
from panterra.energy.meter import EnergyReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A quantity, and between which it may well lie."""

    value: float
    low: float
    high: float

    def __mul__(self, other: Figure | float) -> Figure:
        """Multiply; the ends meet the ends, as if all were low or high together."""
        by = other if isinstance(other, Figure) else exactly(other)
        return Figure(value=self.value * by.value, low=self.low * by.low, high=self.high * by.high)

    def __add__(self, other: Figure) -> Figure:
        return Figure(value=self.value + other.value, low=self.low + other.low, high=self.high + other.high)


def exactly(value: float) -> Figure:
    """Take a number as it is."""
    return Figure(value=value, low=value, high=value)


NOTHING = exactly(0.0)

PUE = Figure(value=1.56, low=1.0, high=1.89)
"""Electricity of a data centre over that of its computers. Mean of Uptime Institute's Global Data Center Survey 2024;
low: a machine in a room without cooling; high: the survey's mean of 2011, for an old machine room."""
PUE_SOURCE = "mean of Uptime Institute's Global Data Center Survey 2024"

WATER_L_PER_KWH = Figure(value=0.37, low=0.0, high=1.8)
"""Litres that cooling takes per kWh of a data centre. 17 billion US gallons over 176 TWh in the United States in 2023
(Shehabi et al. 2024, 2024 United States Data Center Energy Usage Report, Lawrence Berkeley National Laboratory); low:
cooling without evaporation; high: the estimate of the report before (Shehabi et al. 2016, LBNL-1005775)."""
WATER_SOURCE = "United States 2023, Shehabi et al. 2024 (LBNL)"

SERVER_KG_PER_HOUR = Figure(value=0.056, low=0.029, high=0.122)
"""Making a server, per hour of its work. 2,500 kg over 6 years of which it works 85 % (Luccioni et al. 2023, JMLR
24:253); low: 1,000 kg over 4 years (Davy 2021, Building an AWS EC2 carbon emissions dataset); high: 4,288 kg over 4
years (Dell 2019, Life cycle assessment of Dell R740, with eight large SSDs)."""
GPU_KG_PER_HOUR = Figure(value=0.0034, low=0.0029, high=0.0047)
"""Making a GPU, per hour of its work. 150 kg over 6 years of which it works 85 % (Luccioni et al. 2023); low: 150 kg
over 6 years; high: 164 kg, an eighth of NVIDIA's HGX H100 baseboard (product carbon footprint, 2025), over 4 years."""
EMBODIED_SOURCE = "Luccioni et al. 2023 (JMLR 24:253)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The place where a job runs, as far as its impact depends on that."""

    grid: Grid | None
    pue: Figure
    pue_source: str
    water_l_per_kwh: Figure
    water_source: str
    machine_kg_per_hour: Figure
    machine_source: str


def local_site(grid: Grid | None = None) -> Site:
    """Describe this place by what the environment says, and by published means for what it does not say.

    PANTERRA_COUNTRY, PANTERRA_GRAMS_PER_KWH, PANTERRA_PUE, PANTERRA_WUE (litres per kWh of the data centre) and
    PANTERRA_MACHINE_KG_PER_HOUR. A PUE of 1 means that nothing is cooled, so that no water is used.
    """
    pue, water = number_of("PANTERRA_PUE", least=1.0), number_of("PANTERRA_WUE")
    machine = number_of("PANTERRA_MACHINE_KG_PER_HOUR")
    if water is None and pue == 1.0:
        water = 0.0
    return Site(
        grid=grid or local_grid(),
        pue=PUE if pue is None else exactly(pue),
        pue_source=PUE_SOURCE if pue is None else "given",
        water_l_per_kwh=WATER_L_PER_KWH if water is None else exactly(water),
        water_source=WATER_SOURCE if water is None else "given",
        machine_kg_per_hour=SERVER_KG_PER_HOUR if machine is None else exactly(machine),
        machine_source=EMBODIED_SOURCE if machine is None else "given",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Impact:
    """What a job stands for."""

    kwh: Figure
    """Of the computer."""
    method: str
    operation_co2e_kg: Figure | None
    """Of the electricity, that of the data centre around the computer included; None where the grid is not known."""
    embodied_co2e_kg: Figure
    """The job's share in making the computer."""
    water_l: Figure
    """For cooling; power plants' water is not counted."""
    site: Site

    @property
    def co2e_kg(self) -> Figure | None:
        """Operation and embodied share together."""
        return None if self.operation_co2e_kg is None else self.operation_co2e_kg + self.embodied_co2e_kg

    def as_dict(self, *, area_km2: float | None = None) -> dict[str, Any]:
        """Return plain JSON, with the same per km2 where an area is given."""
        amounts = {
            "kwh": self.kwh,
            "operation_co2e_kg": self.operation_co2e_kg,
            "embodied_co2e_kg": self.embodied_co2e_kg,
            "co2e_kg": self.co2e_kg,
            "water_l": self.water_l,
        }
        told: dict[str, Any] = {name: _plain(amount) for name, amount in amounts.items()}
        told |= {"method": self.method, "site": asdict(self.site)}
        if area_km2:
            each = {name: _plain(None if a is None else a * (1 / area_km2)) for name, a in amounts.items()}
            told |= {"area_km2": area_km2, "per_km2": each}
        return told


def _plain(figure: Figure | None) -> dict[str, float] | None:
    return None if figure is None else asdict(figure)


def impact_of(report: EnergyReport) -> Impact:
    """Say what measured or modelled work stands for, by the figures of `local_site`.

    A machine is shared by who keeps its cores busy: a job that keeps a quarter of them busy for an hour answers for a
    quarter of an hour of the machine. GPUs are answered for in full.
    """
    low, high = report.kwh_range or (report.kwh, report.kwh)
    return impact(
        Figure(value=report.kwh, low=low, high=high),
        method=report.method,
        machine_hours=report.core_seconds / (os.cpu_count() or 1) / 3600,
        gpu_hours=report.gpus * report.seconds / 3600,
        site=local_site(report.grid),
    )


def impact(kwh: Figure, *, method: str, machine_hours: float, gpu_hours: float, site: Site) -> Impact:
    """Turn electricity and hours of machines into their impact; `machine_hours` are those of whole machines."""
    assert all(math.isfinite(n) for n in (kwh.value, machine_hours, gpu_hours)), (kwh, machine_hours, gpu_hours)
    there = kwh * site.pue
    return Impact(
        kwh=kwh,
        method=method,
        operation_co2e_kg=None if site.grid is None else there * (site.grid.grams_per_kwh / 1000),
        embodied_co2e_kg=site.machine_kg_per_hour * machine_hours + GPU_KG_PER_HOUR * gpu_hours,
        water_l=there * site.water_l_per_kwh,
        site=site,
    )
