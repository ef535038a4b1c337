"""Smaller embeddings: fewer bits per number, fewer numbers per vector."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from panterra.errors import InputError
from panterra.evaluate.benchmark import Role
from panterra.evaluate.quantise import (
    dequantise,
    percentile_codes,
    percentile_levels,
    percentile_values,
    quantise,
)
from panterra.evaluate.sweep import Table

_ROWS = 2**16
_SAMPLED = 2**20
"""Rows that percentiles are taken over, at most."""
Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One way to make vectors smaller; what it needs to know it learns from the training samples."""

    kind: str
    """int8, percentile (of that many bits) or pca (to that many numbers)."""
    size: int = 8


def parse_compression(text: str) -> tuple[Step, ...]:
    """Read "none", "int8", "percentile4", "pca64", or several from left to right such as "int8+pca64"."""
    if text == "none":
        return ()
    steps = []
    for word in text.split("+"):
        found = re.fullmatch(r"(int8)|(pca|percentile)(\d+)", word)
        if found is None:
            raise InputError(f"{word!r} compresses nothing; write none, int8, percentile1 to 8, pca64, or int8+pca64")
        steps.append(Step(kind="int8") if found[1] else Step(kind=found[2], size=int(found[3])))
        if steps[-1].kind == "percentile" and not 1 <= steps[-1].size <= 8:
            raise InputError(f"{word!r} came; percentile codes have 1 to 8 bits, such as percentile4")
        if steps[-1].size < 1:
            raise InputError(f"{word!r} came; a vector keeps 1 number at least, such as pca64")
    return tuple(steps)


def bytes_of(steps: tuple[Step, ...], dim: int) -> float:
    """Count the bytes that a vector of `dim` float32 takes in the end."""
    bits = 32
    for step in steps:
        # What comes after the codes are whole numbers of float32 again.
        dim, bits = (step.size, 32) if step.kind == "pca" else (dim, step.size)
    return dim * bits / 8


def compressed(tables: Mapping[Role, Table], steps: tuple[Step, ...]) -> dict[Role, Table]:
    """Compress features and bring them back, as they would be after storage; what had no data stays NaN."""
    now = dict(tables)
    for step in steps:
        change = _learn(step, now["train"].x)
        now = {role: replace(table, x=_by_rows(table.x, change)) for role, table in now.items()}
    return now


def _learn(step: Step, x: Float[Tensor, "n *grid d"]) -> Change:
    if step.kind == "int8":
        return lambda rows: dequantise(quantise(rows))
    if step.kind == "pca":
        return _principal_axes(x, step.size)
    rows = x.reshape(-1, x.shape[-1])
    thinned = rows[:: max(1, -(-len(rows) // _SAMPLED))].cpu().numpy()
    edges, midpoints = percentile_levels(thinned[np.isfinite(thinned).all(1)], step.size)
    return lambda rows: percentile_values(percentile_codes(rows, edges), midpoints)


def _principal_axes(x: Float[Tensor, "n *grid d"], size: int) -> Change:
    """Find the axes along which training vectors vary most, around their mean."""
    total, outer, count = 0.0, 0.0, 0
    for part in x.reshape(-1, x.shape[-1]).split(_ROWS):
        rows = part[part.isfinite().all(1)].double().cpu().numpy()
        total, outer, count = total + rows.sum(0), outer + rows.T @ rows, count + len(rows)
    if size > min(count, x.shape[-1]):
        raise InputError(
            f"pca{size} was asked for of {count} training vectors of width {x.shape[-1]}; ask for fewer numbers"
        )
    mean = np.asarray(total) / count
    _, axes = np.linalg.eigh(outer / count - np.outer(mean, mean))
    kept = axes[:, ::-1][:, :size]
    return lambda rows: ((rows - mean) @ kept).astype(np.float32)


def _by_rows(x: Float[Tensor, "n *grid d"], change: Change) -> Float[Tensor, "n *grid e"]:
    parts = []
    for part in x.reshape(-1, x.shape[-1]).split(_ROWS):
        rows = part.float().cpu().numpy()
        lost = ~np.isfinite(rows).all(1)
        new = change(np.where(lost[:, None], 0.0, rows))
        new[lost] = np.nan
        parts.append(torch.from_numpy(np.ascontiguousarray(new, np.float32)))
    return torch.cat(parts).reshape(*x.shape[:-1], -1).to(x.device)
