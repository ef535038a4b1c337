import json
import math

import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from panterra.errors import InputError
from panterra.imagery.raster import grid_of, read_legend, read_onto
from panterra.imagery.stac import open_scene
from panterra.modalities import MODALITIES
from panterra.planet import CLASSES, SENSORS, SOUTHERN_CLASSES, Planet, scenes, write_planet_scene

CODES = {c.name: c.code for c in CLASSES}
CLEAR = Planet(seed=0, clouds=0)
MAPS = ("srtm", "worldcover", "wri_canopy_height_map")


def box_at(x: float, y: float, size: int, pixel: float = 10.0) -> GeoBox:
    return GeoBox((size, size), Affine(pixel, 0, x, 0, -pixel, y), "EPSG:32633")


def band(modality: str, pixels: np.ndarray, name: str) -> np.ndarray:
    return pixels[MODALITIES[modality].band_names.index(name)]


@pytest.fixture(scope="module")
def town():
    """A place with every class."""
    return CLEAR.ground(box_at(477400, 5296800, 256))


@pytest.mark.parametrize(
    "planet", [Planet(seed=0, clouds=0.4), Planet(seed=5, clouds=0.4, south=0.8, motorways=True)], ids=["0", "south"]
)
@pytest.mark.parametrize(
    ("pixel", "size", "modalities"),
    [
        (10.0, 70, (*SENSORS, *MAPS)),
        (20.0, 40, ("sentinel2_l2a", "sentinel1")),
        (30.0, 30, ("landsat", "landsat7", "srtm", "worldcover", "alos2")),
        (250.0, 12, ("modis", "worldcover", "wri_canopy_height_map", "sentinel1")),
        (2.5, 60, ("naip_10", "sentinel1")),
        (0.2, 150, ("aerial", "wri_canopy_height_map")),
    ],
)
def test_a_window_is_the_crop_of_a_larger_one(pixel, size, modalities, planet):
    random = np.random.default_rng(planet.seed)
    left, top = (np.floor((c + random.uniform(-8e3, 8e3)) / pixel) * pixel for c in (476100, 5294400))
    large = box_at(left, top, size, pixel)
    row, col, height, width = (int(n) for n in random.integers(3, size // 2, 4))
    inside = np.s_[row : row + height, col : col + width]
    whole, part = planet.ground(large), planet.ground(large[inside])
    np.testing.assert_array_equal(planet.truth(part), planet.truth(whole)[inside])
    for modality in modalities:
        for date in ("2023-06-13", "2022-10-04"):
            pixels, valid = planet.observe(modality, whole, date)
            np.testing.assert_array_equal(planet.observe(modality, part, date)[0], pixels[:, *inside])
            np.testing.assert_array_equal(planet.observe(modality, part, date)[1], valid[inside])


def test_ground_saves_time_and_nothing_else(town):
    box = town.box
    np.testing.assert_array_equal(CLEAR.truth(box), CLEAR.truth(town))
    np.testing.assert_array_equal(
        CLEAR.observe("sentinel1", box, "2023-05-01")[0], CLEAR.observe("sentinel1", town, "2023-05-01")[0]
    )


def test_the_default_place_has_every_class(town):
    shares = {c.name: (CLEAR.truth(town) == c.code).mean() for c in CLASSES}
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) > 0.003, shares
    # Who changes the planet changes every figure that was measured on it: say so in the changelog.
    recorded = {"winter wheat": 0.1272, "built-up": 0.0969}
    assert {name: shares[name] for name in recorded} == pytest.approx(recorded, abs=0.002)


def test_seeds_and_dates_make_a_difference(town):
    assert (Planet(seed=1).truth(town.box) != CLEAR.truth(town)).mean() > 0.3
    first, second = (CLEAR.observe("sentinel1", town, f"2023-05-0{day}")[0] for day in (1, 2))
    assert np.corrcoef(first[0].ravel(), second[0].ravel())[0, 1] < 0.95


def test_the_south_grows_other_things(town):
    """Orchards take the place of fields and scrub that of meadows and woods, the more the further south."""
    orchards, shrubs = (c.code for c in SOUTHERN_CLASSES)
    fields = [CODES[name] for name in ("winter wheat", "rapeseed", "maize", "alfalfa")]
    towns = [CODES["water"], CODES["built-up"]]
    north, *souths = (Planet(seed=0, clouds=0, south=share).truth(town.box) for share in (0, 0.5, 1))
    np.testing.assert_array_equal(north, CLEAR.truth(town))
    for south in souths:
        assert np.isin(north[south == orchards], fields).mean() > 0.98
        np.testing.assert_array_equal(np.isin(south, towns), np.isin(north, towns))
    for code, least in ((orchards, 0.1), (shrubs, 0.03)):
        some, most = ((truth == code).mean() for truth in souths)
        assert least < most
        assert 0.2 * most < some < most
    planet = Planet(seed=0, clouds=0, south=1)
    codes = planet.observe("worldcover", town.box, "2023-07-10")[0][0]
    assert set(np.unique(codes[souths[1] == shrubs])) == {20}
    # Vines and dry grass show their soil in summer: redder than what stood there.
    july = "2023-07-25"
    hot, mild = (band("sentinel2_l2a", p.observe("sentinel2_l2a", town.box, july)[0], "B04") for p in (planet, CLEAR))
    assert hot[souths[1] == shrubs].mean() > 1.5 * mild[souths[1] == shrubs].mean()


def test_motorways_are_wide_roads_that_nothing_else_gives_way_to():
    box = box_at(520000, 5310000, 300)
    without, crossed = (Planet(seed=12, clouds=0, motorways=wide) for wide in (False, True))
    before, after = (planet.truth(box) for planet in (without, crossed))
    changed = before != after
    assert 0.002 < changed.mean() < 0.06
    assert np.isin(after[changed], [CODES["built-up"], CODES["grassland"]]).mean() > 0.8


@pytest.mark.parametrize("south", [-0.1, 1.5])
def test_a_south_is_a_share(south):
    with pytest.raises(InputError, match=r"south=.* came; wanted a share from 0 to 1"):
        Planet(south=south)


@pytest.mark.parametrize("modality", [*SENSORS, *MAPS])
def test_values_are_in_the_declared_unit(modality, town):
    spec = MODALITIES[modality]
    pixels, valid = CLEAR.observe(modality, town, "2023-07-10")
    assert pixels.dtype == np.float32
    assert pixels.shape == (len(spec.bands), 256, 256)
    assert valid.all()
    low, high = spec.plausible or (0, 255)
    assert ((pixels >= low) & (pixels <= high)).mean() > 0.97
    if spec.unit in ("dn", "code", "metres"):
        assert (pixels == np.rint(pixels)).all()


def test_landsat_counts_follow_the_usgs_formulas(town):
    counts, _ = CLEAR.observe("landsat", town, "2023-07-10")
    declination = math.radians(23.44) * math.sin(2 * math.pi * (191 - 81) / 365)
    up = math.sin(declination) * math.sin(math.radians(48)) + math.cos(declination) * math.cos(math.radians(48)) * (
        math.cos(math.radians(15 * (10.2 - 12)))
    )
    top_of_air = CLEAR.observe("sentinel2", town, "2023-07-10")[0]
    for ours, theirs in (("B4", "B04"), ("B5", "B8A"), ("B6", "B11")):
        reflectance = (band("landsat", counts, ours) * 2e-5 - 0.1) / up
        assert reflectance.mean() == pytest.approx(band("sentinel2", top_of_air, theirs).mean() / 1e4, rel=0.1)
    kelvin = 1321.0789 / np.log(774.8853 / (band("landsat", counts, "B10") * 3.342e-4 + 0.1) + 1)
    truth = CLEAR.truth(town)
    assert kelvin.min() > 280
    assert kelvin.max() < 325
    assert kelvin[truth == CODES["built-up"]].mean() > kelvin[truth == CODES["water"]].mean() + 5


def test_bands_are_as_coarse_as_the_instrument(town):
    pixels, _ = CLEAR.observe("sentinel2_l2a", town, "2023-06-01")
    left, bottom = int(town.box.affine.c) // 10, int(town.box.affine.f) // 10 - 256
    for name, size in (("B11", 2), ("B09", 6)):
        image = band("sentinel2_l2a", pixels, name)[::-1]
        block = image[-bottom % size :, -left % size :][:size, :size]
        assert (block == block[0, 0]).all(), name
    assert np.unique(band("sentinel2_l2a", pixels, "B02")[:2, :2]).size > 1


def test_crops_follow_their_calendars(town):
    truth = CLEAR.truth(town)

    def index(date: str, crop: str) -> float:
        pixels, _ = CLEAR.observe("sentinel2_l2a", town, date)
        red, infrared = (band("sentinel2_l2a", pixels, name)[truth == CODES[crop]].mean() for name in ("B04", "B08"))
        return float((infrared - red) / (infrared + red))

    assert index("2023-05-15", "winter wheat") > index("2023-05-15", "maize") + 0.2
    assert index("2023-08-10", "maize") > index("2023-08-10", "winter wheat") + 0.2
    assert index("2023-07-01", "broadleaf forest") > index("2023-02-01", "broadleaf forest") + 0.2
    assert abs(index("2023-07-01", "conifer forest") - index("2023-02-01", "conifer forest")) < 0.2
    spring, _ = CLEAR.observe("sentinel2_l2a", town, "2023-05-01")
    yellow = spring[2] - spring[0]
    assert yellow[truth == CODES["rapeseed"]].mean() > yellow[truth == CODES["winter wheat"]].mean() + 200


def test_radar_tells_water_from_fields_from_towns_through_speckle(town):
    truth = CLEAR.truth(town)
    co = CLEAR.observe("sentinel1", town, "2023-06-01")[0][0]
    levels = [float(np.median(co[truth == CODES[name]])) for name in ("water", "winter wheat", "built-up")]
    assert levels[0] + 3 < levels[1] < levels[2] - 3
    # Two dates of one week share the scene; their ratio is speckle, of about 4 looks each and correlated.
    week = [10 ** (CLEAR.observe("sentinel1", town, f"2023-08-1{day}")[0][0] / 10) for day in (0, 1)]
    wood = truth == CODES["broadleaf forest"]
    spread = np.std(week[0][wood] / week[0][wood].mean())
    assert 0.4 < spread < 0.75
    neighbours = np.corrcoef(week[0][:, :-1].ravel(), week[0][:, 1:].ravel())[0, 1]
    assert neighbours > 0.3


def test_classes_need_more_than_one_band_or_one_date():
    dates = ("2023-04-20", "2023-06-09", "2023-07-21", "2023-09-14")
    random = np.random.default_rng(0)

    def sample(x: float, y: float) -> tuple[np.ndarray, np.ndarray]:
        ground = CLEAR.ground(box_at(x, y, 400))
        series = np.stack([CLEAR.observe("sentinel2_l2a", ground, date)[0] for date in dates])
        truth = CLEAR.truth(ground).ravel()
        chosen = np.concatenate([random.permutation(np.flatnonzero(truth == c.code))[:120] for c in CLASSES])
        return series.reshape(4, 12, -1)[:, :, chosen], truth[chosen]

    (train, known), (test, asked) = sample(476000, 5297500), sample(474000, 5295500)

    def score(part: slice | int, bands: slice) -> float:
        left, right = (s[part][..., bands, :].reshape(-1, s.shape[-1]).T for s in (train, test))
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(left, known)
        return float(np.mean(probe.predict(right) == asked))

    assert score(1, slice(3, 4)) < 0.4
    one_date, all_dates = score(1, slice(None)), score(slice(None), slice(None))
    assert 0.5 < one_date < 0.8
    assert one_date + 0.08 < all_dates < 0.97


def test_clouds_hide_the_ground_and_cast_shadows_beside_them():
    cloudy, box = Planet(seed=0, clouds=0.3), box_at(4e5, 5.4e6, 240, 25)
    ground = cloudy.ground(box)
    dates = [f"2023-{month:02d}-{day:02d}" for month in (5, 6, 7) for day in range(1, 29, 2)]
    hidden = {date: 1 - cloudy.observe("landsat7", ground, date)[1].mean() for date in dates}
    assert 0.2 < np.mean(list(hidden.values())) < 0.5  # clouds and shadows
    assert min(hidden.values()) < 0.02
    assert max(hidden.values()) > 0.9
    date = min(dates, key=lambda date: abs(hidden[date] - 0.4))
    pixels, valid = cloudy.observe("sentinel2_l2a", ground, date)
    clear, all_valid = CLEAR.observe("sentinel2_l2a", ground, date)
    assert all_valid.all()
    assert np.abs(pixels[0] - clear[0])[valid].mean() < 60
    bright, dark = pixels[0] > clear[0] + 1000, pixels[3] < 0.75 * clear[3]
    assert bright[~valid].mean() > 0.3
    assert dark[~valid].mean() > 0.05
    assert (bright | dark)[valid].mean() < 0.01


def test_aircraft_fly_on_clear_days():
    ground = Planet(clouds=0.9).ground(box_at(477400, 5296800, 40))
    assert Planet(clouds=0.9).observe("aerial", ground, "2023-06-01")[1].all()


def test_elevation_and_canopy_are_seen(town):
    height, _ = CLEAR.observe("wri_canopy_height_map", town, "2023-06-01")
    truth = CLEAR.truth(town)
    assert height[0][truth == CODES["conifer forest"]].mean() > 8
    assert height[0][truth == CODES["winter wheat"]].max() == 0
    surface, _ = CLEAR.observe("srtm", town, "2023-06-01")
    assert 200 < surface.min() < surface.max() < 1500


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "_CHUNK", 64)
        return write_planet_scene(
            folder / "scene",
            size_px=150,
            dates=("2023-06-13", "2023-04-28"),
            modalities=("sentinel2_l2a", "sentinel1", "landsat", "srtm"),
            labels=110,
            clouds=0.3,
        )


