"""What the path from imagery to a map gives on real samples: every number and picture of docs/real-data.md.

    python benchmarks/real_data.py all                                    # baselines and random weights, as on the page
    python benchmarks/real_data.py flanders --model olmoearth-v1.2-nano   # released weights beside them, fetched once

One JSON line per result. The samples are found through PANTERRA_DATA or `--data`; docs/real-data.md says what each is.
Every feature set meets the same samples, splits and probes: raw band statistics, which use no model, encoders with
random weights, which were never trained, and the models that `--model` names.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import geopandas as gpd
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import rasterio
from affine import Affine
from matplotlib.patches import Patch
from odc.geo.geobox import GeoBox

from panterra.commands.pictures import picture_of
from panterra.evaluate import metrics
from panterra.evaluate.embed import embed_samples, raw_band_statistics, raw_patch_statistics
from panterra.evaluate.metrics import Interval
from panterra.evaluate.probes import Kind, Probe, Report, fit_probe
from panterra.evaluate.splits import spatial_blocks
from panterra.imagery.doctor import examine, repair
from panterra.imagery.files import scene_from_files
from panterra.imagery.labels import read_labels, sample_labels
from panterra.imagery.raster import grid_of, read_onto, write_cog
from panterra.imagery.stac import Scene, make_item, open_scene, save_scene
from panterra.mapping import run
from panterra.mapping.report import paint
from panterra.modalities import MODALITIES
from panterra.models.features import Encoder
from panterra.models.slots import align
from panterra.models.weights import load_model
from panterra.sample import Batch, Observation

RAW = "raw band statistics"
Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is compared, and where things are."""

    data: Path
    out: Path
    """Where pictures go."""
    work: Path
    models: tuple[str, ...]
    """Released names or folders, with their own weights."""
    architectures: tuple[str, ...]
    """Released names that get random weights."""
    seeds: int

    def encoders(self) -> Iterator[tuple[Encoder, int]]:
        """Give each encoder and the side of its windows in pixels."""
        for name in self.models:
            yield load_model(name), 32
        # What surrounds a patch is noise to an untrained encoder.
        for name in self.architectures:
            for seed in range(self.seeds):
                yield load_model(name, random=seed), 16


def label(encoder: Encoder) -> str:
    """Name an encoder in tables: a folder by its last part."""
    return Path(encoder.name).name if Path(encoder.name).is_dir() else encoder.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Labelled patches of a grid."""

    row: np.ndarray
    col: np.ndarray
    target: np.ndarray
    group: np.ndarray
    names: dict[int, str]
    colours: dict[int, Colour]


def say(data: str, **result: Any) -> None:
    print(json.dumps({"data": data, **result}), flush=True)


def rounded(figures: dict[str, Interval]) -> dict[str, list[float]]:
    """Give estimate, low and high of what is compared."""
    wanted = ("macro_f1", "accuracy")
    return {
        name: [round(v, 3) for v in (figures[name].estimate, figures[name].low, figures[name].high)] for name in wanted
    }


def fit(x: np.ndarray, truth: Truth, *, kind: Kind = "logistic", folds: int = 5) -> tuple[Probe, Report]:
    """Fit a probe with blocks held out in turn."""
    names = {code: truth.names[code] for code in np.unique(truth.target).tolist()}
    neighbours = 5 if kind == "knn" else 20
    return fit_probe(x, truth.target, kind=kind, groups=truth.group, folds=folds, names=names, neighbours=neighbours)


def transfer(probe: Probe, x: np.ndarray, truth: Truth) -> dict[str, Interval]:
    """Score a probe on samples that it was not fitted on, whole blocks resampled."""
    return scores(truth.target, probe.predict(x), truth.group)


def scores(target: np.ndarray, predicted: np.ndarray, group: np.ndarray) -> dict[str, Interval]:
    classes, both = np.unique(np.concatenate([target, predicted]), return_inverse=True)
    unit = np.unique(group, return_inverse=True)[1]
    conf = metrics.confusion(both[: len(target)], both[len(target) :], len(classes), groups=unit)
    return {
        "macro_f1": metrics.bootstrap(metrics.macro_f1, conf),
        "accuracy": metrics.bootstrap(metrics.accuracy, conf),
    }


def chosen(truth: Truth, where: np.ndarray) -> Truth:
    return replace(
        truth, row=truth.row[where], col=truth.col[where], target=truth.target[where], group=truth.group[where]
    )


def embedded(
    setting: Setting, scene: Scene, encoder: Encoder, window_px: int, modalities: Sequence[str], patch_m: float
) -> tuple[np.ndarray, float]:
    """Embed a scene with the product's own path: features [H, W, D] and the seconds that it took."""
    began = time.perf_counter()
    store = run.embed(
        scene,
        encoder,
        setting.work / "embeddings.zarr",
        patch_m=patch_m,
        modalities=modalities,
        window_px=window_px,
        overlap_px=window_px // 4,
        overwrite=True,
    )
    return store.read(), time.perf_counter() - began


