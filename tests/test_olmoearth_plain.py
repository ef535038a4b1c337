"""OlmoEarth's encoder and predictor against their definition, written out slowly: one token at a time, in float64.

Models are drawn at random, with sensors, sizes and options that no release has, and given as published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from panterra.modalities import MODALITIES
from panterra.models.convert import (
    check_fit,
    olmoearth_config,
    olmoearth_encoder_state,
    olmoearth_predictor_config,
    olmoearth_predictor_state,
    published_encoder_state,
    published_predictor_state,
)
from panterra.models.olmoearth import V1_BAND_SETS, OlmoEarth
from panterra.models.predictor import Predictor
from panterra.objectives.latent_mim import LatentMIM, LatentMIMConfig, View, Views
from test_parity import as_recorded, to_pixels

DAYS = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)
State = Mapping[str, Tensor]


# The definition


def kind_of(m: str) -> str:
    return MODALITIES[m].kind


def factor(m: str) -> int:
    return 4 if m == "naip_10" else 1


def groups_of(part: Mapping[str, Any], m: str) -> list[list[str]]:
    overrides = (part.get("tokenization_config") or {"overrides": {}})["overrides"]
    if m in overrides:
        return overrides[m]["band_groups"]
    return [list(bands) for bands in V1_BAND_SETS.get(m, (MODALITIES[m].band_names,))]


def sincos1d(position: float, dim: int) -> Tensor:
    omega = [10000 ** (-k / (2 * dim)) for k in range(dim // 2)]
    return torch.tensor([f(position * w) for f in (math.sin, math.cos) for w in omega], dtype=torch.float64)


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def embed(x: Tensor, m: str, part: Mapping[str, Any], state: State, patch_px: int) -> Tensor:
    """[B, h, w, T, S, D], [B, T, S, D] or [B, S, D]."""
    sets = []
    for s, bands in enumerate(groups_of(part, m)):
        home = f"encoder.patch_embeddings.per_modality_embeddings.{m}.{m}__{s}"
        chosen = x[..., [MODALITIES[m].band_names.index(band) for band in bands]]
        if kind_of(m) in ("weather", "constant"):
            sets.append(linear(chosen, state, home))
            continue
        b, height, width, t, _ = chosen.shape
        image = chosen.permute(0, 3, 4, 1, 2).flatten(0, 1)
        side, base = patch_px * factor(m), part["max_patch_size"] * factor(m)
        rows, cols = height // side, width // side
        if side != base:
            image = F.interpolate(image, (rows * base, cols * base), mode="bicubic", antialias=True)
        if not part.get("use_linear_patch_embed", False):
            weight, bias = state[f"{home}.proj.weight"], state[f"{home}.proj.bias"]
            tokens = F.conv2d(image, weight, bias, stride=base).permute(0, 2, 3, 1)
        else:
            pixels = image.permute(0, 2, 3, 1)
            for j in range(len(part.get("patch_embed_hidden_sizes") or ())):
                pixels = linear(pixels, state, f"{home}.pixel_proj.{2 * j}").relu()
            cut = [
                torch.stack(
                    [pixels[:, i * base : (i + 1) * base, j * base : (j + 1) * base].flatten(1) for j in range(cols)], 1
                )
                for i in range(rows)
            ]
            tokens = linear(torch.stack(cut, 1), state, f"{home}.proj")
            for j in range(len(part.get("post_proj_hidden_sizes") or ())):
                tokens = linear(tokens.relu(), state, f"{home}.post_proj.{2 * j + 1}")
        sets.append(tokens.unflatten(0, (b, t)).permute(0, 2, 3, 1, 4))
    return torch.stack(sets, -2)


def places(shape: torch.Size, m: str) -> Iterator[tuple[tuple[int, ...], int, int, int, int]]:
    """Indices of a modality's tokens [(h, w, t, s), (t, s) or (s)] with row, column, date and band set."""
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape[1:-1])).view(-1, len(shape) - 2).tolist():
        row, col = index[:2] if kind_of(m) in ("series", "still") else (0, 0)
        yield tuple(index), row, col, index[-2] if len(index) > 1 else 0, index[-1]


