"""Classes that count more, the Dice loss and interpolating probes, against torch's own losses and gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from panterra.evaluate.class_weights import balanced_weights, count_classes
from panterra.evaluate.dice import dice_loss, rarity
from panterra.evaluate.readout import Readout
from panterra.evaluate.sweep import Linear, Recipe, Table, train_together

WEIGHTS = torch.tensor([0.5, 3.0, 1.0])


def dice_by_hand(image, y, weights):
    known = y >= 0
    loss, p = 0.0, image.softmax(1)
    for k, weight in enumerate(weights):
        share, there = p[:, k][known], (y == k)[known].to(p.dtype)
        loss = loss + weight * (1 - (2 * (share * there).sum() + 1) / (share.sum() + there.sum() + 1))
    return loss


def drawn(size=8, members=3):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(members, 3 * 4, 2 * 4 * 4, generator=generator, dtype=torch.float64, requires_grad=True)
    return raw, torch.randint(-1, 3, (2, size, size), generator=generator)


def as_image(raw, m, size):
    image = rearrange(raw[m], "(k i j) (b h w) -> b k (h i) (w j)", i=2, j=2, h=4, w=4)
    return image if size == 8 else F.interpolate(image, size=(size, size), mode="bilinear", align_corners=True)


def test_dice_is_what_it_is_by_hand():
    raw, y = drawn()
    raw = raw.detach()
    image = as_image(raw, 0, 8)
    assert float(dice_loss(image, y, WEIGHTS)) == pytest.approx(float(dice_by_hand(image, y, WEIGHTS)))
    sure = F.one_hot(y.clamp(min=0), 3).movedim(-1, 1).double() * 100
    assert float(dice_loss(sure, y, rarity(np.array([5, 5, 5])))) == pytest.approx(0, abs=1e-6)


def test_rare_classes_weigh_more_and_absent_ones_nothing():
    assert rarity(np.array([10, 30, 0])).tolist() == pytest.approx([0.75, 0.25, 0])
    assert balanced_weights(np.array([90, 10, 0])).tolist() == pytest.approx([100 / 180, 5, 0])
    y = torch.tensor([[0, 1, 1], [-1, -1, 2]], dtype=torch.int16)
    assert count_classes(y, 4).tolist() == [1, 2, 1, 0]
    assert count_classes(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), 2).tolist() == [2, 1]


@pytest.mark.parametrize("size", [8, 13])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("dice", [None, WEIGHTS])
def test_gradients_of_pixels_are_those_of_autograd(size, weights, dice):
    raw, y = drawn(size)
    readout = Readout(task="segmentation", classes=3, side=2, class_weights=weights, dice=dice)
    found = readout.residual(raw.detach(), readout.aim(y, (2, 4, 4), readout.share(y).to(raw.dtype)))
    for m in range(3):
        image = as_image(raw, m, size)
        loss = F.cross_entropy(image, y, ignore_index=-1, weight=None if weights is None else weights.double())
        if dice is not None:
            loss = loss + dice_by_hand(image, y, dice)
        (wanted,) = torch.autograd.grad(loss, raw)
        torch.testing.assert_close(found[m], wanted[m], rtol=1e-5, atol=1e-8)


def test_several_labels_have_weights_of_their_presence():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(1, 3, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    y = (torch.rand(6, 3, generator=generator) < 0.5).double()
    readout = Readout(task="multilabel", classes=3, class_weights=WEIGHTS)
    loss = F.binary_cross_entropy_with_logits(raw[0].mT, y, pos_weight=WEIGHTS.double())
    (wanted,) = torch.autograd.grad(loss, raw)
    torch.testing.assert_close(
        readout.residual(raw.detach(), readout.aim(y, (6, 1, 1), readout.share(y).to(raw.dtype))), wanted
    )
    total, count = readout.loss(raw.detach(), y, (6, 1, 1))
    assert float(total[0]) / count == pytest.approx(loss.item())


def test_the_weighted_loss_is_torchs():
    raw, y = drawn()
    readout = Readout(task="segmentation", classes=3, side=2, class_weights=WEIGHTS)
    total, count = readout.loss(raw.detach(), y, (2, 4, 4))
    for m in range(3):
        wanted = F.cross_entropy(as_image(raw, m, 8), y, ignore_index=-1, weight=WEIGHTS.double())
        assert float(total[m]) / count == pytest.approx(wanted.item())


def table(samples=20, grid=4, size=8, dim=6):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(samples, grid, grid, dim, generator=g, dtype=torch.float64)
    return Table(x=x, y=torch.randint(-1, 3, (samples, size, size), generator=g))


@pytest.mark.parametrize("members", [1, 2, 3])
def test_members_in_parts_are_those_at_once(monkeypatch, members):
    whole = table()
    net = Linear.of(whole, 12, "layer")
    theta = net.start(torch.Generator().manual_seed(0)).double().repeat(3, 1)
    theta += 0.3 * torch.arange(3)[:, None]
    readout = Readout(task="segmentation", classes=3, side=2, class_weights=WEIGHTS, dice=WEIGHTS)
    given = whole.batch(torch.arange(20), learning=True)
    wanted = net.gradient(theta, *given, readout)
    monkeypatch.setattr("panterra.evaluate.sweep._CACHED", members * 12 * 20 * 16)
    torch.testing.assert_close(net.gradient(theta, *given, readout), wanted)


@pytest.mark.parametrize("size", [8, 13])
@pytest.mark.parametrize("dice", [None, torch.tensor([0.3, 0.7])])
def test_the_difference_of_two_classes_says_all(size, dice):
    """Gradients, losses, shares and counts, where it comes instead of the outputs of both."""
    raw, y = drawn(size)
    raw, y, grid = raw[:, :8].detach(), y.clamp(max=1), (2, 4, 4)
    difference = raw[:, 4:] - raw[:, :4]
    readout = Readout(task="segmentation", classes=2, side=2, class_weights=torch.tensor([1.0, 4.0]), dice=dice)
    aim = readout.aim(y, grid, readout.share(y).to(raw.dtype))
    wanted, found = readout.residual(raw, aim), readout.residual(difference, aim)
    torch.testing.assert_close(wanted, torch.cat([-found, found], 1))
    torch.testing.assert_close(readout.loss(difference, y, grid)[0], readout.loss(raw, y, grid)[0])
    torch.testing.assert_close(readout.shares(difference[:1], y, grid)[0], readout.shares(raw[:1], y, grid)[0])
    assert (readout.totals(difference, y, grid) == readout.totals(raw, y, grid)).all()


def test_interpolating_outputs_is_interpolating_features_first():
    whole = table()
    net, readout = Linear.of(whole, 3, "none"), Readout(task="segmentation", classes=3)
    theta = net.start(torch.Generator().manual_seed(0)).double()[None]
    x, y = whole.batch(torch.arange(20), learning=True)
    leaf = theta.clone().requires_grad_()
    weight, bias = leaf[0, : 3 * 6].view(3, 6), leaf[0, 3 * 6 :]
    up = F.interpolate(x.movedim(-1, 1), size=(8, 8), mode="bilinear", align_corners=True)
    image = F.conv2d(up, weight[:, :, None, None], bias)
    (wanted,) = torch.autograd.grad(F.cross_entropy(image, y, ignore_index=-1), leaf)
    torch.testing.assert_close(net.gradient(theta, x, y, readout), wanted, rtol=1e-5, atol=1e-8)
    codes = readout.answer(net.outputs(theta, x, readout), y, (20, 4, 4))
    assert torch.equal(codes[0].long(), image.argmax(1))


def test_dice_finds_a_small_class_that_cross_entropy_leaves():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, 4, 8, generator=g)
    # One cell in thirty is of the second class, and only half told by its features.
    y = (x[..., 0] + torch.randn(40, 4, 4, generator=g) > 2.6).long()
    both, recipe = Table(x=x, y=y), Recipe(rates=(1e-2,), epochs=20, check_every=20)
    scores = []
    for dice in (None, rarity(count_classes(y, 2))):
        readout = Readout(task="segmentation", classes=2, dice=dice)
        (member,) = train_together(both, both, Linear.of(both, 2, "none"), readout, "f1_class_1", recipe)
        scores.append(member.score)
    assert scores[1] > scores[0]
