import datetime as dt
import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.control import GroundControlPoint

from panterra.errors import InputError
from panterra.imagery.files import sample_windows, scene_from_files
from panterra.imagery.raster import write_cog
from panterra.modalities import MODALITIES

# rasterio silences this one itself, but not safely when several threads warp at once.
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

BOX = GeoBox((24, 20), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32631")
COARSE = GeoBox((12, 10), Affine(20, 0, 500000, 0, -20, 5000000), "EPSG:32631")
S2 = MODALITIES["sentinel2_l2a"].band_names


def reflectances(bands, box=BOX, seed=0):
    return np.random.default_rng(seed).integers(200, 4000, (bands, *box.shape)).astype(np.uint16)


def read(scene, modality, date=0):
    observation = scene.read(modality, scene.geobox())
    pixels = observation.pixels[0, date].numpy().copy()
    pixels[:, ~observation.valid[0, date].numpy()] = np.nan
    return pixels


def test_a_multi_band_file_keeps_every_number(tmp_path):
    image = reflectances(12)
    names = sorted(S2)
    write_cog(tmp_path / "in" / "S2_L2A_20210604.tif", image, BOX, band_names=names)
    ingest = scene_from_files(tmp_path / "in", tmp_path / "out", licence="CC-BY-4.0")
    assert ingest.scene.dates("sentinel2_l2a") == (dt.date(2021, 6, 4),)
    assert ingest.scene.licence == "CC-BY-4.0"
    np.testing.assert_array_equal(read(ingest.scene, "sentinel2_l2a"), image[[names.index(b) for b in S2]])


@pytest.mark.parametrize("copy", [True, False])
def test_one_file_per_band_at_several_resolutions_is_one_item(tmp_path, copy):
    for i, band in enumerate(S2):
        box = BOX if band in ("B02", "B03", "B04", "B08") else COARSE
        write_cog(tmp_path / f"S2A_MSIL2A_20170617T113321_36_85_{band}.tif", reflectances(1, box, i), box)
    scene = scene_from_files(tmp_path, tmp_path / "out", copy=copy).scene
    assert len(scene.items) == 1
    assert scene.missing_bands("sentinel2_l2a") == ()
    np.testing.assert_array_equal(read(scene, "sentinel2_l2a")[0], reflectances(1, BOX, 0)[0])
    inside = [(tmp_path / "out") in rasterio_path.parents for rasterio_path in hrefs(scene)]
    assert all(inside) if copy else not any(inside)


def hrefs(scene):
    return [Path(asset.href) for item in scene.items for asset in item.assets]


def test_sentinel1_in_every_unit_reads_as_the_same_decibels(tmp_path):
    db = np.random.default_rng(1).uniform(-22, -6, (2, *BOX.shape))
    for unit, stored in {
        "db": db.astype(np.float32),
        "db_1e2": np.round(db * 100).astype(np.int16),
        "db_1e4": np.round(db * 1e4).astype(np.int32),
        "linear": (10 ** (db / 10)).astype(np.float32),
        "jaxa_dn": np.round(10 ** ((db + 83) / 20)).astype(np.uint16),
    }.items():
        write_cog(tmp_path / unit / "S1_20210604.tif", stored, BOX, band_names=("VH", "VV"))
        scene = scene_from_files(tmp_path / unit, tmp_path / f"{unit}_out").scene
        np.testing.assert_allclose(read(scene, "sentinel1"), db[::-1], atol=0.011, err_msg=unit)


def test_nodata_that_a_file_declares_or_hides_is_not_data(tmp_path):
    image = reflectances(4)
    image[:, :3] = 65535
    for name, declared in (("declared", 65535), ("hidden", None)):
        bands = ("B02", "B03", "B04", "B08")
        write_cog(tmp_path / name / "S2_L2A_20210604.tif", image, BOX, band_names=bands, nodata=declared)
        ingest = scene_from_files(tmp_path / name, tmp_path / f"{name}_out")
        with rasterio.open(hrefs(ingest.scene)[0]) as source:
            assert source.nodata == 65535
        said = any("65535, which fills all bands" in decision for decision in ingest.decisions)
        assert said == (declared is None)


def test_a_dated_stack_is_one_image_per_date(tmp_path):
    image = np.stack([np.full(BOX.shape, v, np.float32) for v in (0.1, 0.5, 0.9)])
    names = [f"ndvi_2020-0{month}-15" for month in (3, 4, 5)]
    write_cog(tmp_path / "ndvi.tif", image, BOX, band_names=names)
    scene = scene_from_files(tmp_path / "ndvi.tif", tmp_path / "out").scene
    assert [d.month for d in scene.dates("ndvi")] == [3, 4, 5]
    assert read(scene, "ndvi", date=2).mean() == pytest.approx(0.9)


def test_dates_from_a_text_file_make_a_stack_of_one_band(tmp_path):
    image = np.stack([np.full(BOX.shape, v, np.int16) for v in (1000, 5000, 9000)])
    write_cog(tmp_path / "mod13q1.tif", image, BOX)
    (tmp_path / "dates.csv").write_text("2020-01-01\n2020-01-17\n2020-02-02\n")
    scene = scene_from_files(
        tmp_path / "mod13q1.tif", tmp_path / "out", bands=["ndvi"] * 3, modality="ndvi", dates=tmp_path / "dates.csv"
    ).scene
    assert scene.dates("ndvi")[-1] == dt.date(2020, 2, 2)
    assert read(scene, "ndvi", date=1).mean() == pytest.approx(0.5)


def test_scene_classes_mask_clouds(tmp_path):
    classes = np.full(COARSE.shape, 4, np.uint8)
    classes[:2] = 9
    write_cog(tmp_path / "S2_L2A_20210604.tif", reflectances(12), BOX, band_names=S2)
    write_cog(tmp_path / "S2_L2A_20210604_SCL.tif", classes, COARSE, band_names=("SCL",))
    scene = scene_from_files(tmp_path, tmp_path / "out").scene
    observation = scene.read("sentinel2_l2a", scene.geobox())
    assert not observation.valid[0, 0, :4].any()
    assert observation.valid[0, 0, 4:].all()


def test_the_level_of_sentinel2_is_told_by_dark_blue(tmp_path):
    bands = ("B02", "B03", "B04", "B08")
    write_cog(tmp_path / "dark" / "S2_20210604.tif", reflectances(4), BOX, band_names=bands)
    ingest = scene_from_files(tmp_path / "dark", tmp_path / "out")
    assert ingest.scene.modalities == ("sentinel2_l2a",)
    assert any("darker than the air" in decision for decision in ingest.decisions)
    write_cog(tmp_path / "bright" / "S2_20210604.tif", reflectances(4) + np.uint16(900), BOX, band_names=bands)
    with pytest.raises(InputError, match=r"level 2A or 1C; say which with --modality"):
        scene_from_files(tmp_path / "bright", tmp_path / "out")
    scene = scene_from_files(tmp_path / "bright", tmp_path / "out", modality="sentinel2").scene
    assert scene.modalities == ("sentinel2",)


@pytest.mark.parametrize(("added", "decision"), [(1000, "which is taken away"), (0, "left as it is")])
def test_the_offset_of_a_late_baseline_is_taken_away_once(tmp_path, added, decision):
    folder = tmp_path / "S2A_MSIL2A_20230604T105031_N0509_R051_T31UFS_20230604T170200.SAFE" / "IMG_DATA" / "R10m"
    image = reflectances(12)
    for band, pixels in zip(S2, image + np.uint16(added), strict=True):
        write_cog(folder / f"T31UFS_20230604T105031_{band}_10m.tif", pixels, BOX)
    write_cog(folder / "T31UFS_20230604T105031_TCI_10m.tif", reflectances(3).astype(np.uint8), BOX)
    ingest = scene_from_files(tmp_path, tmp_path / "out")
    assert any(decision in said for said in ingest.decisions)
    assert ingest.scene.dates("sentinel2_l2a") == (dt.date(2023, 6, 4),)
    np.testing.assert_array_equal(read(ingest.scene, "sentinel2_l2a"), image)


def test_the_near_infrared_of_four_bytes_is_no_transparency(tmp_path):
    image = np.random.default_rng(0).integers(1, 255, (4, *BOX.shape)).astype(np.uint8)
    with rasterio.open(
        tmp_path / "naip_20200801.tif",
        "w",
        driver="GTiff",
        width=20,
        height=24,
        count=4,
        dtype="uint8",
        crs="EPSG:32631",
        transform=BOX.affine,
        photometric="RGB",
    ) as file:
        file.write(image)
        file.descriptions = ("R", "G", "B", "NIR")
    ingest = scene_from_files(tmp_path / "naip_20200801.tif", tmp_path / "out")
    assert ingest.scene.modalities == ("naip_10",)
    assert any("nearest to naip_10" in decision for decision in ingest.decisions)
    assert ingest.scene.missing_bands("naip_10") == ()


def test_control_points_are_carried_over(tmp_path):
    points = [GroundControlPoint(r, c, 10 + c * 1e-4, 45 - r * 1e-4) for r in (0, 12, 24) for c in (0, 10, 20)]
    path = tmp_path / "S1_20210604_vv.tif"
    with rasterio.open(path, "w", driver="GTiff", width=20, height=24, count=1, dtype="float32") as file:
        file.write(np.full((1, 24, 20), 0.1, np.float32))
        file.gcps = (points, "EPSG:4326")
    scene = scene_from_files(path, tmp_path / "out").scene
    with rasterio.open(hrefs(scene)[0]) as source:
        assert len(source.gcps[0]) == 9


def test_netcdf_from_the_south_and_from_the_north_read_the_same(tmp_path):
    xr = pytest.importorskip("xarray")
    image = reflectances(2)
    cubes = {"north": slice(None), "south": slice(None, None, -1)}
    for name, rows in cubes.items():
        y = (5000000 - 5 - 10 * np.arange(24))[rows]
        data = xr.Dataset(
            {
                f"S2-L2A-{band}": (("t", "y", "x"), image[i][rows][None], {"grid_mapping": "crs"})
                for i, band in enumerate(("B02", "B08"))
            }
            | {"crs": ((), 0, {"crs_wkt": rasterio.crs.CRS.from_epsg(32631).to_wkt()})},
            coords={
                "t": np.array(["2023-04-03"], "datetime64[ns]"),
                "y": y.astype(float),
                "x": 500005.0 + 10 * np.arange(20),
            },
        )
        (tmp_path / name).mkdir()
        data.to_netcdf(tmp_path / name / "cube.nc", engine="h5netcdf")
        scene = scene_from_files(tmp_path / name / "cube.nc", tmp_path / f"{name}_out").scene
        assert scene.geobox() == BOX
        assert scene.dates("sentinel2_l2a") == (dt.date(2023, 4, 3),)
        with rasterio.open(hrefs(scene)[0]) as source:
            np.testing.assert_array_equal(source.read(), image)


def test_the_same_image_twice_is_taken_once(tmp_path):
    for folder in ("a", "b"):
        write_cog(tmp_path / folder / "S2_L2A_20210604.tif", reflectances(12), BOX, band_names=S2)
    ingest = scene_from_files(tmp_path, tmp_path / "out")
    assert len(ingest.scene.items) == 1
    assert any("same place, date and bands" in decision for decision in ingest.decisions)


def test_a_second_run_gives_the_same_bytes(tmp_path):
    write_cog(tmp_path / "in" / "S2_L2A_20210604.tif", reflectances(12), BOX, band_names=S2)
    contents = []
    for _ in range(2):
        scene_from_files(tmp_path / "in", tmp_path / "in" / "out")
        files = [p for p in sorted((tmp_path / "in" / "out").rglob("*")) if p.is_file()]
        contents.append([(p.name, p.read_bytes()) for p in files])
    assert contents[0] == contents[1]


def test_windows_stay_inside_and_are_few():
    for height, width in ((10, 10), (300, 500), (10980, 10980), (50, 9000)):
        windows = sample_windows(height, width)
        assert 1 <= len(windows) <= 9
        assert all(w.row_off >= 0 and w.row_off + w.height <= height for w in windows)
        assert all(w.col_off >= 0 and w.col_off + w.width <= width for w in windows)
        assert sum(w.height * w.width for w in windows) <= 9 * 128 * 128


def unnamed(path):
    write_cog(path / "image_20210604.tif", reflectances(4), BOX)


def undated(path):
    write_cog(path / "S2_L2A_x.tif", reflectances(12), BOX, band_names=S2)


def contradicting(path):
    write_cog(path / "S2_L2A_20210604.tif", reflectances(12), BOX, band_names=S2, tags={"datetime": "2020-01-01"})


def colours(path):
    write_cog(path / "photo_20210604.tif", reflectances(3).astype(np.uint8), BOX, band_names=("R", "G", "B"))


def eight_bit(path):
    write_cog(path / "S2_L2A_20210604.tif", (reflectances(12) // 16).astype(np.uint8), BOX, band_names=S2)


def raw_sar(path):
    write_cog(path / "S1_20210604.tif", np.full((2, *BOX.shape), 120, np.uint16), BOX, band_names=("VV", "VH"))


def nowhere(path):
    with rasterio.open(path / "naip_20210604.tif", "w", driver="GTiff", width=9, height=9, count=1, dtype="uint8") as f:
        f.write(np.ones((1, 9, 9), np.uint8))


def two(path):
    undated(path)
    write_cog(path / "S2_L2A_y.tif", reflectances(12), BOX, band_names=S2)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (unnamed, {}, r"4 band\(s\) without names.*--bands.*--modality"),
        (unnamed, {"bands": ["B02"]}, r"--bands names 1 bands but image_20210604.tif has 4"),
        (unnamed, {"bands": ["w", "x", "y", "z"], "modality": "spot"}, r"w, x, y, z, none of spot"),
        (undated, {}, r"neither the name nor the tags of S2_L2A_x.tif tell its date; give --dates"),
        (undated, {"dates": "soon"}, r"--dates has something else than dates"),
        (two, {"dates": ["2020-01-01"] * 3}, r"--dates gives 3 dates for 2 files"),
        (contradicting, {}, r"gives two dates, 2020-01-01 and 2021-06-04.*--dates"),
        (colours, {}, r"can be .*spot.* by its bands R, G, B; say which with --modality"),
        (eight_bit, {}, r"8-bit pictures hold no measurements"),
        (raw_sar, {}, r"not sentinel1 in any known unit.*--unit"),
        (undated, {"modality": "landsat9"}, r"no modality 'landsat9'; --modality knows: aerial"),
        (undated, {"dates": "2020-01-01", "unit": "watts"}, r"cannot come in unit 'watts'"),
        (nowhere, {}, r"no place on Earth"),
    ],
)
def test_what_is_doubtful_names_the_option_that_settles_it(tmp_path, make, options, message):
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    with pytest.raises(InputError, match=message) as error:
        scene_from_files(tmp_path / "in", tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "scene.json").exists()


def test_a_folder_without_rasters_says_so(tmp_path):
    with pytest.raises(InputError, match="no rasters in"):
        scene_from_files(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="there is no file"):
        scene_from_files(tmp_path / "none.tif", tmp_path / "out")


# Real data ------------------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_worldcereal_cube(data_dir, tmp_path):
    folder = data_dir / "worldcereal_cube_belgium"
    ingest = scene_from_files(folder, tmp_path, copy=False)
    scene = ingest.scene
    assert scene.modalities == ("sentinel2_l2a", "sentinel1", "srtm")
    assert scene.missing_bands("sentinel2_l2a") == ("B8A", "B01", "B09")
    assert len(scene.dates("sentinel2_l2a")) == len(scene.dates("sentinel1")) == 20
    cube = np.load(folder / "cube.npz")
    names = json.loads((folder / "metadata.json").read_text())["s1_bands"]
    observation = scene.read("sentinel1", scene.geobox())
    dn = cube["s1"][:, [names.index("VV"), names.index("VH")]].astype(np.float64)
    assert observation.valid.all()
    np.testing.assert_allclose(observation.pixels[0].numpy(), 20 * np.log10(dn) - 83, atol=2e-5)
    observation = scene.read("sentinel2_l2a", scene.geobox())
    np.testing.assert_array_equal(observation.valid[0].numpy(), (cube["s2"] != 65535).all(1))
    np.testing.assert_array_equal(observation.pixels[0, 0, 0].numpy(), cube["s2"][0, 0])


@pytest.mark.data
@pytest.mark.slow
def test_worldcereal_patch_with_many_dates(data_dir, tmp_path):
    folder = data_dir / "worldcereal_patches" / "flanders_2018_A"
    scene = scene_from_files(folder / "timeseries.npz", tmp_path).scene
    series = np.load(folder / "timeseries.npz")
    assert scene.modalities == ("sentinel2_l2a", "sentinel1", "hls")
    assert scene.missing_bands("sentinel2_l2a") == ("B01", "B09")
    assert len(scene.dates("sentinel2_l2a")) == 118
    observation = scene.read("sentinel1", scene.geobox(20))
    vv = series["s1_asc"][0, 1] / 1e4
    np.testing.assert_allclose(observation.pixels[0, 0, 0].numpy(), vv, atol=1e-4)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "modality", "dates", "bands"),
    [
        ("s1_grd_flanders_2023-04", "sentinel1", 10, 2),
        ("s2_flanders_2023-04", "sentinel2_l2a", 12, 4),
        ("s2_quintad_flanders_2022-11_2023-02", "sentinel2_l2a", 20, 4),
        ("s2_rgb_puglia_polygon_laea_2023-06_2023-09", "sentinel2_l2a", 19, 3),
    ],
)
def test_openeo_cubes(data_dir, tmp_path, name, modality, dates, bands):
    scene = scene_from_files(data_dir / "openeo_netcdf" / f"{name}.nc", tmp_path).scene
    assert scene.modalities == (modality,)
    assert len(scene.dates(modality)) == dates
    assert len(scene.items[0].bands) == bands
    if modality == "sentinel1":
        observation = scene.read(modality, scene.geobox())
        assert -14 < np.median(observation.pixels[0, :, 0].numpy()) < -10


