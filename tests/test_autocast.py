from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from panterra.mapping.export_looks import planet_samples
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.exported import Signature
from panterra.models.olmoearth import OlmoEarth, released_config


def olmoearth(samples):
    torch.manual_seed(0)
    return OlmoEarth(replace(released_config("v1.2", "nano"), dim=32, depth=2, heads=2)).eval()


def anysat(samples):
    torch.manual_seed(0)
    model = AnySat(AnySatConfig(dim=64, depth=2, heads=2)).eval()
    return model.with_statistics(model.fit_statistics([samples]))


@pytest.mark.parametrize("make", [olmoearth, anysat])
@pytest.mark.parametrize("gradients", [False, True])
def test_encoders_work_under_autocast(make, gradients):
    signature = Signature(modalities=("sentinel2_l2a", "sentinel1"), dates=2, window_px=8, patch_m=40)
    samples = planet_samples(signature)
    model = make(samples)
    with torch.set_grad_enabled(gradients):
        exact = model.encode(samples, patch_m=40)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model.encode(samples, patch_m=40)
    assert torch.equal(exact.valid, rough.valid)
    cosine = F.cosine_similarity(exact.patches[exact.valid].double(), rough.patches[exact.valid].double(), dim=-1)
    assert cosine.min() > 0.995
