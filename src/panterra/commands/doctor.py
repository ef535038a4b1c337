"""What the doctor says of a scene to those who have chosen a model or a probe."""

from __future__ import annotations

from pathlib import Path

from panterra.commands.terminal import note
from panterra.errors import InputError
from panterra.evaluate.probes import load_probe
from panterra.imagery.doctor import Finding, compare_statistics, examine, worst_first
from panterra.imagery.stac import Scene, open_scene
from panterra.mapping.areas import common_grid
from panterra.mapping.standards import in_blocks
from panterra.models.features import Encoder, Fitted
from panterra.models.weights import MODELS, load_model


def diagnose(address: str, *, model: str | None, probe: Path | None) -> tuple[Scene, list[Finding]]:
    """Examine a scene, with a model or a probe also against what they expect and were fitted to."""
    fitted = load_probe(probe) if probe else None
    source = fitted.source if fitted else None
    if probe is not None and source is None:
        raise InputError(f"{probe} does not say how its features were made; give the model instead")
    name = model or (source.encoder if source else None)
    # A released model is not fetched for what its architecture knows. It comes first: it may declare modalities.
    encoder = load_model(name, random=0 if name in MODELS else None) if name else None
    scene = open_scene(address)
    if encoder is None:
        return scene, examine(scene)
    wanted = source.modalities if source else encoder.modalities
    findings = examine(scene, wanted)
    if isinstance(encoder, Fitted):
        seen = [m for m in scene.modalities if m in wanted]
        whose = str(probe) if source and source.statistics else encoder.name
        encoder = encoder.with_statistics(source.statistics) if source else encoder
        findings += _statistics(scene, encoder, seen, whose)
    return scene, worst_first(findings)


def _statistics(scene: Scene, encoder: Fitted, modalities: list[str], whose: str) -> list[Finding]:
    """Fit statistics to a scene and hold them against those that an encoder has already."""
    assert isinstance(encoder, Encoder)
    findings = []
    box = common_grid(scene, encoder, modalities)
    for modality in modalities:
        note(f"Fitting statistics of {modality} to the scene")
        try:
            own = encoder.with_statistics(encoder.fit_statistics(in_blocks(scene, box, [modality])))
        except InputError as error:
            findings.append(Finding(level="warning", modality=modality, what=f"no statistics can be fitted: {error}"))
            continue
        findings += compare_statistics(
            modality, own.statistics_of(modality), encoder.statistics_of(modality), whose=whose
        )
    return findings
