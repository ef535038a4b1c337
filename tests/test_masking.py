import itertools

import pytest
import torch

from panterra.errors import InputError
from panterra.models.olmoearth import TARGET_ONLY
from panterra.models.predictor import DECODE, MISSING, TEACHER_ONLY, VISIBLE
from panterra.objectives.masking import STRATEGIES, TIME_MASKING, V1_MASKING, make_masks

OPTIONS = {
    "random_fixed_modality": {"decoded_modalities": ["worldcover"]},
    "selectable_modality": {
        "decodable_modalities": ["landsat"],
        "fully_mask_modalities": ["sentinel1"],
        "max_to_mask": 2,
    },
    "selectable_random_range_modality": {"decodable_modalities": ["landsat"]},
}
CONFIGS = [{"type": name, **OPTIONS.get(name, {})} for name in STRATEGIES] + [V1_MASKING, TIME_MASKING]
SETS = {"sentinel2_l2a": 3, "sentinel1": 1, "landsat": 2, "worldcover": 1, "srtm": 1}


def nothing_missing(batch=16, side=4, dates=4, modalities=tuple(SETS), sets=SETS):
    shapes = {m: (batch, side, side, dates if m not in TARGET_ONLY else 1, sets[m]) for m in modalities}
    return {m: torch.zeros(shape, dtype=torch.bool) for m, shape in shapes.items()}


def some_missing(batch=16):
    missing = nothing_missing(batch)
    missing["sentinel1"][::2] = True
    missing["landsat"][:, :, :, 1:] = True
    missing["sentinel2_l2a"][3, :, :, 2] = True
    missing["sentinel2_l2a"][4, 0, 0] = True
    missing["worldcover"][1::2] = True
    return missing


def draw(missing, config, seed=0):
    return make_masks(missing, config, generator=torch.Generator().manual_seed(seed))


def share(mask, value):
    return (mask == value).float().mean().item()


def name_of(config):
    return config["type"]


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_missing_is_what_has_no_data_and_nothing_else(config):
    missing = some_missing()
    masks = draw(missing, config)
    assert list(masks) == list(missing)
    for m, mask in masks.items():
        assert mask.shape == missing[m].shape
        assert torch.equal(mask == MISSING, missing[m])
        assert mask.max() <= MISSING


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_a_run_is_replayed_from_its_seed_and_leaves_the_global_one_alone(config):
    missing, state = some_missing(), torch.random.get_rng_state()
    before = {m: gone.clone() for m, gone in missing.items()}
    one, same, other = (draw(missing, config, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[m], same[m]) for m in missing)
    assert any(not torch.equal(one[m], other[m]) for m in missing)
    assert all(torch.equal(missing[m], before[m]) for m in missing)


@pytest.mark.parametrize("config", [V1_MASKING, TIME_MASKING, {"type": "random_with_decode"}], ids=name_of)
@pytest.mark.parametrize("missing", [nothing_missing(), some_missing()], ids=["whole", "gaps"])
def test_every_sample_has_something_to_see_and_to_predict_and_never_sees_maps(config, missing):
    masks = draw(missing, config | {"only_decode_modalities": TARGET_ONLY})
    whole = torch.cat([mask.flatten(1) for mask in masks.values()], dim=1)
    assert (whole == VISIBLE).any(1).all()
    assert (whole == DECODE).any(1).all()
    for m in ("worldcover", "srtm"):
        assert not (masks[m] == VISIBLE).any()


@pytest.mark.parametrize("config", [{"type": "random"}, {"type": "space"}, {"type": "time"}], ids=name_of)
def test_ratios_are_shares_of_tokens(config):
    masks = draw(nothing_missing(), config | {"encode_ratio": 0.25, "decode_ratio": 0.5})
    for mask in masks.values():
        counts = [(mask == value).flatten(1).sum(1) / mask[0].numel() for value in (VISIBLE, TEACHER_ONLY, DECODE)]
        for got, wanted in zip(counts, (0.25, 0.25, 0.5), strict=True):
            assert (got == wanted).all()


