"""Other people's tools open what we write, and have nothing to say about it.

Warnings are errors here as in all tests; what GDAL only logs is caught as well. Schemas of STAC extensions are on the
internet: of STAC, the core is validated.
"""

import csv
import json
import logging
from pathlib import Path

import duckdb
import geopandas as gpd
import numpy as np
import pyogrio
import pystac
import pystac.validation
import pytest
import rasterio
import shapely
import xarray as xr
import zarr
from rio_cogeo.cogeo import cog_info, cog_validate

from fetching import WHERE, fetch
from panterra.cli import main
from panterra.mapping.detections import detect
from panterra.mapping.report import ClassScores, LegendEntry, Page, Panel, Score, write_report
from stac_server import AREA, make_archive, make_far_archive, serving
from test_detections import a_detector
from test_finetune_detection import plant_ships
from test_report import Elements

MODEL = ("--model", "olmoearth-v1.2-nano", "--random", "0")
SERIES = {"composite": "none", "options": {"title": "A scene"}}


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def plots(path):
    """Two kinds of plots, a chessboard of squares of 120 m."""
    left, _, _, top = AREA.boundingbox
    squares = [
        {"class": ("meadow", "wood")[(row + col) % 2], "geometry": shapely.box(x, y - 110, x + 110, y)}
        for row, y in enumerate(np.arange(top, top - 700, -120))
        for col, x in enumerate(np.arange(left, left + 1190, 120))
    ]
    gpd.GeoDataFrame(squares, crs=str(AREA.crs)).to_file(path)
    return path


