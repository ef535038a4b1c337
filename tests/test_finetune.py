"""Losses, heads, LoRA and what is trained how fast."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from panterra.data.labelled import LabelledSample
from panterra.errors import InputError
from panterra.evaluate import metrics
from panterra.evaluate.class_weights import balanced_weights
from panterra.evaluate.dice import dice_loss
from panterra.evaluate.probes import ProbeClass
from panterra.finetune.augment import Augmentation, turn_sample, vary
from panterra.finetune.heads import HeadConfig, build_head
from panterra.finetune.lora import add_lora, merge_lora
from panterra.finetune.model import Base, FineTuned, Setup
from panterra.finetune.step import Tuning, layer_scales, make_optimiser, prepare
from panterra.finetune.tasks import TASKS, LossOptions, macro_f1, micro_f1, task_of
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.features import Features
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig
from panterra.sample import Batch, Observation


def tiny_olmoearth(seed=0):
    torch.manual_seed(seed)
    config = OlmoEarthConfig(dim=32, depth=2, heads=2, position="rope_3d_mixed", pixel_hidden=(8,), convolution=False)
    return OlmoEarth(config).eval().requires_grad_(False)


def tiny_anysat(seed=0):
    torch.manual_seed(seed)
    model = AnySat(AnySatConfig(dim=96, depth=2, heads=4), normalized_input=True)
    return model.eval().requires_grad_(False)


def a_batch(samples=2, side=8, dates=2, seed=0, missing=True):
    g = torch.Generator().manual_seed(seed)
    valid = torch.ones(samples, dates, side, side, dtype=torch.bool)
    if missing:
        valid[0, 0, :4] = False
    optical = Observation(
        pixels=torch.rand(samples, dates, 12, side, side, generator=g) * 3000,
        dates=torch.tensor([[19000, 19060][:dates]] * samples),
        valid=valid,
    )
    radar = Observation(
        pixels=torch.randn(samples, 1, 2, side, side, generator=g) * 3 - 12,
        dates=torch.tensor([[19003]] * samples),
        valid=torch.ones(samples, 1, side, side, dtype=torch.bool),
    )
    return Batch(observations={"sentinel2_l2a": optical, "sentinel1": radar})


def a_model(encoder=None, *, kind="linear", task="segmentation", side=4, classes=3, skip=None, **changes):
    encoder = encoder or tiny_olmoearth()
    rows = TASKS[task]
    return FineTuned(
        encoder,
        Setup(
            task=task,
            head=HeadConfig(
                kind=kind,
                dense=rows.dense,
                dim=encoder.dim,
                outputs=rows.outputs(classes),
                side=side,
                hidden=16,
                skip_bands=12 if skip else 0,
            ),
            classes=tuple(ProbeClass(name=f"class {k}", code=k + 1) for k in range(classes)),
            modalities=("sentinel2_l2a", "sentinel1"),
            patch_m=40,
            window_px=8,
            skip=skip,
            base=Base.of(encoder),
            **changes,
        ),
    )


# Losses and figures, against sums by hand.


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_weighted_mean_over_labelled_cells(weights, smoothing):
    g = np.random.default_rng(0)
    scores, target = g.normal(size=(2, 3, 2, 2)), np.array([[[0, 2], [-1, 1]], [[-1, -1], [2, 2]]])
    total = weight = 0.0
    w = np.ones(3) if weights is None else np.array(weights)
    for b, y, x in zip(*np.nonzero(target >= 0), strict=True):
        z = scores[b, :, y, x]
        log_share = z - np.log(np.exp(z).sum())
        k = target[b, y, x]
        # As torch and the paper have it: the smoothed part weighs each class by its own weight.
        total += (1 - smoothing) * -w[k] * log_share[k] + smoothing / 3 * -(w * log_share).sum()
        weight += w[k]
    options = LossOptions(
        class_weights=None if weights is None else torch.tensor(weights, dtype=torch.float64), label_smoothing=smoothing
    )
    loss = task_of("segmentation").loss(torch.tensor(scores), torch.tensor(target), options)
    assert float(loss) == pytest.approx(total / weight, rel=1e-9)


def test_binary_cross_entropy_leaves_out_unknown_labels():
    scores = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    target = torch.tensor([[1.0, 0.0], [float("nan"), 1.0]], dtype=torch.float64)
    p = 1 / (1 + np.exp(-scores.numpy()))
    by_hand = -(2 * np.log(p[0, 0]) + np.log(1 - p[0, 1]) + 3 * np.log(p[1, 1])) / 3
    options = LossOptions(class_weights=torch.tensor([2.0, 3.0], dtype=torch.float64))
    assert float(task_of("multilabel").loss(scores, target, options)) == pytest.approx(by_hand)


def test_squared_error_counts_in_spreads_and_leaves_out_nan():
    scores, target = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 9.0]]]]), torch.tensor([[[0.0, np.nan]], [[1.0, 5.0]]])
    loss = task_of("regression").loss(scores, target, LossOptions(spread=2.0))
    assert float(loss) == pytest.approx((1 + 4 + 16) / 4 / 3)


@pytest.mark.parametrize(
    ("task", "scores", "target"),
    [
        ("segmentation", torch.ones(1, 3, 2, 2), torch.full((1, 2, 2), -1)),
        ("regression", torch.ones(1, 1, 2, 2), torch.full((1, 2, 2), np.nan)),
        ("regression", torch.ones(1, 1, 2, 2), torch.full((1, 2, 2), -np.inf)),
        ("multilabel", torch.ones(1, 3), torch.full((1, 3), np.nan)),
    ],
)
def test_a_batch_without_labels_teaches_nothing(task, scores, target):
    scores.requires_grad_(True)
    loss = task_of(task).loss(scores, target, LossOptions())
    loss.backward()
    assert loss.item() == 0
    assert not scores.grad.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_of_a_class_that_does_not_count_teaches_nothing(smoothing):
    scores = torch.randn(2, 3, 2, 2, requires_grad=True)
    weights = torch.tensor([1.0, 1.0, 0.0])
    target = torch.full((2, 2, 2), 2)
    loss = task_of("segmentation").loss(scores, target, LossOptions(class_weights=weights, label_smoothing=smoothing))
    loss.backward()
    assert loss.item() == 0
    assert not scores.grad.any()
    # What it says is compared by the Dice loss still.
    said, options = scores.detach(), LossOptions(class_weights=weights, dice=weights)
    both = task_of("segmentation").loss(said, target, options)
    torch.testing.assert_close(both, dice_loss(said, target, weights))


def test_values_that_are_not_finite_are_not_counted():
    scores, target = torch.ones(1, 1, 2, 2), torch.tensor([[[3.0, np.nan], [np.inf, -np.inf]]])
    assert task_of("regression").tally(scores, target).tolist() == [[1, 3, 9, 4, 2]]


def test_tallies_of_values_give_the_figures_of_all_values_together():
    g = torch.Generator().manual_seed(0)
    scores, target = torch.randn(4, 1, 3, 3, generator=g) + 5, torch.randn(4, 3, 3, generator=g) + 5
    target[0, 0] = torch.nan
    task = task_of("regression")
    sums = task.tally(scores, target).sum(0)
    known = ~target.isnan()
    by_hand = metrics.moments(target[known].numpy(), scores[:, 0][known].numpy())
    for name, figure in task.figures.items():
        assert float(figure(sums)) == pytest.approx(float(getattr(metrics, name)(by_hand)), rel=1e-6), name


def test_tallies_of_labels_give_f1():
    g = np.random.default_rng(0)
    scores, target = g.normal(size=(20, 4)), g.integers(0, 2, (20, 4))
    sums = task_of("multilabel").tally(torch.tensor(scores), torch.tensor(target, dtype=torch.float32)).sum(0)
    micro, macro = metrics.multilabel_f1(target > 0, scores > 0)
    assert float(micro_f1(sums)) == pytest.approx(micro)
    assert float(macro_f1(sums)) == pytest.approx(macro)


def test_dice_stands_beside_the_cross_entropy():
    g = torch.Generator().manual_seed(0)
    scores, target = torch.randn(2, 3, 4, 4, generator=g), torch.randint(-1, 3, (2, 4, 4), generator=g)
    loss, weights = task_of("segmentation").loss, torch.tensor([0.2, 0.3, 0.5])
    both = loss(scores, target, LossOptions(dice=weights))
    torch.testing.assert_close(both, loss(scores, target, LossOptions()) + dice_loss(scores, target, weights))
    nothing = loss(scores, torch.full_like(target, -1), LossOptions(dice=weights))
    assert nothing == 0


def test_balanced_classes_weigh_the_same_together():
    weights = balanced_weights(np.array([90, 10, 0]))
    assert (weights * torch.tensor([90, 10, 0])).tolist() == pytest.approx([50, 50, 0])
    assert balanced_weights(np.array([25, 50, 0]), samples=100).tolist() == pytest.approx([3, 1, 0])


# Heads.


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv"])
@pytest.mark.parametrize("side", [1, 4, 6])
def test_dense_heads_answer_for_every_cell(kind, side):
    model = a_model(kind=kind, side=side)
    assert model(a_batch()).shape == (2, 3, 2 * side, 2 * side)


@pytest.mark.parametrize("kind", ["linear", "mlp", "attention"])
def test_scene_heads_answer_once(kind):
    assert a_model(kind=kind, task="classification")(a_batch()).shape == (2, 3)


def test_a_decoder_sees_detail_inside_a_patch_where_it_has_pixels():
    batch = a_batch(missing=False)
    inside = Batch(
        observations={
            **batch.observations,
            "sentinel2_l2a": Observation(
                pixels=batch.observations["sentinel2_l2a"].pixels.roll(1, -1),
                dates=batch.observations["sentinel2_l2a"].dates,
                valid=batch.observations["sentinel2_l2a"].valid,
            ),
        }
    )
    torch.manual_seed(0)
    model = a_model(kind="conv", skip="sentinel2_l2a").eval()
    features = model.features(batch)
    assert not torch.allclose(model.scores(batch, features), model.scores(inside, features))


def test_what_is_not_valid_never_reaches_the_scores():
    torch.manual_seed(0)
    model = a_model(kind="conv", skip="sentinel2_l2a").eval()
    batch = a_batch()
    o = batch.observations["sentinel2_l2a"]
    other = Observation(pixels=torch.where(o.valid[:, :, None], o.pixels, 9e4), dates=o.dates, valid=o.valid)
    changed = Batch(observations={**batch.observations, "sentinel2_l2a": other})
    torch.testing.assert_close(model(changed), model(batch))


def test_batch_mates_do_not_matter():
    torch.manual_seed(0)
    model = a_model(kind="conv", skip="sentinel2_l2a").eval()
    batch = a_batch()
    alone = Batch(
        observations={
            n: Observation(pixels=o.pixels[:1], dates=o.dates[:1], valid=o.valid[:1])
            for n, o in batch.observations.items()
        }
    )
    torch.testing.assert_close(model(batch)[:1], model(alone))


def test_attention_pooling_looks_at_valid_patches_alone():
    torch.manual_seed(0)
    head = build_head(HeadConfig(kind="attention", dense=False, dim=8, outputs=2))
    torch.nn.init.normal_(head.pool.query)
    patches, valid = torch.randn(1, 2, 2, 8), torch.tensor([[[True, False], [True, True]]])
    features = Features(patches=patches, summary=patches.mean((1, 2)), valid=valid, patch_m=40)
    changed = Features(
        patches=torch.where(valid[..., None], patches, 7.0), summary=patches.mean((1, 2)), valid=valid, patch_m=40
    )
    torch.testing.assert_close(head(changed), head(features))


@pytest.mark.parametrize(("kind", "dense"), [("attention", True), ("conv", False)])
def test_a_head_that_does_not_suit_the_task_is_refused(kind, dense):
    with pytest.raises(InputError, match="choose one of"):
        HeadConfig(kind=kind, dense=dense, dim=8, outputs=2)


# The model as an encoder.


def test_samples_that_are_no_whole_patches_are_filled_up_and_cut_back():
    torch.manual_seed(0)
    model = a_model(kind="linear", side=4).eval()
    whole = a_batch(side=8, missing=False)
    cut = Batch(
        observations={
            n: Observation(pixels=o.pixels[..., :6, :], dates=o.dates, valid=o.valid[..., :6, :])
            for n, o in whole.observations.items()
        }
    )
    features = model.encode(cut, patch_m=10)
    assert features.patches.shape == (2, 6, 8, 3)
    assert features.valid.all()


def test_places_without_data_have_no_answer():
    model = a_model().eval()
    batch = a_batch(dates=1, missing=False)
    empty = {}
    for name, o in batch.observations.items():
        valid = o.valid.clone()
        valid[:, :, :4, :4] = False
        empty[name] = Observation(pixels=o.pixels, dates=o.dates, valid=valid)
    features = model.encode(Batch(observations=empty), patch_m=10)
    assert not features.valid[:, :4, :4].any()
    assert not features.patches[:, :4, :4].any()
    assert features.valid[:, 4:].all()


def test_a_model_refuses_another_resolution():
    with pytest.raises(InputError, match="cells of 10 m"):
        a_model().encode(a_batch(), patch_m=40)


# What is trained.


def gradients(model):
    task = model.task_kind
    scores = model(a_batch(missing=False))
    target = torch.zeros(2, *scores.shape[2:], dtype=torch.int64)
    task.loss(scores, target, LossOptions()).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


UNUSED = ("projection.", "landsat", "encodings.month", "worldcover", "srtm", "openstreetmap", "canopy", "cdl", "cereal")


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_reach_all_of_the_encoder_and_the_head(kind):
    model = a_model(kind=kind)
    trained = prepare(model, Tuning(method="full"))
    reached = gradients(model)
    wanted = {n for n in trained.parameters if not any(u in n for u in UNUSED)}
    assert wanted - reached == set()
    assert reached <= set(trained.parameters)
    assert not any("month" in name for name in trained.parameters)


def test_gradients_reach_anysat():
    model = a_model(tiny_anysat())
    prepare(model, Tuning(method="full"))
    reached = gradients(model)
    for part in ("patch_encoder.blocks.0", "blocks.1.", "combiner", "projectors.s2.", "projectors.s1", "head."):
        assert any(part in name for name in reached), part


def test_training_works_after_inference_in_the_same_process():
    for encoder in (tiny_olmoearth(), tiny_anysat()):
        with torch.inference_mode():
            encoder.encode(a_batch(missing=False), patch_m=40)
        model = a_model(encoder)
        prepare(model, Tuning(method="full"))
        assert gradients(model)


def test_head_alone_leaves_the_encoder():
    model = a_model()
    trained = prepare(model, Tuning(method="head"))
    assert gradients(model) == set(trained.parameters)
    assert all(name.startswith("head.") for name in trained.parameters)


def test_lora_begins_as_the_encoder_and_trains_its_changes_alone():
    encoder = tiny_olmoearth()
    before = encoder.encode(a_batch(), patch_m=40).patches
    model = a_model(encoder)
    trained = prepare(model, Tuning(method="lora", rank=2, alpha=4))
    torch.testing.assert_close(encoder.encode(a_batch(), patch_m=40).patches, before)
    inside = {n for n in trained.parameters if n.startswith("encoder.")}
    # Four linear layers in each of two blocks, two thin matrices each.
    assert len(inside) == 2 * 4 * 2
    reached = gradients(model)
    # The first matrix has no gradient while the second is zero.
    assert {n for n in inside if n.endswith("up")} <= reached <= set(trained.parameters)


@pytest.mark.parametrize("build", [tiny_olmoearth, tiny_anysat])
def test_merged_lora_is_lora(build):
    encoder, names = build(), sorted(build().state_dict())
    added = add_lora(encoder, rank=3, alpha=6)
    for p in added:
        torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        before, plain = encoder.encode(a_batch(), patch_m=40).patches, build().encode(a_batch(), patch_m=40).patches
        merge_lora(encoder)
        after = encoder.encode(a_batch(), patch_m=40).patches
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain, before, atol=1e-3)
    assert sorted(encoder.state_dict()) == names


def test_lora_is_the_product_of_its_matrices():
    encoder = tiny_olmoearth()
    layer = encoder.blocks[0].mlp.fc1
    weight = layer.weight.clone()
    down, up = add_lora(encoder, rank=2, alpha=8)[4:6]
    layers = dict(encoder.blocks[0].named_modules())
    change = layers["mlp.fc1"].parametrizations.weight[0]
    torch.nn.init.normal_(change.up)
    torch.testing.assert_close(layer.weight, weight + 4 * change.up @ change.down)
    assert down.shape[0] == up.shape[1] == 2


def test_layers_learn_the_slower_the_deeper_they_are():
    scales = layer_scales(tiny_olmoearth(), 0.5)
    table = {
        "patch_embeddings.sentinel2_l2a.0.proj.weight": 0.125,
        "encodings.channel.sentinel1": 0.125,
        "blocks.0.attn.qkv.weight": 0.25,
        "blocks.1.mlp.fc2.bias": 0.5,
        "norm.weight": 1.0,
    }
    assert {name: scales[name] for name in table} == table


def test_layers_of_anysat_are_its_blocks_in_order():
    scales = layer_scales(tiny_anysat(), 0.5)
    order = ["class_token", "patch_encoder.blocks.0", "patch_encoder.blocks.1", "blocks.0", "blocks.1", "combiner"]
    found = [min(v for n, v in scales.items() if n.startswith(part)) for part in order]
    assert found == sorted(found)
    assert len(set(found)) == len(found)
    assert found[-1] == 1.0


def test_rates_and_decay_go_to_the_right_parameters():
    model = a_model()
    tuning = Tuning(method="full", lr=1e-2, encoder_lr=1e-3, layer_decay=0.5, weight_decay=0.1)
    trained = prepare(model, tuning)
    made = make_optimiser(trained, tuning).param_groups
    groups = {id(p): (g["lr"], g["weight_decay"]) for g in made for p in g["params"]}
    assert groups[id(model.head.layers[1].weight)] == (1e-2, 0.1)
    assert groups[id(model.head.layers[1].bias)] == (1e-2, 0.0)
    assert groups[id(model.encoder.norm.weight)] == (1e-3, 0.0)
    assert groups[id(model.encoder.blocks[0].attn.qkv.weight)] == (pytest.approx(2.5e-4), 0.1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"method": "half"}, "full, head, lora or projector"),
        ({"epochs": 0}, "1 or more"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"lr": -1.0}, "lr is -1 and encoder_lr 0.0001; wanted a finite lr above 0"),
        ({"lr": 0.0}, "lr above 0"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": math.nan}, "lr is nan"),
        ({"encoder_lr": -1e-4}, "encoder_lr of 0 or more"),
        ({"encoder_lr": math.nan}, "encoder_lr nan"),
    ],
)
def test_wrong_settings_are_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        Tuning(**wrong)


# Augmentation.


@given(seed=st.integers(0, 200), square=st.booleans())
def test_turns_move_all_modalities_and_the_target_together(seed, square):
    height, width = (4, 4) if square else (4, 6)
    place = torch.arange(height * width, dtype=torch.float32).reshape(1, 1, 1, height, width)
    fine = place.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def see(x, bands):
        pixels = x.expand(1, 1, bands, -1, -1)
        return Observation(pixels=pixels, dates=torch.zeros(1, 1, dtype=torch.int64), valid=x[:, :, 0] > 3)

    batch = Batch(observations={"sentinel1": see(place, 2), "naip": see(fine, 4)})
    sample = LabelledSample(id="", batch=batch, target=place[0, 0].long(), fold="train")
    turned = turn_sample(sample, torch.Generator().manual_seed(seed), dense=True)
    target = turned.target[0].float()
    radar, aerial = (turned.batch.observations[n] for n in ("sentinel1", "naip"))
    torch.testing.assert_close(radar.pixels[0, 0, 0], target)
    torch.testing.assert_close(radar.valid[0, 0], target > 3)
    torch.testing.assert_close(F.avg_pool2d(aerial.pixels[0], 2)[0, 0], target)
    assert sorted(target.flatten().tolist()) == list(range(height * width))
    assert turned.target.shape == sample.target.shape


def test_all_eight_views_occur():
    place = torch.arange(9, dtype=torch.float32).reshape(1, 1, 1, 3, 3).expand(1, 1, 2, 3, 3)
    o = Observation(pixels=place, dates=torch.zeros(1, 1, dtype=torch.int64), valid=place[:, :, 0] >= 0)
    sample = LabelledSample(
        id="", batch=Batch(observations={"sentinel1": o}), target=torch.zeros(1, dtype=torch.int64), fold="train"
    )
    g = torch.Generator().manual_seed(0)
    turned = [turn_sample(sample, g, dense=False).batch.observations["sentinel1"] for _ in range(200)]
    views = {tuple(o.pixels[0, 0, 0].flatten().tolist()) for o in turned}
    assert len(views) == 8


@pytest.mark.parametrize("seed", range(20))
def test_a_series_keeps_a_date_with_data(seed):
    batch = a_batch(samples=3, dates=2)
    g = torch.Generator().manual_seed(seed)
    varied = vary(batch, g, Augmentation(drop_dates=0.9, noise=0.0), {})
    for name, o in varied.observations.items():
        before = batch.observations[name]
        assert o.valid.flatten(1).any(1).all()
        assert not (o.valid & ~before.valid).any()
        torch.testing.assert_close(o.pixels, before.pixels)


def test_noise_is_as_large_as_asked_for_and_spares_codes():
    spreads = {"sentinel2_l2a": torch.linspace(10, 120, 12), "worldcover": torch.ones(1)}
    o = Observation(
        pixels=torch.zeros(4, 2, 12, 64, 64),
        dates=torch.zeros(4, 2, dtype=torch.int64),
        valid=torch.ones(4, 2, 64, 64, dtype=torch.bool),
    )
    codes = Observation(pixels=torch.zeros(4, 1, 1, 64, 64), dates=o.dates[:, :1], valid=o.valid[:, :1])
    batch = Batch(observations={"sentinel2_l2a": o, "worldcover": codes})
    varied = vary(batch, torch.Generator().manual_seed(0), Augmentation(drop_dates=0, noise=0.1), spreads)
    found = varied.observations["sentinel2_l2a"].pixels.std((0, 1, 3, 4))
    torch.testing.assert_close(found, 0.1 * spreads["sentinel2_l2a"], rtol=0.02, atol=0)
    assert not varied.observations["worldcover"].pixels.any()
    assert not o.pixels.any()
