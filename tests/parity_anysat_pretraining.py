"""Checks of recorded cases: AnySat's pretraining, and how its evaluation reads off and scores.

`CHECKS` has a check for each kind of case, and for cases of the kind "module" one for each stem; a check takes the path
of a case's json.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from panterra.evaluate import anysat_protocol as protocol
from panterra.evaluate.metrics import confusion
from panterra.models.anysat import AnySatConfig
from panterra.models.anysat_attention import Layout, places
from panterra.models.anysat_convert import anysat_state
from panterra.models.anysat_predictor import AnySatPredictor, AnySatPredictorConfig
from panterra.models.anysat_projectors import Grid, Input
from panterra.models.anysat_sensors import NEW_SENSORS, SENSORS, Sensor
from panterra.models.anysat_training import anysat_predictor_state
from panterra.objectives.jepa import (
    JEPA,
    JEPAConfig,
    MaskedTiles,
    patches_present,
    place_before,
    sensor_contrast,
    similarities,
)
from panterra.objectives.jepa_masks import BlockMasking, Dates, NaiveMasking, PatchMasks, keep_tokens
from panterra.objectives.teacher import follow, momentum_at

RTOL, ATOL = 1e-4, 2e-5


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    listing = json.loads(path.read_text())
    return listing, load_file(path.with_suffix(".safetensors")) if "file" in listing else {}


def close(got: Any, wanted: Any, *, rtol: float = RTOL, atol: float = ATOL) -> None:
    got, wanted = torch.as_tensor(got), torch.as_tensor(wanted)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.to(wanted.dtype), wanted, rtol=rtol, atol=atol)


def scores(got: Mapping[str, float], wanted: Mapping[str, float]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        close(got[name], value)


def training_sensors(config: Mapping[str, Any]) -> dict[str, Sensor]:
    """Configure the sensors as a training configuration says."""
    changed = {}
    for name, sensor in {**SENSORS, **NEW_SENSORS}.items():
        periods = config["T"]
        period = periods if isinstance(periods, int) else periods.get(name, periods["default"])
        reduce = config.get("l7_alos_reduce_scale", 3) if name in ("l7", "alos") else None
        cell_m = sensor.cell_m if reduce is None else 10.0 * reduce
        changed[name] = replace(sensor, period=period, cell_m=cell_m)
    return changed


# A step of pretraining


def pretrain_step(path: Path) -> None:
    listing, found = read(path)
    model = build(path, listing)
    tiles = read_tiles(listing, found)
    assert torch.equal(tiles.kept, found["out.token_kept"].bool())
    with torch.no_grad():
        out = model.teacher(tiles.inputs, scale=tiles.grid.scale)
    close(torch.cat([out.tile[:, None], out.patches.flatten(1, 2)], dim=1), found["out.teacher_encoder_out"])
    close(model.targets(tiles).flatten(0, 1), found["out.target"])
    seen = model.look(tiles)
    for name, tokens in seen.patches.items():
        close_but_for_rounding(tokens, found[f"out.tokens_{name}"], listing["suggested_tolerance"])
    close(seen.selected, found["out.context_tokens_selected"])
    close(seen.given, found["out.context_tokens_after_drop"])
    close(seen.encoded, found["out.student_encoder_out"])
    close(model.predict(seen.encoded[:, 1:], tiles).flatten(0, 1), found["out.predicted_tokens"])
    check_validity(seen.patches, tiles, found)
    loss = model(tiles)
    for got, name in ((loss.total, "loss"), (loss.prediction, "mse_loss"), (loss.contrast, "contrastive_loss")):
        close(got, listing["losses"][name])
    loss.total.backward()
    check_gradients(model, listing)
    check_teacher(model, listing)


def build(path: Path, listing: Mapping[str, Any]) -> JEPA:
    sizes, settings = listing["config"], listing["config"]["predictor"]
    encoder = anysat_state(load_file(path.with_name(listing["weights"])))
    held = {key.split(".")[1] for key in encoder if key.startswith("projectors.")}
    sensors = tuple(sensor for name, sensor in training_sensors(sizes).items() if name in held)
    layout: Layout = "heads" if sizes.get("flash_attn") else "tokens"
    share = re.search(r"= (0\.\d+) \*", listing["teacher"])
    assert share
    model = JEPA(
        JEPAConfig(
            encoder=AnySatConfig(
                dim=sizes["embed_dim"],
                depth=sizes["depth"],
                heads=sizes["num_heads"],
                sensors=sensors,
                layout=layout,
            ),
            predictor=AnySatPredictorConfig(
                dim=settings["predictor_embed_dim"],
                depth=settings["depth"],
                heads=settings["num_heads"],
                layout=layout,
            ),
            published=True,
        )
    ).eval()
    predictor = {
        key.removeprefix("predictor."): weight
        for key, weight in load_file(path.with_name(listing["predictor_weights"])).items()
    }
    model.encoder.load_state_dict(encoder)
    model.teacher.load_state_dict({name: float(share[1]) * weight for name, weight in encoder.items()})
    model.masked_token.data.copy_(predictor.pop("masked_token"))
    model.predictor.load_state_dict(anysat_predictor_state(predictor))
    return model


def read_tiles(listing: Mapping[str, Any], found: Mapping[str, Tensor]) -> MaskedTiles:
    inputs = {}
    for name in listing["modality_order"]:
        values, mask = found[f"in.{name}"].float(), found.get(f"in.{name}_mask")
        inputs[name] = Input(
            values=values if values.ndim == 5 else values[:, None],
            days=found.get(f"in.{name}_dates"),
            present=None if mask is None else mask != 0,
        )
    side = listing["config"]["shapes"][listing["dataset"]] // listing["scale"]
    targets = [found[key] for key in sorted(found) if key.startswith("in.mask_pred.")]
    prefix = "rand.date_keep."
    return MaskedTiles(
        inputs=inputs,
        grid=Grid(rows=side, cols=side, scale=listing["scale"]),
        masks=PatchMasks(context=found["in.mask_enc.0"], targets=torch.stack(targets)),
        kept=keep_tokens(
            found["rand.modality_kept_per_position"],
            found["rand.drop_noise_raw"],
            dropped=listing["config"]["modality_drop_ratio"],
        ),
        dates={key.removeprefix(prefix): Dates(index=x) for key, x in found.items() if key.startswith(prefix)},
    )


def close_but_for_rounding(got: Tensor, wanted: Tensor, allowed: Mapping[str, float]) -> None:
    """Compare to our tolerance but for one value in a thousand, and all to the tolerance of the record.

    Computed in float64, some values of the record are off by more than our tolerance, and ours less so.
    """
    off = (got - wanted).abs() > ATOL + RTOL * wanted.abs()
    assert off.float().mean() < 1e-3
    close(got, wanted, rtol=allowed["rtol"], atol=allowed["atol"])


def check_validity(names: Mapping[str, Tensor], tiles: MaskedTiles, found: Mapping[str, Tensor]) -> None:
    for name in names:
        present = tiles.inputs[name].present
        if present is not None:
            index = tiles.dates[name].index
            kept = present[torch.arange(len(index))[:, None], index]
            assert torch.equal(patches_present(kept, tiles.grid), found[f"out.masks_{name}"] != 0)


def check_gradients(model: JEPA, listing: Mapping[str, Any]) -> None:
    """Compare norms and sums; what is nothing but rounding in the record may be absent here."""
    recorded, got = listing["grad_l2norm_and_sum"], dict(model.named_parameters())
    names = {ours: f"encoder.{ours}" for ours in model.encoder.state_dict()}
    published = {key.removeprefix("encoder."): key for key in recorded if key.startswith("encoder.")}
    renamed = anysat_state({key: torch.tensor(i) for i, key in enumerate(published)})
    keys = {names[ours]: list(published.values())[int(i)] for ours, i in renamed.items()}
    predictor = [key for key in recorded if key.startswith("predictor.")]
    for key in predictor:
        (ours,) = anysat_predictor_state({key.removeprefix("predictor."): torch.empty(0)})
        keys[f"predictor.{ours}"] = key
    keys["masked_token"] = "masked_token"
    assert sorted(keys.values()) == sorted(recorded)
    for ours, key in keys.items():
        gradient = got[ours].grad
        if recorded[key] is None:
            assert gradient is None, key
        elif gradient is None:
            assert recorded[key][0] < 1e-6, key
        else:
            norm, total = recorded[key]
            close(gradient.norm(), norm, rtol=listing["suggested_tolerance"]["grad_rtol"], atol=1e-6)
            close(gradient.sum(), total, rtol=listing["suggested_tolerance"]["grad_rtol"], atol=1e-6 + 1e-3 * norm)


def check_teacher(model: JEPA, listing: Mapping[str, Any]) -> None:
    follow(model.teacher, model.encoder, listing["ema"]["momentum"])
    recorded = {
        key.removeprefix("encoder."): torch.tensor(value)
        for key, value in listing["ema"]["teacher_after_update_l2norm_and_sum"].items()
    }
    got = model.teacher.state_dict()
    for name, (norm, total) in anysat_state(recorded).items():
        close(got[name].norm(), norm)
        close(got[name].sum(), total, atol=ATOL + RTOL * float(norm))


# Parts


def predictor(path: Path) -> None:
    listing, found = read(path)
    config = AnySatPredictorConfig(**listing["config"])
    model = AnySatPredictor(config, config.dim)
    model.load_state_dict(
        anysat_predictor_state({k.removeprefix("w."): v for k, v in found.items() if k.startswith("w.")})
    )
    grid = re.search(r"(\d+)x\1 grid, scale (\d+)", listing["description"])
    assert grid
    side, scale = int(grid[1]), int(grid[2])
    table = place_before(places(side, side, scale, config.dim))
    targets = torch.stack([found[key] for key in sorted(found) if key.startswith("in.mask_pred.")])
    out = model(found["in.context"], table[found["in.mask_enc.0"]], table[targets])
    close(out.flatten(0, 1), found["out.predicted"])


def losses(path: Path) -> None:
    listing, found = read(path)
    values, prefix = dict(listing["values"]), "in.tokens_"
    names = [name for name in ("s2", "s1", "l7") if prefix + name in found]
    names += [key.removeprefix(prefix) for key in found if key.startswith(prefix) and key[len(prefix) :] not in names]
    told = re.search(r"tau = ([\d.]*\d)", listing["description"])
    temperature = float(told[1]) if told else 0.1
    tokens = torch.stack([found[prefix + name] for name in names])

    def contrast(tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        return sensor_contrast(tokens, valid, temperature=temperature)

    for key in [key for key in values if key.startswith("contrastive_") and "masked" not in key]:
        chosen = [found[prefix + name] for name in key.removeprefix("contrastive_").split("+")]
        close(contrast(torch.stack(chosen)), values.pop(key))
    sights: list[tuple[str, Tensor | None]] = [("", None)]
    if f"in.masks_{names[0]}" in found:
        valid = torch.stack([found[f"in.masks_{name}"] for name in names]) != 0
        # The published code takes the masks, sample by sample, for those of tokens that run sensor by sensor.
        misplaced = valid.transpose(0, 1).reshape(valid.shape)
        sights.append(("masked_", misplaced))
        close(contrast(tokens, misplaced), values.pop(f"contrastive_masked_{len(names)}"))
    for name, masks in sights:
        wanted = found[f"out.contrastive_logits_{name}{len(names)}"]
        got = similarities(tokens, masks).flatten(3).flatten(0, 2)
        close(torch.where(got < -2, -torch.inf, got), wanted)
    for pixels, patches in (("validity_12x12", "patch_mask_scale3"), ("validity_4x4", "patch_mask_l7")):
        if f"out.{patches}" in found:
            side = math.isqrt(found[f"out.{patches}"].shape[1])
            grid = Grid(rows=side, cols=side, scale=3)
            assert torch.equal(patches_present(found[f"in.{pixels}"] != 0, grid), found[f"out.{patches}"] != 0)
    for name, value in values.items():
        assert name in LOSSES, f"{name} is not covered"
        close(LOSSES[name](found), value)


def without_last_class(found: Mapping[str, Tensor]) -> Tensor:
    weight = torch.ones(found["in.seg_logits"].shape[1])
    weight[-1] = 0
    return F.cross_entropy(found["in.seg_logits"], found["in.seg_label"], weight=weight)


def one_hot(found: Mapping[str, Tensor]) -> Tensor:
    wanted = F.one_hot(found["in.cls_label"], found["in.cls_logits"].shape[1]).float()
    return F.cross_entropy(found["in.cls_logits"], wanted)


LOSSES: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "smooth_l1": lambda t: F.smooth_l1_loss(t["in.pred"], t["in.target"]),
    "ce_weighted_last_class_zero": without_last_class,
    "ce_ignore_minus1": lambda t: F.cross_entropy(t["in.seg_logits"], t["in.seg_label_ignore"], ignore_index=-1),
    "ce_class_index": lambda t: F.cross_entropy(t["in.cls_logits"], t["in.cls_label"]),
    "ce_ignore_1d": lambda t: F.cross_entropy(t["in.cls_logits"], t["in.cls_label"], ignore_index=-1),
    "ce_one_hot": one_hot,
    "bce": lambda t: F.binary_cross_entropy_with_logits(t["in.cls_logits"], t["in.cls_multilabel"].float()),
    "mse_softplus_regression_intended": lambda t: protocol.squared_error(t["in.reg_pred"][:, 0], t["in.reg_label"]),
    "mse_softplus_regression_as_coded": lambda t: protocol.squared_error(
        t["in.reg_pred"][:, 0], t["in.reg_label"], published=True
    ),
}


def blocks(path: Path) -> None:
    listing, found = read(path)
    masking = BlockMasking()
    for grid in map(int, listing["statistics"]):
        for count, recorded in enumerate(found[f"block_sizes.{grid}"].tolist()):
            target, context = masking.sizes(grid, torch.Generator().manual_seed(count))
            assert [target.rows, target.cols, context.rows, context.cols] == recorded
        places = torch.Generator().manual_seed(listing["seed"])
        for count in range(sum(name.startswith(f"sample.{grid}.call") and ".enc." in name for name in found)):
            sizes = torch.Generator().manual_seed(count)
            masks = masking(grid, listing["batch"], sizes=sizes, places=places)
            assert torch.equal(masks.context, found[f"sample.{grid}.call{count}.enc.0"])
            for i, target in enumerate(masks.targets):
                assert torch.equal(target, found[f"sample.{grid}.call{count}.pred.{i}"])


def naive_masks(path: Path) -> None:
    _, found = read(path)
    for name in (name for name in found if name.endswith(".enc")):
        call, context = name.removesuffix(".enc"), found[name]
        side = math.isqrt(context.shape[1] + found[f"{call}.pred"].shape[1])
        generator = torch.Generator().manual_seed(int(call.removeprefix("call")))
        masks = NaiveMasking()(side, len(context), sizes=generator, places=generator)
        assert torch.equal(masks.context, context)
        assert torch.equal(masks.targets[0], found[f"{call}.pred"])


def real_batches(path: Path) -> None:
    """Compare sizes over as many calls; those of targets depend on the counter alone, those of contexts on places."""
    for row in read(path)[0]["rows"]:
        places, lengths, targets = torch.Generator().manual_seed(0), [], []
        for count in range(row["calls"]):
            sizes = torch.Generator().manual_seed(count)
            masks = BlockMasking()(row["grid"], row["batch"], sizes=sizes, places=places)
            lengths.append(masks.context.shape[1])
            targets.append(masks.targets.shape[2])
        close(np.mean(targets), row["target_block_mean"], atol=5e-3 + 1e-9)
        spread = np.std(lengths) / np.sqrt(len(lengths))
        assert abs(np.mean(lengths) - row["context_mean"]) < max(5 * spread, 0.05)


def moving_average(path: Path) -> None:
    listing, found = read(path)

    def weights(name: str) -> nn.ParameterList:
        return nn.ParameterList([value.clone() for key, value in sorted(found.items()) if key.startswith(f"{name}.")])

    teacher, student, schedule = weights("in.teacher"), weights("in.student"), listing["momentum_schedule"]
    total = len(schedule) - 1
    momenta = [momentum_at(step, total, start=schedule[0], end=schedule[-1]) for step in range(len(schedule))]
    close(torch.tensor(momenta, dtype=torch.float64), torch.tensor(schedule, dtype=torch.float64), rtol=0, atol=1e-12)
    for step in range(sum(key.startswith("out.") and key.endswith(".0") for key in found)):
        follow(teacher, student, momenta[step])
        for weight, wanted in zip(teacher, weights(f"out.teacher_after_step{step + 1}"), strict=True):
            close(weight, wanted, **listing["suggested_tolerance"])


# Evaluation


def heads(path: Path) -> None:
    listing, found = read(path)
    config, tokens = listing["config"], found["in.tokens"]
    dim, patches = config["dim"], tokens[:, 1:]

    def load(head: nn.Sequential, name: str) -> nn.Sequential:
        prefix = f"w.{name}.mlp."
        head.load_state_dict({k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)})
        return head.eval()

    classes, side = config["naive"]["final_dim"], config["naive"]["patch_size"]
    naive = load(protocol.linear_head(dim, classes * side**2), "naive")
    close(protocol.patches_to_pixels(naive(patches), side), found["out.naive"])
    cells, proj = config["flair"]["patch_side"], config["flair"]["proj_size"]
    for name, inside, side in (("dense", config["dense"]["patch_size"], 1), ("flair", cells, proj)):
        inner = found[f"in.subpatches_{inside}x{inside}"]
        both = torch.cat([patches[:, :, None].expand_as(inner), inner], dim=-1)
        head = load(protocol.linear_head(2 * dim, config[name]["final_dim"] * side**2), name)
        wanted = found["out.dense" if name == "dense" else f"out.flair_proj{side}"]
        close(protocol.cells_to_pixels(head(both), side), wanted)
    classifier = load(protocol.mlp_head(dim, config["mlp"]["final"], config["mlp"]["hidden"]), "mlp")
    close(classifier(tokens[:, 0]), found["out.mlp_classifier"])


def metrics(path: Path) -> None:
    listing, found = read(path)
    for name, value in listing["values"].items():
        assert name in METRICS, f"{name} is not covered"
        got = METRICS[name](found)
        if isinstance(value, Mapping):
            scores(got, value)
        else:
            close(got, value)


def counts(found: Mapping[str, Tensor], kind: str, label: str) -> np.ndarray:
    logits = found[f"in.{kind}_logits"]
    return confusion(found[f"in.{label}"].numpy(), logits.argmax(1).numpy(), logits.shape[1])


def second_update(found: Mapping[str, Tensor]) -> dict[str, float]:
    """Count all samples and then the first of them again, as metrics that are never reset do."""
    logits = found["in.seg_logits"]
    again = confusion(found["in.seg_label"][:1].numpy(), logits[:1].argmax(1).numpy(), logits.shape[1])
    return protocol.iou_without_last_class(counts(found, "seg", "seg_label") + again)


def retrieval(found: Mapping[str, Tensor]) -> dict[str, float]:
    retrieved = protocol.retrieval_accuracy(found["in.retrieval_logits"], ("a", "b", "c"))
    return {f"acc_d_{name}": value for name, value in retrieved.items()}


def root_error(found: Mapping[str, Tensor], *, published: bool) -> Tensor:
    return protocol.squared_error(found["in.reg_pred"][:, 0], found["in.reg_label"], published=published).sqrt()


METRICS: dict[str, Callable[[Mapping[str, Tensor]], Any]] = {
    "iou_last_class_ignored": lambda t: protocol.iou_without_last_class(counts(t, "seg", "seg_label")),
    "iou_last_class_ignored_after_second_update": second_update,
    "seg_pangaea_ignore_minus1": lambda t: protocol.segmentation_scores(counts(t, "seg", "seg_label_ignore")),
    "seg_pangaea_binary": lambda t: protocol.segmentation_scores(counts(t, "bin", "bin_label")),
    "jaccard_macro_ignore": lambda t: protocol.segmentation_scores(counts(t, "bin", "bin_label"))["mIoU"],
    "f1_multiclass": lambda t: protocol.f1_scores(counts(t, "cls", "class")),
    "overall_accuracy": lambda t: protocol.f1_scores(counts(t, "cls", "class"))["F1_Score_micro"],
    "f1_multilabel": lambda t: protocol.multilabel_f1_scores(
        t["in.multilabel"].bool().numpy(), (t["in.cls_logits"].sigmoid() > 0.5).numpy()
    ),
    "rmse_softplus_intended": lambda t: root_error(t, published=False),
    "rmse_softplus_as_coded": lambda t: root_error(t, published=True),
    "retrieval_accuracy": retrieval,
}


CHECKS: dict[str, Callable[[Path], None]] = {
    "pretrain_step": pretrain_step,
    "module_predictor": predictor,
    "losses": losses,
    "mask_collator": blocks,
    "mask_collator_naive": naive_masks,
    "statistics": real_batches,
    "ema": moving_average,
    "heads": heads,
    "metrics": metrics,
}
