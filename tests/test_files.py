import os
import subprocess
import sys

import pytest

from panterra.files import unfinished, unfinished_folder, write_whole


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_holds_what_was_written(tmp_path, sync):
    path = tmp_path / "a.txt"
    assert write_whole(path, "è\n", sync=sync) == path
    assert path.read_bytes() == "è\n".encode()
    write_whole(path, b"\x00\r\n", sync=sync)
    assert path.read_bytes() == b"\x00\r\n"
    with unfinished(path, sync=sync) as place:
        place.write_text("third")
        assert path.read_bytes() == b"\x00\r\n"
    assert path.read_text() == "third"
    assert [*tmp_path.iterdir()] == [path]


def test_files_are_for_all_to_read(tmp_path):
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "a", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path, error):
    path = write_whole(tmp_path / "a.txt", "before")

    def write(place):
        place.write_text("half of it")
        raise error

    with pytest.raises(error), unfinished(path) as place:
        write(place)
    assert path.read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]


def test_a_kill_leaves_what_was_there(tmp_path):
    path = write_whole(tmp_path / "a.txt", "before")
    code = (
        "import os, pathlib, sys\n"
        "from panterra.files import unfinished\n"
        "with unfinished(pathlib.Path(sys.argv[1])) as place:\n"
        "    place.write_text('half of it')\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.glob(".a.txt.*.tmp")] != []


def test_a_folder_takes_the_place_of_an_older_one_or_leaves_it(tmp_path):
    path = tmp_path / "deep" / "model"
    with unfinished_folder(path) as fresh:
        (fresh / "first").write_text("1")
        assert not path.exists()

    def write_half(fresh):
        (fresh / "second").write_text("2")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), unfinished_folder(path) as fresh:
        write_half(fresh)
    assert [file.name for file in path.iterdir()] == ["first"]
    with unfinished_folder(path) as fresh:
        (fresh / "third").write_text("3")
    assert [file.name for file in path.iterdir()] == ["third"]
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]
