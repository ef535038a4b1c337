"""What a job costs in electricity, and what that stands for."""

from panterra.energy.grid import GRID_G_PER_KWH
from panterra.energy.ledger import record, recorded
from panterra.energy.meter import CORE_W, EnergyMeter, EnergyReport, measure_energy

__all__ = ["CORE_W", "GRID_G_PER_KWH", "EnergyMeter", "EnergyReport", "measure_energy", "record", "recorded"]
