"""Where finished tiles go: GeoTIFFs, or a Zarr store."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import pystac
import rasterio

from panterra.errors import InputError
from panterra.evaluate.probes import Probe
from panterra.finetune.model import FineTuned
from panterra.imagery.raster import CogWriter
from panterra.mapping.embeddings import (
    NO_BYTE,
    Dtype,
    cog_band_names,
    cog_bands,
    cog_tags,
    create_zarr,
    file_window,
    is_tif,
    write_zarr,
)
from panterra.mapping.parts import Parts
from panterra.mapping.passport import data_asset
from panterra.mapping.seams import KEYS, tile_seams
from panterra.mapping.sources import Encoding
from panterra.mapping.stored import Stored
from panterra.mapping.tiles import Borders, Tile


class Sink(Protocol):
    """Takes tiles while it is open; when it closes without an error, the output is there, whole."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def put(self, tile: Tile, features: np.ndarray) -> None:
        """Take a tile's features [h, w, D], and save it in the parts."""

    def again(self, tile: Tile) -> None:
        """Take a tile that an earlier start saved."""


@dataclass(slots=True, kw_only=True)
class Cogs:
    """Tiles into GeoTIFFs. Their pixels are kept in the parts as well: a GeoTIFF cannot be gone on with."""

    parts: Parts
    tiles: Callable[[], Iterable[Tile]]
    borders: tuple[Borders, Borders]
    convert: Callable[[np.ndarray], dict[str, np.ndarray]]
    """Makes the pixels of each file from features [h, w, D]."""
    create: Callable[[Path], dict[str, CogWriter]]
    """Opens the files in a folder, each under its final name."""
    _writers: dict[str, CogWriter] = field(default_factory=dict)
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Cogs:
        self._writers = self.create(self.parts.folder)
        for writer in self._writers.values():
            self._open.enter_context(writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
        if kind is None:
            for name, writer in self._writers.items():
                self._check(name, writer.path)
            for writer in self._writers.values():
                for name in (f"{writer.path.name}.aux.xml", writer.path.name):
                    fresh, final = self.parts.folder / name, self.parts.out.with_name(name)
                    if fresh.exists():
                        fresh.replace(final)
                    else:
                        final.unlink(missing_ok=True)

    def put(self, tile: Tile, features: np.ndarray) -> None:
        pixels = self.convert(features)
        self.parts.save(tile, {**pixels, **tile_seams(features, tile, self.borders)})
        self._write(tile, pixels)

    def again(self, tile: Tile) -> None:
        self.parts.require(tile, KEYS)
        self._write(tile, self.parts.load(tile))

    def _write(self, tile: Tile, pixels: Mapping[str, np.ndarray]) -> None:
        for name, writer in self._writers.items():
            writer.write(file_window(tile.core), pixels[name])

    def _check(self, name: str, path: Path) -> None:
        """Compare a file with the tiles: GDAL does not always say when a disk is full."""
        with rasterio.open(path) as file:
            for tile in (tile for tile in self.tiles() if tile.name not in self.parts.failed):
                written = self.parts.load(tile)[name]
                if not np.array_equal(
                    file.read(window=file_window(tile.core)), written.reshape(-1, *written.shape[-2:]), True
                ):
                    raise OSError(f"{path.name} does not hold what was written, as happens on a full disk")


@dataclass(slots=True, kw_only=True)
class Shards:
    """Tiles into a Zarr store, one shard each, so that a killed job finds its shards whole."""

    parts: Parts
    num_tiles: int
    borders: tuple[Borders, Borders]
    create: Callable[[Path], None]

    @property
    def _path(self) -> Path:
        return self.parts.folder / "store"

    def __enter__(self) -> Shards:
        moved = len(self.parts) == self.num_tiles and self.parts.out.exists()
        if not self._path.exists() and not moved:
            self.parts.forget()
            fresh = self.parts.folder / "fresh"
            shutil.rmtree(fresh, ignore_errors=True)
            self.create(fresh)
            for path in (path for path in fresh.rglob("*") if path.is_file()):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            fresh.replace(self._path)
        # What zarr had begun to write when the job was killed.
        for leftover in self._path.rglob("*.partial"):
            leftover.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        out = self.parts.out
        if kind is None and self._path.exists():
            if out.exists():
                shutil.rmtree(self.parts.folder / "replaced", ignore_errors=True)
                out.replace(self.parts.folder / "replaced")
            (self._copy() if self.parts.failed else self._path).replace(out)

    def _copy(self) -> Path:
        """Copy a store to which tiles are still to be added; shards, which are only ever replaced, are linked."""
        copy = self.parts.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        try:
            shutil.copytree(self._path, copy, copy_function=os.link)
        except OSError:  # a file system without links
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self._path, copy)
        return copy

    def put(self, tile: Tile, features: np.ndarray) -> None:
        with self.parts.reading(self._path):
            write_zarr(self._path, tile.core, features)
        self.parts.save(tile, tile_seams(features, tile, self.borders))

    def again(self, tile: Tile) -> None:
        """Leave the store as it is: the shard is in it."""
        self.parts.require(tile, KEYS)