@pytest.mark.data
@pytest.mark.parametrize(
    ("files", "options", "modalities", "count"),
    [
        ("bigearthnet_patch", {}, ("sentinel2_l2a",), 1),
        ("sentinel2_amazon_polygons", {"dates": "2022-07-01"}, ("sentinel2_l2a", "srtm"), 2),
        ("landsat7_olinda", {"dates": "2001-08-01"}, ("landsat7", "srtm"), 2),
        ("alos2_palsar_mosaic", {"dates": "2020-09-09"}, ("alos2",), 1),
        ("eurosat_ms/Forest/Forest_1.tif", {"dates": "2016-06-01"}, ("sentinel2",), 1),
        ("sen1floods11_spain", {"dates": "2019-09-18"}, ("sentinel2", "sentinel1"), 2),
        ("oscd_change/bercy_paris", {}, ("sentinel2",), 2),
        ("hls_gedi_biomass/hls_l30_composite_10bands.tif", {"dates": "2019-01-01"}, ("hls",), 1),
        ("slovenia_ndvi_lulc/dem.tif", {}, ("srtm",), 1),
        ("modis_sinop/jp2_2013_2014", {}, ("ndvi",), 12),
        ("naip_multiyear", {}, ("naip_10",), 7),
        ("flanders_parcels_s1s2", {}, ("sentinel2_l2a", "sentinel1"), 3),
        ("raster_edge_cases/cog_nodata_nan.tif", {}, ("sentinel1",), 1),
    ],
)
def test_real_files_open(data_dir, tmp_path, files, options, modalities, count):
    ingest = scene_from_files(data_dir / files, tmp_path, copy=False, **options)
    assert ingest.scene.modalities == modalities
    assert len(ingest.scene.items) == count
    assert ingest.decisions


