import json
import os
import platform
import time

import pytest

from panterra.energy import CORE_W, GRID_G_PER_KWH, EnergyReport, measure_energy
from panterra.energy.grid import local_grid
from panterra.energy.meter import CORE_W_RANGE, MEMORY_W_PER_GB, Usage, _Rapl
from panterra.errors import InputError


def write_zone(folder, zone, name, microjoules, largest=1000_000):
    path = folder / zone
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(name)
    (path / "energy_uj").write_text(str(microjoules))
    (path / "max_energy_range_uj").write_text(str(largest))


def test_work_is_counted_and_turned_into_emissions():
    with measure_energy(country="FRA") as meter:
        stop = time.process_time() + 0.2
        while time.process_time() < stop:
            pass
    report = meter.report
    assert report.kwh > 0
    assert report.seconds > 0
    assert report.co2e_kg == pytest.approx(report.kwh * GRID_G_PER_KWH["FRA"][0] / 1000)
    if report.method == "modelled":
        tick = 1 / os.sysconf("SC_CLK_TCK")  # in which the system counts the time of a process and its children
        assert report.kwh * 3.6e6 >= (0.2 - 2 * tick) * CORE_W
    assert "FRA 2023" in report.detail
    assert report.as_dict()["country"] == "FRA"


def test_without_a_country_there_is_no_figure_for_emissions():
    with measure_energy() as meter:
        pass
    assert meter.report.co2e_kg is None


def test_the_callers_intensity_wins():
    with measure_energy(country="FRA", grams_per_kwh=1000) as meter:
        sum(range(1000))
    assert meter.report.co2e_kg == pytest.approx(meter.report.kwh)


def test_an_unknown_country_says_what_is_wanted():
    with (
        pytest.raises(InputError, match=r"country 'XXX'; wanted one of 2.. ISO 3166 codes such as FRA"),
        measure_energy(country="XXX"),
    ):
        pass


def test_a_report_is_there_after_a_failure_too():
    with pytest.raises(KeyError), measure_energy() as meter:
        raise KeyError
    assert meter.report.seconds >= 0


def test_counters_are_added_up_once_and_may_wrap(tmp_path):
    write_zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    write_zone(tmp_path, "intel-rapl:0:0", "core", 5)
    write_zone(tmp_path, "intel-rapl:0:1", "dram", 100_000)
    write_zone(tmp_path, "intel-rapl:1", "psys", 7)
    counters = _Rapl(tmp_path)
    write_zone(tmp_path, "intel-rapl:0", "package-0", 100_000)
    write_zone(tmp_path, "intel-rapl:0:0", "core", 500_000)
    write_zone(tmp_path, "intel-rapl:0:1", "dram", 150_000)
    write_zone(tmp_path, "intel-rapl:1", "psys", 800_000)
    assert counters.joules() == pytest.approx(0.2 + 0.05)
    write_zone(tmp_path, "intel-rapl:0", "package-0", 300_000)
    assert counters.joules() == pytest.approx(0.2 + 0.05 + 0.2)
    counters.stop()


def test_without_counters_nothing_is_measured(tmp_path):
    assert _Rapl(tmp_path).joules() is None


def test_modelled_energy_has_a_range():
    with measure_energy() as meter:
        early = meter.so_far()
        sum(range(10**6))
    report = meter.report
    assert early.kwh <= report.kwh
    assert early.seconds < report.seconds
    if report.method == "modelled":
        low, high = report.kwh_range
        assert low <= report.kwh <= high
        watts = [(end - low) * 3.6e6 / report.core_seconds for end in (report.kwh, high) if report.core_seconds]
        assert watts == pytest.approx([w - CORE_W_RANGE[0] for w in (CORE_W, CORE_W_RANGE[1])][: len(watts)])


def test_stretches_of_a_job_add_up_and_survive_json():
    first = EnergyReport(kwh=1.0, seconds=10, method="measured", detail="", gpus=1, peak_memory_gb=2)
    second = EnergyReport(
        kwh=2.0,
        seconds=5,
        method="modelled",
        detail="",
        kwh_range=(1.0, 4.0),
        core_seconds=3,
        grid=local_grid("FRA"),
        country="FRA",
        co2e_kg=2 * 0.056,
    )
    both = first + EnergyReport.of(json.loads(json.dumps(second.as_dict())))
    assert (both.kwh, both.seconds, both.method, both.kwh_range) == (3.0, 15, "modelled", (2.0, 5.0))
    assert (both.core_seconds, both.gpus, both.peak_memory_gb) == (3, 1, 2)
    assert both.co2e_kg == pytest.approx(3 * 0.056)
    assert EnergyReport.of(json.loads(json.dumps(both.as_dict()))) == both


def used(**changes):
    told = {"machine": platform.node(), "process": 7, "seconds": 60.0, "core_seconds": 100.0, "memory_gb": 0.0}
    return Usage(**{**told, **changes})


def test_workers_count_by_what_they_told_last(tmp_path, monkeypatch):
    monkeypatch.setattr("panterra.energy.meter.RAPL", tmp_path)
    with measure_energy() as meter, measure_energy() as alone:
        meter.tell(used(core_seconds=900.0))
        meter.tell(used())
        meter.tell(used(machine="elsewhere", core_seconds=50.0, memory_gb=2.0))
    more = meter.report.core_seconds - alone.report.core_seconds
    assert more == pytest.approx(150, abs=1)
    joules = (meter.report.kwh - alone.report.kwh) * 3.6e6
    assert joules == pytest.approx(150 * CORE_W + 60 * 2 * MEMORY_W_PER_GB, abs=20)
    assert "this process and 2 workers: " in meter.report.detail
    assert "worker" not in alone.report.detail


def test_counters_know_of_the_workers_here_and_of_none_elsewhere(tmp_path, monkeypatch):
    write_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    monkeypatch.setattr("panterra.energy.meter.RAPL", tmp_path)
    with measure_energy() as here, measure_energy() as both:
        here.tell(used())
        both.tell(used())
        both.tell(used(machine="elsewhere", core_seconds=50.0))
    assert (here.report.method, here.report.kwh, here.report.kwh_range) == ("measured", 0, None)
    assert both.report.method == "modelled"
    assert both.report.kwh * 3.6e6 == pytest.approx(50 * CORE_W)
    assert both.report.kwh_range[1] * 3.6e6 == pytest.approx(50 * CORE_W_RANGE[1])
    assert "whole machine and 1 worker on other machines: 50.0 core-seconds" in both.report.detail
