import datetime as dt
from itertools import pairwise

import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.data.composites import as_stored, compose, period_starts, timestamps_of
from panterra.imagery.items import SceneAsset, SceneBand
from panterra.imagery.raster import write_cog
from panterra.imagery.stac import make_item, open_scene
from panterra.modalities import MODALITIES

BOX = GeoBox((6, 8), Affine(10, 0, 476160, 0, -10, 5294080), "EPSG:32633")
CENTRE = dt.date(2023, 6, 1)


def write_items(folder, modality, images, *, box=BOX):
    """Write (day, pixels, cloud cover) as items; 0 or NaN is no data."""
    items = []
    for number, (day, pixels, cover) in enumerate(images):
        path = folder / f"{modality}_{number}.tif"
        write_cog(path, pixels, box, nodata=float("nan") if pixels.dtype.kind == "f" else 0)
        item = make_item(f"{modality}-{number}", modality, day, box, {"pixels": path})
        if cover is not None:
            item.properties["eo:cloud_cover"] = cover
        items.append(item)
    return items


def covers(items):
    stated = {item.id: item.properties.get("eo:cloud_cover") for item in items}
    return {id: cover for id, cover in stated.items() if cover is not None}


def holed(rng, bands=12, share=0.5):
    pixels = rng.integers(1, 10_000, (bands, *BOX.shape)).astype(np.uint16)
    pixels[:, rng.random(BOX.shape) < share] = 0
    return pixels


def test_periods_are_those_of_the_published_corpus():
    starts = period_starts(CENTRE)
    assert (starts[0] - CENTRE).days == -187
    assert [(b - a).days for a, b in pairwise(starts)] == [30] * 11
    assert timestamps_of(CENTRE)[0].tolist() == [26, 10, 2022]
    assert timestamps_of(CENTRE).shape == (12, 3)


@pytest.mark.parametrize("stated", ["all", "none", "some"])
def test_a_mosaic_is_the_first_valid_pixel_of_the_least_cloudy(tmp_path, stated):
    rng = np.random.default_rng(1)
    first = period_starts(CENTRE)[0]
    days = [int(n) for n in rng.integers(-20, 380, 28)]
    images = []
    for number, day in enumerate(days):
        known = {"all": True, "none": False, "some": number % 2 == 0}[stated]
        pixels = holed(rng, share=rng.uniform(0.2, 0.9))
        images.append((first + dt.timedelta(days=day), pixels, float(rng.integers(0, 5) * 20) if known else None))
    items = write_items(tmp_path, "sentinel2_l2a", images)
    found = compose(open_scene(items), "sentinel2_l2a", BOX, CENTRE, cloud_cover=covers(items))

    for period in range(12):
        inside = [i for i in range(len(days)) if 30 * period <= days[i] < 30 * (period + 1)]
        cover = {
            i: images[i][2] if images[i][2] is not None else 100 * float((images[i][1][0] == 0).mean()) for i in inside
        }
        ranked = sorted(inside, key=lambda i: (cover[i], days[i], f"sentinel2_l2a-{i}"))
        for row in range(BOX.shape[0]):
            for col in range(BOX.shape[1]):
                seen = [images[i][1][:, row, col] for i in ranked if images[i][1][0, row, col] > 0]
                assert found.valid[period, row, col] == bool(seen)
                wanted = seen[0] if seen else np.zeros(12)
                assert (found.pixels[period, :, row, col] == wanted).all()


def test_no_more_is_read_than_a_mosaic_takes(tmp_path):
    rng = np.random.default_rng(0)
    whole, other = holed(rng, share=0), holed(rng, share=0)
    items = write_items(tmp_path, "sentinel2_l2a", [(CENTRE, other, 40.0), (CENTRE, whole, 3.0)])
    (tmp_path / "sentinel2_l2a_0.tif").unlink()
    found = compose(open_scene(items), "sentinel2_l2a", BOX, CENTRE, cloud_cover=covers(items))
    period = 6
    assert found.valid[period].all()
    assert (found.pixels[period] == whole).all()
    assert not found.valid[np.arange(12) != period].any()


def test_clouds_that_a_mask_hides_count_where_nobody_states_them(tmp_path):
    rng = np.random.default_rng(0)
    items = write_items(tmp_path, "sentinel2_l2a", [(CENTRE, holed(rng, share=0), None) for _ in range(2)])
    mask = np.full(BOX.shape, 255, np.uint8)
    mask[:4] = 0
    write_cog(tmp_path / "mask.tif", mask, BOX)
    first = open_scene(items).items[0]
    cloudy = make_item(
        first.id, "sentinel2_l2a", CENTRE, BOX, {"pixels": first.assets[0].href, "valid": tmp_path / "mask.tif"}
    )
    found = compose(open_scene([cloudy, items[1]]), "sentinel2_l2a", BOX, CENTRE)
    second = open_scene([items[1]]).read("sentinel2_l2a", BOX).pixels[0, 0].numpy()
    assert (found.pixels[6] == second).all()
    unmasked = compose(open_scene([cloudy, items[1]], apply_masks=False), "sentinel2_l2a", BOX, CENTRE)
    assert (unmasked.pixels[6] == open_scene([items[0]]).read("sentinel2_l2a", BOX).pixels[0, 0].numpy()).all()


def test_radar_comes_in_decibels(tmp_path):
    power = np.random.default_rng(0).uniform(0.001, 0.5, (2, *BOX.shape)).astype(np.float32)
    write_cog(tmp_path / "s1.tif", power, BOX)
    bands = tuple(SceneBand(name=name, index=i, unit="linear") for i, name in enumerate(("vv", "vh"), start=1))
    asset = SceneAsset(href=str(tmp_path / "s1.tif"), bands=bands)
    scene = open_scene([make_item("s1", "sentinel1", CENTRE, BOX, {"pixels": asset})])
    found = compose(scene, "sentinel1", BOX, CENTRE)
    np.testing.assert_allclose(found.pixels[6], 10 * np.log10(power), rtol=1e-5)
    assert as_stored(found.pixels, "sentinel1").dtype == np.float32


def test_a_map_is_its_newest_item_filled_up(tmp_path):
    rng = np.random.default_rng(0)
    old, new = (rng.choice([10, 20, 30], (1, *BOX.shape)).astype(np.uint8) for _ in range(2))
    new[:, :, :3] = 0
    days = (dt.date(2020, 1, 1), dt.date(2021, 1, 1))
    items = write_items(tmp_path, "worldcover", [(days[0], old, None), (days[1], new, None)])
    found = compose(open_scene(items), "worldcover", BOX, CENTRE)
    assert found.pixels.shape == (1, 1, *BOX.shape)
    assert found.valid.all()
    assert (found.pixels[0] == np.where(new == 0, old, new)).all()


@pytest.mark.parametrize(
    ("modality", "values", "wanted"),
    [
        ("sentinel2_l2a", [-120.4, 0.4, 1234.6, 70_000], [0, 0, 1235, 65_535]),
        ("srtm", [-413.2, 8848.8], [-413, 8849]),
        ("worldcover", [10, 100], [10, 100]),
        ("sentinel1", [-23.25, 3.5], [-23.25, 3.5]),
    ],
)
def test_types_of_the_published_corpus(modality, values, wanted):
    stored = as_stored(np.array(values, np.float32), modality)
    assert stored.tolist() == wanted
    assert stored.dtype.kind in ("f" if MODALITIES[modality].unit == "db" else "iu")
