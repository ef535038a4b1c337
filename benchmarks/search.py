"""What a search costs: seconds and memory by the number of vectors, exact and with an index.

    python benchmarks/search.py                           # 1, 3 and 10 million vectors, then an index of the last
    python benchmarks/search.py --millions 1 --no-index

One JSON line per case, each in a process of its own. The vectors are those of the planet's bands, projected at random
to the width of a model, stored as int8 and tiled with noise of up to 12 steps, so that no two are the same.
Memory is what the process added to that of its imports, at its peak.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.mapping.embeddings import create_zarr, lonlat_of, open_embeddings, to_bytes
from panterra.mapping.search import search
from panterra.mapping.search_index import build_index, open_index
from panterra.mapping.search_query import gather_examples, make_query, place_at
from panterra.mapping.tiles import blocks
from panterra.planet import Planet

SIDE = 320
"""Rows and columns of the planet that are tiled; also those of a shard."""
DATES = ("2023-04-28", "2023-06-09", "2023-07-22", "2023-09-14")


def planet_vectors(dim: int) -> np.ndarray:
    box = GeoBox((SIDE, SIDE), Affine(10, 0, 477000, 0, -10, 5297500), "EPSG:32633")
    planet = Planet(seed=0, clouds=0.0)
    ground = planet.ground(box)
    bands = np.concatenate([planet.observe("sentinel2_l2a", ground, date)[0] for date in DATES])
    bands = np.moveaxis((bands - bands.mean((1, 2), keepdims=True)) / bands.std((1, 2), keepdims=True), 0, -1)
    mixing = np.random.default_rng(0).normal(size=(bands.shape[-1], dim)) / np.sqrt(bands.shape[-1])
    vectors: np.ndarray = (bands @ mixing).astype(np.float32)
    return vectors


def write_store(path: Path, millions: float, dim: int) -> None:
    """Write a store of a whole number of tiles in a row of ten, of about so many vectors."""
    tiles = max(round(millions * 1e6 / SIDE**2), 1)
    cols = min(tiles, 10)
    box = GeoBox((-(-tiles // cols) * SIDE, cols * SIDE), Affine(10, 0, 400000, 0, -10, 5400000), "EPSG:32633")
    about = {"model": {"name": "bands"}, "patch_m": 10.0, "modalities": ["sentinel2_l2a"], "dates": list(DATES)}
    create_zarr(path, box, dim=dim, dtype="int8", shard=(SIDE, SIDE), chunk=(10, 10), about=about)
    codes, exponent = to_bytes(planet_vectors(dim))
    codes, rng = np.moveaxis(codes, -1, 0), np.random.default_rng(1)
    group: Any = zarr.open_group(str(path), mode="r+")
    for tile in blocks(*box.shape, rows=SIDE, cols=SIDE):
        noise = rng.integers(-12, 13, codes.shape, np.int8)
        group["embeddings"][:, *tile.core.slices] = np.clip(codes.astype(np.int16) + noise, -127, 127).astype(np.int8)
        group["scale_exponent"][tile.core.slices] = exponent


def queries(path: Path, count: int) -> list[Any]:
    """Take patches spread over the store as examples."""
    store, rng = open_embeddings(path), np.random.default_rng(2)
    row, col = (rng.integers(0, side, count) for side in store.box.shape)
    places = lonlat_of(row, col, store.box)
    return [gather_examples(place_at(*place), [store]) for place in places]


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def run(case: str, path: Path, millions: float, dim: int) -> dict[str, Any]:
    """Run one case and say what it took; CPU seconds hold on a machine that others use too."""
    if case == "write":
        write_store(path, millions, dim)
    examples = queries(path, 10)
    store, before = open_embeddings(path), peak_mb()
    vectors = store.box.shape[0] * store.box.shape[1]
    began, cpu = time.perf_counter(), time.process_time()
    result: dict[str, Any] = {}
    if case == "write":
        result = {"store_mb": round(sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e6)}
        began, cpu = 0.0, 0.0
    elif case == "exact":
        search([store], make_query(examples[0]), top=100, leave_out=examples[0])
    elif case == "build":
        index = build_index(store)
        size = sum(f.stat().st_size for f in index.folder.iterdir())
        result = {"index_mb": round(size / 1e6), "lists": index.lists, "probes": index.probes, "recall": index.recall}
    else:
        index = open_index(store)
        for like in examples:
            search([store], make_query(like), top=100, leave_out=like, indexes=[index])
    seconds, spent = (0.0, 0.0) if case == "write" else (time.perf_counter() - began, time.process_time() - cpu)
    if case == "indexed":
        seconds, spent = seconds / len(examples), spent / len(examples)
    return {
        "case": case,
        "vectors": vectors,
        "dim": dim,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(spent, 2),
        "cpu_us_per_vector": round(spent / vectors * 1e6, 3),
        "added_mb": round(peak_mb() - before),
        "peak_mb": round(peak_mb()),
        **result,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="*", default=[1, 3, 10])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--no-index", action="store_true", help="leave out the index of the largest store")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for millions in sorted(args.millions):
            path = Path(folder) / "store.zarr"
            shutil.rmtree(path, ignore_errors=True)
            last = millions == max(args.millions) and not args.no_index
            for case in ("write", "exact", *(("build", "indexed") if last else ())):
                with mp.get_context("spawn").Pool(1) as process:
                    print(json.dumps(process.apply(run, (case, path, millions, args.dim))), flush=True)


if __name__ == "__main__":
    main()
