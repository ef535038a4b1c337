from dataclasses import replace

import numpy as np
import pytest
import torch

from panterra.models.anysat import AnySatConfig
from panterra.models.anysat_predictor import AnySatPredictorConfig
from panterra.models.anysat_projectors import Grid, Input
from panterra.models.anysat_sensors import SENSORS
from panterra.objectives.jepa import JEPA, JEPAConfig, MaskedTiles
from panterra.objectives.jepa_looks import JEPAWithLooks, describe, look_size
from panterra.objectives.jepa_masks import BlockMasking, draw_dates, draw_tokens

GRID = Grid(rows=2, cols=2, scale=2)


def series(batch=3, *, channels=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Input(
        values=torch.randn(batch, 5, channels, 4, 4, generator=g),
        days=torch.randint(1, 366, (batch, 5), generator=g),
        valid=torch.rand(batch, 5, 4, 4, generator=g) < 0.7,
    )


def tiles(seed=0, batch=3):
    g = torch.Generator().manual_seed(seed)
    masks = BlockMasking()(2, batch, sizes=g, places=g)
    inputs = {"s2": series(batch, seed=seed), "s1": series(batch, channels=3, seed=seed + 1)}
    return MaskedTiles(
        inputs=inputs,
        grid=GRID,
        masks=masks,
        kept=draw_tokens(2, masks.context.shape[1], batch, g),
        dates={name: draw_dates(torch.ones(batch, 5, dtype=torch.bool), g) for name in inputs},
    )


def config():
    encoder = AnySatConfig(dim=96, depth=1, heads=4, sensors=(SENSORS["s2"], SENSORS["s1"]))
    return JEPAConfig(encoder=encoder, predictor=AnySatPredictorConfig(dim=96, depth=1, heads=4))


def test_a_series_is_described_by_its_valid_values():
    given = series()
    found, valid = describe(given, SENSORS["s2"], GRID)
    assert found.shape == (3, 4, look_size(SENSORS["s2"]))
    assert valid.all()
    rows, cols, band = slice(2, 4), slice(0, 2), 7
    seen = given.valid[1, :, rows, cols].numpy()
    x = given.values[1, :, band, rows, cols].numpy()[seen]
    angle = np.broadcast_to(given.days[1].numpy()[:, None, None] * 2 * np.pi / 365.25, seen.shape)[seen]
    wanted = [x.mean(), np.log(x.var() + 1e-3) / 2, np.cov(x, np.cos(angle), bias=True)[0, 1]]
    wanted.append(((x - x.mean()) * np.sin(angle)).mean())
    np.testing.assert_allclose(found[1, 2].view(4, 10)[:, band], wanted, rtol=1e-4, atol=1e-6)


def test_what_is_not_valid_does_not_matter():
    given = series()
    found, _ = describe(given, SENSORS["s2"], GRID)
    other = replace(given, values=torch.where(given.valid[:, :, None], given.values, 9.0))
    torch.testing.assert_close(describe(other, SENSORS["s2"], GRID)[0], found)
    given.valid[0, :, :2, 2:] = False
    _, valid = describe(given, SENSORS["s2"], GRID)
    assert valid.tolist() == [[True, False, True, True]] + 2 * [4 * [True]]


def test_stills_vary_inside_cells_or_between_them():
    # 20 m patches of 10 x 10 cells of 10 x 10 pixels.
    g = torch.Generator().manual_seed(0)
    inside = torch.tensor([-1.0, 1.0]).repeat(100).expand(200, -1)
    between = torch.randn(20, 20, generator=g).repeat_interleave(10, 0).repeat_interleave(10, 1)
    between = between - between.unflatten(1, (2, 100)).unflatten(0, (2, 100)).mean((1, 3)).repeat_interleave(
        100, 0
    ).repeat_interleave(100, 1)
    image = torch.stack([inside, 2 * between, inside + between, torch.full((200, 200), 3.0)])[None, None]
    found, _ = describe(Input(values=image), SENSORS["aerial"], GRID)
    mean, fine, coarse = found.unflatten(2, (3, 4)).unbind(2)
    torch.testing.assert_close(mean, torch.tensor([0.0, 0, 0, 3]).expand(1, 4, 4), atol=1e-5, rtol=0)
    spread = between[:100, :100].square().mean()
    faint = np.log(1e-3) / 2
    for band, (near, far) in enumerate(((1.0, 0.0), (0.0, 4 * spread), (1.0, spread), (0.0, 0.0))):
        assert float(fine[0, 0, band]) == pytest.approx(np.log(near + 1e-3) / 2 if near else faint, abs=1e-2)
        assert float(coarse[0, 0, band]) == pytest.approx(np.log(float(far) + 1e-3) / 2 if far else faint, abs=1e-2)


def test_anysats_losses_are_as_they_were():
    torch.manual_seed(0)
    objective = JEPAWithLooks(config(), looks_weight=3.0)
    plain = JEPA(config())
    plain.load_state_dict(objective.state_dict(), strict=False)
    given = tiles()
    objective.standardise_looks([given])
    loss, other = objective.eval()(given), plain.eval()(given)
    torch.testing.assert_close(loss.prediction, other.prediction)
    torch.testing.assert_close(loss.contrast, other.contrast)
    torch.testing.assert_close(loss.total, other.total + 3 * loss.looks)
    assert set(loss.terms) == {"prediction", "contrast", "looks"}


def test_looks_are_standardised_by_what_was_seen():
    objective, views = JEPAWithLooks(config(), looks_weight=1.0), [tiles(seed) for seed in (0, 10)]
    objective.standardise_looks(views)
    for name, sensor in objective.encoder.sensors.items():
        found = [describe(view.inputs[name], sensor, GRID) for view in views]
        rows = torch.cat([wanted[valid] for wanted, valid in found])
        rows = (rows - objective.mean[name]) / objective.std[name]
        torch.testing.assert_close(rows.mean(0), torch.zeros(look_size(sensor)), atol=1e-5, rtol=0)
        torch.testing.assert_close(rows.std(0), torch.ones(look_size(sensor)), atol=1e-4, rtol=0)


def test_what_a_sensor_saw_is_told_even_where_it_is_hidden():
    torch.manual_seed(0)
    objective = JEPAWithLooks(config(), looks_weight=1.0)
    given = tiles()
    kept = torch.zeros_like(given.kept)
    kept[:, : kept.shape[1] // 2] = True  # Sentinel-2 alone
    given = replace(given, kept=kept)
    objective.standardise_looks([given])
    loss = objective(given).looks
    loss.backward()
    assert (objective.of_patch["s1"].weight.grad != 0).any()
    # Of Sentinel-1 the context's embeddings know nothing; their layers learn from those of Sentinel-2.
    assert (objective.encoder.projectors["s2"].stages[0].linear.weight.grad != 0).any()
    optimiser = torch.optim.AdamW([w for w in objective.parameters() if w.requires_grad], lr=3e-3)
    for _ in range(30):
        optimiser.zero_grad()
        objective(given).looks.backward()
        optimiser.step()
    assert objective(given).looks < 0.7 * loss
