"""The script behind docs/real-data.md runs on cut-down real samples and gives sane figures.

The files of raster_edge_cases are looked at in test_raster.py, those of openeo_netcdf in test_files.py.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from panterra.models.olmoearth import OlmoEarth, released_config
from panterra.models.weights import save_model

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

# The warper's threads let a warning of rasterio's own through now and then.
pytestmark = [pytest.mark.data, pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")]


@pytest.fixture
def setting(data_dir, tmp_path, monkeypatch):
    real_data = pytest.importorskip("real_data")
    torch.manual_seed(0)
    small = OlmoEarth(replace(released_config("v1.2", "nano"), dim=16, depth=1, heads=2), name="small")
    monkeypatch.setitem(real_data.mpl.rcParams, "figure.constrained_layout.use", True)
    real_data.mpl.use("agg")
    return real_data.Setting(
        data=data_dir,
        out=tmp_path / "pictures",
        work=tmp_path,
        models=(str(save_model(small, tmp_path / "small")),),
        architectures=(),
        seeds=0,
    )


def results(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def scored(lines, **wanted):
    """Give the macro F1 of the results that are as wanted, by features."""
    fitting = [line for line in lines if "macro_f1" in line and wanted.items() <= line.items()]
    for line in fitting:
        for estimate, low, high in (line["macro_f1"], line["accuracy"]):
            assert 0 <= low <= high <= 1
            assert 0 <= estimate <= 1
    return {line["features"]: line["macro_f1"][0] for line in fitting}


def check_picture(setting, name):
    path = setting.out / f"{name}.png"
    assert path.stat().st_size < 300_000
    with Image.open(path) as picture:
        assert min(picture.size) > 300


@pytest.mark.slow
def test_crops_from_points(setting, capsys):
    import real_data

    real_data.belgium(setting, points=100, months=2)
    lines = results(capsys)
    found = scored(lines, split="blocks of 200 m, 5 folds")
    assert found.keys() == {real_data.RAW, "small"}
    assert found[real_data.RAW] > 0.75
    assert any("2021-01-01" in line["what"] for line in lines if "doctor" in line)
    check_picture(setting, "belgium")


@pytest.mark.slow
def test_an_offset_is_found_mended_and_matters(setting, capsys):
    import real_data

    real_data.amazon(setting)
    lines = results(capsys)
    found = [line for line in lines if line.get("doctor") == "error"]
    assert [line["data"] for line in found] == ["amazon"]
    assert "offset of 1000" in found[0]["what"]
    repaired = scored(lines, imagery="repaired")
    assert repaired[real_data.RAW] > 0.9
    assert repaired["small"] > 0.4
    crossed = scored(lines, imagery="fitted on repaired, applied with the offset")
    assert all(crossed[name] < repaired[name] - 0.1 for name in repaired)
    check_picture(setting, "amazon")


@pytest.mark.slow
def test_images_sorted_by_one_vector(setting, capsys):
    import real_data

    real_data.eurosat(setting, per_class=6, train=4)
    lines = results(capsys)
    for probe in ("knn", "logistic"):
        assert scored(lines, split="first 4 of each class", probe=probe)[real_data.RAW] > 0.3
        assert scored(lines, split="cells of 1 degree, 5 folds", probe=probe)["small"] > 0.15
    check_picture(setting, "eurosat")


@pytest.mark.slow
def test_a_year_of_three_sensors_with_gaps(setting, capsys):
    import real_data

    real_data.flanders(setting, months=6)
    lines = results(capsys)
    (dates,) = (line for line in lines if "slots" in line)
    assert dates["slots"] == len(dates["kept"]["sentinel2_l2a"]) == 6
    assert 2 <= len(dates["kept"]["landsat"]) < 6
    for sensors in ("sentinel2_l2a+sentinel1", "sentinel2_l2a+sentinel1+landsat"):
        for split in ("blocks of 160 m, 5 folds", "west to east"):
            found = scored(lines, task="land cover", sensors=sensors, split=split)
            assert found.keys() == {real_data.RAW, "small"}
            assert found[real_data.RAW] > 0.5
    check_picture(setting, "flanders")
