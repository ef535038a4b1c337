"""What `panterra evaluate` says and writes."""

import csv
import json
import re
from html.parser import HTMLParser

import pytest
from cyclopts import App, Parameter

from panterra.cli.evaluate import evaluate
from panterra.commands.evaluate import parse_benchmarks
from panterra.commands.evaluation_page import figure, points_of, write_page
from panterra.errors import InputError
from panterra.evaluate.metrics import Interval
from panterra.evaluate.suite import Row, read_rows

app = App(default_parameter=Parameter(negative=()))
app.default(evaluate)


def run(*words):
    return app([*map(str, words)], exit_on_error=False, print_error=False, result_action="return_value")


pytestmark = pytest.mark.usefixtures("root")


def quick(root, out, *names):
    names = [f"{name}={root}" for name in names]
    return "--models", "raw", "--benchmarks", *names, "--out", out, "--rates", 0.01, "--epochs", 2, "--limit", 20


def test_one_run_gives_table_csv_lines_and_page(root, tmp_path, capsys):
    words = quick(root, tmp_path, "planet_classes", "planet_height")
    run(*words, "--fractions", 0.5, 1, "--seeds", 0, 1, "--sweep", "pooling", "--batch", 4, "--published-rate")
    said = capsys.readouterr()
    assert "planet_classes  knn" in said.out
    assert "raw on planet_height" in said.err
    rows = read_rows(tmp_path / "results.jsonl")
    # Neighbours of all samples do not depend on the seed.
    assert [(r.protocol, r.fraction, r.seed) for r in rows if r.benchmark == "planet_classes"] == [
        ("knn", 0.5, 0),
        ("knn", 0.5, 1),
        ("knn", 1, 0),
        *[("linear", f, s) for f in (0.5, 1) for s in (0, 1)],
    ]
    with (tmp_path / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    for line, row in zip(table, rows, strict=True):
        assert float(line["score"]) == pytest.approx(row.score.estimate) == pytest.approx(float(line[row.metric]))
        assert (line["error"], line["modalities"]) == ("", "sentinel2_l2a")
        assert line["batch"] == ("" if row.protocol == "knn" else "4")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 + 3 + 3


def test_what_was_asked_for_stands_in_columns(root, tmp_path, capsys):
    words = quick(root, tmp_path, "planet_pixels")
    options = ("--compress", "none", "int8", "--fractions", 0.5, 1, "--subsets", "published", "--loss", "dice")
    run(*words, "--protocols", "interpolate", *options, "--class-weights", "balanced", "--normalisation", "model")
    assert "interpolate, int8" in capsys.readouterr().out
    with (tmp_path / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(line["compression"], line["subset"]) for line in table] == [
        (compression, subset) for compression in ("none", "int8") for subset in ("random, seed 42", "")
    ]
    assert {(line["loss"], line["class_weights"], line["protocol"]) for line in table} == {
        ("dice", "balanced", "interpolate")
    }
    assert float(table[0]["bytes"]) == 4 * float(table[2]["bytes"])
    page = (tmp_path / "report.html").read_text()
    assert "interpolating probe, int8" in page
    assert "Dice and cross-entropy; balanced classes" in page
    # A curve over labels for each way of storage.
    assert page.count("training samples</text>") == 2


def test_one_way_to_choose_the_statistics(root, tmp_path):
    words = quick(root, tmp_path, "planet_pixels")
    with pytest.raises(InputError, match="leave it or --normalisation out"):
        run(*words, "--normalisation", "model", "--sweep", "normalisation")
    with pytest.raises(InputError, match="'zip' compresses nothing"):
        run(*words, "--compress", "zip")


def test_a_failure_is_told_after_the_rest_is_written(root, tmp_path, capsys):
    words = quick(root, tmp_path, "planet_classes")
    at = words.index("--out")
    with pytest.raises(InputError, match=r"raw on so2sat failed: there is no folder /nowhere.*repeat to try again"):
        run(*words[:at], "so2sat=/nowhere", *words[at:], "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["failed"] == 1
    assert [row["error"] is None for row in result["rows"]] == [True, True, False]
    assert "so2sat failed with raw" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("text", ["planet_classes", "=folder", "name="])
def test_benchmarks_are_names_with_folders(text):
    with pytest.raises(InputError, match="write NAME=FOLDER"):
        parse_benchmarks([text])


def test_a_benchmark_that_nobody_knows_is_refused_before_anything_runs():
    with pytest.raises(InputError, match="no data set 'm_eurosatt'"):
        parse_benchmarks(["m_eurosatt=folder"])


class Strict(HTMLParser):
    """Notes what a page would load, and tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href") and value]
        if tag not in ("meta", "br", "line", "circle", "rect", "polyline", "polygon"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def row(model, score, **options):
    interval = Interval(estimate=score, low=score - 0.1, high=score + 0.1, std=0.05)
    about = {
        "features": "summary",
        "pooling": "mean",
        "normalisation": "model",
        "patch_m": 40.0,
        "modalities": ["naip"],
    }
    settings = {"benchmark": "b", "protocol": "knn", "metric": "accuracy", "task": "classification"} | options
    figures = {settings["metric"]: interval}
    return Row(id=str((model, options)), model=model, figures=figures, chosen=about, labels=10, **settings)


def test_the_page_is_whole_and_loads_nothing(tmp_path):
    rows = [
        row("<b>bold</b> & co", 0.5),
        row("other", 0.7, fraction=0.1),
        row("other", 0.8, protocol="linear", seed=1),
        row("other", 12.0, benchmark="height", metric="rmse", protocol="linear"),
        Row(id="x", model="other", benchmark="lost", protocol="knn", error="no <folder>"),
    ]
    page = write_page(tmp_path / "report.html", rows, settings={"A": "<1>"}).read_text()
    parser = Strict()
    parser.feed(page)
    assert parser.open == []
    assert parser.loads == []
    assert "url(" not in page
    assert "<b>bold" not in page
    assert "no &lt;folder&gt;" in page
    assert re.search(r'class="best">0\.800', page)


def test_seeds_are_averaged():
    rows = [row("m", 0.4, seed=0), row("m", 0.6, seed=1), row("m", 0.9, fraction=0.5)]
    both, half = points_of(rows)
    assert (both.estimate, both.low, both.high, both.seeds) == pytest.approx((0.5, 0.4, 0.6, 2))
    assert half.seeds == 1


@pytest.mark.parametrize(("value", "text"), [(0.12345, "0.123"), (123.4, "123"), (float("nan"), "–")])
def test_figures_have_three_digits(value, text):
    assert figure(value) == text


def test_models_can_be_fine_tuned_and_features_diagnosed(root, tmp_path, capsys):
    model = "olmoearth-v1.2-nano@random:0"
    words = ("--models", model, "--benchmarks", f"planet_pixels={root}", "--out", tmp_path, "--epochs", 1)
    options = ("--tuning-rates", 0.001, "--tuned-head", "nearest", "--precision", "float32", "--diagnostics")
    run(*words, *options, "--rates", 0.01, "--limit", 4, "--protocols", "linear", "finetune")
    assert "finetune" in capsys.readouterr().out
    with (tmp_path / "results.csv").open(newline="") as file:
        probe, tuned = csv.DictReader(file)
    assert (tuned["protocol"], tuned["head"], tuned["precision"], tuned["rate"]) == (
        "finetune",
        "nearest",
        "float32",
        "0.001",
    )
    assert float(tuned["seconds"]) > 0
    assert tuned["embed_seconds"] == "0.0"
    assert 1 <= float(probe["effective_rank"]) <= 128
    assert float(probe["uniformity"]) < 0
    assert tuned["effective_rank"] == ""
    for line in (probe, tuned):
        assert 0 <= float(line["ece"]) <= 1
    page = (tmp_path / "report.html").read_text()
    assert "How features spread" in page
    assert "nearest head" in page
