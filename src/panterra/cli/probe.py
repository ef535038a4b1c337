"""`panterra probe`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from panterra.cli.options import BlockM, Device, Json, LabelColumn, PatchM, RandomSeed

if TYPE_CHECKING:
    from panterra.evaluate.metrics import Interval


def probe(
    source: Annotated[str, Parameter(help="Embeddings that panterra embed wrote, or a scene to embed first.")],
    /,
    *,
    labels: Annotated[Path, Parameter(help="Points or polygons with a class or value column, or a raster of codes.")],
    out: Annotated[Path, Parameter(help="Folder of the probe.")],
    kind: Annotated[
        Literal["logistic", "knn", "ridge"], Parameter(help="Ridge and knn also know values.")
    ] = "logistic",
    column: LabelColumn | None = None,
    split: Annotated[Literal["blocks", "random"], Parameter(help="Random flatters: neighbours look alike.")] = "blocks",
    block_m: BlockM = 500,
    folds: Annotated[int, Parameter(help="Rounds of testing, each on other blocks.")] = 5,
    class_weights: Annotated[
        Literal["none", "balanced"],
        Parameter(help="Logistic: balanced lets rare classes count as much as common ones."),
    ] = "none",
    seed: int = 42,
    model: Annotated[str | None, Parameter(help="Where the source is a scene: the model to embed it with.")] = None,
    random: RandomSeed = None,
    patch_m: PatchM = 40,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Fit a probe to labels and report what it scores where it has not been."""
    from panterra.commands.probe import as_embeddings, fit_to_labels, unseen_mistakes
    from panterra.commands.terminal import show_json, show_table
    from panterra.energy import recorded

    store = as_embeddings(source, beside=out, model=model, random=random, patch_m=patch_m, device=device)
    with recorded("probe", model=model):
        fitted = fit_to_labels(
            store,
            labels,
            column=column,
            kind=kind,
            split=split,
            block_m=block_m,
            folds=folds,
            seed=seed,
            class_weights=class_weights,
        )
    fitted.probe.save(out)
    report = fitted.report
    if as_json:
        show_json(
            {"probe": str(out), "left_out": fitted.left_out, "other_dates": fitted.other_dates, **report.as_dict()}
        )
        return
    show_table(["", "held out", "95 % interval"], [(name, *_figures(i)) for name, i in report.metrics.items()])
    if report.classes:
        print()
        show_table(
            ["class", "labels", "precision", "recall", "F1", "95 % interval"],
            [
                (c.name, c.support, _figures(c.precision)[0], _figures(c.recall)[0], *_figures(c.f1))
                for c in report.classes
            ],
        )
    groups = f"{report.num_samples} labelled patches in {report.num_groups} groups"
    print(f"\n{out}: {kind} probe on {groups}.{unseen_mistakes(report)}")


def _figures(interval: Interval) -> tuple[str, str]:
    return f"{interval.estimate:.3f}", f"{interval.low:.3f} to {interval.high:.3f}"
