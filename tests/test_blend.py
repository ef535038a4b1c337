import numpy as np
import pytest

from panterra.mapping.blend import Canvas, window_weight


@pytest.mark.parametrize(("size", "overlap"), [(16, 4), (16, 0), (5, 4), (8, 7), (1, 0), (3, 6)])
def test_weights_are_positive_symmetric_and_at_most_one(size, overlap):
    weight = window_weight(size, size + 2, overlap)
    assert (weight > 0).all()
    assert weight.max() <= 1
    np.testing.assert_array_equal(weight, weight[::-1, ::-1])


@pytest.mark.parametrize(("size", "overlap"), [(16, 4), (16, 8), (9, 3), (4, 0)])
def test_neighbours_on_the_lattice_add_up_to_one(size, overlap):
    stride = size - overlap
    total = np.zeros(stride * 5 + size)
    for start in range(0, stride * 5 + 1, stride):
        total[start : start + size] += window_weight(99, size, overlap)[50]
    np.testing.assert_allclose(total[overlap:-overlap] if overlap else total, 1, atol=1e-6)


def test_two_windows_cross_over_without_a_step():
    canvas, weight = Canvas.blank(1, 28, 1), window_weight(1, 16, 4)
    seen = np.ones((1, 16), bool)
    canvas.part(slice(0, 1), slice(0, 16)).paint(np.full((1, 16, 1), 0.0), seen, weight)
    canvas.part(slice(0, 1), slice(12, 28)).paint(np.full((1, 16, 1), 1.0), seen, weight)
    line = canvas.mean()[0, :, 0]
    assert (line[:12] == 0).all()
    assert (line[16:] == 1).all()
    assert (np.diff(line) >= 0).all()
    assert np.diff(line).max() < 0.4


def test_what_is_not_valid_never_bleeds():
    canvas, weight = Canvas.blank(1, 6, 2), window_weight(1, 4, 2)
    left, right = np.full((1, 4, 2), 3.0), np.full((1, 4, 2), np.nan)
    right[0, 3] = 7.0
    canvas.part(slice(0, 1), slice(0, 4)).paint(left, np.ones((1, 4), bool), weight)
    canvas.part(slice(0, 1), slice(2, 6)).paint(right, np.array([[False, False, False, True]]), weight)
    expected = np.array([3, 3, 3, 3, np.nan, 7])
    np.testing.assert_allclose(canvas.mean()[0, :, 1], expected, rtol=1e-6)


def test_sums_may_be_carried_over_in_parts():
    rng = np.random.default_rng(0)
    whole, features = Canvas.blank(4, 8, 3), rng.normal(size=(4, 8, 3)).astype(np.float32)
    whole.paint(features, np.ones((4, 8), bool), window_weight(4, 8, 2))
    here = Canvas.blank(4, 5, 3)
    here.add(whole)
    np.testing.assert_array_equal(here.mean(), whole.mean()[:, :5])
