"""Map decoding: an encoder learns to tell what covers the ground, and keeps what it saw.

Linear layers on its embeddings say what share of a patch each kind of surface has, how high things stand there and
how the ground lies: from the mean of all tokens of the patch, from each token alone and, for the shares, from the mean
of the whole sample. Others say what each token saw itself (mean and contrast of every band in the patch) and how the
bands of the sample vary, so that nothing that raw band statistics hold is lost on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from panterra.modalities import MODALITIES
from panterra.models.olmoearth import OlmoEarth
from panterra.objectives.teacher import follow

SHAPE_SHARE = 0.1
"""Of heights and slopes in the loss of a patch."""
METRES = 8.0
"""Heights are told in units of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapViews:
    """Images of some places and what is there, patch by patch."""

    inputs: Mapping[str, Float[Tensor, "b t _c y x"]]
    """Normalised pixels of each modality, all on the same dates."""
    timestamps: Int[Tensor, "b t 3"]
    """Day 1-31, month 0-11, year."""
    patch_px: int
    shares: Float[Tensor, "b h w k"]
    """Of each kind of surface in a patch."""
    height: Float[Tensor, "b h w"]
    """Of what stands on the ground, in metres."""
    relief: Float[Tensor, "b h w"]
    """Of the ground above its mean in the sample, in metres."""

    @property
    def samples(self) -> int:
        """Count the samples."""
        return len(self.shares)

    def to(self, device: torch.device | str) -> Self:
        """Move everything to a device."""
        return replace(
            self,
            inputs={m: x.to(device) for m, x in self.inputs.items()},
            timestamps=self.timestamps.to(device),
            shares=self.shares.to(device),
            height=self.height.to(device),
            relief=self.relief.to(device),
        )


class Decoded(NamedTuple):
    """What a pass gave."""

    total: Tensor
    terms: dict[str, Tensor]


class MapDecoding(nn.Module):
    """An encoder with the linear layers that its embeddings are read by; these are thrown away afterwards."""

    def __init__(self, encoder: OlmoEarth, *, kinds: int) -> None:
        super().__init__()
        self.encoder, self.kinds, dim = encoder, kinds, encoder.dim
        self.averaged = deepcopy(encoder).requires_grad_(False)
        """What the encoder was over many steps, see `average`; nothing is learned from it."""
        bands = {m: len(MODALITIES[m].bands) for m in encoder.modalities}
        self.patch, self.token = nn.Linear(dim, kinds + 2), nn.Linear(dim, kinds + 2)
        self.sample = nn.Linear(dim, kinds)
        self.look = nn.ModuleDict({m: nn.Linear(dim, 2 * c) for m, c in bands.items()})
        self.variety = nn.ModuleDict({m: nn.Linear(dim, 3 * c) for m, c in bands.items()})

    def average(self, step: int, window: int) -> None:
        """Take the encoder into the average, which starts with step 0: of all steps, then mostly of the last `window`.

        Averaged weights do better away from what was trained on (Cha et al. 2021).
        """
        if step >= 0:
            follow(self.averaged, self.encoder, min(step / (step + 1), 1 - 1 / window))

    def forward(self, views: MapViews, generator: torch.Generator | None = None) -> Decoded:
        """Give the loss: patch + token / 2 + sample / 2 + look. Nothing in it is random."""
        seen = self.encoder(views.inputs, views.timestamps, patch_px=views.patch_px).tokens
        tokens = torch.cat([x.flatten(3, 4) for x in seen.values()], dim=3)
        patches = tokens.mean(3)
        whole = patches.mean((1, 2))
        looks = []
        for m, x in seen.items():
            near, far = describe(views.inputs[m], views.patch_px)
            looks.append(F.smooth_l1_loss(self.look[m](x[..., 0, :]), near))
            looks.append(F.smooth_l1_loss(self.variety[m](whole), far))
        terms = {
            "patch": self._decode(self.patch(patches), views),
            "token": self._decode(self.token(tokens), views),
            "sample": cross_entropy(self.sample(whole), views.shares.mean((1, 2))),
            "look": torch.stack(looks).sum() / len(seen),
        }
        total = terms["patch"] + 0.5 * terms["token"] + 0.5 * terms["sample"] + terms["look"]
        return Decoded(total, {name: term.detach() for name, term in terms.items()})

    def _decode(self, answers: Float[Tensor, "b h w *n k2"], views: MapViews) -> Tensor:
        relief, height, shares = views.relief / METRES, views.height / METRES, views.shares
        if answers.ndim > shares.ndim:
            relief, height, shares = relief[..., None], height[..., None], shares[..., None, :]
        rest = sum(
            F.smooth_l1_loss(answers[..., self.kinds + i], wanted.expand(answers.shape[:-1]))
            for i, wanted in enumerate((relief, height))
        )
        return cross_entropy(answers[..., : self.kinds], shares) + SHAPE_SHARE * rest


def cross_entropy(answers: Float[Tensor, "*b k"], shares: Float[Tensor, "*#b k"]) -> Tensor:
    """Compare answers with shares that add up to 1."""
    return -(shares * answers.log_softmax(-1)).sum(-1).mean()


def describe(
    pixels: Float[Tensor, "b t c y x"], patch_px: int
) -> tuple[Float[Tensor, "b h w t c2"], Float[Tensor, "b c3"]]:
    """Say how images look, in numbers of about unit size where pixels are normalised as OlmoEarth's.

    Of each patch and date every band's mean and the logarithm of its standard deviation; of each sample every band's
    mean, the logarithm of its standard deviation over pixels and dates, and that of the means of patches.
    """
    rows, columns = (side // patch_px for side in pixels.shape[3:])
    cut = pixels.unflatten(4, (columns, patch_px)).unflatten(3, (rows, patch_px))
    mean = cut.mean((4, 6))
    contrast = (cut - mean[:, :, :, :, None, :, None]).square().mean((4, 6)).add(1e-6).sqrt()
    near = torch.cat([(mean - 0.5) * 4, (contrast.log() + 4) * 0.7], dim=2).permute(0, 3, 4, 1, 2)
    bands = pixels.transpose(1, 2).flatten(2)
    spread, between = bands.std(2), mean.std((1, 3, 4))
    far = [(bands.mean(2) - 0.5) * 4, spread.add(1e-3).log() + 3, between.add(1e-3).log() + 3.5]
    return near, torch.cat(far, dim=1)
