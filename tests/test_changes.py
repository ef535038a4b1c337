import json

import geopandas as gpd
import numpy as np
import pystac
import pystac.validation
import pytest
import rasterio
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.mapping import embeddings
from panterra.mapping.changes import LOG_EDGES, bulk_threshold, cosine_distances, find_change, stable_threshold
from panterra.mapping.embeddings import create_zarr, open_embeddings, write_zarr
from panterra.mapping.tiles import blocks

BOX = GeoBox((60, 75), Affine(40, 0, 500000, 0, -40, 5000000), "EPSG:32633")
ABOUT = {"model": {"name": "some"}, "patch_m": 40.0, "modalities": ["sentinel2_l2a"], "dates": ["2023-04-15"]}
DIM = 16
FIELD, POND = (slice(10, 16), slice(20, 30)), (slice(40, 42), slice(50, 52))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", 30_000)


def store_of(path, features, dtype="float32", box=BOX, about=ABOUT):
    create_zarr(path, box, dim=DIM, dtype=dtype, shard=(20, 20), chunk=(5, 5), about=about)
    for tile in blocks(*box.shape, rows=20, cols=20):
        write_zarr(path, tile.core, features[tile.core.slices])
    return open_embeddings(path)


@pytest.fixture
def two_years() -> tuple[np.ndarray, np.ndarray]:
    """Features of two years that differ by noise, and a field and a pond that changed."""
    rng = np.random.default_rng(0)
    before = rng.normal(size=(*BOX.shape, DIM))
    before *= 4 / np.linalg.norm(before, axis=-1, keepdims=True)
    noise = rng.normal(size=before.shape) * 0.1
    after = before + noise
    for place in (FIELD, POND):
        after[place] = rng.normal(size=after[place].shape)
    before[0:3, 0:5] = np.nan
    after[50:55, 60:70] = np.nan
    return before.astype(np.float32), 3 * after.astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_distances_are_one_minus_the_cosine(tmp_path, two_years, dtype):
    before, after = (store_of(tmp_path / f"{n}.zarr", x, dtype) for n, x in zip("ab", two_years, strict=True))
    find_change(before, after, tmp_path / "change.tif")
    u, v = (store.read().astype(np.float64) for store in (before, after))
    wanted = 1 - (u * v).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1)
    with rasterio.open(tmp_path / "change.tif") as file:
        assert (file.transform, file.nodata is not None) == (BOX.affine, True)
        np.testing.assert_allclose(file.read(1), wanted, atol=1e-6, equal_nan=True)


def test_near_vectors_keep_their_digits():
    u = np.array([[1.0], [0.0]], np.float32)
    v = np.array([[1.0], [1e-3]], np.float32)
    assert cosine_distances(u, v)[0] == pytest.approx(5e-7, rel=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25])
def test_the_bulk_tells_its_false_alarms_whatever_changed(share):
    rng = np.random.default_rng(1)
    stable = np.log(0.01 * rng.chisquare(12, 200_000) / 12)
    changed = np.log(rng.uniform(0.3, 1.0, int(share / (1 - share) * len(stable))))
    counts = np.histogram(np.concatenate([stable, changed]), LOG_EDGES)[0]
    assert np.mean(stable > np.log(bulk_threshold(counts, 0.001))) == pytest.approx(0.001, abs=4e-4)


def test_stable_places_give_an_order_statistic():
    distances = np.random.default_rng(0).permutation(np.linspace(0.01, 1, 100))
    assert stable_threshold(distances, 0.1) == pytest.approx(0.91)
    assert stable_threshold(distances, 0.01) == pytest.approx(1.0)
    with pytest.raises(InputError, match="give 999 or more, or allow a larger share"):
        stable_threshold(distances, 0.001)