def test_a_scene_reads_back_as_observed_whatever_the_chunks(scene):
    opened, planet = open_scene(scene), Planet(seed=0, clouds=0.3)
    assert set(opened.modalities) == {"sentinel2_l2a", "sentinel1", "landsat", "srtm"}
    assert [str(date) for date in opened.dates("sentinel2_l2a")] == ["2023-04-28", "2023-06-13"]
    assert len(opened.dates("srtm")) == 1
    assert opened.licence == "CC0-1.0"
    box = opened.geobox(modality="sentinel2_l2a")
    for modality in ("sentinel2_l2a", "sentinel1"):
        seen = opened.read(modality, box)
        for step, date in enumerate(opened.dates(modality)):
            pixels, valid = planet.observe(modality, box, date)
            kept = pixels if modality == "sentinel1" else np.rint(pixels)
            np.testing.assert_array_equal(seen.valid[0, step].numpy(), valid)
            np.testing.assert_array_equal(seen.pixels[0, step].numpy()[:, valid], kept[:, valid])
    landsat = grid_of(scene / "landsat_2023-06-13.tif")
    assert landsat.resolution.x == 15


def test_the_truth_carries_names_and_colours(scene):
    names, colours = read_legend(scene / "truth.tif")
    assert names == {c.code: c.name for c in CLASSES}
    assert colours == {c.code: c.colour for c in CLASSES}
    box = grid_of(scene / "truth.tif")
    codes, _ = read_onto(scene / "truth.tif", box, categorical=True)
    np.testing.assert_array_equal(codes[0], CLEAR.truth(box))


