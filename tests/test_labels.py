import datetime as dt
import json

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio.features
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely.geometry import LineString, MultiPoint, Point, Polygon, box

from panterra.errors import InputError
from panterra.imagery.labels import MAX_NUMBERED, distinct_colours, of_dates, read_labels, sample_labels
from panterra.imagery.raster import write_cog

GRID = GeoBox((30, 40), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")


def centre(row, col):
    return Point(500000 + 10 * (col + 0.5), 5000000 - 10 * (row + 0.5))


def save(path, geometries, driver="GeoJSON", crs="EPSG:32633", **columns):
    gpd.GeoDataFrame(columns, geometry=geometries, crs=crs).to_file(path, driver=driver)
    return path


@pytest.fixture
def points(tmp_path):
    places = [centre(2, 3), centre(2, 3), centre(29, 39), centre(7, 7), centre(7, 7), centre(-1, 5), Point(0, 0)]
    names = ["water", "water", "forest", "water", "forest", "forest", "water"]
    return save(tmp_path / "p.gpkg", places, driver="GPKG", id=range(7), Class=names)


# Points ---------------------------------------------------------------------------------------------------------------


def test_points_find_their_cells(points):
    labels = read_labels(points)
    assert (labels.kind, labels.names, len(labels.colours)) == ("classes", ("forest", "water"), 2)
    samples = sample_labels(labels, GRID)
    assert samples.row.tolist() == [2, 29]
    assert samples.col.tolist() == [3, 39]
    assert samples.target.tolist() == [1, 0]
    assert samples.group.tolist() == [0, 2]
    assert samples.xy.tolist() == [[500035, 4999975], [500395, 4999705]]
    assert samples.conflicts == 1
    assert {samples.row.dtype, samples.col.dtype, samples.target.dtype, samples.group.dtype} == {np.dtype("int64")}


def test_points_in_degrees_find_the_same_cells(points, tmp_path):
    degrees = gpd.read_file(points).to_crs(4326)
    degrees.to_file(tmp_path / "d.geojson", driver="GeoJSON")
    degrees.to_parquet(tmp_path / "d.parquet")
    table = pd.DataFrame({"Lon": degrees.geometry.x, "LAT": degrees.geometry.y, "Class": degrees["Class"]})
    table.to_csv(tmp_path / "d.csv", index=False)
    table.to_csv(tmp_path / "semicolon.csv", index=False, sep=";")
    table.to_parquet(tmp_path / "plain.parquet")
    expected = sample_labels(read_labels(points), GRID)
    for name in ("d.geojson", "d.parquet", "d.csv", "semicolon.csv", "plain.parquet"):
        found = sample_labels(read_labels(tmp_path / name), GRID)
        np.testing.assert_array_equal(found.row, expected.row)
        np.testing.assert_array_equal(found.target, expected.target)
        np.testing.assert_array_equal(found.group, expected.group)


def test_multipoints_are_one_feature(tmp_path):
    path = save(tmp_path / "m.geojson", [MultiPoint([centre(1, 1), centre(5, 9)]), centre(6, 6)], label=["a", "b"])
    samples = sample_labels(read_labels(path), GRID)
    assert samples.group.tolist() == [0, 0, 1]


def test_a_grid_without_labels_gives_no_samples(points):
    far = GeoBox((5, 5), Affine(10, 0, 900000, 0, -10, 4000000), "EPSG:32633")
    samples = sample_labels(read_labels(points), far)
    assert len(samples) == 0
    assert samples.xy.shape == (0, 2)


def test_labels_off_the_map_projection_are_not_in_the_grid(tmp_path):
    path = save(
        tmp_path / "far.geojson", [Point(190, 0), box(-170, 10, -160, 20), Point(15, 45.1)], crs=4326, label=[*"aab"]
    )
    antipodes = GeoBox((9, 9), Affine(1000, 0, -5000, 0, -1000, 5000), "+proj=ortho +lat_0=45.1 +lon_0=15")
    assert sample_labels(read_labels(path), antipodes).target.tolist() == [1]


# Polygons -------------------------------------------------------------------------------------------------------------


def random_polygons(seed):
    rng = np.random.default_rng(seed)
    shapes = []
    for _ in range(12):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
        radius, middle = rng.uniform(20, 90, 7), rng.uniform([500000, 4999700], [500400, 5000000])
        shapes.append(Polygon(np.stack([np.cos(angles), np.sin(angles)], 1) * radius[:, None] + middle).buffer(0))
    return shapes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "grid", [GRID, GRID.zoom_out(4), GeoBox((40, 40), Affine(7, 3, 500050, 3, -7, 4999900), GRID.crs)]
)
def test_polygons_claim_the_cells_that_rasterio_burns(tmp_path, seed, grid):
    shapes = random_polygons(seed)
    path = save(tmp_path / "p.gpkg", shapes, driver="GPKG", label=[f"c{i % 3}" for i in range(len(shapes))])
    samples = sample_labels(read_labels(path), grid)
    claims = np.zeros((3, *grid.shape), bool)
    for number, shape in enumerate(shapes):
        claims[number % 3] |= rasterio.features.rasterize([shape], grid.shape, transform=grid.affine).astype(bool)
    single = claims.sum(0) == 1
    expected = np.argwhere(single)
    np.testing.assert_array_equal(np.stack([samples.row, samples.col], 1), expected)
    np.testing.assert_array_equal(samples.target, claims.argmax(0)[single])
    assert samples.conflicts == (claims.sum(0) > 1).sum()
    assert single.any()


