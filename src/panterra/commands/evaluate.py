"""Comparing models on benchmarks, as tables and as a page."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from panterra.commands.evaluation_page import DIAGNOSTICS, METRICS, choice, figure, write_page
from panterra.commands.terminal import note, progress_bar
from panterra.data.labelled import card_of
from panterra.energy import recorded
from panterra.errors import InputError
from panterra.evaluate.protocols import TUNED
from panterra.evaluate.suite import Plan, Row, evaluate
from panterra.files import unfinished
from panterra.finetune.protocol import tune

COLUMNS = (
    "benchmark",
    "task",
    "protocol",
    "model",
    "fraction",
    "subset",
    "labels",
    "tested",
    "seed",
    "metric",
    "score",
    "low",
    "high",
    *METRICS,
    "rate",
    "epoch",
    "batch",
    "loss",
    "class_weights",
    "neighbours",
    "head",
    "precision",
    "features",
    "compression",
    "bytes",
    "pooling",
    "normalisation",
    "patch_m",
    "modalities",
    "seconds",
    "wh",
    "embed_seconds",
    "embed_wh",
    "energy",
    *DIAGNOSTICS,
    "note",
    "error",
)
"""Of results.csv."""


def run_evaluate(plan: Plan, out: Path, *, cache: Path | None) -> dict[str, Any]:
    """Fill the table, write it beside a page about it, and give everything as plain JSON."""
    work = "embedding, training" if any(p in TUNED for p in plan.protocols) else "embedding"
    with recorded("evaluate"), progress_bar(work) as progress:
        rows = evaluate(plan, out, cache=cache, note=note, progress=progress, tuner=tune)
    write_csv(out / "results.csv", rows)
    report = write_page(out / "report.html", rows, settings=_settings(plan))
    return {
        "report": str(report.resolve()),
        "csv": str(out / "results.csv"),
        "rows": [row.as_dict() for row in rows],
        "failed": sum(row.error is not None for row in rows),
    }


def refuse_failures(rows: Sequence[Row]) -> None:
    """Raise InputError about what failed, once everything else is written."""
    failed = [row for row in rows if row.error is not None]
    if failed:
        first = failed[0]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise InputError(f"{first.model} on {first.benchmark} failed: {first.error}{more}; repeat to try again")


def parse_benchmarks(texts: Sequence[str]) -> tuple[tuple[str, Path], ...]:
    """Read benchmarks such as "sen1floods11=data/floods"; the names are those of `DATASETS`."""
    found = []
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise InputError(f"{text!r} is no benchmark; write NAME=FOLDER, such as sen1floods11=data/floods")
        card_of(name)
        found.append((name, Path(path)))
    return tuple(found)


def table_of(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Give what the terminal shows of each row."""
    shown: list[tuple[str, ...]] = []
    for row in rows:
        score = row.score
        if row.error is not None or score is None:
            shown.append((row.benchmark, row.protocol, row.model, "", "", "failed", row.error or "", "", ""))
            continue
        value = f"{figure(score.estimate)} ({figure(score.low)} to {figure(score.high)})"
        cost = f"{row.embed_seconds:.1f} + {row.seconds:.1f} s", f"{row.embed_wh + row.wh:.2g} Wh"
        name = METRICS[row.metric]
        shown.append(
            (
                row.benchmark,
                row.protocol + (f", {row.compression}" if row.compression != "none" else ""),
                row.model,
                f"{row.labels}",
                f"{row.seed}",
                f"{name} {value}",
                choice(row),
                *cost,
            )
        )
    return shown


HEADINGS = ("benchmark", "protocol", "model", "labels", "seed", "score", "chosen", "embed + probe", "energy")
"""Of `table_of`."""


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """Write one line per row, whole or not at all."""
    with unfinished(path) as fresh, fresh.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(_flat(row) for row in rows)
    return path


def _flat(row: Row) -> dict[str, Any]:
    plain = {name: value for name, value in asdict(row).items() if name in COLUMNS}
    chosen = {name: value for name, value in row.chosen.items() if name in COLUMNS}
    if "modalities" in chosen:
        chosen["modalities"] = " + ".join(chosen["modalities"])
    score = row.score
    main = {} if score is None else {"score": score.estimate, "low": score.low, "high": score.high}
    return {**plain, **chosen, **main, **{name: i.estimate for name, i in row.figures.items()}, **row.diagnostics}


def _settings(plan: Plan) -> dict[str, str]:
    facts = {
        "Models": ", ".join(m if isinstance(m, str) else m.name for m in plan.models),
        "Benchmarks": ", ".join(f"{name} ({path})" for name, path in plan.benchmarks),
        "Protocols": ", ".join(plan.protocols),
        "Learning rates": ", ".join(f"{rate:g}" for rate in plan.rates)
        + (", or the one of the published table" if plan.published_rate else ""),
        "Epochs": "as published" if plan.epochs is None else str(plan.epochs),
        "Shares of the training samples": ", ".join(f"{f:g}" for f in plan.fractions),
        "Seeds": ", ".join(map(str, plan.seeds)),
    }
    if any(f < 1 for f in plan.fractions):
        facts["Which training samples"] = plan.subsets
    if plan.compressions != ("none",):
        facts["Compression of the features"] = ", ".join(plan.compressions)
    if plan.loss is not None:
        facts["Loss of pixels' classes"] = plan.loss
    if tuned := [p for p in plan.protocols if p in TUNED]:
        facts["Fine-tuning"] = f"in {plan.precision}, head {plan.tuned_head}"
        if "finetune" in tuned:
            rates = ", ".join(f"{rate:g}" for rate in plan.tuning_rates)
            facts["Fine-tuning"] += f"; learning rates of finetune {rates}"
    if plan.class_weights != "none":
        facts["Class weights"] = plan.class_weights
    if plan.as_published:
        facts["Bands"] = "filled as in OlmoEarth's evaluation"
    if plan.limit is not None:
        facts["Samples of a split"] = f"at most {plan.limit}"
    return facts
