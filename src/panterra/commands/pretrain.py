"""Pretraining as a person starts it: a recipe by name, corpora, a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from panterra.commands.pretrain_anysat import (
    dry_run_anysat,
    export_anysat,
    list_anysat,
    run_anysat,
    show_anysat_plan,
)
from panterra.commands.pretrain_nano import NanoPlan, dry_run_nano, export_nano, list_nano, run_nano, show_nano_plan
from panterra.commands.terminal import note, show_table
from panterra.data.olmoearth_h5 import open_corpus
from panterra.energy import recorded
from panterra.errors import InputError
from panterra.recipes import ABLATED, ABLATIONS, RECIPES, Recipe, recipe
from panterra.recipes.anysat import AnySatRecipe
from panterra.recipes.anysat_plan import AnySatPlan
from panterra.recipes.checks import read_labelled
from panterra.recipes.nano import NanoRecipe
from panterra.recipes.olmoearth import OlmoEarthRecipe
from panterra.recipes.overrides import check, override
from panterra.recipes.plan import (
    Plan,
    Power,
    Rate,
    count_parameters,
    crop_tokens,
    facts_of,
    local_power,
    measure_rate,
    plan_run,
    published_facts,
)
from panterra.recipes.run import make_run, write_card
from panterra.recipes.start import Start, begin_from, inherit, noted_start, open_start, read_start
from panterra.train.loop import Options, TrainResult, export, train
from panterra.train.parallel import choose_device


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedPlan:
    """A run as it would be, and the weights that it would start from."""

    plan: Plan | AnySatPlan
    start: Mapping[str, Any]
    """What the run would note of them, see `panterra.recipes.start.Start`."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {**self.plan.as_dict(), "start": dict(self.start)}


def configured(name: str, changes: Sequence[str], *, precision: str | None = None) -> Recipe:
    """Give a recipe with a person's changes, checked."""
    changed = override(recipe(name), [*changes, *([f"precision={precision}"] if precision else [])])
    check(changed)
    return changed


def run_pretrain(
    settings: Recipe,
    data: Sequence[str | Path],
    out: Path,
    *,
    start: str | None = None,
    labelled: Path | None = None,
    check_every: int = 1000,
    options: Options,
) -> TrainResult:
    """Train, going on from where an earlier start of the same run was; at the end, export the model and its card.

    A new run starts from the weights `start`, see `panterra.recipes.start.open_start`, or from random ones.
    """
    choose_device(options.device)  # before corpora are read
    first = is_first_rank()
    with recorded("pretrain", model=settings.name, country=options.country) if first else nullcontext():
        if isinstance(settings, NanoRecipe):
            _refuse_start(settings, start)
            if data or labelled is not None:
                raise InputError(
                    f"{settings.name} draws the places that it learns from; leave out --data and --labelled"
                )
            return run_nano(settings, out, options)
        began = open_start(settings, start, out)
        if began is not None and first:
            note(f"{'Started' if began.state else 'Going on with a run that started'} from {began.about['source']}")
        settings = inherit(settings, None if began is None else began.about)
        if isinstance(settings, OlmoEarthRecipe):
            return _run_olmoearth(settings, data, out, labelled, check_every, options, began)
        if labelled is not None:
            raise InputError("nearest neighbours on the way are for OlmoEarth's runs; leave out --labelled")
        return run_anysat(settings, [str(path) for path in data], out, options, start=began)


def _refuse_start(settings: NanoRecipe, start: str | None) -> None:
    if start is not None:
        raise InputError(f"{settings.name} starts from weights that it calibrates itself; leave out --start")


def _run_olmoearth(
    settings: OlmoEarthRecipe,
    data: Sequence[str | Path],
    out: Path,
    labelled: Path | None,
    check_every: int,
    options: Options,
    start: Start | None,
) -> TrainResult:
    if not data:
        raise InputError(f"{settings.name} needs a corpus; give its folder with --data, or count with --dry-run")
    corpora = [open_corpus(folder) for folder in data]
    run = make_run(
        settings, corpora, check_every=check_every, labelled=None if labelled is None else read_labelled(labelled)
    )
    if start is not None:
        run = begin_from(run, start)
    try:
        result = train(run, out, options)
    except FloatingPointError as error:
        raise InputError(f"{error}; a smaller lr or precision=float32 may help, in another folder") from error
    # Ranks meet for the last time inside `train`; the one that exported the model is alone in writing its card.
    if result.model is not None and is_first_rank():
        write_card(result.model, settings, corpora, result)
    return result


