"""How far predicted tokens are from their targets, and views of one sample from each other (OlmoEarth).

Losses of tokens take pairs: for each modality the predicted and the target tokens to compare, padded to the sample that
has most. All is computed in float32 and without a loop over samples. With `across_ranks` a loss is that of the batches
of all processes together, given that gradients are averaged over processes, as DDP and FSDP do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from panterra.errors import InputError
from panterra.models.packed import Packed
from panterra.models.predictor import Chosen

_NEVER = -1e30
"""A logit without any weight; minus infinity would make NaN of the gradients of samples that have no tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Predicted tokens beside their targets."""

    predicted: Float[Tensor, "b k d"]
    target: Float[Tensor, "b k d"]
    valid: Bool[Tensor, "b k"]
    """False for padding."""


Pairs = Mapping[str, Pair]


def pair_up(
    predicted: Float[Tensor, "b k d"], target: Float[Tensor, "b k d"], chosen: Chosen, sizes: Mapping[str, int]
) -> dict[str, Pair]:
    """Split tokens chosen from all modalities in line into each modality's pairs."""
    sample, place = chosen.valid.nonzero(as_tuple=True)
    packed = Packed.build(sample, chosen.index[sample, place], samples=len(predicted))
    return pair_packed(predicted[chosen.valid], target[chosen.valid], packed, sizes)


def pair_packed(
    predicted: Float[Tensor, "n d"], target: Float[Tensor, "n d"], packed: Packed, sizes: Mapping[str, int]
) -> dict[str, Pair]:
    """Split packed tokens, whose numbers count all modalities in line, into each modality's pairs."""
    ends = torch.tensor(list(sizes.values()), device=predicted.device).cumsum(0)
    modality, samples = torch.searchsorted(ends, packed.token, right=True), len(packed.lengths)
    # A sample's tokens stand in order of their modalities, so that all of one are neighbours.
    counts = torch.bincount(packed.sample * len(sizes) + modality, minlength=samples * len(sizes))
    starts = (counts.cumsum(0) - counts).view(samples, -1)
    counts = counts.view(samples, -1)
    longest, last = counts.amax(0).tolist(), max(len(predicted) - 1, 0)
    places = [torch.arange(most, device=predicted.device) for most in longest]
    rows = [(starts[:, i, None] + place).clamp(max=last) for i, place in enumerate(places)]
    every = torch.cat([row.flatten() for row in rows])
    parts = (x.index_select(0, every).split([row.numel() for row in rows]) for x in (predicted, target))
    return {
        name: Pair(
            predicted=p.unflatten(0, row.shape), target=t.unflatten(0, row.shape), valid=place < counts[:, i, None]
        )
        for i, (name, row, place, p, t) in enumerate(zip(sizes, rows, places, *parts, strict=True))
    }


def join(pairs: Pairs) -> Pair:
    """Line up the tokens of all modalities."""
    return Pair(
        predicted=torch.cat([pair.predicted for pair in pairs.values()], dim=1),
        target=torch.cat([pair.target for pair in pairs.values()], dim=1),
        valid=torch.cat([pair.valid for pair in pairs.values()], dim=1),
    )


def patch_discrimination(
    pair: Pair,
    *,
    temperature: float = 0.1,
    pred2unit: bool = False,
    same_target: float | None = None,
    across_ranks: bool = False,
) -> Float[Tensor, ""]:
    """Cross-entropy of picking each token's own target among its sample's, times twice the temperature.

    The mean over a sample's tokens, then over the samples that have any. `pred2unit` first gives predictions unit
    variance over the batch, per dimension. With `same_target`, targets whose cosine exceeds it do not count as each
    other's negatives; a sample in which some token is left without any negative is skipped.
    """
    if pred2unit:
        pair = _standardised(pair, views=1, across_ranks=across_ranks)
    per_sample, counted = _discriminated(pair, temperature=temperature, same_target=same_target)
    return _mean_where(per_sample, counted, across_ranks=across_ranks)


