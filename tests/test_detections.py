"""Objects all over a scene."""

import json
import os

import geopandas as gpd
import numpy as np
import pytest
import shapely
import torch
import torch.nn.functional as F

from panterra.cli.detect import detect as command
from panterra.errors import InputError
from panterra.evaluate.probes import ProbeClass
from panterra.finetune.boxes import SHAPE, find_boxes
from panterra.finetune.heads import HeadConfig
from panterra.finetune.model import Base, FineTuned, Setup
from panterra.imagery.stac import open_scene
from panterra.mapping import detections, reading
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig
from test_cluster import block_of, drive_ray, on_ray, write_scene
from test_finetune_detection import plant_ships


@pytest.fixture(scope="module")
def sea(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sea") / "scene"
    plant_ships(folder, size_px=112, number=40, seed=5)
    return folder


def shifted(x, step, dim):
    """Move an image, with zeros where nothing was."""
    edges = (max(step, 0), max(-step, 0)) if dim == 3 else (0, 0, max(step, 0), max(-step, 0))
    return F.pad(x, edges).narrow(dim, max(-step, 0), x.shape[dim])


def run_length(bright, dim, sign):
    """Count how many bright pixels follow each bright one without a gap."""
    count, alive = torch.zeros_like(bright), bright
    for step in range(1, 16):
        alive = alive * shifted(bright, sign * step, dim)
        count = count + alive
    return count


class Brightness(torch.nn.Module):
    """A head that needs no training: it says of every bright cell where the middle of the ship is, and how large."""

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, features, pixels):
        bright = F.interpolate((pixels[:, :1] > 2000).float(), scale_factor=self.side / 4)
        ahead, back = ([run_length(bright, dim, sign) for dim in (3, 2)] for sign in (-1, 1))
        offsets = [(a - b) / 2 for a, b in zip(ahead, back, strict=True)]
        sizes = [(a + b + 1).log() for a, b in zip(ahead, back, strict=True)]
        heat = torch.where(bright > 0, 5.0 - offsets[0].abs() - offsets[1].abs(), -10.0)
        return torch.cat([heat, *offsets, *sizes], 1)


def a_detector(side=4, patch_m=40):
    torch.manual_seed(0)
    config = OlmoEarthConfig(dim=32, depth=1, heads=2, position="rope_3d_mixed", pixel_hidden=(8,), convolution=False)
    encoder = OlmoEarth(config, name="olmoearth-v1.2-nano").eval()
    head = HeadConfig(kind="conv", dense=True, dim=32, outputs=1 + SHAPE, side=side, hidden=16, skip_bands=12)
    setup = Setup(
        task="detection",
        head=head,
        classes=(ProbeClass(name="ship", code=1, colour=(9, 9, 9)),),
        modalities=("sentinel2_l2a",),
        patch_m=patch_m,
        window_px=32,
        skip="sentinel2_l2a",
        base=Base.of(encoder),
    )
    model = FineTuned(encoder, setup)
    model.head = Brightness(side)
    return model.eval().requires_grad_(False)


def an_untrained_detector():
    """A detector that can be saved; of everything it sees it thinks something else."""
    model = a_detector()
    torch.manual_seed(1)
    return FineTuned(model.encoder, model.setup).eval().requires_grad_(False)


def boxes_in(path, crs):
    return gpd.read_file(path).to_crs(crs)


@pytest.mark.parametrize("side", [4, 8])
def test_every_ship_is_listed_once_where_it_is(sea, tmp_path, side):
    """Of 16 windows that overlap by 8 pixels, many cut a ship; cells are as fine as pixels, or finer."""
    scene = open_scene(sea)
    made = detections.detect(scene, a_detector(side), tmp_path / "ships.geojson", threshold=0.3)
    truth, found = gpd.read_file(sea / "ships.gpkg"), boxes_in(tmp_path / "ships.geojson", scene.geobox().crs.to_wkt())
    assert made.counts == {"ship": 40}
    assert made.areas_m2["ship"] == pytest.approx(truth.area.sum(), rel=0.1)
    for ship in truth.geometry:
        shared = found.geometry.intersection(ship).area / found.geometry.union(ship).area
        assert (shared > 0.5).sum() == 1
    assert (found["score"] >= 0.3).all()
    assert found["score"].is_monotonic_decreasing


