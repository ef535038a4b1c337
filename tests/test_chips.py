import json

import geopandas as gpd
import numpy as np
import pyarrow.parquet as pq
import pystac
import pystac.validation
import pytest
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.commands.search import run_chips
from panterra.errors import InputError
from panterra.mapping import embeddings
from panterra.mapping.chips import open_chips, write_chips
from panterra.mapping.embeddings import INT8_RULE, create_zarr, from_bytes, lonlat_of, open_embeddings, write_zarr
from panterra.mapping.search import search
from panterra.mapping.search_query import gather_examples, make_query, open_vectors, place_at
from panterra.mapping.tiles import blocks

BOX = GeoBox((30, 45), Affine(40, 0, 500000, 0, -40, 5000000), "EPSG:32633")
ABOUT = {
    "model": {"name": "some"},
    "patch_m": 40.0,
    "modalities": ["sentinel2_l2a"],
    "dates": ["2023-07-01", "2023-04-15"],
    "licence": "CC-BY-4.0",
}
DIM = 6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", 3000)


@pytest.fixture
def features() -> np.ndarray:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(*BOX.shape, DIM)) * 10 ** rng.uniform(-3, 2, (*BOX.shape, 1))
    values[4:9, 20:31] = np.nan
    return values.astype(np.float32)


def store_of(folder, features, dtype):
    create_zarr(folder / "e.zarr", BOX, dim=DIM, dtype=dtype, shard=(12, 20), chunk=(6, 5), about=ABOUT)
    for tile in blocks(*BOX.shape, rows=12, cols=20):
        write_zarr(folder / "e.zarr", tile.core, features[tile.core.slices])
    return open_embeddings(folder / "e.zarr")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_chips_of_a_patch_are_the_store(tmp_path, features, dtype):
    store = store_of(tmp_path, features, dtype)
    chips = write_chips(store, tmp_path / "chips.parquet")
    assert (chips.box, chips.dim, chips.dtype, chips.about) == (store.box, DIM, dtype, store.about)
    row, col = (n.ravel() for n in np.mgrid[: BOX.shape[0], : BOX.shape[1]])
    np.testing.assert_array_equal(chips.sample(row, col), store.read().reshape(-1, DIM))
    assert len(chips) == np.isfinite(features).all(-1).sum()
    assert chips.sample(row[:0], col[:0]).shape == (0, DIM)
    assert open_vectors(tmp_path / "chips.parquet") == chips


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_larger_chips_are_the_mean_of_their_patches(tmp_path, features, dtype):
    store = store_of(tmp_path, features, dtype)
    chips = write_chips(store, tmp_path / "chips.parquet", side=4)
    assert chips.box == GeoBox((8, 12), Affine(160, 0, 500000, 0, -160, 5000000), "EPSG:32633")
    values = store.read()
    for row, col in ((0, 0), (1, 4), (2, 6), (7, 11)):
        patches = values[4 * row : 4 * row + 4, 4 * col : 4 * col + 4].reshape(-1, DIM)
        mean = patches[np.isfinite(patches).all(1)].mean(0)
        found = chips.sample(np.array([row]), np.array([col]))[0]
        np.testing.assert_allclose(found, mean, atol=(0.012 if dtype == "int8" else 1e-6) * np.abs(mean).max())
    # Rows 4 to 7 and columns 20 to 27 lie in the hole.
    assert np.isnan(chips.sample(np.array([1, 1]), np.array([5, 6]))).all() == np.isnan(values[4:8, 20:28]).all()
    assert len(chips) == 8 * 12 - 2


