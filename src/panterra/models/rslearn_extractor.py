"""Our encoders as a feature extractor of rslearn, which has to be installed to import this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from panterra.models.backbones import panterra_backbone
from panterra.sample import to_days

_component: Any = import_module("rslearn.models.component")


class PanterraExtractor(_component.FeatureExtractor):  # type: ignore[misc]
    """The first component of an rslearn encoder, for its model configurations (rslearn, docs/TasksAndModels.md).

    `inputs` names, for each modality, the key of the input dictionaries that holds it; without it keys are modalities.
    Images [C, T, H, W] with time stamps bring their dates; plain tensors [C, H, W] take those of `dates`. The other
    arguments are those of `panterra_backbone`.
    """

    def __init__(
        self,
        model: str = "olmoearth-v1.2-nano",
        patch_m: float = 40.0,
        pixel_m: float = 10.0,
        channels: Sequence[Mapping[str, Any]] = (),
        inputs: Mapping[str, str] | None = None,
        dates: Sequence[str] = (),
        scales: Sequence[float] = (1.0,),
        random: int | None = None,
        train: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = panterra_backbone(
            model,
            patch_m=patch_m,
            pixel_m=pixel_m,
            channels=channels,
            dates=dates,
            scales=scales,
            random=random,
            train=train,
        )
        self.inputs = dict(inputs or {m: m for m in self.backbone.channels})

    def forward(self, context: Any) -> Any:
        """Give the feature maps of a batch."""
        images, dates = {}, {}
        for m, key in self.inputs.items():
            given = [sample[key] for sample in context.inputs]
            images[m] = torch.stack([_pixels(x) for x in given])
            if getattr(given[0], "timestamps", None):
                dates[m] = torch.stack([_days(x.timestamps) for x in given]).to(images[m].device)
        return _component.FeatureMaps(self.backbone(images, dates=dates))

    def get_backbone_channels(self) -> list[tuple[float, int]]:
        """Give, for each map, how much smaller than the input it is, and its width."""
        return list(zip(self.backbone.reductions, self.backbone.out_channels, strict=True))


def _pixels(given: Any) -> Float[Tensor, "c t y x"]:
    x: Tensor = getattr(given, "image", given)
    return x if x.ndim == 4 else x[:, None]


def _days(periods: Sequence[tuple[Any, Any]]) -> Int[Tensor, " t"]:
    """Take the middle of each period."""
    return torch.tensor([(to_days(start) + to_days(end)) // 2 for start, end in periods])
