"""What masked patches look like: pixels from predicted tokens. Only pretraining by pixels needs it (OlmoEarth)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from panterra.modalities import MODALITIES
from panterra.models.olmoearth import SPATIAL_FACTOR, OlmoEarthConfig
from panterra.models.patches import resize


class Reconstructor(nn.Module):
    """One linear layer per band set, from a token to its patch (He et al. 2022, masked autoencoders).

    A patch is made at the size that patch embeddings take, and resized to the one asked for.
    """

    def __init__(self, config: OlmoEarthConfig, dim: int) -> None:
        super().__init__()
        self.base_px = config.base_patch_px
        self.bands = {m: config.groups(m) for m in config.modalities}
        self.layers = nn.ModuleDict(
            {
                m: nn.ModuleList(nn.Linear(dim, len(bands) * patch_side(m, self.base_px) ** 2) for bands in sets)
                for m, sets in self.bands.items()
            }
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(
        self, tokens: Float[Tensor, "n d"], modality: str, band_set: int, patch_px: int
    ) -> Float[Tensor, "n c y x"]:
        """Make the normalised pixels of some patches of a band set, on the modality's own grid."""
        made, side = patch_side(modality, self.base_px), patch_side(modality, patch_px)
        layers = self.layers[modality]
        assert isinstance(layers, nn.ModuleList)
        pixels: Tensor = layers[band_set](tokens)
        pixels = pixels.unflatten(1, (len(self.bands[modality][band_set]), made, made))
        return pixels if side == made else resize(pixels, side, side)


def patch_side(modality: str, patch_px: int) -> int:
    """Count the pixels of a patch's side on the modality's own grid; 1 for what has no place."""
    if MODALITIES[modality].kind not in ("series", "still"):
        return 1
    return patch_px * SPATIAL_FACTOR.get(modality, 1)
