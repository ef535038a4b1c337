import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from panterra.cli import main
from panterra.errors import InputError
from panterra.imagery.providers import find_provider
from panterra.imagery.pull import pull
from panterra.imagery.web import Web
from panterra.imagery.wish import Wish
from stac_server import AREA, corners, make_archive, serving

WHERE = ",".join(f"{edge:.9f}" for edge in corners(AREA))
ALL = ("sentinel2_l2a", "sentinel1", "landsat")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    return folder, make_archive(folder)


@pytest.fixture
def server(archive):
    with serving(*archive) as state:
        yield state


def connect(provider, access):
    return Web(access.sign, per_second=1e6, pause_s=0.001, timeout_s=5, tries=4)


def fetch(server, out, modalities=("sentinel1", "landsat"), *, dates="2024-01/2024-02", options=None, **wishes):
    wish = Wish(aoi=WHERE, dates=dates, modalities=modalities, **wishes)
    return pull(wish, [find_provider(server.address)], out, connect=connect, **(options or {}))


def command(server, out, *more):
    return [
        *("fetch", f"--aoi={WHERE}", "--dates", "2024-01/2024-02", "--source", server.address, "--out", str(out)),
        *("--modalities", "sentinel2_l2a", "--title", "t", *more),
    ]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(server, tmp_path):
    assert main(command(server, tmp_path / "whole")) == 0
    server.slow_s = 0.05
    out, pieces = tmp_path / "killed", tmp_path / "killed.parts" / "pieces"
    process = subprocess.Popen(
        [sys.executable, "-m", "panterra", *command(server, out)],
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
    assert not out.exists()
    server.slow_s = 0
    server.log.clear()
    assert main(command(server, out)) == 0
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    again = {path.rsplit("/", 1)[1] for path in server.asked("/data/")}
    assert not again & {f"{name.rsplit('-', 1)[0]}.tif" for name in finished}
    # The search is not repeated, so what was chosen cannot change half-way.
    assert not server.asked("/search")
    assert not out.with_name("killed.parts").exists()


def test_a_run_that_stops_while_composing_goes_on_as_well(server, tmp_path):
    fetch(server, tmp_path / "whole", options={"title": "t"})

    def stage(what):
        def advance(done, total):
            if what == "composing" and done == 1:
                raise KeyboardInterrupt

        return advance

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        fetch(server, out, options={"title": "t", "stage": stage})
    (made,) = (tmp_path / "stopped.parts" / "scene").glob("*.tif")
    before = made.stat().st_mtime_ns
    server.log.clear()
    fetch(server, out, options={"title": "t"})
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert (out / made.name).stat().st_mtime_ns == before
    assert not server.log


def test_parts_of_another_job_are_not_mixed_in(server, tmp_path):
    server.dead["/data/"] = 404
    out = tmp_path / "scene"
    with pytest.raises(InputError):
        fetch(server, out)
    server.dead.clear()
    with pytest.raises(InputError, match=r"scene\.parts holds part of a job with another composite; repeat"):
        fetch(server, out, composite="best")
    fetch(server, out, composite="best", options={"overwrite": True})
    with pytest.raises(InputError, match="scene exists; choose another name, or replace it with --overwrite"):
        fetch(server, out)
    before = bytes_of(out)
    fetch(server, out, options={"overwrite": True})
    assert bytes_of(out).keys() == before.keys()
    assert bytes_of(out) != before
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="mine is no scene and is not replaced"):
        fetch(server, tmp_path / "mine", options={"overwrite": True})


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
        fetch(server, tmp_path / "c", options={"replay": tmp_path / "none"})
    with pytest.raises(InputError, match="exclude each other"):
        fetch(server, tmp_path / "c", options={"replay": tmp_path / "copy", "cache": tmp_path})


def test_a_cache_serves_other_runs(server, tmp_path):
    fetch(server, tmp_path / "a", options={"cache": tmp_path / "cache"})
    server.log.clear()
    again = fetch(server, tmp_path / "b", composite="best", options={"cache": tmp_path / "cache"})
    assert server.asked("/search")
    assert not server.asked("/data/")
    assert again.scene.modalities == ("sentinel1", "landsat")
