import json

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from pyproj import Transformer

from panterra.data.openstreetmap import (
    CATEGORIES,
    LINES,
    RASTER_CATEGORIES,
    Features,
    categories_of,
    cells_by_category,
    iter_features,
    rasterise,
    read_features,
    to_common_grid,
)
from panterra.data.windows import Cell, cells_at
from panterra.errors import InputError
from panterra.modalities import OSM_CATEGORIES

CELL = Cell(epsg=32633, col=186, row=-2068)
TO_DEGREES = Transformer.from_crs(32633, 4326, always_xy=True)

POINTS = [
    ((14.701, 47.781), {"man_made": "water_tower"}),
    ((14.703, 47.782), {"power": "generator", "generator:source": "wind", "name": 'The "big" one'}),
    ((14.702, 47.785), {"shop": "bakery"}),
    ((14.705, 47.784), {"power": "tower"}),
]


def write_osm(path):
    nodes, ways = [], []
    for i, ((lon, lat), tags) in enumerate(POINTS, start=1):
        text = "".join(f'<tag k="{k}" v="{v.replace(chr(34), "&quot;")}"/>' for k, v in tags.items())
        nodes.append(f'<node id="{i}" lat="{lat}" lon="{lon}" version="1">{text}</node>')

    def ring(first, corners, tags, closed=True):
        for k, (lon, lat) in enumerate(corners):
            nodes.append(f'<node id="{first + k}" lat="{lat}" lon="{lon}" version="1"/>')
        refs = [first + k for k in range(len(corners))] + ([first] if closed else [])
        text = "".join(f'<tag k="{k}" v="{v}"/>' for k, v in tags.items())
        ways.append(
            f'<way id="{first}" version="1">{"".join(f"<nd ref={chr(34)}{r}{chr(34)}/>" for r in refs)}{text}</way>'
        )

    square = [(14.71, 47.78), (14.72, 47.78), (14.72, 47.79), (14.71, 47.79)]
    hole = [(14.713, 47.783), (14.717, 47.783), (14.717, 47.787), (14.713, 47.787)]
    ring(100, square, {})
    ring(110, hole, {})
    ring(120, [(14.73, 47.78), (14.731, 47.78), (14.731, 47.781)], {"man_made": "storage_tank"})
    ring(130, [(14.74, 47.78), (14.741, 47.78), (14.741, 47.781)], {"highway": "primary", "junction": "roundabout"})
    ring(140, [(14.74, 47.78), (14.75, 47.79)], {"waterway": "river"}, closed=False)
    ring(150, [(14.76, 47.78), (14.761, 47.78), (14.761, 47.781)], {"building": "yes"})
    relation = (
        '<relation id="1" version="1"><member type="way" ref="100" role="outer"/><member type="way" ref="110" '
        'role="inner"/><tag k="type" v="multipolygon"/><tag k="power" v="plant"/></relation>'
    )
    path.write_text(f'<?xml version="1.0"?><osm version="0.6">{"".join(nodes)}{"".join(ways)}{relation}</osm>')
    return path


def table_of(features: Features) -> set[tuple[str, str]]:
    return {
        (features.names[c], shapely.set_precision(g, 1e-6).normalize().wkt)
        for c, g in zip(features.category, features.geometry, strict=True)
    }


def test_the_table_of_categories():
    assert tuple(RASTER_CATEGORIES) == OSM_CATEGORIES
    assert 110 <= len(CATEGORIES) <= 130
    assert set(CATEGORIES) >= LINES
    assert len(set(CATEGORIES.values())) == len(CATEGORIES)


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ({"man_made": "water_tower"}, {"water_tower"}),
        ({"building": "yes", "amenity": "school"}, {"building", "school"}),
        ({"building": "no"}, set()),
        ({"power": "generator"}, set()),
        ({"power": "generator", "generator:source": "wind"}, {"generator_wind"}),
        ({"power": "plant", "plant:source": "solar; wind"}, {"power_plant", "power_plant_solar"}),
        ({"highway": "trunk", "bridge": "yes"}, {"highway", "motorway", "bridge"}),
        ({"man_made": "tower", "tower:type": "communication"}, {"communications_tower"}),
        ({}, set()),
    ],
)
def test_tags_decide_the_categories(tags, wanted):
    assert set(categories_of(tags)) == wanted


