"""Real labelled samples as batches, targets and blocks, for real_tasks.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rasterio
import torch

from panterra.data.labelled import IGNORE
from panterra.data.stored_pixels import observe, read_image
from panterra.evaluate.splits import spatial_blocks
from panterra.imagery.raster import grid_of, read_onto
from panterra.modalities import Band, Modality
from panterra.models.anysat_sensors import declare, new_sensor
from panterra.sample import Batch, to_days

NO_DATE = "2020-06-15"
"""Given to images that do not tell theirs."""


# Constants K1 and K2 of Landsat 8's thermal bands (USGS, Landsat 8 Data Users Handbook).
THERMAL = {"B10": (774.8853, 1321.0789), "B11": (480.8883, 1201.1442)}


def _camera(name: str, gsd: float, *bands: str) -> Modality:
    waves = {"R": 0.65, "G": 0.56, "B": 0.48, "NIR": 0.83}
    return Modality(
        name=name,
        title=f"Camera of {', '.join(bands)}",
        bands=tuple(Band(name=b, gsd=gsd, wavelength=waves[b]) for b in bands),
        unit="dn",
        gsd=gsd,
        kind="still",
        plausible=(0, 255),
    )


RGB = _camera("camera_rgb", 0.25, "R", "G", "B")
RGBN = _camera("camera_rgbn", 0.5, "R", "G", "B", "NIR")
MOD13Q1 = Modality(
    name="mod13q1",
    title="MODIS 16-day composites",
    bands=tuple(
        Band(name=name, gsd=250, wavelength=wave)
        for name, wave in (("BLUE", 0.469), ("RED", 0.645), ("NIR", 0.859), ("MIR", 2.130))
    ),
    unit="reflectance_1e4",
    gsd=250,
)
for row in (RGB, RGBN, MOD13Q1):
    declare(new_sensor(row))


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Samples as one family of encoders, or the forest, takes them."""

    batches: Sequence[Batch]
    """One sample each."""
    patch_m: float
    new: tuple[Modality | str, ...] = ()
    """Modalities that AnySat has to be given a projector for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """One question put to one set of samples."""

    task: str
    """A name of `panterra.finetune.tasks.TASKS`."""
    names: tuple[str, ...]
    """Of the classes; empty for values."""
    targets: Sequence[np.ndarray]
    """Class numbers, or values; one per sample or [H, W] cells."""
    blocks: np.ndarray
    views: dict[str, View]
    """By family: olmoearth, anysat; the forest takes the first one's bands."""
    forest_m: float | None = None
    """Side of the forest's cells; None where it gets statistics of a whole image."""
    window_m: float
    tune_m: float
    """Side of the patches when fine-tuning."""
    two_dates: bool = False
    """Whether the answer lies in the difference of two dates."""
    about: dict[str, Any] = field(default_factory=dict)


def _bands(file: Path) -> tuple[str, ...]:
    """Read the bands' names, with numbers of two digits."""
    with rasterio.open(file) as opened:
        names = [str(name) for name in opened.descriptions]
    return tuple(f"B{int(n[1:]):02d}" if n[1:].isdigit() else n for n in names)


def _level_1c_as_2a(pixels: np.ndarray, days: Sequence[int], bands: Sequence[str]) -> Any:
    """Give level 1C to models of level 2A: bands by name, B10 dropped, the air left in."""
    return observe("sentinel2_l2a", pixels, days, bands=bands)


def _windows(height: int, width: int, side: int) -> list[tuple[int, int, slice, slice]]:
    return [
        (r, c, slice(r, r + side), slice(c, c + side))
        for r in range(0, height - side + 1, side)
        for c in range(0, width - side + 1, side)
    ]


def eurosat(data: Path) -> Material:
    """Ten scene classes of Europe, one image each."""
    folder = data / "eurosat_ms"
    index = pd.read_csv(folder / "index.csv")
    batches, centres = [], []
    for name in index.file:
        pixels, bands = read_image(folder / name).pixels[None], _bands(folder / name)
        batches.append(Batch(observations={"sentinel2_l2a": _level_1c_as_2a(pixels, [_JUNE], bands)}))
        centre = _level_1c_as_2a(pixels[..., 16:48, 16:48], [_JUNE], bands)
        centres.append(Batch(observations={"sentinel2_l2a": centre}))
    names = tuple(index.sort_values("class_id").class_name.unique())
    return Material(
        task="classification",
        names=names,
        targets=[np.array([k]) for k in index.class_id],
        blocks=spatial_blocks(index[["lon", "lat"]].to_numpy(), 1.0),
        # AnySat took a minute for whole images, so it sees their middle.
        views={"olmoearth": View(batches=batches, patch_m=40), "anysat": View(batches=centres, patch_m=40)},
        window_m=640,
        tune_m=40,
    )


