import json
import math
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import shapely
import torch
from affine import Affine
from odc.geo import CRS
from odc.geo.geobox import GeoBox
from safetensors.numpy import load_file, save_file
from torch import nn

from panterra.cli import main
from panterra.errors import InputError
from panterra.evaluate.probes import FeatureSource, Probe
from panterra.imagery.grids import common_crs, footprint, lonlat
from panterra.imagery.raster import read_onto, write_cog
from panterra.imagery.stac import Scene, make_item, open_scene, save_scene
from panterra.mapping.areas import lay_grid, parse_crs, read_area
from panterra.mapping.embeddings import open_embeddings
from panterra.mapping.run import embed
from panterra.mapping.run import map as make_map
from panterra.mapping.seams import read_seams
from panterra.mapping.tiles import Window
from panterra.models.features import Features
from panterra.models.weights import load_model
from panterra.planet import write_planet_scene

CUT = {"window_px": 16, "overlap_px": 4, "tile_px": 48, "patch_m": 40}


class Means(nn.Module):
    """The mean of each band per patch, and where in the window it was."""

    modalities = ("sentinel2_l2a",)
    dim = 13
    name = "means"

    def __init__(self):
        super().__init__()
        self.num_windows = 0

    def encode(self, batch, *, patch_m, dense=False):
        self.num_windows += len(batch)
        o, side = batch.observations["sentinel2_l2a"], round(patch_m / batch.pixel_m)
        seen = o.valid[:, :, None].expand_as(o.pixels)
        total, count = (
            x.sum(1).unfold(2, side, side).unfold(3, side, side).sum((-2, -1)).movedim(1, -1)
            for x in (torch.where(seen, o.pixels, 0.0) / 1000, seen.float())
        )
        rows, cols = (torch.arange(n) for n in total.shape[1:3])
        place = 0.1 * torch.sin(rows[:, None] * 1.3 + cols * 0.7).expand(len(batch), -1, -1)
        patches = torch.cat([total / count.clamp(min=1), place[..., None]], -1)
        return Features(patches=patches, summary=patches.mean((1, 2)), valid=count[..., 0] > 0, patch_m=patch_m)


def image(folder, name, box, *, absent=False, mask=None, seed=0):
    """Write noise as a Sentinel-2 image; an absent one has an item, but no file that could be read."""
    path, assets = folder / f"{name}.tif", {}
    if not absent:
        pixels = np.random.default_rng(seed).integers(500, 4000, (12, *box.shape)).astype(np.uint16)
        write_cog(path, pixels, box, nodata=0)
    if mask is not None:
        assets["valid"] = folder / f"{name}_valid.tif"
        write_cog(assets["valid"], mask.astype(np.uint8), box)
    return make_item(name, "sentinel2_l2a", "2023-05-01", box, {"data": path, **assets})


def box_at(left, top, crs, size=60):
    return GeoBox((size, size), Affine(10, 0, left, 0, -10, top), crs)


# Several zones --------------------------------------------------------------------------------------------------------

BORDER = (723_000.0, 5_320_000.0)
"""About 18 degrees east in EPSG:32633, where zone 34 begins."""
MEETING = 156
"""The column at which the image of zone 33 ends."""


@pytest.fixture(scope="module")
def two_zones(tmp_path_factory) -> tuple[Scene, Scene]:
    """The planet around a border of zones: as one image, and as one of each zone, which overlap."""
    folder = tmp_path_factory.mktemp("zones")
    size = 192
    about = {"dates": ["2023-06-09"], "modalities": ["sentinel2_l2a"], "origin": BORDER, "clouds": 0, "labels": 8}
    write_planet_scene(folder / "one", size_px=size, **about)
    (whole,) = open_scene(folder / "one").items
    west = whole.grid[:, :MEETING]
    (x,), (y,) = rasterio.warp.transform(whole.grid.crs, "EPSG:32634", *zip(whole.grid.affine @ (size / 2, 0)))
    east = GeoBox((size + 36, 92), Affine(10, 0, round(x, -1) + 200, 0, -10, round(y, -1) + 150), "EPSG:32634")
    items = []
    for name, box in (("west", west), ("east", east)):
        pixels, valid = read_onto(whole.assets[0].href, box)
        pixels[:, ~valid.all(0)] = 0
        write_cog(folder / f"{name}.tif", np.rint(pixels).astype(np.uint16), box, nodata=0)
        items.append(make_item(name, "sentinel2_l2a", "2023-06-09", box, {"data": folder / f"{name}.tif"}))
    save_scene(folder, items, "Two zones", None)
    return open_scene(folder / "one"), open_scene(folder)


