"""The transformer block, once for training and once in place for inference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from panterra.models.packed import Packed
from panterra.models.positions import rotate_, turn_heads, unit

ROWS = 1024
"""Tokens whose intermediate values stay in a processor's cache together during inference."""


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
        turn: Float[Tensor, "b n _h pairs"] | None = None,
        visible: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        q, k, v = self._turned(self.qkv(x), turn)
        out: Tensor = self.proj(attend(q, k, v, visible=visible).flatten(2))
        return out

    def mix_packed(
        self,
        x: Float[Tensor, "1 n d"],
        norm: nn.LayerNorm,
        packed: Packed,
        *,
        turn: Float[Tensor, "1 n _h pairs"] | None = None,
    ) -> Float[Tensor, "1 n d"]:
        """Attend over `norm(x)`, each sample to its own tokens."""
        q, k, v = self._turned(norm_linear(x, norm, self.qkv), turn)
        out: Tensor = self.proj(attend_packed(q, k, v, packed, packed).flatten(2))
        return out

    def _turned(self, qkv: Float[Tensor, "b n e"], turn: Tensor | None) -> tuple[Float[Tensor, "b n h d"], ...]:
        qkv = qkv.unflatten(-1, (3, self.heads, -1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.unbind(2)
            qkv = torch.stack([self.q_norm(q), self.k_norm(k), v], dim=2)
        return qkv.unbind(2) if turn is None else turn_heads(qkv, turn, 2)

    def update(
        self,
        x: Float[Tensor, "b n d"],
        norm: nn.LayerNorm,
        *,
        turn: Float[Tensor, "b n _h pairs"] | None = None,
        visible: Bool[Tensor, "b m"] | None = None,
    ) -> None:
        """Add attention over `norm(x)` to `x` in place."""
        self._update(x, norm, turn, partial(attend, visible=visible))

    def update_packed(
        self,
        x: Float[Tensor, "1 n d"],
        norm: nn.LayerNorm,
        packed: Packed,
        *,
        turn: Float[Tensor, "1 n _h pairs"] | None = None,
    ) -> None:
        """Do in place what `mix_packed` does, and add."""
        self._update(x, norm, turn, partial(attend_packed, queries=packed, keys=packed))

    def _update(self, x: Tensor, norm: nn.LayerNorm, turn: Tensor | None, mix: Callable[..., Tensor]) -> None:
        weight, bias = self.qkv.weight.mT, self.qkv.bias
        qkv = x.new_empty(*x.shape[:2], len(bias))
        rows = rows_together(x)
        for part, out in zip(x.flatten(0, 1).split(rows), qkv.flatten(0, 1).split(rows), strict=True):
            torch.addmm(bias, norm(part), weight, out=out)
        parts = qkv.unflatten(-1, (3, self.heads, -1))
        qk, v = parts[:, :, :2], parts[:, :, 2]
        if self.q_norm is not None and self.k_norm is not None:
            qk[:, :, 0], qk[:, :, 1] = self.q_norm(qk[:, :, 0]), self.k_norm(qk[:, :, 1])
        if turn is not None:
            qk = rotate_(qk, unit(turn)[:, :, None])
        mixed = mix(qk[:, :, 0], qk[:, :, 1], v).flatten(2).flatten(0, 1)
        for part, seen in zip(x.flatten(0, 1).split(rows), mixed.split(rows), strict=True):
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


def attend_packed(
    q: Float[Tensor, "1 n h d"],
    k: Float[Tensor, "1 m h d"],
    v: Float[Tensor, "1 m h d"],
    queries: Packed,
    keys: Packed,
) -> Float[Tensor, "1 n h d"]:
    """Softmax attention of each sample's queries to its own keys; zero where it has none."""
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        return _attend_in_turn(q, k, v, queries, keys)
    return _attend_padded(q, k, v, queries, keys)


def _attend_in_turn(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed) -> Tensor:
    """Take samples one by one, or together where they are of one length."""
    if len({*zip(queries.lengths, keys.lengths, strict=True)}) == 1 and keys.lengths[0]:
        b = len(keys.lengths)
        return attend(*(x.reshape(b, -1, *x.shape[2:]) for x in (q, k, v))).reshape(q.shape)
    rows = zip(q.split(queries.lengths, 1), k.split(keys.lengths, 1), v.split(keys.lengths, 1), strict=True)
    return torch.cat([attend(*row) if row[0].numel() and row[1].numel() else _nothing(*row) for row in rows], dim=1)


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Give zeros that depend on everything all the same, for DDP waits for every parameter's gradient."""
    return 0.0 * (q + k.sum() + v.sum())


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed) -> Tensor:
    # A sample without keys looks at its padding, since softmax over nothing is not a number.
    some = keys.valid.any(1, keepdim=True)
    out = attend(queries.pad(q[0]), keys.pad(k[0]), keys.pad(v[0]), visible=keys.valid | ~some)
    return torch.where(some[..., None, None], out, 0.0)[queries.valid][None]


def norm_linear(x: Float[Tensor, "*b d"], norm: nn.LayerNorm, linear: nn.Linear) -> Float[Tensor, "*b e"]:
    """Give `linear(norm(x))` without keeping `norm(x)` for the backward pass, which is quickly made again."""
    weights = norm.weight, norm.bias, linear.weight, linear.bias
    out: Tensor = _NormLinear.apply(x, *weights, norm.eps)  # type: ignore[no-untyped-call]
    return out


def gelu_linear(x: Float[Tensor, "*b d"], linear: nn.Linear) -> Float[Tensor, "*b e"]:
    """Give `linear(gelu(x))` without keeping `gelu(x)` for the backward pass."""
    out: Tensor = _GeluLinear.apply(x, linear.weight, linear.bias)  # type: ignore[no-untyped-call]
    return out


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        gain, shift = gain.to(x.dtype), shift.to(x.dtype)
        normed = torch.native_layer_norm(x, x.shape[-1:], gain, shift, eps)[0]
        ctx.save_for_backward(x, gain, shift, weight)
        ctx.eps = eps
        return F.linear(normed, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, shift, weight = ctx.saved_tensors
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], gain, shift, ctx.eps)
        d_normed, d_weight, d_bias = _linear_backward(gradient, normed, weight)
        d_x, d_gain, d_shift = torch.ops.aten.native_layer_norm_backward(
            d_normed, x, x.shape[-1:], mean, rstd, gain, shift, [True, True, True]
        )
        return d_x, d_gain, d_shift, d_weight, d_bias, None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        d_active, d_weight, d_bias = _linear_backward(gradient, F.gelu(x), weight)
        return torch.ops.aten.gelu_backward.grad_input(d_active, x, grad_input=d_active), d_weight, d_bias


