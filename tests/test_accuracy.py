import json

import geopandas as gpd
import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.commands.accuracy import assess, draw_points
from panterra.errors import InputError
from panterra.evaluate.area import ground_hectares
from panterra.imagery.raster import write_cog

BOX = GeoBox((100, 120), Affine(10, 0, 478440, 0, -10, 5295740), "EPSG:32633")
NAMES = {1: "forest", 2: "field", 3: "water"}


@pytest.fixture(scope="module")
def region(tmp_path_factory):
    """A map of three classes with a fifth of its pixels wrong, and the truth."""
    rng = np.random.default_rng(0)
    truth = np.repeat([1, 2, 3], [60, 45, 15])[None] * np.ones((100, 1), int)
    shown = np.where(rng.random(truth.shape) < 0.2, rng.integers(1, 4, truth.shape), truth).astype(np.uint8)
    path = tmp_path_factory.mktemp("region") / "map.tif"
    write_cog(path, shown, BOX, nodata=0, categories=NAMES)
    return path, shown, truth


def plan(path, out, **change):
    defaults = {"size": 600, "standard_error": None, "users_accuracy": (), "allocation": "proportional"}
    return draw_points(path, out, **{**defaults, "minimum": 50, "seed": 1, **change})


def fill(points, truth, names=NAMES, column="reference"):
    """Do what an interpreter does: look at each place and write down what is there."""
    frame = gpd.read_file(points)
    places = frame.to_crs(32633).geometry
    row, col = ((BOX.affine.f - places.y) // 10).astype(int), ((places.x - BOX.affine.c) // 10).astype(int)
    codes = truth[row.to_numpy(), col.to_numpy()]
    return frame.assign(**{column: [names[c] for c in codes] if names else codes})


def compare(path, reference, **change):
    return assess(path, reference, **{"column": "reference", "confidence": 0.95, "interval": "wilson", **change})


def test_from_a_map_to_honest_figures(region, tmp_path):
    path, shown, truth = region
    design = plan(path, tmp_path / "points.geojson")
    fill(tmp_path / "points.geojson", truth).to_file(tmp_path / "filled.gpkg")
    found = compare(path, tmp_path / "filled.gpkg")
    report, hectares = found.report, ground_hectares(BOX)
    assert (found.stratified, found.unlabelled, report.num_points) == (True, 0, 600)
    assert found.hectares == pytest.approx(hectares.sum())
    assert found.names == NAMES
    assert report.overall.low < (shown == truth).mean() < report.overall.high
    for code in NAMES:
        area = found.hectares_of(code)
        assert area.low < hectares[truth == code].sum() < area.high
        assert found.mapped[code] == pytest.approx(hectares[shown == code].sum())
    # Counting pixels of the map is wrong by more than the interval allows: that is why points are needed.
    assert found.mapped[3] > found.hectares_of(3).high
    assert report.overall.standard_error == pytest.approx(design.standard_error, rel=0.15)
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["classes"][0]["name"] == "forest"
    assert plain["classes"][0]["area_ha"]["value"] == pytest.approx(found.hectares_of(1).value)
    assert plain["design"] == "stratified"


def test_points_of_an_older_map_judge_a_newer_one(region, tmp_path):
    path, shown, truth = region
    plan(path, tmp_path / "points.geojson")
    fill(tmp_path / "points.geojson", truth, names=None).to_file(tmp_path / "filled.geojson")
    better = np.where(np.random.default_rng(1).random(truth.shape) < 0.5, truth, shown).astype(np.uint8)
    write_cog(tmp_path / "better.tif", better, BOX, nodata=0)
    found = compare(tmp_path / "better.tif", tmp_path / "filled.geojson")
    assert found.report.overall.low < (better == truth).mean() < found.report.overall.high
    assert found.report.overall.value > compare(path, tmp_path / "filled.geojson").report.overall.value


def test_a_simple_random_sample_is_poststratified_unless_it_is_to_stay_simple(region, tmp_path):
    path, shown, truth = region
    rng = np.random.default_rng(2)
    col, row = rng.uniform(0, 120, 500), rng.uniform(0, 100, 500)
    places = gpd.points_from_xy(BOX.affine.c + 10 * col, BOX.affine.f - 10 * row, crs=32633)
    codes = truth[row.astype(int), col.astype(int)]
    gpd.GeoDataFrame({"seen": [NAMES[c].upper() for c in codes]}, geometry=places).to_file(tmp_path / "random.gpkg")
    tight = compare(path, tmp_path / "random.gpkg", column="seen")
    simple = compare(path, tmp_path / "random.gpkg", column="seen", simple=True)
    assert not tight.stratified
    assert simple.report.overall.value == pytest.approx((shown[row.astype(int), col.astype(int)] == codes).mean())
    share = tight.report.classes[2].area_share
    assert share.standard_error < simple.report.classes[2].area_share.standard_error
    assert share.low < (truth == 3).mean() < share.high
    assert simple.hectares == pytest.approx(tight.hectares)


def test_points_not_looked_at_are_counted(region, tmp_path):
    path, _, truth = region
    plan(path, tmp_path / "points.geojson")
    frame = fill(tmp_path / "points.geojson", truth)
    frame.loc[:19, "reference"] = None
    frame.to_file(tmp_path / "filled.geojson")
    found = compare(path, tmp_path / "filled.geojson")
    assert (found.unlabelled, found.report.num_points) == (20, 580)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "lake"}, "has the class 'lake', which the map does not show; it shows forest, field, water"),
        ({"stratum_ha": None}, "disagree about its size|no column 'stratum_ha'"),
        ({"stratum_pixels": 5}, "has more points than pixels"),
        ({"reference": None}, "has no feature with both a geometry and a value in 'reference'"),
    ],
)
def test_what_a_person_can_put_right(region, tmp_path, change, message):
    path, _, truth = region
    plan(path, tmp_path / "points.geojson")
    fill(tmp_path / "points.geojson", truth).assign(**change).to_file(tmp_path / "filled.geojson")
    with pytest.raises(InputError, match=message):
        compare(path, tmp_path / "filled.geojson")


