"""What the data hold against what a model expects."""

from __future__ import annotations

import datetime as dt
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pystac
import rasterio
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.imagery.files import in_file_order, same_ground, sample_windows, spread
from panterra.imagery.items import CONVERSIONS, MASKS, OWN_MASKS, SceneAsset, SceneBand, SceneItem
from panterra.imagery.naming import match_band
from panterra.imagery.raster import grid_of, read_onto
from panterra.imagery.stac import SUBSTITUTES, Scene, make_item, open_scene, save_scene
from panterra.imagery.units import FileUnit, darkest_pixels, file_units, offset_kept, plausible_units, to_declared
from panterra.modalities import MODALITIES, Modality

Level = Literal["ok", "note", "warning", "error"]
Numbers = npt.NDArray[np.float32]

WINDOWS = 20
"""Windows of 128 x 128 pixels or small whole images that are read of each modality."""

BASELINE_4 = dt.date(2022, 1, 25)
"""Since then ESA adds 1000 to Sentinel-2's numbers (processing baseline 04.00), and to older data reprocessed since."""

FIRST_DATA = {
    "sentinel2_l2a": dt.date(2015, 6, 23),
    "sentinel2": dt.date(2015, 6, 23),
    "sentinel1": dt.date(2014, 4, 3),
    "landsat": dt.date(2013, 2, 11),
    "landsat7": dt.date(1999, 4, 15),
    "hls": dt.date(2013, 2, 11),
    "modis": dt.date(1999, 12, 18),
    "alos2": dt.date(2014, 5, 24),
}
"""The launch of each sensor."""

FAR = 3.0
"""Standard deviations by which a channel's mean may differ from what a model standardises by, without a warning."""
SPREAD = 5.0
"""The factor by which its standard deviation may."""

Moments = Mapping[str, tuple[float, float]]
"""Mean and standard deviation of each channel by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What `repair` does to some items: the values as they read now become those of `unit`, bands get other names."""

    items: frozenset[str]
    unit: FileUnit | None = None
    names: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """(href, band in the file) -> name of the band."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: how it stands, and what to do."""

    level: Level
    modality: str
    what: str
    fix: str = ""
    change: Change | None = None

    @property
    def exact(self) -> bool:
        """Whether `repair` can put it right without loss."""
        return self.change is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Numbers of one item, in the declared unit as its metadata say."""

    item: SceneItem
    bands: dict[str, Numbers]
    """[N] of each band that the item has, the same pixels in all, NaN where not data."""

    @property
    def pooled(self) -> Numbers:
        """All valid numbers."""
        every: Numbers = np.concatenate(list(self.bands.values()))
        return every[np.isfinite(every)]

    @property
    def valid_share(self) -> float:
        every = np.stack(list(self.bands.values()))
        return float(np.isfinite(every).all(axis=0).mean())


def examine(scene: Scene, modalities: Sequence[str] | None = None) -> list[Finding]:
    """Look for mismatches between what a scene holds and what its modalities declare, in at most a few windows.

    Without `modalities`, all of the scene. Worst first.
    """
    findings = [
        Finding(level="warning", modality="", what=f"cannot be used: {reason}", fix="correct the item or leave it out")
        for reason in scene.unsupported
    ]
    if modalities is not None and not set(modalities) & set(scene.modalities):
        what, fix = nothing_shared(scene.modalities, modalities)
        findings.append(Finding(level="error", modality="", what=what, fix=fix))
    for name in modalities if modalities is not None else scene.modalities:
        if name in scene.modalities:
            found = list(_examine(scene, name))
            findings += found
            if not any(f.level in ("warning", "error") for f in found):
                findings.append(_in_order(scene, name))
        else:
            findings.append(
                Finding(level="note", modality=name, what="the scene has none", fix="fetch it, or go without")
            )
    return worst_first(findings)


def nothing_shared(holds: Collection[str], wanted: Collection[str]) -> tuple[str, str]:
    """Say that imagery has none of the modalities that a model looks at, and what to do."""
    what = f"there is {', '.join(holds)}, and none of {', '.join(wanted)}"
    if "sentinel2" in holds and "sentinel2_l2a" in wanted:
        return what, "sentinel2 is level 1C, with the air still in it: take the same dates in level 2A"
    return what, "take imagery of one of these, or another model"


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Sort by level; stable, so that conversions stay in the order in which they apply."""
    order: list[Level] = ["error", "warning", "note", "ok"]
    return sorted(findings, key=lambda finding: order.index(finding.level))


