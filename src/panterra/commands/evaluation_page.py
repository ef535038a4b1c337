"""Models against benchmarks on one page: scores with intervals, curves over labels, what it took."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

import panterra
from panterra.evaluate.protocols import TUNED
from panterra.evaluate.scoring import LOWER_IS_BETTER, better
from panterra.evaluate.suite import Row
from panterra.mapping.report import facts, write_document

OWN_STYLE = Path(__file__).with_suffix(".css")
PALETTE = ("#2a7f62", "#c1683c", "#4f6fb5", "#a34f8c", "#a98a26", "#4f93a3", "#8a5a44", "#77803a")
"""Readable on light and dark paper."""
METRICS = {
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
    "micro_f1": "Micro F1",
    "mean_iou": "Mean IoU",
    "rmse": "RMSE",
    "mae": "MAE",
    "r2": "R²",
    "macro_accuracy": "Macro accuracy",
    "f1_class_1": "F1 of the second class",
    "average_precision": "Average precision",
    "weighted_f1": "Weighted F1",
    "iou_but_last": "Mean IoU but the last class",
    "auroc": "AUROC",
    "prauc": "PR-AUC",
    "ece": "Calibration error",
}
DIAGNOSTICS = {
    "effective_rank": "effective rank",
    "uniformity": "uniformity",
    "mean_cosine": "mean cosine",
    "std_cosine": "its deviation",
    "min_cosine": "least cosine",
    "max_cosine": "greatest cosine",
    "mean_norm": "mean norm",
    "std_norm": "its deviation",
    "min_norm": "least norm",
    "max_norm": "greatest norm",
    "image_effective_rank": "effective rank within an image",
    "image_uniformity": "uniformity within an image",
    "image_mean_cosine": "mean cosine within an image",
}
PROTOCOL_NAMES = {
    "knn": "kNN",
    "linear": "linear probe",
    "interpolate": "interpolating probe",
    "attention": "attention probe",
    "anysat": "AnySat's probe",
    "finetune": "fine-tuning",
    "anysat_finetune": "AnySat's fine-tuning",
    "anysat_plus": "AnySat's projectors and head",
    "anysat_scratch": "AnySat's training from scratch",
}
WIDTH, LABELS, RIGHT = 540, 210, 64
LINE_PX = 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A score, averaged over seeds."""

    model: str
    judged: str
    """By which protocol, of which features."""
    fraction: float
    labels: int
    estimate: float
    low: float
    high: float
    seeds: int


def points_of(rows: Iterable[Row]) -> list[Point]:
    """Average over seeds: scores, and the ends of their intervals."""
    together: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        if row.score is not None:
            together.setdefault((row.model, judged(row), row.fraction), []).append(row)
    points = []
    for (model, how, fraction), same in together.items():
        scores = [row.score for row in same if row.score is not None]
        points.append(
            Point(
                model=model,
                judged=how,
                fraction=fraction,
                labels=round(float(np.mean([row.labels for row in same]))),
                estimate=float(np.mean([s.estimate for s in scores])),
                low=float(np.mean([s.low for s in scores])),
                high=float(np.mean([s.high for s in scores])),
                seeds=len(same),
            )
        )
    return points


def judged(row: Row) -> str:
    """Say by which protocol a row is judged, and of which features."""
    name = PROTOCOL_NAMES[row.protocol]
    return name if row.compression == "none" else f"{name}, {row.compression}"


