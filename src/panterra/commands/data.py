"""Making a pretraining corpus, and looking at one."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from panterra.commands.terminal import progress_bar
from panterra.data.build import Built, build_corpus
from panterra.data.composites import STORED
from panterra.data.corpus_plan import MADE_ON_READING, Job
from panterra.data.labelled import DATASETS
from panterra.data.olmoearth_h5 import LENGTH, BandSets, Corpus, open_corpus
from panterra.data.verify import IMPLAUSIBLE, Finding, verify
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.normalize import olmoearth_range
from panterra.models.olmoearth import released_config

PRESENCE = "missing_timesteps_masks"
VALUES = 4096
"""Values per band and sample that are looked at for their range."""
VERSIONS = ("v1", "v1.2")
"""Of OlmoEarth, that cut pixels into tokens in different ways."""


def run_build(out: Path, job: Job, *, workers: int) -> Built:
    """Build a corpus with a progress bar; a stopped build goes on."""
    with progress_bar("building") as progress:
        return build_corpus(out, job, workers=workers, progress=progress)


def parse_shares(texts: Sequence[str]) -> dict[str, float]:
    """Read shares such as "train=0.9"."""
    shares = {}
    for text in texts:
        name, _, share = text.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise InputError(f"{text!r} is no share of a split; write train=0.9 val=0.1") from None
    return shares


def parse_day(text: str | None) -> dt.date | None:
    """Read a day such as "2023-06-01"."""
    try:
        return None if text is None else dt.date.fromisoformat(text)
    except ValueError:
        raise InputError(f"{text!r} is not a date; write it as YYYY-MM-DD") from None


def find_corpora(path: str | Path) -> dict[str, Corpus]:
    """Open a corpus, or the corpora of all splits in a folder that `panterra data build` wrote, by name."""
    root = Path(path)
    report = root / "report.json"
    if report.is_file():
        folders = json.loads(report.read_text(encoding="utf-8"))["corpora"]
        return {name: open_corpus(root / folder) for name, folder in folders.items()}
    if (root / "plan.json").is_file():
        raise InputError(f"{root} is not finished; repeat its panterra data build to go on with it")
    return {root.name: open_corpus(root)}


# Inspection


def inspect_corpus(corpus: Corpus, *, samples: int = 64, patch_px: int = 4) -> dict[str, Any]:
    """Sum up a corpus; ranges, dates and tokens are those of some samples that lie evenly in it.

    Expected ranges are those that OlmoEarth's normalisation turns into 0 to 1.
    """
    chosen = spread(len(corpus), samples)
    seen: dict[str, list[np.ndarray]] = {}
    dates: dict[str, list[int]] = {}
    days: list[dt.date] = []
    tokens: dict[str, list[int]] = {version: [] for version in VERSIONS}
    groups = {version: released_config(version, "nano").groups for version in VERSIONS}
    side = 0
    for index in chosen:
        content = _read_sample(corpus, index)
        days += _days(content["timestamps"])
        stored = {name: content[name] for name in corpus.modalities if name in content}
        for name, pixels in stored.items():
            values = pixels.reshape(-1, pixels.shape[-1])
            seen.setdefault(name, []).append(values[:: max(len(values) // VALUES, 1)])
            if MODALITIES[name].kind == "series":
                dates.setdefault(name, []).append(pixels.shape[2])
                side = pixels.shape[0]
        for version, of in groups.items():
            tokens[version].append(sum(_tokens(name, x.shape, patch_px, of) for name, x in stored.items()))
    return {
        "folder": str(corpus.folder),
        "samples": len(corpus),
        "bytes": sum(path.stat().st_size for path in corpus.folder.iterdir()),
        "tile_px": side,
        "looked_at": len(chosen),
        "first_day": min(days, default=None),
        "last_day": max(days, default=None),
        "latitude": _span(corpus.latlon[:, 0]),
        "longitude": _span(corpus.latlon[:, 1]),
        "degree_squares": len(np.unique(np.floor(corpus.latlon), axis=0)),
        "patch_px": patch_px,
        "tokens": {version: round(float(np.mean(counts))) for version, counts in tokens.items()},
        "modalities": {
            name: {
                "samples": int(corpus.has[:, i].sum()),
                "dates": round(float(np.mean(dates[name])), 1) if name in dates else None,
                **_ranges(name, seen.get(name, [])),
            }
            for i, name in enumerate(corpus.modalities)
        },
    }


def spread(count: int, most: int) -> list[int]:
    """List at most `most` numbers below `count`, evenly."""
    most = min(most, count)
    return [round(i * (count - 1) / max(most - 1, 1)) for i in range(most)]


def _read_sample(corpus: Corpus, index: int) -> dict[str, np.ndarray]:
    path = corpus.path(index)
    try:
        with h5py.File(path, "r") as file:
            return {name: file[name][()] for name in file if name == "timestamps" or name in MODALITIES}
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({_first_line(error)}); see what else is wrong with: panterra data verify"
        ) from None


def _days(timestamps: np.ndarray) -> list[dt.date]:
    return [dt.date(int(year), int(month) + 1, int(day)) for day, month, year in timestamps]


def _span(values: np.ndarray) -> tuple[float, float] | None:
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if len(known) else None


def _tokens(name: str, shape: Sequence[int], patch_px: int, groups: Callable[[str], BandSets]) -> int:
    if MODALITIES[name].kind == "weather":
        return shape[0] * len(groups(name))
    finer = max(1, round(10 / MODALITIES[name].gsd))
    return (shape[0] // (patch_px * finer)) * (shape[1] // (patch_px * finer)) * shape[2] * len(groups(name))


def _ranges(name: str, seen: Sequence[np.ndarray]) -> dict[str, Any]:
    """Compare the middle 96 % of each band with what the normalisation expects, where it knows the modality."""
    if not seen:
        return {"bands": {}, "outside": None}
    values = np.concatenate(seen).astype(np.float64)
    try:
        low, high = (end.numpy() for end in olmoearth_range(name))
    except InputError:
        low = high = np.full(values.shape[1], np.nan)
    found = np.percentile(values, (2, 98), axis=0)
    known = bool(np.isfinite(low).all())
    return {
        "bands": {
            band: {
                "found": [float(found[0, i]), float(found[1, i])],
                "expected": [float(low[i]), float(high[i])] if known else None,
            }
            for i, band in enumerate(MODALITIES[name].band_names)
        },
        "outside": float(((values < low) | (values > high)).mean()) if known else None,
    }


def summary_lines(name: str, about: Mapping[str, Any]) -> list[str]:
    """Say in a few lines what `inspect_corpus` found, but for the modalities."""
    side, tokens = about["tile_px"], about["tokens"]
    counts = ", ".join(f"{count:,} ({version})" for version, count in tokens.items())
    lines = [
        f"{name}: {about['samples']:,} samples of {side} x {side} px, {about['bytes'] / 1e6:,.1f} MB",
        f"dates: {about['first_day']} to {about['last_day']}",
        f"tokens per sample at patches of {about['patch_px']} px: {counts}",
    ]
    if about["latitude"] and about["longitude"]:
        (south, north), (west, east) = about["latitude"], about["longitude"]
        where = f"latitude {south:.2f} to {north:.2f}, longitude {west:.2f} to {east:.2f}"
        lines.insert(1, f"place: {where}, {about['degree_squares']:,} squares of 1 degree")
    return lines


def range_row(name: str, about: Mapping[str, Any]) -> tuple[str, ...]:
    """Show a modality of `inspect_corpus` as a row: name, samples, dates, values found, expected, share outside."""
    bands = about["bands"].values()
    expected = [band["expected"] for band in bands if band["expected"]]
    return (
        name,
        f"{about['samples']:,}",
        "" if about["dates"] is None else f"{about['dates']:g}",
        _between([band["found"] for band in bands]),
        _between(expected),
        "" if about["outside"] is None else f"{about['outside']:.1%}",
    )


def _between(ends: Sequence[Sequence[float]]) -> str:
    return f"{min(e[0] for e in ends):.4g} to {max(e[1] for e in ends):.4g}" if ends else ""


# Verification


def run_verify(target: str, path: Path | None, *, samples: int | None) -> list[Finding]:
    """Check a corpus by its path, or a labelled data set by its name and path; worst first."""
    if path is None:
        if target in DATASETS:
            raise InputError(f"{target} is a data set; say where it lies: panterra data verify {target} PATH")
        with progress_bar("checking") as progress:
            return check_corpora(find_corpora(target), samples=samples, progress=progress)
    return verify(target, path) if samples is None else verify(target, path, samples=samples)


def check_corpora(
    corpora: Mapping[str, Corpus], *, samples: int | None = None, progress: Callable[[int, int], None] | None = None
) -> list[Finding]:
    """Check tables against files, and all files, or some of each corpus: readable, shapes, types, dates, values.

    Equal images, in one corpus or in two, are found among the files that are opened.
    """
    findings: list[Finding] = []
    troubles: dict[str, list[str]] = {}
    images: dict[str, str] = {}
    places: dict[tuple[float, ...], str] = {}
    chosen = [
        (name, corpus, index)
        for name, corpus in corpora.items()
        for index in spread(len(corpus), len(corpus) if samples is None else samples)
    ]
    for corpus in corpora.values():
        findings += _tables(corpus)
    sides: set[int] = set()
    for done, (name, corpus, index) in enumerate(chosen, start=1):
        path = corpus.path(index)
        if path.is_file():
            called = f"{name}/{path.name}"
            for kind, what in _check_file(called, corpus, index, images, places, sides):
                troubles.setdefault(kind, []).append(f"{called} {what}")
        if progress is not None:
            progress(done, len(chosen))
    for kind, where in troubles.items():
        more = f"; so do {len(where) - 1:,} more of {len(chosen):,} files" if len(where) > 1 else ""
        findings.append(Finding(level="warning" if kind.startswith("doubt") else "error", what=where[0] + more))
    if len(sides) > 1:
        findings.append(Finding(level="error", what=f"samples are {', '.join(map(str, sorted(sides)))} px wide"))
    if not troubles:
        findings.append(Finding(level="ok", what=f"{len(chosen):,} files were opened and found in order"))
    return sorted(findings, key=lambda finding: ("error", "warning", "ok").index(finding.level))


def _tables(corpus: Corpus) -> Iterator[Finding]:
    """Compare the tables of a corpus with the files and with the name of its folder."""
    listed = {corpus.path(i).name for i in range(len(corpus))}
    there = {path.name for path in corpus.folder.glob("sample_*.h5")}
    for names, what in ((listed - there, "are listed and not there"), (there - listed, "are there and not listed")):
        if names:
            yield Finding(level="error", what=f"{corpus.folder}: {len(names):,} files {what}, such as {min(names)}")
    if corpus.folder.name.isdigit() and int(corpus.folder.name) != len(corpus):
        yield Finding(
            level="error",
            what=f"{corpus.folder} is named after {corpus.folder.name} samples; its table lists {len(corpus):,}",
        )
    unknown = [name for name in corpus.modalities if name not in MODALITIES]
    if unknown:
        yield Finding(level="warning", what=f"{corpus.folder}: modality {unknown[0]!r} is not known and not checked")
    empty = [name for i, name in enumerate(corpus.modalities) if not corpus.has[:, i].any()]
    if empty:
        yield Finding(level="warning", what=f"{corpus.folder}: no sample has {', '.join(empty)}")
    if not np.isfinite(corpus.latlon).all():
        yield Finding(level="warning", what=f"{corpus.folder} has no latlon_distribution.npy for all samples")
    if listed == there:
        yield Finding(level="ok", what=f"{corpus.folder}: {len(corpus):,} samples, as its table says")


def _check_file(
    called: str,
    corpus: Corpus,
    index: int,
    images: dict[str, str],
    places: dict[tuple[float, ...], str],
    sides: set[int],
) -> Iterator[tuple[str, str]]:
    """Name what is wrong with a sample: a kind, and a sentence without its subject; "doubt" is no error."""
    try:
        with h5py.File(corpus.path(index), "r") as file:
            content = {name: file[name][()] for name in file if name != PRESENCE}
            present = {name: which[()] for name, which in file.get(PRESENCE, {}).items()}
    except OSError as error:
        yield "unreadable", f"cannot be read ({_first_line(error)})"
        return
    except KeyError as error:
        yield "unreadable", f"lacks {error}"
        return
    missing = [name for name in ("latlon", "timestamps") if name not in content]
    if missing:
        yield "incomplete", f"has no {missing[0]}"
        return
    latlon, timestamps = content.pop("latlon"), content.pop("timestamps")
    yield from _check_place(latlon, corpus.latlon[index])
    yield from _check_dates(timestamps)
    listed = {name for i, name in enumerate(corpus.modalities) if corpus.has[index, i]}
    if set(content) != listed:
        yield "table", f"holds {', '.join(sorted(content))}; its table says {', '.join(sorted(listed))}"
    series = [name for name in sorted(content) if name in MODALITIES and MODALITIES[name].kind == "series"]
    for name in sorted(set(content) & set(MODALITIES)):
        yield from _check_pixels(name, content[name], present.get(name))
        if name in series and content[name].shape[0] == content[name].shape[1]:
            sides.add(content[name].shape[0] // max(1, round(10 / MODALITIES[name].gsd)))
    if series:
        images_of = hashlib.sha256()
        for name in series:
            images_of.update(name.encode() + content[name].tobytes())
        same = images.setdefault(images_of.hexdigest(), called)
        if same != called:
            yield "twin", f"has the same images as {same}"
    same = places.setdefault((*map(float, latlon), *map(float, timestamps.ravel())), called)
    if same != called:
        yield "place", f"shows the same place and time as {same}"


def _check_place(latlon: np.ndarray, listed: np.ndarray) -> Iterator[tuple[str, str]]:
    if latlon.shape != (2,) or not (np.abs(latlon) <= (90, 180)).all():
        yield "latlon", f"has latlon {latlon.tolist()}; wanted latitude and longitude in degrees"
    elif np.isfinite(listed).all() and np.abs(latlon - listed).max() > 1e-3:
        yield "latlon table", f"lies at {latlon.tolist()}; latlon_distribution.npy says {listed.tolist()}"


def _check_dates(timestamps: np.ndarray) -> Iterator[tuple[str, str]]:
    if timestamps.ndim != 2 or timestamps.shape[1] != 3 or not 1 <= len(timestamps) <= LENGTH:
        yield "timestamps", f"has timestamps of shape {list(timestamps.shape)}; wanted [{LENGTH}, 3]"
        return
    try:
        days = _days(timestamps)
    except ValueError as error:
        yield "timestamps", f"has a timestamp that is no day 1-31, month 0-11, year ({error})"
        return
    if any(later < earlier for earlier, later in pairwise(days)):
        yield "order", "has timestamps that go back in time"


def _check_pixels(name: str, pixels: np.ndarray, present: np.ndarray | None) -> Iterator[tuple[str, str]]:
    spec = MODALITIES[name]
    axes = 2 if spec.kind == "weather" else 4
    if pixels.ndim != axes or pixels.shape[-1] != len(spec.bands):
        wanted = f"{'[date' if axes == 2 else '[row, column, date'}, {len(spec.bands)} bands]"
        yield f"shape {name}", f"has {name} of shape {list(pixels.shape)}; wanted {wanted}"
        return
    if axes == 4 and pixels.shape[0] != pixels.shape[1]:
        yield f"square {name}", f"has {name} of {pixels.shape[0]} x {pixels.shape[1]} pixels; wanted a square"
    if spec.kind == "series" and present is not None and (present.shape != (LENGTH,) or present.dtype != np.bool_):
        yield f"mask {name}", f"has a mask of {name} of {present.dtype} {list(present.shape)}; wanted bool [{LENGTH}]"
    elif spec.kind == "series" and present is not None and int(present.sum()) != pixels.shape[2]:
        yield f"mask {name}", f"has {pixels.shape[2]} dates of {name}; its mask says {int(present.sum())}"
    elif spec.kind == "series" and present is None and pixels.shape[2] != LENGTH:
        yield f"mask {name}", f"has {pixels.shape[2]} dates of {name} and no mask that says which"
    if name in MADE_ON_READING:
        yield f"doubt made {name}", f"stores {name}, which is made on reading"
    wanted_type = np.dtype(STORED.get(name, np.float32))
    if pixels.dtype.kind not in "iuf":
        yield f"type {name}", f"has {name} as {pixels.dtype}; wanted {wanted_type}"
        return
    if pixels.dtype != wanted_type:
        yield f"doubt type {name}", f"has {name} as {pixels.dtype}; the published corpus has {wanted_type}"
    if not np.isfinite(pixels).all():
        yield f"finite {name}", f"has {name} that is not finite"
        return
    if spec.plausible is not None and pixels.size:
        low, high = spec.plausible
        outside = float(((pixels < low) | (pixels > high)).mean())
        if outside > IMPLAUSIBLE:
            span = f"{float(pixels.min()):.4g} to {float(pixels.max()):.4g}"
            yield (
                f"doubt range {name}",
                f"has {name} from {span}, {outside:.0%} of it outside the plausible {low:g} to {high:g} ({spec.unit})",
            )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
