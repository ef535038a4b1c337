"""An encoder with a head: what fine-tuning makes, and what `map` takes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.evaluate.probes import FeatureSource, ProbeClass
from panterra.files import saving_tensors, unfinished_folder
from panterra.finetune.boxes import first_guess
from panterra.finetune.heads import HeadConfig, build_head
from panterra.finetune.pairs import PARTS, Periods, compare, pair_up
from panterra.finetune.tasks import Task, task_of
from panterra.imagery.stac import Scene
from panterra.models.features import Encoder, Features
from panterra.models.filling import fill_up, ground_m
from panterra.models.sub_patches import divided, encode_sub_patches
from panterra.models.weights import MODELS, Model, load_model, save_model, weights_checksum
from panterra.plain import as_plain
from panterra.sample import Batch

FORMAT = "panterra-finetuned-1"
FILES = ("config.json", "model.safetensors")
ENCODER = "encoder"
"""Folder of the encoder, which `load_model` opens too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What the training started from."""

    name: str
    licence: str | None
    terms: str = ""

    @classmethod
    def of(cls, encoder: Encoder) -> Base:
        """Note where an encoder came from and what may be done with its weights."""
        card = MODELS.get(encoder.name)
        licence = getattr(encoder, "licence", None)
        # Terms are those of published weights; architectures drawn at random have none.
        return cls(name=encoder.name, licence=licence, terms=card.terms if card and licence else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a fine-tuned model is shown and what it answers; plain numbers and names alone."""

    task: str
    head: HeadConfig
    classes: tuple[ProbeClass, ...]
    """In the order of the scores; empty for values."""
    modalities: tuple[str, ...]
    patch_m: float
    window_px: int
    """Side of a training sample in pixels of the common grid; a map's windows are as large."""
    pixel_m: float = 10.0
    """Of the common grid."""
    centre: float = 0.0
    spread: float = 1.0
    """Values are the head's output times `spread` plus `centre`; boxes have a side of about exp(centre) cells."""
    sub_patches: str | None = None
    """The modality whose sub-patches the head looks at, for encoders that have them; None: at patches."""
    parts: int = 1
    """How many of these lie along a patch."""
    skip: str | None = None
    """The modality whose pixels the head also looks at."""
    pairs: bool = False
    """Whether it compares two periods; the head takes both embeddings and their difference."""
    periods: Periods | None = None
    """The two that a map compares unless told otherwise; None where each label had its own."""
    base: Base

    @property
    def cells(self) -> int:
        """Cells of the answer along the side of a patch."""
        return self.head.side * self.parts

    @property
    def output_m(self) -> float:
        """Side of a cell of the answer in metres: of a patch's part, or of the whole sample."""
        return self.patch_m / self.cells if self.head.dense else self.window_px * self.pixel_m


