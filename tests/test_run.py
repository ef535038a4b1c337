import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from odc.geo.geobox import GeoBox
from rio_cogeo.cogeo import cog_validate
from torch import nn

import panterra
from panterra.errors import InputError
from panterra.evaluate.probes import FeatureSource, Probe, ProbeClass
from panterra.files import CLAIM
from panterra.imagery.raster import write_cog
from panterra.imagery.stac import Scene, make_item, open_scene, save_scene
from panterra.mapping import reading
from panterra.mapping.blend import window_weight
from panterra.mapping.embeddings import open_embeddings
from panterra.mapping.run import embed
from panterra.mapping.run import map as make_map
from panterra.models.features import Encoder, Features
from panterra.sample import Batch

BOX = GeoBox((150, 203), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")
CUT = {"window_px": 32, "overlap_px": 8}
PATCH_PX, WINDOW, STRIDE, OVERLAP = 4, 8, 6, 2


class BandMeans(nn.Module):
    """Three band means and one backscatter mean per patch, and a term that depends on the place in the window."""

    modalities = ("sentinel2_l2a", "sentinel1")
    dim = 5
    name = "band-means"

    def __init__(self, seconds_per_batch: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5]))
        self.seconds_per_batch, self.sizes = seconds_per_batch, []

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False) -> Features:
        time.sleep(self.seconds_per_batch)
        self.sizes.append(len(batch))
        side, columns, seen = round(patch_m / batch.pixel_m), [], []
        for name, bands in (("sentinel2_l2a", 3), ("sentinel1", 1)):
            o = batch.observations[name]
            valid = o.valid[:, :, None]
            pixels = torch.where(valid, o.pixels[:, :, :bands], 0.0)
            total, count = (_patch_sums(x, side) for x in (pixels, valid.expand_as(pixels).float()))
            columns.append(total / count.clamp(min=1) / 1000)
            seen.append(count[..., 0] > 0)
        rows, cols = (torch.arange(n) for n in seen[0].shape[1:])
        place = (self.gain * torch.sin(rows[:, None] * 1.3 + cols * 0.7)).expand(len(batch), -1, -1)
        valid = seen[0] | seen[1]
        patches = torch.where(valid[..., None], torch.cat([*columns, place[..., None]], dim=-1), 0.0)
        return Features(patches=patches, summary=patches.mean((1, 2)), valid=valid, patch_m=patch_m)


def _patch_sums(x: torch.Tensor, side: int) -> torch.Tensor:
    return x.sum(1).unfold(2, side, side).unfold(3, side, side).sum((-2, -1)).movedim(1, -1)


def write_scene(folder: Path) -> Scene:
    """Two Sentinel-2 dates with a hole in both, and Sentinel-1 over the west half."""
    rng = np.random.default_rng(3)
    height, width = BOX.shape
    items = []
    for step, date in enumerate(("2023-04-15", "2023-07-01")):
        pixels = rng.integers(500, 4000, (12, height, width)).astype(np.uint16)
        pixels[:, 40:110, 60:130] = 0
        write_cog(folder / f"s2_{step}.tif", pixels, BOX, nodata=0)
        items.append(make_item(f"s2-{step}", "sentinel2_l2a", date, BOX, {"data": str(folder / f"s2_{step}.tif")}))
    west = BOX[:, :100]
    radar = rng.normal(-12, 3, (2, *west.shape)).astype(np.float32)
    radar[:, 40:110, 60:] = -32768
    write_cog(folder / "s1.tif", radar, west, nodata=-32768)
    items.append(make_item("s1-0", "sentinel1", "2023-04-20", west, {"data": str(folder / "s1.tif")}))
    save_scene(folder, items, "A scene for tests", "CC-BY-4.0")
    return open_scene(folder)


