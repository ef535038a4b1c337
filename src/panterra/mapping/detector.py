"""A detector, as an encoder of patches."""

from __future__ import annotations

from dataclasses import dataclass

from einops import rearrange

from panterra.finetune.model import FineTuned
from panterra.models.features import Features
from panterra.sample import Batch

NO_OBJECT = -30.0
"""A logit, and a shape that no box has: what a cell without data holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detector:
    """A fine-tuned model of objects; a patch's vector holds the scores of its cells.

    So cells may be finer than the common grid, and scores are blended where windows overlap, as features are.
    """

    model: FineTuned

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.model.modalities

    @property
    def side(self) -> int:
        """Cells along a patch."""
        return self.model.setup.cells

    @property
    def dim(self) -> int:
        return self.model.dim * self.side**2

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False) -> Features:
        assert patch_m == self.model.setup.patch_m, patch_m
        device = next(self.model.parameters()).device
        cells = self.model.encode(batch.to(device), patch_m=self.model.setup.output_m)
        # A model of sub-patches may know nothing of some cells in a patch with data.
        scores = cells.patches.masked_fill(~cells.valid[..., None], NO_OBJECT)
        patches = rearrange(scores, "b (h r) (w c) k -> b h w (r c k)", r=self.side, c=self.side)
        valid = rearrange(cells.valid, "b (h r) (w c) -> b h w (r c)", r=self.side, c=self.side).any(-1)
        return Features(patches=patches, summary=patches.mean((1, 2)), valid=valid, patch_m=patch_m)
