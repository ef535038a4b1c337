import datetime as dt
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from odc.geo.geobox import GeoBox

import fetching
from fetching import ALL, WHERE, bytes_of, command, connect, fetch
from panterra.cli import main
from panterra.errors import InputError
from panterra.imagery.download import cut_out, fetch_pieces, piece_name
from panterra.imagery.providers import find_provider
from panterra.imagery.pull import list_pull, pull
from panterra.imagery.raster import read_onto, write_cog
from panterra.imagery.stac import open_scene
from panterra.imagery.web import Web
from panterra.imagery.wish import Wish
from stac_server import AREA, CRS, S2_DAYS, TILES, corners, serving

BOTH = "sentinel2_l2a,sentinel1"

archive, server = fetching.archive, fetching.server


def here(archive, *days, modality="sentinel2_l2a", **options):
    """Open the files themselves as a scene: newest versions only, the first of a date first."""
    folder, items = archive
    text = json.dumps([i for i in items if i["properties"]["datetime"][:10] in days and "20240105T12" not in i["id"]])
    return open_scene(json.loads(text.replace("{address}/data", str(folder))), modalities=[modality], **options)


def read(out, name):
    with rasterio.open(out / name) as file:
        return file.read()


# Pixels ---------------------------------------------------------------------------------------------------------------


def test_single_dates_are_what_the_files_hold(server, archive, tmp_path):
    out = tmp_path / "scene"
    pulled = fetch(server, out, ALL, composite="none")
    assert pulled.failures == ()
    scene = pulled.scene
    assert [str(day) for day in scene.dates("sentinel2_l2a")] == list(S2_DAYS)
    box = scene.geobox()
    assert box == AREA
    for modality, nothing in (("sentinel2_l2a", 0), ("sentinel1", -32768), ("landsat", 0)):
        for day in scene.dates(modality):
            seen = here(archive, str(day), modality=modality)
            # Of the second tile only the images that are not too cloudy were taken.
            kept = [i for i in seen.items if not (str(day) == S2_DAYS[2] and "33TWM" in i.id)]
            direct = open_scene_of(seen, kept).read(modality, AREA)
            pixels, valid = direct.pixels[0, 0].numpy(), direct.valid[0, 0].numpy()
            got = read(out, f"{modality}_{day}.tif")
            if modality != "sentinel1":
                pixels = np.rint(pixels).clip(1, 65535)
            np.testing.assert_array_equal(got[:, valid], pixels[:, valid], err_msg=f"{modality} {day}")
            assert (got[:, ~valid] == nothing).all()
            assert valid.any()


def open_scene_of(scene, items):
    return replace(scene, items=tuple(items))


def test_the_offset_of_1000_is_gone_and_the_newest_version_was_taken(server, archive, tmp_path):
    fetch(server, tmp_path / "scene", composite="none", dates=S2_DAYS[0])
    folder, items = archive
    with rasterio.open(folder / f"{items[1]['id']}_B02.tif") as file:
        raw = file.read(1)
    left = round((AREA.affine.c - TILES["33TVM"].affine.c) / 10)
    top = round((TILES["33TVM"].affine.f - AREA.affine.f) / 10)
    got = read(tmp_path / "scene", f"sentinel2_l2a_{S2_DAYS[0]}.tif")[0]
    width = 96 - left
    expected = raw[top : top + 72, left:].astype(int) - 1000
    np.testing.assert_array_equal(got[:, :width], np.maximum(expected, 1))
    assert (got[:, width:] > 0).all()


def test_radar_is_in_decibels(server, archive, tmp_path):
    fetch(server, tmp_path / "scene", ("sentinel1",), composite="none", orbit="ascending")
    folder, items = archive
    name = next(i["id"] for i in items if i["properties"].get("sat:orbit_state") == "ascending")
    with rasterio.open(folder / f"{name}_vv.tif") as file:
        linear = file.read(1, window=file.window(*AREA.boundingbox))
    got = read(tmp_path / "scene", "sentinel1_2024-01-15.tif")[0]
    np.testing.assert_allclose(got, 10 * np.log10(linear.astype("float64")), rtol=1e-6)
    assert len(list((tmp_path / "scene").glob("*.tif"))) == 1


