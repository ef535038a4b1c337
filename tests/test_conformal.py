import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panterra.errors import InputError
from panterra.evaluate.conformal import calibrate_intervals, calibrate_sets, class_scores, conformal_quantile


def test_the_quantile_by_hand():
    scores = np.array([5.0, 1, 4, 2, 3, 9, 8, 6, 7])
    # Of nine scores, the ceil(10 * 0.9) = 9th; of a promise of one half the 5th.
    assert conformal_quantile(scores, 0.1) == 9
    assert conformal_quantile(scores, 0.5) == 5
    assert conformal_quantile(scores, 0.09) == math.inf
    assert conformal_quantile(np.empty(0), 0.5) == math.inf


@given(num=st.integers(1, 300), alpha=st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.3, 0.5]), seed=st.integers(0, 100))
@settings(max_examples=60)
def test_the_quantile_is_the_right_one_in_order(num, alpha, seed):
    scores = np.random.default_rng(seed).random(num)
    rank = math.ceil(round((num + 1) * (1 - alpha), 9))
    wanted = np.sort(scores)[rank - 1] if rank <= num else math.inf
    assert conformal_quantile(scores, alpha) == wanted
    # Groups of one are no groups.
    assert conformal_quantile(scores, alpha, groups=np.arange(num) * 3) == wanted


def test_a_group_weighs_the_same_whatever_its_size():
    scores = np.concatenate([np.zeros(1000), [1.0, 2, 3, 4]])
    groups = np.concatenate([np.zeros(1000, int), [1, 2, 3, 4]])
    assert conformal_quantile(scores, 0.5) == 0
    assert conformal_quantile(scores, 0.5, groups=groups) == 2  # the third of five groups, 3 / 6


def test_scores_by_hand():
    shares = np.array([[0.5, 0.2, 0.3]])
    np.testing.assert_allclose(class_scores(shares, "lac"), [[0.5, 0.8, 0.7]])
    np.testing.assert_allclose(class_scores(shares, "aps"), [[0.5, 1.0, 0.8]])
    np.testing.assert_allclose(class_scores(shares, "raps", penalty=0.1, free_ranks=1), [[0.5, 1.2, 0.9]])
    part = np.random.default_rng(0).random()
    random = class_scores(shares, "aps", generator=np.random.default_rng(0))
    np.testing.assert_allclose(random, [[0.5 * part, 0.8 + 0.2 * part, 0.5 + 0.3 * part]])


def softmax(logits):
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def misled(rng, num, classes=5):
    """Targets, and the probabilities of a model that is too sure and prefers the first classes."""
    logits = rng.normal(size=(num, classes)) * 1.5
    targets = (softmax(logits).cumsum(1) < rng.random((num, 1))).sum(1)
    return softmax(logits * 2 + np.linspace(1, -1, classes)), targets


@pytest.mark.parametrize("score", ["lac", "aps", "raps"])
@pytest.mark.parametrize("random", [False, True])
def test_sets_hold_the_truth_as_often_as_promised(score, random):
    rng = np.random.default_rng(0)
    covered, sizes = [], []
    for _ in range(300):
        probabilities, targets = misled(rng, 300)
        generator = rng if random else None
        sets = calibrate_sets(probabilities[:99], targets[:99], alpha=0.1, score=score, generator=generator)
        inside = sets(probabilities[99:], generator=generator)
        covered.append(inside[np.arange(201), targets[99:]].mean())
        sizes.append(inside.sum(1).mean())
    # With 99 samples the promise is 0.9 exactly.
    assert np.mean(covered) == pytest.approx(0.9, abs=0.01)
    assert 1.5 < np.mean(sizes) < 4.5


def test_by_class_the_promise_holds_for_each():
    rng = np.random.default_rng(1)
    hits, plain, total = np.zeros(5), np.zeros(5), np.zeros(5)
    for _ in range(150):
        probabilities, targets = misled(rng, 900)
        fitted, new = (probabilities[:500], targets[:500]), (probabilities[500:], targets[500:])
        own = np.arange(400), new[1]
        hits += np.bincount(new[1], calibrate_sets(*fitted, by_class=True)(new[0])[own], 5)
        plain += np.bincount(new[1], calibrate_sets(*fitted)(new[0])[own], 5)
        total += np.bincount(new[1], minlength=5)
    np.testing.assert_allclose(hits / total, 0.9, atol=0.02)
    assert np.ptp(plain / total) > 0.1


def test_a_class_without_samples_is_never_left_out():
    rng = np.random.default_rng(2)
    probabilities, targets = misled(rng, 400)
    kept = targets != 4
    sets = calibrate_sets(probabilities[kept], targets[kept], by_class=True)
    assert sets.thresholds[4] == math.inf
    assert sets(probabilities)[:, 4].all()


def clustered(rng, blocks, per_block):
    """Predictions that err alike within a block."""
    size = rng.integers(1, per_block, blocks)
    block = np.repeat(np.arange(blocks), size)
    error = rng.normal(size=blocks)[block] * 2 + rng.normal(size=len(block)) * 0.5
    truth = rng.normal(size=len(block))
    return truth + error, truth, block


def test_blocks_keep_the_promise_in_new_blocks():
    rng = np.random.default_rng(3)
    grouped, pooled = [], []
    for _ in range(400):
        guess, truth, block = clustered(rng, 20, 60)
        new, fresh, where = clustered(rng, 20, 60)
        for groups, covered in ((block, grouped), (None, pooled)):
            low, high = calibrate_intervals(guess, truth, alpha=0.2, groups=groups)(new)
            hit = (low <= fresh) & (fresh <= high)
            covered.append((np.bincount(where, hit) / np.bincount(where)).mean())
    assert 0.8 <= np.mean(grouped) < 0.85
    assert np.mean(pooled) < np.mean(grouped) - 0.02


def test_ranges_hold_the_truth_and_follow_the_spread():
    rng = np.random.default_rng(4)
    covered, widths = [], []
    for _ in range(200):
        spread = rng.uniform(0.2, 2, 400)
        truth = rng.normal(size=400)
        guess = truth + rng.standard_t(3, 400) * spread
        ranges = calibrate_intervals(guess[:199], truth[:199], alpha=0.1, spread=spread[:199])
        low, high = ranges(guess[199:], spread=spread[199:])
        covered.append(((low <= truth[199:]) & (truth[199:] <= high)).mean())
        widths.append(np.corrcoef(high - low, spread[199:])[0, 1])
    assert np.mean(covered) == pytest.approx(0.9, abs=0.01)
    assert min(widths) > 0.999
    plain = calibrate_intervals(guess, truth, alpha=0.1)
    low, high = plain(guess.reshape(20, 20))
    assert low.shape == (20, 20)
    np.testing.assert_allclose(high - low, 2 * plain.radius)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0}, "alpha is 0; wanted the share of misses to allow"),
        ({"targets": [0, 2]}, "with the columns of the true classes"),
        ({"probabilities": [[np.nan, 1], [0.5, 0.5]]}, "some scores are NaN"),
    ],
)
def test_what_a_person_can_put_right(arguments, message):
    given = {"probabilities": np.full((2, 2), 0.5), "targets": [0, 1], **arguments}
    with pytest.raises(InputError, match=message):
        calibrate_sets(**given)


def test_ranges_want_a_positive_spread():
    with pytest.raises(InputError, match="some of the spreads are not above 0"):
        calibrate_intervals(np.zeros(3), np.ones(3), spread=np.array([1.0, 0, 1]))
