"""Maps that several processes or machines make together."""

import json
import multiprocessing as mp
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.cli import main
from panterra.errors import InputError
from panterra.imagery.stac import make_item, save_scene
from panterra.mapping import reading
from panterra.mapping.effort import BudgetError
from panterra.mapping.embeddings import open_embeddings
from panterra.mapping.painter import saved
from panterra.mapping.parts import IncompleteError
from panterra.mapping.run import embed
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig
from panterra.models.weights import load_model, passport, save_model

BOX = GeoBox((192, 192), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")
CUT = {"window_px": 32, "overlap_px": 8, "tile_px": 48, "batch_windows": 2}
TWO = "processes:2"


def write_model(folder):
    torch.manual_seed(0)
    config = OlmoEarthConfig(dim=32, depth=2, heads=2, position="rope_3d_mixed", pixel_hidden=(8,), convolution=False)
    return save_model(OlmoEarth(config, name="small"), folder)


def write_scene(folder):
    """Two Sentinel-2 dates in uncompressed blocks of 64 pixels."""
    folder.mkdir(parents=True)
    items = []
    for step, date in enumerate(("2023-04-15", "2023-07-01")):
        pixels = np.random.default_rng(step).integers(500, 4000, (12, *BOX.shape)).astype(np.uint16)
        path = folder / f"s2_{step}.tif"
        profile = {"count": 12, "dtype": "uint16", "crs": "EPSG:32633", "transform": BOX.affine, "nodata": 0}
        layout = {"tiled": True, "blockxsize": 64, "blockysize": 64, "interleave": "pixel", "compress": "deflate"}
        with rasterio.open(path, "w", driver="GTiff", height=192, width=192, **profile, **layout) as file:
            file.write(pixels)
        items.append(make_item(f"s2-{step}", "sentinel2_l2a", date, BOX, {"data": str(path)}))
    save_scene(folder, items, "A scene for tests", "CC-BY-4.0")
    return folder


def block_of(path, row, col):
    """Where a block of a GeoTIFF lies in the file: offset and size."""
    with rasterio.open(path) as file:
        return [int(file.get_tag_item(f"BLOCK_{what}_{col}_{row}", "TIFF", bidx=1)) for what in ("OFFSET", "SIZE")]


def bytes_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp("scene") / "scene")


@pytest.fixture(scope="module")
def alone(scene, model, tmp_path_factory):
    """What one process makes."""
    return embed(scene, model, tmp_path_factory.mktemp("alone") / "e.zarr", **CUT).path


