"""A layer beside a map that tells where it extrapolates."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from panterra.energy import measure_energy
from panterra.errors import InputError
from panterra.evaluate.applicability import Applicability
from panterra.imagery.raster import CogWriter
from panterra.mapping.embeddings import EmbeddingStore, file_window, is_tif
from panterra.mapping.passport import data_asset, passport_of, write_passport
from panterra.mapping.stored import Stored

BANDS = ("dissimilarity", "inside")


def write_applicability(
    store: EmbeddingStore,
    fitted: Applicability,
    out: str | Path,
    *,
    overwrite: bool = False,
    country: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the dissimilarity index of stored embeddings and whether it is inside (1) or outside (0) as a GeoTIFF.

    Both bands are float32 and NaN without data, so that overviews average them: an overview's `inside` is a share. The
    file is made block by block, appears whole, and has a passport beside it.
    """
    out = Path(out)
    if not is_tif(out):
        raise InputError(f"the layer is written as a GeoTIFF; let the name {out.name!r} end in .tif")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; choose another name, or replace it with overwrite")
    if fitted.dim != store.dim:
        raise InputError(
            f"the area of applicability is of features of width {fitted.dim}, {store.path} holds {store.dim}; "
            "use the same encoder"
        )
    work = Stored(store=store, workers=1)
    tiles = list(work.tiles())
    about = {"metric": fitted.metric, "neighbours": fitted.neighbours, "threshold": fitted.threshold}
    with (
        measure_energy(country=country) as meter,
        CogWriter(
            out,
            store.box,
            len(BANDS),
            "float32",
            nodata=math.nan,
            band_names=BANDS,
            tags={f"applicability_{name}": str(value) for name, value in about.items()},
        ) as writer,
    ):
        for done, tile in enumerate(tiles, start=1):
            index = fitted.index(store.read(tile.core))
            inside = np.where(np.isfinite(index), fitted.inside(index), np.float32(np.nan))
            writer.write(file_window(tile.core), np.stack([index, inside]).astype(np.float32))
            if progress:
                progress(done, len(tiles))
    asset = data_asset(out, data_type="float32", nodata="nan", bands=[{"name": name} for name in BANDS])
    write_passport(
        passport_of(out),
        store.box,
        work.dates,
        {"applicability": asset},
        energy=meter.report,
        licence=work.licence,
        properties={**work.origin, "panterra:applicability": {**about, "examples": len(fitted.examples)}},
    )
    return out