def test_space_is_one_mask_for_all_dates_and_sensors():
    masks = draw(nothing_missing(), {"type": "space"})
    first = masks["srtm"]
    for mask in masks.values():
        assert torch.equal(mask, first.expand(mask.shape))
    assert not torch.equal(first[0], first[1])


def test_time_is_one_mask_for_all_places_and_sensors():
    masks = draw(nothing_missing(dates=5), {"type": "time"})
    for m in ("sentinel2_l2a", "sentinel1", "landsat"):
        assert torch.equal(masks[m], masks["sentinel1"][:, :1, :1].expand(masks[m].shape))
    steps = masks["sentinel1"][:, 0, 0, :, 0]
    assert ((steps == VISIBLE).sum(1) == 2).all()
    assert ((steps == DECODE).sum(1) == 2).all()


def test_time_needs_three_dates_with_data():
    missing = nothing_missing()
    for m in ("sentinel2_l2a", "sentinel1", "landsat"):
        missing[m][0, :, :, 2:] = True
    mask = draw(missing, {"type": "time"})["sentinel1"]
    by_date = (mask == mask[:, :1, :1]).flatten(1).all(1)
    assert by_date.tolist() == [False] + [True] * 15


def test_time_masking_encodes_some_band_sets_and_decodes_the_others():
    """With three tokens per place and date two are seen, by half; in half of the samples whole dates."""
    missing = nothing_missing(64, sets=dict.fromkeys(SETS, 1))
    masks = draw(missing, TIME_MASKING)
    by_date = 0
    for sample in range(64):
        roles = []
        for m in ("sentinel2_l2a", "sentinel1", "landsat"):
            mask = masks[m][sample]
            kinds = {int(v) for v in mask.unique()}
            assert kinds in ({VISIBLE, TEACHER_ONLY}, {TEACHER_ONLY, DECODE})
            assert share(mask, TEACHER_ONLY) == 0.5
            roles.append(VISIBLE in kinds)
            by_date += bool((mask == mask[:1, :1]).all())
        assert sum(roles) == 2
    assert 64 * 3 * 0.3 < by_date < 64 * 3 * 0.7
    assert share(masks["worldcover"], DECODE) == 1


def test_seen_and_predicted_dates_differ():
    masks = draw(nothing_missing(32, sets=dict.fromkeys(SETS, 1)), TIME_MASKING | {"random_ratio": 0.0})
    series = torch.cat([masks[m] for m in ("sentinel2_l2a", "sentinel1", "landsat")], dim=-1)
    seen, predicted = ((series == value).flatten(1, 2).any(1).any(-1) for value in (VISIBLE, DECODE))
    assert not (seen & predicted).any()
    assert (seen.sum(1) == 2).all()
    assert (predicted.sum(1) == 2).all()


@pytest.mark.parametrize("dates", [1, 4])
def test_a_single_token_per_date_is_split_between_seeing_and_predicting(dates):
    """Sentinel-2 alone, as one token: the band set is filled at random instead of being only seen."""
    mask = draw({"sentinel2_l2a": torch.zeros(8, 4, 4, dates, 1, dtype=torch.bool)}, TIME_MASKING)["sentinel2_l2a"]
    assert ((mask == VISIBLE).flatten(1).sum(1) == 8 * dates).all()
    assert ((mask == DECODE).flatten(1).sum(1) == 8 * dates).all()


def test_the_last_token_of_a_band_set_is_always_seen():
    mask = draw(nothing_missing(side=1, dates=1), TIME_MASKING)
    for m in ("sentinel2_l2a", "sentinel1", "landsat"):
        assert (mask[m] == VISIBLE).all()


def test_a_band_set_without_data_on_the_chosen_dates_is_filled_at_random():
    missing = nothing_missing(64, sets=dict.fromkeys(SETS, 1))
    missing["landsat"][:, :, :, 1:] = True
    masks = draw(missing, TIME_MASKING | {"random_ratio": 0.0})
    landsat = masks["landsat"][:, :, :, 0]
    shares = (landsat != TEACHER_ONLY).flatten(1).float().mean(1)
    assert {round(x, 2) for x in shares.tolist()} == {0.5, 1.0}


