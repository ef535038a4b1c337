import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from panterra.errors import InputError
from panterra.models.anysat import AnySatConfig
from panterra.models.anysat_predictor import AnySatPredictorConfig
from panterra.models.anysat_projectors import Grid, Input
from panterra.models.anysat_sensors import SENSORS
from panterra.objectives.jepa import JEPA, JEPAConfig, MaskedTiles, sensor_contrast, some_dates
from panterra.objectives.jepa_masks import BlockMasking, Dates, PatchMasks, draw_dates, draw_tokens
from panterra.objectives.teacher import follow

SHAPES = {"s2": (5, 10, 8, 8), "s1": (3, 3, 8, 8), "l8": (4, 11, 8, 8), "modis": (6, 7, 1, 1)}


def make(*, sensors=("s2", "s1", "l8", "aerial", "modis"), **options):
    torch.manual_seed(0)
    encoder = AnySatConfig(dim=96, depth=1, heads=4, sensors=tuple(SENSORS[name] for name in sensors))
    return JEPA(
        JEPAConfig(encoder=encoder, predictor=AnySatPredictorConfig(dim=96, depth=1, heads=4), **options)
    ).eval()


def tiles(names=("s2", "s1", "l8"), batch=3, *, scale=2, seed=0):
    """Tiles of 80 m: three properties of the ground for each 20 m, which each sensor mixes in its own way."""
    g = torch.Generator().manual_seed(seed)
    ground = torch.randn(batch, 3, 4, 4, generator=g).repeat_interleave(2, 2).repeat_interleave(2, 3)
    inputs = {}
    for name in names:
        t, c, h, _ = SHAPES[name]
        seen = ground if h > 1 else ground.mean((2, 3), keepdim=True)
        values = torch.einsum("ck,bkyx->bcyx", torch.randn(c, 3, generator=g), seen)[:, None].repeat(1, t, 1, 1, 1)
        values = values + 0.1 * torch.randn(values.shape, generator=g)
        inputs[name] = Input(values=values, days=torch.arange(t).expand(batch, -1) * 30 + 10)
    side = 8 // scale
    masks = BlockMasking()(side, batch, sizes=g, places=g)
    extent = [name for name in names if name != "modis"]
    return MaskedTiles(
        inputs=inputs,
        grid=Grid(rows=side, cols=side, scale=scale),
        masks=masks,
        kept=draw_tokens(len(extent), masks.context.shape[1], batch, g),
        dates={name: draw_dates(torch.ones(x.values.shape[:2], dtype=torch.bool), g) for name, x in inputs.items()},
    )


def with_input(given, name, **changes):
    return replace(given, inputs={**given.inputs, name: replace(given.inputs[name], **changes)})


def test_the_contrast_is_that_of_two_loops():
    rng = np.random.default_rng(0)
    tokens = {row: rng.normal(size=8) for row in itertools.product(range(3), range(2), range(4))}
    total = 0.0
    for (sensor, sample, patch), x in tokens.items():
        cosine = {r: x @ y / np.linalg.norm(x) / np.linalg.norm(y) for r, y in tokens.items()}
        score = {r: np.exp(c / 0.1) for r, c in cosine.items() if r[:2] != (sensor, sample)}
        total -= np.log(sum(s for r, s in score.items() if r[1:] == (sample, patch)) / sum(score.values()))
    stacked = torch.tensor(np.stack(list(tokens.values()))).view(3, 2, 4, 8)
    torch.testing.assert_close(sensor_contrast(stacked).item(), total / len(tokens), rtol=1e-5, atol=0)


def test_what_is_not_valid_is_not_contrasted():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 2, 4, 8, generator=g, requires_grad=True)
    valid = torch.rand(3, 2, 4, generator=g) < 0.6
    valid[:, 0, 0], valid[:, 1, 1] = False, torch.tensor([True, False, False])
    loss = sensor_contrast(tokens, valid)
    loss.backward()
    assert tokens.grad.isfinite().all()
    assert (tokens.grad[~valid] == 0).all()
    other = torch.where(valid[..., None], tokens, 7.0).detach()
    torch.testing.assert_close(sensor_contrast(other, valid), loss.detach())
    whole = torch.ones_like(valid)
    torch.testing.assert_close(sensor_contrast(tokens, whole), sensor_contrast(tokens))
    nothing = sensor_contrast(tokens, torch.zeros_like(valid))
    assert nothing == 0