def test_two_zones_make_one_map_without_a_seam(two_zones, tmp_path):
    whole, parts = two_zones
    box = whole.geobox()
    assert parts.geobox().crs == box.crs
    encoder = load_model("olmoearth-v1.2-nano", random=0)
    args = {"window_px": 32, "overlap_px": 8, "patch_m": 40, "box": box}
    one, both = (embed(s, encoder, tmp_path / f"{n}.zarr", **args) for n, s in enumerate((whole, parts)))
    a, b = one.read().astype(np.float64), both.read().astype(np.float64)
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    assert np.abs(a - b).mean() < 0.05 * np.abs(a - a.mean((0, 1))).mean()
    # Where the images meet, and for comparison everywhere, neighbours differ as much as in the one image.
    meet = MEETING // 4
    steps = [np.abs(np.diff(x, axis=1)).mean((0, 2)) for x in (a, b)]
    assert steps[1][meet - 2 : meet + 2].mean() / steps[0][meet - 2 : meet + 2].mean() == pytest.approx(1, abs=0.1)
    assert read_seams(both.passport).ratio == pytest.approx(read_seams(one.passport).ratio, abs=0.05)


def test_the_zone_with_most_of_the_area_gives_the_grid(tmp_path):
    east = [image(tmp_path, f"e{n}", box_at(300_000, 5e6, "EPSG:32634", 50), absent=True) for n in range(3)]
    west = image(tmp_path, "w", box_at(699_000, 5e6, "EPSG:32633", 80), absent=True)
    assert open_scene([*east, west]).geobox().crs.epsg == 32633, "three dates are not three areas"
    assert open_scene([*east, west]).geobox(crs=CRS("EPSG:3035")).crs.epsg == 3035


def test_what_is_wider_than_a_zone_gets_an_equal_area_grid():
    grids = [box_at(500_000, 5e6, f"EPSG:326{zone}", 10_000) for zone in (29, 31, 33, 35)]
    crs = common_crs(grids)
    assert crs.to_epsg() is None
    assert crs.proj.coordinate_operation.method_name == "Lambert Azimuthal Equal Area"
    outlines = [footprint(grid, per_side=8)[0] for grid in grids]
    there = [shapely.geometry.shape(rasterio.warp.transform_geom("EPSG:4326", crs.to_wkt(), o)) for o in outlines]
    assert [shape.area for shape in there] == pytest.approx([1e10] * 4, rel=0.002)
    assert common_crs(grids[1:2] + grids[1:2]).epsg == 32631
    own = [GeoBox(g.shape, g.affine, "EPSG:3035") for g in grids]
    assert common_crs(own).epsg == 3035, "one projection of the files stays"


