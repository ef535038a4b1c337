"""Predict what a slower copy of the model sees of a tile, and know a place by any sensor (AnySat)."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.models.anysat import AnySat, AnySatConfig, Embedded
from panterra.models.anysat_attention import PatchBlock, places
from panterra.models.anysat_predictor import AnySatPredictor, AnySatPredictorConfig
from panterra.models.anysat_projectors import Grid, Input
from panterra.objectives.jepa_masks import Dates, PatchMasks

_NEVER = -1e30
"""A logit without any weight; minus infinity would make NaN of the gradients of tokens that have nothing to look at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedTiles:
    """Some tiles of one data set, all over as many patches, and what of them the student sees."""

    inputs: Mapping[str, Input]
    """Standardised, by sensor."""
    grid: Grid
    masks: PatchMasks
    kept: Bool[Tensor, "b n"]
    """Which of the context's tokens the student gets, sensor after sensor, without those that see the whole tile."""
    dates: Mapping[str, Dates]
    """Of each series the dates that the student gets; it gets all of a sensor that is not named."""

    @property
    def samples(self) -> int:
        """Count the tiles."""
        return len(self.kept)

    def to(self, device: torch.device | str) -> MaskedTiles:
        """Move all tensors."""
        moved: MaskedTiles = _moved(self, torch.device(device))
        return moved


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _moved(part, device) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class JEPAConfig:
    """What is trained and by which losses."""

    encoder: AnySatConfig
    predictor: AnySatPredictorConfig
    prediction_weight: float = 1.0
    contrast_weight: float = 1.0
    """Of the contrast between sensors; 0 leaves it out."""
    contrast_temperature: float = 0.1
    targets: Literal["normalised", "standardised"] = "normalised"
    """What the teacher makes of a patch, each vector normalised by itself (AnySat), or each channel over the samples.

    The latter are not alike for all samples, whatever the teacher does.
    """
    dropped: Literal["masked", "hidden"] = "masked"
    """What becomes of the context's tokens that the student does without: masked tokens (AnySat), or nothing."""
    published: bool = False
    """Do as the published code where it departs from the paper.

    Where no sensor sees the whole tile, the context's tokens of sensor i are those of 1 - i patches further on; queries
    (where one does) and predictions carry the place of the patch before; with several samples the masks of the contrast
    belong to other tokens; the teacher drops out as the student does; scores by distance that no loss reaches decay.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class JEPALoss:
    """The loss of some tiles and what it is made of."""

    total: Float[Tensor, ""]
    prediction: Float[Tensor, ""]
    contrast: Float[Tensor, ""]

    @property
    def terms(self) -> dict[str, Float[Tensor, ""]]:
        """Name what a log should hold."""
        return {"prediction": self.prediction.detach(), "contrast": self.contrast.detach()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the student makes of a tile."""

    patches: Mapping[str, Float[Tensor, "b p d"]]
    """Each sensor's patch embeddings, without places."""
    valid: Bool[Tensor, "m b p"] | None
    """Which of them have data; None where all have."""
    selected: Float[Tensor, "b n d"]
    """The context's tokens, sensor after sensor."""
    given: Float[Tensor, "b n d"]
    """The same after some were replaced by the masked token."""
    encoded: Float[Tensor, "b _k d"]
    """The tile and the patches of the context."""


