import csv
import json

import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox
from rio_cogeo.cogeo import cog_validate

from panterra.cli import main
from panterra.errors import InputError
from panterra.imagery.raster import read_legend, read_onto, write_cog
from panterra.mapping.transitions import find_transitions, is_class_map

BOX = GeoBox((30, 40), Affine(40, 0, 500_000, 0, -40, 5_300_000), "EPSG:32633")
NAMES = {1: "water", 4: "grass", 9: "town"}
PALETTE = {1: (20, 60, 120), 4: (90, 180, 60), 9: (200, 30, 40)}


def write_map(path, codes, **legend):
    return write_cog(path, codes.astype(np.uint8), BOX, nodata=0, **{"categories": NAMES, "palette": PALETTE} | legend)


@pytest.fixture
def maps(tmp_path):
    rng = np.random.default_rng(0)
    before, after = (rng.choice([0, 1, 4, 9], BOX.shape, p=[0.1, 0.4, 0.3, 0.2]) for _ in range(2))
    write_map(tmp_path / "a.tif", before)
    write_map(tmp_path / "b.tif", after)
    return before, after


def test_each_pixel_tells_what_it_was_and_is(tmp_path, maps):
    before, after = maps
    made = find_transitions(tmp_path / "a.tif", tmp_path / "b.tif", tmp_path / "t.tif")
    names, palette = read_legend(made.path)
    pixels, valid = read_onto(made.path, BOX, categorical=True)
    np.testing.assert_array_equal(valid[0], (before > 0) & (after > 0))
    for row in made.rows:
        codes = {name: code for code, name in NAMES.items()}
        here = (before == codes[row.before]) & (after == codes[row.after])
        np.testing.assert_array_equal(pixels[0] == row.code, here)
        assert row.pixels == here.sum()
        # UTM's scale in the middle of a zone is 0.9996: the ground is a little larger than the map.
        assert row.hectares == pytest.approx(here.sum() * 0.16 / 0.9996**2, rel=1e-4)
        changed = row.before != row.after
        assert names[row.code] == (f"{row.before} to {row.after}" if changed else row.before)
        assert (palette[row.code] == PALETTE[codes[row.after]]) == changed
    assert len(made.rows) == 9
    assert sum(row.pixels for row in made.rows) == valid.sum()
    assert cog_validate(made.path, quiet=True)[0]
    table = list(csv.DictReader(made.table.read_text().splitlines()))
    assert [int(row["pixels"]) for row in table] == [row.pixels for row in made.rows]
    item = json.loads(made.passport.read_text())
    assert item["properties"]["panterra:transitions"]["changed_hectares"] == pytest.approx(made.changed_hectares)
    assert len(item["assets"]["transitions"]["classification:classes"]) == 9


def test_many_classes_take_two_bytes_and_codes_without_a_name_are_told(tmp_path):
    codes = np.arange(BOX.shape.x * BOX.shape.y).reshape(BOX.shape) % 20 + 1
    for name in "ab":
        write_map(tmp_path / f"{name}.tif", codes, categories={1: "one"}, palette=None)
    made = find_transitions(tmp_path / "a.tif", tmp_path / "b.tif", tmp_path / "t.tif")
    assert made.changed_hectares == 0
    assert [row.before for row in made.rows] == ["one", *map(str, range(2, 21))]
    assert [row.code for row in made.rows] == [i * 20 + i + 1 for i in range(20)]
    assert read_onto(made.path, BOX, categorical=True)[0].max() == 400


def test_maps_that_cannot_be_compared_say_so(tmp_path, maps):
    write_map(tmp_path / "other.tif", maps[0], categories={**NAMES, 4: "crops"})
    with pytest.raises(InputError, match=r"class 4 is 'grass' in .* and 'crops' in"):
        find_transitions(tmp_path / "a.tif", tmp_path / "other.tif", tmp_path / "t.tif")
    write_cog(tmp_path / "moved.tif", maps[0].astype(np.uint8), BOX.translate_pix(1, 0), nodata=0)
    with pytest.raises(InputError, match="different grids"):
        find_transitions(tmp_path / "a.tif", tmp_path / "moved.tif", tmp_path / "t.tif")
    with pytest.raises(InputError, match=r"end in \.tif"):
        find_transitions(tmp_path / "a.tif", tmp_path / "b.tif", tmp_path / "t.zarr")
    write_cog(tmp_path / "values.tif", maps[0].astype(np.float32), BOX)
    assert not is_class_map(tmp_path / "values.tif")
    assert not is_class_map(tmp_path / "absent.tif")


def test_the_command_line_compares_maps(tmp_path, maps, capsys):
    words = ["change", str(tmp_path / "a.tif"), str(tmp_path / "b.tif"), "--out", str(tmp_path / "t.tif")]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["rows"]) == 9
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert "ha changed" in capsys.readouterr().out
    assert main([*words, "--overwrite", "--threshold", "0.1"]) == 2
    assert "for embeddings" in capsys.readouterr().err
