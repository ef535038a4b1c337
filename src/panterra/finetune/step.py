"""Which parameters are trained, and how fast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from panterra.errors import InputError
from panterra.finetune.augment import Augmentation
from panterra.finetune.lora import add_lora
from panterra.finetune.model import FineTuned

Method = Literal["full", "head", "lora", "projector"]
Precision = Literal["float32", "bfloat16"]


# Loading a model freezes all of it, so what its own training leaves alone has to be named here.
NEVER_TRAINED = ("encodings.month", ".pad")
"""Ends of the names of parameters that are tables or constants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plateau:
    """Lower all rates where the validation part has not got better for more than `patience` epochs."""

    factor: float
    patience: int
    cooldown: int = 0
    """Epochs after each time in which nothing is counted."""
    watches: Literal["figure", "loss"] = "figure"
    """The figure that decides which epoch is kept, or the loss; better is so by more than a ten thousandth."""

    def share(self, figures: Sequence[float]) -> float:
        """Tell what rates are multiplied by after these figures, of which higher is better.

        As torch's ReduceLROnPlateau does.
        """
        best, bad, cooling, share = -math.inf, 0, 0, 1.0
        for figure in figures:
            if figure > best + (1e-4 * abs(best) if math.isfinite(best) else 0.0):
                best, bad = figure, 0
            else:
                bad += 1
            if cooling > 0:
                cooling, bad = cooling - 1, 0
            if bad > self.patience:
                share, cooling, bad = share * self.factor, self.cooldown, 0
        return share


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How a model is trained; each value changes the result."""

    method: Method = "full"
    """full: all weights; head: the head alone, on a frozen encoder; lora: the head and low-rank changes; projector: the
    head and what first reads each sensor's pixels (AnySat's for a new sensor)."""
    epochs: int = 50
    batch_size: int = 8
    lr: float = 1e-3
    """Peak of the head's learning rate."""
    encoder_lr: float | None = None
    """Peak in the encoder's last layer; 1e-4, or 1e-3 with LoRA, unless given."""
    layer_decay: float = 0.75
    """From each layer of the encoder to the one below; 1 trains all alike. LoRA's changes are all trained alike."""
    head_first: int = 5
    """Epochs in which the head learns alone, before the encoder moves."""
    after_head: float = 1.0
    """What all rates are multiplied by from then on."""
    frozen_drop_path: bool = False
    """Whether the encoder drops paths in the head's own epochs too, as if it were trained."""
    weight_decay: float = 0.05
    """Of matrices; biases and norms have none."""
    decay_all: bool = False
    """Whether biases and norms have it too."""
    schedule: Plateau | Literal["cosine", "epoch_cosine"] = "cosine"
    """cosine: step by step, see `warmup`; epoch_cosine: AnySat's, epoch by epoch (`sweep.rates_at`)."""
    warmup: float = 0.1
    """Share of all steps in which the rate rises, before a cosine."""
    clip_norm: float | None = 1.0
    patience: int = 10
    """Epochs without a better validation figure after which it is enough."""
    least_epochs: int = 0
    """Epochs before which it is never enough."""
    accumulate: int = 1
    """Parts that a batch is worked through in, which saves memory; each counts alike."""
    drop_last: bool = False
    """Whether an incomplete last batch of an epoch is left out."""
    draw: Literal["each", "root"] = "each"
    """each: every training sample once an epoch; root: as many, classes by the root of their frequency."""
    date_shares: Mapping[str, float] = field(default_factory=dict)
    """By modality, the share of the dates of a training sample that is shown, drawn anew each time; else all."""
    most_dates: int | None = None
    """Of a longer series of a training sample so many dates are shown, drawn anew each time."""
    rank: int = 8
    """Of LoRA."""
    alpha: float = 16.0
    """LoRA's change counts alpha / rank times."""
    class_weights: Literal["none", "balanced"] | Mapping[str, float] = "none"
    """balanced: as rare as a class is in the training part; or by class name, 1 where a name is missing."""
    loss: Literal["cross_entropy", "dice"] = "cross_entropy"
    """Of a segmentation; dice: both, the Dice loss with classes weighing by how rare they are in the training part."""
    label_smoothing: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    precision: Precision = "float32"
    """bfloat16: autocast; parameters, scores and losses stay in float32."""
    as_published: bool = False
    """As AnySat's code trains: the figure that decides is of all epochs so far, since it is never reset; incomplete
    last batches do not validate; and what stands for masked pixels of a series is learned."""
    seed: int = 42

    def __post_init__(self) -> None:
        if self.method not in ("full", "head", "lora", "projector") or self.precision not in ("float32", "bfloat16"):
            raise InputError(
                f"method is {self.method!r} and precision {self.precision!r}; wanted full, head, lora or projector, "
                "and float32 or bfloat16"
            )
        if self.loss not in ("cross_entropy", "dice"):
            raise InputError(f"loss is {self.loss!r}; wanted cross_entropy or dice")
        if min(self.epochs, self.batch_size, self.patience, self.accumulate) < 1 or self.head_first < 0:
            raise InputError("epochs, batch_size, patience and accumulate must be 1 or more, and head_first 0 or more")
        if self.draw not in ("each", "root") or not all(0 < share <= 1 for share in self.date_shares.values()):
            raise InputError(
                f"draw is {self.draw!r} and date_shares {dict(self.date_shares)}; wanted each or root, and shares "
                "above 0 and up to 1"
            )
        if self.most_dates is not None and self.most_dates < 1:
            raise InputError(f"most_dates is {self.most_dates}; give 1 or more, or None for all")
        if not 0 < self.lr < math.inf or not 0 <= self.encoder_peak < math.inf:
            raise InputError(
                f"lr is {self.lr:g} and encoder_lr {self.encoder_peak:g}; wanted a finite lr above 0 and a finite "
                "encoder_lr of 0 or more"
            )
        if not 0 < self.layer_decay <= 1 or not 0 <= self.label_smoothing < 1 or not 0 <= self.warmup < 1:
            raise InputError(
                f"layer_decay is {self.layer_decay}, label_smoothing {self.label_smoothing} and warmup {self.warmup}; "
                "wanted above 0 and up to 1, from 0 to below 1, and from 0 to below 1"
            )

    @property
    def frozen_epochs(self) -> int:
        """Epochs in which the encoder stays as it is."""
        return self.epochs if self.method == "head" else min(self.head_first, self.epochs)

    @property
    def encoder_peak(self) -> float:
        return self.encoder_lr if self.encoder_lr is not None else 1e-3 if self.method == "lora" else 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The parameters that a run trains, by their names in the model, and the peak of each one's learning rate."""

    parameters: dict[str, nn.Parameter]
    peaks: dict[str, float]

    def encoder(self) -> list[nn.Parameter]:
        """List those of the encoder."""
        return [p for name, p in self.parameters.items() if name.startswith("encoder.")]


