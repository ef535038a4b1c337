"""The published checkpoint of AnySat's pretraining: student, predictor and teacher, to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from panterra.errors import InputError
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.anysat_attention import Layout
from panterra.models.anysat_convert import anysat_config_of, anysat_state, published_anysat_state
from panterra.models.anysat_predictor import AnySatPredictor, AnySatPredictorConfig
from panterra.models.convert import check_fit, open_state_dict

STUDENT, PREDICTOR, TEACHER, MASKED = "model.encoder.", "model.predictor.", "target_encoder.", "model.masked_token"
"""What the names of a published training checkpoint begin with, and one whole name."""

_PREDICTOR = {
    "predictor_embed.": "input.",
    "predictor_blocks.": "blocks.",
    "predictor_norm.": "norm.",
    "predictor_proj.": "output.",
    "cls_token": "class_token",
}
"""Published name -> ours; `mask_token` is the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnySatTraining:
    """Where a pretraining stands: all that `panterra.objectives.jepa.JEPA` holds."""

    encoder: AnySatConfig
    predictor: AnySatPredictorConfig
    state: Mapping[str, Tensor]
    """As a JEPA's state dict: "masked_token" and all of "encoder.", "predictor." and "teacher."."""


def load_anysat_training(path: Path | str, *, layout: Layout = "tokens", predictor_heads: int = 16) -> AnySatTraining:
    """Read `AnySat_full.pth`, every entry of it, so that pretraining can go on from there.

    Only the number of the predictor's heads is not in the file. Optimiser and schedule start afresh. Raises InputError
    for names that are none of a training checkpoint's, and for missing ones.
    """
    path = Path(path)
    published = open_state_dict(path)
    known = (STUDENT, PREDICTOR, TEACHER)
    if unknown := [key for key in published if key != MASKED and not key.startswith(known)]:
        rest = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(
            f"{path} holds {unknown[0]}{rest}; wanted a training checkpoint of AnySat, whose names are {MASKED} or "
            f"begin with {', '.join(known)}"
        )
    student, teacher = ({k.removeprefix(p): v for k, v in published.items() if k.startswith(p)} for p in known[::2])
    encoder = anysat_config_of(student, layout=layout)
    state = {
        **({"masked_token": published[MASKED]} if MASKED in published else {}),
        **{f"encoder.{key}": value for key, value in anysat_state(student).items()},
        **{f"predictor.{key}": value for key, value in anysat_predictor_state(published, prefix=PREDICTOR).items()},
        **{f"teacher.{key}": value for key, value in anysat_state(teacher).items()},
    }
    predictor = _predictor_config(state, layout, predictor_heads, path)
    check_fit(_shapes(encoder, predictor), state, source=str(path))
    return AnySatTraining(
        encoder=encoder,
        predictor=predictor,
        state={key: value.to(torch.float32) for key, value in state.items()},
    )


def anysat_predictor_state(published: Mapping[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """Rename the predictor's entries of a published state dict to ours."""
    entries = {key.removeprefix(prefix): value for key, value in published.items() if key.startswith(prefix)}
    return {_renamed(key, _PREDICTOR): value for key, value in entries.items()}


def published_training_state(training: AnySatTraining) -> dict[str, Tensor]:
    """Rename all entries to the published names; undoes `load_anysat_training`."""

    def part(home: str) -> dict[str, Tensor]:
        return {k.removeprefix(home): v for k, v in training.state.items() if k.startswith(home)}

    back = {new: old for old, new in _PREDICTOR.items()}
    return {
        MASKED: training.state["masked_token"],
        **published_anysat_state(part("encoder."), training.encoder, prefix=STUDENT),
        **{PREDICTOR + _renamed(key, back): value for key, value in part("predictor.").items()},
        **published_anysat_state(part("teacher."), training.encoder, prefix=TEACHER),
    }


def _renamed(key: str, table: Mapping[str, str]) -> str:
    old = next((old for old in table if key.startswith(old)), "")
    return table.get(old, "") + key.removeprefix(old)


def _predictor_config(state: Mapping[str, Tensor], layout: Layout, heads: int, path: Path) -> AnySatPredictorConfig:
    """Read the predictor's sizes off its entries."""
    token = state.get("predictor.mask_token")
    if token is None:
        raise InputError(f"{path} has no predictor in it, so no pretraining can go on from there; use load_model")
    blocks = {key.split(".")[2] for key in state if key.startswith("predictor.blocks.")}
    return AnySatPredictorConfig(dim=token.shape[-1], depth=len(blocks), heads=heads, layout=layout)


def _shapes(encoder: AnySatConfig, predictor: AnySatPredictorConfig) -> dict[str, Tensor]:
    """Give the entries that a training has, without their values."""
    with torch.device("meta"):
        model, head = AnySat(encoder).state_dict(), AnySatPredictor(predictor, encoder.dim).state_dict()
        masked = torch.zeros(1, 1, encoder.dim)
    return {
        "masked_token": masked,
        **{f"encoder.{key}": value for key, value in model.items()},
        **{f"predictor.{key}": value for key, value in head.items()},
        **{f"teacher.{key}": value for key, value in model.items()},
    }
