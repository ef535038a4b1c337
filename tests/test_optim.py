import math
from dataclasses import replace

import pytest
import torch

from panterra.errors import InputError
from panterra.train.optim import Optimisation, Plateau, Waited, learning_rate, make_optimisers, wait

PUBLISHED = Optimisation(lr=1e-4, weight_decay=0.02, steps=667_200)


def test_the_schedule_is_the_published_one():
    assert learning_rate(0, PUBLISHED) == 0
    assert learning_rate(2000, PUBLISHED) == pytest.approx(2.5e-5)
    assert learning_rate(8000, PUBLISHED) == 1e-4
    assert learning_rate((667_200 + 8000) // 2, PUBLISHED) == pytest.approx(5.5e-5)
    assert learning_rate(667_200, PUBLISHED) == pytest.approx(1e-5)


def test_the_schedule_rises_and_falls():
    few = replace(PUBLISHED, steps=50, warmup_steps=10)
    rates = [learning_rate(step, few) for step in range(51)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(1, replace(few, warmup_steps=0)) < few.lr
    assert learning_rate(50, replace(few, warmup_steps=50)) == few.lr


def test_a_restart_repeats_the_cosine_from_a_share_of_the_peak():
    once = replace(PUBLISHED, steps=40, warmup_steps=10)
    twice = replace(once, steps=70, restart_step=40, restart_share=0.5)
    assert [learning_rate(step, twice) for step in range(41)] == [learning_rate(step, once) for step in range(41)]
    assert learning_rate(41, twice) == pytest.approx(0.5 * PUBLISHED.lr, rel=0.01)
    assert learning_rate(55, twice) == pytest.approx(0.3 * PUBLISHED.lr)
    assert learning_rate(70, twice) == pytest.approx(0.1 * PUBLISHED.lr)
    with pytest.raises(InputError, match="restart_step=70"):
        replace(twice, restart_step=70)


def test_all_trainable_parameters_are_updated_as_adamw_does():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 1))
    module[2].requires_grad_(False)
    optimisation = replace(PUBLISHED, lr=0.1, weight_decay=0.3)
    start = [weight.detach().clone() for weight in module.parameters()]
    (optimiser,) = make_optimisers(module, optimisation)
    expected, moments = [w.double() for w in start], [(0.0, 0.0) for _ in start]
    x = torch.randn(5, 3)
    for step in (1, 2):
        optimiser.zero_grad()
        module(x).square().sum().backward()
        for i, weight in enumerate(module.parameters()):
            if weight.grad is None:
                continue
            g = weight.grad.double()
            m, v = 0.9 * moments[i][0] + 0.1 * g, 0.999 * moments[i][1] + 0.001 * g**2
            moments[i] = m, v
            direction = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            expected[i] = expected[i] * (1 - 0.1 * 0.3) - 0.1 * direction
        optimiser.step()
    for weight, wanted, first in zip(module.parameters(), expected, start, strict=True):
        torch.testing.assert_close(weight.double(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(weight, first) != weight.requires_grad


@pytest.mark.parametrize("changes", [{"steps": 0}, {"warmup_steps": 700_000}, {"warmup_steps": -1}])
def test_a_schedule_that_cannot_be_is_refused(changes):
    with pytest.raises(InputError, match="warmup_steps from 0 to steps"):
        replace(PUBLISHED, **changes)


def test_the_cosine_is_a_half_one():
    few = replace(PUBLISHED, lr=1.0, steps=9, warmup_steps=1, final_share=0.0)
    assert learning_rate(3, few) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_a_plateau_lowers_the_rate_as_torch_does():
    figures = [3.0, 2.0, 2.1, 1.99995, 2.0, 1.5, 1.6, 1.6, 1.6, 1.6, 1.6, 1.6, 1.4]
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.1, patience=2)
    plateau, waited = Plateau(figure="loss", patience=2), Waited()
    for figure in figures:
        theirs.step(figure)
        waited = wait(waited, figure, plateau)
        assert waited.share == pytest.approx(optimiser.param_groups[0]["lr"])
    assert waited == Waited(best=1.4, times=0, share=pytest.approx(0.001))
