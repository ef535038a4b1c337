"""The whole path from imagery to a map and a report, in one run."""

from __future__ import annotations

import os
import sys
import time
import webbrowser
from pathlib import Path
from typing import Any

from panterra.commands.page import page_of
from panterra.commands.probe import fit_to_labels
from panterra.commands.terminal import note, progress_bar
from panterra.energy import measure_energy
from panterra.errors import InputError
from panterra.imagery.stac import open_scene
from panterra.mapping import run
from panterra.mapping.report import write_report
from panterra.models.weights import load_model
from panterra.planet import CLASSES, write_planet_scene

RANDOM_WEIGHTS = (
    "Random weights: this encoder was never trained, which is why its windows leave steps in the map too. The run "
    "shows that the whole path works, not what a trained model can do: leave out --random for that"
)


def run_demo(
    out: Path,
    *,
    scene: str | None,
    labels: Path | None,
    column: str | None,
    model: str,
    random: int | None,
    patch_m: float,
    window_px: int | None,
    block_m: float,
    size_px: int,
    seed: int,
) -> dict[str, Any]:
    """Make a planet scene (or take one), embed it, fit a probe, write map and report; return where everything is."""
    if (scene is None) != (labels is None):
        raise InputError(
            "a scene of your own needs labels, and labels need their scene: give both --scene and --labels"
        )
    # A trained encoder makes use of what surrounds a patch. To an untrained one it is noise, which is averaged away.
    window_px = window_px or (32 if random is None else 16)
    overlap_px = window_px // (4 if random is None else 2)
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    with measure_energy() as meter:
        truth = None
        if scene is None or labels is None:
            note("Making a planet: imagery with a known truth")
            folder = write_planet_scene(out / "scene", seed=seed, size_px=size_px)
            scene, labels, truth = str(folder), folder / "labels.geojson", folder / "truth.tif"
        encoder = load_model(model, random=random)
        if random is not None:
            note(RANDOM_WEIGHTS)
        opened = open_scene(scene)
        with progress_bar("embedding") as progress:
            store = run.embed(
                opened,
                encoder,
                out / "embeddings.zarr",
                patch_m=patch_m,
                window_px=window_px,
                overlap_px=overlap_px,
                overwrite=True,
                progress=progress,
                note=note,
            )
        note("Fitting a probe")
        fitted = fit_to_labels(
            store,
            labels,
            column=column,
            kind="logistic",
            split="blocks",
            block_m=block_m,
            folds=5,
            seed=42,
            colours={c.name: c.colour for c in CLASSES} if truth else None,
        )
        fitted.probe.save(out / "probe")
        with progress_bar("mapping") as progress:
            result = run.map(store, fitted.probe, out / "map.tif", overwrite=True, progress=progress)
    page = page_of(
        scene=opened,
        store=store,
        fitted=fitted,
        result=result,
        labels=labels,
        truth=truth,
        notices=[RANDOM_WEIGHTS] if random is not None else [],
        energy=meter.report,
        seconds=time.perf_counter() - started,
    )
    report = write_report(out / "report.html", page)
    return {
        "report": str(report.resolve()),
        "map": str(result.path),
        "passport": str(result.passport),
        "embeddings": str(store.path),
        "probe": str(out / "probe"),
        "scores": {name: interval.estimate for name, interval in fitted.report.metrics.items()},
        "seconds": round(time.perf_counter() - started, 1),
        "energy_kwh": meter.report.kwh,
        "energy_method": meter.report.method,
    }


def open_in_browser(page: str) -> None:
    """Open a page where a person sits in front of a display; elsewhere its path is all there is to say."""
    display = sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if sys.stdout.isatty() and display:
        webbrowser.open(Path(page).as_uri())
