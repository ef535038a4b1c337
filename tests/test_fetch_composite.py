import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from panterra.imagery.clouds import HIDING, grow, near_clouds
from panterra.imagery.composite import BLOCK_PX, blocks, compose_block, reduce_dates
from panterra.imagery.items import MASKS, SceneAsset, SceneBand, SceneItem
from panterra.imagery.pull import storage_type, to_storage
from panterra.imagery.raster import write_cog
from panterra.imagery.stac import Scene
from panterra.modalities import MODALITIES

BOX = GeoBox((30, 40), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")


def stack(seed, dates=5, bands=3, shape=(7, 9)):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 3000, (dates, bands, *shape)).astype("float32")
    valid = rng.random((dates, *shape)) < 0.6
    valid[:, 0, 0] = False
    return pixels, valid


@pytest.mark.parametrize("dates", [1, 2, 5, 6])
def test_the_median_is_that_of_numpy(dates):
    pixels, valid = stack(dates, dates)
    masked = np.ma.masked_array(pixels, np.broadcast_to(~valid[:, None], pixels.shape))
    found, seen = reduce_dates(pixels, valid, "median")
    np.testing.assert_array_equal(found, np.ma.median(masked, axis=0).filled(0))
    np.testing.assert_array_equal(seen, valid.any(0))


def test_the_medoid_is_the_date_nearest_to_the_others():
    pixels, valid = stack(3)
    found, seen = reduce_dates(pixels, valid, "medoid")
    for row, col in np.ndindex(seen.shape):
        spectra = pixels[valid[:, row, col], :, row, col].astype("float64")
        if not len(spectra):
            assert not seen[row, col]
            assert (found[:, row, col] == 0).all()
            continue
        sums = np.linalg.norm(spectra[:, None] - spectra[None], axis=2).sum(1)
        assert sums[(spectra == found[:, row, col]).all(1)].min() == pytest.approx(sums.min(), rel=1e-5)


def test_the_best_pixel_is_the_first_valid_one():
    pixels, valid = stack(4)
    found, seen = reduce_dates(pixels, valid, "best")
    for row, col in np.argwhere(seen):
        first = np.flatnonzero(valid[:, row, col])[0]
        np.testing.assert_array_equal(found[:, row, col], pixels[first, :, row, col])


@pytest.mark.parametrize("how", ["median", "medoid", "best"])
def test_values_where_nothing_is_valid_do_not_matter(how):
    pixels, valid = stack(5)
    spoilt = np.where(valid[:, None], pixels, np.float32(1e9))
    for one, other in zip(reduce_dates(pixels, valid, how), reduce_dates(spoilt, valid, how), strict=True):
        np.testing.assert_array_equal(one, other)


# Clouds ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_clouds_grow_to_a_disc(seed, distance):
    hidden = np.random.default_rng(seed).random((11, 13)) < 0.05
    rows, cols = np.indices(hidden.shape)
    expected = np.zeros_like(hidden)
    for row, col in np.argwhere(hidden):
        expected |= (rows - row) ** 2 + (cols - col) ** 2 <= distance**2
    np.testing.assert_array_equal(grow(hidden, distance), expected)


def test_hiding_codes_are_no_data_for_a_scene():
    for kind, hiding in HIDING.items():
        codes = np.arange(256, dtype="float32")
        assert not (hiding(codes) & MASKS[kind](codes)).any(), kind
    assert HIDING["scl"](np.arange(12)).nonzero()[0].tolist() == [3, 8, 9, 10]
    # Landsat: clear, fill, dilated cloud, cirrus, cloud, shadow (QA_PIXEL of Collection 2, level 1).
    assert (
        HIDING["qa_pixel"](np.float32([21824, 1, 21826, 54596, 22280, 23888])).tolist() == [False, False] + [True] * 4
    )


def test_clouds_beyond_the_edge_of_a_block_count(tmp_path):
    classes = np.full(BOX.shape, 4, "uint8")
    classes[10, 20] = 9
    classes[0] = 0
    path = str(write_cog(tmp_path / "scl.tif", classes, BOX))
    whole = near_clouds((path, "scl"), BOX, 5)
    rows, cols = np.indices(BOX.shape)
    np.testing.assert_array_equal(whole, (rows - 10) ** 2 + (cols - 20) ** 2 <= 25)
    for block in (BOX[:10, :18], BOX[10:, 18:]):
        row, col = (round(n) for n in (~BOX.affine @ (block.affine.c, block.affine.f))[::-1])
        part = whole[row : row + block.shape.y, col : col + block.shape.x]
        np.testing.assert_array_equal(near_clouds((path, "scl"), block, 5), part)
    assert not near_clouds((path, "palsar"), BOX, 5).any()