def _discriminated(
    pair: Pair, *, temperature: float, same_target: float | None
) -> tuple[Float[Tensor, " b"], Bool[Tensor, " b"]]:
    """Give each sample's patch discrimination, and whether it counts."""
    p, t = _unit(pair.predicted), _unit(pair.target)
    logits = p / temperature @ t.mT
    own = logits.diagonal(dim1=1, dim2=2)
    allowed = pair.valid[:, None, :]
    number = pair.valid.sum(1)
    counted = number > 0
    if same_target is not None:
        alike = t @ t.mT > same_target
        stranded = pair.valid & ~(allowed & ~alike).any(2)
        counted = counted & ~(stranded.any(1) & (number > 1))
        alike.diagonal(dim1=1, dim2=2).fill_(False)
        allowed = allowed & ~alike
    loss = logits.masked_fill(~allowed, _NEVER).logsumexp(2) - own
    return _masked_mean(loss, pair.valid) * 2 * temperature, counted


def adjusted_patch_discrimination(
    pair: Pair,
    *,
    temperature: float = 0.1,
    mu: float = 0.7,
    sigma: float = 1.0,
    pred2unit: bool = False,
    across_ranks: bool = False,
) -> Float[Tensor, ""]:
    """Patch discrimination in which negatives weigh by how close they are to being confused.

    A negative's logit is multiplied by a Gaussian of its cosine, relative to the other negatives of its token.
    """
    if pred2unit:
        pair = _standardised(pair, views=1, across_ranks=across_ranks)
    cosine = _unit(pair.predicted) @ _unit(pair.target).mT
    own = torch.eye(cosine.shape[1], dtype=torch.bool, device=cosine.device)
    negative = pair.valid[:, None, :] & ~own
    weight = (-0.5 * ((cosine.detach() - mu) / sigma) ** 2).exp().masked_fill(~negative, 0.0)
    weight = weight / _masked_mean(weight, negative)[..., None].clamp(min=torch.finfo(weight.dtype).tiny)
    logits = torch.where(negative, cosine * weight, cosine) / temperature
    loss = logits.masked_fill(~(negative | own), _NEVER).logsumexp(2) - logits.diagonal(dim1=1, dim2=2)
    per_sample = _masked_mean(loss, pair.valid) * 2 * temperature
    return _mean_where(per_sample, pair.valid.any(1), across_ranks=across_ranks)


def all_discrimination(pair: Pair, *, temperature: float = 0.1, pred2unit: bool = False) -> Float[Tensor, ""]:
    """Cross-entropy of picking each token's own target among those of the whole batch; each sample weighs the same."""
    if pred2unit:
        pair = _standardised(pair, views=1, across_ranks=False)
    p, t = _unit(pair.predicted[pair.valid]), _unit(pair.target[pair.valid])
    logits = p @ t.mT / temperature
    loss = logits.logsumexp(1) - logits.diagonal()
    share = (1 / pair.valid.sum(1, keepdim=True)).expand_as(pair.valid)[pair.valid]
    return (loss * share).sum() / len(pair.valid) * 2 * temperature


def distance(pair: Pair, *, power: Literal[1, 2], across_ranks: bool = False) -> Float[Tensor, ""]:
    """Average the absolute (1) or squared (2) difference of predictions and targets over all elements."""
    difference = pair.predicted.float() - pair.target.float()
    per_token = (difference.abs() if power == 1 else difference.square()).mean(-1)
    return _mean_where(per_token.flatten(), pair.valid.flatten(), across_ranks=across_ranks)


def cosine_similarity(pair: Pair, *, across_ranks: bool = False) -> Float[Tensor, ""]:
    """Average the negative cosine of predictions and targets over all tokens."""
    cosine = F.cosine_similarity(pair.predicted.float(), pair.target.float(), dim=-1)
    return _mean_where(-cosine.flatten(), pair.valid.flatten(), across_ranks=across_ranks)


