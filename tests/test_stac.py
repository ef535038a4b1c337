import datetime as dt
import functools
import json
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyproj
import pystac
import pytest
import torch
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.imagery.items import CONVERSIONS, MASKS, SceneAsset, SceneBand
from panterra.imagery.raster import write_cog
from panterra.imagery.stac import make_item, modality_grid, open_scene, parse_item, pixel_metres, save_scene
from panterra.modalities import MODALITIES

BOX = GeoBox((40, 50), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")
S2 = MODALITIES["sentinel2_l2a"]
DAYS = ("2023-04-15", "2023-06-01")


def s2_pixels(seed, box=BOX):
    return np.random.default_rng(seed).integers(1, 5000, (12, *box.shape)).astype("uint16")


@pytest.fixture
def folder(tmp_path):
    """A scene of two Sentinel-2 dates, one with clouds, and a photograph four times finer."""
    items = []
    for seed, day in enumerate(DAYS):
        path = write_cog(tmp_path / f"{day}.tif", s2_pixels(seed), BOX, nodata=0)
        items.append(make_item(f"s2-{day}", "sentinel2_l2a", day, BOX, {"data": path}))
    classes = np.full(BOX.shape, 4, "uint8")
    classes[:4, :12] = np.arange(12)
    items[1].add_asset("scl", pystac.Asset(href=str(write_cog(tmp_path / "scl.tif", classes, BOX))))
    fine = BOX.zoom_out(0.25)
    photo = np.random.default_rng(9).integers(1, 255, (4, *fine.shape)).astype("uint8")
    items.append(
        make_item("photo", "naip_10", "2020-07-01", fine, {"image": write_cog(tmp_path / "n.tif", photo, fine)})
    )
    save_scene(tmp_path, items, "Two dates", "CC0-1.0")
    return tmp_path


# Our own scenes -------------------------------------------------------------------------------------------------------


def test_a_scene_comes_back_as_it_was_written(folder):
    scene = open_scene(folder)
    assert scene.modalities == ("sentinel2_l2a", "naip_10")
    assert scene.dates("sentinel2_l2a") == tuple(dt.date.fromisoformat(day) for day in DAYS)
    assert (scene.title, scene.licence, scene.unsupported) == ("Two dates", "CC0-1.0", ())
    assert scene.geobox() == BOX
    assert scene.geobox(modality="naip_10", resolution=2.5) == BOX.zoom_out(0.25)
    seen = scene.read("sentinel2_l2a", BOX[10:30, 5:45])
    for step in range(2):
        np.testing.assert_array_equal(seen.pixels[0, step], s2_pixels(step)[:, 10:30, 5:45])
    assert seen.valid.all()
    assert seen.dates.tolist() == [[19462, 19509]]


def test_hrefs_are_relative_and_the_folder_can_move(folder, tmp_path_factory):
    stored = json.loads((folder / "scene.json").read_text())
    assert {a["href"] for f in stored["features"] for a in f["assets"].values()} == {
        *(f"{day}.tif" for day in DAYS),
        "scl.tif",
        "n.tif",
    }
    moved = folder.rename(tmp_path_factory.mktemp("elsewhere") / "scene")
    for where in (moved, moved / "scene.json", str(moved)):
        assert open_scene(where).read("naip_10", BOX).valid.all()


def test_scene_json_is_valid_stac(folder):
    items = pystac.ItemCollection.from_file(str(folder / "scene.json"))
    assert [item.id for item in items] == ["s2-2023-04-15", "s2-2023-06-01", "photo"]
    west, south, east, north = items[0].bbox
    assert west < 15.001 < east
    assert south < 45.152 < north
    assert items[0].properties["proj:code"] == "EPSG:32633"


def test_writing_twice_gives_the_same_bytes(folder):
    before = (folder / "scene.json").read_bytes()
    items = list(pystac.ItemCollection.from_file(str(folder / "scene.json")))
    save_scene(folder, items, "Two dates", "CC0-1.0")
    assert (folder / "scene.json").read_bytes() == before


def test_items_and_dicts_open_as_well(folder):
    path = folder / "scene.json"
    absolute = json.loads(path.read_text())["features"]
    for feature in absolute:
        for asset in feature["assets"].values():
            asset["href"] = str(folder / asset["href"])
    expected = open_scene(folder).read("sentinel2_l2a", BOX).pixels
    (folder / "one.json").write_text(json.dumps(absolute[0]))
    as_items = [pystac.Item.from_dict(feature) for feature in absolute]
    for given in (
        absolute,
        as_items,
        pystac.ItemCollection(as_items),
        {"type": "FeatureCollection", "features": absolute},
    ):
        np.testing.assert_array_equal(open_scene(given).read("sentinel2_l2a", BOX).pixels, expected)
    for given in (folder / "one.json", absolute[0], as_items[0]):
        assert len(open_scene(given).items) == 1


def test_batch_holds_place_pixel_size_and_finer_modalities(folder):
    batch = open_scene(folder).batch(BOX[8:24, 16:32])
    assert batch.pixel_m == 10
    assert {name: tuple(o.pixels.shape) for name, o in batch.observations.items()} == {
        "sentinel2_l2a": (1, 2, 12, 16, 16),
        "naip_10": (1, 1, 4, 64, 64),
    }
    assert batch.lonlat.dtype == torch.float64
    place = pyproj.Transformer.from_crs(32633, 4326, always_xy=True).transform(500000 + 240, 5000000 - 160)
    np.testing.assert_allclose(batch.lonlat[0], place, atol=1e-9)
    assert list(open_scene(folder).batch(BOX, modalities=["naip_10", "sentinel1"]).observations) == ["naip_10"]


def test_a_coarser_box_gives_coarser_pixels(folder):
    box = BOX.zoom_out(2)
    batch = open_scene(folder).batch(box)
    assert batch.pixel_m == 20
    assert batch.observations["naip_10"].pixels.shape[-2:] == (80, 100)
    blocks = s2_pixels(0).reshape(12, 20, 2, 25, 2).mean((2, 4))
    np.testing.assert_allclose(batch.observations["sentinel2_l2a"].pixels[0, 0], blocks, rtol=1e-5)


def test_beyond_the_scene_nothing_is_valid(folder):
    scene = open_scene(folder)
    wide = scene.batch(BOX.pad(8)).observations["sentinel2_l2a"]
    assert wide.valid[0, 0].sum() == 40 * 50
    far = GeoBox((8, 8), Affine(10, 0, 700000, 0, -10, 5000000), BOX.crs)
    nothing = scene.read("sentinel2_l2a", far)
    assert nothing.pixels.shape == (1, 2, 12, 8, 8)
    assert not nothing.valid.any()


def test_threads_read_the_same(folder):
    scene = open_scene(folder)
    windows = [(slice(r, r + 8), slice(c, c + 8)) for r in range(0, 40, 8) for c in range(0, 48, 8)] * 3
    whole = scene.read("sentinel2_l2a", BOX)

    def read(window):
        return scene.read("sentinel2_l2a", BOX[window])

    with ThreadPoolExecutor(8) as pool:
        for (rows, cols), part in zip(windows, pool.map(read, windows), strict=True):
            np.testing.assert_array_equal(part.pixels, whole.pixels[..., rows, cols])
            np.testing.assert_array_equal(part.valid, whole.valid[..., rows, cols])


# Masks, gaps and mosaics ----------------------------------------------------------------------------------------------


def test_cloud_shadow_and_nodata_classes_are_invalid_unless_turned_off(folder):
    seen = open_scene(folder).read("sentinel2_l2a", BOX).valid[0]
    assert seen[0].all()
    usable = [False, False, True, False, True, True, True, True, False, False, False, True]
    assert seen[1, 0, :12].tolist() == usable
    assert seen[1, 4:].all()
    assert open_scene(folder, apply_masks=False).read("sentinel2_l2a", BOX).valid.all()


def test_own_valid_asset_is_honoured(tmp_path):
    shown = np.random.default_rng(0).random(BOX.shape) > 0.4
    item = make_item(
        "a",
        "srtm",
        "2000-02-11",
        BOX,
        {
            "srtm": write_cog(tmp_path / "d.tif", np.full(BOX.shape, 300, "int16"), BOX),
            "valid": write_cog(tmp_path / "v.tif", shown.astype("uint8"), BOX),
        },
    )
    np.testing.assert_array_equal(open_scene([item]).read("srtm", BOX).valid[0, 0], shown)


def test_bands_may_be_listed_in_another_order_than_in_the_file(tmp_path):
    pixels = s2_pixels(3)
    path = write_cog(tmp_path / "a.tif", pixels, BOX)
    bands = tuple(SceneBand(name=name, index=i) for i, name in reversed(list(enumerate(S2.band_names, 1))))
    item = make_item("a", "sentinel2_l2a", "2023-01-01", BOX, {"data": SceneAsset(href=str(path), bands=bands)})
    seen = open_scene([item]).read("sentinel2_l2a", BOX)
    np.testing.assert_array_equal(seen.pixels[0, 0], pixels)


def test_items_of_one_date_are_mosaicked_first_valid_first(tmp_path):
    items, layers = [], []
    for number, (value, columns) in enumerate(((100, slice(0, 30)), (200, slice(20, 50)))):
        pixels = np.zeros((12, *BOX.shape), "uint16")
        pixels[:, :, columns] = value
        layers.append(pixels)
        path = write_cog(tmp_path / f"{number}.tif", pixels, BOX, nodata=0)
        items.append(make_item(f"i{number}", "sentinel2_l2a", "2023-01-01", BOX, {"data": path}))
    seen = open_scene(items).read("sentinel2_l2a", BOX)
    assert seen.pixels.shape[1] == 1
    np.testing.assert_array_equal(seen.pixels[0, 0], np.where(layers[0] > 0, layers[0], layers[1]))
    assert seen.valid.all()
    backwards = open_scene(items[::-1]).read("sentinel2_l2a", BOX)
    np.testing.assert_array_equal(backwards.pixels[0, 0], np.where(layers[1] > 0, layers[1], layers[0]))


def test_a_pixel_is_valid_only_where_every_band_is(tmp_path):
    pixels = s2_pixels(0)
    pixels[3, 5, 6], pixels[7, 8, 9] = 0, 0
    item = make_item("a", "sentinel2_l2a", "2023-01-01", BOX, {"data": write_cog(tmp_path / "a.tif", pixels, BOX)})
    item.assets["data"].extra_fields["bands"][3]["nodata"] = 0
    seen = open_scene([item]).read("sentinel2_l2a", BOX).valid[0, 0]
    assert (~seen).nonzero().tolist() == [[5, 6]]


def test_a_still_image_is_one_mosaic_the_newest_first(tmp_path):
    items = []
    for year, columns in ((2019, slice(0, 40)), (2021, slice(0, 20)), (2020, slice(10, 50))):
        codes = np.zeros(BOX.shape, "uint8")
        codes[:, columns] = year - 2000
        path = write_cog(tmp_path / f"{year}.tif", codes, BOX, nodata=0)
        items.append(make_item(str(year), "worldcover", f"{year}-01-01", BOX, {"B1": path}))
    scene = open_scene(items)
    assert scene.dates("worldcover") == (dt.date(2021, 1, 1),)
    seen = scene.read("worldcover", BOX)
    assert seen.pixels[0, 0, 0, 0].tolist() == [21.0] * 20 + [20.0] * 30


def test_files_of_other_resolution_and_projection_come_onto_the_grid(tmp_path):
    """A plane over the ground must stay that plane whatever the grid of its file, but for half a coarse pixel."""

    def plane(box):
        rows, cols = np.mgrid[: box.shape.y, : box.shape.x] + 0.5
        return (
            (box.affine.a * cols + box.affine.c - 500000) * 2 + (5000000 - box.affine.e * rows - box.affine.f)
        ).astype("float32")

    coarse = GeoBox((30, 35), Affine(20, 0, 499900, 0, -20, 5000100), BOX.crs)
    files = {
        "vv": write_cog(tmp_path / "vv.tif", plane(coarse), coarse),
        "vh": write_cog(tmp_path / "vh.tif", plane(BOX), BOX),
    }
    item = make_item("a", "sentinel1", "2023-01-01", BOX, files)
    seen = open_scene([item]).read("sentinel1", BOX)
    assert seen.valid.all()
    np.testing.assert_allclose(seen.pixels[0, 0, 0], plane(BOX), atol=1e-2)
    np.testing.assert_array_equal(seen.pixels[0, 0, 1], plane(BOX))


@pytest.mark.parametrize(
    ("kind", "usable", "unusable"),
    [
        ("scl", [2, 4, 5, 6, 7, 11], [0, 1, 3, 8, 9, 10]),
        # Clear land, water and snow of Landsat's QA_PIXEL; then fill, dilated cloud, cirrus, cloud, cloud shadow.
        ("qa_pixel", [21824, 21952, 30048], [1, 21826, 54596, 22280, 23888]),
        ("fmask", [1, 4, 5], [0, 2, 3]),
        ("palsar", [50, 255], [0, 100, 150]),
        ("valid", [1, 255], [0]),
    ],
)
def test_codes_of_masks(kind, usable, unusable):
    assert MASKS[kind](np.array(usable, "float32")).all()
    assert not MASKS[kind](np.array(unusable, "float32")).any()


# Units and bands ------------------------------------------------------------------------------------------------------


def test_scale_offset_and_unit_of_a_band_lead_to_the_declared_unit(tmp_path):
    power = np.random.default_rng(0).uniform(1e-4, 2, BOX.shape).astype("float32")
    decibel = (np.random.default_rng(1).uniform(-25, 0, BOX.shape) * 1e4).astype("int32")
    item = make_item(
        "a",
        "sentinel1",
        "2023-01-01",
        BOX,
        {
            "a": SceneAsset(
                href=str(write_cog(tmp_path / "a.tif", power, BOX)), bands=(SceneBand(name="vv", unit="linear"),)
            ),
            "b": SceneAsset(
                href=str(write_cog(tmp_path / "b.tif", decibel, BOX, nodata=-(2**31))),
                bands=(SceneBand(name="vh", scale=1e-4, unit="db"),),
            ),
        },
    )
    assert any("stac-extensions.github.io/raster/" in named for named in item.stac_extensions)
    pixels = open_scene([item]).read("sentinel1", BOX).pixels[0, 0].numpy()
    np.testing.assert_allclose(pixels[0], 10 * np.log10(power.astype("float64")), atol=1e-5)
    np.testing.assert_allclose(pixels[1], decibel / 1e4, rtol=1e-6)


@pytest.mark.parametrize(
    ("units", "raw", "declared"),
    [
        (("linear", "db"), [1, 0.1, 0], [0, -10, -100]),
        (("amplitude", "db"), [1, 10, 1e-6], [0, 20, -100]),
        (("reflectance", "reflectance_1e4"), [0.1, -0.01], [1000, -100]),
        (("fraction", "percent"), [0.25], [25]),
        (("percent", "fraction"), [25], [0.25]),
    ],
)
def test_conversions(units, raw, declared):
    np.testing.assert_allclose(CONVERSIONS[units](np.array(raw, "float32")), declared, rtol=1e-6, atol=1e-5)


def test_index_and_order_of_bands_in_files_do_not_matter(tmp_path):
    pixels = s2_pixels(3)
    shuffled = [7, 2, 11, 0, 5, 1, 3, 4, 6, 8, 10, 9]
    path = write_cog(tmp_path / "a.tif", np.concatenate([pixels[:1], pixels[shuffled]]), BOX)
    bands = tuple(SceneBand(name=S2.band_names[n], index=i) for i, n in enumerate(shuffled, start=2))
    notes = {"data": SceneAsset(href=str(path), bands=(SceneBand(name="other"), *bands))}
    item = make_item("a", "sentinel2_l2a", "2023-01-01", BOX, notes)
    np.testing.assert_array_equal(open_scene([item]).read("sentinel2_l2a", BOX).pixels[0, 0], pixels)


def test_absent_bands_are_filled_by_their_neighbour_or_refused(tmp_path):
    bands = {name: s2_pixels(i)[0] for i, name in enumerate(S2.band_names) if name not in ("B01", "B09", "B8A")}
    files = {name: write_cog(tmp_path / f"{name}.tif", pixels, BOX) for name, pixels in bands.items()}
    item = make_item("a", "sentinel2_l2a", "2023-01-01", BOX, files)
    scene = open_scene([item])
    assert scene.missing_bands("sentinel2_l2a") == ("B8A", "B01", "B09")
    pixels = scene.read("sentinel2_l2a", BOX).pixels[0, 0].numpy()
    for absent, stand_in in (("B01", "B02"), ("B8A", "B08"), ("B09", "B08")):
        np.testing.assert_array_equal(pixels[S2.band_names.index(absent)], bands[stand_in])
    with pytest.raises(InputError, match="item a lacks B8A, B01, B09 of sentinel2_l2a"):
        open_scene([item], fill_missing_bands=False).read("sentinel2_l2a", BOX)
    del item.assets["B04"]
    with pytest.raises(InputError, match=r"lacks B04 of sentinel2_l2a, .* or leave sentinel2_l2a out"):
        open_scene([item]).read("sentinel2_l2a", BOX)


@pytest.mark.parametrize("modality", MODALITIES)
def test_modality_grid_covers_the_same_ground(modality):
    grid = modality_grid(MODALITIES[modality], BOX)
    np.testing.assert_allclose(grid.boundingbox, BOX.boundingbox)
    if MODALITIES[modality].kind in ("still", "series"):
        assert grid.shape.x == round(50 * max(10 / MODALITIES[modality].gsd, 1))


def test_pixel_size_is_in_metres():
    assert pixel_metres(BOX.zoom_out(4)) == 40
    feet = GeoBox((4, 4), Affine(10, 0, 6e6, 0, -10, 2e6), "EPSG:2229")
    assert pixel_metres(feet) == pytest.approx(3.048, rel=1e-5)
    with pytest.raises(InputError, match="give one in a projected CRS"):
        pixel_metres(GeoBox((4, 4), Affine(1e-4, 0, 15, 0, -1e-4, 45), "EPSG:4326"))


def test_geobox_of_geographic_files_is_in_their_utm_zone(tmp_path):
    degrees = GeoBox((60, 80), Affine(1e-4, 0, -60.3, 0, -1e-4, -3.1), "EPSG:4326")
    path = write_cog(tmp_path / "a.tif", np.ones((12, *degrees.shape), "uint16"), degrees)
    item = make_item("a", "sentinel2_l2a", "2023-01-01", degrees, {"data": path})
    box = open_scene([item]).geobox()
    assert box.crs.epsg == 32720
    assert (box.affine.a, box.affine.c % 10, box.affine.f % 10) == (10, 0, 0)
    assert open_scene([item]).read("sentinel2_l2a", box).valid.float().mean() > 0.9


def test_geobox_unites_items_and_keeps_the_native_lattice(tmp_path):
    shifted = GeoBox((10, 10), Affine(30, 0, 500615, 0, -30, 5000015), BOX.crs)
    items = [
        make_item("a", "landsat", "2023-01-01", shifted, {"data": tmp_path / "unread.tif"}),
        make_item("b", "landsat", "2023-01-01", shifted.translate_pix(20, 5), {"data": tmp_path / "unread.tif"}),
    ]
    scene = open_scene(items)
    box = scene.geobox()
    assert tuple(box.boundingbox) == (500615, 5000015 - 450, 500615 + 900, 5000015)
    assert scene.geobox(30).shape == (15, 30)
    other_zone = GeoBox((5, 5), Affine(30, 0, 28500, 0, -30, 5017400), "EPSG:32634")
    elsewhere = make_item("c", "landsat", "2023-01-01", other_zone, {"data": tmp_path / "unread.tif"})
    assert open_scene([*items, elsewhere]).geobox().crs == BOX.crs


# Over the network -----------------------------------------------------------------------------------------------------


class RangeHandler(BaseHTTPRequestHandler):
    """Static files with byte ranges, which http.server lacks."""

    def __init__(self, *args, folder, log):
        self.folder, self.log = folder, log
        super().__init__(*args)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.folder / urllib.parse.unquote(self.path.lstrip("/"))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        start, stop = 0, len(content)
        asked = self.headers.get("Range")
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last or stop) + 1, stop)
        self.log.append((path.name, stop - start if self.command == "GET" else 0))
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:stop])

    def log_message(self, *args):
        pass


