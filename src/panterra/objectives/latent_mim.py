"""Latent MIM Lite: predict masked tokens' embeddings under frozen random patch embeddings (OlmoEarth)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.olmoearth import TARGET_ONLY, OlmoEarth, OlmoEarthConfig
from panterra.models.predictor import VISIBLE, Masks, Predictor
from panterra.objectives.losses import info_nce, pair_up, token_loss
from panterra.objectives.teacher import Teacher, fresh_teacher

V1_LOSS = {"type": "modality_patch_discrimination_vec", "tau": 0.1}
MASKED_NEGATIVES_LOSS = {
    "type": "modality_patch_discrimination_masked_negatives_vec",
    "tau": 0.1,
    "same_target_threshold": 0.999,
    "mask_negatives_for_modalities": TARGET_ONLY,
}
"""The loss of v1.1 and v1.2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A batch as one pass through the model sees it."""

    inputs: Mapping[str, Float[Tensor, "b _t _c _y _x"]]
    """Normalised pixels."""
    timestamps: Int[Tensor, "b _T 3"]
    """Day 1-31, month 0-11, year."""
    masks: Masks
    patch_px: int


@dataclass(frozen=True, slots=True)
class Views:
    """What one pass of training takes: the same samples, masked differently."""

    views: tuple[View, ...]

    def __iter__(self) -> Iterator[View]:
        return iter(self.views)

    def __len__(self) -> int:
        """Count the views."""
        return len(self.views)

    @property
    def samples(self) -> int:
        """Count the samples."""
        return len(self.views[0].timestamps)

    def to(self, device: torch.device | str) -> Views:
        """Move all tensors; views that share their inputs still share them."""
        moved: dict[int, Mapping[str, Tensor]] = {}
        for view in self.views:
            if id(view.inputs) not in moved:
                moved[id(view.inputs)] = {m: x.to(device, non_blocking=True) for m, x in view.inputs.items()}
        return Views(
            tuple(
                replace(
                    view,
                    inputs=moved[id(view.inputs)],
                    timestamps=view.timestamps.to(device, non_blocking=True),
                    masks={m: x.to(device, non_blocking=True) for m, x in view.masks.items()},
                )
                for view in self.views
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentMIMConfig:
    """What is trained and by which losses; the defaults are those of v1.1 and v1.2."""

    encoder: OlmoEarthConfig
    predictor: OlmoEarthConfig
    loss: Mapping[str, Any] = field(default_factory=lambda: MASKED_NEGATIVES_LOSS)
    """A published loss configuration, see `losses.token_loss`."""
    contrast_weight: float = 0.05
    """Of the contrast between two views of each sample; 0 leaves it out."""
    contrast_temperature: float = 0.1
    across_ranks: bool = False
    """Whether losses are those of the batches of all processes together; the published code treats each by itself."""
    band_dropout: float = 0.2
    """Highest share of bands that the student does without; 0 for v1."""
    band_dropout_modalities: tuple[str, ...] = ("sentinel2_l2a", "landsat")
    teacher_seed: int | None = None
    """Seed of a teacher with weights of its own; None copies the student's at the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentMIMLoss:
    """The loss of a batch and what it is made of."""

    total: Float[Tensor, ""]
    views: tuple[Mapping[str, Float[Tensor, ""]], ...]
    """For each view the terms of its loss, by modality."""
    contrast: Float[Tensor, ""]
    """Already weighted."""

    @property
    def terms(self) -> dict[str, Float[Tensor, ""]]:
        """Name what a log should hold: the views' losses by modality, averaged, and the contrast."""
        names = dict.fromkeys(m for losses in self.views for m in losses)
        found = {m: [losses[m].detach() for losses in self.views if m in losses] for m in names}
        return {m: torch.stack(values).mean() for m, values in found.items()} | {"contrast": self.contrast.detach()}


