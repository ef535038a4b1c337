"""Networks of other packages with random weights, where those packages are installed.

They are not among the development dependencies, since most bring torchvision: install them in an environment of their
own (docs/other-models.md) and run this file there.
"""

import importlib.util

import pytest
import torch

from panterra import Batch, Observation, collate
from panterra.modalities import MODALITIES
from panterra.models.adapters.adapter import FittedAdapter
from panterra.models.adapters.offers import ADAPTERS

SMALL = {
    "croma-base": {"image_px": 32},
    "panopticon-base": {},
    "copernicus-fm-base": {},
    "satlas-swin-tiny": {},
    "presto": {
        "encoder_embedding_size": 32,
        "encoder_depth": 1,
        "encoder_num_heads": 2,
        "decoder_embedding_size": 32,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
    },
    "terramind-tiny": {},
    "prithvi-v2-tiny": {},
    "clay-v1": {},
    "dinov3-small": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
}

warm = pytest.mark.filterwarnings("ignore")
"""Their warnings are not ours."""


def build(name):
    offer = ADAPTERS[name]
    if importlib.util.find_spec(offer.package) is None:
        pytest.skip(f"{offer.package} is not installed")
    torch.manual_seed(0)
    try:
        model = offer.build(pretrained=False, **SMALL[name])
    except AttributeError as error:
        pytest.skip(f"{offer.needs} is wanted: {error}")
    return model.eval().requires_grad_(False)


def sample(modalities, *, px, days, seed):
    generator = torch.Generator().manual_seed(seed)
    observations = {}
    for m in modalities:
        spec = MODALITIES[m]
        low, high = spec.plausible
        steps = days if spec.kind == "series" else days[:1]
        size = (1, len(steps), len(spec.bands), px, px)
        observations[m] = Observation(
            pixels=low + (high - low) * torch.rand(size, generator=generator),
            dates=torch.tensor([steps]),
            valid=torch.ones(1, len(steps), px, px, dtype=torch.bool),
        )
    return Batch(observations=observations, lonlat=torch.tensor([[12.5, 47.0]], dtype=torch.float64))


@warm
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_encodes_and_batch_mates_do_not_matter(name):
    model = build(name)
    # Of a sensor at 10 m each; the others have their own number of pixels.
    first = [m for m in model.modalities if MODALITIES[m].gsd >= 10][:2]
    if name in ("dinov3-small", "prithvi-v2-tiny", "copernicus-fm-base", "panopticon-base"):
        first = ["sentinel2_l2a"]
    px, patch_m = (8, 40) if name == "presto" else (16, 40)
    short = sample(first, px=px, days=[19000], seed=1)
    long = sample(first, px=px, days=[19000, 19060], seed=2)
    if isinstance(model, FittedAdapter):
        model = model.with_statistics(model.fit_statistics([long]))
    alone = model.encode(short, patch_m=patch_m)
    together = model.encode(collate([short, long]), patch_m=patch_m)
    side = px * 10 // patch_m
    assert alone.patches.shape == (1, side, side, model.dim)
    assert bool(alone.patches.isfinite().all())
    assert float(alone.patches.std()) > 0
    torch.testing.assert_close(together.patches[0], alone.patches[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(together.summary[0], alone.summary[0], atol=1e-4, rtol=1e-3)


@warm
@pytest.mark.slow
@pytest.mark.parametrize("name", ["croma-base", "presto", "terramind-tiny"])
def test_a_sensor_alone_is_enough_and_another_changes_the_features(name):
    model = build(name)
    both = sample(["sentinel2_l2a", "sentinel1"], px=8, days=[19000], seed=1)
    parts = [Batch(observations={m: o}, lonlat=both.lonlat) for m, o in both.observations.items()]
    found = [model.encode(b, patch_m=40).summary for b in (both, *parts)]
    assert all(bool(f.isfinite().all()) for f in found)
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[1], found[2])


def test_every_network_that_is_offered_has_a_small_one_here():
    families = {name.split("-")[0] for name in ADAPTERS}
    assert families == {name.split("-")[0] for name in SMALL}