def compare_statistics(modality: str, here: Moments, given: Moments, whose: str) -> list[Finding]:
    """Show by what a model standardises a modality, and warn where the scene is far from it.

    `here` are the scene's own statistics; `given` those that `whose` brings along, empty where the scene's are used.
    """
    used = given or here
    listed = ", ".join(f"{channel} {mean:.4g} ± {std:.3g}" for channel, (mean, std) in used.items())
    source = f"the statistics of {whose}" if given else "the scene's own statistics"
    findings = [Finding(level="note", modality=modality, what=f"standardised by {source}: {listed}")]
    for channel, (mean, std) in given.items():
        found, spread = here[channel]
        what = f"{channel} is {found:.4g} ± {spread:.3g} in the scene, {mean:.4g} ± {std:.3g} in {whose}"
        if abs(found - mean) > FAR * std or not std / SPREAD <= spread <= std * SPREAD:
            fix = "check units, offset and season of the scene; if they are right, fit to scenes like this one"
            findings.append(Finding(level="warning", modality=modality, what=what, fix=fix))
    return findings


def repair(scene: Scene, findings: Sequence[Finding], out: str | Path) -> Scene:
    """Write a scene of the same files with metadata that put the exact findings right; no pixel is copied."""
    changes = [finding.change for finding in findings if finding.change is not None]
    items = []
    for item in scene.items:
        for change in changes:
            if item.id in change.items:
                item = replace(item, assets=tuple(_changed(asset, change) for asset in item.assets))
        items.append(_as_stac(item))
    save_scene(out, items, title=scene.title or Path(out).name, licence=scene.licence)
    return open_scene(out, fill_missing_bands=scene.fill_missing_bands, apply_masks=scene.apply_masks)


def _examine(scene: Scene, name: str) -> Iterator[Finding]:
    items = [item for item in scene.items if item.modality == name]
    yield from _dates(name, items)
    yield from _bands(scene, name, items)
    yield from _grids(name, items)
    named = list(_names(name, items))
    yield from named
    for change in (finding.change for finding in named if finding.change is not None):
        items = [replace(item, assets=tuple(_changed(asset, change) for asset in item.assets)) for item in items]
    samples = sampled(scene, items)
    yield from _gaps(name, samples)
    samples = [sample for sample in samples if sample.pooled.size >= 100]
    if not samples:
        return
    unit, samples = _unit(name, items, samples)
    yield from unit
    if any(finding.level == "error" and not finding.exact for finding in unit):
        return
    if name in ("sentinel2", "sentinel2_l2a"):
        yield from _offset(name, items, samples)
    yield from _order(name, samples)


def _in_order(scene: Scene, name: str) -> Finding:
    dates = scene.dates(name)
    when = f"{dates[0]}" if len(dates) == 1 else f"{len(dates)} dates from {dates[0]} to {dates[-1]}"
    return Finding(level="ok", modality=name, what=f"{when}; units, offsets and bands are as expected")


# Metadata -------------------------------------------------------------------------------------------------------------


