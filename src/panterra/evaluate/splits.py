"""Which samples are learned from, and which are kept to test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from panterra.errors import InputError

_ATTEMPTS = 20


def spatial_blocks(
    xy: Float[np.ndarray, "n 2"], block_m: float, *, together: Int[np.ndarray, " n"] | None = None
) -> Int[np.ndarray, " n"]:
    """Number the square blocks of side `block_m` that samples lie in, from 0, in metres of a projected CRS.

    Samples with the same `together` (the pixels of one polygon) go to the block of their mean position.
    """
    xy = np.asarray(xy, np.float64)
    if xy.ndim != 2 or xy.shape[1] != 2 or not np.isfinite(xy).all():
        raise InputError(f"xy is {list(xy.shape)}; wanted finite positions [n, 2] in metres")
    if not block_m > 0:
        raise InputError(f"block_m is {block_m}; wanted a length in metres above 0")
    if together is not None:
        _, member = np.unique(together, return_inverse=True)
        size = np.bincount(member)
        xy = np.stack([np.bincount(member, axis) / size for axis in xy.T], axis=1)[member]
    _, block = np.unique(np.floor(xy / block_m), axis=0, return_inverse=True)
    return block.reshape(-1).astype(np.int64)


def split_by_group(
    groups: Int[np.ndarray, " n"],
    targets: Int[np.ndarray, " n"] | None = None,
    *,
    folds: int = 5,
    names: Mapping[int, str] | None = None,
    seed: int = 42,
) -> Int[np.ndarray, " n"]:
    """Deal whole groups (spatial blocks) into folds of about equal size and mixture of classes.

    Every class is in two folds at least, so that it is in the training data of each fold. Raises InputError where the
    groups do not allow that.
    """
    if folds < 2:
        raise InputError(f"{folds} folds were asked for; wanted 2 or more")
    return _deal(groups, targets, np.full(folds, 1 / folds), names or {}, seed)


def holdout_by_group(
    groups: Int[np.ndarray, " n"],
    targets: Int[np.ndarray, " n"] | None = None,
    *,
    test_fraction: float = 0.2,
    names: Mapping[int, str] | None = None,
    seed: int = 42,
) -> Bool[np.ndarray, " n"]:
    """Mark about a fraction of the samples, in whole groups, for testing: True is test; each class is on both sides."""
    if not 0 < test_fraction < 1:
        raise InputError(f"test_fraction is {test_fraction}; wanted more than 0 and less than 1")
    part = _deal(groups, targets, np.array([1 - test_fraction, test_fraction]), names or {}, seed)
    test: np.ndarray = part == 1
    return test


def split_at_random(
    targets: Int[np.ndarray, " n"], *, folds: int = 5, names: Mapping[int, str] | None = None, seed: int = 42
) -> Int[np.ndarray, " n"]:
    """Deal single samples into folds, class by class; neighbours in space then stand on both sides of the split."""
    if not 2 <= folds <= len(targets):
        raise InputError(f"{len(targets)} samples cannot make {folds} folds; ask for 2 to {len(targets)} folds")
    classes, counts = np.unique(targets, return_counts=True)
    _refuse_lonely(classes[counts < 2], names or {}, "has one sample only", "label more of it")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(targets))
    order = shuffled[np.argsort(targets[shuffled], kind="stable")]
    fold = np.empty(len(targets), np.int64)
    fold[order] = np.arange(len(targets)) % folds
    return fold


def _deal(
    groups: np.ndarray, targets: np.ndarray | None, shares: np.ndarray, names: Mapping[int, str], seed: int
) -> np.ndarray:
    """Assign each sample's group to one of the parts, whose sizes are to be as `shares`."""
    present, group = np.unique(groups, return_inverse=True)
    if len(present) < len(shares):
        raise InputError(
            f"{len(groups)} samples in {len(present)} groups cannot make {len(shares)} parts; "
            "use smaller blocks, fewer folds or samples from more places"
        )
    labels = np.zeros(len(groups), np.int64) if targets is None else targets
    classes, label = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(present), len(classes)), np.int64)
    np.add.at(counts, (group, label), 1)
    _refuse_lonely(
        classes[(counts > 0).sum(0) < 2],
        names,
        "lies in one spatial block only",
        "label it in other places too, use smaller blocks",
    )
    for attempt in range(_ATTEMPTS):
        part = _greedy(counts, shares, np.random.default_rng([seed, attempt]))
        reach = np.stack([(counts[part == p] > 0).any(0) for p in range(len(shares))]).sum(0)
        if (reach >= 2).all() and len(np.unique(part)) == len(shares):
            return part[group]
    confined = ", ".join(repr(names.get(int(c), str(c))) for c in classes[reach < 2])
    raise InputError(
        f"the {len(present)} groups cannot be dealt into {len(shares)} parts with {confined or 'every class'} "
        "both learned and tested; use smaller blocks or another number of folds"
    )


def _greedy(counts: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give each group, the constraining and large ones first, to the part that it unbalances least."""
    spread = (counts > 0).sum(0)
    size = counts.sum(1)
    scarcity = np.where(counts > 0, np.minimum(spread, len(shares)), len(shares)).min(1)
    shuffled = rng.permutation(len(counts))
    order = shuffled[np.lexsort((-size[shuffled], scarcity[shuffled]))]
    # Each class weighs the same, and so does the number of samples as a whole.
    weight = np.column_stack([counts / counts.sum(0), size / size.sum()])
    filled = np.zeros((len(shares), weight.shape[1]))
    holds = np.zeros((len(shares), counts.shape[1]), bool)
    left = spread.copy()
    part = np.empty(len(counts), np.int64)
    for g in order:
        here = counts[g] > 0
        last = here & (left == 1) & (holds.sum(0) == 1)
        confines = (holds & last).sum(1)
        cost = (2 * filled @ weight[g] + weight[g] @ weight[g]) / shares
        part[g] = np.lexsort((cost, confines))[0]
        filled[part[g]] += weight[g]
        holds[part[g]] |= here
        left -= here
    return part


def _refuse_lonely(lonely: Sequence[int] | np.ndarray, names: Mapping[int, str], what: str, remedy: str) -> None:
    if len(lonely):
        listed = ", ".join(repr(names.get(int(c), str(c))) for c in lonely)
        raise InputError(f"class {listed} {what}, so it cannot be both learned and tested; {remedy}, or leave it out")