def export_checkpoint(
    settings: Recipe,
    data: Sequence[str | Path],
    out: Path,
    folder: Path,
    *,
    step: int | None = None,
) -> Path:
    """Write the model of a run's newest checkpoint, or of that after `step`, to a folder."""
    if isinstance(settings, NanoRecipe):
        return export_nano(settings, out, folder, step=step)
    settings = inherit(settings, noted_start(out))
    if isinstance(settings, AnySatRecipe):
        return export_anysat(settings, [str(path) for path in data], out, folder, step=step)
    return export(make_run(settings, [open_corpus(path) for path in data], check_every=0), out, folder, step=step)


def is_first_rank() -> bool:
    """Say whether this process speaks for those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def dry_run(
    settings: Recipe,
    data: Sequence[str | Path],
    *,
    start: str | None = None,
    ranks: int = 1,
    sharded: bool = False,
    device: str = "auto",
    tflops: float | None = None,
    watts: float | None = None,
    country: str | None = None,
) -> Plan | AnySatPlan | NanoPlan | StartedPlan:
    """Count a run; without corpora, one over the published corpus or data sets.

    `tflops` and `watts` are those of one rank. Without `tflops` this machine is measured; what it draws is only known
    for itself, so that a given speed without given watts leaves the energy open. Raises InputError where the weights to
    `start` from do not fit.
    """
    if isinstance(settings, NanoRecipe):
        _refuse_start(settings, start)
        return dry_run_nano(settings)
    about = None if start is None else read_start(settings, start).about
    settings = inherit(settings, about)
    plan: Plan | AnySatPlan
    if isinstance(settings, AnySatRecipe):
        plan = dry_run_anysat(settings, [str(path) for path in data], ranks=ranks)
    else:
        plan = _dry_run_olmoearth(
            settings, data, ranks=ranks, sharded=sharded, device=device, tflops=tflops, watts=watts, country=country
        )
    return plan if about is None else StartedPlan(plan=plan, start=about)


def _dry_run_olmoearth(
    settings: OlmoEarthRecipe,
    data: Sequence[str | Path],
    *,
    ranks: int,
    sharded: bool,
    device: str,
    tflops: float | None,
    watts: float | None,
    country: str | None,
) -> Plan:
    where = str(choose_device(device))
    corpora = [open_corpus(folder) for folder in data]
    facts = facts_of(corpora, settings) if corpora else published_facts(settings)
    if tflops is not None:
        rate, power = Rate(flops=tflops * 1e12, source="given"), None
    else:
        rate, power = measure_rate(settings, crop_tokens(settings, facts), device=where), local_power(where)
    if watts is not None:
        power = Power(watts=watts, source="given")
    return plan_run(settings, facts, world=ranks, sharded=sharded, rate=rate, power=power, country=country)


def list_recipes() -> dict[str, list[dict[str, Any]]]:
    """Describe the runs, and the ablations with the releases that they go with."""
    runs = [
        {
            "name": name,
            "about": _first_line(make),
            "parameters": count_parameters(made),
            "recipe": asdict(made),
        }
        for name, make in RECIPES.items()
        if name not in ABLATED and isinstance(made := make(), OlmoEarthRecipe)
    ]
    ablations = [
        {
            "name": ablation,
            "about": _first_line(change),
            "releases": list(dict.fromkeys(name.split("-")[1] for name in ABLATED if name.endswith(f"-{ablation}"))),
        }
        for ablation, change in ABLATIONS.items()
    ]
    return {"nano": list_nano(), "runs": runs, "ablations": ablations, "anysat": list_anysat()}


def _first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").strip().split("\n")[0]


def show_recipes(listed: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print the runs, then the ablations."""
    for row in listed["nano"]:
        print(f"{row['name']}: {row['about']}\n")
    rows = []
    for run in listed["runs"]:
        settings, parameters = run["recipe"], run["parameters"]
        millions = [f"{parameters[part] / 1e6:.1f} M" for part in ("encoder", "predictor")]
        size = f"{settings['encoder']['dim']} x {settings['encoder']['depth']}"
        rows.append(
            (run["name"], size, *millions, f"{settings['lr']:g}", f"{settings['weight_decay']:g}", run["about"])
        )
    show_table(["name", "width x depth", "encoder", "predictor", "lr", "decay", "what it is"], rows)
    print("\nWith an ablation behind the name, as in olmoearth-v1.2-nano-no-contrast:\n")
    show_table(
        ["ablation", "goes with", "what differs"],
        [(row["name"], ", ".join(row["releases"]), row["about"]) for row in listed["ablations"]],
    )
    print("\nAnySat, which takes --data NAME=FOLDER for each data set; also with a variant behind the name:\n")
    show_table(
        ["name", "width x depth", "data sets", "variants"],
        [
            (
                row["name"],
                f"{row['recipe']['encoder']['dim']} x {row['recipe']['encoder']['depth']}",
                row["about"],
                ", ".join(row["variants"]),
            )
            for row in listed["anysat"]
        ],
    )


