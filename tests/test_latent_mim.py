import sys
from dataclasses import replace

import pytest
import torch

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig, cut_patches, embed_chosen, released_config
from panterra.models.predictor import DECODE, predictor_config
from panterra.objectives.latent_mim import (
    MASKED_NEGATIVES_LOSS,
    V1_LOSS,
    LatentMIM,
    LatentMIMConfig,
    View,
    Views,
    draw_bands,
)
from panterra.objectives.masking import TIME_MASKING, V1_MASKING, make_masks
from panterra.objectives.teacher import follow

sys.path.insert(0, "benchmarks")
SIZES = {"sentinel2_l2a": 2, "sentinel1": 2, "landsat": 2, "worldcover": 1, "srtm": 1}


def config(**options):
    encoder = OlmoEarthConfig(
        dim=32,
        depth=2,
        heads=2,
        modalities=tuple(SIZES),
        convolution=False,
        pixel_hidden=(8,),
        band_sets={m: (MODALITIES[m].band_names,) for m in ("sentinel2_l2a", "landsat")},
        position="rope_3d_mixed",
        rope_time_scale=1 / 30,
        drop_path=0.0,
    )
    predictor = predictor_config(encoder, depth=1)
    return LatentMIMConfig(**{"encoder": encoder, "predictor": predictor, "band_dropout": 0.0, **options})


def make(**options):
    torch.manual_seed(0)
    return LatentMIM(config(**options))


def views(batch=4, *, seed=0, number=2):
    """Two views of samples of which the first lacks Sentinel-1 and the last a date of Landsat."""
    g = torch.Generator().manual_seed(seed)
    ground = torch.rand(batch, 1, 1, 8, 8, generator=g)  # what all sensors look at, each in its own way
    shapes = {m: (1, dates, len(MODALITIES[m].bands), 1, 1) for m, dates in SIZES.items()}
    inputs = {m: ground * torch.randn(shape, generator=g) for m, shape in shapes.items()}
    missing = {m: torch.zeros(batch, 4, 4, dates, 1, dtype=torch.bool) for m, dates in SIZES.items()}
    missing["sentinel1"][0], missing["landsat"][-1, :, :, 1] = True, True
    timestamps = torch.tensor([[15, 3, 2021], [15, 4, 2021]]).expand(batch, -1, -1)
    masks = [make_masks(missing, TIME_MASKING, generator=g) for _ in range(number)]
    return Views(tuple(View(inputs=inputs, timestamps=timestamps, masks=mask, patch_px=2) for mask in masks))


def sample(view, i):
    pick = slice(i, i + 1)
    one = View(
        inputs={m: x[pick] for m, x in view.inputs.items()},
        timestamps=view.timestamps[pick],
        masks={m: x[pick] for m, x in view.masks.items()},
        patch_px=view.patch_px,
    )
    return Views((one,))


def test_a_batch_costs_what_its_samples_cost():
    model = make(contrast_weight=0.0, loss=V1_LOSS)
    (view,) = views(number=1)
    together = model(Views((view,))).views[0]
    alone = [model(sample(view, i)).views[0] for i in range(4)]
    for m, loss in together.items():
        decodes = [bool((view.masks[m][i] == DECODE).any()) for i in range(4)]
        expected = [single[m] for single, decode in zip(alone, decodes, strict=True) if decode]
        torch.testing.assert_close(loss, torch.stack(expected).mean() if expected else torch.tensor(0.0))


def test_the_total_is_the_mean_of_the_views_and_the_contrast():
    out = make()(views())
    expected = sum(sum(terms.values()) for terms in out.views) / 2 + out.contrast
    torch.testing.assert_close(out.total, expected)
    assert out.contrast > 0


def test_every_trainable_parameter_gets_a_gradient_even_where_a_modality_was_not_seen():
    model = make()
    a, b = views()
    without = [View(inputs=v.inputs, timestamps=v.timestamps, masks=dict(v.masks), patch_px=2) for v in (a, b)]
    for view in without:
        del view.masks["srtm"]
    model(Views(tuple(without))).total.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad, name
    assert model.encoder.patch_embeddings["worldcover"][0].proj.weight.grad.abs().sum() == 0
    assert model.encoder.patch_embeddings["sentinel2_l2a"][0].proj.weight.grad.abs().sum() > 0


def test_without_contrast_every_parameter_is_still_in_use():
    model = make(contrast_weight=0.0)
    model(views(number=1)).total.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_masks_of_other_patches_are_refused():
    coarse = [replace(v, masks={**v.masks, "sentinel1": v.masks["sentinel1"][:, :2, :2]}) for v in views()]
    with pytest.raises(
        InputError, match=r"sentinel1 has \[4, 4, 2\] patches and dates, and its mask is of \[2, 2, 2\]"
    ):
        make()(Views(tuple(coarse)))


