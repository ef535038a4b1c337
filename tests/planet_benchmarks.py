"""Small labelled sets that the procedural planet makes, one for each task, read as any data set is."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.data.labelled import DatasetCard, LabelledSample, LabelledSet
from panterra.planet import CLASSES, Planet
from panterra.sample import Batch, Observation

SIDE = 16
COUNTS = {"train": 60, "val": 24, "test": 30}
DATE = "2023-06-15"
TASKS = {
    "planet_classes": ("classification", tuple(c.name for c in CLASSES)),
    "planet_labels": ("multilabel", tuple(c.name for c in CLASSES)),
    "planet_pixels": ("segmentation", tuple(c.name for c in CLASSES)),
    "planet_height": ("regression", ("height of the ground",)),
}


def cards():
    return {
        name: DatasetCard(
            name=name,
            title=f"Planet, {task}",
            opener=f"planet_benchmarks:open_{name}",
            task=task,
            class_names=names,
            splits=COUNTS,
            modalities={"sentinel2_l2a": (1, SIDE, SIDE)},
            target_shape=(),
            layout=("train", "val", "test"),
            about="Made for tests.",
            licence=None,
            citation="",
        )
        for name, (task, names) in TASKS.items()
    }


def write_planet(root: Path, seed: int = 3) -> Path:
    """Cut a planet into tiles and deal them into splits; pixels, classes and elevation go to one file per tile."""
    side = 12
    box = GeoBox((SIDE * side, SIDE * side), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")
    planet = Planet(seed=seed, clouds=0.0)
    ground = planet.ground(box)
    pixels, _ = planet.observe("sentinel2_l2a", ground, DATE)
    height, _ = planet.observe("srtm", ground, DATE)
    truth = planet.truth(ground)
    order = np.random.default_rng(0).permutation(side * side)
    start = 0
    for split, count in COUNTS.items():
        (root / split).mkdir(parents=True)
        for n, cell in enumerate(order[start : start + count]):
            row, col = (SIDE * int(i) for i in divmod(int(cell), side))
            cut = (..., slice(row, row + SIDE), slice(col, col + SIDE))
            np.savez(root / split / f"{n:03}.npz", pixels=pixels[cut], truth=truth[cut], height=height[cut])
        start += count
    return root


def opened(name, root, split):
    task, names = TASKS[name]
    folder = Path(root) / split
    return LabelledSet(
        card=cards()[name],
        split=split,
        task=task,
        class_names=names,
        ids=sorted(path.stem for path in folder.glob("*.npz")),
        read=partial(read, task, folder),
        files=lambda id: (folder / f"{id}.npz",),
    )


def read(task, folder, id):
    stored = np.load(folder / f"{id}.npz")
    index = {c.code: n for n, c in enumerate(CLASSES)}
    codes = np.vectorize(lambda code: index.get(int(code), -1))(stored["truth"])
    counts = np.bincount(codes[codes >= 0].ravel(), minlength=len(CLASSES))
    target = {
        "classification": torch.tensor([int(counts.argmax())]),
        "multilabel": torch.tensor((counts > 0.1 * codes.size)[None].astype(np.float32)),
        "segmentation": torch.tensor(codes[None]),
        "regression": torch.tensor(stored["height"].astype(np.float32)),
    }[task]
    batch = Batch(observations={"sentinel2_l2a": Observation.build(stored["pixels"], [DATE])})
    return LabelledSample(id=id, batch=batch, target=target, fold="")


open_planet_classes, open_planet_labels, open_planet_pixels, open_planet_height = (partial(opened, n) for n in TASKS)
