"""From features and targets to a probe, with its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from panterra.errors import InputError
from panterra.evaluate import splits
from panterra.evaluate.class_weights import ClassWeights, balanced_weights
from panterra.evaluate.probes.probe import NEIGHBOURS, FeatureSource, Kind, Probe, ProbeClass, Task, score_in_parts
from panterra.evaluate.probes.regression import Basis, ridge, softmax_regression
from panterra.evaluate.probes.report import Report, figures_of

Weigh = Callable[[Int[np.ndarray, " k"]], Float[Tensor, " k"]]
"""From the number of samples of each class in a training set to how much one of them counts."""

STRENGTHS = tuple(float(s) for s in np.logspace(-1, 4, 9))
"""Weights of the L2 penalty beside the summed loss, for standardised features: scikit-learn's alpha, and its 1 / C."""
_LOGITS = 2**25


def fit_probe(
    features: Float[np.ndarray, "n d"] | Float[Tensor, "n d"],
    targets: np.ndarray | Tensor,
    *,
    kind: Kind = "logistic",
    task: Task = "classes",
    groups: Int[np.ndarray, " n"] | None = None,
    split: Literal["blocks", "random"] = "blocks",
    block_m: float | None = None,
    folds: int = 5,
    names: Mapping[int, str] | Sequence[str] | None = None,
    colours: Mapping[int, tuple[int, int, int]] | Sequence[tuple[int, int, int]] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    neighbours: int = NEIGHBOURS,
    class_weights: ClassWeights | Mapping[str, float] = "none",
    source: FeatureSource | None = None,
    resamples: int = 1000,
    seed: int = 42,
) -> tuple[Probe, Report]:
    """Fit a probe on all samples, and report what its like scores on places it has not seen.

    Targets are class codes or values; `names` and `colours` belong to codes. `groups` are kept whole in the folds and
    in the bootstrap (see `splits.spatial_blocks`; `block_m` is noted in the report); a random split must be asked for.
    Features are standardised inside, but for knn, which compares directions. `class_weights` are for logistic probes:
    "balanced" lets rare classes count as much as common ones in every training set, or weights by class name, 1 where a
    name is missing.
    """
    for choice, known in ((kind, get_args(Kind)), (task, get_args(Task)), (split, ("blocks", "random"))):
        if choice not in known:
            raise InputError(f"{choice!r} is none of {', '.join(known)}; choose one of them")
    x = _as_features(features)
    classes, answers, label = _as_answers(targets, task, len(x), names, colours)
    if kind == "logistic" and task == "values":
        raise InputError("logistic probes know classes only; use kind='ridge' or 'knn' for values")
    if kind != "knn" and not (len(strengths) and min(strengths) > 0):
        raise InputError(f"strengths are {tuple(strengths)}; wanted one or more, all above 0")
    groups, fold = _as_folds(groups, split, folds, label, {c.code: c.name for c in classes}, classes, seed)
    settings = (float(neighbours),) if kind == "knn" else tuple(sorted(float(s) for s in strengths))

    index = torch.as_tensor(label, device=x.device)
    answers = answers.to(x.device)
    train = torch.as_tensor(fold != np.arange(folds)[:, None], device=x.device)
    weigh = _class_weights(class_weights, kind, classes)
    fitted, settled = _fit(kind, x, answers, index, train, settings, weigh)
    scores = torch.empty(len(settings), len(x), answers.shape[1], dtype=torch.float64, device=x.device)
    for f, models in enumerate(fitted):
        held = ~train[f]
        for s, tensors in enumerate(models):
            scores[s, held] = score_in_parts(kind, task, tensors, x[held], neighbours)
    if kind == "logistic":
        loss = -scores.clamp_min(1e-12).log().gather(2, index[None, :, None].expand(len(settings), -1, 1))[..., 0]
    else:
        loss = (scores - answers).square().sum(2)
    weights = weigh(np.bincount(label, minlength=max(1, len(classes)))).to(loss)
    if class_weights != "none":
        loss = loss * weights[index]
    loss_sums = torch.stack([loss[:, ~t].sum(1) for t in train], dim=1).cpu().numpy()
    # A fold does not choose the strength that it is scored with.
    others = loss_sums.sum(1, keepdims=True) - loss_sums
    honest = scores.cpu().numpy()[others.argmin(0)[fold], np.arange(len(x))]
    best = int(loss_sums.sum(1).argmin())
    every = torch.ones_like(train[:1])
    (final,), settled_final = _fit(kind, x, answers, index, every, settings[best : best + 1], weigh)

    codes = np.array([c.code for c in classes])
    predicted = honest.argmax(1) if task == "classes" else honest[:, 0]
    units = np.unique(groups, return_inverse=True)[1] if split == "blocks" else None
    figures, per_class, conf = figures_of(
        task, label, answers.cpu().numpy(), predicted, classes, units, resamples, seed
    )
    report = Report(
        kind=kind,
        task=task,
        split=split,
        num_samples=len(x),
        num_groups=len(x) if units is None else int(units.max()) + 1,
        block_m=block_m,
        fold_sizes=tuple(np.bincount(fold, minlength=folds).tolist()),
        strengths=settings,
        losses=tuple((loss_sums.sum(1) / len(x)).tolist()),
        strength=settings[best],
        converged=settled and settled_final,
        metrics=figures,
        classes=per_class,
        confusion=conf,
        resamples=resamples,
        seed=seed,
        class_weights=() if class_weights == "none" else tuple(weights.tolist()),
        predictions=codes[predicted] if task == "classes" else predicted,
        folds=fold,
    )
    probe = Probe(
        kind=kind,
        task=task,
        classes=classes,
        tensors={name: t.to(torch.float32).contiguous() for name, t in final[0].items()},
        neighbours=neighbours,
        source=source,
        summary=report.as_dict(),
    )
    return probe, report


