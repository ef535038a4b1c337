"""Fetching what a person declared, and scenes that bring their declarations along."""

import json

import numpy as np
import pytest
import rasterio

from fetching import WHERE, connect
from panterra import MODALITIES
from panterra.cli import main
from panterra.errors import InputError
from panterra.imagery import declared, foreign_items
from panterra.imagery.declared import declare_modalities
from panterra.imagery.foreign_items import declare_source
from panterra.imagery.providers import find_provider, serving
from panterra.imagery.pull import pull
from panterra.imagery.raster import write_cog
from panterra.imagery.stac import open_scene
from panterra.imagery.wish import Wish
from stac_server import TILES, asset, sentinel2, stac_item
from stac_server import serving as serve

SCANNER = """
[scanner]
title = "A scanner of our own"
bands = { green = 0.56, nir = 0.84 }
gsd = 10
plausible = [0, 70000]

[scanner.stac]
collections = ["scanner-v1"]
assets = { image = ["nir", "green"] }
scale = 0.5
offset = 10
mask = ["clear", "valid"]
licence = "CC-BY-4.0"
"""


@pytest.fixture(autouse=True)
def registry():
    """Forget what a test declares."""
    before = dict(MODALITIES)
    yield
    forget(before)


def forget(before):
    """Be as a program that starts afresh."""
    MODALITIES.clear()
    MODALITIES.update(before)
    declared.DECLARED.clear()
    foreign_items.DECLARED_SOURCES.clear()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """An image of two bands over a tile, and Sentinel-2 beside it."""
    folder, box = tmp_path_factory.mktemp("archive"), TILES["33TVM"] | TILES["33TWM"]
    raw = np.random.default_rng(0).integers(100, 65000, (2, *box.shape)).astype("uint16")
    clear = np.ones(box.shape, "uint8")
    clear[40:60] = 0
    write_cog(folder / "scanner.tif", raw, box)
    write_cog(folder / "clear.tif", clear, box)
    assets = {"Image": asset("scanner.tif", box), "clear": asset("clear.tif", box)}
    item = stac_item("scan-1", "scanner-v1", "2024-01-07", box, {}, assets)
    return folder, [item, sentinel2(folder, "33TVM", "2024-01-05", cloud=1.0)]


@pytest.fixture
def server(archive):
    with serve(*archive) as state:
        yield state


@pytest.fixture
def declaration(tmp_path):
    path = tmp_path / "sensors.toml"
    path.write_text(SCANNER)
    return path


def test_a_declared_modality_is_fetched_and_known_to_every_later_command(
    server, archive, declaration, tmp_path, capsys
):
    before, out = dict(MODALITIES), tmp_path / "scene"
    fetched = ["fetch", f"--aoi={WHERE}", "--dates", "2024-01", "--source", server.address, "--composite", "none"]
    asked = [*fetched, "--modalities", "scanner", "sentinel2_l2a", "--declare", str(declaration), "--out", str(out)]
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["dates"] == {"sentinel2_l2a": ["2024-01-05"], "scanner": ["2024-01-07"]}
    assert "CC-BY-4.0" in told["licence"]

    forget(before)
    scene = open_scene(out)
    assert scene.modalities == ("sentinel2_l2a", "scanner")
    row = MODALITIES["scanner"]
    assert (row.title, row.band_names, row.plausible) == ("A scanner of our own", ("green", "nir"), (0, 70000))
    # Numbers of files by their scale and offset, in the order of the declaration, above what 16 bits with a sign hold.
    seen = scene.read("scanner", scene.geobox(modality="scanner"))
    with rasterio.open(archive[0] / "scanner.tif") as file:
        window = file.window(*scene.geobox(modality="scanner").boundingbox)
        raw, rows = file.read(window=window), slice(int(window.row_off), int(window.row_off + window.height))
    clear = np.ones(96, bool)
    clear[40:60] = False
    np.testing.assert_array_equal(seen.valid[0, 0].numpy().all(1), clear[rows])
    np.testing.assert_allclose(seen.pixels[0, 0].numpy()[:, clear[rows]], raw[::-1][:, clear[rows]] * 0.5 + 10)

    forget(before)
    assert main(["doctor", str(out), "--json"]) in (0, 1)
    assert "scanner" in capsys.readouterr().out