def write_page(path: Path, rows: Sequence[Row], *, settings: Mapping[str, str]) -> Path:
    """Write one HTML file that loads nothing from elsewhere; rename it into place when complete."""
    done = [row for row in rows if row.error is None]
    failed = [row for row in rows if row.error is not None]
    models = list(dict.fromkeys(row.model for row in rows))
    benchmarks = list(dict.fromkeys(row.benchmark for row in done))
    colours = {m: PALETTE[i % len(PALETTE)] for i, m in enumerate(models)}
    title = f"{_count(len(models), 'model')} on {_count(len(benchmarks), 'benchmark')}"
    by_benchmark = {b: [row for row in done if row.benchmark == b] for b in benchmarks}
    trained = any(row.protocol in TUNED for row in done)
    how = "Frozen features, judged by probes" + (", and fine-tuned models" if trained else "")
    parts = [
        f'<header>\n<h1>{title}</h1>\n<p class="quiet">{how} · made {dt.date.today()}</p>\n</header>',
        *_notices(failed),
        _untrained(models),
        _summary(by_benchmark, models) if done else "",
        _scores(by_benchmark, colours) if done else "",
        _curves(by_benchmark, colours),
        _cost(done, colours) if done else "",
        _diagnostics(done),
        _table(rows),
        _reading(),
        facts("How it was made", {**settings, "Software": f"panterra {panterra.__version__}"}),
    ]
    return write_document(path, title, parts, style=OWN_STYLE.read_text(encoding="utf-8"))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _notices(failed: Sequence[Row]) -> list[str]:
    """Say what failed, once where several models failed alike."""
    alike: dict[tuple[str, str], list[str]] = {}
    for row in failed:
        alike.setdefault((row.benchmark, row.error or ""), []).append(row.model)
    said = [f"{benchmark} failed with {', '.join(models)}: {error}" for (benchmark, error), models in alike.items()]
    return [f'<p class="notice" role="note">{escape(text)}</p>' for text in said]


def _untrained(models: Sequence[str]) -> str:
    names = [m for m in models if "@random:" in m]
    if not names:
        return ""
    return (
        f'<p class="notice" role="note">{escape(", ".join(names))}: random weights, never trained. They are a baseline '
        "and say nothing of the published models.</p>"
    )


def _key(colours: Mapping[str, str]) -> str:
    entries = "".join(
        f'<li><span class="swatch" style="background: {colour}"></span>{escape(model)}</li>'
        for model, colour in colours.items()
    )
    return f'<ul class="key">{entries}</ul>'


# Scores with intervals


def _summary(by_benchmark: Mapping[str, Sequence[Row]], models: Sequence[str]) -> str:
    """Give one line per benchmark and protocol, one column per model, at the largest share of labels."""
    lines = []
    for benchmark, rows in by_benchmark.items():
        most, metric = max(row.fraction for row in rows), rows[0].metric
        points = points_of(row for row in rows if row.fraction == most)
        for how in dict.fromkeys(p.judged for p in points):
            mine = {p.model: p for p in points if p.judged == how}
            top = max(better(metric, p.estimate) for p in mine.values())
            cells = "".join(_summary_cell(mine.get(m), metric, top) for m in models)
            lines.append(
                f'<tr><th scope="row">{escape(benchmark)}</th><td class="text">{how}</td>'
                f'<td class="text">{METRICS[metric]}</td>{cells}</tr>'
            )
    head = "".join(f'<th scope="col">{escape(m)}</th>' for m in models)
    return (
        '<h2>Summary</h2>\n<div class="scroll" tabindex="0">\n<table>\n<thead><tr><th scope="col">Benchmark</th>'
        f'<th scope="col" class="text">Protocol</th><th scope="col" class="text">Figure</th>{head}</tr></thead>\n'
        "<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>\n</div>\n"
        '<p class="quiet">Bold: the best estimate of a line. Small: the 95 % interval.</p>'
    )


def _summary_cell(p: Point | None, metric: str, top: float) -> str:
    if p is None:
        return "<td>–</td>"
    best = ' class="best"' if better(metric, p.estimate) == top else ""
    return f'<td{best}>{figure(p.estimate)} <span class="range">{figure(p.low)}–{figure(p.high)}</span></td>'


def _scores(by_benchmark: Mapping[str, Sequence[Row]], colours: Mapping[str, str]) -> str:
    charts = "\n".join(_dots(name, rows, colours) for name, rows in by_benchmark.items())
    return (
        "<h2>Scores</h2>\n<p>Dots are scores on the test samples, lines their 95 % intervals. Where intervals of two "
        f"models overlap, these test samples may not tell them apart.</p>\n{_key(colours)}\n"
        f'<div class="charts">\n{charts}\n</div>'
    )