def test_the_total_is_the_weighted_sum_of_its_terms():
    out = make(prediction_weight=2.0, contrast_weight=0.5)(tiles())
    torch.testing.assert_close(out.total, 2 * out.prediction + 0.5 * out.contrast)
    assert set(out.terms) == {"prediction", "contrast"}
    assert make(contrast_weight=0.0)(tiles()).contrast == 0


def test_the_student_sees_the_context_alone():
    model, given = make(), tiles()
    row, col = 2, 1
    assert not (given.masks.context[0] == row * 4 + col).any()
    values = given.inputs["s2"].values.clone()
    values[0, ..., 2 * row : 2 * row + 2, 2 * col : 2 * col + 2] += 5.0
    with torch.no_grad():
        before, after = (model.look(t).encoded for t in (given, with_input(given, "s2", values=values)))
    torch.testing.assert_close(after, before)
    inside = int(given.masks.context[0, 0])
    row, col = inside // 4, inside % 4
    everything = replace(given, kept=torch.ones_like(given.kept))
    values[0, ..., 2 * row : 2 * row + 2, 2 * col : 2 * col + 2] += 5.0
    with torch.no_grad():
        before, after = (model.look(t).encoded for t in (everything, with_input(everything, "s2", values=values)))
    assert not torch.allclose(after[0], before[0], atol=1e-5)
    torch.testing.assert_close(after[1:], before[1:])


def test_published_contexts_are_shifted_where_no_sensor_sees_the_whole_tile():
    index = torch.tensor([[3, 7]])
    rows = {
        (published, whole): make(published=published)._rows(index, 3, 16, whole).tolist()[0]
        for published in (False, True)
        for whole in (False, True)
    }
    right = [3, 7, 19, 23, 35, 39]
    assert rows[False, False] == rows[False, True] == rows[True, True] == right
    assert rows[True, False] == [4, 8, 19, 23, 34, 38]


def test_dates_without_data_make_no_difference():
    model, given = make(), tiles(("s2", "s1"), batch=2)
    x = given.inputs["s2"]
    padded = Input(
        values=F.pad(x.values, (0, 0) * 3 + (0, 2), value=9.0),
        days=F.pad(x.days, (0, 2)),
        valid=(torch.arange(7) < 5)[None, :, None, None].expand(2, -1, 8, 8),
    )
    longer = Dates(index=F.pad(given.dates["s2"].index, (0, 1), value=6), valid=torch.tensor([[True, True, False]] * 2))
    other = replace(given, inputs={**given.inputs, "s2": padded}, dates={**given.dates, "s2": longer})
    torch.testing.assert_close(model(other).total, model(given).total)


def test_a_sensor_that_a_sample_lacks_is_a_dropped_one():
    model, given = make(), tiles()
    absent = torch.ones(3, 4, 8, 8, dtype=torch.bool)
    absent[1] = False
    other = with_input(given, "l8", valid=absent)
    seen = model.look(other)
    positions = given.masks.context.shape[1]
    gone = torch.zeros_like(given.kept)
    gone[1, 2 * positions :] = True
    torch.testing.assert_close(seen.given[gone], torch.zeros_like(seen.given[gone]))
    assert not seen.valid[2, 1].any()
    assert seen.valid[:2].all()
    values = torch.where(absent[:, :, None], given.inputs["l8"].values, 1e3)
    torch.testing.assert_close(model(with_input(other, "l8", values=values)).total, model(other).total)
    assert model(other).total.isfinite()


