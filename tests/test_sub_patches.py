"""Sub-patches in stores, in probes and under heads."""

import numpy as np
import pytest
import torch

from panterra.errors import InputError
from panterra.evaluate.embed import embed_samples
from panterra.evaluate.probes import ProbeClass
from panterra.finetune.heads import HeadConfig
from panterra.finetune.model import Base, FineTuned, Setup, load_finetuned, on_sub_patches
from panterra.finetune.step import Tuning, make_optimiser, prepare
from panterra.finetune.tasks import TASKS, LossOptions
from panterra.imagery.stac import open_scene
from panterra.mapping import run
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.filling import fill_up, ground_m
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig
from panterra.models.sub_patches import SubPatches, encode_sub_patches
from panterra.planet import write_planet_scene
from panterra.sample import Batch, Observation


def an_anysat(seed=0):
    torch.manual_seed(seed)
    config = AnySatConfig(dim=64, depth=1, heads=2)
    return AnySat(config, name="small", normalized_input=True).eval().requires_grad_(False)


def an_olmoearth():
    return OlmoEarth(OlmoEarthConfig(dim=32, depth=1, heads=2)).eval().requires_grad_(False)


def series(bands, side=8, samples=2, dates=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Observation(
        pixels=torch.randn(samples, dates, bands, side, side, generator=g),
        dates=torch.tensor([[19000, 19060][:dates]] * samples),
        valid=torch.ones(samples, dates, side, side, dtype=torch.bool),
    )


def a_batch(side=8, samples=2, names=("sentinel2_l2a", "sentinel1")):
    bands = {"sentinel2_l2a": 12, "sentinel1": 2}
    return Batch(observations={m: series(bands[m], side, samples, seed=i) for i, m in enumerate(names)})


# Embedding samples


def test_each_sub_patch_is_its_own_row():
    model, batches = an_anysat(), [a_batch(), a_batch(samples=1)]
    rows = embed_samples(model, batches, patch_m=20, what="dense")
    assert (rows.shape, rows.dtype) == ((3, 8, 8, 2 * 64), np.float32)
    patches = embed_samples(model, batches, patch_m=20, what="patches")
    np.testing.assert_allclose(rows[:, ::2, 1::2, :64], patches, atol=1e-5)  # first the patch's vector, then its own
    assert len(np.unique(rows[0, :2, :2, 64:].reshape(4, -1), axis=0)) == 4


def test_sub_patches_without_data_are_nan_and_the_patch_is_not():
    batch = a_batch()
    batch.observations["sentinel2_l2a"].valid[1, :, 2, 3] = False
    rows = embed_samples(an_anysat(), [batch], patch_m=20, what="dense")
    assert np.argwhere(np.isnan(rows).any(-1)).tolist() == [[1, 2, 3]]
    assert not np.isnan(embed_samples(an_anysat(), [batch], patch_m=20, what="patches")).any()


def test_of_sensors_with_equal_sub_patches_the_preferred_one_counts_whatever_the_order():
    one, other = (a_batch(names=names) for names in (("sentinel2_l2a", "sentinel1"), ("sentinel1", "sentinel2_l2a")))
    other = Batch(observations={name: one.observations[name] for name in other.observations})
    first, second = (embed_samples(an_anysat(), [batch], patch_m=20, what="dense") for batch in (one, other))
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_families_without_sub_patches_say_so():
    with pytest.raises(InputError, match=r"has no sub-patch features; ask for a smaller patch_m instead$"):
        embed_samples(an_olmoearth(), [a_batch()], patch_m=20, what="dense")
    with pytest.raises(InputError, match="wanted 'summary', 'patches', 'dense' or 'centre'"):
        embed_samples(an_anysat(), [a_batch()], patch_m=20, what="pixels")


# As an encoder of its own, for stores and maps


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """44 pixels are no whole number of patches of 30 m."""
    folder = tmp_path_factory.mktemp("planet") / "scene"
    dates = ("2023-06-09", "2023-07-22")
    return open_scene(write_planet_scene(folder, seed=3, size_px=44, dates=dates, labels=20))


def test_a_store_holds_what_the_encoder_says_of_each_sub_patch(scene, tmp_path):
    model = SubPatches(an_anysat(), patch_m=20, modality="sentinel1")
    names, box = ["sentinel1", "sentinel2_l2a"], scene.geobox()[:32, :32]
    store = run.embed(
        scene, model, tmp_path / "e.zarr", patch_m=10, modalities=names, box=box, window_px=32, overlap_px=0
    )
    batch = scene.batch(box, store.about["modalities"])
    with torch.inference_mode():
        expected = encode_sub_patches(model.encoder, batch, patch_m=20, modality="sentinel1")
    np.testing.assert_allclose(store.read(), expected.patches[0], atol=1e-4)
    assert store.about["patch_m"] == 10
    assert store.about["model"]["name"] == "small, sub-patches of sentinel1 in patches of 20 m"


def test_a_scene_of_any_size_is_stored_and_standardised_once(scene, tmp_path):
    inner = an_anysat()
    inner.normalized_input = False
    model = SubPatches(inner, patch_m=30, modality="sentinel2_l2a")
    store = run.embed(
        scene, model, tmp_path / "e.zarr", patch_m=10, modalities=["sentinel2_l2a"], window_px=30, overlap_px=6
    )
    assert store.read().shape == (44, 44, 128)
    assert not inner.statistics
    batch = scene.batch(scene.geobox()[:20, :20], ["sentinel2_l2a"])
    fitted = model.with_statistics(model.fit_statistics([batch]))
    assert not fitted.missing_statistics(["sentinel2_l2a"])
    assert model.missing_statistics(["sentinel2_l2a"]) == ("sentinel2_l2a",)
    assert fitted.statistics_of("sentinel2_l2a") == fitted.encoder.statistics_of("sentinel2_l2a") != {}
    small = fitted.encode(batch, patch_m=10)  # 200 m are six patches and two thirds
    assert (small.patches.shape, small.patch_m) == ((1, 20, 20, 128), 10)


def test_filling_up_adds_missing_pixels_alone():
    batch = a_batch(side=5)
    whole = fill_up(batch, patch_m=40)
    assert (ground_m(batch), ground_m(whole)) == ((50.0, 50.0), (80.0, 80.0))
    for name, o in whole.observations.items():
        assert torch.equal(o.pixels[..., :5, :5], batch.observations[name].pixels)
        assert int(o.valid.sum()) == int(batch.observations[name].valid.sum())
    assert fill_up(whole, patch_m=40) is whole


def test_what_has_no_sub_patches_is_refused():
    with pytest.raises(InputError, match="has no sub-patch features"):
        SubPatches(an_olmoearth(), patch_m=40, modality="sentinel1")
    with pytest.raises(InputError, match="no sub-patches of 'modis'; choose one of sentinel2_l2a"):
        SubPatches(an_anysat(), patch_m=40, modality="modis")
    with pytest.raises(InputError, match="multiples of 10 m"):
        SubPatches(an_anysat(), patch_m=25, modality="sentinel1")
    model = SubPatches(an_anysat(), patch_m=40, modality="sentinel1")
    with pytest.raises(InputError, match="measure 10 m; ask for patch_m=10"):
        model.encode(a_batch(), patch_m=40)
    with pytest.raises(InputError, match="came without sentinel1; give it"):
        model.encode(a_batch(names=("sentinel2_l2a",)), patch_m=10)


# Under a head


def a_setup(encoder, *, kind="linear", task="segmentation", side=4, modalities=("sentinel2_l2a", "sentinel1"), **more):
    row = TASKS[task]
    return Setup(
        task=task,
        head=HeadConfig(kind=kind, dense=row.dense, dim=encoder.dim, outputs=row.outputs(2), side=side, hidden=16),
        classes=(ProbeClass(name="a", code=1), ProbeClass(name="b", code=2)),
        modalities=modalities,
        patch_m=40,
        window_px=8,
        base=Base.of(encoder),
        **more,
    )


def test_a_head_on_sub_patches_scores_each_from_its_own_vector():
    encoder, batch = an_anysat(), a_batch()
    setup = on_sub_patches(a_setup(encoder), encoder)
    assert (setup.sub_patches, setup.parts, setup.head.dim, setup.head.side) == ("sentinel2_l2a", 4, 128, 1)
    assert setup.output_m == 10
    model = FineTuned(encoder, setup).eval()
    features = encode_sub_patches(encoder, batch, patch_m=40, modality="sentinel2_l2a")
    expected = model.head.layers(features.patches).movedim(-1, 1)
    torch.testing.assert_close(model(batch), expected)
    mapped = model.encode(a_batch(side=6), patch_m=10)
    assert mapped.patches.shape == (2, 6, 6, 2)
    with pytest.raises(InputError, match="looks at sub-patches of sentinel2_l2a, which the batch does not have"):
        model(a_batch(names=("sentinel1",)))


@pytest.mark.parametrize(("kind", "side", "cells"), [("linear", 8, 2), ("mlp", 4, 1), ("conv", 16, 4)])
def test_sub_patches_may_be_divided_further(kind, side, cells):
    encoder = an_anysat()
    model = FineTuned(encoder, on_sub_patches(a_setup(encoder, kind=kind, side=side), encoder, modality="sentinel1"))
    assert (model.setup.sub_patches, model.setup.head.side, model.setup.cells) == ("sentinel1", cells, side)
    assert model(a_batch()).shape == (2, 2, 2 * side, 2 * side)


def test_training_moves_the_encoder_by_way_of_its_sub_patches():
    encoder, batch = an_anysat(), a_batch()
    model = FineTuned(encoder, on_sub_patches(a_setup(encoder), encoder))
    target = (batch.observations["sentinel2_l2a"].pixels[:, 0, 0] > 0).long()
    tuning = Tuning(epochs=1, head_first=0, lr=3e-2, encoder_lr=3e-3)
    optimiser = make_optimiser(prepare(model, tuning), tuning)
    before = encoder.patch_encoder.blocks[-1].attn.distance.clone()
    losses = []
    for _ in range(25):
        loss = TASKS["segmentation"].loss(model(batch), target, LossOptions())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]  # what differs inside a patch can be learned
    assert not torch.equal(before, encoder.patch_encoder.blocks[-1].attn.distance)


