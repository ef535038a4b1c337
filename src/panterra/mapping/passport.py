"""Where an output came from."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pystac
from odc.geo.geobox import GeoBox

import panterra
from panterra.energy import EnergyReport
from panterra.energy.impact import impact_of
from panterra.files import file_checksum, write_whole
from panterra.imagery.grids import footprint
from panterra.imagery.providers import licence_fields
from panterra.imagery.stac import pixel_metres
from panterra.mapping.embeddings import proj_fields

EXTENSIONS = (
    "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "https://stac-extensions.github.io/processing/v1.2.0/schema.json",
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
)
CLASSIFICATION = "https://stac-extensions.github.io/classification/v2.0.0/schema.json"
CLASSES = "classification:classes"


def write_passport(
    path: Path,
    box: GeoBox,
    dates: Sequence[dt.date],
    assets: Mapping[str, pystac.Asset],
    *,
    energy: EnergyReport,
    area_km2: float | None = None,
    licence: str | None,
    properties: Mapping[str, Any],
) -> pystac.Item:
    """Write a STAC 1.1 item beside outputs on `box`: what they show, what made them, at what cost.

    Assets carry absolute paths and leave with relative ones and checksums. `dates` are those of the inputs. The cost is
    told for each of `area_km2`, by default those of the box.
    """
    geometry, bbox = footprint(box, per_side=8)
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    item = pystac.Item(
        id=path.name.removesuffix(".json"),
        geometry=geometry,
        bbox=bbox,
        datetime=None if dates else now,
        start_datetime=_at(min(dates), dt.time.min) if dates else None,
        end_datetime=_at(max(dates), dt.time(23, 59, 59)) if dates else None,
        properties={
            **(licence_fields(licence) if licence else {}),
            **proj_fields(box),
            "processing:datetime": _rfc3339(now),
            "processing:software": software(),
            "panterra:energy": energy.as_dict(),
            "panterra:impact": impact_of(energy).as_dict(area_km2=area_km2 or _area_km2(box)),
            "emb:energy": {
                "energy_kwh": energy.kwh,
                "inference_duration_s": energy.seconds,
                "avg_power_w": energy.kwh * 3.6e6 / max(energy.seconds, 1e-9),
                "platform": platform.platform(),
            },
            **properties,
        },
        stac_extensions=list(EXTENSIONS),
    )
    for name, asset in assets.items():
        file = Path(asset.href)
        asset.extra_fields.update({"file:checksum": checksum(file), "file:size": size(file)})
        asset.href = "./" + os.path.relpath(file, path.parent)
        item.add_asset(name, asset)
        if classes := asset.extra_fields.pop(CLASSES, ()):
            asset.extra_fields[CLASSES] = [_class(stated) for stated in classes]
            if CLASSIFICATION not in item.stac_extensions:
                item.stac_extensions.append(CLASSIFICATION)
    write_whole(path, json.dumps(item.to_dict(include_self_link=False), indent=1) + "\n")
    return item


def passport_of(out: Path) -> Path:
    """Return where the passport of an output lies."""
    return out.with_name(f"{out.name}.json")


def data_asset(path: Path, media_type: str = pystac.MediaType.COG, /, **fields: Any) -> pystac.Asset:
    """Describe an output, a GeoTIFF unless said otherwise, by some fields."""
    return pystac.Asset(str(path.absolute()), media_type=media_type, roles=["data"], extra_fields=fields)


def _class(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a class whose name may be any text: the extension allows no blanks in names, but any text as title."""
    name = re.sub(r"[^0-9A-Za-z_-]+", "-", stated["name"]).strip("-") or str(stated["value"])
    return {**stated, "name": name} | ({"title": stated["name"]} if name != stated["name"] else {})


def software() -> dict[str, str]:
    """Name what computes, with versions."""
    import torch

    return {"panterra": panterra.__version__, "torch": torch.__version__, "python": platform.python_version()}


def checksum(path: Path) -> str:
    """Return the sha256 of a file as a multihash; of a folder, that of its files' names and checksums in order."""
    if path.is_dir():
        lines = [f"{checksum(f)}  {f.relative_to(path).as_posix()}\n" for f in _files(path)]
        return "1220" + hashlib.sha256("".join(lines).encode()).hexdigest()
    return "1220" + file_checksum(path)


def size(path: Path) -> int:
    """Count the bytes of a file or of all files in a folder."""
    return sum(f.stat().st_size for f in _files(path)) if path.is_dir() else path.stat().st_size


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def _area_km2(box: GeoBox) -> float | None:
    """Return the area of a box; None for degrees."""
    assert box.crs is not None
    return math.prod(box.shape) * pixel_metres(box) ** 2 / 1e6 if box.crs.projected else None


def _at(date: dt.date, time: dt.time) -> dt.datetime:
    return dt.datetime.combine(date, time, tzinfo=dt.UTC)


def _rfc3339(moment: dt.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
