"""Checks of recorded cases: AnySat's pretraining, and how its evaluation reads off and scores.

`CHECKS` has a check for each kind of case, and for cases of the kind "module" one for each stem; a check takes the path
of a case's json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
from panterra.models.anysat_attention import places
from panterra.models.anysat_convert import anysat_state
from panterra.models.anysat_predictor import AnySatPredictor, AnySatPredictorConfig
from panterra.models.anysat_projectors import Grid, Input
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
    model = JEPA(
        JEPAConfig(
            encoder=AnySatConfig(dim=sizes["embed_dim"], depth=sizes["depth"], heads=sizes["num_heads"]),
            predictor=AnySatPredictorConfig(
                dim=settings["predictor_embed_dim"], depth=settings["depth"], heads=settings["num_heads"]
            ),
            published=True,
        )
    ).eval()
    encoder = anysat_state(load_file(path.with_name(listing["weights"])))
    predictor = {
        key.removeprefix("predictor."): weight
        for key, weight in load_file(path.with_name(listing["predictor_weights"])).items()
    }
    model.encoder.load_state_dict(encoder)
    model.teacher.load_state_dict({name: 0.9 * weight for name, weight in encoder.items()})
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
            assert recorded[key][0] < 1e-7, key
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
    table = place_before(places(6, 6, 1, config.dim))
    targets = torch.stack([found[key] for key in sorted(found) if key.startswith("in.mask_pred.")])
    out = model(found["in.context"], table[found["in.mask_enc.0"]], table[targets])
    close(out.flatten(0, 1), found["out.predicted"])


def losses(path: Path) -> None:
    listing, found = read(path)
    names, values = ("s2", "s1", "l7"), listing["values"]
    tokens = torch.stack([found[f"in.tokens_{name}"] for name in names])
    valid = torch.stack([found[f"in.masks_{name}"] for name in names]) != 0
    # The published code takes the masks, sample by sample, for those of tokens that run sensor by sensor.
    misplaced = valid.transpose(0, 1).reshape(valid.shape)
    close(sensor_contrast(tokens[:2]), values["contrastive_s2+s1"])
    close(sensor_contrast(tokens), values["contrastive_s2+s1+l7"])
    close(sensor_contrast(tokens, misplaced), values["contrastive_masked_3"])
    for name, masks in (("", None), ("masked_", misplaced)):
        got, wanted = similarities(tokens, masks).flatten(3).flatten(0, 2), found[f"out.contrastive_logits_{name}3"]
        close(torch.where(got < -2, -torch.inf, got), wanted)
    grid = Grid(rows=4, cols=4, scale=3)
    for pixels, patches in (("validity_12x12", "patch_mask_scale3"), ("validity_4x4", "patch_mask_l7")):
        assert torch.equal(patches_present(found[f"in.{pixels}"] != 0, grid), found[f"out.{patches}"] != 0)
    close(F.smooth_l1_loss(found["in.pred"], found["in.target"]), values["smooth_l1"])

    maps, classes = found["in.seg_logits"], found["in.cls_logits"]
    weight = torch.ones(maps.shape[1])
    weight[-1] = 0
    close(F.cross_entropy(maps, found["in.seg_label"], weight=weight), values["ce_weighted_last_class_zero"])
    ignored = F.cross_entropy(maps, found["in.seg_label_ignore"], ignore_index=-1)
    close(ignored, values["ce_ignore_minus1"])
    label = found["in.cls_label"]
    close(F.cross_entropy(classes, label), values["ce_class_index"])
    close(F.cross_entropy(classes, label, ignore_index=-1), values["ce_ignore_1d"])
    close(F.cross_entropy(classes, F.one_hot(label, classes.shape[1]).float()), values["ce_one_hot"])
    multilabel = found["in.cls_multilabel"].float()
    close(F.binary_cross_entropy_with_logits(classes, multilabel), values["bce"])
    raw, biomass = found["in.reg_pred"][:, 0], found["in.reg_label"]
    close(protocol.squared_error(raw, biomass), values["mse_softplus_regression_intended"])
    close(protocol.squared_error(raw, biomass, published=True), values["mse_softplus_regression_as_coded"])


def blocks(path: Path) -> None:
    listing, found = read(path)
    masking = BlockMasking()
    for grid in map(int, listing["statistics"]):
        for count, recorded in enumerate(found[f"block_sizes.{grid}"].tolist()):
            target, context = masking.sizes(grid, torch.Generator().manual_seed(count))
            assert [target.rows, target.cols, context.rows, context.cols] == recorded
        places = torch.Generator().manual_seed(listing["seed"])
        for count in range(3):
            sizes = torch.Generator().manual_seed(count)
            masks = masking(grid, listing["batch"], sizes=sizes, places=places)
            assert torch.equal(masks.context, found[f"sample.{grid}.call{count}.enc.0"])
            for i, target in enumerate(masks.targets):
                assert torch.equal(target, found[f"sample.{grid}.call{count}.pred.{i}"])


def naive_masks(path: Path) -> None:
    _, found = read(path)
    for call in range(2):
        generator = torch.Generator().manual_seed(call)
        masks = NaiveMasking()(6, 3, sizes=generator, places=generator)
        assert torch.equal(masks.context, found[f"call{call}.enc"])
        assert torch.equal(masks.targets[0], found[f"call{call}.pred"])


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
        return nn.ParameterList([found[f"{name}.{i}"].clone() for i in range(2)])

    teacher, student, schedule = weights("in.teacher"), weights("in.student"), listing["momentum_schedule"]
    total = len(schedule) - 1
    momenta = [momentum_at(step, total, start=0.996, end=1.0) for step in range(len(schedule))]
    close(torch.tensor(momenta, dtype=torch.float64), torch.tensor(schedule, dtype=torch.float64), rtol=0, atol=1e-12)
    for step in range(3):
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
    for name, cells, side in (("dense", "3x3", 1), ("flair", "5x5", config["flair"]["proj_size"])):
        inner = found[f"in.subpatches_{cells}"]
        both = torch.cat([patches[:, :, None].expand_as(inner), inner], dim=-1)
        head = load(protocol.linear_head(2 * dim, config[name]["final_dim"] * side**2), name)
        wanted = found["out.dense" if side == 1 else f"out.flair_proj{side}"]
        close(protocol.cells_to_pixels(head(both), side), wanted)
    classifier = load(protocol.mlp_head(dim, config["mlp"]["final"], config["mlp"]["hidden"]), "mlp")
    close(classifier(tokens[:, 0]), found["out.mlp_classifier"])


def metrics(path: Path) -> None:
    listing, found = read(path)
    values = listing["values"]
    maps = found["in.seg_logits"].argmax(1).numpy()
    conf = confusion(found["in.seg_label"].numpy(), maps, 5)
    scores(protocol.iou_without_last_class(conf), values["iou_last_class_ignored"])
    known = confusion(found["in.seg_label_ignore"].numpy(), maps, 5)
    scores(protocol.segmentation_scores(known), values["seg_pangaea_ignore_minus1"])
    binary = confusion(found["in.bin_label"].numpy(), found["in.bin_logits"].argmax(1).numpy(), 2)
    scores(protocol.segmentation_scores(binary), values["seg_pangaea_binary"])
    close(protocol.segmentation_scores(binary)["mIoU"], values["jaccard_macro_ignore"])
    logits = found["in.cls_logits"]
    classes = confusion(found["in.class"].numpy(), logits.argmax(1).numpy(), 5)
    scores(protocol.f1_scores(classes), values["f1_multiclass"])
    close(protocol.f1_scores(classes)["F1_Score_micro"], values["overall_accuracy"])
    several = protocol.multilabel_f1_scores(found["in.multilabel"].bool().numpy(), (logits.sigmoid() > 0.5).numpy())
    scores(several, values["f1_multilabel"])
    raw, biomass = found["in.reg_pred"][:, 0], found["in.reg_label"]
    close(protocol.squared_error(raw, biomass).sqrt(), values["rmse_softplus_intended"])
    close(protocol.squared_error(raw, biomass, published=True).sqrt(), values["rmse_softplus_as_coded"])
    retrieved = protocol.retrieval_accuracy(found["in.retrieval_logits"], ("a", "b", "c"))
    scores({f"acc_d_{name}": value for name, value in retrieved.items()}, values["retrieval_accuracy"])


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