def patch_grid(scene: Scene, patch_m: float) -> tuple[GeoBox, GeoBox]:
    """Lay patches over a scene as `embed` does: the common grid, a whole number of patches, and the patches' grid."""
    box, px = scene.geobox(), round(patch_m / 10)
    height, width = (-(-side // px) for side in box.shape)
    return (
        GeoBox((height * px, width * px), box.affine, box.crs),
        GeoBox((height, width), box.affine @ Affine.scale(px), box.crs),
    )


def compare(
    setting: Setting,
    data: str,
    scene: Scene,
    truth: Truth,
    modalities: Sequence[str],
    patch_m: float,
    each: Callable[[str, np.ndarray, dict[str, Any]], None],
) -> None:
    """Make the features [H, W, D] of the baseline and of every encoder, and hand them on with what they took."""
    box, _ = patch_grid(scene, patch_m)
    began = time.perf_counter()
    raw = raw_patch_statistics(scene.batch(box, modalities), patch_m)[0]
    each(RAW, raw, {"dim": raw.shape[-1], "seconds": round(time.perf_counter() - began, 1)})
    for encoder, window_px in setting.encoders():
        x, seconds = embedded(setting, scene, encoder, window_px, modalities, patch_m)
        each(label(encoder), x, {"dim": encoder.dim, "window_px": window_px, "seconds": round(seconds, 1)})


def findings(data: str, scene: Scene, modalities: Sequence[str]) -> None:
    for finding in examine(scene, modalities):
        say(data, doctor=finding.level, modality=finding.modality, what=finding.what, fix=finding.fix)


# Belgium: a monthly cube, points from a product -----------------------------------------------------------------------

BELGIUM = {1: "temporary crops", 2: "anything else"}
BELGIUM_COLOURS: dict[int, Colour] = {1: (222, 170, 60), 2: (80, 120, 90)}


def belgium(setting: Setting, *, points: int = 300, months: int = 12) -> None:
    """Map temporary crops from points that are drawn from WorldCereal's product, a model's work and not the truth."""
    data, folder, patch_m = "belgium", setting.data / "worldcereal_cube_belgium", 20.0
    product = folder / "label_WORLDCEREAL_TEMPORARYCROPS_2021.tif"
    files = [folder / "s2_geotiff", folder / "s1_geotiff"]
    scene = scene_from_files(files, setting.work / "belgium", copy=False).scene
    findings(data, scene, scene.modalities)
    year = tuple(item for item in scene.items if item.date.year == 2021)
    june = replace(scene, items=tuple(item for item in year if item.date.month == 6))
    scene = replace(scene, items=tuple(item for item in year if abs(item.date.month - 6.5) < months / 2))
    labels = read_labels(drawn_points(product, setting.work / "points.geojson", points))
    _, grid = patch_grid(scene, patch_m)
    samples = sample_labels(labels, grid)
    code = np.array([next(c for c, name in BELGIUM.items() if name == n) for n in labels.names])
    truth = Truth(
        row=samples.row,
        col=samples.col,
        target=code[samples.target],
        group=spatial_blocks(samples.xy, 200),
        names=BELGIUM,
        colours=BELGIUM_COLOURS,
    )
    say(data, samples=len(samples), per_class=np.bincount(truth.target)[1:].tolist(), blocks=int(truth.group.max()) + 1)
    known, _ = read_onto(product, grid, categorical=True)
    known = np.where(known[0] == 100, 1, 2)
    maps: list[tuple[str, np.ndarray]] = []

    def each(name: str, x: np.ndarray, about: dict[str, Any]) -> None:
        probe, report = fit(x[truth.row, truth.col], truth)
        codes = probe.predict(x)
        maps.append((name, codes))
        result = {"agreement_of_map": round(float((codes == known).mean()), 3), **rounded(report.metrics)}
        say(data, split="blocks of 200 m, 5 folds", features=name, probe="logistic", **result, **about)

    compare(setting, data, scene, truth, ("sentinel2_l2a", "sentinel1"), patch_m, each)
    inside = grid[: known.shape[0] - 1, : known.shape[1] - 1]
    height, width = inside.shape
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.75))
    show(axes[0], picture_of(june, inside.zoom_to(resolution=10)).pixels, "Sentinel-2, June 2021, with the points")
    shade = [as_shade(BELGIUM_COLOURS[t]) for t in truth.target]
    axes[0].scatter(2 * truth.col + 0.5, 2 * truth.row + 0.5, c=shade, s=9, edgecolors="white", linewidths=0.4)
    axes[0].set(xlim=(-0.5, 2 * width - 0.5), ylim=(2 * height - 0.5, -0.5))
    show(axes[1], paint(known[:height, :width], BELGIUM_COLOURS), "WorldCereal's product 2021")
    for ax, (name, codes) in zip(axes[2:], maps[:2], strict=False):
        show(ax, paint(codes[:height, :width], BELGIUM_COLOURS), f"map from {short(name)}")
    legend(figure, BELGIUM, BELGIUM_COLOURS)
    save(figure, setting, data)


