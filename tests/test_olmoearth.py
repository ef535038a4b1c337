import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from panterra import Batch, InputError, Observation, collate, load_model
from panterra.models.convert import olmoearth_config
from panterra.models.features import Encoder
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig, released_config
from panterra.models.weights import MODELS

sys.path.insert(0, "benchmarks")
SMALL = OlmoEarthConfig(dim=32, depth=2, heads=2)
CONFIGS = {
    "v1": SMALL,
    "v1.1": replace(released_config("v1.1", "nano"), dim=32, depth=2, heads=2),
    "v1.2": replace(released_config("v1.2", "nano"), dim=32, depth=2, heads=2),
}


@pytest.fixture(params=list(CONFIGS))
def model(request):
    torch.manual_seed(1)
    return OlmoEarth(CONFIGS[request.param], name=request.param).eval().requires_grad_(False)


def observe(bands, dates, *, size=16, seed=0, centre=1500.0, spread=800.0):
    pixels = np.random.default_rng(seed).normal(centre, spread, (len(dates), bands, size, size))
    return Observation.build(pixels.astype(np.float32), dates)


def sample(*, dates=("2023-04-01", "2023-06-01", "2023-08-01"), seed=0, sensors=("sentinel2_l2a", "sentinel1")):
    observations = {}
    if "sentinel2_l2a" in sensors:
        observations["sentinel2_l2a"] = observe(12, dates, seed=seed)
    if "sentinel1" in sensors:
        observations["sentinel1"] = observe(2, dates[:2], seed=seed + 1, centre=-12, spread=4)
    return Batch(observations=observations)


def test_is_an_encoder(model):
    assert isinstance(model, Encoder)
    out = model.encode(sample(), patch_m=40)
    assert out.patches.shape == (1, 4, 4, 32)
    assert out.summary.shape == (1, 32)
    assert out.valid.all()


