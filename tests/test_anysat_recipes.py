import json
from dataclasses import replace

import pytest
import torch

from panterra.errors import InputError
from panterra.models.anysat import AnySatConfig
from panterra.models.anysat_sensors import SENSORS
from panterra.objectives.jepa import JEPALoss
from panterra.recipes import anysat
from panterra.recipes.anysat import GEOPLEX, RUNS, corrected, geoplex, retrieval, run_from, validation
from panterra.train.loop import Check, Options, train
from panterra.train.optim import Plateau, learning_rate

# From the published configuration: sensors in order, batch per device, grid in cells, scales, weight.
MIX = {
    "treesatai_ts": (("aerial", "s2", "s1-asc"), 128, 6, (1, 2), 1),
    "pastis_hd": (("spot", "s2", "s1"), 1, 128, (4, 8, 16), 1),
    "flair": (("aerial-flair", "s2"), 32, 10, (1, 2), 1),
    "planted": (("s2", "s1", "l7", "alos", "modis"), 256, 12, (3,), 2),
    "s2naip_urban": (("naip", "l8", "s2", "s1"), 2, 64, (4, 8, 16), 4),
}


def test_geoplex_is_the_published_run():
    recipe = geoplex()
    assert {s.name: (s.sensors, s.batch, s.cells, s.scales, s.weight) for s in GEOPLEX} == MIX
    assert recipe.sources == GEOPLEX
    assert [s.crop_px for s in GEOPLEX] == [{"aerial": 300}, {}, {"aerial-flair": 500}, {}, {}]
    assert [s.max_dates for s in GEOPLEX] == [None, 20, None, None, None]
    assert [s.name for s in GEOPLEX if s.masked] == ["planted"]
    assert [sensor.name for sensor in recipe.encoder.sensors] == list(SENSORS)
    assert (recipe.encoder.dim, recipe.encoder.depth, recipe.encoder.heads) == (768, 6, 12)
    objective = recipe.objective
    assert (objective.predictor.dim, objective.predictor.depth, objective.predictor.heads) == (768, 4, 16)
    assert (objective.prediction_weight, objective.contrast_weight, objective.contrast_temperature) == (1, 1, 0.1)
    assert objective.published
    assert (recipe.modality_dropout, recipe.date_dropout, recipe.masking) == (0.5, 0.5, "blocks")
    assert (recipe.lone_sensors, objective.targets, objective.dropped) == (0, "normalised", "masked")
    assert recipe.method == "adamw"
    assert (recipe.lr, recipe.weight_decay, recipe.betas, recipe.eps) == (5e-5, 0.05, (0.9, 0.999), 1e-8)
    assert (recipe.warmup_steps, recipe.final_share, recipe.clip_norm) == (0, 1, None)
    assert (recipe.momentum_start, recipe.momentum_end, recipe.epochs, recipe.data_seed) == (0.996, 1, 200, 32)
    assert (recipe.epoch_steps(1), recipe.epoch_steps(3)) == (17952, 5984)
    assert recipe.validation_samples // 20 == 4107
    assert geoplex("tiny").encoder.dim == 192
    assert geoplex("small").encoder.dim == 384


def test_runs_on_one_data_set_have_its_sensors_alone():
    batches = {"anysat-treesatai-ts": 64, "anysat-flair": 16, "anysat-planted": 256, "anysat-s2naip-urban": 2}
    for name in (*batches, "anysat-pastis-hd"):
        recipe = RUNS[name]()
        (source,) = recipe.sources
        assert recipe.name == name
        assert tuple(sensor.name for sensor in recipe.encoder.sensors) == source.sensors
        assert source.batch == batches.get(name, 1)
        assert (recipe.lr, recipe.epochs) == (5e-5, 200)
    assert RUNS["anysat-pastis-hd"]().sources[0].max_dates == 40
    assert RUNS["anysat-s2naip-urban"]().epoch_steps(1) == 8976


def test_every_recipe_has_its_name_and_a_lab_note():
    assert {recipe().name for recipe in RUNS.values()} == set(RUNS)
    for function in (anysat.geoplex, anysat.treesatai_ts, anysat.pastis_hd, anysat.flair, anysat.planted):
        assert "Published" in (function.__doc__ or "")
    assert RUNS["anysat-flair-naive-masking"]().masking == "naive"
    assert not RUNS["anysat-flair-corrected"]().objective.published


