import pytest
import torch

from panterra.errors import InputError
from panterra.objectives.jepa_masks import (
    BlockMasking,
    NaiveMasking,
    draw_dates,
    draw_scale,
    draw_tokens,
    keep_tokens,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def masks(grid, batch=4, *, sizes=0, places=0, masking=None):
    return (masking or BlockMasking())(grid, batch, sizes=seeded(sizes), places=seeded(places))


@pytest.mark.parametrize("grid", [2, 3, 6, 10, 16])
def test_targets_are_blocks_and_the_context_lies_outside_them(grid):
    for seed in range(20):
        drawn = masks(grid, 3, sizes=seed, places=seed)
        assert drawn.targets.shape[:2] == (4, 3)
        assert len(drawn.context) == 3
        assert drawn.context.shape[1] > 0
        for i in range(3):
            covered = set()
            for target in drawn.targets[:, i].tolist():
                rows, cols = {t // grid for t in target}, {t % grid for t in target}
                block = [r * grid + c for r in range(min(rows), max(rows) + 1) for c in range(min(cols), max(cols) + 1)]
                assert target == block
                assert 0 <= target[0] <= target[-1] < grid * grid
                covered |= set(target)
            context = drawn.context[i].tolist()
            assert context == sorted(set(context))
            if grid >= 10:  # where blocks hide everything, some of them are disregarded
                assert not covered & set(context)


def test_sizes_and_places_are_drawn_apart():
    a, b, c = masks(10), masks(10, places=1), masks(10, sizes=1)
    assert a.targets.shape == b.targets.shape != c.targets.shape
    assert not torch.equal(a.targets, b.targets)
    assert torch.equal(masks(10).context, a.context)


def test_contexts_are_cut_to_the_shortest_of_the_batch():
    many = masks(16, 32)
    alone = masks(16, 1)
    assert many.context.shape[1] < alone.context.shape[1]
    assert torch.equal(many.context[0], alone.context[0, : many.context.shape[1]])


def test_a_context_that_blocks_always_hide_comes_about_by_disregarding_some():
    everything = BlockMasking(target_area=(1.0, 1.0), target_aspect=(1.0, 1.0), target_blocks=9)
    drawn = masks(3, 8, masking=everything)
    assert drawn.context.shape[1] >= 1


def test_tiles_of_one_patch_cannot_be_masked():
    with pytest.raises(InputError, match="1 x 1 patches cannot be masked"):
        masks(1)


def test_naive_masks_are_random_patches():
    drawn = masks(6, 3, masking=NaiveMasking())
    assert drawn.context.shape == (3, 7)
    assert drawn.targets.shape == (1, 3, 29)
    for row in (*drawn.context.tolist(), *drawn.targets[0].tolist()):
        assert len(set(row)) == len(row)
    with pytest.raises(InputError, match="leaves no context"):
        masks(2, masking=NaiveMasking())


def test_at_each_position_one_modality_stays_and_of_the_others_half():
    modality, noise = torch.tensor([[2, 0, 1, 2, 2]]), torch.rand(1, 15, generator=seeded())
    kept = keep_tokens(modality, noise).view(3, 5)
    assert kept[modality[0], torch.arange(5)].all()
    assert kept.sum() == 5 + 5  # of the ten others
    chosen = torch.zeros(3, 5, dtype=torch.bool)
    chosen[modality[0], torch.arange(5)] = True
    others = noise.view(3, 5)[~chosen]
    assert torch.equal(kept[~chosen], others <= others.sort().values[4])
    assert keep_tokens(modality, noise, dropped=1.0).sum() == 5
    assert keep_tokens(modality, noise, dropped=0.0).all()


def test_modalities_are_kept_equally_often():
    kept = draw_tokens(4, 10, 2000, seeded()).view(2000, 4, 10).float()
    torch.testing.assert_close(kept.mean((0, 2)), torch.full((4,), (1 + 3 * 0.5) / 4), rtol=0.02, atol=0)


def test_dates_that_stay_are_present_ones():
    present = torch.tensor([[True] * 7, [False, True, True, False, True, False, False], [False] * 7])
    seen = set()
    for seed in range(20):
        dates = draw_dates(present, seeded(seed))
        assert dates.index.shape == (3, 3)
        assert dates.valid.sum(1).tolist() == [3, 1, 1]
        for i in range(2):
            chosen = dates.index[i][dates.valid[i]].tolist()
            assert len(set(chosen)) == len(chosen)
            assert present[i, chosen].all()
        seen |= set(dates.index[0].tolist())
    assert seen == set(range(7))
    assert draw_dates(torch.ones(2, 8, dtype=torch.bool), seeded()).valid is None
    assert draw_dates(torch.ones(2, 1, dtype=torch.bool), seeded()).index.shape == (2, 1)


def test_scales_are_drawn_equally_often():
    generator = seeded()
    drawn = [draw_scale((4, 8, 16), generator) for _ in range(600)]
    assert all(160 < drawn.count(scale) < 240 for scale in (4, 8, 16))
