"""Sensors that a person declares."""

import json
import subprocess
import sys

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine

import panterra
from panterra import MODALITIES
from panterra.commands.export import standardised
from panterra.errors import InputError
from panterra.imagery.declared import declare_modalities, declare_modality
from panterra.imagery.doctor import examine
from panterra.imagery.files import scene_from_files
from panterra.imagery.stac import open_scene
from panterra.mapping import run
from panterra.mapping.embeddings import open_embeddings
from panterra.mapping.export import export
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.anysat_new_sensor import add_modality
from panterra.models.anysat_sensors import SENSORS
from panterra.models.weights import load_model, save_model

DRONE = """
[kite]
title = "Camera on a kite"
bands = { red = 0.65, green = 0.56, blue = 0.48, extra = 0.72 }
gsd = 0.5
dated = false
plausible = [0, 255]

[sentinel1_descending]
bands = ["vv", "vh"]
gsd = 10
unit = "db"
"""


@pytest.fixture(autouse=True)
def registry():
    """Forget the modalities that a test declares."""
    before = dict(MODALITIES)
    yield
    MODALITIES.clear()
    MODALITIES.update(before)


def a_model():
    torch.manual_seed(0)
    return AnySat(AnySatConfig(dim=32, depth=1, heads=2), name="small").eval().requires_grad_(False)


def test_a_declaration_says_what_a_row_says():
    row = declare_modality(
        "kite", bands={"RED": 0.65, "extra": None}, gsd=0.5, dated=False, plausible=(0, 255), nodata=0, title="Kite"
    )
    assert panterra.MODALITIES["kite"] is row
    assert (row.title, row.kind, row.unit, row.gsd, row.nodata) == ("Kite", "still", "dn", 0.5, 0)
    assert [(b.name, b.gsd, b.wavelength, b.common) for b in row.bands] == [
        ("RED", 0.5, 0.65, "red"),
        ("extra", 0.5, None, None),
    ]
    series = declare_modality("my_radar", bands=["hh"], gsd=3, unit="db")
    assert (series.title, series.kind, series.band_names) == ("My radar", "series", ("hh",))


def test_a_declaration_may_be_repeated_but_not_changed():
    row = declare_modality("kite", bands=["a", "b"], gsd=1)
    assert declare_modality("kite", bands=["a", "b"], gsd=1) is row
    with pytest.raises(InputError, match="'kite' with another bands, gsd is known already; choose another name"):
        declare_modality("kite", bands={"a": None, "b": None}, gsd=2)
    with pytest.raises(InputError, match="'sentinel2' with another title, bands"):
        declare_modality("sentinel2", bands=["red"], gsd=10)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"name": "My Kite"}, "take small letters, digits and underscores"),
        ({"bands": "red"}, "give a list of different names"),
        ({"bands": []}, "give a list of different names"),
        ({"bands": ["a", "a"]}, "give a list of different names"),
        ({"bands": [{"name": "a"}]}, "give a list of different names"),
        ({"bands": 3}, "give a list of different names"),
        ({"bands": {"a": 650}}, "band a of kite has the wavelength 650; give micrometres"),
        ({"gsd": 0}, "has pixels of 0; give their side in metres"),
        ({"gsd": "10"}, "has pixels of '10'"),
        ({"unit": "watts"}, "has the unit 'watts'; choose one of reflectance_1e4, dn"),
        ({"plausible": (5, 1)}, "give the least and the greatest"),
        ({"plausible": 5}, "give the least and the greatest"),
        ({"plausible": (1,)}, "give the least and the greatest"),
        ({"dated": "no"}, "give true or false"),
        ({"nodata": "none"}, "and a number"),
    ],
)
def test_what_cannot_be_is_refused_and_not_declared(wrong, said):
    with pytest.raises(InputError, match=said):
        declare_modality(**{"name": "kite", "bands": ["a"], "gsd": 1, **wrong})
    assert "kite" not in MODALITIES


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[kite", "cannot be read as a declaration"),
        ("title = 1", "write a table for each"),
        ("", "declares no modality"),
        ("[kite]\ngsd = 1", "does not say the bands of kite; add it"),
        ('[kite]\nbands = ["a"]\ngsd = 1\ncolour = 2', "says colour of kite, which nothing knows; known: bands, gsd"),
        ('[kite]\nbands = ["a"]\ngsd = -1', "has pixels of -1"),
    ],
)
def test_a_file_that_declares_nothing_says_why(tmp_path, text, said):
    path = tmp_path / "sensors.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as error:
        declare_modalities(path)
    assert str(path) in str(error.value)
    with pytest.raises(InputError, match="cannot be read as a declaration"):
        declare_modalities(tmp_path / "absent.toml")


