"""What a probe, or a fine-tuned model, needs to make a map."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.evaluate.probes import Probe, load_probe
from panterra.finetune.model import FineTuned, is_finetuned, load_finetuned
from panterra.imagery.stac import Scene, open_scene
from panterra.mapping.areas import Area
from panterra.mapping.sources import Encoding
from panterra.mapping.stored import Stored
from panterra.models import weights
from panterra.models.features import Encoder, Fitted


def as_probe(folder: str | Path) -> Probe | FineTuned:
    """Load a probe or a fine-tuned model."""
    return load_finetuned(folder) if is_finetuned(folder) else load_probe(folder)


def encoding_for(
    probe: Probe | FineTuned,
    scene: Scene | str | Path,
    *,
    model: Encoder | str | Path | None,
    box: GeoBox | None,
    crs: str | None,
    area: Area | None,
    patch_m: float | None,
    modalities: Sequence[str] | None,
    window_px: int | None,
    overlap_px: int | None,
    tile_px: int | None,
    batch_windows: int,
    workers: int,
    device: str | torch.device | None = None,
) -> Encoding:
    """Plan the features that a probe or a fine-tuned model needs; it says what is not given.

    The encoder is taken to a `device`, if one is given.
    """
    source, tuned = probe.source, probe if isinstance(probe, FineTuned) else None
    if tuned is not None and model is not None:
        raise InputError("a fine-tuned model has its own encoder; leave out model")
    if source is None and (model is None or patch_m is None):
        raise InputError("the probe does not say how its features were made; give model and patch_m")
    found = cast("Encoder | str | Path", tuned or model or (source and source.encoder))
    encoder = weights.load_model(found, device=device or "cpu") if isinstance(found, str | Path) else found
    if device is not None and isinstance(encoder, torch.nn.Module):
        encoder.to(device)
    if source is not None and source.statistics and isinstance(encoder, Fitted):
        encoder = encoder.with_statistics(source.statistics)
    scene = scene if isinstance(scene, Scene) else open_scene(scene)
    return Encoding.plan(
        tuned.narrow(scene) if tuned else scene,
        encoder,
        box=box,
        crs=crs,
        area=area,
        patch_m=cast(float, patch_m if patch_m is not None else source and source.patch_m),
        modalities=modalities or (source.modalities if source else None),
        window_px=window_px if window_px is not None else source.window_px if source else 64,
        overlap_px=overlap_px if overlap_px is not None else tuned.overlap_px if tuned else 16,
        tile_px=tile_px,
        batch_windows=batch_windows,
        workers=workers,
    )


def check_fit(probe: Probe | FineTuned, work: Encoding | Stored) -> None:
    """Refuse features that the probe was not fitted on, as far as both say what they are."""
    name = (work.about.get("model") or {}).get("name", "the encoder")
    if probe.dim != work.dim:
        raise InputError(
            f"the probe takes features of width {probe.dim}; {name} gives {work.dim}: use the same encoder"
        )
    if probe.source is not None and isinstance(work, Stored):
        wanted = {"patch_m": probe.source.patch_m, "modalities": sorted(probe.source.modalities)}
        stored = {"patch_m": work.about["patch_m"], "modalities": sorted(work.about["modalities"])}
        if stored != wanted:
            raise InputError(f"the embeddings were made with {stored}, the probe was fitted with {wanted}; embed again")
        if probe.source.statistics and work.about["model"].get("statistics", {}) != probe.source.statistics:
            raise InputError(
                f"the embeddings were standardised by other statistics than those that the probe was fitted with; map "
                f"the scene itself, which takes the probe's, instead of {work.store.path}"
            )


def about_probe(probe: Probe | FineTuned) -> dict[str, Any]:
    """Tell in plain JSON what answers."""
    if isinstance(probe, FineTuned):
        return probe.about()
    digest = hashlib.sha256()
    for name, tensor in sorted(probe.tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return {
        "kind": probe.kind,
        "task": probe.task,
        "neighbours": probe.neighbours,
        "classes": [{"name": c.name, "code": c.code, "colour": c.colour} for c in probe.classes],
        "sha256": digest.hexdigest(),
    }
