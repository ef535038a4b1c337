from dataclasses import replace

import numpy as np
import pytest
import torch
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.models.anysat_attention import buckets, distance_bias, places
from panterra.models.anysat_sensors import SENSORS
from panterra.models.weights import load_model
from panterra.planet import CLASSES, CRS, Planet
from panterra.recipes.anysat import run_from
from panterra.recipes.anysat_planet import (
    CELLS_WEIGHT,
    DATES,
    LOOKS_WEIGHT,
    SERIES,
    SOURCES,
    Regions,
    Tiles,
    choose_patches,
    directions,
    draw_regions,
    embed_patches,
    find_place,
    first_layer,
    land_cover_check,
    planet_run,
    planet_statistics,
    planet_tiny,
    pure_patches,
)
from panterra.train.loop import Options, train


@pytest.fixture(scope="module")
def close():
    return draw_regions([3, 4], metres=40)


@pytest.fixture(scope="module")
def far():
    return draw_regions(range(9000, 9004), metres=120, modalities=SERIES)


def tiny_recipe():
    recipe = planet_tiny()
    kept = {"close-20m": 2, "far-40m": 4}
    sources = tuple(replace(s, batch=kept[s.name]) for s in SOURCES if s.name in kept)
    encoder = replace(recipe.encoder, dim=64, depth=1, heads=2)
    return replace(
        recipe, encoder=encoder, predictor_depth=1, predictor_heads=2, sources=sources, steps=3, warmup_steps=1
    )


def test_a_region_depends_on_its_planet_alone(far):
    alone = draw_regions([9002], metres=120, modalities=SERIES)
    for m in SERIES:
        np.testing.assert_array_equal(alone.pixels[m][0], far.pixels[m][2])
        np.testing.assert_array_equal(alone.dates[m][0], far.dates[m][2])
    np.testing.assert_array_equal(alone.land_cover[0], far.land_cover[2])


def test_a_place_holds_the_class_that_was_asked_for():
    planet, rng = Planet(seed=12), np.random.default_rng(0)
    forest = CLASSES[1].code
    for _ in range(3):
        left, top = find_place(planet, forest, 60, rng)
        box = GeoBox((3, 3), Affine(20, 0, left, 0, -20, top), CRS)
        assert forest in planet.truth(box)


def test_regions_are_written_and_read(close, far, tmp_path):
    far.save(tmp_path / "a.npz")
    again = Regions.read([tmp_path / "a.npz", tmp_path / "a.npz"])
    assert len(again) == 8
    assert again.metres == far.metres == 120
    for m in SERIES:
        np.testing.assert_array_equal(again.pixels[m][4:], far.pixels[m])
        assert again.pixels[m].dtype == far.pixels[m].dtype
        np.testing.assert_array_equal(again.valid[m][:4], far.valid[m])
    assert set(close.pixels) == set(DATES)


def test_tiles_cover_a_region_once_with_all_sensors(close):
    tiles = Tiles(regions=close, metres=20, modalities=tuple(DATES))
    assert len(tiles) == 8
    for m, looks in DATES.items():
        pixels = [tiles[i].observations[m].pixels[0] for i in range(4, 8)]
        whole = torch.cat([torch.cat(pixels[:2], -1), torch.cat(pixels[2:], -1)], -2)
        np.testing.assert_array_equal(whole.numpy(), close.pixels[m][1].astype(np.float32))
        assert len(whole) == looks
    np.testing.assert_array_equal(
        np.block([[tiles.land_cover(4), tiles.land_cover(5)], [tiles.land_cover(6), tiles.land_cover(7)]]),
        close.land_cover[1],
    )
    assert [tiles.planet(i) for i in (0, 3, 4, 7)] == [3, 3, 4, 4]
    np.testing.assert_array_equal(
        Tiles(regions=close, metres=30, modalities=SERIES).land_cover(1), close.land_cover[1][:3, :3]
    )
    with pytest.raises(InputError, match="40 m have no tiles of 60 m"):
        Tiles(regions=close, metres=60, modalities=tuple(DATES))


def test_pure_patches_hold_one_class():
    rng, codes = np.random.default_rng(0), np.ones((6, 6), np.uint8)
    codes[:, 4:] = 5
    codes[0, 0] = 7
    drawn = pure_patches(codes, 20, rng, most=10)
    assert sorted(drawn) == [(0, 1, 1), (0, 2, 5), (1, 0, 1), (1, 1, 1), (1, 2, 5), (2, 0, 1), (2, 1, 1), (2, 2, 5)]
    assert sorted(code for *_, code in pure_patches(codes, 20, rng, most=1)) == [1, 5]
    assert [(row, col) for row, col, _ in pure_patches(codes, 30, rng)] in ([(1, 0)],)


