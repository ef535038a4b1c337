"""AnySat on scenes, as any encoder is used: statistics, windows, patches, new sensors, and real imagery."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.cli import main
from panterra.commands.probe import fit_to_labels
from panterra.errors import InputError
from panterra.evaluate.embed import embed_samples
from panterra.evaluate.probes import FeatureSource, load_probe
from panterra.imagery.doctor import compare_statistics, examine, repair
from panterra.imagery.files import scene_from_files
from panterra.imagery.raster import grid_of, write_cog
from panterra.imagery.stac import make_item, open_scene, save_scene
from panterra.mapping import run, standards
from panterra.mapping.embeddings import open_embeddings
from panterra.modalities import MODALITIES, Band, Modality
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.anysat_new_sensor import add_modality
from panterra.models.weights import save_model
from panterra.planet import write_planet_scene
from panterra.sample import Batch

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

DATES = ("2023-04-28", "2023-07-22")
RANDOM = ("--model", "anysat-tiny", "--random", "0")
BOX = GeoBox((48, 48), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")


@pytest.fixture
def model() -> AnySat:
    torch.manual_seed(0)
    return AnySat(AnySatConfig(dim=64, depth=1, heads=2), name="small").eval().requires_grad_(False)


@pytest.fixture
def registry():
    """Forget the modalities that a test declares."""
    before = dict(MODALITIES)
    yield
    MODALITIES.clear()
    MODALITIES.update(before)


@pytest.fixture(scope="module")
def planet(tmp_path_factory) -> Path:
    folder = write_planet_scene(tmp_path_factory.mktemp("planet"), size_px=48, dates=DATES, labels=60)
    labels = json.loads((folder / "labels.geojson").read_text())
    names = Counter(place["properties"]["class"] for place in labels["features"])
    common = [name for name, _ in names.most_common(2)]
    labels["features"] = [place for place in labels["features"] if place["properties"]["class"] in common]
    (folder / "labels.geojson").write_text(json.dumps(labels))
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    return write_planet_scene(folder, size_px=48, dates=DATES, labels=1, origin=(420_000, 5_300_000))


def moments(scene, modality: str, band: str) -> tuple[float, float]:
    """Compute mean and standard deviation of a band at once, as an oracle."""
    seen = scene.read(modality, scene.geobox())
    values = seen.pixels[:, :, MODALITIES[modality].band_names.index(band)][seen.valid].double()
    return float(values.mean()), float(values.std(correction=0))


def told(out: Path) -> dict:
    return json.loads(out.with_name(f"{out.name}.json").read_text())["properties"]


def test_from_scene_to_map_and_to_the_map_of_another_scene(planet, elsewhere, tmp_path, capsys):
    store, probe = tmp_path / "e.zarr", tmp_path / "probe"
    assert main(["embed", str(planet), "--out", str(store), "--window-px", "32", "--json", *RANDOM]) == 0
    said = capsys.readouterr().err
    assert said.count("has no statistics of sentinel2_l2a, sentinel1 yet: fitting them to the scene, once") == 1
    about = open_embeddings(store).about["model"]
    assert (about["family"], about["name"]) == ("anysat", "anysat-tiny (random weights, seed 0)")
    s2 = about["statistics"]["s2"]
    for band in ("B02", "B8A"):
        at = s2["channels"].index(band)
        assert (s2["mean"][at], s2["std"][at]) == pytest.approx(
            moments(open_scene(planet), "sentinel2_l2a", band), 1e-6
        )
    assert set(about["statistics"]) == {"s2", "s1"}

    labels = ("--labels", str(planet / "labels.geojson"), "--split", "random", "--folds", "2")
    assert main(["probe", str(store), "--out", str(probe), *labels, "--json"]) == 0
    assert load_probe(probe).source.statistics == about["statistics"]
    made = {}
    for name, source in (("stored", store), ("same", planet), ("other", elsewhere)):
        made[name] = tmp_path / f"{name}.tif"
        assert main(["map", str(source), "--probe", str(probe), "--out", str(made[name])]) == 0
        assert told(made[name])["panterra:model"]["statistics"] == about["statistics"]
    assert "fitting" not in capsys.readouterr().err
    assert made["stored"].read_bytes() == made["same"].read_bytes()
    with rasterio.open(made["other"]) as file:
        assert file.shape == (12, 12)
        assert file.read(1).any()

    assert main(["doctor", str(planet), "--probe", str(probe), "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert not [f for f in findings if f["level"] == "warning"]
    (shown,) = [f for f in findings if f["modality"] == "sentinel1" and "standardised" in f["what"]]
    assert f"statistics of {probe}: vv -1" in shown["what"]
    assert "vv/vh" in shown["what"]


def test_the_doctor_shows_what_a_model_would_be_standardised_by(planet, tmp_path, capsys):
    assert main(["doctor", str(planet), "--model", "anysat-tiny", "--json"]) == 0
    captured = capsys.readouterr()
    assert "Fitting statistics of sentinel2_l2a" in captured.err
    shown = [f["what"] for f in json.loads(captured.out) if "standardised" in f["what"]]
    assert [what.startswith("standardised by the scene's own statistics: ") for what in shown] == [True, True]
    mean, _ = moments(open_scene(planet), "sentinel2_l2a", "B02")
    assert f"B02 {mean:.4g} ±" in shown[0]


@pytest.mark.parametrize(
    ("given", "warns"),
    [
        ({"B02": (900, 300)}, False),
        ({"B02": (90, 300)}, False),
        ({"B02": (40, 280)}, True),
        ({"B02": (1850, 280)}, True),
        ({"B02": (0.1, 0.03)}, True),
    ],
)
def test_a_scene_far_from_a_models_statistics_is_warned_of(given, warns):
    findings = compare_statistics("sentinel2_l2a", {"B02": (990.0, 310.0)}, given, "my-probe")
    assert findings[0].level == "note"
    assert "statistics of my-probe: B02" in findings[0].what
    assert [f.level for f in findings[1:]] == ["warning"] * warns
    assert all("B02 is 990 ± 310 in the scene" in f.what and f.fix for f in findings[1:])


def test_statistics_do_not_depend_on_blocks_and_are_fitted_once(planet, model, tmp_path, monkeypatch):
    scene, notes = open_scene(planet), []
    whole = run.embed(scene, model, tmp_path / "a.zarr", window_px=32, overlap_px=8, note=notes.append)
    assert len(notes) == 1
    assert model.missing_statistics(["sentinel2_l2a"])  # what was given stays as it was
    monkeypatch.setattr(standards, "STATISTICS_BYTES", 4 * 2 * 12 * 10**2)
    assert sum(1 for _ in standards.in_blocks(scene, scene.geobox(), ["sentinel2_l2a"])) == 25
    small = run.embed(scene, model, tmp_path / "b.zarr", window_px=32, overlap_px=8)
    for name, found in whole.about["model"]["statistics"].items():
        for key in ("mean", "std"):
            np.testing.assert_allclose(small.about["model"]["statistics"][name][key], found[key], rtol=1e-9)
    np.testing.assert_allclose(small.read(), whole.read(), atol=1e-5)


def test_a_stopped_run_goes_on_with_the_same_statistics(planet, model, tmp_path):
    scene = open_scene(planet)
    options = {"window_px": 16, "overlap_px": 0, "tile_px": 16}
    whole = run.embed(scene, model, tmp_path / "whole.tif", **options)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.embed(scene, model, tmp_path / "e.tif", progress=stop, **options)
    kept = json.loads((tmp_path / "e.tif.parts" / "statistics.json").read_text())
    assert kept == whole.about["model"]["statistics"]
    notes = []
    run.embed(scene, model, tmp_path / "e.tif", note=notes.append, **options)
    assert notes == []
    assert (tmp_path / "e.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


def test_windows_equal_the_encoder_alone(planet, model, tmp_path):
    scene = open_scene(planet)
    store = run.embed(scene, model, tmp_path / "e.zarr", patch_m=20, window_px=48, overlap_px=0)
    fitted = model.with_statistics(store.about["model"]["statistics"])
    with torch.inference_mode():
        alone = fitted.encode(scene.batch(scene.geobox()), patch_m=20)
    valid = alone.valid[0].numpy()
    np.testing.assert_allclose(store.read()[valid], alone.patches[0].numpy()[valid], atol=1e-5)
    assert np.isnan(store.read()[~valid]).all()


def test_embeddings_by_other_statistics_do_not_suit_a_probe(planet, elsewhere, model, tmp_path):
    stores = [
        run.embed(scene, model, tmp_path / f"{i}.zarr", window_px=48, overlap_px=0)
        for i, scene in enumerate((planet, elsewhere))
    ]
    options = {"column": None, "kind": "ridge", "split": "random", "block_m": 100, "folds": 2, "seed": 0}
    probe = fit_to_labels(stores[0], planet / "labels.geojson", **options).probe
    with pytest.raises(InputError, match=r"other statistics .* map the scene itself"):
        run.map(stores[1], probe, tmp_path / "m.tif")
    own = model.with_statistics(stores[1].about["model"]["statistics"])
    result = run.map(elsewhere, probe, tmp_path / "m.tif", model=own)
    assert told(result.path)["panterra:model"]["statistics"] == stores[0].about["model"]["statistics"]
    assert isinstance(probe.source, FeatureSource)


def test_nothing_to_fit_to_is_one_line_and_leaves_nothing(planet, model, tmp_path):
    scene = open_scene(planet)
    beyond = GeoBox((16, 16), scene.geobox().affine @ Affine.translation(1000, 0), scene.geobox().crs)
    with pytest.raises(InputError, match=r"statistics of sentinel2_l2a, sentinel1 cannot be fitted .*no pixel of s2"):
        run.embed(scene, model, tmp_path / "e.zarr", box=beyond, window_px=16, overlap_px=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("modalities", "patch_m", "window_px", "size_px"),
    [
        (("sentinel2_l2a", "aerial"), 20, 4, 8),
        (("naip", "sentinel1"), 10, 12, 24),
        (("naip_10",), 20, 8, 24),
        (("landsat7", "alos2", "sentinel2_l2a"), 30, 12, 24),
        (("modis", "sentinel2_l2a"), 40, 12, 24),
        (("landsat7", "alos2"), 60, 4, 24),
        (("landsat7", "modis"), 30, 4, 24),
    ],
)
def test_sensors_of_every_resolution_go_the_whole_way(tmp_path, model, modalities, patch_m, window_px, size_px):
    shown = tuple("naip_10" if m == "naip" else m for m in modalities)
    folder = write_planet_scene(tmp_path / "s", size_px=size_px, dates=DATES, modalities=shown, labels=1, clouds=0)
    if "naip" in modalities:
        text = (folder / "scene.json").read_text().replace('"naip_10"', '"naip"')
        (folder / "scene.json").write_text(text)
    store = run.embed(folder, model, tmp_path / "e.zarr", patch_m=patch_m, window_px=window_px, overlap_px=0)
    assert store.box.shape[0] * patch_m >= 10 * size_px
    assert np.isfinite(store.read()[:4, :4]).all()
    assert store.read()[:4, :4].std((0, 1)).max() > 1e-3
    assert set(store.about["modalities"]) == set(modalities)


def coarse_scene(folder: Path, *, with_s2: bool):
    """Sensors of 30 m and 250 m whose pixels are the files', and Sentinel-2 of one colour."""
    rng = np.random.default_rng(0)
    items = []
    for name, gsd, size in (("landsat7", 30, 16), ("modis", 480, 1), ("sentinel2_l2a", 10, 48)):
        if name == "sentinel2_l2a" and not with_s2:
            continue
        box = GeoBox((size, size), Affine(gsd, 0, 500000, 0, -gsd, 5000000), BOX.crs)
        for day in DATES:
            pixels = rng.integers(20, 200, (len(MODALITIES[name].bands), size, size)).astype(np.float32)
            path = folder / f"{name}_{day}.tif"
            write_cog(path, pixels, box)
            items.append(make_item(f"{name}_{day}", name, day, box, {"data": path}))
    save_scene(folder, items, "Coarse", None)
    return open_scene(folder)


