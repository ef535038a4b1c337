"""Which tokens the student sees and which it predicts (OlmoEarth).

A strategy takes, for each modality, which tokens [b, h, w, t, s] have no data, and gives one of the values VISIBLE,
TEACHER_ONLY, DECODE and MISSING for each. Strategies and their options have the published names; ratios are shares of
tokens. All samples are drawn at once, from the given generator alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.olmoearth import TARGET_ONLY
from panterra.models.predictor import DECODE, MISSING, TEACHER_ONLY, VISIBLE

Missing = Mapping[str, Bool[Tensor, "b _h _w _t _s"]]
Drawn = dict[str, Int[Tensor, "b _h _w _t _s"]]
Ratio = float | Float[Tensor, "b 1"]


def make_masks(missing: Missing, config: Mapping[str, Any], *, generator: Generator) -> Drawn:
    """Draw masks by a published configuration, {"type": strategy, option: value}."""
    options = dict(config)
    name = options.pop("type")
    if name not in STRATEGIES:
        raise InputError(f"no masking strategy {name!r}; known: {', '.join(STRATEGIES)}")
    try:
        inspect.signature(STRATEGIES[name]).bind(missing, generator=generator, **options)
    except TypeError as error:
        raise InputError(f"masking strategy {name!r} cannot be used so: {error}") from None
    masks = STRATEGIES[name](missing, generator=generator, **options)
    return {m: mask.masked_fill(missing[m], MISSING) for m, mask in masks.items()}


# Drawing


def _rank(eligible: Bool[Tensor, "b n"], generator: Generator) -> Int[Tensor, "b n"]:
    """Number the eligible places of each row in random order, from 0; the others come after them."""
    key = torch.rand(eligible.shape, generator=generator)
    return key.masked_fill(~eligible, 2.0).argsort(dim=1).argsort(dim=1)


def _between(low: Int[Tensor, " b"], high: Int[Tensor, " b"], generator: Generator) -> Int[Tensor, " b"]:
    """Draw a number per row, both ends included."""
    share = torch.rand(low.shape, generator=generator, dtype=torch.float64)
    return low + (share * (high - low + 1)).long()


def _share(count: Int[Tensor, "b 1"], ratio: Ratio) -> Int[Tensor, "b 1"]:
    return (count.double() * ratio).floor().long()


def _deal(eligible: Bool[Tensor, "b n"], encode: Ratio, decode: Ratio, generator: Generator) -> Int[Tensor, "b n"]:
    """Make a share of each row's eligible places VISIBLE and another DECODE, all others TEACHER_ONLY."""
    count, rank = eligible.sum(1, keepdim=True), _rank(eligible, generator)
    zeros, twos = _share(count, encode), _share(count, decode)
    return _values(rank, zeros, twos)


def _values(rank: Int[Tensor, "b n"], zeros: Int[Tensor, "b 1"], twos: Int[Tensor, "b 1"]) -> Int[Tensor, "b n"]:
    dealt = torch.full_like(rank, TEACHER_ONLY, dtype=torch.uint8)
    dealt[rank < zeros + twos] = DECODE
    dealt[rank < zeros] = VISIBLE
    return dealt


def _fill(missing: Bool[Tensor, "b n"], encode: float, decode: float, generator: Generator) -> Int[Tensor, "b n"]:
    """Deal what is not missing. A single token becomes visible whatever the shares, as in the published code."""
    dealt = _deal(~missing, encode, decode, generator)
    alone = (~missing).sum(1, keepdim=True) == 1
    return torch.where(alone & ~missing, VISIBLE, dealt)


def _shuffled(
    gone: Bool[Tensor, "b h w t s"], modality: str, encode: Ratio, decode: Ratio, generator: Generator
) -> Tensor:
    """Deal all tokens of each sample, missing or not; a constant's over the batch."""
    every = torch.ones_like(gone)
    if MODALITIES[modality].kind == "constant":
        if isinstance(encode, Tensor) or isinstance(decode, Tensor):
            encode, decode = float(torch.as_tensor(encode).mean()), float(torch.as_tensor(decode).mean())
        return _deal(every.reshape(1, -1), encode, decode, generator).view(gone.shape)
    return _deal(every.flatten(1), encode, decode, generator).view(gone.shape)


def _spatial(modality: str) -> bool:
    return MODALITIES[modality].kind in ("series", "still")


def _temporal(modality: str) -> bool:
    return MODALITIES[modality].kind in ("series", "weather")


# Strategies that treat all modalities alike