def _alike(counts: Int[np.ndarray, " k"]) -> Float[Tensor, " k"]:
    return torch.ones(len(counts))


def _class_weights(asked: ClassWeights | Mapping[str, float], kind: Kind, classes: Sequence[ProbeClass]) -> Weigh:
    """Give what turns counts of each class in a training set into weights."""
    if isinstance(asked, str) and asked not in get_args(ClassWeights):
        raise InputError(f"class_weights is {asked!r}; wanted none, balanced or weights by class name")
    if asked == "none":
        return _alike
    if kind != "logistic":
        raise InputError(f"class weights are for logistic probes, not for {kind}; leave them out")
    if isinstance(asked, str):
        return balanced_weights
    names = [c.name for c in classes]
    if unknown := [name for name in asked if name not in names]:
        raise InputError(f"a weight came for {unknown[0]!r}; the classes are {', '.join(names)}")
    if wrong := [w for w in asked.values() if not w > 0]:
        raise InputError(f"a class weight is {wrong[0]:g}; wanted more than 0")
    given = torch.tensor([float(asked.get(name, 1.0)) for name in names])
    return lambda counts: given


def _as_features(features: np.ndarray | Tensor) -> Float[Tensor, "n d"]:
    x = torch.as_tensor(features)
    if x.ndim != 2 or not len(x):
        raise InputError(f"features are {list(x.shape)}; wanted one row per sample, [n, D] with n above 0")
    # Not every accelerator has float64.
    x = x.detach().to(x.device if x.is_cuda else "cpu").to(torch.float64)
    broken = int((~x.isfinite()).any(1).sum())
    if broken:
        raise InputError(f"{broken} of {len(x)} feature rows hold NaN or infinity; drop the samples without data first")
    return x


