"""Areas over the antimeridian, at the poles, and too wide for one UTM zone."""

import json

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
import torch

from fetching import bytes_of, connect, fetch
from panterra.cli import main
from panterra.errors import InputError
from panterra.imagery.aoi import read_area
from panterra.imagery.choose import as_candidates
from panterra.imagery.grids import extent, onto_globe, unwrapped
from panterra.imagery.providers import find_provider
from panterra.imagery.pull import list_pull
from panterra.imagery.stac import open_scene
from panterra.imagery.wish import Wish
from panterra.mapping.plan import plan_map
from panterra.mapping.run import embed
from panterra.models.features import Features
from stac_server import FAR_TILES, S2_DAYS, make_far_archive, serving

ISLAND = "179.9972,-16.502,-179.9972,-16.4985"
POLE = "179.98,85.4975,-179.98,85.5005"
CUT = {"patch_m": 40, "window_px": 16, "overlap_px": 4, "tile_px": 32}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("far")
    return folder, make_far_archive(folder)


@pytest.fixture
def server(archive):
    with serving(*archive) as state:
        yield state


class Means(torch.nn.Module):
    """The mean of everything in a patch."""

    dim = 1
    name = "means"

    def __init__(self, *modalities):
        super().__init__()
        self.modalities = modalities
        self.gain = torch.nn.Parameter(torch.ones(1))

    def encode(self, batch, *, patch_m, dense=False):
        pixels = torch.stack([o.pixels.mean((1, 2)) for o in batch.observations.values()]).mean(0)
        seen = torch.stack([o.valid.any(1) for o in batch.observations.values()]).all(0)
        side = round(patch_m / batch.pixel_m)
        patches, valid = (torch.nn.functional.avg_pool2d(x[:, None].float(), side) for x in (pixels, seen))
        patches = patches.movedim(1, -1)
        return Features(patches=patches, summary=patches.mean((1, 2)), valid=valid[:, 0] > 0.99, patch_m=patch_m)


# The area -------------------------------------------------------------------------------------------------------------


def write(path, *geometries, crs="EPSG:4326"):
    geopandas.GeoDataFrame(geometry=list(geometries), crs=crs).to_file(path)
    return path


def test_one_area_may_be_written_in_four_ways(tmp_path):
    box = read_area(ISLAND, ["sentinel2_l2a"])
    beyond = shapely.box(179.9972, -16.502, 180.0028, -16.4985)
    cut = [shapely.box(179.9972, -16.502, 180, -16.4985), shapely.box(-180, -16.502, -179.9972, -16.4985)]
    place = geopandas.GeoSeries([shapely.transform(beyond, lambda xy: xy - (360, 0))], crs="EPSG:4326").to_crs(3832)
    for name, area in {
        "beyond": write(tmp_path / "beyond.geojson", beyond),
        "cut": write(tmp_path / "cut.geojson", shapely.MultiPolygon(cut)),
        "before": write(tmp_path / "before.geojson", shapely.transform(beyond, lambda xy: xy - (360, 0))),
        "projected": write(tmp_path / "projected.gpkg", place[0], crs="EPSG:3832"),
    }.items():
        read = read_area(area, ["sentinel2_l2a"])
        np.testing.assert_allclose(read.searched, box.searched, atol=1e-6, err_msg=name)
        assert [part.box for part in read.parts] == [part.box for part in box.parts], name
    assert box.searched == ((179.9972, -16.502, 180.0, -16.4985), (-180.0, -16.502, -179.9972, -16.4985))
    assert [str(part.box.crs) for part in box.parts] == ["EPSG:32760", "EPSG:32701"]
    assert box.geometry.area == pytest.approx(beyond.area)
    assert shapely.union_all([part.geometry for part in box.parts]).area == pytest.approx(beyond.area)
    assert [part.share for part in box.parts] == pytest.approx([0.5, 0.5])
    assert max(box.box.shape) < 120, "the grid of both is as wide as the ground"


@pytest.mark.parametrize(
    ("where", "systems"),
    [
        ("0,85,20,86", [5041]),
        ("-180,80,180,90", [5041]),
        ("170,-79,-170,-81", None),
        ("170,-81,-170,-79", [5042]),
        ("1,72,4,85", [32631, 5041]),
        ("10,83,11,85", [5041]),
        ("-10,45,10,46", [32629, 32630, 32631, 32632]),
        ("175,-1,-175,3", [32660, 32601]),
        ("190,-1,191,0.5", [32702]),
        ("177,60,-170,61", [32660, 32601, 32602]),
    ],
)
def test_each_zone_and_pole_has_a_grid_of_its_own(where, systems):
    if systems is None:
        with pytest.raises(InputError, match="is empty; wanted west,south,east,north"):
            read_area(where, [])
        return
    area = read_area(where, ["sentinel2_l2a", "hls"])
    assert [part.box.crs.epsg for part in area.parts] == systems
    assert shapely.union_all([part.geometry for part in area.parts]).area == pytest.approx(area.geometry.area)
    assert sum(part.share for part in area.parts) == pytest.approx(1)
    for part in area.parts:
        assert part.grid("hls").boundingbox == part.box.boundingbox
        x, y = place(part.geometry.segmentize(0.5), part.box.crs)
        left, bottom, right, top = part.box.boundingbox
        assert left <= x.min() < x.max() <= right
        assert bottom <= y.min() < y.max() <= top
    assert len(area.decisions) == (where != "190,-1,191,0.5")