class JEPA(nn.Module):
    """Student, predictor and teacher; its forward pass is a loss, so that it can be wrapped by DDP and FSDP.

    Parameters of sensors that a batch lacks get no gradient: the optimiser must leave them alone, as published.
    """

    leaves_out_parameters = True

    def __init__(self, config: JEPAConfig) -> None:
        super().__init__()
        self.config = config
        if config.contrast_weight and len(config.encoder.sensors) < 2:
            raise InputError("one sensor has nothing to be contrasted with; give two, or contrast_weight=0")
        self.encoder = AnySat(config.encoder)
        self.masked_token = nn.Parameter(torch.zeros(1, 1, config.encoder.dim))
        self.predictor = AnySatPredictor(config.predictor, config.encoder.dim)
        # These reach sub-patches alone, which nothing here looks at: to the patch's own row all keys are equally far.
        # Published, weight decay takes them to zero.
        cast(PatchBlock, self.encoder.patch_encoder.blocks[-1]).attn.distance.requires_grad_(config.published)
        self.teacher = deepcopy(self.encoder).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> JEPA:
        """Switch dropout; the teacher's, which only its projectors have, stays off unless `published`.

        Outside of training an encoder works in place, which autocast cannot.
        """
        super().train(mode)
        self.teacher.projectors.train(mode and self.config.published)
        return self

    def forward(self, tiles: MaskedTiles, generator: torch.Generator | None = None) -> JEPALoss:
        """Compare the predicted targets with the teacher's, and the sensors' patches with one another.

        The generator is not used: the tiles come with all that was drawn, and dropout uses the global one.
        """
        return self.compare(tiles)[0]

    def compare(self, tiles: MaskedTiles) -> tuple[JEPALoss, Seen]:
        """Give the loss, and what the student made of the tiles."""
        target, seen = self.targets(tiles), self.look(tiles)
        predicted = self.predict(seen.encoded[:, 1:], tiles)
        with torch.autocast(predicted.device.type, enabled=False):
            prediction = F.smooth_l1_loss(predicted.float(), target.float())
            contrast = prediction.new_zeros(())
            if self.config.contrast_weight and len(seen.patches) > 1:
                contrast = sensor_contrast(
                    torch.stack(list(seen.patches.values())), seen.valid, temperature=self.config.contrast_temperature
                )
        total = self.config.prediction_weight * prediction + self.config.contrast_weight * contrast
        return JEPALoss(total=total, prediction=prediction, contrast=contrast), seen

    @torch.no_grad()
    def targets(self, tiles: MaskedTiles) -> Float[Tensor, "s b n d"]:
        """Give what the teacher, who sees everything, makes of the patches to predict, normalised."""
        patches = self.teacher(tiles.inputs, scale=tiles.grid.scale).patches.flatten(1, 2)
        if self.config.targets == "standardised":
            if len(patches) < 2:
                raise InputError("one sample has nothing to be standardised over; give two or more a micro-batch")
            patches = standardise_channels(patches)
        else:
            patches = F.layer_norm(patches, patches.shape[-1:])
        return torch.stack([take(patches, index) for index in tiles.masks.targets])

    def look(self, tiles: MaskedTiles) -> Seen:
        """Pass the student what the masks leave."""
        inputs = {
            name: some_dates(given, tiles.dates[name]) if name in tiles.dates else given
            for name, given in tiles.inputs.items()
        }
        embedded = self.encoder.embed(inputs, scale=tiles.grid.scale)
        if embedded.grid != tiles.grid:
            raise InputError(f"tiles hold {embedded.grid}, but the masks are for {tiles.grid}; correct `cells`")
        place = self.encoder.places(tiles.grid).to(embedded.whole)
        sensors, patches = len(embedded.tokens), len(place)
        rows = self._rows(tiles.masks.context, sensors, patches, bool(embedded.whole.shape[1]))
        selected = take(torch.cat([x + place for x in embedded.tokens.values()], dim=1), rows)
        kept, visible, whole = tiles.kept, embedded.seen(), embedded.whole.shape[1]
        if visible is not None:
            # A token without data becomes the masked token, which is there to be seen, like those that were dropped.
            kept = kept & visible[:, whole:].gather(1, rows)
            visible = torch.cat([visible[:, :whole], torch.ones_like(kept)], dim=1)
        if self.config.dropped == "hidden":
            whole_seen = kept.new_ones(len(kept), whole) if visible is None else visible[:, :whole]
            visible = torch.cat([whole_seen, kept], dim=1)
        given = torch.where(kept[..., None], selected, self.masked_token.to(selected.dtype))
        encoded = self.encoder.combine(
            given,
            embedded.whole,
            tiles.grid,
            context=tiles.masks.context,
            visible=visible,
            published_places=self.config.published,
        )
        return Seen(
            patches=embedded.tokens,
            valid=self._valid(inputs, embedded, tiles.grid),
            selected=selected,
            given=given,
            encoded=torch.cat([encoded[:, :1], encoded[:, 1 + embedded.whole.shape[1] :]], dim=1),
        )

    def predict(self, context: Float[Tensor, "b k d"], tiles: MaskedTiles) -> Float[Tensor, "s b n d"]:
        """Predict each set of targets from the encoded context."""
        grid = tiles.grid
        table = places(grid.rows, grid.cols, grid.scale, self.config.predictor.dim).to(context.device)
        if self.config.published:
            table = place_before(table)
        out: Tensor = self.predictor(context, table[tiles.masks.context], table[tiles.masks.targets])
        return out

    def _rows(self, context: Int[Tensor, "b k"], sensors: int, patches: int, whole: bool) -> Int[Tensor, "b n"]:
        """Find the context's patches among the tokens of all sensors."""
        starts = torch.arange(sensors, device=context.device) * patches
        if self.config.published and not whole:
            # The published code takes away a token that only a whole sensor has.
            starts = torch.arange(sensors, device=context.device) * (patches - 1) + 1
        return (context[:, None] + starts[:, None]).flatten(1)

    def _valid(self, inputs: Mapping[str, Input], embedded: Embedded, grid: Grid) -> Bool[Tensor, "m b p"] | None:
        found = {}
        for name, tokens in embedded.tokens.items():
            present, visible = inputs[name].present, embedded.visible[name]
            valid = torch.ones_like(tokens[..., 0], dtype=torch.bool) if visible is None else visible
            found[name] = valid if present is None else valid & patches_present(present, grid)
        if all(inputs[name].present is None and embedded.visible[name] is None for name in found):
            return None
        valid = torch.stack(list(found.values()))
        return valid.transpose(0, 1).reshape(valid.shape) if self.config.published else valid


