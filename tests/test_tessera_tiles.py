"""Embeddings of TESSERA are found where samples lie, in the files as geotessera documents them."""

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin
from rasterio.warp import transform

from panterra.errors import InputError
from panterra.models.adapters.tessera_tiles import DIM, open_tessera
from panterra.models.features import Encoder
from panterra.sample import Batch, Observation, collate

CRS = "EPSG:32631"
WEST, NORTH = 300_000, 5_760_000
SIDE = 20


def write_mask(path, column):
    """Write a tile's land mask; tiles of 20 pixels stand side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "height": SIDE, "width": SIDE, "crs": CRS}
    grid = from_origin(WEST + column * SIDE * 10, NORTH, 10, 10)
    with rasterio.open(path, "w", count=1, dtype="uint8", transform=grid, **profile) as file:
        file.write(np.ones((1, SIDE, SIDE), "uint8"))
    return grid, profile


def write_tiles(root, *, deep=False):
    """Write two neighbours as int8 with scales, one per pixel or per number; give what they mean, side by side."""
    rng, known = np.random.default_rng(0), []
    for column, name in enumerate(("grid_0.05_51.95", "grid_0.15_51.95")):
        numbers = rng.integers(-127, 128, (SIDE, SIDE, DIM), dtype="int8")
        scales = rng.uniform(0.01, 0.1, (SIDE, SIDE, DIM) if deep else (SIDE, SIDE)).astype("float32")
        folder = root / "v1/2024" / name
        folder.mkdir(parents=True)
        np.save(folder / f"{name}.npy", numbers)
        np.save(folder / f"{name}_scales.npy", scales)
        write_mask(root / "v1/landmasks" / f"{name}.tiff", column)
        known.append(numbers * (scales if deep else scales[..., None]))
    return np.concatenate(known, axis=1)


def batch_at(*corners, pixels=8):
    """Show nothing of squares of 8 pixels whose north-western corner is at a (row, column) of the tiles."""
    xs = [WEST + (column + pixels / 2) * 10 for _, column in corners]
    ys = [NORTH - (row + pixels / 2) * 10 for row, _ in corners]
    lonlat = torch.tensor(np.array(transform(CRS, "EPSG:4326", xs, ys)).T)
    seen = Observation.build(torch.zeros(12, pixels, pixels), ["2024-06-01"])
    return collate([Batch(observations={"sentinel2_l2a": seen}, lonlat=place[None]) for place in lonlat])


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(("patch_m", "fine"), [(10, 1), (40, 4)])
def test_patches_are_means_of_the_pixels_below(tmp_path, deep, patch_m, fine):
    known = write_tiles(tmp_path, deep=deep)
    encoder = open_tessera(tmp_path)
    assert isinstance(encoder, Encoder)
    # The second lies over both tiles.
    corners = [(3, 5), (8, 16)]
    found = encoder.encode(batch_at(*corners), patch_m=patch_m)
    assert found.valid.all()
    for n, (row, column) in enumerate(corners):
        under = known[row : row + 8, column : column + 8]
        wanted = under.reshape(8 // fine, fine, 8 // fine, fine, DIM).mean((1, 3))
        np.testing.assert_allclose(found.patches[n], wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.summary[n], under.mean((0, 1)), rtol=1e-4, atol=1e-5)


def test_ground_without_a_tile_is_no_data(tmp_path):
    known = write_tiles(tmp_path)
    found = open_tessera(tmp_path).encode(batch_at((-4, 2), (500, 500)), patch_m=40)
    assert found.valid[0].tolist() == [[False, False], [True, True]]
    assert not found.valid[1].any()
    assert found.patches[1].abs().sum() == 0
    np.testing.assert_allclose(found.summary[0], known[:4, 2:10].mean((0, 1)), rtol=1e-4, atol=1e-5)


def test_exported_geotiffs_are_the_same(tmp_path):
    known = write_tiles(tmp_path / "stored")
    for column in (0, 1):
        path = tmp_path / "exported" / f"any_name_{column}.tif"
        grid, profile = write_mask(path, column)
        with rasterio.open(path, "w", count=DIM, dtype="float32", transform=grid, **profile) as file:
            file.write(known[:, column * SIDE : (column + 1) * SIDE].transpose(2, 0, 1).astype("float32"))
    write_mask(tmp_path / "exported" / "mask_of_another_kind.tif", 5)
    given = batch_at((0, 15))
    stored, exported = (
        open_tessera(tmp_path / kind).encode(given, patch_m=20).patches for kind in ("stored", "exported")
    )
    torch.testing.assert_close(stored, exported)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="has no tiles of TESSERA"):
        open_tessera(tmp_path)
    write_tiles(tmp_path)
    encoder = open_tessera(tmp_path, name="tessera 2024")
    assert encoder.name == "tessera 2024"
    batch = batch_at((0, 0))
    with pytest.raises(InputError, match="wants to know where a sample lies"):
        encoder.encode(Batch(observations=batch.observations), patch_m=10)
    with pytest.raises(InputError, match="has no sub-patch features"):
        encoder.encode(batch, patch_m=10, dense=True)
    folder = tmp_path / "v1/2024/grid_0.05_51.95"
    again = tmp_path / "v1/2023/grid_0.05_51.95"
    again.mkdir(parents=True)
    for path in folder.iterdir():
        (again / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="are of the same place; give a folder with one year"):
        open_tessera(tmp_path)
    (folder / "grid_0.05_51.95_scales.npy").unlink()
    with pytest.raises(InputError, match=r"has no grid_0.05_51.95_scales.npy beside it"):
        open_tessera(tmp_path / "v1")
    (tmp_path / "v1/landmasks/grid_0.15_51.95.tiff").unlink()
    with pytest.raises(InputError, match=r"has no land mask grid_0.15_51.95.tiff"):
        open_tessera(tmp_path / "v1/2024/grid_0.15_51.95")