def test_groups_are_the_features(tmp_path):
    path = save(
        tmp_path / "p.geojson",
        [box(500000, 4999950, 500050, 5000000), box(500100, 4999950, 500120, 5000000)],
        lulc=["a", "a"],
    )
    samples = sample_labels(read_labels(path), GRID)
    assert np.bincount(samples.group).tolist() == [25, 10]


# Values and classes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind", "names"),
    [
        (["b", "a", "b"], "classes", ("a", "b")),
        ([30, 10, 20], "classes", ("10", "20", "30")),
        ([30.0, None, 20.0], "classes", ("20", "30")),
        ([0.5, 1.5, 2.0], "values", ()),
        ([True, False, True], "classes", ("False", "True")),
    ],
)
def test_kind_follows_from_the_column(tmp_path, given, kind, names):
    path = save(tmp_path / "p.gpkg", [centre(i, i) for i in range(3)], driver="GPKG", value=given)
    labels = read_labels(path)
    assert (labels.kind, labels.names) == (kind, names)


def test_many_whole_numbers_are_values_unless_told(tmp_path):
    count = MAX_NUMBERED + 1
    path = save(tmp_path / "p.gpkg", [centre(0, i % 40) for i in range(count)], driver="GPKG", value=range(count))
    assert read_labels(path).kind == "values"
    assert len(read_labels(path, kind="classes").names) == count


def test_values_in_one_cell_are_averaged(tmp_path):
    path = save(tmp_path / "p.geojson", [centre(1, 1), centre(1, 1), centre(3, 3)], height=[1.5, 2.5, 7.25])
    samples = sample_labels(read_labels(path), GRID)
    assert samples.target.dtype == np.float32
    assert samples.target.tolist() == [2, 7.25]


def test_features_without_place_or_target_are_left_out(tmp_path):
    path = save(
        tmp_path / "p.gpkg", [centre(1, 1), None, centre(3, 3), centre(4, 4)], driver="GPKG", label=["a", "b", None, ""]
    )
    assert read_labels(path).frame["label"].tolist() == ["a"]


def test_colours_come_from_the_file_or_differ(tmp_path):
    places = [centre(i, i) for i in range(3)]
    path = save(tmp_path / "p.geojson", places, label=["b", "a", "b"], color=["#0000ff", "#102030", "#0000ff"])
    assert read_labels(path).colours == ((16, 32, 48), (0, 0, 255))
    assert len(set(distinct_colours(30))) == 30


def test_column_is_found_or_asked_for(tmp_path):
    places = [centre(1, 1)]
    assert read_labels(save(tmp_path / "a.geojson", places, foo=["x"], LULC=["y"])).names == ("y",)
    assert read_labels(save(tmp_path / "b.geojson", places, foo=["x"])).names == ("x",)
    path = save(tmp_path / "c.geojson", places, foo=["x"], bar=["y"])
    assert read_labels(path, column="bar").names == ("y",)
    with pytest.raises(InputError, match="has the columns foo, bar; say with --column"):
        read_labels(path)
    with pytest.raises(InputError, match="has no column 'baz'; it has foo, bar"):
        read_labels(path, column="baz")


# Rasters --------------------------------------------------------------------------------------------------------------


