"""Fewer training samples, as the published evaluations choose them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int

from panterra.data.labelled import LabelledSet
from panterra.errors import InputError

Subsets = Literal["stratified", "published"]
"""stratified: drawn with each seed by `protocols.fraction_of`; published: see `published_subset`."""

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of the training samples (OlmoEarth)."""
SEED = 42
"""Of subsets where no list is at hand (OlmoEarth)."""


def published_subset(root: Path, train: LabelledSet, fraction: float) -> tuple[Int[np.ndarray, " k"], str]:
    """Take the training samples that a list in the data set's folder names, or a random share; say which it was.

    Lists are called such as `0.05x_train_partition.json` and say {"train": [ids]}, as GEO-Bench's do; samples that were
    cut into tiles may be listed as a whole. OlmoEarth's lists for PASTIS, MADOS and the floods are no part of those
    downloads; where there is no list, a share is drawn without strata with seed 42.
    """
    if fraction not in FRACTIONS:
        raise InputError(
            f"a fraction is {fraction:g}; published subsets are of {', '.join(f'{f:g}' for f in FRACTIONS)} and 1"
        )
    path = root / f"{fraction:.2f}x_train_partition.json"
    if not path.is_file():
        count = max(1, round(fraction * len(train)))
        return np.sort(np.random.default_rng(SEED).permutation(len(train))[:count]), f"random, seed {SEED}"
    try:
        listed = {str(id) for id in json.loads(path.read_text("utf-8"))["train"]}
    except (ValueError, KeyError, TypeError):
        raise InputError(f'{path} lists no training samples; wanted JSON such as {{"train": ["a", "b"]}}') from None
    index = np.array([i for i, id in enumerate(train.ids) if {id, id.split("@")[0]} & listed], np.int64)
    if not len(index):
        raise InputError(f"{path} lists none of the {len(train)} training samples; give the list that belongs to them")
    return index, path.name
