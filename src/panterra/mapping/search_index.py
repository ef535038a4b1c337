"""An approximate index of stored vectors."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from panterra.errors import InputError
from panterra.files import CLAIM, claimed, clear, read_json, unfinished, write_whole
from panterra.mapping.embeddings import Block
from panterra.mapping.passport import checksum
from panterra.mapping.search_query import Vectors
from panterra.mapping.search_scores import Best, directional_products, units_of

Progress = Callable[[int, int], None]

PART_VECTORS = 2**21
"""Vectors of a part of an index: building holds one part in memory, D + 8 bytes a vector; a search maps it."""
MOST_LISTS = 2**10
"""A build compares every vector with every list, so its cost per vector grows up to this number and no further.

Of a part it makes lists of 2048 vectors, about as many as there are lists to choose from.
"""
TRAINING = 40
"""Vectors per list that the lists are learned from; fewer make poor lists."""
REFINED = 4
"""Candidates per place wanted whose exact scores are looked up: 8 bits put close ones in a wrong order."""
CHECKED, CHECKED_TOP = 64, 100
"""Recall is measured with this many stored vectors as queries, over this many neighbours of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Inverted lists of 8-bit vectors, in parts that are mapped and not loaded."""

    folder: Path
    count: int
    lists: int
    probes: int
    """Lists that are looked through to reach the recall that was asked for."""
    recall: float
    """Measured at `probes`."""
    _parts: tuple[Any, ...]

    def nearest(
        self, weight: Float32[np.ndarray, " d"], count: int, *, probes: int | None = None
    ) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Return the cells of about the best vectors and their approximate products, best first."""
        found = []
        for part in self._parts:
            part.nprobe = min(probes or self.probes, self.lists)
            found.append(part.search(np.ascontiguousarray(weight[None], np.float32), min(count, part.ntotal)))
        products, cells = (np.concatenate(column, axis=1)[0] for column in zip(*found, strict=True))
        order = np.argsort(-products, kind="stable")[: min(count, int((cells >= 0).sum()))]
        return cells[order], products[order]


def exact_products(store: Vectors, weight: np.ndarray, cells: np.ndarray) -> Float32[np.ndarray, " n"]:
    """Compare cells that an index offers with the vectors themselves."""
    vectors = store.sample(*np.divmod(cells, store.box.shape[1]))
    products: np.ndarray = directional_products(weight[None], vectors.T)[0]
    return products


def index_folder(store: Vectors) -> Path:
    """Return where the index of a store lies."""
    return store.path.with_name(f"{store.path.name}.index")


def open_index(store: Vectors) -> Index:
    """Open the index of a store; one of other content is refused."""
    folder = index_folder(store)
    if not (folder / "index.json").is_file():
        raise InputError(f"{store.path} has no index; build it with: panterra search {store.path} --build-index")
    about = read_json(folder / "index.json", f"build it again with: panterra search {store.path} --build-index")
    # Looking at times and sizes is quick; a copied store has other times, so its content is asked before it is refused.
    if about["files"] != _fingerprint(store.path) and about["checksum"] != checksum(store.path):
        raise InputError(
            f"{folder} is stale: {store.path} has changed since it was built; build it again with: "
            f"panterra search {store.path} --build-index"
        )
    return _load(folder, about)