@contextmanager
def serving(folder):
    log = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(RangeHandler, folder=folder, log=log))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_scene_over_http_is_the_same_scene(folder):
    here = open_scene(folder).batch(BOX)
    with serving(folder) as (address, _):
        for given in (address, f"{address}/scene.json"):
            there = open_scene(given).batch(BOX)
            for name, seen in here.observations.items():
                np.testing.assert_array_equal(there.observations[name].pixels, seen.pixels)
                np.testing.assert_array_equal(there.observations[name].valid, seen.valid)


def test_over_http_only_the_needed_part_is_fetched(tmp_path):
    big = GeoBox((2048, 2048), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")
    pixels = np.random.default_rng(0).normal(size=big.shape).astype("float32")
    item = make_item("a", "srtm", "2000-02-11", big, {"srtm": write_cog(tmp_path / "d.tif", pixels, big)})
    save_scene(tmp_path, [item], "t", None)
    size = (tmp_path / "d.tif").stat().st_size
    with serving(tmp_path) as (address, log):
        seen = open_scene(address).read("srtm", big[600:700, 600:700])
    np.testing.assert_array_equal(seen.pixels[0, 0, 0], pixels[600:700, 600:700])
    assert sum(sent for name, sent in log if name == "d.tif") < size / 4


def test_what_the_network_lacks_gives_one_line(folder):
    (folder / "scl.tif").unlink()
    with serving(folder) as (address, _):
        with pytest.raises(InputError, match=r"cannot read http://127.*scl\.tif"):
            open_scene(address).read("sentinel2_l2a", BOX)
        with pytest.raises(InputError, match=r"cannot fetch .*nothing\.json: Not Found"):
            open_scene(f"{address}/nothing.json")
    with pytest.raises(InputError, match="cannot fetch"):
        open_scene(address)


# Messages -------------------------------------------------------------------------------------------------------------


def test_what_is_no_scene_gives_one_line(tmp_path):
    (tmp_path / "c.json").write_text('{"type": "Collection"}')
    (tmp_path / "bad.json").write_text("{")
    for given, message in (
        (tmp_path, "there is no .*scene.json"),
        (tmp_path / "none", "there is no .*none"),
        (tmp_path / "c.json", "is a Collection; wanted a STAC Item or ItemCollection"),
        (tmp_path / "bad.json", "is not a STAC Item"),
        ([], "holds no item of any modality"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            open_scene(given)
        assert "\n" not in str(caught.value)


def test_wrong_questions_give_one_line(folder):
    scene = open_scene(folder)
    with pytest.raises(InputError, match="the scene has no sentinel1; it holds sentinel2_l2a, naip_10"):
        scene.read("sentinel1", BOX)
    with pytest.raises(InputError, match="none of the wanted sentinel1"):
        scene.batch(BOX, modalities=["sentinel1"])
    with pytest.raises(InputError, match="no modality 'sentinel3'"):
        open_scene(folder, modalities=["sentinel3"])
    with pytest.raises(InputError, match="holds no item of sentinel1"):
        open_scene(folder, modalities=["sentinel1"])
    assert open_scene(folder, modalities=["naip_10"]).modalities == ("naip_10",)


def own_item(**changes):
    raw = make_item("a", "sentinel1", "2023-01-01", BOX, {"data": "a.tif"}).to_dict()
    raw["properties"] |= changes.get("properties", {})
    raw["assets"]["data"]["bands"][0] |= changes.get("band", {})
    return raw


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"properties": {"panterra:modality": "sentinel9"}}, "unknown modality 'sentinel9'"),
        ({"properties": {"datetime": None}}, "has the date None; wanted one like"),
        ({"band": {"unit": "kelvin"}}, "'kelvin'; sentinel1 can be read from db, linear, amplitude"),
    ],
)
def test_items_that_contradict_themselves_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        parse_item(own_item(**changes))


