"""What a network of others wants to be shown, and what it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from panterra.errors import InputError
from panterra.modalities import MODALITIES

Standardise = Literal["declared", "image", "data"]
"""declared: by `Input.mean` and `Input.std`, where it has them. image: two standard deviations around the mean of each
image's band become 0 to 1, the rest is clipped. data: by the mean and standard deviation of the data at hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One modality that a network looks at.

    What reaches the network is (unit * scale + offset), clipped, minus `mean`, over `std`, where `unit` is the
    modality's declared one.
    """

    modality: str
    bands: tuple[str, ...]
    """In the network's order."""
    scale: float | tuple[float, ...] = 1.0
    """One for all bands, or one for each."""
    offset: float = 0.0
    clip: tuple[float, float] | None = None
    mean: tuple[float, ...] = ()
    """One for each band, or none."""
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise InputError(f"no modality {self.modality!r}; known: {', '.join(sorted(MODALITIES))}")
        spec = MODALITIES[self.modality]
        if spec.kind not in ("series", "still"):
            raise InputError(f"{self.modality} has no pixels; an adapter takes images, leave it out")
        if wrong := [band for band in self.bands if band not in spec.band_names]:
            raise InputError(f"{self.modality} has no band {wrong[0]!r}; it has {', '.join(spec.band_names)}")
        scales = self.scale if isinstance(self.scale, tuple) else ()
        for name, values in (("scale", scales), ("mean", self.mean), ("std", self.std)):
            if len(values) not in (0, len(self.bands)):
                raise InputError(
                    f"{name} of {self.modality} has {len(values)} numbers for {len(self.bands)} bands; give one each"
                )
        if bool(self.mean) != bool(self.std):
            raise InputError(f"{self.modality} has one of mean and std; give both or neither")

    @property
    def index(self) -> list[int]:
        """Where the network's bands stand in an observation."""
        names = MODALITIES[self.modality].band_names
        return [names.index(band) for band in self.bands]


@dataclass(frozen=True, slots=True, kw_only=True)
class Takes:
    """All that an adapter has to know of a network's inputs."""

    inputs: tuple[Input, ...]
    patch_px: int
    """Side of a patch, in the pixels that the network sees; 1 for networks that look at single pixels."""
    image_px: int | None = None
    """Side of the images it wants; None: any whole number of patches."""
    series: bool = False
    """True where it takes all dates of a place at once; otherwise it is shown one date after another."""
    standardise: Standardise = "declared"
    needs_place: bool = False
    """Whether it cannot do without longitude and latitude."""

    def __post_init__(self) -> None:
        names = [given.modality for given in self.inputs]
        if not names or len(set(names)) < len(names):
            raise InputError(f"inputs are {names}; declare one or more modalities, each once")
        if self.image_px is not None and self.image_px % self.patch_px:
            raise InputError(f"image_px={self.image_px} is not a whole number of patches of {self.patch_px} pixels")

    @property
    def modalities(self) -> dict[str, Input]:
        """The inputs by modality."""
        return {given.modality: given for given in self.inputs}

    def as_json(self) -> dict[str, Any]:
        """Give plain JSON, for the record of what was computed how."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a network is shown: N images, each with the same modalities, or N series where it takes those."""

    images: Mapping[str, Float[Tensor, "n *t c y x"]]
    """By modality, in the unit and order that were declared; holes have their image's mean."""
    valid: Mapping[str, Bool[Tensor, "n *t h w"]]
    """Per patch, True where any pixel is data."""
    dates: Int[Tensor, "n ..."]
    """Days since 1970-01-01."""
    lonlat: Float[Tensor, "n 2"] | None
    """Degrees, where known."""
    pixel_m: float
    """Metres on the ground per pixel of the images."""

    @property
    def image(self) -> Float[Tensor, "n *t c y x"]:
        """The images of the only modality."""
        (only,) = self.images.values()
        return only