def test_a_rule_that_is_not_understood():
    with pytest.raises(InputError, match="'power' of category 'x' is not understood"):
        categories_of({}, {"x": ("power",)})


def test_an_osm_extract(tmp_path):
    features = read_features(write_osm(tmp_path / "extract.osm"))
    found = {(features.names[c], g.geom_type) for c, g in zip(features.category, features.geometry, strict=True)}
    assert found == {
        ("water_tower", "Point"),
        ("generator_wind", "Point"),
        ("power_tower", "Point"),
        ("power_plant", "MultiPolygon"),
        ("storage_tank", "Polygon"),  # GDAL leaves this closed way a line
        ("highway", "LineString"),
        ("river", "LineString"),
        ("building", "MultiPolygon"),
    }
    plant = features.geometry[features.category == features.names.index("power_plant")][0]
    assert plant.area == pytest.approx(1e-4 - 16e-6, rel=1e-3)
    more = {f.names[c] for f in iter_features(tmp_path / "extract.osm") for c in f.category}
    assert more == {name for name, _ in found} | {"roundabout"}


def hstore(tags):
    return ",".join(f'"{k}"=>"{v.replace(chr(34), chr(92) + chr(34))}"' for k, v in tags.items())


@pytest.mark.parametrize("kind", ["columns", "hstore", "json", "utm", "map", "struct", "plain"])
def test_tables_of_tags_say_the_same_as_the_extract(tmp_path, kind):
    shapes = [shapely.Point(place) for place, _ in POINTS]
    tags = [tags for _, tags in POINTS]
    frame = gpd.GeoDataFrame({"id": range(len(shapes))}, geometry=shapes, crs=4326)
    path = tmp_path / {"columns": "t.geojson", "hstore": "t.gpkg", "json": "t.gpkg", "utm": "t.gpkg"}.get(
        kind, "t.parquet"
    )
    if kind == "columns":
        frame.assign(**{key: [t.get(key) for t in tags] for key in ("power", "man_made", "generator:source")}).to_file(
            path
        )
    elif kind in ("hstore", "utm"):
        frame.assign(other_tags=[hstore(t) for t in tags]).to_crs(32633 if kind == "utm" else 4326).to_file(path)
    elif kind == "json":
        frame.assign(tags=[json.dumps(t) for t in tags]).to_file(path)
    elif kind == "struct":
        frame.assign(tags=tags).to_parquet(path)
    elif kind == "plain":
        pd.DataFrame({"lon": frame.geometry.x, "lat": frame.geometry.y, "tags": [hstore(t) for t in tags]}).to_parquet(
            path
        )
    else:
        frame.to_parquet(path)
        table = pq.read_table(path)
        column = pa.array([list(t.items()) for t in tags], pa.map_(pa.string(), pa.string()))
        pq.write_table(table.append_column("tags", column), path)
    points = {name: RASTER_CATEGORIES[name] for name in ("water_tower", "generator_wind", "power_tower")}
    wanted = table_of(read_features(write_osm(tmp_path / "extract.osm"), points))
    assert len(wanted) == 3
    assert table_of(read_features(path, points)) == wanted


def test_files_that_hold_no_tags(tmp_path):
    path = tmp_path / "t.geojson"
    gpd.GeoDataFrame({"name": ["a"]}, geometry=[shapely.Point(1, 2)], crs=4326).to_file(path)
    with pytest.raises(InputError, match="no column tags or other_tags"):
        read_features(path)
    with pytest.raises(InputError, match="there is no file"):
        read_features(tmp_path / "none.osm.pbf")
    (tmp_path / "odd.osm.pbf").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot read"):
        read_features(tmp_path / "odd.osm.pbf")
    (tmp_path / "odd.parquet").write_bytes(b"nothing")
    with pytest.raises(InputError, match="as Parquet"):
        read_features(tmp_path / "odd.parquet")
    pd.DataFrame({"tags": ["{}"]}).to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(InputError, match="neither GeoParquet nor a table with lon and lat"):
        read_features(tmp_path / "bare.parquet")


