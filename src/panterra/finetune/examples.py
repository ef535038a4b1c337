"""Samples to learn from and to test on, made of labels and scenes, or of a labelled data set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from affine import Affine
from jaxtyping import Bool, Int
from odc.geo.geobox import GeoBox

from panterra.data.labelled import IGNORE, LabelledSample, LabelledSet, card_of
from panterra.errors import InputError
from panterra.evaluate import splits
from panterra.evaluate.probes import ProbeClass
from panterra.finetune.pairs import Periods, pair_up
from panterra.finetune.tasks import Task, kind_of, task_of
from panterra.imagery.labels import (
    Labels,
    LabelSamples,
    distinct_colours,
    fits_dates,
    picked,
    read_labels,
    sample_labels,
)
from panterra.imagery.stac import Scene, pixel_metres
from panterra.modalities import MODALITIES

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
ATTEMPTS = 8
"""Ways to deal samples that are tried; the best is taken."""
CACHE_BYTES = 2**31
"""What samples that were read may take in memory; others are read again each time."""


@dataclass(slots=True, kw_only=True)
class Examples:
    """Labelled samples in three parts that share no ground."""

    task: Task
    classes: tuple[ProbeClass, ...]
    """Empty for values."""
    read: Callable[[int], LabelledSample]
    parts: np.ndarray
    """Of each sample: "train", "val" or "test"."""
    blocks: Int[np.ndarray, " n"]
    """What is resampled as a whole where intervals are made: spatial blocks, or single samples."""
    block_m: float | None
    """Side of the blocks; None where the split is the data set's own."""
    window_px: int
    pixel_m: float
    cells: int
    """Rows of a sample's target; 0 where there is one target per sample."""
    pairs: bool = False
    """Whether each sample's batch is a pair: what was seen before, and after."""
    periods: Periods | None = None
    """Of all pairs, where they share them."""
    about: dict[str, Any]
    """Where it comes from, as plain JSON: decides, with the labels, whether a run can be gone on with."""
    anew: Callable[[int, torch.Generator], LabelledSample] | None = None
    """Reads a training sample otherwise each time; None: as ever."""
    _kept: dict[int, LabelledSample] = field(default_factory=dict)
    _bytes: int = 0

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> LabelledSample:
        """Read a sample, or take it from memory."""
        if index in self._kept:
            return self._kept[index]
        sample = self.read(index)
        size = sum(o.pixels.nbytes + o.valid.nbytes for o in sample.batch.observations.values())
        if self._bytes + size <= CACHE_BYTES:
            self._kept[index] = sample
            self._bytes += size
        return sample

    def to_learn_from(self, index: int, generator: torch.Generator) -> LabelledSample:
        """Read a training sample as it is learned from this time."""
        return self[index] if self.anew is None else self.anew(index, generator)

    def of(self, part: Part) -> Int[np.ndarray, " n"]:
        """Number the samples of a part."""
        return np.flatnonzero(self.parts == part)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chip:
    """Where a sample lies and what is known in it."""

    scene: int
    box: GeoBox
    row: Int[np.ndarray, " m"]
    col: Int[np.ndarray, " m"]
    target: np.ndarray
    feature: Int[np.ndarray, " m"]
    """Which label a cell came from."""
    periods: Periods | None = None
    """The two that the label compares."""


