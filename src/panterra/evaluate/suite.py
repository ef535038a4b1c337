"""Models against benchmarks: every row of a comparison, kept as it is finished."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from panterra.energy import measure_energy
from panterra.errors import InputError
from panterra.evaluate.benchmark import (
    RAW,
    Benchmark,
    Role,
    open_benchmark,
    open_encoder,
)
from panterra.evaluate.cache import Source, Store, View, identity, key_of
from panterra.evaluate.compress import bytes_of, compressed, parse_compression
from panterra.evaluate.diagnostics import diagnose
from panterra.evaluate.metrics import Interval
from panterra.evaluate.plan import Plan, check_plan
from panterra.evaluate.protocols import (
    TUNED,
    FrozenProtocol,
    Outcome,
    Protocol,
    Trial,
    TunedProtocol,
    allowed,
    fraction_of,
    run,
    standardised,
)
from panterra.evaluate.published import OLMOEARTH, OlmoEarthTask
from panterra.evaluate.subsets import published_subset
from panterra.evaluate.sweep import ALONE_EVERY, Recipe, Table
from panterra.evaluate.tuning import TunedTrial, Tuner
from panterra.evaluate.views import trainable, views_of
from panterra.files import claimed, write_whole
from panterra.models.features import Encoder
from panterra.train.parallel import choose_device

__all__ = ["ROWS", "Plan", "Row", "evaluate", "read_rows", "reason"]

ROWS = "results.jsonl"
Note = Callable[[str], None]
Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of the table, or why there is none."""

    id: str
    """Names all that it depends on."""
    model: str
    benchmark: str
    protocol: str
    task: str = ""
    fraction: float = 1.0
    seed: int = 42
    labels: int = 0
    """Training samples."""
    subset: str = ""
    """How they were chosen, where they are a fraction."""
    compression: str = "none"
    """Of the features."""
    tested: int = 0
    """Test samples."""
    metric: str = ""
    """What was chosen by, the first to look at."""
    figures: Mapping[str, Interval] = field(default_factory=dict)
    """With 95 % intervals over test samples drawn anew."""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    """Of the features of the training samples, where asked for."""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """By validation: learning rate and epoch; normalisation, pooling, patch and modalities; and what was given."""
    seconds: float = 0.0
    """Of probe training and testing."""
    wh: float = 0.0
    energy: str = ""
    """measured or modelled (`panterra.energy`)."""
    embed_seconds: float = 0.0
    """Of embedding all splits, when that was done; shared with other rows."""
    embed_wh: float = 0.0
    note: str = ""
    error: str | None = None

    @property
    def score(self) -> Interval | None:
        """The figure that was chosen by."""
        return self.figures.get(self.metric)

    def as_dict(self) -> dict[str, Any]:
        """Give plain JSON; undefined figures are None."""
        plain = asdict(self)
        plain["figures"] = {
            name: {k: v if np.isfinite(v) else None for k, v in asdict(i).items()} for name, i in self.figures.items()
        }
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Row:
        """Read what `as_dict` gave."""
        figures = {
            name: Interval(**{k: np.nan if v is None else v for k, v in i.items()})
            for name, i in plain["figures"].items()
        }
        return cls(**{**plain, "figures": figures})