def test_modis_stands_before_the_context():
    model, given = make(), tiles(("s2", "s1", "modis"))
    seen = model.look(given)
    assert list(seen.patches) == ["s2", "s1"]
    assert seen.encoded.shape == (3, 1 + given.masks.context.shape[1], 96)
    assert seen.selected.shape == (3, 2 * given.masks.context.shape[1], 96)
    other = with_input(given, "modis", values=given.inputs["modis"].values + 1.0)
    assert not torch.allclose(model.look(other).encoded, seen.encoded, atol=1e-4)


def test_sensors_that_a_batch_lacks_get_no_gradient():
    model = make()
    model(tiles()).total.backward()
    for name, weight in model.named_parameters():
        expected = weight.requires_grad and not name.startswith(
            ("encoder.projectors.aerial", "encoder.projectors.modis")
        )
        assert (weight.grad is not None) == expected, name


def test_scores_that_no_loss_reaches_decay_as_published_alone():
    for published in (False, True):
        model = make(published=published)
        last = model.encoder.patch_encoder.blocks[-1].attn.distance
        before = last.detach().clone()
        optimiser = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.1, weight_decay=0.5)
        model(tiles()).total.backward()
        optimiser.step()
        torch.testing.assert_close(last.detach(), before * (0.95 if published else 1.0))
        assert (last.detach() != 0).any()


def test_a_small_model_learns_and_its_teacher_follows():
    model, given = make().train(), replace(tiles(("s2", "l8"), batch=2), dates={})
    optimiser = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=3e-4)
    first = [weight.clone() for weight in model.teacher.parameters()]
    losses = []
    for _ in range(50):
        losses.append(model(given))
        optimiser.zero_grad()
        losses[-1].total.backward()
        follow(model.teacher, model.encoder, 0.98)
        optimiser.step()
    assert losses[-1].prediction < 0.3 * losses[0].prediction
    assert losses[-1].contrast < 0.8 * np.log(48)  # what it costs to know nothing
    assert any(not torch.equal(*weights) for weights in zip(model.teacher.parameters(), first, strict=True))
    assert all(weight.grad is None for weight in model.teacher.parameters())


def test_the_teacher_drops_out_as_published_alone():
    for published in (False, True):
        model = make(published=published).train()
        assert model.encoder.training
        assert all(part.training == published for part in model.teacher.projectors.values())
        torch.manual_seed(0)
        again = [model.targets(tiles()) for _ in range(2)]
        assert torch.equal(*again) != published
        assert not any(part.training for part in model.eval().teacher.modules())


@pytest.mark.parametrize("published", [True, False])
def test_bfloat16_gives_nearly_the_same_loss(published):
    model, given = make(published=published).train(), tiles()
    exact = model.eval()(given)
    with torch.autocast("cpu", torch.bfloat16):
        # Without dropout, but otherwise as in training.
        for part in (model.encoder, model.teacher):
            part.train()
            part.projectors.eval()
        rough = model(given)
    rough.total.backward()
    torch.testing.assert_close(rough.total, exact.total, rtol=0.02, atol=0)


def test_tiles_move_as_a_whole():
    given = tiles()
    moved = given.to("meta")
    assert moved.samples == 3
    parts = [moved.kept, moved.masks.targets, moved.inputs["s2"].values, moved.dates["s2"].index]
    assert all(x.device.type == "meta" for x in parts)
    assert moved.grid == given.grid


def test_the_student_gets_the_drawn_dates():
    given = tiles().inputs["s2"]
    index = torch.tensor([[3, 0], [1, 4], [2, 2]])
    kept = some_dates(given, Dates(index=index))
    for i in range(3):
        assert torch.equal(kept.values[i], given.values[i, index[i]])
        assert torch.equal(kept.days[i], given.days[i, index[i]])


def test_what_cannot_be_trained_says_so():
    with pytest.raises(InputError, match="one sensor has nothing to be contrasted with"):
        make(sensors=("s2",))
    alone = make(sensors=("s2",), contrast_weight=0.0)(tiles(("s2",)))
    assert alone.total == alone.prediction
    wrong = replace(tiles(), grid=Grid(rows=3, cols=3, scale=2))
    with pytest.raises(InputError, match="correct `cells`"):
        make()(wrong)
    assert isinstance(wrong.masks, PatchMasks)