def drawn_points(product: Path, out: Path, count: int) -> Path:
    """Write as many random pixels of each class of a raster as points with a class, as a person would give them."""
    with rasterio.open(product) as file:
        values, to, crs = file.read(1), file.transform, file.crs
    rng = np.random.default_rng(0)
    rows = []
    for value, name in ((100, BELGIUM[1]), (0, BELGIUM[2])):
        row, col = np.nonzero(values == value)
        some = rng.choice(len(row), count // 2, replace=False)
        rows += [(name, *(to @ (c + 0.5, r + 0.5))) for r, c in zip(row[some], col[some], strict=True)]
    names, x, y = zip(*rows, strict=True)
    frame = gpd.GeoDataFrame({"class": names}, geometry=gpd.points_from_xy(x, y, crs=crs.to_wkt()))
    frame.to_crs("EPSG:4326").to_file(out)
    return out


# Amazon: polygons, and an offset that was left in ---------------------------------------------------------------------

AMAZON_DATE = "2022-07-01"
"""The file tells none; this is a month of the dry season after ESA began to add 1000."""
AMAZON_COLOURS: dict[str, Colour] = {
    "forest": (40, 110, 60),
    "village": (214, 96, 77),
    "water": (70, 130, 190),
    "dryout": (230, 200, 110),
}


def amazon(setting: Setting) -> None:
    """Map four classes from 25 polygons, with the offset of 1000 put right, left in, and left in on one side alone."""
    data, folder, patch_m, seen = "amazon", setting.data / "sentinel2_amazon_polygons", 20.0, ("sentinel2_l2a",)
    files = folder / "sentinel2_l2a_reflectance.tif"
    scene = scene_from_files(files, setting.work / "amazon", dates=AMAZON_DATE, copy=False).scene
    findings(data, scene, seen)
    mended = repair(scene, examine(scene, seen), setting.work / "repaired")
    findings(f"{data}, repaired", mended, seen)
    labels = read_labels(folder / "training_polygons.geojson")
    _, grid = patch_grid(scene, patch_m)
    samples = sample_labels(labels, grid)
    names = dict(enumerate(labels.names, start=1))
    truth = Truth(
        row=samples.row,
        col=samples.col,
        target=samples.target + 1,
        group=spatial_blocks(samples.xy, 300, together=samples.group),
        names=names,
        colours={code: AMAZON_COLOURS[name] for code, name in names.items()},
    )
    say(data, samples=len(samples), per_class=np.bincount(truth.target)[1:].tolist(), blocks=int(truth.group.max()) + 1)
    right: dict[str, np.ndarray] = {}
    maps: dict[str, list[np.ndarray]] = {}

    def keep(name: str, x: np.ndarray, about: dict[str, Any]) -> None:
        right[name] = x

    def each(name: str, wrong: np.ndarray, about: dict[str, Any]) -> None:
        good = right[name]
        known = np.isfinite(good).all(2)
        at = truth.row, truth.col
        probe, report = fit(good[at], truth)
        spoilt, spoilt_report = fit(wrong[at], truth)
        crossed = np.empty_like(truth.target)
        for fold in np.unique(report.folds):
            tested = report.folds == fold
            part = fit_probe(
                good[at][~tested], truth.target[~tested], split="random", folds=2, strengths=(report.strength,)
            )[0]
            crossed[tested] = part.predict(wrong[at][tested])
        results = {
            "repaired": report.metrics,
            "offset left in": spoilt_report.metrics,
            "fitted on repaired, applied with the offset": scores(truth.target, crossed, truth.group),
        }
        for imagery, figures in results.items():
            say(data, split="blocks of 300 m", imagery=imagery, features=name, probe="logistic", **rounded(figures))
        maps[name] = [
            np.where(known, p.predict(np.nan_to_num(x)), 0) for p, x in ((probe, good), (spoilt, wrong), (probe, wrong))
        ]
        say(data, features=name, changed=[round(float((m != maps[name][0])[known].mean()), 3) for m in maps[name][1:]])

    compare(setting, data, mended, truth, seen, patch_m, keep)
    compare(setting, data, scene, truth, seen, patch_m, each)
    figure, axes = plt.subplots(2, 4, figsize=(12, 6.6))
    box = grid.zoom_to(resolution=10)
    show(axes[0, 0], picture_of(mended, box).pixels, "Sentinel-2, repaired, with the polygons")
    outlines = labels.frame.to_crs(str(grid.crs))
    to = ~box.affine
    for outline, number in zip(outlines.geometry, outlines["target"], strict=True):
        x, y = (np.array(n) for n in outline.exterior.xy)
        shade = as_shade(AMAZON_COLOURS[labels.names[number]])
        axes[0, 0].plot(to.a * x + to.c, to.e * y + to.f, color="white", linewidth=2.2)
        axes[0, 0].plot(to.a * x + to.c, to.e * y + to.f, color=shade, linewidth=1.2)
    axes[0, 0].set(xlim=(-0.5, box.shape.x - 0.5), ylim=(box.shape.y - 0.5, -0.5))
    show_offset(axes[1, 0], scene, mended)
    titles = ("repaired", "offset left in", "offset in the imagery alone")
    for line, (name, three) in zip(axes[:, 1:], list(maps.items())[:2], strict=False):
        for ax, codes, title in zip(line, three, titles, strict=True):
            show(ax, paint(codes, truth.colours), f"{short(name)}:\n{title}")
    legend(figure, truth.names, truth.colours)
    save(figure, setting, data)


def show_offset(ax: Any, scene: Scene, mended: Scene) -> None:
    """Draw how dark the darkest pixels of each band are, before and after."""
    for which, label in ((scene, "as delivered"), (mended, "repaired")):
        seen = which.read("sentinel2_l2a", which.geobox())
        values = seen.pixels[0, 0][:, seen.valid[0, 0]].numpy()
        ax.plot(np.percentile(values, 0.5, axis=1), marker="o", markersize=3, label=label)
    ax.axhline(0, color="grey", linewidth=0.6)
    ax.set_xticks(range(12), MODALITIES["sentinel2_l2a"].band_names, rotation=90, fontsize=7)
    ax.tick_params(axis="y", labelsize=7)
    ax.set_title("darkest pixels, reflectance times 10,000", fontsize=9)
    ax.legend(fontsize=7, frameon=False)


# EuroSAT: whole images ------------------------------------------------------------------------------------------------

EUROSAT_DATE = "2017-06-15"
"""The images tell none."""


def eurosat(setting: Setting, *, per_class: int = 13, train: int = 9) -> None:
    """Sort small images of ten classes by one vector each, with kNN and logistic probes."""
    data, folder = "eurosat", setting.data / "eurosat_ms"
    index = [line.split(",") for line in (folder / "index.csv").read_text().splitlines()[1:]]
    number = [int(file.rsplit("_", 1)[1].removesuffix(".tif")) for file, *_ in index]
    index = [row for row, n in zip(index, number, strict=True) if n <= per_class]
    target = np.array([int(row[2]) for row in index])
    first = np.array([n <= train for n in number if n <= per_class])
    lonlat = np.array([[float(row[4]), float(row[5])] for row in index])
    place = np.unique(np.floor(lonlat), axis=0, return_inverse=True)[1].reshape(-1)
    names = {int(row[2]): row[1] for row in index}
    truth = Truth(row=target, col=target, target=target, group=place, names=names, colours={})
    batches = [as_level_2a(folder / row[0], setting.work / "eurosat" / Path(row[0]).stem) for row in index]
    say(data, images=len(index), classes=len(names), degree_cells=int(place.max()) + 1)
    raw = np.concatenate([raw_band_statistics(batch) for batch in batches])
    # Cosines of raw numbers say little: each statistic gets mean 0 and deviation 1 over all images, labels unseen.
    spread = raw.std(0)
    raw = (raw - raw.mean(0)) / np.where(spread > 0, spread, 1)
    features = [(RAW, raw)]
    features += [(label(e), embed_samples(e, batches, patch_m=40)) for e, _ in setting.encoders()]
    confusions = []
    for name, x in features:
        for kind in ("knn", "logistic"):
            half, rest = chosen(truth, first), chosen(truth, ~first)
            probe, _ = fit(x[first], half, kind=kind)
            # Each image is a place of its own.
            figures = transfer(probe, x[~first], replace(rest, group=np.arange(len(rest.target))))
            say(data, split=f"first {train} of each class", features=name, probe=kind, **rounded(figures))
            _, report = fit(x, truth, kind=kind)
            say(data, split="cells of 1 degree, 5 folds", features=name, probe=kind, **rounded(report.metrics))
            if kind == "logistic":
                confusions.append((name, np.array(report.confusion)))
    figure = plt.figure(figsize=(11, 6.2))
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 3.2))
    firsts = [batches[int(np.flatnonzero(target == code)[0])].observations["sentinel2_l2a"] for code in sorted(names)]
    order = [MODALITIES["sentinel2_l2a"].band_names.index(band) for band in ("B04", "B03", "B02")]
    pixels = np.stack([seen.pixels[0, 0][order].numpy() for seen in firsts])
    # One range per band for all images: each image's own would colour the air.
    low, high = (np.percentile(pixels, q, axis=(0, 2, 3))[:, None, None] for q in (1, 98))
    tones = ((pixels - low) / (high - low)).clip(0, 1) ** 0.8
    for ax, image, code in zip(parts[0].subplots(1, len(firsts)), tones, sorted(names), strict=True):
        show(ax, image.transpose(1, 2, 0), names[code])
        ax.title.set_fontsize(6.5)
    for ax, (name, conf) in zip(parts[1].subplots(1, 2), confusions[:2], strict=False):
        show_confusion(ax, conf, [names[c] for c in sorted(names)], short(name))
    save(figure, setting, data)


