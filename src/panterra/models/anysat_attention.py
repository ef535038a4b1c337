"""How AnySat's tokens look at one another: by distance inside a patch, freely between patches, and once to combine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.models.layers import MLP, Attention, Block, rows_together, works_in_place

Layout = Literal["tokens", "heads"]
"""tokens: softmax over the tokens of a sample, the usual attention. heads: over the heads of each token alone, which is
what the published code computes where it runs with flash attention."""

BUCKETS = 8
PLACELESS = 7
"""The bucket of whatever has no place: the class token and a sensor that sees the whole tile."""


def check_width(dim: int, heads: int, part: str) -> None:
    """Refuse a width that codes, groups of channels or heads do not divide. Raises InputError."""
    if min(dim, heads) < 1 or dim % 32 or dim % heads:
        raise InputError(f"a width of {dim} with {heads} heads in the {part}; take a multiple of 32 and of the heads")


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def places(rows: int, cols: int, step: float, dim: int) -> Float[Tensor, "n d"]:
    """Encode the cells of a grid `step` apart, in raster order; the first half of the width is the column (AnySat)."""
    quarter = dim // 4
    # In float32 throughout: on large grids that is more than rounding, and the weights were trained with it.
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float32) / quarter)

    def encode(num: int) -> Tensor:
        angle = (torch.arange(num, dtype=torch.float32) * step)[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    col = encode(cols)[None].expand(rows, -1, -1)
    row = encode(rows)[:, None].expand(-1, cols, -1)
    return torch.cat([col, row], dim=-1).flatten(0, 1)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def buckets(rows: int, cols: int, extra: int = 1) -> Int[Tensor, "n n"]:
    """Class of the distance between cells of a grid in raster order, after `extra` tokens that have no place.

    Distances round to 0, 1, 2-3 and 4 or more cells: buckets 3 to 6 (AnySat's piecewise index with its constants).
    """
    row, col = (torch.arange(n, dtype=torch.float64) for n in (rows, cols))
    y, x = row.repeat_interleave(cols), col.repeat(rows)
    distance = torch.hypot(y[:, None] - y, x[:, None] - x)
    near = torch.bucketize(distance, torch.tensor([0.5, 1.5, 3.5], dtype=torch.float64)) + 3
    return F.pad(near, (extra, 0, extra, 0), value=PLACELESS)


def distance_bias(
    q: Float[Tensor, "b n e"], table: Float[Tensor, "1 e k"], index: Int[Tensor, "_b n m"]
) -> Float[Tensor, "b 1 n m"]:
    """Look up each query's score for the buckets of its keys."""
    scores = q @ table[0]
    return torch.gather(scores, 2, index.expand(len(scores), -1, -1))[:, None]


def hide(bias: Float[Tensor, "b 1 n m"], visible: Bool[Tensor, "b m"] | None) -> Float[Tensor, "b 1 n m"]:
    """Forbid the keys that are not visible."""
    return bias if visible is None else bias.masked_fill(~visible[:, None, None, :], -torch.inf)


class DistanceAttention(nn.Module):
    """Self-attention whose logits get a score by distance.

    The score comes from the query of the first head and is the same for all heads: the weights were trained so.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.distance = nn.Parameter(torch.zeros(1, dim // heads, BUCKETS))

    def forward(
        self, x: Float[Tensor, "b n d"], index: Int[Tensor, "n n"], *, visible: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        out: Tensor = self.proj(self._mix(self.qkv(x), index, visible))
        return out

    def update(
        self,
        x: Float[Tensor, "b n d"],
        norm: nn.LayerNorm,
        index: Int[Tensor, "n n"],
        *,
        visible: Bool[Tensor, "b n"] | None = None,
    ) -> None:
        """Add attention over `norm(x)` to `x` in place."""
        qkv = x.new_empty(*x.shape[:2], 3 * x.shape[2])
        rows = rows_together(x)
        for part, out in zip(x.flatten(0, 1).split(rows), qkv.flatten(0, 1).split(rows), strict=True):
            torch.addmm(self.qkv.bias, norm(part), self.qkv.weight.mT, out=out)
        mixed = self._mix(qkv, index, visible).flatten(0, 1)
        for part, seen in zip(x.flatten(0, 1).split(rows), mixed.split(rows), strict=True):
            part.add_(self.proj.bias).addmm_(seen, self.proj.weight.mT)

    def first(self, x: Float[Tensor, "b n d"], *, visible: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b 1 d"]:
        """Give the first token's row alone; its score by distance is one number for all keys, so softmax ignores it."""
        dim = x.shape[2]
        q_weight, k_weight, v_weight = self.qkv.weight.split(dim)
        q_bias, _, v_bias = self.qkv.bias.split(dim)
        q = F.linear(x[:, 0], q_weight, q_bias).unflatten(-1, (self.heads, -1))
        out: Tensor = self.proj(attend_once(q, x, k_weight, v_weight, v_bias, visible=visible))
        if torch.is_grad_enabled() and self.distance.requires_grad:
            # A gradient of zero, with which weight decay goes on (AnySat); without one optimisers leave a weight alone.
            out = out + 0.0 * self.distance.sum()
        return out[:, None]

    def _mix(
        self, qkv: Float[Tensor, "b n e"], index: Int[Tensor, "n n"], visible: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b n d"]:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = distance_bias(q[:, 0] / math.sqrt(q.shape[-1]), self.distance, index[None])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=hide(bias, visible))
        return out.transpose(1, 2).flatten(2)


def attend_once(
    q: Float[Tensor, "b h e"],
    x: Float[Tensor, "b n d"],
    key: Float[Tensor, "d d"],
    value: Float[Tensor, "d d"],
    value_bias: Float[Tensor, " d"],
    *,
    visible: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b d"]:
    """Attend from one query to `x` without keys and values of each token.

    The query goes through the key's matrix once, and the value's matrix meets the weighted mean. A key's bias would add
    one number to all scores, which softmax ignores.
    """
    heads = q.shape[1]
    q = torch.einsum("bhe,hed->bhd", q / math.sqrt(q.shape[-1]), key.unflatten(0, (heads, -1)))
    scores = q @ x.mT
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
    mean = scores.softmax(dim=-1) @ x
    return torch.einsum("bhd,hed->bhe", mean, value.unflatten(0, (heads, -1))).flatten(1) + value_bias


class PatchBlock(nn.Module):
    """A pre-norm transformer block whose attention knows distances."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = DistanceAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim)

    def forward(
        self, x: Float[Tensor, "b n d"], index: Int[Tensor, "n n"], *, visible: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        x = x + self.attn(self.norm1(x), index, visible=visible)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def update(
        self, x: Float[Tensor, "b n d"], index: Int[Tensor, "n n"], *, visible: Bool[Tensor, "b n"] | None = None
    ) -> None:
        """Do what `forward` does to a contiguous `x` in place."""
        self.attn.update(x, self.norm1, index, visible=visible)
        self.mlp.update(x, self.norm2)

    def first(self, x: Float[Tensor, "b n d"], *, visible: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b 1 d"]:
        """Give the first token's row alone."""
        x = x[:, :1] + self.attn.first(self.norm1(x), visible=visible)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEncoder(nn.Module):
    """The transformer that every sensor shares: from the sub-patches of one patch to one vector."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(PatchBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        tokens: Float[Tensor, "b n d"],
        *,
        visible: Bool[Tensor, "b n"] | None = None,
        dense: bool = False,
    ) -> Float[Tensor, "b _m d"]:
        """Encode sub-patches in raster order that carry their place; give the patch's row, all rows where `dense`."""
        if torch.is_grad_enabled() or self.training:
            return self._run(tokens, visible, dense)
        size = max(1, chunk_rows(tokens) // (1 + tokens.shape[1]))
        seen = [None] * -(-len(tokens) // size) if visible is None else visible.split(size)
        return torch.cat([self._run(x, v, dense) for x, v in zip(tokens.split(size), seen, strict=True)])

    def _run(
        self, tokens: Float[Tensor, "b n d"], visible: Bool[Tensor, "b n"] | None, dense: bool
    ) -> Float[Tensor, "b _m d"]:
        side = math.isqrt(tokens.shape[1])
        index = buckets(side, side).to(tokens.device)
        x = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        keys = None if visible is None else F.pad(visible, (1, 0), value=True)
        in_place = not self.training and works_in_place(x)
        blocks = cast(Sequence[PatchBlock], self.blocks)
        for block in blocks if dense else blocks[:-1]:
            if in_place:
                block.update(x, index, visible=keys)
            else:
                x = block(x, index, visible=keys)
        if not dense:
            x = blocks[-1].first(x, visible=keys)
        out: Tensor = self.norm(x)
        return out


class HeadAttention(Attention):
    """Attention of each token's heads to one another: no token sees another (published flash path)."""

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        *,
        turn: Tensor | None = None,
        visible: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Mix heads; `visible` makes no difference, since tokens stay apart."""
        assert turn is None
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).flatten(2))
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
        x.add_(self(norm(x), turn=turn))


def fusion_block(dim: int, heads: int, *, eps: float = 1e-6, layout: Layout = "tokens") -> Block:
    """Build a pre-norm transformer block with AnySat's epsilon: 1e-6 between patches, 1e-5 in the predictor."""
    block = Block(dim, heads, 4 * dim)
    if layout == "heads":
        block.attn = HeadAttention(dim, heads)
    block.norm1.eps = block.norm2.eps = eps
    return block


class Combiner(nn.Module):
    """Cross-attention from places to all tokens: one vector per place, whatever the number of sensors.

    Queries are a learned vector plus a place, without projection; there is no residual from the tokens (AnySat).
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.distance = nn.Parameter(torch.zeros(1, dim // heads, BUCKETS))
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)

    def forward(
        self,
        x: Float[Tensor, "b m d"],
        places: Float[Tensor, "_b n d"],
        index: Int[Tensor, "_b n m"],
        *,
        visible: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Combine tokens at `places`; `index` is the bucket of each place's distance to each token."""
        y = self.norm1(x)
        parts = (self.query + places, self.key(y), self.value(y))
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in parts)
        # Here the score takes the query as it is, not divided by the root of its width (AnySat).
        bias = hide(distance_bias(q[:, 0], self.distance, index), visible)
        mixed = F.scaled_dot_product_attention(q.expand(len(x), -1, -1, -1), k, v, attn_mask=bias)
        out = self.proj(mixed.transpose(1, 2).flatten(2))
        result: Tensor = out + self.mlp(self.norm2(out))
        return result


def chunk_rows(x: Tensor) -> int:
    """Say how many vectors go through a stack of layers together in inference: few on a CPU, for its caches.

    Kernels of attention on a GPU take no more than 65,535 sequences at once, each of two vectors or more.
    """
    return 4096 if x.device.type == "cpu" else 1 << 16