# The antimeridian and the poles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zones", "degrees"])
def test_both_sides_of_the_antimeridian_make_one_small_map(tmp_path, kind):
    if kind == "zones":
        (x,), (y,) = rasterio.warp.transform("EPSG:4326", "EPSG:32660", [179.999], [-16.5])
        (u,), (v,) = rasterio.warp.transform("EPSG:4326", "EPSG:32601", [-179.999], [-16.5])
        boxes = (
            box_at(round(x, -1) - 450, round(y, -1), "EPSG:32660"),
            box_at(round(u, -1) - 150, round(v, -1), "EPSG:32601"),
        )
    else:
        boxes = (
            GeoBox((60, 60), Affine(1e-4, 0, 179.994, 0, -1e-4, -16.5), "EPSG:4326"),
            GeoBox((60, 60), Affine(1e-4, 0, -180, 0, -1e-4, -16.5), "EPSG:4326"),
        )
    scene = open_scene([image(tmp_path, f"i{n}", box, seed=n) for n, box in enumerate(boxes)])
    box = scene.geobox()
    assert max(box.shape) < 200
    assert box.crs.epsg in (32660, 32601, 32760, 32701)
    store = embed(scene, Means(), tmp_path / "e.zarr", **CUT)
    seen = np.isfinite(store.read()).all(-1)
    assert seen.mean() > 0.8
    assert seen[2:-2, 2:-2].all()
    item = json.loads(store.passport.read_text())
    west, south, east, north = item["bbox"]
    assert 179.9 < west <= 180
    assert -180 <= east < -179.9
    assert -16.6 < south < north < -16.4
    assert item["geometry"]["type"] == "MultiPolygon"
    shape = shapely.geometry.shape(item["geometry"])
    assert shape.is_valid
    assert shape.area < 1e-3

    area = read_area("179.997,-16.505,-179.998,-16.501")
    assert area.area == pytest.approx(0.005 * 0.004)
    part = embed(scene, Means(), tmp_path / "part.zarr", aoi="179.997,-16.505,-179.998,-16.501", **CUT)
    assert np.isfinite(part.read()).all(-1).sum() * 1600 == pytest.approx(0.005 * 0.004 * 110_600 * 106_800, rel=0.1)


@pytest.mark.parametrize(("lat", "epsg"), [(86.0, 5041), (-85.0, 5042), (83.9, 32631), (-79.9, 32731)])
def test_near_the_poles_the_grid_is_polar_stereographic(tmp_path, lat, epsg):
    lon_step = 1e-4 / math.cos(math.radians(lat))
    box = GeoBox((60, 60), Affine(lon_step, 0, 3.0, 0, -1e-4, lat), "EPSG:4326")
    scene = open_scene([image(tmp_path, "i", box)])
    assert scene.geobox().crs.epsg == epsg
    store = embed(scene, Means(), tmp_path / "e.zarr", **CUT)
    assert np.isfinite(store.read()).all(-1).mean() > 0.5
    x, y = store.box.affine @ (store.box.shape.x / 2, store.box.shape.y / 2)
    assert np.ravel(lonlat(store.box.crs, [x], [y])) == pytest.approx([3.0 + 30 * lon_step, lat - 0.003], abs=0.01)


def test_footprints_are_cut_at_the_antimeridian_and_drawn_around_poles():
    plain, bbox = footprint(box_at(500_000, 5e6, "EPSG:32633"))
    assert plain["type"] == "Polygon"
    assert len(plain["coordinates"][0]) == 5
    assert bbox[0] < bbox[2]
    assert shapely.geometry.shape(plain).exterior.is_ccw
    for crs, pole in (("EPSG:5041", 90), ("EPSG:5042", -90)):
        around, bbox = footprint(GeoBox((20, 20), Affine(1e4, 0, 1.9e6, 0, -1e4, 2.1e6), crs), per_side=8)
        shape = shapely.geometry.shape(around)
        assert shape.is_valid
        assert (bbox[0], bbox[2]) == (-180, 180)
        assert pole in bbox
        assert all(shape.covers(shapely.Point(lon, pole * 0.999)) for lon in range(-180, 181, 15))
        assert shape.area == pytest.approx(360 * 1.02, rel=0.15)


# Only what is wanted, only where there is something -------------------------------------------------------------------


def square(box, left, top, right, bottom, crs="EPSG:4326"):
    """A rectangle of a grid's pixels, in degrees."""
    corners = [box.affine @ c for c in ((left, top), (left, bottom), (right, bottom), (right, top))]
    return shapely.Polygon(zip(*lonlat(box.crs, *zip(*corners, strict=True)), strict=True))


