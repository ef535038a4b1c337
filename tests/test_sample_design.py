import json

import geopandas as gpd
import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.evaluate import area
from panterra.evaluate.area import classes_at, estimate, ground_hectares
from panterra.evaluate.sample_design import allocate, design_sample, draw, sample_size, write_points
from panterra.imagery.raster import write_cog

SHARES = (0.02, 0.015, 0.32, 0.645)
USERS = (0.7, 0.6, 0.9, 0.95)
UTM = GeoBox((90, 120), Affine(10, 0, 478440, 0, -10, 5295740), "EPSG:32633")


@pytest.fixture(scope="module")
def land(tmp_path_factory):
    """Three classes in bands, the third rare, and a border without data."""
    codes = np.full(UTM.shape, 1, np.uint8)
    codes[:, 60:], codes[40:43, 60:80] = 2, 9
    codes[:, :10] = 0
    path = tmp_path_factory.mktemp("land") / "land.tif"
    write_cog(path, codes, UTM, nodata=0, categories={1: "forest", 2: "field", 9: "pond"})
    return path, codes


def test_the_sample_size_of_olofsson():
    # Section 5.1.1 of the paper: 641 points.
    assert sample_size(SHARES, USERS, 0.01) == 641


def test_the_promised_standard_error_is_met():
    """Neyman's allocation of the computed size has the error that was asked for, if the conjectures hold."""
    points = allocate(641, SHARES, how="neyman", users_accuracy=USERS)
    w, u = np.array(SHARES), np.array(USERS)
    assert np.sqrt((w**2 * u * (1 - u) / points).sum()) == pytest.approx(0.01, rel=0.01)


def test_small_regions_need_fewer_points():
    assert sample_size(SHARES, USERS, 0.01, pixels=(20, 15, 320, 645)) < 400
    assert sample_size(SHARES, USERS, 0.01, pixels=(2e6, 1.5e6, 3.2e7, 6.45e7)) == 641


def test_allocations_by_hand():
    assert allocate(640, SHARES) == (13, 9, 205, 413)
    assert allocate(640, SHARES, how="equal") == (160, 160, 160, 160)
    assert allocate(641, SHARES, minimum=75) == (75, 75, 163, 328)
    # W S = 0.4 * 0.5, 0.6 * 0.3
    assert allocate(380, (0.4, 0.6), how="neyman", users_accuracy=(0.5, 0.9)) == (200, 180)


