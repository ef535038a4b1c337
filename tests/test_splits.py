import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panterra.errors import InputError
from panterra.evaluate.splits import holdout_by_group, spatial_blocks, split_at_random, split_by_group


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_blocks_are_squares_of_the_asked_size():
    xy = np.array([[0, 0], [99, 99], [100, 0], [-1, 0], [50, 50]])
    block = spatial_blocks(xy, 100)
    assert block[0] == block[1] == block[4]
    assert len({block[0], block[2], block[3]}) == 3
    assert sorted(set(block)) == [0, 1, 2]


def test_pixels_of_a_polygon_stay_together():
    xy = np.array([[90.0, 0], [95, 0], [105, 0], [10, 0]])
    assert len(set(spatial_blocks(xy, 100)[:3])) == 2
    block = spatial_blocks(xy, 100, together=np.array([7, 7, 7, 9]))
    assert len(set(block)) == 1


@given(
    seed=st.integers(0, 10**6), folds=st.integers(2, 6), num_groups=st.integers(6, 40), num_classes=st.integers(1, 6)
)
@settings(max_examples=60)
def test_groups_stay_whole_and_every_class_is_always_learned(seed, folds, num_groups, num_classes):
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.arange(400) % num_groups)
    targets = (rng.integers(0, num_classes, 400) + groups) % num_classes
    fold = split_by_group(groups, targets, folds=folds, seed=seed)
    assert set(fold) == set(range(folds))
    for g in range(num_groups):
        assert len(set(fold[groups == g])) == 1
    for f in range(folds):
        assert set(targets[fold != f]) == set(targets)


def test_folds_are_balanced_in_size_and_classes(rng):
    centre = rng.uniform(0, 1000, (60, 2))
    groups = rng.choice(60, 3000, p=rng.dirichlet(np.full(60, 2)))
    targets = (centre[groups, 0] // 250).astype(int)
    fold = split_by_group(groups, targets, folds=5)
    table = np.array([[(targets[fold == f] == c).sum() for c in range(4)] for f in range(5)])
    shares = table / table.sum(0)
    assert abs(table.sum(1) / 3000 - 0.2).max() < 0.03
    assert abs(shares - 0.2).max() < 0.15


def test_a_rare_class_of_two_blocks_is_spread():
    groups = np.repeat(np.arange(20), 10)
    targets = np.zeros(200, int)
    targets[[3, 113]] = 1
    for seed in range(20):
        fold = split_by_group(groups, targets, folds=3, seed=seed)
        assert fold[3] != fold[113]
        test = holdout_by_group(groups, targets, test_fraction=0.2, seed=seed)
        assert test[3] != test[113]


def test_holdout_takes_about_the_asked_share(rng):
    groups, targets = rng.integers(0, 50, 2000), rng.integers(0, 4, 2000)
    test = holdout_by_group(groups, targets, test_fraction=0.3)
    assert test.mean() == pytest.approx(0.3, abs=0.03)
    assert not set(groups[test]) & set(groups[~test])


def test_random_folds_are_stratified(rng):
    targets = rng.choice(3, 90, p=[0.7, 0.2, 0.1])
    fold = split_at_random(targets, folds=5)
    for c in range(3):
        counts = np.bincount(fold[targets == c], minlength=5)
        assert counts.max() - counts.min() <= 1


def test_the_same_seed_gives_the_same_split(rng):
    groups, targets = rng.integers(0, 30, 300), rng.integers(0, 3, 300)
    np.testing.assert_array_equal(split_by_group(groups, targets, seed=5), split_by_group(groups, targets, seed=5))
    assert (split_by_group(groups, targets, seed=5) != split_by_group(groups, targets, seed=6)).any()


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            lambda: split_by_group(np.arange(3), folds=5),
            "3 samples in 3 groups cannot make 5 parts; use smaller blocks",
        ),
        (lambda: split_by_group(np.arange(9), folds=1), "1 folds were asked for"),
        (
            lambda: split_by_group(np.array([0, 0, 1, 2]), np.array([1, 1, 0, 0]), folds=2, names={1: "maize"}),
            "class 'maize' lies in one spatial block only, so it cannot be both learned and tested; label it in other",
        ),
        (
            # Three blocks that share three classes pairwise have no two sides with every class on both.
            lambda: split_by_group(np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 2, 0, 2]), folds=2),
            "cannot be dealt into 2 parts with '\\d' both learned and tested; use smaller blocks",
        ),
        (lambda: holdout_by_group(np.arange(9), test_fraction=1.0), "test_fraction is 1.0"),
        (lambda: split_at_random(np.array([0, 0, 0, 1]), folds=2), "class '1' has one sample only"),
        (lambda: split_at_random(np.array([0, 0]), folds=3), "2 samples cannot make 3 folds"),
        (lambda: spatial_blocks(np.zeros((2, 2)), 0), "block_m is 0"),
        (lambda: spatial_blocks(np.array([[0, np.nan]]), 10), "wanted finite positions"),
    ],
)
def test_impossible_splits_say_what_to_do(split, message):
    with pytest.raises(InputError, match=message):
        split()
