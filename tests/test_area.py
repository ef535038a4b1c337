from statistics import NormalDist

import numpy as np
import pyproj
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.evaluate import area
from panterra.evaluate.area import class_areas, classes_at, estimate, ground_hectares
from panterra.imagery.raster import write_cog

UTM = GeoBox((40, 60), Affine(10, 0, 478440, 0, -10, 5295740), "EPSG:32633")

# Olofsson et al. (2014), table 8 and section 5: deforestation, forest gain, stable forest, stable non-forest.
COUNTS = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]])
SHARES = (0.02, 0.015, 0.32, 0.645)
REGION_HA = 900_000

# Stehman (2014), table 2: ten points in each of four strata, which are not the map's classes.
STRATA = np.repeat([0, 1, 2, 3], 10)
MAPPED = np.array([*"AAAAAAABBB", *"ABBBBBBBBB", *"BBCCCCCCBB", *"DDDDDDDDDD"])
TRUE = np.array([*"AAAAACBABC", *"ABBBBBAABB", *"CCCCCDDBBA", *"DDDDDDDCCB"])


def points_of(counts):
    mapped, true = np.nonzero(counts)
    times = counts[mapped, true]
    return np.repeat(mapped, times), np.repeat(true, times)


def numbered(letters):
    return np.array([ord(letter) - ord("A") for letter in letters])


def test_the_worked_example_of_olofsson():
    mapped, true = points_of(COUNTS)
    report = estimate(mapped, true, mapped, shares=SHARES, interval="normal")
    half = 1.96 * report.overall.standard_error
    assert (round(report.overall.value, 2), round(half, 2)) == (0.95, 0.02)
    users = [(round(c.users.value, 2), round(1.96 * c.users.standard_error, 2)) for c in report.classes]
    assert users == [(0.88, 0.07), (0.73, 0.10), (0.93, 0.04), (0.96, 0.02)]
    assert [round(c.producers.value, 2) for c in report.classes] == [0.75, 0.85, 0.93, 0.96]
    hectares = [c.area_share.times(REGION_HA) for c in report.classes]
    assert [round(a.value) for a in hectares] == [21158, 11686, 285770, 581386]
    assert round(1.96 * hectares[0].standard_error) == 6158
    assert [a.high - a.value for a in hectares] == pytest.approx([6158, 3756, 15510, 16282], abs=1)
    assert report.counts == tuple(map(tuple, COUNTS))
    assert np.sum(report.proportions) == pytest.approx(1)
    assert [c.mapped_share for c in report.classes] == pytest.approx(SHARES)


def test_the_worked_example_of_stehman():
    size = (40_000, 30_000, 20_000, 10_000)
    report = estimate(numbered(MAPPED), numbered(TRUE), STRATA, shares=np.divide(size, 100_000), pixels=size)
    a, b, c, _ = report.classes
    assert (round(a.area_share.value, 2), round(a.area_share.standard_error, 3)) == (0.35, 0.082)
    assert (round(c.area_share.value, 2), round(c.area_share.standard_error, 3)) == (0.20, 0.064)
    assert (round(report.overall.value, 2), round(report.overall.standard_error, 3)) == (0.63, 0.085)
    assert (round(b.users.value, 3), round(b.users.standard_error, 3)) == (0.574, 0.125)
    assert round(b.producers.value, 3) == 0.794
    assert report.proportions[1][2] == pytest.approx(0.08)


def test_two_strata_by_hand():
    # W = 0.75, 0.25; of 4 points mapped 0, 1 is truly 1; of 5 points mapped 1, 1 is truly 0.
    mapped, true = points_of(np.array([[3, 1], [1, 4]]))
    report = estimate(mapped, true, mapped, shares=(0.75, 0.25), interval="normal")
    error = np.sqrt(0.75**2 * 0.75 * 0.25 / 3 + 0.25**2 * 0.8 * 0.2 / 4)
    assert report.overall.value == pytest.approx(0.75 * 0.75 + 0.25 * 0.8)
    assert report.overall.standard_error == pytest.approx(error)
    assert report.classes[1].area_share.value == pytest.approx(0.75 * 0.25 + 0.25 * 0.8)
    assert report.classes[1].area_share.standard_error == pytest.approx(error)
    assert report.classes[1].producers.value == pytest.approx(0.2 / 0.3875)


def planet(rng):
    """A region of 20,000 pixels in three classes, mapped with errors, in strata of yet another kind."""
    true = rng.choice(3, 20_000, p=(0.6, 0.3, 0.1))
    mapped = np.where(rng.random(20_000) < 0.25, rng.choice(3, 20_000), true)
    stratum = np.where(rng.random(20_000) < 0.3, rng.choice(2, 20_000), (true > 0).astype(int))
    return mapped, true, stratum


