import datetime as dt
import json

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from pyproj import Transformer

from panterra.data.windows import (
    CELL_M,
    Cell,
    cells_at,
    cells_touched,
    draw_cells,
    draw_centre,
    outlines,
    overlaps,
    parse_cell,
    read_places,
    spatial_groups,
    split_cells,
)
from panterra.errors import InputError

PLACES = [(14.7, 47.8), (-58.4, -34.6), (179.95, -17.0), (-0.1, 51.5), (36.8, -1.3), (12.0, 0.0)]


def block(epsg: int, col: int, row: int, side: int) -> list[Cell]:
    return [Cell(epsg=epsg, col=col + c, row=row + r) for c in range(side) for r in range(side)]


@pytest.mark.parametrize(("lon", "lat"), PLACES)
def test_a_cell_holds_its_place(lon, lat):
    (cell,) = cells_at(np.array([(lon, lat)]))
    x, y = Transformer.from_crs(4326, cell.epsg, always_xy=True).transform(lon, lat)
    assert CELL_M * cell.col <= x <= CELL_M * (cell.col + 1)
    assert -CELL_M * (cell.row + 1) <= y <= -CELL_M * cell.row
    bounds = cell.box().boundingbox
    assert (bounds.left, bounds.top) == (CELL_M * cell.col, -CELL_M * cell.row)
    assert cell.box().shape == (256, 256)
    assert cell.box(2.5).shape == (1024, 1024)
    assert parse_cell(cell.name) == cell
    assert cell.epsg == (32600 if lat >= 0 else 32700) + int((lon + 180) // 6) + 1


def test_rows_grow_southwards_from_the_equator():
    north, south = cells_at(np.array([(15.0, 0.001), (15.0, -0.001)]))
    assert (north.name, south.name) == ("32633_195_-1", "32733_195_-3907")


def test_places_and_names_that_cannot_be():
    with pytest.raises(InputError, match=r"latitude 85 is outside UTM"):
        cells_at(np.array([(10.0, 85.0)]))
    with pytest.raises(InputError, match="not the name of a cell"):
        parse_cell("4326_1_2")


@pytest.mark.parametrize("seed", range(6))
def test_cells_touched_are_those_that_intersect(seed):
    rng = np.random.default_rng(seed)
    middle = np.array([rng.uniform(13, 16.9), rng.uniform(-60, 60)])
    around = middle + rng.uniform(-0.08, 0.08, (9, 2))
    shapes = [
        shapely.convex_hull(shapely.multipoints(around)),
        shapely.linestrings(around[:5]),
        shapely.points(around[0]),
        shapely.difference(shapely.buffer(shapely.points(middle), 0.09), shapely.buffer(shapely.points(middle), 0.05)),
    ]
    owner, cells = cells_touched(shapes)
    epsg = (32600 if middle[1] >= 0 else 32700) + 33
    to_utm = Transformer.from_crs(4326, epsg, always_xy=True)
    for number, shape in enumerate(shapes):
        flat = shapely.transform(shapely.segmentize(shape, 0.002), to_utm.transform, interleaved=False)
        west, south, east, north = flat.bounds
        found = {cell for o, cell in zip(owner, cells, strict=True) if o == number}
        for col in range(int(west // CELL_M), int(east // CELL_M) + 1):
            for row in range(int(-north // CELL_M), int(-south // CELL_M) + 1):
                bounds = Cell(epsg=epsg, col=col, row=row).box().boundingbox
                square = shapely.box(bounds.left, bounds.bottom, bounds.right, bounds.top)
                if Cell(epsg=epsg, col=col, row=row) in found:
                    assert square.buffer(1).intersects(flat)
                else:
                    assert not square.buffer(-120).intersects(flat)


def test_a_category_gives_at_most_so_many_cells_and_all_together_their_union():
    cells = block(32633, 0, -2000, 20)
    by_category = {"silo": cells[:7], "river": set(cells[5:100]), "peak": cells[90:400]}
    drawn = draw_cells(by_category, 30, seed=1)
    chosen = {name: {c for c, names in drawn.items() if name in names} for name in by_category}
    assert {name: len(found) for name, found in chosen.items()} == {"silo": 7, "river": 30, "peak": 30}
    assert all(found <= set(by_category[name]) for name, found in chosen.items())
    assert set(drawn) == set().union(*chosen.values())
    assert draw_cells(dict(reversed(by_category.items())), 30, seed=1) == drawn
    assert draw_cells(by_category, 30, seed=2) != drawn
    alone = draw_cells({"peak": by_category["peak"]}, 30, seed=1)
    assert set(alone) == chosen["peak"]


def test_cells_of_a_parent_tile_share_the_centre():
    first, last = dt.date(2016, 6, 1), dt.date(2024, 6, 1)
    by_parent: dict[str, set[dt.date]] = {}
    for cell in block(32733, -20, -40, 64):
        by_parent.setdefault(cell.parent(), set()).add(draw_centre(cell, first, last, seed=3))
    assert len(by_parent) == 25
    days = [days.pop() for days in by_parent.values() if len(days) == 1]
    assert len(days) == 25
    assert len(set(days)) > 20
    assert all(first <= day <= last for day in days)
    assert draw_centre(Cell(epsg=32633, col=1, row=1), first, first, seed=0) == first


def test_centres_are_drawn_evenly():
    first = dt.date(2020, 1, 1)
    cells = [Cell(epsg=32633, col=16 * i, row=0) for i in range(4000)]
    days = [(draw_centre(c, first, dt.date(2020, 1, 10), seed=0) - first).days for c in cells]
    counts = np.bincount(days, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 320
    assert counts.max() < 480


@pytest.mark.parametrize("parent_cells", [4, 16])
def test_no_parent_tile_is_in_two_splits(parent_cells):
    rng = np.random.default_rng(0)
    cells = [Cell(epsg=32633, col=int(c), row=int(r)) for c, r in rng.integers(-80, 80, (900, 2))]
    split = split_cells(cells, {"train": 0.7, "val": 0.2, "test": 0.1}, seed=5, parent_cells=parent_cells)
    assert set(split) == set(cells)
    homes: dict[str, set[str]] = {}
    for cell, name in split.items():
        homes.setdefault(cell.parent(parent_cells), set()).add(name)
    assert all(len(names) == 1 for names in homes.values())
    counts = {name: list(split.values()).count(name) / len(split) for name in ("train", "val", "test")}
    assert counts == pytest.approx({"train": 0.7, "val": 0.2, "test": 0.1}, abs=0.03)
    again = split_cells(reversed(cells), {"train": 0.7, "val": 0.2, "test": 0.1}, seed=5, parent_cells=parent_cells)
    assert again == split
    assert split_cells(cells, {"train": 0.7, "val": 0.3}, seed=6, parent_cells=parent_cells) != split


def test_every_split_gets_a_block():
    cells = [Cell(epsg=32633, col=16 * i, row=0) for i in range(3)]
    split = split_cells(cells, {"train": 0.98, "val": 0.01, "test": 0.01}, seed=0)
    assert sorted(split.values()) == ["test", "train", "val"]
    with pytest.raises(InputError, match=r"2 splits need as many blocks of 40.96 km, but the cells \(1\) lie in 1"):
        split_cells(cells[:1], {"train": 0.9, "val": 0.1}, seed=0)
    with pytest.raises(InputError, match="shares above 0"):
        split_cells(cells, {"train": 0.0}, seed=0)


def test_cells_that_overlap_where_zones_meet_stay_together():
    lats = np.linspace(47, 49, 60)
    west = cells_at(np.column_stack([np.full(60, 11.995), lats]))
    east = cells_at(np.column_stack([np.full(60, 12.005), lats]))
    cells = sorted({*west, *east})
    assert {cell.epsg for cell in cells} == {32632, 32633}
    shapes = outlines(cells)
    brute = {
        (a, b)
        for a in range(len(cells))
        for b in range(a + 1, len(cells))
        if cells[a].epsg != cells[b].epsg and shapes[a].intersection(shapes[b]).area > 0
    }
    pairs = overlaps(cells)
    assert {(a, b) for a, b, _ in pairs} == brute
    assert len(brute) > 30
    assert all(0 < share <= 1 for *_, share in pairs)
    groups = spatial_groups(cells, parent_cells=4)
    split = split_cells(cells, {"train": 0.5, "val": 0.5}, seed=0, parent_cells=4)
    for a, b in brute:
        assert groups[a] == groups[b]
        assert split[cells[a]] == split[cells[b]]
    assert len(set(groups)) > 2


def test_outlines_reach_across_the_180th_meridian():
    (cell,) = cells_at(np.array([(179.999, -17.0)]))
    west, _, east, _ = outlines([cell])[0].bounds
    assert east - west < 0.05


LONLAT = [(14.70, 47.80), (14.90, 47.90), (14.701, 47.80)]


def write(path, table):
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.name == "plain.parquet":
        table.to_parquet(path)
    else:
        frame = gpd.GeoDataFrame(
            table.drop(columns=["lon", "lat"]), geometry=gpd.points_from_xy(table.lon, table.lat), crs=4326
        )
        if path.suffix == ".parquet":
            frame.to_parquet(path)
        else:
            frame.to_crs(32633 if path.suffix == ".gpkg" else 4326).to_file(path)


@pytest.mark.parametrize("name", ["p.csv", "plain.parquet", "geo.parquet", "p.geojson", "p.gpkg"])
def test_places_come_from_any_list(tmp_path, name):
    table = pd.DataFrame(LONLAT, columns=["lon", "lat"]).assign(date=["2021-05-01", "2022-05-01", "2021-05-01"])
    write(tmp_path / name, table)
    cells = cells_at(np.array(LONLAT))
    assert cells[0] == cells[2]
    assert read_places(tmp_path / name) == [(cells[0], dt.date(2021, 5, 1)), (cells[1], dt.date(2022, 5, 1))]


def test_a_polygon_stands_for_all_cells_that_it_touches(tmp_path):
    area = shapely.box(14.6, 47.7, 14.9, 47.9)
    content = {"type": "Feature", "properties": {}, "geometry": shapely.geometry.mapping(area)}
    path = tmp_path / "area.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [content]}))
    places = read_places(path)
    assert {cell for cell, _ in places} == set(cells_touched([area])[1])
    assert len(places) > 80
    assert {day for _, day in places} == {None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "needs lon and lat"),
        ("lon,lat\n200,10\n", "longitude 200, latitude 10 is outside UTM"),
        ("lon,lat\nfar,10\n", "longitude nan"),
        ("lon,lat,date\n10,10,someday\n", "holds what is no date"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "places.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_places(path)


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        read_places(tmp_path / "none.csv")
    (tmp_path / "odd.gpkg").write_text("no")
    with pytest.raises(InputError, match="cannot read places"):
        read_places(tmp_path / "odd.gpkg")