def make_probe(kind: str = "classes") -> Probe:
    """A linear probe that thresholds the first band."""
    classes = (
        ProbeClass(name="dark", code=3, colour=(20, 60, 120)),
        ProbeClass(name="bright", code=7, colour=(240, 220, 90)),
        ProbeClass(name="odd", code=8, colour=(200, 30, 200)),
    )
    weight = torch.tensor([[-1.0, 1.0, 0.0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1.0]])
    values = kind == "values"
    return Probe(
        kind="ridge" if values else "logistic",
        task="values" if values else "classes",
        classes=() if values else classes,
        tensors={
            "mean": torch.tensor([2.25, 0, 0, 0, 0]),
            "scale": torch.full((5,), 0.2),
            "weight": weight[:, :1].contiguous() if values else weight,
            "bias": torch.zeros(1 if values else 3),
        },
        source=FeatureSource(encoder="band-means", patch_m=40, modalities=BandMeans.modalities[::-1], window_px=32),
    )


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    return write_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def expected(scene) -> np.ndarray:
    """The blended features, window by window over the whole scene."""
    height, width = (-(-n // PATCH_PX) for n in BOX.shape)
    box = GeoBox((height * PATCH_PX, width * PATCH_PX), BOX.affine, BOX.crs)
    total, weights, encoder = np.zeros((height, width, 5)), np.zeros((height, width)), BandMeans()
    weight = window_weight(WINDOW, WINDOW, OVERLAP)
    for row in _starts(height):
        for col in _starts(width):
            part = np.s_[row : row + WINDOW, col : col + WINDOW]
            pixels = np.s_[row * 4 : (row + WINDOW) * 4, col * 4 : (col + WINDOW) * 4]
            with torch.inference_mode():
                features = encoder.encode(scene.batch(box[pixels]), patch_m=40)
            seen = weight * features.valid[0].numpy()
            total[part] += seen[..., None] * features.patches[0].numpy()
            weights[part] += seen
    with np.errstate(invalid="ignore"):
        return total / weights[..., None]


def _starts(size: int) -> list[int]:
    return [*range(0, size - WINDOW, STRIDE), size - WINDOW]


def test_the_fake_is_an_encoder():
    assert isinstance(BandMeans(), Encoder)


@pytest.mark.parametrize("tile_px", [24, 56, 110, 1000])
def test_embeddings_equal_whole_scene_blending_whatever_the_tile_size(scene, expected, tmp_path, tile_px):
    store = embed(scene, BandMeans(), tmp_path / "e.zarr", tile_px=tile_px, batch_windows=3, **CUT)
    np.testing.assert_allclose(store.read(), expected, atol=1e-5)
    assert np.isnan(expected[12:26, 16:31]).all()
    assert np.isfinite(expected[:9]).all()
    assert store.box == GeoBox((38, 51), Affine(40, 0, 500000, 0, -40, 5000000), "EPSG:32633")
    assert not (tmp_path / "e.zarr.parts").exists()


def test_every_window_is_encoded_once(scene, tmp_path):
    encoder, calls = BandMeans(), []
    embed(scene, encoder, tmp_path / "e.zarr", tile_px=60, batch_windows=4, progress=lambda *n: calls.append(n), **CUT)
    windows = len(_starts(38)) * len(_starts(51))
    # Four windows lie wholly in the hole and are left out.
    assert sum(encoder.sizes) == windows - 4
    assert max(encoder.sizes) == 4
    assert calls[0] == (0, windows)
    assert calls[-1] == (windows, windows)
    assert calls == sorted(calls)


def test_a_map_is_the_probe_of_the_blended_features(scene, expected, tmp_path):
    probe = make_probe()
    result = make_map(scene, probe, tmp_path / "m.tif", model=BandMeans(), probabilities=True, tile_px=60, overlap_px=8)
    seen = np.isfinite(expected).all(-1)
    with rasterio.open(result.path) as file:
        assert file.nodata == 0
        assert file.colormap(1)[7] == (240, 220, 90, 255)
        codes = file.read(1)
    np.testing.assert_array_equal(codes[~seen], 0)
    np.testing.assert_array_equal(codes[seen], probe.predict(expected[seen].astype(np.float32)))
    assert set(np.unique(codes)) == {0, 3, 7, 8}
    with rasterio.open(result.probabilities) as file:
        assert file.descriptions == ("dark", "bright", "odd")
        shares = np.moveaxis(file.read(), 0, -1)
    np.testing.assert_allclose(shares[seen], probe.probabilities(expected[seen].astype(np.float32)), atol=1e-5)
    assert np.isnan(shares[~seen]).all()
    for path in (result.path, result.probabilities):
        valid, errors, _ = cog_validate(path, strict=True)
        assert valid, errors
    assert 0 < result.encoder_seconds < result.seconds
    assert result.energy.kwh > 0


def test_a_map_of_values_keeps_nan_where_there_is_no_data(scene, expected, tmp_path):
    probe = make_probe("values")
    result = make_map(scene, probe, tmp_path / "m.tif", model=BandMeans(), overlap_px=8)
    with rasterio.open(result.path) as file:
        assert np.isnan(file.nodata)
        values = file.read(1)
    seen = np.isfinite(expected).all(-1)
    np.testing.assert_allclose(values[seen], probe.predict(expected[seen].astype(np.float32)), atol=1e-4)
    assert np.isnan(values[~seen]).all()


@pytest.mark.parametrize("name", ["e.zarr", "e.tif"])
def test_stored_embeddings_give_the_same_map_without_an_encoder(scene, tmp_path, name):
    direct = make_map(scene, make_probe(), tmp_path / "a.tif", model=BandMeans(), tile_px=60, overlap_px=8)
    store = embed(scene, BandMeans(), tmp_path / name, tile_px=60, **CUT)
    for given, out in ((store, "b.tif"), (tmp_path / name, "c.tif")):
        result = make_map(given, make_probe(), tmp_path / out)
        assert result.encoder_seconds == 0
        assert result.path.read_bytes() == direct.path.read_bytes()


def test_a_scene_smaller_than_a_window_is_padded(scene, tmp_path):
    box = BOX[3:16, 5:27]
    store = embed(scene, BandMeans(), tmp_path / "e.zarr", box=box, **CUT)
    assert store.box.shape == (4, 6)
    with torch.inference_mode():
        alone = BandMeans().encode(scene.batch(BOX[3:19, 5:29]), patch_m=40)
    np.testing.assert_allclose(store.read(), alone.patches[0].numpy(), atol=1e-5)


def test_places_beyond_the_scene_are_nodata(scene, tmp_path):
    beyond = GeoBox((40, 40), Affine(10, 0, 600000, 0, -10, 5000000), "EPSG:32633")
    encoder = BandMeans()
    store = embed(scene, encoder, tmp_path / "e.zarr", box=beyond, **CUT)
    assert np.isnan(store.read()).all()
    assert encoder.sizes == []


class FineMeans(nn.Module):
    """Mean colours of naip_10, which has four pixels per pixel of the common grid along a side, and the longitude."""

    modalities, dim, name = ("naip_10",), 5, "fine-means"

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False) -> Features:
        side = round(patch_m / batch.pixel_m * 4)
        o = batch.observations["naip_10"]
        colours = _patch_sums(o.pixels, side) / side**2
        valid = _patch_sums(o.valid[:, :, None].float(), side)[..., 0] > 0
        longitude = batch.lonlat[:, :1, None, None].float().expand(*colours.shape[:3], 1)
        patches = torch.cat([colours, longitude], dim=-1)
        return Features(patches=patches, summary=patches.mean((1, 2)), valid=valid, patch_m=patch_m)


def test_a_finer_modality_is_cut_at_its_own_pixels(tmp_path):
    common = BOX[:60, :90]
    fine = GeoBox((240, 360), Affine(2.5, 0, 500000, 0, -2.5, 5000000), "EPSG:32633")
    pixels = np.random.default_rng(4).integers(1, 255, (4, *fine.shape)).astype(np.uint8)
    write_cog(tmp_path / "naip.tif", pixels, fine)
    save_scene(
        tmp_path, [make_item("n", "naip_10", "2023-06-01", fine, {"data": str(tmp_path / "naip.tif")})], "Fine", None
    )
    store = embed(tmp_path, FineMeans(), tmp_path / "e.zarr", box=common, patch_m=20, tile_px=32, **CUT)
    means = pixels.reshape(4, 30, 8, 45, 8).mean((2, 4)).transpose(1, 2, 0)
    np.testing.assert_allclose(store.read()[..., :4], means, rtol=1e-4)
    longitude = store.read()[0, :, 4]
    # The first window's middle is 160 m from the west edge; a degree is 78.6 km there.
    assert longitude[0] == pytest.approx(15 + 0.16 / 78.6, abs=2e-5)
    assert longitude[-1] == pytest.approx(15 + 0.74 / 78.6, abs=2e-5)


def test_patches_that_cut_through_pixels_are_refused(tmp_path):
    pixels = np.full((3, 40, 40), 9, np.uint8)
    box = GeoBox((40, 40), Affine(3, 0, 500000, 0, -3, 5000000), "EPSG:32633")
    write_cog(tmp_path / "p.tif", pixels, box)
    save_scene(tmp_path, [make_item("p", "planet", "2023-06-01", box, {"data": str(tmp_path / "p.tif")})], "P", None)
    encoder = FineMeans()
    encoder.modalities = ("planet",)
    with pytest.raises(InputError, match="a patch of 20 m is not a whole number of planet's pixels of 3 m"):
        embed(tmp_path, encoder, tmp_path / "e.zarr", patch_m=20, **CUT)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_small_types_stay_close(scene, expected, tmp_path, dtype):
    store = embed(scene, BandMeans(), tmp_path / "e.zarr", dtype=dtype, **CUT)
    largest = np.abs(expected).max(-1, keepdims=True)
    error = np.abs(store.read() - expected) / largest
    assert np.nanmax(error) < (0.001 if dtype == "float16" else 0.012)
    assert (np.isnan(store.read()) == np.isnan(expected)).all()


def test_the_passport_says_where_a_map_came_from(scene, tmp_path):
    result = make_map(
        scene, make_probe(), tmp_path / "m.tif", model=BandMeans(), probabilities=True, overlap_px=8, country="FRA"
    )
    item = json.loads(result.passport.read_text())
    told = item["properties"]
    assert [i["id"] for i in told["panterra:inputs"]] == ["s2-0", "s2-1", "s1-0"]
    assert told["panterra:model"]["name"] == "band-means"
    assert len(told["panterra:model"]["weights_sha256"]) == 64
    assert told["panterra:options"]["window_px"] == 32
    assert told["panterra:energy"]["co2e_kg"] > 0
    assert told["license"] == "CC-BY-4.0"
    assert told["start_datetime"] == "2023-04-15T00:00:00Z"
    assert told["processing:software"]["panterra"] == panterra.__version__
    assert item["assets"]["map"]["classification:classes"][1] == {"value": 7, "name": "bright", "color_hint": "F0DC5A"}
    assert item["assets"]["map"]["href"] == "./m.tif"
    digest = hashlib.sha256(result.path.read_bytes()).hexdigest()
    assert item["assets"]["map"]["file:checksum"] == f"1220{digest}"
    assert item["assets"]["probabilities"]["href"] == "./m_probabilities.tif"


def test_a_tile_that_cannot_be_read_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "WAITS_S", ())
    scene = write_scene(tmp_path)
    away = tmp_path / "away.tif"
    whole = embed(scene, BandMeans(), tmp_path / "whole.zarr", tile_px=60, **CUT)

    def unplug(done: int, total: int) -> None:
        if done > total / 2 and not away.exists():
            (tmp_path / "s2_1.tif").rename(away)

    args = {"tile_px": 60, "workers": 1, **CUT}
    with pytest.raises(InputError, match=r"tile \d+_\d+ cannot be read: .*s2_1.tif.* kept in .*e.zarr.parts"):
        embed(scene, BandMeans(), tmp_path / "e.zarr", progress=unplug, **args)
    assert np.isnan(open_embeddings(tmp_path / "e.zarr").read()[-1]).all()
    away.rename(tmp_path / "s2_1.tif")
    encoder = BandMeans()
    again = embed(scene, encoder, tmp_path / "e.zarr", **args)
    assert 0 < sum(encoder.sizes) < 30
    assert _bytes_of(again.path) == _bytes_of(whole.path)