def as_level_2a(file: Path, work: Path) -> Batch:
    """Give a level 1C image to a model of level 2A: the same bands in its order, without B10, air left in."""
    scene = scene_from_files(file, work, modality="sentinel2", dates=EUROSAT_DATE, copy=False).scene
    seen = scene.read("sentinel2", grid_of(file))
    level_1c = MODALITIES["sentinel2"].band_names
    order = [level_1c.index(band) for band in MODALITIES["sentinel2_l2a"].band_names]
    pixels = Observation(pixels=seen.pixels[:, :, order], dates=seen.dates, valid=seen.valid)
    return Batch(observations={"sentinel2_l2a": pixels}, pixel_m=10)


def show_confusion(ax: Any, conf: np.ndarray, names: Sequence[str], title: str) -> None:
    ax.imshow(conf, cmap="Blues")
    for (row, col), count in np.ndenumerate(conf):
        if count:
            shade = "white" if count > conf.max() / 2 else "black"
            ax.text(col, row, count, ha="center", va="center", fontsize=7, color=shade)
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=6.5)
    ax.set_yticks(range(len(names)), names, fontsize=6.5)
    ax.set_title(f"logistic on {title}", fontsize=9)


# Flanders: many dates, three sensors, gaps ----------------------------------------------------------------------------

