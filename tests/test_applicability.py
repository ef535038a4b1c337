import json

import numpy as np
import pytest
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from panterra.errors import InputError
from panterra.evaluate.applicability import fit_applicability, load_applicability
from panterra.mapping.applicability import write_applicability
from panterra.mapping.embeddings import create_zarr, open_embeddings, write_zarr
from panterra.mapping.tiles import blocks

METRICS = ("euclidean", "cosine", "mahalanobis")
BOX = GeoBox((30, 45), Affine(40, 0, 500000, 0, -40, 5000000), "EPSG:32633")
ABOUT = {"model": {"name": "some"}, "patch_m": 40.0, "modalities": ["sentinel2_l2a"], "dates": ["2023-04-15"]}


@pytest.fixture
def trained():
    """Correlated features of unequal size in eight blocks, each around a centre of its own."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(8), 15)
    mixing = rng.normal(size=(6, 6)) * [1, 2, 5, 0.1, 1, 1]
    features = (rng.normal(size=(8, 6))[groups] + rng.normal(size=(120, 6))) @ mixing + 3
    return features.astype(np.float32), groups


def standardised(features, like, metric):
    if metric == "mahalanobis":
        # Distances in this space are Mahalanobis distances whatever the rotation.
        root = np.linalg.cholesky(LedoitWolf().fit(like).precision_)
        return (features - like.mean(0)) @ root
    rows = (features - like.mean(0)) / like.std(0)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if metric == "cosine" else rows


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("neighbours", [1, 4])
def test_the_index_is_that_of_meyer_and_pebesma(trained, metric, neighbours):
    features, groups = trained
    fitted = fit_applicability(features, groups, metric=metric, neighbours=neighbours)
    like = features.astype(float)
    examples = standardised(like, like, metric)
    kind = "cosine" if metric == "cosine" else "euclidean"
    everyone = NearestNeighbors(n_neighbors=120, metric=kind).fit(examples)
    distance, order = everyone.kneighbors(examples)
    unit = distance.sum() / (120 * 119)
    across = np.array([d[groups[o] != g][:neighbours].mean() for d, o, g in zip(distance, order, groups, strict=True)])
    index = across / unit
    lower, upper = np.quantile(index, [0.25, 0.75])
    assert fitted.unit == pytest.approx(unit, rel=1e-3)
    assert fitted.threshold == pytest.approx(index[index <= upper + 1.5 * (upper - lower)].max(), rel=1e-3)
    new = np.random.default_rng(1).normal(size=(5, 7, 6)).astype(np.float32) * 4
    nearest = everyone.kneighbors(standardised(new.reshape(-1, 6), like, metric))[0][:, :neighbours].mean(1)
    np.testing.assert_allclose(fitted.index(new).ravel(), nearest / unit, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("metric", METRICS)
def test_what_was_learned_from_is_inside_and_what_is_far_is_not(trained, metric):
    features, groups = trained
    fitted = fit_applicability(features, groups, metric=metric)
    assert fitted.inside(fitted.index(features)).all()
    np.testing.assert_allclose(fitted.index(features), 0, atol=2e-3)
    if metric == "cosine":  # which looks at directions alone
        np.testing.assert_allclose(fitted.index(features.mean(0) + 9 * (features - features.mean(0))), 0, atol=2e-3)
        return
    # Far from all, in a direction of which the examples know nothing.
    far = features.mean(0) + 100 * np.linalg.svd(features - features.mean(0))[2][-1]
    assert not fitted.inside(fitted.index(far))


def test_places_without_data_are_neither(trained):
    fitted = fit_applicability(*trained)
    places = np.zeros((2, 3, 6), np.float32)
    places[0, 1, 4] = np.nan
    index = fitted.index(places)
    assert np.isnan(index[0, 1])
    assert np.isfinite(index).sum() == 5
    assert not fitted.inside(index)[0, 1]
    assert np.isnan(fitted.index(np.full((3, 6), np.nan))).all()


def test_mahalanobis_hardly_cares_how_features_are_mixed():
    rng = np.random.default_rng(3)
    features, groups = rng.normal(size=(1500, 4)) * [1, 3, 9, 27], np.arange(1500) % 10
    mixing = rng.normal(size=(4, 4))
    new = rng.normal(size=(50, 4)) * [3, 9, 27, 81]
    plain = fit_applicability(features, groups, metric="mahalanobis").index(new)
    mixed = fit_applicability(features @ mixing, groups, metric="mahalanobis").index(new @ mixing)
    np.testing.assert_allclose(plain, mixed, rtol=0.1)


def test_fewer_samples_than_features_are_enough():
    rng = np.random.default_rng(4)
    fitted = fit_applicability(rng.normal(size=(20, 64)), np.arange(20) % 4, metric="mahalanobis")
    assert np.isfinite(fitted.index(rng.normal(size=(5, 64)))).all()


def test_neighbours_within_a_block_prove_nothing(trained):
    """Blocks that lie apart give a wider area than the same samples dealt at random."""
    features, groups = trained
    shuffled = np.random.default_rng(0).permutation(groups)
    assert fit_applicability(features, groups).threshold > fit_applicability(features, shuffled).threshold


def test_parts_of_the_examples_do_not_matter(trained, monkeypatch):
    features, groups = trained
    whole = fit_applicability(features, groups)
    monkeypatch.setattr("panterra.evaluate.applicability._DISTANCES", 120 * 26)
    parts = fit_applicability(features, groups)
    assert parts.threshold == pytest.approx(whole.threshold, rel=1e-4)
    np.testing.assert_allclose(parts.index(features * 1.1), whole.index(features * 1.1), rtol=1e-3, atol=1e-3)


def test_saved_and_loaded(trained, tmp_path):
    fitted = fit_applicability(*trained, metric="cosine", neighbours=3)
    again = load_applicability(fitted.save(tmp_path / "area.safetensors"))
    assert (again.metric, again.neighbours, again.threshold) == ("cosine", 3, fitted.threshold)
    new = np.random.default_rng(1).normal(size=(9, 6)).astype(np.float32)
    assert (again.index(new) == fitted.index(new)).all()
    (tmp_path / "other.safetensors").write_bytes(b"0")
    with pytest.raises(InputError, match="holds no area of applicability"):
        load_applicability(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": np.zeros(120, int)}, "give samples of two groups or more"),
        ({"neighbours": 106}, "ask for fewer neighbours"),
        ({"features": np.ones((120, 6))}, "all training features are the same"),
        ({"features": np.full((120, 6), np.nan)}, "leave out samples without data"),
        ({"metric": "manhattan"}, "known: euclidean, cosine, mahalanobis"),
        ({"groups": np.zeros(3, int)}, r"wanted \[n, d\] and \[n\]"),
    ],
)
def test_what_a_person_can_put_right(trained, change, message):
    given = {"features": trained[0], "groups": trained[1], **change}
    with pytest.raises(InputError, match=message):
        fit_applicability(**given)


def test_features_of_another_encoder_are_refused(trained):
    with pytest.raises(InputError, match=r"features are \[2, 5\]; wanted \[..., 6\]"):
        fit_applicability(*trained).index(np.zeros((2, 5)))


@pytest.fixture
def store(tmp_path):
    features = np.random.default_rng(2).normal(size=(*BOX.shape, 6)).astype(np.float32) * 3
    features[4:9, 20:31] = np.nan
    path = tmp_path / "e.zarr"
    create_zarr(path, BOX, dim=6, dtype="float32", shard=(12, 20), chunk=(6, 5), about=ABOUT)
    for tile in blocks(*BOX.shape, rows=12, cols=20):
        write_zarr(path, tile.core, features[tile.core.slices])
    return open_embeddings(path), features


def test_the_layer_holds_the_index_of_every_patch(store, trained, tmp_path):
    opened, features = store
    fitted = fit_applicability(*trained)
    seen = []
    out = write_applicability(opened, fitted, tmp_path / "layer.tif", progress=lambda *n: seen.append(n))
    with rasterio.open(out) as file:
        index, inside = file.read()
        assert file.descriptions == ("dissimilarity", "inside")
        assert file.transform == BOX.affine
        assert float(file.tags()["applicability_threshold"]) == pytest.approx(fitted.threshold)
    wanted = fitted.index(features)
    np.testing.assert_allclose(index, wanted, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(inside, np.where(np.isnan(index), np.nan, index <= fitted.threshold))
    assert 0 < np.nanmean(inside) < 1
    assert seen[-1] == (9, 9)
    passport = json.loads((tmp_path / "layer.tif.json").read_text())
    assert passport["properties"]["panterra:applicability"]["examples"] == 120
    assert passport["assets"]["applicability"]["bands"] == [{"name": "dissimilarity"}, {"name": "inside"}]


@pytest.mark.parametrize(("name", "message"), [("a.png", "end in .tif"), ("there.tif", "replace it with overwrite")])
def test_where_the_layer_cannot_go(store, trained, tmp_path, name, message):
    (tmp_path / "there.tif").touch()
    with pytest.raises(InputError, match=message):
        write_applicability(store[0], fit_applicability(*trained), tmp_path / name)


def test_a_layer_of_another_encoder_is_refused(store, trained, tmp_path):
    features, groups = trained
    with pytest.raises(InputError, match="is of features of width 5"):
        write_applicability(store[0], fit_applicability(features[:, :5], groups), tmp_path / "a.tif")