def place(geometry, crs):
    there = geopandas.GeoSeries([geometry], crs="EPSG:4326").to_crs(crs.to_wkt())
    return shapely.get_coordinates(there).T


def test_a_polygon_around_a_pole_holds_the_pole(tmp_path):
    path = write(tmp_path / "cap.gpkg", shapely.box(-5e5, -5e5, 5e5, 5e5), crs="EPSG:3413")
    area = read_area(path, [])
    assert area.geometry.bounds[3] == 90
    assert area.searched[0][::2] == (-180, 180)
    assert area.box.crs.epsg == 5041
    assert np.divide(area.box.shape, 1e5) == pytest.approx([1.45, 1.45], rel=0.02), "turned by 45 degrees"
    left, bottom, right, top = area.box.boundingbox
    assert left < 2e6 < right
    assert bottom < 2e6 < top


@pytest.mark.parametrize("where", ["-179.9,10,179.9,11", "-100,-20,120,10", "-180,-10,180,10"])
def test_what_goes_around_half_the_globe_gives_one_line(where):
    with pytest.raises(InputError, match="around more than half of the globe; over the antimeridian write"):
        read_area(where, [])


def test_extents_leave_out_the_widest_gap():
    islands = shapely.MultiPolygon([shapely.box(170, 0, 172, 1), shapely.box(-175, -2, -174, 0)])
    assert extent(islands) == (170, -2, -174, 1)
    assert extent(shapely.box(10, 0, 20, 1)) == (10, 0, 20, 1)
    assert extent(shapely.box(-180, 85, 180, 90)) == (-180, 85, 180, 90)


def test_outlines_that_providers_do_not_cut_are_understood():
    naive = shapely.Polygon([(179.5, 0), (-179.5, 0), (-179.5, 1), (179.5, 1)])
    assert unwrapped(naive).equals(onto_globe(shapely.box(179.5, 0, 180.5, 1)))
    assert unwrapped(naive).area == pytest.approx(1)
    cut = onto_globe(shapely.box(179.5, 0, 180.5, 1))
    assert unwrapped(cut).equals(cut)
    assert all(part.exterior.is_ccw for part in cut.geoms)
    world = shapely.box(-180, -60, 180, 60)
    assert unwrapped(world).area == world.area
    ring = shapely.Polygon([(lon, 80) for lon in range(-180, 180, 20)])
    assert unwrapped(ring).bounds == (-180, 80, 180, 90)


def test_an_item_without_geometry_is_where_its_bbox_says():
    raw = {
        "id": "a",
        "collection": "sentinel-2-l2a",
        "bbox": [179.9, -17, 0, -179.9, -16, 100],
        "properties": {"datetime": "2024-01-05T00:00:00Z", "s2:processing_baseline": "05.10"},
        "assets": {"blue": {"href": "https://host/B02.tif"}},
    }
    (found,), _ = as_candidates([raw], "sentinel2_l2a", read_area(ISLAND, []).geometry)
    assert found.covers == pytest.approx(1)


# The scene ------------------------------------------------------------------------------------------------------------


def test_both_sides_of_the_antimeridian_are_fetched_onto_their_own_zones(server, archive, tmp_path):
    out = tmp_path / "scene"
    pulled = fetch(server, out, aoi=ISLAND, composite="none")
    assert not pulled.failures
    assert len(server.asked("/search")) == 2
    assert any("has 2 items, of which 2 can be used" in decision for decision in pulled.decisions)
    assert "over the antimeridian; each part has a grid of its own: EPSG:32760, EPSG:32701" in pulled.decisions[0]
    ids = [f"sentinel2_l2a_{S2_DAYS[0]}_epsg{code}" for code in (32760, 32701)]
    assert [item.id for item in pulled.scene.items] == ids
    folder, items = archive
    for item, source, tile in zip(pulled.scene.items, items, FAR_TILES.values(), strict=False):
        assert item.grid.crs == tile.crs
        with rasterio.open(item.assets[0].href) as file, rasterio.open(folder / f"{source['id']}_B02.tif") as raw:
            expected = raw.read(1, window=raw.window(*file.bounds).round()).astype(int) - 1000
            np.testing.assert_array_equal(file.read(1), np.maximum(expected, 1))
    used = [i["properties"]["panterra:sources"] for i in json.loads((out / "scene.json").read_text())["features"]]
    assert [[s["id"] for s in one] for one in used] == [[items[0]["id"]], [items[1]["id"]]]
    again = fetch(server, tmp_path / "again", aoi=ISLAND, composite="none", options={"title": "scene"})
    assert bytes_of(out) == bytes_of(tmp_path / "again")
    assert not again.failures


