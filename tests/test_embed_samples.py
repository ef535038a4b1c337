import numpy as np
import pytest
import torch

from panterra.errors import InputError
from panterra.evaluate.embed import PERCENTILES, embed_samples, raw_band_statistics, raw_patch_statistics
from panterra.models.features import Encoder, Features
from panterra.sample import Batch, Observation


class MeanColour:
    """An encoder whose embedding of a patch is the mean over its pixels and dates, band by band."""

    modalities = ("sentinel1",)
    dim = 2
    name = "mean colour"

    def encode(self, batch, *, patch_m, dense=False):
        o = batch.observations["sentinel1"]
        side = round(patch_m / batch.pixel_m)
        pixels = o.pixels.mean(1).unflatten(3, (-1, side)).unflatten(2, (-1, side)).mean((3, 5))
        valid = o.valid.any(1).unflatten(2, (-1, side)).unflatten(1, (-1, side)).any(4).any(2)
        patches = pixels.permute(0, 2, 3, 1).masked_fill(~valid[..., None], 0)
        return Features(patches=patches, summary=patches.mean((1, 2)), valid=valid, patch_m=patch_m)


def radar(seed, num=3, dates=4, side=6, valid=1.0):
    rng = np.random.default_rng(seed)
    return Observation(
        pixels=torch.tensor(rng.normal(-12, 3, (num, dates, 2, side, side)), dtype=torch.float32),
        dates=torch.arange(dates).expand(num, dates).contiguous(),
        valid=torch.tensor(rng.random((num, dates, side, side)) < valid),
    )


def hide(observation, sample, rows=slice(None), columns=slice(None), dates=slice(None)):
    observation.valid[sample, dates, rows, columns] = False
    return observation


