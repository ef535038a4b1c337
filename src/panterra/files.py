"""Files and folders that are whole from the moment they have their name."""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from panterra.errors import InputError


def _machine() -> str:
    try:
        numbering = str(Path("/proc/self/ns/pid").readlink())  # containers have their own
    except OSError:
        numbering = ""
    return f"{zlib.crc32((platform.node() + numbering).encode()):08x}"


MACHINE = _machine()
"""Tells the processes of this computer from those of others that write to the same disk."""
LEFTOVER = re.compile(rf"\..+\.{MACHINE}-(?P<process>\d+)(\.\w+)?\.tmp")
CLAIM = ".claimed"


@contextmanager
def unfinished(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Give the place beside `path` where a file is to be written; it takes that name when the block ends.

    After an error nothing is left of it, and `path` is as it was; a killed process leaves
    `.<name>.<machine>-<process>.tmp`, which the next one that writes there takes away.
    With `sync` the bytes are on disk before the name is, for what has to survive the machine too.
    """
    _remove_leftovers(path.parent)
    temporary = path.with_name(f".{path.name}.{MACHINE}-{os.getpid()}.tmp")
    try:
        yield temporary
        if sync:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # of a full disk the system does not say which file it was
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path` that takes its name, in place of an older one, when the block ends.

    After an error nothing is left of it, and `path` is as it was; a killed process leaves
    `.<name>.<machine>-<process>.<letters>.tmp`, which the next one that writes there takes away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.{MACHINE}-{os.getpid()}.", suffix=".tmp", dir=path.parent))
    try:
        fresh = work / "fresh"
        fresh.mkdir()
        fresh.chmod(0o755)
        yield fresh
        if path.exists():
            path.rename(work / "replaced")  # to remove it takes a while, in which it would be neither old nor new
        fresh.rename(path)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_whole(path: Path, content: str | bytes, *, sync: bool = False) -> Path:
    """Write text (UTF-8) or bytes as a file that appears whole or not at all; return its path."""
    with unfinished(path, sync=sync) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def saving_tensors(path: Path) -> Iterator[None]:
    """Say where safetensors could not write, as the system would."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None


def read_json(path: Path, remedy: str) -> Any:
    """Read JSON that `write_whole` wrote. Raises InputError, which ends in `remedy`, where it is damaged since."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes that are no text
        raise InputError(f"{path} is damaged ({error}); {remedy}") from None


def open_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """Start a .npy file and map it into memory, with room on disk for all of it.

    Without room the system would kill whoever fills it; so this raises OSError.
    """
    import numpy as np

    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:  # others mean that the file system cannot reserve room
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise OSError(error.errno, error.strerror, str(path)) from None
    return array


def file_checksum(path: Path) -> str:
    """Hash a file (SHA-256)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def claim(folder: Path, what: str) -> int | None:
    """Keep other processes from writing what is made in a folder, until the handle that this returns is closed.

    A process's claims end with it, however it ends. None: nothing is claimed on file systems without locks, or on
    Windows. Raises InputError where another process has the claim.
    """
    if os.name == "nt":
        return None
    import fcntl

    handle = os.open(folder / CLAIM, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_nlink:  # else it was taken away in between, by who had it until now
            return handle
    except (BlockingIOError, PermissionError):
        pass
    except OSError:
        os.close(handle)
        return None
    os.close(handle)
    raise InputError(f"another process is making {what}; wait for it, or choose another name")


@contextmanager
def claimed(folder: Path, what: str) -> Iterator[None]:
    """Claim a folder, which is made where it is absent, while the block lasts. Raises InputError as `claim` does."""
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = claim(folder, what)
    try:
        yield
    finally:
        (folder / CLAIM).unlink(missing_ok=True)
        if fresh and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if handle is not None:
            os.close(handle)


def clear(folder: Path) -> None:
    """Take away all that is in a folder but the claim on it."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != CLAIM:
            path.unlink()


@cache
def _remove_leftovers(folder: Path) -> None:
    """Take away, once in each process, what killed processes had begun to write in a folder."""
    with suppress(OSError):
        for path in folder.iterdir():
            found = LEFTOVER.fullmatch(path.name)
            if found is not None and not alive(int(found["process"])):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def alive(process: int) -> bool:
    """Tell whether a process of this machine is there; on Windows, where to ask would be to signal it, assume so."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another person
        return True
    return True
