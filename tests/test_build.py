import csv
import datetime as dt
import json
import subprocess
import sys
from dataclasses import replace

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import torch
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer

from panterra.data.build import build_corpus
from panterra.data.composites import compose, period_starts, timestamps_of
from panterra.data.corpus_plan import Choice, Job, Rules, Splits, plan_corpus
from panterra.data.duplicates import NEAR_BITS, find_duplicates
from panterra.data.olmoearth_h5 import open_corpus, read_item
from panterra.data.openstreetmap import rasterise, read_features, to_common_grid
from panterra.data.windows import CELL_M, Cell, Window, parse_cell
from panterra.errors import InputError
from panterra.imagery.raster import write_cog
from panterra.imagery.stac import make_item, open_scene, save_scene
from panterra.modalities import OSM_CATEGORIES
from panterra.planet import write_planet_scene

CORNER = Cell(epsg=32633, col=186, row=-2068)
DAYS = ("2023-04-28", "2023-06-09", "2023-07-22")
FEW = Rules(min_dates=1)


def grid(cell=CORNER, *, cells=2, margin_px=0):
    side = 256 * cells + 2 * margin_px
    x, y = CELL_M * cell.col - 10 * margin_px, -CELL_M * cell.row + 10 * margin_px
    return GeoBox((side, side), Affine(10, 0, x, 0, -10, y), f"EPSG:{cell.epsg}")