def test_a_composite_is_the_median_of_what_is_clear(server, archive, tmp_path):
    pulled = fetch(server, tmp_path / "scene", grow_m=20)
    assert [str(d) for d in pulled.scene.dates("sentinel2_l2a")] == ["2024-01-16", "2024-02-15"]
    layers = []
    for day in S2_DAYS[:3]:
        seen = here(archive, day)
        kept = [i for i in seen.items if not (day == S2_DAYS[2] and "33TWM" in i.id)]
        direct = open_scene_of(seen, kept).read("sentinel2_l2a", AREA)
        pixels, valid = direct.pixels[0, 0].numpy(), direct.valid[0, 0].numpy()
        if day == S2_DAYS[1]:
            around = AREA.pad(2)
            codes, known = read_onto(kept[0].mask[0], around, categorical=True)
            cloud = np.isin(codes[0], (3, 8, 9, 10)) & known[0]
            rows, cols = np.indices(AREA.shape) + 2
            near = np.zeros(AREA.shape, bool)
            for row, col in np.argwhere(cloud):
                near |= (rows - row) ** 2 + (cols - col) ** 2 <= 4
            assert (near & valid).any()
            valid &= ~near
        layers.append(np.ma.masked_array(pixels, np.broadcast_to(~valid, pixels.shape)))
    expected = np.ma.median(np.ma.stack(layers), axis=0)
    got = read(tmp_path / "scene", "sentinel2_l2a_2024-01.tif")
    seen = ~np.ma.getmaskarray(expected)
    np.testing.assert_array_equal(got[seen], np.rint(expected[seen]).clip(1, 65535))
    assert (got[~seen] == 0).all()


def test_clouds_can_be_kept(server, archive, tmp_path):
    fetch(server, tmp_path / "scene", composite="none", mask_clouds=False, dates=S2_DAYS[1])
    direct = here(archive, S2_DAYS[1], apply_masks=False).read("sentinel2_l2a", AREA)
    got = read(tmp_path / "scene", f"sentinel2_l2a_{S2_DAYS[1]}.tif")
    valid = direct.valid[0, 0].numpy()
    np.testing.assert_array_equal(got[:, valid], np.rint(direct.pixels[0, 0].numpy()).clip(1)[:, valid])
    assert not server.asked("SCL")


def test_the_best_pixel_is_that_of_the_clearest_date(server, archive, tmp_path):
    fetch(server, tmp_path / "best", composite="best", dates="2024-01")
    fetch(server, tmp_path / "dates", composite="none", dates="2024-01")
    layers = np.stack([read(tmp_path / "dates", f"sentinel2_l2a_{S2_DAYS[i]}.tif") for i in (0, 2, 1)])
    first = (layers[:, 0] > 0).argmax(0)
    expected = np.take_along_axis(layers, first[None, None], 0)[0]
    np.testing.assert_array_equal(read(tmp_path / "best", "sentinel2_l2a_2024-01.tif"), expected)


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_faults_change_nothing(server, tmp_path):
    clean = fetch(server, tmp_path / "clean", ALL)
    assert not clean.failures
    server.faults |= {
        "/search": [503, "truncate", (429, "0")],
        "_B02": [500, "truncate", (429, "0")],
        "_B03": ["drop"],
        "_vv": ["truncate", 503],
        "_qa": [500],
    }
    faulty = fetch(server, tmp_path / "faulty", ALL, options={"title": "clean"})
    assert not faulty.failures
    assert not any(server.faults.values())
    assert bytes_of(tmp_path / "clean") == bytes_of(tmp_path / "faulty")