def test_files_of_ones_own_bring_the_declaration_too(archive, declaration, tmp_path, capsys):
    before, out = dict(MODALITIES), tmp_path / "scene"
    mine = ["--from-files", str(archive[0] / "scanner.tif"), "--modality", "scanner", "--bands", "nir", "green"]
    assert main(["fetch", *mine, "--dates", "2024-01-07", "--unit", "dn", "--out", str(out), "--json"]) == 2
    assert "scanner" in capsys.readouterr().err
    told = ["--dates", "2024-01-07", "--unit", "dn", "--declare", str(declaration)]
    assert main(["fetch", *mine, *told, "--out", str(out), "--json"]) == 0
    forget(before)
    assert open_scene(out).modalities == ("scanner",)
    # The collection alone will do, wherever it came from.
    forget(before)
    content = json.loads((out / "scene.json").read_text())
    content["features"] = [f | {"assets": {}} for f in content["features"]]
    with pytest.raises(InputError, match="has no assets"):
        open_scene(content)
    assert MODALITIES["scanner"].gsd == 10


def test_scenes_that_declare_otherwise_are_refused(archive, declaration, tmp_path):
    declare_modalities(declaration)
    content = {
        "type": "FeatureCollection",
        "features": [],
        "panterra:modalities": {"scanner": {"bands": ["a"], "gsd": 1}},
    }
    with pytest.raises(InputError, match=r"the list of items: a modality 'scanner' with another title, bands, gsd"):
        open_scene(content)
    with pytest.raises(InputError, match="the list of items declares no modality"):
        open_scene(content | {"panterra:modalities": ["scanner"]})


def test_a_job_with_another_declaration_is_not_gone_on_with(server, declaration, tmp_path):
    declare_modalities(declaration)
    wish = Wish(aoi=WHERE, dates="2024-01", modalities=("scanner",), composite="none")
    out, providers = tmp_path / "scene", [find_provider(server.address)]
    server.dead["scanner.tif"] = 500
    with pytest.raises(InputError, match="no image could be fetched"):
        pull(wish, providers, out, connect=connect)
    server.dead.clear()
    declaration.write_text(SCANNER.replace("scale = 0.5", "scale = 0.25"))
    declare_modalities(declaration)
    with pytest.raises(InputError, match="part of a job with another declared"):
        pull(wish, providers, out, connect=connect)


def test_where_a_declared_modality_is_looked_for(declaration):
    scanner = declare_modalities(declaration)[0]
    known, own = find_provider("planetary-computer"), find_provider("https://stac.example.org")
    assert serving("scanner", [known, own]) is own
    assert serving("scanner", [known]) is known
    foreign_items.DECLARED_SOURCES.clear()
    with pytest.raises(InputError, match=r"add a table \[scanner.stac\] to its declaration"):
        serving("scanner", [own])
    assert declare_source(scanner, {"collections": ["a"]}).assets == {"green": "green", "nir": "nir"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ('collections = ["scanner-v1"]', "the collections of scanner are None; give a list of names"),
        ('"nir", "green"', "hold nir; wanted green, nir, each once"),
        ("scale = 0.5", "the scale of scanner is 'half'; give a number"),
        ('["clear", "valid"]', "give the key of its asset and one of scl, qa_pixel"),
        ("offset = 10", "is told by assets, collections, licence, mask"),
        ("gsd = 10", "10 m is no whole number; to fetch it, declare a gsd such as 3.33333"),
        ('licence = "CC-BY-4.0"', "files of scanner are in 'linear'; choose one of dn"),
    ],
)
def test_what_no_catalogue_can_have_is_refused(tmp_path, changed, said):
    others = {
        'collections = ["scanner-v1"]': "",
        '"nir", "green"': '"nir"',
        "scale = 0.5": 'scale = "half"',
        '["clear", "valid"]': '["clear", "fog"]',
        "offset = 10": "plus = 10",
        "gsd = 10": "gsd = 3",
        'licence = "CC-BY-4.0"': 'unit = "linear"',
    }
    path = tmp_path / "sensors.toml"
    path.write_text(SCANNER.replace(changed, others[changed]))
    with pytest.raises(InputError, match=said.replace("[", r"\[")) as error:
        declare_modalities(path)
    assert str(path) in str(error.value)


def test_of_a_known_collection_the_wanted_modality_is_taken(archive, declaration):
    scanner = declare_modalities(declaration)[0]
    bands = {"B03": "green", "B08": "nir"}
    declare_source(scanner, {"collections": ["sentinel-2-l2a"], "assets": bands})
    item = archive[1][1]
    assert foreign_items.foreign_item(item, None, ("scanner",)).modality == "scanner"
    assert foreign_items.foreign_item(item, None, ()).modality == "sentinel2_l2a"
