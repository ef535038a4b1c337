"""AnySat's weights: the published files in our words and back, and our own files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from panterra.errors import InputError
from panterra.modalities import Band, Modality
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.anysat_attention import Layout
from panterra.models.anysat_sensors import NEW_SENSORS, SENSORS, Sensor
from panterra.models.anysat_statistics import as_json, statistics_from_json
from panterra.models.convert import check_fit, open_state_dict
from panterra.plain import as_lists, as_tuples

ANYSAT_LICENCE = "MIT"
FORMAT = "panterra-anysat-1"

# Published name -> ours. The published combiner is the last of the blocks; its number depends on the depth.
_STAGES = {f"inconv.{4 * i + j}.": f"stages.{i}.{part}." for i in range(5) for j, part in enumerate(("linear", "norm"))}
_SERIES = {
    "pad_parameter": "pad",
    **{f"patch_embed.{old}": new for old, new in _STAGES.items()},
    "patch_embed.attention_heads.Q": "query",
    "patch_embed.attention_heads.fc1_k.": "key.",
    "patch_embed.in_norm.": "in_norm.",
    "patch_embed.mlp.0.": "output.linear.",
    "patch_embed.mlp.1.": "output.norm.",
    "patch_embed.out_norm.": "out_norm.",
}
_IMAGE = {
    "patch_embed.weight": "embed.weight",
    "mlp.0.": "expand.",
    "mlp.1.": "norm1.",
    "mlp.3.": "shrink.",
    "mlp.4.": "norm2.",
}
_COMBINER = {
    "attn.q_learned": "query",
    "attn.wk.": "key.",
    "attn.wv.": "value.",
    "attn.proj.": "proj.",
    "attn.rpe_k.lookup_table_weight": "distance",
}
_TRUNK = {
    "cls_token": "class_token",
    "spatial_encoder.cls_token": "patch_encoder.class_token",
    "spatial_encoder.predictor_norm.": "patch_encoder.norm.",
    "spatial_encoder.predictor_blocks.": "patch_encoder.blocks.",
}
_TABLE = ("attn.rpe_k.lookup_table_weight", "attn.distance")
_PROJECTOR = re.compile(r"^projector_([^.]+)\.")


def anysat_state(published: Mapping[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """Rename the entries of a published state dict to ours.

    The prefix "target_encoder." gives the teacher, "model.encoder." the student of a training checkpoint.
    """
    entries = {key.removeprefix(prefix): value for key, value in published.items() if key.startswith(prefix)}
    last = _depth(entries)
    return {_ours(key, last): value for key, value in entries.items()}


def published_anysat_state(state: Mapping[str, Tensor], config: AnySatConfig, *, prefix: str = "") -> dict[str, Tensor]:
    """Rename our entries, or their gradients, to the published names in the published order; undoes `anysat_state`."""
    sensors = {sensor.name: sensor for sensor in config.sensors}
    renamed = {_published(key, config.depth, sensors): value for key, value in state.items()}
    return {prefix + key: renamed[key] for key in sorted(renamed, key=_place_in_file)}


def _place_in_file(key: str) -> tuple[int, str]:
    """Put projectors by name between the class token and the rest, which keeps its order."""
    if key.startswith("projector_"):
        return 1, key.partition(".")[0]
    return (0 if key == "cls_token" else 2), ""


def _ours(key: str, last: int) -> str:
    if found := _PROJECTOR.match(key):
        rest = key[found.end() :]
        return f"projectors.{found[1]}.{_swap(rest, _IMAGE if _is_image(rest) else _SERIES)}"
    if key.startswith(home := f"blocks.{last}."):
        return "combiner." + _swap(key.removeprefix(home), _COMBINER)
    return _swap(key, _TRUNK).replace(*_TABLE)


def _published(key: str, depth: int, sensors: Mapping[str, Sensor]) -> str:
    head, _, rest = key.partition(".")
    if head == "projectors":
        name, _, rest = rest.partition(".")
        table = _SERIES if sensors[name].dated else _IMAGE
        return f"projector_{name}.{_swap(rest, {new: old for old, new in table.items()})}"
    if head == "combiner":
        return f"blocks.{depth}.{_swap(rest, {new: old for old, new in _COMBINER.items()})}"
    old = _swap(key, {new: old for old, new in _TRUNK.items()})
    return old.replace(_TABLE[1], _TABLE[0])


def _is_image(rest: str) -> bool:
    return rest == "patch_embed.weight" or rest.startswith("mlp.")


def _swap(key: str, table: Mapping[str, str]) -> str:
    old = next((old for old in table if key.startswith(old)), "")
    return table.get(old, "") + key.removeprefix(old)


def _depth(entries: Mapping[str, Tensor]) -> int:
    """Find the number of the last block, which is the combiner."""
    return max((int(found[1]) for key in entries if (found := re.match(r"^blocks\.(\d+)\.", key))), default=0)


def anysat_config_of(published: Mapping[str, Tensor], *, layout: Layout = "tokens") -> AnySatConfig:
    """Read a configuration off the shapes of a published state dict, given without prefix. Raises InputError."""
    table = published.get("spatial_encoder.predictor_blocks.0.attn.rpe_k.lookup_table_weight")
    token = published.get("cls_token")
    if table is None or token is None or table.ndim != 3:
        raise InputError("the file has no AnySat encoder in it; wanted AnySat.pth, or a checkpoint of its training")
    names = list(dict.fromkeys(found[1] for key in published if (found := _PROJECTOR.match(key))))
    known = {**SENSORS, **NEW_SENSORS}
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"the file has a projector for {unknown[0]!r}; known sensors: {', '.join(known)}")
    dim = token.shape[-1]
    order = [name for name in known if name in names]
    return AnySatConfig(
        dim=dim,
        depth=_depth(published),
        heads=dim // table.shape[1],
        sensors=tuple(known[name] for name in order),
        layout=layout,
    )


def load_anysat(path: Path | str, *, name: str | None = None, layout: Layout = "tokens") -> AnySat:
    """Load the published weights: `AnySat.pth`, a folder that holds it, or a checkpoint of the published training.

    Of a training checkpoint the teacher is taken, as published fine-tuning does. Raises InputError.
    """
    path = Path(path)
    if path.is_dir():
        found = [p for p in (path / "AnySat.pth", path / "models" / "AnySat.pth") if p.is_file()]
        if not found:
            raise InputError(f"{path} has no AnySat.pth; fetch it from huggingface.co/g-astruc/AnySat")
        path = found[0]
    published = open_state_dict(path)
    for prefix in ("target_encoder.", "model.encoder."):
        if any(key.startswith(prefix) for key in published):
            published = {k.removeprefix(prefix): v for k, v in published.items() if k.startswith(prefix)}
            break
    with torch.random.fork_rng(devices=[]):
        model = AnySat(anysat_config_of(published, layout=layout), name=name or str(path.resolve()))
    state = {key: value.to(torch.float32) for key, value in anysat_state(published).items()}
    check_fit(model.state_dict(), state, source=str(path))
    model.load_state_dict(state)
    model.licence = ANYSAT_LICENCE
    return model.eval()


def anysat_json(model: AnySat) -> dict[str, Any]:
    """Say in plain JSON all that a model is besides its tensors: sizes, sensors, statistics, licence."""
    return {
        "format": FORMAT,
        "name": model.name,
        "licence": model.licence,
        "config": as_lists(asdict(model.config)),
        "statistics": {name: as_json(found) for name, found in model.statistics.items()},
    }


def anysat_from_json(saved: Mapping[str, Any], *, name: str) -> AnySat:
    """Build the model that `anysat_json` described, whose weights are still to be loaded. Raises InputError."""
    if saved.get("format") != FORMAT:
        raise InputError(f"the configuration is {saved.get('format')!r}, not {FORMAT!r}; update panterra")
    try:
        config = dict(saved["config"])
        config["sensors"] = tuple(sensor_from(sensor) for sensor in config["sensors"])
        statistics = {key: statistics_from_json(value) for key, value in saved["statistics"].items()}
        with torch.random.fork_rng(devices=[]):
            model = AnySat(AnySatConfig(**config), name=name, statistics=statistics)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the configuration is incomplete ({error}); save the model again") from None
    model.licence = saved.get("licence")
    return model


def sensor_from(saved: Mapping[str, Any]) -> Sensor:
    """Make a sensor again from its fields as JSON gives them."""
    fields = as_tuples(saved)
    if (row := fields["declared"]) is not None:
        row = {**row, "bands": tuple(Band(**band) for band in row["bands"])}
        fields["declared"] = Modality(**row)
    return Sensor(**fields)
