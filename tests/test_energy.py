import os
import time

import pytest

from panterra.energy import CORE_W, GRID_G_PER_KWH, _Rapl, measure_energy
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


def test_an_unknown_country_says_which_are_known():
    with (
        pytest.raises(InputError, match=r"country 'XXX' \(known: ARG, .*give grams_per_kwh"),
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
    assert counters.stop() == pytest.approx(0.2 + 0.05)


def test_without_counters_nothing_is_measured(tmp_path):
    assert _Rapl(tmp_path).stop() is None