def _dates(name: str, items: Sequence[SceneItem]) -> Iterator[Finding]:
    spec, days = MODALITIES[name], sorted({item.date for item in items})
    early = [day for day in days if day < FIRST_DATA.get(name, dt.date(1972, 7, 23)) and spec.kind == "series"]
    if early:
        yield Finding(
            level="error",
            modality=name,
            what=f"{_listing(early)}: dates before the sensor flew, so the dates are missing or wrong",
            fix="give the true ones, with fetch --from-files --dates",
        )
    repeats = [
        f"{one.id} and {other.id}"
        for day in days
        for one, other in _pairs([item for item in items if item.date == day])
        if one.grid and other.grid and same_ground(one.grid, other.grid) and set(one.bands) & set(other.bands)
    ]
    if repeats and spec.kind == "series":
        yield Finding(
            level="warning",
            modality=name,
            what=f"the same place twice at one date: {_listing(repeats)}; only the first is seen where both are valid",
            fix="leave one out, or correct its date",
        )
    if [item.date for item in items] != sorted(item.date for item in items):
        yield Finding(level="note", modality=name, what="the items are out of order; they are read by date")
    if spec.kind == "still" and len(days) > 1:
        yield Finding(
            level="note",
            modality=name,
            what=f"{len(days)} dates, of which the newest is read: {days[-1]}",
            fix="for another date make a scene of its files",
        )
    if spec.kind != "series":
        return
    if len(days) == 1:
        yield Finding(
            level="note",
            modality=name,
            what="one date only; what changes over the year cannot be seen",
            fix="add dates, such as one a month",
        )
    steps = [(after - before).days for before, after in itertools.pairwise(days)]
    if len(days) >= 4 and max(steps) > max(3 * float(np.median(steps)), 45):
        at = int(np.argmax(steps))
        yield Finding(level="note", modality=name, what=f"no image from {days[at]} to {days[at + 1]}", fix="add dates")


def _pairs(items: Sequence[SceneItem]) -> Iterator[tuple[SceneItem, SceneItem]]:
    return ((one, other) for i, one in enumerate(items) for other in items[i + 1 :])


def _bands(scene: Scene, name: str, items: Sequence[SceneItem]) -> Iterator[Finding]:
    missing = scene.missing_bands(name)
    if not missing:
        return
    lacking = sum(not set(missing) <= set(item.bands) for item in items)
    who = "" if lacking == len(items) else f" in {lacking} of {len(items)} items"
    stand_ins = SUBSTITUTES.get(name, {}) if scene.fill_missing_bands else {}
    without = [band for band in missing if not _stand_in(band, items, stand_ins)]
    if without:
        yield Finding(
            level="error",
            modality=name,
            what=f"{_listing(without)} missing{who}, and no other band may stand in",
            fix="add the files of these bands, or leave the modality out",
        )
    filled = [f"{band} ({_stand_in(band, items, stand_ins)})" for band in missing if band not in without]
    if filled:
        yield Finding(
            level="note",
            modality=name,
            what=f"missing{who}, with the band that stands in: {_listing(filled)}",
            fix="add the files of these bands; open_scene(..., fill_missing_bands=False) refuses stand-ins",
        )


def _stand_in(band: str, items: Sequence[SceneItem], stand_ins: Mapping[str, str]) -> str | None:
    """Name the band that stands in for one in every item that lacks it."""
    for _ in range(2):
        band = stand_ins.get(band, band)
        if all(band in item.bands for item in items):
            return band
    return None


def _grids(name: str, items: Sequence[SceneItem]) -> Iterator[Finding]:
    grids = [item.grid for item in items if item.grid is not None]
    systems = {grid.crs for grid in grids}
    if len(systems) > 1:
        what = f"{len(systems)} coordinate reference systems; all but one are resampled"
        yield Finding(level="note", modality=name, what=what)
    spec = MODALITIES[name]
    # NAIP comes at 0.6 m, but one of its modalities wants 2.5 m.
    finest = max(min(band.gsd for band in spec.bands), min(spec.gsd, 10))
    sizes = [_metres(grid) for grid in grids]
    if sizes and min(sizes) > 2.5 * finest and spec.kind != "weather":
        yield Finding(
            level="note",
            modality=name,
            what=f"pixels of {min(sizes):.3g} m, where {finest:g} m are wanted; detail is lost",
            fix="take the images at their own resolution",
        )


