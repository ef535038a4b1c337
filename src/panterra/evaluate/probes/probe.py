"""A fitted probe: what it says of features, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from panterra.errors import InputError
from panterra.files import saving_tensors, unfinished_folder

Kind = Literal["logistic", "ridge", "knn"]
Task = Literal["classes", "values"]
Array = TypeVar("Array", np.ndarray, Tensor)

NEIGHBOURS = 20
TEMPERATURE = 0.07
"""Of the neighbours' weights exp(cosine / temperature), as in the published kNN evaluation."""
_ROWS = 2**14
_SIMILARITIES = 2**25
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
        scores = score_in_parts(self.kind, self.task, tensors, given.reshape(-1, self.dim), self.neighbours)
        return scores.reshape(*given.shape[:-1], scores.shape[-1])

    def save(self, folder: str | Path) -> Path:
        """Write `config.json` and `model.safetensors` as a whole folder, in place of an older probe of that name."""
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or {entry.name for entry in folder.iterdir()} - _FILES):
            raise InputError(f"{folder} exists and is more than a probe; choose another name or move it away")
        with unfinished_folder(folder) as fresh:
            text = json.dumps(self._config(), indent=2, allow_nan=False)
            (fresh / "config.json").write_text(text + "\n", encoding="utf-8")
            with saving_tensors(folder):
                save_file({name: t.cpu().contiguous() for name, t in self.tensors.items()}, fresh / "model.safetensors")
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
    # Half precision knows no number like exp(1 / 0.07).
    dtype = torch.promote_types(torch.promote_types(examples.dtype, queries.dtype), torch.float32)
    examples, answers, queries = examples.to(dtype), answers.to(dtype), queries.to(dtype)
    cosine = F.normalize(queries, dim=-1, eps=1e-8) @ F.normalize(examples, dim=-1, eps=1e-8).mT
    nearest, index = cosine.topk(neighbours + skip_first)
    weight = (nearest[:, int(skip_first) :] / TEMPERATURE).exp()
    sums = torch.einsum("mn,mnk->mk", weight, answers[index[:, int(skip_first) :]])
    return sums / weight.sum(1, keepdim=True)


def score(
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


def score_in_parts(
    kind: Kind, task: Task, tensors: Mapping[str, Tensor], rows: Float[Tensor, "m d"], neighbours: int
) -> Float[Tensor, "m k"]:
    """Score rows, as many at a time as memory allows."""
    like = tensors["examples" if kind == "knn" else "weight"]
    step = max(1, min(_ROWS, _SIMILARITIES // len(like))) if kind == "knn" else _ROWS
    scores = []
    for part in rows.split(step):
        if not part.isfinite().all():
            raise InputError("features hold NaN or infinity; predict only where there is data")
        scores.append(score(kind, task, tensors, part.to(like.dtype), neighbours))
    return torch.cat(scores)
