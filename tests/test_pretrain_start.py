"""Pretraining that starts from weights."""

import json
import re
from dataclasses import replace

import pytest
import torch

import miniatures
from panterra.cli import main
from panterra.commands.pretrain import dry_run, show_plan
from panterra.errors import InputError
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.anysat_predictor import AnySatPredictorConfig
from panterra.models.anysat_training import AnySatTraining, published_training_state
from panterra.models.olmoearth import OlmoEarth
from panterra.models.weights import load_model, save_model
from panterra.objectives.jepa import JEPA, JEPAConfig
from panterra.objectives.latent_mim import LatentMIM
from panterra.recipes import recipe
from panterra.recipes.anysat_planet import SENSORS_HERE, planet_tiny
from panterra.recipes.overrides import override
from panterra.recipes.start import begin_from, inherit, noted_start, open_start, read_start
from panterra.train.loop import Run
from panterra.train.optim import Optimisation

SIZE = {"dim": 96, "depth": 1, "heads": 4}
SMALL = (
    *(f"encoder.{name}={value}" for name, value in SIZE.items()),
    *("predictor_heads=4", "predictor_depth=1"),
    *("sources.flair.batch=1", "sources.flair.scales=5", "sources.flair.cells=10", "epochs=2"),
)


def a_jepa(**changes):
    torch.manual_seed(5)
    config = AnySatConfig(**{**SIZE, **changes})
    return JEPA(JEPAConfig(encoder=config, predictor=AnySatPredictorConfig(dim=config.dim, depth=1, heads=4)))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A training checkpoint of all eleven sensors, as published."""
    jepa = a_jepa()
    with torch.no_grad():
        for weight in jepa.teacher.parameters():
            weight.mul_(1.01)  # it lags behind
    training = AnySatTraining(encoder=jepa.config.encoder, predictor=jepa.config.predictor, state=jepa.state_dict())
    path = tmp_path_factory.mktemp("full") / "AnySat_full.pth"
    torch.save({"state_dict": published_training_state(training)}, path)
    return path, training.state


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    model = a_jepa().encoder
    model.licence = "MIT"
    return save_model(model, tmp_path_factory.mktemp("encoder") / "model")


def a_run(settings, objective):
    return Run(
        name=settings.name,
        seed=0,
        objective=objective,
        batches=lambda rank, world: [],
        optimisation=Optimisation(lr=0.0, weight_decay=0.0, steps=1, warmup_steps=0),
        settings={"recipe": 1},
    )


def flair_small():
    return override(recipe("anysat-flair"), SMALL)


def test_the_command_starts_from_a_checkpoint_and_a_resumed_run_remembers(full, tmp_path_factory, tmp_path, capsys):
    root = tmp_path_factory.mktemp("flair")
    miniatures.flair(root)
    settings = [part for change in (*SMALL, "lr=0", "weight_decay=0") for part in ("--set", change)]
    where = ["--data", str(root), "--device", "cpu", "--workers", "0", "--precision", "float32", "--json"]
    asked = ["pretrain", "anysat-flair", *settings, *where, "--out", str(tmp_path / "run")]
    assert main([*asked, "--start", str(full[0]), "--steps-now", "1"]) == 0
    assert f"Started from {full[0]}" in capsys.readouterr().err
    noted = noted_start(tmp_path / "run")
    assert (noted["source"], noted["parts"]) == (str(full[0]), ["student", "predictor", "teacher"])
    # What is given for a run that goes on is not even read.
    assert main([*asked, "--start", str(tmp_path / "absent.pth")]) == 0
    captured = capsys.readouterr()
    assert f"Going on with a run that started from {full[0]}" in captured.err
    told = json.loads(captured.out)
    assert (told["step"], told["finished"]) == (2, True)
    assert noted_start(tmp_path / "run") == noted
    # Without a learning rate nothing but the teacher moves, towards the student.
    model = load_model(told["model"])
    assert (set(model.sensors), model.licence) == ({"aerial-flair", "s2"}, "MIT")
    state = full[1]
    for key, value in model.state_dict().items():
        student, teacher = state[f"encoder.{key}"], state[f"teacher.{key}"]
        assert (value - teacher).abs().max() <= (student - teacher).abs().max() + 1e-6, key
    torch.testing.assert_close(model.class_token, state["teacher.class_token"], rtol=0, atol=1e-3)


def test_all_of_a_checkpoint_that_the_recipe_has_is_where_the_run_starts(full):
    settings = flair_small()
    start = read_start(settings, str(full[0]))
    run = begin_from(a_run(settings, lambda: JEPA(settings.objective)), start)
    assert run.settings == {"recipe": 1, "start": start.about}
    begun = run.objective().state_dict()
    assert all(torch.equal(value, full[1][key]) for key, value in begun.items())
    assert not any(".projectors.naip." in key for key in begun)


def test_an_encoder_is_student_and_teacher_and_the_predictor_is_fresh(encoder):
    settings = flair_small()
    run = begin_from(a_run(settings, lambda: JEPA(settings.objective)), read_start(settings, str(encoder)))
    begun, model = run.objective(), load_model(encoder)
    for part in (begun.encoder, begun.teacher):
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in part.state_dict().items())
    torch.manual_seed(1)
    fresh = JEPA(settings.objective)
    torch.manual_seed(1)
    assert torch.equal(run.objective().predictor.input.weight, fresh.predictor.input.weight)


def test_the_planet_recipe_takes_an_encoder_of_its_size(tmp_path):
    torch.manual_seed(0)
    folder = save_model(AnySat(AnySatConfig(dim=192, depth=2, heads=3)), tmp_path / "model")
    start = read_start(planet_tiny(), str(folder))
    assert {key.split(".")[2] for key in start.state if ".projectors." in key} == set(SENSORS_HERE)


def an_olmoearth_recipe(*changes):
    small = ("encoder.dim=32", "encoder.depth=1", "encoder.heads=2", "predictor_depth=1")
    return override(recipe("olmoearth-v1.2-nano"), [*small, *changes])


def test_an_olmoearth_starts_with_its_encoder_and_a_fresh_teacher(tmp_path):
    maps = "encoder.modalities=sentinel2_l2a,sentinel1,worldcover"
    given, settings = an_olmoearth_recipe(maps), an_olmoearth_recipe("encoder.modalities=sentinel2_l2a,srtm")
    torch.manual_seed(3)
    model = OlmoEarth(given.encoder)
    model.licence = "OlmoEarth Artifact License"
    start = read_start(settings, str(save_model(model, tmp_path / "model")))
    run = begin_from(a_run(settings, lambda: LatentMIM(settings.objective)), start)
    torch.manual_seed(4)
    begun = run.objective()
    torch.manual_seed(4)
    fresh = LatentMIM(settings.objective)
    known = model.state_dict()
    for key, value in begun.encoder.state_dict().items():
        # The elevation map is predicted alone, and the weights that it started from never knew it.
        expected = fresh.encoder.state_dict()[key] if ".srtm" in key else known[key]
        assert torch.equal(value, expected), key
    for part in ("teacher", "predictor"):
        ours, theirs = (getattr(objective, part).state_dict() for objective in (begun, fresh))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert inherit(settings, start.about).licence == "OlmoEarth Artifact License"
    assert inherit(replace(settings, licence="other"), start.about).licence == "other"


@pytest.mark.parametrize("changes", [(), ("encoder.output_dim=16",)])
def test_a_teacher_that_follows_starts_as_the_student(tmp_path, changes):
    given = an_olmoearth_recipe("encoder.modalities=sentinel2_l2a,worldcover", *changes)
    moving = ("teacher.momentum_start=0.996", "encoder.modalities=sentinel2_l2a,worldcover,srtm", *changes)
    settings = an_olmoearth_recipe(*moving)
    folder = str(save_model(OlmoEarth(given.encoder), tmp_path / "model"))
    start = read_start(settings, folder)
    assert start.about["parts"] == ["student", "teacher"]
    begun = begin_from(a_run(settings, lambda: LatentMIM(settings.objective)), start).objective()
    student = begun.encoder.state_dict()
    assert all(torch.equal(value, student[key]) for key, value in begun.teacher.state_dict().items())
    own = read_start(override(settings, ["teacher.seed=3"]), folder)  # who asks for other weights gets them
    assert own.about["parts"] == ["student"]


def test_a_dry_run_says_what_it_would_start_from(encoder, tmp_path, capsys):
    settings = an_olmoearth_recipe("encoder.modalities=sentinel2_l2a,srtm", "side_patches=2")
    model = OlmoEarth(settings.encoder)
    model.licence = "OlmoEarth Artifact License"
    folder = str(save_model(model, tmp_path / "model"))
    plan = dry_run(settings, [], start=folder, tflops=1)
    told = plan.as_dict()
    assert (told["start"]["source"], told["start"]["parts"]) == (folder, ["student"])
    assert told["recipe"]["licence"] == "OlmoEarth Artifact License"
    assert {key: told[key] for key in told if key not in ("start", "recipe")} == {
        key: value for key, value in dry_run(settings, [], tflops=1).as_dict().items() if key != "recipe"
    }
    show_plan(plan)
    said = capsys.readouterr().out
    assert f"Starts from {folder} (student), licence OlmoEarth Artifact License, SHA-256 " in said
    show_plan(dry_run(flair_small(), [], start=str(encoder)))
    assert f"Starts from {encoder} (student, teacher), licence MIT" in capsys.readouterr().out
    with pytest.raises(InputError, match="dim of its encoder is 32 and the recipe's is 64"):
        dry_run(override(settings, ["encoder.dim=64"]), [], start=folder, tflops=1)
    with pytest.raises(InputError, match="calibrates itself; leave out --start"):
        dry_run(recipe("panterra-nano"), [], start=folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("encoder.depth=2",), "depth of its encoder is 1 and the recipe's is 2"),
        (("predictor_depth=2",), "depth of its predictor is 1 and the recipe's is 2"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(full, changes, said):
    with pytest.raises(InputError, match=re.escape(f"{full[0]} does not fit anysat-flair: {said}")) as error:
        read_start(override(flair_small(), changes), str(full[0]))
    assert "\n" not in str(error.value)


def test_an_encoder_that_does_not_fit_is_refused_by_what_differs_first(encoder, tmp_path):
    settings = flair_small()
    with pytest.raises(InputError, match="dim of its encoder is 96 and the recipe's is 192; choose a recipe of its"):
        read_start(override(settings, ["encoder.dim=192"]), str(encoder))
    lone = a_jepa()
    lone = AnySat(replace(lone.config.encoder, sensors=lone.config.encoder.sensors[:1]))
    folder = save_model(lone, tmp_path / "lone")
    with pytest.raises(InputError, match=r"its projectors\.\S+ is absent and the recipe's is \["):
        read_start(settings, str(folder))
    with pytest.raises(InputError, match=r"is no OlmoEarth, which olmoearth-v1\.2-nano trains"):
        read_start(an_olmoearth_recipe(), str(encoder))
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="holds a; wanted a training checkpoint of AnySat"):
        read_start(settings, str(tmp_path / "other.pth"))
    assert open_start(settings, None, tmp_path / "run") is None


def test_the_command_says_what_cannot_start(tmp_path, capsys):
    assert main(["pretrain", "panterra-nano", "--out", str(tmp_path / "run"), "--start", "x"]) == 2
    assert "panterra-nano starts from weights that it calibrates itself; leave out --start" in capsys.readouterr().err
    assert main(["pretrain", "anysat-flair", "--out", str(tmp_path / "run"), "--start", str(tmp_path)]) == 2
    assert "has no config.json and no AnySat.pth" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
