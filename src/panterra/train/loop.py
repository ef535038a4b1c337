"""The one training loop, of every objective, on one machine or many."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from panterra import __version__
from panterra.energy import EnergyReport, measure_energy
from panterra.errors import InputError
from panterra.files import claimed, read_json, unfinished_folder
from panterra.train import checkpoint
from panterra.train.loading import load_batches
from panterra.train.logs import Progress, open_logs, progress_bar
from panterra.train.optim import Optimisation, Waited, learning_rate, make_optimisers, wait
from panterra.train.parallel import (
    Ranks,
    compile_blocks,
    distribute,
    full,
    gathered,
    join_ranks,
    summed,
    synchronising,
    whole,
)

UNKNOWN = "what its checkpoints are of is not known without it: put back a copy, or choose another folder"
Micro = Any
"""One pass's worth of samples: it has `.to(device)` and `.samples`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What is looked at every so many steps, and before the first: a probe, signs of collapse."""

    name: str
    every: int
    run: Callable[[nn.Module, int], Mapping[str, float]]
    """Takes the objective in evaluation mode and the steps done; every rank runs it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that decides what a training run computes."""

    name: str
    seed: int
    """With the step, the rank and the micro-batch it decides everything random."""
    objective: Callable[[], nn.Module]
    """Its forward takes a micro-batch and a generator, and gives something with `.total` and `.terms`."""
    batches: Callable[[int, int], Dataset[Sequence[Micro]]]
    """From rank and number of ranks to that rank's micro-batches by step, counted from 0."""
    optimisation: Optimisation
    init_seed: int = 12536
    before_step: Callable[[nn.Module, int], None] | None = None
    """A teacher that follows, for example; takes the objective and the step, counted from 0."""
    before_update: Callable[[nn.Module, int], None] | None = None
    """The same between gradients and update."""
    checks: Sequence[Check] = ()
    export: Callable[[nn.Module, Path], None] | None = None
    """Writes a model folder."""
    best_of: int | None = None
    """Export the model after that stretch of so many steps whose mean loss is the lowest; None: after the last step."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the run was made from; a resumed run must have the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a run is carried out."""

    device: str = "auto"
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """auto: DDP where there are several processes."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast; parameters, gradients, their sums over ranks and losses stay in float32."""
    compile: bool = False
    workers: int = 2
    """Processes that make batches; 0 makes them here."""
    save_every: int = 250
    """Steps between checkpoints of which the newest is kept."""
    keep_every: int = 5000
    """Steps between checkpoints that stay."""
    log_every: int = 10
    logs: tuple[str, ...] = ("jsonl", "tensorboard")
    country: str | None = None
    """Whose electricity is used (ISO 3166 alpha-3); gives CO2 equivalents."""
    steps_this_time: int | None = None
    """Stop after so many steps, with a checkpoint."""

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise InputError(f"precision={self.precision!r} came; choose float32 or bfloat16")
        if min(self.save_every, self.keep_every, self.log_every) < 1:
            raise InputError("save_every, keep_every and log_every are numbers of steps; give 1 or more")

    @property
    def checkpoints(self) -> tuple[int, int]:
        """After how many steps there is one."""
        return self.save_every, self.keep_every


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How far a run has come."""

    folder: Path
    step: int
    finished: bool
    loss: float | None
    """Of the last step."""
    samples: int
    """Over all resumes, as are time and energy."""
    seconds: float
    kwh: float
    co2e_kg: float | None
    model: Path | None
    """The exported model folder."""


class Stopped(KeyboardInterrupt):
    """A signal ended a run, which has a checkpoint to go on from."""


class Signals:
    """The signal that asked the run to stop, if any did."""

    def __init__(self) -> None:
        self.name: str | None = None


@dataclass(slots=True, kw_only=True)
class State:
    """A run at some step."""

    ranks: Ranks
    objective: nn.Module
    model: nn.Module
    """The objective as DDP or FSDP has it."""
    optimisers: Sequence[torch.optim.Optimizer]
    signals: Signals
    step: int = 0
    """Steps done."""
    loss: float | None = None
    """Of the last step."""
    samples: int = 0
    seconds: float = 0.0
    kwh: float = 0.0
    co2e_kg: float | None = None
    energy: str = ""
    """How it was found, in words."""
    waited: Waited = field(default_factory=Waited)
    stretch: float = 0.0
    """Sum of the losses of the current stretch of steps (`Run.best_of`)."""
    lowest: float | None = None
    """Of the sums of whole stretches; the exported model is that of its end."""
    stopped: bool = False
    """Whether a signal reached any rank."""

    def facts(self) -> dict[str, Any]:
        """Return what is kept beside the tensors."""
        names = ("step", "loss", "samples", "seconds", "kwh", "co2e_kg", "energy", "stretch", "lowest")
        return {**{name: getattr(self, name) for name in names}, "waited": asdict(self.waited)}

    def go_on_from(self, facts: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        for name in facts.keys() & self.facts():
            setattr(self, name, Waited(**facts[name]) if name == "waited" else facts[name])

    def charge(self, report: EnergyReport) -> None:
        """Add the energy of a stretch; work that a kill undid is not counted."""
        # Counters are those of a whole machine, so that one process of each reads them.
        whole_machine = report.method == "measured" or self.ranks.device.type == "cuda"
        mine = 0.0 if whole_machine and self.ranks.local_rank else 1.0
        spent = torch.tensor([report.kwh, report.co2e_kg or 0.0], dtype=torch.float64) * mine
        kwh, co2e_kg = summed(spent.to(self.ranks.device), self.ranks).tolist()
        self.kwh, self.seconds, self.energy = self.kwh + kwh, self.seconds + report.seconds, report.detail
        if report.co2e_kg is not None:
            self.co2e_kg = (self.co2e_kg or 0.0) + co2e_kg


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What a step gave."""

    loss: float
    """Mean over micro-batches and ranks."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    samples: int
    """Of all ranks."""
    seconds: float
    """The wait for the batch included."""
    terms: Sequence[Mapping[str, Tensor]]
    """Of this rank's micro-batches."""

    def record(self, ranks: Ranks) -> dict[str, float]:
        """Return what a log holds, every term averaged over the micro-batches of all ranks that have it."""
        here = [{name: float(value) for name, value in terms.items()} for terms in self.terms]
        parts: dict[str, list[float]] = {}
        for terms in (terms for rank in gathered(here, ranks) for terms in rank):
            for name, value in terms.items():
                parts.setdefault(f"loss/{name}", []).append(value)
        return {
            "loss": self.loss,
            **{name: sum(values) / len(values) for name, values in parts.items()},
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "samples_per_s": self.samples / self.seconds,
        }


