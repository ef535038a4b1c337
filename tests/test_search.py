import json

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from panterra.commands.search import run_search
from panterra.errors import InputError
from panterra.imagery.raster import write_cog
from panterra.mapping import embeddings, search_index
from panterra.mapping import search as searching
from panterra.mapping.embeddings import (
    NO_BYTE,
    cog_band_names,
    cog_bands,
    cog_tags,
    create_zarr,
    lonlat_of,
    open_embeddings,
    write_zarr,
)
from panterra.mapping.search import earth_xyz, search, similarity_map, spread
from panterra.mapping.search_index import build_index, open_index
from panterra.mapping.search_query import (
    PENALTY,
    Examples,
    Query,
    check_comparable,
    gather_examples,
    make_query,
    open_together,
    place_at,
    read_places,
)
from panterra.mapping.tiles import Window, blocks

BOX = GeoBox((44, 61), Affine(40, 0, 500000, 0, -40, 5000000), "EPSG:32633")
ABOUT = {"model": {"name": "some"}, "patch_m": 40.0, "modalities": ["sentinel2_l2a"], "dates": ["2023-04-15"]}
HOLE = (slice(4, 9), slice(20, 31))
DIM = 12


def make_features(seed=1, shape=BOX.shape):
    """Clustered features of very different lengths that vary smoothly on the ground, with a hole."""
    rng = np.random.default_rng(seed)
    row, col = np.mgrid[: shape[0], : shape[1]] / 9
    waves = np.stack([np.sin(row * a + b) * np.cos(col * c + d) for a, b, c, d in rng.uniform(0.3, 3, (DIM, 4))], -1)
    values = (waves + 0.1 * rng.normal(size=waves.shape)) * 10 ** rng.uniform(-2, 2, (*shape, 1))
    values[HOLE] = np.nan
    return values.astype(np.float32)