def _metres(grid: GeoBox) -> float:
    side = math.sqrt(abs(grid.affine.determinant))
    return side if grid.crs is None or grid.crs.projected else side * 111_320


def _names(name: str, items: Sequence[SceneItem]) -> Iterator[Finding]:
    """Hold the band names in the metadata against those in the files."""
    spec = MODALITIES[name]
    wrong = [item for item in (items[i] for i in spread(len(items), WINDOWS)) if _contradictions(item, spec)]
    if not wrong:
        return
    names = {key: band for item in items for key, band in _contradictions(item, spec).items()}
    (href, index), band = next(iter(names.items()))
    said = next(b.name for item in items for a in item.assets if a.href == href for b in a.bands if b.index == index)
    yield Finding(
        level="error",
        modality=name,
        what=f"{Path(href).name} calls its band {index} {band}, the scene calls it {said}",
        fix="take the names of the files",
        change=Change(items=frozenset(item.id for item in items), names=names),
    )


def _contradictions(item: SceneItem, spec: Modality) -> dict[tuple[str, int], str]:
    """Find the bands that their local file names differently, provided that its names are without repeats."""
    found: dict[tuple[str, int], str] = {}
    for asset in item.assets:
        if "://" in asset.href or asset.href.startswith("/vsi"):
            continue
        with rasterio.open(asset.href) as source:
            said = {b.index: match_band(source.descriptions[b.index - 1] or "", spec) for b in asset.bands}
        named = [band for band in said.values() if band is not None]
        if len(set(named)) == len(named) == len(asset.bands):
            found |= {(asset.href, b.index): str(said[b.index]) for b in asset.bands if said[b.index] != b.name}
    return found


# Numbers --------------------------------------------------------------------------------------------------------------