def test_nodata_that_json_cannot_say_comes_back(tmp_path):
    values = np.full(BOX.shape, 3, "float32")
    asset = SceneAsset(href=str(tmp_path / "a.tif"), bands=(SceneBand(name="srtm", nodata=np.nan),))
    write_cog(tmp_path / "a.tif", values, BOX)
    save_scene(tmp_path, [make_item("a", "srtm", "2000-01-01", BOX, {"data": asset})], "t", None)
    json.loads((tmp_path / "scene.json").read_text(), parse_constant=pytest.fail)
    band = open_scene(tmp_path).items[0].assets[0].bands[0]
    assert np.isnan(band.nodata)
    assert (band.name, band.unit, band.scale) == ("srtm", "metres", None)


def test_bands_of_another_name_are_left_out_and_named():
    item = make_item("a", "sentinel1", "2023-01-01", BOX, {"data": "a.tif"})
    item.assets["data"].extra_fields["bands"].append({"name": "angle"})
    assert parse_item(item.to_dict()).decisions == ("not bands of sentinel1, left out: angle",)


def test_one_bad_item_does_not_spoil_a_scene(folder):
    stored = json.loads((folder / "scene.json").read_text())
    stored["features"].append(
        {"type": "Feature", "id": "x", "properties": {}, "collection": "aster", "assets": {"a": {}}}
    )
    (folder / "scene.json").write_text(json.dumps(stored))
    scene = open_scene(folder)
    assert len(scene.items) == 3
    assert [line[:32] for line in scene.unsupported] == ["item x is of collection 'aster',"]