def test_a_dead_file_costs_its_image_alone_and_is_reported(server, archive, tmp_path):
    lost = f"S2A_MSIL2A_{S2_DAYS[2].replace('-', '')}T100031_R122_T33TVM_20240301T000000"
    server.dead[f"{lost}_B05"] = 500
    pulled = fetch(server, tmp_path / "scene")
    assert len(pulled.failures) == 1
    assert f"{lost}_B05.tif: the server answered 500; gave up after 4 tries" in pulled.failures[0]
    assert f"sentinel2_l2a_2024-01: made of 3 of 4 images; could not be fetched: {lost}" in pulled.decisions
    rest = [i for i in pulled.scene.items if str(i.date) == "2024-01-16"]
    assert len(rest) == 1
    stored = json.loads((tmp_path / "scene" / "scene.json").read_text())["features"][0]["properties"]
    assert lost not in [source["id"] for source in stored["panterra:sources"]]
    assert len(stored["panterra:sources"]) == 3


def test_a_dead_mask_does_not_let_clouds_in(server, tmp_path):
    server.dead["20240115T100031_R122_T33TVM_20240301T000000_SCL"] = 404
    pulled = fetch(server, tmp_path / "scene", composite="none")
    assert [str(d) for d in pulled.scene.dates("sentinel2_l2a")] == [S2_DAYS[0], S2_DAYS[2], S2_DAYS[3]]
    assert f"sentinel2_l2a_{S2_DAYS[1]}: left out; could not be fetched" in " ".join(pulled.decisions)


def test_when_nothing_comes_there_is_no_scene(server, tmp_path):
    server.dead["/data/"] = 404
    with pytest.raises(InputError, match=r"no image could be fetched: .*404 \(and \d+ more\)"):
        fetch(server, tmp_path / "scene")
    assert not (tmp_path / "scene").exists()


def test_signatures_that_expire_on_the_way_are_renewed(archive, tmp_path):
    folder, items = archive
    with serving(folder, items, signature="2") as server:
        href = f"{server.address}/data/{items[1]['id']}_B02.tif"
        made = []

        def sign(url, headers, *, fresh=False):
            if fresh:
                made.append(url)
            return f"{url}?sig={len(made) + 1}", dict(headers)

        with Web(sign, per_second=1e6) as web:
            pieces, failures = fetch_pieces([href], AREA, tmp_path, web)
        assert made == [href]
    assert not failures
    assert pieces[href].name == piece_name(f"{href}?sig=7", AREA)


def test_an_api_that_is_none_gives_one_line(server, tmp_path):
    for path, message in (("/data/none", "cannot fetch .*404"), ("/collections", "does not answer as a STAC API")):
        wish = Wish(aoi=WHERE, dates="2024", modalities=("sentinel1",))
        with pytest.raises(InputError, match=message) as caught:
            pull(wish, [find_provider(server.address + path)], tmp_path / "scene", connect=connect)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="has no collection that can be read as naip"):
        fetch(server, tmp_path / "scene", ("naip",))
    with pytest.raises(InputError, match=r"nothing to fetch; .*has 0 items"):
        fetch(server, tmp_path / "scene", dates="2020")
    assert not (tmp_path / "scene").exists()


# Pieces ---------------------------------------------------------------------------------------------------------------


def test_a_piece_is_the_part_of_its_file_over_the_area(tmp_path):
    big = AREA.pad(900)
    pixels = np.random.default_rng(0).integers(0, 60000, (2, *big.shape)).astype("uint16")
    write_cog(tmp_path / "big.tif", pixels, big, nodata=7)
    with serving(tmp_path, []) as server, Web(per_second=1e6) as web:
        cut_out(web, f"{server.address}/data/big.tif", AREA, tmp_path / "piece.tif")
        assert web.received < (tmp_path / "big.tif").stat().st_size / 2
    with rasterio.open(tmp_path / "piece.tif") as piece:
        assert piece.nodata == 7
        assert piece.width < AREA.shape.x + 30
        np.testing.assert_array_equal(
            piece.read(window=piece.window(*AREA.boundingbox).round()), pixels[:, 900:-900, 900:-900]
        )
    for box in (AREA, AREA.zoom_out(3), AREA.zoom_out(0.5)):
        for one, other in zip(
            read_onto(tmp_path / "piece.tif", box), read_onto(tmp_path / "big.tif", box), strict=True
        ):
            np.testing.assert_array_equal(one, other)


