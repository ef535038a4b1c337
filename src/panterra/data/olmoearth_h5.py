"""OlmoEarth's pretraining corpus: one HDF5 file per place, beside tables of what is where."""

from __future__ import annotations

import csv
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from panterra.errors import InputError
from panterra.modalities import MODALITIES

try:  # registers the zstd filter; reading and writing say so where it is needed and absent
    import hdf5plugin
except ImportError:
    hdf5plugin = None  # type: ignore[assignment]

LENGTH = 12
"""Most dates of a sample."""
TOKEN_BUDGET = 2250
MISSING = -99999.0
"""What stands for a value that is not there, before and after normalisation."""
ZSTD_FILTER = 32015
WORLDCOVER_CODES = (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100)
SOURCE = {"ndvi": "sentinel2_l2a", "worldcover_onehot": "worldcover"}
"""Modalities that are made when read, and what of."""
_PRESENCE = "missing_timesteps_masks"  # True where a date is present, in spite of the name

BandSets = tuple[tuple[str, ...], ...]
Groups = Callable[[str], BandSets]
"""Says which bands of a modality share a token, as `OlmoEarthConfig.groups` does."""
Normalise = Callable[[Float[Tensor, "*grid c"], str], Float[Tensor, "*grid c"]]
"""Normalises values whose last axis is the band, as `normalize_olmoearth` does."""
Rng = np.random.Generator | np.random.RandomState


# Layout on disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One place as it is stored: raw values without gaps."""

    latlon: tuple[float, float]
    timestamps: Int[np.ndarray, "t 3"]
    """Day 1-31, month 0-11, year."""
    pixels: Mapping[str, np.ndarray]
    """[H, W, T, C] (T = 1 for maps), or [T, C] for weather; series hold the dates of `present` only."""
    present: Mapping[str, Bool[np.ndarray, " 12"]] = field(default_factory=dict)
    """For each series, which of the timestamps it has; all of them where it is not listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A folder of samples."""

    folder: Path
    modalities: tuple[str, ...]
    """The columns of the table, in its order."""
    has: Bool[np.ndarray, "n m"]
    """Which sample has which modality."""
    latlon: Float[np.ndarray, "n 2"]

    def __len__(self) -> int:
        return len(self.has)

    def path(self, index: int) -> Path:
        """Say where a sample lies."""
        return self.folder / f"sample_{index}.h5"

    def usable(
        self, modalities: Sequence[str], *, fraction: float = 1.0, seed: int = 0, only: Iterable[int] | None = None
    ) -> Int[np.ndarray, " k"]:
        """List the samples that have at least one of the series asked for, or a random fraction of them, sorted."""
        stored = [SOURCE.get(m, m) for m in modalities if MODALITIES[m].kind == "series"]
        kept = self.has[:, [self.modalities.index(m) for m in stored if m in self.modalities]].any(1)
        if only is not None:
            listed = np.zeros_like(kept)
            listed[list(only)] = True
            kept &= listed
        indices = np.flatnonzero(kept)
        if fraction < 1:
            rng = np.random.Generator(np.random.PCG64(seed))
            indices = np.sort(rng.choice(indices, int(len(indices) * fraction), replace=False))
        return indices