def test_the_file_is_geojson_as_the_standard_says(sea, tmp_path):
    made = detections.detect(sea, a_detector(), tmp_path / "ships.geojson")
    told = json.loads(made.path.read_text())
    assert "crs" not in told
    for feature in told["features"]:
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        assert shapely.LinearRing(ring).is_ccw
        assert feature["properties"]["class"] == "ship"
        assert 20 < feature["properties"]["width_m"] < 80
        assert 10 < ring[0][0] < 20
        assert 45 < ring[0][1] < 50
    passport = json.loads(made.passport.read_text())
    assert passport["properties"]["panterra:objects"]["counts"] == made.counts
    assert passport["properties"]["panterra:detector"]["threshold"] == 0.5
    assert set(passport["assets"]) == {"objects"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ships.geojson", "ships.geojson.json"]


def test_tiles_do_not_change_the_list(sea, tmp_path):
    one = detections.detect(sea, a_detector(), tmp_path / "one.geojson", threshold=0.3)
    two = detections.detect(sea, a_detector(), tmp_path / "two.geojson", threshold=0.3, tile_px=32, batch_windows=3)
    found = [json.loads(made.path.read_text())["features"] for made in (one, two)]
    corners = [np.array(sorted(f["geometry"]["coordinates"][0] for f in some)) for some in found]
    assert len(found[0]) == len(found[1]) == 40
    np.testing.assert_allclose(corners[0], corners[1], atol=1e-6)


def test_a_killed_run_goes_on_with_the_same_bytes(sea, tmp_path):
    def stop(done, total):
        if done > 4:
            raise KeyboardInterrupt

    options = {"threshold": 0.3, "tile_px": 32, "batch_windows": 1}
    one = detections.detect(sea, a_detector(), tmp_path / "one.geojson", **options)
    with pytest.raises(KeyboardInterrupt):
        detections.detect(sea, a_detector(), tmp_path / "two.geojson", progress=stop, **options)
    assert (tmp_path / "two.geojson.parts").is_dir()
    assert not (tmp_path / "two.geojson").exists()
    two = detections.detect(sea, a_detector(), tmp_path / "two.geojson", **options)
    assert one.path.read_bytes() == two.path.read_bytes()
    with pytest.raises(InputError, match="exists"):
        detections.detect(sea, a_detector(), tmp_path / "two.geojson", **options)


def test_a_scene_of_one_window_is_read_as_training_does(sea, tmp_path):
    """Peaks among candidates of tiles are those of a whole window."""
    scene, model = open_scene(sea), a_detector()
    box = scene.geobox()[32:64, 32:64]
    made = detections.detect(scene, model, tmp_path / "one.geojson", box=box, threshold=0.3)
    with torch.inference_mode():
        scores = model(scene.batch(box))[0]
    boxes, score, _ = find_boxes(scores, lowest=0.3)
    told = json.loads(made.path.read_text())["features"]
    assert [f["properties"]["score"] for f in told] == pytest.approx(score.tolist(), abs=1e-4)
    assert sorted(f["properties"]["width_m"] for f in told) == pytest.approx(
        sorted((10 * (boxes[:, 2] - boxes[:, 0])).tolist()), abs=0.02
    )


def test_nothing_is_a_list_without_features(sea, tmp_path):
    model = a_detector()
    model.head = torch.nn.Sequential()
    model.head.forward = lambda features, pixels: torch.full((len(pixels), 5, 32, 32), -20.0)
    made = detections.detect(sea, model, tmp_path / "none.geojson")
    assert json.loads(made.path.read_text()) == {"type": "FeatureCollection", "features": []}
    assert made.counts == {"ship": 0}


def test_the_command_lists_objects(sea, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("panterra.finetune.model.load_finetuned", lambda folder, device: a_detector())
    command(str(sea), model=tmp_path, out=tmp_path / "a.geojson", threshold=0.3, as_json=True)
    assert json.loads(capsys.readouterr().out)["counts"] == {"ship": 40}
    command(str(sea), model=tmp_path, out=tmp_path / "b.geojson", threshold=0.3)
    assert "ship" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("ships.tif", {}, r"end in \.geojson"),
        ("ships.geojson", {"threshold": 1.5}, "between 0 and 1"),
        ("ships.geojson", {"threshold": 0.5, "same": 0}, "between 0 and 1"),
    ],
)
def test_wrong_wishes_are_refused(sea, tmp_path, name, options, said):
    with pytest.raises(InputError, match=said):
        detections.detect(sea, a_detector(), tmp_path / name, **options)


