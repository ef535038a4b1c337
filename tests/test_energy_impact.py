import json

import pytest

from panterra.energy.grid import GRID_G_PER_KWH, Grid, local_grid
from panterra.energy.impact import (
    GPU_KG_PER_HOUR,
    PUE,
    SERVER_KG_PER_HOUR,
    WATER_L_PER_KWH,
    Figure,
    exactly,
    impact,
    impact_of,
    local_site,
)
from panterra.energy.meter import CORE_W, CORE_W_RANGE, EnergyReport
from panterra.errors import InputError

MODELLED = EnergyReport(
    kwh=2.0, seconds=7200, method="modelled", detail="", kwh_range=(1.0, 4.0), core_seconds=3600.0, peak_memory_gb=1
)


def told(figure):
    return figure.value, figure.low, figure.high


@pytest.fixture
def place(monkeypatch):
    for name, value in {"PUE": "1.25", "WUE": "0.5", "MACHINE_KG_PER_HOUR": "0.1", "COUNTRY": "POL"}.items():
        monkeypatch.setenv(f"PANTERRA_{name}", value)
    monkeypatch.setattr("os.cpu_count", lambda: 4)


def test_arithmetic_of_a_known_place(place):
    """2 kWh in Poland (662 g/kWh), a PUE of 1.25, a core-hour on a machine of four cores."""
    found = impact_of(MODELLED)
    assert told(found.operation_co2e_kg) == pytest.approx((2 * 1.25 * 0.662, 1.25 * 0.662, 4 * 1.25 * 0.662))
    assert told(found.embodied_co2e_kg) == pytest.approx((0.1 / 4,) * 3)
    assert told(found.water_l) == pytest.approx((2 * 1.25 * 0.5, 1.25 * 0.5, 4 * 1.25 * 0.5))
    assert found.co2e_kg.value == pytest.approx(2 * 1.25 * 0.662 + 0.1 / 4)


def test_per_square_kilometre_is_the_whole_shared_out(place):
    found = impact_of(MODELLED).as_dict(area_km2=8.0)
    for name in ("kwh", "operation_co2e_kg", "embodied_co2e_kg", "co2e_kg", "water_l"):
        for end in ("value", "low", "high"):
            assert found["per_km2"][name][end] == pytest.approx(found[name][end] / 8)
    assert found["site"]["grid"]["year"] == 2023
    json.dumps(found)


def test_without_a_word_the_published_means_count():
    found = impact(exactly(1.0), method="measured", machine_hours=3, gpu_hours=5, site=local_site())
    assert found.operation_co2e_kg is None
    assert found.co2e_kg is None
    assert told(found.water_l) == pytest.approx((1.56 * 0.37, 0, 1.89 * 1.8))
    assert told(found.embodied_co2e_kg) == pytest.approx(
        tuple(3 * a + 5 * b for a, b in zip(told(SERVER_KG_PER_HOUR), told(GPU_KG_PER_HOUR), strict=True))
    )


@pytest.mark.parametrize("figure", [PUE, WATER_L_PER_KWH, SERVER_KG_PER_HOUR, GPU_KG_PER_HOUR])
def test_intervals_hold_their_values(figure):
    assert 0 <= figure.low < figure.value < figure.high


def test_figures_follow_from_their_sources():
    hours = 6 * 8760 * 0.85
    assert pytest.approx(2500 / hours, rel=0.01) == SERVER_KG_PER_HOUR.value
    assert pytest.approx(1000 / (4 * 8760), rel=0.02) == SERVER_KG_PER_HOUR.low
    assert pytest.approx(4288 / (4 * 8760), rel=0.01) == SERVER_KG_PER_HOUR.high
    assert pytest.approx(150 / hours, rel=0.02) == GPU_KG_PER_HOUR.value
    assert pytest.approx(150 / (6 * 8760), rel=0.02) == GPU_KG_PER_HOUR.low
    assert pytest.approx(1312 / 8 / (4 * 8760), rel=0.01) == GPU_KG_PER_HOUR.high
    assert pytest.approx(17e9 * 3.785 / 176e9, rel=0.02) == WATER_L_PER_KWH.value
    assert CORE_W_RANGE[0] < CORE_W < CORE_W_RANGE[1]


def test_nothing_is_cooled_where_the_pue_is_one(monkeypatch):
    monkeypatch.setenv("PANTERRA_PUE", "1")
    assert impact_of(MODELLED).water_l == exactly(0)


@pytest.mark.parametrize(("name", "value"), [("PUE", "0.9"), ("PUE", "much"), ("WUE", "-1"), ("GRAMS_PER_KWH", "nan")])
def test_a_wrong_word_in_the_environment_is_named(monkeypatch, name, value):
    monkeypatch.setenv(f"PANTERRA_{name}", value)
    with pytest.raises(InputError, match=f"PANTERRA_{name} is '{value}'; wanted a number of"):
        local_site()


def test_the_environment_names_the_country_where_nobody_else_does(monkeypatch):
    monkeypatch.setenv("PANTERRA_COUNTRY", "KEN")
    assert local_grid().grams_per_kwh == GRID_G_PER_KWH["KEN"][0]
    assert local_grid("FRA").country == "FRA"
    monkeypatch.setenv("PANTERRA_GRAMS_PER_KWH", "12.5")
    assert local_grid() == Grid(grams_per_kwh=12.5, source="given", country="KEN")


def test_an_unknown_country_gets_a_suggestion():
    with pytest.raises(InputError, match=r"country 'FR'.*did you mean .*FRA"):
        local_grid("FR")


def test_the_table_of_grids_is_plausible():
    assert len(GRID_G_PER_KWH) > 200
    assert all(len(code) == 3 and code.isupper() for code in GRID_G_PER_KWH)
    assert all(10 < grams < 1400 and 2021 <= year <= 2023 for grams, year in GRID_G_PER_KWH.values())


def test_figures_add_and_multiply_end_by_end():
    a, b = Figure(value=2, low=1, high=3), Figure(value=5, low=4, high=10)
    assert a + b == Figure(value=7, low=5, high=13)
    assert a * b == Figure(value=10, low=4, high=30)
    assert a * 2 == Figure(value=4, low=2, high=6)