def test_toml_and_json_declare_the_same(tmp_path):
    (tmp_path / "a.toml").write_text(DRONE)
    kite, radar = declare_modalities(tmp_path / "a.toml")
    assert (kite.kind, kite.plausible, kite.bands[0].common) == ("still", (0, 255), "red")
    assert (radar.kind, radar.unit, radar.band_names) == ("series", "db", ("vv", "vh"))
    table = {"bands": dict(zip(kite.band_names, (0.65, 0.56, 0.48, 0.72), strict=True)), "gsd": 0.5, "dated": False}
    content = {"kite": {**table, "plausible": [0, 255], "title": "Camera on a kite"}}
    (tmp_path / "b.json").write_text(json.dumps(content))
    assert declare_modalities(tmp_path / "b.json") == (kite,)


@pytest.fixture
def kite(tmp_path):
    """A scene of a declared camera and a saved model that knows it: their folder, and the pixels."""
    (tmp_path / "sensors.toml").write_text(DRONE)
    declare_modalities(tmp_path / "sensors.toml")
    pixels = np.random.default_rng(0).integers(20, 230, (4, 160, 160)).astype(np.uint8)
    profile = {"driver": "GTiff", "height": 160, "width": 160, "count": 4, "dtype": "uint8", "crs": "EPSG:32633"}
    with rasterio.open(
        tmp_path / "kite.tif", "w", **profile, transform=Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000)
    ) as file:
        file.write(pixels)
    names = ["red", "green", "blue", "extra"]
    made = scene_from_files(
        tmp_path / "kite.tif", tmp_path / "scene", modality="kite", bands=names, dates="2024-05-01", unit="dn"
    )
    assert made.scene.modalities == ("kite",)
    assert not [finding for finding in examine(made.scene) if finding.level == "error"]
    model = a_model()
    sensor = add_modality(model, "kite")
    assert (sensor.name, sensor.kernel, sensor.cell_m) == ("kite", 4, 2.0)
    save_model(model, tmp_path / "model")
    return tmp_path, pixels


def test_files_of_a_declared_sensor_go_the_whole_way(kite):
    folder, pixels = kite
    MODALITIES.pop("kite")  # as in a program that starts afresh: the file and the model declare the same
    assert "kite" in load_model(folder / "model").modalities
    declare_modalities(folder / "sensors.toml")
    store = run.embed(
        open_scene(folder / "scene"), str(folder / "model"), folder / "e.zarr", patch_m=10, window_px=8, overlap_px=0
    )
    assert np.isfinite(store.read()).all()
    mean = store.about["model"]["statistics"]["kite"]["mean"]
    np.testing.assert_allclose(mean, pixels.mean((1, 2)), rtol=1e-3)


def test_workers_know_a_declared_sensor(kite):
    folder, _ = kite
    scene, options = open_scene(folder / "scene"), {"patch_m": 10, "window_px": 4, "overlap_px": 0, "tile_px": 4}
    ways = {"alone": {}, "threads": {"workers": 2}, "processes": {"on": "processes:2"}}
    found = {
        way: run.embed(scene, str(folder / "model"), folder / f"{way}.zarr", **options, **how).read()
        for way, how in ways.items()
    }
    np.testing.assert_array_equal(found["threads"], found["alone"])
    np.testing.assert_array_equal(found["processes"], found["alone"])


def test_an_export_brings_its_declared_sensor_along(kite, tmp_path):
    """In a program of its own, which never declared it, and in the workers of that."""
    folder, _ = kite
    model = standardised(load_model(folder / "model"), ["kite"], str(folder / "scene"))
    export(model, tmp_path / "exported", engine="torch", modalities=["kite"], dates=1, window_px=4, patch_m=10)
    script = f"""
from panterra import embed, open_scene
from panterra.models.weights import load_model
if __name__ == "__main__":
    model = load_model({str(tmp_path / "exported")!r})
    scene = open_scene({str(folder / "scene")!r})
    for on in ("local", "processes:2"):
        out = {str(tmp_path)!r} + "/" + on.partition(":")[0] + ".zarr"
        embed(scene, model, out, patch_m=10, window_px=4, overlap_px=0, tile_px=4, on=on)
"""
    (tmp_path / "script.py").write_text(script)
    subprocess.run([sys.executable, tmp_path / "script.py"], check=True, capture_output=True)
    local, elsewhere = (open_embeddings(tmp_path / f"{on}.zarr").read() for on in ("local", "processes"))
    assert np.isfinite(local).any()
    np.testing.assert_array_equal(local, elsewhere)


def test_the_descending_orbit_is_a_sensor_of_its_own():
    row = declare_modality("sentinel1_descending", bands=["vv", "vh"], gsd=10, unit="db", plausible=(-40, 10))
    model = a_model()
    sensor = add_modality(model, row, like="s1-asc")
    assert (sensor.bands, sensor.cell_m, sensor.period) == (("vv", "vh"), 10, SENSORS["s1-asc"].period)
    ours, like = (model.projectors[name].state_dict() for name in (sensor.name, "s1-asc"))
    assert all(torch.equal(value, like[key]) for key, value in ours.items())
