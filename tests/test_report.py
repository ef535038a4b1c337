import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from panterra.mapping.report import ClassScores, LegendEntry, Mark, Page, Panel, Score, paint, stretch, write_report

COLOURS = {1: (40, 90, 160), 2: (60, 120, 50)}
CODES = np.array([[1, 2, 0], [2, 2, 1]], np.uint8)
VOID = {"meta", "img", "input", "br", "rect", "line", "circle"}


class Elements(HTMLParser):
    """Collects elements and fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def page(tmp_path):
    imagery = Panel(
        title="Imagery",
        pixels=np.full((2, 3, 4), 200, np.uint8),
        alt="True-colour imagery",
        photo=True,
        marks=[Mark(across=0.5, down=0.25, colour=(1, 2, 3))],
    )
    good = Score(estimate=0.8, interval=(0.7, 0.9))
    return Page(
        title="Fields & <forests>",
        lead="A test",
        panels=[imagery, Panel(title="Map", pixels=paint(CODES, COLOURS), alt="The map", over=imagery)],
        legend=[LegendEntry(name="Water", colour=COLOURS[1], share=0.4)],
        scores={"Overall accuracy": good, "Kappa": Score(estimate=float("nan"))},
        measured="On 10 held-out labels.",
        classes=[
            ClassScores(name=name, colour=COLOURS[code], support=5, precision=good, recall=good, f1=good)
            for code, name in ((1, "Water"), (2, "Forest"))
        ],
        confusion=np.array([[4, 1], [0, 5]]),
        effort={"Run time": "3 s"},
        origin={"Model": 'nano "random"'},
        files={"Map": tmp_path / "out" / "map.tif", "Labels": tmp_path / "labels.geojson"},
    )


@pytest.fixture
def text(page, tmp_path):
    return write_report(tmp_path / "out" / "report.html", page).read_text()


def test_the_page_asks_nothing_from_elsewhere(text):
    addresses = [a.get(key, "") for _, a in Elements(text).found for key in ("src", "href", "action", "poster")]
    addresses += re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", text)
    assert all(a.startswith("data:") or not re.match(r"(\w+:)?//|\w+:", a) for a in addresses if a)
    assert "<script" not in text
    assert "http" not in text


def test_pictures_keep_every_colour(text):
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    assert len(found) == 1
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[0]))).convert("RGBA"))
    np.testing.assert_array_equal(shown, paint(CODES, COLOURS))


def test_text_is_escaped_and_links_are_relative(text):
    assert "<h1>Fields &amp; &lt;forests&gt;</h1>" in text
    links = [a["href"] for a in Elements(text).all("a")]
    assert links == ["map.tif", "../labels.geojson"]


def test_those_who_cannot_see_are_served(text):
    elements = Elements(text)
    assert [a["alt"] for a in elements.all("img")] == ["True-colour imagery", "", "The map"]
    assert all(a.get("scope") in ("row", "col") for a in elements.all("th"))
    assert all(a.get("aria-label") for a in elements.all("input"))
    assert elements.all("html")[0]["lang"] == "en"
    described = {a["aria-describedby"] for a in elements.all("table")}
    assert described <= {a.get("id") for a in elements.all("p")}


def test_figures_stand_where_they_belong(text):
    rows = re.findall(r'<th scope="row">.*?</span>(\w+)</th>(.*?)</tr>', text)
    confusion = {name: re.findall(r">(\d+|·)</td>", cells) for name, cells in rows[2:]}
    assert confusion == {"Water": ["4", "1"], "Forest": ["·", "5"]}
    assert '0.80 <span class="range">0.70–0.90</span>' in rows[0][1]
    assert "Water <span" in text
    assert "40.0%" in text
    assert "<dd>–</dd>" in text, "a figure that is not a number is shown as a dash"


def test_a_page_without_classes_has_no_tables(page, tmp_path):
    values = replace(page, classes=(), confusion=None, legend=())
    text = write_report(tmp_path / "values.html", values).read_text()
    assert "<table" not in text
    assert "Overall accuracy" in text
    assert [p.name for p in tmp_path.iterdir()] == ["values.html"]


def test_stretch_is_monotone_and_marks_what_is_missing():
    ramp = np.linspace(0, 4000, 300).reshape(1, 10, 30).repeat(3, axis=0)
    ramp[:, 9, 29] = np.nan
    valid = np.isfinite(ramp[0])
    shown = stretch(ramp, valid)
    assert shown[9, 29, 3] == 0
    assert (shown[valid][:, 3] == 255).all()
    assert (np.diff(shown[valid][:, 0].astype(int)) >= 0).all()
    assert shown[valid][:, 0].max() == 255


def test_stretch_of_nothing_is_transparent():
    assert stretch(np.full((3, 2, 2), np.nan), np.zeros((2, 2), bool))[..., 3].sum() == 0
