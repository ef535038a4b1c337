"""What a run has to say for itself: the page of a report."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import rasterio
from jaxtyping import UInt8
from odc.geo.geobox import GeoBox

import panterra
from panterra.commands.pictures import picture_of
from panterra.commands.probe import Fitted, unseen_mistakes
from panterra.energy import EnergyReport
from panterra.evaluate.metrics import Interval
from panterra.imagery.raster import Colour, read_legend, read_onto
from panterra.imagery.stac import Scene
from panterra.mapping.embeddings import EmbeddingStore
from panterra.mapping.report import ClassScores, LegendEntry, Mark, Page, Panel, Score, paint
from panterra.mapping.run import MapResult
from panterra.models.weights import MODELS

TITLES = {"accuracy": "Accuracy", "macro_f1": "Macro F1", "mean_iou": "Mean IoU"}
MAX_MARKS = 2000
PICTURE_PX = 1024


def page_of(
    *,
    scene: Scene,
    store: EmbeddingStore,
    fitted: Fitted,
    result: MapResult,
    labels: Path,
    truth: Path | None,
    notices: Sequence[str],
    energy: EnergyReport,
    seconds: float,
) -> Page:
    """Tell a classification from imagery to map; `truth` is a raster of the same class codes, where it is known."""
    picture = picture_of(scene, _picture_grid(store))
    imagery = Panel(
        title="Imagery", pixels=picture.pixels, alt=f"Satellite imagery: {picture.about}", photo=True, caption=""
    )
    with rasterio.open(result.path) as file:
        codes = file.read(1)
    names, colours = read_legend(result.path)
    shares = np.bincount(codes.ravel(), minlength=256) / max((codes != file.nodata).sum(), 1)
    patch_m = store.about["patch_m"]
    panels = [
        replace(imagery, marks=_marks(fitted, store, colours), caption=f"{picture.about}. Dots are the labels."),
        Panel(
            title="Map",
            pixels=paint(codes, colours),
            alt=f"Map of {', '.join(names.values())}",
            caption=f"One class per patch of {patch_m:g} m.",
            over=imagery,
        ),
    ]
    scores = {TITLES[name]: _score(fitted.report.metrics[name]) for name in TITLES if name in fitted.report.metrics}
    if truth is not None:
        known = _in_codes_of(names, truth, _picture_grid(store))
        panels.append(
            Panel(
                title="Truth",
                pixels=paint(known, colours),
                alt="What the planet is, in the colours of the map",
                caption="What the planet is, pixel by pixel.",
            )
        )
        scores["Agreement with the truth"] = Score(estimate=_agreement(codes, known))
    report = fitted.report
    return Page(
        title=f"{len(names)} classes from {len(np.unique(fitted.samples.group))} labelled places",
        lead=_lead(scene),
        notices=notices,
        panels=panels,
        legend=[LegendEntry(name=names[c], colour=colours[c], share=float(shares[c])) for c in names],
        scores=scores,
        measured=_measured(fitted),
        classes=[
            ClassScores(
                name=c.name,
                colour=known_class.colour or (128, 128, 128),
                support=c.support,
                precision=_score(c.precision),
                recall=_score(c.recall),
                f1=_score(c.f1),
            )
            for c, known_class in zip(report.classes, fitted.probe.classes, strict=True)
        ],
        confusion=np.array(report.confusion),
        effort=_effort(energy, seconds),
        origin=_origin(scene, store, fitted),
        files={
            "Map": result.path,
            "Passport of the map": result.passport,
            "Embeddings": store.path,
            "Passport of the embeddings": store.passport,
            "Labels": labels,
        },
    )


def _in_codes_of(names: Mapping[int, str], raster: Path, box: GeoBox) -> UInt8[np.ndarray, "h w"]:
    """Read a raster of classes onto a box in the codes of the map, by name; 0 where the map has no such class."""
    own, _ = read_legend(raster)
    pixels, _ = read_onto(raster, box, categorical=True)
    table = np.zeros(256, np.uint8)
    for code, name in own.items():
        table[code] = next((c for c, called in names.items() if called == name), 0)
    translated: UInt8[np.ndarray, "h w"] = table[pixels[0].astype(np.uint8)]
    return translated


def _picture_grid(store: EmbeddingStore) -> GeoBox:
    """Cover the map's area with pixels of 10 m, or coarser ones where that would be a large picture."""
    rows, cols = store.box.shape
    finer = max(store.about["patch_m"] / 10, 1)
    scale = min(finer, PICTURE_PX / max(rows, cols))
    return store.box.zoom_to((max(round(rows * scale), 1), max(round(cols * scale), 1)))