def random(missing: Missing, *, generator: Generator, encode_ratio: float = 0.5, decode_ratio: float = 0.5) -> Drawn:
    """Deal the tokens of each modality at random."""
    return {m: _shuffled(gone, m, encode_ratio, decode_ratio, generator) for m, gone in missing.items()}


def space(missing: Missing, *, generator: Generator, encode_ratio: float = 0.5, decode_ratio: float = 0.5) -> Drawn:
    """Deal patches: one draw for all dates and spatial modalities of a sample; at random for what has no place."""
    masks = random(missing, generator=generator, encode_ratio=encode_ratio, decode_ratio=decode_ratio)
    places = [gone for m, gone in missing.items() if _spatial(m)]
    if places:
        b, h, w = places[0].shape[:3]
        dealt = _deal(torch.ones(b, h * w, dtype=torch.bool), encode_ratio, decode_ratio, generator)
        grid = dealt.view(b, h, w, 1, 1)
        masks |= {m: grid.expand(gone.shape).clone() for m, gone in missing.items() if _spatial(m)}
    return masks


def time(missing: Missing, *, generator: Generator, encode_ratio: float = 0.5, decode_ratio: float = 0.5) -> Drawn:
    """Deal dates, at least one to see and one to predict: one draw for all series of a sample.

    At random for modalities without time, and for samples with fewer than three dates that have data.
    """
    masks = random(missing, generator=generator, encode_ratio=encode_ratio, decode_ratio=decode_ratio)
    some = _dates_with_data(missing)
    if some is None:
        return masks
    count, rank = some.sum(1, keepdim=True), _rank(some, generator)
    dealt = _values(rank, _share(count, encode_ratio).clamp(min=1), _share(count, decode_ratio).clamp(min=1))
    enough = (count >= 3)[:, :, None, None, None]
    dates = dealt[:, None, None, :, None]
    return {m: torch.where(enough, dates, mask) if _temporal(m) else mask for m, mask in masks.items()}


def _dates_with_data(missing: Missing, kinds: Collection[str] = ("series", "weather")) -> Bool[Tensor, "b t"] | None:
    some = [(~gone).any(4).flatten(1, 2).any(1) for m, gone in missing.items() if MODALITIES[m].kind in kinds]
    return torch.stack(some).any(0) if some else None


def _either(
    first: Callable[..., Drawn],
    second: Callable[..., Drawn],
    missing: Missing,
    *,
    generator: Generator,
    encode_ratio: float = 0.5,
    decode_ratio: float = 0.5,
) -> Drawn:
    """Draw each sample by one of two strategies."""
    a, b = (
        strategy(missing, generator=generator, encode_ratio=encode_ratio, decode_ratio=decode_ratio)
        for strategy in (first, second)
    )
    size = len(next(iter(missing.values())))
    heads = torch.rand(size, 1, 1, 1, 1, generator=generator) < 0.5
    return {m: torch.where(heads, a[m], b[m]) for m in missing}


space_time = partial(_either, space, time)
random_space = partial(_either, random, space)


def random_range(
    missing: Missing,
    *,
    generator: Generator,
    min_encode_ratio: float = 0.1,
    max_encode_ratio: float = 0.5,
    min_decode_ratio: float | None = None,
    max_decode_ratio: float | None = None,
) -> Drawn:
    """Deal at random, by ratios drawn for each sample and modality; all that is not visible is decoded unless given."""

    def draw(low: float, high: float, size: int) -> Float[Tensor, "b 1"]:
        return low + (high - low) * torch.rand(size, 1, generator=generator, dtype=torch.float64)

    masks = {}
    for m, gone in missing.items():
        encode = draw(min_encode_ratio, max_encode_ratio, len(gone))
        decode = 1 - encode
        if min_decode_ratio is not None and max_decode_ratio is not None:
            decode = draw(min_decode_ratio, max_decode_ratio, len(gone))
        masks[m] = _shuffled(gone, m, encode, decode, generator)
    return masks


def random_increasing(
    missing: Missing,
    *,
    generator: Generator,
    step: int = 0,
    steps: int = 1000,
    initial_encode_ratio: float = 0.5,
    final_encode_ratio: float = 0.1,
    initial_decode_ratio: float = 0.5,
    final_decode_ratio: float = 0.9,
) -> Drawn:
    """Deal at random by ratios that move linearly from their first to their last value over `steps`."""
    done = min(step / steps, 1.0)
    return random(
        missing,
        generator=generator,
        encode_ratio=initial_encode_ratio + done * (final_encode_ratio - initial_encode_ratio),
        decode_ratio=initial_decode_ratio + done * (final_decode_ratio - initial_decode_ratio),
    )