def figures_of(report):
    rows = [(c.users, c.producers, c.area_share) for c in report.classes]
    return [report.overall, *(figure for row in rows for figure in row)]


@pytest.mark.parametrize("design", ["map", "other", "random", "poststratified"])
def test_brute_force_agrees_with_the_formulas(design):
    """Draw the sample three hundred times: estimates are right on average, errors as large as they say."""
    rng = np.random.default_rng(5)
    mapped, true, other = planet(rng)
    stratum = {"map": mapped, "other": other, "random": np.zeros(20_000, int), "poststratified": mapped}[design]
    members = [np.flatnonzero(stratum == h) for h in range(stratum.max() + 1)]
    shares = [len(m) / 20_000 for m in members]
    truth = figures_of(estimate(mapped, true, np.zeros(20_000, int), shares=(1.0,), pixels=(20_000,)))
    values, errors, covered = [], [], []
    for _ in range(300):
        if design == "poststratified":
            drawn = rng.choice(20_000, 400, replace=False)
        else:
            drawn = np.concatenate([rng.choice(m, 400 // len(members), replace=False) for m in members])
        figures = figures_of(estimate(mapped[drawn], true[drawn], stratum[drawn], shares=shares))
        values.append([f.value for f in figures])
        errors.append([f.standard_error for f in figures])
        covered.append([f.low <= t.value <= f.high for f, t in zip(figures, truth, strict=True)])
    spread = np.std(values, axis=0)
    np.testing.assert_allclose(np.mean(values, axis=0), [t.value for t in truth], atol=0.012)
    np.testing.assert_allclose(np.mean(errors, axis=0), spread, rtol=0.17)
    assert np.mean(covered) == pytest.approx(0.955, abs=0.015)


def test_a_census_has_no_error():
    mapped, true, _ = planet(np.random.default_rng(1))
    report = estimate(mapped, true, mapped, shares=np.bincount(mapped) / 20_000, pixels=np.bincount(mapped))
    assert report.overall.value == pytest.approx((mapped == true).mean())
    assert report.overall.standard_error == pytest.approx(0, abs=1e-12)
    assert [c.area_share.value for c in report.classes] == pytest.approx(np.bincount(true) / 20_000)


def test_wilson_intervals_of_a_share_are_wilsons():
    """Of one class against the rest, in one stratum, an interval for a binomial share."""
    mapped, true = np.zeros(50, int), np.repeat([0, 1], [43, 7])
    share = estimate(mapped, true, mapped, shares=(1.0,)).classes[1].area_share
    wanted = NormalDist().inv_cdf(0.975)
    centre = (7 + wanted**2 / 2) / (50 + wanted**2)
    half = wanted / (50 + wanted**2) * np.sqrt(7 * 43 / 50 + wanted**2 / 4)
    assert (share.low, share.high) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_wilson_intervals_stay_between_0_and_1_and_are_never_empty():
    mapped, true = points_of(np.array([[10, 0], [1, 9]]))
    wilson = estimate(mapped, true, mapped, shares=(0.5, 0.5)).classes[0]
    normal = estimate(mapped, true, mapped, shares=(0.5, 0.5), interval="normal").classes[0]
    assert normal.users.low == normal.users.high == 1
    assert normal.producers.high > 1
    assert 0.7 < wilson.users.low < wilson.users.high == 1
    assert wilson.producers.high <= 1
    alone = estimate([4] * 30, [4] * 30, [0] * 30, shares=(1.0,))
    assert 0.85 < alone.overall.low < 0.9
    assert alone.overall.high == 1


def test_wilson_intervals_are_the_normal_ones_where_there_are_many_points():
    mapped, true = points_of(COUNTS * 100)
    pair = [estimate(mapped, true, mapped, shares=SHARES, interval=kind) for kind in ("wilson", "normal")]
    for wilson, normal in zip(*map(figures_of, pair), strict=True):
        assert (wilson.value, wilson.standard_error) == (normal.value, normal.standard_error)
        assert (wilson.low, wilson.high) == pytest.approx((normal.low, normal.high), abs=0.2 * normal.standard_error)


def test_what_no_point_shows_may_be_there_all_the_same():
    """No omission was met in the large stratum, yet the area of the small class may well be larger."""
    mapped, true = points_of(np.array([[200, 0], [3, 47]]))
    wilson = estimate(mapped, true, mapped, shares=(0.98, 0.02)).classes[1]
    normal = estimate(mapped, true, mapped, shares=(0.98, 0.02), interval="normal").classes[1]
    assert normal.area_share.high < 0.021
    assert wilson.area_share.high > 0.025
    assert normal.producers.low == 1
    assert wilson.producers.low < 0.8


def test_a_class_that_is_never_mapped_has_no_users_accuracy():
    report = estimate([0, 0, 0, 1, 1], [0, 0, 2, 1, 1], [0, 0, 0, 1, 1], shares=(0.5, 0.5))
    missed = report.classes[2]
    assert (missed.code, missed.mapped_points, missed.producers.value) == (2, 0, 0)
    assert np.isnan(missed.users.value)
    assert report.as_dict()["classes"][2]["users"]["value"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shares": (0.5, 0.6)}, "wanted positive shares that sum to 1"),
        ({"stratum": [0, 0, 0, 2]}, "strata are numbered 0 to 2; wanted 0 to 1"),
        ({"stratum": [0, 0, 0, 1]}, "stratum small has 1 labelled points, and an error needs 2 or more"),
        ({"reference": [0, 0, 1]}, "wanted one of each per point"),
        ({"pixels": (2, 1)}, "stratum small has more points than pixels"),
        ({"confidence": 95}, "confidence is 95; wanted more than 0 and less than 1"),
    ],
)
def test_what_a_person_can_put_right(change, message):
    given = {"mapped": [0, 0, 1, 1], "reference": [0, 0, 1, 1], "stratum": [0, 0, 1, 1], "shares": (0.5, 0.5)}
    with pytest.raises(InputError, match=message):
        estimate(**{**given, "names": ("large", "small"), **change})


GRIDS = {
    "UTM": (UTM, 1e-6),
    "UTM, three zones off": (GeoBox((40, 60), Affine(10, 0, -800000, 0, -10, 5295740), "EPSG:32633"), 1e-6),
    "web mercator": (GeoBox((40, 60), Affine(30, 0, 1e6, 0, -30, 8e6), "EPSG:3857"), 1e-6),
    "equal area": (GeoBox((40, 60), Affine(100, 0, 4321000, 0, -100, 3210000), "EPSG:3035"), 1e-6),
    "feet": (GeoBox((40, 60), Affine(100, 0, 1e6, 0, -100, 2e5), "EPSG:2263"), 1e-6),
    "degrees": (GeoBox((40, 60), Affine(0.001, 0, 179.98, 0, -0.001, -16), "EPSG:4326"), 1e-5),
    "coarse degrees": (GeoBox((180, 360), Affine(0.5, 0, 0, 0, -0.5, 90), "EPSG:4326"), 4e-3),
    "the pole": (GeoBox((40, 60), Affine(1000, 0, -30500, 0, -1000, 20500), "EPSG:3413"), 1e-5),
}


@pytest.mark.parametrize("name", GRIDS)
def test_pixels_cover_what_geodesics_around_them_enclose(name):
    box, tolerance = GRIDS[name]
    hectares = ground_hectares(box)
    to_degrees = pyproj.Transformer.from_crs(str(box.crs), "EPSG:4326", always_xy=True)
    geod = pyproj.Geod(ellps="WGS84")
    height, width = box.shape
    steps = np.arange(20) / 20
    for row, col in [(1, 1), (height // 2, width // 3), (height - 1, width - 1)]:
        cols = col + np.concatenate([steps, np.ones(20), 1 - steps, np.zeros(20)])
        rows = row + np.concatenate([np.zeros(20), steps, np.ones(20), 1 - steps])
        lon, lat = to_degrees.transform(*(box.affine @ (cols, rows)))
        wanted = abs(geod.polygon_area_perimeter(lon, lat)[0]) / 10_000
        assert hectares[row, col] == pytest.approx(wanted, rel=tolerance)


@pytest.fixture
def land(tmp_path):
    codes = np.zeros(UTM.shape, np.uint8)
    codes[5:, :20], codes[5:, 20:] = 3, 7
    write_cog(tmp_path / "land.tif", codes, UTM, nodata=0, categories={3: "forest", 7: "field"})
    return tmp_path / "land.tif", codes


def test_class_areas_leave_out_nodata(land, monkeypatch):
    path, codes = land
    forest, field = class_areas(path)
    assert (forest.code, forest.name, forest.pixels) == (3, "forest", 35 * 20)
    assert field.pixels == 35 * 40
    assert field.hectares == pytest.approx(ground_hectares(UTM)[codes == 7].sum())
    assert field.hectares == pytest.approx(14, rel=1e-3)
    monkeypatch.setattr(area, "BLOCK_PX", 16)
    assert class_areas(path)[1].hectares == pytest.approx(field.hectares, rel=1e-9)


def test_classes_at_pixels(land):
    path, _ = land
    row, col = np.array([39, 0, 7, 7, -1, 40]), np.array([59, 0, 19, 20, 3, 3])
    assert classes_at(path, row, col).tolist() == [7, -1, 3, 7, -1, -1]


def test_a_map_of_values_has_no_classes(tmp_path):
    write_cog(tmp_path / "height.tif", np.ones(UTM.shape, np.float32), UTM)
    with pytest.raises(InputError, match="holds float32 values, not classes"):
        class_areas(tmp_path / "height.tif")
