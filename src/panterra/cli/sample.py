"""`panterra sample`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from panterra.cli.options import Json


def sample(
    map: Annotated[Path, Parameter(help="A map of classes, or any other raster of strata.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="GeoJSON of points to look at, with an empty column `reference`.")],
    size: Annotated[int | None, Parameter(help="How many points; otherwise as many as the error needs.")] = None,
    standard_error: Annotated[
        float | None, Parameter(help="Of overall accuracy, to be reached; 0.02 if left out.")
    ] = None,
    users_accuracy: Annotated[
        list[str] | None,
        Parameter(consume_multiple=True, help="What you expect of classes: water=0.95 maize=0.7; 0.8 otherwise."),
    ] = None,
    allocation: Annotated[
        Literal["proportional", "equal", "neyman"], Parameter(help="How points are dealt to the classes.")
    ] = "proportional",
    minimum: Annotated[int, Parameter(help="Points in each class at least.")] = 50,
    seed: int = 42,
    as_json: Json = False,
) -> None:
    """Draw a stratified random sample of a map: points to look at, to learn how good it is."""
    from panterra.commands.accuracy import draw_points
    from panterra.commands.terminal import show_json, show_table

    design = draw_points(
        map,
        out,
        size=size,
        standard_error=standard_error,
        users_accuracy=users_accuracy or [],
        allocation=allocation,
        minimum=minimum,
        seed=seed,
    )
    strata = list(zip(design.strata, design.shares, design.points, design.users_accuracy, strict=True))
    if as_json:
        show_json(
            {
                "points": str(out),
                "standard_error": design.standard_error,
                "strata": [{**asdict(s), "share": w, "points": n, "users_accuracy": u} for s, w, n, u in strata],
            }
        )
        return
    show_table(
        ["class", "hectares", "share", "expected user's accuracy", "points"],
        [(s.name, f"{s.hectares:,.1f}", f"{w:.1%}", f"{u:g}", n) for s, w, n, u in strata],
    )
    print(
        f"\n{out}: {sum(design.points)} points; fill in `reference`, then: panterra accuracy {map} --reference {out}\n"
        f"Overall accuracy will have a standard error of about {design.standard_error:.3f}, if the expectations hold."
    )
