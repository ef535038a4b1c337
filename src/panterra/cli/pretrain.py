"""`panterra pretrain`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from panterra.cli.options import Country, Json
from panterra.errors import InputError


def pretrain(
    name: Annotated[str | None, Parameter(help="A recipe, see --list.")] = None,
    /,
    *,
    data: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True,
            help="Corpora: folders with sample_metadata.csv and sample_*.h5. For AnySat NAME=FOLDER of each data set.",
        ),
    ] = None,
    out: Annotated[Path | None, Parameter(help="Folder of the run; one that is there goes on.")] = None,
    start: Annotated[
        str | None,
        Parameter(help="Start a new run from weights: AnySat_full.pth, or the folder or name of a model."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        Parameter(name="--set", consume_multiple=True, help="Settings: lr=1e-4 loss.tau=0.2 steps=500."),
    ] = None,
    show_list: Annotated[bool, Parameter(name="--list", show_default=False, help="List the recipes.")] = False,
    dry_run: Annotated[bool, Parameter(show_default=False, help="Count tokens, memory, time and energy only.")] = False,
    steps_now: Annotated[int | None, Parameter(help="Stop after so many steps, with a checkpoint.")] = None,
    parallel: Annotated[
        Literal["auto", "none", "ddp", "fsdp"], Parameter(help="How processes that torchrun started share the work.")
    ] = "auto",
    precision: Annotated[
        Literal["float32", "bfloat16"] | None, Parameter(help="The same as --set precision=...")
    ] = None,
    compile: Annotated[bool, Parameter(show_default=False, help="Compile the transformer blocks.")] = False,
    device: Annotated[str, Parameter(help="auto, cpu, cuda or cuda:N.")] = "auto",
    workers: Annotated[int, Parameter(help="Processes that read samples, for each rank.")] = 2,
    report_to: Annotated[
        list[Literal["jsonl", "tensorboard", "wandb", "mlflow"]] | None,
        Parameter(consume_multiple=True, help="Where numbers go; jsonl and tensorboard if left out."),
    ] = None,
    labelled: Annotated[
        Path | None, Parameter(help="Labelled samples (.npz) for nearest neighbours on the way.")
    ] = None,
    check_every: Annotated[int, Parameter(help="Steps between checks for collapse; 0 leaves them out.")] = 1000,
    export: Annotated[Path | None, Parameter(help="Only make a model folder of a checkpoint of --out.")] = None,
    step: Annotated[
        int | None, Parameter(help="For --export: of the checkpoint after this step, not the newest.")
    ] = None,
    save_every: Annotated[int, Parameter(help="Steps between checkpoints.")] = 250,
    ranks: Annotated[int, Parameter(help="For --dry-run: processes that share a step.")] = 1,
    tflops: Annotated[
        float | None, Parameter(help="For --dry-run: TFLOP/s of a rank; measured here if left out.")
    ] = None,
    watts: Annotated[float | None, Parameter(help="For --dry-run: what a rank draws.")] = None,
    country: Country | None = None,
    as_json: Json = False,
) -> None:
    """Pretrain a model by a recipe. A stopped run goes on where it was, with the numbers of one that never stopped."""
    from panterra.commands import pretrain as command
    from panterra.commands.terminal import show_json
    from panterra.train.loop import Options

    if show_list:
        listed = command.list_recipes()
        show_json(listed) if as_json else command.show_recipes(listed)
        return
    if name is None:
        raise InputError("which recipe? give its name, such as olmoearth-v1.2-nano; --list shows all")
    settings = command.configured(name, changes or [], precision=precision)
    if dry_run:
        plan = command.dry_run(
            settings,
            data or [],
            ranks=ranks,
            sharded=parallel == "fsdp",
            device=device,
            tflops=tflops,
            watts=watts,
            country=country,
            start=start,
        )
        show_json(plan.as_dict()) if as_json else command.show_plan(plan)
        return
    if out is None:
        raise InputError("give the folder of the run with --out, or count the run with --dry-run")
    if export is not None:
        folder = command.export_checkpoint(settings, data or [], out, export, step=step)
        show_json({"model": str(folder)}) if as_json else print(f"The model is in {folder}")
        return
    result = command.run_pretrain(
        settings,
        data or [],
        out,
        start=start,
        labelled=labelled,
        check_every=check_every,
        options=Options(
            device=device,
            parallel=parallel,
            precision=settings.precision,
            compile=compile,
            workers=workers,
            save_every=save_every,
            logs=tuple(report_to or ("jsonl", "tensorboard")),
            country=country,
            steps_this_time=steps_now,
        ),
    )
    if command.is_first_rank():
        show_json(asdict(result)) if as_json else command.show_result(result)
