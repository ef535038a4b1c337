"""The run of `panterra-nano`: batches of places, how their images vary, where training starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from panterra.models.normalize import normalize_olmoearth
from panterra.models.olmoearth import OlmoEarth, PatchEmbedding
from panterra.models.slots import to_timestamps
from panterra.models.weights import save_model
from panterra.objectives.map_decoding import MapDecoding, MapViews
from panterra.recipes.nano import DATES, SIDE_PX, NanoRecipe
from panterra.recipes.nano_places import KINDS, Places, draw_places, join
from panterra.train.loop import Check, Run
from panterra.train.optim import Optimisation

MIXTURES = (
    *[("sentinel2_l2a",)] * 5,
    *[("sentinel2_l2a", "sentinel1")] * 2,
    ("sentinel1",),
    ("landsat",),
    ("landsat", "sentinel1"),
    ("sentinel2_l2a", "landsat", "sentinel1"),
)
"""What the samples of a batch show, one of these."""
# Centres of the bands of Sentinel-2 in micrometres, in the order of the modality.
_WAVELENGTHS = torch.tensor([0.49, 0.56, 0.665, 0.842, 0.705, 0.74, 0.783, 0.865, 1.61, 2.19, 0.443, 0.945])
_LANDSAT_DARK = 5000
_CALIBRATION = 10**7
"""Batches from this number on calibrate the patch embeddings and are not trained on."""


def nano_run(
    recipe: NanoRecipe,
    folder: Path,
    *,
    checks: Sequence[Check] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Run:
    """Make the run; its places are drawn into `folder` first, where they are not there yet."""
    parts = [
        draw_places(folder / f"places-{seed}", count, seed=seed, southern=seed > len(recipe.places), progress=progress)
        for seed, count in enumerate((*recipe.places, *recipe.southern), 1)
    ]

    restart = round(recipe.restart * recipe.steps)

    def objective() -> nn.Module:
        encoder = OlmoEarth(recipe.encoder)
        calibrate(encoder, PlaceBatches(parts, recipe, seed=77))
        return MapDecoding(encoder, kinds=len(KINDS))

    def average(trained: nn.Module, step: int) -> None:
        assert isinstance(trained, MapDecoding)
        trained.average(step - restart, recipe.average_window)

    def export(trained: nn.Module, out: Path) -> None:
        assert isinstance(trained, MapDecoding)
        trained.averaged.name, trained.averaged.licence = recipe.name, "Apache-2.0"
        save_model(trained.averaged, out, dtype=torch.float16)

    return Run(
        name=recipe.name,
        seed=recipe.seed,
        init_seed=recipe.init_seed,
        objective=objective,
        batches=lambda rank, world: PlaceBatches(parts, recipe, seed=recipe.seed, rank=rank, world=world),
        optimisation=Optimisation(
            method="muon",
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            steps=recipe.steps,
            warmup_steps=recipe.warmup_steps,
            final_share=recipe.final_share,
            restart_step=restart,
        ),
        before_step=average,
        checks=checks,
        export=export,
        settings={"recipe": asdict(recipe)},
    )


class PlaceBatches(Dataset[Sequence[MapViews]]):
    """Batches by number: crops of places, turned and mirrored, in light and air that vary."""

    def __init__(
        self, parts: Sequence[Places], recipe: NanoRecipe, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.places, self.recipe, self.seed, self.rank, self.world = join(parts), recipe, seed, rank, world

    def __getitem__(self, step: int) -> Sequence[MapViews]:
        return [self.views(step * self.world + self.rank)]

    def views(self, number: int, modalities: tuple[str, ...] | None = None, tokens: int | None = None) -> MapViews:
        """Make a batch, of some modalities where they are given."""
        rng = np.random.default_rng([self.seed, number])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        recipe = self.recipe
        patch_px = int(rng.choice(recipe.patch_px))
        side = int(rng.choice([side for side in recipe.side_patches if side * patch_px <= SIDE_PX]))
        dates = int(rng.choice(recipe.dates))
        mixtures = MIXTURES if modalities is None else (modalities,)
        seen = mixtures[int(rng.integers(len(mixtures)))]
        count = int(np.clip((tokens or recipe.tokens) // (side * side * dates * len(seen)), 4, recipe.batch))
        chosen = rng.integers(len(self.places), size=count)
        crops = [crop(self.places[i], seen, side * patch_px, dates, rng) for i in chosen]
        fields = {name: np.stack([c[name] for c in crops]) for name in crops[0]}
        inputs = {}
        for m in seen:
            x = VARIED[m](torch.from_numpy(fields[m].astype(np.float32)), generator)
            kept = None
            if m != "sentinel1" and rng.random() < 0.25:
                odds = torch.rand(count, 1, x.shape[2], 1, 1, generator=generator)
                kept = odds > 0.2 * torch.rand(count, 1, 1, 1, 1, generator=generator)
            x = normalize_olmoearth(x.permute(0, 1, 3, 4, 2), m).permute(0, 1, 4, 2, 3).contiguous()
            inputs[m] = x if kept is None else x * kept
        surface = F.one_hot(torch.from_numpy(fields["surface"]).long(), len(KINDS)).float()
        elevation = by_patch(torch.from_numpy(fields["elevation"])[..., None], patch_px)[..., 0]
        return MapViews(
            inputs=inputs,
            timestamps=to_timestamps(torch.from_numpy(fields["days"])),
            patch_px=patch_px,
            shares=by_patch(surface, patch_px),
            height=by_patch(torch.from_numpy(fields["height"].astype(np.float32))[..., None], patch_px)[..., 0],
            relief=elevation - elevation.mean((1, 2), keepdim=True),
        )


def crop(
    place: tuple[Places, int], modalities: Sequence[str], side_px: int, dates: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Cut a square from a place, with some of its dates and in one of eight positions."""
    places, index = place
    row, col = rng.integers(0, SIDE_PX - side_px + 1, 2)
    which = np.sort(rng.permutation(DATES)[:dates])
    transposed = rng.random() < 0.5
    down, across = rng.random(2) < 0.5
    inside = (..., slice(row, row + side_px), slice(col, col + side_px))

    def placed(x: np.ndarray) -> np.ndarray:
        x = x.swapaxes(-1, -2) if transposed else x
        x = x[..., ::-1, :] if down else x
        return np.ascontiguousarray(x[..., ::-1] if across else x)

    images = {m: placed(getattr(places, m)[index][which][inside]) for m in modalities}
    truth = {name: placed(getattr(places, name)[index][inside]) for name in ("surface", "height", "elevation")}
    return {**images, **truth, "days": places.days[index][which]}


