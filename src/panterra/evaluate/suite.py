"""Models against benchmarks: every row of a comparison, kept as it is finished."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from panterra.energy import measure_energy
from panterra.errors import InputError
from panterra.evaluate.benchmark import (
    RAW,
    Benchmark,
    Kind,
    Normalisation,
    Pooling,
    Role,
    batches_of,
    gives_tokens,
    normalisations,
    open_benchmark,
    open_encoder,
    own_statistics,
    patch_for,
    seen_by,
)
from panterra.evaluate.cache import Source, Store, View, identity, key_of
from panterra.evaluate.class_weights import ClassWeights
from panterra.evaluate.compress import bytes_of, compressed, parse_compression
from panterra.evaluate.metrics import Interval
from panterra.evaluate.protocols import (
    PROTOCOLS,
    Loss,
    Outcome,
    Protocol,
    Trial,
    allowed,
    fraction_of,
    run,
    standardised,
)
from panterra.evaluate.published import ANYSAT, OLMOEARTH, OlmoEarthTask
from panterra.evaluate.subsets import FRACTIONS, Subsets, published_subset
from panterra.evaluate.sweep import RATES, Recipe, Table
from panterra.models.features import Encoder, Fitted
from panterra.sample import Batch

ROWS = "results.jsonl"
Note = Callable[[str], None]
Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is compared, and how."""

    models: tuple[str | Encoder, ...]
    """Names, folders, "raw" for band statistics, NAME@random:SEED for untrained weights; or encoders."""
    benchmarks: tuple[tuple[str, Path], ...]
    """Name and folder of each."""
    protocols: tuple[Protocol, ...] = ("knn", "linear")
    fractions: tuple[float, ...] = (1.0,)
    """Of the training samples."""
    subsets: Subsets = "stratified"
    """How a fraction is chosen: drawn with each seed, or as published."""
    seeds: tuple[int, ...] = (42,)
    """Each draws other training samples, first weights and batches."""
    normalisations: tuple[Normalisation, ...] = ()
    """To choose among by validation; empty: what the model is made for."""
    poolings: tuple[Pooling, ...] = ("mean",)
    """To choose among by validation."""
    compressions: tuple[str, ...] = ("none",)
    """Of the features, each in rows of its own: see `compress.parse_compression`."""
    rates: tuple[float, ...] = RATES
    published_rate: bool = False
    """Whether benchmarks of the published table have its one rate instead."""
    epochs: int | None = None
    batch: int | None = None
    """Of probe training, instead of the published numbers."""
    loss: Loss | None = None
    """Of probes of pixels' classes, instead of the published one."""
    class_weights: ClassWeights = "none"
    """Of trained probes."""
    as_published: bool = False
    """Whether bands are filled as OlmoEarth's evaluation does (`benchmark.open_benchmark`)."""
    patch_m: float | None = None
    """Instead of four pixels, or what divides the samples."""
    modalities: tuple[str, ...] | None = None
    """Of the benchmarks, where not all that a model knows."""
    limit: int | None = None
    """Most samples of a split."""
    device: str = "cpu"


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
    plan: Plan, out: Path, *, cache: Path | None = None, note: Note = lambda _: None, progress: Advance | None = None
) -> list[Row]:
    """Fill the table of a plan, in its order; rows that are in `out` already are not computed again.

    Whatever is wrong with one model or benchmark becomes a row that says so, and the rest goes on. Features are kept in
    `cache` (by default in `out`) and serve every later run.
    """
    _check(plan)
    out.mkdir(parents=True, exist_ok=True)
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
            for row in _compare(plan, model, name, benchmark, store, known, progress):
                if row.id not in known:
                    _append(journal, row)
                rows.append(row)
    _rewrite(journal, [*rows, *(row for id, row in known.items() if id not in {r.id for r in rows})])
    return rows