# Strategies that treat modalities and band sets differently


def random_fixed_modality(
    missing: Missing,
    *,
    generator: Generator,
    decoded_modalities: Collection[str] = (),
    encode_ratio: float = 0.5,
    decode_ratio: float = 0.5,
) -> Drawn:
    """Deal at random, but decode the given modalities whole."""
    masks = random(missing, generator=generator, encode_ratio=encode_ratio, decode_ratio=decode_ratio)
    return {m: mask.fill_(DECODE) if m in decoded_modalities else mask for m, mask in masks.items()}


def selectable_modality(
    missing: Missing,
    *,
    generator: Generator,
    decodable_modalities: Collection[str] = (),
    fully_mask_modalities: Collection[str] = (),
    max_to_mask: int = 1,
    base: Callable[..., Drawn] = random,
    **ratios: float,
) -> Drawn:
    """Deal by `base`, then take up to `max_to_mask` of the listed modalities from each sample's sight.

    Those of `decodable_modalities` are decoded whole, the others left to the teacher. The published strategy is named
    but not described in the specification; this is what its name says.
    """
    masks = base(missing, generator=generator, **ratios)
    listed = [m for m in missing if m in decodable_modalities or m in fully_mask_modalities]
    if not listed:
        return masks
    some = torch.stack([(~missing[m]).flatten(1).any(1) for m in listed], dim=1)
    number = _between(torch.zeros(len(some), dtype=torch.long), some.sum(1).clamp(max=max_to_mask), generator)
    taken = some & (_rank(some, generator) < number[:, None])
    for i, m in enumerate(listed):
        masks[m][taken[:, i]] = DECODE if m in decodable_modalities else TEACHER_ONLY
    return masks


def modality_cross(
    missing: Missing,
    *,
    generator: Generator,
    base: Callable[..., Drawn] = random,
    encode_ratio: float = 0.5,
    decode_ratio: float = 0.5,
    allow_encoding_decoding_same_bandset: bool = False,
    min_encoded_bandsets: int = 2,
    max_encoded_bandsets: int | None = None,
    min_decoded_bandsets: int = 1,
    max_decoded_bandsets: int | None = None,
    only_decode_modalities: Collection[str] = (),
) -> Drawn:
    """Deal by `base`, then let each sample see some band sets only and predict others (v1).

    As published, a band set that is not seen keeps what it has to decode, whether it was chosen for that or not. Where
    only one or two band sets have data, maps that are never to be seen are predicted, wherever they are listed; the
    published code sees what is listed first.
    """
    masks = base(missing, generator=generator, encode_ratio=encode_ratio, decode_ratio=decode_ratio)
    masks = {m: mask.masked_fill(missing[m], MISSING) for m, mask in masks.items()}
    hidden = {m: m in only_decode_modalities for m in missing}
    listed = [(m, s) for m, gone in missing.items() for s in range(gone.shape[-1])]
    some = torch.stack([(~missing[m][..., s]).flatten(1).any(1) for m, s in listed], dim=1)
    seen = torch.stack([(masks[m][..., s] == VISIBLE).flatten(1).any(1) for m, s in listed], dim=1)
    never = torch.tensor([hidden[m] for m, _ in listed])
    present = some & (seen | never)
    able = present & ~never
    number, number_able = present.sum(1), able.sum(1)

    most = number_able if allow_encoding_decoding_same_bandset else number_able - 1
    most = most.clamp(min=0, max=max_encoded_bandsets)
    least = torch.minimum(number_able.clamp(max=min_encoded_bandsets), most)
    encoded = able & (_rank(able, generator) < _between(least, most, generator)[:, None])
    if allow_encoding_decoding_same_bandset:
        most = number.clamp(min=0, max=max_decoded_bandsets)
        least = torch.minimum(number.clamp(max=min_decoded_bandsets), most)
        decoded = present & (_rank(present, generator) < _between(least, most, generator)[:, None])
    else:
        decoded = present & ~encoded
    first = able & (able.cumsum(1) == 1)
    few = (number <= 2)[:, None]
    encoded, decoded = torch.where(few, first, encoded), torch.where(few, present & ~first, decoded)

    for i, (m, s) in enumerate(listed):
        mask = masks[m][..., s]
        unseen, only_seen = ~encoded[:, i], encoded[:, i] & ~decoded[:, i]
        mask[(mask == VISIBLE) & unseen[:, None, None, None]] = TEACHER_ONLY
        mask[(mask == DECODE) & only_seen[:, None, None, None]] = TEACHER_ONLY
    useless = ~(_any(masks, VISIBLE) & _any(masks, DECODE))
    if bool(useless.any()):
        for m in missing:
            if not hidden[m]:
                gone = missing[m][useless]
                masks[m][useless] = _fill(gone.flatten(1), encode_ratio, decode_ratio, generator).view(gone.shape)
    return masks


