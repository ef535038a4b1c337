"""Networks that terratorch offers: TerraMind, Prithvi-EO-2.0 and Clay."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from jaxtyping import Float
from torch import Tensor

from panterra.models.adapters.adapter import Adapter
from panterra.models.adapters.declaration import Input, Takes, View

S2_BY_WAVELENGTH = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
TERRAMIND_NAMES = {"sentinel2_l2a": "S2L2A", "sentinel2": "S2L1C", "sentinel1": "S1RTC", "srtm": "DEM"}

# Band order, means and standard deviations: PRETRAINED_BANDS, v1_pretraining_mean and v1_pretraining_std of
# terratorch 1.2.11, terramind_register.py.
TERRAMIND_INPUTS = (
    Input(
        modality="sentinel2_l2a",
        bands=S2_BY_WAVELENGTH,
        mean=(
            *(1390.458, 1503.317, 1718.197, 1853.91, 2199.1, 2779.975),
            *(2987.011, 3083.234, 3132.22, 3162.988, 2424.884, 1857.648),
        ),
        std=(
            *(2106.761, 2141.107, 2038.973, 2134.138, 2085.321, 1889.926),
            *(1820.257, 1871.918, 1753.829, 1797.379, 1434.261, 1334.311),
        ),
    ),
    Input(
        modality="sentinel2",
        bands=(*S2_BY_WAVELENGTH[:10], "B10", "B11", "B12"),
        mean=(
            *(2357.089, 2137.385, 2018.788, 2082.986, 2295.651, 2854.537, 3122.849),
            *(3040.56, 3306.481, 1473.847, 506.07, 2472.825, 1838.929),
        ),
        std=(
            *(1624.683, 1675.806, 1557.708, 1833.702, 1823.738, 1733.977, 1732.131),
            *(1679.732, 1727.26, 1024.687, 442.165, 1331.411, 1160.419),
        ),
    ),
    Input(modality="sentinel1", bands=("vv", "vh"), mean=(-10.93, -17.329), std=(4.391, 4.459)),
    Input(modality="srtm", bands=("srtm",), mean=(670.665,), std=(951.272,)),
)


def terramind(size: str, *, pretrained: bool) -> Adapter:
    """Open TerraMind 1.0 (Jakubik et al. 2025): any mix of Sentinel-2, Sentinel-1 (RTC) and elevation."""
    network = _build(f"terramind_v1_{size}", pretrained=pretrained, modalities=list(TERRAMIND_NAMES.values()))
    takes = Takes(inputs=TERRAMIND_INPUTS, patch_px=16, image_px=224)
    adapter = Adapter(network, takes, dim=network.out_channels[-1], name=f"terramind-{size}", call=_call_terramind)
    adapter.source = f"https://huggingface.co/ibm-esa-geospatial/TerraMind-1.0-{size}"
    return adapter


def _call_terramind(network: Any, view: View) -> Float[Tensor, "n p d"]:
    tokens: Tensor = network({TERRAMIND_NAMES[m]: x for m, x in view.images.items()})[-1]
    return tokens


# prithvi_vit.py of terratorch 1.2.11: blue, green, red, narrow infrared, two of short-wave infrared.
_PRITHVI: dict[str, Any] = {
    "mean": (1087.0, 1342.0, 1433.0, 2734.0, 1958.0, 1363.0),
    "std": (2248.0, 2179.0, 2178.0, 1850.0, 1242.0, 1049.0),
}
PRITHVI_INPUTS = (
    Input(modality="hls", bands=("B2", "B3", "B4", "B5", "B6", "B7"), **_PRITHVI),
    Input(modality="sentinel2_l2a", bands=("B02", "B03", "B04", "B8A", "B11", "B12"), **_PRITHVI),
)
PRITHVI_PATCH_PX = {"tiny_tl": 16, "300": 16, "600": 14}


def prithvi(size: str, *, pretrained: bool) -> Adapter:
    """Open Prithvi-EO-2.0 (Szwarcman et al. 2024): HLS or Sentinel-2 at its six bands, one date at a time."""
    network = _build(f"prithvi_eo_v2_{size}", pretrained=pretrained, num_frames=1)
    takes = Takes(inputs=PRITHVI_INPUTS, patch_px=PRITHVI_PATCH_PX[size], image_px=224)
    name = f"prithvi-v2-{size.removesuffix('_tl')}"
    adapter = Adapter(network, takes, dim=network.out_channels[-1], name=name, call=_call_prithvi)
    hub = {"tiny_tl": "tiny-TL", "300": "300M", "600": "600M"}[size]
    adapter.source = f"https://huggingface.co/ibm-nasa-geospatial/Prithvi-EO-2.0-{hub}"
    return adapter


def _call_prithvi(network: Any, view: View) -> Float[Tensor, "n p d"]:
    tokens = [network(images)[-1][:, 1:] for images in view.images.values()]
    mean: Tensor = sum(tokens) / len(tokens)
    return mean


# configs/metadata.yaml of Clay-foundation/model: sentinel-2-l2a, of which terratorch's Clay v1 takes these six.
CLAY_S2 = Input(
    modality="sentinel2_l2a",
    bands=("B02", "B03", "B04", "B08", "B11", "B12"),
    mean=(1105.0, 1355.0, 1552.0, 2743.0, 2388.0, 1835.0),
    std=(1809.0, 1757.0, 1888.0, 1742.0, 1470.0, 1379.0),
)


def clay(*, pretrained: bool) -> Adapter:
    """Open Clay v1 at 256 pixels, without place and date, as terratorch builds it."""
    network = _build("clay_v1_base", pretrained=pretrained)
    takes = Takes(inputs=(CLAY_S2,), patch_px=8, image_px=256)
    adapter = Adapter(network, takes, dim=768, name="clay-v1", call=_call_clay)
    adapter.source = "https://huggingface.co/made-with-clay/Clay-legacy"
    return adapter


def _call_clay(network: Any, view: View) -> Float[Tensor, "n p d"]:
    tokens: Tensor = network(view.image, gsd=view.pixel_m)[-1]
    return tokens[:, 1:]


def _build(name: str, **options: Any) -> Any:
    registry: Any = import_module("terratorch.registry")
    return registry.BACKBONE_REGISTRY.build(name, **options)
