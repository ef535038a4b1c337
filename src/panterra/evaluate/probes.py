"""What a frozen model's features say, learned from a few labels."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.evaluate import metrics, splits
from panterra.evaluate.class_weights import ClassWeights, balanced_weights
from panterra.evaluate.metrics import Interval

Kind = Literal["logistic", "ridge", "knn"]
Task = Literal["classes", "values"]
Array = TypeVar("Array", np.ndarray, Tensor)
Weigh = Callable[[Int[np.ndarray, " k"]], Float[Tensor, " k"]]
"""From the number of samples of each class in a training set to how much one of them counts."""

STRENGTHS = tuple(float(s) for s in np.logspace(-1, 4, 9))
"""Weights of the L2 penalty beside the summed loss, for standardised features: scikit-learn's alpha, and its 1 / C."""
NEIGHBOURS = 20
TEMPERATURE = 0.07
"""Of the neighbours' weights exp(cosine / temperature), as in the published kNN evaluation."""
_ROWS = 2**14
_SIMILARITIES = 2**25
_LOGITS = 2**25
_ITERATIONS = 1000
_EXCESS = 1e-6
"""Of an objective above its minimum, as a share of it."""
_STEEP = 1e-5
"""Of the largest entry of a gradient; a tenth of scikit-learn's default."""
_MEMORY = 10
_SHORTENINGS = 30
_LINEAR = ("mean", "scale", "weight", "bias")
_TENSORS: dict[Kind, tuple[str, ...]] = {"logistic": _LINEAR, "ridge": _LINEAR, "knn": ("examples", "answers")}
_FILES = {"config.json", "model.safetensors"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeClass:
    """One answer that a probe can give."""

    name: str
    code: int
    """The number that stands for it in targets, predictions and maps."""
    colour: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSource:
    """How the features were made, so that a map can make the same ones."""

    encoder: str
    """A released name or a folder."""
    patch_m: float
    modalities: tuple[str, ...]
    window_px: int
    statistics: Mapping[str, Any] = field(default_factory=dict)
    """By what the encoder standardised, in its own words; empty where it has nothing to fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassReport:
    """How well one class is found; figures are NaN where undefined."""

    name: str
    support: int
    precision: Interval
    recall: Interval
    f1: Interval
    iou: Interval


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """What a probe scores on samples that it was not fitted on.

    Each sample is predicted by a probe fitted on the other folds, at the strength that did best on the other folds.
    Intervals come from resampling whole groups, or single samples when the split was random.
    """

    kind: Kind
    task: Task
    split: Literal["blocks", "random"]
    num_samples: int
    num_groups: int
    """Spatial blocks, or samples when the split was random."""
    block_m: float | None
    fold_sizes: tuple[int, ...]
    strengths: tuple[float, ...]
    """What was tried: weights of the L2 penalty, or numbers of neighbours."""
    losses: tuple[float, ...]
    """Mean out-of-fold loss at each strength: cross-entropy (logistic) or squared error, as classes weigh."""
    strength: float
    """What the final probe was fitted with, on all samples."""
    converged: bool
    """False where an optimisation stopped before its gradient vanished."""
    metrics: dict[str, Interval]
    classes: tuple[ClassReport, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Rows are the true classes, columns the predicted ones; empty for values."""
    resamples: int
    seed: int
    class_weights: tuple[float, ...] = ()
    """How much a sample of each class counted in the final fit; empty where all count alike."""
    predictions: np.ndarray = field(repr=False)
    """Out-of-fold prediction of each sample: a class code or a value."""
    folds: np.ndarray = field(repr=False)
    """The fold in which each sample was tested."""

    def as_dict(self) -> dict[str, Any]:
        """Give everything but the arrays per sample as plain JSON; undefined figures are None."""
        plain = {name: value for name, value in asdict(self).items() if name not in ("predictions", "folds")}
        return {name: _plain(value) for name, value in plain.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """A fitted map from features to classes or values."""

    kind: Kind
    task: Task
    classes: tuple[ProbeClass, ...]
    """In the order of the columns of `probabilities`; empty for values."""
    tensors: Mapping[str, Tensor]
    """float32. logistic, ridge: mean, scale [D], weight [D, K], bias [K]. knn: unit examples [N, D], answers [N, K]."""
    neighbours: int = NEIGHBOURS
    """Used by knn alone."""
    source: FeatureSource | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    """`Report.as_dict()` of the fit."""

    @property
    def dim(self) -> int:
        """D, the width of the features it takes."""
        return self.tensors["examples"].shape[1] if self.kind == "knn" else self.tensors["weight"].shape[0]

    def predict(self, features: Array) -> Array:
        """Turn features [..., D] into class codes (int64) or values (float32), [...]; numpy or torch, as it came."""
        scores = self._scores(features)
        if self.task == "values":
            answer = scores[..., 0]
        else:
            codes = torch.tensor([c.code for c in self.classes], device=scores.device)
            answer = codes[scores.argmax(-1)]
        return answer.numpy() if isinstance(features, np.ndarray) else answer

    def probabilities(self, features: Array) -> Array:
        """Turn features [..., D] into class shares that sum to one, [..., K]; they are not calibrated."""
        if self.task == "values":
            raise InputError("a probe of values has no class probabilities; use predict")
        scores = self._scores(features)
        return scores.numpy() if isinstance(features, np.ndarray) else scores

    def _scores(self, features: np.ndarray | Tensor) -> Float[Tensor, "... k"]:
        given = torch.as_tensor(features)
        if given.ndim == 0 or given.shape[-1] != self.dim:
            raise InputError(
                f"features are {list(given.shape)}; this probe wants [..., {self.dim}]: use its own encoder"
            )
        tensors = {name: tensor.to(given.device) for name, tensor in self.tensors.items()}
        scores = _score_in_parts(self.kind, self.task, tensors, given.reshape(-1, self.dim), self.neighbours)
        return scores.reshape(*given.shape[:-1], scores.shape[-1])

    def save(self, folder: str | Path) -> Path:
        """Write `config.json` and `model.safetensors` as a whole folder, in place of an older probe of that name."""
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or {entry.name for entry in folder.iterdir()} - _FILES):
            raise InputError(f"{folder} exists and is more than a probe; choose another name or move it away")
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            fresh.chmod(0o755)
            text = json.dumps(self._config(), indent=2, allow_nan=False)
            (fresh / "config.json").write_text(text + "\n", encoding="utf-8")
            save_file({name: t.cpu().contiguous() for name, t in self.tensors.items()}, fresh / "model.safetensors")
            if folder.exists():
                shutil.rmtree(folder)
            fresh.rename(folder)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        return folder

    def _config(self) -> dict[str, Any]:
        source = asdict(self.source) if self.source else dict.fromkeys(FeatureSource.__dataclass_fields__)
        return {
            "panterra": version("panterra"),
            "kind": self.kind,
            "task": self.task,
            "dim": self.dim,
            "neighbours": self.neighbours,
            "classes": [asdict(c) for c in self.classes],
            **source,
            "report": dict(self.summary),
        }


def load_probe(folder: str | Path) -> Probe:
    """Read a probe that `Probe.save` wrote; a damaged folder raises InputError."""
    folder = Path(folder)
    missing = sorted(name for name in _FILES if not (folder / name).is_file())
    if missing:
        raise InputError(f"{folder} is not a saved probe: {' and '.join(missing)} missing; give the folder of a probe")
    try:
        return _parse(json.loads((folder / "config.json").read_text("utf-8")), load_file(folder / "model.safetensors"))
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise InputError(f"{folder} is a damaged probe ({why}); fit and save it again") from None


def _parse(config: dict[str, Any], tensors: dict[str, Tensor]) -> Probe:
    """Build a probe from its files; raises ValueError or KeyError where they contradict each other."""
    kind, task = config["kind"], config["task"]
    if kind not in get_args(Kind) or task not in get_args(Task):
        raise ValueError(f"unknown kind {kind!r} or task {task!r}")
    classes = tuple(
        ProbeClass(
            name=str(c["name"]), code=int(c["code"]), colour=None if c["colour"] is None else _colour(c["colour"])
        )
        for c in config["classes"]
    )
    source = None
    if config["encoder"] is not None:
        source = FeatureSource(
            encoder=str(config["encoder"]),
            patch_m=float(config["patch_m"]),
            modalities=tuple(config["modalities"]),
            window_px=int(config["window_px"]),
            statistics=dict(config.get("statistics") or {}),  # absent in probes of version 0.1
        )
    if set(tensors) != set(_TENSORS[kind]):
        raise ValueError(f"tensors {sorted(tensors)} instead of {sorted(_TENSORS[kind])}")
    dim, width = int(config["dim"]), len(classes) if task == "classes" else 1
    shapes = {"mean": (dim,), "scale": (dim,), "weight": (dim, width), "bias": (width,)}
    if kind == "knn":
        num = len(tensors["examples"])
        if not 0 < int(config["neighbours"]) <= num:
            raise ValueError(f"{config['neighbours']} neighbours among {num} examples")
        shapes = {"examples": (num, dim), "answers": (num, width)}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name] or tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite float32 {list(shapes[name])}")
    return Probe(
        kind=kind,
        task=task,
        classes=classes,
        tensors=tensors,
        neighbours=int(config["neighbours"]),
        source=source,
        summary=config["report"],
    )


