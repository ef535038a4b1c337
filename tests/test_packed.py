import pytest
import torch

from panterra.models.packed import Packed


@pytest.mark.parametrize("seed", range(4))
def test_a_row_laid_out_by_sample_holds_the_wanted_tokens(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 9, 3, generator=g)
    wanted = torch.rand(5, 9, generator=g) < torch.tensor([[0.5], [0.0], [1.0], [0.2], [0.7]])
    packed = Packed.of(wanted)
    row = x[packed.sample, packed.token]
    assert torch.equal(row, x[wanted])
    assert packed.lengths == tuple(wanted.sum(1).tolist())
    assert torch.equal(packed.pad(row)[packed.valid], row)
    for i, mean in enumerate(packed.mean(row)):
        expected = x[i, wanted[i]].mean(0) if wanted[i].any() else torch.zeros(3)
        torch.testing.assert_close(mean, expected)


def test_a_part_is_what_its_samples_alone_give():
    wanted = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    rows, part = Packed.of(wanted).part(2, 5)
    alone = Packed.of(wanted[2:5])
    assert torch.equal(part.sample, alone.sample)
    assert torch.equal(part.token, alone.token)
    assert torch.equal(part.padded, alone.padded)
    assert (rows.start, rows.stop) == (int(wanted[:2].sum()), int(wanted[:5].sum()))


def test_nothing_may_be_wanted():
    packed = Packed.of(torch.zeros(3, 4, dtype=torch.bool))
    assert packed.lengths == (0, 0, 0)
    assert torch.equal(packed.mean(torch.zeros(0, 2)), torch.zeros(3, 2))
