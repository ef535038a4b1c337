"""`panterra demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from panterra.cli.options import BlockM, Json, LabelColumn, PatchM, RandomSeed, WindowPx

DEMO_MODEL = "panterra-nano"


def demo(
    *,
    out: Annotated[Path, Parameter(help="Folder for everything that is made.")] = Path("demo"),
    scene: Annotated[str | None, Parameter(help="A scene of your own instead of the procedural planet.")] = None,
    labels: Annotated[Path | None, Parameter(help="Its labels: points or polygons with a class.")] = None,
    column: LabelColumn | None = None,
    model: Annotated[str, Parameter(help="Name or folder.")] = DEMO_MODEL,
    random: RandomSeed = None,
    patch_m: PatchM = 20,
    window_px: WindowPx | None = None,
    block_m: BlockM = 500,
    size_px: Annotated[int, Parameter(help="Side of the planet's scene in 10 m pixels.")] = 320,
    seed: Annotated[int, Parameter(help="Which planet.")] = 0,
    as_json: Json = False,
) -> None:
    """Make imagery, embed it, fit a probe on 200 labels, write a map and a report about it."""
    from panterra.commands.demo import open_in_browser, run_demo
    from panterra.commands.terminal import show_json

    result = run_demo(
        out,
        scene=scene,
        labels=labels,
        column=column,
        model=model,
        random=random,
        patch_m=patch_m,
        window_px=window_px,
        block_m=block_m,
        size_px=size_px,
        seed=seed,
    )
    if as_json:
        show_json(result)
        return
    print(result["report"])
    open_in_browser(result["report"])