# Other people's items -------------------------------------------------------------------------------------------------

S2_BANDS = {"B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"}
SR_BANDS = {"B2", "B3", "B4", "B5", "B6", "B7"}

# What was decided for each real item: modality, bands, mask, offset that is added to its digital numbers.
DECIDED = {
    "earthsearch__cop-dem-glo-30__Copernicus_DSM_COG_10_S90_00_W171_00_DEM": ("srtm", {"srtm"}, None, 0),
    "earthsearch__cop-dem-glo-30__Copernicus_DSM_COG_10_S90_00_W172_00_DEM": ("srtm", {"srtm"}, None, 0),
    "earthsearch__landsat-c2-l2__LC08_L2SP_033032_20231008_02_T1": ("hls", SR_BANDS, "qa_pixel", -2000),
    # Level 1C of baseline 05.11: as ESA delivers it.
    "earthsearch__sentinel-2-l1c__S2B_20EPT_20250731_0_L1C": ("sentinel2", S2_BANDS | {"B10"}, None, -1000),
    # Baselines 05.09 and 05.11, but earthsearch:boa_offset_applied.
    "earthsearch__sentinel-2-l2a__S2A_13TDE_20231008_0_L2A": ("sentinel2_l2a", S2_BANDS, "scl", 0),
    "earthsearch__sentinel-2-l2a__S2B_20EPT_20250731_0_L2A": ("sentinel2_l2a", S2_BANDS, "scl", 0),
    "odcstac__LC08_L2SP_028030_20200114_20200824_02_T1_SR": ("hls", SR_BANDS, "qa_pixel", -2000),
    # Baseline 02.14, from the product's name.
    "odcstac__S2A_28QCH_20200714_0_L2A": ("sentinel2_l2a", S2_BANDS, "scl", 0),
    # Baseline 02.12.
    "odcstac__S2B_MSIL2A_20190629T212529_R043_T06VVN_20201006T080531_raster_ext": ("sentinel2_l2a", S2_BANDS, "scl", 0),
    "odcstac__ga_ls8c_ard_3-1-0_088080_2020-05-25_final.stac-item": ("hls", SR_BANDS, "fmask", 0),
    "pc__landsat-8-c2-l2__LC08_L2SP_044034_20160830_02_T1": ("hls", SR_BANDS, "qa_pixel", -2000),
    "pc__landsat-8-c2-l2__LC08_L2SP_044034_20160915_02_T1": ("hls", SR_BANDS, "qa_pixel", -2000),
    "pc__landsat-c2-l2__LC09_L2SP_084068_20250722_02_T2": ("hls", SR_BANDS, "qa_pixel", -2000),
    "pc__landsat-c2-l2__LC09_L2SP_084069_20250722_02_T2": ("hls", SR_BANDS, "qa_pixel", -2000),
    "pc__naip__fl_m_2608004_nw_17_060_20191215_20200113": ("naip_10", {"R", "G", "B", "IR"}, None, 0),
    "pc__naip__id_m_4611606_ne_11_060_20231117_20240103": ("naip_10", {"R", "G", "B", "IR"}, None, 0),
    "pc__sentinel-2-l2a__S2A_MSIL2A_20190101T000001_R116_T58UFE_20201007T214651": ("sentinel2_l2a", S2_BANDS, "scl", 0),
    "pc__sentinel-2-l2a__S2A_MSIL2A_20190101T000001_R116_T58UFF_20201007T214659": ("sentinel2_l2a", S2_BANDS, "scl", 0),
    "pc__sentinel-2-l2a__S2A_MSIL2A_20190101T000001_R116_T58UFG_20201007T214655": ("sentinel2_l2a", S2_BANDS, "scl", 0),
}
GRD = "sentinel-1-grd is uncalibrated amplitude on a slanted grid; take sentinel-1-rtc"
REFUSED = {
    "earthsearch__sentinel-1-grd__S1A_IW_GRDH_1SSH_20250731T135608_20250731T135637_060328_077F7E": GRD,
    "earthsearch__sentinel-1-grd__S1A_IW_GRDH_1SSH_20250731T135637_20250731T135702_060328_077F7E": GRD,
    "earthsearch__sentinel-2-c1-l2a__S2A_T13TDE_20250711T175745_L2A": "has no assets",
    "earthsearch__sentinel-2-c1-l2a__S2A_T13TDE_20250718T175132_L2A": "has no assets",
    "odcstac__LE07_L2SP_044033_20210329_20210424_02_T1_SR": "is surface reflectance of an older Landsat",
    "pc__aster-l1t__AST_L1T_00312272006013647_20150517144406": "collection 'aster-l1t', which is not known",
}


