import json

import pytest

import miniatures
from panterra.cli import main
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.weights import load_model
from panterra.recipes import recipe
from panterra.recipes.anysat_data import kept_statistics, open_sets, parse_folders
from panterra.recipes.anysat_plan import plan_anysat
from panterra.recipes.overrides import check, override

SMALL = (
    "encoder.dim=96",
    "encoder.depth=1",
    "encoder.heads=4",
    "predictor_heads=4",
    "predictor_depth=1",
    "sources.flair.batch=1",
    "sources.flair.scales=5",
    "sources.flair.cells=10",
    "epochs=2",
)


@pytest.fixture(scope="module")
def flair(tmp_path_factory):
    root = tmp_path_factory.mktemp("flair")
    miniatures.flair(root)
    return root


def pretrain(capsys, *arguments):
    status = main(["pretrain", "anysat-flair", *(part for change in SMALL for part in ("--set", change)), *arguments])
    captured = capsys.readouterr()
    return status, captured


def test_a_run_over_a_download_validates_resumes_and_gives_a_model(flair, tmp_path, capsys):
    where = ("--data", f"flair={flair}", "--device", "cpu", "--workers", "0", "--precision", "float32", "--json")
    status, captured = pretrain(capsys, *where, "--out", str(tmp_path / "whole"))
    assert status == 0, captured.err
    whole = json.loads(captured.out)
    assert (whole["step"], whole["finished"]) == (2, True)
    logged = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "validation/loss" in line] == [0, 1, 2]
    assert pretrain(capsys, *where, "--out", str(tmp_path / "half"), "--steps-now", "1")[0] == 0
    status, captured = pretrain(capsys, *where, "--out", str(tmp_path / "half"))
    assert json.loads(captured.out)["loss"] == whole["loss"]
    model = load_model(tmp_path / "whole" / "model")
    assert set(model.modalities) == {"aerial_flair", "sentinel2_l2a", "sentinel2"}
    held = json.loads((tmp_path / "whole" / "statistics.json").read_text())["flair"]
    assert model.statistics["s2"].mean == tuple(held["s2"]["mean"])


def test_images_are_whole_to_train_on_and_folds_those_of_the_run(flair, tmp_path):
    sides = [open_sets({"flair": flair}, split)["flair"][0].target.shape[-1] for split in ("train", "val")]
    assert sides == [512, 500]
    miniatures.pastis_hd(tmp_path)
    alone = open_sets({"pastis_hd": tmp_path}, "train")
    with_others = open_sets({"pastis_hd": tmp_path, "flair": flair}, "train")
    assert [len(found["pastis_hd"]) for found in (alone, with_others)] == [5, 3]
    assert len(open_sets({"pastis_hd": tmp_path}, "val")["pastis_hd"]) == 1


def test_published_statistics_are_means_of_the_samples_own(flair, tmp_path):
    samples = open_sets({"flair": flair}, "train")
    published, pooled = (
        kept_statistics(recipe(name), samples, tmp_path / name)["flair"]["s2"]
        for name in ("anysat-flair", "anysat-flair-corrected")
    )
    share = ((published.count - 1) / published.count) ** 0.5  # of one sample, unbiased
    assert pooled.mean == pytest.approx(published.mean)
    assert pooled.std == pytest.approx([share * x for x in published.std])


def test_statistics_are_those_of_the_samples(flair, tmp_path):
    settings = recipe("anysat-flair")
    samples = open_sets({"flair": flair}, "train")
    fitted = kept_statistics(settings, samples, tmp_path)["flair"]["s2"]
    observation = samples["flair"][0].batch.observations["sentinel2_l2a"]
    pixels = observation.pixels.movedim(2, -1)[observation.valid].double()
    bands = [band.name for band in MODALITIES["sentinel2_l2a"].bands]
    expected = dict(zip(bands, pixels.mean(0).tolist(), strict=True))
    for channel, mean in zip(fitted.channels, fitted.mean, strict=True):
        assert mean == pytest.approx(expected[channel])
    assert kept_statistics(settings, {}, tmp_path)["flair"]["s2"] == fitted


def test_a_plan_adds_up():
    settings = override(recipe("anysat-geoplex"), ["epochs=3"])
    counts = {"treesatai_ts": 38520, "pastis_hd": 2433, "flair": 49230, "planted": 1075701, "s2naip_urban": 359046}
    plan = plan_anysat(settings, counts, ranks=2)
    assert (plan.epoch, plan.steps) == (8976, 3 * 8976)
    assert sum(source.steps for source in plan.sources) == plan.epoch
    assert plan.sources[0].tokens == 3 * (36 + 9) / 2
    assert plan.samples_per_step == 2 * sum(s.steps * s.batch for s in plan.sources) / 8976
    assert plan.parameters["encoder"] == plan.parameters["teacher"] == 125_905_447


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dry-run", "--data", "elsewhere=x"), "anysat-flair takes flair=FOLDER"),
        (("--out", "x"), "anysat-flair needs flair; give --data flair=FOLDER"),
        (("--dry-run", "--set", "sources.batch=2"), "write sources.NAME.PART=value with flair"),
        (("--dry-run", "--set", "encoder.dim=100"), "take a multiple of 32 and of the heads"),
        (("--dry-run", "--set", "date_dropout=1"), "from 0 to below 1"),
        (("--dry-run", "--set", "epochs=0"), "wanted 1 at least"),
        (("--dry-run", "--set", "sources.flair.batch=100000"), "set its batch smaller"),
    ],
)
def test_what_cannot_be_is_said(arguments, message, capsys):
    status, captured = pretrain(capsys, *arguments)
    assert status == 2
    assert message in captured.err


def test_a_recipe_of_one_set_takes_a_folder_alone(tmp_path):
    assert parse_folders(recipe("anysat-flair"), [str(tmp_path)]) == {"flair": tmp_path}
    with pytest.raises(InputError, match="needs pastis_hd"):
        parse_folders(recipe("anysat-geoplex"), ["flair=x", "treesatai_ts=y"])
    check(recipe("anysat-geoplex-tiny"))