@pytest.mark.parametrize("with_s2", [True, False])
def test_coarse_sensors_come_back_to_their_own_pixels(tmp_path, model, with_s2):
    scene = coarse_scene(tmp_path, with_s2=with_s2)
    store = run.embed(scene, model, tmp_path / "e.zarr", patch_m=60, window_px=48 if with_s2 else 16, overlap_px=0)
    exact = dict(scene.batch(scene.geobox()).observations)
    own = {"landsat7": 30, "modis": 480}
    exact |= {m: replace(scene, items=scene.items).read(m, scene.geobox(gsd, m)) for m, gsd in own.items()}
    assert exact["landsat7"].pixels.shape[-2:] == (16, 16)
    fitted = model.with_statistics(store.about["model"]["statistics"])
    with torch.inference_mode():
        wanted = fitted.encode(Batch(observations=exact), patch_m=60).patches[0].numpy()
    np.testing.assert_allclose(store.read(), wanted, atol=1e-4)


def test_a_window_that_cuts_a_coarse_pixel_says_so(tmp_path, model):
    scene = coarse_scene(tmp_path, with_s2=True)
    with pytest.raises(InputError, match="320 x 320 m is not a whole number of landsat7's pixels of 30 m"):
        run.embed(scene, model, tmp_path / "e.zarr", patch_m=40, window_px=32, overlap_px=0)
    with pytest.raises(InputError, match="patches of 40 m are not a whole number of 30 m pixels"):
        run.embed(scene, model, tmp_path / "f.zarr", patch_m=40, modalities=["landsat7"])