def patchwork(rng, bands, box, low=500, high=4000):
    """Draw blocks of 160 m, so that files stay small and places look different."""
    coarse = rng.integers(low, high, (bands, box.shape[0] // 16 + 1, box.shape[1] // 16 + 1))
    return np.kron(coarse, np.ones((1, 16, 16), int))[:, : box.shape[0], : box.shape[1]].astype(np.uint16)


def write_scene(folder, *, seed=0, box=None, days=DAYS, worldcover=True, change=lambda pixels: pixels):
    rng, box = np.random.default_rng(seed), box or grid()
    folder.mkdir(parents=True)
    items = []
    for day in days:
        path = folder / f"s2_{day}.tif"
        write_cog(path, change(patchwork(rng, 12, box)), box, nodata=0)
        items.append(make_item(path.stem, "sentinel2_l2a", day, box, {"pixels": path}))
    if worldcover:
        path = folder / "worldcover.tif"
        write_cog(path, (patchwork(rng, 1, box, 1, 10) * 10).astype(np.uint8), box, nodata=0)
        items.append(make_item("wc", "worldcover", "2021-01-01", box, {"pixels": path}))
    save_scene(folder, items, "test", None)
    return str(folder)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp("scene") / "scene")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tree(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_what_is_read_back_are_the_pixels_of_the_scene(tmp_path):
    write_planet_scene(
        tmp_path / "scene",
        size_px=264,
        dates=DAYS[:2],
        modalities=("sentinel2_l2a", "sentinel1", "worldcover", "srtm"),
        labels=3,
        origin=(CELL_M * CORNER.col - 40, -CELL_M * CORNER.row + 40),
        clouds=0.0,
    )
    scene = open_scene(tmp_path / "scene")
    built = build_corpus(tmp_path / "corpus", Job(scenes=(str(tmp_path / "scene"),), rules=FEW))
    corpus = open_corpus(built.corpora["train"])
    table = rows_of(tmp_path / "corpus" / "windows.csv")
    assert [(row["cell"], row["tile"], row["sample_index"]) for row in table] == [
        (CORNER.name, str(tile), str(tile)) for tile in range(4)
    ]
    centre = dt.date.fromisoformat(table[0]["centre"])
    periods = period_starts(centre)
    assert set(corpus.modalities) == {"sentinel2_l2a", "sentinel1", "worldcover", "srtm"}
    assert corpus.folder.parent.parent.name == "h5py_data_w_missing_timesteps_zstd_3_128_x_4"
    assert not (tmp_path / "corpus" / "parts").exists()
    for tile in range(4):
        row, col = divmod(tile, 2)
        box = CORNER.box()[128 * row : 128 * row + 128, 128 * col : 128 * col + 128]
        item = read_item(corpus.path(tile), corpus.modalities, rng=np.random.default_rng(0))
        first = next(i for i, start in enumerate(periods) if (dt.date(2023, 4, 28) - start).days in range(30))
        assert item.timestamps[0].tolist() == timestamps_of(centre)[first].tolist()
        for name in ("sentinel2_l2a", "sentinel1"):
            seen = scene.read(name, box)
            kept = 0
            for date, pixels in zip(scene.dates(name), seen.pixels[0], strict=True):
                period = next(i for i, start in enumerate(periods) if (date - start).days in range(30))
                torch.testing.assert_close(item.inputs[name][period - first], pixels, rtol=0, atol=0)
                kept += 1
            gone = (item.inputs[name] == -99999).all(dim=1).all(dim=-1).all(dim=-1)
            assert int((~gone).sum()) == kept == 2
        for name in ("worldcover", "srtm"):  # elevation is kept in whole metres
            torch.testing.assert_close(item.inputs[name], scene.read(name, box).pixels[0].round(), rtol=0, atol=0)
        x, y = box.affine @ (64, 64)
        lon, lat = Transformer.from_crs(32633, 4326, always_xy=True).transform(x, y)
        assert item.latlon.tolist() == pytest.approx([lat, lon], abs=1e-5)


KILLED = """
import os, sys
from panterra.data.build import build_corpus
from panterra.data.corpus_plan import Job, Rules
def progress(done, total):
    if done == 2:
        os._exit(9)
build_corpus(sys.argv[1], Job(scenes=(sys.argv[2],), rules=Rules(min_dates=1)), workers=2, progress=progress)
"""


def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(tmp_path, scene):
    job = Job(scenes=(scene,), rules=FEW)
    calls = []
    whole = build_corpus(tmp_path / "whole", job, workers=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]

    root = tmp_path / "killed"
    root.mkdir()
    (root / ".plan.json.tmp").write_text("{")  # killed while it wrote its plan
    done = subprocess.run([sys.executable, "-c", KILLED, str(root), scene], check=False, capture_output=True)
    assert done.returncode == 9, done.stderr
    notes = sorted((root / "parts").glob("*.json"))
    assert len(notes) >= 2
    assert not (root / "report.json").exists()
    before = {path: path.stat().st_mtime_ns for path in notes}
    # What else a kill may leave: a part without its note, and a corpus half written.
    notes[0].unlink()
    del before[notes[0]]
    (root / "train" / ".corpus.x").mkdir(parents=True)
    (root / "train" / ".corpus.x" / "sample_0.h5").write_bytes(b"half")
    again = []
    root_stats = {}

    def progress(done, total):
        again.append(done)
        root_stats.update({path: path.stat().st_mtime_ns for path in before})

    built = build_corpus(root, job, workers=3, progress=progress)
    assert len(again) == 4 - len(before)
    assert root_stats == before
    assert tree(root) == tree(tmp_path / "whole")
    assert built.report == whole.report
    assert built.report["samples"] == {"train": 16}

    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert build_corpus(root, job).report == whole.report
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == stamps


def test_a_folder_of_another_job_is_left_alone(tmp_path, scene):
    job = Job(scenes=(scene,), rules=FEW, choice=Choice(places=((14.69, 47.79),)))
    build_corpus(tmp_path / "a", job)
    with pytest.raises(InputError, match=r"a job with other rules, seed; repeat that job"):
        build_corpus(tmp_path / "a", replace(job, seed=1, rules=replace(FEW, tile_px=64)))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").touch()
    with pytest.raises(InputError, match="holds other things"):
        build_corpus(tmp_path / "b", job)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["thesis.txt"]


def test_windows_that_look_alike_are_found(tmp_path):
    away = [replace(CORNER, col=CORNER.col + 16 * i) for i in range(1, 4)]
    noise = np.random.default_rng(9)
    scenes = (
        write_scene(tmp_path / "one", box=grid(cells=1), worldcover=False),
        write_scene(tmp_path / "copy", box=grid(away[0], cells=1), worldcover=False),
        write_scene(
            tmp_path / "noisy",
            box=grid(away[1], cells=1),
            worldcover=False,
            change=lambda pixels: (pixels + noise.integers(0, 9, pixels.shape)).astype(np.uint16),
        ),
        write_scene(tmp_path / "other", seed=1, box=grid(away[2], cells=1), worldcover=False),
    )
    built = build_corpus(tmp_path / "corpus", Job(scenes=scenes, rules=FEW))
    assert built.report["windows"] == 4
    assert built.report["windows_kept"] == 2
    assert built.report["dropped"] == {
        "windows: nearly the same pixels as another window": 1,
        "windows: the same pixels as another window": 1,
    }
    kept = {row["cell"] for row in rows_of(tmp_path / "corpus" / "windows.csv")}
    assert kept == {CORNER.name, away[2].name}
    dropped = {row["window"].rpartition("_")[0]: row["why"] for row in rows_of(tmp_path / "corpus" / "dropped.csv")}
    assert set(dropped) == {away[0].name, away[1].name}
    assert all(CORNER.name in why for why in dropped.values())


def test_duplicates_are_those_that_comparing_all_pairs_finds():
    rng = np.random.default_rng(0)
    thumbnails = rng.normal(1000, 300, (60, 256)).astype(np.float32)
    copies = rng.integers(0, 60, 60)
    strength = rng.uniform(0, 60, 60)[:, None]
    thumbnails = np.concatenate([thumbnails, thumbnails[copies] + rng.normal(0, 1, (60, 256)) * strength])
    thumbnails = thumbnails.astype(np.float32)
    windows = [Window(cell=replace(CORNER, col=i), centre=dt.date(2020, 1, 1)) for i in range(120)]
    found = find_duplicates(windows, [str(i) for i in range(120)], thumbnails)
    grid = thumbnails.reshape(-1, 16, 16)
    signs = np.concatenate([(np.diff(grid, axis=a) > 0).reshape(120, -1) for a in (1, 2)], axis=1)
    kept, wanted = [], {}
    for number in range(120):
        for rival in kept:
            near = np.abs(thumbnails[rival] - thumbnails[number]).mean() / thumbnails[rival].std() <= 0.1
            if near and (signs[rival] != signs[number]).sum() <= NEAR_BITS:
                wanted[number] = rival
                break
        else:
            kept.append(number)
    assert {number: rival for number, (rival, _) in found.items()} == wanted
    assert 10 < len(wanted) < 55
    same_place = [replace(window, cell=CORNER) for window in windows]
    assert find_duplicates(same_place, [str(i) for i in range(120)], thumbnails) == {}


def test_what_does_not_make_a_sample_is_named(tmp_path):
    box = grid(cells=1)

    def holes(pixels):
        pixels = pixels.copy()
        pixels[:, :128, :128] = 0  # nothing in the first quarter
        pixels[:, 130, 130] = 0  # a gap in the last
        return pixels

    scene = write_scene(tmp_path / "scene", box=box, days=DAYS[:1], change=holes)
    job = Job(scenes=(scene,), rules=FEW)
    built = build_corpus(tmp_path / "strict", job)
    rows = [(r["tile"], r["modality"], r["why"]) for r in rows_of(tmp_path / "strict" / "dropped.csv")]
    assert rows == [
        ("0", "sentinel2_l2a", "no date has enough data"),
        ("0", "", "no series has data"),
        ("3", "sentinel2_l2a", "no date has enough data"),
        ("3", "", "no series has data"),
    ]
    assert [r["tile"] for r in rows_of(tmp_path / "strict" / "windows.csv")] == ["1", "2"]
    assert built.report["dropped"] == {
        "samples: no series has data": 2,
        "sentinel2_l2a: no date has enough data": 2,
    }
    build_corpus(tmp_path / "loose", replace(job, rules=replace(FEW, min_valid=0.99)))
    assert [r["tile"] for r in rows_of(tmp_path / "loose" / "windows.csv")] == ["1", "2", "3"]
    whole = replace(job, scenes=(write_scene(tmp_path / "whole", box=box, days=DAYS[:1]),))
    for rules, message in (
        (Rules(min_dates=2), "fewer than 2 dates"),
        (replace(FEW, near_days=7), "no Sentinel-2 image within 7 days"),
    ):
        choice = Choice(first=dt.date(2023, 5, 20), last=dt.date(2023, 5, 20))
        with pytest.raises(InputError, match=f"none of the 1 windows is fit.*{message}"):
            build_corpus(tmp_path / message.replace(" ", "-"), replace(whole, rules=rules, choice=choice))
    near = Choice(first=dt.date(2023, 5, 4), last=dt.date(2023, 5, 4))
    built = build_corpus(tmp_path / "near", replace(job, rules=replace(FEW, near_days=7), choice=near))
    assert built.report["samples"] == {"train": 2}


def test_a_map_with_holes_stays_out_of_its_sample_alone(tmp_path):
    box = grid(cells=1)
    scene = write_scene(tmp_path / "scene", box=box, worldcover=False)
    codes = np.full(box.shape, 40, np.uint8)
    codes[5, 200] = 0
    heights = np.zeros(box.shape, np.uint8)
    heights[:128, :128] = 12
    items = json.loads((tmp_path / "scene" / "scene.json").read_text())["features"]
    extra = []
    for name, pixels, nodata in (("worldcover", codes, 0), ("wri_canopy_height_map", heights, 255)):
        write_cog(tmp_path / "scene" / f"{name}.tif", pixels, box, nodata=nodata)
        item = make_item(name, name, "2021-01-01", box, {"pixels": tmp_path / "scene" / f"{name}.tif"})
        extra.append(item.to_dict(include_self_link=False, transform_hrefs=False))
    (tmp_path / "scene" / "scene.json").write_text(json.dumps({"type": "FeatureCollection", "features": items + extra}))
    built = build_corpus(tmp_path / "corpus", Job(scenes=(scene,), rules=FEW))
    corpus = open_corpus(built.corpora["train"])
    has = dict(zip(corpus.modalities, corpus.has.T.tolist(), strict=True))
    assert has == {
        "sentinel2_l2a": [True] * 4,
        "worldcover": [True, False, True, True],
        "wri_canopy_height_map": [True, False, False, False],
    }
    required = replace(FEW, required=("worldcover",))
    built = build_corpus(tmp_path / "required", Job(scenes=(scene,), rules=required))
    assert built.report["samples"] == {"train": 3}
    assert built.report["dropped"]["samples: worldcover is required"] == 1


def write_tags(path, cells, tags):
    """Put a point in the middle of each cell."""
    to_degrees = Transformer.from_crs(CORNER.epsg, 4326, always_xy=True)
    places = [to_degrees.transform(CELL_M * (c.col + 0.5) + 5, -CELL_M * (c.row + 0.5) - 5) for c in cells]
    frame = gpd.GeoDataFrame(pd.DataFrame(tags), geometry=[shapely.Point(p) for p in places], crs=4326)
    frame.to_parquet(path)
    return str(path)


def test_cells_are_balanced_among_those_that_the_scenes_cover(tmp_path, scene):
    inside = [Cell(epsg=32633, col=CORNER.col + c, row=CORNER.row + r) for c in range(2) for r in range(2)]
    outside = [replace(CORNER, col=CORNER.col + 5 + i) for i in range(40)]
    tags = [{"man_made": "silo"}] * 3 + [{"man_made": "works"}] + [{"man_made": "silo"}] * 40
    osm = write_tags(tmp_path / "tags.parquet", inside + outside, tags)
    job = Job(scenes=(scene,), rules=FEW, choice=Choice(osm=osm, most_per_category=2))
    plan = plan_corpus(job)
    categories = [name for window in plan.windows for name in window.categories]
    assert sorted(categories) == ["silo", "silo", "works"]
    assert {window.cell for window in plan.windows} < set(inside)
    assert plan_corpus(job) == plan
    assert plan.modalities == ("sentinel2_l2a", "worldcover", "openstreetmap_raster")


@pytest.mark.parametrize("keep_all", [True, False])
def test_openstreetmap_is_burned_into_its_samples(tmp_path, scene, keep_all):
    osm = write_tags(tmp_path / "tags.parquet", [CORNER], [{"man_made": "silo"}])
    rules = replace(FEW, keep_all=keep_all, tile_px=256)
    job = Job(scenes=(scene,), rules=rules, choice=Choice(osm=osm))
    built = build_corpus(tmp_path / "corpus", job)
    wanted = to_common_grid(rasterise(read_features(osm), CORNER.box(2.5)), keep_all=keep_all)
    assert wanted.sum() == keep_all
    corpus = open_corpus(built.corpora["train"])
    assert ("openstreetmap_raster" in corpus.modalities) == keep_all
    item = read_item(corpus.path(0), ["sentinel2_l2a", "openstreetmap_raster"], rng=np.random.default_rng(0))
    raster = item.inputs["openstreetmap_raster"][0]
    if keep_all:
        assert np.array_equal(raster.numpy(), wanted)
        assert np.argwhere(wanted)[0].tolist() == [OSM_CATEGORIES.index("silo"), 128, 128]
    else:
        assert built.report["dropped"] == {"openstreetmap_raster: no feature": 1}
        assert (raster == -99999).all()


def test_places_and_their_days(tmp_path, scene):
    lonlat = [(14.69, 47.79), (14.6905, 47.7905), (14.72, 47.79), (15.9, 47.8)]
    table = pd.DataFrame(lonlat, columns=["lon", "lat"])
    table["date"] = ["2021-05-01", "2021-07-01", "2023-05-01", "2023-05-01"]
    table.to_csv(tmp_path / "places.csv", index=False)
    plan = plan_corpus(Job(scenes=(scene,), choice=Choice(places=str(tmp_path / "places.csv"))))
    assert [str(w.centre) for w in plan.windows] == ["2021-05-01", "2023-05-01"]
    assert [d.why.split(" as ")[0] for d in plan.dropped] == ["the scenes do not cover it", "same place and time"]
    listed = plan_corpus(Job(scenes=(scene,), choice=Choice(places=tuple(lonlat[:3]))))
    assert {w.cell for w in listed.windows} == {w.cell for w in plan.windows}


def test_centres_are_where_the_imagery_fills_the_periods(tmp_path, scene):
    short = plan_corpus(Job(scenes=(scene,)))
    assert len(short.windows) == 4
    (centre,) = {window.centre for window in short.windows}
    starts = period_starts(centre)
    end = starts[-1] + dt.timedelta(days=30)
    before = dt.date(2023, 4, 28) - starts[0]
    after = end - dt.date(2023, 7, 23)
    assert abs(before - after).days <= 1
    years = write_scene(tmp_path / "years", box=grid(cells=1), days=("2019-01-01", "2022-12-31"), worldcover=False)
    (window,) = plan_corpus(Job(scenes=(years,))).windows
    assert dt.date(2019, 1, 1) <= period_starts(window.centre)[0]
    assert period_starts(window.centre)[-1] + dt.timedelta(days=29) <= dt.date(2022, 12, 31)
    other = plan_corpus(Job(scenes=(years,), seed=1)).windows[0]
    assert other.centre != window.centre


def test_splits_lie_apart_on_disk_and_on_the_ground(tmp_path, scene):
    splits = Splits(shares={"train": 0.5, "val": 0.25, "test": 0.25}, block_cells=1)
    built = build_corpus(tmp_path / "corpus", Job(scenes=(scene,), rules=FEW, splits=splits))
    assert built.report["samples"] == {"train": 8, "val": 4, "test": 4}
    assert {name: len(open_corpus(folder)) for name, folder in built.corpora.items()} == built.report["samples"]
    homes = {}
    for row in rows_of(tmp_path / "corpus" / "windows.csv"):
        homes.setdefault(parse_cell(row["cell"]).parent(1), set()).add(row["split"])
    assert sorted(len(names) for names in homes.values()) == [1, 1, 1, 1]
    with pytest.raises(InputError, match="2 splits need as many blocks"):
        plan_corpus(Job(scenes=(scene,), splits=Splits(shares={"train": 0.9, "val": 0.1})))


def test_cloud_cover_of_the_catalogue_decides(tmp_path):
    box = grid(cells=1)
    folder = tmp_path / "scene"
    write_scene(folder, box=box, days=("2023-06-01", "2023-06-02"), worldcover=False)
    content = json.loads((folder / "scene.json").read_text())
    for feature, cover in zip(content["features"], (70, 5), strict=True):
        feature["properties"]["eo:cloud_cover"] = cover
    (folder / "scene.json").write_text(json.dumps(content))
    choice = Choice(first=dt.date(2023, 6, 1), last=dt.date(2023, 6, 1))
    built = build_corpus(
        tmp_path / "corpus", Job(scenes=(str(folder),), rules=replace(FEW, tile_px=256), choice=choice)
    )
    item = read_item(open_corpus(built.corpora["train"]).path(0), ["sentinel2_l2a"], rng=np.random.default_rng(0))
    clear = open_scene(folder).read("sentinel2_l2a", CORNER.box()).pixels[0, 1]
    torch.testing.assert_close(item.inputs["sentinel2_l2a"][0], clear, rtol=0, atol=0)
    assert (
        compose(open_scene(folder), "sentinel2_l2a", CORNER.box(), dt.date(2023, 6, 1)).pixels[6] != clear.numpy()
    ).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": Rules(tile_px=100)}, "do not divide a window of 256 px"),
        ({"rules": Rules(min_valid=0)}, "wanted a share above 0"),
        ({"rules": Rules(min_dates=13)}, "wanted 1 to 12"),
        ({"rules": Rules(required=("srtm",))}, "srtm is required, but only"),
        ({"modalities": ("sentinel1",)}, "sentinel1 cannot be built: the scenes hold sentinel2_l2a, worldcover"),
        ({"modalities": ("openstreetmap_raster",)}, "needs an extract, --osm"),
        ({"modalities": ("worldcover",)}, "are maps; a corpus needs at least one series"),
        ({"scenes": ()}, "no scene came"),
        ({"choice": Choice(places=((2.3, 48.8),))}, "cover none of the 1 cells"),
        ({"splits": Splits(shares={"../up": 1.0})}, "cannot name a split"),
        ({"splits": Splits(shares={})}, "wanted names with shares above 0"),
    ],
)
def test_jobs_that_cannot_be_done(scene, change, message):
    with pytest.raises(InputError, match=message):
        plan_corpus(replace(Job(scenes=(scene,)), **change))


def test_a_scene_smaller_than_a_cell(tmp_path):
    scene = write_scene(tmp_path / "small", box=GeoBox((64, 64), grid().affine, "EPSG:32633"), worldcover=False)
    with pytest.raises(InputError, match="cover no whole cell of 2,560 m"):
        plan_corpus(Job(scenes=(scene,)))


def test_a_file_that_breaks_off_stops_the_build_with_its_name(tmp_path):
    scene = write_scene(tmp_path / "scene", box=grid(cells=1), worldcover=False)
    path = tmp_path / "scene" / f"s2_{DAYS[0]}.tif"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=path.name):
        build_corpus(tmp_path / "corpus", Job(scenes=(scene,), rules=FEW))