_JUNE = to_days("2017-06-15")


def floods(data: Path) -> Material:
    """Water in a chip of Sentinel-2 and Sentinel-1."""
    folder, side = data / "sen1floods11_spain", 32
    optical, radar, label = (folder / f"Spain_7370579_west_{part}.tif" for part in ("S2", "S1", "label"))
    s2, s1, water = read_image(optical).pixels, read_image(radar).pixels, read_image(label).pixels[0]
    bands, batches, targets, xy = _bands(optical), [], [], []
    for r, c, rows, cols in _windows(water.shape[0], water.shape[1], side):
        seen = {
            "sentinel2_l2a": _level_1c_as_2a(s2[None, :, rows, cols], [to_days("2019-09-18")], bands),
            "sentinel1": observe("sentinel1", s1[None, :, rows, cols], [to_days("2019-09-17")], bands=("vv", "vh")),
        }
        batches.append(Batch(observations=seen))
        targets.append(water[rows, cols].astype(np.int64))
        xy.append((c * 10.0, r * 10.0))
    return Material(
        task="segmentation",
        names=("dry", "water"),
        targets=targets,
        blocks=spatial_blocks(np.array(xy), 640),
        views={"olmoearth": View(batches=batches, patch_m=20), "anysat": View(batches=batches, patch_m=20)},
        forest_m=10,
        window_m=320,
        tune_m=40,
        about={"where": [("Spain", int(y / 10), int(x / 10)) for x, y in xy]},
    )


def change(data: Path) -> Material:
    """New buildings in pairs of Sentinel-2 images of Paris and Dubai."""
    side, batches, targets, blocks, where = 32, [], [], [], []
    for place, dates in (("bercy_paris", ("20161130", "20170829")), ("dubai_west", ("20151211", "20180330"))):
        folder = data / "oscd_change" / place
        files = [folder / f"{place}_t{i}_{date}.tif" for i, date in enumerate(dates, start=1)]
        pair = np.stack([read_image(file).pixels for file in files])
        truth = read_image(folder / f"{place}_change.tif").pixels[0].astype(np.int64) - 1
        days = [to_days(f"{d[:4]}-{d[4:6]}-{d[6:]}") for d in dates]
        for r, c, rows, cols in _windows(truth.shape[0], truth.shape[1], side):
            seen = _level_1c_as_2a(pair[..., rows, cols], days, _bands(files[0]))
            batches.append(Batch(observations={"sentinel2_l2a": seen}))
            targets.append(truth[rows, cols])
            # Blocks of 64 pixels; the two places are far apart.
            blocks.append((c * 10.0 + (1e6 if place == "dubai_west" else 0), r * 10.0))
            where.append((place, r, c))
    return Material(
        task="segmentation",
        names=("no change", "change"),
        targets=targets,
        blocks=spatial_blocks(np.array(blocks), 640),
        views={"olmoearth": View(batches=batches, patch_m=20)},
        forest_m=10,
        window_m=320,
        tune_m=40,
        two_dates=True,
        about={"where": where},
    )