def test_the_list_may_be_made_on_another_grid(sea, tmp_path):
    made = detections.detect(sea, a_detector(), tmp_path / "ships.geojson", threshold=0.3, crs="EPSG:3035")
    assert json.loads(made.passport.read_text())["properties"]["proj:code"] == "EPSG:3035"
    assert made.counts["ship"] == pytest.approx(40, abs=8)
    box = open_scene(sea).geobox()
    with pytest.raises(InputError, match="a box has its own CRS"):
        detections.detect(sea, a_detector(), tmp_path / "b.geojson", threshold=0.3, crs="EPSG:3035", box=box)


FEW = {"threshold": 0.08, "tile_px": 48}


def test_other_processes_list_the_same_and_a_poisoned_tile_loses_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "WAITS_S", (0.0,))
    scene, model = write_scene(tmp_path / "scene"), an_untrained_detector()
    whole = detections.detect(scene, model, tmp_path / "whole.geojson", **FEW)
    assert whole.counts["ship"] > 20
    path, out = scene / "s2_0.tif", tmp_path / "ships.geojson"
    good, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    offset, size = block_of(path, 1, 1)
    path.write_bytes(good[:offset] + b"\xff" * size + good[offset + size :])
    os.utime(path, ns=times)
    monkeypatch.setattr("panterra.finetune.model.load_finetuned", lambda folder, device: model)
    monkeypatch.setenv("PANTERRA_LEDGER", "off")
    with pytest.raises(SystemExit) as status:
        command(str(scene), model=tmp_path, out=out, threshold=0.08, tile_px=48, on="processes:1", as_json=True)
    assert status.value.code == 3
    said = capsys.readouterr()
    assert "is complete but for 4 of 16 tiles, which list no objects (the passport lists them)" in said.err
    told = json.loads(said.out)
    assert list(told["failed_tiles"]) == ["00001_00001", "00001_00002", "00002_00001", "00002_00002"]
    noted = json.loads((tmp_path / "ships.geojson.json").read_text())["properties"]["panterra:failed_tiles"]
    assert {tile["tile"]: tile["reason"] for tile in noted} == told["failed_tiles"]
    assert 0 < told["counts"]["ship"] < whole.counts["ship"]
    assert len(json.loads(out.read_text())["features"]) == told["counts"]["ship"]
    path.write_bytes(good)
    os.utime(path, ns=times)
    done = []
    again = detections.detect(scene, model, out, progress=lambda n, total: done.append(n), **FEW)
    assert done[0] > 0
    assert again.path.read_bytes() == whole.path.read_bytes()
    assert not (tmp_path / "ships.geojson.parts").exists()
    other = detections.detect(scene, model, tmp_path / "other.geojson", on="processes:1", **FEW)
    assert other.path.read_bytes() == whole.path.read_bytes()


DETECT = """
from panterra.cli import main
from panterra.mapping.detections import detect
import test_detections

scene, model, out, other = words
detect(scene, model, out, on="ray", progress=kill_one, **test_detections.FEW)
main(f"detect {scene} --model {model} --out {other} --on ray --threshold 0.08 --tile-px 48".split())
"""


@on_ray
def test_ray_lists_the_same_even_where_a_worker_is_killed(tmp_path):
    scene, model = write_scene(tmp_path / "scene"), tmp_path / "model"
    an_untrained_detector().save(model)
    whole = detections.detect(scene, model, tmp_path / "whole.geojson", **FEW)
    assert whole.counts["ship"] > 20
    killed, command = tmp_path / "killed.geojson", tmp_path / "command.geojson"
    said = drive_ray(tmp_path, DETECT, scene, model, killed, command)
    assert f"{whole.counts['ship']}" in said
    assert killed.read_bytes() == command.read_bytes() == whole.path.read_bytes()
    assert "panterra:failed_tiles" not in json.loads((tmp_path / "killed.geojson.json").read_text())["properties"]