def embedding_sink(work: Encoding, out: Path, dtype: Dtype, parts: Parts) -> Sink:
    """Write embeddings into `out`, a GeoTIFF where it ends in .tif, else a Zarr store."""

    def about() -> dict[str, Any]:  # when the sink opens: statistics may be fitted until then
        return {**work.about, "licence": work.licence}

    if not is_tif(out):
        rows, cols = work.lattice.rows, work.lattice.cols
        return Shards(
            parts=parts,
            num_tiles=work.lattice.num_tiles,
            borders=work.borders,
            create=lambda path: create_zarr(
                path,
                work.grid,
                dim=work.dim,
                dtype=dtype,
                shard=(rows.tile, cols.tile),
                chunk=(rows.stride, cols.stride),
                about=about(),
            ),
        )
    names, nodata = cog_band_names(work.dim, dtype), NO_BYTE if dtype == "int8" else math.nan
    return Cogs(
        parts=parts,
        convert=lambda features: {"embeddings": cog_bands(features, dtype)},
        tiles=work.tiles,
        borders=work.borders,
        create=lambda folder: {
            "embeddings": CogWriter(
                folder / out.name,
                work.grid,
                len(names),
                dtype,
                nodata=nodata,
                band_names=names,
                tags=cog_tags(about(), dtype),
            )
        },
    )


def map_sink(probe: Probe | FineTuned, work: Encoding | Stored, out: Path, beside: Path | None, parts: Parts) -> Cogs:
    """Write predictions into `out` and probabilities into `beside`."""
    nodata, dtype = map_nodata(probe)
    categories = {c.code: c.name for c in probe.classes}
    palette = {c.code: c.colour for c in probe.classes if c.colour is not None}

    def convert(features: np.ndarray) -> dict[str, np.ndarray]:
        seen = np.isfinite(features).all(-1)
        pixels = {"map": np.full(seen.shape, nodata, dtype)}
        pixels["map"][seen] = probe.predict(features[seen])
        if beside is not None:
            pixels["probabilities"] = np.full((len(probe.classes), *seen.shape), np.nan, np.float32)
            pixels["probabilities"][:, seen] = probe.probabilities(features[seen]).T
        return pixels

    def create(folder: Path) -> dict[str, CogWriter]:
        classes = CogWriter(
            folder / out.name,
            work.grid,
            1,
            dtype,
            nodata=nodata,
            palette=palette if dtype == "uint8" else None,
            categories=categories or None,
        )
        writers = {"map": classes}
        if beside is not None:
            names = [c.name for c in probe.classes]
            writers["probabilities"] = CogWriter(
                folder / beside.name, work.grid, len(names), "float32", nodata=math.nan, band_names=names
            )
        return writers

    return Cogs(parts=parts, tiles=work.tiles, borders=work.borders, convert=convert, create=create)


def map_nodata(probe: Probe | FineTuned) -> tuple[float, str]:
    """Choose a value that is no class, 0 where it is free, and the smallest type that holds it and the codes."""
    if probe.task == "values":
        return math.nan, "float32"
    codes = {c.code for c in probe.classes}
    if min(codes) < 0 or max(codes) > 65534:
        raise InputError(f"the class codes go from {min(codes)} to {max(codes)}; a map holds 0 to 65534")
    free = next(value for value in (0, 255, 65535) if value not in codes)
    return free, "uint8" if max(*codes, free) < 256 else "uint16"


def map_asset(probe: Probe | FineTuned, out: Path) -> pystac.Asset:
    """Describe a map: its type, nodata value and classes."""
    nodata, dtype = map_nodata(probe)
    classes = [
        {
            "value": c.code,
            "name": c.name,
            **({"color_hint": "{:02X}{:02X}{:02X}".format(*c.colour)} if c.colour else {}),
        }
        for c in probe.classes
    ]
    fields = {"classification:classes": classes} if classes else {}
    return data_asset(out, data_type=dtype, nodata="nan" if math.isnan(nodata) else nodata, **fields)
