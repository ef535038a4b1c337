"""What is looked at while a run goes on: its loss on the same batch, what its embeddings are worth."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import nn

from panterra.errors import InputError
from panterra.evaluate.embed import embed_samples
from panterra.evaluate.probes import NEIGHBOURS, knn_scores
from panterra.modalities import MODALITIES
from panterra.objectives.latent_mim import LatentMIM, Views
from panterra.sample import Batch, Observation
from panterra.train.loop import Check

CHUNK = 32
"""Labelled samples that are embedded at once."""


def loss_check(views: Views, *, every: int) -> Check:
    """Watch the loss of a batch that stays the same."""

    @torch.no_grad()
    def run(objective: nn.Module, step: int) -> Mapping[str, float]:
        return {"loss": float(objective(views.to(next(objective.parameters()).device)).total)}

    return Check(name="watched", every=every, run=run)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Samples with a class each, some to learn from and the others to be tested on."""

    batches: tuple[Batch, ...]
    classes: Int[np.ndarray, " n"]
    train: Bool[np.ndarray, " n"]
    """False for those to be tested on."""


def read_labelled(path: str | Path) -> Labelled:
    """Read labelled samples from an .npz file.

    It holds `label` [N], `train` [N] (true or false) and, for each modality, its pixels [N, T, C, H, W] in the declared
    unit with NaN where there is no data, and its dates [N, T] as `<modality>.dates`, in days since 1970-01-01. Raises
    InputError.
    """
    try:
        with np.load(path) as file:
            held = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} cannot be read as .npz ({error}); see docs/pretraining.md for what it holds"
        ) from None
    names = [name for name in held if name in MODALITIES]
    wanted = ["label", "train", *(f"{m}.dates" for m in names)]
    absent = [name for name in wanted if name not in held]
    if absent or not names:
        raise InputError(f"{path} has no {absent[0] if absent else 'modality'}; it holds {', '.join(held)}")
    train, label = held["train"].astype(bool), held["label"]
    if train.all() or not train.any():
        raise InputError(f"{path} needs samples with train true and others with false; all are {bool(train[0])}")
    batches = []
    for start in range(0, len(label), CHUNK):
        part = slice(start, start + CHUNK)
        seen = {}
        for m in names:
            pixels = torch.from_numpy(held[m][part].astype(np.float32))
            dates = torch.from_numpy(held[f"{m}.dates"][part].astype(np.int64))
            seen[m] = Observation(pixels=pixels, dates=dates, valid=pixels.isfinite().all(2))
        batches.append(Batch(observations=seen))
    return Labelled(batches=tuple(batches), classes=np.unique(label, return_inverse=True)[1], train=train)


def knn_check(labelled: Labelled, *, every: int, patch_m: float = 40) -> Check:
    """Watch how many of the tested samples have the class that their nearest neighbours vote for."""
    train = torch.from_numpy(labelled.train)
    classes = torch.from_numpy(labelled.classes)
    neighbours = min(NEIGHBOURS, int(train.sum()))

    def run(objective: nn.Module, step: int) -> Mapping[str, float]:
        assert isinstance(objective, LatentMIM)
        encoder, device = objective.encoder, next(objective.parameters()).device
        batches = (choose(batch, encoder.modalities).to(device) for batch in labelled.batches)
        rows = torch.from_numpy(embed_samples(encoder, batches, patch_m=patch_m))
        votes = knn_scores(rows[train], F.one_hot(classes[train]).float(), rows[~train], neighbours=neighbours)
        return {"accuracy": float((votes.argmax(1) == classes[~train]).float().mean())}

    return Check(name="knn", every=every, run=run)


def choose(batch: Batch, modalities: Sequence[str]) -> Batch:
    """Leave out what a model does not look at. Raises InputError where nothing is left."""
    kept = {m: o for m, o in batch.observations.items() if m in modalities}
    if not kept:
        raise InputError(f"labelled samples of {', '.join(batch.observations)}; wanted any of {', '.join(modalities)}")
    return replace(batch, observations=kept)