def real_item(data_dir, name):
    return json.loads((data_dir / "stac_items" / "items" / f"{name}.json").read_text())


@pytest.mark.data
def test_every_real_item_is_decided(data_dir):
    names = {path.name.removesuffix(".json") for path in (data_dir / "stac_items" / "items").iterdir()}
    assert names == {*DECIDED, *REFUSED}


@pytest.mark.data
@pytest.mark.parametrize("name", DECIDED)
def test_real_items_are_understood(data_dir, name):
    raw = real_item(data_dir, name)
    item = parse_item(raw)
    modality, bands, mask, offset = DECIDED[name]
    assert (item.modality, set(item.bands), item.mask and item.mask[1]) == (modality, bands, mask)
    assert len(item.bands) == len(bands)
    found = [band for asset in item.assets for band in asset.bands]
    assert {band.offset for band in found} == {offset}
    scale = 0.275 if mask == "qa_pixel" else 1
    assert {band.scale for band in found} == {scale}
    if not name.startswith(("pc__naip", "odcstac__ga")):
        assert {band.nodata for band in found} == {-32768 if modality == "srtm" else 0}
    assert str(item.date) == raw["properties"]["datetime"][:10]
    assert item.grid is not None
    assert item.grid.crs.epsg == raw["properties"]["proj:epsg"]
    assert bool(item.decisions) == modality.startswith("sentinel2")


