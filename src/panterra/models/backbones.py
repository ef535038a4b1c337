"""Our encoders as backbones of other toolkits: tensors in, feature maps out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.features import Encoder
from panterra.models.weights import load_model
from panterra.sample import Batch, Observation, to_days


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """What the channels of a tensor are, and how its values come back to the modality's unit.

    unit = value * scale + offset: of standardised values scale is their standard deviation and offset their mean.
    """

    modality: str
    bands: tuple[str, ...]
    """In the tensor's order; more than the modality has are left out, none may be absent."""
    scale: float | tuple[float, ...] = 1.0
    """One for all bands, or one for each."""
    offset: float | tuple[float, ...] = 0.0
    nodata: float | None = None
    """A value of the tensor that marks missing pixels; NaN always does."""

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise InputError(f"no modality {self.modality!r}; known: {', '.join(sorted(MODALITIES))}")
        if absent := [b for b in MODALITIES[self.modality].band_names if b not in self.bands]:
            raise InputError(f"channels of {self.modality} lack {', '.join(absent)}; the encoder looks at all of them")
        for name, values in (("scale", self.scale), ("offset", self.offset)):
            if isinstance(values, tuple) and len(values) != len(self.bands):
                raise InputError(f"{name} has {len(values)} numbers for {len(self.bands)} bands; give one each")

    def read(self, x: Float[Tensor, "b t c y x"], dates: Int[Tensor, "b t"]) -> Observation:
        """Turn a tensor into an observation in the modality's unit."""
        if x.shape[2] != len(self.bands):
            raise InputError(f"{self.modality} came with {x.shape[2]} channels; wanted {', '.join(self.bands)}")
        missing = ~x.isfinite()
        if self.nodata is not None:
            missing = missing | (x == self.nodata)
        scale, offset = (torch.as_tensor(v, dtype=torch.float32, device=x.device) for v in (self.scale, self.offset))
        values = x.float() * scale.reshape(-1, 1, 1) + offset.reshape(-1, 1, 1)
        order = [self.bands.index(b) for b in MODALITIES[self.modality].band_names]
        return Observation(pixels=values[:, :, order], dates=dates, valid=~missing[:, :, order].any(2))