def _colour(value: Sequence[int]) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in value)
    return red, green, blue


def _plain(value: Any) -> Any:
    """Turn tuples into lists and undefined numbers into None, as JSON wants it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def knn_scores(
    examples: Float[Tensor, "n d"],
    answers: Float[Tensor, "n k"],
    queries: Float[Tensor, "m d"],
    *,
    neighbours: int = NEIGHBOURS,
    skip_first: bool = False,
) -> Float[Tensor, "m k"]:
    """Average the answers of the most similar examples, weighted by exp(cosine / 0.07).

    One-hot answers give class shares; several ones per row (multilabel) give the share of each label, which is met
    above one half; values give their weighted mean. With `skip_first` the nearest example, the query itself, is left
    out. Memory grows with m * n: `Probe.predict` cuts queries into parts.
    """
    others = len(examples) - skip_first
    if not 0 < neighbours <= others:
        raise InputError(f"{neighbours} neighbours were asked for among {others} samples; ask for 1 to {others}")
    cosine = F.normalize(queries, dim=-1, eps=1e-8) @ F.normalize(examples, dim=-1, eps=1e-8).mT
    nearest, index = cosine.topk(neighbours + skip_first)
    weight = (nearest[:, int(skip_first) :] / TEMPERATURE).exp()
    sums = torch.einsum("mn,mnk->mk", weight, answers[index[:, int(skip_first) :]])
    return sums / weight.sum(1, keepdim=True)


def _score(
    kind: Kind, task: Task, tensors: Mapping[str, Tensor], rows: Float[Tensor, "m d"], neighbours: int
) -> Float[Tensor, "m k"]:
    """Give class shares or values of standardised or unit rows."""
    if kind == "knn":
        return knn_scores(tensors["examples"], tensors["answers"], rows, neighbours=neighbours)
    scores = (rows - tensors["mean"]) / tensors["scale"] @ tensors["weight"] + tensors["bias"]
    if task == "values":
        return scores
    if kind == "logistic":
        return scores.softmax(-1)
    # Regressed on 0 and 1 the scores are shares that sum to one already, but for what lies outside.
    shares = scores.clamp_min(0)
    return shares / shares.sum(-1, keepdim=True)


def _score_in_parts(
    kind: Kind, task: Task, tensors: Mapping[str, Tensor], rows: Float[Tensor, "m d"], neighbours: int
) -> Float[Tensor, "m k"]:
    """Score rows, as many at a time as memory allows."""
    like = tensors["examples" if kind == "knn" else "weight"]
    step = max(1, min(_ROWS, _SIMILARITIES // len(like))) if kind == "knn" else _ROWS
    scores = []
    for part in rows.split(step):
        if not part.isfinite().all():
            raise InputError("features hold NaN or infinity; predict only where there is data")
        scores.append(_score(kind, task, tensors, part.to(like.dtype), neighbours))
    return torch.cat(scores)


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
            scores[s, held] = _score_in_parts(kind, task, tensors, x[held], neighbours)
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
    figures, per_class, conf = _figures(task, label, answers.cpu().numpy(), predicted, classes, units, resamples, seed)
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
    x = x.detach().to("cuda" if x.is_cuda else "cpu").to(torch.float64)
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


def _figures(
    task: Task,
    label: np.ndarray,
    answers: np.ndarray,
    predicted: np.ndarray,
    classes: Sequence[ProbeClass],
    units: np.ndarray | None,
    resamples: int,
    seed: int,
) -> tuple[dict[str, Interval], tuple[ClassReport, ...], tuple[tuple[int, ...], ...]]:
    """Score out-of-fold predictions, with intervals over whole units (or single samples where there are none)."""
    if task == "values":
        rows = np.arange(len(label)) if units is None else units
        sums = metrics.moments(answers[:, 0], predicted, groups=rows)
        drawn = metrics.resample(sums, n=resamples, seed=seed)
        by_value = {"r2": metrics.r2, "rmse": metrics.rmse, "mae": metrics.mae}
        return {name: Interval.of(f(sums.sum(0)), f(drawn)) for name, f in by_value.items()}, (), ()
    conf = metrics.confusion(label, predicted, len(classes))
    if units is None:
        drawn = metrics.resample_samples(conf, n=resamples, seed=seed)
    else:
        blocks = metrics.confusion(label, predicted, len(classes), groups=units)
        drawn = metrics.resample(blocks, n=resamples, seed=seed)
    by_class = {
        "accuracy": metrics.accuracy,
        "macro_accuracy": metrics.macro_accuracy,
        "macro_f1": metrics.macro_f1,
        "mean_iou": metrics.mean_iou,
    }
    figures = {name: Interval.of(f(conf), f(drawn)) for name, f in by_class.items()}
    one, many = metrics.per_class(conf), metrics.per_class(drawn)
    table = tuple(
        ClassReport(
            name=c.name,
            support=int(one["support"][k]),
            **{f: Interval.of(one[f][k], many[f][:, k]) for f in ("precision", "recall", "f1", "iou")},
        )
        for k, c in enumerate(classes)
    )
    return figures, table, tuple(tuple(row) for row in conf.tolist())


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
    bases = [_Basis.of(x[t]) for t in train]
    strengths = torch.tensor(settings, dtype=torch.float64, device=x.device)
    if kind == "ridge":
        solved, settled = (
            torch.stack([_ridge(x, answers, t, b, strengths) for t, b in zip(train, bases, strict=True)]),
            True,
        )
    else:
        step = max(1, _LOGITS // (len(x) * answers.shape[1] * len(train)))
        counts = [label[t].bincount(minlength=answers.shape[1]).cpu().numpy() for t in train]
        weight = torch.stack([weigh(c).to(x)[label] * t for c, t in zip(counts, train, strict=True)])
        weight = weight / train.sum(1, keepdim=True)
        parts = [_logistic(x, label, answers.shape[1], train, weight, bases, part) for part in strengths.split(step)]
        solved, settled = torch.cat([p[0] for p in parts], dim=1), all(p[1] for p in parts)
    return [
        [{"mean": b.mean, "scale": b.scale, "weight": w[:-1], "bias": w[-1]} for w in by_strength]
        for b, by_strength in zip(bases, solved, strict=True)
    ], settled


@dataclass(frozen=True, slots=True, kw_only=True)
class _Basis:
    """One training set's features standardised, and the principal axes of that."""

    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    axes: Float[Tensor, "d r"]
    variances: Float[Tensor, " r"]

    @classmethod
    def of(cls, rows: Float[Tensor, "m d"]) -> _Basis:
        mean, scale = rows.mean(0), rows.std(0, correction=0)
        scale = torch.where(scale > 1e-10 * mean.abs(), scale, 1.0)
        z = (rows - mean) / scale
        m, d = z.shape
        if m >= d:
            variances, axes = torch.linalg.eigh(z.mT @ z / m)
            return cls(mean=mean, scale=scale, axes=axes, variances=variances.clamp_min(0))
        variances, weights = torch.linalg.eigh(z @ z.mT / m)
        kept = variances > 1e-12 * variances[-1]
        axes = z.mT @ (weights[:, kept] / (m * variances[kept]).sqrt())
        return cls(mean=mean, scale=scale, axes=axes, variances=variances[kept])


