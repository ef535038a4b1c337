"""Which labelled data sets can be opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from panterra.data import cards_anysat, cards_eurosat, cards_geobench, cards_olmoearth, cards_rslearn
from panterra.data.card import IGNORE, UNDATED, DatasetCard, LabelledSample, LabelledSet, Task, check_split
from panterra.errors import InputError

__all__ = [
    "DATASETS",
    "IGNORE",
    "UNDATED",
    "DatasetCard",
    "LabelledSample",
    "LabelledSet",
    "Task",
    "card_of",
    "check_split",
    "open_labelled",
]


def open_labelled(name: str, root: str | Path, split: str, **options: Any) -> LabelledSet:
    """Open one split of a data set of `DATASETS`."""
    return card_of(name).open(root, split, **options)


def card_of(name: str) -> DatasetCard:
    """Look a data set up by its name."""
    if name not in DATASETS:
        raise InputError(f"no data set {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name]


DATASETS: dict[str, DatasetCard] = {
    card.name: card
    for cards in (cards_anysat, cards_geobench, cards_olmoearth, cards_rslearn, cards_eurosat)
    for card in cards.CARDS
}