def test_an_area_limits_the_work_and_changes_nothing_inside(tmp_path):
    box = box_at(500_000, 5e6, "EPSG:32633", 160)
    scene = open_scene([image(tmp_path, "i", box)])
    area = shapely.MultiPolygon([square(box, 11, 13, 35, 31), square(box, 101, 101, 131, 151)])
    whole, part = Means(), Means()
    a = embed(scene, whole, tmp_path / "whole.zarr", box=box, **CUT).read()
    b = embed(scene, part, tmp_path / "part.tif", box=box, aoi=area, **CUT).read()
    rows, cols = np.mgrid[:40, :40] * 4 + 2
    wanted = ((cols > 11) & (cols < 35) & (rows > 13) & (rows < 31)) | (
        (cols > 101) & (cols < 131) & (rows > 101) & (rows < 151)
    )
    np.testing.assert_array_equal(np.isfinite(b).all(-1), wanted)
    np.testing.assert_allclose(b[wanted], a[wanted], atol=1e-6)
    assert part.num_windows < 0.45 * whole.num_windows
    fitted = lay_grid(scene, 10, area=area)
    assert tuple(fitted.boundingbox) == pytest.approx((500_110, 5e6 - 1510, 501_310, 5e6 - 130), abs=11)
    assert lay_grid(scene, 10, area=area, crs=parse_crs("EPSG:3035")).crs.epsg == 3035


def test_images_outside_the_area_are_not_read(tmp_path):
    near, far = box_at(500_000, 5e6, "EPSG:32633"), box_at(501_000, 5e6, "EPSG:32633")
    scene = open_scene([image(tmp_path, "near", near), image(tmp_path, "far", far, absent=True)])
    seen = embed(scene, Means(), tmp_path / "e.zarr", box=scene.geobox(), aoi=square(near, 4, 4, 40, 40), **CUT).read()
    assert np.isfinite(seen).all(-1).sum() == 81
    assert seen.shape[1] == 40


def test_between_islands_nothing_is_read_or_encoded(tmp_path):
    islands = [box_at(500_000, 5e6, "EPSG:32633", 40), box_at(540_000, 4_970_000, "EPSG:32633", 40)]
    encoder, told = Means(), []
    scene = open_scene([image(tmp_path, f"i{n}", box) for n, box in enumerate(islands)])
    store = embed(
        scene, encoder, tmp_path / "e.zarr", progress=lambda *step: told.append(step), **CUT | {"tile_px": 512}
    )
    assert np.isfinite(store.read()).all(-1).sum() == 200
    assert math.prod(store.box.shape) > 700_000
    assert encoder.num_windows <= 32
    assert told[-1] == (told[-1][1],) * 2
    assert told[-1][1] <= 40, "only windows that images reach into are counted"


def test_bands_are_not_read_where_the_mask_shows_nothing(tmp_path):
    box = box_at(500_000, 5e6, "EPSG:32633")
    sea = image(tmp_path, "sea", box, absent=True, mask=np.zeros((1, *box.shape)))
    land = image(tmp_path, "land", box.translate_pix(60, 0), mask=np.ones((1, *box.shape)))
    scene = open_scene([sea, land])
    seen = embed(scene, Means(), tmp_path / "e.zarr", **CUT).read()
    assert np.isfinite(seen).all(-1).sum() == 225
    with pytest.raises(InputError, match=r"sea\.tif"):
        open_scene([sea], apply_masks=False).read("sentinel2_l2a", box)


