"""Sub-patches in the place of patches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, Self, cast, runtime_checkable

from torch import nn

from panterra.errors import InputError
from panterra.models.features import Encoder, Features, Fitted
from panterra.models.filling import fill_up, ground_m
from panterra.sample import Batch


@runtime_checkable
class Divided(Protocol):
    """An encoder that also describes the parts of its patches."""

    @property
    def dense_dim(self) -> int:
        """E, the width of a sub-patch's vector."""
        ...

    def sub_patches_m(self, patch_m: float) -> Mapping[str, float]:
        """Give the side of the sub-patches in metres, for each modality that has them."""
        ...

    def encode(self, batch: Batch, *, patch_m: float, dense: bool | str = False) -> Features:
        """Embed a batch; `dense` adds vectors of sub-patches, of the finest ones or of the modality it names."""
        ...


def divided(encoder: Encoder) -> Divided:
    """See an encoder as one with sub-patches. Raises InputError."""
    if not isinstance(encoder, Divided):
        raise InputError(f"{encoder.name} has no sub-patch features; ask for a smaller patch_m instead")
    return encoder


def encode_sub_patches(encoder: Encoder, batch: Batch, *, patch_m: float, modality: str | None = None) -> Features:
    """Embed a batch by sub-patches: `patches` are theirs, and `valid` says where the modality has data.

    They are those of the named modality, or else of the one with the smallest. Raises InputError.
    """
    features = divided(encoder).encode(batch, patch_m=patch_m, dense=modality or True)
    dense = features.dense
    assert dense is not None, encoder.name
    rows, cols = (a // b for a, b in zip(dense.shape[1:3], features.valid.shape[1:], strict=True))
    # A sub-patch without data is all zeros.
    valid = features.valid.repeat_interleave(rows, 1).repeat_interleave(cols, 2) & (dense != 0).any(-1)
    return Features(
        patches=dense.masked_fill(~valid[..., None], 0.0),
        summary=features.summary,
        valid=valid,
        patch_m=patch_m / rows,
    )


class SubPatches(nn.Module):
    """An encoder whose patches are the sub-patches of another, so that stores and maps hold one vector for each."""

    def __init__(self, encoder: Encoder, *, patch_m: float, modality: str) -> None:
        super().__init__()
        sides = divided(encoder).sub_patches_m(patch_m)
        if modality not in sides:
            raise InputError(f"{encoder.name} has no sub-patches of {modality!r}; choose one of {', '.join(sides)}")
        self.encoder, self.patch_m, self.modality = encoder, patch_m, modality
        self.side_m = sides[modality]

    @property
    def name(self) -> str:
        return f"{self.encoder.name}, sub-patches of {self.modality} in patches of {self.patch_m:g} m"

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.encoder.modalities

    @property
    def dim(self) -> int:
        return divided(self.encoder).dense_dim

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False) -> Features:
        """Embed a batch by sub-patches of `patch_m`, after filling it up to whole patches with missing pixels."""
        if dense or not math.isclose(patch_m, self.side_m, rel_tol=1e-6):
            raise InputError(
                f"the sub-patches of {self.modality} measure {self.side_m:g} m; ask for patch_m={self.side_m:g} and no "
                "dense features"
            )
        if self.modality not in batch.observations:
            raise InputError(f"{self.name} came without {self.modality}; give it")
        whole = fill_up(batch, patch_m=self.patch_m)
        found = encode_sub_patches(self.encoder, whole, patch_m=self.patch_m, modality=self.modality)
        rows, cols = (round(side / self.side_m) for side in ground_m(batch))
        return Features(
            patches=found.patches[:, :rows, :cols],
            summary=found.summary,
            valid=found.valid[:, :rows, :cols],
            patch_m=self.side_m,
        )

    def missing_statistics(self, modalities: Iterable[str]) -> tuple[str, ...]:
        """Name the modalities that it cannot standardise yet."""
        return self.encoder.missing_statistics(modalities) if isinstance(self.encoder, Fitted) else ()

    def fit_statistics(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Fit the statistics of what occurs, in one pass over batches in declared units, and change nothing."""
        return cast(Fitted, self.encoder).fit_statistics(batches)

    def with_statistics(self, statistics: Mapping[str, Any]) -> Self:
        """Give the same encoder, sharing its weights, that standardises by these where it knew others or none."""
        encoder = cast(Encoder, cast(Fitted, self.encoder).with_statistics(statistics))
        return type(self)(encoder, patch_m=self.patch_m, modality=self.modality)

    def statistics_of(self, modality: str) -> Mapping[str, tuple[float, float]]:
        """Give mean and standard deviation of each channel by name, empty where they are not known."""
        return self.encoder.statistics_of(modality) if isinstance(self.encoder, Fitted) else {}
