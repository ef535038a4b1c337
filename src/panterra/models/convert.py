"""Published checkpoints in our own words, and back."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.olmoearth import SPATIAL_FACTOR, TARGET_ONLY, BandSets, OlmoEarthConfig, Position

Json = Mapping[str, Any]

POSITIONS = ("absolute", "rope", "rope_mixed", "rope_3d", "rope_3d_mixed", "none")


def olmoearth_config(experiment: Json) -> OlmoEarthConfig:
    """Read the encoder's configuration out of a published `config.json`, by the rules of the published loader."""
    model = experiment.get("model")
    encoder = model.get("encoder_config") if isinstance(model, Mapping) else None
    if not isinstance(encoder, Mapping):
        raise InputError('config.json has no "model" with an "encoder_config"; is it an OlmoEarth checkpoint?')
    linear = bool(encoder.get("use_linear_patch_embed", False))
    return replace(
        _trunk_config(encoder),
        dim=int(encoder.get("embedding_size", 16)),
        base_patch_px=int(encoder.get("max_patch_size", 8)),
        convolution=not linear,
        pixel_hidden=tuple(encoder.get("patch_embed_hidden_sizes") or ()) if linear else (),
        post_hidden=tuple(encoder.get("post_proj_hidden_sizes") or ()) if linear else (),
        registers=int(encoder.get("num_register_tokens", 0)),
        drop_path=float(encoder.get("drop_path", 0.1)),
        projection_layers=int(encoder.get("num_projection_layers", 1)),
        aggregate_first=bool(encoder.get("aggregate_then_project", True)),
        output_dim=encoder.get("output_embedding_size"),
    )


def olmoearth_predictor_config(experiment: Json) -> tuple[OlmoEarthConfig, int]:
    """Read the predictor's configuration, and the width of the tokens it takes, out of a published `config.json`."""
    model = experiment.get("model")
    decoder = model.get("decoder_config") if isinstance(model, Mapping) else None
    if not isinstance(decoder, Mapping):
        raise InputError('config.json has no "model" with a "decoder_config"; only pretraining checkpoints have one')
    encoder_dim = int(decoder.get("encoder_embedding_size", 16))
    config = replace(
        _trunk_config(decoder),
        dim=int(decoder.get("decoder_embedding_size", 16)),
        drop_path=float(decoder.get("drop_path", 0.0)),
        output_dim=int(decoder.get("output_embedding_size") or encoder_dim),
    )
    return config, encoder_dim