def on_sub_patches(setup: Setup, encoder: Encoder, *, modality: str | None = None) -> Setup:
    """Put a head that was planned for patches onto sub-patches: of a modality, or of the finest one that suits.

    An answer's cells are sub-patches or parts of them, never larger. Raises InputError.
    """
    if not setup.head.dense:
        raise InputError(f"{setup.task} has one answer per sample, so it needs no sub-patches; leave them out")
    sides = {m: s for m, s in divided(encoder).sub_patches_m(setup.patch_m).items() if m in setup.modalities}
    if not sides or (modality is not None and modality not in sides):
        raise InputError(f"{modality or 'nothing'} of {', '.join(setup.modalities)} has sub-patches; leave them out")
    parts = {m: round(setup.patch_m / s) for m, s in sides.items() if modality in (None, m)}
    able = {m: n for m, n in parts.items() if setup.head.side % n == 0}
    if not able:
        found = ", ".join(f"{m} of {sides[m]:g} m" for m in parts)
        raise InputError(
            f"cells of {setup.output_m:g} m came for the sub-patches of {found}, which are no whole number of them; "
            "ask for smaller cells, or leave the sub-patches out"
        )
    chosen = max(able, key=lambda m: able[m])
    if setup.skip is not None and setup.head.side == able[chosen]:
        raise InputError(
            f"cells of {setup.output_m:g} m are the sub-patches themselves, so no step of the decoder would look at "
            "the pixels; leave out skip, or ask for smaller cells"
        )
    width = divided(encoder).dense_dim * (PARTS if setup.pairs else 1)
    head = replace(setup.head, dim=width, side=setup.head.side // able[chosen])
    return replace(setup, head=head, sub_patches=chosen, parts=able[chosen])


class FineTuned(nn.Module):
    """An encoder whose features are scores on the grid of the answer, with the way to read them.

    As an `Encoder` it is tiled, blended and resumed by `map` as any other; like a probe it turns blended scores into
    classes or values.
    """

    skip_mean: Tensor
    skip_std: Tensor

    def __init__(self, encoder: Encoder, setup: Setup, *, name: str = "fine-tuned") -> None:
        super().__init__()
        width = (divided(encoder).dense_dim if setup.sub_patches else encoder.dim) * (PARTS if setup.pairs else 1)
        if width != setup.head.dim:
            raise InputError(f"the head takes features of width {setup.head.dim}; {encoder.name} gives {width}")
        if not isinstance(encoder, nn.Module):
            raise InputError(f"{encoder.name} is not a torch module, so it cannot be trained; fit a probe instead")
        self.encoder = encoder
        self.head = build_head(setup.head)
        self.setup, self.name, self.summary = setup, name, dict[str, Any]()
        self.register_buffer("skip_mean", torch.zeros(setup.head.skip_bands))
        self.register_buffer("skip_std", torch.ones(setup.head.skip_bands))

    @property
    def task_kind(self) -> Task:
        """The row of `TASKS`."""
        return task_of(self.setup.task)

    @property
    def task(self) -> str:
        """Whether a map of it holds "classes" or "values"; of "boxes" there is a list instead."""
        answer = self.task_kind.answer
        return answer if answer in ("values", "boxes") else "classes"

    @property
    def classes(self) -> tuple[ProbeClass, ...]:
        """What the scores stand for."""
        return self.setup.classes

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it was trained to look at."""
        return self.setup.modalities

    @property
    def dim(self) -> int:
        """How many scores a cell has."""
        return self.setup.head.outputs

    @property
    def source(self) -> FeatureSource:
        """How a map is to show it a scene."""
        window = self.setup.window_px
        return FeatureSource(
            encoder=self.name, patch_m=self.setup.output_m, modalities=self.modalities, window_px=window
        )

    @property
    def overlap_px(self) -> int:
        """How far the windows of a map overlap: a quarter, in whole patches; not at all where a window is one cell."""
        if not self.setup.head.dense:
            return 0
        patch_px = round(self.setup.patch_m / self.setup.pixel_m)
        return self.setup.window_px // 4 // patch_px * patch_px

    def over(self, periods: Periods) -> FineTuned:
        """Give the same model, sharing its weights, that compares two other periods."""
        if not self.setup.pairs:
            raise InputError(f"{self.name} looks at one period, not at two; leave out before and after")
        other = copy.copy(self)
        other.setup = replace(self.setup, periods=periods)
        return other

    def narrow(self, scene: Scene) -> Scene:
        """Leave of a scene what the model looks at."""
        return self._periods.narrow(scene) if self.setup.pairs else scene

    @property
    def _periods(self) -> Periods:
        if self.setup.periods is None:
            raise InputError(f"{self.name} compares two periods; say which, with before and after")
        return self.setup.periods

    def forward(self, batch: Batch) -> Float[Tensor, "b k *grid"]:
        """Score a batch in declared units whose sides are whole patches.

        Where the model compares periods each answer takes two samples, as `pair_up` makes them; B is of the answers.
        """
        return self.scores(batch, self.features(batch))

    def features(self, batch: Batch) -> Features:
        """Embed what the encoder is to see of a batch."""
        shown = {name: o for name, o in batch.observations.items() if name in self.modalities}
        if not shown:
            raise InputError(
                f"the batch holds {', '.join(batch.observations)}; {self.name} looks at {', '.join(self.modalities)}"
            )
        encoder = cast(Encoder, self.encoder)
        seen, patch_m, modality = replace(batch, observations=shown), self.setup.patch_m, self.setup.sub_patches
        if modality is None:
            features = encoder.encode(seen, patch_m=patch_m)
        elif modality in shown:
            features = encode_sub_patches(encoder, seen, patch_m=patch_m, modality=modality)
        else:
            raise InputError(f"{self.name} looks at sub-patches of {modality}, which the batch does not have; give it")
        return compare(features) if self.setup.pairs else features

    def scores(self, batch: Batch, features: Features) -> Float[Tensor, "b k *grid"]:
        """Apply the head; values come in their own unit."""
        out: Tensor = self.head(features, self._raw(batch)).float()
        if self.task == "boxes":
            return first_guess(out, math.exp(self.setup.centre))
        return out * self.setup.spread + self.setup.centre if self.task == "values" else out

    def _raw(self, batch: Batch) -> Float[Tensor, "b c y x"] | None:
        """Average the dates of the modality that the head looks at, standardised; zeros where nothing is valid.

        Of a pair the bands before come first, then those after.
        """
        if self.setup.skip is None:
            return None
        if self.setup.skip not in batch.observations:
            raise InputError(f"{self.name} needs the pixels of {self.setup.skip}, which the batch does not have")
        o = batch.observations[self.setup.skip]
        seen = o.valid[:, :, None]
        mean = torch.where(seen, o.pixels, 0.0).sum(1) / seen.sum(1).clamp(min=1)
        known = seen.any(1).expand_as(mean)
        if self.setup.pairs:
            mean, known = (rearrange(x, "(b two) c y x -> b (two c) y x", two=2) for x in (mean, known))
        scaled = (mean - self.skip_mean[:, None, None]) / self.skip_std[:, None, None]
        return torch.where(known, scaled, 0.0)

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False) -> Features:
        """Score a batch on the grid of the answer; `patch_m` is its cell.

        `patches` are scores: of classes before softmax, of labels before the sigmoid, values as they are. Samples that
        are no whole number of patches are filled up with missing pixels. Of a model that compares periods the batch
        holds both.
        """
        cell_m = self.setup.output_m if self.setup.head.dense else _side_m(batch)
        if dense or not math.isclose(patch_m, cell_m, rel_tol=1e-6):
            raise InputError(
                f"{self.name} answers for cells of {cell_m:g} m; ask for patch_m={cell_m:g} and no dense features"
            )
        shown = pair_up(batch, self._periods) if self.setup.pairs else batch
        whole = fill_up(shown, patch_m=self.setup.patch_m)
        height, width = (round(side / self.setup.patch_m * self.setup.cells) for side in ground_m(shown))
        features = self.features(whole)
        scores = self.scores(whole, features)
        if self.setup.head.dense:
            side = self.setup.head.side
            valid = features.valid.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :height, :width]
            grid = scores.movedim(1, -1)[:, :height, :width]
        else:
            valid, grid = features.valid.flatten(1).any(1)[:, None, None], scores[:, None, None]
        grid = torch.where(valid[..., None], grid, 0.0)
        count = valid.sum((1, 2)).clamp(min=1)[:, None]
        return Features(patches=grid, summary=grid.sum((1, 2)) / count, valid=valid, patch_m=patch_m)

    def predict(self, scores: np.ndarray) -> np.ndarray:
        """Turn scores [..., K] into class codes (int64; of labels the likeliest one) or values (float32), [...]."""
        self._check(scores)
        if self.task == "values":
            return scores[..., 0].astype(np.float32)
        codes = np.array([c.code for c in self.classes])
        chosen: np.ndarray = codes[scores.argmax(-1)]
        return chosen

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Turn scores [..., K] into the share of each class, or the probability of each label, uncalibrated."""
        self._check(scores)
        if self.task == "values":
            raise InputError("a model of values has no class probabilities; use predict")
        given = torch.from_numpy(np.ascontiguousarray(scores))
        shares = given.sigmoid() if self.task_kind.answer == "labels" else given.softmax(-1)
        return shares.numpy()

    def _check(self, scores: np.ndarray) -> None:
        if self.task == "boxes":
            raise InputError(f"{self.name} finds objects, which no map of classes or values holds; use panterra detect")
        if scores.shape[-1] != self.dim:
            raise InputError(f"scores are {list(scores.shape)}; {self.name} gives [..., {self.dim}]")

    def about(self) -> dict[str, Any]:
        """Say for a map's passport what made it."""
        return {
            "kind": "fine-tuned",
            "task": self.setup.task,
            "classes": [asdict(c) for c in self.classes],
            "base": asdict(self.setup.base),
            **({"periods": asdict(self._periods)} if self.setup.pairs else {}),
            "sha256": weights_checksum(self),
        }

    def save(self, folder: str | Path, *, files: Mapping[str, str] | None = None, overwrite: bool = False) -> Path:
        """Write the model as a whole folder, with further text `files` by name."""
        folder, others = Path(folder), files or {}
        if not isinstance(self.encoder, Model):
            raise InputError(f"{cast(Encoder, self.encoder).name} is of a family that cannot be saved with its weights")
        check_free(folder, overwrite=overwrite)
        with unfinished_folder(folder) as fresh:
            save_model(self.encoder, fresh / ENCODER)
            tensors = {key: value.contiguous() for key, value in self._own_state().items()}
            with saving_tensors(folder):
                save_file(tensors, fresh / "model.safetensors")
            config = {
                "format": FORMAT,
                "panterra": version("panterra"),
                "setup": asdict(self.setup),
                "summary": self.summary,
            }
            text = json.dumps(as_plain(config), indent=1, allow_nan=False)
            for name, content in {"config.json": text + "\n", **others}.items():
                (fresh / name).write_text(content, encoding="utf-8")
        return folder

    def _own_state(self) -> dict[str, Tensor]:
        """Give the tensors that are not the encoder's."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("encoder.")}


T = TypeVar("T")


def at_periods(model: T, before: str | None, after: str | None) -> T | FineTuned:
    """Let a fine-tuned model compare these periods, where they are given; anything else looks at no two of them."""
    if before is None and after is None:
        return model
    if before is None or after is None:
        raise InputError("a comparison needs two periods; give both before and after")
    if not isinstance(model, FineTuned):
        raise InputError("a probe looks at one period, not at two; leave out before and after")
    return model.over(Periods(before=before, after=after))


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse a place where something else, or an older model that is not to be replaced, is."""
    if folder.exists() and not (folder.is_dir() and (is_finetuned(folder) or not any(folder.iterdir()))):
        raise InputError(f"{folder} exists and is no fine-tuned model; choose another name or move it away")
    if is_finetuned(folder) and not overwrite:
        raise InputError(f"{folder} is a fine-tuned model already; choose another name, or replace it with overwrite")


def is_finetuned(folder: str | Path) -> bool:
    """Tell whether a folder says that it holds a fine-tuned model."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and str(config.get("format", "")).startswith("panterra-finetuned-")


def load_finetuned(folder: str | Path, *, device: str | torch.device = "cpu") -> FineTuned:
    """Read a model that `FineTuned.save` wrote, ready for inference; a damaged folder raises InputError."""
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} is not a fine-tuned model: {' and '.join(missing)} missing; give its folder")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "format" not in config and "kind" in config:
            raise InputError(
                f"{folder} is no fine-tuned model but seems to be a probe; give a folder that panterra finetune wrote, "
                "or map with the probe"
            )
        if config["format"] != FORMAT:
            raise InputError(f"{folder} holds {config['format']!r}, which this version cannot read; update panterra")
        setup = _parse(config["setup"])
        tensors = load_file(folder / "model.safetensors")
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OSError, SafetensorError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise InputError(f"{folder} is a damaged model ({why}); copy or train it again") from None
    model = FineTuned(load_model(folder / ENCODER), setup, name=str(folder.resolve()))
    wanted = {key: value.shape for key, value in model._own_state().items()}
    found = {key: value.shape for key, value in tensors.items()}
    if wrong := sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key)):
        raise InputError(
            f"{folder} is a damaged model ({wrong[0]} of model.safetensors is {_shape(found.get(wrong[0]))}, and "
            f"config.json wants {_shape(wanted.get(wrong[0]))}); copy or train it again"
        )
    model.load_state_dict(tensors, strict=False)
    model.summary = config.get("summary", {})
    return model.to(device).eval().requires_grad_(False)


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _parse(saved: Mapping[str, Any]) -> Setup:
    classes = tuple(ProbeClass(**{**c, "colour": c["colour"] and tuple(c["colour"])}) for c in saved["classes"])
    setup = Setup(
        **{
            **saved,
            "head": HeadConfig(**saved["head"]),
            "base": Base(**saved["base"]),
            "periods": Periods(**saved["periods"]) if saved.get("periods") else None,
            "classes": classes,
            "modalities": tuple(saved["modalities"]),
        }
    )
    task_of(setup.task)
    return setup


def _side_m(batch: Batch) -> float:
    return max(ground_m(batch))
