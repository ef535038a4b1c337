"""What a person should know before using a fine-tuned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from panterra.finetune.model import FineTuned, Setup


def write_card(model: FineTuned) -> str:
    """Write the model card, in Markdown, from what the model's summary holds."""
    setup, summary = model.setup, model.summary
    return "\n".join(
        [
            f"# {setup.task.replace('_', ' ').capitalize()} with {setup.base.name}",
            "",
            f"Fine-tuned with Panterra: `{_use(model)}`. It looks at "
            f"{', '.join(setup.modalities)} in windows of {setup.window_px} px, in patches of "
            f"{setup.patch_m:g} m{_divided(setup)}, and "
            f"{'looks for centres on' if model.task == 'boxes' else 'answers for'} cells of {setup.output_m:g} m."
            f"{_compared(model)}",
            "",
            *_data(model, summary["examples"]),
            *_figures("Held out for testing", summary["test"]),
            *_figures("Validation, which chose the epoch", summary["validation"]),
            *_training(summary),
            *_licence(model, summary["examples"]),
        ]
    )


def _use(model: FineTuned) -> str:
    if model.task == "boxes":
        return "panterra detect SCENE --model FOLDER --out objects.geojson"
    return "panterra map SCENE --probe FOLDER --out map.tif"


def _divided(setup: Setup) -> str:
    if setup.sub_patches is None:
        return ""
    return f" by sub-patches of {setup.sub_patches}, {setup.patch_m / setup.parts:g} m each"


def _compared(model: FineTuned) -> str:
    if not model.setup.pairs:
        return ""
    periods = model.setup.periods
    spans = f"{periods.before} with {periods.after}" if periods else "those of each label"
    return f" It compares two periods; in training {spans}."


def _data(model: FineTuned, about: Mapping[str, Any]) -> list[str]:
    what = "objects" if model.task == "boxes" else "labelled cells" if model.setup.head.dense else "labels"
    split = (
        f"Parts are whole blocks of {about['block_m']:g} m, so that no place is both learned and tested."
        if about["block_m"]
        else "Parts are those of the data set."
    )
    source = about.get("dataset") or f"{about.get('labels')} {what} in {len(about.get('scenes', ()))} scene(s)"
    others = f" {about['other_dates']} labels of other dates were left out." if about.get("other_dates") else ""
    rows = [[part, about["samples"][part], about["blocks"][part]] for part in ("train", "val", "test")]
    return ["## Data", "", f"{source}. {split}{others}", "", *_table(["part", "samples", "blocks"], rows), ""]


def _figures(title: str, part: Mapping[str, Any]) -> list[str]:
    rows = [[name, _number(i["estimate"]), _interval(i)] for name, i in part["metrics"].items()]
    cut = f" Boxes count from a score of {part['threshold']:.3g} on." if part["threshold"] is not None else ""
    alone = part["num_blocks"] < 2
    whence = "there are no intervals, which take several blocks" if alone else "intervals come from resampling blocks"
    lines = [
        f"## {title}",
        "",
        f"{part['num_targets']} targets in {part['num_samples']} samples and {part['num_blocks']} block(s); {whence}."
        f"{cut}",
        "",
        *_table(["figure", "estimate", "95 % interval"], rows),
        "",
    ]
    if part["classes"]:
        columns = ["support", "precision", "recall", "f1", "iou"]
        per_class = [[name, *(_number(f[c]) for c in columns)] for name, f in part["classes"].items()]
        lines += [*_table(["class", *columns], per_class), ""]
    return lines


def _training(summary: Mapping[str, Any]) -> list[str]:
    tuning, energy = summary["tuning"], summary["energy"]
    carbon = "" if energy["co2e_kg"] is None else f", {energy['co2e_kg']:.3g} kg CO2 equivalents"
    return [
        "## Training",
        "",
        f"Method {tuning['method']}, {summary['epochs']} epochs, of which number {summary['best_epoch']} was kept; "
        f"seed {tuning['seed']}. {energy['seconds']:.0f} s and {energy['kwh']:.3g} kWh{carbon} ({energy['energy']}).",
        "",
    ]


def _licence(model: FineTuned, about: Mapping[str, Any]) -> list[str]:
    base = model.setup.base
    data = ", ".join(str(licence) for licence in about.get("licences", ()) if licence) or "not stated"
    return [
        "## Licences",
        "",
        f"Started from {base.name}, licence: {base.licence or 'none stated'}. {base.terms}".rstrip(),
        "",
        f"Licence of the data: {data}.",
        "",
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.4g}"


def _interval(interval: Mapping[str, float]) -> str:
    low, high = _number(interval["low"]), _number(interval["high"])
    return low if low == high == "-" else f"{low} to {high}"