def train(run: Run, out: Path, options: Options | None = None, *, progress: Progress | None = None) -> TrainResult:
    """Train, going on from the newest checkpoint in `out`; the numbers are those of a run that never stopped.

    Raises FloatingPointError, before any update, where a loss or gradient is not finite, and `Stopped` after SIGINT or
    SIGTERM. `progress` takes the place of the bar on stderr.
    """
    options, steps = options or Options(), run.optimisation.steps
    with (
        join_ranks(options.device, options.parallel) as ranks,
        stop_signals() as signals,
        claimed(out, f"the run in {out}") if ranks.first else nullcontext(),
    ):
        state = begin(run, out, options, ranks, signals)
        end = steps if options.steps_this_time is None else min(steps, state.step + options.steps_this_time)
        logs, made = options.logs if ranks.first else (), run.batches(ranks.rank, ranks.world)
        with (
            load_batches(made, range(state.step, end), workers=options.workers) as batches,
            open_logs(logs, out, step=state.step, run=run.name, settings=describe(run)) as log,
            progress_bar(run.name, shown=ranks.first and progress is None) as bar,
        ):
            show = progress if progress is not None and ranks.first else bar
            if state.step == 0 and run.checks:
                log(0, check(run, state))
            while state.step < end and not state.stopped:
                with measure_energy(country=options.country) as meter:
                    pause = min(end, *(every * (state.step // every + 1) for every in options.checkpoints))
                    while state.step < pause and not state.stopped:
                        measures = update(run, state, batches, out, options)
                        keep_best(run, state, out)
                        found = check(run, state)
                        if found or state.step % options.log_every == 0 or state.step == steps:
                            log(state.step, measures.record(ranks) | found)
                        show(state.step, steps, measures.samples / measures.seconds)
                state.charge(meter.report)
                save(run, state, out, options)
        if state.stopped and state.step < steps:
            raise Stopped(
                f"{signals.name or 'a signal to another rank'} stopped the run after step {state.step} of {steps};"
                f" start it again to go on from there, in {out}"
            )
        return finish(run, state, out)


def update(run: Run, state: State, batches: Iterator[Sequence[Micro]], out: Path, options: Options) -> Measures:
    """Make one step: all micro-batches forward and backward, and the update where everything is finite."""
    ranks, started, losses, terms = state.ranks, time.perf_counter(), [], []
    batch = next(batches)
    if run.before_step is not None:
        run.before_step(state.objective, state.step)
    for optimiser in state.optimisers:
        optimiser.zero_grad()
    for i, micro in enumerate(batch):
        generator = seed_micro(run.seed, state.step, ranks.rank, i)
        with synchronising(state.model, ranks, last=i + 1 == len(batch)):
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
                loss, parts = state.model(micro.to(ranks.device), generator)
            (loss / len(batch)).backward()
        losses.append(loss.detach().float())
        terms.append(parts)
    groups = [group for optimiser in state.optimisers for group in optimiser.param_groups]
    norm = full(clip([weight for group in groups for weight in group["params"]], run.optimisation.clip_norm), ranks)
    # One look at the device a step: all ranks learn together whether to update and whether to stop.
    values = torch.stack([*losses, norm])
    counts = torch.tensor([bool(state.signals.name), sum(micro.samples for micro in batch)], device=ranks.device)
    ours = torch.cat([torch.stack([values[:-1].mean(), norm, (~values.isfinite()).any()]), counts])
    mean, norms, broken, stopped, samples = summed(ours, ranks).tolist()
    if broken:
        if state.step:
            save(run, state, out, options)
        refuse(run, state, out, losses=values[:-1].tolist(), norm=norms / ranks.world, terms=terms)
    if run.before_update is not None:
        run.before_update(state.objective, state.step)
    rate = learning_rate(state.step + 1, run.optimisation) * state.waited.share
    for group in groups:
        group["lr"] = rate
    for optimiser in state.optimisers:
        optimiser.step()
    state.step, state.samples, state.stopped = state.step + 1, state.samples + int(samples), bool(stopped)
    state.loss = mean / ranks.world
    return Measures(
        loss=state.loss,
        learning_rate=rate,
        gradient_norm=norms / ranks.world,
        samples=int(samples),
        seconds=time.perf_counter() - started,
        terms=terms,
    )


def seed_micro(seed: int, step: int, rank: int, micro: int) -> torch.Generator:
    """Let everything random of a pass follow from its place in the run; nothing random needs a checkpoint.

    What takes a generator gets the one returned; what draws globally, such as drop path, finds its seed set.
    """
    # The last number sets these draws apart from those of batches, which have a 1 there.
    own, common = np.random.SeedSequence([seed, step, rank, micro, 2]).generate_state(2, np.uint64).tolist()
    torch.manual_seed(common)
    return torch.Generator().manual_seed(own)


def clip(weights: Sequence[Tensor], limit: float | None) -> Tensor:
    """Scale gradients to a global norm of at most `limit` and return the norm that they had."""
    return nn.utils.clip_grad_norm_(weights, math.inf if limit is None else limit)


def refuse(
    run: Run, state: State, out: Path, *, losses: Sequence[float], norm: float, terms: Sequence[Mapping[str, Tensor]]
) -> None:
    """Stop at a loss or gradient that is not finite and note in `nonfinite.json` what replays it."""
    report = {
        "seed": run.seed,
        "step": state.step,
        "rank": state.ranks.rank,
        "micro_batches": [i for i, loss in enumerate(losses) if not math.isfinite(loss)],
        "losses": [str(loss) for loss in losses],
        "gradient_norm": str(norm),
        "terms": [{name: str(float(value)) for name, value in parts.items()} for parts in terms],
    }
    reports = gathered(report, state.ranks)
    if state.ranks.first:
        checkpoint.write_json(out / "nonfinite.json", {"world": state.ranks.world, "ranks": reports})
    places = [
        f"micro-batch {i} of rank {found['rank']}: loss {found['losses'][i]}"
        for found in reports
        for i in found["micro_batches"]
    ]
    raise FloatingPointError(
        f"batch {state.step} (counted from 0) is not finite: {'; '.join(places) or f'gradient norm {norm}'}; no update"
        f" was made, {out / 'nonfinite.json'} has what replays it (seed {run.seed})"
    )


def check(run: Run, state: State) -> dict[str, float]:
    """Run the checks that are due, which all are at the start and at the end."""
    end = state.step == run.optimisation.steps
    due = [c for c in run.checks if end or state.step % c.every == 0]
    if not due:
        return {}
    objective = whole(state.objective, state.ranks, run.objective).eval()
    found = {f"{c.name}/{key}": float(value) for c in due for key, value in c.run(objective, state.step).items()}
    state.objective.train()
    plateau = run.optimisation.plateau
    # What the untrained model gives is no measure: an objective may be easy before there is anything to predict.
    if plateau is not None and state.step and plateau.figure in found:
        state.waited = wait(state.waited, found[plateau.figure], plateau)
    return found


def begin(run: Run, out: Path, options: Options, ranks: Ranks, signals: Signals) -> State:
    """Build the run's state, at the newest checkpoint or at the start."""
    found = checkpoint.newest(out / "checkpoints")
    if len({str(name) for name in gathered(found and found.name, ranks)}) > 1:
        raise InputError(f"the ranks find different checkpoints in {out}; give a folder that all machines share")
    if found is not None:
        check_same(run, out)
    elif ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        about = {"panterra": __version__, "torch": torch.__version__, "ranks": ranks.world, "options": plain(options)}
        checkpoint.write_json(out / "run.json", {"run": describe(run), **about})
    torch.manual_seed(run.init_seed)
    objective = run.objective().to(ranks.device).train()
    if options.compile:
        compile_blocks(objective)
    model = distribute(objective, ranks)
    optimisers = make_optimisers(model, run.optimisation)
    state = State(ranks=ranks, objective=objective, model=model, optimisers=optimisers, signals=signals)
    if found is not None:
        state.go_on_from(checkpoint.load(found, objective, optimisers))
    return state


def describe(run: Run) -> dict[str, Any]:
    """Return as plain JSON what a run must have in common with one that it continues."""
    names = ("name", "seed", "init_seed", "optimisation", "settings")
    described: dict[str, Any] = plain({name: getattr(run, name) for name in names})
    return described


def plain(value: Any) -> Any:
    """Turn settings into what JSON gives back unchanged."""
    return json.loads(
        json.dumps(value, default=lambda x: asdict(x) if is_dataclass(x) and not isinstance(x, type) else str(x))
    )


def check_same(run: Run, out: Path) -> None:
    """Refuse to continue a run of other settings."""
    there, here = (_flat(d) for d in (read_json(out / "run.json", UNKNOWN)["run"], describe(run)))
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if names:
        changes = ", ".join(f"{name} was {there.get(name)!r} and is {here.get(name)!r}" for name in names[:3])
        more = f", and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(
            f"{out} holds a run of other settings ({changes}{more}); give its settings to go on, or another folder"
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, part in value.items():
        flat |= _flat(part, f"{prefix}{name}.") if isinstance(part, dict) and part else {f"{prefix}{name}": part}
    return flat


def save(run: Run, state: State, out: Path, options: Options) -> None:
    """Write a checkpoint."""
    permanent = state.step % options.keep_every == 0 or state.step == run.optimisation.steps
    checkpoint.save(out / "checkpoints", state.objective, state.optimisers, state.facts(), permanent=permanent)


@contextmanager
def stop_signals() -> Iterator[Signals]:
    """Note the first SIGINT or SIGTERM instead of dying of it; the second does what it always did."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: Any) -> None:
        signals.name = signal.Signals(number).name
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        restore()


def keep_best(run: Run, state: State, out: Path) -> None:
    """Export the model after a stretch of steps whose loss is the lowest; a resumed run does again what it repeats."""
    if run.best_of is None or run.export is None:
        return
    assert state.loss is not None
    state.stretch += state.loss
    if state.step % run.best_of == 0:
        total, state.stretch = state.stretch, 0.0
        if state.lowest is None or total < state.lowest:
            state.lowest = total
            export_here(run.export, run, state, out / "model")


def export_here(export: Callable[[nn.Module, Path], None], run: Run, state: State, folder: Path) -> None:
    """Export the model of a run as it is; all ranks take part."""
    objective = whole(state.objective, state.ranks, run.objective)
    if state.ranks.first:
        write_model(export, objective, folder)
    state.objective.train()


def finish(run: Run, state: State, out: Path) -> TrainResult:
    """Export the model of a run that is at its end, note the result and return it."""
    finished, model = state.step == run.optimisation.steps, None
    if finished and run.export is not None:
        model = out / "model"
        if state.lowest is None:
            export_here(run.export, run, state, model)
    facts = {name: value for name, value in state.facts().items() if name in TrainResult.__dataclass_fields__}
    result = TrainResult(folder=out, finished=finished, model=model, **facts)
    if state.ranks.first:
        checkpoint.write_json(out / "result.json", {**plain(result), "energy": state.energy})
    return result


def export(run: Run, out: Path, folder: Path, *, step: int | None = None) -> Path:
    """Export the model of a run's newest checkpoint, or of that after `step`, to a folder of its own."""
    if run.export is None:
        raise InputError(f"the run {run.name!r} says no way to export its model")
    found = checkpoint.newest(out / "checkpoints") if step is None else checkpoint.at(out / "checkpoints", step)
    if found is None:
        raise InputError(f"no checkpoint {'' if step is None else f'of step {step} '}in {out / 'checkpoints'}")
    objective = run.objective()
    checkpoint.load(found, objective)
    write_model(run.export, objective, folder)
    return folder


def write_model(export: Callable[[nn.Module, Path], None], objective: nn.Module, folder: Path) -> None:
    """Export a model so that the folder has its name only when it is complete."""
    with unfinished_folder(folder) as fresh:
        export(objective.eval(), fresh)
