import datetime as dt
import itertools
import json

import pytest
import shapely
from pyproj import Transformer

from panterra.errors import InputError
from panterra.imagery.aoi import read_area
from panterra.imagery.choose import (
    as_candidates,
    clearest,
    covering,
    days_of,
    newest_versions,
    parse_dates,
    periods,
)
from panterra.imagery.providers import PROVIDERS, collections_of, find_provider
from panterra.imagery.providers import serving as provider_of
from panterra.imagery.pull import list_pull
from panterra.imagery.wish import Wish
from panterra.modalities import MODALITIES
from stac_server import serving

AREA = shapely.box(10, 50, 11, 51)


def sentinel2(name, day, west=9.0, east=12.0, *, cloud=0.0, tile="32UNA", baseline="05.10", made="a", **more):
    geometry = shapely.geometry.mapping(shapely.box(west, 49, east, 52))
    return {
        "id": name,
        "collection": "sentinel-2-l2a",
        "geometry": geometry,
        "bbox": [west, 49, east, 52],
        "properties": {
            "datetime": f"{day}T10:00:00Z",
            "platform": "sentinel-2a",
            "eo:cloud_cover": cloud,
            "grid:code": f"MGRS-{tile}",
            "s2:processing_baseline": baseline,
            "s2:generation_time": made,
            **more,
        },
        "assets": {"blue": {"href": f"https://host/{name}/B02.tif"}},
    }


def candidates(*raws, **options):
    found, refused = as_candidates(raws, "sentinel2_l2a", AREA, **options)
    assert not refused
    return found


def ids(images):
    return [image.item.id for image in images]


# Items ----------------------------------------------------------------------------------------------------------------


def test_of_the_versions_of_an_image_the_newest_baseline_wins():
    found = candidates(
        sentinel2("old", "2024-01-05", baseline="04.00", made="2025"),
        sentinel2("new", "2024-01-05", baseline="05.10", made="2024"),
        sentinel2("late", "2024-01-05", baseline="05.10", made="2024-b"),
        sentinel2("neighbour", "2024-01-05", tile="32UPA"),
    )
    assert ids(newest_versions(found)) == ["late", "neighbour"]
    assert ids(newest_versions(found[::-1])) == ["late", "neighbour"]


def test_of_the_versions_of_a_landsat_image_the_best_tier_wins():
    def image(name, tier, made):
        raw = sentinel2(name, "2024-01-05", **{"landsat:collection_category": tier, "created": made})
        keys = ["blue", "green", "red", "nir08", "swir16", "swir22"]
        raw["properties"] |= {"platform": "landsat-8", "landsat:wrs_path": "190", "landsat:wrs_row": "28"}
        return raw | {"collection": "landsat-c2-l2", "assets": {key: {"href": key} for key in keys}}

    found, _ = as_candidates([image("rt", "RT", "3"), image("t1", "T1", "1"), image("t2", "T2", "2")], "hls", AREA)
    assert ids(newest_versions(found)) == ["t1"]


def test_what_lies_elsewhere_or_flies_the_other_way_is_no_candidate():
    assert not candidates(sentinel2("a", "2024-01-05", 12.5, 13))
    raws = [sentinel2(way, "2024-01-05", **{"sat:orbit_state": way}) for way in ("ascending", "descending")]
    assert ids(candidates(*raws, orbit="ascending")) == ["ascending"]


def test_what_cannot_be_read_is_said():
    unknown = sentinel2("b", "2024-01-05") | {"collection": "sentinel-1-grd"}
    found, refused = as_candidates([unknown], "sentinel1", AREA)
    assert not found
    assert "sentinel-1-grd is uncalibrated amplitude" in refused[0]


