import importlib.util
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from panterra import Batch, Observation, load_model
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.backbones import Backbone, Channels, panterra_backbone, register_with_terratorch
from panterra.sample import to_date

ORDER = ("B12", "B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B10")
"""As someone may have them, with one band that the modality lacks."""


@pytest.fixture(scope="module")
def nano():
    return load_model("olmoearth-v1.2-nano", random=0)


def reflectance(b=2, t=1, size=8, seed=0):
    return 4000 * torch.rand(b, t, 12, size, size, generator=torch.Generator().manual_seed(seed))


def theirs(pixels):
    """Reorder our bands and standardise them as a data module would; its own channel more is noise."""
    names = MODALITIES["sentinel2_l2a"].band_names
    found = [pixels[:, :, names.index(b)] if b in names else torch.rand_like(pixels[:, :, 0]) for b in ORDER]
    return (torch.stack(found, dim=2) - 1000) / 2000


CHANNELS = Channels(modality="sentinel2_l2a", bands=ORDER, scale=(2000.0,) * 13, offset=1000.0)


def expected(nano, pixels, days, valid=None):
    valid = torch.ones(*pixels.shape[:2], *pixels.shape[-2:], dtype=torch.bool) if valid is None else valid
    o = Observation(pixels=pixels, dates=torch.tensor(days).expand(len(pixels), -1), valid=valid)
    return nano.encode(Batch(observations={"sentinel2_l2a": o}), patch_m=20).patches.permute(0, 3, 1, 2)


def test_one_image_gives_what_encode_gives(nano):
    pixels = reflectance()
    backbone = Backbone(nano, [CHANNELS], patch_m=20, dates=["2022-01-08"])
    (found,) = backbone(theirs(pixels)[:, 0])
    assert backbone.out_channels == [nano.dim]
    assert backbone.reductions == [2]
    torch.testing.assert_close(found, expected(nano, pixels, [19000]), atol=1e-4, rtol=1e-4)


def test_a_series_in_either_layout_and_in_a_dictionary(nano):
    pixels, days = reflectance(t=3), [19000, 19031, 19062]
    wanted = expected(nano, pixels, days)
    dates = torch.tensor(days).expand(2, -1)
    named = Backbone(nano, [CHANNELS], patch_m=20, dates=["2022-01-08", "2022-02-08", "2022-03-11"])
    first = Backbone(nano, [CHANNELS], patch_m=20, time_first=True)
    for found in (
        named(theirs(pixels).transpose(1, 2)),
        first(theirs(pixels), dates=dates),
        first({"sentinel2_l2a": theirs(pixels)}, dates=dates),
    ):
        torch.testing.assert_close(found[0], wanted, atol=1e-4, rtol=1e-4)


def test_missing_pixels_take_no_part(nano):
    pixels, x = reflectance(), theirs(reflectance())
    x[0, :, 3, :4, :4] = float("nan")
    x[1, :, 0, 0, 0] = -9999
    valid = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    valid[0, :, :4, :4] = False
    valid[1, :, 0, 0] = False
    declared = Channels(modality="sentinel2_l2a", bands=ORDER, scale=2000.0, offset=1000.0, nodata=-9999)
    (found,) = Backbone(nano, [declared], patch_m=20, dates=["2022-01-08"])(x[:, 0])
    torch.testing.assert_close(found, expected(nano, pixels, [19000], valid), atol=1e-4, rtol=1e-4)
    assert not found[0, :, :2, :2].any()


def test_a_pyramid_for_decoders_that_want_one(nano):
    backbone = Backbone(nano, [CHANNELS], patch_m=20, dates=["2022-01-08"], scales=(4, 2, 1, 0.5))
    maps = backbone(theirs(reflectance())[:, 0])
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]
    assert backbone.out_channels == [nano.dim] * 4
    assert backbone.reductions == [0.5, 1, 2, 4]
    torch.testing.assert_close(maps[0].mean(), maps[2].mean(), atol=0.02, rtol=0.1)