@pytest.mark.data
@pytest.mark.parametrize("name", REFUSED)
def test_real_items_that_cannot_be_used_are_named(data_dir, name):
    with pytest.raises(InputError, match=REFUSED[name]) as caught:
        open_scene(real_item(data_dir, name))
    assert "\n" not in str(caught.value)
    assert real_item(data_dir, name)["id"] in str(caught.value)


@pytest.mark.data
def test_scene_of_real_items_has_a_grid_without_opening_a_file(data_dir):
    scene = open_scene([real_item(data_dir, name) for name in DECIDED if "sentinel-2-l2a__S2A_MSIL2A" in name])
    box = scene.geobox()
    assert (box.crs.epsg, box.affine.a) == (32658, 10)
    assert box.shape.x >= 10980
    naip = open_scene(real_item(data_dir, "pc__naip__id_m_4611606_ne_11_060_20231117_20240103"), modalities=["naip"])
    assert naip.modalities == ("naip",)


def sentinel2(**properties):
    assets = {"B02": {"href": "https://x.org/B02.tif", "raster:bands": [{"scale": 1e-4, "offset": -0.1}]}}
    stated = {"datetime": "2023-05-01T10:00:00Z", **properties}
    return {"type": "Feature", "id": "s2", "collection": "sentinel-2-l2a", "properties": stated, "assets": assets}


