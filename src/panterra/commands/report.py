"""What all jobs have taken together."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from panterra.commands.terminal import show_table
from panterra.energy.impact import NOTHING, Figure
from panterra.energy.ledger import Entry, Note, ledger_folder, read_ledger
from panterra.errors import InputError
from panterra.mapping.report import write_document

GROUPS: dict[str, Callable[[Entry], str]] = {
    "command": lambda entry: entry.command,
    "model": lambda entry: entry.model or "none",
    "month": lambda entry: entry.ended[:7],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What some jobs have taken."""

    jobs: int
    stopped: int
    hours: float
    measured_kwh: float
    modelled_kwh: Figure
    operation_co2e_kg: Figure
    """Of the jobs whose grid is known."""
    without_grid_kwh: float
    """Of the jobs whose grid is not known, so that their electricity counts for no CO2 equivalents."""
    embodied_co2e_kg: Figure
    water_l: Figure
    area_km2: float
    """Of the jobs that have an area."""
    kwh_per_km2: float | None
    co2e_kg_per_km2: float | None

    @property
    def kwh(self) -> float:
        return self.measured_kwh + self.modelled_kwh.value

    @property
    def co2e_kg(self) -> Figure:
        return self.operation_co2e_kg + self.embodied_co2e_kg


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The ledger, added up."""

    ledger: Path | None
    since: str | None
    total: Sums
    by: dict[str, dict[str, Sums]]
    """For each of `GROUPS`."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "ledger": None if self.ledger is None else str(self.ledger),
            "since": self.since,
            "total": _plain(self.total),
            **{f"by_{name}": {key: _plain(sums) for key, sums in group.items()} for name, group in self.by.items()},
        }


def _plain(sums: Sums) -> dict[str, Any]:
    return asdict(sums) | {"kwh": sums.kwh, "co2e_kg": asdict(sums.co2e_kg)}


def summarise(*, since: str | None = None, note: Note | None = None) -> Summary:
    """Add up the jobs of the ledger that ended on a day or in a month, or later."""
    folder, first = ledger_folder(), _first_day(since)
    entries = [entry for entry in read_ledger(folder, note=note) if entry.ended[:10] >= first]
    if folder is None and note:
        note("PANTERRA_LEDGER is off: no job is written down")
    by = {
        name: {key: _add_up(e for e in entries if of(e) == key) for key in sorted({of(entry) for entry in entries})}
        for name, of in GROUPS.items()
    }
    return Summary(ledger=folder, since=since, total=_add_up(entries), by=by)


def _first_day(since: str | None) -> str:
    if since is None:
        return ""
    for text in (since, f"{since}-01"):
        try:
            return dt.date.fromisoformat(text).isoformat()
        except ValueError:
            continue
    raise InputError(f"since is {since!r}; wanted a month or a day, such as 2026-01 or 2026-01-15")


def _add_up(entries: Iterable[Entry]) -> Sums:
    entries = list(entries)
    mapped = [entry for entry in entries if entry.area_km2]
    area = sum(entry.area_km2 or 0.0 for entry in mapped)
    gases = [entry.co2e_kg for entry in mapped]
    return Sums(
        jobs=len(entries),
        stopped=sum(entry.status == "stopped" for entry in entries),
        hours=sum(entry.seconds for entry in entries) / 3600,
        measured_kwh=sum(entry.kwh.value for entry in entries if entry.method == "measured"),
        modelled_kwh=_sum(entry.kwh for entry in entries if entry.method != "measured"),
        operation_co2e_kg=_sum(entry.operation_co2e_kg for entry in entries),
        without_grid_kwh=sum(entry.kwh.value for entry in entries if entry.operation_co2e_kg is None),
        embodied_co2e_kg=_sum(entry.embodied_co2e_kg for entry in entries),
        water_l=_sum(entry.water_l for entry in entries),
        area_km2=area,
        kwh_per_km2=sum(entry.kwh.value for entry in mapped) / area if area else None,
        co2e_kg_per_km2=None if not area or None in gases else _sum(gases).value / area,
    )


def _sum(figures: Iterable[Figure | None]) -> Figure:
    total = NOTHING
    for figure in figures:
        total = total if figure is None else total + figure
    return total


# What a person reads --------------------------------------------------------------------------------------------------

STYLE = """
table { font-size: .84rem; }
th, td { padding: 6px 9px; }
th[scope="row"] { white-space: normal; overflow-wrap: anywhere; min-width: 9em; max-width: 20em; }
.scroll { margin-bottom: 16px; }
"""
"""Of the page: its tables have many columns, and folders of models have long names."""