def test_a_decoder_on_top_learns_and_so_does_the_encoder():
    backbone = panterra_backbone(random=0, dates=["2022-01-08"], patch_m=20)
    model = nn.Conv2d(backbone.out_channels[0], 3, 1)
    model(backbone(reflectance()[:, 0])[0]).logsumexp(1).sum().backward()
    assert sum(float(p.grad.abs().sum()) for p in backbone.encoder.blocks.parameters() if p.grad is not None) > 0
    frozen = panterra_backbone(random=0, dates=["2022-01-08"], patch_m=20, train=False)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_plain_values_of_a_configuration_file(nano):
    channels = [{"modality": "sentinel2_l2a", "bands": list(ORDER), "scale": [2000.0] * 13, "offset": 1000.0}]
    backbone = panterra_backbone(random=0, channels=channels, patch_m=20, dates=["2022-01-08"])
    pixels = reflectance()
    torch.testing.assert_close(backbone(theirs(pixels)[:, 0])[0], expected(nano, pixels, [19000]), atol=1e-4, rtol=1e-4)


def test_what_is_wrong_is_said(nano):
    with pytest.raises(InputError, match="lack B12; the encoder looks at all"):
        Channels(modality="sentinel2_l2a", bands=ORDER[1:])
    with pytest.raises(InputError, match="scale has 2 numbers for 13 bands"):
        Channels(modality="sentinel2_l2a", bands=ORDER, scale=(1.0, 2.0))
    with pytest.raises(InputError, match="does not know naip"):
        Backbone(nano, [Channels(modality="naip", bands=("R", "G", "B", "IR"))], patch_m=20)
    backbone = Backbone(nano, [CHANNELS], patch_m=20)
    with pytest.raises(InputError, match=r"1 images came as .* with 0 dates"):
        backbone(theirs(reflectance())[:, 0])
    with pytest.raises(InputError, match="came with 12 channels; wanted B12, B01"):
        backbone(reflectance()[:, 0], dates=torch.tensor([[19000], [19000]]))
    with pytest.raises(InputError, match=r"wanted \[B, C, H, W\], or with dates, \[B, C, T, H, W\]"):
        backbone(torch.zeros(12, 8, 8))
    with pytest.raises(InputError, match="'radar' were not declared"):
        backbone({"radar": reflectance()})


@pytest.mark.filterwarnings("ignore")
def test_terratorch_knows_it_once_registered():
    if importlib.util.find_spec("terratorch") is None:
        with pytest.raises(InputError, match="terratorch is not installed"):
            register_with_terratorch()
        return
    register_with_terratorch()
    register_with_terratorch()
    from terratorch.models import EncoderDecoderFactory

    model = EncoderDecoderFactory().build_model(
        "segmentation",
        backbone="panterra_backbone",
        backbone_random=0,
        backbone_patch_m=20,
        backbone_dates=["2022-01-08"],
        decoder="FCNDecoder",
        num_classes=3,
    )
    assert model(reflectance()[:, 0]).output.shape == (2, 3, 8, 8)


@dataclass
class RasterImage:
    """What rslearn's input dictionaries hold, as its documentation describes it."""

    image: torch.Tensor
    timestamps: list


@dataclass
class Context:
    inputs: list


@pytest.mark.filterwarnings("ignore")
def test_rslearn_gets_its_feature_maps(nano):
    pytest.importorskip("rslearn.models.component", exc_type=ImportError)
    from panterra.models.rslearn_extractor import PanterraExtractor

    channels = [{"modality": "sentinel2_l2a", "bands": list(ORDER), "scale": 2000.0, "offset": 1000.0}]
    extractor = PanterraExtractor(random=0, channels=channels, inputs={"sentinel2_l2a": "image"}, patch_m=20)
    pixels, days = reflectance(t=2), [19000, 19031]
    periods = [(to_date(d - 2), to_date(d + 2)) for d in days]
    samples = [{"image": RasterImage(x.transpose(0, 1), periods)} for x in theirs(pixels)]
    (found,) = extractor(Context(samples)).feature_maps
    torch.testing.assert_close(found, expected(nano, pixels, days), atol=1e-4, rtol=1e-4)
    assert extractor.get_backbone_channels() == [(2.0, 128)]
