"""What a search costs: seconds and memory by the number of vectors, exact and with an index.

    python benchmarks/search.py                           # 10, 3 and 1 million vectors
    python benchmarks/search.py --millions 1

One JSON line per case, each in a process of its own. The vectors are drawn from a mixture of Gaussians that is fitted
to embeddings: panterra-nano's of a square of the planet. So they have its clusters and, within each, its directions; no
two are the same, and neighbours are no closer than chance brings them, which is hard for an index. Each is laid on the
ground where one of its cluster was. They are stored as int8.
Memory is what the process added to that of its imports, at its peak; pages of a mapped index count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.mapping.embeddings import create_zarr, lonlat_of, open_embeddings, to_bytes
from panterra.mapping.run import embed
from panterra.mapping.search import search
from panterra.mapping.search_index import build_index, open_index
from panterra.mapping.search_query import gather_examples, make_query, place_at
from panterra.mapping.search_scores import Best, directional_products
from panterra.mapping.tiles import blocks
from panterra.planet import write_planet_scene

SIDE = 320
"""Rows and columns of a shard."""
ACROSS = 10
"""Shards in a row."""
SEEN = 160
"""Rows and columns of the embeddings that the mixture is fitted to."""
CLUSTERS = 64
QUERIES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Gaussians, and where on the ground each was."""

    means: np.ndarray
    roots: np.ndarray
    """[c, d, d]; a root times white noise has the covariance of its cluster."""
    cluster: np.ndarray
    """[rows, columns]"""

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a shard, [rows, columns, d], from the ground turned and flipped."""
        ground = np.kron(np.rot90(self.cluster, int(rng.integers(4))), np.ones((SIDE // SEEN, SIDE // SEEN), int))
        shard = np.empty((*ground.shape, self.means.shape[1]), np.float32)
        for number, (mean, root) in enumerate(zip(self.means, self.roots, strict=True)):
            here = ground == number
            shard[here] = mean + rng.standard_normal((int(here.sum()), len(mean)), np.float32) @ root.T
        return shard


def embeddings(folder: Path) -> np.ndarray:
    """Embed a square of the planet, [SEEN, SEEN, D]."""
    scene = write_planet_scene(folder / "scene", size_px=2 * SEEN, labels=0, modalities=("sentinel2_l2a",), clouds=0)
    torch.set_num_threads(1)
    return embed(scene, "panterra-nano", folder / "seen.zarr", patch_m=20, window_px=32, overlap_px=0).read()


def fit(vectors: np.ndarray) -> Mixture:
    """Fit a mixture by k-means and the covariance of each cluster; a small one leans on that of all."""
    import faiss

    flat = np.ascontiguousarray(vectors.reshape(-1, vectors.shape[-1]))
    means = faiss.Kmeans(flat.shape[1], CLUSTERS, niter=20, seed=1)
    means.train(flat)
    assert means.centroids is not None
    cluster = means.index.search(flat, 1)[1][:, 0]
    within = [flat[cluster == c] - flat[cluster == c].mean(0) for c in range(CLUSTERS)]
    pooled = np.cov(np.concatenate(within).T)
    roots = []
    for own in within:
        scatter = own.T @ own + flat.shape[1] * pooled
        values, vectors_ = np.linalg.eigh(scatter / (len(own) + flat.shape[1]))
        roots.append(vectors_ * np.sqrt(np.maximum(values, 0)))
    return Mixture(
        means=means.centroids, roots=np.stack(roots).astype(np.float32), cluster=cluster.reshape(vectors.shape[:2])
    )


def empty_store(path: Path, shards: int, dim: int) -> Any:
    rows, cols = -(-shards // ACROSS), min(shards, ACROSS)
    box = GeoBox((rows * SIDE, cols * SIDE), Affine(10, 0, 400000, 0, -10, 5400000), "EPSG:32633")
    about = {"model": {"name": "mixture"}, "patch_m": 10.0, "modalities": ["sentinel2_l2a"], "dates": ["2023-04-28"]}
    create_zarr(path, box, dim=dim, dtype="int8", shard=(SIDE, SIDE), chunk=(10, 10), about=about)
    return zarr.open_group(str(path), mode="r+")


def write_store(path: Path, shards: int, mixture: Mixture) -> None:
    group, rng = empty_store(path, shards, mixture.means.shape[1]), np.random.default_rng(1)
    for tile in blocks(*group["scale_exponent"].shape, rows=SIDE, cols=SIDE):
        codes, exponent = to_bytes(mixture.draw(rng))
        group["embeddings"][:, *tile.core.slices] = np.moveaxis(codes, -1, 0)
        group["scale_exponent"][tile.core.slices] = exponent


def first_shards(path: Path, shards: int, whole: Path) -> None:
    """Make a smaller store of the first rows of another; they share their files."""
    empty_store(path, shards, open_embeddings(whole).dim)
    for array in ("embeddings/c/0", "scale_exponent/c"):
        for row in range(-(-shards // ACROSS)):
            (path / array / str(row)).mkdir(parents=True)
            for shard in (whole / array / str(row)).iterdir():
                os.link(shard, path / array / str(row) / shard.name)


def queries(path: Path) -> list[Any]:
    """Take patches spread over the store as examples."""
    store, rng = open_embeddings(path), np.random.default_rng(2)
    row, col = (rng.integers(0, side, QUERIES) for side in store.box.shape)
    places = lonlat_of(row, col, store.box)
    return [gather_examples(place_at(*place), [store]) for place in places]


def recall(path: Path, examples: list[Any]) -> dict[str, float]:
    """Return the share of the true nearest neighbours that a search with the index finds."""
    store = open_embeddings(path)
    index, asked = open_index(store), [make_query(like) for like in examples]
    best = [Best(100) for _ in asked]
    for block in store.blocks():
        products = directional_products(np.stack([query.weight for query in asked]), block.codes)
        for own, scores in zip(best, products, strict=True):
            hopeful = own.promising(scores)
            own.add(scores[hopeful], 0, block.cells[hopeful])
    hits = {10: 0, 100: 0}
    for query, own in zip(asked, best, strict=True):
        found = search([store], query, top=100, apart_m=0, indexes=[index])
        cells = found.row * store.box.shape[1] + found.col
        for k in hits:
            hits[k] += len(np.intersect1d(own.sorted()[2][:k], cells[:k]))
    return {f"recall_at_{k}": round(n / k / len(asked), 4) for k, n in hits.items()}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def run(case: str, path: Path, shards: int, whole: Path) -> dict[str, Any]:
    """Run one case and say what it took; CPU seconds hold on a machine that others use too."""
    if case == "write":
        if path == whole:
            write_store(path, shards, fit(embeddings(path.parent)))
        else:
            first_shards(path, shards, whole)
    store, examples = open_embeddings(path), queries(path)
    told: dict[str, Any] = {"case": case, "vectors": store.box.shape[0] * store.box.shape[1], "dim": store.dim}
    if case == "write":
        return told | {"store_mb": megabytes(path)}
    before, cpu, searches = peak_mb(), time.process_time(), 1
    if case == "exact":
        search([store], make_query(examples[0]), top=100, leave_out=examples[0])
    elif case == "build":
        index = build_index(store)
        told |= {"index_mb": megabytes(index.folder), "lists": index.lists, "probes": index.probes}
        told["recall_when_built"] = index.recall
    else:
        index, searches = open_index(store), len(examples)
        for like in examples:
            search([store], make_query(like), top=100, leave_out=like, indexes=[index])
    spent = (time.process_time() - cpu) / searches
    told |= {"cpu_s": round(spent, 3), "cpu_us_per_vector": round(spent / told["vectors"] * 1e6, 3)}
    told |= {"added_mb": round(peak_mb() - before), "peak_mb": round(peak_mb())}
    return told | (recall(path, examples) if case == "indexed" else {})


def megabytes(folder: Path) -> int:
    return round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="*", default=[1, 3, 10])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # A row of ten shards has about a million vectors.
        sizes = sorted({max(round(m * 1e6 / SIDE**2 / ACROSS), 1) * ACROSS for m in args.millions}, reverse=True)
        whole = Path(folder) / f"{sizes[0]}.zarr"
        for shards in sizes:
            for case in ("write", "exact", "build", "indexed"):
                with mp.get_context("spawn").Pool(1) as process:
                    path = Path(folder) / f"{shards}.zarr"
                    print(json.dumps(process.apply(run, (case, path, shards, whole))), flush=True)


if __name__ == "__main__":
    main()
