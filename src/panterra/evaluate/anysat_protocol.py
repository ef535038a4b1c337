"""How AnySat's published evaluation reads off and scores what a model says, where that is not as elsewhere here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.evaluate.metrics import accuracy, mean_iou, multilabel_f1, per_class


def linear_head(dim: int, outputs: int) -> nn.Sequential:
    """Build what is trained on vectors of a model: on the tile's, on patches or on patch and sub-patch side by side."""
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, outputs))


def mlp_head(dim: int, classes: int, hidden: Sequence[int] = (128, 64)) -> nn.Sequential:
    """Build the classifier of models that are trained from scratch."""
    widths = (dim, *hidden)
    layers: list[nn.Module] = [nn.LayerNorm(dim)]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def freeze(encoder: nn.Module, *, published: bool = False, masked: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Freeze an encoder under a probe, in place, and give those of its parameters that go on learning: none.

    `published`: it stays in training mode, so that attention over dates goes on dropping a tenth; and the value that
    stands for masked pixels of a series is learned, in the projectors of the sensors whose images come `masked`.
    """
    encoder.requires_grad_(False).train(published)
    if not published:
        return {}
    parameters = dict(encoder.named_parameters())
    absent = [sensor for sensor in masked if f"projectors.{sensor}.pad" not in parameters]
    if absent:
        raise InputError(f"the encoder has no projector with a pad for {absent[0]}; name sensors with series of images")
    learning = {name: parameters[name] for name in (f"projectors.{sensor}.pad" for sensor in masked)}
    for parameter in learning.values():
        parameter.requires_grad_()
    return learning


def validation_scores(
    looks: Iterable[np.ndarray], figure: Callable[[np.ndarray], np.ndarray], *, published: bool = False
) -> list[float]:
    """Score each look at the validation samples, from what `figure` is made of (`scoring.sums_of`, over samples).

    `published`: metrics are never reset, so that each score is that of all looks so far.
    """
    sums = [np.asarray(look) for look in looks]
    return [float(figure(total)) for total in (itertools.accumulate(sums) if published else sums)]


def patches_to_pixels(outputs: Float[Tensor, "b p o"], side: int) -> Float[Tensor, "b k y x"]:
    """Lay out what each patch says of its `side` x `side` pixels, class by class ("naive" head)."""
    rows = math.isqrt(outputs.shape[1])
    return rearrange(outputs, "b (R C) (k r c) -> b k (R r) (C c)", R=rows, r=side, c=side)


def cells_to_pixels(outputs: Float[Tensor, "b p n o"], side: int = 1) -> Float[Tensor, "b k y x"]:
    """Lay out what each sub-patch says of its `side` x `side` pixels, pixel by pixel ("dense" head)."""
    rows, cells = math.isqrt(outputs.shape[1]), math.isqrt(outputs.shape[2])
    order = "b (R C) (i j) (r c k) -> b k (R i r) (C j c)"
    return rearrange(outputs, order, R=rows, i=cells, r=side, c=side)


def iou_without_last_class(conf: Int[np.ndarray, "k k"]) -> dict[str, float]:
    """Score a segmentation of PASTIS-HD or FLAIR by mean IoU, and by accuracy in per cent.

    What is, or was called, the last class is left out (void, other).
    """
    kept = conf.copy()
    kept[-1], kept[:, -1] = 0, 0
    return {"mIoU": float(mean_iou(kept)), "acc": 100 * float(accuracy(kept))}


def segmentation_scores(conf: Int[np.ndarray, "k k"]) -> dict[str, float]:
    """Score a segmentation by means over all classes, absent ones counting 0: IoU and F1; and overall accuracy."""
    figures = per_class(conf)
    return {
        "mIoU": float(np.nan_to_num(figures["iou"]).mean()),
        "mF1": float(np.nan_to_num(figures["f1"]).mean()),
        "mAcc": float(accuracy(conf)),
    }


def pooled_iou(conf: Int[np.ndarray, "k k"]) -> float:
    """Score a batch of BraDD-S1TS: the classes' intersections over their unions; batches are averaged.

    NaN without labels.
    """
    right, total = np.trace(conf), conf.sum()
    return float(right / (2 * total - right)) if total else math.nan


def f1_scores(conf: Int[np.ndarray, "k k"]) -> dict[str, float]:
    """Score a classification by F1; absent classes count 0."""
    figures = per_class(conf)
    f1 = np.nan_to_num(figures["f1"])
    return {
        "F1_Score_macro": float(f1.mean()),
        "F1_Score_micro": float(accuracy(conf)),
        "F1_Score_weighted": float((f1 * figures["support"]).sum() / max(conf.sum(), 1)),
    }


def multilabel_f1_scores(targets: Bool[np.ndarray, "n k"], predictions: Bool[np.ndarray, "n k"]) -> dict[str, float]:
    """Score labels of which a sample may have several by F1; absent classes count 0."""
    micro, macro = multilabel_f1(targets, predictions)
    hit, support, guessed = (targets & predictions).sum(0), targets.sum(0), predictions.sum(0)
    weighted = (2 * hit / np.maximum(support + guessed, 1) * support).sum() / max(support.sum(), 1)
    return {"F1_Score_macro": macro, "F1_Score_micro": micro, "F1_Score_weighted": float(weighted)}


def squared_error(
    raw: Float[Tensor, "b y x"], targets: Float[Tensor, "b y x"], *, published: bool = False
) -> Float[Tensor, ""]:
    """Give the mean squared error of the softplus of raw predictions (BioMassters), whose root is the score.

    `published` compares each prediction with the targets of every sample of the batch, as the published code does.
    """
    if not published:
        return F.mse_loss(F.softplus(raw), targets)
    each, every = torch.broadcast_tensors(F.softplus(raw)[:, None], targets[None])
    return F.mse_loss(each, every)


def retrieval_accuracy(logits: Float[Tensor, "n n"], names: Sequence[str]) -> dict[str, float]:
    """Say how often a patch's nearest tokens are the same patch seen by other sensors, for each sensor.

    Tokens come sensor after sensor; one of the nearest counts as the token itself. A figure is a share of all tokens,
    so that the sensors' figures add up to 1 at best.
    """
    patches = len(logits) // len(names)
    nearest = logits.topk(len(names), dim=1).indices
    same = nearest % patches == torch.arange(len(logits), device=logits.device)[:, None] % patches
    hits = same.sum(1).view(len(names), patches).sum(1) - patches
    return {name: float(n) / (len(names) - 1) / len(logits) for name, n in zip(names, hits, strict=True)}


def merge_crops(
    outputs: Float[Tensor, "n k h w"], places: Sequence[tuple[int, int]], side: int
) -> Float[Tensor, "k side side"]:
    """Average what overlapping crops of an image say, each beginning at its (row, column) (FLAIR's test)."""
    total = outputs.new_zeros(outputs.shape[1], side, side)
    count = outputs.new_zeros(side, side)
    height, width = outputs.shape[2:]
    for crop, (row, col) in zip(outputs, places, strict=True):
        total[:, row : row + height, col : col + width] += crop
        count[row : row + height, col : col + width] += 1
    return total / count.clamp(min=1)
