"""A labelled data set as a model gets to see it: which split does what, in which modalities, patches and units."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from panterra.data.labelled import UNDATED, LabelledSample, LabelledSet, card_of
from panterra.data.views import pass_off
from panterra.errors import InputError
from panterra.evaluate.embed import raw_band_statistics, raw_patch_statistics
from panterra.evaluate.published_statistics import Statistics, published_statistics
from panterra.evaluate.scoring import Task
from panterra.modalities import MODALITIES
from panterra.models.features import Encoder, Features, Fitted, Tokens
from panterra.models.normalize import normalize_bands
from panterra.models.pooling import instance_pool, spatial_pool
from panterra.models.weights import load_model
from panterra.sample import Batch, Observation, collate, to_days

RAW = "raw"
Role = Literal["train", "val", "test"]
Pooling = Literal["mean", "max"]
Normalisation = Literal["model", "dataset", "published"]
"""By whose statistics pixels are scaled: the model's own, those of the training samples, or published ones."""
Kind = Literal["summary", "centre", "patches", "tokens", "dense"]
ROLES: Mapping[Role, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
HELD_OUT = 0.2
"""Of the training samples, where a data set has no split to validate with."""
PATCHES_M = (40.0, 30.0, 20.0, 10.0)
"""Patch sizes that are tried, on pixels of 10 m: 4 as published (OlmoEarth), or the next that divides the samples."""
STAND_INS = {"sentinel2": "sentinel2_l2a", "sentinel1_ascending": "sentinel1"}
"""What a model is shown in place of a sensor that it does not know: level 1C for 2A, by band names (OlmoEarth)."""
ASSUMED_DAY = to_days("2020-07-01")
"""Of images whose date the data set does not give (OlmoEarth)."""
SPREAD = "norm_no_clip_2_std"
"""How a data set's own statistics normalise (OlmoEarth)."""
BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A data set's splits by what they are used for."""

    name: str
    task: Task
    class_names: tuple[str, ...]
    modalities: tuple[str, ...]
    root: Path
    splits: Mapping[Role, LabelledSet]
    contents: Mapping[Role, str]
    """A checksum of the names, sizes and times of the files behind each."""
    note: str = ""
    """What is not as published, such as a validation split of our own."""
    as_published: bool = False
    """Whether bands are filled as OlmoEarth's evaluation does, where that is not what the sensors saw."""


def open_benchmark(
    name: str, root: str | Path, *, limit: int | None = None, seed: int = 42, as_published: bool = False
) -> Benchmark:
    """Open a data set's splits; `limit` takes at most so many samples of each, drawn at random.

    A set without a test split is tested on what validates; a set without that gives up a fifth of its training samples.
    Data sets whose reader knows only one way are the same with and without `as_published`.
    """
    card = card_of(name)
    if not Path(root).is_dir():
        raise InputError(f"there is no folder {root}; give {name}=FOLDER with a download of {card.title}")
    opened: dict[Role, LabelledSet] = {}
    differs = as_published and card.takes("as_published")
    for role, names in ROLES.items():
        split = next((s for s in names if s in card.splits), None)
        if split is not None:
            opened[role] = card.open(root, split, **({"as_published": True} if differs else {}))
    notes = ["bands filled as published"] if differs else []
    if "train" not in opened:
        raise InputError(f"{card.title} has no split to learn from; known splits: {', '.join(card.splits)}")
    rng = np.random.default_rng(seed)
    if "test" not in opened and "val" in opened:
        opened["test"] = opened.pop("val")
        notes.append(f"tested on {opened['test'].split}")
    if "test" not in opened:
        raise InputError(f"{card.title} has no split to test on; known splits: {', '.join(card.splits)}")
    if "val" not in opened:
        order = rng.permutation(len(opened["train"]))
        cut = max(1, round(HELD_OUT * len(order)))
        opened["val"], opened["train"] = (_some(opened["train"], part) for part in (order[:cut], order[cut:]))
        notes.append("a fifth of the training samples validates")
    if limit is not None:
        opened = {role: _some(s, rng.permutation(len(s))[:limit]) for role, s in opened.items()}
        notes.append(f"at most {limit} samples of each split")
    for role, labelled in opened.items():
        if not len(labelled):
            raise InputError(f"{card.title} in {root} has no samples to {role}; see: panterra data verify {root}")
    train = opened["train"]
    return Benchmark(
        name=name,
        task=train.task,
        class_names=train.class_names,
        modalities=tuple(train[0].batch.observations if differs else card.modalities),
        root=Path(root),
        splits=opened,
        contents={role: _content(s, as_published=differs) for role, s in opened.items()},
        note="; ".join(notes),
        as_published=differs,
    )


def _some(labelled: LabelledSet, index: np.ndarray) -> LabelledSet:
    return replace(labelled, ids=[labelled.ids[i] for i in sorted(index.tolist())])


def _content(labelled: LabelledSet, *, as_published: bool) -> str:
    how = " as published" if as_published else ""
    digest = hashlib.sha256(f"{labelled.card.name} {labelled.split}{how}".encode())
    seen: set[Path] = set()
    for id in labelled.ids:
        digest.update(id.encode() + b"\0")
        for path in labelled.files(id):
            if path in seen:
                continue
            seen.add(path)
            about = path.stat()
            digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# What a model sees of it


@dataclass(frozen=True, slots=True, kw_only=True)
class RawStatistics:
    """Band statistics in place of an encoder: what every model has to beat."""

    by_date: bool
    """Whether patches also have each date's mean; only where all samples have as many dates."""
    modalities: tuple[str, ...]
    name: str = RAW
    dim: int = 0
    """Not known before data come: it depends on their sensors and dates."""

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False) -> Features:
        """Describe samples and patches; nothing is known of a patch where a sensor has no data."""
        if dense:
            raise InputError("band statistics have no sub-patches; ask for a smaller patch_m instead")
        placed = {m: o for m, o in batch.observations.items() if MODALITIES[m].kind in ("series", "still")}
        parts = []
        for m, o in placed.items():
            found = raw_patch_statistics(replace(batch, observations={m: o}), patch_m)
            by_band = torch.from_numpy(found).unflatten(3, (len(MODALITIES[m].bands), -1))
            parts.append((by_band if self.by_date else by_band[..., :4]).flatten(3))
        patches, summary = torch.cat(parts, dim=3), torch.from_numpy(raw_band_statistics(batch))
        return Features(patches=patches, summary=summary, valid=patches.isfinite().any(3), patch_m=patch_m)


