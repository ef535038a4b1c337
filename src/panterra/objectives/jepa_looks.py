"""AnySat's losses beside a third that keeps what sensors saw: linear layers tell it from the student's embeddings.

Prediction in the space of a teacher and the contrast between sensors ask for what sensors have in common; neither minds
if the rest is lost. OmniSat (Astruc et al. 2024), from which AnySat comes, rebuilt pixels beside its contrast; here a
few numbers of each patch do: how bright each band is, how much it varies, and how it goes through the year. Of still
images these say little, so that there is a second look at them: what a frozen projector makes of the patch's cells, on
average. Random features such as those tell much of images from above (Rolf et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn

from panterra.models.anysat_projectors import Grid, Input
from panterra.models.anysat_sensors import Sensor
from panterra.objectives.jepa import JEPA, JEPAConfig, JEPALoss, MaskedTiles, Seen, take

_FAINT = 1e-3
"""Added to variances of standardised values before their logarithm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LooksLoss(JEPALoss):
    """The loss of some tiles with its third part."""

    looks: Float[Tensor, ""]

    @property
    def terms(self) -> dict[str, Float[Tensor, ""]]:
        """Name what a log should hold."""
        terms = {"prediction": self.prediction, "contrast": self.contrast, "looks": self.looks}
        return {name: term.detach() for name, term in terms.items()}


class JEPAWithLooks(JEPA):
    """Student, predictor, teacher, and the linear layers that tell looks, which are thrown away afterwards.

    From a patch's embedding they tell how it looks to every sensor, hidden ones included, and from what one sensor's
    part of the student makes of a patch, before sensors are brought together, how it looks to that sensor. Projectors
    of still images are looks themselves and have to be frozen.
    """

    def __init__(self, config: JEPAConfig, *, looks_weight: float, cells_weight: float = 1.0) -> None:
        super().__init__(config)
        self.looks_weight, self.cells_weight = looks_weight, cells_weight
        sensors = config.encoder.sensors
        sizes = {sensor.name: look_size(sensor) for sensor in sensors}
        sizes |= {cells_of(sensor.name): config.encoder.dim for sensor in sensors if not sensor.dated}
        self.of_patch = nn.ModuleDict({name: nn.Linear(config.encoder.dim, size) for name, size in sizes.items()})
        self.of_token = nn.ModuleDict({name: nn.Linear(config.encoder.dim, size) for name, size in sizes.items()})
        self.mean = nn.ParameterDict({name: _constant(torch.zeros(size)) for name, size in sizes.items()})
        self.std = nn.ParameterDict({name: _constant(torch.ones(size)) for name, size in sizes.items()})

    def forward(self, tiles: MaskedTiles, generator: Generator | None = None) -> LooksLoss:
        """Give AnySat's loss and, weighed, how wrongly looks are told."""
        loss, seen = self.compare(tiles)
        with torch.autocast(loss.total.device.type, enabled=False):
            looks = self.tell(seen, tiles)
        total = loss.total + self.looks_weight * looks
        return LooksLoss(total=total, prediction=loss.prediction, contrast=loss.contrast, looks=looks)

    def tell(self, seen: Seen, tiles: MaskedTiles) -> Float[Tensor, ""]:
        """Compare what is told of the context's patches and of tokens with what sensors saw on all dates."""
        context, losses = seen.encoded[:, 1:].float(), []
        for name, tokens in seen.patches.items():
            for look, (wanted, valid) in self.looks(name, tiles).items():
                wanted = (wanted - self.mean[look]) / self.std[look]
                weight = 1.0 if look == name else self.cells_weight
                losses.append(weight * _error(self.of_token[look](tokens.float()), wanted, valid))
                wanted, valid = take(wanted, tiles.masks.context), valid.gather(1, tiles.masks.context)
                losses.append(weight * _error(self.of_patch[look](context), wanted, valid))
        return torch.stack(losses).sum() / (2 * len(seen.patches))

    @torch.no_grad()
    def looks(self, name: str, tiles: MaskedTiles) -> dict[str, tuple[Float[Tensor, "b p _k"], Bool[Tensor, "b p"]]]:
        """Say by name how patches look to a sensor, and which have data."""
        given, sensor = tiles.inputs[name], self.encoder.sensors[name]
        wanted, valid = describe(given, sensor, tiles.grid)
        found = {name: (wanted, valid)}
        if not sensor.dated:
            cells, seen = self.encoder.projectors[name](given, tiles.grid)
            if seen is None:
                seen = torch.ones_like(cells[..., 0], dtype=torch.bool)
            mean = (cells * seen[..., None]).sum(2) / seen.sum(2, keepdim=True).clamp(min=1)
            found[cells_of(name)] = mean, valid
        return found

    @torch.no_grad()
    def standardise_looks(self, views: Sequence[MaskedTiles]) -> None:
        """Fit by what looks are standardised, to some tiles."""
        rows: dict[str, list[Tensor]] = {}
        for view in views:
            for name in view.inputs:
                for look, (wanted, valid) in self.looks(name, view).items():
                    rows.setdefault(look, []).append(wanted[valid])
        for look, found in rows.items():
            std, mean = torch.std_mean(torch.cat(found), 0)
            self.mean[look].copy_(mean)
            self.std[look].copy_(std.clamp_min(1e-2))


