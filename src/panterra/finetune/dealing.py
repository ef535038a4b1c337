"""Which training samples an epoch is made of, and what of them is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int

from panterra.data.labelled import LabelledSample
from panterra.errors import InputError
from panterra.finetune.examples import Examples
from panterra.modalities import MODALITIES
from panterra.sample import Observation


def classes_of(examples: Examples) -> Int[np.ndarray, " n"]:
    """Read the class of each training sample. Raises InputError where samples have no class as a whole."""
    if examples.task.answer != "classes" or examples.task.dense:
        raise InputError(f"samples came to be drawn by class, but {examples.task.name} has no class per sample")
    return np.array([int(examples[int(i)].target) for i in examples.of("train")])


def deal(
    train: Int[np.ndarray, " n"], rng: np.random.Generator, *, classes: Int[np.ndarray, " n"] | None = None
) -> Int[np.ndarray, " n"]:
    """Order the samples of an epoch at random.

    With `classes` as many are drawn, with repetition: first a class, by the root of its frequency, then one of its
    samples (AnySat's PLANTED).
    """
    if classes is None:
        return rng.permutation(train)
    _, own, counts = np.unique(classes, return_inverse=True, return_counts=True)
    share = 1 / np.sqrt(counts[own])
    return rng.choice(train, size=len(train), p=share / share.sum())


def cut_at_random(sample: LabelledSample, generator: torch.Generator, sides: Mapping[str, int]) -> LabelledSample:
    """Cut squares of so many pixels out of modalities, and out of a target of the same pixels what belongs to it."""
    observations, target = dict(sample.batch.observations), sample.target
    for name, side in sides.items():
        o = observations[name]
        size = o.pixels.shape[-2:]
        row, col = (int(torch.randint(n - side + 1, (), generator=generator)) for n in size)
        inside = (..., slice(row, row + side), slice(col, col + side))
        target = target[inside] if target.shape[-2:] == size else target
        observations[name] = Observation(pixels=o.pixels[inside], dates=o.dates, valid=o.valid[inside])
    return replace(sample, batch=replace(sample.batch, observations=observations), target=target)


def draw_dates(
    sample: LabelledSample, generator: torch.Generator, *, shares: Mapping[str, float], most: int | None
) -> LabelledSample:
    """Show some dates of each series, at least one: its share, rounded down, where it is named, and `most` of all."""

    def some(name: str, o: Observation) -> Observation:
        count = o.pixels.shape[1]
        left = max(int(count * shares.get(name, 1.0) + 1e-9), 1)
        left = left if most is None else min(left, most)
        if MODALITIES[name].kind != "series" or left == count:
            return o
        kept = torch.randperm(count, generator=generator)[:left].sort().values
        return Observation(pixels=o.pixels[:, kept], dates=o.dates[:, kept], valid=o.valid[:, kept])

    shown = {name: some(name, o) for name, o in sample.batch.observations.items()}
    return replace(sample, batch=replace(sample.batch, observations=shown))
