"""What clouds and their shadows hide."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from odc.geo.geobox import GeoBox

from panterra.imagery.raster import Bools, Floats, read_onto

HIDING: Mapping[str, Callable[[Floats], Bools]] = {
    # Sentinel-2 scene classes: cloud shadow, medium and high cloud probability, thin cirrus.
    "scl": lambda v: np.isin(v, (3, 8, 9, 10)),
    # Landsat Collection 2 QA_PIXEL, bits 1-4: dilated cloud, cirrus, cloud, cloud shadow.
    "qa_pixel": lambda v: (v.astype(np.int64) & 0b11110) != 0,
    # DEA's Fmask codes: cloud, cloud shadow.
    "fmask": lambda v: np.isin(v, (2, 3)),
}
"""Which codes of a mask are clouds or their shadows: those of `stac.MASKS` but for what lacks data anyway."""


S2CLOUDLESS_BANDS = ("B01", "B02", "B04", "B05", "B08", "B8A", "B09", "B10", "B11", "B12")
"""What s2cloudless looks at, in its order, as reflectance from 0 to 1."""

S2CLOUDLESS_PX = {"average_over": 22, "dilation_size": 11}
"""Radius of its smoothing and of its margin, in pixels of 10 m: more than 200 m and 100 m."""

S2CLOUDLESS_REACH_PX = 34
"""How far from a pixel others matter to it."""


def detect_clouds(pixels: Float[np.ndarray, "c h w"], bands: Sequence[str]) -> Bools:
    """Find clouds in Sentinel-2 level 1C, which comes without a mask, by s2cloudless; shadows stay.

    `pixels` are reflectance times 10,000.
    """
    # An extra: whoever asks for it has been told to install it.
    detector = importlib.import_module("s2cloudless").S2PixelCloudDetector(threshold=0.4, **S2CLOUDLESS_PX)
    chosen = np.stack([pixels[bands.index(band)] for band in S2CLOUDLESS_BANDS], axis=-1)
    masks: Bools = detector.get_cloud_masks(chosen[None] / np.float32(1e4))[0] > 0
    return masks


def near_clouds(mask: tuple[str, str], grid: GeoBox, distance_px: int) -> Bools:
    """Tell which pixels of a grid lie at most that far from a pixel that a mask file calls cloud or shadow.

    `mask` is the file and the kind of its codes. Clouds beyond the edge of the grid count as well.
    """
    path, kind = mask
    if kind not in HIDING:
        return np.zeros(grid.shape, np.bool_)
    around = grid.pad(distance_px)
    codes, known = read_onto(path, around, categorical=True, bands=[1], scale=1.0, offset=0.0)
    inner = slice(distance_px, -distance_px or None)
    return grow(HIDING[kind](codes[0]) & known[0], distance_px)[inner, inner]


def grow(hidden: Bool[np.ndarray, "h w"], distance_px: int) -> Bool[np.ndarray, "h w"]:
    """Add the pixels whose centre lies at most that far, in pixels, from the centre of a hidden one."""
    height, width = hidden.shape
    # Row by row a disc is a run of pixels, and a run of pixels is a difference of sums.
    sums = np.zeros((height, width + 1), np.int64)
    np.cumsum(hidden, axis=1, out=sums[:, 1:])
    cols = np.arange(width)
    grown = np.zeros_like(hidden)
    for down in range(-distance_px, distance_px + 1):
        reach = math.isqrt(distance_px**2 - down**2)
        near = sums[:, np.minimum(cols + reach + 1, width)] > sums[:, np.maximum(cols - reach, 0)]
        if down >= 0:
            grown[down:] |= near[: height - down]
        else:
            grown[:down] |= near[-down:]
    return grown