def examples_from_scenes(
    scenes: Sequence[Scene],
    labels: Labels | str | Path,
    *,
    boxes: Sequence[GeoBox] | None = None,
    column: str | None = None,
    task: str | None = None,
    periods: Periods | Sequence[Periods] | None = None,
    modalities: Sequence[str] | None = None,
    window_px: int = 64,
    cell_px: int = 1,
    block_m: float = 1000,
    seed: int = 42,
) -> Examples:
    """Cut windows that hold labels out of scenes, and deal them into training, validation and test by spatial block.

    Without a task classes become a segmentation and values a regression, on cells of `cell_px` pixels of the common
    grid (`boxes`, one per scene; default: the whole scene at 10 m). Cells without a label are ignored. For tasks with
    one target per sample a window lies around each point or polygon, but for multilabel, in which a window has the
    labels of its cells. Blocks of side `block_m` are learned or tested as a whole, three in five, one and one; the
    cells of a polygon in several parts count in the one that has most of them.

    With `periods`, for all or one per label, a label says what changed between the two. Without, a label with dates of
    its own counts on scenes of these dates alone.
    """
    known = labels if isinstance(labels, Labels) else read_labels(labels, column=column, kind=kind_of(task))
    chosen = task_of(task or ("segmentation" if known.kind == "classes" else "regression"))
    if chosen.answer == "boxes":
        raise InputError("objects are known all over a window: cut examples of detection with objects_from_scenes")
    if (known.kind == "values") != (chosen.answer == "values"):
        raise InputError(f"the labels hold {known.kind}; {chosen.name} is about {chosen.answer}: choose another task")
    if window_px < 1 or window_px % cell_px:
        raise InputError(f"window_px is {window_px}, not a whole number of cells of {cell_px} px; give one that is")
    around = not chosen.dense and chosen.answer != "labels"
    if around and known.raster is not None:
        raise InputError(f"{chosen.name} needs points or polygons, around which windows are cut; a raster came")
    grids, pixel_m = grids_of(scenes, boxes)
    fits = fits_of(known, scenes, modalities) if periods is None else None
    others = 0 if fits is None else int((~fits.any(axis=0)).sum())
    cut = _around if around else _windows
    chips = [
        replace(chip, periods=span, feature=chip.feature if number is None else number[chip.feature])
        for i, box in enumerate(grids)
        for span, some, number in (_by_periods(known, periods) if fits is None else _dated(known, fits[i]))
        for chip in cut(i, box, some, window_px, cell_px)
    ]
    if not chips and others:
        raise InputError(f"{others} labels are of other dates than the scenes, and no other label lies on them")
    if not chips:
        raise InputError("no label lies on the scenes; check that both show the same place")
    blocks = number_blocks([chip.box for chip in chips], block_m)
    chips, parts = _dealt(chips, blocks, known, seed)
    kept = np.array([len(chip.row) > 0 for chip in chips])
    chips, parts, blocks = [c for c, k in zip(chips, kept, strict=True) if k], parts[kept], blocks[kept]
    names, side = tuple(modalities) if modalities is not None else None, window_px // cell_px

    narrowed = {
        (scene, span): span.narrow(scenes[scene]) if span else scenes[scene]
        for scene, span in {(chip.scene, chip.periods) for chip in chips}
    }

    def read(index: int) -> LabelledSample:
        chip = chips[index]
        batch = narrowed[chip.scene, chip.periods].batch(chip.box, names)
        return LabelledSample(
            id=f"{chip.scene}-{index}",
            batch=pair_up(batch, chip.periods) if chip.periods else batch,
            target=_target(chip, chosen, known, side),
            fold=str(parts[index]),
        )

    digest = hashlib.sha256()
    for chip in chips:
        digest.update(repr((chip.scene, str(chip.box.crs), chip.box.shape, tuple(chip.box.affine))).encode())
        digest.update(b"".join(a.tobytes() for a in (chip.row, chip.col, chip.target)))
    spans = sorted({(chip.periods.before, chip.periods.after) for chip in chips if chip.periods})
    return Examples(
        task=chosen,
        classes=classes_of(known),
        read=read,
        parts=parts,
        blocks=blocks,
        block_m=block_m,
        window_px=window_px,
        pixel_m=pixel_m,
        cells=side if chosen.dense else 0,
        pairs=bool(spans),
        periods=periods if isinstance(periods, Periods) else None,
        about={
            **named(scenes),
            "labels": sum(len(chip.row) for chip in chips),
            **({"other_dates": others} if others else {}),
            **({"periods": [list(span) for span in spans]} if spans else {}),
            "seed": seed,
            "sha256": digest.hexdigest(),
        },
    )


def grids_of(scenes: Sequence[Scene], boxes: Sequence[GeoBox] | None) -> tuple[list[GeoBox], float]:
    """Give the grid of each scene and the size of their pixels in metres. Raises InputError where it differs."""
    grids = list(boxes) if boxes is not None else [scene.geobox() for scene in scenes]
    sizes = sorted({round(pixel_metres(box), 6) for box in grids})
    if len(sizes) != 1:
        raise InputError(f"the scenes have grids of {sizes} m; give boxes of one pixel size")
    return grids, sizes[0]


def classes_of(labels: Labels) -> tuple[ProbeClass, ...]:
    """Give classes their codes, which start at 1 and leave 0 for places without data."""
    return tuple(
        ProbeClass(name=name, code=code, colour=colour)
        for code, (name, colour) in enumerate(zip(labels.names, labels.colours, strict=True), start=1)
    )


def named(scenes: Sequence[Scene]) -> dict[str, Any]:
    """Say which images and licences scenes bring."""
    return {
        "scenes": [sorted(item.id for item in scene.items) for scene in scenes],
        "licences": sorted({scene.licence for scene in scenes if scene.licence}),
    }