class Backbone(nn.Module):
    """An encoder that takes tensors and gives feature maps [B, D, h, w], one per scale, as segmentation decoders want.

    It takes [B, C, H, W], [B, C, T, H, W] (as terratorch has series) or, with `time_first`, [B, T, C, H, W] (as
    torchgeo has them), or a dictionary of such tensors by modality. `dates` are those of all samples where a call does
    not give them. Gradients reach the encoder as far as its parameters want any.
    """

    def __init__(
        self,
        encoder: Encoder,
        channels: Sequence[Channels],
        *,
        patch_m: float,
        pixel_m: float = 10.0,
        dates: Sequence[str] = (),
        scales: Sequence[float] = (1.0,),
        time_first: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise InputError(f"{encoder.name} is not a torch module, so it cannot be a backbone")
        if unknown := [c.modality for c in channels if c.modality not in encoder.modalities]:
            raise InputError(f"{encoder.name} does not know {unknown[0]}; it takes {', '.join(encoder.modalities)}")
        self.encoder = encoder
        self.channels = {c.modality: c for c in channels}
        self.patch_m, self.pixel_m, self.scales, self.time_first = patch_m, pixel_m, tuple(scales), time_first
        self.days = tuple(to_days(d) for d in dates)
        self.out_channels = [encoder.dim] * len(self.scales)

    @property
    def reductions(self) -> list[float]:
        """How many pixels of the common grid a cell of each map is wide."""
        return [self.patch_m / self.pixel_m / scale for scale in self.scales]

    def forward(
        self,
        x: Tensor | Mapping[str, Tensor],
        *,
        dates: Int[Tensor, "b t"] | Mapping[str, Int[Tensor, "b _t"]] | None = None,
        lonlat: Float[Tensor, "b 2"] | None = None,
    ) -> list[Float[Tensor, "b d _h _w"]]:
        """Give a feature map for each scale; `dates` are days since 1970-01-01. Raises InputError."""
        given = x if isinstance(x, Mapping) else {next(iter(self.channels)): x}
        if unknown := [m for m in given if m not in self.channels]:
            raise InputError(f"channels of {unknown[0]!r} were not declared; declared: {', '.join(self.channels)}")
        observations = {}
        for m, values in given.items():
            series = self._series(values)
            own = dates.get(m) if isinstance(dates, Mapping) else dates
            observations[m] = self.channels[m].read(series, self._days(series) if own is None else own)
        batch = Batch(observations=observations, lonlat=lonlat, pixel_m=self.pixel_m)
        found = cast(Encoder, self.encoder).encode(batch, patch_m=self.patch_m)
        maps = found.patches.permute(0, 3, 1, 2)
        return [maps if scale == 1 else _scaled(maps, scale) for scale in self.scales]

    def _series(self, x: Tensor) -> Float[Tensor, "b t c y x"]:
        if x.ndim == 4:
            return x[:, None]
        if x.ndim != 5:
            raise InputError(f"the input is {list(x.shape)}; wanted [B, C, H, W], or with dates, {self._layout}")
        return x if self.time_first else x.transpose(1, 2)

    @property
    def _layout(self) -> str:
        return "[B, T, C, H, W]" if self.time_first else "[B, C, T, H, W]"

    def _days(self, x: Float[Tensor, "b t c y x"]) -> Int[Tensor, "b t"]:
        """Give the dates of a call that brings none."""
        if not self.days or len(self.days) not in (1, x.shape[1]):
            raise InputError(
                f"{x.shape[1]} images came as {self._layout} with {len(self.days)} dates; give `dates` to the backbone "
                "or to the call, one for each"
            )
        return torch.tensor(self.days, device=x.device).expand(len(x), x.shape[1])


def _scaled(maps: Float[Tensor, "b d h w"], scale: float) -> Float[Tensor, "b d y x"]:
    return F.interpolate(maps, scale_factor=scale, mode="bilinear", align_corners=False, antialias=scale < 1)


def panterra_backbone(
    model: str = "olmoearth-v1.2-nano",
    *,
    patch_m: float = 40.0,
    pixel_m: float = 10.0,
    channels: Sequence[Mapping[str, Any]] = (),
    dates: Sequence[str] = (),
    scales: Sequence[float] = (1.0,),
    time_first: bool = False,
    random: int | None = None,
    train: bool = True,
) -> Backbone:
    """Open a model by name as a backbone, with plain values as configuration files have them.

    `channels` are the fields of `Channels`; without any, those of Sentinel-2 level 2A as Panterra orders them.
    `train` lets gradients change the encoder.
    """
    bare: Mapping[str, Any] = {"modality": "sentinel2_l2a", "bands": MODALITIES["sentinel2_l2a"].band_names}
    plain: list[dict[str, Any]] = [
        {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        for given in channels or [bare]
    ]
    declared = [Channels(**given) for given in plain]
    encoder = cast(Encoder, load_model(model, random=random))
    backbone = Backbone(
        encoder, declared, patch_m=patch_m, pixel_m=pixel_m, dates=dates, scales=scales, time_first=time_first
    )
    return backbone.requires_grad_(train)


def register_with_terratorch() -> None:
    """Make `panterra_backbone` a name that terratorch's model factories know. Raises InputError without terratorch."""
    try:
        registry: Any = import_module("terratorch.registry")
    except ImportError as error:
        raise InputError(f"terratorch is not installed ({error}): pip install 'terratorch>=1.2'") from error
    if panterra_backbone.__name__ not in registry.TERRATORCH_BACKBONE_REGISTRY:
        registry.TERRATORCH_BACKBONE_REGISTRY.register(panterra_backbone)