def test_parts_of_another_job_are_not_mixed_in(tmp_path):
    scene = write_scene(tmp_path)

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    out = tmp_path / "m.tif"
    args = {"model": BandMeans(), "tile_px": 60}
    with pytest.raises(KeyboardInterrupt):
        make_map(scene, make_probe(), out, overlap_px=8, progress=stop, **args)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith((".", "m"))] == ["m.tif.parts"]
    with pytest.raises(InputError, match=r"m.tif.parts holds tiles of a job with another overlap_px.*; .* overwrite"):
        make_map(scene, make_probe(), out, overlap_px=4, **args)
    os.utime(tmp_path / "s1.tif", (1, 1))
    with pytest.raises(InputError, match="another scene"):
        make_map(scene, make_probe(), out, overlap_px=8, **args)
    fresh = make_map(scene, make_probe(), tmp_path / "fresh.tif", overlap_px=4, **args)
    result = make_map(scene, make_probe(), out, overlap_px=4, overwrite=True, **args)
    assert result.path.read_bytes() == fresh.path.read_bytes()


def test_an_existing_output_is_replaced_only_when_asked(scene, tmp_path):
    for out in (tmp_path / "e.zarr", tmp_path / "e.tif"):
        embed(scene, BandMeans(), out, **CUT)
        before = _bytes_of(out)
        with pytest.raises(InputError, match="exists; choose another name"):
            embed(scene, BandMeans(), out, **CUT)
        embed(scene, BandMeans(), out, overwrite=True, **CUT)
        assert _bytes_of(out) == before
    (tmp_path / "m_probabilities.tif").touch()
    with pytest.raises(InputError, match=r"m_probabilities\.tif exists; choose another name"):
        make_map(scene, make_probe(), tmp_path / "m.tif", model=BandMeans(), probabilities=True)
    (tmp_path / "things").mkdir()
    with pytest.raises(InputError, match="is a folder with other things"):
        embed(scene, BandMeans(), tmp_path / "things", overwrite=True, **CUT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_m": 35}, "patches of 35 m are not a whole number of 10 m pixels"),
        ({"patch_m": float("nan")}, "patches of nan m are not a whole number of 10 m pixels"),
        ({"window_px": 30}, "window_px is 30, not a whole number of patches of 4 px; give 28, 32"),
        ({"overlap_px": 3}, "overlap_px is 3, .* give 4"),
        ({"overlap_px": 32}, "wanted 0 <= overlap < window"),
        ({"modalities": ["landsat"]}, "cannot use landsat: the scene holds sentinel2_l2a, sentinel1"),
        ({"dtype": "float64"}, "wanted one of float32, float16, int8"),
        ({"batch_windows": 0}, "both must be 1 or more"),
        ({"tile_px": 0}, "tile_px is 0; give 1 or more"),
        ({"tile_px": -4}, "tile_px is -4; give 1 or more"),
        ({"box": GeoBox((5, 5), Affine(1, 0, 15, 0, -1, 45), "EPSG:4326")}, "projected"),
        ({"box": GeoBox((5, 5), Affine(10, 0, 15, 0, 10, 45), "EPSG:32633")}, "north up"),
    ],
)
def test_what_cannot_be_embedded_says_so(scene, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        embed(scene, BandMeans(), tmp_path / "e.zarr", **{**CUT, **change})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "given", [{"patch_m": 20}, {"modalities": ["sentinel1"]}, {"window_px": 64, "overlap_px": 0}, {"tile_px": 0}]
)
def test_what_stored_embeddings_were_made_with_is_not_asked_for_again(scene, tmp_path, given):
    store = embed(scene, BandMeans(), tmp_path / "e.zarr", **CUT)
    with pytest.raises(InputError, match=f"as they were made; leave out {', '.join(given)}, or embed again"):
        make_map(store, make_probe(), tmp_path / "m.tif", **given)