def test_raster_of_classes(tmp_path):
    codes = np.random.default_rng(0).choice([0, 3, 7], GRID.shape).astype("uint8")
    path = write_cog(
        tmp_path / "r.tif",
        codes,
        GRID,
        nodata=0,
        palette={3: (1, 2, 3), 7: (4, 5, 6)},
        categories={3: "tree", 7: "road"},
    )
    labels = read_labels(path)
    assert (labels.kind, labels.names, labels.colours) == ("classes", ("tree", "road"), ((1, 2, 3), (4, 5, 6)))
    samples = sample_labels(labels, GRID)
    np.testing.assert_array_equal(np.stack([samples.row, samples.col], 1), np.argwhere(codes > 0))
    np.testing.assert_array_equal(samples.target, (codes[codes > 0] == 7).astype(int))
    assert len(set(samples.group.tolist())) == len(samples)


def test_pixels_below_zero_are_no_class(tmp_path):
    codes = np.random.default_rng(0).choice([-1, 0, 1], GRID.shape).astype("int16")
    labels = read_labels(write_cog(tmp_path / "flood.tif", codes, GRID))
    assert (labels.kind, labels.names) == ("classes", ("0", "1"))
    samples = sample_labels(labels, GRID)
    np.testing.assert_array_equal(np.stack([samples.row, samples.col], 1), np.argwhere(codes >= 0))
    np.testing.assert_array_equal(samples.target, codes[codes >= 0])
    with pytest.raises(InputError, match="holds no valid pixel of a class"):
        read_labels(write_cog(tmp_path / "none.tif", np.full(GRID.shape, -1, "int16"), GRID))


def test_raster_of_values(tmp_path):
    heights = np.random.default_rng(0).random(GRID.shape).astype("float32")
    labels = read_labels(write_cog(tmp_path / "r.tif", heights, GRID))
    samples = sample_labels(labels, GRID.zoom_out(2))
    assert labels.kind == "values"
    np.testing.assert_allclose(samples.target, heights.reshape(15, 2, 20, 2).mean((1, 3)).ravel(), rtol=1e-5)


# Messages -------------------------------------------------------------------------------------------------------------