def evaluate(
    plan: Plan,
    out: Path,
    *,
    cache: Path | None = None,
    note: Note = lambda _: None,
    progress: Advance | None = None,
    tuner: Tuner | None = None,
) -> list[Row]:
    """Fill the table of a plan, in its order; rows that are in `out` already are not computed again.

    Whatever is wrong with one model or benchmark becomes a row that says so, and the rest goes on. Features are kept in
    `cache` (by default in `out`) and serve every later run. Protocols that train encoders need a `tuner`, which is
    `panterra.finetune.protocol.tune`.
    """
    check_plan(plan)
    plan = replace(plan, device=str(choose_device(plan.device)))
    if tuner is None and (asked := [p for p in plan.protocols if p in TUNED]):
        raise InputError(f"{asked[0]} trains encoders; hand evaluate tuner=panterra.finetune.protocol.tune")
    with claimed(out, f"the table in {out}"):
        journal = out / ROWS
        known = {row.id: row for row in read_rows(journal) if row.error is None}
        store = Store(folder=cache or out / "features")
        benchmarks: dict[str, Benchmark | str] = {}
        for name, root in plan.benchmarks:
            try:
                benchmarks[name] = open_benchmark(name, root, limit=plan.limit, as_published=plan.as_published)
            except Exception as error:
                benchmarks[name] = reason(error)
        rows: list[Row] = []
        for model in plan.models:
            for name, benchmark in benchmarks.items():
                note(f"{model if isinstance(model, str) else model.name} on {name}")
                for row in _compare(
                    plan, model, name, benchmark, store, known, progress, _Tuning(tuner, out / "tuning")
                ):
                    if row.id not in known:
                        _append(journal, row)
                    if row.protocol in TUNED:
                        shutil.rmtree(out / "tuning" / row.id, ignore_errors=True)
                    rows.append(row)
        _rewrite(journal, [*rows, *(row for id, row in known.items() if id not in {r.id for r in rows})])
    return rows


def reason(error: Exception) -> str:
    """Say in a line what went wrong."""
    said = " ".join(str(error).split()) or "no reason was given"
    return said if isinstance(error, InputError) else f"{type(error).__name__}: {said}"


