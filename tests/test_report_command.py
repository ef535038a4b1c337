import json
import re
from dataclasses import replace

import pytest

from panterra.cli.report import report
from panterra.commands.report import summarise
from panterra.energy import EnergyReport, record
from panterra.energy.grid import local_grid
from panterra.energy.ledger import append
from panterra.errors import InputError


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """Three jobs: measured in France, modelled in Poland, modelled nobody knows where."""
    monkeypatch.setenv("PANTERRA_LEDGER", str(tmp_path))
    monkeypatch.setenv("PANTERRA_PUE", "1.5")
    monkeypatch.setenv("PANTERRA_WUE", "2")
    monkeypatch.setenv("PANTERRA_MACHINE_KG_PER_HOUR", "0")
    measured = EnergyReport(kwh=4.0, seconds=3600, method="measured", detail="", grid=local_grid("FRA"))
    modelled = EnergyReport(
        kwh=2.0, seconds=1800, method="modelled", detail="", kwh_range=(1.0, 3.0), grid=local_grid("POL")
    )
    entries = [
        (record("map", measured, model="a", area_km2=10.0), "2025-12-31T23:00:00Z"),
        (record("embed", modelled, model="a", area_km2=5.0), "2026-01-02T00:00:00Z"),
        (record("fetch", replace(modelled, grid=None), status="stopped"), "2026-02-01T00:00:00Z"),
    ]
    (tmp_path / "ledger.jsonl").unlink()
    for entry, ended in entries:
        append(tmp_path, replace(entry, ended=ended))
    return tmp_path


def test_sums_are_those_of_the_jobs(ledger):
    total = summarise().total
    assert (total.jobs, total.stopped, total.hours) == (3, 1, 2.0)
    assert (total.measured_kwh, total.kwh) == (4.0, 8.0)
    assert (total.modelled_kwh.value, total.modelled_kwh.low, total.modelled_kwh.high) == (4.0, 2.0, 6.0)
    assert total.operation_co2e_kg.value == pytest.approx(4 * 1.5 * 0.056 + 2 * 1.5 * 0.662)
    assert total.operation_co2e_kg.low == pytest.approx(4 * 1.5 * 0.056 + 1 * 1.5 * 0.662)
    assert total.without_grid_kwh == 2.0
    assert total.water_l.value == pytest.approx(8 * 1.5 * 2)
    assert total.area_km2 == 15
    assert total.kwh_per_km2 == pytest.approx(6 / 15)
    assert total.co2e_kg_per_km2 == pytest.approx((4 * 1.5 * 0.056 + 2 * 1.5 * 0.662) / 15)


def test_groups_share_the_whole_out(ledger):
    summary = summarise()
    assert {name: sorted(group) for name, group in summary.by.items()} == {
        "command": ["embed", "fetch", "map"],
        "model": ["a", "none"],
        "month": ["2025-12", "2026-01", "2026-02"],
    }
    for group in summary.by.values():
        assert sum(sums.kwh for sums in group.values()) == pytest.approx(summary.total.kwh)
        assert sum(sums.co2e_kg.high for sums in group.values()) == pytest.approx(summary.total.co2e_kg.high)


@pytest.mark.parametrize(
    ("since", "jobs"), [(None, 3), ("2025-12", 3), ("2026-01", 2), ("2026-01-03", 1), ("2026-03", 0)]
)
def test_since_a_month_or_a_day(ledger, since, jobs):
    assert summarise(since=since).total.jobs == jobs


@pytest.mark.parametrize("since", ["January", "2026-13", "26"])
def test_since_something_else_is_refused(ledger, since):
    with pytest.raises(InputError, match="wanted a month or a day, such as 2026-01"):
        summarise(since=since)


def test_the_page_holds_everything_and_loads_nothing(ledger, tmp_path, capsys):
    report(html=tmp_path / "report.html", as_json=True)
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(?:src|href)=|<script|https?://|@import", page)
    assert page.count("<h2>") == 3
    assert "8 kWh" in page
    told = json.loads(capsys.readouterr().out)
    assert told["total"]["kwh"] == 8.0
    assert told["by_month"]["2026-01"]["jobs"] == 1
    assert told["html"] == str(tmp_path / "report.html")


def test_names_are_escaped_on_the_page(ledger, tmp_path):
    entry = record("map", EnergyReport(kwh=1, seconds=1, method="measured", detail=""), model="<b>&")
    assert entry is not None
    report(html=tmp_path / "report.html")
    assert "&lt;b&gt;&amp;" in (tmp_path / "report.html").read_text()


def test_the_table_marks_what_was_measured_and_modelled(ledger, capsys):
    report()
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"kWh measured +kWh modelled", lines[0])
    (embed,) = (line for line in lines if line.startswith("embed"))
    assert re.search(r" 0 +2 \(1 to 3\)", embed)
    assert any("2 kWh were used where the country is not known" in line for line in lines)


def test_an_empty_ledger_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PANTERRA_LEDGER", str(tmp_path))
    report(since="2026-01")
    assert capsys.readouterr().out == f"no jobs since 2026-01 in {tmp_path}\n"


def test_a_ledger_that_is_off_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PANTERRA_LEDGER", "off")
    report()
    told = capsys.readouterr()
    assert told.out == "no jobs in a ledger: PANTERRA_LEDGER is off\n"
    assert "PANTERRA_LEDGER is off" in told.err
