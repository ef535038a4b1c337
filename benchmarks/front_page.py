"""The picture at the top of README: what `make demo` left, drawn side by side.

Run `make demo`, then `python benchmarks/front_page.py demo`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import geopandas as gpd
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import rasterio
from matplotlib.patches import Patch

from panterra.commands.pictures import picture_of
from panterra.evaluate.probes import load_probe
from panterra.imagery.raster import read_onto
from panterra.imagery.stac import open_scene
from panterra.mapping.embeddings import open_embeddings
from panterra.mapping.report import paint
from panterra.planet import CLASSES

WIDTH_IN = 10.5


def main() -> None:
    """Draw imagery with labels, the map and the truth on the ground of the map."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images/demo.png"))
    args = parser.parse_args()
    box = open_embeddings(args.demo / "embeddings.zarr").box
    fine = box.zoom_out(0.25)
    with rasterio.open(args.demo / "map.tif") as file:
        codes = file.read(1)
    known = read_onto(args.demo / "scene" / "truth.tif", fine, categorical=True)[0][0].astype(np.uint8)
    colours = {c.name: c.colour for c in CLASSES}
    mapped = {c.code: colours[c.name] for c in load_probe(args.demo / "probe").classes}
    labels = gpd.read_file(args.demo / "scene" / "labels.geojson").to_crs(fine.crs)
    imagery = picture_of(open_scene(args.demo / "scene"), fine)
    left, bottom, right, top = fine.boundingbox

    mpl.rcParams["font.family"], mpl.rcParams["font.size"] = "DejaVu Sans", 9
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH_IN, 4.45), layout="constrained")
    panels = {
        f"Imagery, and {len(labels)} labels": imagery.pixels,
        "Map by panterra-nano and a probe": paint(codes, mapped),
        "Truth": paint(known, {c.code: c.colour for c in CLASSES}),
    }
    for axis, (title, pixels) in zip(axes, panels.items(), strict=True):
        axis.imshow(pixels, extent=(left, right, bottom, top), interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    points = labels.geometry.representative_point()
    axes[0].scatter(points.x, points.y, s=5, c="white", edgecolors="black", linewidths=0.4)
    seen = [c for c in CLASSES if (known == c.code).any()]
    handles = [Patch(facecolor="#{:02x}{:02x}{:02x}".format(*c.colour), label=c.name) for c in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=115, metadata={"Software": None})


if __name__ == "__main__":
    main()