def _ridge(
    x: Float[Tensor, "n d"],
    answers: Float[Tensor, "n k"],
    train: Bool[Tensor, " n"],
    basis: _Basis,
    strengths: Float[Tensor, " s"],
) -> Float[Tensor, "s d+1 k"]:
    """Solve least squares with an L2 penalty at every strength from one set of principal axes; last row is the bias."""
    z, wanted = (x[train] - basis.mean) / basis.scale, answers[train]
    bias = wanted.mean(0)
    along = basis.axes.mT @ (z.mT @ (wanted - bias)) / len(z)
    shrunk = along / (basis.variances[:, None] + strengths[:, None, None] / len(z))
    return torch.cat([basis.axes @ shrunk, bias.expand(len(strengths), 1, -1)], dim=1)


def _logistic(
    x: Float[Tensor, "n d"],
    label: Int[Tensor, " n"],
    num_classes: int,
    train: Bool[Tensor, "f n"],
    weight: Float[Tensor, "f n"],
    bases: Sequence[_Basis],
    strengths: Float[Tensor, " s"],
) -> tuple[Float[Tensor, "f s d+1 k"], bool]:
    """Solve softmax regression for all training sets and strengths in one batched L-BFGS; last row is the bias.

    All problems share the features, so that a step of all of them is one matrix product. Each has its own line search,
    which runs on logits alone, and its own stopping test, and leaves the batch when it has converged.
    """
    problems = _Problems(
        x=x,
        label=label,
        weight=weight,
        bases=bases,
        variances=nn.utils.rnn.pad_sequence([b.variances for b in bases], batch_first=True),
        fold=torch.arange(len(train), device=x.device).repeat_interleave(len(strengths)),
        strength=(strengths / train.sum(1, keepdim=True)).flatten(),
    )
    num_problems = len(problems.fold)
    theta = x.new_zeros(num_problems, num_classes, problems.variances.shape[1] + 1)
    logits = x.new_zeros(len(x), num_classes, num_problems)
    fit = problems.fit(logits)
    gradient = problems.gradient(fit.residual, theta)
    solved, running = theta.clone(), torch.arange(num_problems, device=x.device)
    history: list[tuple[Tensor, Tensor]] = []
    for _ in range(_ITERATIONS):
        unsettled = problems.unsettled(theta, fit, gradient)
        if not unsettled.any():
            break
        if unsettled.double().mean() < 0.75:
            problems, fit, logits = problems.keep(unsettled), fit.keep(unsettled), logits[..., unsettled]
            running, theta, gradient = running[unsettled], theta[unsettled], gradient[unsettled]
            history = [(step[unsettled], change[unsettled]) for step, change in history]
        direction = _lbfgs_direction(problems, fit, gradient, history)
        step, logits, fit = _line_search(problems, theta, direction, logits, fit, gradient)
        theta = theta + step
        solved[running] = theta
        previous, gradient = gradient, problems.gradient(fit.residual, theta)
        history = [*history[1 - _MEMORY :], (step, gradient - previous)]
    settled = not problems.unsettled(theta, fit, gradient).any()
    by_fold = solved.unflatten(0, (len(train), len(strengths))).mT
    weights = [
        torch.cat([b.axes @ t[:, : b.axes.shape[1]], t[:, -1:]], dim=1) for b, t in zip(bases, by_fold, strict=True)
    ]
    return torch.stack(weights), settled


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """How P softmax regressions fit their training sets."""

    loss: Float[Tensor, " p"]
    """Mean cross-entropy."""
    residual: Float[Tensor, "n k p"]
    """Its derivative by the logits."""
    curvature: Float[Tensor, " p"]
    """Its second derivative by a logit, averaged over samples and classes."""

    def keep(self, which: Bool[Tensor, " p"]) -> _Fit:
        return _Fit(loss=self.loss[which], residual=self.residual[..., which], curvature=self.curvature[which])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problems:
    """P softmax regressions on the same features.

    Parameters [P, K, R + 1] belong to the principal axes of each training set's standardised features, with the bias
    last: there the penalty is the same and the curvature nearly diagonal. In what has a row per sample P stands last,
    which lets the processor take several problems at a time.
    """

    x: Float[Tensor, "n d"]
    label: Int[Tensor, " n"]
    weight: Float[Tensor, "f n"]
    """A sample's weight over the size of the training set, or zero outside it."""
    bases: Sequence[_Basis]
    variances: Float[Tensor, "f r"]
    """Those of the bases, padded with zeros to one length."""
    fold: Int[Tensor, " p"]
    strength: Float[Tensor, " p"]
    """Of the penalty beside the mean loss."""

    def keep(self, which: Bool[Tensor, " p"]) -> _Problems:
        return replace(self, fold=self.fold[which], strength=self.strength[which])

    def logits(self, theta: Float[Tensor, "p k r+1"]) -> Float[Tensor, "n k p"]:
        slopes, bias = self.x.new_empty(*theta.shape[:2], self.x.shape[1]), theta[..., -1].clone()
        for f, basis in enumerate(self.bases):
            mine, rank = self.fold == f, len(basis.variances)
            slopes[mine] = theta[mine, :, :rank] @ (basis.axes.mT / basis.scale)
            bias[mine] -= slopes[mine] @ basis.mean
        product: Tensor = (self.x @ slopes.permute(2, 1, 0).flatten(1)).unflatten(1, bias.mT.shape)
        return product.add_(bias.mT)

    def fit(self, logits: Float[Tensor, "n k p"]) -> _Fit:
        sample, weight = torch.arange(len(logits), device=logits.device), self.weight[self.fold].mT
        highest = logits.amax(1, keepdim=True)
        share = (logits - highest).exp_()
        total = share.sum(1, keepdim=True)
        missed = (total.log() + highest)[:, 0] - logits[sample, self.label]
        share.div_(total)
        curvature = (1 - share.square().sum(1)) / logits.shape[1]
        share[sample, self.label] -= 1
        return _Fit(
            loss=(missed * weight).sum(0),
            residual=share.mul_(weight[:, None]),
            curvature=(curvature * weight).sum(0),
        )

    def gradient(self, residual: Float[Tensor, "n k p"], theta: Float[Tensor, "p k r+1"]) -> Float[Tensor, "p k r+1"]:
        product = (self.x.mT @ residual.flatten(1)).unflatten(1, residual.shape[1:]).permute(2, 1, 0)
        out = self.strength[:, None, None] * theta
        out[..., -1] = residual.sum(0).mT
        for f, basis in enumerate(self.bases):
            mine, rank = self.fold == f, len(basis.variances)
            centred = product[mine] - out[mine, :, -1:] * basis.mean
            out[mine, :, :rank] += centred @ (basis.axes / basis.scale[:, None])
        return out

    def penalty(self, a: Float[Tensor, "p k r+1"], b: Float[Tensor, "p k r+1"]) -> Float[Tensor, " p"]:
        return self.strength * _dot(a[..., :-1], b[..., :-1]).flatten()

    def unsettled(
        self, theta: Float[Tensor, "p k r+1"], fit: _Fit, gradient: Float[Tensor, "p k r+1"]
    ) -> Bool[Tensor, " p"]:
        """Say which problems may still be far from their minimum.

        An objective with penalty strength s is at most |gradient|^2 / 2 s above its minimum.
        """
        objective = fit.loss + self.penalty(theta, theta) / 2
        excess = self.penalty(gradient, gradient) / (2 * self.strength**2)
        return (excess > _EXCESS * objective) | (gradient.abs().amax((1, 2)) > _STEEP)

    def precondition(self, gradient: Float[Tensor, "p k r+1"], fit: _Fit) -> Float[Tensor, "p k r+1"]:
        """Apply the inverse Hessian as it would be, did every sample and class have the average curvature.

        It spares badly conditioned features, as embeddings are, hundreds of iterations.
        """
        average = fit.curvature.clamp_min(1e-12)[:, None]
        hessian = torch.cat([average * self.variances[self.fold] + self.strength[:, None], average], dim=1)
        return gradient / hessian[:, None]