def write(path, features, dtype="float32", box=BOX, about=ABOUT):
    if path.suffix == ".tif":
        nodata = NO_BYTE if dtype == "int8" else np.nan
        names, tags = cog_band_names(DIM, dtype), cog_tags(about, dtype)
        write_cog(path, cog_bands(features, dtype), box, nodata=nodata, band_names=names, tags=tags)
    else:
        create_zarr(path, box, dim=DIM, dtype=dtype, shard=(20, 20), chunk=(5, 5), about=about)
        for tile in blocks(*box.shape, rows=20, cols=20):
            write_zarr(path, tile.core, features[tile.core.slices])
    return open_embeddings(path)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Make a search of these few patches go through several blocks."""
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", 20_000)


def directions(store):
    values = store.read().astype(np.float64).reshape(-1, store.dim)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def oracle(store, weight, top, apart_m):
    """Sort everything, then walk down the list."""
    scores = np.nan_to_num(directions(store) @ weight.astype(np.float64), nan=-np.inf)
    places = earth_xyz(lonlat_of(*np.divmod(np.arange(len(scores)), store.box.shape[1]), store.box))
    kept = []
    for cell in np.argsort(-scores, kind="stable"):
        if len(kept) == top or scores[cell] == -np.inf:
            break
        if not kept or np.linalg.norm(places[kept] - places[cell], axis=1).min() >= apart_m:
            kept.append(int(cell))
    return np.array(kept), scores[kept]


def some_query(seed=3):
    weight = np.random.default_rng(seed).normal(size=DIM).astype(np.float32)
    return Query(weight=weight / np.linalg.norm(weight))


@pytest.mark.parametrize(
    ("name", "dtype"), [("e.zarr", "float32"), ("e.zarr", "float16"), ("e.zarr", "int8"), ("e.tif", "int8")]
)
@pytest.mark.parametrize(("top", "apart_m"), [(25, 0), (25, 200), (400, 130)])
def test_an_exact_search_is_what_brute_force_finds(tmp_path, name, dtype, top, apart_m):
    store, query = write(tmp_path / name, make_features(), dtype), some_query()
    assert len(store.windows()) > 3 or name == "e.tif"
    found = search([store], query, top=top, apart_m=apart_m)
    cells, scores = oracle(store, query.weight, top, apart_m)
    assert (found.row * BOX.shape[1] + found.col).tolist() == cells.tolist()
    np.testing.assert_allclose(found.score, scores, atol=2e-6)


def test_few_candidates_at_a_time_find_the_same(tmp_path, monkeypatch):
    store, query = write(tmp_path / "e.zarr", make_features(), "int8"), some_query()
    cells, _ = oracle(store, query.weight, 30, 300)
    monkeypatch.setattr(searching, "MOST_CANDIDATES", 40)
    found = search([store], query, top=30, apart_m=300)
    assert (found.row * BOX.shape[1] + found.col).tolist() == cells.tolist()


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(1, 2000), st.integers(1, 60))
def test_kept_places_keep_their_distance_and_others_are_near_a_better_one(seed, apart_m, most):
    rng = np.random.default_rng(seed)
    xyz = earth_xyz(np.stack([rng.uniform(179.98, 180.02, 80), rng.uniform(-0.02, 0.02, 80)], axis=1))
    kept = spread(xyz, apart_m, most)
    between = np.linalg.norm(xyz[kept][:, None] - xyz[kept][None], axis=-1)
    assert (between[~np.eye(len(kept), dtype=bool)] >= apart_m).all()
    for dropped in np.setdiff1d(np.arange(kept[-1]), kept):
        better = kept[kept < dropped]
        assert np.linalg.norm(xyz[better] - xyz[dropped], axis=1).min() < apart_m
    if len(kept) < most:
        assert all(np.linalg.norm(xyz[kept] - place, axis=1).min() < apart_m for place in np.delete(xyz, kept, axis=0))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_places_without_data_are_never_found(tmp_path, dtype):
    features = make_features()
    features[30, 30] = 0
    store = write(tmp_path / "e.zarr", features, dtype)
    found = search([store], some_query(), top=10**4, apart_m=0)
    cells = found.row * BOX.shape[1] + found.col
    hole = np.zeros(BOX.shape, bool)
    hole[HOLE] = hole[30, 30] = True
    assert set(cells.tolist()) == set(np.flatnonzero(~hole.ravel()).tolist())
    assert np.isfinite(found.score).all()


def test_the_surroundings_of_examples_are_left_out(tmp_path):
    store = write(tmp_path / "e.zarr", make_features())
    like = gather_examples(place_at(*lonlat_of(np.array([33]), np.array([12]), BOX)[0]), [store])
    query = make_query(like)
    with_them = search([store], query, top=1)
    assert (with_them.row[0], with_them.col[0]) == (33, 12)
    assert with_them.score[0] == pytest.approx(1, abs=1e-5)
    without = search([store], query, top=500, apart_m=150, leave_out=like)
    assert (np.hypot(without.row - 33, without.col - 12) * 40 >= 149.5).all()


def test_several_stores_are_one_search(tmp_path):
    east = GeoBox(BOX.shape, Affine(40, 0, 190000, 0, -40, 5000000), "EPSG:32634")
    stores = [
        write(tmp_path / "a.zarr", make_features(1)),
        write(tmp_path / "b.zarr", make_features(2), "int8", box=east),
    ]
    query = some_query()
    both = search(stores, query, top=40, apart_m=0)
    alone = [search([store], query, top=40, apart_m=0) for store in stores]
    expected = np.sort(np.concatenate([a.score for a in alone]))[::-1][:40]
    np.testing.assert_array_equal(both.score, expected)
    assert set(both.source) == {0, 1}


def test_examples_and_counter_examples_make_the_query(tmp_path):
    store = write(tmp_path / "e.zarr", make_features())
    at = directions(store).reshape(*BOX.shape, DIM)
    square = shapely.box(500000 + 40 * 10, 5000000 - 40 * 35, 500000 + 40 * 13, 5000000 - 40 * 31)
    tiny = shapely.Point(500000 + 40 * 50.2, 5000000 - 40 * 40.2).buffer(3)
    lost = shapely.Point(0, 0)
    hole = shapely.Point(500000 + 40 * 25, 5000000 - 40 * 6)
    places = gpd.GeoSeries([square, tiny, lost, hole], crs="EPSG:32633").to_crs("EPSG:4326")
    mean = gather_examples(places, [store])
    assert (len(mean.vectors), len(mean.lonlat), mean.unseen) == (2, 13, 2)
    centre = at[31:35, 10:13].reshape(-1, DIM).mean(0)
    np.testing.assert_allclose(mean.vectors, [centre / np.linalg.norm(centre), at[40, 50]], atol=1e-5)
    every = gather_examples(places, [store], polygons="all")
    np.testing.assert_allclose(
        every.vectors.mean(0), np.vstack([at[31:35, 10:13].reshape(-1, DIM), at[40, 50]]).mean(0), atol=1e-5
    )
    against = mean.vectors.mean(0) - 0.2 * every.vectors.mean(0)
    np.testing.assert_allclose(
        make_query(mean, every, unlike_weight=0.2).weight, against / np.linalg.norm(against), atol=1e-5
    )
    with pytest.raises(InputError, match="nothing is left to look for"):
        make_query(mean, mean)


def test_a_logistic_query_is_where_its_loss_is_flat():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, DIM)) + np.repeat([[0.5], [-0.3]], [20, 40], axis=0)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    like, unlike = (Examples(vectors=part, lonlat=np.zeros((1, 2))) for part in (x[:20], x[20:]))
    query = make_query(like, unlike, method="logistic")
    pull = np.repeat([0.5 / 20, 0.5 / 40], [20, 40]) * (query.values(x @ query.weight) - np.repeat([1, 0], [20, 40]))
    np.testing.assert_allclose(pull @ x + 2 * PENALTY * query.weight, 0, atol=1e-5)
    assert pull.sum() == pytest.approx(0, abs=1e-5)
    assert query.values(x[:20] @ query.weight).mean() > query.values(x[20:] @ query.weight).mean() + 0.2


def test_a_logistic_query_needs_no_counter_examples(tmp_path):
    store = write(tmp_path / "e.zarr", make_features())
    like = gather_examples(place_at(*lonlat_of(np.array([33]), np.array([12]), BOX)[0]), [store])
    found = search([store], make_query(like, method="logistic", background=[store]), top=5)
    assert (found.row[0], found.col[0]) == (33, 12)
    assert 1 >= found.score[0] > 0.5


def test_a_similarity_map_shows_the_score_of_every_patch(tmp_path):
    store, query = write(tmp_path / "e.zarr", make_features(), "int8"), some_query()
    with similarity_map(tmp_path / "map.tif", BOX) as similarity:
        search([store], query, top=3, similarity=similarity)
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.transform == BOX.affine
        np.testing.assert_allclose(
            file.read(1), (directions(store) @ query.weight).reshape(BOX.shape), atol=2e-6, equal_nan=True
        )


def test_a_small_window_reads_its_chunks_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "CHUNK_BYTES", 1)
    store = write(tmp_path / "e.zarr", make_features())
    assert (store.block, store.chunk) == ((20, 20), (5, 5))
    gets = record_gets(monkeypatch)
    store.read(Window(row=21, col=41, height=4, width=8))
    # Of the shard in the second row and third column: its index, and the chunks of rows 20-24 and columns 40-44, 45-49.
    assert {key for key, _ in gets} == {"embeddings/c/0/1/2"}
    assert len(gets) == 3
    assert sum(length for _, length in gets) < (store.path / "embeddings/c/0/1/2").stat().st_size / 4


def record_gets(monkeypatch):
    """List what is read from stores from now on, as keys and numbers of bytes."""
    from zarr.storage import LocalStore

    gets, get = [], LocalStore.get

    async def counted(self, key, prototype, byte_range=None):
        found = await get(self, key, prototype, byte_range)
        gets.append((key, len(found) if found is not None else 0))
        return found

    monkeypatch.setattr(LocalStore, "get", counted)
    return gets


def test_chunks_grow_to_a_size_that_is_quick_to_read(tmp_path):
    assert write(tmp_path / "e.zarr", make_features()).chunk == (20, 20)


# The index


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_index_finds_what_it_promises(tmp_path, dtype):
    store = write(tmp_path / "e.zarr", make_features(), dtype)
    index = build_index(store, recall=0.9, part_vectors=700)
    assert len(list(index.folder.glob("part_*.faiss"))) > 2
    assert index.count == np.isfinite(store.read()).all(-1).sum()
    assert index.recall >= 0.9
    recalls = []
    for seed in range(10):
        query = some_query(seed)
        exact = search([store], query, top=50, apart_m=0)
        found = search([store], query, top=50, apart_m=0, indexes=[open_index(store)])
        cells = [set((f.row * BOX.shape[1] + f.col).tolist()) for f in (exact, found)]
        recalls.append(len(cells[0] & cells[1]) / 50)
        np.testing.assert_allclose(
            found.score, directions(store)[found.row * BOX.shape[1] + found.col] @ query.weight, atol=2e-6
        )
        assert (np.diff(found.score) <= 0).all()
    assert np.mean(recalls) > 0.85


def test_an_index_looks_further_until_it_has_enough(tmp_path):
    store = write(tmp_path / "e.zarr", make_features())
    index = build_index(store, recall=0.2)
    assert index.probes < index.lists
    exact, found = (search([store], some_query(), top=10**4, apart_m=0, indexes=i) for i in ([], [index]))
    assert len(found) == len(exact)


def test_a_stale_index_is_refused_and_a_copied_one_is_not(tmp_path):
    store = write(tmp_path / "e.zarr", make_features())
    with pytest.raises(InputError, match=r"has no index; build it with: panterra search .*e.zarr --build-index"):
        open_index(store)
    built = build_index(store)
    (store.path / "zarr.json").touch()
    assert open_index(store).count == built.count
    changed = make_features(2)
    write_zarr(store.path, Window(row=0, col=0, height=20, width=20), changed[:20, :20])
    with pytest.raises(InputError, match="is stale"):
        open_index(store)
    assert build_index(store).count == built.count
    assert open_index(store).count == built.count


def test_a_damaged_index_is_told_of(tmp_path):
    store = write(tmp_path / "e.zarr", make_features())
    path = next(build_index(store).folder.glob("part_*"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"e\.zarr\.index is damaged .*remove it, and build the index again"):
        open_index(store)


def test_a_build_that_was_stopped_goes_on(tmp_path, monkeypatch):
    store = write(tmp_path / "e.zarr", make_features())
    whole = build_index(store, part_vectors=700)
    parts = {p.name: p.read_bytes() for p in whole.folder.glob("part_*")}
    kept = whole.folder.rename(tmp_path / "kept")

    def stop_late(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(store, part_vectors=700, progress=stop_late)
    assert not whole.folder.exists()
    begun = sorted((tmp_path / "e.zarr.index.parts").glob("part_*"))
    assert 0 < len(begun) < len(parts)
    times = [p.stat().st_mtime_ns for p in begun]
    again = build_index(store, part_vectors=700)
    assert {p.name: p.read_bytes() for p in again.folder.glob("part_*")} == parts
    assert [(again.folder / p.name).stat().st_mtime_ns for p in begun] == times
    assert json.loads((kept / "index.json").read_text()) == json.loads((again.folder / "index.json").read_text())
    assert not list(tmp_path.glob("*.parts"))


# The command


def places_file(path, *cells):
    lonlat = lonlat_of(*np.array(cells).T, BOX)
    gpd.GeoSeries(shapely.points(lonlat), crs="EPSG:4326").to_file(path)
    return path


DEFAULTS = {
    "like": None,
    "at": (),
    "unlike": None,
    "like_stores": (),
    "polygons": "mean",
    "method": "cosine",
    "unlike_weight": 1.0,
    "top": 5,
    "apart_m": 100.0,
    "keep_examples": False,
    "approximate": False,
    "out": None,
    "similarity": None,
    "overwrite": False,
}


def test_what_was_found_is_written_with_where_it_comes_from(tmp_path):
    store = write(tmp_path / "e.zarr", make_features())
    like, out = places_file(tmp_path / "like.geojson", (33, 12)), tmp_path / "found.geojson"
    options = DEFAULTS | {"like": like, "out": out, "similarity": tmp_path / "map.tif", "at": (15.01, 45.14)}
    done = run_search([store.path], **options)
    frame = gpd.read_file(out)
    assert frame["rank"].tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(frame["score"], done.found.score, atol=1e-6)
    np.testing.assert_allclose(frame.geometry.x, done.found.lonlat[:, 0], atol=1e-6)
    assert set(frame["store"]) == {"e.zarr"}
    note = json.loads(out.read_text())["panterra:search"]
    assert (note["model"], note["exact"], note["examples"]) == ("some", True, 2)
    passport = json.loads((tmp_path / "map.tif.json").read_text())
    assert passport["assets"]["similarity"]["href"] == "./map.tif"
    with pytest.raises(InputError, match="exists; choose another name"):
        run_search([store.path], **options)
    assert not list(tmp_path.glob(".*"))


def test_examples_may_come_from_another_store(tmp_path):
    east = GeoBox(BOX.shape, Affine(40, 0, 190000, 0, -40, 5000000), "EPSG:32634")
    store = write(tmp_path / "a.zarr", make_features())
    write(tmp_path / "b.zarr", make_features(), box=east)
    like = places_file(tmp_path / "like.geojson", (33, 12))
    done = run_search([tmp_path / "b.zarr"], **DEFAULTS | {"like": like, "like_stores": [store.path]})
    assert (done.found.row[0], done.found.col[0]) == (33, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "like what"),
        ({"at": (15.0,)}, "pairs of longitude and latitude"),
        ({"at": (200.0, 45.0)}, "no longitude and latitude"),
        ({"at": (1.0, 2.0)}, "none of the 1 example places lies on a patch with data"),
        ({"at": (15.01, 45.14), "top": 0}, "wanted 1 or more"),
        ({"at": (15.01, 45.14), "approximate": True}, "has no index"),
    ],
)
def test_what_cannot_be_searched_says_why(tmp_path, options, message):
    store = write(tmp_path / "e.zarr", make_features())
    with pytest.raises(InputError, match=message):
        run_search([store.path], **DEFAULTS | options)


def test_stores_that_mean_different_things_are_refused(tmp_path):
    write(tmp_path / "a.zarr", make_features())
    write(tmp_path / "b.zarr", make_features(), about=ABOUT | {"model": {"name": "other"}})
    with pytest.raises(InputError, match=r"differ in model \(some and other\)"):
        open_together([tmp_path / "a.zarr", tmp_path / "b.zarr"])
    check_comparable(*open_together([tmp_path / "a.zarr"] * 2))


def test_files_without_places_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        read_places(tmp_path / "none.geojson")
    (tmp_path / "bad.geojson").write_text("{}")
    with pytest.raises(InputError, match="cannot read places"):
        read_places(tmp_path / "bad.geojson")
    gpd.GeoSeries([shapely.LineString([(0, 0), (1, 1)])], crs="EPSG:4326").to_file(tmp_path / "line.geojson")
    with pytest.raises(InputError, match="holds LineString; wanted points or polygons"):
        read_places(tmp_path / "line.geojson")


def test_a_recall_that_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(InputError, match="wanted more than 0 and at most 1"):
        search_index.build_index(write(tmp_path / "e.zarr", make_features()), recall=0)