def test_such_a_scene_is_planned_and_embedded_as_one_without_a_gap(server, tmp_path):
    wish = Wish(aoi=ISLAND, dates="2024-01", modalities=("sentinel2_l2a",), composite="none")
    wanted = list_pull(wish, [find_provider(server.address)], connect=connect)
    encoder = Means("sentinel2_l2a")
    plan = plan_map(wanted, model=encoder, **CUT)
    scene = fetch(server, tmp_path / "scene", aoi=ISLAND, composite="none").scene
    assert wanted.area.box == scene.geobox()
    later = plan_map(scene, model=encoder, **CUT)
    assert (plan.rows, plan.cols, plan.windows) == (later.rows, later.cols, later.windows)
    store = embed(scene, encoder, tmp_path / "e.zarr", aoi=ISLAND, **CUT)
    seen = np.isfinite(store.read()).all(-1)
    # 0.0056 by 0.0035 degrees at 16.5 degrees south.
    assert seen.sum() * 1600 == pytest.approx(0.0056 * 106_740 * 0.0035 * 110_650, rel=0.2)
    rows, cols = (np.flatnonzero(seen.any(axis)) for axis in (1, 0))
    inner = seen[rows[0] + 1 : rows[-1], cols[0] + 1 : cols[-1]]
    assert inner.all(), "no gap where the parts meet"


def test_elevation_in_degrees_is_read_from_both_sides(server, tmp_path):
    scene = fetch(server, tmp_path / "scene", ("srtm",), aoi=ISLAND).scene
    assert [item.id for item in scene.items] == ["srtm_epsg32760", "srtm_epsg32701"]
    for item in scene.items:
        with rasterio.open(item.assets[0].href) as file:
            values = file.read(1, masked=True)
            assert not values.mask.any(), "what lies on the other side is there as well"
            # A metre for each hundredth of a degree, in pixels of 1/360 of a degree.
            assert values.filled() == pytest.approx(100, abs=0.8)
            assert values[:, 0].mean() < values[:, -1].mean()


def test_near_a_pole_everything_lies_on_one_polar_grid(server, tmp_path):
    out = tmp_path / "scene"
    pulled = fetch(server, out, ("sentinel1",), aoi=POLE, composite="none")
    assert "polar stereographic grid of EPSG:5041" in pulled.decisions[0]
    (item,) = pulled.scene.items
    assert item.grid.crs.epsg == 5041
    store = embed(pulled.scene, Means("sentinel1"), tmp_path / "e.zarr", aoi=POLE, **CUT)
    assert np.isfinite(store.read()).all(-1).mean() > 0.8
    feature = json.loads((out / "scene.json").read_text())["features"][0]
    assert feature["geometry"]["type"] == "MultiPolygon"
    west, _, east, _ = feature["bbox"]
    assert east < 0 < west


def test_the_command_says_on_which_grids_images_lie(server, capsys):
    arguments = ["fetch", f"--aoi={ISLAND}", "--dates", "2024-01", "--source", server.address]
    arguments += ["--modalities", "sentinel2_l2a", "--list"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [image["grid"]["crs"] for image in told["images"]] == ["EPSG:32760", "EPSG:32701"]
    assert told["grid"]["crs"] in ("EPSG:32760", "EPSG:32701")
    assert sum(item["covers"] for image in told["images"] for item in image["items"]) == pytest.approx(1, abs=1e-3)
    assert main(arguments) == 0
    assert "pixels of 10 m in EPSG:32760 and " in capsys.readouterr().out


def test_a_recording_of_both_sides_is_replayed(server, tmp_path):
    options = {"record": tmp_path / "tape", "title": "t"}
    fetch(server, tmp_path / "a", aoi=ISLAND, options=options)
    assert len(list((tmp_path / "tape").glob("search-*.json"))) == 2
    replayed = fetch(server, tmp_path / "b", aoi=ISLAND, options={"replay": tmp_path / "tape", "title": "t"})
    assert replayed.received == 0
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert open_scene(tmp_path / "b").modalities == ("sentinel2_l2a",)
