"""Windows that show what another one shows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from panterra.data.composites import Composite
from panterra.data.olmoearth_h5 import Sample
from panterra.data.windows import Window
from panterra.modalities import MODALITIES

THUMBNAIL = 16
NEAR_BITS = 16
"""How many of the 480 signs of a thumbnail's differences may differ in a near-identical window."""
NEAR_DISTANCE = 0.1
"""How far apart such thumbnails are at most, on average, in standard deviations of the first."""


def digest(samples: Iterable[Sample]) -> str:
    """Sum up the images of samples, wherever they lie."""
    total = hashlib.sha256()
    for sample in samples:
        for name in sorted(sample.present):
            total.update(name.encode() + np.packbits(sample.present[name]).tobytes())
            total.update(np.ascontiguousarray(sample.pixels[name]).tobytes())
    return total.hexdigest()


def thumbnail(layers: Mapping[str, Composite]) -> list[float]:
    """Average the first series over its dates and bands, down to 16 x 16 blocks."""
    layer = next(layer for name, layer in layers.items() if MODALITIES[name].kind == "series" and layer.valid.any())
    weight = layer.valid.sum(0)
    mean = layer.pixels.mean(1).sum(0) / np.maximum(weight, 1)
    side = mean.shape[0] // THUMBNAIL
    blocks = mean[: side * THUMBNAIL, : side * THUMBNAIL].reshape(THUMBNAIL, side, THUMBNAIL, side).mean((1, 3))
    return [float(value) for value in blocks.astype(np.float32).ravel()]


def find_duplicates(
    windows: Sequence[Window], digests: Sequence[str], thumbnails: Float[np.ndarray, "n 256"]
) -> dict[int, tuple[int, str]]:
    """Find windows that look like an earlier one: number -> number of that one and how alike they are.

    Pixels that are equal are duplicates anywhere. Others are where the thumbnails rise and fall alike, but for
    `NEAR_BITS` of their differences, and lie close; the same cell at another time is not.
    """
    signs = _signs(thumbnails)
    # Two rows that differ in at most n bits agree on at least one of n + 1 parts.
    parts = [np.packbits(part, axis=1) for part in np.array_split(signs, NEAR_BITS + 1, axis=1)]
    spread = np.maximum(thumbnails.std(1), 1e-12)
    first: dict[str, int] = {}
    buckets: dict[tuple[int, bytes], list[int]] = {}
    found: dict[int, tuple[int, str]] = {}
    for number, digest in enumerate(digests):
        if digest in first:
            found[number] = first[digest], "the same pixels as"
            continue
        first[digest] = number
        keys = [(place, part[number].tobytes()) for place, part in enumerate(parts)]
        rivals = sorted({rival for key in keys for rival in buckets.get(key, ())})
        for rival in rivals:
            alike = (signs[rival] != signs[number]).sum() <= NEAR_BITS
            distance = np.abs(thumbnails[rival] - thumbnails[number]).mean() / spread[rival]
            if alike and distance <= NEAR_DISTANCE and windows[rival].cell != windows[number].cell:
                found[number] = rival, "nearly the same pixels as"
                break
        else:
            for key in keys:
                buckets.setdefault(key, []).append(number)
    return found


def _signs(thumbnails: Float[np.ndarray, "n 256"]) -> Int[np.ndarray, "n 480"]:
    grid = thumbnails.reshape(-1, THUMBNAIL, THUMBNAIL)
    steps = [np.diff(grid, axis=axis).reshape(len(grid), -1) > 0 for axis in (1, 2)]
    return np.concatenate(steps, axis=1).astype(np.int64)
