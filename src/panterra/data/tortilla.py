"""Tortillas: files that hold other files and a table of them (TACO, first version of the format).

Layout: two letters, then the place and the length of a Parquet table in eight bytes each; the table says where each
file lies. A file may be a tortilla again. The library that reads them wants a release of years ago and downloads; the
layout is small enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from panterra.errors import InputError

MAGIC = (b"#y", b"WX")
"""Of a tortilla and of a taco, which is one with a description."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file in a tortilla."""

    id: str
    tortilla: Path
    offset: int
    length: int
    columns: Mapping[str, Any]
    """All that the table says of it."""

    @property
    def path(self) -> Path:
        """Where GDAL finds it."""
        return Path(f"/vsisubfile/{self.offset}_{self.length},{self.tortilla}")

    def entries(self) -> tuple[Entry, ...]:
        """List what is in it, where it is a tortilla."""
        return read_entries(self.tortilla, offset=self.offset)


def read_entries(path: Path, *, offset: int = 0) -> tuple[Entry, ...]:
    """List the files in a tortilla that starts at a byte of a file."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            head = file.read(18)
            if head[:2] not in MAGIC:
                raise InputError(f"{path} is no tortilla; it starts with {head[:2]!r} instead of {MAGIC[0]!r}")
            file.seek(offset + int.from_bytes(head[2:10], "little"))
            table = file.read(int.from_bytes(head[10:18], "little"))
        rows = pq.read_table(pa.BufferReader(table)).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {path} as a tortilla ({error}); download it again") from None
    return tuple(
        Entry(
            id=str(row["tortilla:id"]),
            tortilla=path,
            offset=offset + row["tortilla:offset"],
            length=row["tortilla:length"],
            columns=row,
        )
        for row in rows
    )
