"""Recorded numbers of the published models: every case of a folder laid out like `golden/olmoearth`.

`make parity GOLDEN=DIR` runs this on any such folder, or on the parent of both families, and fails on what it does not
know; AnySat's cases are those of test_parity_anysat.py. Without GOLDEN the cases in `tests/golden` run, and those of
`../shared/golden` where that is present; kinds of cases that Panterra does not reproduce yet are then expected to fail.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from panterra.data.olmoearth_h5 import CropSize, num_dates, open_corpus, read_item, valid_starts
from panterra.errors import InputError
from panterra.evaluate import metrics, quantise
from panterra.evaluate.probes import knn_scores
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
from panterra.models.features import Tokens
from panterra.models.normalize import BAND_NORMALIZATIONS, normalize_bands, normalize_olmoearth, olmoearth_tables
from panterra.models.olmoearth import OBSERVED, TARGET_ONLY, V1_BAND_SETS, OlmoEarth, released_config
from panterra.models.patches import resize
from panterra.models.pooling import concat_pool, instance_pool, spatial_pool
from panterra.models.positions import (
    axial_frequencies,
    days_since_2000,
    mixed_frequencies,
    month_table,
    rotate,
    sincos1d,
    sincos2d,
    token_coordinates,
)
from panterra.models.predictor import DECODE, Chosen, Predictor
from panterra.models.weights import load_model
from panterra.objectives.latent_mim import LatentMIM, LatentMIMConfig, View, Views
from panterra.objectives.losses import LOSSES, info_nce, koleo, pair_up, token_loss
from panterra.objectives.masking import STRATEGIES, make_masks
from panterra.objectives.teacher import Teacher
from test_parity_anysat import is_anysat

ROOT = Path(__file__).parent.parent
RTOL, ATOL = 1e-4, 2e-5


@dataclass(frozen=True)
class Case:
    """One comparison; `run` raises where the numbers differ. None: Panterra has nothing to compare."""

    name: str
    run: Callable[[], None] | None


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.to(wanted.dtype), wanted, rtol=RTOL, atol=ATOL)


def find_cases(root: Path) -> Iterator[Case]:
    """Enumerate a folder; every file in it belongs to some case."""
    if is_anysat(root):
        return
    if (root / "olmoearth").is_dir() or (root / "anysat").is_dir():
        for family in sorted(path for path in root.iterdir() if path.is_dir()):
            yield from (Case(f"{family.name}/{case.name}", case.run) for case in find_cases(family))
        return
    for path in sorted(root.iterdir()):
        if path.is_dir():
            yield from folder_cases(path)
        elif path.suffix == ".json" and path.name != "INDEX.json" and not path.stem.endswith("_config"):
            yield from file_cases(path)
        elif path.suffix == ".safetensors" and not (path.with_suffix(".json").exists() or belongs_to_model(path)):
            yield Case(path.name, None)


def belongs_to_model(path: Path) -> bool:
    return path.stem.endswith("_weights") and path.with_name(f"{path.stem[:-8]}_config.json").exists()


def folder_cases(path: Path) -> Iterator[Case]:
    if (path / "outputs.json").is_file():
        listing = json.loads((path / "outputs.json").read_text())
        source = Source(path / "config.json", path / "weights.pth")
        yield from encoder_cases(path.name, listing, path / "outputs.safetensors", source)
    elif not path.name.startswith("h5_dataset"):  # h5_items.json speaks for that folder
        yield Case(path.name, None)


def file_cases(path: Path) -> Iterator[Case]:
    listing = json.loads(path.read_text())
    known = {"encodings_cases": encoding_cases, "normalization_cases": normalization_cases}
    if path.stem in known:
        yield from known[path.stem](load_file(path.with_suffix(".safetensors")))
    elif path.stem in ("losses", "masking_statistics", "h5_items", "eval_cases"):
        find = {"losses": loss_cases, "masking_statistics": mask_cases, "h5_items": h5_cases, "eval_cases": eval_cases}
        yield from find[path.stem](listing, path)
    elif path.stem.endswith("_cases") and "cases" in listing and "weights" in listing:
        source = Source(path.with_name(listing["config"]), path.with_name(listing["weights"]))
        yield from encoder_cases(path.stem.removesuffix("_cases"), listing, path.with_suffix(".safetensors"), source)
    else:
        yield Case(path.stem, None)


# Models


@dataclass(frozen=True)
class Source:
    """Where a recorded model comes from: its configuration and its weights."""

    config: Path
    weights: Path

    def encoder(self) -> OlmoEarth:
        return load_encoder(self)

    def predictor(self) -> Predictor:
        return load_predictor(self)

    def teacher(self) -> Teacher:
        return load_teacher(self)

    def state(self) -> dict[str, Tensor]:
        if self.weights.suffix == ".safetensors":
            return tensors_of(self.weights)
        return torch.load(self.weights, weights_only=True)

    def published_config(self) -> dict[str, Any]:
        return json.loads(self.config.read_text())


@lru_cache(maxsize=4)
def load_encoder(source: Source) -> OlmoEarth:
    if source.weights.suffix == ".pth":
        return load_model(source.weights.parent)
    model = OlmoEarth(olmoearth_config(source.published_config()))
    state = olmoearth_encoder_state(source.state())
    check_fit(model.state_dict(), state, source=str(source.weights))
    model.load_state_dict(state)
    return model.eval()


@lru_cache(maxsize=4)
def load_predictor(source: Source) -> Predictor:
    model = Predictor(*olmoearth_predictor_config(source.published_config()))
    state = olmoearth_predictor_state(source.state())
    check_fit(model.state_dict(), state, source=str(source.weights))
    model.load_state_dict(state)
    return model.eval()


@lru_cache(maxsize=4)
def load_teacher(source: Source) -> Teacher:
    model = Teacher(OlmoEarth(olmoearth_config(source.published_config())))
    state = olmoearth_encoder_state(source.state(), prefix="target_encoder.")
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


@lru_cache(maxsize=4)
def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def encoder_cases(name: str, listing: Mapping[str, Any], path: Path, source: Source) -> Iterator[Case]:
    keys = listing["tensor_index"]
    for case in listing["cases"]:
        prefix = f"case/{case['name']}/"
        for kind in sorted({_kind(key.removeprefix(prefix)) for key in keys if key.startswith(prefix)}):
            check = CHECKS.get(kind)
            run = None if check is None else partial(run_encoder_case, case, kind, path, source)
            yield Case(f"{name}/{case['name']}/{kind}", run)
        for loss, value in listing.get("loss_values", {}).get(case["name"], {}).items():
            config = known_losses(path.parent).get(loss)
            run = None if config is None else partial(check_loss_value, case, path, config, value)
            yield Case(f"{name}/{case['name']}/loss_values/{loss}", run)
    if "train_step" in listing:
        yield from train_cases(name, listing, path, source)
    known = ("inputs/", "masks/", "case/", "train/")
    for key in keys:
        if not key.startswith(known):
            yield Case(f"{name}/{key}", None)


def _kind(rest: str) -> str:
    head, _, tail = rest.partition("/")
    return f"pooled/{tail}" if head == "pooled" else head


def run_encoder_case(case: Mapping[str, Any], kind: str, path: Path, source: Source) -> None:
    tensors = tensors_of(path)
    given = Given(source, case, tensors)
    wanted = {
        key.removeprefix(f"case/{case['name']}/{kind}").removeprefix("/"): value
        for key, value in tensors.items()
        if key == f"case/{case['name']}/{kind}" or key.startswith(f"case/{case['name']}/{kind}/")
    }
    assert wanted
    with torch.no_grad():
        CHECKS[kind](given, wanted)


class Given:
    """What a recorded case feeds the model, in our layout."""

    def __init__(self, model: Source, case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.source, self.model = model, model.encoder()
        self.patch_px, self.pixel_m = int(case["patch_size"]), float(case["input_res"])
        source = f"inputs/{case['input_set']}"
        self.inputs = {m: to_pixels(m, tensors[f"{source}/{m}"]) for m in case["modalities"]}
        self.timestamps = tensors[f"{source}/timestamps"]
        self.visible = self.masks = None
        if case["mask_set"] != "all_online":
            self.masks = masks_of(case["mask_set"], case["modalities"], self.patch_px, tensors)
            self.visible = {m: mask == 0 for m, mask in self.masks.items()}
        fast, training = case["fast_pass"], case["mode"] == "train"
        self.attention = "published_fast" if fast else "masked" if training else "published_eval"

    def run(self) -> Tokens:
        return self.model(
            self.inputs,
            self.timestamps,
            patch_px=self.patch_px,
            pixel_m=self.pixel_m,
            visible=self.visible,
            attention=self.attention,
        )


def to_pixels(modality: str, x: Tensor) -> Tensor:
    """[B, H, W, T, C], [B, T, C] or [B, C] to [B, T, C, H, W]."""
    if x.ndim == 5:
        return x.permute(0, 3, 4, 1, 2)
    return (x if x.ndim == 3 else x[:, None])[..., None, None]


def masks_of(name: str, modalities: Sequence[str], patch_px: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {m: to_token_mask(m, tensors[f"masks/{name}/{m}_mask"], patch_px) for m in modalities}


def to_token_mask(modality: str, mask: Tensor, patch_px: int) -> Tensor:
    """Published masks look at the first pixel of each patch."""
    if MODALITIES[modality].kind == "weather":
        return mask[:, None, None]
    if MODALITIES[modality].kind == "constant":
        return mask[:, None, None, None]
    side = patch_px * (4 if modality == "naip_10" else 1)
    mask = mask[:, ::side, ::side]
    return mask if mask.ndim == 5 else mask[..., None, :]


def as_recorded(x: Tensor, wanted: Tensor) -> Tensor:
    """Drop the axes that a modality without space or time does not have in the recorded layout."""
    return x.reshape(wanted.shape) if x.numel() == wanted.numel() else x


def check_tokens(given: Given, wanted: Mapping[str, Tensor]) -> None:
    out = given.run()
    for name, value in wanted.items():
        if not name.endswith("_mask"):
            close(as_recorded(out.tokens[name], value), value)
        elif given.visible is not None:
            seen = as_recorded(given.visible[name.removesuffix("_mask")], value)
            assert torch.equal(seen, value == 0)


def check_aggregated(given: Given, wanted: Mapping[str, Tensor]) -> None:
    out = given.run()
    assert out.aggregated is not None
    close(out.aggregated, wanted[""])


def check_pool(pool: Callable[[Tokens], Tensor], given: Given, wanted: Mapping[str, Tensor]) -> None:
    close(pool(given.run()), wanted[""])


def check_patch_embed(given: Given, wanted: Mapping[str, Tensor]) -> None:
    out = given.model.embed_patches(given.inputs, given.patch_px)
    for name, value in wanted.items():
        if not name.endswith("_mask"):
            close(as_recorded(out[name], value), value)


def after_encodings(given: Given) -> dict[str, Tensor]:
    step = given.pixel_m * given.patch_px / 10
    embedded = given.model.embed_patches(given.inputs, given.patch_px)
    return {m: given.model.encodings.add(x, m, given.timestamps[..., 1], step) for m, x in embedded.items()}


def check_after_encodings(given: Given, wanted: Mapping[str, Tensor]) -> None:
    out = after_encodings(given)
    for name, value in wanted.items():
        if not name.endswith("_mask"):
            close(as_recorded(out[name], value), value)


def check_rope_positions(given: Given, wanted: Mapping[str, Tensor]) -> None:
    shapes = {m: x.shape for m, x in given.model.embed_patches(given.inputs, given.patch_px).items()}
    days = days_since_2000(*(given.timestamps[..., i] for i in range(3)))
    step = given.pixel_m * given.patch_px / 10
    rotary = given.model.rotary
    assert rotary is not None
    places = token_coordinates(shapes, days, step)
    places = (places * torch.tensor(rotary.scale))[..., rotary.axes].expand(len(days), -1, -1)
    split = dict(zip(shapes, places.split([s[1:5].numel() for s in shapes.values()], dim=1), strict=True))
    for name, value in wanted.items():
        close(as_recorded(split[name], value), value)


def check_after_block0(given: Given, wanted: Mapping[str, Tensor]) -> None:
    kept: list[Tensor] = []
    handle = given.model.blocks[0].register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.enable_grad():  # inference works in place, without calling blocks
        given.run()
    handle.remove()
    (out,) = kept
    if list(wanted) == [""]:
        close(out, wanted[""])
        return
    registers, out = out.split([given.model.config.registers, out.shape[1] - given.model.config.registers], dim=1)
    shapes = {m: x.shape for m, x in given.model.embed_patches(given.inputs, given.patch_px).items()}
    split = dict(zip(shapes, out.split([s[1:5].numel() for s in shapes.values()], dim=1), strict=True))
    split["register_tokens"] = registers
    for name, value in wanted.items():
        close(as_recorded(split[name], value), value)


def check_decoder(given: Given, wanted: Mapping[str, Tensor]) -> None:
    """The recorded predictor passes all tokens through its last layers: decoded ones, the context, zeros elsewhere."""
    predictor, out = given.source.predictor(), given.run()
    assert given.masks is not None
    # In training the published code predicts at 10 m whatever the input.
    query, context = predictor.decode(out.tokens, given.masks, given.timestamps, patch_px=given.patch_px, pixel_m=10.0)
    sizes = {m: x[..., 0].numel() // len(x) for m, x in out.tokens.items()}
    whole = sum(chosen.put(x, sum(sizes.values())) for x, chosen in (query, context))
    whole = predictor.output(predictor.norm(whole))
    split = dict(zip(sizes, whole.split(list(sizes.values()), dim=1), strict=True))
    for name, value in wanted.items():
        if name.endswith("_mask"):
            assert torch.equal(as_recorded(given.masks[name.removesuffix("_mask")], value).to(value.dtype), value)
        else:
            close(split[name].reshape(value.shape), value)


def check_target(given: Given, wanted: Mapping[str, Tensor]) -> None:
    out = given.source.teacher()(given.inputs, given.patch_px)
    for name, value in wanted.items():
        if name.endswith("_mask"):  # the teacher sees all but what is missing
            mask = given.masks[name.removesuffix("_mask")]
            assert torch.equal(as_recorded(torch.where(mask == 3, 3, 0), value).to(value.dtype), value)
        else:
            got = as_recorded(out[name], value)
            seen = wanted.get(f"{name}_mask", torch.zeros(value.shape[:-1])) != 3
            close(got[seen], value[seen])
            scale = value.abs().amax()  # what is missing was embedded as -99999: large sums of either sign
            torch.testing.assert_close(got / scale, value / scale, rtol=RTOL, atol=1e-6)


CHECKS: dict[str, Callable[[Given, Mapping[str, Tensor]], None]] = {
    "encoder": check_tokens,
    "project_aggregated": check_aggregated,
    "pooled/instance_mean": partial(check_pool, instance_pool),
    "pooled/instance_max": partial(check_pool, partial(instance_pool, how="max")),
    "pooled/spatial_mean": partial(check_pool, spatial_pool),
    "pooled/spatial_max": partial(check_pool, partial(spatial_pool, how="max")),
    "pooled/concat": partial(check_pool, concat_pool),
    "patch_embed": check_patch_embed,
    "after_encodings": check_after_encodings,
    "rope_positions": check_rope_positions,
    "after_block0": check_after_block0,
    "decoder": check_decoder,
    "target": check_target,
}


# Losses


MASKED = {"type": "modality_patch_discrimination_masked_negatives", "tau": 0.1, "same_target_threshold": 0.999}
MASKED_VEC = MASKED | {"type": "modality_patch_discrimination_masked_negatives_vec"}
TEMPERATURE = {"tau": 0.1}
KNOWN_LOSSES: dict[str, dict[str, Any]] = {
    **{name: {"type": name} for name in ("l1", "l2", "cosine_similarity")},
    **{name: {"type": name} | TEMPERATURE for name in LOSSES if name.endswith(("discrimination", "_new"))},
    "modality_patch_discrimination_vec": {"type": "modality_patch_discrimination_vec"} | TEMPERATURE,
    "modality_patch_discrimination_pred2unit": {"type": "modality_patch_discrimination", "pred2unit": True},
    "modality_patch_discrimination_weighted": {
        "type": "modality_patch_discrimination",
        "tau": 0.2,
        "weight": 0.5,
        "modality_weights": {},
    },
    "modality_patch_discrimination_masked_negatives_all": MASKED,
    "modality_patch_discrimination_masked_negatives_vec_all": MASKED_VEC,
    "modality_patch_discrimination_masked_negatives_vec_maps": MASKED_VEC | {"mask_negatives_for_modalities": []},
}
"""What cases mean by the names of losses, unless a `losses.json` beside them says otherwise."""


@lru_cache(maxsize=2)
def known_losses(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "losses.json"
    listed = json.loads(path.read_text())["losses"] if path.is_file() else {}
    return KNOWN_LOSSES | {name: entry["config"] for name, entry in listed.items()}


def loss_of(
    predicted: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> Tensor:
    chosen = Chosen.of(line_up(masks)[..., 0] == DECODE)
    sizes = {m: mask[0].numel() for m, mask in masks.items()}
    pairs = pair_up(chosen.take(line_up(predicted)), chosen.take(line_up(target)), chosen, sizes)
    return torch.stack(list(token_loss(pairs, config).values())).sum()


def line_up(tokens: Mapping[str, Tensor]) -> Tensor:
    """Modalities' [b, ...] masks or [b, ..., d] tokens, all places in one row."""
    rows = [x[..., None] if not x.is_floating_point() else x for x in tokens.values()]
    return torch.cat([x.flatten(1, -2) for x in rows], dim=1)


