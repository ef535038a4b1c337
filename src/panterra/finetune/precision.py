"""How well boxes are found: average precision and F1, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from panterra.evaluate.metrics import Interval
from panterra.finetune.boxes import NO_OBJECT, SHAPE, find_boxes, iou_matrix

LIKE = np.linspace(0.5, 0.95, 10)
"""IoU from which a box counts as found; figures of the first are AP50, the mean over all is COCO's AP."""
RECALLS = np.linspace(0, 1, 101)
"""Where COCO reads precision off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matches:
    """What was found in a window, and what there is."""

    kind: Int[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]
    hit: Bool[np.ndarray, "n 10"]
    """Whether a box is the first to be as like an object of its class as each of `LIKE` asks."""
    iou: Float[np.ndarray, " n"]
    """With that object, at the first of `LIKE`; 0 where there is none."""
    truths: Int[np.ndarray, " k"]
    """Objects of each class."""


def match(
    boxes: Float[np.ndarray, "n 4"],
    score: Float[np.ndarray, " n"],
    kind: Int[np.ndarray, " n"],
    true_boxes: Float[np.ndarray, "m 4"],
    true_kind: Int[np.ndarray, " m"],
    num_classes: int,
) -> Matches:
    """Give each box, the best score first, the free object of its class that it overlaps most (COCO)."""
    order = np.argsort(-score, kind="stable")
    kind, score = kind[order], score[order]
    like = iou_matrix(boxes[order], true_boxes)
    like[kind[:, None] != true_kind[None, :]] = -1
    hit, iou = np.zeros((len(kind), len(LIKE)), np.bool_), np.zeros(len(kind))
    for t, least in enumerate(LIKE):
        free = np.ones(len(true_kind), np.bool_)
        for n in range(len(kind) if len(true_kind) else 0):
            best = int(np.where(free, like[n], -1).argmax())
            # Equal within rounding counts, as in COCO's own evaluation.
            if free[best] and like[n, best] >= least - 1e-10:
                free[best], hit[n, t] = False, True
                iou[n] = like[n, best] if t == 0 else iou[n]
    return Matches(kind=kind, score=score, hit=hit, iou=iou, truths=np.bincount(true_kind, minlength=num_classes))


def match_windows(scores: Float[Tensor, "b k y x"], target: Float[Tensor, "b m 5"]) -> np.ndarray:
    """Match what the scores of each window show with its objects: B times `Matches`."""
    height, width = scores.shape[-2:]
    tallies = np.empty(len(scores), object)
    for n, (own, rows) in enumerate(zip(scores, target.cpu(), strict=True)):
        rows = rows[rows[:, 0] != NO_OBJECT].double()
        x, y, w, h = (rows[:, 1:] * torch.tensor([width, height, width, height])).unbind(1)
        truth = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1).numpy()
        tallies[n] = match(*find_boxes(own), truth, rows[:, 0].long().numpy(), len(own) - SHAPE)
    return tallies


def average_precision(
    found: Sequence[Matches], weights: Float[np.ndarray, "r s"] | None = None
) -> Float[np.ndarray, "r k 10"]:
    """Give the average precision of each class at each of `LIKE`, with windows counted `weights` times.

    Precision at 101 recalls, at each the best that this or a higher recall has (COCO); NaN without objects.
    """
    weights = np.ones((1, len(found))) if weights is None else weights
    owner = np.repeat(np.arange(len(found)), [len(m.kind) for m in found])
    kind, score, hit = (np.concatenate([getattr(m, name) for m in found]) for name in ("kind", "score", "hit"))
    truths = weights @ np.stack([m.truths for m in found])
    figures = np.full((len(weights), truths.shape[1], len(LIKE)), np.nan)
    for k in range(truths.shape[1]):
        mine = np.flatnonzero(kind == k)
        mine = mine[np.argsort(-score[mine], kind="stable")]
        for r, (own, there) in enumerate(zip(weights, truths[:, k], strict=True)):
            if not there:
                continue
            times = own[owner[mine]]
            guessed = np.cumsum(times)
            right = np.cumsum(times[:, None] * hit[mine], axis=0)
            precision = right / np.maximum(guessed, 1e-12)[:, None]
            best = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
            for t in range(len(LIKE)):
                place = np.searchsorted(right[:, t] / there, RECALLS - 1e-12)
                figures[r, k, t] = np.append(best[:, t], 0.0)[place].mean()
    return figures


def ap50(found: Sequence[Matches], weights: Float[np.ndarray, "r s"] | None = None) -> Float[np.ndarray, " r"]:
    """Average over classes the average precision at an IoU of 0.5."""
    return _mean(average_precision(found, weights)[..., 0])


def ap(found: Sequence[Matches], weights: Float[np.ndarray, "r s"] | None = None) -> Float[np.ndarray, " r"]:
    """Average over classes and IoUs from 0.5 to 0.95 the average precision, as COCO does."""
    return _mean(average_precision(found, weights).mean(-1))


def _mean(per_class: Float[np.ndarray, "r k"]) -> Float[np.ndarray, " r"]:
    """Average over the classes that have objects."""
    known = np.isfinite(per_class)
    total, number = np.where(known, per_class, 0).sum(-1), known.sum(-1)
    mean: np.ndarray = np.divide(total, number, out=np.full(len(per_class), np.nan), where=number > 0)
    return mean


def counts_at(found: Sequence[Matches], threshold: float) -> Float[np.ndarray, "s k 4"]:
    """Count per window and class what is found, what is there, what was said, and add up the IoU of what is found."""
    counts = np.zeros((len(found), len(found[0].truths), 4))
    for own, m in zip(counts, found, strict=True):
        said = m.score >= threshold
        np.add.at(own[:, 0], m.kind[said], m.hit[said, 0])
        own[:, 1] = m.truths
        np.add.at(own[:, 2], m.kind[said], 1)
        np.add.at(own[:, 3], m.kind[said], m.iou[said])
    return counts


def f1(counts: Float[np.ndarray, "*n 4"]) -> Float[np.ndarray, "*n"]:
    """Give F1 of counts as `counts_at` makes them; NaN where there is and was said nothing."""
    either = counts[..., 1] + counts[..., 2]
    figure: np.ndarray = np.divide(2 * counts[..., 0], either, out=np.full(either.shape, np.nan), where=either > 0)
    return figure


def best_threshold(found: Sequence[Matches]) -> float:
    """Choose the score from which boxes count so that F1 at an IoU of 0.5, over all classes together, is best."""
    score = np.concatenate([m.score for m in found])
    hit = np.concatenate([m.hit[:, 0] for m in found])
    if not hit.any():
        return 0.5
    order = np.argsort(-score, kind="stable")
    truths = sum(int(m.truths.sum()) for m in found)
    figures = 2 * np.cumsum(hit[order]) / (np.arange(1, len(order) + 1) + truths)
    return float(score[order][figures.argmax()])


def figures_with_intervals(
    found: Sequence[Matches], blocks: np.ndarray, threshold: float, *, resamples: int, seed: int
) -> dict[str, Interval]:
    """Give AP50, AP and F1 at a threshold, with intervals over resampled blocks of windows."""
    _, block = np.unique(blocks, return_inverse=True)
    number = int(block.max()) + 1
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=resamples)[:, block.reshape(-1)].astype(float)
    counts, precisions = counts_at(found, threshold).sum(1), average_precision(found, drawn)
    return {
        "ap50": Interval.of(ap50(found)[0], _mean(precisions[..., 0])),
        "ap": Interval.of(ap(found)[0], _mean(precisions.mean(-1))),
        "f1": Interval.of(f1(counts.sum(0)), f1(drawn @ counts)),
    }
