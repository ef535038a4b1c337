"""Values as plain JSON, which has no word for tuples and undefined numbers, and back."""

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


def as_lists(value: Any) -> Any:
    """Turn tuples into lists, however deep they are nested; numbers stay as they are."""
    if isinstance(value, Mapping):
        return {key: as_lists(item) for key, item in value.items()}
    return [as_lists(item) for item in value] if isinstance(value, list | tuple) else value


def as_tuples(value: Any) -> Any:
    """Turn lists into tuples, however deep they are nested."""
    if isinstance(value, Mapping):
        return {key: as_tuples(item) for key, item in value.items()}
    return tuple(as_tuples(item) for item in value) if isinstance(value, list) else value