COVER = {11: "annual crops", 13: "grass and fodder", 60: "built-up", 99: "other, no cropland"}
CROPS = {1200: "maize", 2130: "cabbage", 5100: "potato", 7900: "legumes", 9120: "permanent grass"}
FLANDERS_COLOURS: dict[int, Colour] = {
    0: (225, 225, 225),
    11: (222, 170, 60),
    13: (130, 190, 90),
    60: (200, 80, 80),
    99: (90, 110, 120),
}
NEAR = 7
"""Days between images of one month that may share a slot of the encoder."""


def flanders(setting: Setting, *, months: int = 12) -> None:
    """Tell land cover and crops from a year of three sensors, a clear date per month."""
    data, folder, patch_m = "flanders", setting.data / "worldcereal_patches" / "flanders_2018_A", 20.0
    scene = scene_from_files(folder / "timeseries.npz", setting.work / "flanders").scene
    findings(data, scene, ("sentinel2_l2a", "sentinel1"))
    scene = with_landsat(scene, folder, setting.work / "flanders")
    box, grid = patch_grid(scene, patch_m)
    year = one_a_month(scene, box, months)
    named = ("sentinel2_l2a", "sentinel1", "landsat")
    slots = align(year.batch(box, named).observations, tolerance_days=15)
    say(
        data,
        dates={m: len(scene.dates(m)) for m in named},
        kept={m: [str(d) for d in year.dates(m)] for m in named},
        slots=slots.timestamps.shape[1],
    )
    tasks = {
        task: whole_patches(folder / file, grid, classes)
        for task, file, classes in (
            ("land cover", "label_landcover_LC.tif", COVER),
            ("crop type", "label_croptype_CT.tif", CROPS),
        )
    }
    drawn: list[tuple[str, np.ndarray]] = []
    for sensors in (named[:2], named):
        for task, truth in tasks.items():
            say(data, task=task, patches={truth.names[int(c)]: int((truth.target == c).sum()) for c in truth.names})

        def each(name: str, x: np.ndarray, about: dict[str, Any], sensors: Sequence[str] = sensors) -> None:
            for task, truth in tasks.items():
                z = x[truth.row, truth.col]
                what = {"task": task, "sensors": "+".join(sensors), "features": name, "probe": "logistic", **about}
                _, report = fit(z, truth)
                say(data, split="blocks of 160 m, 5 folds", **what, **rounded(report.metrics))
                west = truth.col < grid.shape.x // 2
                both = np.isin(truth.target, [c for c in truth.names if blocks_of(truth, c, west) >= 2])
                east = both & ~west & np.isin(truth.target, truth.target[west])
                probe, _ = fit(z[west & both], chosen(truth, west & both), folds=2)
                say(data, split="west to east", **what, **rounded(transfer(probe, z[east], chosen(truth, east))))
                if task == "land cover" and len(sensors) == 2:
                    canvas = np.zeros(grid.shape, np.int64)
                    canvas[truth.row, truth.col] = report.predictions
                    drawn.append((name, canvas))

        compare(setting, data, year, tasks["land cover"], sensors, patch_m, each)
    figure = plt.figure(figsize=(12, 5.6))
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 2.1))
    above, below = parts
    show_dates(above.subplots(), scene, year, box)
    axes = below.subplots(1, 4)
    truth = tasks["land cover"]
    canvas = np.zeros(grid.shape, np.int64)
    canvas[truth.row, truth.col] = truth.target
    july = replace(year, items=tuple(i for i in year.items if i.modality == "sentinel2_l2a" and i.date.month == 7))
    show(axes[0], picture_of(july, box).pixels, f"Sentinel-2, {july.items[0].date}")
    for ax, (title, codes) in zip(axes[1:], [("land cover from parcels", canvas), *drawn[:2]], strict=False):
        labelled = title if ax is axes[1] else f"held out: {short(title)}"
        show(ax, paint(codes, FLANDERS_COLOURS), labelled)
    legend(below, COVER, FLANDERS_COLOURS)
    save(figure, setting, data)