def test_what_changed_is_found_masked_and_outlined(tmp_path, two_years):
    before, after = (store_of(tmp_path / f"{n}.zarr", x, "int8") for n, x in zip("ab", two_years, strict=True))
    made = find_change(
        before, after, tmp_path / "change.tif", polygons=tmp_path / "change.geojson", min_patches=3, false_alarms=0.001
    )
    with rasterio.open(made.mask) as file:
        mask = file.read(1)
        assert (file.nodata, file.tags()["rule"]) == (255, made.rule)
    truth = np.zeros(BOX.shape, bool)
    truth[FIELD] = truth[POND] = True
    assert (mask[:3, :5] == 255).all()
    assert (mask[50:55, 60:70] == 255).all()
    seen = mask != 255
    assert (mask == 1)[truth].mean() > 0.95
    assert (mask == 1)[seen & ~truth].mean() < 0.004
    assert made.share == pytest.approx((mask == 1).sum() / seen.sum())
    frame = gpd.read_file(tmp_path / "change.geojson").to_crs(32633)
    assert len(frame) == made.num_polygons == 2
    assert frame.patches.tolist() == sorted(frame.patches, reverse=True)
    field = shapely.box(500000 + 40 * 20, 5000000 - 40 * 16, 500000 + 40 * 30, 5000000 - 40 * 10)
    assert frame.geometry[0].intersection(field).area / field.area > 0.9
    np.testing.assert_allclose(frame.hectares, frame.patches * 0.16)
    assert (frame.mean_distance > made.threshold).all()
    item = json.loads(made.passport.read_text())
    assert item["properties"]["panterra:change"]["rule"] == made.rule
    assert set(item["assets"]) == {"distance", "mask", "polygons"}
    pystac.validation.validate_dict(item | {"stac_extensions": []})


def test_known_stable_places_set_the_threshold(tmp_path, two_years):
    before, after = (store_of(tmp_path / f"{n}.zarr", x) for n, x in zip("ab", two_years, strict=True))
    stable = gpd.GeoSeries([shapely.box(500000 + 40 * 35, 5000000 - 40 * 38, 502990, 4999990)], crs=32633)
    made = find_change(before, after, tmp_path / "change.tif", stable=stable, false_alarms=0.01)
    with rasterio.open(tmp_path / "change.tif") as file:
        distances = np.sort(file.read(1)[0:38, 35:75].ravel())
    assert made.rule == "1520 patches of stable places"
    assert made.threshold == pytest.approx(distances[int(np.ceil(1521 * 0.99)) - 1])
    given = find_change(before, after, tmp_path / "given.tif", threshold=0.5)
    assert (given.threshold, given.rule) == (0.5, "given")


def test_nothing_changed_gives_no_polygon(tmp_path, two_years):
    store = store_of(tmp_path / "a.zarr", two_years[0])
    made = find_change(store, store, tmp_path / "change.tif", polygons=tmp_path / "none.geojson")
    assert made.num_polygons == 0
    assert json.loads((tmp_path / "none.geojson").read_text())["features"] == []


def test_what_cannot_be_compared_says_why(tmp_path, two_years):
    store = store_of(tmp_path / "a.zarr", two_years[0])
    moved = GeoBox(BOX.shape, BOX.affine @ Affine.translation(1, 0), BOX.crs)
    other = store_of(tmp_path / "b.zarr", two_years[1], box=moved)
    with pytest.raises(InputError, match=r"60 x 75 patches of 40 m from 500000 .* change needs the same grid"):
        find_change(store, other, tmp_path / "change.tif")
    foreign = store_of(tmp_path / "c.zarr", two_years[1], about=ABOUT | {"model": {"name": "other"}})
    with pytest.raises(InputError, match="differ in model"):
        find_change(store, foreign, tmp_path / "change.tif")
    empty = store_of(tmp_path / "d.zarr", np.full_like(two_years[0], np.nan))
    with pytest.raises(InputError, match="no patch with data in common"):
        find_change(store, empty, tmp_path / "change.tif")
    for wrong in ({"false_alarms": 0.0}, {"threshold": 3.0}):
        with pytest.raises(InputError, match=r"wanted more than 0|between 0 and 2"):
            find_change(store, store, tmp_path / "change.tif", **wrong)
    with pytest.raises(InputError, match=r"end in \.tif"):
        find_change(store, store, tmp_path / "change.png")