def encode_places(
    tokens: Tensor, m: str, part: Mapping[str, Any], state: State, home: str, stamps: Tensor, g: float
) -> Tensor:
    mode, dim = part["position_encoding"], tokens.shape[-1]
    n, tokens = dim // 4, tokens.clone()
    for index, row, col, t, s in places(tokens.shape, m):
        for b in range(len(tokens)):
            token = tokens[(b, *index)]
            token[:n] += state[f"{home}.composite_encodings.per_modality_channel_embeddings.{m}"][s]
            if kind_of(m) in ("series", "weather"):
                if not mode.startswith("rope_3d"):
                    token[n : 2 * n] += sincos1d(t, n)
                angle = 2 * math.pi * int(stamps[b, t, 1]) / 12
                half = n // 2
                token[2 * n : 2 * n + half] += math.sin(angle)
                token[2 * n + half : 2 * n + 2 * half] += math.cos(angle)
            if mode == "absolute" and kind_of(m) in ("series", "still"):
                token[3 * n : 4 * n] += torch.cat([sincos1d(col * g, n // 2), sincos1d(row * g, n // 2)])
    return tokens


def coordinates(shape: torch.Size, m: str, part: Mapping[str, Any], stamps: Tensor, g: float) -> Tensor:
    """[B, n, 3]: time, row and column."""
    scale, time_scale = part.get("rope_coordinate_scale", 1.0), part.get("rope_temporal_coordinate_scale", 1.0)
    out = []
    for b in range(len(stamps)):
        for _, row, col, t, _ in places(shape, m):
            day, month, year = stamps[b, t].tolist()
            days = (year - 2000) * 365.25 + DAYS[month] + (day - 1)
            out.append([0.0 if kind_of(m) == "constant" else days * time_scale, row * g * scale, col * g * scale])
    return torch.tensor(out, dtype=torch.float64).view(len(stamps), -1, 3)


def turn(x: Tensor, place: Tensor, part: Mapping[str, Any], state: State, home: str) -> Tensor:
    """Rotate [n, heads, head_dim] by the coordinates [n, 3]."""
    mode, (_, heads, dim) = part["position_encoding"], x.shape
    angles = torch.zeros(len(x), heads, dim // 2, dtype=torch.float64)
    base = part.get("rope_base", 10000.0)
    if mode.endswith("mixed"):
        table = state[f"{home}.rope_mixed_freqs"]
        angles = torch.einsum("na,ahp->nhp", place[:, -len(table) :], table)
    elif mode.startswith("rope"):
        time_dim = 2 * round(dim * part.get("temporal_rope_dim_frac", 0.25) / 2) if mode == "rope_3d" else 0
        rest = (dim - time_dim) // 2
        parts = ((time_dim, part.get("rope_temporal_base") or base), (rest, base), (rest, base))
        start = 0
        for axis, (width, axis_base) in enumerate(parts):
            for k in range(width // 2):
                angles[:, :, start + k] = (place[:, axis] * axis_base ** (-2 * k / width))[:, None]
            start += width // 2
    else:
        return x
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1).flatten(-2)


def norm(x: Tensor, state: State, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def attend(
    x: Tensor, context: Tensor, part: Mapping[str, Any], state: State, home: str, at: tuple[Tensor, Tensor]
) -> Tensor:
    q, k, v = (
        linear(y, state, f"{home}.{letter}").unflatten(-1, (part["num_heads"], -1))
        for y, letter in ((x, "q"), (context, "k"), (context, "v"))
    )
    if part.get("qk_norm"):
        q, k = norm(q, state, f"{home}.q_norm"), norm(k, state, f"{home}.k_norm")
    q, k = (turn(y, place, part, state, home) for y, place in zip((q, k), at, strict=True))
    heads = [(q[:, h] @ k[:, h].T / math.sqrt(q.shape[-1])).softmax(-1) @ v[:, h] for h in range(part["num_heads"])]
    return linear(torch.cat(heads, -1), state, f"{home}.proj")


def mlp(x: Tensor, state: State, home: str) -> Tensor:
    return linear(F.gelu(linear(norm(x, state, f"{home}.norm2"), state, f"{home}.mlp.fc1")), state, f"{home}.mlp.fc2")


def run_blocks(x: Tensor, place: Tensor, part: Mapping[str, Any], state: State) -> Tensor:
    """One sample's tokens [n, D], registers first."""
    registers = part.get("num_register_tokens", 0)
    if registers:
        x = torch.cat([state["encoder.register_tokens"], x])
        place = torch.cat([torch.zeros(registers, 3, dtype=torch.float64), place])
    for i in range(part["depth"]):
        home = f"encoder.blocks.{i}"
        y = norm(x, state, f"{home}.norm1")
        x = x + attend(y, y, part, state, f"{home}.attn", (place, place))
        x = x + mlp(x, state, home)
    return norm(x[registers:], state, "encoder.norm")


def project(x: Tensor, part: Mapping[str, Any], state: State) -> Tensor:
    for i in range(part.get("num_projection_layers", 1)):
        x = linear(x.relu() if i else x, state, f"encoder.project_and_aggregate.projection.{2 * i}")
    return x


def plain_encoder(
    config: Mapping[str, Any], state: State, inputs: State, stamps: Tensor, masks: State, patch_px: int, res: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens and what is aggregated of them, samples apart."""
    part, g = config["encoder_config"], res * patch_px / 10
    order = [m for m in part["supported_modality_names"] if m in inputs]
    tokens = {m: embed(inputs[m], m, part, state, patch_px) for m in order}
    tokens = {m: encode_places(x, m, part, state, "encoder", stamps, g) for m, x in tokens.items()}
    line = torch.cat([x.flatten(1, -2) for x in tokens.values()], 1)
    at = torch.cat([coordinates(x.shape, m, part, stamps, g) for m, x in tokens.items()], 1)
    seen = torch.cat([masks[m].flatten(1) for m in order], 1) == 0
    out, pooled = torch.zeros_like(line), []
    width = part.get("output_embedding_size") or line.shape[-1]
    for b in range(len(line)):
        out[b, seen[b]] = run_blocks(line[b, seen[b]], at[b, seen[b]], part, state)
    if part.get("output_embedding_size"):
        out = linear(out, state, "encoder.embedding_projector.projection.0")
    for b in range(len(line)):
        kept = out[b, seen[b]]
        first = part.get("aggregate_then_project", True)
        pooled.append(project(kept.mean(0), part, state) if first else project(kept, part, state).mean(0))
    sizes = [x[0, ..., 0].numel() for x in tokens.values()]
    split = zip(tokens.items(), out.split(sizes, 1), strict=True)
    return {m: y.view(*x.shape[:-1], width) for (m, x), y in split}, torch.stack(pooled)


def plain_predictor(
    config: Mapping[str, Any], state: State, latent: State, stamps: Tensor, masks: State, patch_px: int
) -> dict[str, Tensor]:
    """Decoded tokens at their places, zeros elsewhere."""
    part, g, parts, at = config["decoder_config"], float(patch_px), {}, []
    for m, x in latent.items():
        y = linear(norm(x, state, "decoder.input_norm"), state, "decoder.encoder_to_decoder_embed")
        y[masks[m] == 2] = state["decoder.mask_token"]
        parts[m] = encode_places(y, m, part, state, "decoder", stamps, g)
        at.append(coordinates(y.shape, m, part, stamps, g))
    line, values, place = (
        torch.cat(rows, 1)
        for rows in ([y.flatten(1, -2) for y in parts.values()], [masks[m].flatten(1) for m in parts], at)
    )
    out = torch.zeros(*line.shape[:2], state["decoder.to_output_embed.bias"].numel(), dtype=torch.float64)
    for b in range(len(line)):
        wanted, seen = values[b] == 2, values[b] == 0
        x, context = line[b, wanted], line[b, seen]
        for i in range(part["depth"]):
            home, two = f"decoder.blocks.{i}", (place[b, wanted], place[b, seen])
            x = x + attend(norm(x, state, f"{home}.norm1"), context, part, state, f"{home}.attn", two)
            x = x + mlp(x, state, home)
        out[b, wanted] = linear(norm(x, state, "decoder.norm"), state, "decoder.to_output_embed")
    sizes = [masks[m][0].numel() for m in parts]
    split = zip(parts, out.split(sizes, 1), strict=True)
    return {m: y.view(*masks[m].shape, -1) for m, y in split}


# Checkpoints drawn at random


def draw_state(config: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Give weights to a configuration, under the published names and in the published shapes."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, outs: int, *ins: int) -> None:
        shapes.update({f"{name}.weight": (outs, *ins), f"{name}.bias": (outs,)})

    encoder, decoder = config["encoder_config"], config["decoder_config"]
    dim, narrow = encoder["embedding_size"], decoder["decoder_embedding_size"]
    width = encoder.get("output_embedding_size") or dim
    for m in encoder["supported_modality_names"]:
        for s, bands in enumerate(groups_of(encoder, m)):
            home = f"encoder.patch_embeddings.per_modality_embeddings.{m}.{m}__{s}"
            side = encoder["max_patch_size"] * factor(m)
            if kind_of(m) in ("weather", "constant"):
                layer(home, dim, len(bands))
            elif encoder.get("use_linear_patch_embed", False):
                widths = [len(bands), *(encoder.get("patch_embed_hidden_sizes") or ())]
                for j in range(len(widths) - 1):
                    layer(f"{home}.pixel_proj.{2 * j}", widths[j + 1], widths[j])
                layer(f"{home}.proj", dim, side**2 * widths[-1])
                after = [dim, *(encoder.get("post_proj_hidden_sizes") or ())]
                for j in range(len(after) - 1):
                    layer(f"{home}.post_proj.{2 * j + 1}", after[j + 1], after[j])
            else:
                layer(f"{home}.proj", dim, len(bands), side, side)
    for name, part, d in (("encoder", encoder, dim), ("decoder", decoder, narrow)):
        for m in part["supported_modality_names"]:
            shapes[f"{name}.composite_encodings.per_modality_channel_embeddings.{m}"] = (
                len(groups_of(part, m)),
                d // 4,
            )
        for i in range(part["depth"]):
            home, head_dim = f"{name}.blocks.{i}", d // part["num_heads"]
            for letter in ("q", "k", "v", "proj"):
                layer(f"{home}.attn.{letter}", d, d)
            if part.get("qk_norm"):
                for letter in ("q", "k"):
                    layer(f"{home}.attn.{letter}_norm", head_dim)
            if part["position_encoding"].endswith("mixed"):
                axes = 3 if "3d" in part["position_encoding"] else 2
                shapes[f"{home}.attn.rope_mixed_freqs"] = (axes, part["num_heads"], head_dim // 2)
            layer(f"{home}.mlp.fc1", int(part["mlp_ratio"] * d), d)
            layer(f"{home}.mlp.fc2", d, int(part["mlp_ratio"] * d))
            layer(f"{home}.norm1", d)
            layer(f"{home}.norm2", d)
        layer(f"{name}.norm", d)
    for i in range(encoder.get("num_projection_layers", 1)):
        layer(f"encoder.project_and_aggregate.projection.{2 * i}", width, width)
    if encoder.get("output_embedding_size"):
        layer("encoder.embedding_projector.projection.0", width, dim)
    if encoder.get("num_register_tokens", 0):
        shapes["encoder.register_tokens"] = (encoder["num_register_tokens"], dim)
    shapes["decoder.mask_token"] = (narrow,)
    layer("decoder.input_norm", width)
    layer("decoder.encoder_to_decoder_embed", narrow, width)
    layer("decoder.to_output_embed", decoder.get("output_embedding_size") or width, narrow)
    state = {}
    for key, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        fan = math.prod(shape[1:]) if len(shape) > 1 and key.endswith("weight") else 16
        state[key] = drawn / math.sqrt(fan) + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
    for name, d in (("encoder", dim), ("decoder", narrow)):
        n = d // 4
        turns = [2 * math.pi * month / 12 for month in range(12)]
        table = [[math.sin(a)] * (n // 2) + [math.cos(a)] * (n // 2) for a in turns]
        state[f"{name}.composite_encodings.month_embed.weight"] = torch.tensor(table, dtype=torch.float64)
    return state


def checkpoint(modalities: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """Write a configuration as published; options named decoder_* are the predictor's alone."""
    shared = {"supported_modality_names": list(modalities), "num_heads": 2, "depth": 2, "mlp_ratio": 2.0}
    shared |= {"position_encoding": "absolute", "qk_norm": False, "tokenization_config": None}
    encoder = shared | {"embedding_size": 32, "max_patch_size": 4, "use_linear_patch_embed": False}
    own = {k.removeprefix("decoder_"): v for k, v in options.items() if k.startswith("decoder_")}
    encoder |= {k: v for k, v in options.items() if not k.startswith("decoder_")}
    decoder = {k: encoder[k] for k in encoder if k in shared or k.startswith(("rope", "temporal"))}
    decoder |= {"encoder_embedding_size": encoder.get("output_embedding_size") or encoder["embedding_size"]}
    decoder |= {"decoder_embedding_size": encoder["embedding_size"], **own}
    return {"encoder_config": encoder, "decoder_config": decoder}


def single(*modalities: str) -> dict[str, Any]:
    return {"overrides": {m: {"band_groups": [list(MODALITIES[m].band_names)]} for m in modalities}}


SENSORS = ("sentinel2_l2a", "sentinel1", "landsat")
MAPS = ("worldcover", "srtm", "openstreetmap_raster")
OTHERS = ("sentinel2", "naip_10", "era5_10", "latlon", "ndvi", "worldcover_onehot", "gse")
ROTARY = {"rope_temporal_coordinate_scale": 0.01, "rope_coordinate_scale": 0.7}
SHUFFLED = {"overrides": {"sentinel2_l2a": {"band_groups": [["B12", "B02"], ["B09"], ["B8A", "B03", "B04"]]}}}
CASES: dict[str, tuple[dict[str, Any], int, float]] = {
    "every kind of modality": (checkpoint(SENSORS + OTHERS), 2, 10),
    "every kind of modality, rotated": (
        checkpoint(SENSORS + OTHERS, position_encoding="rope_3d_mixed", **ROTARY, use_linear_patch_embed=True),
        2,
        5,
    ),
    "weather alone": (checkpoint(("era5l_day_10",), position_encoding="rope_3d_mixed", **ROTARY), 1, 10),
    "maps alone": (checkpoint(MAPS, position_encoding="rope_3d_mixed", **ROTARY), 4, 10),
    "constant alone": (checkpoint(("latlon",)), 1, 10),
    "bands in an order of their own, some left out": (
        checkpoint(("sentinel2_l2a",), tokenization_config=SHUFFLED, use_linear_patch_embed=True),
        3,
        10,
    ),
    "large patches, deep embedding": (
        checkpoint(
            (*SENSORS, "naip_10"),
            tokenization_config=single("sentinel2_l2a", "landsat"),
            use_linear_patch_embed=True,
            patch_embed_hidden_sizes=[5, 3],
            post_proj_hidden_sizes=[24, 32],
        ),
        6,
        2.5,
    ),
    "registers, normalised queries, aggregated before two layers": (
        checkpoint(
            SENSORS,
            position_encoding="rope_3d",
            rope_base=50.0,
            rope_temporal_base=20.0,
            **ROTARY,
            num_register_tokens=2,
            qk_norm=True,
            num_projection_layers=2,
            output_embedding_size=16,
        ),
        4,
        20,
    ),
    "projected before it is aggregated": (
        checkpoint(SENSORS, position_encoding="rope_mixed", aggregate_then_project=False, num_projection_layers=2),
        2,
        10,
    ),
    "rotated by place, a wide predictor": (
        checkpoint(
            SENSORS,
            position_encoding="rope",
            decoder_decoder_embedding_size=48,
            decoder_num_heads=3,
            decoder_depth=3,
            decoder_mlp_ratio=1.0,
            decoder_output_embedding_size=20,
        ),
        4,
        10,
    ),
    "no positions": (checkpoint(SENSORS, position_encoding="none", num_register_tokens=1), 4, 10),
    "an odd width": (checkpoint(("sentinel2_l2a", "srtm"), embedding_size=34, mlp_ratio=1.5), 4, 10),
    "a width that only rotations allow": (
        checkpoint(("sentinel2_l2a", "srtm"), position_encoding="rope_3d_mixed", embedding_size=24, **ROTARY),
        4,
        10,
    ),
}
"""A configuration, the patch size and the metres of a pixel."""


def draw_inputs(
    modalities: list[str], patch_px: int, part: Mapping[str, Any], generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Draw pixels, dates and masks of two samples; of each the first token is visible, the last one to be decoded."""
    rows, cols, dates, inputs, masks = 2, 3, 3, {}, {}
    for m in modalities:
        bands, sets = len(MODALITIES[m].bands), len(groups_of(part, m))
        side = patch_px * factor(m)
        shapes = {
            "series": ((rows * side, cols * side, dates), (rows, cols, dates)),
            "still": ((rows * side, cols * side, 1), (rows, cols, 1)),
            "weather": ((dates,), (dates,)),
            "constant": ((), ()),
        }
        pixels, tokens = shapes[kind_of(m)]
        inputs[m] = torch.randn(2, *pixels, bands, generator=generator, dtype=torch.float64)
        masks[m] = torch.randint(4, (2, *tokens, sets), generator=generator)
    masks[modalities[-1]].flatten(1)[:, -1] = 2
    masks[modalities[0]].flatten(1)[:, 0] = 0
    stamps = torch.tensor([[[31, 0, 2021], [1, 2, 2021], [29, 11, 2022]], [[15, 5, 2016], [2, 6, 2016], [1, 1, 2019]]])
    return inputs, stamps, masks


def to_tokens(m: str, mask: Tensor) -> Tensor:
    """Give a mask the axes that our tokens have."""
    return mask[(slice(None), *[None] * (5 - mask.ndim))]


@pytest.mark.parametrize("name", CASES)
def test_encoder_and_predictor_are_as_defined(name):
    config, patch_px, res = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    state = draw_state(config, generator)
    part = config["encoder_config"]
    inputs, stamps, masks = draw_inputs(part["supported_modality_names"], patch_px, part, generator)
    wanted, aggregated = plain_encoder(config, state, inputs, stamps, masks, patch_px, res)
    decoded = plain_predictor(config, state, wanted, stamps, masks, patch_px)

    published = {key: x.float() for key, x in state.items()}
    encoder = OlmoEarth(olmoearth_config({"model": config}))
    predictor = Predictor(*olmoearth_predictor_config({"model": config}))
    for model, ours in (
        (encoder, olmoearth_encoder_state(published)),
        (predictor, olmoearth_predictor_state(published)),
    ):
        check_fit(model.state_dict(), ours, source=name)
        model.load_state_dict(ours)
        model.eval().requires_grad_(False)
    back = published_encoder_state(encoder.state_dict(), encoder.config)
    back |= published_predictor_state(predictor.state_dict(), predictor.config)
    assert all(torch.equal(back.pop(key), x) for key, x in published.items())
    assert not back

    pixels = {m: to_pixels(m, x).float() for m, x in inputs.items()}
    grids = {m: to_tokens(m, mask) for m, mask in masks.items()}
    visible = {m: mask == 0 for m, mask in grids.items()}
    with torch.no_grad():
        out = encoder(pixels, stamps, patch_px=patch_px, pixel_m=res, visible=visible)
        latent = {m: as_recorded(x.float(), out.tokens[m]) for m, x in wanted.items()}
        predictions = predictor(latent, grids, stamps, patch_px=patch_px)
    for m, x in wanted.items():
        torch.testing.assert_close(as_recorded(out.tokens[m], x).double(), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.aggregated.double(), aggregated, rtol=1e-4, atol=1e-4)
    rows = predictions.chosen.put(predictions.tokens, sum(predictions.sizes.values()))
    for x, y in zip(decoded.values(), rows.split(list(predictions.sizes.values()), 1), strict=True):
        torch.testing.assert_close(as_recorded(y, x).double(), x, rtol=1e-4, atol=1e-4)


def plain_loss(predicted: State, target: State, masks: State) -> dict[str, float]:
    """Patch discrimination of each modality, sample after sample."""
    losses = {}
    for m, mask in masks.items():
        samples = []
        for p, t, wanted in zip(predicted[m], target[m], mask == 2, strict=True):
            if wanted.any():
                rows = F.normalize(p[wanted], dim=-1) @ F.normalize(t[wanted], dim=-1).T / 0.1
                samples.append(float(-rows.log_softmax(1).diagonal().mean() * 2 * 0.1))
        losses[m] = sum(samples) / max(len(samples), 1)
    return losses


TRAINED = [name for name in CASES if not name.endswith("alone")]


@pytest.mark.parametrize("name", TRAINED)
def test_losses_of_training_are_as_defined(name):
    config, patch_px, _ = CASES[name]
    part = config["encoder_config"]
    width = part.get("output_embedding_size") or part["embedding_size"]
    config = config | {"decoder_config": config["decoder_config"] | {"output_embedding_size": width}}
    generator = torch.Generator().manual_seed(len(name) + 1)
    state, frozen = (draw_state(config, generator) for _ in range(2))
    views = [draw_inputs(part["supported_modality_names"], patch_px, part, generator) for _ in range(2)]
    wanted, pooled = [], []
    for inputs, stamps, masks in views:
        latent, aggregated = plain_encoder(config, state, inputs, stamps, masks, patch_px, 10)
        target = {m: embed(x, m, part, frozen, patch_px) for m, x in inputs.items()}
        if part.get("output_embedding_size"):
            target = {m: linear(x, frozen, "encoder.embedding_projector.projection.0") for m, x in target.items()}
        wanted.append(plain_loss(plain_predictor(config, state, latent, stamps, masks, patch_px), target, masks))
        pooled.append(F.normalize(aggregated, dim=-1))
    contrast = 0.3 * F.cross_entropy(pooled[0] @ pooled[1].T / 0.2, torch.arange(2))

    model = LatentMIM(
        LatentMIMConfig(
            encoder=olmoearth_config({"model": config}),
            predictor=olmoearth_predictor_config({"model": config})[0],
            loss={"type": "modality_patch_discrimination", "tau": 0.1},
            contrast_weight=0.3,
            contrast_temperature=0.2,
        )
    ).eval()
    published, teacher = ({key: x.float() for key, x in given.items()} for given in (state, frozen))
    model.encoder.load_state_dict(olmoearth_encoder_state(published))
    model.predictor.load_state_dict(olmoearth_predictor_state(published))
    known = olmoearth_encoder_state(teacher)
    model.teacher.load_state_dict({key: known[key] for key in model.teacher.state_dict()})
    out = model(
        Views(
            tuple(
                View(
                    inputs={m: to_pixels(m, x).float() for m, x in inputs.items()},
                    timestamps=stamps,
                    masks={m: to_tokens(m, mask) for m, mask in masks.items()},
                    patch_px=patch_px,
                )
                for inputs, stamps, masks in views
            )
        )
    )
    for got, losses in zip(out.views, wanted, strict=True):
        assert {m: x.item() for m, x in got.items()} == pytest.approx(losses, rel=1e-4, abs=1e-5)
    assert out.contrast.item() == pytest.approx(contrast.item(), rel=1e-4, abs=1e-5)
    out.total.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.requires_grad)
