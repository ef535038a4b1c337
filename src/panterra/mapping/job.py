"""A job: every tile of a map is made, put where it belongs, and accounted for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import pystac

from panterra.energy import EnergyReport
from panterra.energy.ledger import Note
from panterra.errors import InputError
from panterra.mapping.cluster import painters
from panterra.mapping.effort import Account, accounted
from panterra.mapping.parts import Failure, IncompleteError, Parts
from panterra.mapping.passport import passport_of, write_passport
from panterra.mapping.seams import KEYS, SeamScore, seam_score
from panterra.mapping.sinks import Sink
from panterra.mapping.sources import Encoding
from panterra.mapping.standards import standardise
from panterra.mapping.stored import Stored

Result = TypeVar("Result")

Progress = Callable[[int, int], None]
"""Called with how many windows (of stored embeddings: blocks) are done and how many there are."""

FAILURES_AT_FIRST, FAILURES_IN_A_ROW = 3, 100
"""So many failed tiles, before the first good one or one after the other, stop a job: it is not the tiles."""


def compute(
    command: str,
    work: Encoding | Stored,
    parts: Parts,
    sink: Sink,
    *,
    on: str,
    country: str | None,
    budget_kwh: float | None,
    progress: Progress | None,
    note: Note | None,
) -> Account:
    """Bring every tile into the sink; the thread that writes also applies the probe, while the encoder goes on."""
    advance = counting(work, progress)
    with accounted(command, work, parts, on=on, country=country, budget_kwh=budget_kwh, note=note) as account:
        if isinstance(work, Encoding):
            standardise(work, parts, note)
        with parts.guard(), sink:
            finished = [tile for tile in work.tiles() if parts.has(tile)] if len(parts) else []
            for tile in finished:
                sink.again(tile)
            advance(sum(work.cost(tile) for tile in finished))
            todo = (tile for tile in work.tiles() if not parts.has(tile))
            # Tiles of an earlier start are not read again for this: they are supposed to hold something.
            in_a_row, empty = 0, not finished
            with (
                painters(on, work, parts, tell=account.meter.tell, note=note) as canvases,
                ThreadPoolExecutor(1, "panterra-write") as writer,
            ):
                writing: deque[Future[None]] = deque()
                for tile, features in work.features(todo, parts, advance, canvases):
                    if isinstance(features, Failure):
                        in_a_row += 1
                        most = FAILURES_IN_A_ROW if finished or account.tiles else FAILURES_AT_FIRST
                        if in_a_row == most:
                            raise _stopped(parts, f"the last {most} tiles could not be made")
                        continue
                    in_a_row, empty = 0, empty and not np.isfinite(features).any()
                    writing.append(writer.submit(sink.put, tile, features))
                    account.finish(tile)
                    if len(writing) > 1:
                        writing.popleft().result()
                for last in writing:
                    last.result()
            if parts.failed and not finished and not account.tiles:
                raise _stopped(parts, "no tile could be made")
            if empty and not parts.failed and note:
                note(f"{parts.out} holds no data: there is not one valid pixel in what was looked at")
    return account


def counting(work: Encoding | Stored, progress: Progress | None) -> Callable[[int], None]:
    """Make what is told of windows as they are done, and tells `progress` how far the whole job is."""
    done, total = 0, sum(work.cost(tile) for tile in work.tiles())

    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        if progress:
            progress(done, total)

    return advance


def _stopped(parts: Parts, why: str) -> InputError:
    name, reason = next(reversed(parts.failed.items()))
    return InputError(
        f"stopped, as {why}: tile {name} {reason}; finished tiles are kept in {parts.folder}, and the same job goes on "
        "from there when this is put right"
    )


def complete(result: Result, work: Encoding | Stored, parts: Parts, *, missing: str = "are nodata") -> Result:
    """Return what was made, or raise IncompleteError, with what became of them, where tiles are missing in it."""
    if not parts.failed:
        return result
    name, reason = next(iter(parts.failed.items()))
    raise IncompleteError(
        f"{parts.out} is complete but for {len(parts.failed)} of {sum(1 for _ in work.tiles())} tiles, which "
        f"{missing} (the passport lists them): tile {name} {reason}; the others are kept in {parts.folder}, and the "
        "same job tries these again",
        failed=parts.failed,
        result=result,
    )


def seams_of(work: Encoding | Stored, parts: Parts) -> SeamScore:
    """Tell how far borders show."""
    with parts.guard():
        return seam_score(work.tiles(), lambda t: None if t.name in parts.failed else parts.load(t, KEYS))


def conclude(
    work: Encoding | Stored,
    parts: Parts,
    assets: Mapping[str, pystac.Asset],
    energy: EnergyReport,
    properties: Mapping[str, Any],
    *,
    area_km2: float | None = None,
) -> None:
    """Write the passport and take the parts away, unless tiles are to be tried again."""
    with parts.guard():
        write_passport(
            passport_of(parts.out),
            work.grid,
            work.dates,
            assets,
            energy=energy,
            area_km2=work.area_km2 if area_km2 is None else area_km2,
            licence=work.licence,
            properties={
                **work.origin,
                **properties,
                "panterra:encoder_seconds": round(work.encoder_seconds, 3),
                **({"panterra:failed_tiles": _failed_tiles(work, parts)} if parts.failed else {}),
            },
        )
        if not parts.failed:
            parts.remove()


def _failed_tiles(work: Encoding | Stored, parts: Parts) -> list[dict[str, Any]]:
    """List the tiles that are missing in an output, each with its rows and columns."""
    return [
        {"tile": tile.name, "reason": parts.failed[tile.name], **asdict(tile.core)}
        for tile in work.tiles()
        if tile.name in parts.failed
    ]
