import datetime as dt
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.imagery.doctor import Finding, examine, repair, sampled, swapped
from panterra.imagery.files import scene_from_files
from panterra.imagery.items import SceneAsset, SceneBand
from panterra.imagery.raster import write_cog
from panterra.imagery.stac import make_item, open_scene, save_scene
from panterra.imagery.units import offset_kept
from panterra.modalities import MODALITIES

# rasterio silences this one itself, but not safely when several threads warp at once.
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

BOX = GeoBox((48, 40), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32631")
S2 = MODALITIES["sentinel2_l2a"].band_names

# Surface reflectance times 10,000 of water, forest, crop and soil, in the bands' order of `MODALITIES`.
SPECTRA = np.array(
    [
        [300, 280, 200, 120, 180, 150, 140, 110, 60, 40, 350, 100],
        [250, 450, 260, 3200, 800, 2400, 3000, 3400, 1500, 700, 220, 3400],
        [400, 750, 450, 4200, 1200, 3200, 4000, 4400, 2200, 1100, 380, 4300],
        [900, 1200, 1600, 2400, 1900, 2100, 2300, 2600, 3300, 2800, 800, 2600],
    ]
)
BACKSCATTER = np.array([[-20, -27], [-9, -14], [-11, -17], [-12, -20]])


def cover(seed):
    """Draw land cover in blocks of 4 pixels."""
    blocks = np.random.default_rng(seed).choice(4, (12, 10), p=[0.15, 0.3, 0.3, 0.25])
    return blocks.repeat(4, 0).repeat(4, 1)


def optical(seed=0):
    grain = np.random.default_rng(seed).normal(1, 0.08, (12, *BOX.shape))
    return np.round(np.moveaxis(SPECTRA[cover(seed)], -1, 0) * grain).clip(1)


def top_of_atmosphere(seed=0):
    """Add the light that air scatters and the bands that it hides from the ground: 13 bands of level 1C."""
    surface = optical(seed)
    air = np.array([700, 350, 180, 60, 120, 100, 80, 40, 10, 10, 1000, 0])[:, None, None]
    image = surface + air
    image[S2.index("B09")] *= 0.2
    return np.concatenate([image, np.random.default_rng(seed).integers(6, 14, (1, *BOX.shape))])


def radar(seed=0):
    noise = np.random.default_rng(seed).normal(0, 1.5, (2, *BOX.shape))
    return (np.moveaxis(BACKSCATTER[cover(seed)], -1, 0) + noise).astype(np.float32)


def monthly(count, start=dt.date(2021, 3, 10)):
    return [start + dt.timedelta(30 * i) for i in range(count)]


def store(path, image):
    """Write a plain GeoTIFF, which is quicker than a cloud-optimised one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = image.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=count,
        height=height,
        width=width,
        dtype=image.dtype,
        crs="EPSG:32631",
        transform=BOX.affine,
        photometric="MINISBLACK",
    ) as file:
        file.write(image)
    return path


def scene(folder, modality, images, dates=None, bands=None, **band_options):
    """Write images [C, H, W] as a scene whose metadata say what `band_options` say, the declared unit by default."""
    names = bands or MODALITIES[modality].band_names
    items = []
    for number, (image, date) in enumerate(zip(images, dates or monthly(len(images)), strict=True)):
        path = store(folder / f"{modality}_{number}.tif", image)
        described = tuple(SceneBand(name=name, index=i, **band_options) for i, name in enumerate(names, start=1))
        asset = SceneAsset(href=str(path), bands=described)
        items.append(make_item(f"{modality}_{number}", modality, date, BOX, {"data": asset}))
    save_scene(folder, items, title="test", licence=None)
    return open_scene(folder)


def troubles(findings):
    return [finding for finding in findings if finding.level in ("warning", "error")]


def values(scene, modality):
    observation = scene.read(modality, scene.geobox())
    return observation.pixels[0].numpy(), observation.valid[0].numpy()


OPTICAL = [optical(seed) for seed in range(3)]
RADAR = [radar(seed) for seed in range(2)]


def scaled_as_olmoearth_does(image):
    mean, sd = image.mean((1, 2), keepdims=True), image.std((1, 2), keepdims=True)
    return (image - (mean - 2 * sd)) / (4 * sd)


def standardised(image):
    return (image - image.mean((1, 2), keepdims=True)) / image.std((1, 2), keepdims=True)


def exchanged(first, second):
    def exchange(image):
        image = image.copy()
        one, other = S2.index(first), S2.index(second)
        image[[one, other]] = image[[other, one]]
        return image

    return exchange


EXACT = {
    "offset kept": ("sentinel2_l2a", lambda x: (x + 1000).astype(np.uint16), ["offset of 1000 .* is still in"]),
    "offset taken twice": ("sentinel2_l2a", lambda x: (x - 1000).astype(np.int16), ["was taken away twice"]),
    "from 0 to 1": ("sentinel2_l2a", lambda x: (x / 1e4).astype(np.float32), ["are reflectance from 0 to 1"]),
    "from 0 to 1 with offset": (
        "sentinel2_l2a",
        lambda x: (x / 1e4 + 0.1).astype(np.float32),
        ["are reflectance from 0 to 1", "offset of 1000 .* is still in"],
    ),
    "linear": ("sentinel1", lambda x: (10 ** (x / 10)).astype(np.float32), ["are linear power"]),
    "dB x 100": ("sentinel1", lambda x: np.round(x * 100).astype(np.int16), ["are decibels times 100,"]),
    "dB x 10,000": ("sentinel1", lambda x: np.round(x * 1e4).astype(np.int32), ["are decibels times 10,000"]),
    "packed": ("sentinel1", lambda x: np.round(10 ** ((x + 83) / 20)).astype(np.uint16), ["20 log10"]),
}


@pytest.mark.parametrize("fault", EXACT)
def test_exact_faults_are_found_and_repaired(tmp_path, fault):
    modality, injure, expected = EXACT[fault]
    clean = OPTICAL if modality == "sentinel2_l2a" else RADAR
    ill = scene(tmp_path / "ill", modality, [injure(image) for image in clean])
    findings = examine(ill)
    found = troubles(findings)
    assert len(found) == len(expected)
    for finding, message in zip(found, expected, strict=True):
        assert finding.exact
        assert finding.level == "error"
        assert re.search(message, finding.what)
    well = repair(ill, findings, tmp_path / "well")
    assert not troubles(examine(well))
    pixels, valid = values(well, modality)
    assert valid.all()
    np.testing.assert_allclose(pixels, np.stack(clean), atol=0.02 if modality == "sentinel1" else 0.002, rtol=1e-6)
    assert {path.suffix for path in (tmp_path / "well").iterdir()} == {".json"}


BEYOND_REPAIR = {
    "8 bits": ("sentinel2_l2a", lambda x: (x / 5000 * 255).clip(0, 255).astype(np.uint8), "picture of 8 bits"),
    "standardised": ("sentinel2_l2a", standardised, "already normalised"),
    "between 0 and 1": ("sentinel2_l2a", scaled_as_olmoearth_does, "already normalised"),
    "red and infrared": ("sentinel2_l2a", exchanged("B04", "B08"), "B04 and B08 look as if"),
    "red and blue": ("sentinel2_l2a", exchanged("B02", "B04"), "B02 and B04 look as if"),
    "narrow infrared": ("sentinel2_l2a", exchanged("B8A", "B12"), "B08 and B8A look as if"),
    "short waves": ("sentinel2_l2a", exchanged("B11", "B12"), "B12 and B11 look as if"),
    "unknown scale": ("sentinel2_l2a", lambda x: x * 100, "not sentinel2_l2a in any known unit"),
    "polarisations": ("sentinel1", lambda x: x[::-1], "vv and vh look as if"),
    "standardised radar": ("sentinel1", standardised, "already normalised"),
    "radar between 0 and 1": ("sentinel1", scaled_as_olmoearth_does, "already normalised"),
    "raw radar": ("sentinel1", lambda x: 10 ** (x / 20 + 2.6), "not sentinel1 in any known unit"),
}


@pytest.mark.parametrize("fault", BEYOND_REPAIR)
def test_other_faults_are_found_and_left_alone(tmp_path, fault):
    modality, injure, message = BEYOND_REPAIR[fault]
    clean = OPTICAL if modality == "sentinel2_l2a" else RADAR
    images = [np.ascontiguousarray(injure(image)) for image in clean]
    images = [image if image.dtype == np.uint8 else image.astype(np.float32) for image in images]
    found = troubles(examine(scene(tmp_path, modality, images)))
    assert any(message in finding.what for finding in found), found
    assert not any(finding.exact for finding in found)
    assert all(finding.fix for finding in found)


@pytest.mark.parametrize(
    ("modality", "images"),
    [
        ("sentinel2_l2a", OPTICAL),
        ("sentinel2", [top_of_atmosphere(seed) for seed in range(3)]),
        ("sentinel1", RADAR),
        ("naip_10", [np.random.default_rng(0).integers(20, 230, (4, *BOX.shape))]),
        ("landsat", [6000 + 5 * optical()[:11]]),
    ],
)
def test_clean_scenes_raise_no_alarm(tmp_path, modality, images):
    stored = [image.astype({"sentinel1": np.float32, "naip_10": np.uint8}.get(modality, np.uint16)) for image in images]
    findings = examine(scene(tmp_path, modality, stored))
    assert not troubles(findings)
    assert findings[-1].level == "ok"


def test_the_order_of_eurosat_is_noticed(tmp_path):
    names = MODALITIES["sentinel2"].band_names
    natural = sorted(names, key=lambda name: (int(name[1:].rstrip("A")), name))
    eurosat = [name for name in natural if name != "B8A"] + ["B8A"]
    right = top_of_atmosphere().astype(np.uint16)
    as_stored = right[[names.index(name) for name in eurosat]]
    as_read = np.stack([as_stored[natural.index(name)] for name in names])
    found = troubles(examine(scene(tmp_path, "sentinel2", [as_read])))
    assert any("B08 and B8A" in finding.what for finding in found)


def test_level_1c_with_its_offset_is_told_by_cirrus(tmp_path):
    images = [(top_of_atmosphere(seed) + 1000).astype(np.uint16) for seed in range(2)]
    ill = scene(tmp_path / "ill", "sentinel2", images)
    findings = examine(ill)
    assert [f.exact for f in troubles(findings)] == [True]
    assert not troubles(examine(repair(ill, findings, tmp_path / "well")))


def test_the_offset_is_taken_from_the_later_dates_alone(tmp_path):
    dates = monthly(6, start=dt.date(2021, 11, 1))
    clean = [optical(seed) for seed in range(6)]
    late = [date >= dt.date(2022, 1, 25) for date in dates]
    assert any(late)
    assert not all(late)
    stored = [(x + 1000 * is_late).astype(np.uint16) for x, is_late in zip(clean, late, strict=True)]
    ill = scene(tmp_path / "ill", "sentinel2_l2a", stored, dates)
    findings = examine(ill)
    (finding,) = troubles(findings)
    assert finding.exact
    well = repair(ill, findings, tmp_path / "well")
    assert not troubles(examine(well))
    np.testing.assert_array_equal(values(well, "sentinel2_l2a")[0], np.stack(clean))


def test_one_hazy_date_among_clear_ones_is_no_offset(tmp_path):
    images = [*OPTICAL, (0.8 * OPTICAL[0] + 1050)]
    assert not troubles(examine(scene(tmp_path, "sentinel2_l2a", [x.astype(np.uint16) for x in images])))


@pytest.mark.parametrize("floor", [2500, 6000])
def test_deserts_and_clouds_are_no_offset(floor):
    bright = {band: floor + np.random.default_rng(0).normal(800, 200, 4000) for band in S2}
    bright["B02"] = bright["B02"] * 0.5
    assert offset_kept(bright) == "unsure"


def test_muddy_water_is_no_swap():
    muddy = np.array([700, 1300, 1700, 600, 1200, 700, 650, 600, 60, 40, 600, 200])
    grain = np.random.default_rng(0).normal(1, 0.05, (12, 5000))
    assert swapped("sentinel2_l2a", dict(zip(S2, muddy[:, None] * grain, strict=True))) == []


def test_a_few_items_in_another_unit_are_found_among_the_rest(tmp_path):
    stored = [OPTICAL[0], OPTICAL[1] / 1e4, OPTICAL[2]]
    ill = scene(tmp_path / "ill", "sentinel2_l2a", [image.astype(np.float32) for image in stored])
    findings = examine(ill)
    (finding,) = troubles(findings)
    assert "1 of the 3 items" in finding.what
    well = repair(ill, findings, tmp_path / "well")
    assert not troubles(examine(well))
    np.testing.assert_allclose(values(well, "sentinel2_l2a")[0], np.stack(OPTICAL), rtol=1e-6)


def test_names_in_the_files_beat_names_in_the_metadata(tmp_path):
    wrong = list(S2)
    wrong[2], wrong[3] = wrong[3], wrong[2]
    path = write_cog(tmp_path / "image.tif", OPTICAL[0].astype(np.uint16), BOX, band_names=S2)
    bands = tuple(SceneBand(name=name, index=i) for i, name in enumerate(wrong, start=1))
    item = make_item("a", "sentinel2_l2a", "2021-05-01", BOX, {"data": SceneAsset(href=str(path), bands=bands)})
    save_scene(tmp_path, [item], "test", None)
    ill = open_scene(tmp_path)
    findings = examine(ill)
    assert [f.what for f in troubles(findings)] == ["image.tif calls its band 3 B04, the scene calls it B08"]
    well = repair(ill, findings, tmp_path / "well")
    assert not troubles(examine(well))
    np.testing.assert_array_equal(values(well, "sentinel2_l2a")[0][0], OPTICAL[0])


def test_repair_keeps_scales_masks_and_other_modalities(tmp_path):
    image = write_cog(tmp_path / "s2.tif", (OPTICAL[0] + 1000).astype(np.uint16)[:, ::2, ::2], coarser(BOX))
    clouds = np.full(BOX.shape, 4, np.uint8)
    clouds[:8] = 9
    scl = write_cog(tmp_path / "scl.tif", clouds, BOX)
    bands = tuple(SceneBand(name=n, index=i, scale=1e-4, unit="reflectance") for i, n in enumerate(S2, start=1))
    echo = write_cog(tmp_path / "s1.tif", RADAR[0], BOX)
    items = [
        make_item(
            "a", "sentinel2_l2a", "2021-05-01", BOX, {"data": SceneAsset(href=str(image), bands=bands), "scl": scl}
        ),
        make_item("b", "sentinel1", "2021-05-01", BOX, {"data": echo}),
    ]
    save_scene(tmp_path, items, "test", "CC0-1.0")
    ill = open_scene(tmp_path)
    well = repair(ill, examine(ill), tmp_path / "well")
    assert not troubles(examine(well))
    assert (well.licence, well.modalities) == ("CC0-1.0", ill.modalities)
    before, seen = values(ill, "sentinel2_l2a")
    after, still_seen = values(well, "sentinel2_l2a")
    np.testing.assert_array_equal(seen, still_seen)
    assert not seen[:, :8].any()
    at = np.broadcast_to(seen[:, None], before.shape)
    np.testing.assert_allclose(before[at] - after[at], 1000, atol=0.01)
    np.testing.assert_array_equal(values(ill, "sentinel1")[0], values(well, "sentinel1")[0])


def coarser(box):
    return GeoBox((box.shape[0] // 2, box.shape[1] // 2), box.affine @ Affine.scale(2), box.crs)


def test_undeclared_nodata_is_found(tmp_path):
    image = OPTICAL[0].astype(np.uint16)
    image[:, :20] = 7
    found = troubles(examine(scene(tmp_path, "sentinel2_l2a", [image])))
    assert "is 7 in all bands, counted as data" in found[0].what


@pytest.mark.parametrize(
    ("absent", "level", "message"),
    [
        ("B8A", "note", "B8A (B08)"),
        ("B01", "note", "B01 (B02)"),
        ("B11", "error", "B11 missing, and no other band may stand in"),
    ],
)
def test_missing_bands(tmp_path, absent, level, message):
    at = S2.index(absent)
    bands = tuple(name for name in S2 if name != absent)
    ill = scene(tmp_path, "sentinel2_l2a", [np.delete(OPTICAL[0], at, 0).astype(np.uint16)], bands=bands)
    finding = next(f for f in examine(ill) if "missing" in f.what)
    assert (finding.level, message in finding.what) == (level, True)
    refusing = next(f for f in examine(replace(ill, fill_missing_bands=False)) if "missing" in f.what)
    assert refusing.level == "error"


def test_a_scene_without_anything_that_the_model_looks_at(tmp_path):
    level_1c = scene(tmp_path, "sentinel2", [top_of_atmosphere().astype(np.uint16)])
    first, *others = examine(level_1c, ["sentinel2_l2a", "landsat"])
    assert (first.level, first.what) == ("error", "there is sentinel2, and none of sentinel2_l2a, landsat")
    assert "level 1C" in first.fix
    assert {finding.level for finding in others} == {"note"}
    assert "take imagery of one of these" in examine(level_1c, ["landsat"])[0].fix


def test_of_still_images_the_newest_is_read(tmp_path):
    image = np.random.default_rng(0).integers(20, 230, (4, *BOX.shape)).astype(np.uint8)
    findings = examine(scene(tmp_path, "naip_10", [image, image]))
    assert any("2 dates, of which the newest is read: 2021-04-09" in finding.what for finding in findings)


def levels_of(findings, word):
    return {finding.level for finding in findings if word in finding.what}


def test_dates(tmp_path):
    images = [*RADAR, RADAR[0]]
    twice = [dt.date(2021, 5, 1), dt.date(2021, 5, 1), dt.date(2021, 6, 1)]
    findings = examine(scene(tmp_path / "twice", "sentinel1", images, twice))
    assert levels_of(findings, "the same place twice") == {"warning"}
    unknown = [dt.date(1970, 1, 1), *twice[1:]]
    findings = examine(scene(tmp_path / "unknown", "sentinel1", images, unknown))
    assert levels_of(findings, "before the sensor flew") == {"error"}
    findings = examine(scene(tmp_path / "backwards", "sentinel1", images, monthly(3)[::-1]))
    assert levels_of(findings, "out of order") == {"note"}
    findings = examine(scene(tmp_path / "single", "sentinel1", images[:1]))
    assert levels_of(findings, "one date only") == {"note"}
    gap = [*monthly(3), dt.date(2022, 3, 1)]
    findings = examine(scene(tmp_path / "gap", "sentinel1", [*images, images[0]], gap))
    assert levels_of(findings, "no image from 2021-05-09 to 2022-03-01") == {"note"}


def test_modalities_that_a_model_wants_and_the_scene_lacks(tmp_path):
    findings = examine(scene(tmp_path, "sentinel1", RADAR), ["sentinel2_l2a", "sentinel1"])
    assert [(f.level, f.modality) for f in findings] == [("note", "sentinel2_l2a"), ("ok", "sentinel1")]


def test_items_that_cannot_be_used_are_named(tmp_path):
    own = make_item("a", "sentinel1", "2022-06-01", BOX, {"data": store(tmp_path / "s1.tif", RADAR[0])}).to_dict()
    foreign = own | {
        "id": "S2A_x",
        "collection": "sentinel-2-l2a",
        "properties": {"datetime": "2022-06-01T10:00:00Z"},
        "assets": {"blue": {"href": "https://example.com/B02.tif"}},
    }
    found = troubles(examine(open_scene([own, foreign])))
    assert len(found) == 1
    assert "S2A_x does not say its processing baseline" in found[0].what


def test_without_any_valid_pixel_it_says_so(tmp_path):
    image = np.zeros((12, *BOX.shape), np.uint16)
    found = troubles(examine(scene(tmp_path, "sentinel2_l2a", [image], nodata=0)))
    assert "no valid pixel" in found[0].what


@pytest.mark.parametrize("count", [1, 7, 300])
def test_a_large_scene_is_looked_at_in_a_few_windows(tmp_path, count):
    box = GeoBox((1500, 1800), BOX.affine, BOX.crs)
    path = store(tmp_path / "s1.tif", np.tile(RADAR[0], (1, 32, 45)))
    items = [make_item(f"s1_{d}", "sentinel1", d, box, {"data": path}) for d in monthly(count)]
    large = open_scene(items)
    samples = sampled(large, large.items)
    assert len(samples) <= 20
    assert sum(sample.bands["vv"].size for sample in samples) <= 20 * 128 * 128
    assert all(np.isfinite(sample.bands["vv"]).all() for sample in samples)


def test_findings_say_whether_they_are_exact():
    assert not Finding(level="note", modality="sentinel1", what="nothing").exact


# Real data ------------------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_the_offset_of_the_amazon_image(data_dir, tmp_path):
    folder = data_dir / "sentinel2_amazon_polygons"
    ill = scene_from_files(folder, tmp_path / "ill", dates="2022-07-01", copy=False).scene
    findings = examine(ill)
    (finding,) = troubles(findings)
    assert finding.modality == "sentinel2_l2a"
    assert finding.exact
    assert "offset of 1000" in finding.what
    assert "0.1" in finding.fix
    well = repair(ill, findings, tmp_path / "well")
    assert not troubles(examine(well))
    before, after = (s.read("sentinel2_l2a", s.geobox()) for s in (ill, well))
    seen = before.valid[0, 0]
    assert seen.any()
    np.testing.assert_allclose((before.pixels - after.pixels)[0, 0][:, seen].numpy(), 1000, atol=0.01)


@pytest.mark.data
@pytest.mark.parametrize(
    ("files", "options"),
    [
        ("worldcereal_cube_belgium", {}),
        ("worldcereal_patches/flanders_2018_A/s2_geotiff", {}),
        ("bigearthnet_patch", {}),
        ("oscd_change/bercy_paris", {}),
        ("oscd_change/dubai_west", {}),
        ("sen1floods11_spain", {"dates": "2019-09-18"}),
        ("hls_gedi_biomass/hls_l30_composite_10bands.tif", {"dates": "2019-01-01"}),
        ("landsat7_olinda", {"dates": "2001-08-01"}),
        ("alos2_palsar_mosaic", {"dates": "2020-09-09"}),
        ("naip_multiyear", {}),
    ],
)
def test_no_false_alarm_on_real_data(data_dir, tmp_path, files, options):
    scene = scene_from_files(data_dir / files, tmp_path, copy=False, **options).scene
    assert not troubles(examine(scene))


@pytest.mark.data
def test_no_false_alarm_on_eurosat(data_dir, tmp_path):
    for path in sorted((data_dir / "eurosat_ms").glob("*/*_1.tif")):
        scene = scene_from_files(path, tmp_path / path.stem, dates="2016-06-01", copy=False).scene
        assert not troubles(examine(scene)), path


@pytest.mark.data
@pytest.mark.parametrize(
    ("injure", "message"),
    [
        (lambda x: (x.astype(np.int32) + 1000).astype(np.uint16), "offset of 1000"),
        (lambda x: (x / 1e4).astype(np.float32), "reflectance from 0 to 1"),
    ],
)
def test_faults_are_found_in_real_data_too(data_dir, tmp_path, injure, message):
    clean = scene_from_files(data_dir / "bigearthnet_patch", tmp_path / "clean", copy=False).scene
    box = clean.geobox()
    image = injure(clean.read("sentinel2_l2a", box).pixels[0, 0].numpy())
    path = write_cog(Path(tmp_path) / "ill" / "s2.tif", image, box)
    save_scene(path.parent, [make_item("a", "sentinel2_l2a", "2022-06-17", box, {"data": path})], "ill", None)
    ill = open_scene(path.parent)
    findings = examine(ill)
    (finding,) = troubles(findings)
    assert message in finding.what
    assert not troubles(examine(repair(ill, findings, tmp_path / "well")))