def reason(error: Exception) -> str:
    """Say in a line what went wrong."""
    said = " ".join(str(error).split()) or "no reason was given"
    return said if isinstance(error, InputError) else f"{type(error).__name__}: {said}"


def read_rows(journal: Path) -> list[Row]:
    """Read the rows of a run; a last line that a kill cut short is left out."""
    if not journal.is_file():
        return []
    rows = []
    for line in journal.read_text("utf-8").splitlines():
        try:
            rows.append(Row.from_dict(json.loads(line)))
        except (json.JSONDecodeError, KeyError, TypeError):
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
    fresh = journal.with_name(f".{journal.name}.part")
    fresh.write_text("".join(json.dumps(row.as_dict(), default=str) + "\n" for row in rows), "utf-8")
    fresh.replace(journal)


def _check(plan: Plan) -> None:
    """Refuse what no benchmark could put right."""
    unknown = [p for p in plan.protocols if p not in PROTOCOLS]
    if unknown:
        raise InputError(f"no protocol {unknown[0]!r}; known: {', '.join(PROTOCOLS)}")
    for what, given in (("model", plan.models), ("benchmark", plan.benchmarks), ("protocol", plan.protocols)):
        if not given:
            raise InputError(f"no {what} came; give one at least")
    if len({name for name, _ in plan.benchmarks}) < len(plan.benchmarks):
        raise InputError("a benchmark was given twice; give each once")
    if wrong := [f for f in plan.fractions if not 0 < f <= 1]:
        raise InputError(f"a fraction is {wrong[0]:g}; wanted more than 0, at most 1")
    if plan.subsets == "published" and (wrong := [f for f in plan.fractions if f not in (*FRACTIONS, 1)]):
        known = ", ".join(f"{f:g}" for f in FRACTIONS)
        raise InputError(f"a fraction is {wrong[0]:g}; published subsets are of {known} and 1")
    for text in plan.compressions:
        parse_compression(text)
    if wrong := [r for r in plan.rates if not r > 0]:
        raise InputError(f"a learning rate is {wrong[0]:g}; wanted more than 0")
    if any(count is not None and count < 1 for count in (plan.epochs, plan.limit, plan.batch)):
        raise InputError("epochs, batch and limit are counts; wanted 1 or more")


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
) -> Iterator[Row]:
    """Give the rows of one model on one benchmark."""
    model = given if isinstance(given, str) else given.name
    blank = Row(id=key_of({"failed": [model, name]}), model=model, benchmark=name, protocol=" ".join(plan.protocols))
    if isinstance(benchmark, str):
        yield replace(blank, error=benchmark)
        return
    try:
        encoder = open_encoder(given, benchmark, plan.device) if isinstance(given, str) else given
        source = Source(encoder=encoder, model=identity(encoder), benchmark=benchmark, store=store, device=plan.device)
        views = {p: _views(plan, p, encoder, benchmark) for p in plan.protocols if allowed(p, benchmark.task)}
        jobs = list(_jobs(plan, source, views))
        wanted = [v for job in jobs if job.id not in known for v in job.views]
        if wanted:
            source.prepare(wanted, progress)
        tables = lru_cache(maxsize=1)(_tables_by_view(plan, source, model))
        for job in jobs:
            if job.id in known:
                # The name by which a model is called may be another one now.
                yield replace(known[job.id], model=model)
            else:
                yield _fill(plan, source, job, tables, model)
    except Exception as error:
        yield replace(blank, error=reason(error))


