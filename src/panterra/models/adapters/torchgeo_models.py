"""Networks that torchgeo offers: CROMA, Panopticon, Copernicus-FM, Satlas and Presto."""

from __future__ import annotations

from copy import copy
from importlib import import_module
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.adapters.adapter import Adapter, FittedAdapter
from panterra.models.adapters.declaration import Input, Takes, View
from panterra.models.slots import to_timestamps

S2_BY_WAVELENGTH = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")


def croma(size: Literal["base", "large"], *, pretrained: bool, image_px: int = 120) -> Adapter:
    """Open CROMA (Fuller et al. 2023): Sentinel-1 and -2 at 120 pixels, each image stretched to its own contrast.

    Scaling and band order: the README of antofuller/CROMA, in which the statistics are those of a batch; here they are
    those of each image, so that its company changes nothing.
    """
    models: Any = import_module("torchgeo.models")
    weights = models.CROMABase_Weights.CROMA_VIT if size == "base" else models.CROMALarge_Weights.CROMA_VIT
    network = getattr(models, f"croma_{size}")(weights=weights if pretrained else None, image_size=image_px)
    takes = Takes(
        inputs=(
            Input(modality="sentinel2_l2a", bands=S2_BY_WAVELENGTH),
            Input(modality="sentinel1", bands=("vv", "vh")),
        ),
        patch_px=8,
        image_px=image_px,
        standardise="image",
    )
    dim = 768 if size == "base" else 1024
    adapter = Adapter(network, takes, dim=dim, name=f"croma-{size}", call=_call_croma)
    adapter.licence, adapter.source = "MIT", "https://huggingface.co/torchgeo/croma"
    return adapter


def _call_croma(network: Any, view: View) -> Float[Tensor, "n p d"]:
    given = {"sentinel1": "sar", "sentinel2_l2a": "optical"}
    parts = [given[m] for m in view.images]
    # It reads from this list which of its encoders to run.
    same = copy(network)
    same.modalities = parts
    out = same(x_sar=view.images.get("sentinel1"), x_optical=view.images.get("sentinel2_l2a"))
    tokens: Tensor = out[f"{parts[0]}_encodings" if len(parts) == 1 else "joint_encodings"]
    return tokens


def panopticon(*, pretrained: bool) -> FittedAdapter:
    """Open Panopticon (Waldmann et al. 2025): any optical sensors at 224 pixels, told by their wavelengths.

    Its README asks for standard-normal values and gives no statistics, so those of the data are taken.
    """
    models: Any = import_module("torchgeo.models")
    weights = models.Panopticon_Weights.VIT_BASE14 if pretrained else None
    network = models.panopticon_vitb14(weights=weights)
    takes = Takes(
        inputs=tuple(Input(modality=m, bands=_optical(m)) for m in ("sentinel2_l2a", "sentinel2", "landsat", "hls")),
        patch_px=14,
        image_px=224,
        standardise="data",
    )
    adapter = Adapter(network, takes, dim=768, name="panopticon-base", call=_call_panopticon)
    adapter.source = "https://huggingface.co/lewaldm/panopticon"
    return FittedAdapter(adapter)


def _optical(modality: str) -> tuple[str, ...]:
    """List the reflective bands of a sensor."""
    return tuple(b.name for b in MODALITIES[modality].bands if b.wavelength is not None and b.wavelength < 3)


def _call_panopticon(network: Any, view: View) -> Float[Tensor, "n p d"]:
    nanometres = [
        round(1000 * band.wavelength)
        for m in view.images
        for band in MODALITIES[m].bands
        if band.wavelength is not None and band.wavelength < 3
    ]
    images = torch.cat(list(view.images.values()), dim=1)
    channels = torch.tensor(nanometres, device=images.device).expand(len(images), -1)
    tokens: Tensor = network.model.forward_features({"imgs": images, "chn_ids": channels})
    return tokens[:, 1:]


# Centre and width in nanometres: the README of Copernicus-FM for B02, B03, B04, B08; the rest from the same source as
# these, ESA's Sentinel-2 User Handbook (2015), table of spectral bands.
S2_NANOMETRES = {
    "B01": (443, 20),
    "B02": (490, 65),
    "B03": (560, 35),
    "B04": (665, 30),
    "B05": (705, 15),
    "B06": (740, 15),
    "B07": (783, 20),
    "B08": (842, 115),
    "B8A": (865, 20),
    "B09": (945, 20),
    "B10": (1375, 30),
    "B11": (1610, 90),
    "B12": (2190, 180),
}


