"""The graphs of encoders give what the encoders give, whatever is missing."""

import datetime as dt
from dataclasses import replace

import pytest
import torch

from panterra.errors import InputError
from panterra.mapping.export_graphs import calendar, day_of_year, graph_of
from panterra.mapping.export_looks import planet_samples
from panterra.models import anysat_sensors
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.exported import Signature, prepare, time_axis
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig, released_config
from panterra.models.slots import align, to_timestamps
from panterra.sample import Batch, Observation, collate

SMALL = {"dim": 32, "depth": 2, "heads": 2}
S2_S1 = ("sentinel2_l2a", "sentinel1")


def test_calendar_is_that_of_the_library():
    days = torch.arange((dt.date(2101, 1, 1) - dt.date(1970, 1, 1)).days)[None]
    assert torch.equal(torch.stack(calendar(days), dim=-1), to_timestamps(days))
    assert torch.equal(day_of_year(days), anysat_sensors.day_of_year(days))


@pytest.mark.parametrize("seed", range(20))
def test_every_image_with_data_has_the_date_and_number_of_its_slot(seed):
    draw = torch.Generator().manual_seed(seed)
    given = {}
    for m, images in (("sentinel2_l2a", 4), ("sentinel1", 3), ("landsat", 2)):
        days = torch.randint(19000, 19060, (3, images), generator=draw).sort(dim=1).values
        valid = torch.rand(3, images, 1, 1, generator=draw) < 0.7
        # Pixels say which image they are of, so that they are found again on the axis.
        pixels = torch.arange(images).float()[None, :, None, None, None].expand(3, -1, 1, 1, 1)
        given[m] = Observation(pixels=pixels, dates=days, valid=valid)
    aligned, axis = align(given, tolerance_days=15), time_axis(given, tolerance_days=15)
    for m, o in aligned.observations.items():
        dates, slots = axis[m]
        for sample, slot in o.valid[:, :, 0, 0].nonzero().tolist():
            image = int(o.pixels[sample, slot, 0, 0, 0])
            assert slots[sample, image] == slot
            assert to_timestamps(dates)[sample, image].tolist() == aligned.timestamps[sample, slot].tolist()


OLMOEARTH = {
    "v1": released_config("v1", "nano"),
    "v1.1": released_config("v1.1", "nano"),
    "v1.2": released_config("v1.2", "nano"),
    "registers": OlmoEarthConfig(**SMALL, registers=2, qk_norm=True, position="rope_3d", output_dim=24),
    "plain": OlmoEarthConfig(**SMALL, position="none", post_hidden=(48, 32)),
    "places": OlmoEarthConfig(**SMALL, position="rope_mixed"),
}


@pytest.mark.parametrize("kind", OLMOEARTH)
def test_olmoearth_graph_is_the_encoder(kind):
    modalities = (*S2_S1, "landsat") if kind == "v1" else S2_S1
    torch.manual_seed(0)
    model = OlmoEarth(replace(OLMOEARTH[kind], **SMALL)).eval().requires_grad_(False)
    slots = model.encodings.slots
    check(model, Signature(modalities=modalities, dates=3, window_px=16, patch_m=40, slots=slots))


@pytest.mark.parametrize(
    ("modalities", "window_px", "patch_m", "layout"),
    [
        (S2_S1, 8, 40, "tokens"),
        (("sentinel2_l2a",), 8, 20, "heads"),
        (("sentinel2_l2a", "modis"), 8, 40, "tokens"),
        (("sentinel2_l2a", "landsat7", "spot"), 12, 60, "tokens"),
        (("sentinel1", "naip"), 4, 20, "tokens"),
    ],
)
def test_anysat_graph_is_the_encoder(modalities, window_px, patch_m, layout):
    signature = Signature(modalities=modalities, dates=3, window_px=window_px, patch_m=patch_m)
    torch.manual_seed(0)
    model = AnySat(AnySatConfig(dim=64, depth=2, heads=2, layout=layout)).eval().requires_grad_(False)
    check(model.with_statistics(model.fit_statistics([planet_samples(signature)])), signature)


def check(model: OlmoEarth | AnySat, signature: Signature) -> None:
    """Compare a graph with its encoder on samples that lack pixels, dates, a modality and everything."""
    samples = planet_samples(signature)
    days = model.align_days if isinstance(model, OlmoEarth) else None
    with torch.inference_mode():
        wanted = model.encode(samples, patch_m=signature.patch_m)
    assert not wanted.valid[3].any()
    assert wanted.valid[:3].any((1, 2)).all()
    with torch.no_grad():
        inputs = prepare(samples, signature, align_days=days, name="test")
        ways = [graph_of(model, signature, in_steps=in_steps)(inputs) for in_steps in (False, True)]
    for patches, summary, valid in ways:
        assert torch.equal(valid, wanted.valid)
        torch.testing.assert_close(patches, wanted.patches, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(summary, wanted.summary, rtol=1e-4, atol=2e-5)


def test_what_pixels_hold_where_they_are_not_valid_makes_no_difference():
    signature = Signature(modalities=S2_S1, dates=2, window_px=8, patch_m=40)
    model = OlmoEarth(replace(released_config("v1.2", "nano"), **SMALL)).eval()
    inputs = prepare(planet_samples(signature), signature, align_days=15, name="test")
    other = {name: x.clone() for name, x in inputs.items()}
    for m in S2_S1:
        hidden = ~other[f"{m}_valid"][:, :, None].expand_as(other[f"{m}_pixels"])
        other[f"{m}_pixels"][hidden] = -1e6
    with torch.no_grad():
        for one, two in zip(*(graph_of(model, signature)(x) for x in (inputs, other)), strict=True):
            assert torch.equal(one, two)


def test_refusals():
    model = OlmoEarth(replace(released_config("v1.2", "nano"), **SMALL), attention="published_eval")
    signature = Signature(modalities=S2_S1, dates=2, window_px=8, patch_m=40)
    with pytest.raises(InputError, match="published_eval"):
        graph_of(model, signature)
    anysat = AnySat(AnySatConfig(dim=64, depth=1, heads=2), missing="published")
    with pytest.raises(InputError, match="published"):
        graph_of(anysat, signature)


def test_planet_samples_lack_something_each():
    signature = Signature(modalities=S2_S1, dates=3, window_px=8, patch_m=40)
    samples = planet_samples(signature)
    valid = samples.observations["sentinel2_l2a"].valid
    assert [bool(valid[i].all()) for i in range(1, 4)] == [False] * 3
    assert not samples.observations["sentinel1"].valid[2].any()
    assert isinstance(samples, Batch)
    assert len(collate([samples, samples])) == 8
