"""A probe that learns which of a sample's vectors to look at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from panterra.evaluate.readout import Readout

HEAD = 64
"""Width of a head; narrower features have one head."""
START_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One learned query attends over keys and values of the vectors, a linear layer reads the result (OlmoEarth).

    Every member of a sweep is computed in the same products. A key is met by one query only, so that query and keys
    join to one vector per head, and values are made from the weighted mean of the vectors.
    """

    dim: int
    width: int
    """Outputs."""

    @property
    def heads(self) -> int:
        """Heads of 64, as many as the width divides into."""
        return self.dim // HEAD if self.dim % HEAD == 0 else 1

    def start(self, generator: torch.Generator) -> Float[Tensor, " p"]:
        """Draw query, keys and values from a truncated normal; the linear layer as torch does."""
        d, bound = self.dim, 1 / math.sqrt(self.dim)
        drawn = torch.empty(d + 2 * d * d)
        torch.nn.init.trunc_normal_(drawn, std=START_STD, generator=generator)
        linear = torch.empty(self.width * (d + 1)).uniform_(-bound, bound, generator=generator)
        return torch.cat([drawn, torch.zeros(2 * d), linear])

    def outputs(
        self, theta: Float[Tensor, "m p"], x: Float[Tensor, "b h w t d"], readout: Readout
    ) -> Float[Tensor, "m o n"]:
        """Read every cell; vectors of NaN are not looked at."""
        del readout
        d, heads = self.dim, self.heads
        sizes = (d, d * d, d * d, d, d, self.width * d, self.width)
        query, key, value, key_bias, value_bias, weight, bias = theta.split(sizes, dim=1)
        # A bias of the keys adds the same to every vector, which softmax does not see.
        del key_bias
        rows = x.flatten(0, 2)
        lost = rows.isnan().any(-1)
        rows = rows.masked_fill(lost[..., None], 0.0)
        # [m, heads, head, d]
        keys, values = (part.unflatten(1, (heads, d // heads, d)) for part in (key, value))
        wanted = torch.einsum("mhc,mhcd->mhd", query.unflatten(1, (heads, -1)), keys) / math.sqrt(d // heads)
        score = torch.einsum("ntd,mhd->nmht", rows, wanted)
        share = score.masked_fill((lost & ~lost.all(1, keepdim=True))[:, None, None], -torch.inf).softmax(-1)
        mean = torch.einsum("nmht,ntd->nmhd", share, rows)
        pooled = torch.einsum("nmhd,mhcd->nmhc", mean, values).flatten(2) + value_bias
        out: Tensor = torch.einsum("nmd,mod->mon", pooled, weight.unflatten(1, (self.width, d))) + bias[..., None]
        return out

    def gradient(
        self, theta: Float[Tensor, "m p"], x: Float[Tensor, "b h w t d"], y: Tensor, readout: Readout
    ) -> Float[Tensor, "m p"]:
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            raw = self.outputs(leaf, x, readout)
        change = readout.residual(raw.detach(), readout.aim(y, x.shape[:3], readout.share(y).to(raw.dtype)))
        (gradient,) = torch.autograd.grad(raw, leaf, change)
        return gradient

    def frozen(self) -> Attention:
        return self