def open_encoder(name: str, benchmark: Benchmark | None, device: str = "cpu") -> Encoder:
    """Open a model by name; "raw" gives band statistics, NAME@random:SEED an architecture with random weights."""
    if name == RAW:
        card = card_of(benchmark.name) if benchmark else None
        steady = card is not None and all(dates is not None for dates, *_ in card.modalities.values())
        return RawStatistics(by_date=steady, modalities=benchmark.modalities if benchmark else ())
    plain, _, seed = name.partition("@random:")
    if seed and not seed.isdecimal():
        raise InputError(f"{name!r} is no model; write NAME@random:SEED with a whole number, such as {plain}@random:0")
    return cast(Encoder, load_model(plain, random=int(seed) if seed else None, device=device))


def seen_by(encoder: Encoder, modalities: Sequence[str]) -> dict[str, str]:
    """Say as what an encoder is shown each modality: under its own name, or in place of one that it knows."""
    shown = {m: m for m in modalities if m in encoder.modalities}
    for m in modalities:
        stands_for = STAND_INS.get(m)
        if m not in shown and stands_for in encoder.modalities and stands_for not in shown.values():
            shown[m] = stands_for
    if not shown:
        raise InputError(
            f"{encoder.name} knows none of {', '.join(modalities)}; it takes {', '.join(encoder.modalities)}"
        )
    return shown


