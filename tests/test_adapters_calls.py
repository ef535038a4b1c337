"""Which numbers reach the networks of other packages, told by stand-ins that keep them."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from panterra import Batch, Observation
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.adapters import terratorch_models, torchgeo_models
from panterra.models.adapters.offers import ADAPTERS

S2, S1 = MODALITIES["sentinel2_l2a"].band_names, MODALITIES["sentinel1"].band_names
PLACE = torch.tensor([[12.5, 47.0]], dtype=torch.float64)


def observed(modality, days, *, px=2, seed=0):
    low, high = MODALITIES[modality].plausible
    size = (1, len(days), len(MODALITIES[modality].bands), px, px)
    pixels = low + (high - low) * torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return Observation(
        pixels=pixels, dates=torch.tensor([days]), valid=torch.ones(1, len(days), px, px, dtype=torch.bool)
    )


@pytest.fixture
def models(monkeypatch):
    """Stand for torchgeo.models; each test puts its network there."""
    models = SimpleNamespace()
    monkeypatch.setattr(torchgeo_models, "import_module", lambda name: models)
    return models


class Presto(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.calls = Encoder(self.keep), []

    def keep(self, values, world, latlon, mask, month):
        self.calls.append(SimpleNamespace(values=values, world=world, latlon=latlon, mask=mask, month=month))
        return values.mean((1, 2))[:, None, None].expand(-1, 3, 4), None, None


class Encoder:
    norm = SimpleNamespace(normalized_shape=(4,))

    def __init__(self, keep):
        self.keep = keep

    def __call__(self, *given):
        return self.keep(*given)


def presto(models):
    network = Presto()
    models.presto = lambda weights, **shape: network
    return torchgeo_models.presto(pretrained=False, encoder_embedding_size=4), network.calls


def test_presto_gets_its_seventeen_channels_months_and_place(models):
    model, calls = presto(models)
    s2, s1 = observed("sentinel2_l2a", [19000, 19040]), observed("sentinel1", [19002, 19044])
    out = model.encode(Batch(observations={"sentinel2_l2a": s2, "sentinel1": s1}, lonlat=PLACE), patch_m=10)
    (call,) = calls
    assert call.values.shape == (4, 2, 17)
    pixel = s2.pixels[0, 1, :, 1, 0] / 1e4
    wanted = [(s1.pixels[0, 1, i, 1, 0] + 25) / 25 for i in range(2)]
    wanted += [pixel[S2.index(b)] for b in torchgeo_models.PRESTO_S2]
    torch.testing.assert_close(call.values[2, 1, :12], torch.stack(wanted))
    red, infrared = pixel[S2.index("B04")], pixel[S2.index("B08")]
    torch.testing.assert_close(call.values[2, 1, 16], (infrared - red) / (infrared + red))
    assert call.mask[0, 0].tolist() == [0] * 12 + [1] * 4 + [0]
    # 2022-01-08 and 2022-02-17, months from 0.
    assert call.month[0].tolist() == [0, 1]
    assert call.latlon[0].tolist() == [47.0, 12.5]
    assert call.world.unique().tolist() == [9]
    torch.testing.assert_close(out.patches[0, 1, 0, 0], call.values[2].mean())


def test_presto_never_sees_dates_without_data_and_masks_the_sensor_that_is_absent(models):
    model, calls = presto(models)
    s2, s1 = observed("sentinel2_l2a", [19000, 19040]), observed("sentinel1", [19100])
    s2.valid[0, 1, 0, 0] = False
    out = model.encode(Batch(observations={"sentinel2_l2a": s2, "sentinel1": s1}, lonlat=PLACE), patch_m=10)
    assert sorted((len(c.values), c.values.shape[1]) for c in calls) == [(1, 2), (3, 3)]
    (long,) = [c for c in calls if c.values.shape[1] == 3]
    assert long.mask[0, :, 0].tolist() == [1, 1, 0]
    assert long.mask[0, :, 2].tolist() == [0, 0, 1]
    assert long.mask[0, :, 16].tolist() == [0, 0, 1]
    assert bool(out.valid.all())


def test_presto_says_how_many_dates_it_takes_and_that_it_wants_a_place(models):
    model, _ = presto(models)
    many = observed("sentinel2_l2a", [19000 + 10 * i for i in range(25)])
    with pytest.raises(InputError, match="takes 24 dates, and 25 came"):
        model.encode(Batch(observations={"sentinel2_l2a": many}, lonlat=PLACE), patch_m=10)
    with pytest.raises(InputError, match="give the batch its lonlat"):
        model.encode(Batch(observations={"sentinel2_l2a": many}), patch_m=10)


class Croma(nn.Module):
    def __init__(self):
        super().__init__()
        self.modalities, self.seen = ["sar", "optical"], []

    def forward(self, x_sar=None, x_optical=None):
        self.seen.append((self.modalities, x_sar, x_optical))
        tokens = torch.ones(1, 4, 768)
        return {f"{part}_encodings": tokens * value for part, value in (("sar", 1), ("optical", 2), ("joint", 3))}


def test_croma_runs_the_encoders_of_what_is_there(models):
    network = Croma()
    models.CROMABase_Weights = SimpleNamespace(CROMA_VIT=None)
    models.croma_base = lambda weights, image_size: network
    model = torchgeo_models.croma("base", pretrained=False, image_px=16)
    s2, s1 = observed("sentinel2_l2a", [19000], px=16), observed("sentinel1", [19003], px=16)
    given = {"sentinel2_l2a": s2, "sentinel1": s1}
    found = [
        float(model.encode(Batch(observations={m: given[m] for m in names}), patch_m=80).patches[0, 0, 0, 0])
        for names in (["sentinel2_l2a", "sentinel1"], ["sentinel2_l2a"], ["sentinel1"])
    ]
    assert found == [3, 2, 1]
    assert network.modalities == ["sar", "optical"]
    assert [sorted(parts) for parts, *_ in network.seen] == [["optical", "sar"], ["optical"], ["sar"]]
    optical = network.seen[1][2]
    band = s2.pixels[0, 0, S2.index("B08")]
    torch.testing.assert_close(optical[0, 7], ((band - band.mean()) / (4 * band.std()) + 0.5).clamp(0, 1))


class Panopticon(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.seen = self, []

    def forward_features(self, given):
        self.seen.append(given)
        return torch.ones(len(given["imgs"]), 257, 768)


def test_panopticon_gets_wavelengths_in_nanometres(models):
    network = Panopticon()
    models.panopticon_vitb14 = lambda weights: network
    model = torchgeo_models.panopticon(pretrained=False)
    batch = Batch(
        observations={"sentinel2_l2a": observed("sentinel2_l2a", [19000]), "landsat": observed("landsat", [19001])}
    )
    able = model.with_statistics(model.fit_statistics([batch]))
    able.encode(batch, patch_m=10)
    (given,) = network.seen
    assert given["imgs"].shape == (1, 12 + 9, 224, 224)
    assert given["chn_ids"][0].tolist() == [
        *(492, 560, 665, 833, 704, 740, 783, 865, 1614, 2202, 443, 945),
        *(590, 443, 482, 561, 655, 865, 1609, 2201, 1373),
    ]


@pytest.mark.parametrize(
    ("given", "bands", "first"),
    [
        (terratorch_models.TERRAMIND_INPUTS[0], "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B11 B12", 1390.458),
        (terratorch_models.TERRAMIND_INPUTS[1], "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B10 B11 B12", 2357.089),
        (terratorch_models.PRITHVI_INPUTS[1], "B02 B03 B04 B8A B11 B12", 1087.0),
        (terratorch_models.CLAY_S2, "B02 B03 B04 B08 B11 B12", 1105.0),
    ],
)
def test_bands_and_statistics_stand_in_the_published_order(given, bands, first):
    assert given.bands == tuple(bands.split())
    assert given.mean[0] == first
    assert len(given.mean) == len(given.std) == len(given.bands)


def test_the_page_names_every_network():
    page = (Path(__file__).parent.parent / "docs" / "other-models.md").read_text()
    assert set(ADAPTERS) <= set(re.findall(r"`([\w.-]+)`", page))