SMALL = 0.1
"""kWh, kg or litres in all, below which thousandths are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """In what the sums are shown."""

    energy: str
    gas: str
    water: str

    @classmethod
    def of(cls, total: Sums) -> Units:
        """Choose them by the size of the sums of all jobs."""
        return cls(
            energy="kWh" if total.kwh >= SMALL else "Wh",
            gas="kg" if total.co2e_kg.value >= SMALL else "g",
            water="l" if total.water_l.value >= SMALL else "ml",
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the columns of a table."""
        energy = f"{self.energy} measured", f"{self.energy} modelled"
        return ("jobs", "hours", *energy, f"{self.gas} CO2e", f"{self.water} water", "km2", "Wh/km2", "g CO2e/km2")


def _in(unit: str, amount: float) -> float:
    return amount if unit in ("kWh", "kg", "l") else 1000 * amount


def show_report(summary: Summary) -> None:
    """Print the sums."""
    if not summary.total.jobs:
        since = f" since {summary.since}" if summary.since else ""
        print(f"no jobs{since} in {summary.ledger or 'a ledger: PANTERRA_LEDGER is off'}")
        return
    units = Units.of(summary.total)
    for name, group in summary.by.items():
        rows = [*group.items(), ("all", summary.total)]
        show_table([name, *units.columns], [(key, *map(" ".join, _cells(sums, units))) for key, sums in rows])
        print()
    print("\n".join(_remarks(summary)))


def _cells(sums: Sums, units: Units) -> tuple[tuple[str, ...], ...]:
    """Give what each column shows: a figure, and in some what it may lie between."""
    return (
        (f"{sums.jobs}", *((f"({sums.stopped} stopped)",) if sums.stopped else ())),
        (f"{sums.hours:.3g}",),
        (f"{_in(units.energy, sums.measured_kwh):.3g}",),
        _figure(sums.modelled_kwh, units.energy),
        _figure(sums.co2e_kg, units.gas),
        _figure(sums.water_l, units.water),
        (f"{sums.area_km2:.4g}",),
        ("" if sums.kwh_per_km2 is None else f"{sums.kwh_per_km2 * 1000:.3g}",),
        ("" if sums.co2e_kg_per_km2 is None else f"{sums.co2e_kg_per_km2 * 1000:.3g}",),
    )


def _figure(figure: Figure, unit: str) -> tuple[str, ...]:
    if not figure.high:
        return ("0",)
    value, low, high = (_in(unit, amount) for amount in (figure.value, figure.low, figure.high))
    return f"{value:.3g}", f"({low:.3g} to {high:.3g})"


def _remarks(summary: Summary) -> list[str]:
    remarks = [
        "CO2e is that of the electricity, with the data centre around the machine, and of the job's share in making "
        "the machine. Water is that of cooling.",
        f"From {summary.ledger}",
    ]
    if summary.total.without_grid_kwh:
        remarks.insert(
            1,
            f"{summary.total.without_grid_kwh:.3g} kWh were used where the country is not known: their CO2e counts the "
            "machine alone; set PANTERRA_COUNTRY.",
        )
    return remarks


def write_page(path: Path, summary: Summary) -> Path:
    """Write the sums as one HTML file without a script or a request to anywhere."""
    total, units = summary.total, Units.of(summary.total)
    cards = {
        "Electricity": f"{_in(units.energy, total.kwh):.3g} {units.energy}",
        "CO2 equivalents": f"{_in(units.gas, total.co2e_kg.value):.3g} {units.gas}",
        "Water": f"{_in(units.water, total.water_l.value):.3g} {units.water}",
        "Mapped": f"{total.area_km2:.4g} km2",
    }
    title = "What the jobs have taken"
    lead = f"{total.jobs} jobs" + (f" since {summary.since}" if summary.since else "") + f", as of {dt.date.today()}"
    body = [
        f'<header>\n<h1>{title}</h1>\n<p class="quiet">{escape(lead)}</p>\n</header>',
        '<dl class="cards">\n'
        + "\n".join(f'<div class="card"><dt>{name}</dt><dd>{amount}</dd></div>' for name, amount in cards.items())
        + "\n</dl>",
        *(_section(name, [*group.items(), ("all", total)], units) for name, group in summary.by.items()),
        *(f"<p>{escape(text)}</p>" for text in _remarks(summary)),
    ]
    return write_document(path, title, body, style=STYLE)


def _section(name: str, rows: Sequence[tuple[str, Sums]], units: Units) -> str:
    columns = (column.capitalize() if column.isalpha() else column for column in (name, *units.columns))
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = "\n".join(
        f'<tr><th scope="row">{escape(key)}</th>'
        + "".join(
            f"<td>{escape(figure)}" + "".join(f"<br><small>{escape(range)}</small>" for range in ranges) + "</td>"
            for figure, *ranges in _cells(sums, units)
        )
        + "</tr>"
        for key, sums in rows
    )
    return (
        f'<h2>By {escape(name)}</h2>\n<div class="scroll" tabindex="0">\n<table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody>\n</table>\n</div>"
    )