def _linear_backward(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give a linear layer's gradients: of what came in, written over `x` where it can be, of weight and bias."""
    rows, ins = gradient.flatten(0, -2), x.flatten(0, -2).to(gradient.dtype)
    d_weight, d_bias = rows.mT @ ins, rows.sum(0)
    d_x = torch.mm(rows, weight.to(rows.dtype), out=ins)
    return d_x.view(x.shape).to(x.dtype), d_weight, d_bias


def rows_together(x: Tensor) -> int:
    """Say how many tokens go through a layer together in inference: few on a CPU, for its caches."""
    return ROWS if x.device.type == "cpu" else 1 << 16


def works_in_place(x: Tensor) -> bool:
    """Say whether layers may write over what they are given: without gradients, and without changing types."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


class MLP(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*b d"], *, norm: nn.LayerNorm | None = None) -> Float[Tensor, "*b d"]:
        return gelu_linear(self.fc1(x) if norm is None else norm_linear(x, norm, self.fc1), self.fc2)

    def update(self, x: Float[Tensor, "b n d"], norm: nn.LayerNorm) -> None:
        """Add the MLP of `norm(x)` to `x` in place."""
        for part in x.flatten(0, 1).split(rows_together(x)):
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
        turn: Float[Tensor, "b n _h pairs"] | None = None,
        visible: Bool[Tensor, "b n"] | None = None,
        packed: Packed | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Look at what is `visible` of each sample, or at each sample's own tokens in one row (b = 1)."""
        if packed is None:
            mixed = self.attn(self.norm1(x), turn=turn, visible=visible)
        else:
            mixed = self.attn.mix_packed(x, self.norm1, packed, turn=turn)
        x = x + drop_path(mixed, self.drop_path, training=self.training, packed=packed)
        return x + drop_path(self.mlp(x, norm=self.norm2), self.drop_path, training=self.training, packed=packed)

    def update(
        self,
        x: Float[Tensor, "b n d"],
        *,
        turn: Float[Tensor, "b n _h pairs"] | None = None,
        visible: Bool[Tensor, "b n"] | None = None,
        packed: Packed | None = None,
    ) -> None:
        """Do what `forward` does outside training, to a contiguous `x` in place: faster, and in half the memory."""
        if packed is None:
            self.attn.update(x, self.norm1, turn=turn, visible=visible)
        else:
            self.attn.update_packed(x, self.norm1, packed, turn=turn)
        self.mlp.update(x, self.norm2)


def drop_path(
    x: Float[Tensor, "b n d"], rate: float, *, training: bool, packed: Packed | None = None
) -> Float[Tensor, "b n d"]:
    """Zero whole samples at `rate` in training and scale the others up to keep the mean."""
    if not training or rate == 0:
        return x
    keep = 1 - rate
    scale = x.new_empty(len(x) if packed is None else len(packed.lengths), 1, 1).bernoulli_(keep) / keep
    return x * (scale if packed is None else scale[packed.sample, 0][None])