def by_patch(field: Float[Tensor, "b y x k"], patch_px: int) -> Float[Tensor, "b h w k"]:
    """Average over patches."""
    b, rows, columns, k = field.shape
    return field.view(b, rows // patch_px, patch_px, columns // patch_px, patch_px, k).mean((2, 4))


# How images differ from the planet's own: what people feed to a model is lit, corrected and scaled in many ways.


def vary_sentinel2(x: Float[Tensor, "b t c y x"], g: torch.Generator) -> Float[Tensor, "b t c y x"]:
    """Give 70 % of samples other gains along the spectrum, contrast, haze, an offset and noise."""
    b, t, c = x.shape[:3]
    varied = (torch.rand(b, 1, 1, 1, 1, generator=g) < 0.7).float()
    gain = curve(b, g)[:, None, :, None, None] * torch.exp(0.08 * torch.randn(b, t, 1, 1, 1, generator=g))
    haze = (torch.rand(b, t, 1, generator=g) ** 2 * 600 * (0.45 / _WAVELENGTHS) ** 2).view(b, t, c, 1, 1)
    haze = haze * (torch.rand(b, 1, 1, 1, 1, generator=g) < 0.4) - 100 * torch.rand(b, 1, 1, 1, 1, generator=g)
    contrast = torch.exp(0.15 * torch.randn(b, 1, 1, 1, 1, generator=g))
    mean = x.mean((3, 4), keepdim=True)
    noise = torch.randn(x.shape, generator=g) * 25 * torch.rand(b, 1, 1, 1, 1, generator=g)
    return x + varied * ((mean + (x - mean) * contrast) * gain + haze + noise - x)


def curve(count: int, g: torch.Generator) -> Float[Tensor, "b c"]:
    """Draw gains of the bands of Sentinel-2: one for all, three bumps along the spectrum, a little for each band."""
    total = 0.15 * torch.randn(count, 1, generator=g)
    for _ in range(3):
        centre = torch.exp(torch.rand(count, 1, generator=g) * 1.8 - 0.9)
        width = 0.15 + 0.6 * torch.rand(count, 1, generator=g)
        height = 0.12 * torch.randn(count, 1, generator=g)
        total = total + height * torch.exp(-(((_WAVELENGTHS - centre) / width) ** 2))
    return torch.exp(total + 0.05 * torch.randn(count, len(_WAVELENGTHS), generator=g))


def vary_sentinel1(x: Float[Tensor, "b t c y x"], g: torch.Generator) -> Float[Tensor, "b t c y x"]:
    """Make 70 % of samples louder or quieter, by a decibel or so."""
    varied = torch.rand(len(x), 1, 1, 1, 1, generator=g) < 0.7
    both = torch.randn(len(x), 1, 1, 1, 1, generator=g)
    return x + varied * (both + 0.5 * torch.randn(len(x), 1, x.shape[2], 1, 1, generator=g))


def vary_landsat(x: Float[Tensor, "b t c y x"], g: torch.Generator) -> Float[Tensor, "b t c y x"]:
    """Give 70 % of samples other gains."""
    varied = torch.rand(len(x), 1, 1, 1, 1, generator=g) < 0.7
    gain = 0.2 * torch.randn(len(x), 1, 1, 1, 1, generator=g)
    gain = torch.exp(gain + 0.08 * torch.randn(len(x), 1, x.shape[2], 1, 1, generator=g))
    return torch.where(varied, (x - _LANDSAT_DARK) * gain + _LANDSAT_DARK, x)


VARIED = {"sentinel2_l2a": vary_sentinel2, "sentinel1": vary_sentinel1, "landsat": vary_landsat}


@torch.no_grad()
def calibrate(encoder: OlmoEarth, batches: PlaceBatches) -> None:
    """Set patch embeddings from data, so that spectra and not constants are most of a token from the first step on.

    The layer of each pixel becomes a random turn of whitened spectra, shifted so far up that few units are cut off;
    patch embeddings are centred and scaled to unit variance.
    """
    for m in encoder.modalities:
        views = [batches.views(_CALIBRATION + i, (m,), tokens=2500) for i in range(6)]
        (embedding,) = encoder.patch_embeddings[m].children()
        assert isinstance(embedding, PatchEmbedding)
        spectra = torch.cat([v.inputs[m].permute(0, 1, 3, 4, 2).flatten(0, 3)[::7] for v in views]).double()
        (layer,) = embedding.pixel
        assert isinstance(layer, nn.Linear)
        layer.weight.copy_(weight := turn(spectra, len(layer.weight)))
        layer.bias.copy_(1.5 - weight @ spectra.mean(0))
        tokens = torch.cat([embedding(v.inputs[m], v.patch_px).flatten(0, -2) for v in views])
        embedding.proj.bias.sub_(tokens.mean(0))
        scale = tokens.std(0)
        embedding.proj.weight.div_(scale[:, None])
        embedding.proj.bias.div_(scale)


def turn(spectra: Float[Tensor, "n c"], units: int) -> Float[Tensor, "units c"]:
    """Draw directions across whitened spectra of at most `units` bands, along each of which spectra vary by one."""
    centred = spectra - spectra.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(centred.T))
    white = (vectors / values.clamp_min(values.max() * 1e-4).sqrt()).T.flip(0)
    count = len(values)
    drawn = torch.randn(units, units, generator=torch.Generator().manual_seed(77), dtype=torch.float64)
    weight = torch.linalg.qr(drawn.T)[0].T[:, :count] @ white
    scaled: Tensor = weight / (centred @ weight.T).std(0)[:, None]
    return scaled