def cells_of(name: str) -> str:
    """Name the look that a still image's cells are."""
    return f"{name}_cells"


def _constant(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


def _error(told: Tensor, wanted: Tensor, valid: Bool[Tensor, "b p"]) -> Float[Tensor, ""]:
    error = F.smooth_l1_loss(told, wanted, reduction="none").mean(-1)
    return torch.where(valid, error, 0.0).sum() / valid.sum().clamp(min=1)


def look_size(sensor: Sensor) -> int:
    """Count the numbers of a look."""
    return sensor.channels * (4 if sensor.dated else 3)


def describe(given: Input, sensor: Sensor, grid: Grid) -> tuple[Float[Tensor, "b p k"], Bool[Tensor, "b p"]]:
    """Say how patches look to a sensor, and which have data; tiles are whole numbers of patches.

    Of each band the mean over pixels and dates; of still images the logarithms of how much pixels vary inside cells and
    cells inside the patch; of series that of how much pixels and dates vary, and how the band goes with the cosine and
    the sine of the year.
    """
    dates = given.values.shape[1]
    cut = given.values.unflatten(4, (grid.cols, -1)).unflatten(3, (grid.rows, -1))
    values = cut.permute(0, 3, 5, 1, 4, 6, 2)  # b, rows, cols, t, y, x, c
    seen = torch.ones_like(values[..., :1])
    if given.valid is not None:
        seen = given.valid.unflatten(3, (grid.cols, -1)).unflatten(2, (grid.rows, -1)).permute(0, 2, 4, 1, 3, 5)
        seen = seen[..., None].to(values)
    flat, weight = values.flatten(3, 5), seen.flatten(3, 5)
    count = weight.sum(3).clamp(min=1)
    mean = (flat * weight).sum(3) / count
    away = (flat - mean[:, :, :, None]) * weight
    spread = away.square().sum(3) / count
    if sensor.dated:
        assert given.days is not None
        angle = given.days.to(values) * (2 * math.pi / 365.25)
        year = [
            wave.repeat_interleave(weight.shape[3] // dates, 1)[:, None, None, :, None]
            for wave in (angle.cos(), angle.sin())
        ]
        parts = [mean, _logarithm(spread), *((away * wave).sum(3) / count for wave in year)]
    else:
        k = sensor.kernel
        cells = F.avg_pool2d(away.view_as(values)[:, :, :, 0].permute(0, 1, 2, 5, 3, 4).flatten(0, 2), k)
        between = cells.square().mean((2, 3)).view_as(mean) * (weight.shape[3] / count)
        parts = [mean, _logarithm((spread - between).clamp(min=0)), _logarithm(between)]
    return torch.cat(parts, dim=-1).flatten(1, 2), (weight.sum((3, 4)) > 0).flatten(1)


def _logarithm(variance: Tensor) -> Tensor:
    return (variance + _FAINT).log() / 2
