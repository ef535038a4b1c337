"""Boxes around objects: where they are in a window, how a grid of scores stands for them, how they are learned.

An anchor-free detector: every cell of a grid says for each class whether an object's centre is in it, and how far off
the centre is and how large the box (Zhou et al. 2019, Objects as Points). Sizes are learned from all cells near the
centre by the generalised IoU, as in TTFNet (Liu et al. 2020, Training-Time-Friendly Network).
"""

from __future__ import annotations

import math

import numpy as np
import shapely
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

NO_OBJECT = -1
"""The class of rows that only fill a target up."""
SHAPE = 4
"""Scores of a cell beside those of classes: how far the centre is to the right and down, log width, log height."""
PRIOR = 0.05
"""What a new model says for every cell, so that all the empty ones do not outweigh the rest (Lin et al. 2017)."""
REACH = 0.54 / 6
"""Standard deviation of the bump around a centre, of the size of the box (TTFNet, section 3.2)."""
BOX_WEIGHT = 5.0
"""Of the loss of boxes against that of centres (TTFNet, section 4)."""
LOWEST = 0.02
"""Peaks below this score are no candidates."""
MOST = 100
"""Candidates per window that count (COCO)."""
SAME = 0.5
"""IoU from which the weaker of two boxes of a class is taken for the same object."""


def turn_boxes(target: Float[Tensor, "b m 5"], quarters: int, *, flip: bool) -> Float[Tensor, "b m 5"]:
    """Turn boxes as `torch.rot90` turns the image that they are fractions of, then flip them left to right."""
    kind, x, y, width, height = target.unbind(-1)
    for _ in range(quarters % 4):
        x, y, width, height = y, 1 - x, height, width
    return torch.stack([kind, 1 - x if flip else x, y, width, height], dim=-1)


def first_guess(scores: Float[Tensor, "b k y x"], size: float) -> Float[Tensor, "b k y x"]:
    """Shift what a head gives so that zeros mean `PRIOR` and boxes of the side `size`, in cells."""
    shift = scores.new_full((scores.shape[1],), math.log(PRIOR / (1 - PRIOR)))
    shift[-SHAPE:-2], shift[-2:] = 0.0, math.log(size)
    return scores + shift[:, None, None]


def boxes_of(shape: Float[Tensor, "xyxy ..."], row: Tensor, col: Tensor) -> Float[Tensor, "xyxy ..."]:
    """Turn the shape scores of cells into left, top, right and bottom, in cells."""
    x, y = col + 0.5 + shape[0], row + 0.5 + shape[1]
    # A size beyond all windows would be infinite after exp.
    half_width, half_height = (shape[2:].clamp(-6, 10).exp() / 2).unbind(0)
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height])


def overlap(one: Float[Tensor, "xyxy ..."], other: Float[Tensor, "xyxy ..."]) -> tuple[Tensor, Tensor]:
    """Give IoU and generalised IoU (Rezatofighi et al. 2019) of pairs of boxes."""
    left, top = (torch.maximum(one[k], other[k]) for k in (0, 1))
    right, bottom = (torch.minimum(one[k], other[k]) for k in (2, 3))
    shared = (right - left).clamp(min=0) * (bottom - top).clamp(min=0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    union = areas[0] + areas[1] - shared
    left, top = (torch.minimum(one[k], other[k]) for k in (0, 1))
    right, bottom = (torch.maximum(one[k], other[k]) for k in (2, 3))
    hull = (right - left) * (bottom - top)
    iou = shared / union
    return iou, iou - (hull - union) / hull


def detection_loss(scores: Float[Tensor, "b k y x"], target: Float[Tensor, "b m 5"]) -> Float[Tensor, ""]:
    """Add the focal loss of the centres and the loss of the boxes, per object.

    `target` holds class, centre and size as fractions of the window, rows of class -1 nothing.
    """
    centres, boxes = scores[:, :-SHAPE], scores[:, -SHAPE:]
    height, width = scores.shape[-2:]
    row = torch.arange(height, device=scores.device, dtype=scores.dtype)[:, None].expand(height, width)
    col = torch.arange(width, device=scores.device, dtype=scores.dtype).expand(height, width)
    wanted = torch.zeros_like(centres)
    loss = scores.sum() * 0
    number = 0
    for sample, (shape, rows) in enumerate(zip(boxes, target, strict=True)):
        rows = rows[rows[:, 0] != NO_OBJECT]
        if not len(rows):
            continue
        number += len(rows)
        kind = rows[:, 0].long()
        x, y, w, h = (rows[:, 1:] * rows.new_tensor([width, height, width, height])).unbind(1)
        bump = _bumps(x, y, w, h, row, col)
        for k in kind.unique():
            wanted[sample, k] = bump[kind == k].amax(0)
        # A cell near several centres belongs to the nearest one.
        strength, owner = bump.max(0)
        share = torch.where(owner == torch.arange(len(rows), device=owner.device)[:, None, None], bump, 0.0)
        weight = (share / share.sum((1, 2), keepdim=True).clamp(min=1e-6)).sum(0)
        truth = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2])[:, owner]
        near = strength > 1e-2
        _, likeness = overlap(boxes_of(shape[:, near], row[near], col[near]), truth[:, near])
        loss = loss + BOX_WEIGHT * (weight[near] * (1 - likeness)).sum()
    return (loss + _focal(centres, wanted)) / max(number, 1)


