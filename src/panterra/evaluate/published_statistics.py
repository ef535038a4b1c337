"""Statistics that were published with a benchmark, which the published evaluations normalise by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from panterra.data.breizhcrops import BANDS as BREIZHCROPS
from panterra.data.geobench import LANDSAT, LANDSAT_STAND_INS, SENTINEL2
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.normalize import olmoearth_tables

Statistics = Mapping[str, tuple[Float[Tensor, " c"], Float[Tensor, " c"]]]
"""Mean and standard deviation of each band, by modality, in declared units."""

TABLES = {"pastis128": "pastis", "sen1floods11_tiles": "sen1floods11"}
"""Data sets that share the numbers of another one."""
SCALES = {"mados": 1e4, "m_so2sat": 1e4}
"""Of those that are published for reflectance from 0 to 1; pixels are declared in ten thousandths of it."""


def published_statistics(name: str, root: Path, shown: Mapping[str, str], *, as_published: bool = False) -> Statistics:
    """Look a benchmark's own statistics up, by what a model is shown (`benchmark.seen_by`).

    GEO-Bench keeps them in `band_stats.json` of its download; others are in OlmoEarth's evaluation tables. What stands
    in for an absent band has the numbers of what it was made from.
    """
    found = {}
    for modality, as_ in shown.items():
        known = _first_geobench(name, root) if name.startswith("m_") else _tabled(name, modality, as_published)
        order = MODALITIES[as_].band_names
        absent = [band for band in order if band not in known]
        if absent:
            raise InputError(
                f"no statistics of {', '.join(absent)} ({as_}) were published for {name}; normalise by those of the "
                "model or of the training samples (dataset)"
            )
        mean, std = (torch.tensor([known[band][i] for band in order], dtype=torch.float64) for i in (0, 1))
        scale = SCALES.get(name, 1.0)
        found[as_] = mean * scale, std * scale
    return found


def _first_geobench(name: str, root: Path) -> dict[str, tuple[float, float]]:
    path = root / "band_stats.json"
    if not path.is_file():
        raise InputError(f"there is no {path}; it comes with the download of {name.replace('_', '-')}")
    stored = json.loads(path.read_text("utf-8"))
    names = LANDSAT if name == "m_forestnet" else SENTINEL2
    bands = {names[key]: (float(row["mean"]), float(row["std"])) for key, row in stored.items() if key in names}
    if name == "m_forestnet":
        return bands | {b: bands[source] for b, source in LANDSAT_STAND_INS.items() if source in bands}
    stand_ins = {"B01": "B02", "B09": "B8A", "B10": "B11"}
    return {b: bands[source] for b, source in stand_ins.items() if source in bands} | bands


def _tabled(name: str, modality: str, as_published: bool) -> dict[str, tuple[float, float]]:
    key = TABLES.get(name, name)
    if key.startswith("gb2_") and not as_published:
        raise InputError(
            f"the statistics of {name} belong to bands as OlmoEarth's evaluation fills them; ask for as_published too"
        )
    datasets: Mapping[str, Mapping[str, Mapping[str, list[float]]]] = olmoearth_tables()["evaluation"]["datasets"]  # type: ignore[assignment]
    tables = datasets.get(key.replace("gb2_", "gb2-"), {})
    row = tables.get(modality) or tables.get({"sentinel2": "sentinel2_l2a"}.get(modality, modality))
    if row is None:
        known = [k.replace("gb2-", "gb2_") for k in datasets]
        raise InputError(
            f"no statistics of {modality} were published for {name}; there are some for GEO-Bench and for "
            f"{', '.join(known)}"
        )
    # Its numbers are in the order of its columns, but listed under other names.
    bands = BREIZHCROPS if key == "breizhcrops" else row["bands"]
    return {str(band): (m, s) for band, m, s in zip(bands, row["mean"], row["std"], strict=True)}
