"""Published checkpoints in our own words, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.olmoearth import OBSERVED, BandSets, OlmoEarthConfig, Position

Json = Mapping[str, Any]

POSITIONS = ("absolute", "rope", "rope_mixed", "rope_3d", "rope_3d_mixed", "none")


def olmoearth_config(experiment: Json) -> OlmoEarthConfig:
    """Read the encoder's configuration out of a published `config.json`, by the rules of spec 2.9."""
    model = experiment.get("model")
    encoder = model.get("encoder_config") if isinstance(model, Mapping) else None
    if not isinstance(encoder, Mapping):
        raise InputError('config.json has no "model" with an "encoder_config"; is it an OlmoEarth checkpoint?')
    position = encoder.get("spatial_pos_encoding") or encoder.get("position_encoding", "absolute")
    if position not in POSITIONS:
        raise InputError(f"config.json asks for position encoding {position!r}; known: {', '.join(POSITIONS)}")
    names = tuple(encoder.get("supported_modality_names", ()))
    unknown = [name for name in names if name not in MODALITIES]
    if unknown or not names:
        raise InputError(f"config.json lists modalities {names}; known: {', '.join(sorted(MODALITIES))}")
    linear = bool(encoder.get("use_linear_patch_embed", False))
    dim = int(encoder.get("embedding_size", 16))
    return OlmoEarthConfig(
        dim=dim,
        depth=int(encoder.get("depth", 2)),
        heads=int(encoder.get("num_heads", 2)),
        mlp_ratio=float(encoder.get("mlp_ratio", 1.0)),
        modalities=names,
        observed=tuple(name for name in OBSERVED if name in names),
        band_sets=_band_sets(encoder.get("tokenization_config")),
        base_patch_px=int(encoder.get("max_patch_size", 8)),
        convolution=not linear,
        pixel_hidden=tuple(encoder.get("patch_embed_hidden_sizes") or ()) if linear else (),
        post_hidden=tuple(encoder.get("post_proj_hidden_sizes") or ()) if linear else (),
        position=_position(position),
        rope_base=float(encoder.get("rope_base", 10000.0)),
        rope_scale=float(encoder.get("rope_coordinate_scale", 1.0)),
        rope_mixed_base=float(encoder.get("rope_mixed_base", 10.0)),
        rope_time_fraction=float(encoder.get("temporal_rope_dim_frac", 0.25)),
        rope_time_base=encoder.get("rope_temporal_base"),
        rope_time_scale=float(encoder.get("rope_temporal_coordinate_scale", 1.0)),
        registers=int(encoder.get("num_register_tokens", 0)),
        qk_norm=bool(encoder.get("qk_norm", False)),
        drop_path=float(encoder.get("drop_path", 0.1)),
        projection_layers=int(encoder.get("num_projection_layers", 1)),
        aggregate_first=bool(encoder.get("aggregate_then_project", True)),
        output_dim=encoder.get("output_embedding_size"),
    )


def _position(name: str) -> Position:
    return name  # type: ignore[return-value]  # checked against POSITIONS by the caller


def _band_sets(tokenization: Json | None) -> dict[str, BandSets]:
    overrides = (tokenization or {}).get("overrides") or {}
    groups = {
        name: tuple(tuple(group) for group in entry.get("band_groups") or entry.get("band_sets") or ())
        for name, entry in overrides.items()
    }
    for name, sets in groups.items():
        known = MODALITIES[name].band_names if name in MODALITIES else ()
        wrong = [band for group in sets for band in group if band not in known]
        if wrong or not sets:
            raise InputError(f"config.json groups {name} into {sets}; its bands are {', '.join(known) or 'unknown'}")
    return groups


# Published name -> ours, applied in order to encoder entries; a block's q, k and v are joined afterwards.
_RENAME = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^patch_embeddings\.per_modality_embeddings\.(\w+)\.\w+?__(\d+)\.pixel_proj\.(\d+)\.", "pixel"),
        (r"^patch_embeddings\.per_modality_embeddings\.(\w+)\.\w+?__(\d+)\.post_proj\.(\d+)\.", "post"),
        (r"^patch_embeddings\.per_modality_embeddings\.(\w+)\.\w+?__(\d+)\.(?:proj\.)?", "proj"),
    )
)
_PLAIN = {
    "composite_encodings.per_modality_channel_embeddings.": "encodings.channel.",
    "composite_encodings.month_embed.weight": "encodings.month",
    "project_and_aggregate.projection.": "projection.",
    "embedding_projector.projection.0.": "output.",
    "register_tokens": "registers",
}
_OLD = re.compile(r"^(encoder|decoder|target_encoder)\.composite_encodings\.pos_embed$")


def olmoearth_encoder_state(published: Mapping[str, Tensor], *, prefix: str = "encoder.") -> dict[str, Tensor]:
    """Rename the encoder's entries of a published state dict to ours; spec 2.8 lists them."""
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    frequencies: dict[int, Tensor] = {}
    for key, value in published.items():
        if not key.startswith(prefix) or _OLD.match(key):
            continue
        name = _rename(key.removeprefix(prefix))
        if joined := re.match(r"^(blocks\.\d+\.attn)\.([qkv])\.(weight|bias)$", name):
            parts.setdefault(f"{joined[1]}.qkv.{joined[3]}", {})[joined[2]] = value
        elif rotary := re.match(r"^blocks\.(\d+)\.attn\.rope_mixed_freqs$", name):
            frequencies[int(rotary[1])] = value
        else:
            state[name] = value.flatten(1) if value.ndim == 4 and name.endswith(".proj.weight") else value
    for name, qkv in parts.items():
        if missing := {"q", "k", "v"} - set(qkv):
            raise InputError(f"the checkpoint lacks {', '.join(sorted(missing))} for {name}; it is incomplete")
        state[name] = torch.cat([qkv["q"], qkv["k"], qkv["v"]])
    if frequencies:
        state["rotary.frequencies"] = torch.stack([frequencies[i] for i in sorted(frequencies)])
    return state


def _rename(name: str) -> str:
    for pattern, part in _RENAME:
        if found := pattern.match(name):
            rest = name[found.end() :]
            home = f"patch_embeddings.{found[1]}.{found[2]}"
            # The published stacks alternate layers and activations, ours hold the layers.
            return f"{home}.proj.{rest}" if part == "proj" else f"{home}.{part}.{int(found[3]) // 2}.{rest}"
    for old, new in _PLAIN.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    if found := re.match(r"^projection\.(\d+)\.(.*)$", name):
        return f"projection.{int(found[1]) // 2}.{found[2]}"
    return name


def check_fit(ours: Mapping[str, Tensor], given: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse a state dict that does not fit, in one line that names the first few differences."""
    missing, extra = sorted(set(ours) - set(given)), sorted(set(given) - set(ours))
    shapes = [
        f"{name} is {list(given[name].shape)} instead of {list(ours[name].shape)}"
        for name in sorted(set(ours) & set(given))
        if ours[name].shape != given[name].shape
    ]
    problems = _first("missing", missing) + _first("unexpected", extra) + _first("wrong shape:", shapes)
    if problems:
        raise InputError(f"{source} does not fit its configuration ({'; '.join(problems)}); use the files it came with")


def _first(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return [f"{what} {', '.join(names[:2])}{more}"]
