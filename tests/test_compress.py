"""Features in fewer bits and numbers, against the recorded codes and scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.decomposition import PCA

from panterra.errors import InputError
from panterra.evaluate.compress import bytes_of, compressed, parse_compression
from panterra.evaluate.sweep import Table

GOLDEN = Path(__file__).parent / "golden" / "olmoearth" / "eval_cases.safetensors"


def tables(x, **others):
    return {role: Table(x=torch.as_tensor(v), y=torch.zeros(len(v))) for role, v in {"train": x, **others}.items()}


def features(n=200, d=8, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / 8).astype(np.float32)


@pytest.mark.parametrize(
    ("how", "name"),
    [("int8", ""), *((f"percentile{b}", f"p{b}_") for b in (1, 2, 4))],
)
def test_recorded_codes(how, name):
    recorded = load_file(GOLDEN)
    found = compressed(tables(recorded["quant/embeddings"]), parse_compression(how))["train"].x
    np.testing.assert_allclose(found, recorded[f"quant/{name}dequantized"], rtol=1e-5, atol=1e-6)


def test_principal_axes_are_those_of_scikit_learn():
    train, test = features(), features(30, seed=1)
    found = compressed(tables(train, test=test), parse_compression("pca3"))
    oracle = PCA(3, svd_solver="full").fit(train)
    for role, rows in (("train", train), ("test", test)):
        wanted, got = oracle.transform(rows), found[role].x.numpy()
        sign = np.sign((wanted * got).sum(0))
        np.testing.assert_allclose(got * sign, wanted, rtol=1e-4, atol=1e-4)


def test_grids_keep_their_shape_and_their_gaps():
    x = features(120).reshape(10, 3, 4, 8).copy()
    x[2, 1, 3] = np.nan
    for how in ("int8", "percentile4", "pca5", "int8+pca5", "pca5+int8"):
        found = compressed(tables(x), parse_compression(how))["train"].x
        assert found.shape == (10, 3, 4, 5 if "pca" in how else 8)
        lost = found.isnan().all(-1)
        assert lost.sum() == 1
        assert lost[2, 1, 3]
        assert not found[~lost].isnan().any()
    assert compressed(tables(x), ())["train"].x.shape == x.shape


def test_steps_go_from_left_to_right():
    x = features()
    first = compressed(tables(x), parse_compression("int8"))
    both = compressed(first, parse_compression("pca4"))["train"].x
    torch.testing.assert_close(compressed(tables(x), parse_compression("int8+pca4"))["train"].x, both)


@pytest.mark.parametrize(
    ("how", "size"),
    [("none", 512), ("int8", 128), ("percentile4", 64), ("pca16", 64), ("pca16+int8", 16), ("int8+pca16", 64)],
)
def test_bytes_of_a_vector(how, size):
    assert bytes_of(parse_compression(how), 128) == size


@pytest.mark.parametrize(
    ("text", "said"),
    [("zip", "'zip' compresses nothing"), ("percentile9", "1 to 8 bits"), ("pca0", "1 number at least")],
)
def test_what_compresses_nothing_is_refused(text, said):
    with pytest.raises(InputError, match=said):
        parse_compression(text)


def test_more_axes_than_vectors_are_refused():
    with pytest.raises(InputError, match="pca7 was asked for of 5 training vectors of width 8"):
        compressed(tables(features(5)), parse_compression("pca7"))
