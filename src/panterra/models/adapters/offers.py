"""The networks of others by name: which package offers each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from panterra.errors import InputError
from panterra.models.adapters import terratorch_models, torchgeo_models, transformers_models
from panterra.models.adapters.adapter import Adapter, FittedAdapter

Build = Callable[..., Adapter | FittedAdapter]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A network of others that `load_model` opens."""

    build: Build
    """Takes `pretrained`, and for tests whatever makes the network small."""
    package: str
    """Its module."""
    needs: str
    """As pip takes it."""


TORCHGEO, TERRATORCH, TRANSFORMERS = "torchgeo>=0.7", "terratorch>=1.2", "transformers>=4.56"

ADAPTERS: dict[str, Offer] = {
    **{
        f"croma-{size}": Offer(build=partial(torchgeo_models.croma, size), package="torchgeo", needs=TORCHGEO)
        for size in ("base", "large")
    },
    "panopticon-base": Offer(build=torchgeo_models.panopticon, package="torchgeo", needs=TORCHGEO),
    "copernicus-fm-base": Offer(build=torchgeo_models.copernicus_fm, package="torchgeo", needs=TORCHGEO),
    **{
        f"satlas-swin-{size}": Offer(build=partial(torchgeo_models.satlas, size), package="torchgeo", needs=TORCHGEO)
        for size in ("tiny", "base")
    },
    "presto": Offer(build=torchgeo_models.presto, package="torchgeo", needs="torchgeo>=0.9"),
    **{
        f"terramind-{size}": Offer(
            build=partial(terratorch_models.terramind, size), package="terratorch", needs=TERRATORCH
        )
        for size in ("tiny", "small", "base", "large")
    },
    **{
        f"prithvi-v2-{size.removesuffix('_tl')}": Offer(
            build=partial(terratorch_models.prithvi, size), package="terratorch", needs=TERRATORCH
        )
        for size in terratorch_models.PRITHVI_PATCH_PX
    },
    "clay-v1": Offer(build=terratorch_models.clay, package="terratorch", needs=TERRATORCH),
    **{
        name: Offer(build=partial(transformers_models.dinov3, name), package="transformers", needs=TRANSFORMERS)
        for name in transformers_models.SIZES
    },
}


def open_adapter(name: str, *, random: int | None = None) -> Adapter | FittedAdapter:
    """Open a network of others by name, with its published weights or with random ones from a seed.

    Raises InputError where its package is not installed or its weights cannot be fetched.
    """
    offer = ADAPTERS[name]
    advice = f"pip install '{offer.needs}', in an environment of its own (see the page on other models)"
    if importlib.util.find_spec(offer.package) is None:
        raise InputError(f"{name} comes with {offer.package}, which is not installed: {advice}")
    try:
        if random is None:
            return offer.build(pretrained=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random)
            adapter = offer.build(pretrained=False)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise InputError(f"{offer.package} could not build {name} ({_line(error)}): {advice}") from error
    except OSError as error:
        raise InputError(
            f"the weights of {name} could not be fetched ({_line(error)}); connect, or accept their terms where they "
            "are published and log in with `hf auth login`"
        ) from error
    (adapter if isinstance(adapter, Adapter) else adapter.adapter).name = f"{name} (random weights, seed {random})"
    return adapter


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
