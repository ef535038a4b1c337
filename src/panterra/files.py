"""Files and folders that are whole from the moment they have their name."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unfinished(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Give the place beside `path` where a file is to be written; it takes that name when the block ends.

    After an error nothing is left of it, and `path` is as it was; a killed process leaves `.<name>.<process>.tmp`.
    With `sync` the bytes are on disk before the name is, for what has to survive the machine too.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if sync:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path` that takes its name, in place of an older one, when the block ends.

    After an error nothing is left of it, and `path` is as it was; a killed process leaves `.<name>.<letters>`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        fresh.chmod(0o755)
        yield fresh
        if path.exists():
            shutil.rmtree(path)
        fresh.rename(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def write_whole(path: Path, content: str | bytes, *, sync: bool = False) -> Path:
    """Write text (UTF-8) or bytes as a file that appears whole or not at all; return its path."""
    with unfinished(path, sync=sync) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