def _trunk_config(part: Json) -> OlmoEarthConfig:
    """Read what encoder and predictor have in common."""
    position = part.get("spatial_pos_encoding") or part.get("position_encoding", "absolute")
    if position not in POSITIONS:
        raise InputError(f"config.json asks for position encoding {position!r}; known: {', '.join(POSITIONS)}")
    names = tuple(part.get("supported_modality_names", ()))
    unknown = [name for name in names if name not in MODALITIES]
    if unknown or not names:
        raise InputError(f"config.json lists modalities {names}; known: {', '.join(sorted(MODALITIES))}")
    return OlmoEarthConfig(
        dim=0,
        depth=int(part.get("depth", 2)),
        heads=int(part.get("num_heads", 2)),
        mlp_ratio=float(part.get("mlp_ratio", 1.0)),
        modalities=names,
        observed=tuple(name for name in names if name not in TARGET_ONLY) or names,
        band_sets=_band_sets(part.get("tokenization_config")),
        position=_position(position),
        rope_base=float(part.get("rope_base", 10000.0)),
        rope_scale=float(part.get("rope_coordinate_scale", 1.0)),
        rope_mixed_base=float(part.get("rope_mixed_base", 10.0)),
        rope_time_fraction=float(part.get("temporal_rope_dim_frac", 0.25)),
        rope_time_base=part.get("rope_temporal_base"),
        rope_time_scale=float(part.get("rope_temporal_coordinate_scale", 1.0)),
        qk_norm=bool(part.get("qk_norm", False)),
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
_ENCODINGS = {
    "composite_encodings.per_modality_channel_embeddings.": "encodings.channel.",
    "composite_encodings.month_embed.weight": "encodings.month",
}
_ENCODER = {
    **_ENCODINGS,
    "project_and_aggregate.projection.": "projection.",
    "embedding_projector.projection.0.": "output.",
    "register_tokens": "registers",
}
_PREDICTOR = {**_ENCODINGS, "encoder_to_decoder_embed.": "input.", "to_output_embed.": "output."}
_OLD = re.compile(r"^(encoder|decoder|target_encoder)\.composite_encodings\.pos_embed$")


def olmoearth_encoder_state(published: Mapping[str, Tensor], *, prefix: str = "encoder.") -> dict[str, Tensor]:
    """Rename the encoder's entries of a published state dict to ours.

    The prefix "target_encoder." gives pretraining's frozen copy.
    """
    return _from_published(published, prefix, _ENCODER, ("qkv",))


def olmoearth_predictor_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the predictor's entries of a published state dict to ours."""
    return _from_published(published, "decoder.", _PREDICTOR, ("q", "kv"))


def _from_published(
    published: Mapping[str, Tensor], prefix: str, names: Mapping[str, str], joined: tuple[str, ...]
) -> dict[str, Tensor]:
    """Rename by the tables; `joined` says which of a block's published q, k and v are one layer of ours."""
    state: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    frequencies: dict[int, Tensor] = {}
    for key, value in published.items():
        if not key.startswith(prefix) or _OLD.match(key):
            continue
        name = _rename(key.removeprefix(prefix), names)
        if found := re.match(r"^(blocks\.\d+\.attn)\.([qkv])\.(weight|bias)$", name):
            parts.setdefault((found[1], found[3]), {})[found[2]] = value
        elif rotary := re.match(r"^blocks\.(\d+)\.attn\.rope_mixed_freqs$", name):
            frequencies[int(rotary[1])] = value
        else:
            state[name] = value.flatten(1) if value.ndim == 4 and name.endswith(".proj.weight") else value
    for (home, kind), qkv in parts.items():
        if missing := {"q", "k", "v"} - set(qkv):
            raise InputError(f"the checkpoint lacks {', '.join(sorted(missing))} of {home}; it is incomplete")
        state |= {f"{home}.{name}.{kind}": torch.cat([qkv[letter] for letter in name]) for name in joined}
    if frequencies:
        state["rotary.frequencies"] = torch.stack([frequencies[i] for i in sorted(frequencies)])
    return state


def published_encoder_state(
    state: Mapping[str, Tensor], config: OlmoEarthConfig, *, prefix: str = "encoder."
) -> dict[str, Tensor]:
    """Rename our encoder's entries, or their gradients, to the published names; undoes `olmoearth_encoder_state`."""
    return _to_published(state, config, prefix, _ENCODER, ("qkv",))


def published_predictor_state(state: Mapping[str, Tensor], config: OlmoEarthConfig) -> dict[str, Tensor]:
    """Rename our predictor's entries, or their gradients, to the published names."""
    return _to_published(state, config, "decoder.", _PREDICTOR, ("q", "kv"))


def _to_published(
    state: Mapping[str, Tensor],
    config: OlmoEarthConfig,
    prefix: str,
    names: Mapping[str, str],
    joined: tuple[str, ...],
) -> dict[str, Tensor]:
    published: dict[str, Tensor] = {}
    for name, value in state.items():
        head, _, rest = name.partition(".")
        found = re.match(r"^(blocks\.\d+\.attn)\.(\w+)\.(weight|bias)$", name)
        if found and found[2] in joined:
            for letter, piece in zip(found[2], value.chunk(len(found[2])), strict=True):
                published[f"{prefix}{found[1]}.{letter}.{found[3]}"] = piece
            continue
        if name == "rotary.frequencies":
            published |= {f"{prefix}blocks.{i}.attn.rope_mixed_freqs": layer for i, layer in enumerate(value)}
        elif head == "patch_embeddings":
            published |= {prefix + key: part for key, part in _published_embedding(rest, value, config)}
        elif head == "projection":
            index, _, kind = rest.partition(".")
            published[f"{prefix}project_and_aggregate.projection.{2 * int(index)}.{kind}"] = value
        else:
            old, new = next((pair for pair in names.items() if name.startswith(pair[1])), ("", ""))
            published[prefix + old + name.removeprefix(new)] = value
    return published


def _published_embedding(name: str, value: Tensor, config: OlmoEarthConfig) -> Iterable[tuple[str, Tensor]]:
    modality, index, layer, *rest = name.split(".")
    home = f"patch_embeddings.per_modality_embeddings.{modality}.{modality}__{index}"
    if layer in ("pixel", "post"):
        number = 2 * int(rest[0]) + (layer == "post")
        yield f"{home}.{layer}_proj.{number}.{rest[1]}", value
    elif MODALITIES[modality].kind not in ("series", "still"):
        yield f"{home}.{rest[0]}", value
    else:
        if config.convolution and value.ndim == 2:
            side = config.base_patch_px * SPATIAL_FACTOR.get(modality, 1)
            value = value.unflatten(1, (-1, side, side))
        yield f"{home}.proj.{rest[0]}", value


def _rename(name: str, names: Mapping[str, str]) -> str:
    for pattern, part in _RENAME:
        if found := pattern.match(name):
            rest = name[found.end() :]
            home = f"patch_embeddings.{found[1]}.{found[2]}"
            # The published stacks alternate layers and activations, ours hold the layers.
            return f"{home}.proj.{rest}" if part == "proj" else f"{home}.{part}.{int(found[3]) // 2}.{rest}"
    for old, new in names.items():
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


def open_state_dict(path: Path) -> dict[str, Tensor]:
    """Open a pickled state dict, bare or in a training checkpoint, without running anything that is in it."""
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}; fetch it from where the weights are published")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} holds more than tensors, so it was not opened; get the file from its publisher"
        ) from None
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError) as error:
        reason = str(error).split("\n")[0][:160]
        raise InputError(f"{path} is damaged or cut short ({reason}); fetch it again") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} is not a dictionary of tensors; wanted a state dict")
    return state