def _dots(benchmark: str, rows: Sequence[Row], colours: Mapping[str, str]) -> str:
    """Draw one line per protocol and model at the largest share of labels."""
    most = max(row.fraction for row in rows)
    points = points_of(row for row in rows if row.fraction == most)
    ways = list(dict.fromkeys(p.judged for p in points))
    metric = rows[0].metric
    low, high = _span([v for p in points for v in (p.low, p.estimate, p.high)], metric)
    along = _axis(low, high, LABELS, WIDTH - RIGHT)
    marks, y = [], -4.0
    for how in ways:
        y += LINE_PX + 4
        marks.append(f'<text class="quiet" x="0" y="{y:.0f}">{escape(how)}</text>')
        for p in (p for p in points if p.judged == how):
            y += LINE_PX - 2
            marks.append(
                f'<text x="14" y="{y:.0f}">{escape(_short(p.model, 30))}</text>'
                + _whisker(along, p, y - 4, colours[p.model])
                + f'<text x="{WIDTH - RIGHT + 10}" y="{y:.0f}">{figure(p.estimate)}</text>'
            )
    height = y + 30
    ticks = "".join(
        f'<line class="grid" x1="{along(t):.1f}" x2="{along(t):.1f}" y1="6" y2="{height - 20:.0f}"/>'
        f'<text class="axis" x="{along(t):.1f}" y="{height - 6:.0f}" text-anchor="middle">{t:g}</text>'
        for t in _ticks(low, high)
    )
    said = "; ".join(f"{p.model}, {p.judged}: {figure(p.estimate)}" for p in points)
    arrow = "less is better" if metric in LOWER_IS_BETTER else "more is better"
    return (
        f'<div class="chart"><h3>{escape(benchmark)} <span>{METRICS[metric]}, {arrow}</span></h3>\n'
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(said, quote=True)}">{ticks}'
        f"{''.join(marks)}</svg></div>"
    )


def _whisker(along: Callable[[float], float], p: Point, y: float, colour: str) -> str:
    line = ""
    if np.isfinite([p.low, p.high]).all():
        line = (
            f'<line x1="{along(p.low):.1f}" x2="{along(p.high):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" '
            'stroke-width="2.5" stroke-linecap="round" opacity="0.75"/>'
        )
    return f'{line}<circle cx="{along(p.estimate):.1f}" cy="{y:.1f}" r="4.8" fill="{colour}"/>'


# Curves over labels


def _curves(by_benchmark: Mapping[str, Sequence[Row]], colours: Mapping[str, str]) -> str:
    charts = []
    for benchmark, rows in by_benchmark.items():
        for how in dict.fromkeys(judged(row) for row in rows):
            points = points_of(row for row in rows if judged(row) == how)
            if len({p.fraction for p in points}) > 1:
                charts.append(_curve(benchmark, how, rows[0].metric, points, colours))
    if not charts:
        return ""
    return (
        "<h2>How far labels go</h2>\n<p>Scores by the number of training samples, on a logarithmic axis; smaller sets "
        "are parts of larger ones. Shading spans the 95 % intervals, averaged over seeds.</p>\n"
        f'{_key(colours)}\n<div class="charts">\n' + "\n".join(charts) + "\n</div>"
    )


def _curve(benchmark: str, how: str, metric: str, points: Sequence[Point], colours: Mapping[str, str]) -> str:
    height, left, bottom = 250, 52, 34
    low, high = _span([v for p in points for v in (p.low, p.estimate, p.high)], metric)
    counts = sorted({p.labels for p in points})
    across = _axis(math.log(counts[0]), math.log(max(counts[-1], counts[0] + 1)), left + 8, WIDTH - 20)
    up = _axis(low, high, height - bottom, 10)
    grid = "".join(
        f'<line class="grid" x1="{left}" x2="{WIDTH - 12}" y1="{up(t):.1f}" y2="{up(t):.1f}"/>'
        f'<text class="axis" x="{left - 8}" y="{up(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
        for t in _ticks(low, high)
    ) + "".join(
        f'<text class="axis" x="{across(math.log(n)):.1f}" y="{height - 14}" text-anchor="middle">{n:,}</text>'
        for n in counts
    )
    drawn = []
    for model, colour in colours.items():
        mine = sorted((p for p in points if p.model == model), key=lambda p: p.labels)
        if not mine:
            continue
        x = [across(math.log(p.labels)) for p in mine]
        band = [(a, up(p.high)) for a, p in zip(x, mine, strict=True)]
        band += [(a, up(p.low)) for a, p in reversed(list(zip(x, mine, strict=True)))]
        if np.isfinite(band).all():
            drawn.append(f'<polygon points="{_path(band)}" fill="{colour}" opacity="0.13"/>')
        line = [(a, up(p.estimate)) for a, p in zip(x, mine, strict=True)]
        drawn.append(f'<polyline points="{_path(line)}" fill="none" stroke="{colour}" stroke-width="2.2"/>')
        drawn += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.8" fill="{colour}"/>' for a, b in line]
    said = "; ".join(f"{p.model} with {p.labels} samples: {figure(p.estimate)}" for p in points)
    return (
        f'<div class="chart"><h3>{escape(benchmark)} <span>{escape(how)}, {METRICS[metric]}</span></h3>\n'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(said, quote=True)}">{grid}{"".join(drawn)}'
        f'<text class="axis" x="{(left + WIDTH) / 2:.0f}" y="{height}" text-anchor="middle">training samples</text>'
        "</svg></div>"
    )


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


