"""What an unfinished output has so far."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.errors import RasterioError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from panterra.errors import InputError
from panterra.files import claim, clear, read_json, write_whole
from panterra.mapping.blend import Canvas
from panterra.mapping.tiles import Tile

Edges = tuple[Canvas, Canvas]
"""What a tile's windows add to the tile on the right (and below that), and to the tile below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a tile could not be made, however often it was tried."""

    reason: str


class IncompleteError(InputError):
    """An output was written whole but for some tiles, which are nodata; the same job tries these again."""

    def __init__(self, message: str, *, failed: Mapping[str, str], result: Any) -> None:
        super().__init__(message)
        self.failed = failed
        """The reason for each tile."""
        self.result = result
        """What the job would have returned."""


class Parts:
    """Finished tiles in `<out>.parts`, each a file that appears whole; killed at any moment, the job can go on.

    `job` is all that the bytes of the output, and of a file `beside` it, depend on. Parts of another job are never
    mixed in, and one process at a time makes an output. Tiles are read and held by one thread and saved by another.

    Tiles that failed are tried again when the job is opened again, and so are the neighbours that were blended without
    them: then the bytes are those of a job without failures.
    """

    def __init__(self, out: Path, job: Mapping[str, Any], *, overwrite: bool, beside: Path | None = None) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.parts")
        note = self.folder / "job.json"
        wanted = json.loads(json.dumps(job))
        before = self._before(note, overwrite=overwrite)
        if before is not None and before != wanted and not overwrite:
            keys = sorted(k for k in {*before, *wanted} if before.get(k) != wanted.get(k))
            raise InputError(
                f"{self.folder} holds tiles of a job with another {', '.join(keys)}; repeat that job to go on with it, "
                "or start afresh with overwrite"
            )
        if before != wanted:
            there = [path for path in (out, beside) if path is not None and path.exists()]
            if there and not overwrite:
                raise InputError(f"{there[0]} exists; choose another name, or replace it with overwrite")
            if out.is_dir() and not (out / "zarr.json").is_file():
                raise InputError(f"{out} is a folder with other things, which is not replaced; choose another name")
        with self.guard():
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = claim(self.folder, str(self.out))
            self._disclaim: Callable[[], Any] = (
                (lambda: None) if handle is None else weakref.finalize(self, os.close, handle)
            )
            if before != wanted:
                self._empty()
            for leftover in self.folder.glob("*.tmp"):
                leftover.unlink()
            self._write("job.json", json.dumps(wanted, indent=1, sort_keys=True))
            self._try_again()
        self.failed: dict[str, str] = {}
        """The reason for each tile that failed since the job was opened."""
        self._again: set[str] = set()
        self._finished = {path.stem for path in self.folder.glob("tile_*.safetensors")}
        self._held: dict[tuple[int, int], Edges] = {}

    def __len__(self) -> int:
        return len(self._finished)

    def has(self, tile: Tile) -> bool:
        """Tell whether a tile was finished when the job was opened."""
        return f"tile_{tile.name}" in self._finished

    def hold(self, tile: Tile, edges: Edges) -> None:
        """Keep what a tile adds to its neighbours in memory, until `save` has it on disk."""
        self._held[tile.row, tile.col] = edges

    def fail(self, tile: Tile, failure: Failure) -> None:
        """Note that a tile cannot be made; its neighbours are to be made without it."""
        self.failed[tile.name] = failure.reason
        # Tiles without windows are not blended with others.
        near = ((0, 1), (1, 0), (1, 1)) if tile.windows else ()
        self._again |= {tile.name, *(f"{tile.row + down:05d}_{tile.col + right:05d}" for down, right in near)}
        note = {"failed": self.failed, "again": sorted(self._again)}
        self._write("failed.json", json.dumps(note, indent=1))

    def _before(self, note: Path, *, overwrite: bool) -> dict[str, Any] | None:
        """Read what job the parts are of; None where there are none, or damaged ones that are to be replaced."""
        try:
            found: dict[str, Any] | None = read_json(note, self._afresh) if note.is_file() else None
        except InputError:
            if not overwrite:
                raise
            return None
        return found

    @property
    def _afresh(self) -> str:
        return f"remove {self.folder}, and the same job starts afresh"

    @contextlib.contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Say in a line that what earlier starts have finished is not as it was written."""
        try:
            yield
        except InputError:
            raise
        except (FileNotFoundError, SafetensorError, ValueError) as error:
            raise InputError(f"{path} is damaged or gone ({error}); {self._afresh}") from None

    def _empty(self) -> None:
        """Take away what another job left; what is without a job, if killed on the way, is never gone on with."""
        (self.folder / "job.json").unlink(missing_ok=True)
        clear(self.folder)

    def _try_again(self) -> None:
        """Take tiles that failed, and those blended without them, for unfinished."""
        note = self.folder / "failed.json"
        if note.is_file():
            for name in read_json(note, self._afresh)["again"]:
                (self.folder / f"tile_{name}.safetensors").unlink(missing_ok=True)
            note.unlink()

    def edges(self, row: int, col: int) -> Edges | None:
        """Return what a tile, held or saved, adds to its neighbours; None where it failed."""
        if f"{row:05d}_{col:05d}" in self.failed:
            return None
        held = self._held.get((row, col))
        if held is not None:
            return held
        saved = self._load(self._edges_path(row, col))
        right, bottom = (Canvas(total=saved[f"{n}_total"], weight=saved[f"{n}_weight"]) for n in ("right", "bottom"))
        return right, bottom

    def save(self, tile: Tile, arrays: Mapping[str, np.ndarray]) -> None:
        """Finish a tile: its edges first, then its pixels, whose file says that it is done."""
        place = tile.row, tile.col
        if place in self._held:
            named = zip(("right", "bottom"), self._held[place], strict=True)
            edges = {f"{n}_{part}": getattr(canvas, part) for n, canvas in named for part in ("total", "weight")}
            self._save(self._edges_path(*place).name, edges)
        self._save(self._tile_path(tile).name, arrays)
        self._held.pop(place, None)
        # The tiles to its left and above are done as well, so nobody needs the corner between them any more; unless one
        # of the three is to be made again.
        left, above = f"{tile.row:05d}_{tile.col - 1:05d}", f"{tile.row - 1:05d}_{tile.col:05d}"
        if tile.row and tile.col and not self._again & {tile.name, left, above}:
            self._edges_path(tile.row - 1, tile.col - 1).unlink(missing_ok=True)

    def load(self, tile: Tile, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Return what was saved of a finished tile, all of it or some arrays."""
        return self._load(self._tile_path(tile), names)

    def _load(self, path: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        with self.reading(path), safe_open(path, "numpy") as file:
            sums = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in (names if names is not None else file.keys())}
            if any(name in sums and sums[name] != _sum(array) for name, array in arrays.items()):
                raise ValueError("it does not hold what was written")
        return arrays

    def require(self, tile: Tile, names: Sequence[str]) -> None:
        """Refuse to go on with a finished tile of an earlier version, which kept less of it."""
        path = self._tile_path(tile)
        with self.reading(path), safe_open(path, "numpy") as file:
            if not set(names) <= set(file.keys()):
                raise InputError(
                    f"{self.folder} holds tiles of an earlier version of panterra, which did not keep what the seam "
                    "score needs; remove that folder, and the job starts afresh"
                )

    def forget(self) -> None:
        """Take every tile for unfinished."""
        self._finished.clear()

    def remove(self) -> None:
        """Remove the folder, when the output is complete; first what would let a job go on with the half of it."""
        (self.folder / "job.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        self._disclaim()

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Say in one line what stopped a write, and what becomes of the tiles."""
        try:
            yield
        except (OSError, RasterioError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"cannot write {self.out}: {reason}; finished tiles are kept in {self.folder}: make room there and "
                "repeat the same job to go on"
            ) from error

    def _tile_path(self, tile: Tile) -> Path:
        return self.folder / f"tile_{tile.name}.safetensors"

    def _edges_path(self, row: int, col: int) -> Path:
        return self.folder / f"edges_{row:05d}_{col:05d}.safetensors"

    def _save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        held = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
        self._write(name, save(held, metadata={key: _sum(value) for key, value in held.items()}))

    def _write(self, name: str, content: str | bytes) -> None:
        write_whole(self.folder / name, content, sync=True)


def _sum(array: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"
