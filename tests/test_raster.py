import json
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import zarr
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from rasterio.control import GroundControlPoint
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate

from panterra.errors import InputError
from panterra.imagery import raster
from panterra.imagery.layers import open_layers
from panterra.imagery.raster import CogWriter, grid_of, read_legend, read_onto, write_cog

BOX = GeoBox((90, 120), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")


def smooth(box: GeoBox, bands: int = 2) -> np.ndarray:
    """Hills that are the same on every grid: a function of the coordinates."""
    rows, cols = np.mgrid[: box.shape.y, : box.shape.x] + 0.5
    x = box.affine.a * cols + box.affine.b * rows + box.affine.c
    y = box.affine.d * cols + box.affine.e * rows + box.affine.f
    return np.stack([100 + 50 * np.sin(x / 97 + band) + 30 * np.cos(y / 71) for band in range(bands)]).astype("float32")


def plain_tif(path, array, transform, crs="EPSG:32633", **profile):
    """Write with rasterio alone, so that reading is not judged by our own writing."""
    pixels = array if array.ndim == 3 else array[None]
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=len(pixels),
        height=pixels.shape[1],
        width=pixels.shape[2],
        dtype=pixels.dtype,
        crs=crs,
        transform=transform,
        **profile,
    ) as file:
        file.write(pixels)
    return path


def oracle(path, box, resampling, **options):
    """What rasterio's own warped dataset gives on the grid, and its mask."""
    with (
        rasterio.open(path) as source,
        WarpedVRT(
            source,
            crs=box.crs.to_wkt(),
            transform=box.affine,
            width=box.shape.x,
            height=box.shape.y,
            resampling=resampling,
            **options,
        ) as warped,
    ):
        return warped.read().astype("float32"), warped.read_masks() > 0


@pytest.fixture
def hills(tmp_path):
    return plain_tif(tmp_path / "hills.tif", smooth(BOX), BOX.affine)


# An aligned window ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_aligned_window_is_copied_bit_for_bit(tmp_path, dtype):
    pixels = np.random.default_rng(0).integers(0, 200, (3, 90, 120)).astype(dtype)
    path = plain_tif(tmp_path / "a.tif", pixels, BOX.affine)
    values, valid = read_onto(path, BOX[20:60, 30:110])
    np.testing.assert_array_equal(values, pixels[:, 20:60, 30:110].astype("float32"))
    assert valid.all()
    values, _ = read_onto(path, BOX[:5, :5], bands=[3, 1])
    np.testing.assert_array_equal(values, pixels[[2, 0], :5, :5])


def test_aligned_window_beyond_the_file_is_invalid_there(hills):
    values, valid = read_onto(hills, BOX.pad(7))
    np.testing.assert_array_equal(values[:, 7:-7, 7:-7], smooth(BOX))
    assert valid.sum() == smooth(BOX).size
    assert (values[~valid] == 0).all()
    far = GeoBox((4, 4), Affine(10, 0, 900000, 0, -10, 5000000), BOX.crs)
    assert not read_onto(hills, far)[1].any()


def test_a_box_in_the_opposite_direction_is_not_taken_for_aligned(hills):
    upside_down = GeoBox((90, 120), Affine(10, 0, 500000, 0, 10, 4999100), BOX.crs)
    values, valid = read_onto(hills, upside_down)
    assert valid.all()
    np.testing.assert_allclose(values, smooth(BOX)[:, ::-1], atol=1e-4)


# Resampling -----------------------------------------------------------------------------------------------------------

GRIDS = {
    "half a pixel off": (GeoBox((60, 60), Affine(10, 0, 500205, 0, -10, 4999895), BOX.crs), Resampling.bilinear),
    "twice finer": (BOX[10:60, 10:60].zoom_out(0.5), Resampling.bilinear),
    "twice coarser": (BOX.zoom_out(2), Resampling.average),
    "coarser, not whole": (GeoBox((20, 25), Affine(37, 0, 500011, 0, -37, 4999987), BOX.crs), Resampling.average),
    "other zone": (GeoBox((70, 90), Affine(10, 0, 28400, 0, -10, 5017450), "EPSG:32634"), Resampling.bilinear),
    "degrees": (GeoBox((40, 40), Affine(1e-4, 0, 15.0012, 0, -1e-4, 45.1525), "EPSG:4326"), Resampling.bilinear),
    "turned": (GeoBox((40, 40), Affine(8, 3, 500300, 3, -8, 4999700), BOX.crs), Resampling.bilinear),
}