def test_values_where_data_are_missing_do_not_matter():
    model, (a, b) = make(), views()
    other = {m: x.clone() for m, x in a.inputs.items()}
    other["sentinel1"][0], other["landsat"][-1, 1] = -99999.0, 7.0
    changed = [View(inputs=other, timestamps=v.timestamps, masks=v.masks, patch_px=2) for v in (a, b)]
    torch.testing.assert_close(model(Views(tuple(changed))).total, model(Views((a, b))).total)


def test_a_small_model_learns_a_batch_and_its_teacher_stays():
    model, pair = make(), views()
    model.train()
    teacher = {name: weight.clone() for name, weight in model.teacher.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(60):
        out = model(pair)
        optimiser.zero_grad()
        out.total.backward()
        optimiser.step()
        losses.append(out.total.item())
    assert losses[-1] < 0.85 * losses[0]
    for name, weight in model.teacher.named_parameters():
        assert torch.equal(weight, teacher[name])
    follow(model.teacher, model.encoder, 0.5)
    assert any(not torch.equal(weight, teacher[name]) for name, weight in model.teacher.named_parameters())


def test_a_regulariser_is_a_term_of_each_view():
    plain, spread = make(), make(regulariser={"type": "KoLeo", "mode": "patch", "weight": 0.1})
    one, other = plain(views()), spread(views())
    terms = [view["regulariser"] for view in other.views]
    assert all(term.detach() != 0 for term in terms)
    torch.testing.assert_close(other.total, one.total + torch.stack(terms).mean())
    assert "regulariser" in other.terms


def test_pixels_cost_their_mean_absolute_error_where_they_are_there():
    model, (view,) = make(contrast_weight=0.0, loss={"type": "mae"}), views(number=1)
    inputs = {m: x.clone() for m, x in view.inputs.items()}
    inputs["worldcover"][1, :, :, 3, 5] = -99999.0  # a pixel of a patch that is there all the same
    inputs["sentinel2_l2a"][2, 1, 4] = -99999.0  # a band of a date
    with torch.no_grad():
        for weight in model.reconstructor.parameters():
            weight.zero_()
    got = model(Views((replace(view, inputs=inputs),))).views[0]
    for m, x in inputs.items():
        errors = []
        for b, row, col, date, _ in (view.masks[m] == DECODE).nonzero().tolist():
            patch = x[b, date, :, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
            errors.append(patch[patch != -99999.0].abs())
        expected = torch.cat(errors).mean() if errors else torch.tensor(0.0)
        torch.testing.assert_close(got[m], expected)


def test_missing_pixels_cost_nothing_and_every_parameter_is_in_use():
    model, (a, b) = make(loss={"type": "mae"}), views()
    there = {m: x.clone() for m, x in a.inputs.items()}
    there["worldcover"][1, 0, 0, 3, 5] = -99999.0
    pair = [replace(view, inputs=there) for view in (a, b)]
    out = model(Views(tuple(pair)))
    out.total.backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in model.parameters() if w.requires_grad)
    assert out.total < 10


def test_a_small_model_learns_the_pixels_of_a_batch():
    model, pair = make(loss={"type": "mae"}, contrast_weight=0.0).train(), views()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(pair).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_teacher_may_have_weights_of_its_own():
    name = "patch_embeddings.sentinel1.0.proj.weight"
    one, other = make(), make(teacher_seed=5)
    assert torch.equal(one.teacher.state_dict()[name], one.encoder.state_dict()[name])
    assert not torch.equal(other.teacher.state_dict()[name], other.encoder.state_dict()[name])


def test_dropped_bands_are_drawn_in_training_alone():
    model, pair = make(band_dropout=0.9), views()

    def loss(seed):
        return model(pair, generator=torch.Generator().manual_seed(seed)).total

    model.train()
    torch.testing.assert_close(loss(1), loss(1), rtol=0, atol=0)
    assert loss(1) != loss(2)
    model.eval()
    assert loss(1) == loss(2)


def test_samples_keep_at_least_one_of_their_bands():
    settings = config().encoder
    g = torch.Generator().manual_seed(0)
    rates = [1 - draw_bands(500, "sentinel2_l2a", settings, highest=0.4, generator=g).float().mean() for _ in range(20)]
    assert max(rates) <= 0.42
    assert 0.1 < sum(rates) / 20 < 0.3
    assert max(rates) - min(rates) > 0.1
    assert (draw_bands(500, "sentinel1", settings, highest=1e9, generator=g).sum(1) == 1).all()


def test_bands_that_are_a_token_alone_stay():
    settings = OlmoEarthConfig(dim=16, depth=1, heads=2, modalities=("landsat",))  # v1: the panchromatic band alone
    kept = draw_bands(50, "landsat", settings, highest=1e9, generator=None)
    assert kept[:, 0].all()
    assert (kept[:, 1:].sum(1) == 1).all()


@pytest.mark.parametrize("version", ["v1", "v1.2"])
def test_dropping_bands_of_patches_is_dropping_them_of_images(version):
    encoder = OlmoEarth(replace(released_config(version, "nano"), modalities=("sentinel2_l2a",)))
    images, kept = torch.randn(3, 2, 12, 8, 8), torch.rand(3, 12) < 0.5
    everything = {
        "sentinel2_l2a": torch.ones(3, 2, 2, 2, len(encoder.patch_embeddings["sentinel2_l2a"]), dtype=torch.bool)
    }
    patches = cut_patches(encoder.patch_embeddings, {"sentinel2_l2a": images}, 4)
    got = embed_chosen(encoder.patch_embeddings, patches, everything, kept={"sentinel2_l2a": kept})
    expected = encoder.embed_patches({"sentinel2_l2a": images * kept[:, None, :, None, None]}, 4)["sentinel2_l2a"]
    torch.testing.assert_close(got, expected.flatten(0, 4))


@pytest.mark.parametrize("turned", [False, True])
def test_views_together_cost_what_they_cost_one_by_one(turned):
    model, (a, b) = make(contrast_weight=0.0), views()
    if turned:
        b = View(inputs={m: x.flip(3) for m, x in b.inputs.items()}, timestamps=b.timestamps, masks=b.masks, patch_px=2)
    together = model(Views((a, b)))
    for view, terms in zip((a, b), together.views, strict=True):
        (alone,) = model(Views((view,))).views
        assert alone.keys() == terms.keys()
        for m in terms:
            torch.testing.assert_close(terms[m], alone[m])


@pytest.mark.parametrize(
    ("version", "masking", "loss"), [("v1", V1_MASKING, V1_LOSS), ("v1.2", TIME_MASKING, MASKED_NEGATIVES_LOSS)]
)
def test_equals_the_plain_version(version, masking, loss):
    from pretrain_plain import PlainLatentMIM

    g = torch.Generator().manual_seed(0)
    encoder = replace(released_config(version, "nano"), depth=2, drop_path=0.0, modalities=tuple(SIZES))
    torch.manual_seed(0)
    settings = {"encoder": encoder, "predictor": predictor_config(encoder, depth=2), "loss": loss, "band_dropout": 0.0}
    model = LatentMIM(LatentMIMConfig(**settings)).train()
    for weight in (*model.encoder.encodings.channel.values(), *model.predictor.encodings.channel.values()):
        torch.nn.init.normal_(weight)
    plain = PlainLatentMIM(model).train()
    pair = views(3)
    gone = {m: torch.zeros(3, 4, 4, dates, len(encoder.groups(m)), dtype=torch.bool) for m, dates in SIZES.items()}
    gone["sentinel1"][0] = True
    pair = [replace(view, masks=make_masks(gone, masking, generator=g)) for view in pair]
    ours = model(Views(tuple(pair))).total
    last = {m: x.permute(0, 3, 4, 1, 2) for m, x in pair[0].inputs.items()}
    wanted = plain(Views(tuple(replace(view, inputs=last) for view in pair)))
    torch.testing.assert_close(ours, wanted)
    ours.backward()
    wanted.backward()
    pairs = {
        "encoder.blocks.1.mlp.fc1.weight": plain.encoder.blocks[1].fc1.weight,
        "encoder.patch_embeddings.sentinel2_l2a.0.proj.weight": plain.encoder.state[
            "patch_embeddings.sentinel2_l2a.0.proj.weight"
        ],
        "encoder.encodings.channel.landsat": plain.encoder.state["encodings.channel.landsat"],
        "encoder.projection.0.weight": plain.encoder.state["projection.0.weight"],
        "predictor.blocks.0.attn.q.weight": plain.predictor.blocks[0].q.weight,
        "predictor.encodings.channel.srtm": plain.predictor.channel["srtm"],
        "predictor.mask_token": plain.predictor.mask_token,
        "predictor.output.weight": plain.predictor.output.weight,
    }
    found = {name: weight.grad for name, weight in model.named_parameters()}
    if version == "v1.2":
        pairs["encoder.rotary.frequencies"] = plain.encoder.blocks[0].freqs
        found["encoder.rotary.frequencies"] = found["encoder.rotary.frequencies"][0]
    for name, weight in pairs.items():
        assert weight.grad.abs().sum() > 0
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_views_of_different_patches_are_refused():
    a, b = views()
    with pytest.raises(InputError, match="views differ in their modalities or patch sizes"):
        make()(Views((a, replace(b, patch_px=1))))


def test_a_contrast_needs_two_views():
    with pytest.raises(InputError, match="1 views came; the contrast needs 2"):
        make()(views(number=1))
