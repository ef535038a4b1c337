"""From pixels to patches of one size."""

from __future__ import annotations

from functools import lru_cache

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def bicubic_matrix(num_in: int, num_out: int) -> Float[Tensor, "out in"]:
    """The linear map of antialiased bicubic resizing along one axis.

    Keys' cubic with a = -0.5, half-pixel centres, support scaled when shrinking, weights renormalised at the borders
    (OlmoEarth), which is what `torch.nn.functional.interpolate(mode="bicubic", antialias=True)` computes.
    """
    ratio = num_in / num_out
    scale = max(ratio, 1.0)
    centre = ratio * (torch.arange(num_out, dtype=torch.float64) + 0.5)
    first = (centre - 2 * scale + 0.5).floor().clamp(min=0)
    last = (centre + 2 * scale + 0.5).floor().clamp(max=num_in) - 1
    tap = torch.arange(num_in, dtype=torch.float64)
    x = ((tap - centre[:, None] + 0.5) / scale).abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weight = torch.where((tap >= first[:, None]) & (tap <= last[:, None]), weight, 0.0)
    return (weight / weight.sum(dim=1, keepdim=True)).float()


def resize(images: Float[Tensor, "b c h w"], height: int, width: int) -> Float[Tensor, "b c y x"]:
    """Resize images as two matrix products, which beats the library's kernel for many bands of few pixels."""
    across = bicubic_matrix(images.shape[-1], width).to(images)
    down = bicubic_matrix(images.shape[-2], height).to(images)
    return down @ (images @ across.T)


def to_patches(
    images: Float[Tensor, "b c h w"], patch_px: int, size: int, *, channels_last: bool
) -> Float[Tensor, "b rows cols features"]:
    """Cut images into patches of `patch_px` pixels, each resized to `size` pixels and flattened.

    The whole image is resized, as OlmoEarth does, so values leak a little across patch borders, and pixels beyond the
    last whole patch count too; where nothing is resized, they are left out. Features run (band, row, column), or
    (row, column, band) with `channels_last`.
    """
    rows, cols = images.shape[-2] // patch_px, images.shape[-1] // patch_px
    if patch_px != size:
        images = resize(images, rows * size, cols * size)
    elif images.shape[-2] % size or images.shape[-1] % size:
        images = images[..., : rows * size, : cols * size]
    order = "b c (h p) (w q) -> b h w (p q c)" if channels_last else "b c (h p) (w q) -> b h w (c p q)"
    return rearrange(images, order, p=size, q=size)
