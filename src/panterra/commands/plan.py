"""A plan, as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

from panterra.commands.terminal import show_table
from panterra.energy.impact import Figure
from panterra.errors import InputError
from panterra.imagery.choose import Every
from panterra.imagery.providers import find_provider
from panterra.imagery.pull import list_pull
from panterra.imagery.wish import Plan as Wanted
from panterra.imagery.wish import Wish
from panterra.mapping.plan import Imagery, MapPlan


def find_imagery(
    aoi: str, dates: str | None, modalities: Sequence[str], sources: Sequence[str], every: Every
) -> Wanted:
    """Search for the imagery of an area, as `panterra fetch` would choose it, and fetch nothing."""
    if dates is None or not modalities:
        raise InputError("an area needs --dates, such as 2024-01/2024-12, and --modalities")
    wish = Wish(aoi=aoi, dates=dates, modalities=tuple(modalities), every=every)
    return list_pull(wish, [find_provider(name) for name in sources or ["planetary-computer"]])


def show_plan(plan: MapPlan) -> None:
    """Print what a map or embeddings would take."""
    print(
        f"{plan.model}: {plan.rows:,} x {plan.cols:,} patches of {plan.patch_m:g} m, {plan.area_km2:,.4g} km2, "
        f"{plan.windows:,} windows, tiles: {plan.tiles:,}, on {plan.device}\n"
    )
    show_table(
        ["imagery", "items", "dates", "first", "last", "clear dates", "nine in ten have", "never clear"],
        [_imagery(one) for one in plan.imagery],
    )
    volume, stands_for, grid = plan.volume, plan.impact, plan.impact.site.grid
    files = "not known" if volume.files is None else _bytes(volume.files)
    rows = [
        ("files read", files, "" if volume.files is not None else f"at most {_bytes(volume.transferred)} transferred"),
        ("pixels decoded", _bytes(volume.decoded), "exact"),
        ("results written", _bytes(volume.written), "exact, before compression"),
        ("peak memory", f"{plan.peak_memory_gb:.3g} GB", "estimate"),
        ("time", _time(plan.seconds.value), f"{_time(plan.seconds.low)} to {_time(plan.seconds.high)}"),
        ("electricity", *_amount(stands_for.kwh, "kWh")),
        ("CO2e of electricity", *_amount(stands_for.operation_co2e_kg, "kg")),
        ("CO2e of making the machine", *_amount(stands_for.embodied_co2e_kg, "kg")),
        ("water", *_amount(stands_for.water_l, "l")),
    ]
    if plan.cost is not None:
        rows.append(("cost", *_amount(plan.cost, plan.currency or "")))
    print()
    show_table(["what", "estimate", "between"], rows)
    print(f"\nSpeed: {plan.speed.source}. Electricity is {plan.speed.method}; PUE: {stands_for.site.pue_source}.")
    print(
        "No CO2e of electricity: name the country with --country."
        if grid is None
        else f"Grid: {grid.grams_per_kwh:g} g CO2e/kWh ({grid.source})."
    )


def _imagery(one: Imagery) -> tuple[str, ...]:
    first, last = (one.dates[0], one.dates[-1]) if one.dates else ("", "")
    clear = one.clear
    seen = (
        "" if clear is None else f"{clear.mean:.1f}",
        "" if clear is None or clear.least is None else f"{clear.least:g}",
        "" if clear is None or clear.never is None else f"{clear.never:.1%}",
    )
    return one.modality, str(one.items), str(len(one.dates)), first, last, *seen


def _amount(figure: Figure | None, unit: str) -> tuple[str, str]:
    if figure is None:
        return "not known", ""
    return f"{figure.value:.3g} {unit}", f"{figure.low:.3g} to {figure.high:.3g}"


def _bytes(count: int) -> str:
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1000:.3g} kB"


def _time(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
