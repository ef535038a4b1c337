"""`panterra accuracy`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from panterra.cli.options import Json

if TYPE_CHECKING:
    from panterra.evaluate.area import Estimate


def accuracy(
    map: Annotated[Path, Parameter(help="A map of classes.")],
    /,
    *,
    reference: Annotated[Path, Parameter(help="Points with the true class, drawn by panterra sample or at random.")],
    column: Annotated[
        str, Parameter(help="Column with the true class, as the map names it or its code.")
    ] = "reference",
    confidence: Annotated[float, Parameter(help="Of the intervals.")] = 0.95,
    interval: Annotated[
        Literal["wilson", "normal"], Parameter(help="Normal is the papers' own, too short for rare classes.")
    ] = "wilson",
    simple: Annotated[
        bool, Parameter(show_default=False, help="Do not stratify points drawn at random by the map's classes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Estimate a map's accuracy and the area of its classes from reference points, with confidence intervals."""
    from panterra.commands.accuracy import assess
    from panterra.commands.terminal import note, show_json, show_table

    found = assess(map, reference, column=column, confidence=confidence, interval=interval, simple=simple)
    if found.unlabelled:
        note(f"{found.unlabelled} points of {reference} have no {column} and are left out, as if at random")
    if as_json:
        show_json(found.as_dict())
        return
    report, percent = found.report, f"{confidence:.0%} interval"
    show_table(["", "estimate", percent], [("overall accuracy", *_share(report.overall))])
    print()
    show_table(
        [
            "class",
            "points",
            "user's accuracy",
            percent,
            "producer's accuracy",
            percent,
            "mapped ha",
            "area ha",
            percent,
        ],
        [
            (
                found.names[c.code],
                c.mapped_points,
                *_share(c.users),
                *_share(c.producers),
                f"{found.mapped.get(c.code, 0):,.1f}",
                *_hectares(found.hectares_of(c.code)),
            )
            for c in report.classes
        ],
    )
    design = "stratified" if found.stratified else "simple random"
    print(f"\n{report.num_points} points of a {design} sample of {found.hectares:,.1f} ha")


def _share(figure: Estimate) -> tuple[str, str]:
    if math.isnan(figure.value):
        return "-", "-"
    return f"{figure.value:.3f}", f"{figure.low:.3f} to {figure.high:.3f}"


def _hectares(area: Estimate) -> tuple[str, str]:
    return f"{area.value:,.1f}", f"{area.low:,.1f} to {area.high:,.1f}"