@given(
    shares=st.lists(st.floats(1e-4, 1), min_size=1, max_size=12),
    total=st.integers(10, 2000),
    minimum=st.integers(0, 60),
    how=st.sampled_from(["proportional", "equal", "neyman"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80)
def test_every_allocation_adds_up_and_keeps_its_bounds(shares, total, minimum, how, seed):
    rng = np.random.default_rng(seed)
    w = np.array(shares) / sum(shares)
    pixels = rng.integers(1, 4000, len(w))
    users = rng.uniform(0.05, 0.95, len(w))
    least = np.minimum(minimum, pixels)
    if not least.sum() <= total <= pixels.sum():
        with pytest.raises(InputError, match="points cannot be dealt"):
            allocate(total, w, how=how, users_accuracy=users, minimum=minimum, pixels=pixels)
        return
    points = np.array(allocate(total, w, how=how, users_accuracy=users, minimum=minimum, pixels=pixels))
    assert points.sum() == total
    assert (points >= least).all()
    assert (points <= pixels).all()
    # Between the bounds, points are in proportion.
    wanted = {"proportional": w, "equal": np.ones_like(w), "neyman": w * np.sqrt(users * (1 - users))}[how]
    free = (points > least) & (points < pixels)
    if free.sum() > 1:
        scale = points[free].sum() / wanted[free].sum()
        assert (np.abs(points[free] - scale * wanted[free]) <= 2).all()


def test_points_lie_in_their_strata_and_never_on_nodata(land):
    path, codes = land
    drawn = draw(path, {1: 200, 2: 100, 9: 60}, seed=1)
    assert (codes[drawn.row, drawn.col] == drawn.code).all()
    assert np.bincount(drawn.code)[[1, 2, 9]].tolist() == [200, 100, 60]
    assert len(set(zip(drawn.row, drawn.col, strict=True))) == 360
    # The rare class is drawn whole.
    assert (codes == 9).sum() == 60
    # Interpreters do not meet one stratum after the other.
    assert (np.diff(drawn.code) != 0).mean() > 0.4


def test_blocks_and_other_strata_do_not_change_the_draw(land, monkeypatch):
    path, _ = land
    first = draw(path, {1: 50, 2: 40}, seed=3)
    monkeypatch.setattr(area, "BLOCK_PX", 32)
    again, more = draw(path, {1: 50, 2: 40}, seed=3), draw(path, {1: 80, 9: 5}, seed=3)
    places = [set(zip(d.row, d.col, d.code, strict=True)) for d in (first, again, more)]
    assert places[0] == places[1]
    assert {p for p in places[0] if p[2] == 1} < places[2]
    assert places[0] != set(zip(*(lambda d: (d.row, d.col, d.code))(draw(path, {1: 50, 2: 40}, seed=4)), strict=True))


def test_every_pixel_is_drawn_equally_often(land):
    path, codes = land
    times = np.zeros(codes.shape)
    for seed in range(100):
        drawn = draw(path, {1: 540}, seed=seed)
        times[drawn.row, drawn.col] += 1
    share = times[codes == 1] / 100
    # 540 of 4,500 pixels: binomial with p = 0.12.
    assert share.mean() == pytest.approx(0.12)
    assert share.std() == pytest.approx(np.sqrt(0.12 * 0.88 / 100), rel=0.05)
    rows = times.sum(1) / times.sum()
    assert rows.std() < 0.2 * rows.mean()


def test_in_degrees_the_chance_of_a_pixel_goes_with_its_area(tmp_path):
    box = GeoBox((80, 100), Affine(0.1, 0, 10, 0, -1, 80), "EPSG:4326")
    write_cog(tmp_path / "map.tif", np.ones(box.shape, np.uint8), box, nodata=0)
    rows = np.zeros(80)
    for seed in range(40):
        rows += np.bincount(draw(tmp_path / "map.tif", {1: 200}, seed=seed).row, minlength=80)
    hectares = ground_hectares(box).sum(1)
    wanted = hectares / hectares.sum() * rows.sum()
    assert wanted[-1] > 4 * wanted[0]
    assert ((rows - wanted) ** 2 / wanted).sum() < 120  # chi-squared with 79 degrees of freedom: p = 0.002


def test_areas_estimated_from_drawn_points_are_right_on_average_in_degrees(tmp_path):
    box = GeoBox((60, 60), Affine(1, 0, 10, 0, -1, 75), "EPSG:4326")
    truth = np.where(np.arange(60)[:, None] < 30, 1, 2) * np.ones((1, 60), np.uint8)
    write_cog(tmp_path / "map.tif", np.ones(box.shape, np.uint8), box, nodata=0)
    hectares = ground_hectares(box)
    shares = []
    for seed in range(60):
        drawn = draw(tmp_path / "map.tif", {1: 100}, seed=seed)
        report = estimate(drawn.code, truth[drawn.row, drawn.col], np.zeros(100, int), shares=(1.0,))
        shares.append(report.classes[0].area_share.value)
    assert np.mean(shares) == pytest.approx(hectares[:30].sum() / hectares.sum(), abs=0.02)
    assert hectares[:30].sum() / hectares.sum() < 0.45


def test_the_design_of_a_map(land):
    path, _ = land
    design = design_sample(path, standard_error=0.02, users_accuracy={"forest": 0.9, "9": 0.6}, minimum=30)
    assert [s.name for s in design.strata] == ["forest", "field", "pond"]
    assert design.users_accuracy == (0.9, 0.8, 0.6)
    assert design.points[2] == 30
    assert sum(design.shares) == pytest.approx(1)
    assert 0.0195 < design.standard_error <= 0.02
    assert sum(design.points) > sample_size(design.shares, design.users_accuracy, 0.02)
    assert sum(design_sample(path, size=300).points) == 300
    # The minimum goes before a standard error that needs fewer points.
    assert design_sample(path, standard_error=0.2).points == (50, 50, 50)


def test_points_are_written_with_their_strata_and_an_empty_reference(land, tmp_path):
    path, _ = land
    design = design_sample(path, size=200)
    out = write_points(path, tmp_path / "points.geojson", design)
    frame = gpd.read_file(out)
    assert frame.crs.to_epsg() == 4326
    assert len(frame) == 200
    assert frame["reference"].isna().all()
    assert frame["id"].tolist() == list(range(1, 201))
    by_stratum = frame.groupby("stratum")
    assert tuple(by_stratum.size()) == design.points
    assert by_stratum["stratum_ha"].first().tolist() == pytest.approx([s.hectares for s in design.strata])
    assert by_stratum["stratum_name"].first().tolist() == ["forest", "field", "pond"]
    centres = frame.to_crs(32633).geometry
    col, row = (centres.x - UTM.affine.c) / 10, (UTM.affine.f - centres.y) / 10
    np.testing.assert_allclose(col % 1, 0.5, atol=1e-4)
    assert (classes_at(path, row.astype(int).to_numpy(), col.astype(int).to_numpy()) == frame["stratum"]).all()
    about = json.loads(out.read_text())["panterra:design"]
    assert [s["points"] for s in about["strata"]] == list(design.points)
    with pytest.raises(InputError, match="someone may have filled it in"):
        write_points(path, out, design)
    other = write_points(path, tmp_path / "again.geojson", design)
    assert other.read_text().replace("again", "points") == out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 100}, "ask for 150 to 9900, or for another minimum"),
        ({"size": 20, "minimum": 0}, "class 'pond' would get fewer than 2 points"),
        ({"users_accuracy": {"lake": 0.9}}, "shows no class 'lake'; it shows forest, field, pond"),
        (
            {"users_accuracy": {"forest": 0.9, "pond": 9.0}},
            "the user's accuracy of pond is 9; wanted more than 0 and less",
        ),
        ({"users_accuracy": {"pond": 1.0}}, "wanted more than 0 and less than 1"),
        ({"standard_error": 2}, "a standard error of 2 was asked for"),
    ],
)
def test_what_a_person_can_put_right(land, arguments, message):
    with pytest.raises(InputError, match=message):
        design_sample(land[0], **arguments)


def test_too_many_points_of_a_class(land):
    with pytest.raises(InputError, match="has 60 pixels of class 9, fewer than 61"):
        draw(land[0], {9: 61})