def _views(plan: Plan, protocol: Protocol, encoder: Encoder, benchmark: Benchmark) -> tuple[View, ...]:
    """List the features that a protocol chooses among."""
    task = OLMOEARTH.get(benchmark.name, OlmoEarthTask())
    row = ANYSAT.get(benchmark.name) if protocol == "anysat" else None
    published = row.modalities if row else task.modalities
    wanted = plan.modalities or published or benchmark.modalities
    offered = [m for m in benchmark.modalities if m in wanted]
    if not offered:
        raise InputError(f"{benchmark.name} has none of {', '.join(wanted)}; it has {', '.join(benchmark.modalities)}")
    shown = seen_by(encoder, offered)
    train = benchmark.splits["train"]
    (sample,), batch = next(batches_of(replace(train, ids=train.ids[:1]), shown))
    patch_m = plan.patch_m or (row.patch_m if row else None)
    patch_m = patch_m or (batch.pixel_m * task.patch_px if task.patch_px else patch_for(batch))
    dense = sample.target.ndim == 3
    kind: Kind = "tokens" if protocol == "attention" else "patches" if dense else "centre" if task.centre else "summary"
    if protocol == "anysat":
        sub_patches = dense and _has_sub_patches(encoder, batch, patch_m, plan.device)
        kind = "dense" if sub_patches else "patches" if dense else "summary"
    able = normalisations(encoder)
    norms = [n for n in plan.normalisations or (task.normalisation,) if n in able] or [able[0]]
    if "published" in norms:
        # Whether there are any is known before anything is embedded.
        own_statistics(benchmark, shown)
    # Sub-patches and single tokens are not pooled; patches only where dates and band sets are at hand.
    pools = (
        plan.poolings if kind == "summary" or (kind in ("patches", "centre") and gives_tokens(encoder)) else ("mean",)
    )
    return tuple(
        View(kind=kind, pooling=p, normalisation=n, patch_m=patch_m, shown=tuple(shown.items()))
        for n in norms
        for p in pools
    )


def _has_sub_patches(encoder: Encoder, batch: Batch, patch_m: float, device: str) -> bool:
    given = batch.to(device)
    able = encoder.with_statistics(encoder.fit_statistics([given])) if isinstance(encoder, Fitted) else encoder
    assert isinstance(able, Encoder)
    try:
        return able.encode(given, patch_m=patch_m, dense=True).dense is not None
    except InputError:
        return False


def _jobs(plan: Plan, source: Source, views: Mapping[Protocol, tuple[View, ...]]) -> Iterator[_Job]:
    """List the rows of one model on one benchmark; what has no chance in it is done once."""
    benchmark, recipe = source.benchmark, Recipe(rates=plan.rates)
    contents = [benchmark.contents[role] for role in benchmark.splits]
    training = {**asdict(recipe), **{name: getattr(plan, name) for name in ("batch", "epochs", "published_rate")}}
    loss = plan.loss or OLMOEARTH.get(benchmark.name, OlmoEarthTask()).loss
    # Rows of before these could be chosen are found again where nothing of it was.
    training |= {"loss": loss} if loss != "cross_entropy" else {}
    training |= {"class_weights": plan.class_weights} if plan.class_weights != "none" else {}
    chances = product(views.items(), plan.compressions, plan.fractions)
    for (protocol, chosen), compression, fraction in chances:
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
                "views": [asdict(v) for v in chosen],
                **(training if protocol != "knn" else {}),
                "fraction": fraction,
                "seed": seed,
                **({"published": by} if by else {}),
                **({"compression": compression} if compression != "none" else {}),
                **({"subset": subset[0].tolist()} if subset is not None else {}),
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
        outcome = run(job.protocol, trial, job.views)
    cost = source.cost(outcome.view)
    return Row(
        id=job.id,
        model=model,
        benchmark=benchmark.name,
        protocol=job.protocol,
        task=benchmark.task,
        fraction=job.fraction,
        seed=job.seed,
        labels=len(train) if index is None else len(index),
        subset=subset,
        compression=job.compression,
        tested=len(benchmark.splits["test"]),
        metric=outcome.metric,
        figures=outcome.figures,
        chosen={**outcome.chosen, **_about(outcome, model), "bytes": bytes_of(steps, train.x.shape[-1])},
        seconds=meter.report.seconds,
        wh=meter.report.kwh * 1000,
        energy=meter.report.method,
        embed_seconds=cost["seconds"],
        embed_wh=cost["wh"],
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
