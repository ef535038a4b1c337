"""What of a tile the student sees and what it predicts: patches, modalities, dates (AnySat).

Patches are numbered row after row. All is drawn from the given generators alone, on the CPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from panterra.errors import InputError

FAILURES_BEFORE_RELAXING = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchMasks:
    """Which patches of each sample are the context and which are to be predicted from it."""

    context: Int[Tensor, "b k"]
    targets: Int[Tensor, "s b n"]
    """Several sets, each predicted by itself; they may overlap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dates:
    """Which dates of each sample the student sees."""

    index: Int[Tensor, "b n"]
    valid: Bool[Tensor, "b n"] | None = None
    """False for what fills up samples with fewer dates; None where none has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A block's sides in patches."""

    rows: int
    cols: int


class Masking(Protocol):
    """A way to draw patch masks for the tiles of a batch, which all have `grid` x `grid` patches."""

    def __call__(self, grid: int, batch: int, *, sizes: Generator, places: Generator) -> PatchMasks:
        """Draw sizes that the batch shares from one generator, and each sample's places from the other."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMasking:
    """Predict large blocks from what they leave of a larger one, as published.

    Context lists are cut to the batch's shortest, its first patches staying: large batches leave very short contexts.
    """

    context_area: tuple[float, float] = (0.85, 1.0)
    """Lowest and highest share of the grid."""
    target_area: tuple[float, float] = (0.2, 0.8)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    """Lowest and highest rows / cols; the context block is a square."""
    target_blocks: int = 4

    def __call__(self, grid: int, batch: int, *, sizes: Generator, places: Generator) -> PatchMasks:
        """Draw masks; block sizes are those of the whole batch."""
        target, context = self.sizes(grid, sizes)
        block, corners, seen = _bits(grid, target), [], np.empty((batch, grid * grid), bool)
        for i in range(batch):
            corners.append(_places(grid, target, self.target_blocks, places))
            hidden = [block << corner for corner in corners[i]]
            seen[i] = _cells(_context(grid, context, hidden, places), grid)
        shortest = int(seen.sum(1).min())
        first = np.argsort(~seen, axis=1, kind="stable")[:, :shortest]
        inside = torch.arange(target.rows)[:, None] * grid + torch.arange(target.cols)
        return PatchMasks(
            context=torch.from_numpy(np.ascontiguousarray(first)),
            targets=torch.tensor(corners).T[..., None] + inside.flatten(),
        )

    def sizes(self, grid: int, generator: Generator) -> tuple[Size, Size]:
        """Draw the sizes of target and context blocks; area and aspect follow from one random number each."""
        if grid < 2:
            raise InputError(f"a tile of {grid} x {grid} patches cannot be masked; use larger tiles or lower scales")
        return (
            _size(grid, self.target_area, self.target_aspect, generator),
            _size(grid, self.context_area, (1.0, 1.0), generator),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NaiveMasking:
    """Predict random patches from other random patches, the published ablation; the two may overlap."""

    context_share: float = 0.2

    def __call__(self, grid: int, batch: int, *, sizes: Generator, places: Generator) -> PatchMasks:
        """Draw one set of targets; `sizes` stays unused."""
        number = int(self.context_share * grid * grid)
        if number < 1:
            raise InputError(f"a share of {self.context_share} leaves no context of {grid} x {grid} patches; raise it")
        orders = torch.stack([torch.randperm(grid * grid, generator=places) for _ in range(2 * batch)])
        return PatchMasks(context=orders[::2, :number].contiguous(), targets=orders[None, 1::2, number:].contiguous())


def _size(grid: int, area: tuple[float, float], aspect: tuple[float, float], generator: Generator) -> Size:
    """Draw a block's size; one number decides on area and aspect, so large blocks are high (AnySat)."""
    share = float(torch.rand(1, generator=generator))
    cells = int(grid * grid * (area[0] + share * (area[1] - area[0])))
    ratio = aspect[0] + share * (aspect[1] - aspect[0])
    rows, cols = round(math.sqrt(cells * ratio)), round(math.sqrt(cells / ratio))
    return Size(rows=min(max(rows, 1), grid - 1), cols=min(max(cols, 1), grid - 1))


