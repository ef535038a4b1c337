import pytest
import torch
import torch.nn.functional as F
from torch import nn

from panterra.models.layers import Block, _attend_in_turn, _attend_padded, attend, drop_path, gelu_linear, norm_linear
from panterra.models.packed import Packed


def pack(lengths):
    return Packed.of(torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None])


def gradients(out, *inputs):
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return torch.autograd.grad((out * g).sum(), inputs)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_made_again_gives_the_gradients_of_what_is_kept(autocast):
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(12), nn.Linear(12, 7)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 12, requires_grad=True)
    inputs = (x, linear.weight, linear.bias)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        pairs = (
            (norm_linear(x, norm, linear), linear(norm(x)), (*inputs, norm.weight, norm.bias)),
            (gelu_linear(x, linear), linear(F.gelu(x)), inputs),
        )
    for ours, plain, weights in pairs:
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, **tolerance)
        for a, b in zip(gradients(ours, *weights), gradients(plain, *weights), strict=True):
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((3, 5, 1), (2, 4, 6)),
        ((4, 4), (3, 3)),
        ((2, 0, 3), (4, 2, 0)),
        ((4, 4), (3, 2)),
        ((2, 2), (0, 0)),
        ((0, 0), (0, 0)),
    ],
)
@pytest.mark.parametrize("way", [_attend_in_turn, _attend_padded])
def test_packed_samples_attend_to_themselves_alone(way, queries, keys):
    torch.manual_seed(0)
    q = torch.randn(1, sum(queries), 2, 4, requires_grad=True)
    k, v = torch.randn(2, 1, sum(keys), 2, 4, requires_grad=True)
    rows = zip(q.split(queries, 1), k.split(keys, 1), v.split(keys, 1), strict=True)
    expected = torch.cat(
        [attend(*row) if row[1].numel() else (row[0] + row[1].sum() + row[2].sum()) * 0 for row in rows], dim=1
    )
    got = way(q, k, v, pack((*queries,)), pack((*keys,)))
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(got, q, k, v), gradients(expected, q, k, v), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_block_treats_packed_samples_as_it_treats_each(qk_norm):
    torch.manual_seed(0)
    block = Block(16, 2, 32, qk_norm=qk_norm)
    samples = [torch.randn(1, n, 16) for n in (3, 1, 6)]
    turns = [torch.randn(1, n, 2, 4) for n in (3, 1, 6)]
    packed = pack((3, 1, 6))
    expected = torch.cat([block(x, turn=turn) for x, turn in zip(samples, turns, strict=True)], dim=1)
    got = block(torch.cat(samples, dim=1), turn=torch.cat(turns, dim=1), packed=packed)
    torch.testing.assert_close(got, expected)
    with torch.no_grad():
        x = torch.cat(samples, dim=1)
        block.eval().update(x, turn=torch.cat(turns, dim=1), packed=packed)
    torch.testing.assert_close(x, expected)


def test_dropped_paths_are_those_of_whole_samples():
    torch.manual_seed(0)
    packed = pack((4,) * 200)
    out = drop_path(torch.ones(1, 800, 1), 0.25, training=True, packed=packed).view(200, 4)
    assert torch.equal(out, out[:, :1].expand(-1, 4))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert 0.15 < (out == 0).float().mean() < 0.35