def show(batch: Batch, shown: Mapping[str, str]) -> Batch:
    """Give a batch as `seen_by` says; undated images get the assumed day."""
    observations = {}
    for m, name in shown.items():
        if m not in batch.observations:
            continue
        o = batch.observations[m] if name == m else pass_off(batch.observations[m], m, name)
        observations[name] = replace(o, dates=torch.where(o.dates == UNDATED, ASSUMED_DAY, o.dates))
    if not observations:
        raise InputError(f"a sample has none of {', '.join(shown)}; choose modalities that all samples have")
    return replace(batch, observations=observations)


def patch_for(batch: Batch) -> float:
    """Choose the largest patch, up to four pixels, that divides the samples."""
    sides = {
        round(n * batch.pixel_m * min(MODALITIES[m].gsd, 10) / 10, 3)
        for m, o in batch.observations.items()
        if MODALITIES[m].kind in ("series", "still")
        for n in o.pixels.shape[-2:]
    }
    for patch in (p * batch.pixel_m / 10 for p in PATCHES_M):
        if all(abs(side / patch - round(side / patch)) < 1e-6 and side >= patch for side in sides):
            return patch
    named = ", ".join(f"{s:g} m" for s in sorted(sides))
    raise InputError(f"no patch of 10 to 40 m divides samples of {named}; give --patch-m, or crop them")


def batches_of(labelled: LabelledSet, shown: Mapping[str, str]) -> Iterator[tuple[list[LabelledSample], Batch]]:
    """Read samples and collate them, as a model is shown them."""
    waiting: list[LabelledSample] = []
    for number in range(len(labelled)):
        waiting.append(labelled[number])
        if len(waiting) == BATCH or number + 1 == len(labelled):
            yield waiting, collate([show(s.batch, shown) for s in waiting])
            waiting = []


def band_statistics(batches: Iterable[Batch]) -> Statistics:
    """Give mean and standard deviation of each band over all valid pixels and dates, in one pass."""
    sums: dict[str, Tensor] = {}
    for batch in batches:
        for m, o in batch.observations.items():
            seen = (o.valid[:, :, None] & o.pixels.isfinite()).double()
            values = o.pixels.double().nan_to_num() * seen
            over = (0, 1, 3, 4)
            part = torch.stack([seen.sum(over), values.sum(over), (values * values).sum(over)])
            sums[m] = sums[m] + part if m in sums else part
    found = {}
    for m, (count, total, square) in sums.items():
        mean = total / count.clamp(min=1)
        found[m] = (mean, (square / count.clamp(min=1) - mean**2).clamp(min=0).sqrt())
    return found


def normalised(batch: Batch, statistics: Statistics, *, keep_zeros: bool = False) -> Batch:
    """Bring a batch to about 0 to 1 by a data set's own statistics, two standard deviations each way (OlmoEarth).

    With `keep_zeros` a sample's band that is 0 everywhere, as where a sensor lacks it, stays so.
    """
    observations = {}
    for m, o in batch.observations.items():
        mean, std = (part.to(o.pixels.device) for part in statistics[m])
        # A band that never changes carries nothing and is put in the middle.
        std = torch.where(std > 0, std, 1.0)
        scaled = normalize_bands(
            o.pixels.double().movedim(2, -1), SPREAD, mean=mean, std=std, low=mean, high=mean
        ).movedim(-1, 2)
        if keep_zeros:
            scaled = scaled.masked_fill((o.pixels == 0).all((1, 3, 4), keepdim=True), 0.0)
        observations[m] = Observation(pixels=scaled.float(), dates=o.dates, valid=o.valid)
    return replace(batch, observations=observations)


def normalisations(encoder: Encoder) -> tuple[Normalisation, ...]:
    """Say by whose statistics an encoder can standardise; what fits its own to the data does so always."""
    if isinstance(encoder, Fitted):
        return ("dataset",)
    return ("model", "dataset", "published") if hasattr(encoder, "normalized_input") else ("model",)


def gives_tokens(encoder: Encoder) -> bool:
    """Say whether an encoder gives one vector per patch, date and band set."""
    return "tokens" in inspect.signature(encoder.encode).parameters