COPERNICUS_KM2 = 0.001
"""The smallest patch whose area Copernicus-FM encodes; that of a smaller one is left unknown."""


def copernicus_fm(*, pretrained: bool) -> FittedAdapter:
    """Open Copernicus-FM (Wang et al. 2025): Sentinel-2 at 224 pixels with place, date and patch area.

    Its demo recommends z-scores and gives no statistics, so those of the data are taken.
    """
    models: Any = import_module("torchgeo.models")
    weights = models.CopernicusFM_Base_Weights.CopernicusFM_ViT if pretrained else None
    network = models.copernicusfm_base(weights=weights)
    takes = Takes(
        inputs=(
            Input(modality="sentinel2_l2a", bands=S2_BY_WAVELENGTH),
            Input(modality="sentinel2", bands=tuple(S2_NANOMETRES)),
        ),
        patch_px=16,
        image_px=224,
        standardise="data",
    )
    adapter = Adapter(network, takes, dim=768, name="copernicus-fm-base", call=_call_copernicus_fm)
    adapter.licence, adapter.source = "CC-BY-4.0", "https://huggingface.co/torchgeo/copernicus-fm"
    return FittedAdapter(adapter)


def _call_copernicus_fm(network: Any, view: View) -> Float[Tensor, "n p d"]:
    said: list[Tensor] = []
    patch_km2 = (16 * view.pixel_m / 1000) ** 2
    if patch_km2 < COPERNICUS_KM2:
        patch_km2 = torch.nan
    # It returns the mean of these alone.
    hook = network.blocks[-1].register_forward_hook(lambda layer, given, out: said.append(network.fc_norm(out[:, 1:])))
    try:
        for m, images in view.images.items():
            bands = S2_BY_WAVELENGTH if m == "sentinel2_l2a" else tuple(S2_NANOMETRES)
            unknown = torch.full((len(images), 2), torch.nan, device=images.device)
            place = unknown if view.lonlat is None else view.lonlat.to(images)
            area = torch.full((len(images), 1), patch_km2, device=images.device)
            network.forward_features(
                images,
                torch.cat([place, view.dates[:, None].to(images), area], dim=1),
                wavelengths=[S2_NANOMETRES[b][0] for b in bands],
                bandwidths=[S2_NANOMETRES[b][1] for b in bands],
                input_mode="spectral",
                kernel_size=16,
            )
    finally:
        hook.remove()
    return torch.stack(said).mean(0)


# rslearn, docs/foundation_models/SatlasPretrain.md: colours divided by 3000, the rest by 8160, clipped to 0 to 1.
_SATLAS_S2: dict[str, Any] = {
    "bands": ("B04", "B03", "B02", "B05", "B06", "B07", "B08", "B11", "B12"),
    "scale": (*(1 / 3000,) * 3, *(1 / 8160,) * 6),
    "clip": (0, 1),
}


def satlas(size: Literal["tiny", "base"], *, pretrained: bool) -> Adapter:
    """Open SatlasPretrain's Swin v2 for single Sentinel-2 images (Bastani et al. 2023), features of its last stage.

    It was trained on level 1C; 2A is shown to it alike.
    """
    models: Any = import_module("torchgeo.models")
    letter = size[0]
    weights = getattr(models, f"Swin_V2_{letter.upper()}_Weights").SENTINEL2_SI_MS_SATLAS
    network = getattr(models, f"swin_v2_{letter}")(weights if pretrained else None)
    if not pretrained:
        first = network.features[0][0]
        network.features[0][0] = nn.Conv2d(9, first.out_channels, kernel_size=first.kernel_size, stride=first.stride)
    takes = Takes(
        inputs=tuple(Input(modality=m, **_SATLAS_S2) for m in ("sentinel2", "sentinel2_l2a")),
        patch_px=32,
    )
    adapter = Adapter(network, takes, dim=768 if size == "tiny" else 1024, name=f"satlas-swin-{size}", call=_call_swin)
    adapter.source = "https://huggingface.co/torchgeo/satlas"
    return adapter


def _call_swin(network: Any, view: View) -> Float[Tensor, "n d h w"]:
    maps = [network.norm(network.features(images)) for images in view.images.values()]
    mean: Tensor = sum(maps) / len(maps)
    return mean.permute(0, 3, 1, 2)


