import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import rasterio

import fetching
from fetching import ALL, bytes_of, command, fetch
from panterra.cli import main
from panterra.errors import InputError
from stac_server import serving

SMALL = ("sentinel1", "landsat")

archive, server = fetching.archive, fetching.server


@pytest.mark.parametrize("cache", [False, True])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(server, tmp_path, cache):
    more = ("--cache", str(tmp_path / "cache")) if cache else ()
    assert main(command(server, tmp_path / "whole", "sentinel2_l2a")) == 0
    server.slow_s, server.files_left = 0.05, 16
    out = tmp_path / "killed"
    pieces = tmp_path / "cache" if cache else tmp_path / "killed.parts" / "pieces"
    arguments = command(server, out, "sentinel2_l2a", *more)
    process = subprocess.Popen(
        [sys.executable, "-m", "panterra", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and len(list(pieces.glob("[!.]*.tif"))) < 6:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = {path.name: path.stat().st_mtime_ns for path in pieces.glob("[!.]*.tif")}
    assert len(finished) >= 6
    for name in finished:
        with rasterio.open(pieces / name) as file:
            file.read()
    for path in out.with_name("killed.parts").rglob("[!.]*.json"):
        json.loads(path.read_text())
    assert not out.exists()
    server.slow_s, server.files_left = 0, math.inf
    server.log.clear()
    assert main(arguments) == 0
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    again = {path.rsplit("/", 1)[1] for path in server.asked("/data/")}
    assert not again & {f"{name.rsplit('-', 1)[0]}.tif" for name in finished}
    # The search is not repeated, so what was chosen cannot change half-way.
    assert not server.asked("/search")
    assert not out.with_name("killed.parts").exists()
    assert {name: (pieces / name).stat().st_mtime_ns for name in finished if cache} == (finished if cache else {})


def test_a_run_that_stops_while_composing_goes_on_as_well(server, tmp_path):
    fetch(server, tmp_path / "whole", SMALL, options={"title": "t"})

    def stage(what):
        def advance(done, total):
            if what == "composing" and done == 1:
                raise KeyboardInterrupt

        return advance

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        fetch(server, out, SMALL, options={"title": "t", "stage": stage})
    (made,) = (tmp_path / "stopped.parts" / "scene").glob("*.tif")
    before = made.stat().st_mtime_ns
    server.log.clear()
    fetch(server, out, SMALL, options={"title": "t"})
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert (out / made.name).stat().st_mtime_ns == before
    assert not server.log


def test_parts_of_another_job_are_not_mixed_in(server, tmp_path):
    server.dead["/data/"] = 404
    out = tmp_path / "scene"
    with pytest.raises(InputError):
        fetch(server, out, SMALL)
    server.dead.clear()
    with pytest.raises(InputError, match=r"scene\.parts holds part of a job with another composite; repeat"):
        fetch(server, out, SMALL, composite="best")
    fetch(server, out, SMALL, composite="best", options={"overwrite": True})
    with pytest.raises(InputError, match="scene exists; choose another name, or replace it with --overwrite"):
        fetch(server, out, SMALL)
    before = bytes_of(out)
    fetch(server, out, SMALL, options={"overwrite": True})
    assert bytes_of(out).keys() == before.keys()
    assert bytes_of(out) != before
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="mine is no scene and is not replaced"):
        fetch(server, tmp_path / "mine", SMALL, options={"overwrite": True})


def test_a_recording_gives_the_same_bytes_without_a_network(archive, tmp_path):
    lost = "S2A_MSIL2A_20240125T100031_R122_T33TVM_20240301T000000_B05"
    with serving(*archive, dead={lost: 404}) as server:
        recorded = fetch(server, tmp_path / "a", ALL, options={"record": tmp_path / "tape", "title": "t"})
        assert len(recorded.failures) == 1
    shutil.copytree(tmp_path / "tape", tmp_path / "copy")
    replayed = fetch(server, tmp_path / "b", ALL, options={"replay": tmp_path / "copy", "title": "t"})
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert replayed.failures == recorded.failures
    assert replayed.decisions == recorded.decisions
    assert replayed.received == 0
    with pytest.raises(InputError, match=r"copy holds no search for sentinel1 at http.* in that place and time"):
        fetch(server, tmp_path / "c", ("sentinel1",), dates="2023", options={"replay": tmp_path / "copy"})
    with pytest.raises(InputError, match="there is no recording"):
        fetch(server, tmp_path / "c", SMALL, options={"replay": tmp_path / "none"})
    with pytest.raises(InputError, match="exclude each other"):
        fetch(server, tmp_path / "c", SMALL, options={"replay": tmp_path / "copy", "cache": tmp_path})


def test_a_cache_serves_other_runs(server, tmp_path):
    fetch(server, tmp_path / "a", SMALL, options={"cache": tmp_path / "cache"})
    server.log.clear()
    again = fetch(server, tmp_path / "b", SMALL, composite="best", options={"cache": tmp_path / "cache"})
    assert server.asked("/search")
    assert not server.asked("/data/")
    assert again.scene.modalities == ("sentinel1", "landsat")


def test_what_a_recording_lacks_costs_its_image_and_is_said(server, tmp_path):
    fetch(server, tmp_path / "a", ("sentinel1",), composite="none", options={"record": tmp_path / "tape"})
    sorted((tmp_path / "tape").glob("S1A*20240115*_vv*.tif"))[0].unlink()
    replayed = fetch(server, tmp_path / "b", ("sentinel1",), composite="none", options={"replay": tmp_path / "tape"})
    assert len(replayed.failures) == 1
    assert replayed.failures[0].endswith("was not recorded")
    assert [str(day) for day in replayed.scene.dates("sentinel1")] == ["2024-01-03"]


@pytest.mark.parametrize("fault", [500, "truncate", "drop", 404])
def test_a_search_that_never_comes_is_one_line_and_can_be_repeated(server, tmp_path, fault):
    server.faults["/search"] = [fault] * 4
    with pytest.raises(InputError) as caught:
        fetch(server, tmp_path / "scene", SMALL)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "scene").exists()
    assert not list(tmp_path.rglob("search-*"))
    server.faults.clear()
    assert not fetch(server, tmp_path / "scene", SMALL).failures