# Time and energy


def _cost(rows: Sequence[Row], colours: Mapping[str, str]) -> str:
    """Draw what embedding took per model and benchmark, and what a probe took; features of a pass are counted once."""
    embedded: dict[str, dict[tuple[str, float], float]] = {m: {} for m in colours}
    probed: dict[str, float] = dict.fromkeys(colours, 0.0)
    hours: dict[str, float] = dict.fromkeys(colours, 0.0)
    for row in rows:
        place = row.benchmark, row.embed_seconds
        if place not in embedded[row.model]:
            embedded[row.model][place] = row.embed_seconds
            hours[row.model] += row.embed_wh
        probed[row.model] += row.seconds
        hours[row.model] += row.wh
    seconds = {m: sum(parts.values()) for m, parts in embedded.items()}
    shown = [m for m in colours if any(row.model == m for row in rows)]
    charts = "\n".join(
        _bars(title, unit, {m: values[m] for m in shown}, colours)
        for title, unit, values in (
            ("Embedding", "s", seconds),
            ("Training and testing", "s", probed),
            ("Energy", "Wh", hours),
        )
    )
    how = ", ".join(sorted({row.energy for row in rows if row.energy}))
    return (
        "<h2>What it took</h2>\n<p>Sums over the benchmarks: reading and embedding when that was done, training and "
        f"testing of probes and of what was fine-tuned, and the electricity of both ({escape(how)}).</p>\n"
        f'<div class="charts">\n{charts}\n</div>'
    )


def _bars(title: str, unit: str, values: Mapping[str, float], colours: Mapping[str, str]) -> str:
    most = max(*values.values(), 1e-9)
    along = _axis(0, most, LABELS, WIDTH - RIGHT - 20)
    marks = "".join(
        f'<text x="0" y="{20 + LINE_PX * i}">{escape(_short(model, 32))}</text>'
        f'<rect x="{LABELS}" y="{9 + LINE_PX * i}" width="{max(along(value) - LABELS, 1):.1f}" height="13" rx="2" '
        f'fill="{colours[model]}"/>'
        f'<text x="{along(value) + 7:.1f}" y="{20 + LINE_PX * i}">{value:.3g} {unit}</text>'
        for i, (model, value) in enumerate(values.items())
    )
    said = "; ".join(f"{model}: {value:.3g} {unit}" for model, value in values.items())
    return (
        f'<div class="chart"><h3>{title}</h3>\n<svg viewBox="0 0 {WIDTH} {12 + LINE_PX * len(values)}" role="img" '
        f'aria-label="{escape(said, quote=True)}">{marks}</svg></div>'
    )


def _diagnostics(rows: Sequence[Row]) -> str:
    """Give one line per kind of features that were looked at."""
    looked = {(r.benchmark, r.model, str(r.chosen.get("features")), r.compression): r for r in rows if r.diagnostics}
    if not looked:
        return ""
    names = [name for name in DIAGNOSTICS if any(name in row.diagnostics for row in looked.values())]
    head = "".join(f'<th scope="col">{escape(DIAGNOSTICS[name])}</th>' for name in names)
    lines = [
        f'<tr><th scope="row">{escape(benchmark)}</th><td class="text">{escape(model)}</td>'
        f'<td class="text">{escape(kind)}{"" if compression == "none" else f", {escape(compression)}"}</td>'
        + "".join(f"<td>{figure(row.diagnostics.get(name, math.nan))}</td>" for name in names)
        + "</tr>"
        for (benchmark, model, kind, compression), row in looked.items()
    ]
    return (
        '<h2>How features spread</h2>\n<div class="scroll" tabindex="0">\n<table>\n<thead><tr>'
        '<th scope="col">Benchmark</th><th scope="col" class="text">Model</th>'
        '<th scope="col" class="text">Features</th>'
        f"{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>\n</div>"
    )