def _as_answers(
    targets: np.ndarray | Tensor,
    task: Task,
    num_samples: int,
    names: Mapping[int, str] | Sequence[str] | None,
    colours: Mapping[int, tuple[int, int, int]] | Sequence[tuple[int, int, int]] | None,
) -> tuple[tuple[ProbeClass, ...], Float[Tensor, "n k"], Int[np.ndarray, " n"]]:
    """Check targets; give the classes, one-hot rows or values, and each sample's column."""
    given = np.asarray(targets.cpu() if isinstance(targets, Tensor) else targets)
    if given.shape != (num_samples,):
        raise InputError(f"targets are {list(given.shape)}; wanted [{num_samples}], one per feature row")
    if task == "values":
        if given.dtype.kind not in "iuf" or not np.isfinite(given).all():
            raise InputError("targets are not finite numbers; drop the samples without a value")
        if (given == given[0]).all():
            raise InputError(f"all {num_samples} targets are {given[0]}; a probe needs values that differ")
        return (), torch.tensor(given, dtype=torch.float64)[:, None], np.zeros(num_samples, np.int64)
    if given.dtype.kind not in "iub" or given.min() < 0:
        raise InputError("targets are not class codes; wanted integers from 0, with the classes' names in names")
    codes, label = np.unique(given.astype(np.int64), return_inverse=True)
    called, coloured = _by_code(names), _by_code(colours)
    nameless = [int(c) for c in codes if called and int(c) not in called]
    unseen = [name for code, name in called.items() if code not in codes]
    if nameless:
        raise InputError(
            f"targets hold codes {nameless} that have no name among the {len(called)} given; name them all"
        )
    if unseen:
        raise InputError(f"no sample of class {', '.join(map(repr, unseen))} came; drop its name or add samples of it")
    if len(set(called.values())) < len(called):
        raise InputError(f"names are not distinct: {', '.join(called.values())}; give each code its own name")
    classes = tuple(
        ProbeClass(name=called.get(code, str(code)), code=code, colour=coloured.get(code)) for code in codes.tolist()
    )
    if len(classes) < 2:
        raise InputError(f"all {num_samples} targets are class {classes[0].name!r}; a probe needs two classes or more")
    return classes, F.one_hot(torch.tensor(label), len(codes)).to(torch.float64), label


_Item = TypeVar("_Item")


def _by_code(items: Mapping[int, _Item] | Sequence[_Item] | None) -> dict[int, _Item]:
    return dict(items if isinstance(items, Mapping) else enumerate(items or ()))


def _as_folds(
    groups: np.ndarray | None,
    split: str,
    folds: int,
    label: np.ndarray,
    names: Mapping[int, str],
    classes: Sequence[ProbeClass],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Check groups and deal the samples into folds."""
    labels = np.array([c.code for c in classes])[label] if classes else label
    if split == "random":
        return np.arange(len(label)), splits.split_at_random(labels, folds=folds, names=names, seed=seed)
    if groups is None:
        raise InputError(
            "no groups came for a split by blocks; give groups=spatial_blocks(xy, block_m), "
            "or ask for split='random' and expect scores that flatter"
        )
    if np.shape(groups) != label.shape:
        raise InputError(f"groups are {list(np.shape(groups))}; wanted [{len(label)}], one per feature row")
    return groups, splits.split_by_group(groups, labels, folds=folds, names=names, seed=seed)


def _fit(
    kind: Kind,
    x: Float[Tensor, "n d"],
    answers: Float[Tensor, "n k"],
    label: Int[Tensor, " n"],
    train: Bool[Tensor, "f n"],
    settings: Sequence[float],
    weigh: Weigh = _alike,
) -> tuple[list[list[dict[str, Tensor]]], bool]:
    """Fit one probe per training set and setting; False beside them where an optimisation did not converge."""
    if kind == "knn":
        unit = F.normalize(x, dim=-1, eps=1e-8)
        return [[{"examples": unit[t], "answers": answers[t]}] for t in train], True
    bases = [Basis.of(x[t]) for t in train]
    strengths = torch.tensor(settings, dtype=torch.float64, device=x.device)
    if kind == "ridge":
        solved, settled = (
            torch.stack([ridge(x, answers, t, b, strengths) for t, b in zip(train, bases, strict=True)]),
            True,
        )
    else:
        step = max(1, _LOGITS // (len(x) * answers.shape[1] * len(train)))
        counts = [label[t].bincount(minlength=answers.shape[1]).cpu().numpy() for t in train]
        weight = torch.stack([weigh(c).to(x)[label] * t for c, t in zip(counts, train, strict=True)])
        weight = weight / train.sum(1, keepdim=True)
        parts = [
            softmax_regression(x, label, answers.shape[1], train, weight, bases, part) for part in strengths.split(step)
        ]
        solved, settled = torch.cat([p[0] for p in parts], dim=1), all(p[1] for p in parts)
    return [
        [{"mean": b.mean, "scale": b.scale, "weight": w[:-1], "bias": w[-1]} for w in by_strength]
        for b, by_strength in zip(bases, solved, strict=True)
    ], settled
