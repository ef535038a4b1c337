import datetime as dt
import hashlib
import json
import re

import pystac
import pystac.validation
import pytest
from affine import Affine
from odc.geo import CRS
from odc.geo.geobox import GeoBox

from panterra.energy import EnergyReport
from panterra.mapping.passport import checksum, size, write_passport

BOX = GeoBox((30, 45), Affine(40, 0, 500000, 0, -40, 5000000), "EPSG:32633")
ENERGY = EnergyReport(kwh=0.002, seconds=7.2, method="modelled", detail="by constants")


DATES = (dt.date(2023, 4, 15), dt.date(2023, 7, 1))
WATER = {"value": 1, "name": "water"}


def write(folder, dates=DATES, classes=(WATER,), maps=1, box=BOX):
    (folder / "map.tif").write_bytes(b"pixels")
    fields = {"classification:classes": list(classes)}
    assets = [pystac.Asset(str(folder / "map.tif"), extra_fields=dict(fields)) for _ in range(maps)]
    return write_passport(
        folder / "map.tif.json",
        box,
        dates,
        {"map" + str(n or ""): asset for n, asset in enumerate(assets)},
        energy=ENERGY,
        licence="CC-BY-4.0",
        properties={"panterra:model": {"name": "some"}},
    )


def test_a_passport_is_a_stac_item(tmp_path):
    write(tmp_path)
    item = pystac.Item.from_file(tmp_path / "map.tif.json")
    assert item.to_dict()["stac_version"] == "1.1.0"
    assert item.datetime is None
    assert item.properties["start_datetime"] == "2023-04-15T00:00:00Z"
    assert item.properties["end_datetime"] == "2023-07-01T23:59:59Z"
    assert item.properties["proj:transform"] == [40, 0, 500000, 0, -40, 5000000]
    assert item.properties["emb:energy"]["avg_power_w"] == pytest.approx(1000)
    assert item.assets["map"].get_absolute_href() == str(tmp_path / "map.tif")
    west, south, east, north = item.bbox
    assert (west, north) == pytest.approx((15, 45.1536), abs=0.001)
    assert (east, south) == pytest.approx((15.0229, 45.1428), abs=0.001)
    assert any("classification" in url for url in item.stac_extensions)


def test_it_conforms_to_the_schema_of_stac(tmp_path):
    pytest.importorskip("jsonschema", reason="schemas are checked where jsonschema is installed")
    write(tmp_path)
    item = json.loads((tmp_path / "map.tif.json").read_text())
    # The extensions' own schemas are on the internet.
    pystac.validation.validate_dict(item | {"stac_extensions": []})


def test_names_of_classes_are_those_that_the_extension_allows(tmp_path):
    names = ["water", "wet meadow", "Röhricht / reed", "森林", "a-b_3"]
    item = write(tmp_path, classes=[{"value": n, "name": name} for n, name in enumerate(names)], maps=2)
    told = item.assets["map"].extra_fields["classification:classes"]
    assert [c["name"] for c in told] == ["water", "wet-meadow", "R-hricht-reed", "3", "a-b_3"]
    assert all(re.fullmatch("[0-9A-Za-z_-]+", c["name"]) for c in told)
    assert [c.get("title", c["name"]) for c in told] == names
    assert len(set(item.stac_extensions)) == len(item.stac_extensions)


def test_a_grid_of_no_catalogued_crs_is_told_in_full(tmp_path):
    crs = CRS("+proj=laea +lat_0=52.5 +lon_0=11 +ellps=GRS80")
    told = write(tmp_path, box=GeoBox(BOX.shape, BOX.affine, crs)).properties
    assert told["proj:code"] is None
    assert CRS(told["proj:wkt2"]) == crs
    assert "proj:wkt2" not in write(tmp_path).properties


def test_no_classes_are_no_list(tmp_path):
    item = write(tmp_path, classes=())
    assert "classification:classes" not in item.assets["map"].extra_fields
    assert not any("classification" in url for url in item.stac_extensions)


def test_without_dates_the_item_is_of_now(tmp_path):
    assert write(tmp_path, dates=()).datetime.tzinfo is not None


def test_checksums_are_multihashes_of_files_and_trees(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(b"12")
    (tmp_path / "a").write_bytes(b"345")
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in (("a", b"345"), ("b/c", b"12"))}
    assert checksum(tmp_path / "a") == "1220" + digests["a"]
    lines = "".join(f"1220{digest}  {name}\n" for name, digest in digests.items())
    assert checksum(tmp_path) == "1220" + hashlib.sha256(lines.encode()).hexdigest()
    assert size(tmp_path) == 5