@pytest.mark.data
def test_eurosat_bands_are_not_in_the_usual_order(data_dir, tmp_path):
    path = data_dir / "eurosat_ms" / "Forest" / "Forest_1.tif"
    scene = scene_from_files(path, tmp_path, dates="2016-06-01").scene
    with rasterio.open(path) as source:
        b8a = source.read(13)
    box = GeoBox(b8a.shape, source.transform, scene.geobox().crs)
    at = MODALITIES["sentinel2"].band_names.index("B8A")
    np.testing.assert_array_equal(scene.read("sentinel2", box).pixels[0, 0, at].numpy(), b8a)


@pytest.mark.data
def test_alos_mosaic_in_decibels(data_dir, tmp_path):
    folder = data_dir / "alos2_palsar_mosaic"
    scene = scene_from_files(folder, tmp_path, dates="2020-09-09").scene
    with rasterio.open(folder / "N23W161_2020_sl_HH_crop.tif") as source:
        dn = source.read(1).astype(np.float64)
        box = GeoBox(dn.shape, source.transform, "EPSG:4326")
    observation = scene.read("alos2", box)
    valid = observation.valid[0, 0].numpy()
    np.testing.assert_allclose(observation.pixels[0, 0, 0].numpy()[valid], 20 * np.log10(dn[valid]) - 83, atol=2e-5)


