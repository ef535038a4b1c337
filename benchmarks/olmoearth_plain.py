"""OlmoEarth written down as the specification reads, one sentence after another: the oracle and the baseline.

Nothing is merged, cached or reordered: every band set has its own resize and convolution, every encoding is a tensor of
zeros that is filled and added, queries, keys and values are three layers, rotations are recomputed in every block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panterra.modalities import MODALITIES
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig
from panterra.models.positions import days_since_2000, sincos1d


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.freqs: Tensor | None = None

    def forward(self, x: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        y = self.norm1(x)
        b, n, d = y.shape
        q, k, v = (f(y).reshape(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.freqs is not None:
            q, k = self.turn(q, places), self.turn(k, places)
        attn = None if mask is None else mask[:, None, None, :].expand(b, self.heads, n, n)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, d))
        mlp: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + mlp

    def turn(self, x: Tensor, places: Tensor) -> Tensor:
        assert self.freqs is not None
        angle = torch.einsum("bna,ahp->bhnp", places, self.freqs)
        cos, sin = angle.cos(), angle.sin()
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class PlainOlmoEarth(nn.Module):
    """The same function as `OlmoEarth.forward` of v1, v1.1 and v1.2 without registers or extra options."""

    def __init__(self, model: OlmoEarth) -> None:
        super().__init__()
        self.config: OlmoEarthConfig = model.config
        c = self.config
        state = {key: value.clone() for key, value in model.state_dict().items()}
        self.blocks = nn.ModuleList(PlainBlock(c.dim, c.heads, int(c.dim * c.mlp_ratio)) for _ in range(c.depth))
        for i, block in enumerate(self.blocks):
            own = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
            renamed = {k.replace("attn.proj", "proj").replace("mlp.", ""): v for k, v in own.items()}
            for kind in ("weight", "bias"):
                q, k, v = renamed.pop(f"attn.qkv.{kind}").chunk(3)
                renamed |= {f"q.{kind}": q, f"k.{kind}": k, f"v.{kind}": v}
            block.load_state_dict(renamed)
            if c.position == "rope_3d_mixed":
                block.freqs = state["rotary.frequencies"][i]
        self.norm = nn.LayerNorm(c.dim)
        self.norm.load_state_dict({k: state[f"norm.{k}"] for k in ("weight", "bias")})
        self.state = state

    @torch.no_grad()
    def forward(
        self,
        inputs: Mapping[str, Tensor],
        timestamps: Tensor,
        *,
        patch_px: int,
        visible: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Encode normalised [B, H, W, T, C] images; with `visible` tokens are sorted and padded sample by sample."""
        parts, places = {}, {}
        days = days_since_2000(timestamps[..., 0], timestamps[..., 1], timestamps[..., 2])
        for m in (name for name in self.config.modalities if name in inputs):
            x = torch.stack([self.embed(m, s, inputs[m], patch_px) for s in range(len(self.config.groups(m)))], dim=4)
            parts[m] = x + self.encode(m, x, timestamps[..., 1], patch_px)
            b, h, w, t, s, _ = x.shape
            place = torch.zeros(b, h, w, t, s, 3)
            place[..., 0] = days[:, None, None, :t, None].expand(b, h, w, t, s) * self.config.rope_time_scale
            place[..., 1] = (torch.arange(h) * patch_px)[:, None, None, None].expand(h, w, t, s)
            place[..., 2] = (torch.arange(w) * patch_px)[None, :, None, None].expand(h, w, t, s)
            places[m] = place.flatten(1, 4)
        x = torch.cat([part.flatten(1, 4) for part in parts.values()], dim=1)
        place = torch.cat(list(places.values()), dim=1)
        mask = None
        if visible is not None:
            seen = torch.cat([visible[m].flatten(1) for m in parts], dim=1)
            order = torch.argsort((~seen).int(), dim=1, stable=True)
            longest = int(seen.sum(1).max())
            mask = torch.gather(seen, 1, order)[:, :longest]
            x = torch.gather(x, 1, order[..., None].expand_as(x))[:, :longest] * mask[..., None]
            place = torch.gather(place, 1, order[..., None].expand_as(place))[:, :longest]
        for block in self.blocks:
            x = block(x, place, mask)
        x = self.norm(x)
        if visible is not None and mask is not None:
            whole = x.new_zeros(len(x), order.shape[1], x.shape[-1])
            whole[:, :longest] = x * mask[..., None]
            back = torch.argsort(order, dim=1)
            x = torch.gather(whole, 1, back[..., None].expand_as(whole))
        out, start = {}, 0
        for m, part in parts.items():
            count = part.flatten(1, 4).shape[1]
            out[m] = x[:, start : start + count].reshape(part.shape)
            start += count
        return out

    def embed(self, m: str, s: int, image: Tensor, patch_px: int) -> Tensor:
        names, home, size = MODALITIES[m].band_names, f"patch_embeddings.{m}.{s}", self.config.base_patch_px
        x = image[..., [names.index(band) for band in self.config.groups(m)[s]]]
        b, h, w, t, c = x.shape
        x = x.permute(0, 3, 4, 1, 2).reshape(b * t, c, h, w)
        rows, cols = h // patch_px, w // patch_px
        if patch_px != size:
            x = F.interpolate(x, (rows * size, cols * size), mode="bicubic", antialias=True)
        weight, bias = self.state[f"{home}.proj.weight"], self.state[f"{home}.proj.bias"]
        if not self.config.pixel_hidden:
            x = F.conv2d(x, weight.reshape(-1, c, size, size), bias, stride=size).permute(0, 2, 3, 1)
        else:
            x = x.permute(0, 2, 3, 1)
            x = F.relu(F.linear(x, self.state[f"{home}.pixel.0.weight"], self.state[f"{home}.pixel.0.bias"]))
            x = x.reshape(b * t, rows, size, cols, size, -1).permute(0, 1, 3, 2, 4, 5).reshape(b * t, rows, cols, -1)
            x = F.linear(x, weight, bias)
        return x.reshape(b, t, rows, cols, -1).permute(0, 2, 3, 1, 4)

    def encode(self, m: str, tokens: Tensor, month: Tensor, patch_px: int) -> Tensor:
        b, h, w, t, s, d = tokens.shape
        n = d // 4
        out = torch.zeros(b, h, w, t, s, d)
        out[..., :n] += self.state[f"encodings.channel.{m}"].expand(b, h, w, t, s, n)
        if MODALITIES[m].kind == "series":
            if self.config.position == "absolute":
                out[..., n : 2 * n] += sincos1d(t, n)[None, None, None, :, None, :].expand(b, h, w, t, s, n)
            rows = self.state["encodings.month"][month[:, :t]]
            out[..., 2 * n : 3 * n] += rows[:, None, None, :, None, :].expand(b, h, w, t, s, n)
        if self.config.position == "absolute":
            col = sincos1d(w, n // 2, float(patch_px))[None, :, :].expand(h, w, -1)
            row = sincos1d(h, n // 2, float(patch_px))[:, None, :].expand(h, w, -1)
            out[..., 3 * n :] += torch.cat([col, row], dim=-1)[None, :, :, None, None, :].expand(b, h, w, t, s, n)
        return out