def test_killed_while_it_tidies_up_a_job_is_done(scene, tmp_path, monkeypatch):
    def killed(folder):
        for path in folder.glob("*_00000_*"):
            path.unlink()
        raise KeyboardInterrupt

    args = {"tile_px": 64, "overlap_px": 8, "model": BandMeans()}
    with monkeypatch.context() as patch:
        patch.setattr("panterra.mapping.parts.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            make_map(scene, make_probe(), tmp_path / "m.tif", **args)
    before = _bytes_of(tmp_path / "m.tif")
    with pytest.raises(InputError, match=r"m\.tif exists; choose another name"):
        make_map(scene, make_probe(), tmp_path / "m.tif", **args)
    make_map(scene, make_probe(), tmp_path / "m.tif", overwrite=True, **args)
    assert _bytes_of(tmp_path / "m.tif") == before


def test_what_another_process_is_making_is_left_alone(scene, tmp_path):
    claimed = tmp_path / "e.zarr.parts" / CLAIM
    claimed.parent.mkdir()
    code = f"import fcntl; file = open({str(claimed)!r}, 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(1); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline()
        with pytest.raises(InputError, match=r"another process is making .*e\.zarr; wait for it"):
            embed(scene, BandMeans(), tmp_path / "e.zarr", **CUT)
        other.kill()
    embed(scene, BandMeans(), tmp_path / "e.zarr", **CUT)
    assert not claimed.parent.exists()


def test_an_output_without_data_is_told_of(scene, tmp_path):
    write_cog(tmp_path / "s2.tif", np.zeros((12, *BOX.shape), np.uint16), BOX, nodata=0)
    write_cog(tmp_path / "s1.tif", np.full((2, *BOX.shape), -32768, np.float32), BOX, nodata=-32768)
    empty = open_scene(
        [
            make_item("s2", "sentinel2_l2a", "2023-04-15", BOX, {"data": str(tmp_path / "s2.tif")}),
            make_item("s1", "sentinel1", "2023-04-15", BOX, {"data": str(tmp_path / "s1.tif")}),
        ]
    )
    told = []
    args = {"overlap_px": 8, "tile_px": 60, "note": told.append}
    store = embed(empty, BandMeans(), tmp_path / "e.zarr", window_px=32, **args)
    make_map(empty, make_probe(), tmp_path / "m.tif", model=BandMeans(), **args)
    make_map(store, make_probe(), tmp_path / "stored.tif", note=told.append)
    said = "holds no data: there is not one valid pixel in what was looked at"
    assert told == [f"{tmp_path / name} {said}" for name in ("e.zarr", "m.tif", "stored.tif")]
    told.clear()
    make_map(scene, make_probe(), tmp_path / "full.tif", model=BandMeans(), **args)
    assert not told


def test_what_cannot_be_mapped_says_so(scene, tmp_path):
    probe, encoder = make_probe(), BandMeans()
    with pytest.raises(InputError, match=r"end in \.tif"):
        make_map(scene, probe, tmp_path / "map.png", model=encoder)
    with pytest.raises(InputError, match="no probabilities"):
        make_map(scene, make_probe("values"), tmp_path / "m.tif", model=encoder, probabilities=True)
    with pytest.raises(InputError, match=r"let the name 'field\.txt' end in \.zarr or \.tif"):
        embed(scene, encoder, tmp_path / "field.txt", **CUT)
    with pytest.raises(InputError, match="cannot hold float16"):
        embed(scene, encoder, tmp_path / "e.tif", dtype="float16")
    encoder.dim = 7
    with pytest.raises(InputError, match="width 5; band-means gives 7"):
        make_map(scene, probe, tmp_path / "m.tif", model=encoder, overlap_px=8)
    store = embed(scene, BandMeans(), tmp_path / "e.zarr", patch_m=20, **CUT)
    with pytest.raises(InputError, match=r"'patch_m': 20.* fitted with .*'patch_m': 40"):
        make_map(store, probe, tmp_path / "m.tif")


def _bytes_of(path: Path) -> dict[str, bytes]:
    """Everything in an output, file or folder."""
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
    return {str(f.relative_to(path)): f.read_bytes() for f in files}


def job(
    kind: str,
    folder: Path,
    out: Path,
    *,
    tile_px: int = 32,
    seconds_per_batch: float = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Map or embed the scene of a folder, always the same."""
    scene, encoder = open_scene(folder), BandMeans(seconds_per_batch)
    args = {"tile_px": tile_px, "batch_windows": 2, "overlap_px": 8, "progress": progress}
    if kind == "map":
        make_map(scene, make_probe(), out, model=encoder, probabilities=True, **args)
    else:
        embed(scene, encoder, out, window_px=32, **args)


LARGE_FILES = (("map", "m.tif", 32), ("embed", "e.zarr", 110))
"""Jobs that write a file above 6 kB: the uncompressed map, the first shard of embeddings."""


def in_child(work: Callable[[], None]) -> int:
    """Do something in a child of a process that has no threads yet."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        try:
            work()
        except InputError as error:
            print(error, flush=True)
            os._exit(2)
        os._exit(0)
    return pid


def kill_soon(tiles: Callable[[], Iterable[Path]], enough: int, seconds: float, done: int, total: int) -> None:
    """As progress, end this process some time after it has enough tiles.

    The signal ends it as SIGKILL would, and however busy the system is, the job does not get through before.
    """
    if len(list(tiles())) >= enough and not any(signal.getitimer(signal.ITIMER_REAL)):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def torment(folder: Path) -> None:
    """Kill jobs at random moments before they may end, and run some that may write small files alone."""
    chance = random.Random(7)
    for kind, name in (("map", "m.tif"), ("embed", "e.zarr")):
        work = partial(job, kind, folder, folder / "killed" / name, seconds_per_batch=0.004)
        for _ in range(4):
            tiles = partial((folder / "killed" / f"{name}.parts").glob, "tile_*.safetensors")
            more = chance.randint(1, 3)
            kill = partial(kill_soon, tiles, len(list(tiles())) + more, chance.uniform(0.0001, 0.01))
            assert os.waitpid(in_child(partial(work, progress=kill)), 0)[1] == signal.SIGALRM
        assert os.waitpid(in_child(work), 0)[1] == 0
    for kind, name, tile_px in LARGE_FILES:

        def starve(kind: str = kind, name: str = name, tile_px: int = tile_px) -> None:
            # Python ignores the signal that goes with this limit, so that writes fail as on a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
            job(kind, folder, folder / "full" / name, tile_px=tile_px)

        assert os.waitstatus_to_exitcode(os.waitpid(in_child(starve), 0)[1]) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork, SIGKILL and limits")
def test_killed_or_out_of_space_a_job_goes_on_to_the_same_bytes(tmp_path):
    write_scene(tmp_path)
    whole, killed, full = (tmp_path / name for name in ("whole", "killed", "full"))
    for kind, name in (("map", "m.tif"), ("embed", "e.zarr")):
        job(kind, tmp_path, whole / name)
    code = f"import test_run; test_run.torment(test_run.Path({str(tmp_path)!r}))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert _bytes_of(killed).keys() == _bytes_of(whole).keys()
    for name in ("m.tif", "m_probabilities.tif", "m.tif.aux.xml", "e.zarr"):
        assert _bytes_of(killed / name) == _bytes_of(whole / name), name

    said = ran.stdout.splitlines()
    assert len(said) == 2
    assert "m.tif does not hold what was written, as happens on a full disk; finished tiles are kept in" in said[0]
    assert "cannot write" in said[1]
    assert "e.zarr: File too large; finished tiles are kept in" in said[1]
    assert sorted(path.name for path in full.iterdir()) == ["e.zarr.parts", "m.tif.parts"]
    for kind, name, tile_px in LARGE_FILES:
        job(kind, tmp_path, full / name, tile_px=tile_px)
    embeddings = [open_embeddings(folder / "e.zarr").read() for folder in (full, whole)]
    np.testing.assert_allclose(*embeddings, atol=1e-5)
    assert _bytes_of(full / "m.tif") == _bytes_of(whole / "m.tif")