# Every row


def _table(rows: Sequence[Row]) -> str:
    head = ("Benchmark", "Protocol", "Model", "Labels", "Seed", "Score", "Other figures", "Chosen", "Time", "Energy")
    text = {"Protocol", "Model", "Other figures", "Chosen"}
    cells = []
    for row in sorted(rows, key=lambda r: (r.benchmark, r.protocol)):
        score = row.score
        if row.error is not None or score is None:
            cells.append(
                f'<tr><th scope="row">{escape(row.benchmark)}</th><td class="text">{escape(row.protocol)}</td>'
                f'<td class="text">{escape(row.model)}</td>'
                f'<td class="failed" colspan="7">{escape(row.error or "")}</td></tr>'
            )
            continue
        others = ", ".join(
            f"{METRICS[name]} {figure(i.estimate)}" for name, i in row.figures.items() if name != row.metric
        )
        cells.append(
            f'<tr><th scope="row">{escape(row.benchmark)}</th><td class="text">{escape(judged(row))}</td>'
            f'<td class="text">{escape(row.model)}</td><td>{row.labels:,}</td><td>{row.seed}</td>'
            f'<td>{METRICS[row.metric]} {figure(score.estimate)} <span class="range">{figure(score.low)}–'
            f'{figure(score.high)}</span></td><td class="text">{escape(others)}</td>'
            f'<td class="text">{escape(choice(row))}</td><td>{row.embed_seconds:.1f} + {row.seconds:.1f} s</td>'
            f"<td>{row.embed_wh + row.wh:.2g} Wh</td></tr>"
        )
    columns = "".join(f'<th scope="col"{" class=text" if h in text else ""}>{h}</th>' for h in head)
    return (
        '<h2>Every row</h2>\n<div class="scroll" tabindex="0">\n<table>\n'
        f"<thead><tr>{columns}</tr></thead>\n<tbody>\n" + "\n".join(cells) + "\n</tbody>\n</table>\n</div>"
    )


def choice(row: Row) -> str:
    """Say in a few words what validation chose, and what the model saw."""
    about = row.chosen
    said = []
    if "rate" in about:
        said.append(f"rate {about['rate']:g}, epoch {about['epoch']}")
    if about.get("head", "linear") not in ("linear", "plain"):
        said.append(f"{about['head']} head")
    if about.get("loss") == "dice":
        said.append("Dice and cross-entropy")
    if about.get("class_weights", "none") != "none":
        weights = about["class_weights"]
        said.append("the last class weighs 0" if weights == "last class 0" else f"{weights} classes")
    if "neighbours" in about:
        said.append(f"{about['neighbours']} neighbours")
    said.append(about["features"] if row.protocol in TUNED else f"{about['features']} ({about['pooling']})")
    if row.subset:
        said.append(f"{row.subset} subset")
    said.append(f"{about['normalisation']} statistics")
    said.append(f"{about['patch_m']:g} m patches of {', '.join(about['modalities'])}")
    return "; ".join(said)


def _reading() -> str:
    return (
        "<h2>How to read it</h2>\n<p>A probe learns from the training samples, its settings are chosen on the "
        "validation samples, and the score comes from the test samples, which are looked at once. An interval says how "
        "much the score would move if other test samples of the same kind had been drawn: whole images, one thousand "
        "times, with replacement. It does not cover another draw of training samples; several seeds show that.</p>"
    )


def figure(value: float) -> str:
    """Write a score: three decimals, or three digits where it is a large quantity."""
    if not np.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _span(values: Sequence[float], metric: str) -> tuple[float, float]:
    """Choose an axis: around the values, from 0 for errors, within 0 to 1 for shares."""
    known = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(known), max(known)
    margin = 0.08 * max(high - low, 0.05 * max(abs(high), 1e-6), 1e-6)
    if metric in LOWER_IS_BETTER:
        return 0.0, high + margin
    return max(low - margin, 0.0), min(high + margin, 1.0)


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / max(high - low, 1e-12) * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """Choose round numbers, three to seven of them."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]