class LatentMIM(nn.Module):
    """Student, predictor and teacher; its forward pass is a loss, so that it can be wrapped by DDP and FSDP."""

    def __init__(self, config: LatentMIMConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = OlmoEarth(config.encoder)
        self.predictor = Predictor(config.predictor, self.encoder.dim)
        if config.teacher_seed is None:
            self.teacher = Teacher(self.encoder)
        else:
            self.teacher = fresh_teacher(self.encoder, seed=config.teacher_seed)

    def forward(self, views: Views, generator: torch.Generator | None = None) -> LatentMIMLoss:
        """Average the views' losses and add the contrast of two.

        The generator draws the dropped bands; drop path uses the global one. Views that share their inputs share the
        teacher's work.
        """
        if self.config.contrast_weight and len(views) != 2:
            raise InputError(f"{len(views)} views came; the contrast needs 2: give two, or contrast_weight=0")
        terms, pooled, zeros = [], [], []
        target: dict[str, Tensor] = {}
        last: Mapping[str, Tensor] | None = None
        for view in views:
            if view.inputs is not last:
                target, last = self.teacher(view.inputs, view.patch_px), view.inputs
            losses, aggregated, zero = self._view(view, target, generator)
            terms.append(losses)
            pooled.append(aggregated)
            zeros.append(zero)
        contrast = pooled[0].new_zeros(())
        if self.config.contrast_weight:
            with torch.autocast(contrast.device.type, enabled=False):
                contrast = self.config.contrast_weight * info_nce(
                    *pooled, temperature=self.config.contrast_temperature, across_ranks=self.config.across_ranks
                )
        mean = torch.stack([torch.stack(list(losses.values())).sum() for losses in terms]).mean()
        return LatentMIMLoss(total=mean + contrast + sum(zeros), views=tuple(terms), contrast=contrast)

    def _view(
        self, view: View, target: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        visible = {m: mask == VISIBLE for m, mask in view.masks.items()}
        # The student never embeds what nobody looks at; a batch without anything visible keeps one modality.
        seen = [m for m in visible if bool(visible[m].any())] or list(visible)[:1]
        inputs = {m: view.inputs[m] for m in self.config.encoder.modalities if m in seen}
        if self.training and self.config.band_dropout:
            inputs = drop_bands(
                inputs,
                self.config.encoder,
                modalities=self.config.band_dropout_modalities,
                highest=self.config.band_dropout,
                generator=generator,
            )
        out = self.encoder(inputs, view.timestamps, patch_px=view.patch_px, visible=visible)
        predictions = self.predictor(out.tokens, view.masks, view.timestamps, patch_px=view.patch_px)
        wanted = torch.cat([target[m].flatten(1, 4) for m in predictions.sizes], dim=1)
        pairs = pair_up(predictions.tokens, predictions.chosen.take(wanted), predictions.chosen, predictions.sizes)
        # In the same order on all ranks, whatever each has seen, since their losses may meet.
        pairs = {m: pairs[m] for m in view.masks}
        with torch.autocast(wanted.device.type, enabled=False):
            losses = token_loss(pairs, self.config.loss, across_ranks=self.config.across_ranks)
        assert out.aggregated is not None
        return losses, out.aggregated, self._unused(inputs, view.masks) + 0.0 * out.aggregated.sum()

    def _unused(self, seen: Collection[str], present: Collection[str]) -> Tensor:
        """Give a zero whose gradient reaches the parameters of modalities that this batch left out.

        The optimiser then treats them as the published one does, and DDP finds every parameter in use.
        """
        encoder, predictor = self.encoder, self.predictor
        rest = [p for m, part in encoder.patch_embeddings.items() if m not in seen for p in part.parameters()]
        rest += [p for m, p in encoder.encodings.channel.items() if m not in seen]
        rest += [p for m, p in predictor.encodings.channel.items() if m not in present]
        return 0.0 * sum((p.sum() for p in rest), self.predictor.mask_token.new_zeros(()))


def drop_bands(
    inputs: Mapping[str, Float[Tensor, "b t c y x"]],
    config: OlmoEarthConfig,
    *,
    modalities: Collection[str],
    highest: float,
    generator: torch.Generator | None,
) -> dict[str, Float[Tensor, "b t c y x"]]:
    """Zero some bands of some samples, at a rate drawn per band set up to `highest` (OlmoEarth).

    A sample keeps at least one band of each band set; band sets of one band stay whole.
    """
    out = dict(inputs)
    for m in modalities:
        if m not in inputs:
            continue
        x = inputs[m]
        names = MODALITIES[m].band_names
        kept = torch.ones(len(x), len(names), dtype=torch.bool)
        for bands in config.groups(m):
            if len(bands) > 1:
                rate = torch.rand((), generator=generator) * highest
                keep = torch.rand(len(x), len(bands), generator=generator) >= rate
                lucky = torch.randint(len(bands), (len(x), 1), generator=generator)
                keep |= ~keep.any(1, keepdim=True) & (torch.arange(len(bands)) == lucky)
                kept[:, [names.index(band) for band in bands]] = keep
        out[m] = x * kept.to(x)[:, None, :, None, None]
    return out
