import json
from itertools import product

import numpy as np
import pytest

from panterra.mapping.blend import Canvas, window_weight
from panterra.mapping.seams import LARGEST, VISIBLE, read_seams, seam_score, tile_seams, warning_of
from panterra.mapping.tiles import Axis, Borders, blocks

HEIGHT, WIDTH, DIM = 23, 31, 5


def score_of(features, *, tile, borders):
    height, width = features.shape[:2]
    tiles = list(blocks(height, width, rows=tile, cols=tile))
    kept = {t.name: tile_seams(features[t.core.slices], t, borders) for t in reversed(tiles)}
    return seam_score(tiles, lambda t: kept.get(t.name))


def borders_of(tile, window=0):
    edges = [sorted({*range(tile, n, tile), *range(window, n, window or n)} - {0}) for n in (HEIGHT, WIDTH)]
    return tuple(Borders(middles=tuple(lines), lag=1) for lines in edges)


def by_hand(features, borders):
    """Go through all pairs of neighbours."""
    found = {True: [], False: []}
    for row, col in product(range(features.shape[0]), range(features.shape[1])):
        for axis, (i, j) in enumerate(((row - 1, col), (row, col - 1))):
            if min(i, j) >= 0:
                step = np.abs(features[row, col] - features[i, j]).mean(dtype=np.float64)
                if np.isfinite(step):
                    found[(row, col)[axis] in borders[axis].middles].append(step)
    return found


def scattered(seed=0):
    features = np.random.default_rng(seed).normal(size=(HEIGHT, WIDTH, DIM)).astype(np.float32)
    features[4:9, 6:15] = np.nan
    return features


@pytest.mark.parametrize("tile", [5, 7, 40])
def test_the_score_is_that_of_all_pairs_of_neighbours(tile):
    features, borders = scattered(), borders_of(tile, window=4)
    found, score = by_hand(features, borders), score_of(features, tile=tile, borders=borders)
    assert (score.num_across, score.num_within) == (len(found[True]), len(found[False]))
    assert score.across == pytest.approx(np.mean(found[True]), rel=1e-12)
    assert score.within == pytest.approx(np.mean(found[False]), rel=1e-12)
    assert score.ratio == pytest.approx(score.across / score.within)
    assert not score.visible
    assert warning_of(score) is None


def test_a_step_at_every_border_shows():
    smooth = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH))[..., None] * np.ones(DIM, np.float32)
    assert score_of(smooth, tile=8, borders=borders_of(8)).ratio == pytest.approx(1)
    stepped = smooth + 2.0 * np.add.outer(np.arange(HEIGHT) // 8, np.arange(WIDTH) // 8)[..., None]
    score = score_of(stepped, tile=8, borders=borders_of(8))
    assert score.ratio == pytest.approx(3)
    assert score.ratio > VISIBLE
    assert "3.00 times" in warning_of(score)
    assert score_of(stepped - smooth, tile=8, borders=borders_of(8)).ratio == LARGEST


def test_where_there_is_nothing_to_compare_there_is_no_score():
    assert score_of(np.ones((8, 8, 2)), tile=4, borders=borders_of(4)).ratio is None
    assert score_of(np.full((8, 8, 2), np.nan), tile=4, borders=borders_of(4)).ratio is None
    assert score_of(scattered()[:4, :4], tile=4, borders=borders_of(4)).ratio is None


def test_a_failed_tile_has_no_neighbours():
    features, borders = scattered(), borders_of(8)
    without = features.copy()
    without[8:16, 8:16] = np.nan
    tiles = list(blocks(HEIGHT, WIDTH, rows=8, cols=8))
    kept = {t.name: tile_seams(features[t.core.slices], t, borders) for t in tiles}
    del kept["00001_00001"]
    assert seam_score(tiles, lambda t: kept.get(t.name)) == score_of(without, tile=8, borders=borders)


def test_of_many_features_a_few_tell_as_much():
    features = np.repeat(scattered(), 64, axis=-1)
    few, all_ = (score_of(f, tile=8, borders=borders_of(8)) for f in (features, scattered()))
    assert tile_seams(features, next(blocks(HEIGHT, WIDTH, rows=50, cols=50)), borders_of(8))["seam_top"].size < 40 * 32
    assert few.ratio == pytest.approx(all_.ratio, rel=0.05)


@pytest.mark.parametrize(("window", "overlap", "tile"), [(16, 4, 24), (12, 3, 40), (8, 4, 8), (9, 0, 27)])
def test_windows_that_differ_show_even_when_blended(window, overlap, tile):
    axis = Axis.cut(120, window=window, overlap=overlap, tile=tile)
    rng, weight = np.random.default_rng(1), window_weight(window, window, overlap)
    even, uneven = (Canvas.blank(120, 120, 3) for _ in range(2))
    ground = rng.normal(size=(120, 120, 3)).astype(np.float32)
    for i, j in product(range(axis.num_windows), repeat=2):
        rows, cols = (slice(axis.start(n), axis.start(n) + window) for n in (i, j))
        seen = np.ones((window, window), bool)
        for canvas, offset in ((even, 0), (uneven, rng.normal(size=3) * 5)):
            canvas.part(rows, cols).paint(ground[rows, cols] + offset, seen, weight)
    borders = axis.borders(), axis.borders()
    assert score_of(even.mean(), tile=axis.tile, borders=borders).ratio == pytest.approx(1, abs=0.1)
    assert score_of(uneven.mean(), tile=axis.tile, borders=borders).ratio > VISIBLE


def test_a_passport_tells_the_score(tmp_path):
    score = score_of(scattered(), tile=8, borders=borders_of(8))
    file = tmp_path / "m.tif.json"
    file.write_text(json.dumps({"properties": {"panterra:seams": score.as_dict()}}))
    assert read_seams(file) == score
    file.write_text(json.dumps({"properties": {}}))
    assert read_seams(file) is None