@pytest.mark.parametrize(
    ("properties", "offset"),
    [
        ({"s2:processing_baseline": "03.01"}, 0),
        ({"s2:processing_baseline": "04.00"}, -1000),
        ({"s2:processing_baseline": "05.10"}, -1000),
        ({"processing:version": "05.11"}, -1000),
        ({"s2:product_uri": "S2A_MSIL2A_20230501T100031_N0509_R122_T33TVM_20230501T160000.SAFE"}, -1000),
        ({"s2:product_uri": "S2A_MSIL2A_20190501T100031_N0211_R122_T33TVM_20190501T120000.SAFE"}, 0),
        ({"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": True}, 0),
        ({"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": False}, -1000),
        ({"s2:processing_baseline": "02.14", "earthsearch:boa_offset_applied": False}, 0),
        # Reprocessed in Collection 1: the baseline decides, not the date.
        ({"s2:processing_baseline": "05.00", "datetime": "2018-05-01T10:00:00Z"}, -1000),
        ({"datetime": "2018-05-01T10:00:00Z"}, 0),
    ],
)
def test_sentinel2_offset_is_taken_away_exactly_once(properties, offset):
    item = parse_item(sentinel2(**properties))
    assert item.assets[0].bands[0].offset == offset
    assert item.decisions


