"""Pixels as targets: what masked autoencoders predict (He et al. 2022; OlmoEarth's ablation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from panterra.modalities import MODALITIES
from panterra.models.normalize import MISSING
from panterra.models.positions import TokenLine
from panterra.models.reconstructor import Reconstructor, patch_side
from panterra.objectives.losses import Pair, Pairs


def pair_pixels(
    reconstructor: Reconstructor,
    predicted: Float[Tensor, "n d"],
    line: TokenLine,
    image: Int[Tensor, " n"],
    token: Int[Tensor, " n"],
    inputs: Mapping[str, Float[Tensor, "i _t _c _y _x"]],
    patch_px: int,
) -> dict[str, Pair]:
    """Put the pixels made of predicted tokens beside those of their patches, each value a token of width 1.

    `image` says which of the inputs a token is of, `token` its number in line. What is -99999 there is not valid.
    """
    number, date = line.band_set[token], line.date[token].clamp(min=0)
    place = line.place[token].clamp(min=0)
    row, col = place // line.cols, place % line.cols
    pairs, first = {}, 0
    for m, images in inputs.items():
        side, names = patch_side(m, patch_px), MODALITIES[m].band_names
        patches = rearrange(images, "i t c (h p) (w q) -> i t h w c p q", p=side, q=side)
        made, there = [], []
        for s, bands in enumerate(reconstructor.bands[m]):
            rows = (number == first + s).nonzero()[:, 0]
            made.append(reconstructor(predicted[rows], m, s, patch_px).flatten())
            wanted = patches[image[rows], date[rows], row[rows], col[rows]]
            there.append(wanted[:, [names.index(band) for band in bands]].flatten())
        first += len(made)
        target = torch.cat(there)[None, :, None]
        pairs[m] = Pair(predicted=torch.cat(made)[None, :, None], target=target, valid=target[..., 0] != MISSING)
    return pairs


def line_up_views(views: Sequence[Pairs]) -> dict[str, Pair]:
    """Stack each modality's values of several views, padded to the view that has most."""

    def stack(parts: Sequence[Tensor]) -> Tensor:
        return pad_sequence([part[0] for part in parts], batch_first=True)

    return {
        m: Pair(
            predicted=stack([view[m].predicted for view in views]),
            target=stack([view[m].target for view in views]),
            valid=stack([view[m].valid for view in views]),
        )
        for m in views[0]
    }
