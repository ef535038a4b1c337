import pytest
import torch

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.olmoearth import OlmoEarthConfig
from panterra.models.predictor import DECODE, predictor_config
from panterra.objectives.latent_mim import V1_LOSS, LatentMIM, LatentMIMConfig, View, Views, drop_bands
from panterra.objectives.masking import TIME_MASKING, make_masks
from panterra.objectives.teacher import follow

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


def test_band_dropout_zeroes_whole_bands_and_keeps_at_least_one():
    settings = config().encoder
    inputs = {"sentinel2_l2a": torch.ones(500, 2, 12, 4, 4), "sentinel1": torch.ones(500, 2, 2, 4, 4)}
    g = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(20):
        out = drop_bands(inputs, settings, modalities=("sentinel2_l2a", "landsat"), highest=0.4, generator=g)
        assert out["sentinel1"] is inputs["sentinel1"]
        bands = out["sentinel2_l2a"][:, 0, :, 0, 0]
        assert torch.equal(out["sentinel2_l2a"], bands[:, None, :, None, None].expand(500, 2, 12, 4, 4))
        rates.append(1 - bands.mean().item())
    assert max(rates) <= 0.42
    assert 0.1 < sum(rates) / 20 < 0.3
    assert max(rates) - min(rates) > 0.1
    all_gone = drop_bands(inputs, settings, modalities=("sentinel1",), highest=1e9, generator=g)["sentinel1"]
    assert (all_gone[:, 0, :, 0, 0].sum(1) == 1).all()


def test_bands_that_are_a_token_alone_stay():
    settings = OlmoEarthConfig(dim=16, depth=1, heads=2, modalities=("landsat",))  # v1: the panchromatic band alone
    inputs = {"landsat": torch.ones(50, 1, 11, 2, 2)}
    out = drop_bands(inputs, settings, modalities=("landsat",), highest=1e9, generator=None)["landsat"]
    assert (out[:, :, 0] == 1).all()
    assert (out[:, 0, 1:, 0, 0].sum(1) == 1).all()


def test_a_contrast_needs_two_views():
    with pytest.raises(InputError, match="1 views came; the contrast needs 2"):
        make()(views(number=1))