def class_cross_entropy(pair: Pair, *, across_ranks: bool = False) -> Float[Tensor, ""]:
    """Average the cross-entropy over all tokens; predictions are logits [b, k, classes], targets classes [b, k, 1]."""
    loss = F.cross_entropy(pair.predicted.float().mT, pair.target[..., 0].long(), reduction="none")
    return _mean_where(loss.flatten(), pair.valid.flatten(), across_ranks=across_ranks)


def info_nce(
    a: Float[Tensor, "b d"], b: Float[Tensor, "b d"], *, temperature: float = 0.1, across_ranks: bool = False
) -> Float[Tensor, ""]:
    """Cross-entropy of picking each sample's second view among those of the batch, in one direction.

    The published code compares within one process; `across_ranks` compares with the samples of all of them.
    """
    p, t = _unit(a), _unit(b)
    own = torch.arange(len(p), device=p.device)
    if across_ranks and _distributed():
        t, own = _gather(t), own + dist.get_rank() * len(p)
    return F.cross_entropy(p @ t.mT / temperature, own)


def koleo(x: Float[Tensor, "n d"], *, eps: float = 1e-8) -> Float[Tensor, ""]:
    """Average the negative log distance of unit vectors to their nearest neighbours, which spreads them out.

    Sablayrolles et al. 2019, after Kozachenko and Leonenko. A single vector costs nothing.
    """
    if len(x) < 2:
        return 0.0 * x.float().sum()
    x = F.normalize(x.float(), dim=-1, eps=eps)
    with torch.no_grad():
        nearest = (x @ x.mT).fill_diagonal_(-2).argmax(1)
    return -(F.pairwise_distance(x, x[nearest], eps=eps) + eps).log().mean()


def _modality_patch_discrimination(
    pairs: Pairs,
    *,
    views: int = 1,
    tau: float = 0.1,
    weight: float = 1.0,
    modality_weights: Mapping[str, float] | None = None,
    pred2unit: bool = False,
    across_ranks: bool = False,
) -> dict[str, Tensor]:
    if pred2unit:
        pairs = {m: _standardised(pair, views=views, across_ranks=across_ranks) for m, pair in pairs.items()}
    losses = _each_discriminated(pairs, dict.fromkeys(pairs), views=views, temperature=tau, across_ranks=across_ranks)
    return _weighted(losses, weight, modality_weights)


def _masked_negatives(
    pairs: Pairs,
    *,
    views: int = 1,
    tau: float = 0.1,
    weight: float = 1.0,
    modality_weights: Mapping[str, float] | None = None,
    pred2unit: bool = False,
    same_target_threshold: float = 0.999,
    mask_negatives_for_modalities: Collection[str] | None = None,
    across_ranks: bool = False,
) -> dict[str, Tensor]:
    if pred2unit:
        pairs = {m: _standardised(pair, views=views, across_ranks=across_ranks) for m, pair in pairs.items()}
    listed = pairs if mask_negatives_for_modalities is None else mask_negatives_for_modalities
    same_target = {m: same_target_threshold if m in listed else None for m in pairs}
    losses = _each_discriminated(pairs, same_target, views=views, temperature=tau, across_ranks=across_ranks)
    return _weighted(losses, weight, modality_weights)