def _marks(fitted: Fitted, store: EmbeddingStore, colours: Mapping[int, Colour]) -> list[Mark]:
    """Mark one cell of each labelled point or polygon."""
    samples = fitted.samples
    _, first = np.unique(samples.group, return_index=True)
    rows, cols = store.box.shape
    return [
        Mark(
            across=float(samples.col[i] + 0.5) / cols,
            down=float(samples.row[i] + 0.5) / rows,
            colour=colours[int(samples.target[i])],
        )
        for i in first[:MAX_MARKS]
    ]


def _agreement(codes: np.ndarray, known: np.ndarray) -> float:
    """Return the share of mapped patches whose class is the commonest of the truth in them."""
    rows, cols = codes.shape
    finer = known.shape[0] // rows
    cells = known[: rows * finer, : cols * finer].reshape(rows, finer, cols, finer)
    counts = np.stack([(cells == code).sum((1, 3)) for code in range(int(known.max()) + 1)])
    mapped = codes != 0
    return float((counts.argmax(0) == codes)[mapped].mean())


def _score(interval: Interval) -> Score:
    bounded = np.isfinite([interval.low, interval.high]).all()
    return Score(estimate=interval.estimate, interval=(interval.low, interval.high) if bounded else None)


def _lead(scene: Scene) -> str:
    days = sorted({day for name in scene.modalities for day in scene.dates(name)})
    span = f"{days[0]} to {days[-1]}" if len(days) > 1 else f"{days[0]}"
    return " · ".join([scene.title or "A scene", f"imagery of {span}", f"made {dt.date.today()}"])


def _measured(fitted: Fitted) -> str:
    report = fitted.report
    where = (
        f"in {len(report.fold_sizes)} rounds, each time on whole blocks of {report.block_m:g} m that it had not seen"
        if report.split == "blocks"
        else f"in {len(report.fold_sizes)} rounds, each on labels that it had not seen; their neighbours it may have"
    )
    return (
        f"{report.num_samples} labelled patches in {report.num_groups} blocks. The probe was tested {where}. "
        f"Intervals come from drawing whole blocks {report.resamples} times."
        + (f" {fitted.left_out} labelled patches have no data and were left out." if fitted.left_out else "")
        + (f" {fitted.other_dates} labels of other dates were left out." if fitted.other_dates else "")
        + unseen_mistakes(report)
    )


def _effort(energy: EnergyReport, seconds: float) -> dict[str, str]:
    return {
        "Run time": f"{seconds:.0f} s",
        "Energy": f"{energy.kwh * 1000:.3g} Wh, {energy.method} ({energy.detail})",
    }


def _origin(scene: Scene, store: EmbeddingStore, fitted: Fitted) -> dict[str, str]:
    about, report = store.about, fitted.report
    model = about["model"]
    card = next((c for c in MODELS.values() if model["name"].startswith(c.name)), None)
    return {
        "Model": f"{model['name']}, {store.dim} numbers per patch",
        "Weights": f"sha256 {model['weights_sha256']}",
        "Licence of the model": card.terms if card else str(model.get("licence") or "not stated"),
        "Licence of the imagery": scene.licence or "not stated",
        "Imagery": "; ".join(f"{name}: {len(scene.dates(name))} dates" for name in about["modalities"]),
        "Patches": f"{about['patch_m']:g} m",
        "Windows": f"{about['window_px']} px, overlapping by {about['overlap_px']} px",
        "Probe": f"{report.kind}, strength {report.strength:g} of {len(report.strengths)} tried",
        "Software": f"panterra {panterra.__version__}",
    }