@pytest.mark.parametrize("name", GRIDS)
def test_other_grids_agree_with_warped_vrt(hills, name):
    box, resampling = GRIDS[name]
    values, valid = read_onto(hills, box)
    expected, seen = oracle(hills, box, resampling, nodata=-1e9, XSCALE=1, YSCALE=1)
    assert seen.any()
    np.testing.assert_array_equal(valid, seen)
    np.testing.assert_allclose(values[valid], expected[seen], rtol=1e-4)


def test_classes_are_never_mixed(tmp_path):
    codes = np.random.default_rng(1).choice([1, 40, 200], (90, 120)).astype("uint8")
    path = plain_tif(tmp_path / "codes.tif", codes, BOX.affine)
    for box, _ in GRIDS.values():
        values, valid = read_onto(path, box, categorical=True)
        expected, seen = oracle(path, box, Resampling.nearest, nodata=0)
        np.testing.assert_array_equal(values[valid], expected[seen])
        assert set(np.unique(values[valid])) <= {1, 40, 200}


def test_invalid_pixels_do_not_leak_into_their_neighbours(tmp_path):
    pixels = np.full((90, 120), 5, "int16")
    pixels[30:40, 30:40] = -9999
    path = plain_tif(tmp_path / "hole.tif", pixels, BOX.affine, nodata=-9999)
    for box in (BOX.zoom_out(0.5), BOX.zoom_out(3), GRIDS["half a pixel off"][0], GRIDS["other zone"][0]):
        values, valid = read_onto(path, box)
        np.testing.assert_allclose(values[valid], 5, rtol=1e-6)
        assert not valid.all()


def test_bands_keep_their_own_gaps_when_resampled(tmp_path):
    pixels = np.full((2, 90, 120), 5, "float32")
    pixels[0, :45], pixels[1, :, :60] = np.nan, np.nan
    path = plain_tif(tmp_path / "gaps.tif", pixels, BOX.affine)
    values, valid = read_onto(path, BOX.zoom_out(3))
    np.testing.assert_array_equal(valid[0], np.arange(30)[:, None].repeat(40, 1) >= 15)
    np.testing.assert_array_equal(valid[1], np.arange(40)[None].repeat(30, 0) >= 20)
    np.testing.assert_allclose(values[valid], 5)