def test_crossed_modalities_share_no_band_set_unless_allowed():
    masks = draw(nothing_missing(), {"type": "modality_cross_random"})
    both = [
        bool((masks[m][i, ..., s] == VISIBLE).any() and (masks[m][i, ..., s] == DECODE).any())
        for m, i in itertools.product(masks, range(16))
        for s in range(SETS[m])
    ]
    assert not any(both)
    allowed = draw(nothing_missing(), V1_MASKING)["sentinel2_l2a"]
    assert any((allowed[i, ..., 0] == VISIBLE).any() and (allowed[i, ..., 0] == DECODE).any() for i in range(16))


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 2), (3, 3)])
def test_the_number_of_encoded_band_sets_can_be_chosen(low, high):
    masks = draw(nothing_missing(), V1_MASKING | {"min_encoded_bandsets": low, "max_encoded_bandsets": high})
    seen = torch.cat([(mask == VISIBLE).flatten(1, 3).any(1) for mask in masks.values()], dim=1)
    assert (seen.sum(1) == low).all()


def test_of_two_band_sets_one_is_seen_and_the_other_predicted():
    masks = draw(nothing_missing(modalities=("worldcover", "sentinel1")), V1_MASKING)
    assert {int(v) for v in masks["sentinel1"].unique()} == {VISIBLE, TEACHER_ONLY}
    assert {int(v) for v in masks["worldcover"].unique()} == {TEACHER_ONLY, DECODE}


def test_fixed_modalities_are_decoded_whole():
    masks = draw(nothing_missing(), {"type": "random_fixed_modality", "decoded_modalities": ["srtm"]})
    assert share(masks["srtm"], DECODE) == 1
    assert share(masks["worldcover"], VISIBLE) == 0.5


def test_selected_modalities_go_out_of_sight():
    masks = draw(nothing_missing(64), {"type": "selectable_modality", **OPTIONS["selectable_modality"]})
    whole = {m: [{int(v) for v in mask[i].unique()} for i in range(64)] for m, mask in masks.items()}
    assert {frozenset(kinds) for kinds in whole["landsat"]} == {frozenset({DECODE}), frozenset({VISIBLE, DECODE})}
    assert {frozenset(k) for k in whole["sentinel1"]} == {frozenset({TEACHER_ONLY}), frozenset({VISIBLE, DECODE})}
    assert share(masks["srtm"], VISIBLE) == 0.5


def test_ratios_can_move_over_a_run():
    shares = [
        share(
            draw(nothing_missing(), {"type": "random_increasing", "step": step, "steps": 10})["sentinel2_l2a"], VISIBLE
        )
        for step in (0, 5, 10, 20)
    ]
    assert shares == pytest.approx([0.5, 0.3, 0.1, 0.1], abs=0.01)


def test_drawn_ratios_differ_between_samples_and_leave_no_token_unused():
    mask = draw(nothing_missing(64), {"type": "random_range"})["sentinel2_l2a"]
    seen = (mask == VISIBLE).flatten(1).float().mean(1)
    assert seen.min() >= 0.09
    assert seen.max() <= 0.5
    assert seen.std() > 0.05
    assert share(mask, TEACHER_ONLY) < 0.01


def test_weather_and_constants_are_dealt_at_random():
    missing = {
        "era5_10": torch.zeros(6, 1, 1, 4, 1, dtype=torch.bool),
        "latlon": torch.zeros(6, 1, 1, 1, 1, dtype=torch.bool),
    }
    masks = draw(missing, {"type": "random"})
    assert ((masks["era5_10"] == VISIBLE).flatten(1).sum(1) == 2).all()
    assert (masks["latlon"] == VISIBLE).sum() == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "stripes"}, "no masking strategy 'stripes'; known: random, "),
        ({"type": "space", "ratio": 0.5}, "'space' cannot be used so: .*'ratio'"),
    ],
)
def test_what_cannot_be_used_is_named(config, message):
    with pytest.raises(InputError, match=message):
        draw(nothing_missing(), config)
