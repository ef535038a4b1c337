"""`panterra doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from panterra.cli.options import Json, ModelName, SceneAddress


def doctor(
    scene: SceneAddress,
    /,
    *,
    model: ModelName | None = None,
    probe: Annotated[Path | None, Parameter(help="A probe that is to map the scene, and its model.")] = None,
    repair: Annotated[Path | None, Parameter(help="Write a scene with the exact fixes applied to this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Compare what a scene holds with what a model or a probe expects; name each mismatch and its fix."""
    from panterra.commands.doctor import diagnose
    from panterra.commands.terminal import note, show_json, show_table
    from panterra.imagery.doctor import repair as write_repaired

    opened, findings = diagnose(scene, model=model, probe=probe)
    if as_json:
        show_json(
            [
                {"level": f.level, "modality": f.modality, "what": f.what, "fix": f.fix, "exact": f.exact}
                for f in findings
            ]
        )
    else:
        show_table(
            ["", "modality", "what", "what to do"],
            [(f.level, f.modality, f.what, f"{f.fix} (exact)" if f.exact and f.fix else f.fix) for f in findings],
        )
    if repair is not None:
        write_repaired(opened, findings, repair)
        note(f"The repaired scene is in {repair}; examine it once more with: panterra doctor {repair}")