def test_points_off_the_map_say_so(region, tmp_path):
    path, shown, truth = region
    plan(path, tmp_path / "points.geojson")
    fill(tmp_path / "points.geojson", truth).to_file(tmp_path / "filled.geojson")
    write_cog(tmp_path / "half.tif", shown[:50], BOX[:50], nodata=0, categories=NAMES)
    with pytest.raises(InputError, match=r"points of .* lie where .* has no data"):
        compare(tmp_path / "half.tif", tmp_path / "filled.geojson")


def test_strata_without_their_sizes_are_refused(region, tmp_path):
    path, _, truth = region
    plan(path, tmp_path / "points.geojson")
    fill(tmp_path / "points.geojson", truth).drop(columns="stratum_ha").to_file(tmp_path / "filled.geojson")
    with pytest.raises(InputError, match="no column 'stratum_ha'"):
        compare(path, tmp_path / "filled.geojson")


def test_added_points_are_refused(region, tmp_path):
    path, _, truth = region
    plan(path, tmp_path / "points.geojson")
    frame = fill(tmp_path / "points.geojson", truth)
    frame.loc[3, "stratum"] = None
    frame.to_file(tmp_path / "filled.geojson")
    with pytest.raises(InputError, match=r"1 points of .* have no stratum"):
        compare(path, tmp_path / "filled.geojson")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"standard_error": 0.01}, "the size of the sample or the standard error"),
        ({"users_accuracy": ["water"]}, "'water' is no expectation; wanted a class and a share, such as water=0.95"),
        ({"users_accuracy": ["=0.9"]}, "shows no class ''"),
    ],
)
def test_how_a_sample_is_asked_for(region, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        plan(region[0], tmp_path / "points.geojson", **change)


def test_expectations_move_points(region, tmp_path):
    change = {"size": None, "standard_error": 0.02, "allocation": "neyman", "users_accuracy": ["field=0.5", "1=0.99"]}
    design = plan(region[0], tmp_path / "points.geojson", **change)
    assert design.users_accuracy == (0.99, 0.5, 0.8)
    assert design.points[1] > design.points[0]