@settings(max_examples=30)
@given(
    name=st.sampled_from(sorted(GRIDS)),
    corner=st.tuples(st.integers(0, 10), st.integers(0, 10)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_a_place_does_not_depend_on_the_box_around_it(tmp_path_factory, name, corner, size):
    path = tmp_path_factory.getbasetemp() / "place.tif"
    if not path.exists():
        plain_tif(path, smooth(BOX), BOX.affine)
    box, _ = GRIDS[name]
    window = tuple(slice(start, start + length) for start, length in zip(corner, size, strict=True))
    whole, part = read_onto(path, box), read_onto(path, box[window])
    np.testing.assert_array_equal(part[1], whole[1][:, *window])
    # GDAL approximates the change of projection, here by a few ten-thousandths of a pixel.
    np.testing.assert_allclose(part[0], whole[0][:, *window], rtol=1e-6 if box.crs == BOX.crs else 1e-4)


def test_large_sources_are_cut_without_a_trace(hills, monkeypatch):
    for box, _ in GRIDS.values():
        whole = read_onto(hills, box)
        with monkeypatch.context() as patch:
            patch.setattr(raster, "MAX_SOURCE_VALUES", 2000)
            pieces = read_onto(hills, box)
        np.testing.assert_array_equal(whole[1], pieces[1])
        np.testing.assert_allclose(whole[0], pieces[0], rtol=1e-6 if box.crs == BOX.crs else 1e-4)


@pytest.mark.parametrize(
    "box",
    [
        GeoBox((9, 9), Affine(1, 0, 100, 0, -1, 120), "EPSG:4326"),
        GeoBox((9, 9), Affine(10, 0, 1e8, 0, -10, 5e6), "EPSG:32632"),
        GeoBox((9, 9), Affine(1e5, 0, -2e6, 0, -1e5, 2e6), "EPSG:3413"),
        GeoBox((9, 9), Affine(1e6, 0, -9e6, 0, -1e6, 9e6), "+proj=ortho +lat_0=-45 +lon_0=-170"),
    ],
)
def test_boxes_off_the_file_or_off_the_earth_are_empty(hills, box):
    assert not read_onto(hills, box)[1].any()


# What files say of themselves -----------------------------------------------------------------------------------------


def test_nodata_of_the_file_and_of_the_caller_both_count(tmp_path):
    pixels = np.arange(90 * 120, dtype="int32").reshape(90, 120) % 50
    path = plain_tif(tmp_path / "n.tif", pixels, BOX.affine, nodata=7)
    valid = read_onto(path, BOX, nodata=9)[1][0]
    np.testing.assert_array_equal(valid, (pixels != 7) & (pixels != 9))


def test_masks_and_alpha_and_nan_are_invalid(tmp_path):
    seen = np.random.default_rng(0).random((90, 120)) > 0.3
    pixels = np.full((90, 120), 3, "uint8")
    with rasterio.open(
        tmp_path / "mask.tif", "w", driver="GTiff", count=1, height=90, width=120, dtype="uint8", crs=BOX.crs.to_wkt(),
        transform=BOX.affine,
    ) as file:  # fmt: skip
        file.write(pixels, 1)
        file.write_mask(seen)
    alpha = np.stack([pixels, pixels, pixels, np.where(seen, 255, 0).astype("uint8")])
    plain_tif(tmp_path / "alpha.tif", alpha, BOX.affine, photometric="RGB", alpha="YES")
    plain_tif(tmp_path / "nan.tif", np.where(seen, 3, np.nan).astype("float32"), BOX.affine)
    for name, count in (("mask.tif", 1), ("alpha.tif", 3), ("nan.tif", 1)):
        values, valid = read_onto(tmp_path / name, BOX)
        assert values.shape[0] == count
        np.testing.assert_array_equal(valid, np.broadcast_to(seen, valid.shape))
        np.testing.assert_array_equal(values[valid], 3)


def test_scale_and_offset_of_the_file_hold_unless_given(tmp_path):
    path = plain_tif(tmp_path / "s.tif", np.full((2, 90, 120), 100, "int16"), BOX.affine)
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (0.5, 2.0), (-1.0, 3.0)
    assert read_onto(path, BOX)[0][:, 0, 0].tolist() == [49, 203]
    assert read_onto(path, BOX, scale=1, offset=-10)[0][:, 0, 0].tolist() == [90, 90]
    assert read_onto(path, BOX.zoom_out(3))[0][:, 0, 0].tolist() == [49, 203]


def test_control_points_place_a_file(tmp_path):
    """Points on an exact affine grid must give what the affine transform gives."""
    points = [
        GroundControlPoint(row, col, *(BOX.affine @ (col, row)), 0) for row in (0, 45, 90) for col in (0, 60, 120)
    ]
    path = tmp_path / "gcp.tif"
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=90, width=120, dtype="float32", gcps=points, crs="EPSG:32633"
    ) as file:
        file.write(smooth(BOX)[:1])
    box = GRIDS["other zone"][0]
    straight = plain_tif(tmp_path / "affine.tif", smooth(BOX)[:1], BOX.affine)
    (values, valid), (expected, seen) = read_onto(path, box), read_onto(straight, box)
    np.testing.assert_array_equal(valid, seen)
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    assert grid_of(path).shape == BOX.shape


def test_a_changed_file_is_read_anew(tmp_path):
    for value in (1, 2, 3):
        path = write_cog(tmp_path / "same.tif", np.full((90, 120), value, "uint8"), BOX)
        assert read_onto(path, BOX)[0].max() == value


def test_threads_read_the_same_and_keep_few_files_open(tmp_path):
    pixels = np.random.default_rng(0).normal(size=(90, 120)).astype("float32")
    paths = [plain_tif(tmp_path / f"{i}.tif", pixels + i, BOX.affine) for i in range(raster.MAX_OPEN + 8)]
    open_files = []

    def read(i):
        values = read_onto(paths[i], BOX)[0]
        open_files.append(len(raster._threads.handles))
        return values[0]

    with ThreadPoolExecutor(6) as pool:
        for i, values in enumerate(pool.map(read, range(len(paths)))):
            np.testing.assert_array_equal(values, pixels + i)
    for i in range(len(paths)):
        read(i)
    assert max(open_files) == raster.MAX_OPEN


# Messages -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_unusable_files_give_one_line(tmp_path):
    whole = plain_tif(tmp_path / "cut.tif", np.random.default_rng(0).random((90, 120)), BOX.affine)
    whole.write_bytes(whole.read_bytes()[:20000])
    (tmp_path / "text.tif").write_text("not a raster")
    with rasterio.open(tmp_path / "lost.tif", "w", driver="GTiff", count=1, height=9, width=9, dtype="uint8") as file:
        file.write(np.zeros((1, 9, 9), "uint8"))
    plain_tif(tmp_path / "slc.tif", np.zeros((90, 120), "complex64"), BOX.affine)
    plain_tif(tmp_path / "nocrs.tif", np.zeros((90, 120), "uint8"), BOX.affine, crs=None)
    for name, message in {
        "none.tif": "there is no file",
        "text.tif": "cannot read",
        "cut.tif": "cannot read",
        "lost.tif": "has no place on Earth",
        "nocrs.tif": "has no coordinate reference system",
        "slc.tif": "complex",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            read_onto(tmp_path / name, BOX)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
    with pytest.raises(InputError, match="has 1 bands; there is no band 2"):
        read_onto(tmp_path / "nocrs.tif", BOX, bands=[2])


# Writing --------------------------------------------------------------------------------------------------------------

BIG = GeoBox((1100, 1300), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")
CLASSES = {1: "water", 4: "forest & <wood>", 9: "Äcker"}
PALETTE = {1: (0, 0, 255), 4: (0, 90, 0), 9: (200, 180, 40)}


def write_classes(path, codes):
    return write_cog(
        path,
        codes,
        BIG,
        nodata=255,
        band_names=("class",),
        palette=PALETTE,
        categories=CLASSES,
        tags={"model": "m", "a": "b"},
    )


def test_class_cog_holds_everything(tmp_path):
    codes = np.random.default_rng(0).choice([1, 4, 4, 4, 9, 255], (1100, 1300)).astype("uint8")
    path = write_classes(tmp_path / "new" / "map.tif", codes)
    assert cog_validate(path, strict=True) == (True, [], [])
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(file.read(1), codes)
        assert (file.nodata, file.descriptions, file.block_shapes) == (255, ("class",), [(512, 512)])
        assert file.colormap(1)[4] == (0, 90, 0, 255)
        assert json.loads(file.tags(1)["categories"]) == {str(k): v for k, v in CLASSES.items()}
        assert file.tags()["model"] == "m"
        assert file.overviews(1) == [2, 4]
        overview = file.read(1, out_shape=(275, 325))
    assert set(np.unique(overview)) <= {1, 4, 9, 255}
    assert (overview == 4).mean() > (codes == 4).mean()
    assert read_legend(path) == (CLASSES, PALETTE)
    listed = ElementTree.parse(f"{path}.aux.xml").iter("Category")
    assert [c.text or "" for c in listed] == [CLASSES.get(i, "") for i in range(10)]
    assert sorted(p.name for p in path.parent.iterdir()) == ["map.tif", "map.tif.aux.xml"]


def test_value_cog_holds_everything(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 1100, 1300)).astype("float32")
    values[:, :100, :50] = np.nan
    path = write_cog(tmp_path / "v.tif", values, BIG, nodata=np.nan, band_names=("a", "b", "c"))
    assert cog_validate(path, strict=True) == (True, [], [])
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(file.read(), values)
        assert file.descriptions == ("a", "b", "c")
        halved = file.read(2, out_shape=(550, 650))
    np.testing.assert_allclose(
        halved[200:, 200:], values[1].reshape(550, 2, 650, 2).mean((1, 3))[200:, 200:], atol=1e-5
    )
    assert read_legend(path) == ({}, {})


def test_the_order_of_writing_does_not_change_a_byte(tmp_path):
    codes = np.random.default_rng(0).choice([1, 4, 9], (1100, 1300)).astype("uint8")
    whole = write_classes(tmp_path / "whole.tif", codes).read_bytes()
    assert write_classes(tmp_path / "again.tif", codes).read_bytes() == whole
    windows = [
        Window(col, row, min(300, 1300 - col), 100) for row in range(0, 1100, 100) for col in range(0, 1300, 300)
    ]
    np.random.default_rng(1).shuffle(windows)
    options = {"nodata": 255, "band_names": ("class",), "palette": PALETTE, "categories": CLASSES}
    with CogWriter(tmp_path / "tiles.tif", BIG, 1, "uint8", tags={"a": "b", "model": "m"}, **options) as writer:
        for window in windows:
            writer.write(window, codes[window.toslices()])
    assert (tmp_path / "tiles.tif").read_bytes() == whole


def test_pixels_never_written_are_nodata(tmp_path):
    with CogWriter(tmp_path / "s.tif", BIG, 2, "float32", nodata=-1) as writer:
        writer.write(Window(600, 600, 10, 20), np.full((2, 20, 10), 5, "float32"))
    values, valid = read_onto(tmp_path / "s.tif", BIG)
    assert valid.sum() == 2 * 200
    assert (values[valid] == 5).all()


def test_a_failure_leaves_nothing_new(tmp_path):
    path = write_classes(tmp_path / "map.tif", np.ones((1100, 1300), "uint8"))
    before = path.read_bytes()

    def fail():
        with CogWriter(path, BIG, 1, "uint8", nodata=255) as writer:
            writer.write(Window(0, 0, 1300, 1100), np.zeros((1, 1100, 1300), "uint8"))
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.tif", "map.tif.aux.xml"]


def test_many_bands_take_smaller_blocks(tmp_path):
    box = BIG[:140, :140]
    values = np.arange(100 * 140 * 140, dtype="float32").reshape(100, 140, 140)
    path = write_cog(tmp_path / "e.tif", values, box)
    with rasterio.open(path) as file:
        assert file.block_shapes[0] == (128, 128)
        np.testing.assert_array_equal(file.read(), values)


def test_what_cannot_be_written_is_said(tmp_path):
    for problem, options in {
        "cannot hold float16": {"dtype": "float16"},
        "1 band names came for 2 bands": {"band_names": ("a",)},
        "palette needs one uint8 band": {"palette": PALETTE},
    }.items():
        with pytest.raises(InputError, match=problem):
            CogWriter(tmp_path / "x.tif", BIG, 2, options.pop("dtype", "uint8"), **options)
    with pytest.raises(InputError, match=r"wanted \[H, W\] or \[C, H, W\] of the box, \[1100, 1300\]"):
        write_cog(tmp_path / "x.tif", np.zeros((3, 3)), BIG)
    assert not list(tmp_path.iterdir())


# Real files -----------------------------------------------------------------------------------------------------------

EDGE_CASES = {
    "cog_crosses_dateline.tif": (GeoBox((400, 500), Affine(1e-3, 0, 181.1, 0, -1e-3, 51.4), "EPSG:4326"), "bilinear"),
    "cog_nodata_nan.tif": (GeoBox((150, 200), Affine(180, 0, 80000, 0, -180, 5290000), "EPSG:32611"), "bilinear"),
    "cog_scale_offset_tags.tif": (GeoBox((120, 100), Affine(1e3, 0, 310000, 0, -1e3, 4190000), None), "average"),
    "cog_uint16_1band.tif": (GeoBox((200, 200), Affine(70, 0, 370000, 0, -70, 8200000), "EPSG:32621"), "bilinear"),
    "landsat_rgb_byte_utm18.tif": (GeoBox((90, 110), Affine(0.02, 0, -79, 0, -0.02, 25.6), "EPSG:4326"), "average"),
    "rotated_geotransform.tif": (GeoBox((200, 200), Affine(2e4, 0, -1.8e6, 0, -2e4, -1.5e6), "EPSG:3577"), "bilinear"),
}
BY_POINTS = "s1_grd_gcps_no_crs.tif"


@pytest.mark.data
def test_every_edge_case_is_looked_at(data_dir):
    assert {p.name for p in (data_dir / "raster_edge_cases").iterdir()} == {*EDGE_CASES, BY_POINTS}


@pytest.mark.data
@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_cases_agree_with_warped_vrt(data_dir, name):
    path = data_dir / "raster_edge_cases" / name
    box, method = EDGE_CASES[name]
    box = GeoBox(box.shape, box.affine, box.crs or grid_of(path).crs)
    with rasterio.open(path) as source:
        scale, offset = (np.array(n)[:, None, None] for n in (source.scales, source.offsets))
        nodata = np.nan if source.nodata is None else source.nodata
        float_nodata = nodata if source.dtypes[0] == "float32" else source.nodata
    expected, seen = oracle(
        path,
        box,
        Resampling[method],
        dtype="float32",
        nodata=-1e9,
        src_nodata=float_nodata,
        UNIFIED_SRC_NODATA="NO",
        **({"XSCALE": 1, "YSCALE": 1} if method == "bilinear" else {}),
    )
    values, valid = read_onto(path, box)
    assert 0.1 < seen.mean() < 1
    assert (valid != seen).mean() < 1e-3
    both = valid & seen
    np.testing.assert_allclose(values[both], (expected * scale + offset)[both], rtol=1e-3, atol=0.1 * scale.max())


@pytest.mark.data
@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_cases_are_copied_on_their_own_grid(data_dir, name):
    path = data_dir / "raster_edge_cases" / name
    with rasterio.open(path) as source:
        raw, seen = source.read(), source.read_masks() > 0
        scale, offset = (np.array(n)[:, None, None] for n in (source.scales, source.offsets))
    values, valid = read_onto(path, grid_of(path))
    np.testing.assert_array_equal(valid, seen & np.isfinite(raw))
    np.testing.assert_array_equal(values[valid], (raw * scale + offset).astype("float32")[valid])


@pytest.mark.data
def test_control_points_of_a_radar_scene_agree_with_a_polynomial(data_dir):
    """The second-order polynomial that GDAL uses too, fitted by least squares, and the nearest pixel."""
    path = data_dir / "raster_edge_cases" / BY_POINTS
    box = grid_of(path)
    with rasterio.open(path) as source:
        points, raw = source.gcps[0], source.read(1)
    known = np.array([(p.x, p.y, p.col, p.row) for p in points])
    middle = known[:, :2].mean(0)

    def terms(xy):
        x, y = (xy - middle).T
        return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], 1)

    fit = np.linalg.lstsq(terms(known[:, :2]), known[:, 2:], rcond=None)[0]
    cols, rows = (n.ravel() + 0.5 for n in np.meshgrid(np.arange(box.shape.x), np.arange(box.shape.y)))
    at = terms(np.stack([box.affine.a * cols + box.affine.c, box.affine.e * rows + box.affine.f], 1)) @ fit
    col, row = np.floor(at.T).astype(int)
    inside = (col >= 0) & (row >= 0) & (col < raw.shape[1]) & (row < raw.shape[0])
    values, valid = read_onto(path, box, categorical=True)
    assert 0.5 < inside.mean() < 0.9
    assert (valid.ravel() != inside).mean() < 1e-3
    expected = raw[row.clip(0, raw.shape[0] - 1), col.clip(0, raw.shape[1] - 1)]
    # GDAL may be an eighth of a pixel off where it approximates a change of projection.
    assert (values.ravel() == expected)[inside & valid.ravel()].mean() > 0.9