def open_corpus(folder: str | Path) -> Corpus:
    """Open a corpus: the folder that holds `sample_metadata.csv`, or one above it that leads to just one."""
    folder = Path(folder)
    found = [folder] if (folder / "sample_metadata.csv").is_file() else sorted(_tables_below(folder))
    if len(found) != 1:
        what = f"{len(found)} corpora" if found else "no sample_metadata.csv"
        raise InputError(f"{folder} holds {what}; give the folder with sample_metadata.csv and the sample_*.h5 files")
    folder = found[0]
    with (folder / "sample_metadata.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    table = np.array(rows, dtype=np.int64).reshape(-1, len(head))
    table = table[np.argsort(table[:, head.index("sample_index")])]
    columns = [i for i, name in enumerate(head) if name != "sample_index"]
    latlon_path = folder / "latlon_distribution.npy"
    latlon = np.load(latlon_path) if latlon_path.is_file() else np.full((len(table), 2), np.nan)
    if len(latlon) != len(table) or not np.array_equal(table[:, head.index("sample_index")], np.arange(len(table))):
        raise InputError(
            f"{folder} is incomplete: its tables name {len(table)} and {len(latlon)} samples; copy it again"
        )
    return Corpus(
        folder=folder,
        modalities=tuple(head[i] for i in columns),
        has=table[:, columns].astype(bool),
        latlon=latlon,
    )


def _tables_below(folder: Path) -> Iterable[Path]:
    """Look as deep as the published layout goes, without listing a million samples."""
    for depth in ("*", "*/*", "*/*/*"):
        yield from (path.parent for path in folder.glob(f"{depth}/sample_metadata.csv"))


def write_corpus(
    root: str | Path,
    samples: Iterable[Sample],
    *,
    tiles_per_sample: int = 1,
    compression: str | None = "zstd",
    level: int | None = 3,
    shuffle: bool | None = None,
    chunk_px: int | None = None,
) -> Path:
    """Write samples in the published layout and return their folder, which appears when all is written.

    `chunk_px` stores images in squares of that many pixels of the common grid, of which a crop reads those it needs;
    None stores each in one piece, as published. `compression` is "zstd" (as published, level 3), "gzip" or None.
    `tiles_per_sample` is only named in the path: how many samples each 2.56 km tile was cut into.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    options = _compression(compression, level, shuffle)
    fresh = Path(tempfile.mkdtemp(prefix=".corpus.", dir=root))
    try:
        held: list[set[str]] = []
        places, side = [], 0
        for index, sample in enumerate(samples):
            _write_sample(fresh / f"sample_{index}.h5", sample, options, chunk_px)
            held.append(set(sample.pixels))
            places.append(sample.latlon)
            side = max(side, *(_side(m, x) for m, x in sample.pixels.items()))
        if not held:
            raise InputError("no samples came, so there is nothing to write; check what was to be made into samples")
        names = sorted(set().union(*held))
        with (fresh / "sample_metadata.csv").open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["sample_index", *names])
            table.writerows([i, *(int(m in has) for m in names)] for i, has in enumerate(held))
        np.save(fresh / "latlon_distribution.npy", np.array(places, dtype=np.float64))
        settings = {"compression": compression, "compression_opts": level, "shuffle": shuffle}
        (fresh / "compression_settings.json").write_text(json.dumps(settings, indent=2) + "\n")
        parts = [
            "h5py_data_w_missing_timesteps",
            compression,
            level if compression else None,
            "shuffle" if shuffle else None,
        ]
        name = "_".join(str(part) for part in (*parts, side, "x", tiles_per_sample) if part is not None)
        folder = root / name / "_".join(names) / str(len(held))
        if folder.exists():
            raise InputError(f"{folder} exists; move it away or choose another root")
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh.chmod(0o755)
        fresh.rename(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return folder


def _factor(modality: str) -> int:
    """Pixels per pixel of the common 10 m grid, along a side."""
    return max(1, round(10 / MODALITIES[modality].gsd))


def _side(modality: str, x: np.ndarray) -> int:
    return x.shape[0] // _factor(modality) if x.ndim == 4 else 0


def _compression(name: str | None, level: int | None, shuffle: bool | None) -> dict[str, Any]:
    options: dict[str, Any] = {"shuffle": True} if shuffle else {}
    if name == "zstd":
        if hdf5plugin is None:
            raise InputError("zstd needs the package hdf5plugin; install it, or give compression=None")
        return options | dict(hdf5plugin.Zstd(clevel=3 if level is None else level))
    if name not in (None, "gzip"):
        raise InputError(f"no compression {name!r}; known: zstd, gzip, None")
    return options | ({"compression": "gzip", "compression_opts": level} if name else {})


def _write_sample(path: Path, sample: Sample, options: Mapping[str, Any], chunk_px: int | None) -> None:
    present = {m: sample.present.get(m, np.ones(LENGTH, dtype=bool)) for m in _series(sample.pixels)}
    for m, x in sample.pixels.items():
        wanted = int(present[m].sum()) if m in present else (1 if MODALITIES[m].kind == "still" else LENGTH)
        dates, bands = x.shape[-2:]
        if dates != wanted or bands != len(MODALITIES[m].bands):
            raise InputError(
                f"{m} has {dates} dates and {bands} bands; wanted {wanted} and {len(MODALITIES[m].bands)}: "
                "give series the dates that `present` marks, in the order [row, column, date, band]"
            )
    with h5py.File(path, "w") as file:
        file.create_dataset("latlon", data=np.asarray(sample.latlon, dtype=np.float32))
        file.create_dataset("timestamps", data=np.asarray(sample.timestamps))
        for m, x in sample.pixels.items():
            side = chunk_px * _factor(m) if chunk_px and x.ndim == 4 else max(x.shape)
            chunks = (*(min(side, n) for n in x.shape[:2]), *x.shape[2:])
            file.create_dataset(m, data=x, chunks=chunks, **options)
        group = file.create_group(_PRESENCE)
        for m, which in present.items():
            group.create_dataset(m, data=which.astype(bool))


def _series(modalities: Iterable[str]) -> list[str]:
    return [m for m in modalities if MODALITIES[m].kind == "series"]


# Crops


@dataclass(frozen=True, slots=True, kw_only=True)
class CropSize:
    """How much of each sample a batch takes."""

    patch_px: int
    side_patches: int
    dates: int
    """At most; see `num_dates`."""

    @property
    def side_px(self) -> int:
        """Side of the crop in pixels of the common grid."""
        return self.patch_px * self.side_patches


def num_dates(side_patches: int, budget: int, modalities: Iterable[str], groups: Groups, *, most: int = LENGTH) -> int:
    """Count the dates that fit into a budget of tokens, all modalities counted whether a sample has them or not.

    All releases count with the tokens of v1, also where the model makes fewer.
    """
    fixed = per_date = 0
    for m in modalities:
        kind, sets = MODALITIES[m].kind, len(groups(m))
        if kind == "still":
            fixed += side_patches**2 * sets
        elif kind in ("series", "weather"):
            per_date += (side_patches**2 if kind == "series" else 1) * sets
    fits = (budget - fixed) // per_date if per_date else most
    if fits < 1:
        raise InputError(
            f"{side_patches} x {side_patches} patches need more than {budget} tokens for a single date; "
            "raise the budget or take fewer patches"
        )
    return min(fits, most)


def valid_starts(present: Mapping[str, Sequence[bool] | np.ndarray], dates: int, length: int) -> list[int]:
    """List the dates at which a crop of some dates may begin: where some modality has data and the crop still fits."""
    if length <= dates:
        return [0]
    fitting = range(length - dates + 1)
    if not present:
        return list(fitting)
    some = np.any([np.asarray(which, dtype=bool)[:length] for which in present.values()], axis=0)
    return [start for start in fitting if some[start]] or list(fitting)


def draw_crop_size(
    rng: np.random.Generator,
    *,
    tile_px: int,
    patch_px: Sequence[int],
    side_patches: Sequence[int],
    dates: Callable[[int], int],
) -> CropSize:
    """Draw a batch's patch size, then its number of patches among those that fit into a tile.

    `dates` says how many dates go with a number of patches per side.
    """
    patch = int(rng.choice(np.asarray(patch_px)))
    sides = [side for side in side_patches if side * patch <= tile_px]
    if not sides:
        raise InputError(f"patches of {patch} px do not fit into tiles of {tile_px} px; allow smaller patches")
    side = int(rng.choice(np.asarray(sides)))
    return CropSize(patch_px=patch, side_patches=side, dates=dates(side))


# Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A crop of one sample; what is missing is -99999."""

    inputs: dict[str, Float[Tensor, "_t _c _y _x"]]
    timestamps: Int[Tensor, "t 3"]
    latlon: Float[Tensor, " 2"]


def read_item(
    path: str | Path,
    modalities: Sequence[str],
    *,
    rng: Rng,
    crop: CropSize | None = None,
    normalise: Normalise | None = None,
) -> Item:
    """Read a random crop of a sample, or all of it where `crop` is None.

    Draws the first date, the row and the column, in this order. All modalities asked for are there; those that the
    sample lacks are missing throughout. Pixels outside the crop are not kept.
    """
    path = Path(path)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path} cannot be read as HDF5 ({error}); copy it again") from None
    with file:
        stored = {m: file[m] for m in _to_read(modalities) if m in file}
        present = {m: _presence(file, m) for m in _series(stored)}
        first, last = _span(list(present.values()))
        timestamps = np.asarray(file["timestamps"][first : last + 1])
        length = len(timestamps)
        timestamps = np.concatenate([timestamps, np.repeat(timestamps[-1:], LENGTH - length, axis=0)])
        tile_px = _tile_px(stored, path)
        dates, start, row, col, side = LENGTH, 0, 0, 0, tile_px
        if crop is not None:
            side = crop.side_px
            if side > tile_px:
                raise InputError(
                    f"{path.name} is {tile_px} px wide; a crop of {side} px does not fit: take fewer patches"
                )
            dates = crop.dates
            within = {m: which[first : last + 1] for m, which in present.items()}
            start = int(rng.choice(np.asarray(valid_starts(within, dates, length))))
            row, col = (int(rng.choice(tile_px - side + 1)) for _ in range(2))
        window = _Window(first=first + start, dates=dates, row=row, col=col, side=side)
        raw = {m: _read(stored.get(m), m, window, present.get(m)) for m in _to_read(modalities)}
        latlon = torch.from_numpy(np.asarray(file["latlon"], dtype=np.float32))
    inputs = {m: _derive(raw, m) for m in modalities}
    if normalise is not None:
        inputs = {m: normalise(x, m) for m, x in inputs.items()}
    return Item(
        inputs={m: _dates_first(x, m) for m, x in inputs.items()},
        timestamps=torch.from_numpy(timestamps[start : start + dates].astype(np.int64)),
        latlon=latlon,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    first: int
    dates: int
    row: int
    col: int
    side: int


def _to_read(modalities: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(SOURCE.get(m, m) for m in modalities))


def _presence(file: h5py.File, modality: str) -> Bool[np.ndarray, " 12"]:
    group = file.get(_PRESENCE)
    if group is not None and modality in group:
        return np.asarray(group[modality], dtype=bool)
    return np.arange(LENGTH) < int(file[modality].shape[2])


def _span(present: Sequence[Bool[np.ndarray, " 12"]]) -> tuple[int, int]:
    """Find the first and the last date that any series has."""
    some = np.flatnonzero(np.any(present, axis=0)) if present else np.arange(LENGTH)
    return (int(some[0]), int(some[-1])) if len(some) else (0, LENGTH - 1)


def _tile_px(stored: Mapping[str, h5py.Dataset], path: Path) -> int:
    sides = {d.shape[0] // _factor(m) for m, d in stored.items() if d.ndim == 4}
    if len(sides) != 1:
        what = f"modalities of different sizes ({sorted(sides)} px)" if sides else "none of the modalities asked for"
        raise InputError(f"{path} holds {what}; leave it out of the corpus")
    return int(sides.pop())


def _read(
    stored: h5py.Dataset | None, modality: str, window: _Window, present: Bool[np.ndarray, " 12"] | None
) -> Float[Tensor, "*grid c"]:
    """Read a window as [row, column, date, band], [date, band] for weather or [band] for what never varies.

    What is missing is -99999.
    """
    kind, bands = MODALITIES[modality].kind, len(MODALITIES[modality].bands)
    if kind == "constant":
        whole = np.full(bands, MISSING) if stored is None else stored[:]
        return torch.from_numpy(whole.astype(np.float32))
    factor = _factor(modality)
    side = window.side * factor
    dates = 1 if kind == "still" else window.dates
    out = np.full((dates, bands) if kind == "weather" else (side, side, dates, bands), MISSING, dtype=np.float32)
    if stored is None:
        return torch.from_numpy(out)
    last = window.first + window.dates
    if kind == "weather":
        part = _part(stored, slice(window.first, last))
        out[: len(part)] = part
        return torch.from_numpy(out)
    rows = slice(window.row * factor, window.row * factor + side)
    cols = slice(window.col * factor, window.col * factor + side)
    if present is None:
        out[:] = _part(stored, rows, cols)
        return torch.from_numpy(out)
    # Only dates that are there are stored, so the window's are neighbours in the file.
    before, here = int(present[: window.first].sum()), present[window.first : last]
    out[:, :, : len(here)][:, :, here] = _part(stored, rows, cols, slice(before, before + int(here.sum())))
    return torch.from_numpy(out)


def _part(stored: h5py.Dataset, rows: slice, *others: slice) -> np.ndarray:
    """Read some rows, and what is asked for of them.

    What is stored as published, in one piece compressed by zstd, is decompressed to the last of the rows alone.
    """
    plan = stored.id.get_create_plist()
    filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    if filters == [ZSTD_FILTER] and stored.chunks == stored.shape:
        left_out, piece = stored.id.read_direct_chunk((0,) * stored.ndim)
        if not left_out:
            shape = (min(rows.stop, len(stored)), *stored.shape[1:])
            size = math.prod(shape) * stored.dtype.itemsize
            whole = pa.CompressedInputStream(pa.BufferReader(piece), "zstd").read(size)
            return np.frombuffer(whole, stored.dtype).reshape(shape)[(rows, *others)]
    if ZSTD_FILTER in filters and not h5py.h5z.filter_avail(ZSTD_FILTER):
        raise InputError(f"{stored.file.filename} is compressed with zstd; install the package hdf5plugin to read it")
    return np.asarray(stored[(rows, *others)])


def _derive(raw: Mapping[str, Float[Tensor, "*grid c"]], modality: str) -> Float[Tensor, "*grid c"]:
    """Make the vegetation index and one-hot land cover from what was read (OlmoEarth)."""
    x = raw[SOURCE.get(modality, modality)]
    if modality == "ndvi":
        names = MODALITIES["sentinel2_l2a"].band_names
        red, infrared = (x[..., names.index(band), None] for band in ("B04", "B08"))
        total = infrared + red
        index = torch.where(total.abs() < 1e-10, 0.0, (infrared - red) / total)
        return torch.where((red == MISSING) | (infrared == MISSING), MISSING, index)
    if modality == "worldcover_onehot":
        return torch.where(x == MISSING, MISSING, (x == torch.tensor(WORLDCOVER_CODES)).float())
    return x


def _dates_first(x: Float[Tensor, "*grid c"], modality: str) -> Float[Tensor, "t c y x"]:
    if MODALITIES[modality].kind == "constant":
        return x[None, :, None, None]
    if MODALITIES[modality].kind == "weather":
        return x[..., None, None]
    return x.permute(2, 3, 0, 1).contiguous()


# Batches


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingBatch:
    """Crops of one size, as the encoder takes them."""

    inputs: dict[str, Float[Tensor, "b _t _c _y _x"]]
    """Normalised; -99999 where missing."""
    timestamps: Int[Tensor, "b t 3"]
    missing: dict[str, Bool[Tensor, "b _h _w _t _s"]]
    """Which tokens have no data."""
    latlon: Float[Tensor, "b 2"]
    patch_px: int

    def __len__(self) -> int:
        return len(self.timestamps)


def collate_items(items: Sequence[Item], *, patch_px: int, groups: Groups) -> PretrainingBatch:
    """Stack crops of one size; `groups` says which bands of the model share a token."""
    inputs = {m: torch.stack([item.inputs[m] for item in items]) for m in items[0].inputs}
    return PretrainingBatch(
        inputs=inputs,
        timestamps=torch.stack([item.timestamps for item in items]),
        missing={m: missing_tokens(x, m, patch_px, groups(m)) for m, x in inputs.items()},
        latlon=torch.stack([item.latlon for item in items]),
        patch_px=patch_px,
    )


def missing_tokens(
    pixels: Float[Tensor, "b t c y x"], modality: str, patch_px: int, band_sets: BandSets
) -> Bool[Tensor, "b h w t s"]:
    """Say which tokens lack data: as published, those whose first pixel lacks any of the token's bands."""
    side = patch_px * _factor(modality) if MODALITIES[modality].kind in ("series", "still") else 1
    gone = pixels[..., ::side, ::side] == MISSING
    names = MODALITIES[modality].band_names
    sets = [gone[:, :, [names.index(band) for band in bands]].any(2) for bands in band_sets]
    return rearrange(torch.stack(sets), "s b t h w -> b h w t s")


SYMMETRIES = ((0, None), (1, None), (2, None), (3, None), (0, "cols"), (0, "rows"), (1, "cols"), (1, "rows"))
"""Those of a square: quarter turns counter-clockwise, then columns or rows reversed."""


def turn_batch(batch: PretrainingBatch, symmetry: int) -> PretrainingBatch:
    """Turn or mirror all places alike, by a number of `SYMMETRIES`; v1 draws one for each view (OlmoEarth)."""
    quarters, flip = SYMMETRIES[symmetry]

    def turn(x: Tensor, rows: int, cols: int) -> Tensor:
        x = torch.rot90(x, quarters, (rows, cols))
        return x if flip is None else x.flip(cols if flip == "cols" else rows)

    spatial = [m for m in batch.inputs if MODALITIES[m].kind in ("series", "still")]
    return replace(
        batch,
        inputs=batch.inputs | {m: turn(batch.inputs[m], 3, 4) for m in spatial},
        missing=batch.missing | {m: turn(batch.missing[m], 1, 2) for m in spatial},
    )


class PretrainingBatches(Dataset[PretrainingBatch]):
    """One rank's batches of a run over one or more corpora; the batch of a step depends on (seed, step, rank) alone.

    So a `DataLoader(batches, batch_size=None, sampler=range(step, steps))` goes on exactly where another one stopped,
    with any number of workers. Each epoch visits every sample once, in a new order, but for an incomplete last batch.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        *,
        modalities: Sequence[str],
        normalise: Normalise,
        groups: Groups,
        budget_groups: Groups,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        patch_px: Sequence[int] = range(1, 9),
        side_patches: Sequence[int] = range(1, 13),
        token_budget: int = TOKEN_BUDGET,
        fraction: float = 1.0,
    ) -> None:
        """Take `batch_size` samples per step over all ranks, in crops drawn from the given sizes.

        `groups` are the model's tokens, `budget_groups` those that the budget counts: v1's in all releases.
        """
        if batch_size % world:
            raise InputError(
                f"a batch of {batch_size} cannot be shared by {world} processes; take a multiple of {world}"
            )
        usable = ((corpus, corpus.usable(modalities, fraction=fraction, seed=seed)) for corpus in corpora)
        self.places = [(corpus, int(index)) for corpus, indices in usable for index in indices]
        if len(self.places) < batch_size:
            raise InputError(
                f"{len(self.places)} usable samples do not fill a batch of {batch_size}; take a smaller one"
            )
        self.modalities, self.normalise, self.groups = tuple(modalities), normalise, groups
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.patch_px, self.side_patches = tuple(patch_px), tuple(side_patches)
        self.dates = {side: num_dates(side, token_budget, modalities, budget_groups) for side in self.side_patches}
        corpus, index = self.places[0]
        self.tile_px = read_tile_px(corpus.path(index))

    def __len__(self) -> int:
        """Count the steps of an epoch; steps beyond it belong to later epochs."""
        return len(self.places) // self.batch_size

    def order(self, step: int) -> Int[np.ndarray, " b"]:
        """List the numbers, among `places`, of this rank's samples of a step."""
        epoch, step = divmod(step, len(self))
        order = _epoch_order(len(self.places), self.seed + epoch)
        return order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world]

    def __getitem__(self, step: int) -> PretrainingBatch:
        rng = np.random.Generator(np.random.PCG64([self.seed, step, self.rank]))
        crop = draw_crop_size(
            rng,
            tile_px=self.tile_px,
            patch_px=self.patch_px,
            side_patches=self.side_patches,
            dates=self.dates.__getitem__,
        )
        items = []
        for number in self.order(step):
            corpus, index = self.places[number]
            items.append(read_item(corpus.path(index), self.modalities, rng=rng, crop=crop, normalise=self.normalise))
        return collate_items(items, patch_px=crop.patch_px, groups=self.groups)


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int) -> Int[np.ndarray, " n"]:
    order = np.arange(count)
    np.random.Generator(np.random.PCG64(seed)).shuffle(order)
    return order


def read_tile_px(path: Path) -> int:
    """Read the side of a sample in pixels of the common grid."""
    with h5py.File(path, "r") as file:
        return _tile_px({m: d for m, d in file.items() if m in MODALITIES}, path)