def _bumps(x: Tensor, y: Tensor, w: Tensor, h: Tensor, row: Tensor, col: Tensor) -> Float[Tensor, "m y x"]:
    """Draw a Gaussian around each centre's cell, 1 there, as wide as the box is large."""
    height, width = row.shape
    x, y = x.floor().clamp(0, width - 1), y.floor().clamp(0, height - 1)
    across, down = ((REACH * size).clamp(min=1e-3)[:, None, None] for size in (w, h))
    return (-(((col - x[:, None, None]) / across).square() + ((row - y[:, None, None]) / down).square()) / 2).exp()


def _focal(scores: Tensor, wanted: Tensor) -> Tensor:
    """Sum the focal loss of centres, which forgives cells beside one (Zhou et al. 2019, equation 1)."""
    share = scores.sigmoid()
    here = -F.logsigmoid(scores) * (1 - share).square()
    elsewhere = -F.logsigmoid(-scores) * share.square() * (1 - wanted) ** 4
    return torch.where(wanted == 1, here, elsewhere).sum()


def find_boxes(
    scores: Float[Tensor, "k y x"], *, lowest: float = LOWEST, most: int = MOST
) -> tuple[Float[np.ndarray, "n 4"], Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Give boxes (left, top, right, bottom, in cells), scores and classes of what a window's scores show, best first.

    Candidates are cells that no neighbour of the same class exceeds; of boxes that overlap the best stays.
    """
    share = scores[:-SHAPE].sigmoid()
    peak = (F.max_pool2d(share[None], 3, stride=1, padding=1)[0] == share) & (share >= lowest)
    kind, row, col = peak.nonzero().unbind(1)
    score = share[kind, row, col]
    order = score.argsort(descending=True, stable=True)[: 4 * most]
    kind, row, col, score = kind[order], row[order], col[order], score[order]
    boxes = boxes_of(scores[-SHAPE:, row, col], row.to(scores), col.to(scores)).T
    found = boxes.double().cpu().numpy(), score.double().cpu().numpy(), kind.cpu().numpy()
    kept = suppress(*found)[:most]
    return found[0][kept], found[1][kept], found[2][kept]


def suppress(
    boxes: Float[np.ndarray, "n 4"],
    score: Float[np.ndarray, " n"],
    kind: Int[np.ndarray, " n"],
    *,
    same: float = SAME,
) -> Int[np.ndarray, " m"]:
    """Number the boxes that stay, best first, when each leaves out the weaker ones of its class that overlap it.

    The order of the boxes does not matter; equal scores are told apart by place.
    """
    order = np.lexsort((boxes[:, 0], boxes[:, 1], -score))
    boxes, kind = boxes[order], kind[order]
    shapes = shapely.box(*boxes.T)
    one, other = shapely.STRtree(shapes).query(shapes)
    # Sorted, the better one of a pair has the lower number.
    pair = (one < other) & (kind[one] == kind[other])
    one, other = one[pair], other[pair]
    close = _iou(boxes[one], boxes[other])
    one, other = one[close >= same], other[close >= same]
    weaker: dict[int, list[int]] = {}
    for better, worse in zip(one.tolist(), other.tolist(), strict=True):
        weaker.setdefault(better, []).append(worse)
    alive = np.ones(len(boxes), np.bool_)
    for better in sorted(weaker):
        if alive[better]:
            alive[weaker[better]] = False
    kept: np.ndarray = order[alive]
    return kept


def _iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    iou: np.ndarray = overlap(torch.from_numpy(one.T.copy()), torch.from_numpy(other.T.copy()))[0].numpy()
    return iou


def iou_matrix(one: Float[np.ndarray, "n 4"], other: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Give the IoU of every box with every other."""
    rows, cols = (torch.from_numpy(boxes.T.copy()) for boxes in (one, other))
    every = (len(one), len(other))
    iou: np.ndarray = overlap(rows[:, :, None].expand(4, *every), cols[:, None].expand(4, *every))[0].numpy()
    return iou