def blocks_of(truth: Truth, code: int, where: np.ndarray) -> int:
    return len(np.unique(truth.group[where & (truth.target == code)]))


def whole_patches(file: Path, grid: GeoBox, classes: dict[int, str]) -> Truth:
    """Take the patches that lie in one class with all their pixels; classes in fewer than two blocks are left out."""
    fine = grid.zoom_to(resolution=10)
    codes = read_onto(file, fine, categorical=True)[0][0].astype(np.int64)
    cells = codes.reshape(grid.shape.y, 2, grid.shape.x, 2)
    code = cells[:, 0, :, 0]
    row, col = np.nonzero((cells == code[:, None, :, None]).all((1, 3)) & np.isin(code, list(classes)))
    xy = np.stack([grid.affine.c + 20 * (col + 0.5), grid.affine.f - 20 * (row + 0.5)], axis=1)
    truth = Truth(
        row=row,
        col=col,
        target=code[row, col],
        group=spatial_blocks(xy - [grid.affine.c, grid.affine.f], 160),
        names=classes,
        colours={},
    )
    everywhere = np.ones(len(row), np.bool_)
    known = {c: name for c, name in classes.items() if blocks_of(truth, c, everywhere) >= 2}
    return replace(chosen(truth, np.isin(truth.target, list(known))), names=known)


