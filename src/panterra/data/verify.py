"""Whether a downloaded data set is whole, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from panterra.data.labelled import IGNORE, DatasetCard, LabelledSample, LabelledSet, card_of
from panterra.errors import InputError
from panterra.modalities import MODALITIES

if TYPE_CHECKING:
    import torch

Level = Literal["error", "warning", "ok"]

IMPLAUSIBLE = 0.05
"""Share of a modality's values outside its plausible range from which its unit is in doubt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: how it stands."""

    level: Level
    what: str


def verify(name: str, path: str | Path, *, samples: int = 8) -> list[Finding]:
    """Check a download: layout, splits, counts, that all files are there, and some samples of each split opened.

    Worst first.
    """
    card, root = card_of(name), Path(path)
    if not root.is_dir():
        raise InputError(f"there is no folder {root}; give the one that holds {card.title}")
    findings = list(_layout(card, root))
    opened: dict[str, LabelledSet] = {}
    for split in card.splits:
        try:
            opened[split] = card.open(root, split)
        except (InputError, OSError, KeyError, ValueError) as error:
            findings.append(Finding(level="error", what=f"{split} cannot be opened: {_reason(error)}"))
    for split, labelled in opened.items():
        findings += [_count(card, split, len(labelled)), *_absent(labelled), *_examine(labelled, samples)]
    findings += _overlap(card, opened)
    order: list[Level] = ["error", "warning", "ok"]
    return sorted(findings, key=lambda finding: order.index(finding.level))


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def missing_layout(card: DatasetCard, root: Path) -> list[str]:
    """List the files and folders that a download lacks."""
    return [pattern for pattern in card.layout if next(root.glob(pattern), None) is None]


def _layout(card: DatasetCard, root: Path) -> Iterator[Finding]:
    missing = missing_layout(card, root)
    for pattern in missing:
        yield Finding(level="error", what=f"{pattern} is missing; {card.title} has it at the top of its folder")
    if not missing:
        yield Finding(level="ok", what=f"all {len(card.layout)} parts of the layout are there")


def _count(card: DatasetCard, split: str, found: int) -> Finding:
    wanted = card.splits[split]
    if found == 0:
        return Finding(level="error", what=f"{split} lists no samples")
    if wanted is None or found == wanted:
        known = "as published" if wanted else "the published number is not known here"
        return Finding(level="ok", what=f"{split} lists {found:,} samples, {known}")
    difference = f"{wanted - found:,} are missing" if found < wanted else f"{found - wanted:,} too many"
    return Finding(level="warning", what=f"{split} lists {found:,} of {wanted:,} samples: {difference}")


def _absent(labelled: LabelledSet) -> Iterator[Finding]:
    absent = [file for id in labelled.ids if (file := _first_absent(labelled.files(id))) is not None]
    if absent:
        number = f"{len(absent):,} of {len(labelled):,} samples"
        yield Finding(level="error", what=f"{labelled.split}: {number} lack files, such as {absent[0]}")


def _first_absent(files: Sequence[Path]) -> Path | None:
    return next((file for file in files if not file.is_file()), None)


def _examine(labelled: LabelledSet, samples: int) -> Iterator[Finding]:
    """Open samples that lie evenly in a split; name each kind of trouble once, by the first sample that has it."""
    chosen = sorted({round(i * (len(labelled) - 1) / max(samples - 1, 1)) for i in range(min(samples, len(labelled)))})
    troubles: dict[str, str] = {}
    for index in chosen:
        id = labelled.ids[index]
        try:
            found = dict(_troubles(labelled, labelled[index]))
        except (InputError, OSError, KeyError, ValueError) as error:
            found = {"unreadable": f"cannot be read: {_reason(error)}"}
        for kind, what in found.items():
            troubles.setdefault(kind, f"{labelled.split}: sample {id} {what}")
    for kind, what in troubles.items():
        yield Finding(level="error" if kind == "unreadable" else "warning", what=what)
    if chosen and not troubles:
        opened = f"{len(chosen)} samples were" if len(chosen) > 1 else "1 sample was"
        yield Finding(level="ok", what=f"{labelled.split}: {opened} opened and found in order")


def _troubles(labelled: LabelledSet, sample: LabelledSample) -> Iterator[tuple[str, str]]:
    card = labelled.card
    for name, wanted in card.modalities.items():
        observation = sample.batch.observations.get(name)
        if observation is None:
            yield f"absent {name}", f"has no {name}"
            continue
        dates, _, *size = observation.pixels.shape[1:]
        if any(w is not None and w != g for w, g in zip(wanted, (dates, *size), strict=True)):
            shape = " x ".join("any" if w is None else str(w) for w in wanted)
            yield (
                f"shape {name}",
                f"has {name} of {dates} x {size[0]} x {size[1]} (dates, rows, columns); wanted {shape}",
            )
        yield from _values(name, observation.pixels[0], observation.valid[0])
    yield from _target(labelled, sample.target)


def _values(name: str, pixels: torch.Tensor, valid: torch.Tensor) -> Iterator[tuple[str, str]]:
    seen = pixels.transpose(0, 1)[:, valid]
    if seen.numel() == 0:
        yield f"empty {name}", f"has no valid pixel of {name}"
        return
    spec = MODALITIES[name]
    if spec.plausible is None:
        return
    low, high = spec.plausible
    outside = float(((seen < low) | (seen > high)).float().mean())
    if outside > IMPLAUSIBLE:
        span = f"{float(seen.min()):.4g} to {float(seen.max()):.4g}"
        yield (
            f"range {name}",
            f"has {name} from {span}, {outside:.0%} of it outside the plausible {low:g} to {high:g} ({spec.unit}): "
            "the unit may be another",
        )


def _target(labelled: LabelledSet, target: torch.Tensor) -> Iterator[tuple[str, str]]:
    classes = len(labelled.class_names)
    if labelled.task == labelled.card.task and tuple(target.shape[1:]) != labelled.card.target_shape:
        yield "target", f"has a target of shape {list(target.shape[1:])}; wanted {list(labelled.card.target_shape)}"
    if labelled.task in ("classification", "segmentation"):
        strange = target[(target != IGNORE) & ((target < 0) | (target >= classes))]
        if strange.numel():
            yield "codes", f"has class codes such as {int(strange[0])}; there are {classes} classes"
    if labelled.task == "regression" and bool((target < 0).any()):
        yield "codes", f"has a {labelled.class_names[0]} of {float(target[target < 0].min()):.4g}"


def _overlap(card: DatasetCard, opened: Mapping[str, LabelledSet]) -> Iterator[Finding]:
    """Look for samples that stand in several splits."""
    seen: dict[str, str] = {}
    placed = ((id, split) for split, labelled in opened.items() for id in labelled.ids)
    shared = [(id, seen[id], split) for id, split in placed if seen.setdefault(id, split) != split]
    if shared and not card.shared_places:
        id, one, other = shared[0]
        yield Finding(
            level="warning", what=f"{len(shared):,} samples are in two splits, such as {id} in {one} and {other}"
        )
