"""Tokens of several samples in one row, however many each has: nothing is padded where nothing needs to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Which tokens stand in a row, sample after sample."""

    sample: Int[Tensor, " n"]
    token: Int[Tensor, " n"]
    """Its number among all tokens of its sample."""
    lengths: tuple[int, ...]
    """How many each sample has in the row."""
    padded: Int[Tensor, "b k"]
    """The row's places, laid out by sample; beyond a sample's tokens they are any."""
    valid: Bool[Tensor, "b k"]
    """False beyond a sample's tokens."""

    @classmethod
    def of(cls, wanted: Bool[Tensor, "b n"]) -> Packed:
        """Take the tokens that are marked, in their order."""
        return cls.build(*wanted.nonzero(as_tuple=True), samples=len(wanted))

    @classmethod
    def build(cls, sample: Int[Tensor, " n"], token: Int[Tensor, " n"], *, samples: int) -> Packed:
        """Describe a row whose samples are in order."""
        count = torch.bincount(sample, minlength=samples)
        lengths = tuple(count.tolist())
        place = torch.arange(max(lengths, default=0), device=sample.device)
        padded = (count.cumsum(0) - count)[:, None] + place
        return cls(
            sample=sample,
            token=token,
            lengths=lengths,
            padded=padded.clamp(max=max(len(sample) - 1, 0)),
            valid=place < count[:, None],
        )

    def part(self, start: int, stop: int) -> tuple[slice, Packed]:
        """Take some of the samples; the slice is that of their tokens."""
        first = sum(self.lengths[:start])
        rows = slice(first, first + sum(self.lengths[start:stop]))
        return rows, Packed.build(self.sample[rows] - start, self.token[rows], samples=stop - start)

    def pad(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "b k ..."]:
        """Lay a row out by sample."""
        out: Tensor = x.index_select(0, self.padded.flatten()).unflatten(0, self.padded.shape)
        return out

    def mean(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
        """Average each sample's tokens; zero where it has none."""
        return torch.where(self.valid[..., None], self.pad(x), 0.0).sum(1) / self.valid.sum(1, keepdim=True).clamp(
            min=1
        )