def read_rows(journal: Path) -> list[Row]:
    """Read the rows of a run; a last line that a kill cut short, or a damaged one, is left out."""
    if not journal.is_file():
        return []
    rows = []
    for line in journal.read_bytes().splitlines():
        try:
            rows.append(Row.from_dict(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return rows


def _append(journal: Path, row: Row) -> None:
    started = journal.is_file() and journal.stat().st_size > 0
    with journal.open("rb+" if started else "wb") as file:
        if started:
            file.seek(-1, os.SEEK_END)
            # A kill may have cut the last line short.
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(row.as_dict(), default=str) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _rewrite(journal: Path, rows: Sequence[Row]) -> None:
    write_whole(journal, "".join(json.dumps(row.as_dict(), default=str) + "\n" for row in rows))


@dataclass(frozen=True, slots=True)
class _Tuning:
    """What trains encoders, and where its state is until a row is finished."""

    tuner: Tuner | None
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A row to be filled."""

    id: str
    protocol: Protocol
    views: tuple[View, ...]
    fraction: float
    seed: int
    subset: tuple[np.ndarray, str] | None
    """Which training samples and whose choice that is, where it is not left to the seed."""
    compression: str
    recipe: Recipe


def _compare(
    plan: Plan,
    given: str | Encoder,
    name: str,
    benchmark: Benchmark | str,
    store: Store,
    known: Mapping[str, Row],
    progress: Advance | None,
    tuning: _Tuning,
) -> Iterator[Row]:
    """Give the rows of one model on one benchmark."""
    model = given if isinstance(given, str) else given.name
    blank = Row(id=key_of({"failed": [model, name]}), model=model, benchmark=name, protocol=" ".join(plan.protocols))
    if isinstance(benchmark, str):
        yield replace(blank, error=benchmark)
        return
    try:
        encoder = (
            open_encoder(given, benchmark, plan.device) if isinstance(given, str) else _on_device(given, plan.device)
        )
        source = Source(encoder=encoder, model=identity(encoder), benchmark=benchmark, store=store, device=plan.device)
        able = [p for p in plan.protocols if allowed(p, benchmark.task) and trainable(p, encoder)]
        views = {p: views_of(plan, p, encoder, benchmark) for p in able}
        jobs = list(_jobs(plan, source, views))
        wanted = [v for job in jobs if job.id not in known and job.protocol not in TUNED for v in job.views]
        if wanted:
            source.prepare(wanted, progress)
        tables = lru_cache(maxsize=1)(_tables_by_view(plan, source, model))
        for job in jobs:
            if job.id in known:
                # The name by which a model is called may be another one now.
                yield replace(known[job.id], model=model)
            elif job.protocol in TUNED:
                yield _tune(plan, source, job, model, tuning, progress)
            else:
                yield _fill(plan, source, job, tables, model)
    except Exception as error:
        yield replace(blank, error=reason(error))


def _jobs(plan: Plan, source: Source, views: Mapping[Protocol, tuple[View, ...]]) -> Iterator[_Job]:
    """List the rows of one model on one benchmark; what has no chance in it is done once."""
    benchmark, recipe = source.benchmark, Recipe(rates=plan.rates)
    contents = [benchmark.contents[role] for role in benchmark.splits]
    training = {**asdict(recipe), **{name: getattr(plan, name) for name in ("batch", "epochs", "published_rate")}}
    loss = plan.loss or OLMOEARTH.get(benchmark.name, OlmoEarthTask()).loss
    # Rows of before these could be chosen are found again where nothing of it was.
    training |= {"loss": loss} if loss != "cross_entropy" else {}
    training |= {"class_weights": plan.class_weights} if plan.class_weights != "none" else {}
    if plan.published_rate and OLMOEARTH.get(benchmark.name, OlmoEarthTask()).rate is not None:
        training |= {"check_every": ALONE_EVERY}
    chances = product(views.items(), plan.compressions, plan.fractions)
    tuning = {name: getattr(plan, name) for name in ("batch", "epochs", "precision", "class_weights")} | {"loss": loss}
    tuning["head"] = plan.tuned_head
    for (protocol, chosen), compression, fraction in chances:
        settings = {} if protocol == "knn" else training
        if protocol in TUNED:
            if compression != plan.compressions[0]:
                continue
            compression = "none"
            settings = tuning | ({"rates": plan.tuning_rates} if protocol == "finetune" else {})
            settings |= {"as_published": True} if plan.as_published and protocol.startswith("anysat") else {}
        by = [source.published(v) for v in chosen if v.normalisation == "published"]
        subset = None
        if fraction < 1 and plan.subsets == "published":
            subset = published_subset(benchmark.root, benchmark.splits["train"], fraction)
        certain = protocol == "knn" and (fraction == 1 or subset is not None)
        for seed in plan.seeds[:1] if certain else plan.seeds:
            about = {
                "model": source.model,
                "data": contents,
                "protocol": protocol,
                "views": [v.about() for v in chosen],
                **settings,
                "fraction": fraction,
                "seed": seed,
                **({"published": by} if by else {}),
                **({"compression": compression} if compression != "none" else {}),
                **({"subset": subset[0].tolist()} if subset is not None else {}),
                **({"diagnostics": True} if plan.diagnostics and protocol not in TUNED else {}),
            }
            yield _Job(
                id=key_of(about),
                protocol=protocol,
                views=chosen,
                fraction=fraction,
                seed=seed,
                subset=subset,
                compression=compression,
                recipe=replace(recipe, seed=seed),
            )


def _on_device(encoder: Encoder, device: str) -> Encoder:
    """Give an encoder where the computing is to be done: a copy, where it lies elsewhere."""
    first = next(encoder.parameters(), None) if isinstance(encoder, torch.nn.Module) else None
    if first is None or first.device == torch.device(device):
        return encoder
    return cast(Encoder, deepcopy(cast(torch.nn.Module, encoder)).to(device))


def _tables_by_view(plan: Plan, source: Source, model: str) -> Callable[[View], dict[Role, Table]]:
    def read(view: View) -> dict[Role, Table]:
        tables = {role: source.table(role, view) for role in source.benchmark.splits}
        if view.kind == "tokens" and tables["train"].y.ndim < 3:
            tables = {role: replace(t, x=t.x.flatten(1, -2)) for role, t in tables.items()}
        if model == RAW:
            tables = standardised(tables)
        return {role: table.to(plan.device) for role, table in tables.items()}

    return read


def _fill(plan: Plan, source: Source, job: _Job, tables: Callable[[View], dict[Role, Table]], model: str) -> Row:
    """Carry out one row."""
    benchmark, steps = source.benchmark, parse_compression(job.compression)
    train = tables(job.views[0])["train"]
    index, subset = job.subset or (None, "")
    if job.fraction < 1 and index is None:
        index, subset = fraction_of(train.y, job.fraction, job.seed), "stratified"

    @lru_cache(maxsize=1)
    def chosen(view: View) -> dict[Role, Table]:
        found = tables(view)
        found = found if index is None else {**found, "train": found["train"].take(index)}
        return compressed(found, steps)

    trial = Trial(
        benchmark=benchmark.name,
        task=benchmark.task,
        classes=1 if benchmark.task == "regression" else len(benchmark.class_names),
        tables=chosen,
        recipe=job.recipe,
        batch=plan.batch,
        epochs=plan.epochs,
        published_rate=plan.published_rate,
        class_weights=plan.class_weights,
        loss=plan.loss,
    )
    with measure_energy() as meter:
        outcome = run(cast(FrozenProtocol, job.protocol), trial, job.views)
    cost = source.cost(outcome.view)
    return replace(
        _row(job, benchmark, model, outcome, labels=len(train) if index is None else len(index), subset=subset),
        compression=job.compression,
        diagnostics=diagnose(chosen(outcome.view)["train"].x) if plan.diagnostics else {},
        chosen={**outcome.chosen, **_about(outcome, model), "bytes": bytes_of(steps, train.x.shape[-1])},
        seconds=meter.report.seconds,
        wh=meter.report.kwh * 1000,
        energy=meter.report.method,
        embed_seconds=cost["seconds"],
        embed_wh=cost["wh"],
    )


def _tune(plan: Plan, source: Source, job: _Job, model: str, tuning: _Tuning, progress: Advance | None) -> Row:
    """Carry out one row of a protocol that trains the encoder."""
    assert tuning.tuner is not None
    benchmark = source.benchmark
    train = benchmark.splits["train"]
    index, subset = job.subset or (None, "")
    if job.fraction < 1 and index is None:
        targets = torch.cat([train[i].target for i in range(len(train))])
        index, subset = fraction_of(targets, job.fraction, job.seed), "stratified"
    trial = TunedTrial(
        protocol=cast(TunedProtocol, job.protocol),
        benchmark=benchmark,
        encoder=source.encoder,
        views=job.views,
        index=index,
        seed=job.seed,
        folder=tuning.folder / job.id,
        rates=plan.tuning_rates,
        head=plan.tuned_head,
        precision=plan.precision,
        epochs=plan.epochs,
        batch=plan.batch,
        loss=plan.loss or OLMOEARTH.get(benchmark.name, OlmoEarthTask()).loss,
        class_weights=plan.class_weights,
        as_published=plan.as_published,
        device=plan.device,
    )
    tuned = tuning.tuner(trial, progress)
    labels = len(train) if index is None else len(index)
    made = _row(job, benchmark, model, tuned.outcome, labels=labels, subset=subset)
    return replace(made, seconds=tuned.seconds, wh=tuned.wh, energy=tuned.energy)


def _row(job: _Job, benchmark: Benchmark, model: str, outcome: Outcome, *, labels: int, subset: str) -> Row:
    """Say what a row is about and what came out, without what it took."""
    return Row(
        id=job.id,
        model=model,
        benchmark=benchmark.name,
        protocol=job.protocol,
        task=benchmark.task,
        fraction=job.fraction,
        seed=job.seed,
        labels=labels,
        subset=subset,
        tested=len(benchmark.splits["test"]),
        metric=outcome.metric,
        figures=outcome.figures,
        chosen={**outcome.chosen, **_about(outcome, model)},
        seconds=0.0,
        wh=0.0,
        energy="",
        note=benchmark.note,
    )


def _about(outcome: Outcome, model: str) -> dict[str, Any]:
    view = outcome.view
    # No encoder knows what band statistics are like elsewhere.
    normalisation = "dataset" if model == RAW else view.normalisation
    named = [m if m == as_ else f"{m} as {as_}" for m, as_ in view.shown]
    return {
        "features": view.kind,
        "pooling": view.pooling,
        "normalisation": normalisation,
        "patch_m": view.patch_m,
        "modalities": named,
    }