def prepare(model: FineTuned, tuning: Tuning) -> Trained:
    """Choose what is trained, mark it so, and add LoRA's changes where asked for."""
    encoder = model.encoder
    encoder.requires_grad_(False)
    model.head.requires_grad_(True)
    peaks = {f"head.{name}": tuning.lr for name, _ in model.head.named_parameters()}
    if tuning.method == "full":
        scales = layer_scales(encoder, tuning.layer_decay)
        peaks |= {f"encoder.{name}": tuning.encoder_peak * scale for name, scale in scales.items()}
    elif tuning.method == "projector":
        names = [name for name, _ in encoder.named_parameters() if "projector" in name]
        if not names:
            raise InputError(f"{encoder.name} has no projectors to train; choose another method")
        peaks |= {f"encoder.{name}": tuning.encoder_peak for name in names if not name.endswith(NEVER_TRAINED)}
    elif tuning.method == "lora":
        added = {id(p) for p in add_lora(encoder, rank=tuning.rank, alpha=tuning.alpha)}
        names = [name for name, p in encoder.named_parameters() if id(p) in added]
        peaks |= {f"encoder.{name}": tuning.encoder_peak for name in names}
    if tuning.as_published:
        pads = [name for name, _ in encoder.named_parameters() if name.endswith(".pad")]
        peaks |= {f"encoder.{name}": tuning.encoder_peak for name in pads}
    parameters = {name: p for name, p in model.named_parameters() if name in peaks}
    for p in parameters.values():
        p.requires_grad_(True)
    return Trained(parameters=parameters, peaks=peaks)


def layer_scales(encoder: nn.Module, decay: float) -> dict[str, float]:
    """Give each parameter's share of the learning rate: 1 above the last block, `decay` less with each layer below.

    Layers are the transformer blocks, in the order in which the encoder names them; what comes before them (patch
    embeddings, tokens) is the lowest layer of all (Clark et al. 2020; Bao et al. 2022).
    """
    layer, last, order = 0, "", {}
    for name, _ in encoder.named_parameters():
        if name.endswith(NEVER_TRAINED):
            continue
        block = _block_of(name)
        if block and block != last:
            layer, last = layer + 1, block
        elif not block and last:
            # Behind the blocks: a layer of its own at the top, unless further blocks follow.
            layer, last = layer + 1, ""
        order[name] = layer
    top = max(order.values(), default=0)
    return {name: decay ** (top - depth) for name, depth in order.items()}


def _block_of(name: str) -> str:
    """Name the transformer block that a parameter is in, if any: "blocks.3" of "blocks.3.mlp.fc1.weight"."""
    parts = name.split(".")
    places = [i for i, part in enumerate(parts[:-1]) if part == "blocks" and parts[i + 1].isdigit()]
    return ".".join(parts[: places[-1] + 2]) if places else ""


def make_optimiser(trained: Trained, tuning: Tuning) -> torch.optim.AdamW:
    """Make an AdamW with one group per learning rate and kind of parameter."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in trained.parameters.items():
        decay = tuning.weight_decay if p.ndim > 1 or tuning.decay_all else 0.0
        groups.setdefault((trained.peaks[name], decay), []).append(p)
    made = [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
    return torch.optim.AdamW(made, fused=True)


def peaks_of(optimiser: torch.optim.Optimizer) -> list[float]:
    """List the groups' learning rates before any schedule."""
    return [float(group["lr"]) for group in optimiser.param_groups]