def show_plan(plan: Plan | AnySatPlan | NanoPlan | StartedPlan) -> None:
    """Print a run as it would be."""
    if isinstance(plan, StartedPlan):
        show_plan(plan.plan)
        about = plan.start
        print(
            f"\nStarts from {about['source']} ({', '.join(about['parts'])}), licence "
            f"{about['licence'] or 'not stated'}, SHA-256 {about['sha256'][:16]}; it fits"
        )
        return
    if isinstance(plan, NanoPlan):
        show_nano_plan(plan)
        return
    if isinstance(plan, AnySatPlan):
        show_anysat_plan(plan)
        return
    settings, facts = plan.recipe, plan.facts
    encoder, predictor = settings.encoder, settings.objective.predictor
    print(f"{settings.name}\n")
    show_table(
        ["part", "width", "depth", "heads", "parameters"],
        [
            ("encoder", encoder.dim, encoder.depth, encoder.heads, f"{plan.parameters['encoder']:,}"),
            ("predictor", predictor.dim, predictor.depth, predictor.heads, f"{plan.parameters['predictor']:,}"),
            ("teacher (not trained)", encoder.dim, "", "", f"{plan.parameters['teacher']:,}"),
            *(
                (name, encoder.dim, "", "", f"{count:,}")
                for name, count in plan.parameters.items()
                if name == "reconstructor"
            ),
        ],
    )
    print(f"\nCorpus: {facts.samples:,} samples of {facts.tile_px} px, {settings.held_out} of them held out\n")
    show_table(
        ["modality", "samples", "role"],
        [
            (m, f"{share:.1%}", "seen and predicted" if m in encoder.observed else "predicted")
            for m, share in facts.coverage.items()
        ],
    )
    print(
        f"\nSteps: {plan.steps:,}, {plan.steps_per_epoch:,} an epoch, of {settings.batch} samples: "
        f"{plan.micro_batches} micro-batches of at most {settings.micro_batch} on each of {plan.world} ranks, "
        f"{settings.precision}\n"
    )
    rows = [
        (
            f"{c.side_patches} x {c.side_patches}",
            f"{c.share:.1%}",
            str(c.dates),
            *_shares(c.tokens, c.visible, c.decoded),
        )
        for c in plan.crops
    ]
    mean = [plan.mean(what) for what in ("tokens", "visible", "decoded")]
    rows.append(("mean", "", f"{plan.mean('dates'):.1f}", *_shares(*mean)))
    show_table(["patches", "of the steps", "dates", "tokens a sample", "visible", "decoded"], rows)
    print(
        f"\nTokens a step: {settings.batch * mean[0]:,.0f}, of which {settings.batch * mean[1]:,.0f} visible and "
        f"{settings.batch * mean[2]:,.0f} decoded in each of {settings.views} views, if no date of a modality is "
        "missing\n"
    )
    memory = {**asdict(plan.memory), "total": plan.memory.total}
    show_table(["memory of a rank", "GB"], [(name, f"{size / 1e9:.3g}") for name, size in memory.items()])
    print(f"\nArithmetic: {plan.flops_per_step / 1e12:.3g} TFLOP a step")
    print("\n".join(_costs(plan)))


def _shares(tokens: float, visible: float, decoded: float) -> tuple[str, str, str]:
    return f"{tokens:.0f}", f"{visible:.0f} ({visible / tokens:.0%})", f"{decoded:.0f} ({decoded / tokens:.0%})"


def _costs(plan: Plan) -> list[str]:
    if plan.rate is None or plan.seconds_per_step is None or plan.hours is None:
        return ["Time: unknown"]
    lines = [
        f"Time: {plan.seconds_per_step:.3g} s a step, {plan.hours:.3g} h in all, if each of {plan.world} ranks "
        f"computes {plan.rate.flops / 1e12:.3g} TFLOP/s ({plan.rate.source}) and waits for neither data nor the others"
    ]
    if plan.kwh is None or plan.power is None:
        return [*lines, "Energy: unknown; give the watts of a rank with --watts"]
    co2e = "" if plan.co2e_kg is None else f", {plan.co2e_kg:.3g} kg CO2e"
    return [*lines, f"Energy: {plan.kwh:.3g} kWh{co2e}, at {plan.power.watts:.0f} W a rank ({plan.power.source})"]


def show_result(result: TrainResult) -> None:
    """Print how far a run has come."""
    loss = "" if result.loss is None else f", loss {result.loss:.4g}"
    print(
        f"{result.folder}: {result.step} steps{loss}, {result.samples} samples in {result.seconds:.0f} s, "
        f"{result.kwh * 1000:.3g} Wh"
    )
    print(f"The model is in {result.model}" if result.model else "The run is not finished; start it again to go on")
