"""From a map to points to look at, and from what was seen there to honest figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.evaluate.area import AreaReport, ClassArea, Estimate, IntervalKind, class_areas, classes_at, estimate
from panterra.evaluate.sample_design import STANDARD_ERROR, Allocation, Design, design_sample, write_points
from panterra.imagery.labels import read_labels
from panterra.imagery.raster import crs_for_rasterio, grid_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """What reference points say of a map."""

    report: AreaReport
    names: dict[int, str]
    hectares: float
    """Of the region that the points were drawn from."""
    mapped: dict[int, float]
    """Hectares of each class on the map, as counted."""
    unlabelled: int
    """Points whose reference was left empty."""
    stratified: bool
    """False where the points do not say their stratum and were taken for a simple random sample."""

    def hectares_of(self, code: int) -> Estimate:
        """The error-adjusted area of a class."""
        return next(c for c in self.report.classes if c.code == code).area_share.times(self.hectares)

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain JSON."""
        plain = self.report.as_dict()
        for c in plain["classes"]:
            share = c["area_share"]
            c["name"] = self.names[c["code"]]
            c["area_ha"] = {k: None if v is None else v * self.hectares for k, v in share.items()}
            c["mapped_ha"] = self.mapped.get(c["code"], 0.0)
        return {
            **plain,
            "region_ha": self.hectares,
            "unlabelled": self.unlabelled,
            "design": "stratified" if self.stratified else "simple random",
        }


def draw_points(
    path: Path,
    out: Path,
    *,
    size: int | None,
    standard_error: float | None,
    users_accuracy: Sequence[str],
    allocation: Allocation,
    minimum: int,
    seed: int,
) -> Design:
    """Plan a sample of a map and write its points."""
    if size is not None and standard_error is not None:
        raise InputError("give the size of the sample or the standard error that it is to reach, not both")
    design = design_sample(
        path,
        size=size,
        standard_error=STANDARD_ERROR if standard_error is None else standard_error,
        users_accuracy=dict(_conjecture(text) for text in users_accuracy),
        allocation=allocation,
        minimum=minimum,
        seed=seed,
    )
    write_points(path, out, design)
    return design


def assess(
    path: Path,
    reference: Path,
    *,
    column: str,
    confidence: float,
    interval: IntervalKind,
    simple: bool = False,
) -> Assessment:
    """Compare a map with reference points, drawn from it, from another map of the region, or at random.

    Points that `panterra sample` wrote say their strata. Others are taken for a simple random sample, which is
    stratified afterwards by the map's classes unless it is to stay `simple`.
    """
    labels = read_labels(reference, column=column, kind="classes")
    frame, shown = labels.frame, class_areas(path)
    odd = set(frame.geom_type) - {"Point"}
    if odd:
        raise InputError(f"{reference} holds {odd.pop()}s; accuracy needs the points that were drawn")
    codes = _codes(labels.names, shown, reference)
    truth = np.array([codes[n] for n in frame["target"]], np.int64)
    box = grid_of(path)
    mapped = classes_at(path, *_cells(frame.to_crs(crs_for_rasterio(box.crs).to_wkt()), box))
    if (mapped < 0).any():
        raise InputError(
            f"{(mapped < 0).sum()} of {len(mapped)} points of {reference} lie where {path} has no data, and say "
            "nothing about it; draw points from this map, or map the whole region"
        )
    names = {s.code: s.name for s in shown}
    stratified, unlabelled = "stratum" in frame.columns, 0
    if stratified:
        drawn = read_labels(reference, column="stratum", kind="classes").frame
        strata, unlabelled = _strata(drawn, reference), len(drawn) - len(frame)
        key = frame["stratum"]
        if key.isna().any():
            raise InputError(f"{key.isna().sum()} points of {reference} have no stratum; leave out those added")
    elif simple:
        total = sum(s.hectares for s in shown), sum(s.pixels for s in shown)
        strata = pd.DataFrame([("all", *total)], columns=["stratum", "stratum_ha", "stratum_pixels"])
        key = pd.Series("all", index=frame.index)
    else:
        rows = [(s.code, s.hectares, s.pixels) for s in shown]
        strata = pd.DataFrame(rows, columns=["stratum", "stratum_ha", "stratum_pixels"])
        key = pd.Series(mapped)
    hectares = strata["stratum_ha"].to_numpy(float)
    report = estimate(
        mapped,
        truth,
        key.map({code: n for n, code in enumerate(strata["stratum"])}).to_numpy(np.int64),
        shares=(hectares / hectares.sum()).tolist(),
        pixels=strata["stratum_pixels"].astype(int).tolist(),
        names=[str(code) for code in strata["stratum"]],
        confidence=confidence,
        interval=interval,
    )
    return Assessment(
        report=report,
        names={c.code: names.get(c.code, str(c.code)) for c in report.classes},
        hectares=float(hectares.sum()),
        mapped={s.code: s.hectares for s in shown},
        unlabelled=unlabelled,
        stratified=stratified,
    )


def _conjecture(text: str) -> tuple[str, float]:
    """Read what someone expects of a class, such as water=0.95."""
    name, _, number = text.rpartition("=")
    try:
        return name, float(number)
    except ValueError:
        raise InputError(f"{text!r} is no expectation; wanted a class and a share, such as water=0.95") from None


def _codes(names: Sequence[str], shown: Sequence[ClassArea], reference: Path) -> list[int]:
    """Find the codes of reference classes, which go by the map's names or its codes."""
    by_name = {s.name.casefold(): s.code for s in shown}
    codes = []
    for name in names:
        if name.casefold() in by_name:
            codes.append(by_name[name.casefold()])
        elif name.isdecimal():
            codes.append(int(name))
        else:
            known = ", ".join(s.name for s in shown)
            raise InputError(
                f"{reference} has the class {name!r}, which the map does not show; it shows {known}: correct the name, "
                "or give a class that the map lacks a number as its code"
            )
    return codes


def _cells(points: gpd.GeoDataFrame, box: GeoBox) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows and columns that points in the CRS of a grid lie in."""
    to, x, y = ~box.affine, points.geometry.x.to_numpy(), points.geometry.y.to_numpy()
    row, col = to.d * x + to.e * y + to.f, to.a * x + to.b * y + to.c
    return np.floor(row).astype(np.int64), np.floor(col).astype(np.int64)


def _strata(drawn: gpd.GeoDataFrame, reference: Path) -> pd.DataFrame:
    """Collect the strata from what each point says of its own."""
    missing = [name for name in ("stratum_ha", "stratum_pixels") if name not in drawn.columns]
    if missing:
        raise InputError(
            f"{reference} has strata but no column {missing[0]!r}; keep the columns that panterra sample wrote, or "
            "remove 'stratum' if the points are a simple random sample"
        )
    strata = pd.DataFrame(drawn[["stratum", "stratum_ha", "stratum_pixels"]]).drop_duplicates()
    if strata["stratum"].duplicated().any() or strata.isna().any(axis=None):
        raise InputError(f"points of one stratum in {reference} disagree about its size; draw one sample from one map")
    return strata.sort_values("stratum")