def test_two_processes_make_the_same_bytes_even_where_one_is_killed(scene, model, alone, tmp_path):
    killed, told = [], []

    def kill_one(done, total):
        if done and not killed:
            killed.append(mp.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    store = embed(scene, model, tmp_path / "e.zarr", on=TWO, progress=kill_one, note=told.append, **CUT)
    assert killed
    assert bytes_of(store.path) == bytes_of(alone)
    assert any(text.startswith("processes:2: 2 workers with") for text in told)
    assert not mp.active_children()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.zarr", "e.zarr.json"]


@pytest.mark.slow
def test_a_script_that_its_workers_would_run_again_is_told_so(scene, model, tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "e.zarr"
    script.write_text(
        f"from panterra.mapping.run import embed\nembed({str(scene)!r}, {str(model)!r}, {str(out)!r}, on='processes:1')"
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert "another process is making" in ran.stderr  # what the worker said, which took nothing away
    assert ran.stderr.splitlines()[-1].endswith('other processes belongs under if __name__ == "__main__":')


@pytest.fixture
def poisoned(tmp_path):
    """A scene with one broken block, and how it is put right."""
    scene = write_scene(tmp_path / "scene")
    path = scene / "s2_0.tif"
    whole, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    offset, size = block_of(path, 1, 1)

    def put(content):
        path.write_bytes(content)
        os.utime(path, ns=times)

    put(whole[:offset] + b"\xff" * size + whole[offset + size :])
    return scene, lambda: put(whole)


@pytest.mark.parametrize(("on", "name"), [("local", "e.zarr"), ("local", "e.tif"), ("processes:1", "e.zarr")])
def test_a_tile_that_cannot_be_read_is_left_out_and_made_later(model, alone, poisoned, tmp_path, monkeypatch, on, name):
    monkeypatch.setattr(reading, "WAITS_S", (0.0, 0.0))
    (scene, repair), out = poisoned, tmp_path / name
    with pytest.raises(
        IncompleteError, match=r"is complete but for 4 of 16 tiles.*cannot be read: .*s2_0.tif"
    ) as error:
        embed(scene, model, out, on=on, **CUT)
    # The block is pixels 64 to 128, at which tiles 1 (windows from 48 to 104) and 2 (96 to 152) look.
    assert list(error.value.failed) == ["00001_00001", "00001_00002", "00002_00001", "00002_00002"]
    told = json.loads(out.with_name(f"{name}.json").read_text())["properties"]["panterra:failed_tiles"]
    assert [tile["tile"] for tile in told] == list(error.value.failed)
    seen = np.isfinite(error.value.result.read()).all(-1)
    missing = np.zeros((48, 48), bool)
    missing[12:36, 12:36] = True
    assert (seen == ~missing).all()
    repair()
    done = []
    store = embed(scene, model, out, progress=lambda n, total: done.append(n), **CUT)
    assert done[1] > 0  # what is not near a failed tile is not made again
    np.testing.assert_array_equal(store.read(), open_embeddings(alone).read())
    if name == "e.zarr":
        assert bytes_of(store.path) == bytes_of(alone)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, f"{name}.json", "scene"])


def test_what_is_out_of_reach_fails_and_the_rest_is_made(scene, model, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "WAITS_S", (0.0,))
    east = BOX[:, 96:]
    items = [
        make_item("here", "sentinel2_l2a", "2023-04-15", BOX[:, :96], {"data": str(scene / "s2_0.tif")}),
        make_item("away", "sentinel2_l2a", "2023-04-15", east, {"data": "http://127.0.0.1:9/away.tif"}),
    ]
    save_scene(tmp_path / "scene", items, "Half of it is away", None)
    with pytest.raises(IncompleteError, match=r"complete but for 12 of 16 tiles.*127.0.0.1:9") as error:
        embed(tmp_path / "scene", model, tmp_path / "e.zarr", box=BOX, **CUT)
    assert np.isfinite(error.value.result.read()[:, :12]).all()


def test_a_job_in_which_nothing_can_be_made_stops(scene, model, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "WAITS_S", ())
    shutil.copytree(scene, tmp_path / "scene")
    for path in (tmp_path / "scene").glob("*.tif"):
        path.unlink()
    with pytest.raises(InputError, match="stopped, as the last 3 tiles could not be made: tile 00000_00002 cannot be"):
        embed(tmp_path / "scene", model, tmp_path / "e.zarr", box=BOX, **CUT)
    assert not (tmp_path / "e.zarr").exists()


def test_the_command_line_says_which_tiles_are_missing(model, poisoned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "WAITS_S", ())
    scene, out = poisoned[0], str(tmp_path / "e.zarr")
    words = ["embed", str(scene), "--model", str(model), "--out", out, "--tile-px", "48", "--window-px", "32", "--json"]
    assert main([*words, "--overlap-px", "8"]) == 3
    said = capsys.readouterr()
    assert next(iter(json.loads(said.out)["failed_tiles"])) == "00001_00001"
    assert "is complete but for 4 of 16 tiles" in said.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"on": "processes"}, "cannot compute on 'processes'; give local, processes:N"),
        ({"on": "processes:0"}, "cannot compute on 'processes:0'"),
    ],
)
def test_what_is_no_place_to_compute_says_so(scene, model, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        embed(scene, model, tmp_path / "e.zarr", **change, **CUT)
    assert not list(tmp_path.iterdir())


def test_a_budget_stops_the_workers_and_a_larger_one_goes_on(scene, model, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("PANTERRA_LEDGER", "off")
    out = tmp_path / "e.zarr"
    with pytest.raises(BudgetError, match=r"stopped: .* of 1e-12 kWh used .*tiles left: 15"):
        embed(scene, model, out, on=TWO, budget_kwh=1e-12, **CUT)
    assert not mp.active_children()
    assert not out.exists()
    assert len(list((tmp_path / "e.zarr.parts").glob("tile_*"))) == 1
    store = embed(scene, model, out, on=TWO, budget_kwh=1e3, **CUT)
    assert bytes_of(store.path) == bytes_of(alone)
    told = json.loads(store.passport.read_text())["properties"]["panterra:energy"]
    assert "2 workers" in told["detail"]


class Own:
    """An encoder that is no file."""

    name, dim, modalities = "own", 4, ("sentinel2_l2a",)


def test_an_encoder_that_workers_cannot_load_is_refused(scene, tmp_path):
    with pytest.raises(InputError, match="own cannot be loaded by other workers"):
        embed(scene, Own(), tmp_path / "e.zarr", on=TWO, **CUT)


def test_models_arrive_as_they_were(model, tmp_path):
    encoder = load_model(model, dtype=torch.bfloat16, attention="published_fast", normalized_input=True)
    files = saved(encoder, tmp_path / "model")
    for arrived in (files.load(), files.carried().load()):
        about, wanted = passport(arrived), passport(encoder)
        assert {k: v for k, v in about.items() if k != "name"} == {k: v for k, v in wanted.items() if k != "name"}


DRIVER = """
import os, resource, signal, sys
from pathlib import Path
from panterra.errors import InputError
from panterra.mapping.run import embed
import test_cluster


def kill(done, total):
    if len(list(Path(f"{out}.parts").glob("tile_*"))) >= 3:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    scene, model, out, fate = sys.argv[1:]
    if fate == "starve":  # writes beyond the limit fail as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    try:
        embed(scene, model, out, on="processes:1", progress=kill if fate == "kill" else None, **test_cluster.CUT)
    except InputError as error:
        sys.exit(str(error))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and limits")
def test_a_starved_and_then_killed_driver_goes_on_to_the_same_bytes(scene, model, alone, tmp_path):
    script, out = tmp_path / "driver.py", tmp_path / "e.zarr"
    script.write_text(DRIVER)

    def drive(fate):
        command = [sys.executable, str(script), str(scene), str(model), str(out), fate]
        place = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        return subprocess.run(command, env=place, capture_output=True, text=True, check=False)

    starved = drive("starve")
    assert starved.returncode == 1
    assert "cannot write" in starved.stderr
    assert "finished tiles are kept in" in starved.stderr
    assert "Traceback" not in starved.stderr
    killed = drive("kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    done = []
    store = embed(scene, model, out, progress=lambda n, total: done.append(n), **CUT)
    assert done[1] > 0
    assert bytes_of(store.path) == bytes_of(alone)


RAY = """
import os, signal, sys
from pathlib import Path
import ray

mark, *words = sys.argv[1:]
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
killed = []


def kill_one(done, total):
    for process in Path("/proc").glob("[0-9]*") if done and not killed else ():
        try:
            ours = (process / "cmdline").read_bytes().startswith(b"ray::Painter")
            if ours and mark.encode() in (process / "environ").read_bytes() and not killed:
                os.kill(int(process.name), signal.SIGKILL)
                killed.append(process)
        except OSError:
            continue


{job}
assert killed
ray.shutdown()
"""
EMBED = """
from panterra.mapping.run import embed
import test_cluster

scene, model, out = words
embed(scene, model, out, on="ray", progress=kill_one, note=print, **test_cluster.CUT)
"""


def on_ray(test):
    """Mark a test that starts a Ray cluster and kills a worker."""
    for mark in (
        pytest.mark.slow,
        pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed; see panterra[ray]"),
        pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the worker to kill in /proc"),
    ):
        test = mark(test)
    return test


def drive_ray(folder, job, *words):
    """Run a job that hands `kill_one` its progress, in a process of its own; return what it printed."""
    script, mark = folder / "driver.py", f"PANTERRA_TEST={folder}"
    script.write_text(RAY.replace("{job}", job))
    place = {**os.environ, "PANTERRA_TEST": str(folder), "PYTHONPATH": str(Path(__file__).parent)}
    place |= {"RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "300"}
    place["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, str(script), mark, *map(str, words)]
    ran = subprocess.run(command, env=place, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@on_ray
def test_ray_makes_the_same_bytes_even_where_a_worker_is_killed(scene, model, alone, tmp_path):
    assert "workers with" in drive_ray(tmp_path, EMBED, scene, model, tmp_path / "e.zarr")
    assert bytes_of(tmp_path / "e.zarr") == bytes_of(alone)


@pytest.fixture(scope="module")
def scaling():
    spec = spec_from_file_location("scaling", Path(__file__).parent.parent / "benchmarks" / "scaling.py")
    module = module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scaling"]


def test_equal_tiles_are_made_in_rounds(scaling):
    plan = scaling.Plan(tiles=103, workers=10, tile_s=(7.0,), driver_s=0.0)
    assert scaling.simulate(plan).seconds == pytest.approx(11 * 7)
    assert scaling.simulate(replace(plan, workers=1)).seconds == pytest.approx(103 * 7)


def test_the_time_of_unequal_tiles_lies_between_the_bounds_of_list_scheduling(scaling):
    tiles = tuple(np.random.default_rng(0).lognormal(2, 1, 500))
    for workers in (1, 3, 20):
        outcome = scaling.simulate(scaling.Plan(tiles=400, workers=workers, tile_s=tiles, driver_s=0.0))
        least = outcome.seconds * outcome.efficiency
        # Graham 1966: no worse than the even share and the longest tile. The order of writing may add one more tile.
        assert least <= outcome.seconds * (1 + 1e-9)
        assert outcome.seconds <= least + 2 * max(tiles)


def test_more_workers_help_until_the_driver_writes_all_the_time(scaling):
    plan = scaling.Plan(tiles=2000, workers=1, tile_s=(10.0,), driver_s=0.1)
    hours = {n: scaling.simulate(replace(plan, workers=n)).seconds for n in (1, 10, 50, 400)}
    for n in (1, 10, 50):
        assert hours[n] == pytest.approx(20000 / n, rel=0.03)
    assert hours[400] == pytest.approx(10 + 2000 * 0.1, rel=0.01)
    four = scaling.simulate(replace(plan, workers=400, drivers=4)).seconds
    assert four == pytest.approx(10 + 500 * 0.1, rel=0.2)
    assert scaling.best_drivers(replace(plan, workers=400)) == 6


def test_shared_storage_and_deaths_cost_what_they_should(scaling):
    plan = scaling.Plan(tiles=4000, workers=20, tile_s=(36.0,), driver_s=0.0, tile_mb=100, total_mb_per_s=100)
    outcome = scaling.simulate(plan)
    assert outcome.seconds == pytest.approx(200 * (36 + 20))
    assert outcome.read_gb == pytest.approx(400)
    # A tile of t hours is interrupted with probability 1 - exp(-rate t), each time anew.
    plan = replace(plan, tile_mb=0.0, deaths_per_hour=20.0, restart_s=0.0)
    share = 1 - np.exp(-0.2)
    assert scaling.simulate(plan).deaths == pytest.approx(4000 * share / (1 - share), rel=0.1)


def test_without_ray_the_message_says_what_to_install(scene, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"on='ray' needs ray; install it with: pip install 'panterra\[ray\]'"):
        embed(scene, model, tmp_path / "e.zarr", on="ray", **CUT)
