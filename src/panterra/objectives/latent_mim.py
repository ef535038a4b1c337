"""Latent MIM Lite: predict masked tokens' embeddings under frozen random patch embeddings (OlmoEarth).

Its ablation "MAE" predicts the pixels of masked tokens instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.olmoearth import TARGET_ONLY, OlmoEarth, OlmoEarthConfig, Patches, cut_patches, embed_chosen
from panterra.models.packed import Packed
from panterra.models.positions import TokenLine
from panterra.models.predictor import DECODE, VISIBLE, Masks, Predictor
from panterra.models.reconstructor import Reconstructor
from panterra.objectives.losses import PIXEL_LOSSES, Pairs, info_nce, pair_packed, regularise, view_losses
from panterra.objectives.pixels import line_up_views, pair_pixels
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
    """A published loss configuration, see `losses.token_loss`. Those of `PIXEL_LOSSES` compare pixels."""
    regulariser: Mapping[str, Any] | None = None
    """A published configuration, see `losses.regularise`; no release has any."""
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

    @property
    def pixels(self) -> bool:
        """Say whether pixels are predicted, so that the teacher has nothing to do."""
        return self.loss["type"] in PIXEL_LOSSES


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentMIMLoss:
    """The loss of a batch and what it is made of."""

    total: Float[Tensor, ""]
    views: tuple[Mapping[str, Float[Tensor, ""]], ...]
    """For each view the terms of its loss, by modality, and the regulariser where there is one."""
    contrast: Float[Tensor, ""]
    """Already weighted."""

    @property
    def terms(self) -> dict[str, Float[Tensor, ""]]:
        """Name what a log should hold: the views' losses by modality, averaged, and the contrast."""
        names = dict.fromkeys(m for losses in self.views for m in losses)
        found = {m: [losses[m].detach() for losses in self.views if m in losses] for m in names}
        return {m: torch.stack(values).mean() for m, values in found.items()} | {"contrast": self.contrast.detach()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stacked:
    """All views as one batch, view after view, so that each layer is called once."""

    inputs: Mapping[str, Float[Tensor, "i _t _c _y _x"]]
    """Images that views share are there once."""
    place: Int[Tensor, " b"]
    """Which of the images a sample of a view is masked from."""
    timestamps: Int[Tensor, "b _T 3"]
    masks: Masks
    patch_px: int

    @property
    def images(self) -> int:
        """Count the samples of `inputs`."""
        return len(next(iter(self.inputs.values())))

    @classmethod
    def of(cls, views: Views) -> _Stacked:
        """Stack views, which may differ in their masks and in how their images are turned."""
        first, *others = views
        if any(view.patch_px != first.patch_px or view.masks.keys() != first.masks.keys() for view in others):
            raise InputError("views differ in their modalities or patch sizes; mask the same samples for all of them")
        distinct = list({id(view.inputs): view.inputs for view in views}.values())
        number = {id(inputs): i for i, inputs in enumerate(distinct)}
        samples = torch.arange(views.samples, device=first.timestamps.device)
        return cls(
            inputs={m: torch.cat([inputs[m] for inputs in distinct]) for m in first.masks},
            place=torch.cat([samples + number[id(view.inputs)] * views.samples for view in views]),
            timestamps=torch.cat([view.timestamps for view in views]),
            masks={m: torch.cat([view.masks[m] for view in views]) for m in first.masks},
            patch_px=first.patch_px,
        )


class LatentMIM(nn.Module):
    """Student, predictor and teacher; its forward pass is a loss, so that it can be wrapped by DDP and FSDP."""

    def __init__(self, config: LatentMIMConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = OlmoEarth(config.encoder)
        self.predictor = Predictor(config.predictor, self.encoder.dim)
        self.reconstructor = (
            Reconstructor(config.encoder, self.predictor.output.out_features) if config.pixels else None
        )
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
        batch = _Stacked.of(views)
        step = 10.0 * batch.patch_px / 10
        visible = {m: mask == VISIBLE for m, mask in batch.masks.items()}
        values = torch.cat([mask.flatten(1) for mask in batch.masks.values()], dim=1)
        seen, wanted = Packed.of(values == VISIBLE), Packed.of(values == DECODE)
        line = TokenLine.of({m: mask.shape for m, mask in batch.masks.items()}, values.device)
        patches = cut_patches(self.encoder.patch_embeddings, batch.inputs, batch.patch_px)
        _check_masks(patches, batch.masks)
        kept = self._draw_bands(visible, len(views), generator)
        embedded = embed_chosen(self.encoder.patch_embeddings, patches, visible, place=batch.place, kept=kept)
        latent, pooled = self.encoder.encode_packed(embedded, line, seen, batch.timestamps, step)
        predicted = self.predictor.predict_packed(latent, line, seen, wanted, batch.timestamps, step)
        pairs = self._pairs(predicted, patches, batch, line, wanted, len(views))
        contrast = pooled.new_zeros(())
        with torch.autocast(pooled.device.type, enabled=False):
            across_ranks = self.config.across_ranks
            terms = view_losses(pairs, self.config.loss, views=len(views), across_ranks=across_ranks)
            if self.config.regulariser is not None:
                for i, losses in enumerate(terms):
                    rows, part = seen.part(i * views.samples, (i + 1) * views.samples)
                    losses["regulariser"] = regularise(
                        latent[rows], part, self.config.regulariser, across_ranks=across_ranks
                    )
            if self.config.contrast_weight:
                contrast = self.config.contrast_weight * info_nce(
                    *pooled.chunk(2),
                    temperature=self.config.contrast_temperature,
                    across_ranks=across_ranks,
                )
        mean = torch.stack([torch.stack(list(losses.values())).sum() for losses in terms]).mean()
        total = mean + contrast + self._unused(batch.masks) + 0.0 * pooled.sum()
        return LatentMIMLoss(total=total, views=tuple(terms), contrast=contrast)

    def _pairs(
        self,
        predicted: Float[Tensor, "k e"],
        patches: Patches,
        batch: _Stacked,
        line: TokenLine,
        wanted: Packed,
        views: int,
    ) -> Pairs:
        """Put predictions beside their targets, view after view."""
        if self.reconstructor is None:
            return pair_packed(predicted, self._target(patches, batch, wanted), wanted, line.sizes)
        parts = []
        samples = len(batch.place) // views
        for start in range(0, len(batch.place), samples):
            rows, packed = wanted.part(start, start + samples)
            image = batch.place[start + packed.sample]
            parts.append(
                pair_pixels(
                    self.reconstructor, predicted[rows], line, image, packed.token, batch.inputs, batch.patch_px
                )
            )
        return line_up_views(parts)

    def _draw_bands(
        self, visible: Mapping[str, Bool[Tensor, "b _h _w _t _s"]], views: int, generator: torch.Generator | None
    ) -> dict[str, Bool[Tensor, "b _bands"]]:
        """Draw which bands each sample of each view keeps, for the modalities that lose any."""
        highest = self.config.band_dropout if self.training else 0.0
        losing = [m for m in self.config.band_dropout_modalities if m in visible and highest]
        kept: dict[str, list[Tensor]] = {m: [] for m in losing}
        for _ in range(views):
            for m in losing:
                samples = len(visible[m]) // views
                drawn = draw_bands(samples, m, self.config.encoder, highest=highest, generator=generator)
                kept[m].append(drawn.to(visible[m].device))
        return {m: torch.cat(parts) for m, parts in kept.items()}

    def _target(self, patches: Patches, batch: _Stacked, wanted: Packed) -> Float[Tensor, "k e"]:
        """Give the teacher's embeddings of the wanted tokens, made once where views want them of the same images."""
        sizes, owner = {m: mask[0].numel() for m, mask in batch.masks.items()}, batch.place[wanted.sample]
        line = torch.zeros(batch.images, sum(sizes.values()), dtype=torch.bool, device=owner.device)
        line[owner, wanted.token] = True
        parts = zip(batch.masks.items(), line.split(list(sizes.values()), dim=1), strict=True)
        chosen = {m: part.view(-1, *mask.shape[1:]) for (m, mask), part in parts}
        tokens = self.teacher.embed_chosen(patches, chosen)
        number = line.flatten().cumsum(0).view(line.shape) - 1
        return tokens[number[owner, wanted.token]]

    def _unused(self, present: Collection[str]) -> Tensor:
        """Give a zero whose gradient reaches the parameters of modalities that this batch left out.

        The optimiser then treats them as the published one does, and DDP finds every parameter in use.
        """
        encoder, predictor = self.encoder, self.predictor
        rest = [p for m, part in encoder.patch_embeddings.items() if m not in present for p in part.parameters()]
        rest += [p for m, p in encoder.encodings.channel.items() if m not in present]
        rest += [p for m, p in predictor.encodings.channel.items() if m not in present]
        if self.reconstructor is not None:
            layers = self.reconstructor.layers
            rest += [p for m, part in layers.items() if m not in present for p in part.parameters()]
        return 0.0 * sum((p.sum() for p in rest), self.predictor.mask_token.new_zeros(()))


def _check_masks(patches: Patches, masks: Masks) -> None:
    """Refuse masks of other patches than the images are cut into. Raises InputError."""
    for m, (first, *_) in patches.items():
        _, dates, rows, cols, _ = first.shape
        if masks[m].shape[1:4] != (rows, cols, dates):
            wanted, found = ([rows, cols, dates], list(masks[m].shape[1:4]))
            raise InputError(
                f"{m} has {wanted} patches and dates, and its mask is of {found}; mask what the images are cut into"
            )


def draw_bands(
    samples: int, modality: str, config: OlmoEarthConfig, *, highest: float, generator: torch.Generator | None
) -> Bool[Tensor, "b bands"]:
    """Draw which bands of a modality samples keep; others are dropped at a rate drawn per band set up to `highest`.

    A sample keeps at least one band of each band set; band sets of one band stay whole (OlmoEarth).
    """
    names = MODALITIES[modality].band_names
    kept = torch.ones(samples, len(names), dtype=torch.bool)
    for bands in config.groups(modality):
        if len(bands) > 1:
            rate = torch.rand((), generator=generator) * highest
            keep = torch.rand(samples, len(bands), generator=generator) >= rate
            lucky = torch.randint(len(bands), (samples, 1), generator=generator)
            keep |= ~keep.any(1, keepdim=True) & (torch.arange(len(bands)) == lucky)
            kept[:, [names.index(band) for band in bands]] = keep
    return kept
