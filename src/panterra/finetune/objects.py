"""Windows in which all objects are known, to learn to find them and to be tested on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
import torch
from jaxtyping import Bool, Float
from odc.geo.geobox import GeoBox

from panterra.data.labelled import LabelledSample
from panterra.errors import InputError
from panterra.finetune.boxes import NO_OBJECT
from panterra.finetune.examples import Examples, classes_of, deal, fits_of, grids_of, named, number_blocks
from panterra.finetune.pairs import Periods, pair_up
from panterra.finetune.tasks import task_of
from panterra.imagery.labels import Labels, read_labels
from panterra.imagery.raster import crs_for_rasterio
from panterra.imagery.stac import Scene, pixel_metres

POINTS = ("Point", "MultiPoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """A window and what is in it."""

    scene: int
    box: GeoBox
    rows: Float[np.ndarray, "m 5"]
    """Class, centre and size of objects, as fractions of the window."""


def objects_from_scenes(
    scenes: Sequence[Scene],
    labels: Labels | str | Path,
    *,
    boxes: Sequence[GeoBox] | None = None,
    column: str | None = None,
    size_m: float | None = None,
    area: str | Path | None = None,
    periods: Periods | None = None,
    modalities: Sequence[str] | None = None,
    window_px: int = 64,
    cell_m: float = 10,
    block_m: float = 1000,
    seed: int = 42,
) -> Examples:
    """Cut scenes into windows with the boxes around what is labelled, and deal them into parts by spatial block.

    An object is its polygon's bounds on the common grid, or a square of `size_m` around its point; it counts in the
    window that holds its centre. Places without a label hold no object: where that is not so, only windows inside the
    polygons of `area` are used. Centres are looked for on cells of `cell_m`, which may be finer than the pixels of the
    common grid. Blocks and parts are as in `examples_from_scenes`, and so are labels of other dates: nobody knows
    whether these objects are there, so windows that hold their centres are left out.
    """
    known = labels if isinstance(labels, Labels) else read_labels(labels, column=column, kind="classes")
    if known.raster is not None or known.kind != "classes":
        raise InputError("objects are points or polygons with a class; give these")
    if size_m is None and known.frame.geom_type.isin(POINTS).any():
        raise InputError("points say where objects are, but not how large; give their size, or polygons")
    grids, pixel_m = grids_of(scenes, boxes)
    cells = window_px * pixel_m / cell_m
    if abs(cells - round(cells)) > 1e-6:
        raise InputError(
            f"windows of {window_px * pixel_m:g} m are no whole number of cells of {cell_m:g} m; change one"
        )
    fits = fits_of(known, scenes, modalities)
    if periods is not None:
        fits[:] = True
    others = int((~fits.any(axis=0)).sum())
    if others == len(known.frame):
        raise InputError(f"all {others} labels are of other dates than the scenes; give scenes of their dates")
    views = [view for i, box in enumerate(grids) for view in _views(i, box, known, fits[i], window_px, size_m, area)]
    if not any(len(view.rows) for view in views):
        raise InputError("no object lies on the scenes; check that both show the same place, and the area if any")
    blocks = number_blocks([view.box for view in views], block_m)
    names = (*known.names, "no object")
    kinds = [view.rows[:, 0].astype(np.int64) if len(view.rows) else np.array([len(known.names)]) for view in views]
    parts = deal(blocks, kinds, names, seed)
    most = max(len(view.rows) for view in views)
    shown = tuple(modalities) if modalities is not None else None
    narrowed = [periods.narrow(scene) if periods else scene for scene in scenes]

    def read(index: int) -> LabelledSample:
        view = views[index]
        batch = narrowed[view.scene].batch(view.box, shown)
        target = np.full((most, 5), NO_OBJECT, np.float32)
        target[: len(view.rows)] = view.rows
        return LabelledSample(
            id=f"{view.scene}-{index}",
            batch=pair_up(batch, periods) if periods else batch,
            target=torch.from_numpy(target)[None],
            fold=str(parts[index]),
        )

    digest = hashlib.sha256()
    for view in views:
        digest.update(repr((view.scene, str(view.box.crs), view.box.shape, tuple(view.box.affine))).encode())
        digest.update(view.rows.tobytes())
    return Examples(
        task=task_of("detection"),
        classes=classes_of(known),
        read=read,
        parts=parts,
        blocks=blocks,
        block_m=block_m,
        window_px=window_px,
        pixel_m=pixel_m,
        cells=round(cells),
        pairs=periods is not None,
        periods=periods,
        about={
            **named(scenes),
            "labels": sum(len(view.rows) for view in views),
            **({"other_dates": others} if others else {}),
            "seed": seed,
            "sha256": digest.hexdigest(),
        },
    )


def _views(
    scene: int,
    box: GeoBox,
    labels: Labels,
    fits: Bool[np.ndarray, " n"],
    window_px: int,
    size_m: float | None,
    area: str | Path | None,
) -> list[_View]:
    """Lay windows side by side from the upper left corner, with the objects whose centres they hold.

    Windows that hold one that does not fit the dates are left out.
    """
    crs = crs_for_rasterio(box.crs).to_wkt()
    # Of several points in one feature each is an object.
    scattered = labels.frame.geom_type == "MultiPoint"
    told = labels.frame.assign(fits=fits)
    frame = pd.concat([told[~scattered], told[scattered].explode()]).to_crs(crs)
    bounds = frame.bounds.to_numpy(copy=True)
    if size_m is not None:
        points = (frame.geom_type == "Point").to_numpy()
        bounds[points] += np.array([-1, -1, 1, 1]) * size_m / 2
    to = ~box.affine
    left, bottom = to.a * bounds[:, 0] + to.c, to.e * bounds[:, 1] + to.f
    right, top = to.a * bounds[:, 2] + to.c, to.e * bounds[:, 3] + to.f
    kind, fitting = frame["target"].to_numpy(), frame["fits"].to_numpy(np.bool_)
    x, y = (left + right) / 2 / window_px, (top + bottom) / 2 / window_px
    width, height = (right - left) / window_px, (bottom - top) / window_px
    if not np.all((width > 0) & (height > 0)):
        raise InputError("an object has no extent; give points a size, and polygons an area")
    # An area that was drawn along the edges of pixels has lost some digits.
    known = None if area is None else gpd.read_file(area).to_crs(crs).union_all().buffer(pixel_metres(box) / 2)
    views = []
    for row in range(-(-int(box.shape[0]) // window_px)):
        for col in range(-(-int(box.shape[1]) // window_px)):
            own = _window(box, row, col, window_px)
            if known is not None and not known.contains(shapely.box(*own.boundingbox.bbox)):
                continue
            mine = (np.floor(y) == row) & (np.floor(x) == col)
            if not fitting[mine].all():
                continue
            rows = np.stack([kind[mine], x[mine] - col, y[mine] - row, width[mine], height[mine]], axis=1)
            views.append(_View(scene=scene, box=own, rows=rows.astype(np.float32)))
    return views


def _window(box: GeoBox, row: int, col: int, size: int) -> GeoBox:
    """Give a window of the grid, which may reach beyond the box."""
    rows, cols = (row + 1) * size, (col + 1) * size
    return GeoBox((rows, cols), box.affine, box.crs)[row * size : rows, col * size : cols]
