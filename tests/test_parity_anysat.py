"""Recorded numbers of the published AnySat: every case of a folder laid out like `golden/anysat`.

`make parity GOLDEN=DIR` runs this on any such folder, or on the parent of both families; `PANTERRA_GOLDEN_ANYSAT` names
the folder alone. Without either the cases in `tests/golden` run, whose weights are cut to two sensors, and those of
`../shared/golden` where that is present. A case that nothing here knows fails as not covered.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import parity_anysat_pretraining
import parity_anysat_readers
from panterra.evaluate.anysat_protocol import mlp_head
from panterra.models.anysat import AnySat, AnySatConfig, Encoded, cells_to_image
from panterra.models.anysat_attention import (
    Combiner,
    PatchBlock,
    buckets,
    distance_bias,
    fusion_block,
    places,
)
from panterra.models.anysat_convert import (
    anysat_config_of,
    anysat_state,
    published_anysat_state,
)
from panterra.models.anysat_projectors import CellProjector, Grid, Input, SeriesProjector, encode_days
from panterra.models.anysat_sensors import NEW_SENSORS, SENSORS, Sensor, hub_sensors
from parity_anysat_pretraining import training_sensors

ROOT = Path(__file__).parent.parent
GIVEN = os.environ.get("PANTERRA_GOLDEN_ANYSAT") or os.environ.get("PANTERRA_GOLDEN")
RTOL, ATOL = 1e-4, 2e-5
MONO = "-mono"


def close(got: Tensor, wanted: Tensor, allowed: Mapping[str, float] | None = None) -> None:
    """Compare to our tolerance; where the record names its own, one value in a thousand may be off by that."""
    assert got.shape == wanted.shape
    off = (got - wanted).abs() > ATOL + RTOL * wanted.abs()
    if allowed and off.float().mean() < 1e-3:
        torch.testing.assert_close(got.to(wanted.dtype), wanted, rtol=allowed["rtol"], atol=allowed["atol"])
    else:
        torch.testing.assert_close(got.to(wanted.dtype), wanted, rtol=RTOL, atol=ATOL)


class Case:
    """One recorded case: what its listing says, and its tensors."""

    def __init__(self, path: Path) -> None:
        self.listing: dict[str, Any] = json.loads(path.read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))
        self.config: dict[str, Any] = self.listing.get("config", {})
        self.folder = path.parent
        self.allowed: dict[str, float] | None = self.listing.get("suggested_tolerance")

    def close(self, got: Tensor, wanted: Tensor) -> None:
        """Compare by the tolerance of the record, too."""
        close(got, wanted, self.allowed)

    def weights(self) -> dict[str, Tensor]:
        """The published state dict, with what the case adds to it."""
        names = self.listing.get("new_projector_weights", {})
        added = {name: self.tensors[entry["tensor"]] for name, entry in names.items()}
        return {**load_file(self.folder / self.listing["weights"]), **added}

    def inputs(self) -> dict[str, Input]:
        given = {
            name: self.tensors[entry["tensor"]].to(getattr(torch, entry["use_dtype"]))
            for name, entry in self.listing["inputs"].items()
        }
        order = self.listing["modality_order"]
        for name in order:  # one image of a series, which the published code takes for that of day 120
            if name.endswith(MONO) and f"{name}_dates" not in given:
                given[name] = given[name][:, None]
                given[f"{name}_dates"] = torch.full((len(given[name]), 1), 120)
        known = {f"{name}{end}" for name in order for end in ("", "_dates", "_mask")}
        assert set(given) <= known
        return {
            name.removesuffix(MONO): Input(
                values=given[name] if given[name].ndim == 5 else given[name][:, None],
                days=given.get(f"{name}_dates"),
                present=None if f"{name}_mask" not in given else given[f"{name}_mask"] > 0,
            )
            for name in order
        }

    def model(self, sensors: Mapping[str, Sensor]) -> AnySat:
        published = self.weights()
        config = anysat_config_of(published, layout="heads" if self.config.get("flash_attn") else "tokens")
        for ours, theirs in (("dim", "embed_dim"), ("depth", "depth"), ("heads", "num_heads")):
            assert getattr(config, ours) == self.config[theirs]
        config = replace(config, sensors=tuple(sensors.get(s.name, s) for s in config.sensors))
        model = AnySat(config)
        state = anysat_state(published)
        model.load_state_dict(state)
        back = published_anysat_state(state, config)
        assert all(torch.equal(back[name], value) for name, value in published.items())
        return model.eval()


def every_token(out: Encoded, *, whole: bool = False) -> Tensor:
    """Lay out tokens as published: class, the sensor that sees the whole tile where it is kept, patches."""
    return torch.cat([out.tile[:, None], *([out.whole] if whole else []), out.patches.flatten(1, 2)], dim=1)


class Recording:
    """Keeps what parts of a model give back, which only the path with gradients calls one by one."""

    def __init__(self, model: AnySat) -> None:
        self.kept: dict[str, Tensor] = {}
        names = ["combiner.proj", *(f"blocks.{i}" for i in range(len(model.blocks)))]
        names += [f"projectors.{name}" for name in model.projectors]
        self.hooks = [model.get_submodule(name).register_forward_hook(self._keep(name)) for name in names]

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            self.kept[f"{name}.in"], self.kept[name] = given[0], out[0] if isinstance(out, tuple) else out

        return keep

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()


OUTPUTS: dict[str, Callable[[Encoded], Tensor | None]] = {
    "tile": lambda out: out.tile,
    "patch": lambda out: out.patches,
    "all": every_token,
    "dense": lambda out: out.dense,
}


def check_release(path: Path) -> None:
    case = Case(path)
    sensors = {sensor.name: sensor for sensor in hub_sensors()}
    for name, value in case.listing.get("config_overrides", {}).items():
        found = re.fullmatch(r"projectors\.([^.]+)\.(reduce_scale|T)", name)
        assert found, f"{name} is not covered"
        change = {"cell_m": 10.0 * value} if found[2] == "reduce_scale" else {"period": value}
        sensors[found[1]] = replace(sensors[found[1]], **change)
    model, inputs = case.model(sensors), case.inputs()
    assert case.listing["outputs"]
    for entry in case.listing["outputs"]:
        wanted = case.tensors[entry["tensor"]]
        dense = (entry.get("output_modality") or next(iter(inputs))) if entry["output"] == "dense" else None
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                scale, tile = int(entry["patch_size"]) // 10, entry["output"] == "tile"
                out = model(inputs, scale=scale, dense=dense, patches=not tile, published_order=True)
            case.close(OUTPUTS[entry["output"]](out), wanted)
    check_intermediates(case, model, inputs)


def check_intermediates(case: Case, model: AnySat, inputs: Mapping[str, Input]) -> None:
    runs: dict[tuple[int, str | None], tuple[Recording, Encoded]] = {}
    for entry in case.listing.get("intermediates", []):
        kind, _, which = entry["tensor"].split(".", 2)[2].partition(".")
        fine = kind == "spatial_encoder_out" and not model.sensors[which].whole
        run = int(entry["patch_size"]), which if fine else None
        if run not in runs:
            watched = Recording(model)
            runs[run] = watched, model(inputs, scale=run[0] // 10, dense=run[1])
            watched.stop()
        case.close(intermediate(*runs[run], kind, which), case.tensors[entry["tensor"]])


def intermediate(watched: Recording, out: Encoded, kind: str, which: str) -> Tensor:
    if kind == "projector_out":
        return watched.kept[f"projectors.{which}"].flatten(0, 1)
    if kind == "spatial_encoder_out":
        assert out.embedded.cells is not None
        rows = torch.cat([out.embedded.tokens[which][:, :, None], out.embedded.cells], dim=2)
        return rows.flatten(0, 1)
    if kind == "encoder_tokens_in":
        return watched.kept["blocks.0.in"]
    if kind == "encoder_block_out":
        return watched.kept[f"blocks.{which}"]
    assert kind == "combiner_attn_out", f"{kind} is not covered"
    return watched.kept["combiner.proj"]


def check_training_forward(path: Path) -> None:
    case = Case(path)
    model, inputs = case.model(training_sensors(case.config)), case.inputs()
    with torch.no_grad():
        case.close(every_token(model(inputs, scale=case.listing["scale"])), case.tensors["out.tokens"])
    watched = Recording(model)
    out = model(inputs, scale=case.listing["scale"], dense=case.config.get("keep_subpatch_modality") or None)
    last = f"blocks.{len(model.blocks) - 1}"
    known = {
        "out.tokens": lambda: every_token(out),
        "mid.encoder_tokens_in": lambda: watched.kept["blocks.0.in"],
        "mid.before_combiner": lambda: watched.kept[last],
        "out.subpatches": lambda: out.embedded.cells,
    }
    for entry in case.listing["outputs"]:
        assert entry["tensor"] in known, f"{entry['tensor']} is not covered"
        case.close(known[entry["tensor"]](), case.tensors[entry["tensor"]])


def check_finetuning(path: Path) -> None:
    case = Case(path)
    config, names = case.config, case.listing["head_weights"]
    model, inputs = case.model(training_sensors(config)), case.inputs()
    head = {name: case.tensors[entry["tensor"]] for name, entry in names.items()}
    keep = config["keep_subpatch_modality"] or None
    with torch.no_grad():
        out = model(inputs, scale=config["scale"], dense=keep, published_order=True)
    for entry in case.listing["outputs"]:
        assert entry["tensor"] in ("out.logits", "mid.encoder_tokens"), f"{entry['tensor']} is not covered"
    if "mid.encoder_tokens" in case.tensors:
        case.close(every_token(out, whole=True), case.tensors["mid.encoder_tokens"])
    case.close(score(out, head, config), case.tensors["out.logits"])


def score(out: Encoded, head: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """Apply a layer norm and a linear layer as the published heads do, or what models from scratch have on the tile."""
    if out.dense is not None:
        x = out.dense
    elif config["pooling"] is None:
        x = out.patches
    else:
        rest = torch.cat([out.whole, out.patches.flatten(1, 2)], dim=1)
        x = {"token": out.tile, "avg": rest.mean(1), "max": rest.amax(1)}[config["pooling"]]
    if "2.running_mean" in head:
        last = max(int(name.split(".")[0]) for name in head)
        hidden = [len(head[f"{i}.weight"]) for i in range(1, last, 3)]
        classifier = mlp_head(x.shape[-1], len(head[f"{last}.weight"]), hidden)
        classifier.load_state_dict(head, strict=False)  # how many batches were seen may be left out
        with torch.no_grad():
            return classifier.eval()(x)
    y = F.layer_norm(x, x.shape[-1:], head["0.weight"], head["0.bias"])
    y = F.linear(y, head["1.weight"], head["1.bias"])
    if y.ndim == 2:
        return y
    classes = config["n_class"]
    side = math.isqrt(y.shape[-1] // classes)
    parts = (side, side, classes) if out.dense is not None else (classes, side, side)
    y = y.unflatten(-1, parts)
    y = y if out.dense is not None else y.movedim(-3, -1)
    return y.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def load_renamed(part: nn.Module, published: Mapping[str, Tensor], home: str, ours: str) -> None:
    """Load a part from published names, given the place it would have in a whole model."""
    entries = {home + name: value for name, value in published.items()}
    state = {name.removeprefix(ours): value for name, value in anysat_state(entries).items()}
    part.load_state_dict(state, strict=not isinstance(part, SeriesProjector))  # alone, a series has no pad value
    part.eval()


def own(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def check_ltae(path: Path) -> None:
    case, t = Case(path), Case(path).tensors
    config = case.config
    dim = config["mlp_in"][-1]
    assert (config["n_head"], config["d_k"]) == (16, 8)
    bands = tuple(f"B{i}" for i in range(config["in_channels"]))
    sensor = Sensor(name="s2", modalities=(), bands=bands, period=config["T"], in_norm=config["in_norm"])
    part = SeriesProjector(sensor, dim)
    load_renamed(part, own(t, "w."), "projector_s2.patch_embed.", "projectors.s2.")
    x, days = t["in.x"].float(), t["in.dates"]
    b, _, _, h, w = x.shape
    grid = Grid(rows=h, cols=w, scale=1)

    def image(z: Tensor) -> Tensor:
        return z.unflatten(0, (b, h, w)).movedim(-1, 1)

    with torch.no_grad():
        tokens, _ = part(Input(values=x, days=days), grid)
        close(image(tokens.flatten(0, 2)), t["out.features"])
        pixels = x.permute(0, 3, 4, 1, 2).flatten(0, 2)
        codes = encode_days(days, dim // 16, sensor.period).repeat_interleave(h * w, 0)
        lifted = part.lift(pixels)
        normalised = part.normalise_dates(lifted)
        placed = normalised + codes.repeat(1, 1, 16)
        close(lifted.flatten(0, 1), t["mid.after_input_mlp"])
        if "mid.after_in_norm_channels_first" in t:
            close(normalised.mT, t["mid.after_in_norm_channels_first"])
        close(codes.repeat(1, 1, 16), t["mid.date_encoding"])
        sights: list[tuple[Tensor | None, str]] = [(None, "")]
        if "in.pad_mask" in t:
            sights.append((t["in.pad_mask"].permute(0, 2, 3, 1).flatten(0, 2) == 0, "_with_pad_mask"))
        for visible, suffix in sights:
            weights = part.attend_dates(placed, visible)
            attention = weights.unflatten(1, (b, h, w)).movedim(-1, 2)
            pooled = torch.einsum("hnt,nthm->hnm", weights, placed.unflatten(-1, (16, -1)))
            out = part.output(pooled.transpose(0, 1).flatten(1))
            norm = part.out_norm
            features = F.group_norm(out, 16, norm.weight, norm.bias, norm.eps)
            close(attention, t[f"out.attention{suffix}"])
            close(image(features), t[f"out.features{suffix}"])
            if visible is None:
                close(pooled, t["mid.heads_out"])
                close(out, t["mid.after_out_mlp"])


def check_patch_mlp(path: Path) -> None:
    t = Case(path).tensors
    known = {**SENSORS, **NEW_SENSORS}
    for name, wanted in t.items():
        kind, sensor_name, *rest = name.split(".")
        if kind not in ("out", "subpatch_rowcol"):
            assert kind in ("in", "w"), f"{name} is not covered"
            continue
        sensor, scale = known[sensor_name], int(rest[0].removeprefix("scale"))
        if kind == "out":
            image = t[f"in.{sensor_name}"].float()
            part = CellProjector(sensor, wanted.shape[-1])
            load_renamed(part, own(t, f"w.{sensor_name}."), f"projector_{sensor_name}.", f"projectors.{sensor_name}.")
            rows, cols = part.size(*image.shape[-2:], scale)
            with torch.no_grad():
                tokens, _ = part(Input(values=image[:, None]), Grid(rows=rows, cols=cols, scale=scale))
            close(tokens.flatten(0, 1), wanted)
        else:
            side = int(rest[1].removeprefix("tile").removesuffix("m")) // (10 * scale)
            image = cells_to_image(wanted[None], Grid(rows=side, cols=side, scale=scale), sensor)[0]
            row, col = torch.meshgrid(torch.arange(len(image)), torch.arange(len(image)), indexing="ij")
            assert torch.equal(image.long(), torch.stack([row, col], dim=-1))


def check_blocks(path: Path) -> None:
    case, t = Case(path), Case(path).tensors
    dim, heads = case.config["dim"], case.config["heads"]
    fusion, patch, combiner = fusion_block(dim, heads), PatchBlock(dim, heads), Combiner(dim, heads)
    fusion.load_state_dict(own(t, "w.fusion."))
    home = "spatial_encoder.predictor_blocks.0."
    load_renamed(patch, own(t, "w.spatial."), home, "patch_encoder.blocks.0.")
    load_renamed(combiner, own(t, "w.combiner."), "blocks.0.", "combiner.")
    setup = re.match(r"(\d+)x\1 grid of 10 m cells, scale (\d+)", case.listing["combiner_setup"])
    assert setup
    for name in (name.removeprefix("in.") for name in t if name.startswith("in.") and name != "in.comb_mask"):
        x = t[f"in.{name}"].float()
        if not name.startswith("comb_"):
            continue
        scale = int(setup[2])
        side = int(setup[1]) // scale
        if found := re.fullmatch(r"comb_release_(\d+)x\1_scale(\d+)", name):
            side, scale = int(found[1]), int(found[2])
        context = t["in.comb_mask"].long() if name.endswith("_masked") else None
        patches = side**2 if context is None else context.shape[1]
        whole = (x.shape[1] - 1) % patches
        model = AnySat(AnySatConfig(dim=dim, depth=0, heads=heads, sensors=()))
        model.combiner, model.class_token = combiner, nn.Parameter(x[:, :1])
        with torch.no_grad():
            out = model.combine(
                x[:, 1 + whole :],
                x[:, 1 : 1 + whole],
                Grid(rows=side, cols=side, scale=scale),
                context=context,
                published_places=True,
            )
        close(torch.cat([out[:, :1], out[:, 1 + whole :]], dim=1), t[f"out.{name}"])
    for name, wanted in t.items():
        if found := re.fullmatch(r"out\.(fusion|spatial)_(\w+)", name):
            x = t[f"in.tokens_{found[2]}"].float()
            side = math.isqrt(x.shape[1] - 1)
            arguments = () if found[1] == "fusion" else (buckets(side, side),)
            block = fusion if found[1] == "fusion" else patch
            with torch.no_grad():
                close(block(x, *arguments), wanted)
                block.update(inside := x.clone(), *arguments)
            close(inside, wanted)
        else:
            assert name.startswith(("in.", "w.", "out.comb_")), f"{name} is not covered"


def check_buckets(path: Path) -> None:
    t = Case(path).tensors
    table = t["w.lookup_table_weight"]
    for name, wanted in t.items():
        if found := re.fullmatch(r"bucket\.(\d+)\.skip(\d+)", name):
            assert torch.equal(buckets(int(found[1]), int(found[1]), int(found[2])), wanted.long())
        elif name == "piecewise_distance_0_to_100":
            assert torch.equal(buckets(1, len(wanted), 0)[0] - 3, wanted)
        elif found := re.fullmatch(r"out\.bias_(\d+)x\1", name):
            q = t[f"in.q_{found[1]}x{found[1]}"].float()
            side = int(found[1])
            close(distance_bias(q[:, 0], table, buckets(side, side, q.shape[2] - side**2)[None]), wanted)
        elif found := re.fullmatch(r"out\.bias_pos_((\d+)x\2)(_modis)?", name):
            q, context = t[f"in.q_pos_{found[1]}{found[3] or ''}"].float(), t[f"in.pos_{found[1]}"].long()
            extra = q.shape[2] - context.shape[1]
            rows = torch.cat([torch.arange(extra).expand(len(q), -1), context + extra], dim=1)
            index = buckets(int(found[2]), int(found[2]), extra)[rows[:, :, None], rows[:, None]]
            close(distance_bias(q[:, 0], table, index), wanted)
        else:
            assert name.startswith(("in.", "w.")), f"{name} is not covered"


def check_places(path: Path) -> None:
    case = Case(path)
    days = torch.tensor([case.listing["dates_list"]])
    known = {**SENSORS, **NEW_SENSORS, "s1-des": SENSORS["s1-asc"]}
    for name, wanted in case.tensors.items():
        kind, dim, *rest = name.split(".")
        if kind == "date":
            period, repeat = (int(part[1:]) for part in rest)
            close(encode_days(days, int(dim), period).repeat(1, 1, repeat), wanted)
        elif kind == "scale":
            side, scale = (int(part[1:]) for part in rest[:2])
            front = len(rest) - 2
            assert set(rest[2:]) <= {"cls", "modis"}
            close(F.pad(places(side, side, scale, int(dim)), (0, 0, front, 0))[None], wanted)
        else:
            assert kind == "res", f"{name} is not covered"
            sensor, scale = known[rest[1]], int(rest[0][1:])
            side = sensor.side(scale)
            close(F.pad(places(side, side, sensor.place_m, int(dim)), (0, 0, 1, 0))[None], wanted)


# By kind of case, or by how the names of cases begin where a kind says little.
CHECKS: dict[str, Callable[[Path], None]] = {
    "release_forward": check_release,
    "training_forward_all_tokens": check_training_forward,
    "finetune_forward": check_finetuning,
    "module_ltae": check_ltae,
    "module_patch_mlp": check_patch_mlp,
    "module_blocks": check_blocks,
    "irpe_tables": check_buckets,
    "position_encodings": check_places,
}
CHECKS |= parity_anysat_pretraining.CHECKS | parity_anysat_readers.CHECKS


def check_of(path: Path) -> Callable[[Path], None] | None:
    kind = json.loads(path.read_text()).get("kind")
    if kind in CHECKS:
        return CHECKS[kind]
    begin = max((name for name in CHECKS if path.stem.startswith(name)), key=len, default="")
    return CHECKS.get(begin)


def is_anysat(folder: Path) -> bool:
    """Tell AnySat's cases, whose listings say their kind, from another family's."""
    return folder.is_dir() and any("kind" in json.loads(path.read_text()) for path in folder.glob("*.json"))


def find_folders() -> list[Path]:
    roots = [ROOT / GIVEN] if GIVEN else [ROOT / "tests" / "golden", ROOT.parent / "shared" / "golden"]
    return [folder for root in roots for folder in (root, root / "anysat") if is_anysat(folder)]


def find_cases(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*.json") if path.name != "INDEX.json")


FOLDERS = find_folders()


@pytest.mark.parametrize(
    "path",
    [path for folder in FOLDERS for path in find_cases(folder)],
    ids=lambda p: f"{p.parent.parent.name}-{p.stem}",
)
def test_case(path: Path) -> None:
    check = check_of(path)
    assert check is not None, f"{path.stem} is not covered"
    check(path)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_every_file_belongs_to_a_case(folder: Path) -> None:
    listings = [path.read_text() for path in find_cases(folder)]
    for path in folder.glob("*.safetensors"):
        if path.name.startswith("weights_"):
            continue
        assert path.with_suffix(".json").is_file() or any(path.name in text for text in listings), path.name
