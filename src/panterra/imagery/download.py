"""The parts of remote files that lie over an area, as local files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from panterra.errors import InputError
from panterra.files import unfinished, write_whole
from panterra.imagery.raster import CACHE_BYTES, crs_for_rasterio
from panterra.imagery.web import CredentialsError, RangeFile, Web, plain

PART_PX = 1024
"""Side of what is copied at a time; a file's own blocks are never cut."""

Advance = Callable[[int, int], None]


def piece_name(href: str, box: GeoBox) -> str:
    """Name the local file of the part of a remote file over a box; signatures do not count."""
    place = json.dumps([plain(href), str(box.crs), list(box.affine)[:6], list(box.shape)])
    stem = re.sub(r"\W+", "_", Path(plain(href)).stem)[-60:]
    return f"{stem}-{hashlib.sha256(place.encode()).hexdigest()[:16]}.tif"


def fetch_pieces(
    hrefs: Iterable[str],
    box: GeoBox,
    folder: Path,
    web: Web | None,
    *,
    readers: int = 8,
    note_failures: bool = False,
    progress: Advance | None = None,
) -> tuple[dict[str, Path], dict[str, str]]:
    """Fetch what lies over a box of each file into a folder: the pieces by address, and why others failed.

    Pieces that are there already are not fetched again, so a killed run goes on. Without `web` nothing else is used,
    as in a replay; `note_failures` keeps what failed for that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = list(dict.fromkeys(hrefs))
    pieces: dict[str, Path] = {}
    failures: dict[str, str] = {}

    def fetch(href: str) -> Path:
        path = folder / piece_name(href, box)
        note = path.with_suffix(".failed")
        if path.is_file():
            return path
        if web is None:
            raise InputError(note.read_text("utf-8") if note.is_file() else f"{plain(href)} was not recorded")
        try:
            cut_out(web, href, box, path)
        except CredentialsError:
            raise
        except InputError as error:
            if note_failures:
                note.write_text(str(error), "utf-8")
            raise
        note.unlink(missing_ok=True)
        return path

    with ThreadPoolExecutor(max_workers=readers, thread_name_prefix="panterra-fetch") as pool:
        jobs = {pool.submit(fetch, href): href for href in wanted}
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                try:
                    pieces[jobs[job]] = job.result()
                except CredentialsError:
                    raise
                except InputError as error:
                    failures[jobs[job]] = str(error)
                if progress:
                    progress(done, len(jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return pieces, {href: failures[href] for href in wanted if href in failures}


def cut_out(web: Web, href: str, box: GeoBox, path: Path) -> None:
    """Copy the pixels of a remote file over a box, and a margin for interpolation, with all that they mean.

    Nothing is resampled. The copy appears under its name when it is whole.
    """
    file = RangeFile(web, href)
    with unfinished(path) as partial, rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_CACHEMAX=CACHE_BYTES):
        try:
            with rasterio.open("asset", driver=_driver(file), opener=_only(file)) as source:
                _copy(source, _window(source, box, href), partial)
        except RasterioError as error:
            raise file.failure or InputError(f"cannot read {plain(href)}: {error}") from error
        finally:
            file.close()


def _driver(file: RangeFile) -> str:
    """Tell JPEG 2000 from GeoTIFF; other formats, such as VRT, could make GDAL open files of this machine."""
    head = file.read(8)
    file.seek(0)
    return "JP2OpenJPEG" if head[4:] == b"jP  " else "GTiff"


def _only(file: RangeFile) -> Callable[..., RangeFile]:
    """Give GDAL one file, and nothing that it looks for beside it."""

    def opener(path: str, *_: Any, **__: Any) -> RangeFile:
        if path != "asset":
            raise FileNotFoundError(path)
        return file

    return opener


def _window(source: DatasetReader, box: GeoBox, href: str) -> Window:
    """Find the part of a file under a box, with what interpolation and averaging reach beyond it."""
    if source.crs is None or source.transform.is_identity:
        raise InputError(f"cannot use {plain(href)}: it has no place on Earth")
    west, south, east, north = _bounds_in(source, box)
    corners = [~source.transform @ corner for corner in ((west, south), (west, north), (east, south), (east, north))]
    cols, rows = zip(*corners, strict=True)
    ratio = max((max(cols) - min(cols)) / box.shape.x, (max(rows) - min(rows)) / box.shape.y)
    margin = 8 + 3 * ratio
    left, top = max(int(min(cols) - margin), 0), max(int(min(rows) - margin), 0)
    right = min(int(max(cols) + margin) + 1, source.width)
    bottom = min(int(max(rows) + margin) + 1, source.height)
    if left >= right or top >= bottom:
        raise InputError(f"{plain(href)} has no pixels in the area")
    return Window(left, top, right - left, bottom - top)


def _bounds_in(source: DatasetReader, box: GeoBox) -> tuple[float, float, float, float]:
    """Left, bottom, right, top of a box in the CRS of a file; over the antimeridian, on the side of the file."""
    bounds = transform_bounds(crs_for_rasterio(box.crs), source.crs, *box.boundingbox, densify_pts=51)
    west, south, east, north = (float(edge) for edge in bounds)
    if west <= east:
        return west, south, east, north
    left, right = source.bounds.left, source.bounds.right
    if right - left > 180:
        return left, south, right, north
    return (west, south, east + 360, north) if left + right > 0 else (west - 360, south, east, north)


def _copy(source: DatasetReader, window: Window, path: Path) -> None:
    profile = {
        "driver": "GTiff",
        "width": window.width,
        "height": window.height,
        "count": source.count,
        "dtype": source.dtypes[0],
        "crs": source.crs,
        "transform": source.transform @ Affine.translation(window.col_off, window.row_off),
        "nodata": source.nodata,
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": "DEFLATE",
        "zlevel": 1,
        "interleave": "band",
        "bigtiff": "IF_SAFER",
    }
    with rasterio.open(path, "w", **profile) as copy:
        copy.scales, copy.offsets = source.scales, source.offsets
        for part in _parts(source, window):
            place = Window(part.col_off - window.col_off, part.row_off - window.row_off, part.width, part.height)
            copy.write(source.read(window=part), window=place)


def _parts(source: DatasetReader, window: Window) -> Iterator[Window]:
    """Cut a window along the blocks of its file, so that none is fetched twice."""
    height, width = (max(PART_PX // size, 1) * size for size in source.block_shapes[0])
    bottom, right = window.row_off + window.height, window.col_off + window.width
    for row in range(window.row_off // height * height, bottom, height):
        for col in range(window.col_off // width * width, right, width):
            top, left = max(row, window.row_off), max(col, window.col_off)
            yield Window(left, top, min(col + width, right) - left, min(row + height, bottom) - top)


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1, sort_keys=True))