def take(x: Float[Tensor, "b p d"], index: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """Pick patches of each sample."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def standardise_channels(x: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
    """Take from each place what samples have in common there, and bring each channel to unit variance."""
    centred = x - x.mean(0)
    return centred / (centred.square().mean((0, 1)) + 1e-6).sqrt()


def place_before(table: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
    """Give each patch the place of the one before it, and the first none."""
    return torch.cat([torch.zeros_like(table[:1]), table[:-1]])


def some_dates(given: Input, dates: Dates) -> Input:
    """Keep some dates of each sample's series."""

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[torch.arange(len(x), device=x.device)[:, None], dates.index]

    values, valid = pick(given.values), pick(given.valid)
    assert values is not None
    if dates.valid is not None:
        every = dates.valid[:, :, None, None]
        valid = every.expand(-1, -1, *values.shape[-2:]) if valid is None else valid & every
    return Input(values=values, days=pick(given.days), valid=valid, present=pick(given.present))


def patches_present(present: Bool[Tensor, "b t c y x"], grid: Grid) -> Bool[Tensor, "b p"]:
    """Say which patches have a value on some date, in some channel and pixel."""
    pixels = present.flatten(1, 2).any(1, keepdim=True).float()
    return F.adaptive_max_pool2d(pixels, (grid.rows, grid.cols)).flatten(1) > 0


def similarities(
    tokens: Float[Tensor, "m b p d"], valid: Bool[Tensor, "m b p"] | None = None
) -> Float[Tensor, "m b p m b p"]:
    """Give the cosine of all patches of all sensors and samples, and `_NEVER` for pairs that are not to be compared.

    These are patches of the same tile seen by the same sensor, themselves included, and whatever is not valid.
    """
    m, b, p, _ = tokens.shape
    rows = F.normalize(tokens.float().flatten(0, 2), dim=-1, eps=1e-8)
    cosine = (rows @ rows.mT).view(m, b, p, m, b, p)
    cosine.diagonal(dim1=0, dim2=3).diagonal(dim1=0, dim2=2).fill_(_NEVER)
    if valid is not None:
        cosine.masked_fill_(~(valid[..., None, None, None] & valid), _NEVER)
    return cosine


def sensor_contrast(
    tokens: Float[Tensor, "m b p d"], valid: Bool[Tensor, "m b p"] | None = None, *, temperature: float = 0.1
) -> Float[Tensor, ""]:
    """Cross-entropy of finding each patch as the other sensors see it among the other patches of the batch.

    Negatives are the patches of other tiles by any sensor, and other patches of the same tile by other sensors. What is
    not valid counts in the mean, as 0 (AnySat).
    """
    if len(tokens) < 2:
        raise InputError("one sensor came, which has nothing to be contrasted with; give two, or contrast_weight=0")
    logits = similarities(tokens, valid) / temperature
    every = logits.flatten(3).logsumexp(3)
    others = logits.diagonal(dim1=1, dim2=4).diagonal(dim1=1, dim2=3).logsumexp(1)
    if valid is None:
        return (every - others).mean()
    compared = valid & (valid.sum() > valid.sum(2, keepdim=True))
    paired = valid & (valid.sum(0) > 1)
    return (torch.where(compared, every, 0.0).sum() - torch.where(paired, others, 0.0).sum()) / valid.numel()