def a_page(folder):
    picture = Panel(title="Imagery", pixels=np.full((2, 3, 3), 200, np.uint8), alt="True-colour imagery", photo=True)
    score = Score(estimate=0.8, interval=(0.7, 0.9))
    return Page(
        title="Fields & <forests>",
        lead="A test",
        panels=[picture, Panel(title="Map", pixels=picture.pixels, alt="The map", over=picture)],
        legend=[LegendEntry(name="Water", colour=(1, 2, 3), share=0.4)],
        scores={"Overall accuracy": score},
        measured="On 10 held-out labels.",
        classes=[
            ClassScores(name=name, colour=(1, 2, 3), support=5, precision=score, recall=score, f1=score)
            for name in ("Water", "Forest")
        ],
        confusion=np.array([[4, 1], [0, 5]]),
        effort={"Run time": "3 s"},
        origin={"Model": 'nano "random"'},
        files={"Map": folder / "map.tif"},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with one output of each kind, made by the commands that people use."""
    out, archive = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("archive")
    names = ("sentinel2_l2a", "sentinel1")
    with serving(archive, make_archive(archive)) as server:
        for scene, dates in (("scene", "2024-01"), ("later", "2024-01-20/2024-02")):
            fetch(server, out / scene, names, dates=dates, aoi=WHERE, **SERIES)
    far = tmp_path_factory.mktemp("far")
    with serving(far, make_far_archive(far)) as server:
        fetch(server, out / "island", aoi="179.9972,-16.502,-179.9972,-16.4985", **SERIES)
    labels = plots(out / "plots.gpkg")
    for scene in ("scene", "later"):
        run("embed", out / scene, *MODEL, "--modalities", "sentinel2_l2a", "--out", out / f"{scene}.zarr")
    run("embed", out / "scene", *MODEL, "--modalities", "sentinel2_l2a", "--out", out / "scene.tif")
    run("embed", out / "island", *MODEL, "--out", out / "island.zarr", "--dtype", "int8")
    run("chips", out / "scene.zarr", "--side", 2, "--out", out / "chips.parquet")
    run("chips", out / "island.zarr", "--side", 2, "--out", out / "island.parquet")
    run("probe", out / "scene.zarr", "--labels", labels, "--block-m", 120, "--out", out / "probe")
    run("map", out / "scene.zarr", "--probe", out / "probe", "--out", out / "map.tif", "--probabilities")
    run("map", out / "later.zarr", "--probe", out / "probe", "--out", out / "next.tif")
    run("map", out / "island", "--probe", out / "probe", "--out", out / "island.tif")
    run("change", out / "map.tif", out / "next.tif", "--out", out / "transitions.tif")
    change = ("change", out / "scene.zarr", out / "later.zarr", "--out", out / "change.tif", "--threshold")
    run(*change, 1e-6)
    with rasterio.open(out / "change.tif") as file:
        half = np.nanmedian(file.read(1))
    # Half of the patches, many of which touch each other at corners alone.
    run(*change, half, "--polygons", out / "change.geojson", "--overwrite")
    for place in ("scene", "island"):
        at = ("--at", 15.009, 45.15) if place == "scene" else ("--at", 179.999, -16.5)
        found = ("--top", 9, "--apart", 0, "--out", out / f"found_{place}.geojson", "--map", out / f"like_{place}.tif")
        run("search", out / f"{place}.zarr", *at, *found)
    run("sample", out / "map.tif", "--size", 20, "--minimum", 5, "--out", out / "points.geojson")
    plant_ships(out / "sea", size_px=112, number=12, seed=5)
    detect(out / "sea", a_detector(), out / "ships.geojson", threshold=0.3)
    run("report", "--html", out / "report.html")
    write_report(out / "page.html", a_page(out))
    return out


@pytest.fixture
def silent(caplog):
    """Fail where GDAL logs a warning."""
    caplog.set_level(logging.WARNING)
    yield
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


RASTERS = (
    *("map", "map_probabilities", "next", "transitions", "change", "change_mask", "scene", "like_scene", "like_island"),
    "island",
    *("scene/*", "later/*", "island/*", "sea/*"),
)
VECTORS = ("change", "found_scene", "found_island", "points", "ships")
PASSPORTS = (
    *("map.tif", "next.tif", "transitions.tif", "change.tif", "scene.tif", "scene.zarr", "later.zarr", "island.zarr"),
    *("ships.geojson", "chips.parquet", "island.parquet", "like_scene.tif", "like_island.tif", "island.tif"),
)


def strictly(path):
    """Read JSON, which has no NaN."""

    def refuse(name):
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


def test_everything_that_was_made_is_looked_at(made):
    known = {f"{name}.tif" for name in RASTERS} | {f"{name}.geojson" for name in VECTORS}
    known |= {f"{name}.json" for name in PASSPORTS} | {
        "plots.gpkg",
        "transitions_table.csv",
        "report.html",
        "page.html",
    }
    # Where GDAL keeps the names of classes.
    known |= {f"{name}.tif.aux.xml" for name in ("map", "next", "island", "transitions", "change_mask")}
    known |= {"chips.parquet", "island.parquet", "scene.zarr", "later.zarr", "island.zarr"}
    known |= {"scene", "later", "island", "sea", "probe"}
    assert {path.name for path in made.iterdir()} == known - {name for name in known if "*" in name}


@pytest.mark.parametrize("name", RASTERS)
def test_rasters_are_cloud_optimised_and_gdal_reads_all_of_them(made, name, silent):
    paths = sorted(made.glob(f"{name}.tif"))
    assert paths
    for path in paths:
        valid, errors, warnings = cog_validate(path, strict=True, quiet=True)
        assert (valid, errors, warnings) == (True, [], []), path
        assert cog_info(path).COG
        with rasterio.Env(CPL_DEBUG=False), rasterio.open(path) as file:
            assert file.crs.is_projected
            assert file.nodata is not None
            assert (file.transform.b, file.transform.d) == (0, 0)
            for band in file.indexes:
                file.checksum(band)
                file.read_masks(band)
                for level in range(len(file.overviews(band))):
                    with rasterio.open(path, overview_level=level) as small:
                        small.read(band)


def test_the_legend_of_a_map_is_where_qgis_looks_for_it(made, silent):
    for name in ("map", "transitions"):
        with rasterio.open(made / f"{name}.tif") as file:
            codes = {int(code) for code in np.unique(file.read(1, masked=True).compressed())}
            colours = file.colormap(1)
            assert file.colorinterp[0] is rasterio.enums.ColorInterp.palette
            assert all(colours[code][:3] != (0, 0, 0) for code in codes)


@pytest.mark.parametrize("name", VECTORS)
def test_geojson_is_that_of_the_standard(made, name, silent):
    path = made / f"{name}.geojson"
    content = strictly(path)
    assert content["type"] == "FeatureCollection"
    assert "crs" not in content
    assert content["features"]
    for feature in content["features"]:
        assert {"type", "geometry", "properties"} <= set(feature)
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.is_valid
        west, south, east, north = shape.bounds
        assert -180 <= west <= east <= 180
        assert -90 <= south <= north <= 90
        for part in shapely.get_parts(shape):
            assert np.ptp(part.bounds[::2]) < 180, "cut at the antimeridian"
            if part.geom_type == "Polygon":
                assert part.exterior.is_ccw
                assert not any(ring.is_ccw for ring in part.interiors)
    info = pyogrio.read_info(path)
    assert info["driver"] == "GeoJSON"
    assert info["crs"] == "EPSG:4326"
    assert info["features"] == len(content["features"])
    frame = pyogrio.read_dataframe(path)
    assert len(frame) == info["features"]
    assert len(frame.to_crs(AREA.crs.to_wkt())) == len(frame)


@pytest.mark.parametrize("name", ["chips", "island"])
def test_geoparquet_opens_in_geopandas_and_duckdb(made, name):
    path = made / f"{name}.parquet"
    frame = gpd.read_parquet(path)
    assert len(frame)
    assert frame.geometry.is_valid.all()
    west, south, east, north = frame.to_crs("EPSG:4326").total_bounds
    assert -180 <= west < east <= 180
    assert -90 <= south < north <= 90
    table = f"read_parquet('{path}')"
    assert duckdb.sql(f"select count(*) from {table}").fetchall() == [(len(frame),)]
    # The boxes by which readers skip rows are not among what geopandas shows.
    assert {row[0] for row in duckdb.sql(f"describe select * from {table}").fetchall()} == {*frame.columns, "bbox"}
    ((mean,),) = duckdb.sql(f"select avg(list_sum(embedding)) from {table}").fetchall()
    assert np.isfinite(mean)


@pytest.mark.parametrize("name", ["scene", "island"])
def test_zarr_opens_in_xarray(made, name):
    path = made / f"{name}.zarr"
    for how in ({}, {"consolidated": False}):
        with xr.open_zarr(path, **how) as store:
            assert all(variable.load().size for variable in store.variables.values())
            assert {"y", "x"} <= set(store.coords)
    group = zarr.open_group(path, mode="r")
    assert group.metadata.zarr_format == 3


@pytest.mark.parametrize("name", PASSPORTS)
def test_passports_are_stac_items(made, name):
    path = made / f"{name}.json"
    item = pystac.Item.from_file(path)
    check_item(strictly(path))
    for asset in item.assets.values():
        assert Path(asset.get_absolute_href()).exists()


@pytest.mark.parametrize("name", ["scene", "later", "island", "sea"])
def test_scenes_are_item_collections(made, name):
    path = made / name / "scene.json"
    collection = pystac.ItemCollection.from_file(str(path))
    assert len(collection)
    for raw in strictly(path)["features"]:
        check_item(raw)
        for asset in raw["assets"].values():
            assert (path.parent / asset["href"]).is_file()


def check_item(raw):
    pystac.validation.validate_dict(raw | {"stac_extensions": []})
    shape = shapely.geometry.shape(raw["geometry"])
    assert shape.is_valid
    for part in shapely.get_parts(shape):
        assert part.exterior.is_ccw
        assert np.ptp(part.bounds[::2]) < 180
    assert all(address.startswith("https://stac-extensions.github.io/") for address in raw["stac_extensions"])
    prefixes = {key.split(":")[0] for key in raw["properties"] if ":" in key} - {"panterra", "emb"}
    # What describes embeddings (emb) has no schema that could be named yet.
    stated = " ".join(raw["stac_extensions"])
    assert all({"proj": "projection"}.get(prefix, prefix) in stated for prefix in prefixes), prefixes


def test_tables_open_in_a_spreadsheet(made):
    path = made / "transitions_table.csv"
    rows = list(csv.reader(path.read_text("utf-8").splitlines()))
    assert len({len(row) for row in rows}) == 1
    assert len(rows) > 1
    assert len(duckdb.sql(f"select * from read_csv('{path}', header=true)").fetchall()) == len(rows) - 1


def test_what_is_told_in_json_is_json(made, capsys):
    frame = gpd.read_file(made / "points.geojson")
    frame["reference"] = ["meadow", "wood"] * (len(frame) // 2) + ["meadow"] * (len(frame) % 2)
    frame.to_file(made / "probe" / "checked.gpkg")
    capsys.readouterr()
    run("accuracy", made / "map.tif", "--reference", made / "probe" / "checked.gpkg", "--json")
    (made / "probe" / "told.json").write_text(capsys.readouterr().out)
    told = strictly(made / "probe" / "told.json")
    assert told["classes"]


@pytest.mark.parametrize("name", ["report.html", "page.html"])
def test_reports_are_pages_that_need_nothing_else(made, name):
    text = (made / name).read_text("utf-8")
    assert text.lower().startswith("<!doctype html>")
    page = Elements(text)
    assert page.all("html")[0]["lang"]
    assert {"charset": "utf-8"} in [{k: v.lower() for k, v in meta.items()} for meta in page.all("meta")]
    assert len(page.all("title")) == 1
    assert all("alt" in image for image in page.all("img"))
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.found:
        for key in ("src", "href", "xlink:href"):
            address = attributes.get(key, "#")
            beside = tag == "a" and (made / address).is_file()
            assert address.startswith(("#", "data:")) or beside, address