# Rasterio cannot log what GDAL says while an exception of ours is on its way.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_of_a_file_that_breaks_off_nothing_is_left(tmp_path):
    box = AREA.pad(500)
    write_cog(tmp_path / "big.tif", np.random.default_rng(0).integers(0, 60000, box.shape).astype("uint16"), box)
    pieces = tmp_path / "pieces"
    with serving(tmp_path, [], faults={"big.tif": [None, None, *[500] * 9]}) as server:
        href = f"{server.address}/data/big.tif"
        with Web(per_second=1e6, pause_s=0.001, tries=3) as web:
            came, failed = fetch_pieces([href], box, pieces, web)
            assert not came
            assert "answered 500; gave up after 3 tries" in failed[href]
            assert not list(pieces.iterdir())
            server.faults.clear()
            came, failed = fetch_pieces([href], box, pieces, web)
    assert list(pieces.iterdir()) == [came[href]]
    assert not failed


def test_jpeg_2000_is_read_as_well(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 60000, (1, 200, 200)).astype("uint16")
    box = GeoBox((200, 200), AREA.affine, CRS)
    options = {"crs": CRS, "transform": box.affine, "quality": 100, "reversible": "YES"}
    with rasterio.open(
        tmp_path / "a.jp2", "w", driver="JP2OpenJPEG", height=200, width=200, count=1, dtype="uint16", **options
    ) as file:
        file.write(pixels)
    with serving(tmp_path, []) as server, Web(per_second=1e6) as web:
        cut_out(web, f"{server.address}/data/a.jp2", box[50:60, 50:60], tmp_path / "piece.tif")
    got, valid = read_onto(tmp_path / "piece.tif", box[50:60, 50:60])
    np.testing.assert_array_equal(got, pixels[:, 50:60, 50:60])
    assert valid.all()


def test_what_has_no_pixels_there_is_a_failure_of_one_line(tmp_path):
    write_cog(tmp_path / "far.tif", np.ones((20, 20), "uint8"), AREA[:20, :20].translate_pix(5000, 0))
    (tmp_path / "text.tif").write_text("no raster")
    (tmp_path / "vrt.tif").write_text(f'<VRTDataset rasterXSize="9" rasterYSize="9">{tmp_path}/far.tif</VRTDataset>')
    with serving(tmp_path, []) as server, Web(per_second=1e6) as web:
        for name, message in (("far", "has no pixels in the area"), ("text", "cannot read"), ("vrt", "cannot read")):
            with pytest.raises(InputError, match=message):
                cut_out(web, f"{server.address}/data/{name}.tif", AREA, tmp_path / "piece.tif")
    assert not list(tmp_path.glob("*piece*"))


# What comes out -------------------------------------------------------------------------------------------------------