def test_sentinel2_of_unknown_baseline_is_refused():
    with pytest.raises(InputError, match=r'item s2 does not say its processing baseline.*"s2:processing_baseline"'):
        parse_item(sentinel2())


def test_foreign_pixels_come_in_the_declared_unit(tmp_path):
    """Digital numbers of 0 are missing before the offset, and the offset is taken away once."""
    numbers = np.arange(40 * 50, dtype="uint16").reshape(BOX.shape)
    raw = sentinel2(**{"s2:processing_baseline": "05.09"})
    raw["assets"] = {name: {"href": str(write_cog(tmp_path / f"{name}.tif", numbers, BOX))} for name in S2.band_names}
    raw["assets"]["SCL"] = {"href": str(write_cog(tmp_path / "scl.tif", np.full(BOX.shape, 4, "uint8"), BOX))}
    seen = open_scene([raw]).read("sentinel2_l2a", BOX)
    np.testing.assert_array_equal(seen.valid[0, 0], numbers > 0)
    np.testing.assert_array_equal(seen.pixels[0, 0, 5][numbers > 0], numbers[numbers > 0] - 1000.0)


def test_radar_of_planetary_computer_comes_in_decibel(tmp_path):
    power = np.full(BOX.shape, 0.05, "float32")
    numbers = np.full(BOX.shape, 6000, "uint16")
    rtc = sentinel2() | {"id": "s1", "collection": "sentinel-1-rtc"}
    rtc["assets"] = {
        n: {"href": str(write_cog(tmp_path / f"{n}.tif", power, BOX, nodata=-32768))} for n in ("vv", "vh")
    }
    palsar = sentinel2() | {"id": "alos", "collection": "alos-palsar-mosaic"}
    palsar["properties"] = {"datetime": None, "start_datetime": "2020-01-01T00:00:00Z"}
    palsar["assets"] = {n: {"href": str(write_cog(tmp_path / f"{n}.tif", numbers, BOX))} for n in ("HH", "HV")}
    scene = open_scene([rtc, palsar])
    np.testing.assert_allclose(scene.read("sentinel1", BOX).pixels, -13.0103, atol=1e-4)
    np.testing.assert_allclose(scene.read("alos2", BOX).pixels, 20 * np.log10(6000) - 83, atol=1e-4)


def test_bands_say_their_common_names_and_wavelengths(tmp_path):
    box = GeoBox((4, 4), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")
    item = make_item("a", "sentinel2_l2a", "2023-05-01", box, {"data": tmp_path / "a.tif"})
    first = item.assets["data"].extra_fields["bands"][0]
    assert first == {
        "name": "B02",
        "eo:common_name": "blue",
        "eo:center_wavelength": 0.492,
        "unit": "reflectance_1e4",
    }
    assert "https://stac-extensions.github.io/eo/v2.0.0/schema.json" in item.stac_extensions
    radar = make_item("b", "sentinel1", "2023-05-01", box, {"data": tmp_path / "b.tif"})
    assert not any("/eo/" in address for address in radar.stac_extensions)