# Real imagery ---------------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_belgium_with_a_month_that_holds_nothing(data_dir, model, tmp_path):
    folder = data_dir / "worldcereal_cube_belgium"
    scene = scene_from_files([folder / "s2_geotiff", folder / "s1_geotiff"], tmp_path / "scene", copy=False).scene
    spring = [item for item in scene.items if (2020, 12) < (item.date.year, item.date.month) < (2021, 5)]
    scene = replace(scene, items=tuple(spring))
    options = {"patch_m": 20, "window_px": 24, "overlap_px": 8, "box": scene.geobox()[:48, :48]}
    store = run.embed(scene, model, tmp_path / "e.zarr", **options)
    assert np.isfinite(store.read()).all()
    full = [i for i in spring if (i.modality, i.date.month) != ("sentinel2_l2a", 1)]
    assert 0 < len(full) < len(spring)
    without = run.embed(replace(scene, items=tuple(full)), model, tmp_path / "f.zarr", **options)
    assert without.about["model"]["statistics"] == store.about["model"]["statistics"]
    np.testing.assert_allclose(without.read(), store.read(), atol=1e-5)


@pytest.mark.data
def test_amazon_from_polygons_to_a_map(data_dir, model, tmp_path):
    folder = data_dir / "sentinel2_amazon_polygons"
    given = scene_from_files(
        folder / "sentinel2_l2a_reflectance.tif", tmp_path / "given", dates="2022-07-01", copy=False
    ).scene
    scene = repair(given, examine(given), tmp_path / "scene")
    store = run.embed(scene, model, tmp_path / "e.zarr", patch_m=20, window_px=32, overlap_px=8)
    fitted = fit_to_labels(
        store,
        folder / "training_polygons.geojson",
        column=None,
        kind="logistic",
        split="blocks",
        block_m=300,
        folds=3,
        seed=0,
    )
    assert fitted.report.metrics["accuracy"].estimate > 0.6  # always the largest class: 0.46
    mapped = run.map(scene, fitted.probe, tmp_path / "m.tif", model=model, overlap_px=8)
    again = run.map(store, fitted.probe, tmp_path / "n.tif")
    assert mapped.path.read_bytes() == again.path.read_bytes()
    # An offset left in makes another scene of the same place: the probe's statistics are kept, so it shows.
    moved = model.with_statistics(fitted.probe.source.statistics)
    here = moved.fit_statistics(standards.in_blocks(given, given.geobox(), ["sentinel2_l2a"]))
    offset = np.subtract(here["s2"]["mean"], moved.statistics["s2"].mean)
    np.testing.assert_allclose(offset, 1000, atol=1)
    own = model.with_statistics(here).statistics_of("sentinel2_l2a")
    findings = compare_statistics("sentinel2_l2a", own, moved.statistics_of("sentinel2_l2a"), "the probe")
    assert any(f.level == "warning" and "B02" in f.what for f in findings)