def test_the_table_is_geoparquet_that_others_open(tmp_path, features):
    store = store_of(tmp_path, features, "int8")
    write_chips(store, tmp_path / "chips.parquet", side=3)
    frame = gpd.read_parquet(tmp_path / "chips.parquet")
    assert frame.crs == "EPSG:32633"
    assert {"embedding", "scale_exponent", "row", "col", "model", "patch_m"} < set(frame.columns)
    third = frame[(frame.row == 2) & (frame.col == 1)].iloc[0]
    assert third.geometry.equals(shapely.box(500120, 5000000 - 360, 500240, 5000000 - 240))
    assert str(third.start_datetime) == "2023-04-15 00:00:00+00:00"
    assert str(third.end_datetime) == "2023-07-01 23:59:59+00:00"
    np.testing.assert_array_equal(
        from_bytes(np.stack(frame.embedding), frame.scale_exponent.to_numpy()),
        open_chips(tmp_path / "chips.parquet").sample(frame.row.to_numpy(), frame.col.to_numpy()),
    )
    schema = pq.read_schema(tmp_path / "chips.parquet")
    assert str(schema.field("embedding").type) == f"fixed_size_list<element: int8>[{DIM}]"
    geo, emb = (json.loads(schema.metadata[key]) for key in (b"geo", b"emb"))
    assert (geo["version"], geo["columns"]["geometry"]["encoding"]) == ("1.1.0", "WKB")
    assert geo["columns"]["geometry"]["bbox"] == [500000, 4998800, 501800, 5000000]
    assert (emb["emb:type"], emb["emb:dimensions"], emb["emb:quantization"]) == ("chip", DIM, INT8_RULE)
    assert emb["emb:chip_layout"]["chip_size"] == [120, 120]
    # Its covering lets readers pass over row groups.
    corner = gpd.read_parquet(tmp_path / "chips.parquet", bbox=(500010, 4999990, 500020, 4999995))
    assert len(corner) == 1


def test_duckdb_opens_it(tmp_path, features):
    duckdb = pytest.importorskip("duckdb", reason="checked where DuckDB is installed")
    write_chips(store_of(tmp_path, features, "float32"), tmp_path / "chips.parquet")
    asked = f"select count(*), max(len(embedding)) from '{tmp_path}/chips.parquet'"
    with duckdb.connect() as connection:
        ((count, dim),) = connection.sql(asked).fetchall()
    assert (count, dim) == (30 * 45 - 55, DIM)


def test_the_passport_is_a_stac_item(tmp_path, features):
    pytest.importorskip("jsonschema", reason="schemas are checked where jsonschema is installed")
    write_chips(store_of(tmp_path, features, "int8"), tmp_path / "chips.parquet", side=2)
    item = json.loads((tmp_path / "chips.parquet.json").read_text())
    pystac.validation.validate_dict(item | {"stac_extensions": []})
    read = pystac.Item.from_file(tmp_path / "chips.parquet.json")
    assert read.assets["embeddings"].media_type == "application/vnd.apache.parquet"
    assert read.properties["emb:quantization"]["value"] == INT8_RULE["value"]
    assert read.properties["license"] == "CC-BY-4.0"


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_chips_are_searched_like_their_store(tmp_path, features, dtype):
    store = store_of(tmp_path, features, dtype)
    chips = write_chips(store, tmp_path / "chips.parquet")
    place = place_at(*lonlat_of(np.array([20]), np.array([12]), BOX)[0])
    found = []
    for source in (store, chips):
        like = gather_examples(place, [source])
        found.append(search([source], make_query(like), top=20, apart_m=90, leave_out=like))
    np.testing.assert_array_equal(found[0].row, found[1].row)
    np.testing.assert_allclose(found[0].score, found[1].score, atol=1e-6)


def test_a_write_that_was_stopped_leaves_no_file(tmp_path, features):
    store = store_of(tmp_path, features, "int8")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_chips(store, tmp_path / "chips.parquet", progress=stop)
    assert not (tmp_path / "chips.parquet").exists()
    write_chips(store, tmp_path / "chips.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chips.parquet", "chips.parquet.json", "e.zarr"]


def test_what_are_no_chips_says_so(tmp_path, features):
    store = store_of(tmp_path, features, "float32")
    with pytest.raises(InputError, match=r"end in \.parquet"):
        write_chips(store, tmp_path / "chips.csv")
    with pytest.raises(InputError, match="wanted 1 or more along the side"):
        write_chips(store, tmp_path / "chips.parquet", side=0)
    with pytest.raises(InputError, match="there is no file"):
        open_chips(tmp_path / "chips.parquet")
    gpd.GeoDataFrame({"a": [1]}, geometry=[shapely.Point(0, 0)], crs=4326).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match="holds no chips"):
        open_chips(tmp_path / "other.parquet")
    run_chips(store.path, tmp_path / "chips.parquet", side=2, country=None, overwrite=False)
    with pytest.raises(InputError, match="exists"):
        run_chips(store.path, tmp_path / "chips.parquet", side=2, country=None, overwrite=False)
