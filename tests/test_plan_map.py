import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
import torch
from affine import Affine
from odc.geo.geobox import GeoBox
from torch import nn

from panterra.cli import main
from panterra.cli.plan import plan as plan_command
from panterra.commands.plan import show_plan
from panterra.energy import EnergyReport, record
from panterra.energy.grid import local_grid
from panterra.energy.impact import Figure, exactly
from panterra.energy.ledger import read_ledger
from panterra.errors import InputError
from panterra.evaluate.probes import FeatureSource, Probe, ProbeClass
from panterra.imagery.grids import lonlat
from panterra.imagery.raster import write_cog
from panterra.imagery.stac import make_item, open_scene, save_scene
from panterra.mapping.clear import clear_observations
from panterra.mapping.effort import BudgetError, Speed, expect, joined, known_speed, settings_of, spread
from panterra.mapping.embeddings import open_embeddings
from panterra.mapping.plan import Prices, cost, plan_map, read_prices
from panterra.mapping.run import embed
from panterra.mapping.run import map as make_map
from panterra.mapping.sources import Encoding
from panterra.models.features import Features

BOX = GeoBox((96, 120), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")
CUT = {"window_px": 32, "overlap_px": 8, "tile_px": 32}
CLASSES = (ProbeClass(name="dark", code=3), ProbeClass(name="bright", code=7))


class FirstBands(nn.Module):
    """The means over dates of the first three bands of Sentinel-2; Sentinel-1 is asked for and not looked at."""

    modalities = ("sentinel2_l2a", "sentinel1")
    dim = 3
    name = "first-bands"

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.windows = 0

    def encode(self, batch, *, patch_m, dense=False):
        self.windows += len(batch)
        o = batch.observations["sentinel2_l2a"]
        side = round(patch_m / batch.pixel_m)
        pixels = torch.where(o.valid[:, :, None], o.pixels[:, :, :3], 0).mean(1)
        patches = nn.functional.avg_pool2d(pixels, side).permute(0, 2, 3, 1) / 1000 * self.gain
        return Features(
            patches=patches,
            summary=patches.mean((1, 2)),
            valid=torch.ones(patches.shape[:3], dtype=torch.bool),
            patch_m=patch_m,
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two dates of Sentinel-2: clear in the left half on the first, everywhere but in a corner on the second."""
    folder = tmp_path_factory.mktemp("scene")
    rng = np.random.default_rng(0)
    height, width = BOX.shape
    items = []
    for step, date in enumerate(("2023-04-15", "2023-07-01")):
        write_cog(folder / f"s2_{step}.tif", rng.integers(500, 4000, (12, height, width)).astype(np.uint16), BOX)
        scl = np.full((height, width), 4, np.uint8)
        if step:
            scl[:24, :30] = 9
        else:
            scl[:, 60:] = 8
        write_cog(folder / f"scl_{step}.tif", scl, BOX, categories={4: "vegetation", 8: "cloud", 9: "cloud"})
        files = {"data": str(folder / f"s2_{step}.tif"), "scl": str(folder / f"scl_{step}.tif")}
        items.append(make_item(f"s2-{step}", "sentinel2_l2a", date, BOX, files))
    radar = rng.normal(-12, 3, (2, height, width)).astype(np.float32)
    radar[:, :48] = -32768
    write_cog(folder / "s1.tif", radar, BOX, nodata=-32768)
    items.append(make_item("s1-0", "sentinel1", "2023-04-20", BOX, {"data": str(folder / "s1.tif")}))
    save_scene(folder, items, "A scene for tests", None)
    return folder


@pytest.fixture(scope="module")
def scene(folder):
    return open_scene(folder)


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("PANTERRA_LEDGER", str(tmp_path / "ledger"))
    return tmp_path / "ledger"


@pytest.fixture
def probe():
    weight = torch.tensor([[-1.0, 1.0], [0, 0], [0, 0]])
    return Probe(
        kind="logistic",
        task="classes",
        classes=CLASSES,
        tensors={
            "mean": torch.full((3,), 2.25),
            "scale": torch.ones(3),
            "weight": weight,
            "bias": torch.zeros(2),
        },
        source=FeatureSource(encoder="first-bands", patch_m=40, modalities=FirstBands.modalities, window_px=32),
    )


def work_of(scene, **changes):
    options = {"patch_m": 40, "modalities": None, "batch_windows": 8, "workers": 1, **CUT, **changes}
    return Encoding.plan(scene, FirstBands(), box=BOX, **options)


def run_of(work, *, seconds, windows, **changes):
    """Write a job like `work` into the ledger."""
    report = EnergyReport(
        kwh=seconds / 1000,
        seconds=seconds,
        method="modelled",
        detail="",
        kwh_range=(seconds / 2000, seconds / 500),
        core_seconds=2 * seconds,
        grid=local_grid("FRA"),
    )
    facts = {"model": "first-bands", "windows": windows, "settings": settings_of(work), **changes}
    return record(facts.pop("command", "embed"), report, **facts)


# Exact --------------------------------------------------------------------------------------------------------------


def test_windows_pixels_and_bytes_are_those_of_the_run(scene, ledger, tmp_path):
    encoder = FirstBands()
    plan = plan_map(scene, model=encoder, patch_m=40, dtype="float32", **CUT)
    encoder.windows = 0
    embed(scene, encoder, tmp_path / "e.zarr", patch_m=40, **CUT)
    store, work = open_embeddings(tmp_path / "e.zarr"), work_of(scene)
    assert plan.windows == encoder.windows
    assert plan.tiles == len(list(work.tiles()))
    assert (plan.rows, plan.cols, plan.pixels) == (*store.box.shape, math.prod(store.box.shape))
    assert plan.area_km2 == pytest.approx(96 * 120 * 100 / 1e6)
    assert plan.volume.written == plan.pixels * 3 * 4
    read = [work._read(tile) for tile in work.tiles()]
    decoded = sum(o.pixels.nbytes for got in read if got for o in got[1].observations.values())
    assert plan.volume.decoded == decoded
    assert plan.volume.transferred == decoded // 2
    files = {asset.href for item in scene.items for asset in item.assets} | {i.mask[0] for i in scene.items if i.mask}
    assert plan.volume.files == sum(Path(file).stat().st_size for file in files)


def triangle(corners):
    """A polygon in degrees, by columns and rows of the grid."""
    x, y = zip(*(BOX.affine @ corner for corner in corners), strict=True)
    return shapely.Polygon(zip(*lonlat(BOX.crs, x, y), strict=True))


@pytest.mark.parametrize("crs", [None, "EPSG:3035"])
def test_what_lies_outside_an_area_is_not_counted(scene, ledger, tmp_path, crs):
    area, encoder = triangle([(1, 1), (119, 3), (2, 94)]), FirstBands()
    options = {"patch_m": 40, "aoi": area, "crs": crs, **CUT}
    plan, all_of_it = plan_map(scene, model=encoder, **options), plan_map(scene, model=encoder, patch_m=40, **CUT)
    encoder.windows, told = 0, []
    store = embed(scene, encoder, tmp_path / "e.zarr", progress=lambda *step: told.append(step), **options)
    assert 0 < plan.windows < all_of_it.windows
    assert told[-1] == (plan.windows, plan.windows)
    if crs is None:  # on another grid, windows at its corners may see nothing of the images
        assert plan.tiles < all_of_it.tiles
        assert encoder.windows == plan.windows == read_ledger()[-1].windows
    assert (plan.rows, plan.cols) == store.box.shape
    passport = json.loads(store.passport.read_text())["properties"]
    assert passport["panterra:impact"]["area_km2"] == pytest.approx(plan.area_km2)
    assert plan.area_km2 < 0.6 * all_of_it.area_km2
    assert plan.volume.decoded < all_of_it.volume.decoded


def test_windows_are_tried_where_the_area_is(scene, ledger):
    encoder = FirstBands()
    plan = plan_map(scene, model=encoder, aoi=triangle([(100, 80), (119, 80), (119, 95)]), box=BOX, measure=True, **CUT)
    assert plan.windows < 8
    assert encoder.windows == 4 * 8
    with pytest.raises(InputError, match="nothing can be measured, as no image shows the area"):
        plan_map(scene, model=encoder, aoi="0,0,1,1", box=BOX, measure=True, **CUT)


def test_a_map_is_planned_by_its_probe(scene, ledger, probe, tmp_path):
    encoder = FirstBands()
    plan = plan_map(scene, model=encoder, probe=probe, probabilities=True, overlap_px=8, tile_px=32)
    encoder.windows = 0
    result = make_map(scene, probe, tmp_path / "m.tif", model=encoder, probabilities=True, overlap_px=8, tile_px=32)
    assert plan.windows == encoder.windows
    with rasterio.open(result.path) as classes, rasterio.open(result.probabilities) as shares:
        assert plan.volume.written == classes.read().nbytes + shares.read().nbytes
        assert (plan.rows, plan.cols) == classes.shape


@pytest.mark.parametrize(("dtype", "size"), [("int8", 1), ("float16", 2), ("float32", 4)])
def test_bytes_follow_from_the_type(scene, ledger, dtype, size):
    run_of(work_of(scene), seconds=10, windows=10)
    plan = plan_map(scene, model=FirstBands(), dtype=dtype, **CUT)
    assert plan.volume.written == plan.pixels * 3 * size


def test_clear_observations_are_counted(scene, ledger):
    """By hand: the left half is clear once, the right one not; all but 24 x 30 pixels are clear the second time."""
    clear = clear_observations(scene, "sentinel2_l2a", BOX)
    left, corner, everything = 96 * 60, 24 * 30, 96 * 120
    assert clear.mean == pytest.approx((left + everything - corner) / everything)
    assert (clear.least, clear.never, clear.pixel_m) == (1, 0, 10)
    radar = clear_observations(scene, "sentinel1", BOX)
    assert (radar.mean, radar.never, radar.least) == (0.5, 0.5, 0)


def test_clear_observations_agree_with_what_a_run_reads(scene, ledger):
    for name in scene.modalities:
        counts = scene.read(name, BOX).valid[0].sum(0)
        assert clear_observations(scene, name, BOX).mean == pytest.approx(counts.float().mean().item())


def test_they_are_counted_coarsely_on_large_areas(scene, ledger, monkeypatch):
    monkeypatch.setattr("panterra.mapping.clear.CLEAR_PX", 30)
    clear = clear_observations(scene, "sentinel2_l2a", BOX)
    assert clear.pixel_m == 40
    assert clear.mean == pytest.approx(1.4375, abs=0.05)


def test_without_masks_clouds_count_as_seen(scene, ledger):
    assert clear_observations(replace(scene, apply_masks=False), "sentinel2_l2a", BOX).mean == 2


def test_a_file_that_is_gone_is_named(scene, ledger):
    asset = replace(scene.items[0].assets[0], href="/nowhere/at_all.tif")
    items = (replace(scene.items[0], assets=(asset,)), *scene.items[1:])
    with pytest.raises(InputError, match=r"cannot read /nowhere/at_all\.tif"):
        plan_map(replace(scene, items=items), model=FirstBands(), **CUT)


# Learned --------------------------------------------------------------------------------------------------------------


def test_the_speed_is_the_median_of_runs_like_it(scene, ledger):
    work = work_of(scene)
    for seconds in (10, 40, 20):
        run_of(work, seconds=seconds, windows=10)
    speed = known_speed(work, read_ledger())
    factor = math.exp(3 * 1.4826 * math.log(2))
    assert (speed.seconds.value, speed.runs, speed.core_seconds) == (2.0, 3, 4.0)
    assert (speed.seconds.low, speed.seconds.high) == pytest.approx((2 / factor, 2 * factor))
    assert (speed.kwh.value, speed.kwh.low, speed.kwh.high) == pytest.approx((0.002, 0.001 / factor, 0.004 * factor))


@pytest.mark.parametrize(
    "other", [{"model": "other"}, {"command": "fetch"}, {"device": "cuda"}, {"windows": 0}, {"settings": {}}]
)
def test_other_runs_teach_nothing(scene, ledger, other):
    work = work_of(scene)
    run_of(work, seconds=10, **{"windows": 10, **other})
    assert known_speed(work, read_ledger()) is None


def test_runs_on_other_machines_and_with_other_patches_teach_nothing(scene, ledger):
    entry = run_of(work_of(scene, patch_m=20), seconds=10, windows=10)
    work = work_of(scene)
    assert known_speed(work, [entry]) is None
    same = run_of(work, seconds=10, windows=10)
    assert known_speed(work, [replace(same, machine="elsewhere")]) is None
    assert known_speed(work, [same]).runs == 1


def test_other_numbers_of_dates_count_in_proportion_where_there_is_nothing_better(scene, ledger):
    work = work_of(scene)
    settings = settings_of(work)
    assert settings["images"] == 3
    run_of(work, seconds=20, windows=10, settings={**settings, "images": 6})
    assert known_speed(work, read_ledger()).seconds.value == 1.0
    run_of(work, seconds=30, windows=10)
    speed = known_speed(work, read_ledger())
    assert (speed.seconds.value, speed.runs) == (3.0, 1)


def test_small_runs_do_not_count_beside_large_ones(scene, ledger):
    work = work_of(scene)
    run_of(work, seconds=100, windows=4)
    run_of(work, seconds=100, windows=1000)
    assert known_speed(work, read_ledger()).seconds.value == 0.1


def test_one_run_gives_a_wide_interval_and_agreement_a_narrow_one():
    assert spread([3.0]) == Figure(value=3, low=1.5, high=6)
    same = spread([3.0, 3.0, 3.0])
    assert (same.low, same.high) == pytest.approx((3 / 1.15, 3 * 1.15))
    assert joined([Figure(value=2, low=1, high=8)]) == Figure(value=2, low=0.5, high=16)


def test_a_plan_by_an_earlier_run_does_not_touch_the_encoder(scene, ledger):
    run_of(work_of(scene), seconds=10, windows=10)
    encoder = FirstBands()
    plan = plan_map(scene, model=encoder, country="FRA", **CUT)
    assert encoder.windows == 0
    assert plan.speed.source == "1 earlier run on this machine"
    assert plan.seconds == Figure(value=1, low=0.5, high=2) * plan.windows
    assert plan.impact.kwh == plan.speed.kwh * plan.windows
    assert plan.impact.operation_co2e_kg.value == pytest.approx(plan.impact.kwh.value * 1.56 * 0.056)


def test_a_real_run_is_learned_from(scene, ledger, tmp_path):
    embed(scene, FirstBands(), tmp_path / "e.zarr", patch_m=40, **CUT)
    (entry,) = read_ledger()
    plan = plan_map(scene, model=FirstBands(), **CUT)
    assert entry.windows == plan.windows
    assert plan.seconds.value == pytest.approx(entry.seconds)
    assert plan.seconds.low < plan.seconds.value < plan.seconds.high


def test_where_nothing_is_known_a_few_windows_are_measured(scene, ledger):
    notes, encoder = [], FirstBands()
    plan = plan_map(scene, model=encoder, note=notes.append, **CUT)
    assert encoder.windows == 4 * 8
    assert plan.speed.source == "8 windows at each of 3 places, measured now"
    assert notes[0].startswith("measuring")
    assert 0 < plan.seconds.low < plan.seconds.value < plan.seconds.high
    plan_map(scene, model=encoder, **CUT)
    assert encoder.windows == 4 * 8
    plan_map(scene, model=encoder, measure=True, **CUT)
    assert encoder.windows == 2 * 4 * 8


def test_measuring_works_with_the_ledger_off(scene, monkeypatch):
    monkeypatch.setenv("PANTERRA_LEDGER", "off")
    assert plan_map(scene, model=FirstBands(), **CUT).speed.runs == 3


# Money and words ------------------------------------------------------------------------------------------------------


def test_money_adds_up(scene, ledger, monkeypatch):
    monkeypatch.setenv("PANTERRA_PUE", "1.5")
    run_of(work_of(scene), seconds=36, windows=10)
    prices = Prices(currency="EUR", per_kwh=0.2, per_machine_hour=3, per_gb_egress=10, per_gb_month=7, months=2)
    plan = plan_map(scene, model=FirstBands(), prices=prices, **CUT)
    fixed = (10 * plan.volume.files + 7 * 2 * plan.volume.written) / 1e9
    for end in ("value", "low", "high"):
        power, time = getattr(plan.impact.kwh, end), getattr(plan.seconds, end)
        assert getattr(plan.cost, end) == pytest.approx(power * 1.5 * 0.2 + time / 3600 * 3 + fixed)
    assert plan.currency == "EUR"


def test_where_files_are_elsewhere_the_transfer_counts_at_most(scene, ledger):
    run_of(work_of(scene), seconds=36, windows=10)
    plan = plan_map(scene, model=FirstBands(), **CUT)
    remote = replace(plan.volume, files=None)
    money = cost(Prices(currency="EUR", per_gb_egress=1), plan.impact, seconds=plan.seconds, volume=remote)
    assert money == exactly(plan.volume.transferred / 1e9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no price list; wanted JSON such as"),
        ("{", "is no price list"),
        ('{"per_kwh": 1}', "is no price list"),
        (
            '{"currency": "EUR", "per_kw": 1}',
            "has per_kw: 1; wanted amounts of 0 or more for any of months, per_gb_egr",
        ),
        ('{"currency": "EUR", "per_kwh": "1"}', "has per_kwh: '1'; wanted amounts"),
        ('{"currency": "EUR", "per_kwh": -1}', "has per_kwh: -1; wanted amounts"),
    ],
)
def test_a_wrong_price_list_is_explained(tmp_path, text, message):
    (tmp_path / "prices.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_prices(tmp_path / "prices.json")


def test_a_price_list_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the price list .*No such file"):
        read_prices(tmp_path / "prices.json")


def test_an_unknown_country_is_refused_before_any_work(scene, ledger):
    encoder = FirstBands()
    with pytest.raises(InputError, match="no grid intensity known for country 'XXX'"):
        plan_map(scene, model=encoder, country="XXX", **CUT)
    assert encoder.windows == 0


def test_a_probe_of_another_encoder_is_refused(scene, ledger, probe):
    encoder = FirstBands()
    encoder.dim = 4
    with pytest.raises(InputError, match="use the same encoder"):
        plan_map(scene, model=encoder, probe=probe, overlap_px=8)


def test_a_model_or_a_probe_is_needed(scene):
    with pytest.raises(InputError, match="which model"):
        plan_map(scene)


def test_the_table_shows_what_the_json_holds(scene, ledger, capsys):
    run_of(work_of(scene), seconds=3600, windows=1)
    plan = plan_map(scene, model=FirstBands(), country="FRA", prices=Prices(currency="EUR", per_kwh=1), **CUT)
    show_plan(plan)
    table = capsys.readouterr().out
    for text in ("sentinel2_l2a", "1.4", "50.0%", f"{plan.windows} windows", "EUR", "56 g CO2e/kWh", "1 earlier run"):
        assert text in table
    told = json.loads(json.dumps(plan.as_dict()))
    assert told["seconds"]["value"] == 3600 * plan.windows
    assert told["imagery"][0]["clear"]["never"] == 0
    assert told["impact"]["per_km2"]["kwh"]["value"] == pytest.approx(plan.impact.kwh.value / plan.area_km2)


def test_the_command_says_it_as_json(folder, ledger, tmp_path, capsys):
    (tmp_path / "prices.json").write_text('{"currency": "EUR", "per_kwh": 1}')
    plan_command(
        str(folder), model="olmoearth-v1.2-nano", random=0, country="FRA", prices=tmp_path / "prices.json", as_json=True
    )
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["cols"], told["windows"], told["currency"]) == (24, 30, 6, "EUR")


def test_the_command_takes_an_area_of_a_scene(folder, ledger, tmp_path, capsys):
    (tmp_path / "area.geojson").write_text(shapely.to_geojson(triangle([(1, 1), (60, 3), (2, 40)])))
    options = {"model": "olmoearth-v1.2-nano", "random": 0, "as_json": True}
    plan_command(str(folder), aoi=str(tmp_path / "area.geojson"), **options)
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["cols"], told["windows"]) == (10, 15, 1)
    with pytest.raises(InputError, match="choose imagery to fetch; leave them out, or the scene"):
        plan_command(str(folder), dates="2024", **options)


# Budgets --------------------------------------------------------------------------------------------------------------


def test_a_job_that_will_not_fit_is_refused_before_it_starts(scene, ledger, tmp_path):
    run_of(work_of(scene), seconds=1000, windows=10)
    encoder = FirstBands()
    with pytest.raises(
        BudgetError, match=r"budget of 0\.5 kWh does not suffice: 20 windows take about 2 kWh \(0\.5 to 8"
    ):
        embed(scene, encoder, tmp_path / "e.zarr", patch_m=40, budget_kwh=0.5, **CUT)
    assert encoder.windows == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ledger"]
    embed(scene, encoder, tmp_path / "e.zarr", patch_m=40, budget_kwh=2.1, **CUT)


@pytest.mark.parametrize("name", ["out.zarr", "out.tif"])
def test_a_budget_stops_between_tiles_and_a_larger_one_goes_on_to_the_same_bytes(scene, tmp_path, monkeypatch, name):
    monkeypatch.setenv("PANTERRA_LEDGER", str(tmp_path / "ledger"))
    whole, cut, encoder = tmp_path / "whole" / name, tmp_path / "cut" / name, FirstBands()
    for folder in (whole.parent, cut.parent):
        folder.mkdir()
    monkeypatch.setenv("PANTERRA_LEDGER", "off")
    embed(scene, encoder, whole, patch_m=40, **CUT)
    monkeypatch.setenv("PANTERRA_LEDGER", str(tmp_path / "ledger"))
    needed, encoder.windows = encoder.windows, 0
    with pytest.raises(BudgetError, match=r"stopped: .* of 1e-12 kWh used .*tiles left: 5.*a larger budget to go on"):
        embed(scene, encoder, cut, patch_m=40, budget_kwh=1e-12, country="FRA", **CUT)
    assert 0 < encoder.windows < needed
    assert not cut.exists()
    (stopped,) = read_ledger()
    with pytest.raises(BudgetError, match="does not suffice"):
        embed(scene, encoder, cut, patch_m=40, budget_kwh=stopped.kwh.value, country="FRA", **CUT)
    assert encoder.windows < needed
    embed(scene, encoder, cut, patch_m=40, budget_kwh=1e3, country="FRA", **CUT)
    assert encoder.windows == needed
    assert contents(cut) == contents(whole)
    _, finished = read_ledger()
    assert (stopped.status, finished.status) == ("stopped", "finished")
    assert stopped.windows + finished.windows == needed
    assert stopped.area_km2 + finished.area_km2 == pytest.approx(96 * 120 * 100 / 1e6)
    told = json.loads(cut.with_name(f"{name}.json").read_text())["properties"]
    assert told["panterra:energy"]["kwh"] == pytest.approx(stopped.kwh.value + finished.kwh.value)
    assert told["panterra:impact"]["kwh"]["value"] == pytest.approx(told["panterra:energy"]["kwh"])


def test_a_killed_start_is_in_the_ledger_when_the_job_goes_on(scene, ledger, tmp_path):
    """As the budget leaves it, but with the note that a kill prevents from being settled."""
    out, parts = tmp_path / "e.zarr", tmp_path / "e.zarr.parts"
    with pytest.raises(BudgetError):
        embed(scene, FirstBands(), out, patch_m=40, budget_kwh=1e-12, **CUT)
    (stopped,) = read_ledger()
    told = json.loads((parts / "energy.json").read_text())
    assert told["unrecorded"] is None
    lost = {"energy": told["total"], "windows": stopped.windows, "pixels": stopped.pixels}
    (parts / "energy.json").write_text(json.dumps({**told, "unrecorded": lost}))
    (ledger / "ledger.jsonl").unlink()
    embed(scene, FirstBands(), out, patch_m=40, **CUT)
    again, finished = read_ledger()
    assert (again.status, again.windows, again.pixels) == ("stopped", stopped.windows, stopped.pixels)
    assert again.kwh == stopped.kwh
    assert finished.windows + again.windows == 20
    assert again.area_km2 == pytest.approx(stopped.area_km2)


def test_a_mistake_in_the_environment_is_told_before_any_work(scene, ledger, tmp_path, monkeypatch):
    monkeypatch.setenv("PANTERRA_PUE", "0.5")
    encoder = FirstBands()
    with pytest.raises(InputError, match=r"PANTERRA_PUE is '0\.5'"):
        embed(scene, encoder, tmp_path / "e.zarr", patch_m=40, **CUT)
    assert encoder.windows == 0
    assert not any(tmp_path.iterdir())


def test_on_the_command_line_a_budget_ends_with_status_2_and_one_line(folder, ledger, tmp_path, capsys):
    model = ["--model", "olmoearth-v1.2-nano", "--random", "0", "--tile-px", "64"]
    assert main(["embed", str(folder), *model, "--out", str(tmp_path / "e.zarr"), "--budget-kwh", "1e-12"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("panterra: stopped: ")
    assert "tiles left: 1." in line


def contents(path):
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


def test_a_map_says_what_it_stands_for(scene, ledger, probe, tmp_path):
    result = make_map(scene, probe, tmp_path / "m.tif", model=FirstBands(), overlap_px=8, country="FRA", budget_kwh=10)
    told = json.loads(result.passport.read_text())["properties"]["panterra:impact"]
    assert result.area_km2 == pytest.approx(told["area_km2"])
    assert told["per_km2"]["co2e_kg"]["value"] == pytest.approx(result.impact.co2e_kg.value / result.area_km2)
    for name in ("kwh", "operation_co2e_kg", "embodied_co2e_kg", "water_l"):
        assert set(told[name]) == {"value", "low", "high"}
    (entry,) = read_ledger()
    assert (entry.command, entry.model, entry.pixels) == ("map", "first-bands", 24 * 30)


def test_maps_from_stored_embeddings_are_in_the_ledger_too(scene, ledger, probe, tmp_path):
    embed(scene, FirstBands(), tmp_path / "e.zarr", patch_m=40, window_px=32, overlap_px=8)
    make_map(tmp_path / "e.zarr", probe, tmp_path / "m.tif", budget_kwh=1)
    assert [entry.command for entry in read_ledger()] == ["embed", "map"]


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_is_more_than_nothing(scene, ledger, tmp_path, budget):
    with pytest.raises(InputError, match="wanted more than 0"):
        embed(scene, FirstBands(), tmp_path / "e.zarr", patch_m=40, budget_kwh=budget, **CUT)


def test_what_is_used_counts_against_the_budget():
    speed = Speed(seconds=exactly(1), kwh=exactly(0.1), method="modelled", runs=1, source="a run")
    expect(10, speed, 1.5, used=0.4)
    with pytest.raises(BudgetError, match=r"budget of 1\.5 kWh, of which 0\.6 are used, does not suffice"):
        expect(10, speed, 1.5, used=0.6)
    expect(10, None, 1e-9, used=0.0)


def test_a_probe_in_a_folder_can_be_planned_with(scene, ledger, probe, tmp_path):
    probe.save(tmp_path / "probe")
    plan = plan_map(scene, model=FirstBands(), probe=tmp_path / "probe", overlap_px=8, tile_px=32)
    assert plan.volume.written == plan.pixels