@pytest.mark.data
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("sentinel2_amazon_polygons", "--dates"),
        ("alos2_palsar_mosaic", "--dates"),
        ("chesapeake_naip/id_000051_naip_rgbn.tif", "no place on Earth"),
        ("slovenia_ndvi_lulc", "without a place on Earth"),
        ("modis_sinop/mod13q1_ndvi_2000_2017_16day.tif", "--bands"),
        ("treesatai_ts_sample/Abies_alba_1_1005_WEFL_NLF.tif", "--bands"),
        ("spacenet_vhr/SN6_rotterdam_rgb_4p5m.tif", "--modality"),
        ("raster_edge_cases/s1_grd_gcps_no_crs.tif", "--bands"),
        ("raster_edge_cases/cog_scale_offset_tags.tif", "scales of their own"),
        ("raster_edge_cases/cog_crosses_dateline.tif", "--bands"),
        ("raster_edge_cases/cog_uint16_1band.tif", "--bands"),
        ("raster_edge_cases/landsat_rgb_byte_utm18.tif", "--bands"),
        ("raster_edge_cases/rotated_geotransform.tif", "--bands"),
    ],
)
def test_real_files_that_need_a_word_get_one_clear_line(data_dir, tmp_path, file, message):
    with pytest.raises(InputError, match=message) as error:
        scene_from_files(data_dir / file, tmp_path)
    assert "\n" not in str(error.value)
