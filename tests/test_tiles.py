import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panterra.errors import InputError
from panterra.mapping.tiles import Axis, Lattice, Window

CASES = st.tuples(
    st.integers(1, 90), st.integers(1, 90), st.integers(1, 20), st.floats(0, 0.99), st.integers(1, 60)
).map(lambda c: (c[0], c[1], c[2], int(c[2] * c[3]), c[4]))


def windows_of(lattice: Lattice) -> list[Window]:
    return [window for tile in lattice.tiles() for window in tile.windows]


@settings(max_examples=60)
@given(CASES)
def test_windows_depend_on_the_lattice_alone_and_have_one_owner(case):
    height, width, window, overlap, tile = case
    lattice = Lattice.cut(height, width, window=window, overlap=overlap, tile=tile)
    whole = Lattice.cut(height, width, window=window, overlap=overlap, tile=10_000)
    seen = windows_of(lattice)
    assert len(seen) == len(set(seen)) == lattice.num_windows
    assert set(seen) == set(windows_of(whole))


@settings(max_examples=60)
@given(CASES)
def test_tiles_cover_every_patch_once_and_windows_at_least_once(case):
    height, width, window, overlap, tile = case
    lattice = Lattice.cut(height, width, window=window, overlap=overlap, tile=tile)
    cores, covered = np.zeros((height, width), int), np.zeros((height, width), int)
    for t in lattice.tiles():
        cores[t.core.slices] += 1
        for w in t.windows:
            assert w.row >= 0
            assert w.col >= 0
            assert w.row + w.height <= height
            assert w.col + w.width <= width
            assert t.core.row <= w.row < t.core.row + t.core.height
            assert t.core.col <= w.col < t.core.col + t.core.width
            covered[w.slices] += 1
    assert (cores == 1).all()
    assert (covered >= 1).all()
    assert lattice.num_tiles == sum(1 for _ in lattice.tiles())


@settings(max_examples=60)
@given(CASES)
def test_a_tile_reaches_its_neighbours_at_most(case):
    height, width, window, overlap, tile = case
    lattice = Lattice.cut(height, width, window=window, overlap=overlap, tile=tile)
    for t in lattice.tiles():
        bottom, right = t.reach.row + t.reach.height, t.reach.col + t.reach.width
        assert bottom <= height
        assert right <= width
        if t.row + 1 < lattice.rows.num_tiles:
            assert bottom <= sum(lattice.rows.core(t.row + 1))
        if t.col + 1 < lattice.cols.num_tiles:
            assert right <= sum(lattice.cols.core(t.col + 1))


def test_the_last_window_of_a_row_is_shifted_to_end_at_the_border():
    axis = Axis.cut(50, window=16, overlap=4, tile=24)
    assert [axis.start(i) for i in range(axis.num_windows)] == [0, 12, 24, 34]
    assert axis.tile == 24
    assert [list(axis.owned(t)) for t in range(axis.num_tiles)] == [[0, 1], [2, 3], []]


def test_an_area_smaller_than_a_window_is_one_window():
    lattice = Lattice.cut(3, 40, window=16, overlap=4, tile=100)
    assert lattice.window_shape == (3, 16)
    assert {w.row for w in windows_of(lattice)} == {0}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"height": 0, "width": 5, "window": 4, "overlap": 1}, "0 x 5 patches"),
        ({"height": 5, "width": 5, "window": 4, "overlap": 4}, "wanted 0 <= overlap < window"),
    ],
)
def test_what_cannot_be_cut_says_so(case, message):
    with pytest.raises(InputError, match=message):
        Lattice.cut(case["height"], case["width"], window=case["window"], overlap=case["overlap"], tile=8)
