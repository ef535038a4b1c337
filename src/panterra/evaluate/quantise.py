"""Embeddings in a byte or less."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int8

from panterra.errors import InputError

_SCALE = np.float32(127.5)


def quantise(embeddings: np.ndarray) -> np.ndarray:
    """Round the signed square root to int8 of the same shape; beyond -1 to 1 values saturate, NaN is refused.

    The square root spends the levels where unit-length embeddings have their values, near zero.
    """
    values = np.asarray(embeddings, np.float32)
    if np.isnan(values).any():
        raise InputError("embeddings hold NaN, which int8 cannot express; fill or drop the places without data first")
    codes: np.ndarray = np.rint(np.clip(np.sign(values) * np.sqrt(np.abs(values)) * _SCALE, -127, 127)).astype(np.int8)
    return codes


def dequantise(codes: np.ndarray) -> np.ndarray:
    """Turn int8 codes of `quantise` back into float32."""
    values: np.ndarray = np.asarray(codes, np.float32) / _SCALE
    values *= np.abs(values)
    return values


def percentile_levels(
    embeddings: Float[np.ndarray, "n d"], bits: int
) -> tuple[Float[np.ndarray, "d edges"], Float[np.ndarray, "d levels"]]:
    """Find per dimension the 2^bits + 1 edges between equally full bins, and the median of each bin."""
    if not 1 <= bits <= 8:
        raise InputError(f"{bits} bits were asked for; percentile codes have 1 to 8")
    values, levels = np.asarray(embeddings, np.float32), 2**bits
    if not len(values) or not np.isfinite(values).all():
        lost = int((~np.isfinite(values)).any(1).sum())
        raise InputError(
            f"{len(values)} embeddings came to find percentiles of, {lost} of them with numbers missing; give one at "
            "least, and drop the places without data first"
        )
    edges = np.quantile(values, np.linspace(0, 1, levels + 1), axis=0)
    midpoints = np.quantile(values, (np.arange(levels) + 0.5) / levels, axis=0)
    return edges.T.astype(np.float32), midpoints.T.astype(np.float32)


def percentile_codes(
    embeddings: Float[np.ndarray, "n d"], edges: Float[np.ndarray, "d edges"]
) -> Int8[np.ndarray, "n d"]:
    """Number the bin that each value lies in, from 0; 8-bit codes wrap around in the int8 that stores them."""
    values = np.asarray(embeddings, np.float32)
    bins = np.stack([np.searchsorted(e, v, side="left") for e, v in zip(edges, values.T, strict=True)], axis=1) - 1
    codes: np.ndarray = np.clip(bins, 0, edges.shape[1] - 2).astype(np.uint8).view(np.int8)
    return codes


def percentile_values(codes: Int8[np.ndarray, "n d"], midpoints: Float[np.ndarray, "d levels"]) -> np.ndarray:
    """Turn codes of `percentile_codes` back into float32."""
    return np.take_along_axis(midpoints, codes.view(np.uint8).T.astype(np.int64), axis=1).T