def test_the_scene_says_where_it_comes_from_and_the_doctor_finds_nothing(server, tmp_path, capsys):
    out = tmp_path / "scene"
    assert main([*command(server, out, BOTH), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["dates"]["sentinel2_l2a"] == ["2024-01-16", "2024-02-15"]
    assert said["failures"] == []
    assert "Sentinel Data Legal Notice" in said["licence"]
    assert any("1 older versions" in decision for decision in said["decisions"])
    properties = json.loads((out / "scene.json").read_text())["features"][0]["properties"]
    assert properties["panterra:provider"] == server.address
    assert properties["panterra:composite"] == "median"
    assert properties["start_datetime"] == "2024-01-01T00:00:00Z"
    assert {source["collection"] for source in properties["panterra:sources"]} == {"sentinel-2-l2a"}
    assert properties["panterra:decisions"] == ["baseline 05.10: 1000 is taken away"]
    assert "sig" not in (out / "scene.json").read_text()
    assert main(["doctor", str(out), "--json"]) == 0
    assert {finding["level"] for finding in json.loads(capsys.readouterr().out)} <= {"ok", "note"}


def test_a_list_fetches_nothing(server, tmp_path, capsys):
    server.log.clear()
    arguments = command(server, tmp_path / "scene", BOTH, "--best", "1", "--list")
    assert main([*arguments, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [image["id"] for image in listed["images"]] == [
        "sentinel2_l2a_2024-01",
        "sentinel2_l2a_2024-02",
        "sentinel1_2024-01",
    ]
    assert [item["date"] for item in listed["images"][0]["items"]] == [S2_DAYS[0]] * 2
    assert listed["grid"]["shape"] == list(AREA.shape)
    square = AREA.shape.x * AREA.shape.y
    assert listed["images"][2]["bytes"] == pytest.approx(square * 8, rel=0.05)
    assert main(arguments) == 0
    assert "Nothing was fetched" in capsys.readouterr().out
    assert not server.asked("/data/")
    assert not list(tmp_path.iterdir())


def test_seasons_and_years_are_periods(server):
    wish = Wish(aoi=WHERE, dates="2023-12/2024-02", modalities=("sentinel2_l2a",), every="season", best=2)
    plan = list_pull(wish, [find_provider(server.address)], connect=connect)
    (image,) = plan.images
    assert image.id == "sentinel2_l2a_2024-DJF"
    assert (image.first, image.last) == (dt.date(2023, 12, 1), dt.date(2024, 2, 29))
    assert len({c.item.date for c in image.candidates}) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to fetch: an area with --aoi, or files of your own with --from-files"),
        (["--aoi", "1,2,3,4", "--dates", "2024", "--out", "x"], "say what to fetch, such as --modalities"),
        (["--aoi", "1,2,3,4", "--modalities", "sentinel1", "--out", "x"], "say when: --dates"),
        (["--aoi", "1,2,3,4", "--modalities", "sentinel1", "--dates", "2024"], "say where the scene is to be written"),
        (["--aoi", "1,2,3,4", "--unit", "db"], "--unit goes with --from-files"),
        (
            ["--aoi", "1,2,3,4", "--modalities", "sentinel1", "--dates", "2024", "--out", "x", "--s2cloudless"],
            "s2cloudless looks at Sentinel-2 level 1C (sentinel2), which is not asked for",
        ),
        (["--from-files", "a.tif", "--out", "x", "--cache", "y"], "--cache goes with --aoi"),
        (["--from-files", "a.tif"], "say where the scene is to be written"),
        (
            ["--aoi", "1,2,1.1,2.1", "--modalities", "landsat", "--dates", "2024", "--out", "x", "--source", "cdse"],
            "no landsat there; it comes from: usgs",
        ),
    ],
)
def test_what_is_missing_is_asked_for(arguments, message, capsys):
    assert main(["fetch", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_missing_credentials_give_one_line_and_no_requests(server, tmp_path, monkeypatch, capsys):
    for name in ("CDSE_S3_ACCESS_KEY", "CDSE_S3_SECRET_KEY", "CDSE_USERNAME", "CDSE_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    arguments = command(server, tmp_path / "scene", "sentinel2_l2a")
    arguments[arguments.index(server.address)] = "cdse"
    assert main(arguments) == 2
    assert "set CDSE_S3_ACCESS_KEY and CDSE_S3_SECRET_KEY" in capsys.readouterr().err
    assert not (tmp_path / "scene").exists()


def test_the_area_may_be_a_file(server, tmp_path):
    west, south, east, north = corners(AREA)
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    area = tmp_path / "area.geojson"
    area.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    wish = Wish(aoi=area, dates="2024-01", modalities=("sentinel1",))
    plan = list_pull(wish, [find_provider(server.address)], connect=connect)
    assert plan.area.box == AREA
    assert str(plan.area.box.crs) == CRS
    assert Path(area).is_file()
