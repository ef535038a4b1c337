"""What a student's predictions are compared with: patch embeddings that it cannot change."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from panterra.models.olmoearth import OlmoEarth, Patches, embed_chosen, embed_patches


class Teacher(nn.Module):
    """A frozen copy of an encoder's patch embeddings, and of its output projection where it has one.

    The published teacher copies the whole encoder but returns what its patch embeddings give, so these
    are all it needs.
    """

    def __init__(self, student: OlmoEarth) -> None:
        super().__init__()
        self.patch_embeddings = deepcopy(student.patch_embeddings)
        self.output = deepcopy(student.output)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(
        self, inputs: Mapping[str, Float[Tensor, "b _t _c _y _x"]], patch_px: int
    ) -> dict[str, Float[Tensor, "b _h _w _t _s e"]]:
        """Embed normalised pixels; what is missing gets some embedding too, which no loss looks at."""
        tokens = embed_patches(self.patch_embeddings, inputs, patch_px)
        return tokens if self.output is None else {m: self.output(x) for m, x in tokens.items()}

    @torch.no_grad()
    def embed_chosen(
        self, patches: Patches, chosen: Mapping[str, Bool[Tensor, "b _h _w _t _s"]]
    ) -> Float[Tensor, "n e"]:
        """Embed some patches alone, see `olmoearth.embed_chosen`."""
        tokens = embed_chosen(self.patch_embeddings, patches, chosen)
        return tokens if self.output is None else self.output(tokens)


def fresh_teacher(student: OlmoEarth, *, seed: int) -> Teacher:
    """Make a teacher with random weights of its own, the ablation "re-initialised targets"."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Teacher(OlmoEarth(student.config)).to(next(student.parameters()).device)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher towards the student's parameters of the same names by an exponential moving average."""
    if momentum == 1.0:
        return
    weights = dict(student.named_parameters())
    for name, weight in teacher.named_parameters():
        weight.lerp_(weights[name].to(weight.dtype), 1 - momentum)


def momentum_at(step: int, steps: int, *, start: float, end: float) -> float:
    """Give the momentum that moves linearly from `start` to `end` over a run."""
    return start + step * (end - start) / steps