def buildings(data: Path) -> Material:
    """Footprints of buildings in tiles of a drone over Kampala, all brought to about 0.24 m."""
    folder, side = data / "fair_kampala_buildings", 80
    batches, targets, xy, where = [], [], [], []
    for file in sorted((folder / "images").glob("*.tif")):
        box, windows = grid_of(file), 2 ** (21 - int(file.name[1:3]))
        fine = box.zoom_to(shape=(side * windows, side * windows))
        image = read_onto(file, fine)[0]
        mask = read_onto(folder / "masks" / file.name, fine.zoom_out(2), categorical=True)[0][0].astype(np.int64)
        ground = float(box.extent.boundingbox.span_x) / windows
        for r, c, rows, cols in _windows(side * windows, side * windows, side):
            batches.append(
                Batch(
                    observations={RGB.name: observe(RGB.name, image[None, :, rows, cols], [0], bands=("R", "G", "B"))}
                )
            )
            targets.append((mask[r // 2 : (r + side) // 2, c // 2 : (c + side) // 2] > 0).astype(np.int64))
            left, top = box.extent.boundingbox.left, box.extent.boundingbox.top
            xy.append((left + ground * (c / side + 0.5), top - ground * (r / side + 0.5)))
            where.append((file.stem, r // 2, c // 2))
    return Material(
        task="segmentation",
        names=("other", "building"),
        targets=targets,
        blocks=spatial_blocks(np.array(xy), 40075016.685578488 / 2**20),
        views={"anysat": View(batches=batches, patch_m=10, new=(RGB,))},
        forest_m=1,
        window_m=20,
        tune_m=10,
        about={"where": where},
    )


def land_cover(data: Path) -> Material:
    """Six land covers in aerial images of 1 m, which are shown with each pixel doubled."""
    folder, side = data / "chesapeake_naip", 40
    batches, targets, xy, where = [], [], [], []
    for place, file in enumerate(sorted(folder.glob("*_naip_rgbn.tif"))):
        image = read_image(file).pixels.repeat(2, axis=1).repeat(2, axis=2)
        truth = read_image(file.with_name(file.name.replace("naip_rgbn", "label"))).pixels[0].astype(np.int64) - 1
        for r, c, rows, cols in _windows(truth.shape[0], truth.shape[1], side):
            fine = image[None, :, 2 * r : 2 * (r + side), 2 * c : 2 * (c + side)]
            seen = observe(RGBN.name, fine, [0], bands=("R", "G", "B", "NIR"))
            batches.append(Batch(observations={RGBN.name: seen}))
            targets.append(truth[rows, cols])
            xy.append((c + 1e5 * place, float(r)))
            where.append((place, r, c))
    return Material(
        task="segmentation",
        names=("water", "tree canopy", "low vegetation", "barren", "impervious", "road"),
        targets=targets,
        blocks=spatial_blocks(np.array(xy), 2 * side),
        views={"anysat": View(batches=batches, patch_m=10, new=(RGBN,))},
        forest_m=1,
        window_m=side,
        tune_m=10,
        about={"where": where},
    )


def canopy(data: Path) -> Material:
    """Height of the canopy, cell by cell of 1 m, from colour images; plots stay whole."""
    folder = data / "neon_trees"
    batches, targets, plots = [], [], []
    for plot, file in enumerate(sorted((folder / "chm_1m").glob("*.tif"))):
        image = folder / "rgb" / file.name.replace("_chm", "")
        pixels = read_onto(image, grid_of(image).zoom_to(shape=(160, 160)))[0]
        height = read_image(file).pixels[0]
        for r, c, rows, cols in _windows(40, 40, 20):
            fine = pixels[None, :, 4 * r : 4 * (r + 20), 4 * c : 4 * (c + 20)]
            batches.append(Batch(observations={RGB.name: observe(RGB.name, fine, [0], bands=("R", "G", "B"))}))
            targets.append(height[rows, cols].astype(np.float32))
            plots.append(plot)
    return Material(
        task="regression",
        names=(),
        targets=targets,
        blocks=np.array(plots),
        views={"anysat": View(batches=batches, patch_m=10, new=(RGB,))},
        forest_m=1,
        window_m=20,
        tune_m=10,
    )


def biomass(data: Path) -> Material:
    """Biomass above ground at footprints of GEDI, from 5 x 5 pixels of Landsat around them."""
    folder, reach = data / "hls_gedi_biomass", 2
    label = read_image(folder / "gedi_agbd_label.tif").pixels[0]
    stored = dict(
        zip(
            (name[:3] for name in _bands(folder / "hls_l30_composite_10bands.tif")),
            read_image(folder / "hls_l30_composite_10bands.tif").pixels.astype(np.float32),
            strict=True,
        )
    )
    hls = {f"B{n}": stored[f"B{n:02d}"] for n in range(2, 8)}
    level_1 = _as_level_1(stored)
    own, common, targets, xy = [], [], [], []
    for r, c in np.argwhere(label >= 0):
        rows, cols = slice(r - reach, r + reach + 1), slice(c - reach, c + reach + 1)
        if r < reach or c < reach or max(r, c) >= len(label) - reach:
            continue
        cut = np.stack([band[rows, cols] for band in hls.values()])[None]
        own.append(Batch(observations={"hls": observe("hls", cut, [to_days(NO_DATE)], bands=tuple(hls))}, pixel_m=30.0))
        fine = np.stack([b[rows, cols] for b in level_1.values()])[None].repeat(3, axis=2).repeat(3, axis=3)
        common.append(
            Batch(observations={"landsat": observe("landsat", fine, [to_days(NO_DATE)], bands=tuple(level_1))})
        )
        targets.append(label[r, c : c + 1].astype(np.float32))
        xy.append((c * 30.0, r * 30.0))
    return Material(
        task="scene_regression",
        names=(),
        targets=targets,
        blocks=spatial_blocks(np.array(xy), 600),
        views={
            "anysat": View(batches=own, patch_m=30, new=("hls",)),
            "olmoearth": View(batches=common, patch_m=30),
        },
        window_m=150,
        tune_m=30,
    )


def _as_level_1(hls: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turn surface reflectance and temperature into level 1 counts; the air is not put back (see real_data.py)."""
    dn = {f"B{n}": (hls[f"B{n:02d}"] * 1e-4 + 0.1) / 2e-5 for n in (1, 2, 3, 4, 5, 6, 7, 9)}
    for band, (k1, k2) in THERMAL.items():
        radiance = k1 / np.expm1(k2 / (hls[band] * 0.01 + 273.15))
        dn[band] = (radiance - 0.1) / 3.342e-4
    dn["B8"] = (dn["B3"] + dn["B4"]) / 2
    return {band: values.clip(1, 65535) for band, values in dn.items()}


def fuel_moisture(data: Path) -> Material:
    """Moisture of living fuel in percent, from three months of two sensors at a pixel."""
    stored = np.load(data / "presto_regression" / "fuel_moisture.npz")
    return _monthly(stored, np.unique(stored["site"], return_inverse=True)[1])


def algae(data: Path) -> Material:
    """Severity of algae blooms, 1 to 5 taken as a number, from a year of two sensors at a pixel."""
    stored = np.load(data / "presto_regression" / "algae_blooms.npz")
    return _monthly(stored, spatial_blocks(stored["latlon"], 1.0))


def _monthly(stored: Any, blocks: np.ndarray) -> Material:
    names = [str(b) for b in stored["bands"]]
    s2 = [n for n in names if n.startswith("B")]
    called = [f"B{int(n[1:]):02d}" if n[1:].isdigit() else n for n in s2]
    batches = []
    for x, months in zip(stored["x"], stored["month_index0"], strict=True):
        days, pixels = _month_days(months), x[:, :, None, None]
        optical = pixels[:, [names.index(n) for n in s2]]
        seen = {
            "sentinel2_l2a": observe("sentinel2_l2a", optical, days, bands=called),
            "sentinel1": observe("sentinel1", pixels[:, :2], days, bands=("vv", "vh")),
        }
        batches.append(Batch(observations=seen))
    return Material(
        task="scene_regression",
        names=(),
        targets=[np.array([v], np.float32) for v in stored["target"]],
        blocks=blocks,
        **_pixel_views(batches, 10),
    )


def _month_days(months: np.ndarray) -> list[int]:
    """Date months that tell no year, from 2019 on; a month that comes twice gets two days."""
    year, days = 2019, list[int]()
    for i, month in enumerate(months):
        year += int(i > 0 and month < months[i - 1])
        again = i > 0 and month == months[i - 1]
        days.append(to_days(f"{year}-{month + 1:02d}-{25 if again else 10}"))
    return days


def _pixel_views(batches: Sequence[Batch], gsd: float, *families: str) -> dict[str, Any]:
    view = View(batches=batches, patch_m=gsd)
    return {
        "views": dict.fromkeys(families or ("olmoearth", "anysat"), view),
        "forest_m": gsd,
        "window_m": gsd,
        "tune_m": gsd,
    }


def crops(data: Path, *, at_most: int = 1200) -> Material:
    """Six crops of Canada from 18 months of two sensors at a pixel."""
    folder = data / "worldcereal_pixels"
    table = pd.read_parquet(folder / "canada_2017_train.parquet")
    legend = {1110: "winter wheat", 1120: "spring wheat", 1200: "maize", 4100: "soya", 9120: "grass", 5100: "potato"}
    table = table[table.CROPTYPE_LABEL.isin(legend)]
    s1, s2 = ["S1-SIGMA0-VV", "S1-SIGMA0-VH"], [name for name in table.columns if name.startswith("S2-L2A")]
    codes, batches, targets, cells = list(legend), [], [], []
    drawn = np.random.default_rng(0).permutation(table.sample_id.unique())[:at_most]
    for _, one in table[table.sample_id.isin(drawn)].sort_values("timestamp").groupby("sample_id"):
        days = [to_days(str(d)[:10]) for d in one.timestamp]
        optical, amplitude = (one[names].replace(65535, np.nan).to_numpy(np.float32) for names in (s2, s1))
        decibel = 20 * np.log10(amplitude) - 83
        names = tuple(name[-3:] for name in s2)
        seen = {
            "sentinel2_l2a": observe("sentinel2_l2a", optical[..., None, None], days, bands=names),
            "sentinel1": observe("sentinel1", decibel[..., None, None], days, bands=("vv", "vh")),
        }
        batches.append(Batch(observations=seen))
        targets.append(np.array([codes.index(int(one.CROPTYPE_LABEL.iloc[0]))]))
        cells.append(one.h3_l3_cell.iloc[0])
    return Material(
        task="classification",
        names=tuple(legend.values()),
        targets=targets,
        blocks=np.unique(cells, return_inverse=True)[1].reshape(-1),
        **_pixel_views(batches, 10),
    )


def rondonia(data: Path) -> Material:
    """Forest, cleared land and other land of Rondonia from a year of Sentinel-2 at a pixel."""
    table = pd.read_parquet(data / "brazil_pixel_timeseries" / "sentinel2_rondonia_3classes.parquet")
    # The red edge is not in the table; what is nearest in wavelength stands in.
    bands = {b: b for b in ("B02", "B03", "B04", "B08", "B8A", "B11", "B12")} | {
        "B05": "B04",
        "B06": "B8A",
        "B07": "B8A",
    }
    return _series(table, "sentinel2_l2a", bands, 0.1, gsd=10)


def mato_grosso(data: Path) -> Material:
    """Seven land uses of Mato Grosso from a year of MODIS at a pixel, which only AnySat can be taught to read.

    All samples of two further classes lie within 10 km, so they cannot be both learned and tested in other places.
    """
    table = pd.read_parquet(data / "brazil_pixel_timeseries" / "modis_mod13q1_matogrosso_9classes.parquet")
    table = table[~table.label.isin(("Forest", "Soy_Fallow"))]
    made = _series(table, MOD13Q1.name, {b: b for b in MOD13Q1.band_names}, 0.5, gsd=250)
    view = replace(made.views["olmoearth"], new=(MOD13Q1,))
    return replace(made, views={"anysat": view})


def _series(table: pd.DataFrame, modality: str, bands: dict[str, str], block_degrees: float, *, gsd: float) -> Material:
    names, batches, targets, xy = tuple(sorted(table.label.unique())), [], [], []
    for _, one in table.sort_values("date").groupby("sample_id"):
        days = [to_days(str(d)[:10]) for d in one.date]
        values = 1e4 * one[list(bands.values())].to_numpy(np.float32)
        seen = observe(modality, values[..., None, None], days, bands=tuple(bands))
        batches.append(Batch(observations={modality: seen}, pixel_m=gsd))
        targets.append(np.array([names.index(one.label.iloc[0])]))
        xy.append((one.longitude.iloc[0], one.latitude.iloc[0]))
    return Material(
        task="classification",
        names=names,
        targets=targets,
        blocks=spatial_blocks(np.array(xy), block_degrees),
        **_pixel_views(batches, gsd),
    )


SETS: dict[str, Callable[[Path], Material]] = {
    "eurosat": eurosat,
    "floods": floods,
    "change": change,
    "buildings": buildings,
    "land_cover": land_cover,
    "canopy": canopy,
    "biomass": biomass,
    "fuel_moisture": fuel_moisture,
    "algae": algae,
    "crops": crops,
    "rondonia": rondonia,
    "mato_grosso": mato_grosso,
}


def as_target(material: Material, index: int) -> torch.Tensor:
    """Give a sample's target as fine-tuning takes it: [1] or [1, H, W], -1 or NaN where unknown."""
    target = torch.as_tensor(material.targets[index])
    if material.names:
        target = torch.where(target < 0, IGNORE, target.long())
    return target[None] if target.ndim == 2 else target