def _each_discriminated(
    pairs: Pairs, same_target: Mapping[str, float | None], *, views: int, temperature: float, across_ranks: bool
) -> dict[str, Float[Tensor, " views"]]:
    """Give each modality's patch discrimination; those of equally many tokens are computed as one batch."""
    alike: dict[tuple[int, float | None], list[str]] = {}
    for m, pair in pairs.items():
        alike.setdefault((pair.valid.shape[1], same_target[m]), []).append(m)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for (_, threshold), names in alike.items():
        predicted, target, valid = (
            torch.cat(parts)
            for parts in zip(*((pairs[m].predicted, pairs[m].target, pairs[m].valid) for m in names), strict=True)
        )
        batch = Pair(predicted=predicted, target=target, valid=valid)
        figures = _discriminated(batch, temperature=temperature, same_target=threshold)
        found |= zip(names, zip(*(x.chunk(len(names)) for x in figures), strict=True), strict=True)
    # One mean of all, since ranks differ in which modalities they take together.
    per_sample, counted = (
        torch.stack(x).unflatten(1, (views, -1)) for x in zip(*(found[m] for m in pairs), strict=True)
    )
    means = _mean_where(per_sample, counted, across_ranks=across_ranks)
    return dict(zip(pairs, means, strict=True))


def _weighted(
    losses: Mapping[str, Tensor], weight: float, modality_weights: Mapping[str, float] | None
) -> dict[str, Tensor]:
    return {m: loss * (weight * (modality_weights or {}).get(m, 1.0)) for m, loss in losses.items()}


def _together(
    loss: Callable[..., Tensor], pairs: Pairs, *, views: int = 1, weight: float = 1.0, **options: Any
) -> dict[str, Tensor]:
    return {"all": weight * _of_views(loss, join(pairs), views, options)}


def _apart(
    loss: Callable[..., Tensor], pairs: Pairs, *, views: int = 1, weight: float = 1.0, **options: Any
) -> dict[str, Tensor]:
    return {m: weight * _of_views(loss, pair, views, options) for m, pair in pairs.items()}


def _of_views(
    loss: Callable[..., Tensor], pair: Pair, views: int, options: Mapping[str, Any]
) -> Float[Tensor, " views"]:
    named = {"temperature" if name == "tau" else name: value for name, value in options.items()}
    parts = zip(*(x.chunk(views) for x in (pair.predicted, pair.target, pair.valid)), strict=True)
    return torch.stack([loss(Pair(predicted=p, target=t, valid=v), **named) for p, t, v in parts])


LOSSES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "modality_patch_discrimination": _modality_patch_discrimination,
    "modality_patch_discrimination_new": _modality_patch_discrimination,
    "modality_patch_discrimination_vec": _modality_patch_discrimination,
    "modality_patch_discrimination_masked_negatives": _masked_negatives,
    "modality_patch_discrimination_masked_negatives_vec": _masked_negatives,
    "patch_discrimination": partial(_together, patch_discrimination),
    "patch_discrimination_new": partial(_together, patch_discrimination),
    "adjusted_patch_discrimination": partial(_together, adjusted_patch_discrimination),
    "all_discrimination": partial(_together, all_discrimination),
    "modality_all_discrimination": partial(_apart, all_discrimination),
    "l1": partial(_together, partial(distance, power=1)),
    "l2": partial(_together, partial(distance, power=2)),
    "cosine_similarity": partial(_together, cosine_similarity),
    "mae": partial(_apart, partial(distance, power=1)),
    "cross_entropy": partial(_together, class_cross_entropy),
}
"""Losses of tokens by their published names: from pairs and published options, the terms to sum, for each view."""

PIXEL_LOSSES = ("mae",)
"""Those whose pairs are values of pixels, each a token of width 1, instead of embeddings; see `pixels.pair_pixels`."""


def token_loss(pairs: Pairs, config: Mapping[str, Any], *, across_ranks: bool = False) -> dict[str, Float[Tensor, ""]]:
    """Compute a loss from a published configuration, {"type": name, option: value}: terms whose sum is the loss."""
    (losses,) = view_losses(pairs, config, views=1, across_ranks=across_ranks)
    return losses