def test_samples_come_in_the_order_of_the_batches():
    assert isinstance(MeanColour(), Encoder)
    observations = [radar(0), radar(1, num=2)]
    batches = [Batch(observations={"sentinel1": o}) for o in observations]
    pixels = [o.pixels.numpy() for o in observations]
    summary = embed_samples(MeanColour(), iter(batches), patch_m=20)
    np.testing.assert_allclose(summary, np.concatenate([p.mean((1, 3, 4)) for p in pixels]), rtol=1e-5)
    patches = embed_samples(MeanColour(), batches, patch_m=20, what="patches")
    assert (patches.shape, patches.dtype) == ((5, 3, 3, 2), np.float32)
    np.testing.assert_allclose(patches[4, 2, 0], pixels[1][1, :, :, 4:6, 0:2].mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(embed_samples(MeanColour(), batches, patch_m=20, what="centre"), patches[:, 1, 1])


def test_places_without_data_are_nan_not_zero():
    batch = Batch(observations={"sentinel1": hide(hide(radar(0), 1), 2, slice(0, 2), slice(2, 4))})
    summary = embed_samples(MeanColour(), [batch], patch_m=20)
    assert np.isnan(summary).any(1).tolist() == [False, True, False]
    patches = embed_samples(MeanColour(), [batch], patch_m=20, what="patches")
    assert np.isnan(patches[1]).all()
    assert np.argwhere(np.isnan(patches[2, :, :, 0])).tolist() == [[0, 1]]


def test_what_cannot_be_embedded_is_named():
    small, large = (Batch(observations={"sentinel1": radar(0, side=side)}) for side in (4, 6))
    with pytest.raises(InputError, match=r"differ in their numbers of patches \(\[2, 2\] and \[3, 3\]\)"):
        embed_samples(MeanColour(), [small, large], patch_m=20, what="patches")
    assert embed_samples(MeanColour(), [small, large], patch_m=20).shape == (6, 2)
    with pytest.raises(InputError, match="no batches came"):
        embed_samples(MeanColour(), [], patch_m=20)
    with pytest.raises(InputError, match="wanted 'summary', 'patches', 'dense' or 'centre'"):
        embed_samples(MeanColour(), [small], patch_m=20, what="pixels")


def test_band_statistics_are_those_of_numpy_over_valid_pixels():
    radar_, height = radar(0, valid=0.6), radar(5, dates=1)
    height = Observation(pixels=height.pixels[:, :, :1], dates=height.dates, valid=height.valid)
    radar_.pixels[0, 0, 1, 0, 0] = torch.nan
    found = raw_band_statistics(Batch(observations={"sentinel1": radar_, "srtm": height}))
    assert found.shape == (3, 3 * (4 + len(PERCENTILES)))
    for b in range(3):
        expected = []
        for o in (radar_, height):
            for band in range(o.pixels.shape[2]):
                values = o.pixels[b, :, band][o.valid[b]].numpy().astype(np.float64)
                values = values[np.isfinite(values)]
                expected += [
                    values.mean(),
                    values.std(),
                    values.min(),
                    values.max(),
                    *np.percentile(values, PERCENTILES),
                ]
        np.testing.assert_allclose(found[b], expected, rtol=1e-5)


def test_hidden_values_never_reach_the_statistics():
    seen, poisoned = radar(0, valid=0.5), radar(0, valid=0.5)
    poisoned.pixels[~poisoned.valid[:, :, None].expand_as(poisoned.pixels)] = 1e9
    one, other = (Batch(observations={"sentinel1": o}) for o in (seen, poisoned))
    np.testing.assert_array_equal(raw_band_statistics(one), raw_band_statistics(other))
    np.testing.assert_array_equal(raw_patch_statistics(one, 20), raw_patch_statistics(other, 20))


def test_a_sample_without_a_modality_is_nan_in_it():
    found = raw_band_statistics(Batch(observations={"sentinel1": hide(radar(0), 1)}))
    assert np.isnan(found).all(1).tolist() == [False, True, False]


def test_patch_statistics_are_those_of_numpy():
    o = hide(radar(0), 0, slice(2, 4), slice(0, 2), dates=2)
    found = raw_patch_statistics(Batch(observations={"sentinel1": o}), 20)
    assert found.shape == (3, 3, 3, 2 * (4 + 4))
    patch = o.pixels[0, :, 1, 2:4, 0:2].numpy().astype(np.float64)
    kept = patch[[0, 1, 3]]
    by_date = [*kept[:2].mean((1, 2)), kept.mean(), kept[2].mean()]
    expected = [kept.mean(), kept.std(), kept.min(), kept.max(), *by_date]
    np.testing.assert_allclose(found[0, 1, 0, 8:], expected, rtol=1e-5)


def test_patches_of_unequal_pixels_and_weather_share_one_grid():
    aerial = Observation.build(np.arange(4 * 24 * 24).reshape(1, 4, 24, 24).astype(np.float32), [0])
    coarse = Observation.build(np.arange(2 * 3 * 3).reshape(1, 2, 3, 3).astype(np.float32), [0])
    weather = Observation.build(np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1), [0])
    batch = Batch(observations={"naip_10": aerial, "alos2": coarse, "era5_10": weather, "sentinel1": radar(0, num=1)})
    found = raw_patch_statistics(batch, 10)
    assert found.shape == (1, 6, 6, 4 * 5 + 2 * 5 + 6 * 5 + 2 * 8)
    assert found[0, 0, 1, 0] == pytest.approx(aerial.pixels[0, 0, 0, 0:4, 4:8].mean().item())
    assert (found[0, :, :, 20].repeat(1) == np.repeat(np.arange(9).reshape(3, 3), 2, 0).repeat(2, 1).ravel()).all()
    assert (found[0, :, :, 30 + 5] == 1).all()


def test_patches_that_do_not_fit_are_named():
    batch = Batch(observations={"sentinel1": radar(0)})
    with pytest.raises(InputError, match=r"samples measure 1\.5 x 1\.5 patches of 40 m"):
        raw_patch_statistics(batch, 40)
    weather = Observation.build(np.zeros((1, 6, 1, 1), np.float32), [0])
    with pytest.raises(InputError, match="era5_10 have no pixels in space"):
        raw_patch_statistics(Batch(observations={"era5_10": weather}), 40)
    uneven = Observation.build(np.zeros((1, 2, 4, 4), np.float32), [0])
    with pytest.raises(InputError, match="alos2 has 4 pixels along 6 patches"):
        raw_patch_statistics(Batch(observations={"sentinel1": radar(0, num=1), "alos2": uneven}), 10)