def own_statistics(benchmark: Benchmark, shown: Mapping[str, str]) -> Statistics:
    """Look up the statistics that were published with a benchmark, of what a model is shown."""
    return published_statistics(benchmark.name, benchmark.root, shown, as_published=benchmark.as_published)


def fit(
    encoder: Encoder, normalisation: Normalisation, batches: Iterable[Batch], published: Statistics | None = None
) -> tuple[Encoder, Statistics | None]:
    """Fit what the normalisation needs to training samples; give the encoder to use and what to normalise by."""
    if normalisation == "model":
        return encoder, None
    if isinstance(encoder, Fitted):
        return cast(Encoder, encoder.with_statistics(encoder.fit_statistics(batches))), None
    bare: Any = copy(encoder)
    bare.normalized_input = True
    return cast(Encoder, bare), published if normalisation == "published" else band_statistics(batches)


def extract(
    encoder: Encoder, batch: Batch, kinds: Sequence[tuple[Kind, Pooling]], patch_m: float, dense: str | None = None
) -> dict[tuple[Kind, Pooling], Float[Tensor, "b *grid d"]]:
    """Encode a batch once for several kinds of features; NaN where there was no data.

    `dense` names the modality whose sub-patches are wanted, where that is not left to the encoder.
    """
    wanted: dict[str, Any] = {}
    if any(kind == "dense" for kind, _ in kinds):
        wanted["dense"] = dense or True
    if gives_tokens(encoder) and any(kind == "tokens" or pooling == "max" for kind, pooling in kinds):
        wanted["tokens"] = True
    with torch.inference_mode():
        out = encoder.encode(batch, patch_m=patch_m, **wanted)
        return {key: _choose(out, *key) for key in kinds}


def _choose(out: Features, kind: Kind, pooling: Pooling) -> Float[Tensor, "b *grid d"]:
    empty = ~out.valid.flatten(1).any(1)
    tokens = None
    if out.tokens is not None:
        # Tokens that took no part are zeros.
        seen = {m: x.any(-1) for m, x in out.tokens.items()}
        tokens = Tokens(tokens=dict(out.tokens), visible=seen, aggregated=None)
    if kind == "summary":
        if pooling == "mean":
            return out.summary.masked_fill(empty[:, None], torch.nan)
        if tokens is not None:
            return instance_pool(tokens, "max").masked_fill(empty[:, None], torch.nan)
        highest = out.patches.masked_fill(~out.valid[..., None], -torch.inf).amax((1, 2))
        return highest.masked_fill(empty[:, None], torch.nan)
    if kind == "dense":
        assert out.dense is not None
        rows, cols = (a // b for a, b in zip(out.dense.shape[1:3], out.valid.shape[1:], strict=True))
        known = out.valid.repeat_interleave(rows, 1).repeat_interleave(cols, 2)
        return out.dense.masked_fill(~known[..., None], torch.nan)
    if kind == "tokens":
        if tokens is None:
            return out.patches.masked_fill(~out.valid[..., None], torch.nan)[:, :, :, None]
        return torch.cat([_mean_over_dates(x, tokens.visible[m]) for m, x in _placed(tokens).items()], dim=3)
    patches = out.patches if pooling == "mean" or tokens is None else spatial_pool(tokens, "max")
    patches = patches.masked_fill(~out.valid[..., None], torch.nan)
    return patches if kind == "patches" else patches[:, patches.shape[1] // 2, patches.shape[2] // 2]


def _placed(tokens: Tokens) -> dict[str, Float[Tensor, "b h w t s d"]]:
    return {m: x for m, x in tokens.tokens.items() if MODALITIES[m].kind in ("series", "still")}


def _mean_over_dates(x: Float[Tensor, "b h w t s d"], seen: Tensor) -> Float[Tensor, "b h w s d"]:
    """Average over what is visible; NaN where nothing is, so that a probe does not look there."""
    return (x * seen[..., None]).sum(3) / seen.sum(3)[..., None]