def _dot(a: Float[Tensor, "p k r"], b: Float[Tensor, "p k r"]) -> Float[Tensor, "p 1 1"]:
    return (a * b).sum((1, 2), keepdim=True)


def _lbfgs_direction(
    problems: _Problems, fit: _Fit, gradient: Float[Tensor, "p k r"], history: Sequence[tuple[Tensor, Tensor]]
) -> Float[Tensor, "p k r"]:
    """Guess the way to each minimum from past steps and the changes of gradient that they brought."""
    rates = [_dot(step, change).clamp_min(1e-300).reciprocal() for step, change in history]
    rest, used = gradient, []
    for (step, change), rate in zip(reversed(history), reversed(rates), strict=True):
        used.append(rate * _dot(step, rest))
        rest = rest - used[-1] * change
    direction = problems.precondition(rest, fit)
    if history:
        change = history[-1][1]
        scale = rates[-1] * _dot(change, problems.precondition(change, fit))
        direction = direction / scale.clamp_min(1e-300)
    for (step, change), rate, u in zip(history, rates, reversed(used), strict=True):
        direction = direction + (u - rate * _dot(change, direction)) * step
    return -direction


def _line_search(
    problems: _Problems,
    theta: Float[Tensor, "p k r"],
    direction: Float[Tensor, "p k r"],
    logits: Float[Tensor, "n k p"],
    fit: _Fit,
    gradient: Float[Tensor, "p k r"],
) -> tuple[Float[Tensor, "p k r"], Float[Tensor, "n k p"], _Fit]:
    """Shorten each problem's step until its objective falls enough; give the steps, and logits and fit there."""
    along = problems.logits(direction)
    slope = _dot(gradient, direction).flatten()
    linear, square = problems.penalty(theta, direction), problems.penalty(direction, direction)
    size = torch.ones_like(slope)
    for _ in range(_SHORTENINGS):
        there = torch.addcmul(logits, along, size)
        found = problems.fit(there)
        change = found.loss - fit.loss + size * linear + size**2 * square / 2
        short = change > 1e-4 * size * slope + 1e-14 * fit.loss
        if not short.any():
            break
        # The minimum of the parabola through what is known.
        size = torch.where(short, size * (-slope * size / (2 * (change - slope * size))).clamp(0.1, 0.5), size)
    return size[:, None, None] * direction, there, found
