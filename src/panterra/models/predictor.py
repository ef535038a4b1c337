"""OlmoEarth's predictor: fills masked tokens from the visible ones. Only pretraining needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from panterra.models.layers import MLP, attend_packed, drop_path, norm_linear
from panterra.models.olmoearth import Encodings, OlmoEarthConfig, Rotary
from panterra.models.packed import Packed
from panterra.models.positions import TokenLine, turn_heads

VISIBLE, TEACHER_ONLY, DECODE, MISSING = range(4)
"""What a mask says of a token: the student sees it; only the teacher does; it is to be predicted; it has no data."""

Masks = Mapping[str, Int[Tensor, "b _h _w _t _s"]]
"""One of the four values for each token of each modality."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Which tokens of each sample were taken, in their order, padded to the sample with the most (at least one)."""

    index: Int[Tensor, "b k"]
    """Where each comes from. Padding points at tokens that were not taken, each at another."""
    valid: Bool[Tensor, "b k"]
    """False for padding."""

    @classmethod
    def of(cls, wanted: Bool[Tensor, "b n"]) -> Chosen:
        """Choose the tokens that are marked."""
        count = wanted.sum(1, keepdim=True)
        index = (~wanted).byte().argsort(dim=1, stable=True)[:, : max(1, int(count.max()))].contiguous()
        return cls(index=index, valid=torch.arange(index.shape[1], device=index.device) < count)

    def take(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b k d"]:
        """Pick the chosen tokens; a batch axis of 1 stands for all samples."""
        x = x.expand(len(self.index), -1, -1)
        return x.gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))

    def put(self, x: Float[Tensor, "b k d"], length: int) -> Float[Tensor, "b n d"]:
        """Put tokens back to where they came from, among zeros."""
        kept = torch.where(self.valid[..., None], x, 0.0)
        index = self.index[..., None].expand_as(kept)
        return kept.new_zeros(len(kept), length, kept.shape[-1]).scatter(1, index, kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """What the predictor says of the tokens to decode, all modalities in line."""

    tokens: Float[Tensor, "b k e"]
    chosen: Chosen
    """Their places among all tokens, modality after modality as in `sizes`."""
    sizes: Mapping[str, int]
    """Number of tokens of each modality."""


def predictor_config(
    encoder: OlmoEarthConfig, *, depth: int = 4, dim: int | None = None, heads: int | None = None
) -> OlmoEarthConfig:
    """Derive the released predictors' configuration: as the encoder, but four blocks without drop path.

    A predictor has no patch embedding, registers or projection, so it ignores what a configuration says of these.
    """
    return replace(
        encoder,
        depth=depth,
        dim=dim or encoder.dim,
        heads=heads or encoder.heads,
        drop_path=0.0,
        output_dim=encoder.output_dim or encoder.dim,
    )


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a context."""

    def __init__(self, dim: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim // heads) if qk_norm else None
        self.k_norm = nn.LayerNorm(dim // heads) if qk_norm else None

    def forward(
        self,
        x: Float[Tensor, "1 n d"],
        context: Float[Tensor, "1 m d"],
        *,
        norm: nn.LayerNorm,
        turns: tuple[Tensor, Tensor] | None,
        queries: Packed,
        keys: Packed,
    ) -> Float[Tensor, "1 n d"]:
        q = norm_linear(x, norm, self.q).unflatten(-1, (1, self.heads, -1))
        kv: Tensor = self.kv(context).unflatten(-1, (2, self.heads, -1))
        if self.q_norm is not None and self.k_norm is not None:
            q, kv = self.q_norm(q), torch.stack([self.k_norm(kv[:, :, 0]), kv[:, :, 1]], dim=2)
        (q,) = q.unbind(2) if turns is None else turn_heads(q, turns[0], 1)
        k, v = kv.unbind(2) if turns is None else turn_heads(kv, turns[1], 1)
        out: Tensor = self.proj(attend_packed(q, k, v, queries, keys).flatten(2))
        return out


class CrossBlock(nn.Module):
    """A pre-norm block whose queries look at a context, which stays as it is and is not normalised (OlmoEarth)."""

    def __init__(self, dim: int, heads: int, hidden: int, *, qk_norm: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden)
        self.drop_path = drop_path

    def forward(
        self,
        x: Float[Tensor, "1 n d"],
        context: Float[Tensor, "1 m d"],
        *,
        turns: tuple[Tensor, Tensor] | None,
        queries: Packed,
        keys: Packed,
    ) -> Float[Tensor, "1 n d"]:
        mixed = self.attn(x, context, norm=self.norm1, turns=turns, queries=queries, keys=keys)
        x = x + drop_path(mixed, self.drop_path, training=self.training, packed=queries)
        return x + drop_path(self.mlp(x, norm=self.norm2), self.drop_path, training=self.training, packed=queries)


class Predictor(nn.Module):
    """Cross-attention from mask tokens, which know where and when they are, to what the encoder saw."""

    def __init__(self, config: OlmoEarthConfig, encoder_dim: int) -> None:
        super().__init__()
        self.config = config
        self.input_norm = nn.LayerNorm(encoder_dim)
        self.input = nn.Linear(encoder_dim, config.dim)
        self.mask_token = nn.Parameter(torch.zeros(config.dim))
        self.encodings = Encodings(config, config.dim)
        hidden = int(config.dim * config.mlp_ratio)
        self.blocks = nn.ModuleList(
            CrossBlock(config.dim, config.heads, hidden, qk_norm=config.qk_norm, drop_path=config.drop_path)
            for _ in range(config.depth)
        )
        self.rotary = Rotary(config) if config.position.startswith("rope") else None
        self.norm = nn.LayerNorm(config.dim)
        self.output = nn.Linear(config.dim, config.output_dim or encoder_dim)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier for every linear layer; keys and values are two layers to Xavier, one product to us (OlmoEarth)."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                for part in layer.weight.chunk(2 if name.endswith(".kv") else 1):
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        encoded: Mapping[str, Float[Tensor, "b _h _w _t _s e"]],
        masks: Masks,
        timestamps: Int[Tensor, "b _T 3"],
        *,
        patch_px: int,
        pixel_m: float = 10.0,
    ) -> Predictions:
        """Predict the tokens marked DECODE from the VISIBLE ones of `encoded`.

        `encoded` may lack modalities of which nothing is visible.
        """
        names = (*encoded, *(m for m in masks if m not in encoded))
        sizes = {m: masks[m][0].numel() for m in names}
        query, _ = self.decode(encoded, {m: masks[m] for m in names}, timestamps, patch_px=patch_px, pixel_m=pixel_m)
        return Predictions(tokens=self.output(self.norm(query[0])), chosen=query[1], sizes=sizes)

    def decode(
        self,
        encoded: Mapping[str, Float[Tensor, "b _h _w _t _s e"]],
        masks: Masks,
        timestamps: Int[Tensor, "b _T 3"],
        *,
        patch_px: int,
        pixel_m: float,
    ) -> tuple[tuple[Tensor, Chosen], tuple[Tensor, Chosen]]:
        """Give the decoded tokens and the context that they looked at, before the last norm, each with its places.

        The modalities of `encoded` are the first ones of `masks`, in the same order.
        """
        values = torch.cat([mask.flatten(1) for mask in masks.values()], dim=1)
        x = torch.cat([tokens.flatten(1, 4) for tokens in encoded.values()], dim=1)
        visible, wanted = values[:, : x.shape[1]] == VISIBLE, values == DECODE
        line = TokenLine.of({m: mask.shape for m, mask in masks.items()}, x.device)
        query, context = self.decode_packed(
            x[visible], line, Packed.of(visible), Packed.of(wanted), timestamps, pixel_m * patch_px / 10
        )
        places = Chosen.of(wanted), Chosen.of(visible)
        padded = [
            rows.new_zeros(*chosen.valid.shape, rows.shape[-1]).masked_scatter(chosen.valid[..., None], rows)
            for rows, chosen in zip((query, context), places, strict=True)
        ]
        return (padded[0], places[0]), (padded[1], places[1])

    def predict_packed(
        self,
        encoded: Float[Tensor, "n e"],
        line: TokenLine,
        seen: Packed,
        wanted: Packed,
        timestamps: Int[Tensor, "b _T 3"],
        step: float,
    ) -> Float[Tensor, "k e"]:
        """Predict the wanted tokens from those seen."""
        query, _ = self.decode_packed(encoded, line, seen, wanted, timestamps, step)
        return norm_linear(query, self.norm, self.output)

    def decode_packed(
        self,
        encoded: Float[Tensor, "n e"],
        line: TokenLine,
        seen: Packed,
        wanted: Packed,
        timestamps: Int[Tensor, "b _T 3"],
        step: float,
    ) -> tuple[Float[Tensor, "k d"], Float[Tensor, "n d"]]:
        """Do what `decode` does with tokens in a row."""
        month = timestamps[..., 1]
        context = norm_linear(encoded, self.input_norm, self.input) + self.encodings.of(line, seen, month, step)
        query = self.mask_token + self.encodings.of(line, wanted, month, step)
        turns: list[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        if self.rotary is not None:
            places = (line.coordinates(p.sample, p.token, timestamps, step)[None] for p in (wanted, seen))
            turns = list(zip(*(self.rotary.turns(place).unbind() for place in places), strict=True))
        x = query[None]
        for block, pair in zip(self.blocks, turns, strict=True):
            x = block(x, context[None], turns=pair, queries=wanted, keys=seen)
        return x[0], context
