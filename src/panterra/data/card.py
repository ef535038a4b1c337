"""What a labelled data set is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from panterra.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from panterra.sample import Batch

Task = Literal["classification", "multilabel", "segmentation", "regression"]

IGNORE = -1
"""The class of pixels without a label; where the target is a quantity, NaN."""

UNDATED = 0
"""The day (1970-01-01) of images whose date the data set does not give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSample:
    """One place with what is known about it."""

    id: str
    batch: Batch
    """B = 1."""
    target: Tensor
    """classification: int64 [1]; multilabel: float32 [1, classes] of 0 and 1; segmentation: int64 [1, H, W];
    regression: float32 [1, H, W], or [1] where a scene has one value."""
    fold: str
    """The official fold where there are folds, else the split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSet:
    """One split of a data set, read a sample at a time; torch's `DataLoader` takes it as it is."""

    card: DatasetCard
    split: str
    task: Task
    class_names: tuple[str, ...]
    """In the order of the codes; what is measured, where the target is a quantity."""
    ids: Sequence[str]
    read: Callable[[str], LabelledSample]
    files: Callable[[str], Sequence[Path]]
    """What `read` opens, without opening it."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> LabelledSample:
        return self.read(self.ids[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetCard:
    """What is known of a data set before it is opened."""

    name: str
    title: str
    opener: str
    """module:function, called with (root, split) and the card's options."""
    task: Task
    class_names: tuple[str, ...]
    splits: Mapping[str, int | None]
    """Number of samples as published; None where it is not."""
    modalities: Mapping[str, tuple[int | None, int, int]]
    """Dates, rows and columns of each; None where they vary."""
    target_shape: tuple[int, ...]
    layout: tuple[str, ...]
    """Files and folders (glob patterns) that must be there."""
    about: str
    """Units as stored, dates, and where the reader differs from the published ones."""
    licence: str | None
    """None: not established; ask the publisher before passing anything on."""
    citation: str
    shared_places: bool = False
    """Whether a place may stand in several splits, with other pixels labelled."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What an opener of several sets is told."""

    def open(self, root: str | Path, split: str, **options: Any) -> LabelledSet:
        """Open one split of a download."""
        opened: LabelledSet = self._opener()(root, split, **{**self.options, **options})
        return opened

    def takes(self, option: str) -> bool:
        """Say whether the reader knows an option."""
        return option in signature(self._opener()).parameters

    def _opener(self) -> Callable[..., LabelledSet]:
        module, function = self.opener.split(":")
        found: Callable[..., LabelledSet] = getattr(import_module(module), function)
        return found


def check_split(card: DatasetCard, split: str) -> None:
    """Refuse a split that a data set does not have."""
    if split not in card.splits:
        raise InputError(f"{card.title} has no split {split!r}; choose one of {', '.join(card.splits)}")
