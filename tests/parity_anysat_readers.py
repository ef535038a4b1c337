"""Recorded facts about data sets that AnySat was evaluated on."""

import json
from collections.abc import Callable
from pathlib import Path

from panterra.data.spacenet7 import AREAS


def spacenet7_split(path: Path) -> None:
    """Compare the areas of each split, and their order."""
    recorded = json.loads(path.with_suffix(".json").read_text())
    assert {split: list(areas) for split, areas in AREAS.items()} == recorded


CHECKS: dict[str, Callable[[Path], None]] = {"spacenet7_split": spacenet7_split}