def build_index(
    store: Vectors, *, recall: float = 0.95, part_vectors: int = PART_VECTORS, progress: Progress | None = None
) -> Index:
    """Build the index of a store beside it, `<store>.index`; a build that was stopped goes on with its next part.

    The square root of the number of vectors gives the number of lists, found by spherical k-means on a sample; vectors
    are kept in 8 bits a dimension (`IVF`, `SQ8` of faiss). How many lists a search looks through is the least power of
    two that reaches `recall` of the 100 nearest neighbours of 64 stored vectors, against an exact search.
    """
    import faiss

    if not 0 < recall <= 1:
        raise InputError(f"a recall of {recall:g} was asked for; wanted more than 0 and at most 1")
    folder = index_folder(store)
    work = folder.with_name(f"{folder.name}.parts")
    total = math.prod(store.box.shape)
    lists = max(1, min(math.isqrt(total), total // TRAINING, MOST_LISTS))
    job = {"files": _fingerprint(store.path), "lists": lists, "part_vectors": part_vectors, "faiss": faiss.__version__}
    with claimed(work, f"the index of {store.path}"):
        note = work / "job.json"
        if not note.is_file() or read_json(note, f"remove {work} to start afresh") != job:
            clear(work)
            sample = _sample(store, max(TRAINING * lists, CHECKED), total)
            if not len(sample):
                raise InputError(f"{store.path} holds no data to index")
            _write_index(_trained(sample, lists), work / "trained.faiss")
            np.save(work / "queries.npy", sample[np.linspace(0, len(sample) - 1, CHECKED).astype(int)])
            write_whole(note, json.dumps(job))
        for leftover in work.glob("*.tmp"):
            leftover.unlink()
        _add_parts(store, work, part_vectors, total, progress)
        parts = sorted(path.name for path in work.glob("part_*.faiss"))
        about = {
            "kind": "IVF,SQ8",
            "dim": store.dim,
            "lists": lists,
            "checksum": checksum(store.path),
            "files": job["files"],
            "parts": parts,
            "probes": lists,
            "recall": {},
        }
        with _reading(work):
            queries = np.load(work / "queries.npy")
        about |= _choose_probes(store, _load(work, about), queries, _exact_neighbours(store, queries), recall)
        write_whole(work / "index.json", json.dumps(about, indent=1))
        for leftover in (note, work / "trained.faiss", work / "queries.npy", work / CLAIM):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        work.replace(folder)
    return _load(folder, about)


def _sample(store: Vectors, wanted: int, total: int) -> np.ndarray:
    """Draw vectors from all blocks of a store."""
    rng, drawn = np.random.default_rng(0), []
    for block in store.blocks():
        count = min(len(block.cells), math.ceil(wanted * len(block.cells) / total))
        which = np.sort(rng.choice(len(block.cells), count, replace=False))
        chosen = Block(codes=block.codes[:, which], cells=block.cells[which])
        drawn += [vectors for vectors, _ in units_of(chosen)]
    return np.concatenate(drawn)


def _trained(sample: np.ndarray, lists: int) -> Any:
    """Learn the lists, as many as the sample allows."""
    import faiss

    dim = sample.shape[1]
    quantiser = faiss.IndexFlatIP(dim)
    index = faiss.IndexIVFScalarQuantizer(
        quantiser, dim, min(lists, len(sample)), faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.niter, index.cp.spherical, index.cp.seed = 10, True, 1
    index.cp.min_points_per_centroid = 1
    index.train(sample)
    return index


def _add_parts(store: Vectors, work: Path, part_vectors: int, total: int, progress: Progress | None) -> None:
    """Add all vectors, part by part; parts consist of whole blocks and are named by the first and the next block."""
    import faiss

    finished = sorted(work.glob("part_*.faiss"))
    start = int(finished[-1].stem.split("_")[2]) if finished else 0
    first, done = start, 0
    with _reading(work):
        part = faiss.read_index(str(work / "trained.faiss"))

    def finish(stop: int) -> None:
        _write_index(part, work / f"part_{first:06d}_{stop:06d}.faiss")

    stop = start
    for stop, block in enumerate(store.blocks(start), start=start + 1):
        for vectors, cells in units_of(block):
            part.add_with_ids(vectors, cells)
        if part.ntotal >= part_vectors:
            finish(stop)
            part.reset()
            first = stop
        done += len(block.cells)
        if progress:
            progress(done, total)
    if part.ntotal:
        finish(stop)


def _exact_neighbours(store: Vectors, queries: np.ndarray) -> np.ndarray:
    """Return the cells of the nearest vectors of each query, [q, n], by looking at all."""
    best = [Best(CHECKED_TOP) for _ in queries]
    for block in store.blocks():
        for own, products in zip(best, directional_products(queries, block.codes), strict=True):
            hopeful = own.promising(products)
            own.add(products[hopeful], 0, block.cells[hopeful])
    return np.stack([own.sorted()[2] for own in best])


def _choose_probes(
    store: Vectors, index: Index, queries: np.ndarray, wanted: np.ndarray, recall: float
) -> dict[str, Any]:
    """Measure recall with 1, 2, 4, ... lists and take the first number of lists that suffices."""
    measured: dict[int, float] = {}
    probes = 1
    while True:
        probes = min(probes, index.lists)
        offered = [index.nearest(query, REFINED * CHECKED_TOP, probes=probes)[0] for query in queries]
        known = np.unique(np.concatenate(offered))
        vectors = store.sample(*np.divmod(known, store.box.shape[1]))
        hits = 0
        for query, exact, cells in zip(queries, wanted, offered, strict=True):
            products = directional_products(query[None], vectors[np.searchsorted(known, cells)].T)[0]
            hits += len(np.intersect1d(exact, cells[np.argsort(-products)[: len(exact)]]))
        measured[probes] = round(hits / wanted.size, 4)
        if measured[probes] >= recall or probes == index.lists:
            return {"probes": probes, "recall": {str(k): v for k, v in measured.items()}}
        probes *= 2


def _load(folder: Path, about: dict[str, Any]) -> Index:
    import faiss

    with _reading(folder):
        parts: tuple[Any, ...] = tuple(faiss.read_index(str(folder / n), faiss.IO_FLAG_MMAP) for n in about["parts"])
    return Index(
        folder=folder,
        count=sum(part.ntotal for part in parts),
        lists=parts[0].nlist,
        probes=about["probes"],
        recall=about["recall"].get(str(about["probes"]), math.nan),
        _parts=parts,
    )


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Say in a line that the files of an index are not as they were written."""
    try:
        yield
    except (RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{folder} is damaged ({str(error)[-120:]}); remove it, and build the index again") from None


def _fingerprint(path: Path) -> str:
    """Hash names, sizes and times of a store's files."""
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    stats = [(f.relative_to(path).as_posix(), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _write_index(index: Any, path: Path) -> None:
    import faiss

    with unfinished(path) as temporary:
        faiss.write_index(index, str(temporary))