def fits_of(labels: Labels, scenes: Sequence[Scene], modalities: Sequence[str] | None) -> Bool[np.ndarray, "s n"]:
    """Tell of each scene which labels suit the dates of what is seen of it."""
    seen = [[m for m in scene.modalities if modalities is None or m in modalities] for scene in scenes]
    dates = [[day for m in own for day in scene.dates(m)] for scene, own in zip(scenes, seen, strict=True)]
    return np.stack([fits_dates(labels, days) for days in dates])


def _dated(labels: Labels, fits: Bool[np.ndarray, " n"]) -> Iterator[tuple[None, Labels, np.ndarray | None]]:
    """Give the labels that suit, with their numbers among all."""
    if fits.all():
        yield None, labels, None
    elif fits.any():
        yield None, picked(labels, fits), np.flatnonzero(fits)


def _by_periods(
    labels: Labels, periods: Periods | Sequence[Periods] | None
) -> Iterator[tuple[Periods | None, Labels, np.ndarray | None]]:
    """Go through the labels that compare the same two periods, with their numbers among all."""
    if periods is None or isinstance(periods, Periods):
        yield periods, labels, None
        return
    if labels.raster is not None or len(periods) != len(labels.frame):
        raise InputError(f"{len(periods)} pairs of periods came for {len(labels.frame)} labels; give each its own")
    for span in dict.fromkeys(periods):
        number = np.array([i for i, own in enumerate(periods) if own == span])
        yield span, picked(labels, number), number


def deal(
    blocks: Int[np.ndarray, " n"],
    targets: Sequence[np.ndarray] | None,
    names: Sequence[str],
    seed: int,
) -> np.ndarray:
    """Give samples their parts, in whole blocks: about three in five train, one in five each validates and tests.

    `targets` are the class numbers in each sample; every class is in the training part and, where blocks allow, in the
    others. Raises InputError where they do not.
    """
    per_cell = np.repeat(blocks, [len(t) for t in targets]) if targets is not None else blocks
    codes = np.concatenate(list(targets)) if targets is not None else None
    folds = min(5, len(np.unique(blocks)))
    if folds < 3:
        raise InputError(
            f"the labels lie in {folds} spatial blocks; training, validation and test need three: use smaller blocks "
            "or windows, or label more places"
        )
    fold = splits.split_by_group(per_cell, codes, folds=folds, names=dict(enumerate(names)), seed=seed)
    present = np.unique(codes) if codes is not None else np.zeros(1, np.int64)
    here = np.zeros((folds, len(present)), bool)
    here[fold, np.searchsorted(present, codes) if codes is not None else 0] = True

    def found(pair: tuple[int, int]) -> tuple[bool, int]:
        rest = [f for f in range(folds) if f not in pair]
        return bool(here[rest].any(0).all()), int(here[list(pair)].sum())

    test, val = max(permutations(range(folds), 2), key=found)
    if not found((test, val))[0]:
        rest = [f for f in range(folds) if f not in (test, val)]
        lonely = ", ".join(repr(names[c]) for c in present[~here[rest].any(0)])
        raise InputError(
            f"class {lonely} is in too few spatial blocks to be learned and tested; label it in other places too, use "
            "smaller blocks, or leave it out"
        )
    block_fold = dict(zip(per_cell.tolist(), fold.tolist(), strict=True))
    return np.array([{test: "test", val: "val"}.get(block_fold[b], "train") for b in blocks.tolist()])


def _dealt(
    chips: Sequence[_Chip], blocks: Int[np.ndarray, " n"], labels: Labels, seed: int
) -> tuple[list[_Chip], np.ndarray]:
    """Deal samples so that, once polygons are in one part each, training has every class and testing most."""
    classes = labels.kind == "classes"
    best: tuple[tuple[bool, int, int], list[_Chip], np.ndarray] | None = None
    for attempt in range(ATTEMPTS):
        targets = [chip.target for chip in chips] if classes else None
        parts = deal(blocks, targets, labels.names, seed + attempt)
        kept = _one_part_each(chips, parts) if labels.raster is None else list(chips)
        found = {
            part: len(np.unique(np.concatenate([c.target for c, p in zip(kept, parts, strict=True) if p == part])))
            for part in PARTS
        }
        # Values, each its own, need no more than some in every part.
        every = len(np.unique(np.concatenate([c.target for c in chips]))) if classes else 1
        got = found["train"] >= every, min(found["test"], every), min(found["val"], every)
        if best is None or got > best[0]:
            best = got, kept, parts
        if got == (True, every, every):
            break
    assert best is not None
    if not all(best[0]):
        raise InputError(
            "the labels do not suffice for training, validation and test once each polygon is in one part alone; label "
            "more places, or use smaller blocks"
        )
    return best[1], best[2]