def test_a_stopped_job_goes_on_to_the_same_seam_score(tmp_path):
    scene = open_scene([image(tmp_path, "i", box_at(500_000, 5e6, "EPSG:32633", 160))])

    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    whole, stopped = tmp_path / "whole.tif", tmp_path / "stopped.tif"
    embed(scene, Means(), whole, **CUT)
    with pytest.raises(KeyboardInterrupt):
        embed(scene, Means(), stopped, progress=stop, **CUT)
    assert not stopped.exists()
    embed(scene, Means(), stopped, **CUT)
    one, other = (read_seams(path.with_name(f"{path.name}.json")) for path in (whole, stopped))
    assert one == other
    assert one.num_across > 0
    assert whole.read_bytes() == stopped.read_bytes()
    apart = embed(scene, Means(), tmp_path / "apart.zarr", **CUT | {"overlap_px": 0})
    assert read_seams(apart.passport).ratio is not None


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("1,2,3", "there is no file 1,2,3; wanted polygons, or west,south,east,north in degrees"),
        ("10,50,10,51", "is none; wanted west,south,east,north"),
        ("0,0,1,1", "the scene shows nothing of the area"),
    ],
)
def test_areas_that_are_none_say_so(tmp_path, where, message):
    scene = open_scene([image(tmp_path, "i", box_at(500_000, 5e6, "EPSG:32633"))])
    with pytest.raises(InputError, match=message):
        embed(scene, Means(), tmp_path / "e.zarr", aoi=where, **CUT)


def test_grids_that_are_none_say_so(tmp_path):
    scene = open_scene([image(tmp_path, "i", box_at(500_000, 5e6, "EPSG:32633"))])
    for crs, message in (("EPSG:4326", "not in metres"), ("nowhere", "no coordinate reference system")):
        with pytest.raises(InputError, match=message):
            embed(scene, Means(), tmp_path / "e.zarr", crs=crs, **CUT)
    with pytest.raises(InputError, match="a box has its own CRS"):
        embed(scene, Means(), tmp_path / "e.zarr", crs="EPSG:3035", box=scene.geobox(), **CUT)


