import json

import pytest
import torch
from torch import nn

from panterra.train import checkpoint
from panterra.train.optim import Optimisation, make_optimisers

OPTIMISATION = Optimisation(lr=0.1, weight_decay=0.1, steps=10, warmup_steps=0)


def trained(steps, *, seed=0):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    module[0].bias.requires_grad_(False)
    optimisers = make_optimisers(module, OPTIMISATION)
    advance(module, optimisers, steps)
    return module, optimisers


def advance(module, optimisers, steps):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        for optimiser in optimisers:
            optimiser.zero_grad()
        module(x).square().sum().backward()
        for optimiser in optimisers:
            optimiser.step()


def test_what_is_saved_goes_on_bit_for_bit(tmp_path):
    module, optimisers = trained(3)
    facts = {"step": 3, "loss": 1 / 3, "energy": None}
    path = checkpoint.save(tmp_path, module, optimisers, facts, permanent=True)
    other, theirs = trained(0, seed=1)
    assert checkpoint.load(path, other, theirs) == {**facts, "permanent": True}
    advance(other, theirs, 2)
    expected, _ = trained(5)
    for name, weight in expected.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name


class Late(nn.Module):
    """Its second layer takes part only when asked to."""

    def __init__(self):
        super().__init__()
        self.early, self.late = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x, both):
        return self.early(x) + (self.late(x) if both else 0)


def late(steps, *, start=0, found=None):
    """Train from step `start`, with the second layer from step 2 on."""
    torch.manual_seed(0)
    module = Late()
    optimisers = make_optimisers(module, OPTIMISATION)
    if found is not None:
        checkpoint.load(found, module, optimisers)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    for step in range(start, steps):
        for optimiser in optimisers:
            optimiser.zero_grad()
        module(x, both=step >= 2).square().sum().backward()
        for optimiser in optimisers:
            optimiser.step()
    return module, optimisers


def test_a_parameter_without_a_gradient_so_far_goes_on_too(tmp_path):
    found = checkpoint.save(tmp_path, *late(2), {"step": 2}, permanent=True)
    resumed, whole = late(5, start=2, found=found)[0], late(5)[0]
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


def test_a_model_is_loaded_alone(tmp_path):
    module, optimisers = trained(2)
    path = checkpoint.save(tmp_path, module, optimisers, {"step": 2}, permanent=True)
    other, _ = trained(0, seed=1)
    checkpoint.load(path, other)
    assert all(torch.equal(other.state_dict()[name], weight) for name, weight in module.state_dict().items())


def test_the_newest_is_the_one_with_most_steps(tmp_path):
    assert checkpoint.newest(tmp_path / "nowhere") is None
    module, optimisers = trained(1)
    for step in (90, 100, 8):
        checkpoint.save(tmp_path, module, optimisers, {"step": step}, permanent=True)
    (tmp_path / "step_00000200.part").mkdir()
    assert checkpoint.newest(tmp_path).name == "step_00000100"
    assert checkpoint.at(tmp_path, 8).name == "step_00000008"
    assert checkpoint.at(tmp_path, 200) is None


def test_a_new_one_takes_the_place_of_temporary_ones(tmp_path):
    module, optimisers = trained(1)
    for step, permanent in ((1, False), (2, True), (3, False), (4, False)):
        checkpoint.save(tmp_path, module, optimisers, {"step": step}, permanent=permanent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000004"]


def test_one_that_is_there_stays(tmp_path):
    module, optimisers = trained(1)
    path = checkpoint.save(tmp_path, module, optimisers, {"step": 1, "loss": 1.0}, permanent=False)
    checkpoint.save(tmp_path, *trained(2), {"step": 1, "loss": 2.0}, permanent=False)
    assert json.loads((path / "facts.json").read_text())["loss"] == 1.0


@pytest.mark.parametrize("moment", ["write_json", "_sync"])
def test_a_failure_while_saving_leaves_what_was_there(tmp_path, moment, monkeypatch):
    module, optimisers = trained(1)
    checkpoint.save(tmp_path, module, optimisers, {"step": 1}, permanent=False)

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, moment, fail)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(tmp_path, module, optimisers, {"step": 2}, permanent=False)
    found = checkpoint.newest(tmp_path)
    assert checkpoint.load(found, *trained(0))["step"] == (1 if moment == "write_json" else 2)
    checkpoint.save(tmp_path, module, optimisers, {"step": 3}, permanent=False)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_json_is_never_half_there(tmp_path):
    checkpoint.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