def _windows(scene: int, box: GeoBox, labels: Labels, window_px: int, cell_px: int) -> list[_Chip]:
    """Lay windows side by side from the upper left corner; keep those with labels."""
    rows, cols = (-(-int(n) // window_px) for n in box.shape)
    box = GeoBox((rows * window_px, cols * window_px), box.affine, box.crs)
    grid = GeoBox(
        (rows * window_px // cell_px, cols * window_px // cell_px), box.affine @ Affine.scale(cell_px), box.crs
    )
    found, side = sample_labels(labels, grid), window_px // cell_px
    window = found.row // side * cols + found.col // side
    order = np.argsort(window, kind="stable")
    starts = np.flatnonzero(np.diff(window[order], prepend=-1))
    chips = []
    for members in np.split(order, starts[1:]) if len(order) else ():
        row, col = found.row[members[0]] // side * window_px, found.col[members[0]] // side * window_px
        chips.append(
            _Chip(
                scene=scene,
                box=box[int(row) : int(row) + window_px, int(col) : int(col) + window_px],
                row=found.row[members] % side,
                col=found.col[members] % side,
                target=found.target[members],
                feature=found.group[members],
            )
        )
    return chips


def _around(scene: int, box: GeoBox, labels: Labels, window_px: int, cell_px: int) -> list[_Chip]:
    """Lay a window around each point or polygon, as far as it fits into the box."""
    found: LabelSamples = sample_labels(labels, box)
    chips = []
    for feature in np.unique(found.group):
        mine = found.group == feature
        starts = []
        for place, size in ((found.row[mine], box.shape[0]), (found.col[mine], box.shape[1])):
            starts.append(int(np.clip(round(float(place.mean())) - window_px // 2, 0, max(size - window_px, 0))))
        row, col = starts
        corner = box.affine @ Affine.translation(col, row)
        chips.append(
            _Chip(
                scene=scene,
                box=GeoBox((window_px, window_px), corner, box.crs),
                row=np.zeros(1, np.int64),
                col=np.zeros(1, np.int64),
                target=found.target[mine][:1] if labels.kind == "classes" else found.target[mine].mean(keepdims=True),
                feature=np.array([feature]),
            )
        )
    return chips


def number_blocks(boxes: Sequence[GeoBox], block_m: float) -> Int[np.ndarray, " n"]:
    """Number the blocks that the middles of samples lie in; scenes of the same CRS share them."""
    blocks, systems = np.empty(len(boxes), np.int64), np.array([str(box.crs) for box in boxes])
    xy = np.array([box.affine @ (box.shape[1] / 2, box.shape[0] / 2) for box in boxes], np.float64)
    start = 0
    for system in np.unique(systems):
        mine = systems == system
        blocks[mine] = splits.spatial_blocks(xy[mine], block_m) + start
        start = int(blocks[mine].max()) + 1
    return blocks


def _one_part_each(chips: Sequence[_Chip], parts: np.ndarray) -> list[_Chip]:
    """Leave to each label the part in which most of its cells are, so that no polygon is both learned and tested."""
    counts: dict[int, dict[str, int]] = {}
    for chip, part in zip(chips, parts, strict=True):
        for feature, number in zip(*np.unique(chip.feature, return_counts=True), strict=True):
            tally = counts.setdefault(int(feature), {})
            tally[str(part)] = tally.get(str(part), 0) + int(number)
    home = {feature: max(tally, key=lambda part: tally[part]) for feature, tally in counts.items()}
    kept = []
    for chip, part in zip(chips, parts, strict=True):
        own = np.array([home[int(feature)] == part for feature in chip.feature])
        kept.append(
            replace(chip, row=chip.row[own], col=chip.col[own], target=chip.target[own], feature=chip.feature[own])
        )
    return kept


def _target(chip: _Chip, task: Task, labels: Labels, side: int) -> torch.Tensor:
    if task.answer == "labels":
        return torch.tensor([[float((chip.target == k).any()) for k in range(len(labels.names))]])
    if not task.dense:
        return torch.as_tensor(chip.target)
    classes = task.answer == "classes"
    grid = np.full((side, side), IGNORE if classes else np.nan, np.int64 if classes else np.float32)
    grid[chip.row, chip.col] = chip.target
    return torch.from_numpy(grid)[None]


def examples_from_dataset(
    name: str,
    root: str | Path,
    *,
    modalities: Sequence[str] | None = None,
    window_px: int | None = None,
    limit: int | None = None,
    seed: int = 42,
    **options: Any,
) -> Examples:
    """Take the splits of a labelled data set; `limit` samples at most of each, drawn once.

    Where a target has one number per cell, samples are cut into windows of `window_px` pixels of the common grid
    (default: whole samples). A data set without a test split is tested on its validation split, one without a
    validation split has a fifth of its training samples set apart.
    """
    card = card_of(name)
    rng = np.random.default_rng(seed)
    sets: dict[str, LabelledSet] = {}
    for part, prefix in (("train", "train"), ("val", "val"), ("test", "test")):
        split = next((s for s in card.splits if s.startswith(prefix)), None)
        if split is not None:
            sets[part] = card.open(root, split, **options)
    if "test" not in sets and "val" in sets:
        sets["test"] = sets.pop("val")
    places: list[tuple[str, str, int]] = []
    for part, opened in sets.items():
        order = rng.permutation(len(opened))[: limit or len(opened)]
        shares = [part] * len(order)
        if part == "train" and "val" not in sets:
            apart = max(len(order) // 5, 1)
            shares[:apart] = ["val"] * apart
        places += [(part, share, int(i)) for share, i in zip(shares, order, strict=True)]
    if lost := [part for part in PARTS if part not in {share for _, share, _ in places}]:
        raise InputError(f"{name} in {root} leaves no sample for {' and '.join(lost)}; each part needs some")
    first = next(iter(sets.values()))
    task = _task_of_set(first)
    one = first[0]
    height = one.target.shape[-2] if task.dense else 0
    whole = max(o.pixels.shape[-1] * _finer(m) for m, o in one.batch.observations.items())
    window = window_px or int(whole)
    if task.dense and window < whole and (height * window) % whole:
        raise InputError(f"windows of {window} px of {name}'s {int(whole)} are no whole number of its target's cells")
    tiles = int(whole // window) if task.dense else 1
    numbered = [(s, share, i, t) for s, share, i in places for t in range(tiles**2)]
    held: dict[tuple[str, int], LabelledSample] = {}

    def read(index: int) -> LabelledSample:
        split, share, i, tile = numbered[index]
        if (split, i) not in held:
            held.clear()
            held[split, i] = sets[split][i]
        return replace(_crop(held[split, i], tile, tiles, modalities, dense=task.dense), fold=share)

    names, colours = first.class_names, distinct_colours(len(first.class_names))
    coded = enumerate(zip(names, colours, strict=True))
    return Examples(
        task=task,
        classes=() if task.answer == "values" else tuple(ProbeClass(name=n, code=k, colour=c) for k, (n, c) in coded),
        read=read,
        parts=np.array([share for _, share, _, _ in numbered]),
        blocks=np.unique([f"{s}{i}" for s, _, i, _ in numbered], return_inverse=True)[1].reshape(-1),
        block_m=None,
        window_px=window,
        pixel_m=one.batch.pixel_m,
        cells=height // tiles,
        about={"dataset": name, "citation": card.citation, "licences": [card.licence], "limit": limit, "seed": seed},
    )


def _task_of_set(opened: LabelledSet) -> Task:
    if opened.task == "regression" and opened[0].target.ndim == 1:
        return task_of("scene_regression")
    return task_of(opened.task)


def _finer(modality: str) -> float:
    """Give the common grid's pixels per pixel of a modality."""
    return min(MODALITIES[modality].gsd, 10.0) / 10


def _crop(
    sample: LabelledSample, tile: int, tiles: int, modalities: Sequence[str] | None, *, dense: bool
) -> LabelledSample:
    """Cut one of `tiles` x `tiles` windows out of a sample, of the modalities that are wanted."""
    row, col = divmod(tile, tiles)

    def cut(x: torch.Tensor) -> torch.Tensor:
        height, width = (n // tiles for n in x.shape[-2:])
        if not height or not width:
            return x
        return x[..., row * height : (row + 1) * height, col * width : (col + 1) * width]

    shown = {
        name: replace(o, pixels=cut(o.pixels), valid=cut(o.valid))
        for name, o in sample.batch.observations.items()
        if modalities is None or name in modalities
    }
    return replace(
        sample,
        id=f"{sample.id}-{tile}" if tiles > 1 else sample.id,
        batch=replace(sample.batch, observations=shown),
        target=cut(sample.target) if dense else sample.target,
    )