def sampled(scene: Scene, items: Sequence[SceneItem]) -> list[Sample]:
    """Look into some of the items, spread over the dates, and in some windows of each."""
    chosen = [items[i] for i in spread(len(items), WINDOWS)]
    each = max(1, WINDOWS // len(chosen))
    return [_sample(scene, item, number, each) for number, item in enumerate(chosen)]


def _sample(scene: Scene, item: SceneItem, number: int, count: int) -> Sample:
    """Read some windows of an item on its own finest grid; others in each item, so that they cover more ground."""
    grid = _finest(item)
    windows = sample_windows(*grid.shape)
    count = min(count, len(windows))
    parts = []
    for i in range(count):
        window = windows[(number + i * (len(windows) // count)) % len(windows)]
        rows = slice(window.row_off, window.row_off + window.height)
        cols = slice(window.col_off, window.col_off + window.width)
        parts.append(_read(scene, item, grid[rows, cols]))
    return Sample(item=item, bands={band: np.concatenate([part[band] for part in parts]) for band in item.bands})


def _finest(item: SceneItem) -> GeoBox:
    return item.grid or min((grid_of(a.href) for a in item.assets), key=lambda grid: abs(grid.affine.determinant))


def _read(scene: Scene, item: SceneItem, box: GeoBox) -> dict[str, Numbers]:
    """Read the bands that an item has, with no stand-ins; NaN where not data."""
    spec = MODALITIES[item.modality]
    clear = np.ones(box.shape, np.bool_)
    if item.mask is not None and scene.apply_masks:
        codes, known = read_onto(item.mask[0], box, bands=[1], categorical=True, scale=1.0, offset=0.0)
        clear = MASKS[item.mask[1]](codes[0]) & known[0]
    found: dict[str, Numbers] = {}
    for asset in item.assets:
        for band in asset.bands:
            values, valid = read_onto(
                asset.href,
                box,
                bands=[band.index],
                categorical=spec.categorical,
                nodata=band.nodata,
                scale=band.scale,
                offset=band.offset,
            )
            if band.unit not in (None, spec.unit):
                values = CONVERSIONS[str(band.unit), spec.unit](values)
            found[band.name] = np.where(valid[0] & clear, values[0], np.float32(np.nan)).ravel()
    return found


def _gaps(name: str, samples: Sequence[Sample]) -> Iterator[Finding]:
    shares = [sample.valid_share for sample in samples]
    if not any(shares):
        yield Finding(
            level="error",
            modality=name,
            what="no valid pixel in any of the windows that were looked at",
            fix="check nodata and masks; open_scene(..., apply_masks=False) shows what lies under clouds",
        )
        return
    empty = [str(sample.item.date) for sample, share in zip(samples, shares, strict=True) if share == 0]
    if empty:
        yield Finding(level="note", modality=name, what=f"no valid pixel was found at {_listing(empty)}")
    if np.mean(shares) < 0.5:
        level: Level = "warning" if np.mean(shares) < 0.05 else "note"
        yield Finding(level=level, modality=name, what=f"{1 - np.mean(shares):.0%} of the pixels looked at are no data")
    for sample in samples:
        values = np.stack(list(sample.bands.values()))
        alike = (values == values[:1]).all(axis=0)
        if len(values) >= 4 and MODALITIES[name].unit == "reflectance_1e4" and alike.mean() > 0.01:
            yield Finding(
                level="warning",
                modality=name,
                what=f"{alike.mean():.0%} of {sample.item.id} is {values[0][alike][0]:g} in all bands, counted as data",
                fix="declare that number as the nodata of the files",
            )
            return


def _unit(name: str, items: Sequence[SceneItem], samples: list[Sample]) -> tuple[list[Finding], list[Sample]]:
    """Hold the numbers against the declared unit; return the samples as they read once the unit is right."""
    declared = next(iter(file_units(name)))
    pooled = np.concatenate([sample.pooled for sample in samples])
    fitting = plausible_units(name, pooled)
    low, high = np.percentile(pooled, (2, 98))
    mostly = f"numbers of mostly {low:.4g} to {high:.4g}"
    if declared in fitting:
        # Items of another unit among others hide in the pool.
        other = {s.item.id: plausible_units(name, s.pooled) for s in samples}
        astray = [s for s in samples if len(other[s.item.id]) == 1 and declared not in other[s.item.id]]
        if not astray:
            return [], samples
        unit = other[astray[0].item.id][0]
        ids = frozenset(s.item.id for s in astray)
        what = f"{len(astray)} of the {len(samples)} items looked at read as {file_units(name)[unit].about}"
        if len(samples) == len(items):
            change = Change(items=ids, unit=file_units(name)[unit])
            finding = _wrong_unit(name, f"{what}: {_listing(sorted(ids))}", unit, change)
            fixed = [_converted(s, name, file_units(name)[unit]) if s.item.id in ids else s for s in samples]
            return [finding], fixed
        return [_wrong_unit(name, what, unit, None)], samples
    if normalised(name, samples):
        what = f"{mostly}, alike in all bands: already normalised"
        fix = "give the measured values, or load the model with normalized_input=True"
        return [Finding(level="error", modality=name, what=what, fix=fix)], samples
    if len(fitting) == 1:
        unit = fitting[0]
        change = Change(items=frozenset(item.id for item in items), unit=file_units(name)[unit])
        finding = _wrong_unit(name, f"{mostly} are {file_units(name)[unit].about}, not {declared}", unit, change)
        return [finding], [_converted(sample, name, file_units(name)[unit]) for sample in samples]
    if MODALITIES[name].unit == "reflectance_1e4" and pooled.min() >= 0 and 1 < pooled.max() <= 255:
        what, fix = f"{mostly}: a picture of 8 bits, not measurements", "take the measured product; 8 bits have lost it"
    else:
        what = f"{mostly} are not {name} in any known unit ({', '.join(file_units(name))})"
        fix = "say with raster:scale and raster:offset how they become the declared unit"
    return [Finding(level="error", modality=name, what=what, fix=fix)], samples


def _wrong_unit(name: str, what: str, unit: str, change: Change | None) -> Finding:
    fix = f"declare them as {unit}, which is converted exactly"
    return Finding(level="error", modality=name, what=what, fix=fix, change=change)


def _converted(sample: Sample, name: str, unit: FileUnit) -> Sample:
    return replace(sample, bands={band: to_declared(name, values, unit) for band, values in sample.bands.items()})


def normalised(name: str, samples: Sequence[Sample]) -> bool:
    """Tell numbers that were already centred and scaled band by band: no band differs much from the others."""
    spec = MODALITIES[name]
    if spec.unit not in ("reflectance_1e4", "db", "dn") or len(samples[0].bands) < 2:
        return False
    bands = [np.concatenate([s.bands[b] for s in samples if b in s.bands]) for b in samples[0].bands]
    middles = np.array([np.nanmedian(band) for band in bands])
    spreads = np.array([np.nanstd(band) for band in bands])
    low = min(float(np.nanpercentile(band, 2)) for band in bands)
    centred = low < 0 and np.abs(middles).max() < 1.5 and spreads.min() > 0.1 and spreads.max() < 4
    # Between 0 and 1 the middles of real reflectances and powers lie far apart: blue and infrared, VH and VV.
    squeezed = middles.min() > 0.25 and middles.max() < 0.75 and middles.max() < 1.6 * middles.min()
    return bool(centred or (squeezed and low > -1))


def _offset(name: str, items: Sequence[SceneItem], samples: Sequence[Sample]) -> Iterator[Finding]:
    """Look at the darkest pixels for the 1000 that ESA adds since baseline 04.00."""
    found = [(sample.item.date, offset_kept(sample.bands)) for sample in samples]
    kept, removed, twice = (
        [day for day, answer in found if answer == wanted] for wanted in ("kept", "removed", "removed twice")
    )
    for days, against, term in ((kept, removed + twice, -1000.0), (twice, removed + kept, 1000.0)):
        if not days:
            continue
        # A date or two of haze among clear ones look as if the offset were there.
        if against and not (min(days) >= BASELINE_4 > max(against)):
            if len(days) < 0.5 * len(found):
                continue
            chosen = None
        else:
            chosen = frozenset(item.id for item in items if not against or item.date >= BASELINE_4)
        darkest = min(min(darkest_pixels(s.bands).values(), default=math.inf) for s in samples if s.item.date in days)
        yield Finding(
            level="error" if chosen else "warning",
            modality=name,
            what=(
                f"the darkest pixels read {darkest:.0f}: the offset of 1000 of processing baseline 04.00 is still in"
                if term < 0
                else f"the darkest pixels read {darkest:.0f}: the offset of 1000 was taken away twice"
            )
            + (f", at {_listing(sorted(set(days)))}" if against else ""),
            fix="take 1000 (reflectance 0.1) away from every value" if term < 0 else "add 1000 to every value again",
            change=Change(items=chosen, unit=FileUnit(about="without its offset", offset=term)) if chosen else None,
        )


def _order(name: str, samples: Sequence[Sample]) -> Iterator[Finding]:
    """Look for bands in each other's place, by what no surface on Earth looks like."""
    shared = set.intersection(*(set(sample.bands) for sample in samples))
    bands = {band: np.concatenate([sample.bands[band] for sample in samples]) for band in shared}
    for one, other in swapped(name, bands):
        yield Finding(
            level="error",
            modality=name,
            what=f"{one} and {other} look as if they stood in each other's place",
            fix="check the order of the bands, and give it with fetch --from-files --bands",
        )


def swapped(name: str, bands: Mapping[str, Numbers]) -> list[tuple[str, str]]:
    """Name pairs of bands that cannot be what they are called, from pixels [N] of each."""
    spec = MODALITIES[name]
    if name == "sentinel1" and {"vv", "vh"} <= set(bands):
        # Cross-polarised echoes are weaker by 4 to 10 dB.
        return [("vv", "vh")] if np.nanmedian(bands["vh"] - bands["vv"]) > 1 else []
    if spec.unit != "reflectance_1e4":
        return []
    colours = {band.common or band.name: band.name for band in spec.bands if band.name in bands}
    colours["nir"] = colours.get("nir", colours.get("nir08", ""))
    value = {colour: bands[band] for colour, band in colours.items() if band}
    found = []
    with np.errstate(invalid="ignore", divide="ignore"):
        if {"red", "green", "nir"} <= set(value):
            red, green, nir = value["red"], value["green"], value["nir"]
            # Nothing on land is bright in red alone; muddy water is, but its green follows and its SWIR is dark.
            alone = (red > 1500) & (red > 2 * nir) & (green < 0.75 * red)
            if "swir16" in value:
                alone &= value["swir16"] > 0.25 * red
            if _share(alone, red) > 0.02:
                found.append((colours["red"], colours["nir"]))
        if {"red", "blue", "nir", "swir16"} <= set(value) and name != "sentinel2" and not found:
            red, blue, nir, swir = (value[c] for c in ("red", "blue", "nir", "swir16"))
            # Soil brightens from blue to red wherever it lies.
            soil = (swir > 0.9 * nir) & (nir > 1200) & (red < 5000) & (blue < 5000)
            if _share(soil, red) > 0.01 and np.nanmedian((blue / red)[soil]) > 1.25:
                found.append((colours["blue"], colours["red"]))
        for one, other, least, most in (("B08", "B8A", 0.7, 1.45), ("B12", "B11", 0.0, 1.3)):
            if name.startswith("sentinel2") and {one, other} <= set(bands):
                land = (bands[one] > 1000) & (bands[one] < 5000)
                if _share(land, bands[one]) > 0.01:
                    ratio = float(np.nanmedian((bands[one] / bands[other])[land]))
                    found += [] if least < ratio < most else [(one, other)]
    return found


def _share(chosen: npt.NDArray[np.bool_], among: Numbers) -> float:
    return float(chosen.sum() / max(np.isfinite(among).sum(), 1))


# Repair ---------------------------------------------------------------------------------------------------------------


def _changed(asset: SceneAsset, change: Change) -> SceneAsset:
    bands = [replace(band, name=change.names.get((asset.href, band.index), band.name)) for band in asset.bands]
    if change.unit is not None:
        bands = [_rescaled(asset.href, band, change.unit) for band in bands]
    return replace(asset, bands=tuple(bands))


def _rescaled(href: str, band: SceneBand, unit: FileUnit) -> SceneBand:
    """Compose what the metadata do to a raw number with one more conversion."""
    scale, offset = band.scale, band.offset
    if scale is None or offset is None:
        with rasterio.open(href) as source:
            scale = source.scales[band.index - 1] if scale is None else scale
            offset = source.offsets[band.index - 1] if offset is None else offset
    if band.unit == "reflectance":
        scale, offset = scale * 1e4, offset * 1e4
    now = unit.unit or (None if band.unit == "reflectance" else band.unit)
    return replace(band, scale=scale * unit.scale, offset=offset * unit.scale + unit.offset, unit=now)


def _as_stac(item: SceneItem) -> pystac.Item:
    assets: dict[str, SceneAsset | str | Path] = {
        "_".join(band.name for band in asset.bands): replace(asset, bands=in_file_order(asset.bands))
        for asset in item.assets
    }
    if item.mask is not None:
        href, kind = item.mask
        key = next((key for key, codes in OWN_MASKS.items() if codes == kind), None)
        if key is None:
            raise InputError(f"item {item.id} has a mask of kind {kind!r}, which cannot be kept; fetch the scene first")
        assets[key] = href
    return make_item(item.id, item.modality, item.date, _finest(item), assets)


def _listing(things: Sequence[object], most: int = 6) -> str:
    shown = ", ".join(map(str, things[:most]))
    return shown if len(things) <= most else f"{shown} and {len(things) - most} more"
