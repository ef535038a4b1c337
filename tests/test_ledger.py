import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from panterra.energy import EnergyReport, record, recorded
from panterra.energy.grid import local_grid
from panterra.energy.ledger import FILE, append, ledger_folder, read_ledger, this_machine

REPORT = EnergyReport(
    kwh=0.5,
    seconds=100.0,
    method="modelled",
    detail="",
    kwh_range=(0.25, 1.0),
    core_seconds=50.0,
    gpus=2,
    peak_memory_gb=1.5,
    grid=local_grid("FRA"),
)


@pytest.fixture
def ledger(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PANTERRA_LEDGER", str(tmp_path / "ledger"))
    return tmp_path / "ledger"


def test_what_is_recorded_is_read_again(ledger):
    written = record("map", REPORT, model="m", area_km2=2.0, pixels=9, windows=20, tokens=400, settings={"patch_m": 40})
    (read,) = read_ledger()
    assert read == replace(written)
    assert (read.kwh.value, read.kwh.low, read.kwh.high) == (0.5, 0.25, 1.0)
    assert read.operation_co2e_kg.value == pytest.approx(0.5 * 1.56 * 0.056)
    assert (read.command, read.status, read.machine, read.gpu_seconds) == ("map", "finished", this_machine(), 200.0)


def test_a_line_is_plain_json_with_sources_and_speeds(ledger):
    record("embed", REPORT, windows=20, tokens=400)
    told = json.loads((ledger / FILE).read_text())
    assert (told["windows_per_s"], told["tokens_per_s"]) == (0.2, 4.0)
    assert told["site"]["grid"] == {
        "country": "FRA",
        "year": 2023,
        "grams_per_kwh": 56,
        "source": "FRA 2023, Our World in Data after Ember and the Energy Institute, CC BY 4.0, in codecarbon 3.3.2",
    }
    assert "Uptime Institute" in told["site"]["pue_source"]
    assert told["method"] == "modelled"
    assert told["co2e_kg"]["value"] == pytest.approx(
        told["operation_co2e_kg"]["value"] + told["embodied_co2e_kg"]["value"]
    )


def test_off_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PANTERRA_LEDGER", "off")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert record("map", REPORT) is None
    assert read_ledger() == []
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="each system has its own data folder")
def test_by_default_it_is_in_the_users_data_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("PANTERRA_LEDGER")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert ledger_folder() == tmp_path / "panterra"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert ledger_folder() == Path.home() / ".local" / "share" / "panterra"


def test_two_processes_lose_no_line(ledger):
    """Each writes lines that are longer than what the system writes at once."""
    script = (
        "import sys\n"
        "from panterra.energy import EnergyReport, record\n"
        "report = EnergyReport(kwh=1, seconds=1, method='measured', detail='')\n"
        "for i in range(60):\n"
        "    record('map', report, model=sys.argv[1], windows=i, settings={'filler': 'x' * 20_000})\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, name], env=os.environ.copy()) for name in ("a", "b")]
    assert [writer.wait() for writer in writers] == [0, 0]
    notes: list[str] = []
    entries = read_ledger(note=notes.append)
    assert not notes
    for name in ("a", "b"):
        assert [e.windows for e in entries if e.model == name] == list(range(60))


@pytest.mark.parametrize(
    "damage", [b'{"command": "map", "seco', b"\xff\xfe\x00", b'{"command": "map"}', b"[1, 2]", b'"word"', b"null"]
)
def test_a_damaged_line_is_left_out_and_swallows_no_other(ledger, damage):
    record("embed", REPORT)
    with (ledger / FILE).open("ab") as file:
        file.write(damage)  # without its end, as a crash leaves it
    record("map", REPORT)
    notes: list[str] = []
    assert [entry.command for entry in read_ledger(note=notes.append)] == ["embed", "map"]
    assert notes == [f"{ledger / FILE}: lines that cannot be read are left out: 2"]


def test_a_ledger_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PANTERRA_LEDGER", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="the map job is not in the ledger.*set PANTERRA_LEDGER to a folder"):
        assert record("map", REPORT) is None


def test_entries_of_later_versions_can_be_read(ledger):
    entry = record("map", REPORT)
    told = entry.as_dict() | {"something_new": 1}
    (ledger / FILE).write_text(json.dumps(told) + "\n")
    assert read_ledger() == [entry]


def test_a_block_is_recorded_with_what_it_learns(ledger):
    with recorded("evaluate", country="FRA", model="m") as job:
        job["windows"] = 7
    (entry,) = read_ledger()
    assert (entry.command, entry.status, entry.model, entry.windows) == ("evaluate", "finished", "m", 7)
    assert entry.site["grid"]["country"] == "FRA"
    assert entry.seconds > 0


def test_a_block_that_fails_is_recorded_as_stopped(ledger):
    with pytest.raises(KeyError), recorded("fetch"):
        raise KeyError
    assert [entry.status for entry in read_ledger()] == ["stopped"]


def test_entries_come_in_the_order_of_time(ledger):
    entry = record("map", REPORT)
    append(ledger, replace(entry, ended="2020-01-01T00:00:00Z"))
    assert [e.ended[:4] for e in read_ledger()] == ["2020", entry.ended[:4]]
