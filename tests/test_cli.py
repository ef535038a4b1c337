"""The command line as a person meets it; the whole path runs on a small planet."""

import json
import math
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from affine import Affine
from shapely.geometry import Point

from panterra.cli import app, main
from panterra.commands.probe import unseen_mistakes
from panterra.commands.terminal import show_json
from panterra.evaluate.probes import fit_probe
from panterra.modalities import MODALITIES
from panterra.models.adapters.offers import ADAPTERS
from panterra.planet import write_planet_scene

COMMANDS = (
    "demo",
    "models",
    "doctor",
    "fetch",
    "plan",
    "embed",
    "search",
    "chips",
    "change",
    "probe",
    "finetune",
    "map",
    "detect",
    "sample",
    "accuracy",
    "evaluate",
    "report",
    "export",
    "pretrain",
    "data",
)
RANDOM = ("--model", "olmoearth-v1.2-nano", "--random", "0")


def answer(capsys, *arguments):
    """Run a command in this process and read its JSON, which must be all that stdout holds."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys, *arguments):
    """Run a command that must fail as a person can put right, and return its one line."""
    assert main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("panterra: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in COMMANDS)
    assert {name for name in app if not name.startswith("-")} == set(COMMANDS)


@pytest.mark.parametrize("name", [*COMMANDS, "data build", "data inspect", "data verify"])
def test_help_ends_in_an_example(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    last = capsys.readouterr().out.strip().split("Example: ")[-1]
    assert last.startswith(f"panterra {name}")
    app.parse_args(" ".join(last.split()).split()[1:], exit_on_error=False, print_error=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mapp"], "mapp"),
        (["doctor"], "SCENE"),
        (["embed", "scene", "--model", "x", "--out", "y", "--patch-m", "wide"], "--patch-m"),
        (["embed", "scene", "--modell", "x"], "--model"),
        (["doctor", "nowhere"], "nowhere"),
        (["embed", "nowhere", "--out", "o.zarr", *RANDOM], "nowhere"),
        (["map", "nowhere", "--probe", "nothing", "--out", "o.tif"], "no"),
        (["models", "surplus"], "surplus"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in complaint(capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["scene.json/made", "/proc/made"])
def test_a_place_that_cannot_be_written_is_one_line(out, planet, capsys):
    assert "check that the path" in complaint(
        capsys, "fetch", "--from-files", next(planet.glob("sentinel1*.tif")), "--out", planet / out
    )


def test_options_of_catalogues_are_refused_for_files(planet, capsys, tmp_path):
    for option in (("--max-cloud", 10), ("--composite", "none"), ("--every", "year"), ("--keep-clouds",)):
        said = complaint(capsys, "fetch", "--from-files", planet, "--out", tmp_path / "scene", *option)
        assert f"{option[0]} goes with --aoi" in said


def test_a_probe_of_nothing_says_that_there_is_nothing(planet, capsys, tmp_path):
    said = complaint(capsys, "probe", tmp_path / "nothing", "--labels", planet / "labels.geojson", "--out", tmp_path)
    assert "there is no" in said


def test_models_say_their_licence(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "OlmoEarth Artifact License" in out
    assert "military" in out
    cards = {name: card for name, card in answer(capsys, "models").items() if "package" not in card}
    assert cards["olmoearth-v1.2-nano"]["dim"] == 128
    assert cards["anysat-base"]["licence"] == "MIT"
    assert all(bool(card["licence"]) == bool(card["address"] or card["packaged"]) for card in cards.values())
    unpublished = [name for name, card in cards.items() if card["address"] is None]
    assert unpublished == ["panterra-nano", "anysat-tiny", "anysat-small"]


def test_models_of_other_packages_are_listed_without_importing_those(capsys, tmp_path, monkeypatch):
    """Packages that cannot be imported stand in for two of the real ones."""
    for name in ("torchgeo", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('imported')")
        (tmp_path / f"{name}-9.8.7.dist-info").mkdir()
        (tmp_path / f"{name}-9.8.7.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 9.8.7\n")
    monkeypatch.syspath_prepend(tmp_path)
    listed = {name: card for name, card in answer(capsys, "models").items() if "package" in card}
    assert listed.keys() == ADAPTERS.keys()
    assert listed["presto"] == {
        "name": "presto",
        "package": "torchgeo",
        "needs": "torchgeo>=0.9",
        "installed": "9.8.7",
    }
    assert listed["dinov3-base"]["installed"] == "9.8.7"
    assert main(["models"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows["presto"] == ["torchgeo>=0.9", "9.8.7"]
    if find_spec("terratorch") is None:
        assert listed["clay-v1"]["installed"] is None
        assert rows["clay-v1"] == ["terratorch>=1.2", "no"]


@pytest.fixture(scope="module")
def planet(tmp_path_factory):
    """A small scene with labels."""
    return write_planet_scene(tmp_path_factory.mktemp("planet") / "scene", size_px=96, labels=110)


@pytest.fixture(scope="module")
def embeddings(planet):
    out = planet.parent / "embeddings.zarr"
    assert main(["embed", str(planet), "--out", str(out), "--window-px", "32", "--overlap-px", "8", *RANDOM]) == 0
    return out


def probe_arguments(embeddings, planet, out):
    return "probe", embeddings, "--labels", planet / "labels.geojson", "--out", out, "--block-m", 120, "--folds", 3


def test_from_scene_to_map(planet, embeddings, tmp_path, capsys):
    capsys.readouterr()
    report = answer(capsys, *probe_arguments(embeddings, planet, tmp_path / "probe"))
    assert report["num_samples"] + report["left_out"] > 80
    assert 0 <= report["metrics"]["accuracy"]["low"] <= report["metrics"]["accuracy"]["high"] <= 1
    result = answer(
        capsys, "map", embeddings, "--probe", tmp_path / "probe", "--out", tmp_path / "map.tif", "--probabilities"
    )
    with rasterio.open(result["map"]) as mapped, rasterio.open(result["probabilities"]) as shares:
        assert mapped.shape == shares.shape == (24, 24)
        assert mapped.nodata == 0
        codes = mapped.read(1)
        assert set(np.unique(codes)) <= set(range(12))
        likeliest = shares.read().argmax(axis=0) + 1
        np.testing.assert_array_equal(codes[codes > 0], likeliest[codes > 0])
    passport = json.loads(Path(result["passport"]).read_text())
    assert "random weights" in json.dumps(passport)
    again = answer(capsys, "map", embeddings, "--probe", tmp_path / "probe", "--out", tmp_path / "b.tif")
    assert Path(again["map"]).read_bytes() == Path(result["map"]).read_bytes()
    assert "overwrite" in complaint(
        capsys, "map", embeddings, "--probe", tmp_path / "probe", "--out", tmp_path / "b.tif"
    )


def test_a_probe_of_a_scene_embeds_it_first(planet, tmp_path, capsys):
    assert "--model" in complaint(capsys, *probe_arguments(planet, planet, tmp_path / "probe"))
    report = answer(capsys, *probe_arguments(planet, planet, tmp_path / "probe"), "--split", "random", *RANDOM)
    assert report["split"] == "random"
    assert (tmp_path / "probe-embeddings.zarr").is_dir()


def test_labels_of_another_place_are_refused(planet, embeddings, tmp_path, capsys):
    capsys.readouterr()
    elsewhere = tmp_path / "elsewhere.csv"
    elsewhere.write_text("lon,lat,class\n100.5,3.2,forest\n100.6,3.3,water\n")
    arguments = ("probe", embeddings, "--labels", elsewhere, "--out", tmp_path / "probe")
    assert "same place" in complaint(capsys, *arguments)


def test_labels_of_another_year_are_left_out_and_counted(planet, embeddings, tmp_path, capsys):
    capsys.readouterr()
    labels = gpd.read_file(planet / "labels.geojson")
    labels["start_time"], labels["end_time"] = "2023-01-01", "2023-12-31"
    labels.loc[:2, ["start_time", "end_time"]] = ["2019-01-01", "2019-12-31"]
    labels.to_file(tmp_path / "timed.geojson")
    arguments = ("probe", embeddings, "--labels", tmp_path / "timed.geojson", "--out", tmp_path / "probe")
    assert main([*map(str, arguments), "--block-m", "120", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["other_dates"] == 3
    assert "3 labels are of other dates than the imagery, 2023-" in told.err
    labels.assign(start_time="2019-01-01", end_time="2019-12-31").to_file(tmp_path / "old.geojson")
    arguments = ("probe", embeddings, "--labels", tmp_path / "old.geojson", "--out", tmp_path / "probe")
    assert "labels of" in complaint(capsys, *arguments)


def test_a_class_that_no_patch_is_labelled_with_is_told_of(planet, embeddings, tmp_path, capsys):
    frame = gpd.read_file(planet / "labels.geojson")
    frame.loc[len(frame)] = {**frame.iloc[0], "class": "moraine", "geometry": Point(0, 0)}
    frame.to_file(tmp_path / "more.geojson")
    arguments = probe_arguments(embeddings, planet, tmp_path / "probe")
    assert main([str(tmp_path / "more.geojson") if a == planet / "labels.geojson" else str(a) for a in arguments]) == 0
    assert "no patch with data is labelled moraine" in capsys.readouterr().err


def test_imagery_of_another_level_is_told_from_what_a_model_looks_at(tmp_path, capsys):
    grid = {"height": 64, "width": 64, "crs": "EPSG:32735", "transform": Affine(10, 0, 600000, 0, -10, 7200000)}
    names = MODALITIES["sentinel2"].band_names
    for day in ("20180101", "20190405"):
        path = tmp_path / f"s2_l1c_{day}.tif"
        with rasterio.open(path, "w", driver="GTiff", count=len(names), dtype="uint16", **grid) as file:
            file.write(np.random.default_rng(0).integers(800, 4000, (len(names), 64, 64)).astype("uint16"))
            file.descriptions = names
    files = sorted(tmp_path.glob("*.tif"))
    answer(capsys, "fetch", "--from-files", *files, "--out", tmp_path / "scene")
    found = answer(capsys, "doctor", tmp_path / "scene", "--model", "panterra-nano")
    assert (found[0]["level"], "level 1C" in found[0]["fix"]) == ("error", True)
    model = ("--model", "panterra-nano", "--out", tmp_path / "out.zarr")
    assert "there is sentinel2, and none of sentinel2_l2a" in complaint(capsys, "embed", tmp_path / "scene", *model)
    labels = ("--labels", files[0])
    assert "sentinel2 is level 1C" in complaint(capsys, "finetune", tmp_path / "scene", *labels, *model)
    data = ("--dataset", "eurosat_ms", "--root", tmp_path)
    assert "cannot be shown eurosat_ms" in complaint(capsys, "finetune", *data, *model)


def test_of_still_images_the_newest_is_named(tmp_path, capsys):
    grid = {"height": 64, "width": 64, "crs": "EPSG:26910", "transform": Affine(1, 0, 600000, 0, -1, 4200000)}
    for year in (2012, 2014):
        path = tmp_path / f"naip_{year}0715.tif"
        with rasterio.open(path, "w", driver="GTiff", count=4, dtype="uint8", **grid) as file:
            file.write(np.random.default_rng(year).integers(20, 230, (4, 64, 64)).astype("uint8"))
            file.descriptions = ("R", "G", "B", "NIR")
    files = sorted(map(str, tmp_path.glob("*.tif")))
    assert main(["fetch", "--from-files", *files, "--out", str(tmp_path / "scene")]) == 0
    assert "naip: 2014-07-15, the newest of 2 dates" in capsys.readouterr().out


def test_dates_come_from_a_file_too(tmp_path, capsys):
    grid = {"height": 24, "width": 40, "crs": "EPSG:32721", "transform": Affine(250, 0, 600000, 0, -250, 8700000)}
    with rasterio.open(tmp_path / "ndvi.tif", "w", driver="GTiff", count=3, dtype="int16", **grid) as file:
        file.write(np.random.default_rng(0).integers(1000, 9000, (3, 24, 40)).astype("int16"))
    days = ["2000-02-18", "2000-03-05", "2000-03-21"]
    (tmp_path / "dates.csv").write_text("\n".join(days))
    arguments = ("--modality", "ndvi", "--dates", tmp_path / "dates.csv", "--out", tmp_path / "scene")
    assert answer(capsys, "fetch", "--from-files", tmp_path / "ndvi.tif", *arguments)["dates"] == {"ndvi": days}


def test_undefined_numbers_are_null_in_json(capsys):
    show_json(
        {"f1": [math.nan, {"low": -math.inf, "high": np.float64("nan")}], "share": 0.5, "path": Path("a"), "n": 3}
    )
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told == {"f1": [None, {"low": None, "high": None}], "share": 0.5, "path": "a", "n": 3}


def test_a_test_without_a_mistake_says_what_it_leaves_open():
    rng = np.random.default_rng(0)
    target = np.repeat([1, 2], 30)
    _, perfect = fit_probe(rng.normal(10 * target[:, None], 0.1, (60, 3)), target, split="random")
    assert "in 60 places that leaves mistakes in up to 5% of places possible" in unseen_mistakes(perfect)
    _, poor = fit_probe(rng.normal(size=(60, 3)), target, split="random")
    assert unseen_mistakes(poor) == ""


def test_doctor_finds_nothing_wrong_with_the_planet(planet, capsys):
    findings = answer(capsys, "doctor", planet, "--model", "olmoearth-v1.2-nano")
    assert {"sentinel2_l2a", "sentinel1"} <= {f["modality"] for f in findings}
    assert not [f for f in findings if f["level"] == "error"]


def test_doctor_repairs_reflectance_from_0_to_1(planet, tmp_path, capsys):
    for path in planet.glob("sentinel2_l2a_*.tif"):
        with rasterio.open(path) as source:
            profile, pixels, names = source.profile, source.read(), source.descriptions
        profile.update(driver="GTiff", dtype="float32")
        with rasterio.open(tmp_path / path.name, "w", **profile) as small:
            small.write((pixels / 1e4).astype("float32"))
            small.descriptions = names
    files = sorted(tmp_path.glob("*.tif"))
    made = answer(capsys, "fetch", "--from-files", *files, "--out", tmp_path / "scene", "--modality", "sentinel2_l2a")
    assert len(made["dates"]["sentinel2_l2a"]) == len(files)
    assert made["decisions"]
    findings = answer(capsys, "doctor", tmp_path / "scene")
    assert not [f for f in findings if f["level"] == "error"]


def test_the_demo_ends_in_a_report(tmp_path, capsys):
    result = answer(capsys, "demo", "--out", tmp_path / "demo", "--size-px", 96, "--patch-m", 40, "--block-m", 120)
    page = Path(result["report"]).read_text()
    assert "Random weights" not in page
    assert "panterra-nano" in page
    assert "Agreement with the truth" in page
    assert page.count("<figure>") == 3
    assert result["energy_method"] in ("measured", "modelled")
    assert all(Path(result[name]).exists() for name in ("map", "passport", "embeddings", "probe"))


def test_a_demo_with_random_weights_says_so(tmp_path, capsys):
    arguments = ("--out", tmp_path / "demo", "--size-px", 64, "--patch-m", 40, "--block-m", 120, "--random", 0)
    assert "Random weights" in Path(answer(capsys, "demo", *arguments)["report"]).read_text()


def test_the_demo_on_own_data_has_no_truth(planet, tmp_path, capsys):
    own = ("--scene", planet, "--labels", planet / "labels.geojson", "--patch-m", 40, "--block-m", 120)
    result = answer(capsys, "demo", *own, "--out", tmp_path / "demo")
    page = Path(result["report"]).read_text()
    assert page.count("<figure>") == 2
    assert "truth" not in page
    assert "--labels" in complaint(capsys, "demo", "--scene", planet, "--out", tmp_path / "demo")


def test_stopping_with_ctrl_c_is_one_line_and_status_130(embeddings, tmp_path):
    labels = tmp_path / "labels.csv"
    os.mkfifo(labels)
    arguments = ["probe", str(embeddings), "--labels", str(labels), "--out", str(tmp_path / "probe")]
    process = subprocess.Popen(
        [sys.executable, "-m", "panterra.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, they and their children would ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with labels.open("w"):  # opens when the program has begun to read
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert out == ""
    assert err == "panterra: stopped\n"


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m panterra.cli models | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("0", "141")
    assert done.stderr == ""


@pytest.mark.parametrize(
    "command", ["fetch", "plan", "map scene --probe probe --out map", "embed scene --model nano --out store"]
)
def test_an_area_may_lie_west_of_greenwich(command):
    words = [*command.split(), "--aoi", "-56.4,-1.5,-56.3,-1.4"]
    _, bound, *_ = app.parse_args(words, exit_on_error=False, print_error=False)
    assert bound.arguments["aoi"] == "-56.4,-1.5,-56.3,-1.4"
