"""What reading keeps in memory does not grow with the images that were read."""

import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from odc.geo.geobox import GeoBox
from torch import nn

from panterra.imagery.raster import MAX_OPEN, OPEN_BYTES, read_onto
from panterra.imagery.stac import make_item, open_scene, save_scene
from panterra.mapping.run import embed
from panterra.models.features import Features
from panterra.sample import Batch

PROC = Path("/proc/self/fd")
BOX = GeoBox((64, 64), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")

needs_proc = pytest.mark.skipif(not PROC.is_dir(), reason="needs the Linux list of what a process has")


def write_files(folder: Path, number: int, *, bands: int, block: int, interleave: str) -> list[Path]:
    layout = {"tiled": True, "blockxsize": block, "blockysize": block, "interleave": interleave, "sparse_ok": True}
    place = {"crs": str(BOX.crs), "transform": BOX.affine}
    paths = [folder / f"{n:03d}.tif" for n in range(number)]
    for path in paths:
        size = {"height": block, "width": block, "count": bands, "dtype": "uint16"}
        with rasterio.open(path, "w", driver="GTiff", **size, **layout, **place) as file:
            file.write(np.ones((bands, 1, 1), np.uint16), window=((0, 1), (0, 1)))
    return paths


def open_files(folder: Path) -> int:
    """Count the files of a folder that this process has open."""
    return sum(entry.readlink().parent == folder for entry in PROC.iterdir() if entry.is_symlink())


def open_after_reading(paths: list[Path]) -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: [read_onto(path, BOX) and open_files(path.parent) for path in paths][-1]).result()


@needs_proc
@pytest.mark.parametrize(
    ("bands", "block", "interleave", "at_once"),
    [
        pytest.param(1, 64, "band", MAX_OPEN, id="small blocks"),
        pytest.param(1, 1024, "band", OPEN_BYTES // (2 * 1024**2), id="one band, as Sentinel-2 comes"),
        pytest.param(12, 512, "pixel", 1, id="bands together"),
        pytest.param(12, 512, "band", MAX_OPEN, id="bands apart"),
        pytest.param(12, 1024, "pixel", 1, id="a block beyond the bound"),
    ],
)
def test_a_thread_keeps_as_many_files_open_as_their_blocks_allow(
    tmp_path: Path, bands: int, block: int, interleave: str, at_once: int
) -> None:
    paths = write_files(tmp_path, MAX_OPEN + 4, bands=bands, block=block, interleave=interleave)
    assert open_after_reading(paths) == at_once


class Zeros(nn.Module):
    """Nothing, for every patch."""

    modalities, dim, name = ("sentinel2_l2a",), 1, "zeros"

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False) -> Features:
        side = round(patch_m / batch.pixel_m)
        valid = batch.observations["sentinel2_l2a"].valid[:, 0, ::side, ::side]
        patches = torch.zeros(*valid.shape, 1)
        return Features(patches=patches, summary=patches.mean((1, 2)), valid=valid, patch_m=patch_m)


def resident_mb() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def leave_free_memory_in_a_thread(mb: int) -> Callable[[], None]:
    """Let a living thread free memory that its allocator keeps, as what is still in use lies above it."""
    done, leave = threading.Event(), threading.Event()

    def work() -> None:
        blocks = [np.ones(100_000, np.uint8) for _ in range(mb * 10)]
        del blocks[:-1]
        done.set()
        leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    done.wait()

    def finish() -> None:
        leave.set()
        thread.join()

    return finish


def resident_around_a_map(folder: Path) -> tuple[float, float]:
    """Return the MB that a thread's freed memory adds, before and after a map is made."""
    (path,) = write_files(folder, 1, bands=12, block=64, interleave="band")
    save_scene(folder, [make_item("one", "sentinel2_l2a", "2023-04-28", BOX, {"data": path})], "A scene", None)
    scene = open_scene(folder)
    embed(scene, Zeros(), folder / "first.zarr", window_px=32, overlap_px=8)
    before = resident_mb()
    finish = leave_free_memory_in_a_thread(100)
    freed = resident_mb() - before
    embed(scene, Zeros(), folder / "second.zarr", window_px=32, overlap_px=8)
    mapped = resident_mb() - before
    finish()
    return freed, mapped


@needs_proc
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone keeps and returns memory so")
def test_a_map_returns_to_the_system_what_threads_have_freed(tmp_path: Path) -> None:
    # In a process of its own: a thread takes what other tests have freed, at whatever addresses, before it grows.
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    freed, mapped = map(float, done.stdout.split())
    assert freed > 80
    assert mapped < 40


if __name__ == "__main__":
    print(*resident_around_a_map(Path(sys.argv[1])))
