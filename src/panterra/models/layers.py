"""The transformer block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from panterra.models.positions import rotate


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
        x = x + self._drop(self.attn(self.norm1(x), turn=turn, visible=visible))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        kept = torch.empty(len(x), 1, 1, device=x.device, dtype=x.dtype).bernoulli_(keep)
        return x * (kept / keep)