PRESTO_S2 = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
PRESTO_BANDS = 17
"""VV VH, ten of Sentinel-2, temperature and precipitation, elevation and slope, NDVI."""
PRESTO_STEPS = 24
PRESTO_SERIES = 4096
"""Pixel series that go through the network at once."""


def presto(*, pretrained: bool, **shape: Any) -> Adapter:
    """Open Presto (Tseng et al. 2023): series of single pixels of Sentinel-1 and -2, up to 24 dates, by month.

    Order and scaling: `s1_s2_era5_srtm.py` of nasaharvest/presto. Weather and terrain stay masked. It looks at
    patches, each as one pixel.
    """
    models: Any = import_module("torchgeo.models")
    network = models.presto(weights=models.Presto_Weights.PRESTO if pretrained else None, **shape)
    takes = Takes(
        inputs=(
            Input(modality="sentinel2_l2a", bands=PRESTO_S2, scale=1e-4),
            Input(modality="sentinel1", bands=("vv", "vh"), scale=1 / 25, offset=1.0),
        ),
        patch_px=1,
        series=True,
        needs_place=True,
    )
    dim = shape.get("encoder_embedding_size", 128)
    adapter = Adapter(network, takes, dim=dim, name="presto", call=_call_presto)
    adapter.licence, adapter.source = "MIT", "https://huggingface.co/torchgeo/presto"
    return adapter


def _call_presto(network: Any, view: View) -> Float[Tensor, "n d h w"]:
    assert view.lonlat is not None
    first = next(iter(view.images.values()))
    n, t, _, h, w = first.shape
    values = first.new_zeros(n, h, w, t, PRESTO_BANDS)
    masked = torch.ones_like(values, dtype=torch.bool)
    for m, bands in (("sentinel1", slice(0, 2)), ("sentinel2_l2a", slice(2, 12))):
        if m in view.images:
            values[..., bands] = view.images[m].permute(0, 3, 4, 1, 2)
            masked[..., bands] = ~view.valid[m].permute(0, 2, 3, 1)[..., None]
    red, infrared = values[..., 4], values[..., 8]
    both = red + infrared
    values[..., 16] = torch.where(both > 0, (infrared - red) / torch.where(both > 0, both, 1.0), 0.0)
    masked[..., 16] = masked[..., 4]
    month = to_timestamps(view.dates)[..., 1][:, None, None].expand(-1, h, w, -1)
    latlon = view.lonlat.flip(1).to(first)[:, None, None].expand(-1, h, w, -1)
    out = first.new_zeros(n * h * w, network.encoder.norm.normalized_shape[0])
    flat = [x.flatten(0, 2) for x in (values, masked, month, latlon)]
    for rows in _alike(flat[1]):
        for part in rows.split(PRESTO_SERIES):
            out[part] = _embed_series(network, *(x[part] for x in flat))
    maps: Tensor = out.unflatten(0, (n, h, w)).permute(0, 3, 1, 2)
    return maps


def _embed_series(
    network: Any,
    values: Float[Tensor, "n t c"],
    masked: Bool[Tensor, "n t c"],
    month: Tensor,
    latlon: Float[Tensor, "n 2"],
) -> Float[Tensor, "n d"]:
    """Embed series that lack the same; dates without data are left out, since Presto counts them."""
    seen = ~masked[0].all(1)
    if not bool(seen.any()):
        return values.new_zeros(len(values), network.encoder.norm.normalized_shape[0])
    values, masked, month = values[:, seen], masked[:, seen], month[:, seen]
    if values.shape[1] > PRESTO_STEPS:
        raise InputError(
            f"Presto takes {PRESTO_STEPS} dates, and {values.shape[1]} came; give fewer, such as monthly composites"
        )
    unknown = torch.full(values.shape[:2], 9, dtype=torch.long, device=values.device)
    tokens: Tensor = network.encoder(values, unknown, latlon, masked.to(values.dtype), month)[0]
    mean: Tensor = tokens.mean(1)
    return mean


def _alike(masked: Bool[Tensor, "n t c"]) -> list[Tensor]:
    """Group series that lack the same, since Presto wants equally many tokens of each."""
    _, group = masked.flatten(1).unique(dim=0, return_inverse=True)
    return [(group == g).nonzero()[:, 0] for g in range(int(group.max()) + 1)]
