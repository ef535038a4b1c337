"""Recorded numbers of the published models: every case of a folder laid out like `golden/olmoearth`.

`make parity GOLDEN=DIR` runs this on any such folder, or on the parent of both families, and fails on what it does not
know. Without GOLDEN the cases in `tests/golden` run, and those of `../shared/golden` where that is present; kinds of
cases that Panterra does not reproduce yet are then expected failures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from panterra.modalities import MODALITIES
from panterra.models.convert import check_fit, olmoearth_config, olmoearth_encoder_state
from panterra.models.features import Tokens
from panterra.models.normalize import BAND_NORMALIZATIONS, normalize_bands, normalize_olmoearth, olmoearth_tables
from panterra.models.olmoearth import OlmoEarth
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
)
from panterra.models.weights import load_model

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
        yield from encoder_cases(path.name, listing, path / "outputs.safetensors", partial(load_published, path))
    elif not path.name.startswith("h5_dataset"):  # h5_items.json speaks for that folder
        yield Case(path.name, None)


def file_cases(path: Path) -> Iterator[Case]:
    listing = json.loads(path.read_text())
    known = {"encodings_cases": encoding_cases, "normalization_cases": normalization_cases}
    if path.stem in known:
        yield from known[path.stem](load_file(path.with_suffix(".safetensors")))
    elif path.stem.endswith("_cases") and "cases" in listing and "weights" in listing:
        build = partial(load_parts, path.with_name(listing["config"]), path.with_name(listing["weights"]))
        yield from encoder_cases(path.stem.removesuffix("_cases"), listing, path.with_suffix(".safetensors"), build)
    else:
        yield Case(path.stem, None)


# Models


@lru_cache(maxsize=4)
def load_parts(config: Path, weights: Path) -> OlmoEarth:
    model = OlmoEarth(olmoearth_config(json.loads(config.read_text())))
    state = olmoearth_encoder_state(load_file(weights))
    check_fit(model.state_dict(), state, source=str(weights))
    model.load_state_dict(state)
    return model.eval()


@lru_cache(maxsize=4)
def load_published(folder: Path) -> OlmoEarth:
    return load_model(folder)


@lru_cache(maxsize=4)
def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def encoder_cases(name: str, listing: Mapping[str, Any], path: Path, build: Callable[[], OlmoEarth]) -> Iterator[Case]:
    keys = listing["tensor_index"]
    for case in listing["cases"]:
        prefix = f"case/{case['name']}/"
        for kind in sorted({_kind(key.removeprefix(prefix)) for key in keys if key.startswith(prefix)}):
            check = CHECKS.get(kind)
            run = None if check is None else partial(run_encoder_case, case, kind, path, build)
            yield Case(f"{name}/{case['name']}/{kind}", run)
    if any(key.startswith("train/") for key in keys) or "train_step" in listing:
        yield Case(f"{name}/train_step", None)
    known = ("inputs/", "masks/", "case/", "train/")
    for key in keys:
        if not key.startswith(known):
            yield Case(f"{name}/{key}", None)


def _kind(rest: str) -> str:
    head, _, tail = rest.partition("/")
    return f"pooled/{tail}" if head == "pooled" else head


def run_encoder_case(case: Mapping[str, Any], kind: str, path: Path, build: Callable[[], OlmoEarth]) -> None:
    tensors, model = tensors_of(path), build()
    given = Given(model, case, tensors)
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

    def __init__(self, model: OlmoEarth, case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.model, self.patch_px, self.pixel_m = model, int(case["patch_size"]), float(case["input_res"])
        source = f"inputs/{case['input_set']}"
        self.inputs = {m: to_pixels(m, tensors[f"{source}/{m}"]) for m in case["modalities"]}
        self.timestamps = tensors[f"{source}/timestamps"]
        self.visible = None
        if case["mask_set"] != "all_online":
            masks = {m: tensors[f"masks/{case['mask_set']}/{m}_mask"] for m in case["modalities"]}
            self.visible = {m: to_token_mask(m, mask, self.patch_px) == 0 for m, mask in masks.items()}
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
    places = given.model._coordinates(shapes, days, step, days.device)
    places = (places * torch.tensor(rotary.scale))[..., rotary.axes].expand(len(days), -1, -1)
    split = dict(zip(shapes, places.split([s[1:5].numel() for s in shapes.values()], dim=1), strict=True))
    for name, value in wanted.items():
        close(as_recorded(split[name], value), value)


def check_after_block0(given: Given, wanted: Mapping[str, Tensor]) -> None:
    kept: list[Tensor] = []
    handle = given.model.blocks[0].register_forward_hook(lambda module, args, out: kept.append(out))
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
}


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
        close(sincos1d(len(wanted), dim), wanted)
    elif kind == "month":
        close(month_table(dim), wanted)
    else:
        rows, cols, step = int(parts[1][1:]), int(parts[2][1:]), float(parts[3][1:])
        close(sincos2d(rows, cols, dim, step).flatten(0, 1), wanted)


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
