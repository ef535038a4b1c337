"""`panterra-nano`: a v1.2 nano encoder that learned on invented planets to tell what covers the ground."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from panterra.models.olmoearth import OBSERVED, OlmoEarthConfig, released_config

NAME = "panterra-nano"
SIDE_PX, DATES = 64, 4
"""Of each place that is learned from."""

_ENCODER = replace(released_config("v1.2", "nano"), modalities=OBSERVED, drop_path=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoRecipe:
    """All that decides what the weights become."""

    name: str = NAME
    encoder: OlmoEarthConfig = _ENCODER
    places: tuple[int, ...] = (3500, 3500)
    """Of each part, which is drawn from its own seed: 1, 2, ..."""
    southern: tuple[int, ...] = (2000, 2000)
    """Of further parts, on planets with a south and motorways; their seeds follow on."""
    tokens: int = 2000
    """Of a batch, at most."""
    batch: int = 64
    """Samples of a batch, at most."""
    patch_px: tuple[int, ...] = (2, 4, 4, 8)
    side_patches: tuple[int, ...] = (3, 4, 5, 6, 7, 8, 16)
    dates: tuple[int, ...] = (1, 1, 2, 3, 4, 4)
    steps: int = 27000
    lr: float = 2e-3
    restart: float = 5 / 9
    """After this share of the steps the learning rate falls once more, from half the peak, and weights are averaged."""
    average_window: int = 4000
    """Steps of which the averaged weights, which are those that are kept, are mostly made."""
    weight_decay: float = 0.02
    warmup_steps: int = 100
    final_share: float = 0.02
    seed: int = 0
    init_seed: int = 12536
    precision: Literal["float32", "bfloat16"] = "float32"

    @property
    def places_in_all(self) -> int:
        """Count the places of all parts."""
        return sum(self.places) + sum(self.southern)