def test_the_images_of_a_date_are_those_that_cover_it():
    found = candidates(
        sentinel2("west", "2024-01-05", 9, 10.6, tile="32UNA", cloud=10),
        sentinel2("east", "2024-01-05", 10.4, 12, tile="32UPA", cloud=40),
        sentinel2("between", "2024-01-05", 10.3, 10.7, tile="32UQA"),
    )
    (day,) = days_of(found)
    assert sorted(ids(day.images)) == ["east", "west"]
    assert day.covers == pytest.approx(1)
    assert day.cloud == pytest.approx(25)


def test_of_images_that_cover_the_same_those_in_the_zone_are_taken():
    def placed(name, zone):
        raw = sentinel2(name, "2024-01-05", tile=name)
        raw["properties"] |= {"proj:epsg": zone}
        raw["assets"]["blue"] |= {"proj:shape": [10, 10], "proj:transform": [10, 0, 5e5, 0, -10, 5e6]}
        return raw

    found = candidates(placed("32AAA", 32632), placed("33AAA", 32633))
    for zone, wanted in (("EPSG:32632", "32AAA"), ("EPSG:32633", "33AAA")):
        assert ids(days_of(found, zone=zone)[0].images) == [wanted]


def test_the_clearest_days_come_first_and_more_until_the_area_is_covered():
    found = candidates(
        sentinel2("clear-west", "2024-01-01", 9, 10.5, cloud=0),
        sentinel2("cloudy", "2024-01-02", cloud=90),
        sentinel2("hazy", "2024-01-03", cloud=30),
        sentinel2("clear", "2024-01-04", cloud=1),
        sentinel2("clear-east", "2024-01-05", 10.5, 12, cloud=2),
    )
    days = days_of(found)
    assert [d.date.day for d in clearest(days, None)] == [1, 2, 3, 4, 5]
    assert [d.date.day for d in clearest(days, 1)] == [4]
    assert [d.date.day for d in clearest(days, 2)] == [3, 4]
    halves = [d for d in days if d.date.day in (1, 5)]
    assert [d.date.day for d in clearest(halves, 1)] == [1, 5]


def test_a_map_is_covered_by_its_newest_images():
    found = candidates(sentinel2("old", "2015-01-01"), sentinel2("new", "2020-01-01", 9, 10.5))
    assert ids(covering(found[::-1])[0]) == ["new", "old"]
    assert ids(covering(found)[0]) == ["old"]


# Time -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("2024-01/2024-12", "2024-01-01", "2024-12-31"),
        ("2024", "2024-01-01", "2024-12-31"),
        ("2024-02", "2024-02-01", "2024-02-29"),
        ("2024-05-03/2024-06", "2024-05-03", "2024-06-30"),
        ("2023-12/2024-02-10", "2023-12-01", "2024-02-10"),
        ("2024-05-03", "2024-05-03", "2024-05-03"),
    ],
)
def test_spans_of_time_include_both_ends(text, first, last):
    assert parse_dates(text) == (dt.date.fromisoformat(first), dt.date.fromisoformat(last))


@pytest.mark.parametrize("text", ["", "May", "2024-13", "2024-02/2024-01", "2024-02-30", "2024-01-01-01"])
def test_what_is_no_span_of_time_gives_one_line(text):
    with pytest.raises(InputError, match="--dates"):
        parse_dates(text)


@pytest.mark.parametrize(
    ("every", "labels"),
    [
        ("month", ["2023-11", "2023-12", "2024-01", "2024-02", "2024-03"]),
        ("season", ["2023-SON", "2024-DJF", "2024-MAM"]),
        ("year", ["2023", "2024"]),
        ("all", ["2023-11-20_2024-03-02"]),
    ],
)
def test_periods_cover_every_day_once(every, labels):
    first, last = dt.date(2023, 11, 20), dt.date(2024, 3, 2)
    made = periods(first, last, every)
    assert [period.label for period in made] == labels
    assert made[0].first == first
    assert made[-1].last == last
    for before, after in itertools.pairwise(made):
        assert after.first - before.last == dt.timedelta(days=1)


# Place ----------------------------------------------------------------------------------------------------------------