def test_labels_are_true_balanced_and_spread(scene):
    features = json.loads((scene / "labels.geojson").read_text())["features"]
    assert len(features) == 110
    names = [feature["properties"]["class"] for feature in features]
    counts = [names.count(name) for name in set(names)]
    assert len(counts) == len(CLASSES)
    assert max(counts) <= 14
    box = grid_of(scene / "truth.tif")
    truth = CLEAR.truth(box)
    lonlat = np.array([feature["geometry"]["coordinates"] for feature in features])
    x, y = Transformer.from_crs("EPSG:4326", "EPSG:32633", always_xy=True).transform(*lonlat.T)
    cols, rows = ((x - box.affine.c) // 10).astype(int), ((box.affine.f - y) // 10).astype(int)
    assert [CODES[name] for name in names] == truth[rows, cols].tolist()
    wheat = np.array([name == "winter wheat" for name in names])
    assert np.ptp(rows[wheat]) > 75
    assert np.ptp(cols[wheat]) > 75


def test_the_same_scene_has_the_same_bytes(tmp_path):
    options = {"size_px": 24, "dates": ("2023-06-01",), "modalities": ("sentinel2_l2a", "worldcover"), "labels": 10}
    first, second = (write_planet_scene(tmp_path / name, **options) for name in ("a", "b"))
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    assert {"scene.json", "labels.geojson", "truth.tif", "worldcover_2023-06-01.tif"} <= set(files)
    for name in files:
        if name != "scene.json":
            assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize(
    "box",
    [
        GeoBox((8, 8), Affine(10, 0, 5e5, 0, -10, 5.3e6), "EPSG:32632"),
        GeoBox((8, 8), Affine(10, 1, 5e5, 1, -10, 5.3e6), "EPSG:32633"),
        GeoBox((8, 8), Affine(10, 0, 5e5, 0, 10, 5.3e6), "EPSG:32633"),
        GeoBox((8, 8), Affine(10, 0, 5e5, 0, -20, 5.3e6), "EPSG:32633"),
    ],
)
def test_other_grids_are_refused(box):
    with pytest.raises(InputError, match="square north-up pixels in EPSG:32633"):
        CLEAR.truth(box)


def test_what_the_planet_lacks_is_said(tmp_path):
    with pytest.raises(InputError, match="shows no 'gse'; it has sentinel2_l2a"):
        CLEAR.observe("gse", box_at(5e5, 5.3e6, 8), "2023-01-01")
    with pytest.raises(InputError, match="ground of planet 0 came; wanted that of planet 1"):
        Planet(seed=1).truth(CLEAR.ground(box_at(5e5, 5.3e6, 8)))
    with pytest.raises(InputError, match="shows no 'moon'"):
        write_planet_scene(tmp_path, modalities=("moon",))
    with pytest.raises(InputError, match="write it as YYYY-MM-DD"):
        CLEAR.observe("sentinel1", box_at(5e5, 5.3e6, 8), "spring")
    with pytest.raises(InputError, match="a share from 0 to below 1"):
        Planet(clouds=1.5)
    with pytest.raises(InputError, match="8 pixels or more"):
        write_planet_scene(tmp_path, size_px=4)