def check_loss_value(case: Mapping[str, Any], path: Path, config: Mapping[str, Any], wanted: float) -> None:
    """A loss of the recorded predictions and targets.

    What a configuration says of single modalities is about those of `losses.json`. For these values it was made anew:
    weights of 0.25, 0.5, 0.75, ... in the order of the case's modalities, and negatives masked for all maps.
    """
    tensors, config = tensors_of(path), dict(config)
    if "modality_weights" in config:
        config["modality_weights"] = {m: 0.25 * (i + 1) for i, m in enumerate(case["modalities"])}
    if "mask_negatives_for_modalities" in config:
        config["mask_negatives_for_modalities"] = TARGET_ONLY
    predicted = {m: tensors[f"case/{case['name']}/decoder/{m}"] for m in case["modalities"]}
    target = {m: tensors[f"case/{case['name']}/target/{m}"] for m in case["modalities"]}
    masks = {m: tensors[f"case/{case['name']}/decoder/{m}_mask"] for m in case["modalities"]}
    close(loss_of(predicted, target, masks, config), torch.tensor(wanted))


def loss_cases(listing: Mapping[str, Any], path: Path) -> Iterator[Case]:
    for name, entry in listing["losses"].items():
        check = {"InfoNCE": check_contrast, "KoLeo": check_koleo}.get(entry["config"]["type"], check_loss)
        yield Case(f"losses/{name}", partial(check, name, entry, path))