def test_the_grid_is_that_of_the_zone_and_covers_the_area():
    area = read_area("15.01,45.14,15.03,45.16", ["sentinel2_l2a"])
    assert str(area.box.crs) == "EPSG:32633"
    assert area.box.resolution.x == 10
    assert area.box.affine.c % 10 == 0
    x, y = Transformer.from_crs(4326, 32633, always_xy=True).transform(
        (15.01, 15.03, 15.01, 15.03), (45.14, 45.14, 45.16, 45.16)
    )
    left, bottom, right, top = area.box.boundingbox
    for edge, reached in ((left, min(x)), (bottom, min(y)), (-right, -max(x)), (-top, -max(y))):
        assert reached - 10 < edge <= reached
    assert str(read_area("15,-45.2,15.1,-45.1", []).box.crs) == "EPSG:32733"


def test_all_modalities_share_one_rectangle():
    names = ["sentinel2_l2a", "hls", "modis"]
    area = read_area("15.01,45.14,15.03,45.16", names)
    for name in names:
        grid = area.grid(name)
        assert grid.boundingbox == area.box.boundingbox
        assert grid.resolution.x == MODALITIES[name].gsd


def test_polygons_of_a_file_are_put_together(tmp_path):
    def square(x):
        ring = [[x, 45], [x + 0.01, 45], [x + 0.01, 45.01], [x, 45.01], [x, 45]]
        return {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}

    path = tmp_path / "area.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [square(15), square(15.02)]}))
    assert read_area(path, []).geometry.bounds == pytest.approx((15, 45, 15.03, 45.01))


def test_an_area_over_two_zones_is_put_on_one_grid_and_says_so():
    area = read_area("11.9,45,12.2,45.1", [])
    assert area.decisions == (
        "the area lies in several UTM zones; it is put on the grid of EPSG:32633, the zone of its middle",
    )


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("10,46,11,45", "is empty; wanted west,south,east,north"),
        ("10,45,10,46", "is empty; wanted west,south,east,north"),
        ("500,45,10,46", "is empty; wanted west,south,east,north"),
        ("nowhere.geojson", "there is no file nowhere.geojson"),
    ],
)
def test_an_area_that_fits_no_grid_gives_one_line(where, message):
    with pytest.raises(InputError, match=message):
        read_area(where, [])