def test_cells_by_category_hold_their_features(tmp_path):
    found = cells_by_category(iter_features(write_osm(tmp_path / "extract.osm")))
    assert found["water_tower"] == set(cells_at(np.array([POINTS[0][0]])))
    assert found["river"] >= set(cells_at(np.array([(14.74, 47.78), (14.75, 47.79)])))
    assert "school" not in found


def test_features_near_cells_alone(tmp_path):
    path = write_osm(tmp_path / "extract.osm")
    (cell,) = cells_at(np.array([POINTS[0][0]]))
    near, everything = read_features(path, cells=[cell]), read_features(path)
    assert 0 < len(near) < len(everything)
    assert table_of(near) < table_of(everything)
    assert len(read_features(path, cells=[Cell(epsg=32633, col=0, row=0)])) == 0


def degrees(shape):
    return shapely.transform(shape, TO_DEGREES.transform, interleaved=False)


def as_features(*rows):
    return Features(
        names=OSM_CATEGORIES,
        category=np.array([OSM_CATEGORIES.index(name) for name, _ in rows], np.int64),
        geometry=np.array([degrees(shape) for _, shape in rows], dtype=object),
    )


def test_areas_are_burned_by_their_pixels_centres_with_holes():
    box = CELL.box(2.5)
    left, top = box.boundingbox.left, box.boundingbox.top
    rng = np.random.default_rng(0)
    hull = shapely.convex_hull(shapely.multipoints(rng.uniform(100, 400, (8, 2)) * (1, -1) + (left, top)))
    area = hull.difference(hull.centroid.buffer(40))
    raster = rasterise(as_features(("leisure", area)), box)
    x = left + 2.5 * (np.arange(1024) + 0.5)
    y = top - 2.5 * (np.arange(1024) + 0.5)
    wanted = shapely.contains_xy(area, *np.meshgrid(x, y))
    point = area.point_on_surface()
    wanted[int((top - point.y) // 2.5), int((point.x - left) // 2.5)] = True
    layer = raster[OSM_CATEGORIES.index("leisure")]
    assert (layer != wanted).sum() <= 2  # centres within a hair of an edge
    assert wanted.sum() > 1000
    assert raster.sum() == layer.sum()


def test_points_lines_and_slivers_leave_their_pixels():
    box = CELL.box(2.5)
    left, top = box.boundingbox.left, box.boundingbox.top

    def at(col, row):
        return shapely.Point(left + 2.5 * col, top - 2.5 * row)

    line = shapely.LineString([at(100.5, 50.5), at(200.5, 90.5)])
    outside = shapely.LineString([at(-50, 500.5), at(20, 500.5)])
    raster = rasterise(
        as_features(
            ("silo", at(10.3, 20.9)),
            ("silo", at(-3, 20)),
            ("chimney", at(30.2, 40.2).buffer(0.2)),
            ("river", line),
            ("highway", outside),
        ),
        box,
    )
    layer = {name: raster[i] for i, name in enumerate(OSM_CATEGORIES)}
    assert np.argwhere(layer["silo"]).tolist() == [[20, 10]]
    assert np.argwhere(layer["chimney"]).tolist() == [[40, 30]]
    burned = np.argwhere(layer["river"])
    assert len(burned) == 101
    assert max(at(c + 0.5, r + 0.5).distance(line) for r, c in burned) <= 2.5
    assert np.argwhere(layer["highway"]).tolist() == [[500, c] for c in range(21)][: len(np.argwhere(layer["highway"]))]
    assert 20 <= layer["highway"].sum() <= 21


def test_nothing_burns_to_nothing():
    raster = rasterise(as_features(), CELL.box(2.5))
    assert raster.shape == (30, 1024, 1024)
    assert not raster.any()


def test_to_the_common_grid():
    rng = np.random.default_rng(0)
    raster = (rng.random((3, 16, 16)) < 0.05).astype(np.uint8)
    every, first = to_common_grid(raster, keep_all=True), to_common_grid(raster, keep_all=False)
    for band in range(3):
        for row in range(4):
            for col in range(4):
                part = raster[band, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
                assert every[band, row, col] == part.max()
                assert first[band, row, col] == part[0, 0]
    assert every.sum() > first.sum()