def view_losses(
    pairs: Pairs, config: Mapping[str, Any], *, views: int, across_ranks: bool = False
) -> list[dict[str, Float[Tensor, ""]]]:
    """Compute the loss of each of several views at once; their samples stand in line, view after view."""
    options = dict(config)
    name = options.pop("type")
    if name not in LOSSES:
        raise InputError(f"no loss {name!r}; known: {', '.join(LOSSES)}")
    if across_ranks:
        if name.endswith("all_discrimination"):
            raise InputError(f"{name} compares within one process; choose another loss or across_ranks=False")
        options["across_ranks"] = True
    terms = LOSSES[name](pairs, views=views, **options)
    return [{m: term[i] for m, term in terms.items()} for i in range(views)]


def _koleo(
    latent: Float[Tensor, "n d"], seen: Packed, *, mode: Literal["instance", "patch"] = "instance", weight: float = 0.1
) -> Float[Tensor, ""]:
    if mode not in ("instance", "patch"):
        raise InputError(f"KoLeo of mode {mode!r} came; give instance (samples' means) or patch (tokens)")
    return weight * koleo(seen.mean(latent) if mode == "instance" else latent)


REGULARISERS: dict[str, Callable[..., Tensor]] = {"KoLeo": _koleo}
"""What embeddings of visible tokens may cost by themselves, by published names."""


def regularise(
    latent: Float[Tensor, "n d"], seen: Packed, config: Mapping[str, Any], *, across_ranks: bool = False
) -> Float[Tensor, ""]:
    """Compute a regulariser of one view's visible tokens from a published configuration, as `token_loss` does."""
    options = dict(config)
    name = options.pop("type")
    if name not in REGULARISERS:
        raise InputError(f"no regulariser {name!r}; known: {', '.join(REGULARISERS)}")
    if across_ranks:
        raise InputError(f"{name} compares within one process; leave it out or set across_ranks=False")
    return REGULARISERS[name](latent, seen, **options)


def _unit(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    return F.normalize(x.float(), dim=-1, eps=1e-12)


def _masked_mean(x: Float[Tensor, "*b k"], valid: Bool[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    return torch.where(valid, x, 0.0).sum(-1) / valid.sum(-1).clamp(min=1)


def _standardised(pair: Pair, *, views: int, across_ranks: bool) -> Pair:
    """Give predictions zero mean and unit variance per dimension over all tokens of each view's batch.

    What does not vary, or is alone, becomes zero.
    """
    valid = pair.valid.unflatten(0, (views, -1))[..., None]
    x = torch.where(valid, pair.predicted.float().unflatten(0, (views, -1)), 0.0)
    number = _total(valid.sum((1, 2), keepdim=True).float(), across_ranks=across_ranks)
    mean = _total(x.sum((1, 2), keepdim=True), across_ranks=across_ranks) / number.clamp(min=1)
    spread = torch.where(valid, x - mean, 0.0).square().sum((1, 2), keepdim=True)
    variance = _total(spread, across_ranks=across_ranks) / (number - 1).clamp(min=1)
    std = variance.clamp(min=1e-12).sqrt()  # the slope of the root at zero is infinite
    return replace(pair, predicted=((x - mean) / (std + 1e-4)).flatten(0, 1))


def _mean_where(x: Float[Tensor, "*r n"], counted: Bool[Tensor, "*r n"], *, across_ranks: bool) -> Float[Tensor, "*r"]:
    """Average what counts, 0 where nothing does; the average of the ranks' results is that over all of them."""
    world = dist.get_world_size() if across_ranks and _distributed() else 1
    number = _total(counted.sum(-1).float(), across_ranks=across_ranks) / world
    return torch.where(counted, x, 0.0).sum(-1) / number.clamp(min=1 / world)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Gather(torch.autograd.Function):
    """Line up all ranks' rows; each rank's rows get the gradients of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def _gather(x: Float[Tensor, "b d"]) -> Float[Tensor, "n d"]:
    out: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return out


def _total(x: Tensor, *, across_ranks: bool) -> Tensor:
    """Sum over ranks, gradients included."""
    if not (across_ranks and _distributed()):
        return x
    return _gather(x.reshape(1, -1)).sum(0).reshape(x.shape)
