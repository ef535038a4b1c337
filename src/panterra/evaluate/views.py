"""Which features, or which weights, of a model a protocol looks at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from panterra.errors import InputError
from panterra.evaluate.benchmark import (
    Benchmark,
    Kind,
    Pooling,
    batches_of,
    gives_tokens,
    normalisations,
    own_statistics,
    patch_for,
    seen_by,
)
from panterra.evaluate.cache import View
from panterra.evaluate.plan import Plan
from panterra.evaluate.protocols import TUNED, Protocol
from panterra.evaluate.published import ANYSAT, OLMOEARTH, AnySatProbe, OlmoEarthTask
from panterra.evaluate.published_tuning import ANYSAT_TUNING, OLMOEARTH_TUNING, AnySatTuning
from panterra.models.anysat import AnySat
from panterra.models.features import Encoder, Fitted
from panterra.sample import Batch


def trainable(protocol: Protocol, encoder: Encoder) -> bool:
    """Say whether an encoder has the weights that a protocol trains."""
    if protocol not in TUNED:
        return True
    if protocol == "anysat_scratch":
        return isinstance(encoder, AnySat)
    names = [name for name, _ in encoder.named_parameters()] if isinstance(encoder, nn.Module) else []
    return any("projector" in name for name in names) if protocol == "anysat_plus" else bool(names)


def views_of(plan: Plan, protocol: Protocol, encoder: Encoder, benchmark: Benchmark) -> tuple[View, ...]:
    """List the features that a protocol chooses among."""
    task = OLMOEARTH.get(benchmark.name, OlmoEarthTask())
    row: AnySatProbe | AnySatTuning | None = None
    if protocol.startswith("anysat"):
        row = (ANYSAT_TUNING if protocol in TUNED else ANYSAT).get(benchmark.name)
    patch_px, tuned = task.patch_px, OLMOEARTH_TUNING.get(benchmark.name)
    if protocol == "finetune" and tuned is not None:
        patch_px = tuned.patch_px or patch_px
    published = row.modalities if row else task.modalities
    wanted = plan.modalities or published or benchmark.modalities
    offered = [m for m in benchmark.modalities if m in wanted]
    if not offered:
        raise InputError(f"{benchmark.name} has none of {', '.join(wanted)}; it has {', '.join(benchmark.modalities)}")
    shown = seen_by(encoder, offered)
    train = benchmark.splits["train"]
    (sample,), batch = next(batches_of(replace(train, ids=train.ids[:1]), shown))
    patch_m = plan.patch_m or (row.patch_m if row else None)
    patch_m = patch_m or (batch.pixel_m * patch_px if patch_px else patch_for(batch))
    dense = sample.target.ndim == 3
    kind: Kind = "tokens" if protocol == "attention" else "patches" if dense else "centre" if task.centre else "summary"
    sub_patches = None
    if protocol.startswith("anysat"):
        sub_patches = shown.get(row.dense) if row and row.dense else None
        naive = protocol in TUNED and plan.tuned_head == "naive"
        able_to = dense and not naive and _has_sub_patches(encoder, batch, patch_m, sub_patches, plan.device)
        kind = "dense" if able_to else "patches" if dense else "summary"
    elif protocol == "finetune":
        kind = "patches" if dense else "summary"
    able = normalisations(encoder)
    norms = [n for n in plan.normalisations or (task.normalisation,) if n in able] or [able[0]]
    if "published" in norms:
        # Whether there are any is known before anything is embedded.
        own_statistics(benchmark, shown)
    # Sub-patches and single tokens are not pooled; patches only where dates and band sets are at hand.
    pooled = kind == "summary" or (kind in ("patches", "centre") and gives_tokens(encoder))
    own: Pooling = "max" if tuple(shown) == task.highest_of and not protocol.startswith("anysat") else "mean"
    pools: tuple[Pooling, ...] = (plan.poolings or (own,)) if pooled and protocol not in TUNED else ("mean",)
    return tuple(
        View(
            kind=kind,
            pooling=p,
            normalisation=n,
            patch_m=patch_m,
            shown=tuple(shown.items()),
            dense=sub_patches if kind == "dense" else None,
        )
        for n in norms
        for p in pools
    )


def _has_sub_patches(encoder: Encoder, batch: Batch, patch_m: float, modality: str | None, device: str) -> bool:
    given = batch.to(device)
    able = encoder.with_statistics(encoder.fit_statistics([given])) if isinstance(encoder, Fitted) else encoder
    assert isinstance(able, Encoder)
    try:
        asked: Any = modality or True
        with torch.inference_mode():
            return able.encode(given, patch_m=patch_m, dense=asked).dense is not None
    except InputError:
        return False