def test_patches_without_data_are_left_out(far):
    tiles = Tiles(regions=far, metres=60, modalities=SERIES)
    grids = np.arange(16 * 9 * 2, dtype=np.float32).reshape(16, 3, 3, 2)
    every = choose_patches(grids, tiles, patch_m=20)
    for row, planet in zip(every.features, every.planets, strict=True):
        assert far.planets[int(row[0]) // 72] == planet
    grids[:4] = np.nan
    fewer = choose_patches(grids, tiles, patch_m=20)
    np.testing.assert_array_equal(fewer.codes, every.codes[every.planets > 9000])
    with pytest.raises(InputError, match="more tiles or smaller patches"):
        choose_patches(np.full_like(grids, np.nan), tiles, patch_m=20)


def test_a_run_trains_checks_and_exports_a_model_that_embeds_any_mix(close, far, tmp_path):
    recipe, statistics = tiny_recipe(), planet_statistics(close, far)
    assert set(statistics) == {"aerial", "s2", "s1", "l8"}
    assert statistics["s2"].count > 0
    watched = Tiles(regions=far, metres=60, modalities=SERIES)
    run = planet_run(recipe, close, far, statistics=statistics, checks=[land_cover_check({"series": watched}, every=3)])
    assert run.settings["masking"]["target_blocks"] == 2
    assert (run.settings["looks_weight"], run.settings["cells_weight"]) == (LOOKS_WEIGHT, CELLS_WEIGHT)
    quiet = Options(device="cpu", workers=0, logs=("jsonl",))
    result = train(run, tmp_path, quiet, progress=lambda *_: None)
    assert result.finished
    model = load_model(result.model)
    assert model.statistics == statistics
    torch.manual_seed(run.init_seed)
    start = run.objective().encoder
    for name, part in start.projectors.items():
        assert torch.equal(first_layer(model.projectors[name]).weight, first_layer(part).weight)
    for trained, kept in zip(
        model.projectors["aerial"].parameters(), start.projectors["aerial"].parameters(), strict=True
    ):
        assert torch.equal(trained, kept)
    assert not torch.equal(
        model.projectors["s2"].stages[1].linear.weight, start.projectors["s2"].stages[1].linear.weight
    )
    # A patch size, a tile size and a mix of sensors that the run did not have.
    tiles = Tiles(regions=far, metres=60, modalities=("sentinel1", "landsat"))
    patches = embed_patches(model, tiles, patch_m=30)
    assert patches.features.shape == (len(patches.codes), 64)
    assert np.isfinite(patches.features).all()
    for patch_m in (10, 20):
        assert len(embed_patches(model, Tiles(regions=close, metres=40, modalities=("aerial",)), patch_m=patch_m).codes)


def test_a_calibrated_start_has_no_constants_and_looks_at_home(close, far):
    statistics = planet_statistics(close, far)
    run = planet_run(tiny_recipe(), close, far, statistics=statistics)
    torch.manual_seed(0)
    encoder = run.objective().encoder.eval()
    views = [run.batches(0, 1)[10**5 + i][0] for i in range(16)]
    with torch.no_grad():
        given = [encoder(view.inputs, scale=view.grid.scale) for view in views]
    tokens = torch.cat([x.flatten(0, 1) for out in given for x in out.embedded.tokens.values()])
    patches = torch.cat([out.patches.flatten(0, 2) for out in given])
    for x in (tokens, patches):
        torch.testing.assert_close(x.mean(0), torch.zeros(64), atol=1e-3, rtol=0)
        torch.testing.assert_close(x.std(0), torch.ones(64), atol=1e-2, rtol=0)
    index = buckets(4, 4)[None]
    scores = distance_bias(
        (encoder.combiner.query + places(4, 4, 1, 64))[..., :32], encoder.combiner.distance, index[:, 1:]
    )
    at_home = torch.eye(16, dtype=torch.bool)
    assert scores[0, 0, :, 1:][at_home].min() > 2
    assert scores[0, 0, :, 1:][~at_home].abs().max() < 0.5


def test_an_aerial_patch_looks_as_its_cells_do_on_average(close, far):
    run = planet_run(tiny_recipe(), close, far, statistics=planet_statistics(close, far))
    objective = run.objective()
    view = next(v for i in range(16) if "aerial" in (v := run.batches(0, 1)[10**5 + i][0]).inputs)
    given, grid = view.inputs["aerial"], view.grid
    looks = objective.looks("aerial", view)
    assert set(looks) == {"aerial", "aerial_cells"}
    assert set(objective.looks("s2", view)) == {"s2"}
    cells, _ = objective.encoder.projectors["aerial"](given, grid)
    torch.testing.assert_close(looks["aerial_cells"][0], cells.mean(2))
    # Where a cell has no data the others count alone.
    valid = torch.ones_like(given.values[:, :, 0], dtype=torch.bool)
    valid[:, :, :10, :10] = False
    some = replace(view, inputs={"aerial": replace(given, valid=valid)})
    found, seen = objective.looks("aerial", some)["aerial_cells"]
    assert seen.all()
    torch.testing.assert_close(found[:, 0], cells[:, 0, 1:].mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, 1:], cells[:, 1:].mean(2), atol=1e-5, rtol=1e-5)
    objective.standardise_looks([view])
    rows = (looks["aerial_cells"][0] - objective.mean["aerial_cells"]) / objective.std["aerial_cells"]
    assert rows.flatten(0, 1).mean(0).abs().max() < 1e-4


def test_directions_cross_what_varies():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 6, generator=g) @ torch.randn(6, 6, generator=g)
    along = (rows - rows.mean(0)) @ directions(rows, 40, g).T
    torch.testing.assert_close(along.std(0), torch.ones(40), atol=1e-2, rtol=0)
    # Of only two components nothing else is left.
    found = directions(rows, 40, g, most=2)
    assert int(torch.linalg.matrix_rank(found, rtol=1e-4)) == 2


def test_the_recipe_sees_four_sensors_on_three_sizes_of_tiles():
    recipe = planet_tiny()
    assert {name for source in recipe.sources for name in source.sensors} == {"aerial", "s2", "s1", "l8"}
    assert {source.cells for source in recipe.sources} == {2, 4, 12}
    assert all(set(source.sensors) <= set(SENSORS) for source in recipe.sources)
    assert 3 not in {scale for source in recipe.sources for scale in source.scales}  # kept for the evaluation
    run = run_from(recipe, dict.fromkeys((source.name for source in recipe.sources), range(100)))
    assert run.optimisation.method == "muon"