def _any(masks: Drawn, value: int) -> Bool[Tensor, " b"]:
    return torch.stack([(mask == value).flatten(1).any(1) for mask in masks.values()]).any(0)


def random_time_with_decode(
    missing: Missing,
    *,
    generator: Generator,
    encode_ratio: float = 0.5,
    decode_ratio: float = 0.5,
    random_ratio: float = 0.5,
    only_decode_modalities: Collection[str] = (),
) -> Drawn:
    """Let each sample see some band sets and predict the others, in random patches or on different dates (v1.1, v1.2).

    `random_ratio` is the share of samples by patches. The modalities of `only_decode_modalities` are decoded whole.
    """
    masks = {m: torch.full(gone.shape, DECODE, dtype=torch.uint8) for m, gone in missing.items()}
    shown = {m: gone for m, gone in missing.items() if m not in only_decode_modalities}
    if not shown:
        return masks
    listed = [(m, s) for m, gone in shown.items() for s in range(gone.shape[-1])]
    some = torch.stack([(~missing[m][..., s]).flatten(1).any(1) for m, s in listed], dim=1)
    number = some.sum(1, keepdim=True)
    encoded = _rank(some, generator) < (number.double() * encode_ratio).ceil()
    alone = number[:, 0] == 1

    dates = _dates_with_data(shown, ("series",))
    by_date = torch.zeros(len(some), dtype=torch.bool)
    if dates is not None:
        count = dates.sum(1, keepdim=True)
        by_date = (torch.rand(len(some), generator=generator) >= random_ratio) & (count[:, 0] >= 2)
        encode_date = _rank(dates, generator) < (count.double() * encode_ratio).ceil()

    for i, (m, s) in enumerate(listed):
        gone = missing[m][..., s]
        flat = gone.flatten(1)
        encode = _fill(flat, encode_ratio, 0.0, generator)
        decode = _fill(flat, 0.0, decode_ratio, generator)
        drawn = torch.where(encoded[:, i, None], encode, decode)
        drawn = torch.where(alone[:, None], _fill(flat, encode_ratio, decode_ratio, generator), drawn).view(gone.shape)
        if dates is not None and MODALITIES[m].kind == "series":
            # Dates that nobody has are neither; their tokens are missing anyway.
            mine = torch.where(encoded[:, i, None], encode_date, dates & ~encode_date)[:, None, None, :]
            value = torch.where(encoded[:, i], VISIBLE, DECODE).to(torch.uint8)[:, None, None, None]
            dealt = torch.where(mine, value, TEACHER_ONLY)
            usable = by_date & ~alone & (mine & ~gone).flatten(1).any(1)
            drawn = torch.where(usable[:, None, None, None], dealt, drawn)
        masks[m][..., s] = drawn
    return masks


STRATEGIES: dict[str, Callable[..., Drawn]] = {
    "random": random,
    "space": space,
    "time": time,
    "space_time": space_time,
    "random_space": random_space,
    "random_increasing": random_increasing,
    "random_range": random_range,
    "random_with_decode": partial(random_time_with_decode, random_ratio=1.0),
    "random_time_with_decode": random_time_with_decode,
    "random_fixed_modality": random_fixed_modality,
    "selectable_modality": selectable_modality,
    "selectable_random_range_modality": partial(selectable_modality, base=random_range),
    "modality_cross_random": modality_cross,
    "modality_cross_space": partial(modality_cross, base=space),
    # Published under this name with the mask of `space`; released results that name it mean that.
    "modality_cross_time": partial(modality_cross, base=space),
    "modality_cross_space_time": partial(modality_cross, base=space_time),
}
"""Strategies by their published names."""

V1_MASKING = {
    "type": "modality_cross_random",
    "encode_ratio": 0.5,
    "decode_ratio": 0.5,
    "allow_encoding_decoding_same_bandset": True,
    "only_decode_modalities": TARGET_ONLY,
}
TIME_MASKING = {
    "type": "random_time_with_decode",
    "encode_ratio": 0.5,
    "decode_ratio": 0.5,
    "random_ratio": 0.5,
    "only_decode_modalities": TARGET_ONLY,
}
"""The masking of v1.1 and v1.2."""