def test_a_file_without_areas_gives_one_line(tmp_path):
    point = {"type": "Feature", "properties": {}, "geometry": {"type": "Point", "coordinates": [15, 45]}}
    (tmp_path / "point.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [point]}))
    (tmp_path / "text.geojson").write_text("text")
    with pytest.raises(InputError, match="holds no area; wanted polygons"):
        read_area(tmp_path / "point.geojson", [])
    with pytest.raises(InputError, match="is no vector file"):
        read_area(tmp_path / "text.geojson", [])


# Providers ------------------------------------------------------------------------------------------------------------


def test_profiles_name_collections_that_can_be_read():
    for provider in PROVIDERS.values():
        for modality, names in provider.collections.items():
            assert set(names) <= set(collections_of(modality)), (provider.name, modality)
        assert not set(provider.lacks) & set(provider.collections)


def test_a_modality_comes_from_the_first_that_has_it():
    chain = [find_provider("earth-search"), find_provider("planetary-computer"), find_provider("usgs")]
    assert [provider_of(m, chain).name for m in ("sentinel2_l2a", "sentinel1", "landsat")] == [
        "earth-search",
        "planetary-computer",
        "usgs",
    ]
    assert provider_of("landsat", [find_provider("https://stac.example.org/")]).api == "https://stac.example.org"


@pytest.mark.parametrize(
    ("modality", "source", "message"),
    [
        ("landsat", "planetary-computer", "level 1 come from usgs"),
        ("sentinel1", "earth-search", "take it from planetary-computer"),
        ("alos2", "cdse", "cdse: no alos2 there; it comes from: planetary-computer"),
        ("cdl", "usgs", "no known source has it"),
        ("sentinel3", "usgs", "no modality 'sentinel3'"),
    ],
)
def test_what_a_source_lacks_gives_one_line(modality, source, message):
    with pytest.raises(InputError, match=message):
        provider_of(modality, [find_provider(source)])


def test_an_unknown_source_gives_one_line():
    with pytest.raises(InputError, match=r"no source 'pc'; known: planetary-computer, .*or the address of a STAC API"):
        find_provider("pc")


@pytest.mark.data
def test_real_items_of_providers_are_understood(data_dir):
    """Items of the Planetary Computer, Earth Search and the USGS are candidates, or say why not."""
    world = shapely.box(-180, -90, 180, 90)
    wanted = {
        "pc__sentinel-2-l2a": ("sentinel2_l2a", 3),
        "earthsearch__sentinel-2-l2a": ("sentinel2_l2a", 2),
        "earthsearch__sentinel-2-l1c": ("sentinel2", 1),
        "pc__landsat-c2-l2": ("hls", 2),
        "odcstac__LC08": ("hls", 1),
        "pc__naip": ("naip_10", 2),
        "earthsearch__cop-dem": ("srtm", 2),
    }
    for start, (modality, count) in wanted.items():
        raws = [json.loads(p.read_text()) for p in sorted((data_dir / "stac_items" / "items").glob(f"{start}*"))]
        found, refused = as_candidates(raws, modality, world)
        assert (len(found), refused) == (count, []), start
        assert len(newest_versions(found)) == count
        assert all(c.scene[2] and c.item.assets for c in found)
        if modality in ("sentinel2_l2a", "hls"):
            assert all(c.item.mask for c in found)
            assert {c.cloud for c in found} == {raw["properties"]["eo:cloud_cover"] for raw in raws}
    grd = [json.loads(p.read_text()) for p in (data_dir / "stac_items" / "items").glob("*sentinel-1-grd*")]
    assert as_candidates(grd, "sentinel1", world)[0] == []


@pytest.mark.data
def test_real_items_are_found_and_listed(data_dir, tmp_path):
    """Over the API they come back page by page, and images of one date and region are one mosaic."""
    items = [json.loads(path.read_text()) for path in sorted((data_dir / "stac_items" / "items").glob("*.json"))]
    items = [item for item in items if item.get("collection") and item.get("bbox") and item.get("assets")]
    with serving(tmp_path, items) as server:
        wish = Wish(aoi="167.5,53.9,167.9,55.2", dates="2019-01", modalities=("sentinel2_l2a",), max_cloud=100)
        plan = list_pull(wish, [find_provider(server.address)])
        (image,) = plan.images
        assert sorted(c.item.id[32:38] for c in image.candidates) == ["T58UFE", "T58UFF", "T58UFG"]
        assert str(plan.area.box.crs) == "EPSG:32658"
        assert all(c.item.decisions == ("baseline 02.12: no offset",) for c in image.candidates)
        assert 4e8 < plan.bytes_of(image) < 1e9
        wish = Wish(aoi="-105.1,40.1,-105.0,40.2", dates="2023-10", modalities=("sentinel2_l2a", "hls"))
        plan = list_pull(wish, [find_provider(server.address)])
        assert [c.item.id for image in plan.images for c in image.candidates] == [
            "S2A_13TDE_20231008_0_L2A",
            "LC08_L2SP_033032_20231008_02_T1",
        ]
    assert not server.asked("/data/")


@pytest.mark.parametrize(
    ("option", "said"), [({"best": 0}, "1 or more"), ({"max_cloud": 200}, "0 to 100"), ({"grow_m": -1}, "0 or more")]
)
def test_wishes_that_cannot_be_are_refused_before_anything_is_asked(option, said):
    with pytest.raises(InputError, match=said):
        Wish(aoi="1,2,1.1,2.1", dates="2024", modalities=("sentinel2_l2a",), **option)
