import json

import numpy as np
import odc.geo.xr  # noqa: F401  gives xarray objects their `.odc`
import pytest
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.imagery.raster import write_cog
from panterra.mapping.embeddings import (
    NO_BYTE,
    cog_band_names,
    cog_bands,
    cog_tags,
    create_zarr,
    from_bytes,
    open_embeddings,
    to_bytes,
    write_zarr,
)
from panterra.mapping.tiles import Window, blocks

BOX = GeoBox((30, 45), Affine(40, 0, 500000, 0, -40, 5000000), "EPSG:32633")
ABOUT = {"model": {"name": "some"}, "patch_m": 40.0, "modalities": ["sentinel2_l2a"], "dates": ["2023-04-15"]}


@pytest.fixture
def features() -> np.ndarray:
    """Normal features whose size differs from patch to patch, with a hole."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(*BOX.shape, 6)) * 10 ** rng.uniform(-3, 2, (*BOX.shape, 1))
    values[4:9, 20:31] = np.nan
    return values.astype(np.float32)


def write(path, features, dtype):
    if path.suffix == ".zarr":
        create_zarr(path, BOX, dim=6, dtype=dtype, shard=(12, 20), chunk=(6, 5), about=ABOUT)
        for tile in blocks(*BOX.shape, rows=12, cols=20):
            write_zarr(path, tile.core, features[tile.core.slices])
    else:
        nodata = NO_BYTE if dtype == "int8" else np.nan
        names, tags = cog_band_names(6, dtype), cog_tags(ABOUT, dtype)
        write_cog(path, cog_bands(features, dtype), BOX, nodata=nodata, band_names=names, tags=tags)
    return open_embeddings(path)


@pytest.mark.parametrize(
    ("name", "dtype", "error"),
    [
        ("e.zarr", "float32", 0),
        ("e.zarr", "float16", 0.001),
        ("e.zarr", "int8", 0.012),
        ("e.tif", "float32", 0),
        ("e.tif", "int8", 0.012),
    ],
)
def test_what_was_written_is_read(tmp_path, features, name, dtype, error):
    store = write(tmp_path / name, features, dtype)
    assert (store.dim, store.dtype, store.box, store.about) == (6, dtype, BOX, ABOUT)
    off = np.abs(store.read() - features) / np.abs(features).max(-1, keepdims=True)
    assert np.nanmax(off) <= error
    np.testing.assert_array_equal(np.isnan(store.read()), np.isnan(features))
    window = Window(row=3, col=17, height=11, width=9)
    np.testing.assert_array_equal(store.read(window), store.read()[window.slices])
    rng = np.random.default_rng(2)
    row, col = rng.integers(0, 30, 50), rng.integers(0, 45, 50)
    np.testing.assert_array_equal(store.sample(row, col), store.read()[row, col])
    assert store.sample(row[:0], col[:0]).shape == (0, 6)


def test_the_scale_is_the_published_rule_brought_to_each_patch():
    x = np.array([[0.25, -0.5, 0.0], [2.5, -5.0, 0.0], [np.nan, 1, 1]], np.float32)
    codes, exponent = to_bytes(x)
    assert exponent.tolist() == [-8, 19, NO_BYTE]
    assert codes[0].tolist() == [round(np.sqrt(0.5) * 127.5), -127, 0]
    assert codes[2].tolist() == [NO_BYTE] * 3
    back = from_bytes(codes, exponent)
    assert (np.abs(back - x)[:2] / np.abs(x).max(1, keepdims=True)[:2]).max() < 0.012
    assert np.isnan(back[2]).all()


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1.0, 6e4])
def test_no_size_overflows_a_byte(size):
    x = np.array([[size, -size / 3]], np.float32)
    error = np.abs(from_bytes(*to_bytes(x)) - x).max() / max(size, 2**-15)
    assert error < 0.012


@pytest.mark.parametrize(("name", "dtype"), [("e.zarr", "float16"), ("e.zarr", "int8"), ("e.tif", "int8")])
def test_what_a_small_type_cannot_hold_is_refused(tmp_path, features, name, dtype):
    features[0, 0, 0] = -7e4
    with pytest.raises(InputError, match=f"features reach 70000, and {dtype} holds 6[05]"):
        write(tmp_path / name, features, dtype)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_xarray_finds_the_grid_and_the_gaps(tmp_path, features, dtype):
    write(tmp_path / "e.zarr", features, dtype)
    data = xr.open_zarr(tmp_path / "e.zarr", consolidated=False, decode_coords="all")
    assert data.embeddings.dims == ("embedding", "y", "x")
    assert data.embeddings.odc.geobox == BOX
    assert np.isnan(data.embeddings.values[:, 4:9, 20:31]).all()
    assert data.attrs["proj:code"] == "EPSG:32633"
    assert data.attrs["emb:dimensions"] == 6
    if dtype == "int8":
        x = 2 ** (data.scale_exponent / 8) * np.sign(data.embeddings) * (data.embeddings / 127.5) ** 2
        np.testing.assert_allclose(
            x.transpose("y", "x", "embedding"), open_embeddings(tmp_path / "e.zarr").read(), rtol=1e-5
        )


def test_a_shard_is_one_file_and_says_its_layout(tmp_path, features):
    write(tmp_path / "e.zarr", features, "float32")
    note = json.loads((tmp_path / "e.zarr" / "embeddings" / "zarr.json").read_text())
    assert note["zarr_format"] == 3
    assert note["codecs"][0]["name"] == "sharding_indexed"
    assert len([f for f in (tmp_path / "e.zarr" / "embeddings" / "c").rglob("*") if f.is_file()]) == 9


def test_what_holds_no_embeddings_says_so(tmp_path, features):
    store = write(tmp_path / "e.zarr", features, "float32")
    with pytest.raises(InputError, match="not inside the 30 x 45 patches"):
        store.read(Window(row=25, col=0, height=6, width=1))
    with pytest.raises(InputError, match="outside the 30 x 45 patches"):
        store.sample(np.array([30]), np.array([0]))
    with pytest.raises(InputError, match="holds no embeddings"):
        open_embeddings(tmp_path)
    write_cog(tmp_path / "other.tif", features[..., 0], BOX)
    with pytest.raises(InputError, match="holds no embeddings"):
        open_embeddings(tmp_path / "other.tif")
