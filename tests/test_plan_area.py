import json

import pytest
import torch

from panterra.cli.plan import plan as plan_command
from panterra.energy.ledger import read_ledger
from panterra.errors import InputError
from panterra.imagery.providers import find_provider
from panterra.imagery.pull import list_pull, pull
from panterra.imagery.wish import Wish
from panterra.mapping.plan import plan_map
from panterra.mapping.run import embed
from panterra.models.features import Features
from stac_server import AREA, corners, make_archive, serving

WHERE = ",".join(f"{edge:.9f}" for edge in corners(AREA))
CUT = {"patch_m": 40, "window_px": 32, "overlap_px": 8, "tile_px": 32}


class Means(torch.nn.Module):
    """The mean of everything in a patch."""

    modalities = ("sentinel2_l2a", "sentinel1")
    dim = 1
    name = "means"

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.windows = 0

    def encode(self, batch, *, patch_m, dense=False):
        self.windows += len(batch)
        pixels = torch.stack([o.pixels.mean((1, 2)) for o in batch.observations.values()]).mean(0)
        patches = torch.nn.functional.avg_pool2d(pixels[:, None], round(patch_m / batch.pixel_m)).movedim(1, -1)
        valid = torch.ones(patches.shape[:3], dtype=torch.bool)
        return Features(patches=patches, summary=patches.mean((1, 2)), valid=valid, patch_m=patch_m)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    with serving(folder, make_archive(folder)) as state:
        yield state


@pytest.fixture(autouse=True)
def ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("PANTERRA_LEDGER", str(tmp_path / "ledger"))


@pytest.fixture
def wish():
    return Wish(aoi=WHERE, dates="2024-01/2024-02", modalities=("sentinel2_l2a", "sentinel1"), composite="none")


def test_the_plan_of_an_area_is_that_of_the_scene_that_is_fetched(server, wish, tmp_path):
    provider, encoder = find_provider(server.address), Means()
    wanted = list_pull(wish, [provider])
    plan = plan_map(wanted, model=encoder, **CUT)
    scene = pull(wish, [provider], tmp_path / "scene").scene
    later = plan_map(scene, model=encoder, aoi=WHERE, **CUT)
    whole = [plan_map(one, model=encoder, box=wanted.area.box, **CUT) for one in (wanted, scene)]
    assert whole[0].windows == whole[1].windows
    for what in ("rows", "cols", "windows", "tiles", "area_km2"):
        assert getattr(plan, what) == getattr(later, what)
    assert [one.dates for one in plan.imagery] == [one.dates for one in later.imagery]
    assert (plan.volume.decoded, plan.volume.written) == (later.volume.decoded, later.volume.written)
    assert plan.volume.files is None
    assert plan.volume.transferred == sum(wanted.bytes_of(image) for image in wanted.images)
    assert plan.speed.source.endswith("measured now without reading")


def test_the_corners_of_an_area_are_not_counted(server, tmp_path):
    west, south, east, north = corners(AREA)
    where = {"type": "Polygon", "coordinates": [[[west, south], [east, south], [west, north], [west, south]]]}
    (tmp_path / "area.geojson").write_text(json.dumps(where))
    wish = Wish(
        aoi=str(tmp_path / "area.geojson"), dates="2024-01/2024-02", modalities=("sentinel2_l2a",), composite="none"
    )
    provider, encoder, told = find_provider(server.address), Means(), []
    wanted = list_pull(wish, [provider])
    plan = plan_map(wanted, model=encoder, **CUT)
    scene = pull(wish, [provider], tmp_path / "scene").scene
    aoi = tmp_path / "area.geojson"
    embed(scene, encoder, tmp_path / "e.zarr", aoi=aoi, progress=lambda *step: told.append(step), **CUT)
    assert told[-1] == (plan.windows, plan.windows)
    assert plan.windows < plan_map(wanted, model=encoder, box=wanted.area.box, **CUT).windows


def test_clear_dates_are_those_that_the_provider_states(server, wish):
    wanted = list_pull(wish, [find_provider(server.address)])
    optical, radar = plan_map(wanted, model=Means(), **CUT).imagery
    images = [image for image in wanted.images if image.modality == "sentinel2_l2a"]
    stated = sum(
        sum(c.covers * (1 - c.cloud / 100) for c in day) / max(sum(c.covers for c in day), 1)
        for image in images
        for day in image.days
    )
    assert optical.clear.mean == pytest.approx(stated)
    assert 0 < stated < len(optical.dates)
    assert optical.clear.never is None
    assert radar.clear.mean == pytest.approx(len(radar.dates), rel=0.01)
    assert optical.items == sum(len(image.candidates) for image in images)


def test_an_earlier_run_tells_the_speed_of_an_area(server, wish, tmp_path):
    provider, encoder = find_provider(server.address), Means()
    embed(pull(wish, [provider], tmp_path / "scene").scene, encoder, tmp_path / "e.zarr", **CUT)
    done = encoder.windows
    plan = plan_map(list_pull(wish, [provider]), model=encoder, **CUT)
    assert encoder.windows == done
    assert plan.speed.source == "1 earlier run on this machine"
    assert plan.seconds.value == pytest.approx(read_ledger()[0].seconds)


def test_the_command_plans_an_area(server, capsys):
    names = ["sentinel2_l2a", "sentinel1"]
    options = {"model": "olmoearth-v1.2-nano", "random": 0, "modalities": names, "source": [server.address]}
    plan_command(aoi=WHERE, dates="2024-01/2024-02", as_json=True, **options)
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["cols"]) == (18, 30)
    assert [one["modality"] for one in told["imagery"]] == names
    plan_command(aoi=WHERE, dates="2024-01/2024-02", every="all", **options)
    table = capsys.readouterr().out
    assert "not known" in table
    assert "transferred" in table


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "say what to plan: a scene, or an area with --aoi"),
        ({"scene": "scene", "source": ["cdse"]}, "choose imagery to fetch"),
        ({"aoi": WHERE, "modalities": ["sentinel1"]}, "an area needs --dates"),
        ({"aoi": WHERE, "dates": "2024-01"}, "an area needs --dates.* and --modalities"),
    ],
)
def test_what_is_missing_is_asked_for(given, message):
    scene = given.pop("scene", None)
    with pytest.raises(InputError, match=message):
        plan_command(scene, **given)