def test_a_saved_model_looks_at_the_same_sub_patches(scene, tmp_path):
    encoder = an_anysat()
    encoder.normalized_input = False
    encoder = encoder.with_statistics(encoder.fit_statistics([scene.batch(scene.geobox()[:16, :16])]))
    model = FineTuned(encoder, on_sub_patches(a_setup(encoder), encoder)).eval()
    again = load_finetuned(model.save(tmp_path / "model"))
    assert again.setup == model.setup
    batch = scene.batch(scene.geobox()[:8, :8], list(model.modalities))
    with torch.inference_mode():
        torch.testing.assert_close(again(batch), model(batch))
    result = run.map(scene, again, tmp_path / "map.tif")
    assert result.path.is_file()


def test_heads_that_sub_patches_do_not_suit_are_refused():
    encoder = an_anysat()
    with pytest.raises(InputError, match="has no sub-patch features"):
        on_sub_patches(a_setup(an_olmoearth()), an_olmoearth())
    with pytest.raises(InputError, match="one answer per sample, so it needs no sub-patches"):
        on_sub_patches(a_setup(encoder, task="classification"), encoder)
    with pytest.raises(InputError, match="modis of sentinel2_l2a, sentinel1 has sub-patches; leave them out"):
        on_sub_patches(a_setup(encoder), encoder, modality="modis")
    with pytest.raises(InputError, match=r"cells of 20 m came for the sub-patches of sentinel2_l2a of 10 m, sentinel1"):
        on_sub_patches(a_setup(encoder, side=2), encoder)
    aerial = a_setup(encoder, modalities=("sentinel2_l2a", "aerial"))
    assert on_sub_patches(aerial, encoder).sub_patches == "sentinel2_l2a"  # cells of 10 m
    fine = a_setup(encoder, modalities=("sentinel2_l2a", "aerial"), side=20)
    assert on_sub_patches(fine, encoder).sub_patches == "aerial"  # cells of 2 m
    narrow = a_setup(encoder, sub_patches="sentinel1", parts=4, side=1)
    with pytest.raises(InputError, match="the head takes features of width 64; small gives 128"):
        FineTuned(encoder, narrow)