def one_a_month(scene: Scene, box: GeoBox, months: int) -> Scene:
    """Keep the clearest Sentinel-2 date of each month, the nearest to its middle among equals, and what is near it."""
    clear = {modality: clear_share(scene, modality, box) for modality in scene.modalities}
    by_month: dict[tuple[int, int], list[dt.date]] = {}
    for date in clear["sentinel2_l2a"]:
        by_month.setdefault((date.year, date.month), []).append(date)
    share = clear["sentinel2_l2a"]
    anchors = [min(dates, key=lambda d: (-round(share[d], 1), abs(d.day - 15))) for dates in by_month.values()]
    kept = set()
    for anchor in anchors[-months:]:
        for modality, shares in clear.items():
            near = [d for d in shares if abs((d - anchor).days) <= NEAR and shares[d] > 0]
            if near:
                kept.add((modality, min(near, key=lambda d: (-round(shares[d], 1), abs((d - anchor).days)))))
    return replace(scene, items=tuple(i for i in scene.items if (i.modality, i.date) in kept))


def clear_share(scene: Scene, modality: str, box: GeoBox) -> dict[dt.date, float]:
    """Say of each date which share of the pixels is data."""
    shares = scene.read(modality, box).valid[0].float().mean((1, 2)).tolist()
    return dict(zip(scene.dates(modality), shares, strict=True))


# Landsat 8's calibration (USGS, Landsat 8 Data Users Handbook): reflectance = DN * 2e-5 - 0.1; of the thermal bands
# radiance = DN * 3.342e-4 + 0.1 and temperature = K2 / ln(K1 / radiance + 1).
THERMAL = {"B10": (774.8853, 1321.0789), "B11": (480.8883, 1201.1442)}