def check_gradient(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=RTOL, atol=1e-6)


def check_loss(name: str, entry: Mapping[str, Any], path: Path) -> None:
    given = {part: recorded(path, part) for part in ("pred", "target", "mask", f"grad/{name}")}
    predicted = {m: x.clone().requires_grad_() for m, x in given["pred"].items()}
    loss = loss_of(predicted, given["target"], given["mask"], entry["config"])
    close(loss.detach(), torch.tensor(entry["value"]))
    loss.backward()
    assert given[f"grad/{name}"]
    for m, wanted in given[f"grad/{name}"].items():
        check_gradient(predicted[m].grad, wanted)


def recorded(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    every = tensors_of(path.with_suffix(".safetensors")).items()
    return {key.removeprefix(f"{prefix}/"): x for key, x in every if key.startswith(f"{prefix}/")}


def check_contrast(name: str, entry: Mapping[str, Any], path: Path) -> None:
    given, config = recorded(path, "infonce"), entry["config"]
    a, b = given["a"].clone().requires_grad_(), given["b"].clone().requires_grad_()
    loss = config.get("weight", 1.0) * info_nce(a, b, temperature=config.get("tau", 0.1))
    close(loss.detach(), torch.tensor(entry["value"]))
    loss.backward()
    for key, wanted in recorded(path, f"grad/{name}").items():
        check_gradient({"a": a.grad, "b": b.grad}[key], wanted)


def check_koleo(name: str, entry: Mapping[str, Any], path: Path) -> None:
    tokens, seen = line_up(recorded(path, "pred")), line_up(recorded(path, "mask"))[..., 0] == 0
    if entry["config"].get("mode", "instance") == "instance":
        tokens = torch.where(seen[..., None], tokens, 0.0).sum(1) / seen.sum(1, keepdim=True)
    else:
        tokens = tokens[seen]
    close(entry["config"].get("weight", 0.1) * koleo(tokens), torch.tensor(entry["value"]))


# One step of training


def train_cases(name: str, listing: Mapping[str, Any], path: Path, source: Source) -> Iterator[Case]:
    step = listing["train_step"]
    for part in ("losses", "gradients", "parameters", "latent", "decoded", "pooled", "target"):
        yield Case(f"{name}/train_step/{part}", partial(check_train, part, step, path, source))
    stored = ("grad_after_clip", "param_after_step", "a", "b", "target")
    for key in listing["tensor_index"]:
        if key.startswith("train/") and key.split("/")[1] not in stored:
            yield Case(f"{name}/{key}", None)


@dataclass(frozen=True)
class Trained:
    """What one step of training came to, in published names."""

    losses: dict[str, float]
    norms: dict[str, Tensor]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def views_of(step: Mapping[str, Any], path: Path, source: Source) -> Views:
    tensors, patch_px = tensors_of(path), int(step["patch_size"])
    prefix = f"inputs/{step['input_set']}/"
    modalities = [m for m in source.encoder().config.modalities if prefix + m in tensors]
    inputs = {m: to_pixels(m, tensors[prefix + m]) for m in modalities}
    timestamps = tensors[prefix + "timestamps"]
    masks = [masks_of(name, modalities, patch_px, tensors) for name in step["mask_sets"]]
    return Views(tuple(View(inputs=inputs, timestamps=timestamps, masks=mask, patch_px=patch_px) for mask in masks))


@lru_cache(maxsize=1)
def train(step_json: str, path: Path, source: Source) -> Trained:
    step = json.loads(step_json)
    encoder, predictor = source.encoder(), source.predictor()
    config = LatentMIMConfig(
        encoder=encoder.config,
        predictor=predictor.config,
        loss=step["loss"],
        contrast_weight=step["contrastive"]["weight"],
        contrast_temperature=step["contrastive"].get("tau", 0.1),
        band_dropout=0.0,
    )
    model = LatentMIM(config)
    model.encoder.load_state_dict(encoder.state_dict())
    model.predictor.load_state_dict(predictor.state_dict())
    model.teacher.load_state_dict(source.teacher().state_dict())
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    options = {key: step["optimizer"][key] for key in ("lr", "betas", "eps", "weight_decay")}
    assert step["optimizer"]["type"] == "AdamW"
    optimizer = torch.optim.AdamW(weights, **options)
    out = model(views_of(step, path, source))
    out.total.backward()
    losses = {f"a/{m}": x.item() for m, x in out.views[0].items()} | {
        f"b/{m}": x.item() for m, x in out.views[1].items()
    }
    losses |= {"total": out.total.item(), "contrast": out.contrast.item()}
    norms = {name: x.norm() for name, x in in_published_names(model, gradient=True).items()}
    losses["norm"] = torch.nn.utils.clip_grad_norm_(weights, step["max_grad_norm"]).item()
    gradients = {name: x.clone() for name, x in in_published_names(model, gradient=True).items()}
    optimizer.step()
    return Trained(losses, norms, gradients, in_published_names(model, gradient=False))


def in_published_names(model: LatentMIM, *, gradient: bool) -> dict[str, Tensor]:
    def values(part: torch.nn.Module) -> dict[str, Tensor]:
        named = {name: p for name, p in part.named_parameters() if p.requires_grad}
        return {name: p.grad if gradient else p.detach() for name, p in named.items()}

    encoder = published_encoder_state(values(model.encoder), model.encoder.config)
    return encoder | published_predictor_state(values(model.predictor), model.predictor.config)


def check_train(part: str, step: Mapping[str, Any], path: Path, source: Source) -> None:
    stored = recorded(path, "train")
    if part in ("losses", "gradients", "parameters"):
        done = train(json.dumps(step), path, source)
    if part == "losses":
        got, wanted = done.losses, {"total": step["total"], "contrast": step["contrastive_value"]}
        wanted["norm"] = step["grad_norm_before_clip"]
        for view in ("a", "b"):
            wanted |= {f"{view}/{m}": x for m, x in step["per_modality_loss"][view].items()}
            assert sum(x for m, x in got.items() if m.startswith(view + "/")) == pytest.approx(
                step[f"loss_{view}"], RTOL
            )
        assert got == pytest.approx(wanted, rel=RTOL, abs=ATOL)
    elif part == "gradients":
        wanted_norms = step["grad_norm_per_parameter_before_clip"]
        assert {k: v.item() for k, v in done.norms.items()} == pytest.approx(wanted_norms, rel=1e-3, abs=ATOL)
        for name, wanted in of(stored, "grad_after_clip").items():
            close(done.gradients[name], wanted)
    elif part == "parameters":
        for name, wanted in of(stored, "param_after_step").items():
            close(done.parameters[name], wanted)
    else:
        check_train_tensors(part, step, path, source, stored)


def of(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(f"{prefix}/"): x for key, x in tensors.items() if key.startswith(f"{prefix}/")}


def check_train_tensors(
    part: str, step: Mapping[str, Any], path: Path, source: Source, stored: Mapping[str, Tensor]
) -> None:
    """What passes through the model in that step, by the same checks as outside training."""
    for letter, masks in zip(("a", "b"), step["mask_sets"], strict=True):
        names = [m for m in source.encoder().config.modalities if f"inputs/{step['input_set']}/{m}" in tensors_of(path)]
        case = {
            "patch_size": step["patch_size"],
            "input_res": 10,
            "input_set": step["input_set"],
            "mask_set": masks,
            "modalities": names,
            "fast_pass": False,
            "mode": "train",
        }
        given = Given(source, case, tensors_of(path))
        key = "target" if part == "target" else f"{letter}/{part}"
        wanted = of(stored, key) or {"": stored[key]}
        check = {"latent": check_tokens, "decoded": check_decoder, "pooled": check_aggregated, "target": check_target}
        with torch.no_grad():
            check[part](given, wanted)


# Encodings


def encoding_cases(tensors: dict[str, Tensor]) -> Iterator[Case]:
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind in ("sincos1d", "month", "sincos2d"):
            yield Case(f"encodings/{key}", partial(check_table, kind, rest, value))
        elif kind == "days_since_2000":
            stamps = tensors["timestamps"]
            yield Case(f"encodings/{key}", partial(check_days, stamps, value))
        elif kind == "rope" and rest not in ("x", "pos_trc", "freqs3d"):
            yield Case(f"encodings/{key}", rope_check(rest, tensors))
        elif kind == "resize" and rest.startswith("out_"):
            yield Case(f"encodings/{key}", partial(check_resize, tensors[f"resize/in_{rest[4:]}"], value))
        elif kind not in ("timestamps", "rope", "resize"):
            yield Case(f"encodings/{key}", None)


def check_table(kind: str, name: str, wanted: Tensor) -> None:
    parts = name.split("_")
    dim = int(parts[0].removeprefix("dim"))
    if kind == "sincos1d":
        table = sincos1d(len(wanted), dim)
    elif kind == "month":
        table = month_table(dim)
    else:
        rows, cols, step = int(parts[1][1:]), int(parts[2][1:]), float(parts[3][1:])
        table = sincos2d(rows, cols, dim, step).flatten(0, 1)
    # Far closer than other numbers: computed in float64 they would be off by 5e-7 here, and by 1e-4 on large grids.
    torch.testing.assert_close(table, wanted, rtol=0, atol=1.2e-7)


def check_days(stamps: Tensor, wanted: Tensor) -> None:
    close(days_since_2000(stamps[:, 0], stamps[:, 1], stamps[:, 2]), wanted)


def check_resize(image: Tensor, wanted: Tensor) -> None:
    close(resize(image[None], *wanted.shape[-2:])[0], wanted)


def rope_check(name: str, tensors: dict[str, Tensor]) -> Callable[[], None] | None:
    """Rotations by `<kind>_base<b>[_tb<b>][_frac<f>]`, initial values by `init<axes>d_..._base<b>[_torchseed<n>]`."""
    fields = {key: _number(name, key) for key in ("base", "tb", "frac", "hd", "H", "torchseed")}
    if name.startswith("init"):
        if fields["torchseed"] is None:
            return partial(check_magnitudes, name, tensors[f"rope/{name}"])
        return partial(check_drawn, int(name[4]), fields, tensors[f"rope/{name}"])
    if name.startswith("mixed"):
        table = tensors["rope/freqs3d"] if name.startswith("mixed3d") else tensors["rope/freqs3d"][1:]
    elif name.startswith("axial"):
        head_dim = tensors["rope/x"].shape[-1]
        fraction = fields["frac"] if name.startswith("axial3d") else 0.0
        table = axial_frequencies(head_dim, base=fields["base"], time_fraction=fraction, time_base=fields["tb"])
        table = table if name.startswith("axial3d") else table[1:]
    else:
        return None
    return partial(check_rotation, table, tensors, f"rope/{name}")


def _number(name: str, key: str) -> float | None:
    for part in name.split("_"):
        rest = part.removeprefix(key)
        if rest != part and rest.replace(".", "").isdigit():
            return float(rest)
    return None


def check_rotation(table: Tensor, tensors: Mapping[str, Tensor], key: str) -> None:
    places = tensors["rope/pos_trc"][..., 3 - len(table) :]
    angle = torch.einsum("bna,ahp->bnhp", places, table)
    out = rotate(tensors["rope/x"].transpose(1, 2), torch.polar(torch.ones_like(angle), angle))
    close(out.transpose(1, 2), tensors[key])


def check_magnitudes(name: str, wanted: Tensor) -> None:
    """The recorded value without a random direction: a direction is a unit vector, so lengths are the magnitudes."""
    axes, heads, pairs = wanted.shape
    drawn = mixed_frequencies(axes, heads, 2 * pairs, base=_number(name, "base") or 0.0)
    close(drawn.norm(dim=0), wanted.norm(dim=0))


def check_drawn(axes: int, fields: Mapping[str, Any], wanted: Tensor) -> None:
    generator = torch.Generator().manual_seed(int(fields["torchseed"]))
    heads, head_dim = wanted.shape[1], 2 * wanted.shape[2]
    close(mixed_frequencies(axes, heads, head_dim, base=fields["base"], generator=generator), wanted)


# Normalisation

BAND_STATISTICS = ("means", "stds", "mins", "maxs")


def normalization_cases(tensors: dict[str, Tensor]) -> Iterator[Case]:
    for key, value in tensors.items():
        modality, _, kind = key.partition("/")
        if modality == "bands":
            if kind != "image" and kind not in BAND_STATISTICS:
                known = kind in BAND_NORMALIZATIONS
                yield Case(f"normalization/{key}", partial(check_bands, kind, tensors, value) if known else None)
        elif kind in ("normalized", "predefined"):
            check = check_normalized if kind == "normalized" else check_predefined
            yield Case(f"normalization/{key}", partial(check, modality, tensors[f"{modality}/raw"], value))
        elif kind != "raw":
            yield Case(f"normalization/{key}", None)


def check_normalized(modality: str, raw: Tensor, wanted: Tensor) -> None:
    close(normalize_olmoearth(raw, modality), wanted)


def check_predefined(modality: str, raw: Tensor, wanted: Tensor) -> None:
    """The range table, whether or not the model uses it; recorded without regard to missing values."""
    if modality == "worldcover_onehot":
        close(raw, wanted)
        return
    row = olmoearth_tables()["range"][modality]
    low, high = (torch.tensor(row[key], dtype=torch.float64) for key in ("lo", "hi"))
    close(((raw.double() - low) / (high - low)).float(), wanted)


def check_bands(method: str, tensors: Mapping[str, Tensor], wanted: Tensor) -> None:
    mean, std, low, high = (tensors[f"bands/{name}"] for name in BAND_STATISTICS)
    out = normalize_bands(tensors["bands/image"], method, mean=mean, std=std, low=low, high=high)
    close(out, wanted)


# Masks


MEANS = "mean_fraction_per_value_[online,target_only,decode,missing]"
DRAWS = 2000


def mask_cases(listing: Mapping[str, Any], path: Path) -> Iterator[Case]:
    for name, entry in listing["results"].items():
        known = entry["strategy_config"]["type"] in STRATEGIES
        yield Case(f"masking/{name}", partial(check_masks, entry) if known else None)


def recorded_missing(entry: Mapping[str, Any], size: int) -> dict[str, Tensor]:
    """What lacks data, which the record gives as shares: 1 is everywhere.

    A share is one of the dates for Landsat, and of the samples else; maps and series lack different samples, which
    the recorded spread of decoded shares tells.
    """
    rows, cols = entry["H"] // entry["patch_size"], entry["W"] // entry["patch_size"]
    missing = {}
    for m, (*_, share) in entry[MEANS].items():
        kind = MODALITIES[m].kind
        sets = len(V1_BAND_SETS.get(m, ((),))) if entry["tokenization"] == "default" else 1
        gone = torch.zeros(size, rows, cols, entry["T"] if kind == "series" else 1, sets, dtype=torch.bool)
        if m == "landsat":
            gone[:, :, :, evenly(share, gone.shape[3])] = True
        else:
            gone[evenly(share, size, shift=kind == "series")] = True
        missing[m] = gone
    return missing


def evenly(share: float, size: int, *, shift: int = 0) -> Tensor:
    place = torch.arange(size) + shift
    return ((place + 1) * share).floor() > (place * share).floor()


def check_masks(entry: Mapping[str, Any]) -> None:
    missing = recorded_missing(entry, DRAWS)
    masks = make_masks(missing, entry["strategy_config"], generator=torch.Generator().manual_seed(0))
    assert set(masks) == set(entry[MEANS])
    for m, mask in masks.items():
        assert torch.equal(mask == 3, missing[m])
        for value, wanted in enumerate(entry[MEANS][m]):
            check_mean((mask == value).flatten(1).double().mean(1), wanted, entry["samples"])
        seen = (mask == 0).flatten(1).any(1).double()
        check_mean(seen, entry["fraction_of_samples_with_modality_visible"][m], entry["samples"])
    whole = torch.cat([mask.flatten(1) for mask in masks.values()], dim=1)
    for value, name in ((0, "encoded"), (2, "decoded")):
        wanted = entry[f"{name}_token_fraction_per_sample"]
        share = (whole == value).double().mean(1)
        check_mean(share, wanted["mean"], entry["samples"])
        assert share.std().item() == pytest.approx(wanted["std"], rel=0.15, abs=1e-3)


def check_mean(drawn: Tensor, wanted: float, samples: int) -> None:
    """Two means of different draws: within four standard errors of their difference, and rounding to four digits."""
    error = math.sqrt(drawn.var().item() * (1 / len(drawn) + 1 / samples))
    assert abs(drawn.mean().item() - wanted) <= 4 * error + 1e-4


# The pretraining corpus


V1_GROUPS = released_config("v1", "nano").groups


def h5_cases(listing: Mapping[str, Any], path: Path) -> Iterator[Case]:
    modalities = listing["training_modalities"]
    folder = path.parent / listing["directory"]
    yield Case("h5/usable", partial(check_usable, folder, modalities, listing["sample_indices_after_prepare"]))
    for item in listing["items"]:
        yield Case(f"h5/{item['name']}", partial(check_item, folder, modalities, item, path))
    for name, budgets in listing["max_timesteps_for_token_budget"].items():
        known_parts = all(part in NAMED or part in MODALITIES for part in _parts(name))
        for budget, table in budgets.items():
            run = partial(check_dates, name, int(budget), table) if known_parts else None
            yield Case(f"h5/dates/{name}/{budget}", run)
    for i, entry in enumerate(listing["valid_start_timesteps"]):
        yield Case(f"h5/starts/{i}", partial(check_starts, entry))
    known = ("directory", "training_modalities", "sample_indices_after_prepare", "items", "note", "tensor_index")
    for key in set(listing) - {*known, "max_timesteps_for_token_budget", "valid_start_timesteps"}:
        yield Case(f"h5/{key}", None)


def check_usable(folder: Path, modalities: Sequence[str], wanted: Sequence[int]) -> None:
    assert open_corpus(folder).usable(modalities).tolist() == list(wanted)


def check_item(folder: Path, modalities: Sequence[str], item: Mapping[str, Any], path: Path) -> None:
    pytest.importorskip("hdf5plugin")
    crop = None
    if item["token_budget"] is not None:
        side = item["sampled_hw_p"]
        dates = num_dates(side, item["token_budget"], modalities, V1_GROUPS)
        crop = CropSize(patch_px=item["patch_size"], side_patches=side, dates=dates)
    # The published loader draws from numpy's old global generator.
    rng = np.random.RandomState(item["seed"])
    got = read_item(
        open_corpus(folder).path(item["idx"]), modalities, rng=rng, crop=crop, normalise=normalize_olmoearth
    )
    wanted = recorded(path, item["name"])
    assert set(wanted) == {*got.inputs, "timestamps"}
    close(got.timestamps, wanted.pop("timestamps"))
    for m, value in wanted.items():
        close(as_recorded(got.inputs[m].permute(2, 3, 0, 1), value), value)


NAMED = {
    "nine": OBSERVED + TARGET_ONLY,
    "s2": ("sentinel2_l2a",),
    "s1": ("sentinel1",),
    "l8": ("landsat",),
    "maps": TARGET_ONLY,
    "era5": ("era5_10",),
}


def _parts(name: str) -> list[str]:
    """Split `s2_s1_landsat_single_bandset` into the modalities that it names."""
    return name.removesuffix("_default").removesuffix("_single_bandset").removesuffix("_only").split("_")


def check_dates(name: str, budget: int, table: Mapping[str, int | str]) -> None:
    modalities = [m for part in _parts(name) for m in NAMED.get(part, (part,))]
    groups = (lambda m: (MODALITIES[m].band_names,)) if name.endswith("single_bandset") else V1_GROUPS
    for side, wanted in table.items():
        if wanted == "error":
            with pytest.raises(InputError):
                num_dates(int(side), budget, modalities, groups)
        else:
            assert num_dates(int(side), budget, modalities, groups) == wanted


def check_starts(entry: Mapping[str, Any]) -> None:
    assert valid_starts(entry["present_masks"], entry["max_t"], entry["current_length"]) == entry["valid_start"]


# Evaluation


def eval_cases(listing: Mapping[str, Any], path: Path) -> Iterator[Case]:
    for key in listing["tensor_index"]:
        kind, _, name = key.partition("/")
        if kind == "knn" and name.startswith(("pred_", "scores_")):
            yield Case(f"eval/{key}", partial(check_knn, name, path))
        elif kind == "quant" and name != "embeddings":
            yield Case(f"eval/{key}", partial(check_quantised, name, path))
        elif kind not in ("knn", "quant", "seg"):
            yield Case(f"eval/{key}", None)
    for name, wanted in listing["knn"].items():
        yield Case(f"eval/knn/{name}", partial(check_knn_accuracy, name, wanted, path))
    for name, wanted in listing["segmentation_metrics"].items():
        yield Case(f"eval/seg/{name}", partial(check_segmentation, name, wanted, path))
    for key in set(listing) - {"knn", "segmentation_metrics", "tensor_index"}:
        yield Case(f"eval/{key}", None)


def knn(name: str, path: Path) -> Tensor:
    """Scores by a name such as `scores_k20` or `pred_skip_k20_train_vs_train`."""
    given = recorded(path, "knn")
    neighbours = next(int(part[1:]) for part in name.split("_") if part[0] == "k" and part[1:].isdigit())
    queries = given["train"] if name.endswith("train_vs_train") else given["test"]
    answers = torch.nn.functional.one_hot(given["train_labels"]).float()
    return knn_scores(given["train"], answers, queries, neighbours=neighbours, skip_first="skip" in name)


def check_knn(name: str, path: Path) -> None:
    scores, wanted = knn(name, path), recorded(path, "knn")[name]
    if name.startswith("scores"):
        close(scores, wanted)
    else:
        assert torch.equal(scores.argmax(1), wanted)


def check_knn_accuracy(name: str, wanted: float, path: Path) -> None:
    labels = recorded(path, "knn")["test_labels"]
    right = metrics.confusion(labels.numpy(), knn(name, path).argmax(1).numpy())
    assert metrics.accuracy(right) == pytest.approx(wanted, RTOL)


def check_quantised(name: str, path: Path) -> None:
    given = recorded(path, "quant")
    wanted, embeddings = given[name].numpy(), given["embeddings"].numpy()
    if name == "int8":
        np.testing.assert_array_equal(quantise.quantise(embeddings), wanted)
    elif name == "dequantized":
        np.testing.assert_allclose(quantise.dequantise(given["int8"].numpy()), wanted, RTOL, ATOL)
    else:
        part, _, what = name.partition("_")
        edges, levels = quantise.percentile_levels(embeddings, int(part.removeprefix("p")))
        codes = quantise.percentile_codes(embeddings, edges)
        got = {"quantiles": edges, "midpoints": levels, "codes": codes}
        got["dequantized"] = quantise.percentile_values(codes, levels)
        np.testing.assert_allclose(got[what], wanted, RTOL, ATOL)


def check_segmentation(name: str, wanted: float, path: Path) -> None:
    given = recorded(path, "seg")
    labels, scores = given["labels"].flatten().numpy(), given["scores"].movedim(1, -1).flatten(0, 2)
    shares = scores.double().numpy()
    conf = metrics.confusion(labels, scores.argmax(1).numpy(), scores.shape[1])
    got = {
        "miou": metrics.mean_iou(conf),
        "overall_acc": metrics.accuracy(conf),
        "macro_acc": metrics.macro_accuracy(conf),
        "macro_f1": metrics.macro_f1(conf),
        "micro_f1": metrics.accuracy(conf),
        "auroc": metrics.auroc(labels, shares),
        "prauc": metrics.prauc(labels, shares),
    } | {f"f1_class_{i}": figure for i, figure in enumerate(metrics.per_class(conf)["f1"])}
    assert got[name] == pytest.approx(wanted, rel=RTOL, abs=ATOL)


# The tests

GIVEN = os.environ.get("PANTERRA_GOLDEN")
FOLDERS = [Path(GIVEN)] if GIVEN else [ROOT / "tests" / "golden", ROOT.parent / "shared" / "golden" / "olmoearth"]


def collect() -> list[Any]:
    params = []
    for folder in FOLDERS:
        if GIVEN and not folder.is_dir():
            raise pytest.UsageError(f"no folder {folder}; give GOLDEN=DIR")
        if folder.is_dir():
            label = "kept" if folder.parent.name == "tests" else folder.name
            for case in find_cases(folder):
                later = () if case.run or GIVEN else (pytest.mark.xfail(strict=True, reason="not reproduced yet"),)
                params.append(pytest.param(case, id=f"{label}:{case.name}", marks=later))
    return params


@pytest.mark.parametrize("case", collect())
def test_recorded_numbers(case: Case) -> None:
    if case.run is None:
        pytest.fail(f"not covered: Panterra has nothing to compare with {case.name}")
    case.run()