def test_a_fourth_band_is_data_and_not_a_mask(tmp_path):
    box = GeoBox((64, 64), Affine(10, 0, 500000, 0, -10, 4000000), "EPSG:32633")
    pixels = np.random.default_rng(0).integers(0, 3, (4, 64, 64)).astype("uint8")
    path = write_cog(tmp_path / "four.tif", pixels, box)
    values, valid = read_onto(path, box)
    assert valid.all()
    assert (values == pixels).all()


def test_metres_that_are_tagged_as_degrees_are_refused(tmp_path):
    path = plain_tif(tmp_path / "mistagged.tif", np.ones((4, 4), np.uint8), BOX.affine, crs="EPSG:4326")
    with pytest.raises(InputError, match="are no degrees; give it the CRS"):
        grid_of(path)


def test_a_folder_of_arrays_is_no_raster_and_spoils_no_later_reading(tmp_path):
    zarr.create_group(str(tmp_path / "store")).create_array("values", shape=(4, 4), dtype="float32")
    good = plain_tif(tmp_path / "good.tif", np.ones((4, 4), np.uint8), BOX.affine)
    for _ in range(2):
        with pytest.raises(InputError, match="store"):
            grid_of(tmp_path / "store")
        assert grid_of(good) == BOX[:4, :4]


def test_complex_numbers_make_no_scene(tmp_path):
    path = plain_tif(tmp_path / "slc_2023-05-01.tif", np.zeros((2, 8, 8), "complex64"), BOX.affine)
    with pytest.raises(InputError, match="amplitude or power"):
        open_layers(path, ["VV", "VH"])