class Tiles:
    def __len__(self):
        return 9

    def __getitem__(self, index):
        g = torch.Generator().manual_seed(index)
        shapes = {"s2": (4, 10, 12, 12), "s1": (3, 3, 12, 12), "l7": (3, 6, 4, 4), "modis": (2, 7, 1, 1)}
        sample = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
        return sample | {f"{name}_dates": 30 * torch.arange(shape[0]) + 5 for name, shape in shapes.items()}


def small():
    recipe = RUNS["anysat-planted"]()
    source = replace(recipe.sources[0], sensors=("s2", "s1", "l7", "modis"), batch=2)
    sensors = tuple(SENSORS[name] for name in source.sensors)
    encoder = AnySatConfig(dim=96, depth=1, heads=4, sensors=sensors)
    return replace(recipe, encoder=encoder, predictor_depth=1, sources=(source,), steps=3)


@pytest.mark.parametrize("change", [lambda recipe: recipe, corrected])
def test_a_run_trains_and_resumes_to_the_same_numbers(tmp_path, change):
    recipe = change(small())
    run = replace(run_from(recipe, {"planted": Tiles()}), export=None)
    quiet = Options(device="cpu", workers=0, logs=("jsonl",), log_every=1)
    straight = train(run, tmp_path / "a", quiet, progress=lambda *_: None)
    train(run, tmp_path / "b", replace(quiet, steps_this_time=1), progress=lambda *_: None)
    resumed = train(run, tmp_path / "b", quiet, progress=lambda *_: None)
    assert straight.finished
    assert straight.loss == resumed.loss
    assert [learning_rate(step, run.optimisation) for step in (1, 2, 3)] == [5e-5] * 3


def test_an_epoch_decides_the_number_of_steps():
    recipe = replace(small(), steps=None, epochs=5)
    run = run_from(recipe, {"planted": Tiles()})
    assert (run.optimisation.steps, run.best_of) == (5 * 4, 4)
    assert run_from(replace(recipe, exported="last"), {"planted": Tiles()}).best_of is None
    assert run_from(recipe, {"planted": Tiles()}, world=2).optimisation.steps == 5 * 2
    with pytest.raises(InputError, match="made for 1 ranks and starts with 2"):
        run_from(recipe, {"planted": Tiles()}).batches(0, 2)


def test_the_teacher_follows_with_rising_momentum():
    recipe = replace(small(), steps=4, momentum_start=0.5)
    run = run_from(recipe, {"planted": Tiles()})
    torch.manual_seed(0)
    objective = run.objective()
    torch.nn.init.constant_(objective.encoder.class_token, 1.0)
    torch.nn.init.zeros_(objective.teacher.class_token)
    for step, expected in ((2, 0.25), (4, 0.25)):
        run.before_update(objective, step)
        torch.testing.assert_close(objective.teacher.class_token.mean(), torch.tensor(expected))


def test_validation_averages_the_losses_of_other_samples():
    run = run_from(small(), {"planted": Tiles()})
    objective = run.objective().eval()
    found = validation(run.batches(0, 1), every=10, steps=2).run(objective, 0)
    with torch.no_grad():
        losses = [objective(tiles) for step in range(2) for tiles in run.batches(0, 1)[step]]
    torch.testing.assert_close(found["loss"], float(sum(out.total for out in losses)) / 2)
    torch.testing.assert_close(found["contrast"], float(sum(out.contrast for out in losses)) / 2)


def test_patches_are_found_again_by_their_nearest_tokens():
    run = run_from(small(), {"planted": Tiles()}, held_out={"planted": Tiles()})
    objective = run.objective().eval()
    found = retrieval(run.batches(0, 1), every=10, steps=2).run(objective, 0)
    hits = dict.fromkeys(("s2", "s1", "l7"), 0.0)
    for step in range(2):
        (tiles,) = run.batches(0, 1)[step]
        seen = {name: x.detach().flatten(0, 1) for name, x in objective.look(tiles).patches.items()}
        assert set(seen) == set(hits)
        places = [(name, patch) for name in seen for patch in range(32)]
        for name, patch in places:
            cosine = [float(torch.cosine_similarity(seen[name][patch], seen[n][p], dim=0)) for n, p in places]
            nearest = sorted(range(len(places)), key=lambda i, cosine=cosine: -cosine[i])[:3]
            hits[name] += (sum(places[i][1] == patch for i in nearest) - 1) / 2 / len(places) / 2
    assert found == pytest.approx({f"planted/{name}": share for name, share in hits.items()}, abs=1e-6)
    assert [check.name for check in run.checks] == ["validation", "retrieval"]


