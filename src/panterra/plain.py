"""Values as plain JSON, which has no word for undefined numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def as_plain(value: Any) -> Any:
    """Turn tuples into lists, and numbers that are NaN or infinite into None, however deep they are nested."""
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