def test_batch_mates_do_not_matter(model):
    one = sample(dates=("2023-04-01",), sensors=("sentinel2_l2a",), seed=3)
    batches = [one, sample(seed=4), sample(dates=("2022-12-01", "2023-01-20"), seed=5)]
    together = model.encode(collate(batches), patch_m=40)
    for i, batch in enumerate(batches):
        alone = model.encode(batch, patch_m=40)
        torch.testing.assert_close(together.patches[i], alone.patches[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.summary[i], alone.summary[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("junk", [0.0, 1e9, float("nan")])
def test_invalid_pixels_do_not_matter(model, junk):
    batch = sample()
    o = batch.observations["sentinel2_l2a"]
    valid = o.valid.clone()
    valid[:, 0, :6, :7] = False
    valid[:, 1] = False
    base = replace(o, valid=valid)
    dirty = replace(base, pixels=torch.where(valid[:, :, None], o.pixels, junk))
    results = [
        model.encode(replace(batch, observations={**batch.observations, "sentinel2_l2a": x}), patch_m=40)
        for x in (base, dirty)
    ]
    assert torch.equal(results[0].patches, results[1].patches)
    assert results[0].patches.isfinite().all()


def test_places_without_data_are_said_to_be_so(model):
    batch = sample(sensors=("sentinel2_l2a",))
    o = batch.observations["sentinel2_l2a"]
    valid = o.valid.clone()
    valid[..., :4, :8] = False
    out = model.encode(Batch(observations={"sentinel2_l2a": replace(o, valid=valid)}), patch_m=40)
    assert out.valid[0].tolist() == [[False, False, True, True]] + [[True] * 4] * 3
    assert not out.patches[0, 0, :2].any()
    nothing = model.encode(Batch(observations={"sentinel2_l2a": replace(o, valid=torch.zeros_like(valid))}), patch_m=40)
    assert not nothing.valid.any()
    assert not nothing.summary.any()


def test_an_image_that_is_whole_equals_the_published_fast_path(model):
    batch = sample(sensors=("sentinel2_l2a",))
    ours = model.encode(batch, patch_m=40)
    for mode in ("published_fast", "published_eval"):
        model.attention = mode
        torch.testing.assert_close(model.encode(batch, patch_m=40).patches, ours.patches, rtol=1e-5, atol=1e-5)


def test_the_published_evaluation_leaks_padding_and_the_default_does_not(model):
    short, long = sample(dates=("2023-04-01",), seed=1), sample(seed=2)
    alone = model.encode(short, patch_m=40).patches[0]
    model.attention = "published_eval"
    leaked = model.encode(collate([short, long]), patch_m=40).patches[0]
    assert (leaked - alone).abs().max() > 1e-3


@pytest.mark.parametrize("patch_px", range(1, 9))
def test_every_patch_size(model, patch_px):
    batch = Batch(observations={"sentinel2_l2a": observe(12, ["2023-05-01"], size=patch_px * 2)})
    out = model.encode(batch, patch_m=10.0 * patch_px, tokens=True)
    assert out.patches.shape[1:3] == (2, 2)
    sets = len(model.config.groups("sentinel2_l2a"))
    assert out.tokens["sentinel2_l2a"].shape == (1, 2, 2, 1, sets, 32)


def test_normalisation_happens_inside(model):
    batch = sample(sensors=("sentinel2_l2a",))
    o = batch.observations["sentinel2_l2a"]
    from panterra.models.normalize import normalize_olmoearth

    scaled = normalize_olmoearth(o.pixels.movedim(2, -1), "sentinel2_l2a").movedim(-1, 2)
    declared = model.encode(batch, patch_m=40).patches
    model.normalized_input = True
    done = model.encode(Batch(observations={"sentinel2_l2a": replace(o, pixels=scaled)}), patch_m=40).patches
    torch.testing.assert_close(done, declared, rtol=1e-4, atol=1e-5)


def test_training_and_inference_compute_the_same(model):
    batch = sample()
    fast = model.encode(batch, patch_m=40).patches
    with torch.enable_grad():
        plain = model.encode(batch, patch_m=40).patches
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close(model):
    batch = sample()
    exact = model.encode(batch, patch_m=40).summary
    half = model.to(torch.bfloat16).encode(batch, patch_m=40).summary
    assert torch.nn.functional.cosine_similarity(exact, half.float()).item() > 0.999


@pytest.mark.parametrize("version", ["v1", "v1.2"])
def test_equals_the_plain_version_at_full_size(version):
    from olmoearth_plain import PlainOlmoEarth

    model = load_model(f"olmoearth-{version}-nano", random=2)
    generator = torch.Generator().manual_seed(0)
    inputs = {"sentinel2_l2a": torch.randn(2, 16, 16, 2, 12, generator=generator)}
    stamps = torch.tensor([[[1, 3, 2023], [9, 11, 2023]]]).expand(2, -1, -1)
    seen = torch.rand(2, 4, 4, 2, len(model.config.groups("sentinel2_l2a")), generator=generator) > 0.4
    ours = {"sentinel2_l2a": inputs["sentinel2_l2a"].permute(0, 3, 4, 1, 2)}
    for visible in (None, {"sentinel2_l2a": seen}):
        wanted = PlainOlmoEarth(model)(inputs, stamps, patch_px=4, visible=visible)["sentinel2_l2a"]
        got = model(ours, stamps, patch_px=4, visible=visible).tokens["sentinel2_l2a"]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


def test_parameters_add_up_to_the_published_counts():
    for card in MODELS.values():
        if card.name.startswith("olmoearth-") and card.size in ("nano", "tiny", "small"):
            model = OlmoEarth(released_config(card.family.removeprefix("olmoearth-"), card.size))
            assert sum(p.numel() for p in model.parameters()) == card.parameters, card.name


def test_every_parameter_is_initialised(monkeypatch):
    empty = torch.empty

    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", filled)
    model = OlmoEarth(replace(CONFIGS["v1.2"], registers=2, output_dim=8, projection_layers=2))
    assert all(p.isfinite().all() for p in model.parameters())


def test_patches_are_counted_in_pixels_of_the_sensor_where_it_has_a_grid_of_its_own():
    torch.manual_seed(0)
    config = replace(SMALL, modalities=("naip", "naip_10", "era5_10"), observed=("naip", "naip_10", "era5_10"))
    model = OlmoEarth(config).eval()
    fine, coarse = (Batch(observations={m: observe(4, ["2023-01-01"], size=32)}) for m in ("naip", "naip_10"))
    assert model.encode(fine, patch_m=2.5).patches.shape[1:3] == (8, 8)
    assert model.encode(coarse, patch_m=40).patches.shape[1:3] == (2, 2)
    with pytest.raises(InputError, match=r"for 0\.625 m pixels choose one of 0\.625, 1\.25"):
        model.encode(fine, patch_m=40)
    with pytest.raises(InputError, match=r"naip \(0\.625 m\), naip_10 \(10 m\); give those of one size"):
        model.encode(Batch(observations=fine.observations | coarse.observations), patch_m=40)


def test_patches_wider_than_any_in_training_work_as_in_the_published_fine_tuning(model):
    assert model.encode(sample(), patch_m=160).patches.shape[1:3] == (1, 1)


def test_pixels_beyond_the_last_whole_patch_are_left_out_where_nothing_is_resized(model):
    pixels, stamps = torch.randn(1, 1, 12, 20, 17), torch.tensor([[[1, 3, 2023]]])
    every, whole = (
        model({"sentinel2_l2a": x}, stamps, patch_px=8).tokens["sentinel2_l2a"] for x in (pixels, pixels[..., :16, :16])
    )
    torch.testing.assert_close(every, whole)


def test_a_checkpoint_of_other_sensors_looks_at_all_but_the_maps_that_are_predicted():
    def looked_at(*names):
        encoder = {"supported_modality_names": list(names), "embedding_size": 32, "use_linear_patch_embed": False}
        return olmoearth_config({"model": {"encoder_config": encoder}}).observed

    assert looked_at("sentinel2_l2a", "era5_10", "worldcover", "naip_10") == ("sentinel2_l2a", "era5_10", "naip_10")
    assert looked_at("worldcover", "srtm") == ("worldcover", "srtm")


@pytest.mark.parametrize(
    ("batch", "patch_m", "message"),
    [
        (lambda: sample(), 25, "for 10 m pixels choose one of 10, 20"),
        (lambda: sample(), float("nan"), "patch_m is nan; for 10 m pixels choose one of 10, 20"),
        (lambda: sample(), float("inf"), "patch_m is inf; for 10 m pixels"),
        (lambda: sample(), 170, "for 10 m pixels choose one of 10, 20.*up to 160"),
        (lambda: Batch(observations={"srtm": observe(1, ["2023-01-01"])}), 40, "trained to predict srtm"),
        (lambda: Batch(observations={"spot": observe(3, ["2023-01-01"])}), 40, "does not know spot"),
        (lambda: sample(), 30, "16 x 16 pixels is not a whole number of 3-pixel patches"),
    ],
)
def test_what_it_cannot_take_is_said(model, batch, patch_m, message):
    with pytest.raises(InputError, match=message):
        model.encode(batch(), patch_m=patch_m)
