"""The attention probe is what torch's own attention gives, and learns what to look at."""

import pytest
import torch
import torch.nn.functional as F

from panterra.evaluate.attention_probe import Attention
from panterra.evaluate.readout import Readout
from panterra.evaluate.sweep import Recipe, Table, answers, train_together


def plain(net, theta, vectors):
    """Write one member out: keys and values by a linear layer, scaled dot products, a linear layer."""
    d = net.dim
    query, kv, kv_bias, weight, bias = theta.split((d, 2 * d * d, 2 * d, net.width * d, net.width))
    keys, values = F.linear(vectors, kv.view(2 * d, d), kv_bias).chunk(2, dim=-1)
    split = [t.unflatten(-1, (net.heads, -1)).transpose(1, 2) for t in (keys, values)]
    asked = query.view(1, net.heads, 1, -1).expand(len(vectors), -1, -1, -1)
    pooled = F.scaled_dot_product_attention(asked, *split)[:, :, 0].flatten(1)
    return F.linear(pooled, weight.view(net.width, d), bias)


@pytest.mark.parametrize(("dim", "heads"), [(128, 2), (24, 1), (64, 1)])
def test_outputs_are_those_of_torchs_attention(dim, heads):
    net = Attention(dim=dim, width=5)
    assert net.heads == heads
    generator = torch.Generator().manual_seed(0)
    theta = torch.stack([net.start(generator) for _ in range(3)]).double()
    theta += 0.3 * torch.randn(theta.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(4, 1, 1, 7, dim, generator=generator, dtype=torch.float64)
    found = net.outputs(theta, x, Readout(task="classification", classes=5))
    for m in range(3):
        torch.testing.assert_close(found[m].mT, plain(net, theta[m], x[:, 0, 0]))


def test_gradients_are_those_of_each_member_alone():
    net, generator = Attention(dim=8, width=3), torch.Generator().manual_seed(0)
    theta = torch.stack([net.start(generator) for _ in range(2)]).double()
    x = torch.randn(6, 1, 1, 4, 8, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, -1, 1, 0])
    found = net.gradient(theta, x, y, Readout(task="classification", classes=3))
    for m in range(2):
        leaf = theta[m].clone().requires_grad_()
        loss = F.cross_entropy(plain(net, leaf, x[:, 0, 0]), y, ignore_index=-1)
        (wanted,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(found[m], wanted)


def test_vectors_without_data_are_not_looked_at():
    net, generator = Attention(dim=8, width=3), torch.Generator().manual_seed(0)
    theta = net.start(generator)[None]
    x = torch.randn(2, 1, 1, 5, 8, generator=generator)
    holed = x.clone()
    holed[0, 0, 0, 3:] = torch.nan
    readout = Readout(task="classification", classes=3)
    found = net.outputs(theta, holed, readout)
    torch.testing.assert_close(found[..., :1], net.outputs(theta, x[:1, ..., :3, :], readout))
    torch.testing.assert_close(found[..., 1:], net.outputs(theta, x[1:], readout))
    holed[0] = torch.nan
    assert net.outputs(theta, holed, readout).isfinite().all()


def test_it_finds_the_one_vector_that_matters():
    """The class is written in one of nine vectors, which another number marks; their mean hardly shows it."""
    generator = torch.Generator().manual_seed(0)

    def draw(samples):
        x = torch.randn(samples, 9, 16, generator=generator)
        y = torch.randint(0, 3, (samples,), generator=generator)
        x[:, :, 0] = 0
        place = torch.randint(0, 9, (samples,), generator=generator)
        x[torch.arange(samples), place, 0] = 6
        x[torch.arange(samples), place, 1:4] = 3 * F.one_hot(y, 3).float()
        return Table(x=x, y=y)

    train, val, test = draw(300), draw(100), draw(100)
    recipe = Recipe(rates=(1e-2,), epochs=12, batch=20)
    readout = Readout(task="classification", classes=3)
    (member,) = train_together(train, val, Attention(dim=16, width=3), readout, "accuracy", recipe)
    assert answers(member, test, readout).figures(resamples=20)["accuracy"].estimate > 0.9