@pytest.mark.parametrize(("samples", "steps"), [(None, 4), (60, 3)])
def test_validation_is_as_long_as_published_and_sees_all_dates(samples, steps):
    recipe = replace(small(), validation_samples=samples)
    recipe = replace(recipe, sources=(replace(recipe.sources[0], max_dates=2),))
    run = run_from(recipe, {"planted": Tiles()}, held_out={"planted": Tiles()})
    seen = []

    class Watching(torch.nn.Linear):
        def forward(self, tiles):
            seen.append(tiles.inputs["s2"].values.shape[1])
            return JEPALoss(**{name: torch.zeros(()) for name in ("total", "prediction", "contrast")})

    run.checks[0].run(Watching(1, 1), 0)
    assert seen == [4] * steps
    assert run.batches(0, 1)[0][0].inputs["s2"].values.shape[1] == 2


def test_an_untrained_model_sets_no_mark_for_the_plateau(tmp_path):
    figures = (0.0, 3.0, 2.0, 2.5)
    told = Check(name="validation", every=1, run=lambda objective, step: {"loss": figures[step]})
    run = run_from(small(), {"planted": Tiles()}, checks=(told,))
    run = replace(
        run, export=None, optimisation=replace(run.optimisation, plateau=Plateau(figure="validation/loss", patience=0))
    )
    quiet = Options(device="cpu", workers=0, logs=("jsonl",), log_every=1)
    train(run, tmp_path / "a", quiet, progress=lambda *_: None)
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines if "learning_rate" in line] == [5e-5] * 3
    worse = replace(told, run=lambda objective, step: {"loss": float(step > 1)})
    train(replace(run, checks=(worse,)), tmp_path / "b", quiet, progress=lambda *_: None)
    lines = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines if "learning_rate" in line] == pytest.approx([5e-5, 5e-5, 5e-6])


def first_tiles(recipe):
    run = run_from(recipe, {"planted": Tiles()})
    torch.manual_seed(0)
    return run.objective(), run.batches(0, 1)[0][0]


def test_standardised_targets_differ_between_samples_alone():
    objective, tiles = first_tiles(replace(corrected(small()), targets="standardised"))
    every = torch.arange(16).expand(1, tiles.samples, -1)
    tiles = replace(tiles, masks=replace(tiles.masks, targets=every))
    target = objective.targets(tiles)[0]
    torch.testing.assert_close(target.mean(0), torch.zeros(16, 96), atol=1e-4, rtol=0)
    made = objective.teacher(tiles.inputs, scale=tiles.grid.scale).patches.flatten(1, 2)
    rows = (made - made.mean(0)).flatten(0, 1)
    expected = torch.nn.functional.batch_norm(rows, None, None, training=True, eps=1e-6)
    torch.testing.assert_close(target.flatten(0, 1), expected, atol=1e-4, rtol=1e-4)
    one = {name: replace(x, values=x.values[:1], days=x.days[:1]) for name, x in tiles.inputs.items()}
    with pytest.raises(InputError, match="nothing to be standardised over"):
        objective.targets(replace(tiles, inputs=one))


def test_hidden_tokens_are_not_there():
    for dropped, alike in (("masked", False), ("hidden", True)):
        objective, tiles = first_tiles(replace(corrected(small()), dropped=dropped))
        objective.eval()
        assert not tiles.kept.all()
        with torch.no_grad():
            before = objective.look(tiles).encoded
            objective.masked_token.fill_(3.0)
            assert torch.equal(before, objective.look(tiles).encoded) == alike


def test_some_samples_show_one_sensor_alone():
    recipe = replace(corrected(small()), modality_dropout=0.0)
    assert run_from(recipe, {"planted": Tiles()}).batches(0, 1)[0][0].kept.all()
    for step in range(4):
        (tiles,) = run_from(replace(recipe, lone_sensors=1.0), {"planted": Tiles()}).batches(0, 1)[step]
        by_sensor = tiles.kept.unflatten(1, (3, -1))
        assert torch.equal(by_sensor.all(2), by_sensor.any(2))
        assert (by_sensor.any(2).sum(1) == 1).all()
