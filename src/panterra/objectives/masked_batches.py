"""Batches of a pretraining run, masked and ready for the objective (OlmoEarth)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from panterra.data.olmoearth_h5 import SYMMETRIES, PretrainingBatch, PretrainingBatches, turn_batch
from panterra.objectives.latent_mim import View, Views
from panterra.objectives.masking import make_masks


class MaskedBatches(Dataset[list[Views]]):
    """One rank's micro-batches of each step; like what they are made of, they depend on (seed, step, rank) alone."""

    def __init__(
        self,
        batches: PretrainingBatches,
        masking: Mapping[str, Any],
        *,
        micro_batch: int,
        views: int = 2,
        symmetries: bool = False,
    ) -> None:
        """Cut a rank's batch into micro-batches of at most `micro_batch` samples.

        With `symmetries` each view of a micro-batch is turned or mirrored, as in v1.
        """
        self.batches, self.masking = batches, masking
        self.micro_batch, self.views, self.symmetries = micro_batch, views, symmetries

    def __len__(self) -> int:
        """Count the steps of an epoch; steps beyond it belong to later epochs."""
        return len(self.batches)

    def __getitem__(self, step: int) -> list[Views]:
        seeds = np.random.SeedSequence([self.batches.seed, step, self.batches.rank, 1])
        generator = torch.Generator().manual_seed(int(seeds.generate_state(1)[0]))
        batch = self.batches[step]
        parts = [cut(batch, i, i + self.micro_batch) for i in range(0, len(batch), self.micro_batch)]
        return [Views(tuple(self._view(part, generator) for _ in range(self.views))) for part in parts]

    def _view(self, batch: PretrainingBatch, generator: torch.Generator) -> View:
        if self.symmetries:
            batch = turn_batch(batch, int(torch.randint(len(SYMMETRIES), (), generator=generator)))
        return View(
            inputs=batch.inputs,
            timestamps=batch.timestamps,
            masks=make_masks(batch.missing, self.masking, generator=generator),
            patch_px=batch.patch_px,
        )


def cut(batch: PretrainingBatch, start: int, stop: int) -> PretrainingBatch:
    """Take some of the samples."""
    return replace(
        batch,
        inputs={m: x[start:stop] for m, x in batch.inputs.items()},
        timestamps=batch.timestamps[start:stop],
        missing={m: x[start:stop] for m, x in batch.missing.items()},
        latlon=batch.latlon[start:stop],
    )
