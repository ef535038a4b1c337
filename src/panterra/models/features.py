"""What a model returns, whatever its family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from panterra.sample import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Embeddings of B samples on a grid of H' x W' patches."""

    patches: Float[Tensor, "b h w d"]
    """One vector per patch, rows from the north; zeros where `valid` is False."""
    summary: Float[Tensor, "b d"]
    """One vector per sample; zeros for a sample without any data."""
    valid: Bool[Tensor, "b h w"]
    """True where at least one date of one modality was data in the patch."""
    patch_m: float
    """Side of a patch on the ground, in metres."""
    dense: Float[Tensor, "b y x e"] | None = None
    """One vector per sub-patch, for families that have them and when asked for."""
    tokens: Mapping[str, Float[Tensor, "b h w t s d"]] | None = None
    """One vector per patch, date and band set of each modality, when asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a transformer gives back for each modality, in the layout patches, dates, band sets."""

    tokens: dict[str, Float[Tensor, "b _h _w _t _s d"]]
    visible: dict[str, Bool[Tensor, "b _h _w _t _s"]]
    """False where a token took no part; its embedding means nothing then."""
    aggregated: Float[Tensor, "b d"] | None
    """The projected mean of the visible tokens, which pretraining contrasts, where it was computed."""


@runtime_checkable
class Encoder(Protocol):
    """All that evaluation, fine-tuning, mapping and the studio know of a model."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it was trained to look at, in order of preference."""
        ...

    @property
    def dim(self) -> int:
        """D, the width of its embeddings."""
        ...

    @property
    def name(self) -> str:
        """Where it came from: a released name or a folder."""
        ...

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False) -> Features:
        """Embed a batch in declared units at the given patch size in metres."""
        ...


@runtime_checkable
class Fitted(Protocol):
    """An encoder that standardises by statistics of the data it is used on.

    They are fitted once and kept with whatever is trained on top. Between encoder and disk they are plain JSON, which
    nobody but the encoder looks into.
    """

    def missing_statistics(self, modalities: Iterable[str]) -> tuple[str, ...]:
        """Name the modalities that it cannot standardise yet."""
        ...

    def fit_statistics(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Fit the statistics of what occurs, in one pass over batches in declared units, and change nothing."""
        ...

    def with_statistics(self, statistics: Mapping[str, Any]) -> Self:
        """Give the same encoder, sharing its weights, that standardises by these where it knew others or none."""
        ...

    def statistics_of(self, modality: str) -> Mapping[str, tuple[float, float]]:
        """Give mean and standard deviation of each channel by name, empty where they are not known."""
        ...
