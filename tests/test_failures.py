"""What disks, limits and other processes do to a command, and what the person is told."""

import errno
import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from affine import Affine
from odc.geo.geobox import GeoBox
from torch import nn

from panterra import cli
from panterra.errors import InputError, RunError
from panterra.evaluate.cache import Store
from panterra.evaluate.suite import read_rows
from panterra.files import MACHINE, claimed, open_array, read_json, write_whole
from panterra.imagery.raster import CogWriter
from panterra.mapping.parts import Parts
from panterra.mapping.tiles import Tile
from panterra.models.weights import load_model, save_model
from panterra.train import checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL, fork and limits")

BOX = GeoBox((64, 64), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")


@contextmanager
def room_for(size):
    """Let no file grow beyond some bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# What killed processes leave


def test_what_a_killed_process_had_begun_is_taken_away_by_the_next(tmp_path):
    code = (
        "import os, pathlib, sys\n"
        "from panterra.files import unfinished, unfinished_folder\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with unfinished(folder / 'a.txt') as place, unfinished_folder(folder / 'model') as fresh:\n"
        "    place.write_text('half')\n"
        "    (fresh / 'weights').write_text('half')\n"
        "    if sys.argv[2] == 'dies':\n"
        "        os._exit(9)\n"
    )
    others = [tmp_path / f".b.txt.{MACHINE}-{os.getpid()}.tmp", tmp_path / ".c.txt.tmp", tmp_path / ".d.00000000-1.tmp"]
    for path in others:  # of a process that lives, of something else, of another machine
        path.touch()

    def run(how):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path), how], check=False)
        return done.returncode, {path.name for path in tmp_path.iterdir()} - {path.name for path in others}

    status, left = run("dies")
    assert status == 9
    assert len(left) == 2
    assert run("ends") == (0, {"a.txt", "model"})
    assert all(path.exists() for path in others)


def test_a_claim_ends_with_its_process(tmp_path, claimed_elsewhere):
    kill = claimed_elsewhere(tmp_path / "run")
    with (
        pytest.raises(InputError, match="another process is making the run; wait for it"),
        claimed(tmp_path / "run", "the run"),
    ):
        pass
    kill()
    with claimed(tmp_path / "run", "the run"):
        (tmp_path / "run" / "log").touch()
    assert (tmp_path / "run" / "log").exists()


def test_a_claim_leaves_no_folder_in_which_nothing_was_made(tmp_path):
    with pytest.raises(KeyError), claimed(tmp_path / "run", "the run"):
        raise KeyError
    assert not any(tmp_path.iterdir())


# Full disks


def test_a_file_for_which_there_is_no_room_is_named(tmp_path):
    with room_for(1000), pytest.raises(OSError, match=r"a\.txt") as caught:
        write_whole(tmp_path / "a.txt", b"x" * 5000)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.strerror
    assert not any(tmp_path.iterdir())


def test_a_raster_for_which_there_is_no_room_is_named(tmp_path):
    noise = np.random.default_rng(0).normal(size=(4, 64, 64)).astype(np.float32)

    def write():
        with CogWriter(tmp_path / "a.tif", BOX, 4, "float32") as writer:
            writer.write(_whole(), noise)

    with room_for(10_000), pytest.raises(OSError, match="GDAL could not write, as on a full disk") as caught:
        write()
    assert caught.value.filename == str(tmp_path / "a.tif")
    assert not any(tmp_path.iterdir())
    write()
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


def _whole():
    from rasterio.windows import Window

    return Window(0, 0, 64, 64)


def test_a_model_for_which_there_is_no_room_is_named(tmp_path):
    model = load_model("panterra-nano")
    with room_for(10_000), pytest.raises(OSError, match="model") as caught:
        save_model(model, tmp_path / "model")
    assert caught.value.strerror
    assert not any((tmp_path / "model").iterdir())


def test_an_array_in_memory_has_its_room_on_disk_from_the_start(tmp_path):
    with room_for(10_000), pytest.raises(OSError, match="File too large"):
        open_array(tmp_path / "a.npy", np.float32, (100, 1000))
    array = open_array(tmp_path / "b.npy", np.float32, (100, 1000))
    assert (tmp_path / "b.npy").stat().st_blocks * 512 >= array.nbytes


def test_a_checkpoint_for_which_there_is_no_room_keeps_the_one_before(tmp_path):
    module, optimiser = _module()
    first = checkpoint.save(tmp_path, module, [optimiser], {"step": 1}, permanent=False)
    with room_for(10_000), pytest.raises((OSError, RunError)):
        checkpoint.save(tmp_path, module, [optimiser], {"step": 2}, permanent=False)
    assert checkpoint.newest(tmp_path) == first
    checkpoint.save(tmp_path, module, [optimiser], {"step": 2}, permanent=False)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


# State that is damaged


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def _module():
    torch.manual_seed(0)
    module = nn.Linear(64, 64)
    optimiser = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 64)).sum().backward()
    optimiser.step()
    return module, optimiser


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "facts.json"])
@pytest.mark.parametrize("damage", [truncate, zero, empty, remove])
def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path, name, damage):
    module, optimiser = _module()
    path = checkpoint.save(tmp_path, module, [optimiser], {"step": 1}, permanent=True)
    damage(path / name)
    with pytest.raises(InputError, match=f"{path}.* is damaged.*remove that folder"):
        checkpoint.load(path, *_module()[:1], [_module()[1]])


def test_a_checkpoint_of_before_sums_were_kept_is_gone_on_from(tmp_path):
    module, optimiser = _module()
    path = checkpoint.save(tmp_path, module, [optimiser], {"step": 1}, permanent=True)
    facts = json.loads((path / "facts.json").read_text())
    del facts["sha256"]
    (path / "facts.json").write_text(json.dumps(facts))
    assert checkpoint.load(path, module) == {"step": 1, "permanent": True}


@pytest.mark.parametrize("damage", [truncate, zero, empty, remove])
@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_damaged_features_are_made_again(tmp_path, damage, suffix):
    store, about = Store(folder=tmp_path), {"kind": "targets"}
    rows = torch.arange(6000).reshape(3, 2000)
    for _ in range(2):
        writer = store.writer(about, 3)
        writer.add(rows)
        writer.finish({"seconds": 1.0, "wh": 0.0})
        assert store.has(about)
        assert torch.equal(store.read(about), rows)
        (made,) = tmp_path.glob(f"*{suffix}")
        # Cut after 64 bytes of zeros a JSON file is damaged; zeros within a string would only change what it says.
        damage(made)
        assert not store.has(about)
    assert len(list(tmp_path.iterdir())) == (1 if damage is remove else 2)


def test_damaged_lines_of_a_table_are_left_out(tmp_path):
    journal = tmp_path / "results.jsonl"
    journal.write_bytes(b'\xff\xfe\x00\n[]\n{}\n{"figures": null}\n\x00\x00\x00\n{"id": "half')
    assert read_rows(journal) == []


def tile(col):
    return Tile(row=0, col=col, core=_window(4 * col), reach=_window(4 * col), windows=())


def _window(col):
    from panterra.mapping.tiles import Window

    return Window(row=0, col=col, height=4, width=4)


@pytest.mark.parametrize("damage", [truncate, zero, empty])
def test_damaged_notes_of_an_unfinished_job_are_told_of(tmp_path, damage):
    out, job = tmp_path / "map.tif", {"model": "nano", "size": list(range(50))}
    Parts(out, job, overwrite=False)
    damage(tmp_path / "map.tif.parts" / "job.json")
    with pytest.raises(InputError, match=r"job\.json is damaged .*remove .*map\.tif\.parts, and the same job starts"):
        Parts(out, job, overwrite=False)
    assert len(Parts(out, job, overwrite=True)) == 0


@pytest.mark.parametrize("damage", [truncate, zero, empty])
def test_a_damaged_tile_is_told_of(tmp_path, damage):
    out, job = tmp_path / "map.tif", {"model": "nano"}
    parts, one = Parts(out, job, overwrite=False), tile(0)
    parts.save(one, {"map": np.arange(4000, dtype=np.uint16)})
    damage(next((tmp_path / "map.tif.parts").glob("tile_*")))
    with pytest.raises(InputError, match=r"tile_.* is damaged or gone .*remove .*map\.tif\.parts"):
        Parts(out, job, overwrite=False).load(one)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"\x00\x00"])
def test_damaged_json_names_its_file_and_the_remedy(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(InputError, match=r"plan\.json is damaged \(.*\); remove it"):
        read_json(tmp_path / "plan.json", "remove it")


# The command line


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (MemoryError(), 1, "memory ran out"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), 1, "memory ran out"),
        (RuntimeError("can't start new thread"), 1, "memory ran out"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "memory ran out"),
        (OSError(errno.EMFILE, "Too many open files", "a.tif"), 2, "ulimit -n"),
        (OSError(errno.ENOSPC, "No space left on device", "a.tif"), 2, "No space left on device at a.tif"),
        (UnicodeEncodeError("ascii", "b\xe8ta", 1, 2, "not in range"), 2, "set PYTHONUTF8=1"),
        (RunError("a worker was killed"), 1, "a worker was killed"),
    ],
)
def test_what_the_system_refuses_is_one_line(monkeypatch, capsys, error, status, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert cli.main(["models"]) == status
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_a_mistake_of_ours_stays_loud(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(RuntimeError, match="multiplied"):
        cli.main(["models"])


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(closed):
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m panterra.cli models {closed}"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_mistake_in_a_worker_ends_the_process_and_the_workers():
    code = (
        "import torch\n"
        "from panterra.train.loading import load_batches\n"
        "class Batches(torch.utils.data.Dataset):\n"
        "    def __getitem__(self, step):\n"
        "        raise KeyError('deep down')\n"
        "with load_batches(Batches(), range(100), workers=1) as batches:\n"
        "    next(batches)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "KeyError: 'deep down'" in done.stderr


def test_too_few_open_files_for_workers_are_told_of():
    code = (
        "import resource, torch\n"
        "from panterra.errors import InputError\n"
        "from panterra.train.loading import load_batches\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))\n"
        "class Batches(torch.utils.data.Dataset):\n"
        "    def __getitem__(self, step):\n"
        "        return torch.zeros(10)\n"
        "try:\n"
        "    with load_batches(Batches(), range(100), workers=1) as batches:\n"
        "        kept = list(batches)\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ulimit -n 4096" in done.stdout
