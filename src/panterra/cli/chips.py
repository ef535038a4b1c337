"""`panterra chips`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from panterra.cli.options import Country, Json, Overwrite


def chips(
    store: Annotated[Path, Parameter(help="Embeddings that panterra embed wrote.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="A GeoParquet file; its passport is written beside it.")],
    side: Annotated[int, Parameter(help="Patches along the side of a chip, whose embedding is their mean.")] = 1,
    overwrite: Overwrite = False,
    country: Country | None = None,
    as_json: Json = False,
) -> None:
    """Write stored embeddings as a table: GeoParquet, a row for each chip with data."""
    from panterra.commands.search import run_chips
    from panterra.commands.terminal import show_json

    made = run_chips(store, out, side=side, country=country, overwrite=overwrite)
    metres = made.side * made.about["patch_m"]
    if as_json:
        show_json({"chips": str(out), "rows": len(made), "chip_m": metres, "dim": made.dim, "dtype": made.dtype})
    else:
        print(f"{out}: {len(made):,} chips of {metres:g} m, {made.dim} numbers each")