def with_landsat(scene: Scene, folder: Path, out: Path) -> Scene:
    """Add Landsat in the level 1 numbers that OlmoEarth takes, approximated from surface reflectance.

    The air is not put back in; B1 is B2, B8 the mean of green and red, and B9 reflects nothing, as under a clear sky.
    """
    about = json.loads((folder / "metadata.json").read_text())["sensors"]["l8_sr"]
    archive = np.load(folder / "timeseries.npz")
    box = GeoBox((64, 64), Affine(*about["transform"]), scene.geobox().crs)
    items = []
    for step, date in enumerate(archive["l8_sr_dates"]):
        raw = dict(zip(about["bands"], archive["l8_sr"][step].astype(np.float64), strict=True))
        dn = {f"B{n}": (raw[f"B0{n}"] * 1e-4 + 0.1) / 2e-5 for n in range(2, 8)}
        for band, (k1, k2) in THERMAL.items():
            radiance = k1 / np.expm1(k2 / np.maximum(raw[band] * 0.1, 150))
            dn[band] = (radiance - 0.1) / 3.342e-4
        dn |= {"B1": dn["B2"], "B8": (dn["B3"] + dn["B4"]) / 2, "B9": np.full((64, 64), 0.1 / 2e-5)}
        # Bits of pixel_qa, Collection 1: 1 clear, 2 water; cloud and shadow have neither.
        clear = (raw["pixel_qa"].astype(np.int64) & 0b110) > 0
        pixels = np.stack([np.where(clear, dn[band].round().clip(1, 65535), 0) for band in LANDSAT])
        path = out / "landsat" / f"{step:02d}.tif"
        write_cog(path, pixels.astype(np.uint16), box, nodata=0, band_names=LANDSAT)
        items.append(make_item(f"landsat_{step:02d}", "landsat", str(date)[:10], box, {"data": path}))
    save_scene(out / "landsat", items, "Landsat", scene.licence)
    others = tuple(item for item in scene.items if item.modality != "hls")
    return replace(scene, items=(*others, *open_scene(out / "landsat").items))


LANDSAT = MODALITIES["landsat"].band_names


def show_dates(ax: Any, scene: Scene, year: Scene, box: GeoBox) -> None:
    """Draw every date of every sensor by its share of clear pixels, and the dates that were kept."""
    for level, modality in enumerate(("landsat", "sentinel1", "sentinel2_l2a")):
        share = clear_share(scene, modality, box)
        kept = year.dates(modality)
        ax.bar(list(share), [0.75 * s for s in share.values()], bottom=level, width=1.6, color="#9ab")
        ax.bar(list(kept), [0.75 * share[d] for d in kept], bottom=level, width=2.6, color="#c40")
    ax.set_yticks([0.35, 1.35, 2.35], ["Landsat 8", "Sentinel-1", "Sentinel-2"], fontsize=8)
    ax.tick_params(axis="x", labelsize=7)
    ax.set_title("share of clear pixels at each date (grey), and what was kept (red)", fontsize=9)
    ax.spines[["top", "right", "left"]].set_visible(False)


# Pictures -------------------------------------------------------------------------------------------------------------


def short(name: str) -> str:
    return name.replace("olmoearth-", "").replace("random weights, ", "random, ")


def as_shade(colour: Colour) -> tuple[float, float, float]:
    red, green, blue = (part / 255 for part in colour)
    return red, green, blue


def show(ax: Any, pixels: np.ndarray, title: str) -> None:
    ax.imshow(pixels, interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.axis("off")


def legend(figure: Any, names: dict[int, str], colours: dict[int, Colour]) -> None:
    entries = [Patch(color=as_shade(colours[code]), label=name) for code, name in names.items()]
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), fontsize=8, frameon=False)


def save(figure: Any, setting: Setting, name: str) -> None:
    setting.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(setting.out / f"{name}.png", dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)


CASES: dict[str, Callable[[Setting], None]] = {
    "belgium": belgium,
    "amazon": amazon,
    "eurosat": eurosat,
    "flanders": flanders,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=[*CASES, "all"])
    parser.add_argument("--model", action="append", default=[], help="released name or folder; may be repeated")
    parser.add_argument(
        "--random",
        nargs="*",
        default=["olmoearth-v1.2-nano", "olmoearth-v1-nano"],
        help="architectures to give random weights",
    )
    parser.add_argument("--seeds", type=int, default=3, help="draws of random weights per architecture")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PANTERRA_DATA", "../shared/data")))
    parser.add_argument("--out", type=Path, default=Path("docs/images/real-data"), help="folder for pictures")
    args = parser.parse_args()
    mpl.use("agg")
    mpl.rcParams["figure.constrained_layout.use"] = True
    for name in CASES if args.case == "all" else [args.case]:
        with tempfile.TemporaryDirectory() as work:
            setting = Setting(
                data=args.data.resolve(),
                out=args.out,
                work=Path(work),
                models=tuple(args.model),
                architectures=tuple(args.random),
                seeds=args.seeds,
            )
            CASES[name](setting)


if __name__ == "__main__":
    main()