def _places(grid: int, size: Size, number: int, generator: Generator) -> list[int]:
    """Draw where blocks' first patches lie, each one's row and then its column."""
    rows, cols = grid - size.rows + 1, grid - size.cols + 1
    # The generator takes remainders; one by the product has those by both counts in it, so that one call draws all.
    drawn = torch.randint(rows * cols, (number, 2), generator=generator).tolist()
    return [row % rows * grid + col % cols for row, col in drawn]


# A set of patches is an integer, its bit i saying whether patch i is in: the retries below cost next to nothing.


def _bits(grid: int, size: Size) -> int:
    """Mark the patches of a block that lies in the first corner."""
    row = (1 << size.cols) - 1
    return sum(row << (r * grid) for r in range(size.rows))


def _context(grid: int, size: Size, targets: Sequence[int], generator: Generator) -> int:
    """Place the context block until the targets leave something of it; after many failures heed one target less."""
    block = _bits(grid, size)
    for failures in itertools.count():
        heeded = max(0, len(targets) - failures // FAILURES_BEFORE_RELAXING)
        context = block << _places(grid, size, 1, generator)[0]
        for target in targets[:heeded]:
            context &= ~target
        if context:
            return context
    raise AssertionError


def _cells(bits: int, grid: int) -> Bool[np.ndarray, " n"]:
    count = grid * grid
    raw = np.frombuffer(bits.to_bytes(-(-count // 8), "little"), np.uint8)
    return np.unpackbits(raw, count=count, bitorder="little").astype(bool)


def keep_tokens(
    modality: Int[Tensor, "b k"], noise: Float[Tensor, "b n"], *, dropped: float = 0.5
) -> Bool[Tensor, "b n"]:
    """Say which of the context's tokens, modality after modality, the student sees.

    At each position the given modality stays. Of the other tokens stay those with the least noise, all but the share
    `dropped`.
    """
    batch, positions = modality.shape
    modalities = noise.shape[1] // positions
    chosen = (torch.arange(modalities, device=modality.device)[:, None] == modality[:, None, :]).flatten(1)
    others = int(positions * (modalities - 1) * (1 - dropped))
    # The noise lies below 1, so the chosen come last.
    order = noise.masked_fill(chosen, 1.0).argsort(dim=1)
    return chosen.scatter(1, order[:, :others], torch.ones(batch, others, dtype=torch.bool, device=chosen.device))


def draw_tokens(
    modalities: int, positions: int, batch: int, generator: Generator, *, dropped: float = 0.5
) -> Bool[Tensor, "b n"]:
    """Draw which of the context's tokens stay: at each position one modality, and some of the others."""
    modality = torch.randint(modalities, (batch, positions), generator=generator)
    noise = torch.rand(batch, modalities * positions, generator=generator)
    return keep_tokens(modality, noise, dropped=dropped)


def leave_one(kept: Bool[Tensor, "b n"], modalities: int, generator: Generator, *, share: float) -> Bool[Tensor, "b n"]:
    """Of this share of samples, drawn one by one, keep the tokens of one modality, all of them, and no others."""
    batch, tokens = kept.shape
    alone = torch.rand(batch, 1, generator=generator) < share
    modality = torch.randint(modalities, (batch, 1), generator=generator)
    return torch.where(alone, torch.arange(tokens) // (tokens // modalities) == modality, kept)


def draw_dates(present: Bool[Tensor, "b t"], generator: Generator, *, dropped: float = 0.5) -> Dates:
    """Draw which of each sample's present dates stay, in random order; at least one, of any if none is present."""
    counts = (present.sum(1) * (1 - dropped)).long().clamp(min=1)
    order = torch.rand(present.shape, generator=generator).masked_fill(~present, 2.0).argsort(dim=1)
    valid = torch.arange(int(counts.max())) < counts[:, None]
    return Dates(index=order[:, : valid.shape[1]].contiguous(), valid=None if bool(valid.all()) else valid)


def draw_scale(scales: Sequence[int], generator: Generator) -> int:
    """Draw one of the sides that patches may have."""
    return scales[int(torch.randint(len(scales), (1,), generator=generator))]
