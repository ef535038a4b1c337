"""Held-out answers beside the truth, drawn from what real_tasks.py left beside its results.

    python benchmarks/real_task_pictures.py results.jsonl --out docs/images/real-tasks

Windows that no seed tested stay grey; of a window that several seeds tested the first one's answer is shown.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

from panterra.mapping.report import paint
from panterra.modalities import MODALITIES
from real_task_sets import SETS, Material

GREY = (214, 214, 214)
Colour = tuple[int, int, int]
BACKGROUND, MARKED = (245, 240, 225), (190, 45, 45)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How a set is drawn."""

    colours: dict[int, Colour]
    """By class number."""
    places: int = 1
    """How many places, those with the most tested windows first."""
    dates: int = 1
    bands: tuple[str, str, str] = ("R", "G", "B")
    width: float = 11.0


DRAWINGS: dict[str, Drawing] = {
    "floods": Drawing(colours={0: BACKGROUND, 1: (40, 95, 190)}, bands=("B12", "B08", "B04")),
    "change": Drawing(colours={0: BACKGROUND, 1: MARKED}, dates=2, bands=("B04", "B03", "B02")),
    "buildings": Drawing(colours={0: BACKGROUND, 1: MARKED}, places=2),
    "land_cover": Drawing(
        colours={
            0: (40, 95, 190),
            1: (35, 110, 50),
            2: (150, 200, 110),
            3: (205, 170, 120),
            4: (120, 120, 130),
            5: (40, 40, 40),
        },
        places=2,
    ),
}


def answers(folder: Path, name: str, method: str) -> dict[int, np.ndarray]:
    """Read what a method said of each tested window."""
    found: dict[int, np.ndarray] = {}
    for file in sorted(folder.glob(f"{name}, {method}, *.npz")):
        stored = np.load(file)
        for index, said in zip(stored["index"], stored["said"], strict=True):
            found.setdefault(int(index), said)
    return found


def methods(folder: Path, name: str) -> list[str]:
    """Name the methods, the forest first and the fine-tuned last, without the neighbours."""
    named = {file.stem.split(", ")[1] for file in folder.glob(f"{name}, *.npz")}
    return sorted((m for m in named if not m.startswith("knn")), key=lambda m: ("forest" not in m, "tuned" in m, m))


def mosaic(material: Material, place: str, windows: dict[int, np.ndarray], side: int) -> np.ndarray:
    """Lay windows of `side` cells at their place; -1 where there is none."""
    where, cells = material.about["where"], material.targets[0].shape[0]
    mine = [i for i, (p, _, _) in enumerate(where) if p == place]
    height, width = (max(where[i][axis] for i in mine) // cells * side + side for axis in (1, 2))
    canvas = np.full((height, width, *next(iter(windows.values())).shape[2:]), -1.0)
    for i in set(mine) & set(windows):
        row, col = (where[i][axis] // cells * side for axis in (1, 2))
        canvas[row : row + side, col : col + side] = windows[i]
    return canvas


def image_of(material: Material, place: str, bands: tuple[str, str, str], date: int) -> np.ndarray:
    """Put a place's pixels together, in the colours of three bands."""
    shown: dict[int, np.ndarray] = {}
    for i, batch in enumerate(next(iter(material.views.values())).batches):
        modality, o = next(iter(batch.observations.items()))
        order = [MODALITIES[modality].band_names.index(b) for b in bands]
        shown[i] = o.pixels[0, date, order].numpy().transpose(1, 2, 0)
    pixels = mosaic(material, place, shown, next(iter(shown.values())).shape[0])
    low, high = np.percentile(pixels, [1, 99], axis=(0, 1))
    return np.asarray(((pixels - low) / (high - low)).clip(0, 1) ** 0.8)


def draw(name: str, data: Path, folder: Path, out: Path) -> None:
    """Write a set's picture."""
    drawing, material = DRAWINGS[name], SETS[name](data)
    said = {method: answers(folder, name, method) for method in methods(folder, name)}
    if not said:
        return
    where = material.about["where"]
    tested = Counter(where[i][0] for i in next(iter(said.values())) if (material.targets[i] > 0).any())
    places = [str(place) if isinstance(place, str) else place for place, _ in tested.most_common(drawing.places)]
    columns = drawing.dates + 1 + len(said)
    figure, axes = plt.subplots(len(places), columns, squeeze=False, figsize=(drawing.width, 1))
    ratio = 0.0
    cells = material.targets[0].shape[0]
    for number, place in enumerate(places):
        pictures: list[tuple[str, np.ndarray]] = []
        for date in range(drawing.dates):
            title = "image" if drawing.dates == 1 else ("before", "after")[date]
            pictures.append((title, image_of(material, place, drawing.bands, date)))
        maps = [("truth", dict(enumerate(material.targets))), *said.items()]
        for method, windows in maps:
            codes = mosaic(material, place, windows, cells).astype(np.int64)
            pictures.append((method, paint(codes + 1, {0: GREY} | {k + 1: c for k, c in drawing.colours.items()})))
        for ax, (title, pixels) in zip(axes[number], pictures, strict=True):
            ax.imshow(pixels, interpolation="nearest")
            ax.axis("off")
            if number == 0:
                ax.set_title(title.replace(" on ", "\non ").replace("olmoearth-", ""), fontsize=8)
        ratio += pictures[0][1].shape[0] / pictures[0][1].shape[1]
    figure.set_size_inches(drawing.width, drawing.width / columns * ratio + 0.9)
    entries = [Patch(color=shade(c), label=material.names[k]) for k, c in drawing.colours.items()]
    entries.append(Patch(color=shade(GREY), label="not tested"))
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), fontsize=8, frameon=False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"{name}.png", dpi=75, pil_kwargs={"optimize": True})
    plt.close(figure)


def shade(colour: Colour) -> Any:
    return tuple(part / 255 for part in colour)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PANTERRA_DATA", "../shared/data")))
    parser.add_argument("--out", type=Path, default=Path("docs/images/real-tasks"))
    args = parser.parse_args()
    mpl.use("agg")
    mpl.rcParams["figure.constrained_layout.use"] = True
    for name in DRAWINGS:
        draw(name, args.data.resolve(), args.results.with_suffix(""), args.out)


if __name__ == "__main__":
    main()
