"""What a command says: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from panterra.plain import as_plain

Result = TypeVar("Result")

Advance = Callable[[int, int], None]
"""Called with what is done and the total."""

LONGEST_WORD = 32
"""Paths and the like beyond so many characters are folded where a terminal is narrow."""


def note(text: str) -> None:
    """Tell the person in front of the terminal something that is not part of the result."""
    print(text, file=sys.stderr, flush=True)


def show_json(result: object) -> None:
    """Print a result for machines; undefined numbers are null."""
    print(json.dumps(as_plain(result), indent=2, ensure_ascii=False, default=str, allow_nan=False))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, whose words and numbers stay whole; a pipe or a file gets it unwrapped and without colour."""
    cells = [[str(cell) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, *column in zip(columns, *cells, strict=True):
        longest = max(map(len, " ".join([name, *column]).split()), default=0)
        table.add_column(name, min_width=min(longest, LONGEST_WORD), overflow="fold")
    for row in cells:
        table.add_row(*row)
    console = Console() if sys.stdout.isatty() else Console(width=10_000)
    with console.capture() as text:
        console.print(table, soft_wrap=not console.is_terminal, crop=False)
    # rich would end the program where the reader has left; print raises BrokenPipeError, which the command line knows.
    print("\n".join(line.rstrip() for line in text.get().splitlines()))


@contextmanager
def progress_bar(what: str) -> Iterator[Advance]:
    """Show a bar on stderr while the block runs; nothing where stderr is not a terminal."""
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def despite_failures(what: str, work: Callable[[Advance], Result]) -> tuple[Result, Mapping[str, str]]:
    """Do work on tiles behind a progress bar; return what came of it, and the reason for each tile that failed."""
    from panterra.mapping.parts import IncompleteError

    try:
        with progress_bar(what) as progress:
            return work(progress), {}
    except IncompleteError as error:
        note(f"panterra: {error}")
        return error.result, error.failed
