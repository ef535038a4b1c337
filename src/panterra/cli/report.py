"""`panterra report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from panterra.cli.options import Json


def report(
    *,
    since: Annotated[str | None, Parameter(help="First day or month to count, such as 2026-01 or 2026-01-15.")] = None,
    html: Annotated[Path | None, Parameter(help="Also write a page that opens anywhere.")] = None,
    as_json: Json = False,
) -> None:
    """Add up what your jobs have taken: electricity, CO2 equivalents and water, by command, model and month."""
    from panterra.commands.report import show_report, summarise, write_page
    from panterra.commands.terminal import note, show_json

    summary = summarise(since=since, note=note)
    if html is not None:
        write_page(html, summary)
    show_json(summary.as_dict() | {"html": None if html is None else str(html)}) if as_json else show_report(summary)
