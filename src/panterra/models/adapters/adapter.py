"""A network of others as an `Encoder`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.adapters.declaration import Takes, View
from panterra.models.adapters.pixels import Statistics, band_statistics, grid_of, network_values, patch_valid
from panterra.models.features import Features
from panterra.models.patches import resize
from panterra.models.slots import align
from panterra.sample import Batch, Observation

SHARE_DAYS = 15
"""Images of several sensors are shown together when they lie this close."""
CHUNK = 64
"""Images, or pixel series of one window, that go through a network at once."""

Call = Callable[[Any, View], Tensor]
"""Shows a network what it wants of a view; gives maps [N, D, h, w], tokens [N, h * w, D] or vectors [N, D]."""


def on_the_image(network: Callable[[Tensor], Tensor], view: View) -> Tensor:
    """Call a network that takes the images of its only modality."""
    return network(view.image)


class Adapter(nn.Module):
    """Any network as an `Encoder`: inputs brought to what `takes` declares, outputs to features.

    A date is shown to the network with whatever sensors saw the place within 15 days; features are the mean over
    dates, of what is data. Patches are scaled to the network's; a network with a fixed size sees the whole sample at
    that size.
    """

    def __init__(
        self, network: Callable[..., Any], takes: Takes, *, dim: int, name: str, call: Call = on_the_image
    ) -> None:
        super().__init__()
        self.network, self.takes, self.call = network, takes, call
        self.dim, self.name = dim, name
        self.licence: str | None = None
        self.source: str | None = None
        self.normalized_input = False

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it takes, together or alone."""
        return tuple(self.takes.modalities)

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False) -> Features:
        """Embed a batch in declared units. Raises InputError for what the network cannot take."""
        return self.encode_by(batch, {}, patch_m=patch_m, dense=dense)

    def encode_by(self, batch: Batch, statistics: Statistics, *, patch_m: float, dense: bool = False) -> Features:
        """Embed a batch, standardised by statistics of the data where the network wants that."""
        self._check(batch, dense)
        grid = grid_of(batch, patch_m)
        shown = _on_one_axis(batch.observations)
        first = next(self.parameters(), None)
        images, valid = {}, {}
        for m, o in shown.observations.items():
            values = network_values(o, self.takes, m, statistics, normalised=self.normalized_input)
            images[m] = self._fit(values, grid).to(torch.float32 if first is None else first.dtype)
            valid[m] = patch_valid(o.valid, grid)
        shown_px = self.takes.image_px / max(grid) if self.takes.image_px else self.takes.patch_px
        whole = View(images=images, valid=valid, dates=shown.dates, lonlat=batch.lonlat, pixel_m=patch_m / shown_px)
        pieces = _series(whole) if self.takes.series else _images(whole)
        return self._features(whole, pieces, grid, patch_m)

    def _check(self, batch: Batch, dense: bool) -> None:
        if dense:
            raise InputError(f"{self.name} has no sub-patch features; ask for a smaller patch_m instead of dense=True")
        if unknown := [m for m in batch.observations if m not in self.takes.modalities]:
            raise InputError(f"{self.name} does not know {unknown[0]}; it takes {', '.join(self.modalities)}")
        for m, o in batch.observations.items():
            if MODALITIES[m].kind == "still" and o.pixels.shape[1] != 1:
                raise InputError(f"{m} came with {o.pixels.shape[1]} dates; it is a still image, give one")
        if self.takes.needs_place and batch.lonlat is None:
            raise InputError(f"{self.name} wants to know where a sample lies; give the batch its lonlat")

    def _fit(self, x: Float[Tensor, "b t c y x"], grid: tuple[int, int]) -> Float[Tensor, "b t c v u"]:
        """Resample images to the network's patches, or to its image size, padded to a square by their borders."""
        flat, (rows, cols) = x.flatten(0, 1), grid
        if self.takes.image_px is None:
            flat = resize_to(flat, rows * self.takes.patch_px, cols * self.takes.patch_px)
        else:
            side, pixels = max(grid), x.shape[-2] // rows
            flat = F.pad(flat, (0, (side - cols) * pixels, 0, (side - rows) * pixels), mode="replicate")
            flat = resize_to(flat, self.takes.image_px, self.takes.image_px)
        fitted: Tensor = flat.unflatten(0, x.shape[:2])
        return fitted

    def _features(self, whole: View, pieces: Iterable[Piece], grid: tuple[int, int], patch_m: float) -> Features:
        """Average what the network says over the dates at which a patch is data."""
        size, device = len(whole.dates), whole.dates.device
        total = torch.zeros(size, *grid, self.dim, device=device)
        count = torch.zeros(size, *grid, dtype=torch.int64, device=device)
        for piece in pieces:
            seen = torch.stack(list(piece.view.valid.values())).any(0)
            if self.takes.series:
                seen = seen.any(1)
            said = self._on_grid(self.call(self.network, piece.view), grid).to(total.dtype)
            total.index_add_(0, piece.samples, torch.where(seen[..., None], said, 0.0))
            count.index_add_(0, piece.samples, seen.long())
        return Features(
            patches=total / count.clamp(min=1)[..., None],
            summary=total.sum((1, 2)) / count.sum((1, 2)).clamp(min=1)[:, None],
            valid=count > 0,
            patch_m=patch_m,
        )

    def _on_grid(self, said: Tensor, grid: tuple[int, int]) -> Float[Tensor, "n h w d"]:
        """Bring maps, tokens or vectors to one vector for each patch."""
        (rows, cols), fixed = grid, self.takes.image_px
        side = max(grid)
        own = (fixed // self.takes.patch_px,) * 2 if fixed else grid
        if said.ndim == 3:
            if said.shape[1] != own[0] * own[1]:
                raise InputError(
                    f"{self.name} gave {said.shape[1]} tokens for {own[0]} x {own[1]} patches; "
                    "leave out those that are no patch, or declare the right patch_px"
                )
            said = rearrange(said, "n (h w) d -> n d h w", h=own[0])
        elif said.ndim == 2:
            said = said[:, :, None, None].expand(-1, -1, *own)
        if said.ndim != 4 or said.shape[1] != self.dim:
            raise InputError(
                f"{self.name} gave {list(said.shape)}; wanted maps [N, {self.dim}, h, w], tokens [N, h * w, {self.dim}]"
                f" or vectors [N, {self.dim}]"
            )
        wanted = (side, side) if fixed else grid
        if said.shape[-2:] != wanted:
            said = F.interpolate(said.float(), wanted, mode="bilinear", antialias=True)
        return said[:, :, :rows, :cols].permute(0, 2, 3, 1)


class FittedAdapter(nn.Module):
    """An adapter whose network wants values standardised by the data it is used on (`Fitted`)."""

    def __init__(self, adapter: Adapter, statistics: Statistics | None = None) -> None:
        super().__init__()
        self.adapter, self.statistics = adapter, dict(statistics or {})

    @property
    def name(self) -> str:
        return self.adapter.name

    @property
    def dim(self) -> int:
        return self.adapter.dim

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it takes, together or alone."""
        return self.adapter.modalities

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False) -> Features:
        """Embed a batch in declared units. Raises InputError for what the network cannot take."""
        if absent := self.missing_statistics([m for m in batch.observations if m in self.modalities]):
            raise InputError(f"{self.name} has no statistics of {absent[0]} yet; fit them to your data: fit_statistics")
        return self.adapter.encode_by(batch, self.statistics, patch_m=patch_m, dense=dense)

    def missing_statistics(self, modalities: Iterable[str]) -> tuple[str, ...]:
        """Name the modalities that it cannot standardise yet."""
        return tuple(m for m in modalities if m not in self.statistics)

    def fit_statistics(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Fit the statistics of what occurs, in one pass over batches in declared units."""
        return dict(band_statistics(batches, self.adapter.takes))

    def with_statistics(self, statistics: Mapping[str, Any]) -> Self:
        """Give the same encoder, sharing its weights, that standardises by these where it knew others or none."""
        known = self.adapter.takes.modalities
        for m, found in statistics.items():
            if m not in known or tuple(found["bands"]) != known[m].bands:
                raise InputError(f"the statistics of {m} are not for {self.name}; fit them again with it")
        same = copy(self)
        same.statistics = {**self.statistics, **statistics}
        return same

    def statistics_of(self, modality: str) -> dict[str, tuple[float, float]]:
        """Give mean and standard deviation of each band by name, empty where they are not known."""
        found = self.statistics.get(modality)
        return dict(zip(found["bands"], zip(found["mean"], found["std"], strict=True), strict=True)) if found else {}


def adapter_passport(model: Adapter | FittedAdapter) -> dict[str, Any]:
    """Say what of an adapter changes results, besides weights, and where those are from."""
    fitted = model.statistics if isinstance(model, FittedAdapter) else {}
    adapter = model.adapter if isinstance(model, FittedAdapter) else model
    given: Any = adapter.network
    network = given if hasattr(given, "__qualname__") else type(given)
    return {
        "network": f"{network.__module__}.{network.__qualname__}",
        "takes": adapter.takes.as_json(),
        "call": getattr(adapter.call, "__qualname__", type(adapter.call).__name__),
        "normalized_input": adapter.normalized_input,
        "statistics": fitted,
        "licence": adapter.licence,
        "source": adapter.source,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A view and the samples that its images are of."""

    view: View
    samples: Int[Tensor, " n"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Modalities whose t-th images are shown together."""

    observations: Mapping[str, Observation]
    dates: Int[Tensor, "b t"]


def resize_to(images: Float[Tensor, "n c y x"], height: int, width: int) -> Float[Tensor, "n c v u"]:
    """Resize images, where their size is another."""
    return images if images.shape[-2:] == (height, width) else resize(images, height, width)


def _on_one_axis(observations: Mapping[str, Observation]) -> Shown:
    """Put all modalities on one axis of dates; a map is shown whenever a series is, and once where none is."""
    aligned = align(observations, tolerance_days=SHARE_DAYS).observations
    series = {m: o for m, o in aligned.items() if MODALITIES[m].kind == "series"}
    if not series:
        return Shown(observations=aligned, dates=next(iter(aligned.values())).dates)
    seen = {m: o.valid.flatten(2).any(2) for m, o in series.items()}
    some = torch.stack(list(seen.values())).any(0)
    # The first image of a slot gives its date, wherever the sensor stands in the batch.
    late = torch.iinfo(torch.int64).max
    dates = torch.stack([torch.where(seen[m], o.dates, late) for m, o in series.items()]).amin(0)
    dates = torch.where(some, dates, next(iter(series.values())).dates)
    first = torch.zeros_like(some)
    first[:, 0] = ~some.any(1)
    shown = {m: o if m in series else _repeat(o, some | first) for m, o in aligned.items()}
    return Shown(observations=shown, dates=dates)


def _repeat(o: Observation, at: Bool[Tensor, "b t"]) -> Observation:
    """Show a map on several dates."""
    length = at.shape[1]
    return Observation(
        pixels=o.pixels.expand(-1, length, -1, -1, -1),
        dates=o.dates.expand(-1, length),
        valid=o.valid & at[:, :, None, None],
    )


def _present(view: View) -> Bool[Tensor, "b t m"]:
    """Say which modalities have any data on which date."""
    return torch.stack([v.flatten(2).any(2) for v in view.valid.values()], dim=2)


def _images(whole: View) -> Iterator[Piece]:
    """Cut a view into images of single dates; those of one piece have data of the same modalities."""
    present, names = _present(whole), list(whole.images)
    for combination in present.flatten(0, 1).unique(dim=0):
        if not combination.any():
            continue
        where = (present == combination).all(2).nonzero()
        given = [m for m, has in zip(names, combination.tolist(), strict=True) if has]
        for part in where.split(CHUNK):
            sample, date = part.unbind(1)
            yield Piece(
                view=View(
                    images={m: whole.images[m][sample, date] for m in given},
                    valid={m: whole.valid[m][sample, date] for m in given},
                    dates=whole.dates[sample, date],
                    lonlat=None if whole.lonlat is None else whole.lonlat[sample],
                    pixel_m=whole.pixel_m,
                ),
                samples=sample,
            )


def _series(whole: View) -> Iterator[Piece]:
    """Cut a view into samples with all their dates; absent modalities are there, without valid data."""
    some = _present(whole).flatten(1).any(1).nonzero()[:, 0]
    for sample in some.split(CHUNK):
        yield Piece(
            view=View(
                images={m: x[sample] for m, x in whole.images.items()},
                valid={m: v[sample] for m, v in whole.valid.items()},
                dates=whole.dates[sample],
                lonlat=None if whole.lonlat is None else whole.lonlat[sample],
                pixel_m=whole.pixel_m,
            ),
            samples=sample,
        )