def level_1c(tmp_path):
    """Dark ground with a bright cloud, in the colours of each."""
    box = BOX.pad(60)
    names = MODALITIES["sentinel2"].band_names
    ground = dict.fromkeys(names, 900) | {"B10": 15, "B09": 500, "B08": 2500, "B8A": 2600, "B11": 1500, "B12": 900}
    cloud = dict.fromkeys(names, 5500) | {"B10": 400, "B09": 3000, "B11": 3500, "B12": 2600}
    pixels = np.stack([np.full(box.shape, ground[name], "uint16") for name in names])
    pixels[:, 70:95, 60:85] = np.array([cloud[name] for name in names])[:, None, None]
    path = write_cog(tmp_path / "l1c.tif", pixels, box)
    bands = tuple(SceneBand(name=name, index=i) for i, name in enumerate(names, start=1))
    asset = SceneAsset(href=str(path), bands=bands)
    day = np.datetime64("2024-01-05").astype(object)
    return SceneItem(id="l1c", modality="sentinel2", date=day, assets=(asset,))


def test_s2cloudless_finds_a_cloud_whatever_the_block(tmp_path):
    pytest.importorskip("s2cloudless", reason="an extra: pip install s2cloudless")
    item = level_1c(tmp_path)
    scene, days, box = Scene(items=(item,)), [[item]], BOX.pad(60)
    _, seen = compose_block(scene, days, box, "best", s2cloudless=True)
    assert not seen[75:90, 65:80].any()
    assert seen[:30].all()
    assert compose_block(scene, days, box, "best")[1].all()
    part = compose_block(scene, days, box[50:100, 40:90], "best", s2cloudless=True)[1]
    np.testing.assert_array_equal(part, seen[50:100, 40:90])


# Blocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("modality", "finer"), [("sentinel2_l2a", 1), ("naip_10", 4), ("hls", 1)])
def test_blocks_cover_every_pixel_once_and_are_small(modality, finer):
    box = GeoBox((300, 520), BOX.affine, BOX.crs)
    seen = np.zeros((300 * finer, 520 * finer), int)
    for part, window in blocks(MODALITIES[modality], box):
        rows, cols = window.toslices()
        seen[rows, cols] += 1
        assert window.width <= BLOCK_PX
        assert window.height <= BLOCK_PX
        assert (part.shape.x * finer, part.shape.y * finer) == (window.width, window.height)
        assert part.affine.c == box.affine.c + window.col_off * 10 / finer
    assert (seen == 1).all()


def test_a_composite_does_not_depend_on_its_blocks(tmp_path):
    rng = np.random.default_rng(8)
    days = []
    for day in (1, 2, 3):
        path = write_cog(
            tmp_path / f"{day}.tif", rng.normal(-12, 3, (2, *BOX.shape)).astype("float32"), BOX, nodata=-32768
        )
        bands = (SceneBand(name="vv"), SceneBand(name="vh", index=2))
        asset = SceneAsset(href=str(path), bands=bands)
        date = np.datetime64(f"2024-01-0{day}").astype(object)
        days.append([SceneItem(id=str(day), modality="sentinel1", date=date, assets=(asset,))])
    scene = Scene(items=tuple(item for day in days for item in day))
    whole, seen = compose_block(scene, days, BOX, "median")
    assert seen.all()
    for rows, cols in ((slice(0, 9), slice(0, 17)), (slice(9, 30), slice(17, 40))):
        np.testing.assert_array_equal(compose_block(scene, days, BOX[rows, cols], "median")[0], whole[:, rows, cols])


# Storage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["sentinel2_l2a", "sentinel1", "landsat", "hls", "naip_10", "worldcover", "srtm"])
def test_what_is_written_is_what_was_seen(modality):
    spec = MODALITIES[modality]
    dtype, nodata = storage_type(spec)
    low, high = spec.plausible or (1, 255)
    pixels = np.linspace(low, high, 12, dtype="float32").reshape(1, 3, 4)
    pixels = pixels if dtype.kind == "f" else np.rint(pixels)
    valid = np.ones((3, 4), bool)
    valid[2, 3] = False
    stored = to_storage(pixels, valid, dtype, nodata)
    assert stored.dtype == dtype
    assert (stored[0, ~valid] == nodata).all()
    assert (stored[0, valid] != nodata).all()
    expected = np.maximum(pixels, 1) if nodata == 0 else pixels
    np.testing.assert_array_equal(stored[0, valid], expected[0, valid])


def test_dark_water_stays_data():
    stored = to_storage(
        np.float32([[[-40, 0, 0.4, 70000]]]), np.array([[True, True, True, True]]), np.dtype("uint16"), 0
    )
    assert stored.tolist() == [[[1, 1, 1, 65535]]]