@pytest.mark.data
def test_eurosat_images_by_one_vector_each(data_dir, model, tmp_path):
    folder = data_dir / "eurosat_ms"
    rows = [line.split(",") for line in (folder / "index.csv").read_text().splitlines()[1:]]
    files = [folder / row[0] for row in rows if row[1] in ("Forest", "SeaLake", "Residential")][::3]
    batches = []
    for file in files:
        scene = scene_from_files(file, tmp_path / file.stem, modality="sentinel2", dates="2017-06-15", copy=False).scene
        batches.append(replace(scene.batch(grid_of(file)), pixel_m=10.0))  # in truth 10.007 m
    with pytest.raises(InputError, match="no statistics of sentinel2"):
        embed_samples(model, batches, patch_m=40)
    fitted = model.with_statistics(model.fit_statistics(batches))
    vectors = embed_samples(fitted, batches, patch_m=40)
    assert vectors.shape == (len(files), model.dim)
    # Images of one class are nearer to each other than to others, for any weights.
    kind = np.array([file.name.split("_")[0] for file in files])
    far = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    alike = kind[:, None] == kind[None]
    assert far[alike & (far > 0)].mean() < far[~alike].mean()


@pytest.mark.data
def test_hls_in_flanders_as_a_new_sensor(data_dir, model, registry, tmp_path):
    folder = data_dir / "worldcereal_patches" / "flanders_2018_A"
    (tmp_path / "metadata.json").write_bytes((folder / "metadata.json").read_bytes())
    series = np.load(folder / "timeseries.npz")
    np.savez(tmp_path / "timeseries.npz", **{k: v if k.startswith("label") else v[:6] for k, v in series.items()})
    scene = scene_from_files(tmp_path / "timeseries.npz", tmp_path / "scene").scene
    scene = replace(scene, items=tuple(item for item in scene.items if item.modality != "sentinel1"))
    with pytest.raises(InputError, match="cannot use hls"):
        run.embed(scene, model, tmp_path / "e.zarr", modalities=["hls"])
    sensor = add_modality(model, "hls")
    assert sensor.in_norm == model.sensors["l8"].in_norm
    folder = save_model(model, tmp_path / "with-hls")
    box = scene.geobox()[:48, :48]
    both = run.embed(scene, folder, tmp_path / "both.zarr", patch_m=60, window_px=24, overlap_px=0, box=box)
    assert set(both.about["modalities"]) == {"sentinel2_l2a", "hls"}
    assert set(both.about["model"]["statistics"]) == {"s2", "hls"}
    alone = run.embed(scene, folder, tmp_path / "alone.zarr", patch_m=60, window_px=8, overlap_px=0, modalities=["hls"])
    assert alone.box.affine.a == 60
    for store in (both, alone):
        assert np.isfinite(store.read()).any()