def test_the_command_line_takes_an_area_and_a_crs(tmp_path, capsys):
    box = box_at(500_000, 5e6, "EPSG:32633", 64)
    save_scene(tmp_path, [image(tmp_path, "i", box)], "One image", None)
    (tmp_path / "area.geojson").write_text(json.dumps(shapely.geometry.mapping(square(box, 8, 8, 40, 40))))
    out = tmp_path / "e.zarr"
    words = [str(tmp_path), "--model", "olmoearth-v1.2-nano", "--random", "0", "--out", str(out)]
    assert main(["embed", *words, "--aoi", str(tmp_path / "area.geojson"), "--crs", "EPSG:3035", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["seams"]["threshold"] == 1.2
    store = open_embeddings(out)
    assert store.box.crs.epsg == 3035
    assert np.isfinite(store.read()).all(-1).sum() == pytest.approx(64, abs=12)


def a_probe():
    """A probe of values: the first band."""
    tensors = {"mean": torch.zeros(13), "scale": torch.ones(13), "weight": torch.eye(13)[:, :1], "bias": torch.zeros(1)}
    source = FeatureSource(encoder="means", patch_m=40, modalities=Means.modalities, window_px=16)
    return Probe(kind="ridge", task="values", classes=(), tensors=tensors, source=source)


def values_of(path):
    with rasterio.open(path) as file:
        return file.read(1), file.transform


@pytest.mark.parametrize(("name", "dtype", "needed"), [("e.zarr", "int8", 30 + 104), ("e.tif", "float32", 25 * 20)])
def test_a_map_of_stored_embeddings_is_cut_to_an_area(tmp_path, name, dtype, needed):
    """Of each block, 12 patches of the store or all of the GeoTIFF, the rectangle around what is inside is read."""
    box = box_at(500_000, 5e6, "EPSG:32633", 160)
    store = embed(open_scene([image(tmp_path, "i", box)]), Means(), tmp_path / name, dtype=dtype, **CUT)
    area = shapely.MultiPolygon([square(box, 51, 53, 75, 71), square(box, 101, 101, 131, 151)])
    read = []

    def fetch(window):
        read.append(window)
        return store._fetch(window)

    whole, _ = values_of(make_map(store, a_probe(), tmp_path / "whole.tif").path)
    made = make_map(replace(store, _fetch=fetch), a_probe(), tmp_path / "part.tif", aoi=area)
    part, transform = values_of(made.path)
    rows, cols = np.mgrid[13:38, 12:33]
    x, y = cols * 4 + 2, rows * 4 + 2
    inside = ((x > 51) & (x < 75) & (y > 53) & (y < 71)) | ((x > 101) & (x < 131) & (y > 101) & (y < 151))
    assert part.shape == inside.shape
    assert (transform.c, transform.f) == (500_000 + 12 * 40, 5e6 - 13 * 40)
    np.testing.assert_array_equal(part, np.where(inside, whole[13:38, 12:33], np.nan))
    assert sum(w.height * w.width for w in read) == needed
    assert made.area_km2 == pytest.approx((24 * 18 + 30 * 50) * 100 / 1e6, rel=1e-3)
    told = json.loads(made.passport.read_text())["properties"]
    assert len(told["panterra:options"]["area"]) == 64
    with pytest.raises(InputError, match=r"part\.tif exists"):
        make_map(store, a_probe(), tmp_path / "part.tif", aoi=square(box, 51, 53, 75, 71))


def test_a_map_of_stored_embeddings_is_cut_to_a_box(tmp_path):
    box = box_at(500_000, 5e6, "EPSG:32633", 160)
    store = embed(open_scene([image(tmp_path, "i", box)]), Means(), tmp_path / "e.zarr", **CUT)
    whole, _ = values_of(make_map(store, a_probe(), tmp_path / "whole.tif").path)
    part, _ = values_of(make_map(store, a_probe(), tmp_path / "part.tif", box=box[20:101, 30:120]).path)
    np.testing.assert_array_equal(part, whole[5:26, 7:30])
    # Blocks are 12 patches: the first border inside is at row 12 of the store, so at row 7 of the part.
    cut = store.part(Window(row=5, col=7, height=21, width=23), lambda window: np.ones((21, 23), bool))
    assert cut.offset == (5, 7)
    seams = [read_seams(tmp_path / f"{name}.tif.json") for name in ("whole", "part")]
    assert seams[0].num_across == 2 * 3 * 40
    assert seams[1].num_across == 2 * 23 + 2 * 21


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"crs": "EPSG:3035"}, "stored embeddings keep the grid they were made on"),
        ({"model": Means()}, "need no encoder; leave out model"),
        ({"aoi": "0,0,1,1"}, "the embeddings show nothing of the area"),
        (
            {"box": box_at(500_000, 5e6, "EPSG:32632")},
            "the box is in EPSG:32632, the embeddings are in WGS 84 / UTM zone 33N",
        ),
    ],
)
def test_what_stored_embeddings_cannot_do_is_told(tmp_path, given, message):
    scene = open_scene([image(tmp_path, "i", box_at(500_000, 5e6, "EPSG:32633", 40))])
    store = embed(scene, Means(), tmp_path / "e.zarr", **CUT)
    with pytest.raises(InputError, match=message):
        make_map(store, a_probe(), tmp_path / "m.tif", **given)


@pytest.mark.parametrize("name", ["e.zarr", "e.tif"])
def test_parts_without_what_the_seam_score_needs_are_told_of(tmp_path, name):
    scene = open_scene([image(tmp_path, "i", box_at(500_000, 5e6, "EPSG:32633", 160))])

    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(scene, Means(), tmp_path / name, progress=stop, **CUT)
    for path in (tmp_path / f"{name}.parts").glob("tile_*"):
        save_file({key: value for key, value in load_file(path).items() if "seam" not in key}, path)
    with pytest.raises(InputError, match=r"holds tiles of an earlier version of panterra.*remove that folder"):
        embed(scene, Means(), tmp_path / name, **CUT)
