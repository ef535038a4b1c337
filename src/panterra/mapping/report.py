"""A map, its scores and its origin on one page that opens anywhere."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from panterra.files import write_whole
from panterra.imagery.raster import Colour

STYLE = Path(__file__).with_suffix(".css")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A figure and its 95 % interval."""

    estimate: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScores:
    """How well one class is found; `support` counts its labelled patches."""

    name: str
    colour: Colour
    support: int
    precision: Score
    recall: Score
    f1: Score


@dataclass(frozen=True, slots=True, kw_only=True)
class LegendEntry:
    """A class of the map; `share` is its part of the mapped area."""

    name: str
    colour: Colour
    share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A labelled place on a picture, from its upper left corner (0, 0) to the lower right one (1, 1)."""

    across: float
    down: float
    colour: Colour


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A picture with its title and what it shows, for those who cannot see it too."""

    title: str
    pixels: UInt8[np.ndarray, "h w c"]
    alt: str
    caption: str = ""
    photo: bool = False
    """True for imagery, which may be smoothed and compressed; False for classes, which keep hard edges."""
    marks: Sequence[Mark] = ()
    over: Panel | None = None
    """A picture of the same ground that a slider uncovers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """All that a report says, in reading order."""

    title: str
    lead: str
    notices: Sequence[str] = ()
    """What a reader must know first, such as random weights."""
    panels: Sequence[Panel]
    legend: Sequence[LegendEntry] = ()
    scores: Mapping[str, Score]
    measured: str
    """How the scores were obtained: how many labels, which split, which interval."""
    classes: Sequence[ClassScores] = ()
    confusion: Int[np.ndarray, "k k"] | None = None
    """Rows are what the labels say, columns what the map says."""
    effort: Mapping[str, str]
    """Run time and energy."""
    origin: Mapping[str, str]
    """Model, licence, inputs, options."""
    files: Mapping[str, Path]
    """What lies beside the report; the links are relative to it."""


def write_report(path: Path, page: Page) -> Path:
    """Write one HTML file without a script or a request to anywhere; rename it into place when complete."""
    parts = [
        _header(page),
        _pictures(page),
        _scores(page),
        _classes(page.classes) if page.classes else "",
        _confusion(page) if page.confusion is not None and page.classes else "",
        facts("What it took", page.effort),
        facts("What it was made from", page.origin),
        _files(path.parent, page.files),
    ]
    return write_document(path, page.title, parts)


def write_document(path: Path, title: str, parts: Iterable[str], *, style: str = "") -> Path:
    """Write parts of HTML as one page that loads nothing from elsewhere; rename it into place when complete.

    `style` is CSS on top of what all pages share. Empty parts are left out.
    """
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n<footer>Made with Panterra. This page holds everything it shows; it loads nothing from elsewhere.</footer>"
        "\n</main>\n</body>\n</html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, text)


def stretch(bands: Float[np.ndarray, "3 h w"], valid: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 4"]:
    """Turn red, green and blue into a picture that looks right; what is not valid becomes transparent.

    One range for the three bands keeps their colour balance; the square root lifts dark forests and water.
    """
    seen = bands[:, valid]
    low, high = np.percentile(seen, [1, 98.5]) if seen.size else (0.0, 1.0)
    tone = np.sqrt(np.clip((bands - low) / max(high - low, 1e-6), 0, 1))
    alpha = valid[None].astype(np.float64)
    return (np.concatenate([np.nan_to_num(tone), alpha]) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def paint(codes: Int[np.ndarray, "h w"], colours: Mapping[int, Colour]) -> UInt8[np.ndarray, "h w 4"]:
    """Give each class code its colour; codes without one are transparent."""
    table = np.zeros((256, 4), np.uint8)
    for code, colour in colours.items():
        table[code] = (*colour, 255)
    painted: UInt8[np.ndarray, "h w 4"] = table[codes]
    return painted


def _header(page: Page) -> str:
    notices = "\n".join(f'<p class="notice" role="note">{escape(text)}</p>' for text in page.notices)
    title = f'<h1>{escape(page.title)}</h1>\n<p class="quiet">{escape(page.lead)}</p>'
    return f"<header>\n{title}\n</header>\n{notices}".rstrip()


def _pictures(page: Page) -> str:
    figures = "\n".join(_figure(panel) for panel in page.panels)
    entries = "\n".join(
        f"<li>{_swatch(e.colour)}{escape(e.name)}"
        + (f' <span class="quiet">{e.share:.1%}</span>' if e.share is not None else "")
        + "</li>"
        for e in page.legend
    )
    legend = f'<ul class="legend" aria-label="Legend: class and share of the mapped area">\n{entries}\n</ul>'
    return f'<h2>The map</h2>\n<div class="panels">\n{figures}\n</div>\n{legend if page.legend else ""}'.rstrip()


def _figure(panel: Panel) -> str:
    picture, slider = _image(panel), ""
    if panel.over is not None:
        picture = _image(panel.over, hidden=True) + _image(panel, "over")
        slider = (
            '<label class="compare">compare<input type="range" min="0" max="100" value="100" '
            f'aria-label="How much of the picture below is covered by: {escape(panel.title)}" '
            "oninput=\"this.closest('figure').style.setProperty('--shown', this.value + '%')\"></label>"
        )
    marks = _marks(panel)
    return (
        f'<figure>\n<div class="picture">{picture}{marks}</div>{slider}\n'
        f"<figcaption><strong>{escape(panel.title)}</strong>{escape(panel.caption)}</figcaption>\n</figure>"
    )


def _marks(panel: Panel) -> str:
    if not panel.marks:
        return ""
    height, width = panel.pixels.shape[:2]
    radius = 0.008 * max(width, height)
    circles = "".join(
        f'<circle cx="{m.across * width:.1f}" cy="{m.down * height:.1f}" r="{radius:.1f}" fill="{_css(m.colour)}" '
        f'stroke="#fff" stroke-width="{radius / 3:.2f}"/>'
        for m in panel.marks
    )
    return f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{circles}</svg>'


def _image(panel: Panel, *classes: str, hidden: bool = False) -> str:
    height, width = panel.pixels.shape[:2]
    names = " ".join([*classes, *(["photo"] if panel.photo else [])])
    alt = "" if hidden else escape(panel.alt, quote=True)
    return f'<img class="{names}" width="{width}" height="{height}" alt="{alt}" src="{_data_address(panel)}">'


def _data_address(panel: Panel) -> str:
    image, buffer = Image.fromarray(panel.pixels), io.BytesIO()
    if panel.photo:
        image.save(buffer, "WEBP", quality=88)
    else:
        image.save(buffer, "PNG", optimize=True)
    kind = "webp" if panel.photo else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _scores(page: Page) -> str:
    cards = "\n".join(
        f'<div class="card"><dt>{escape(name)}</dt><dd>{_number(s.estimate)}'
        + (f"<small>95 % interval {_range(s.interval)}</small>" if s.interval else "")
        + "</dd></div>"
        for name, s in page.scores.items()
    )
    return f'<h2>How good it is</h2>\n<dl class="cards">\n{cards}\n</dl>\n<p>{escape(page.measured)}</p>'


def _classes(classes: Sequence[ClassScores]) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{_swatch(c.colour)}{escape(c.name)}</th><td>{c.support}</td>'
        f"<td>{_cell(c.precision)}</td><td>{_cell(c.recall)}</td><td>{_cell(c.f1)}</td><td>{_whisker(c.f1)}</td></tr>"
        for c in classes
    )
    return (
        '<p class="quiet" id="per-class">Per class, on held-out patches. Precision: how often the map is right '
        "where it says the class. Recall: how much of the class it finds. F1 joins both.</p>\n"
        '<div class="scroll" tabindex="0">\n<table aria-describedby="per-class">\n'
        '<thead><tr><th scope="col">Class</th><th scope="col">Patches</th><th scope="col">Precision</th>'
        '<th scope="col">Recall</th><th scope="col">F1</th><th scope="col">F1 from 0 to 1</th></tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )


def _confusion(page: Page) -> str:
    counts = np.asarray(page.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    columns = "".join(f'<th scope="col">{_swatch(c.colour)}<br>{escape(c.name)}</th>' for c in page.classes)
    rows = []
    for i, c in enumerate(page.classes):
        cells = "".join(
            f'<td class="{"right" if i == j else "wrong"}" '
            f'style="background: rgb(var(--shade) / {0.75 * share:.2f})">{count or "·"}</td>'
            for j, (count, share) in enumerate(zip(counts[i], shares[i], strict=True))
        )
        rows.append(f'<tr><th scope="row">{_swatch(c.colour)}{escape(c.name)}</th>{cells}</tr>')
    return (
        '<h2>What is taken for what</h2>\n<p class="quiet" id="confusion">Held-out patches. Rows: what the '
        "label says. Columns: what the map says. Shading: share of the row.</p>\n"
        '<div class="scroll" tabindex="0">\n<table class="confusion" aria-describedby="confusion">\n'
        f'<thead><tr><th scope="col">Label</th>{columns}</tr></thead>\n<tbody>\n' + "\n".join(rows) + "\n</tbody>\n"
        "</table>\n</div>"
    )


def facts(title: str, told: Mapping[str, str]) -> str:
    """Write names with what there is to say of each, under a heading."""
    entries = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in told.items())
    return f'<h2>{escape(title)}</h2>\n<div class="scroll"><dl class="facts">\n{entries}\n</dl></div>'


def _files(folder: Path, files: Mapping[str, Path]) -> str:
    links = "\n".join(
        f'<dt>{escape(name)}</dt><dd><a href="{escape(_relative(file, folder))}">{escape(file.name)}</a></dd>'
        for name, file in files.items()
    )
    return f'<h2>Files</h2>\n<div class="scroll"><dl class="facts">\n{links}\n</dl></div>' if files else ""


def _relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file, folder)).as_posix()


def _swatch(colour: Colour) -> str:
    return f'<span class="swatch" style="background: {_css(colour)}"></span>'


def _css(colour: Colour) -> str:
    return f"#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "–"


def _range(interval: tuple[float, float]) -> str:
    return f"{_number(interval[0])}–{_number(interval[1])}"


def _cell(score: Score) -> str:
    interval = f' <span class="range">{_range(score.interval)}</span>' if score.interval else ""
    return f"{_number(score.estimate)}{interval}"


def _whisker(score: Score) -> str:
    """Draw the interval as a line and the estimate as a dot; the numbers stand beside it, so readers skip it."""
    low, high = score.interval or (score.estimate, score.estimate)
    if not np.isfinite([low, score.estimate, high]).all():
        return ""
    return (
        '<svg class="whisker" width="120" height="14" viewBox="0 0 120 14" aria-hidden="true">'
        '<rect x="5" y="6" width="110" height="2"/>'
        f'<line x1="{5 + 110 * low:.1f}" x2="{5 + 110 * high:.1f}" y1="7" y2="7"/>'
        f'<circle cx="{5 + 110 * score.estimate:.1f}" cy="7" r="4.5"/></svg>'
    )