def test_unusable_labels_give_one_line(tmp_path):
    save(tmp_path / "line.geojson", [LineString([(0, 0), (1, 1)])], label=["a"])
    save(tmp_path / "empty.gpkg", [centre(1, 1)], driver="GPKG", label=pd.array([None], "string"))
    (tmp_path / "text.geojson").write_text("hello")
    (tmp_path / "cols.csv").write_text("a,b\n1,2\n")
    (tmp_path / "metres.csv").write_text("x,y,label\n500000,5000000,a\n")
    gpd.GeoDataFrame({"label": ["a"]}, geometry=[centre(1, 1)]).to_parquet(tmp_path / "nocrs.parquet")
    both = tmp_path / "two.gpkg"
    for layer in ("one", "two"):
        gpd.GeoDataFrame({"label": [layer]}, geometry=[centre(1, 1)], crs="EPSG:32633").to_file(both, layer=layer)
    for name, message in {
        "none.geojson": "there is no file",
        "line.geojson": "holds LineString; labels are points or polygons",
        "empty.gpkg": "has no feature with both a geometry and a value in 'label'",
        "text.geojson": "cannot read labels from",
        "cols.csv": "has the columns a, b; it needs lon and lat",
        "metres.csv": "are not degrees",
        "nocrs.parquet": "does not say its coordinate reference system",
        "two.gpkg": "has the layers one, two; give a file of one layer",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            read_labels(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert read_labels(both, layer="two").names == ("two",)
    with pytest.raises(InputError, match="has no layer 'three'"):
        read_labels(both, layer="three")
    with pytest.raises(InputError, match="holds text such as 'one', not values"):
        read_labels(both, layer="one", kind="values")


# Real labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "column", "classes"),
    [
        ("label_vectors/azerbaijan_crops.geojson", None, 5),
        ("label_vectors/azerbaijan_lulc.geojson", None, 7),
        ("sentinel2_amazon_polygons/training_polygons.geojson", None, 4),
        ("slovenia_ndvi_lulc/lulc_polygons.geojson", None, 4),
        ("flanders_parcels_s1s2/parcels_2023.geojson", "GWSCOD_H", 5),
        ("slovenia_ndvi_lulc/lulc_label.tif", None, 5),
        ("brazil_pixel_timeseries/sentinel2_rondonia_3classes.parquet", None, 3),
        ("worldcereal_pixels/canada_2017_train.parquet", "CROPTYPE_LABEL", None),
    ],
)
def test_real_labels_open(data_dir, name, column, classes):
    labels = read_labels(data_dir / name, column=column)
    assert labels.kind == "classes"
    assert len(labels.names) == (classes or len(labels.names)) > 1
    assert len(labels.colours) == len(labels.names)


@pytest.mark.data
def test_parcels_without_a_known_column_are_asked_about(data_dir):
    with pytest.raises(InputError, match="UID, CODE_OBJ, CMP_COD, GWSCOD_H, PRC_GEM; say with --column"):
        read_labels(data_dir / "flanders_parcels_s1s2" / "parcels_2023.geojson")


@pytest.mark.data
def test_real_polygons_lie_on_their_image(data_dir):
    labels = read_labels(data_dir / "sentinel2_amazon_polygons" / "training_polygons.geojson")
    image = rasterio.open(data_dir / "sentinel2_amazon_polygons" / "sentinel2_l2a_reflectance.tif")
    with image:
        samples = sample_labels(labels, GeoBox(image.shape, image.transform, image.crs))
        pixels = image.read()[:, samples.row, samples.col]
    assert len(set(samples.group.tolist())) == 25
    near_infrared, red = pixels[7], pixels[3]
    greenness = (near_infrared - red) / (near_infrared + red)
    by_class = {name: greenness[samples.target == i].mean() for i, name in enumerate(labels.names)}
    assert by_class["forest"] > by_class["village"] > by_class["water"]


# What people's files are like ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("lon,lat,class\n14.5,45.25,maïs\n", "utf-8-sig"),
        ("lon;lat;class\n14,5;45,25;maïs\n", "utf-8"),
        ("lon\tlat\tclass\n14.5\t45.25\tmaïs\n", "utf-8"),
        ("lon lat class\n14.5 45.25 maïs\n", "utf-8"),
    ],
    ids=["byte order mark", "decimal comma", "tabs", "spaces"],
)
def test_tables_are_read_as_spreadsheets_write_them(tmp_path, content, encoding):
    (tmp_path / "t.csv").write_text(content, encoding=encoding)
    labels = read_labels(tmp_path / "t.csv")
    assert labels.names == ("maïs",)
    assert labels.frame.geometry[0].equals(Point(14.5, 45.25))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "is no table"),
        ("latin.csv", "lon,lat,class\n14.5,45.25,maïs\n".encode("latin1"), "save the table as CSV in UTF-8"),
        ("noise.parquet", b"nonsense", "cannot read labels from"),
        ("noise.geojson", b"{nonsense", "cannot read labels from"),
        (
            "lists.geojson",
            b'{"type": "FeatureCollection", "features": [{"type": "Feature", "properties": {"class": ["a", "b"]}, '
            b'"geometry": {"type": "Point", "coordinates": [14.5, 45.25]}}]}',
            "holds lists",
        ),
    ],
)
def test_broken_files_get_one_plain_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_labels(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.fixture
def annotations(tmp_path):
    """Two points as OlmoEarth's annotation_features.geojson has them."""
    times = {"oe_start_time": "2023-01-01T00:00:00Z", "oe_end_time": "2023-12-31T00:00:00Z"}
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": [14.5, 45.25]},
            "properties": {"oe_labels": {"lulc": code}, "oe_annotations_task_id": "a", **times},
        }
        for code in (7, 3)
    ]
    path = tmp_path / "annotation_features.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_annotations_of_olmoearth_are_read(annotations):
    labels = read_labels(annotations)
    assert labels.names == ("3", "7")
    assert labels.frame["target"].tolist() == [1, 0]
    assert read_labels(annotations, column="lulc").names == ("3", "7")


@pytest.mark.parametrize(
    ("dates", "kept"),
    [
        (["2023-06-09"], 2),
        (["2022-07-01", "2024-02-01"], 2),
        (["2024-01-20"], 2),  # within the month that an image stands for
        (["2024-03-01", "2024-09-01"], 0),
        (["2022-05-01", "2022-11-01"], 0),
        ([], 2),
    ],
)
def test_labels_of_another_time_are_left_out(annotations, dates, kept):
    labels, left_out = of_dates(read_labels(annotations), [dt.date.fromisoformat(day) for day in dates])
    assert (len(labels.frame), left_out) == (kept, 2 - kept)


def test_labels_without_times_fit_any_date(points, tmp_path):
    day = [dt.date(1999, 1, 1)]
    assert of_dates(read_labels(points), day)[1] == 0
    some = save(tmp_path / "some.geojson", [centre(1, 1), centre(2, 2)], label=["a", "b"], start=["2024-01-01", None])
    assert of_dates(read_labels(some, column="label"), day)[1] == 1
