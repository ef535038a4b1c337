"""What every job has cost, job by job."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from panterra.energy.impact import Figure, impact_of, local_site
from panterra.energy.meter import EnergyReport, measure_energy

FILE = "ledger.jsonl"
LOCK_S = 30.0
"""How long to wait while other processes write."""

Status = Literal["finished", "stopped"]
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A line of the ledger: one job, or one start of a job that was stopped."""

    command: str
    status: str
    ended: str
    """RFC 3339, UTC."""
    machine: str
    """An anonymous name of the computer, see `this_machine`."""
    device: str
    seconds: float
    core_seconds: float
    gpu_seconds: float
    kwh: Figure
    """Of the computer."""
    method: str
    """Whether the energy was measured or modelled."""
    operation_co2e_kg: Figure | None
    """Of the electricity, that of the data centre around the computer included."""
    embodied_co2e_kg: Figure
    water_l: Figure
    site: Mapping[str, Any] = field(default_factory=dict)
    """PUE, grid, water and embodied figures with their sources, as `Site` has them."""
    model: str | None = None
    area_km2: float | None = None
    pixels: int | None = None
    windows: int | None = None
    tokens: int | None = None
    peak_memory_gb: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What speed depends on, such as patch and window sizes."""

    @property
    def co2e_kg(self) -> Figure | None:
        """Operation and embodied share together."""
        return None if self.operation_co2e_kg is None else self.operation_co2e_kg + self.embodied_co2e_kg

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON, speeds included."""
        told = asdict(self) | {"co2e_kg": None if self.co2e_kg is None else asdict(self.co2e_kg)}
        for what in ("windows", "tokens"):
            count = getattr(self, what)
            told[f"{what}_per_s"] = count / self.seconds if count is not None and self.seconds > 0 else None
        return told


def ledger_folder() -> Path | None:
    """Return where the ledger is: PANTERRA_LEDGER, by default in the user's data folder; None where it is `off`."""
    told = os.environ.get("PANTERRA_LEDGER", "").strip()
    if told.lower() == "off":
        return None
    if told:
        return Path(told).expanduser()
    if sys.platform == "win32":
        home = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
    elif sys.platform == "darwin":
        home = Path("~/Library/Application Support")
    else:
        home = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share")
    return (home / "panterra").expanduser()


def record(
    command: str,
    report: EnergyReport,
    *,
    status: Status = "finished",
    model: str | None = None,
    device: str = "cpu",
    area_km2: float | None = None,
    pixels: int | None = None,
    windows: int | None = None,
    tokens: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Entry | None:
    """Write a job into the ledger; None where it is off. A ledger that cannot be written is a warning, not an error.

    `settings` are those that speed depends on. `report` is that of `measure_energy`, by its country.
    """
    folder = ledger_folder()
    if folder is None:
        return None
    impact = impact_of(report)
    entry = Entry(
        command=command,
        status=status,
        ended=dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        machine=this_machine(),
        device=device,
        seconds=report.seconds,
        core_seconds=report.core_seconds,
        gpu_seconds=report.gpus * report.seconds,
        kwh=impact.kwh,
        method=impact.method,
        operation_co2e_kg=impact.operation_co2e_kg,
        embodied_co2e_kg=impact.embodied_co2e_kg,
        water_l=impact.water_l,
        site=asdict(impact.site),
        model=model,
        area_km2=area_km2,
        pixels=pixels,
        windows=windows,
        tokens=tokens,
        peak_memory_gb=report.peak_memory_gb,
        settings=dict(settings or {}),
    )
    try:
        append(folder, entry)
    except OSError as error:
        warnings.warn(
            f"the {command} job is not in the ledger, {folder / FILE}: {error}; set PANTERRA_LEDGER to a folder that "
            "can be written, or to off",
            stacklevel=2,
        )
        return None
    return entry


@contextlib.contextmanager
def recorded(command: str, *, country: str | None = None, **facts: Any) -> Iterator[dict[str, Any]]:
    """Measure the block and write it into the ledger, as stopped where it ends with an exception.

    `facts` are arguments of `record`; the block gets them as a dict and may add to them.
    """
    local_site()  # a mistake in the environment is told now, not when the block is done
    status: Status = "stopped"
    with contextlib.ExitStack() as later:
        with measure_energy(country=country) as meter:
            later.callback(lambda: record(command, meter.report, status=status, **facts))
            yield facts
        status = "finished"


def append(folder: Path, entry: Entry) -> None:
    """Add a line at the end of the ledger, whole, whoever else writes."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(entry.as_dict(), ensure_ascii=False, default=str).encode() + b"\n"
    with FileLock(folder / f"{FILE}.lock", timeout=LOCK_S), (folder / FILE).open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            # What a crash left of a line must not swallow this one.
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_ledger(folder: Path | None = None, *, note: Note | None = None) -> list[Entry]:
    """Read all jobs, oldest first; lines that cannot be read are left out, and `note` is told which."""
    folder = folder if folder is not None else ledger_folder()
    if folder is None or not (folder / FILE).is_file():
        return []
    entries, damaged = [], []
    with (folder / FILE).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entries.append(_entry_of(json.loads(line)))
            except (ValueError, TypeError, KeyError):
                damaged.append(str(number))
    if damaged and note:
        shown = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        note(f"{folder / FILE}: lines that cannot be read are left out: {shown}")
    return sorted(entries, key=lambda entry: entry.ended)


def _entry_of(told: Mapping[str, Any]) -> Entry:
    known = {name: told[name] for name in (f.name for f in fields(Entry)) if name in told}
    for name in ("kwh", "operation_co2e_kg", "embodied_co2e_kg", "water_l"):
        if known[name] is not None:
            known[name] = Figure(**{end: float(known[name][end]) for end in ("value", "low", "high")})
    dt.datetime.fromisoformat(known["ended"])
    return Entry(**known)


def this_machine() -> str:
    """Name this computer without giving its name away: a few letters of a hash."""
    parts = (platform.node(), platform.machine(), platform.processor(), os.cpu_count())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
