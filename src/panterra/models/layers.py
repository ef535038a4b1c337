"""The transformer block, once as mathematics and once in place for inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from panterra.models.positions import rotate, rotate_

ROWS = 1024
"""Tokens whose intermediate values stay in the cache together during inference."""


class Attention(nn.Module):
    """Multi-head self-attention with one matrix product for queries, keys and values."""

    def __init__(self, dim: int, heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim // heads) if qk_norm else None
        self.k_norm = nn.LayerNorm(dim // heads) if qk_norm else None

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        *,
        turn: Tensor | None = None,
        visible: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        qkv: Tensor = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.stack([self.q_norm(qk[:, :, 0]), self.k_norm(qk[:, :, 1])], dim=2)
        if turn is not None:
            qk = rotate(qk, turn)
        out: Tensor = self.proj(attend(qk[:, :, 0], qk[:, :, 1], v, visible=visible).flatten(2))
        return out

    def update(
        self,
        x: Float[Tensor, "b n d"],
        norm: nn.LayerNorm,
        *,
        turn: Tensor | None = None,
        visible: Bool[Tensor, "b m"] | None = None,
    ) -> None:
        """Add attention over `norm(x)` to `x` in place."""
        weight, bias = self.qkv.weight.mT, self.qkv.bias
        qkv = x.new_empty(*x.shape[:2], len(bias))
        for part, out in zip(x.flatten(0, 1).split(ROWS), qkv.flatten(0, 1).split(ROWS), strict=True):
            torch.addmm(bias, norm(part), weight, out=out)
        parts = qkv.unflatten(-1, (3, self.heads, -1))
        qk, v = parts[:, :, :2], parts[:, :, 2]
        if self.q_norm is not None and self.k_norm is not None:
            qk[:, :, 0], qk[:, :, 1] = self.q_norm(qk[:, :, 0]), self.k_norm(qk[:, :, 1])
        if turn is not None:
            qk = rotate_(qk, turn)
        mixed = attend(qk[:, :, 0], qk[:, :, 1], v, visible=visible).flatten(2).flatten(0, 1)
        for part, seen in zip(x.flatten(0, 1).split(ROWS), mixed.split(ROWS), strict=True):
            part.add_(self.proj.bias).addmm_(seen, self.proj.weight.mT)


def attend(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b m h d"],
    v: Float[Tensor, "b m h d"],
    *,
    visible: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b n h d"]:
    """Softmax attention in which `visible` marks the keys that a query may look at."""
    mask = None if visible is None else visible[:, None, None, :]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out

    def update(self, x: Float[Tensor, "b n d"], norm: nn.LayerNorm) -> None:
        """Add the MLP of `norm(x)` to `x` in place."""
        for part in x.flatten(0, 1).split(ROWS):
            hidden = torch.addmm(self.fc1.bias, norm(part), self.fc1.weight.mT)
            torch.ops.aten.gelu_(hidden)
            part.add_(self.fc2.bias).addmm_(hidden, self.fc2.weight.mT)


class Block(nn.Module):
    """A pre-norm transformer block: x + attention, then x + MLP, each dropped per sample at `drop_path` in training."""

    def __init__(self, dim: int, heads: int, hidden: int, *, qk_norm: bool = False, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden)
        self.drop_path = drop_path

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        *,
        turn: Tensor | None = None,
        visible: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        mixed = self.attn(self.norm1(x), turn=turn, visible=visible)
        x = x + drop_path(mixed, self.drop_path, training=self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, training=self.training)

    def update(
        self,
        x: Float[Tensor, "b n d"],
        *,
        turn: Tensor | None = None,
        visible: Bool[Tensor, "b n"] | None = None,
    ) -> None:
        """Do what `forward` does outside training, to a contiguous `x` in place: faster, and in half the memory."""
        self.attn.update(x, self.norm1, turn=turn, visible=visible)
        self.mlp.update(x, self.norm2)


def drop_path(x: Float[Tensor, "b n d"], rate: float, *, training: bool) -> Float[Tensor, "b n d"]:
    """Zero whole samples at `rate` in training and scale the others up to keep the mean."""
    if not training or rate == 0:
        return x
    keep = 1 - rate
    return x * (x.new_empty(len(x), 1, 1).bernoulli_(keep) / keep)