@pytest.mark.data
def test_a_drone_as_a_new_sensor(data_dir, model, registry, tmp_path):
    file = data_dir / "fair_kampala_buildings" / "images" / "z19_309606_261636.tif"
    bands = tuple(
        Band(name=name, gsd=0.3, wavelength=w, common=common)
        for name, w, common in (("R", 0.65, "red"), ("G", 0.56, "green"), ("B", 0.48, "blue"))
    )
    row = Modality(name="drone_rgb", title="Drone", bands=bands, unit="dn", gsd=0.5, kind="still")
    sensor = add_modality(model, row)
    assert sensor.name == "drone_rgb"
    folder = save_model(model, tmp_path / "with-drone")
    save_scene(tmp_path, [make_item("tile", "drone_rgb", "2021-01-01", grid_of(file), {"data": file})], "Drone", None)
    MODALITIES.pop("drone_rgb")  # as in a program that starts afresh: the model declares its sensor
    assert (
        main(
            [
                *("embed", str(tmp_path), "--model", str(folder), "--out", str(tmp_path / "e.zarr"), "--patch-m", "10"),
                *("--window-px", "8", "--overlap-px", "0", "--json"),
            ]
        )
        == 0
    )
    store = open_embeddings(tmp_path / "e.zarr")
    assert store.box.shape == (8, 8)
    assert np.isfinite(store.read()).all(-1).mean() > 0.9
    with rasterio.open(file) as image:
        mean = image.read().mean((1, 2))
    np.testing.assert_allclose(store.about["model"]["statistics"]["drone_rgb"]["mean"], mean, rtol=0.05)
