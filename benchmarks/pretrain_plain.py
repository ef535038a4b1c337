"""OlmoEarth's pretraining written down as the specification reads: the oracle and the baseline of `pretrain.py`.

Every band set is embedded by itself over whole images, every encoding is a tensor of zeros that is filled and added,
tokens are sorted by their masks and padded to the longest sample, attention takes a mask of full size, the target and
the predictor's last layers compute all tokens, losses loop over modalities and samples, and each view is a pass of its
own. Drop path and dropped bands are left out: they draw random numbers, and cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoearth_plain import PlainBlock, PlainOlmoEarth
from panterra.models.olmoearth import OlmoEarth
from panterra.models.positions import days_since_2000
from panterra.models.predictor import DECODE, VISIBLE, Predictor
from panterra.objectives.latent_mim import LatentMIM, LatentMIMConfig, Views

Tokens = dict[str, Tensor]


class PlainEncoder(PlainOlmoEarth):
    """The encoder whose weights can be trained."""

    def __init__(self, model: OlmoEarth) -> None:
        super().__init__(model)
        self.weights = nn.ParameterDict()
        for key in self.state:
            if key.startswith(("patch_embeddings.", "encodings.channel.", "projection.")):
                self.state[key] = self.weights[key.replace(".", "/")] = nn.Parameter(self.state[key])
        train_frequencies(self.blocks)

    def see(self, inputs: Tokens, timestamps: Tensor, masks: Tokens, patch_px: int) -> tuple[Tokens, Tensor]:
        """Encode the visible tokens; the others are 0. The second result is pooled and projected."""
        tokens = self.target(inputs, patch_px)
        parts = {m: x + self.encode(m, x, timestamps[..., 1], patch_px) for m, x in tokens.items()}
        places = torch.cat([self.places(x, timestamps, patch_px) for x in parts.values()], dim=1)
        x = torch.cat([part.flatten(1, 4) for part in parts.values()], dim=1)
        seen = torch.cat([masks[m].flatten(1) for m in parts], dim=1) == VISIBLE
        (x, places), kept, order = sort_and_cut([x, places], seen)
        for block in self.blocks:
            x = block(x, places, kept)
        x = put_back(self.norm(x), kept, order)
        pooled = F.linear(
            (x * seen[..., None]).sum(1) / seen.sum(1, keepdim=True).clamp(min=1),
            self.state["projection.0.weight"],
            self.state["projection.0.bias"],
        )
        return unflatten(x, parts), pooled

    def target(self, inputs: Tokens, patch_px: int) -> Tokens:
        """Embed the patches of every modality present."""
        return {
            m: torch.stack([self.embed(m, s, inputs[m], patch_px) for s in range(len(self.config.groups(m)))], dim=4)
            for m in self.config.modalities
            if m in inputs
        }

    def places(self, tokens: Tensor, timestamps: Tensor, patch_px: int) -> Tensor:
        b, h, w, t, s, _ = tokens.shape
        days = days_since_2000(timestamps[..., 0], timestamps[..., 1], timestamps[..., 2])
        place = torch.zeros(b, h, w, t, s, 3)
        place[..., 0] = days[:, None, None, :t, None].expand(b, h, w, t, s) * self.config.rope_time_scale
        place[..., 1] = (torch.arange(h) * patch_px)[:, None, None, None].expand(h, w, t, s)
        place[..., 2] = (torch.arange(w) * patch_px)[None, :, None, None].expand(h, w, t, s)
        return place.flatten(1, 4)


class PlainCrossBlock(PlainBlock):
    """Pre-norm attention to a context that is not normalised, and MLP."""

    def look(self, x: Tensor, context: Tensor, places: Tensor, context_places: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.q(self.norm1(x)), self.k(context), self.v(context)
        b, n, d = q.shape
        q, k, v = (y.reshape(b, -1, self.heads, d // self.heads).transpose(1, 2) for y in (q, k, v))
        if self.freqs is not None:
            q, k = self.turn(q, places), self.turn(k, context_places)
        attn = mask[:, None, None, :].expand(b, self.heads, n, k.shape[2])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, d))
        mlp: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + mlp


class PlainPredictor(nn.Module):
    """Predicts the tokens to decode from the visible ones."""

    def __init__(self, model: Predictor, encoder: PlainEncoder) -> None:
        super().__init__()
        c, state = model.config, {key: value.clone() for key, value in model.state_dict().items()}
        self.input_norm, self.norm = nn.LayerNorm(model.input_norm.normalized_shape[0]), nn.LayerNorm(c.dim)
        self.input = nn.Linear(model.input.in_features, c.dim)
        self.output = nn.Linear(c.dim, model.output.out_features)
        for name in ("input_norm", "norm", "input", "output"):
            getattr(self, name).load_state_dict({kind: state[f"{name}.{kind}"] for kind in ("weight", "bias")})
        self.mask_token = nn.Parameter(state["mask_token"])
        self.blocks = nn.ModuleList(PlainCrossBlock(c.dim, c.heads, int(c.dim * c.mlp_ratio)) for _ in range(c.depth))
        for i, block in enumerate(self.blocks):
            own = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
            for kind in ("weight", "bias"):
                own[f"attn.k.{kind}"], own[f"attn.v.{kind}"] = own.pop(f"attn.kv.{kind}").chunk(2)
            block.load_state_dict({k.replace("attn.", "").replace("mlp.", ""): v for k, v in own.items()})
            if c.position == "rope_3d_mixed":
                block.freqs = state["rotary.frequencies"][i]
        train_frequencies(self.blocks)
        # The encodings are computed as the encoder's, with weights of their own.
        self.encodings = PlainOlmoEarth.__new__(PlainOlmoEarth)
        nn.Module.__init__(self.encodings)
        self.encodings.config, self.encodings.state = c, dict(state)
        self.channel = nn.ParameterDict()
        for m in c.modalities:
            key = f"encodings.channel.{m}"
            self.encodings.state[key] = self.channel[m] = nn.Parameter(state[key])
        self.places = encoder.places

    def forward(self, encoded: Tokens, timestamps: Tensor, masks: Tokens, patch_px: int) -> Tokens:
        parts = {}
        for m, tokens in encoded.items():
            x = self.input(self.input_norm(tokens))
            x = torch.where((masks[m] == DECODE)[..., None], self.mask_token, x)
            parts[m] = x + self.encodings.encode(m, x, timestamps[..., 1], patch_px)
        places = torch.cat([self.places(x, timestamps, patch_px) for x in parts.values()], dim=1)
        x = torch.cat([part.flatten(1, 4) for part in parts.values()], dim=1)
        values = torch.cat([masks[m].flatten(1) for m in parts], dim=1)
        (query, query_places), decoded, query_order = sort_and_cut([x, places], values == DECODE)
        (context, context_places), seen, context_order = sort_and_cut([x, places], values == VISIBLE)
        for block in self.blocks:
            assert isinstance(block, PlainCrossBlock)
            query = block.look(query, context, query_places, context_places, seen)
        x = put_back(query, decoded, query_order) + put_back(context, seen, context_order)
        return unflatten(self.output(self.norm(x)), parts)


class PlainLatentMIM(nn.Module):
    """The same loss as `LatentMIM` of v1, v1.1 and v1.2, from the same weights."""

    def __init__(self, model: LatentMIM) -> None:
        super().__init__()
        self.config: LatentMIMConfig = model.config
        self.encoder = PlainEncoder(model.encoder)
        self.predictor = PlainPredictor(model.predictor, self.encoder)
        self.teacher = PlainEncoder(model.encoder).requires_grad_(False)

    def forward(self, views: Views) -> Tensor:
        """Compute the loss of two views whose images are laid out [B, H, W, T, C]."""
        losses, pooled = [], []
        for view in views:
            inputs, masks = dict(view.inputs), dict(view.masks)
            latent, z = self.encoder.see(inputs, view.timestamps, masks, view.patch_px)
            decoded = self.predictor(latent, view.timestamps, masks, view.patch_px)
            with torch.no_grad():
                target = self.teacher.target(inputs, view.patch_px)
            losses.append(self.discriminate(decoded, target, masks))
            pooled.append(z)
        a, b = (F.normalize(z, dim=-1) for z in pooled)
        contrast = F.cross_entropy(a @ b.T / self.config.contrast_temperature, torch.arange(len(a)))
        return (losses[0] + losses[1]) / 2 + self.config.contrast_weight * contrast

    def discriminate(self, decoded: Tokens, target: Tokens, masks: Mapping[str, Tensor]) -> Tensor:
        tau, total = self.config.loss["tau"], torch.zeros(())
        for m, tokens in decoded.items():
            samples = []
            for prediction, wanted, mask in zip(tokens, target[m], masks[m], strict=True):
                chosen = mask == DECODE
                if not chosen.any():
                    continue
                p, t = F.normalize(prediction[chosen], dim=-1), F.normalize(wanted[chosen], dim=-1)
                scores = p @ t.T / tau
                if m in self.config.loss.get("mask_negatives_for_modalities", ()) and len(t) > 1:
                    same = t @ t.T > self.config.loss["same_target_threshold"]
                    if same.all(dim=1).any():
                        continue
                    scores = scores.masked_fill(same & ~torch.eye(len(t), dtype=torch.bool), -torch.inf)
                samples.append(2 * tau * F.cross_entropy(scores, torch.arange(len(t))))
            if samples:
                total = total + torch.stack(samples).mean()
        return total


def sort_and_cut(tensors: list[Tensor], wanted: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Sort each sample's tokens so that the wanted ones come first, cut to the longest sample, zero the padding."""
    order = torch.argsort((~wanted).int(), dim=1, stable=True)
    longest = max(1, int(wanted.sum(1).max()))
    kept = torch.gather(wanted, 1, order)[:, :longest]
    cut = [torch.gather(x, 1, order[..., None].expand_as(x))[:, :longest] * kept[..., None] for x in tensors]
    return cut, kept, order


def put_back(x: Tensor, kept: Tensor, order: Tensor) -> Tensor:
    whole = F.pad(x * kept[..., None], (0, 0, 0, order.shape[1] - x.shape[1]))
    return torch.gather(whole, 1, torch.argsort(order, dim=1)[..., None].expand_as(whole))


def unflatten(x: Tensor, like: Tokens) -> Tokens:
    parts = x.split([part[0, ..., 0].numel() for part in like.values()], dim=1)
    return {m: part.reshape(*like[m].shape[:5], -1) for m, part in zip(like, parts, strict=True)}


def train_frequencies(blocks: nn.ModuleList) -> None:
    for block in blocks:
        assert isinstance(block, PlainBlock)
        if block.freqs is not None:
            block.freqs = nn.Parameter(block.freqs.clone())
