import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from panterra import load_model
from panterra.commands.pretrain import configured, dry_run, run_pretrain, show_plan
from panterra.errors import InputError
from panterra.models.olmoearth import OlmoEarth
from panterra.objectives.map_decoding import MapDecoding, MapViews, describe
from panterra.planet import Planet
from panterra.recipes.nano import NanoRecipe
from panterra.recipes.nano_places import KINDS, PLACE_BYTES, Places, draw_places
from panterra.recipes.nano_run import MIXTURES, PlaceBatches, calibrate, nano_run
from panterra.train.loop import Options, train

FEW = NanoRecipe(places=(6,), southern=(), tokens=300, batch=8, side_patches=(3, 4), steps=8, warmup_steps=2)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return draw_places(tmp_path_factory.mktemp("places") / "places-1", 6, seed=1)


@pytest.fixture
def folder(places, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "places-1").symlink_to(Path(places.days.filename).parent)
    return tmp_path / "run"


def test_places_follow_from_their_seed_and_are_drawn_once(places, tmp_path):
    again = draw_places(tmp_path / "again", 2, seed=1)
    other = draw_places(tmp_path / "other", 1, seed=2)
    for name in Places.__slots__:
        np.testing.assert_array_equal(getattr(again, name), getattr(places, name)[:2])
    assert not np.array_equal(other.surface[0], places.surface[0])
    (tmp_path / "again" / "days.npy").write_bytes((tmp_path / "other" / "days.npy").read_bytes())
    assert len(draw_places(tmp_path / "again", 2, seed=1)) == 1
    assert sum(path.stat().st_size - 128 for path in (tmp_path / "other").iterdir()) == PLACE_BYTES
    assert not list(tmp_path.glob("*.part"))


def test_the_planets_of_the_demo_and_of_the_figures_were_never_learned_from():
    from panterra.recipes.nano_places import PER_PLANET, TRAINING_SEEDS

    seeds = {
        int(np.random.default_rng([part, first]).integers(TRAINING_SEEDS)) or 1
        for part, count in enumerate((*NanoRecipe().places, *NanoRecipe().southern), 1)
        for first in range(0, count, PER_PLANET)
    }
    assert len(seeds) > 1000
    assert not seeds & {0, *range(TRAINING_SEEDS, 10_000)}


@pytest.mark.parametrize("south", [0.0, 1.0])
def test_the_surface_of_a_place_has_the_class_of_the_planet_there(south):
    """Roads, roofs and yards are built-up land, every other kind is its own class."""
    from panterra.planet import SURFACES
    from panterra.recipes import nano_places

    planet = Planet(seed=7, south=south)
    overview = nano_places.Overview(planet, np.random.default_rng(0))
    ground = planet.ground(overview.draw(np.random.default_rng(3)))
    codes = np.array([SURFACES[kind].code for kind in KINDS])
    agree = codes[nano_places.surface(ground)] == planet.truth(ground)
    assert agree.mean() > 0.97


def test_batches_follow_from_their_number(places):
    batches = PlaceBatches([places], FEW, seed=0)
    for number in range(12):
        (views,), (again,) = batches[number], batches[number]
        assert tuple(views.inputs) in MIXTURES
        b, h, w, k = views.shares.shape
        assert 4 <= b <= FEW.batch
        assert k == len(KINDS)
        for m, x in views.inputs.items():
            assert torch.equal(x, again.inputs[m])
            assert x.shape[3:] == (h * views.patch_px, w * views.patch_px)
            assert x.shape[1] == views.timestamps.shape[1]
            assert x.isfinite().all()
        torch.testing.assert_close(views.shares.sum(-1), torch.ones(b, h, w))
        torch.testing.assert_close(views.relief.mean((1, 2)), torch.zeros(b), atol=1e-4, rtol=0)
        stamps = views.timestamps
        assert (stamps[..., 0] >= 1).all()
        assert ((stamps[..., 1] >= 0) & (stamps[..., 1] < 12)).all()
        assert (stamps[..., 2] >= 2016).all()


def test_ranks_share_the_batches_out(places):
    alone = PlaceBatches([places], FEW, seed=0)
    second = PlaceBatches([places], FEW, seed=0, rank=1, world=2)
    assert torch.equal(second[3][0].shares, alone[7][0].shares)


def test_calibration_makes_tokens_centred_and_of_unit_size(places):
    encoder = OlmoEarth(FEW.encoder)
    batches = PlaceBatches([places], FEW, seed=77)
    calibrate(encoder, batches)
    for m in encoder.modalities:
        views = [batches.views(10**7 + i, (m,), tokens=2500) for i in range(6)]
        tokens = torch.cat([encoder.embed_patches(v.inputs, v.patch_px)[m].flatten(0, -2) for v in views])
        torch.testing.assert_close(tokens.mean(0), torch.zeros(encoder.dim), atol=1e-4, rtol=0)
        torch.testing.assert_close(tokens.std(0), torch.ones(encoder.dim), atol=1e-3, rtol=0)


def test_looks_are_described_patch_by_patch():
    pixels = torch.randn(2, 3, 4, 6, 6, dtype=torch.float64) * 0.2 + 0.5
    near, far = describe(pixels, 2)
    assert near.shape == (2, 3, 3, 3, 8)
    assert far.shape == (2, 12)
    patch = pixels[1, 2, 3, 2:4, 4:6]
    torch.testing.assert_close(near[1, 1, 2, 2, 3], (patch.mean() - 0.5) * 4)
    spread = (patch.var(correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(near[1, 1, 2, 2, 7], (spread.log() + 4) * 0.7)
    torch.testing.assert_close(far[0, 1], (pixels[0, :, 1].mean() - 0.5) * 4)
    torch.testing.assert_close(far[0, 5], (pixels[0, :, 1].std() + 1e-3).log() + 3)


def test_the_loss_of_a_perfect_answer_is_the_entropy_of_the_shares():
    torch.manual_seed(0)
    objective = MapDecoding(OlmoEarth(FEW.encoder), kinds=3)
    shares = torch.tensor([0.5, 0.25, 0.25]).expand(2, 2, 2, 3)
    views = MapViews(
        inputs={"sentinel1": torch.rand(2, 1, 2, 4, 4)},
        timestamps=torch.tensor([[[1, 5, 2020]]]).expand(2, 1, 3),
        patch_px=2,
        shares=shares,
        height=torch.full((2, 2, 2), 16.0),
        relief=torch.full((2, 2, 2), -8.0),
    )
    with torch.no_grad():
        for layer in (objective.patch, objective.token):
            layer.weight.zero_()
            layer.bias.copy_(torch.cat([shares[0, 0, 0].log(), torch.tensor([-1.0, 2.0])]))
        objective.sample.weight.zero_()
        objective.sample.bias.copy_(shares[0, 0, 0].log())
    total, terms = objective(views)
    entropy = -(shares[0, 0, 0] * shares[0, 0, 0].log()).sum()
    for name in ("patch", "token", "sample"):
        torch.testing.assert_close(terms[name], entropy)
    torch.testing.assert_close(total.detach(), 2 * entropy + terms["look"])
    far_off = replace(views, height=views.height + 8)
    torch.testing.assert_close(objective(far_off)[1]["patch"], entropy + 0.1 * 0.5)


def test_weights_are_averaged_over_all_steps_and_then_over_a_window():
    objective = MapDecoding(OlmoEarth(FEW.encoder), kinds=3)
    weight, averaged = (next(e.parameters()) for e in (objective.encoder, objective.averaged))
    first = averaged.clone()
    values = [1.0, 2.0, 6.0, 5.0, 5.0]
    for step, value in enumerate(values, -1):
        with torch.no_grad():
            weight.fill_(value)
        objective.average(step, window=3)
        if step < 0:
            assert torch.equal(averaged, first)
    torch.testing.assert_close(averaged, torch.full_like(averaged, ((2 + 6 + 5) / 3 * 2 + 5) / 3))
    assert not averaged.requires_grad


def test_a_stopped_run_goes_on_with_the_same_numbers_and_its_model_is_loaded(folder, tmp_path):
    options = Options(workers=0, logs=("jsonl",), log_every=1, save_every=3)
    whole = train(nano_run(FEW, folder), tmp_path / "whole", options)
    train(nano_run(FEW, folder), tmp_path / "parts", replace(options, steps_this_time=5))
    parts = train(nano_run(FEW, folder), tmp_path / "parts", options)
    assert parts.loss == whole.loss
    model, other = load_model(whole.model), load_model(parts.model)
    assert all(torch.equal(w, other.state_dict()[n]) for n, w in model.state_dict().items())
    assert model.licence == "Apache-2.0"
    assert next(model.parameters()).dtype == torch.float32
    assert (whole.model / "model.safetensors").stat().st_size < 1.1 * 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_what_is_learned_shows_in_the_loss(folder, tmp_path):
    recipe = replace(FEW, steps=120, lr=4e-3, tokens=600)
    train(nano_run(recipe, folder), tmp_path / "out", Options(workers=0, logs=("jsonl",), log_every=1))
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    first, last = (np.mean([row["loss/patch"] for row in part]) for part in (rows[:10], rows[-10:]))
    assert last < 0.85 * first


def test_a_person_starts_it_without_data(folder, capsys):
    settings = configured(
        "panterra-nano",
        ["places=6", "southern=2", "tokens=200", "batch=4", "side_patches=3", "steps=2", "warmup_steps=1"],
    )
    show_plan(dry_run(settings, []))
    out = capsys.readouterr().out
    assert "Places: 8," in out
    assert "panterra-nano" in out
    with pytest.raises(InputError, match="draws the places that it learns from; leave out --data"):
        run_pretrain(settings, ["corpus"], folder, options=Options())
    result = run_pretrain(settings, [], folder, options=Options(workers=0, logs=()))
    assert result.finished
    assert load_model(result.model).modalities == ("sentinel2_l2a", "sentinel1", "landsat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dates=5", "5 dates came; a place has 4"),
        ("side_patches=9", "9 patches of 8 pixels do not fit into places of 64"),
        ("places=", "wanted whole numbers|cannot be"),
        ("tokens=0", "tokens is 0; wanted 1 at least"),
        ("restart=1", "restart=1 of 27000 steps came; give a share below 1"),
        ("steps=10", "restart=0.5556 of 10 steps came"),
        ("encoder.heads=7", "a width of 128 with 7 heads"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        configured("panterra-nano", [change])


def test_the_weights_that_come_with_panterra_are_those_of_the_recipe():
    model = load_model("panterra-nano")
    assert model.config == NanoRecipe().encoder
    assert model.name == "panterra-nano"
    assert model.licence == "Apache-2.0"
    folder = Path(load_model.__globals__["__file__"]).with_name("panterra_nano")
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6
    assert load_model("panterra-nano", random=1).config == model.config


def test_they_tell_what_is_on_a_planet_better_than_bands_or_random_weights_do(capsys):
    from panterra.evaluate.embed import embed_samples, raw_patch_statistics
    from panterra.evaluate.probes import fit_probe

    batches, codes = held_out()
    rows = {
        "bands": np.concatenate([raw_patch_statistics(batch, 40) for batch in batches]),
        "random": embed_samples(load_model("panterra-nano", random=0), batches, patch_m=40, what="patches"),
        "trained": embed_samples(load_model("panterra-nano"), batches, patch_m=40, what="patches"),
    }
    common = [code for code in np.unique(codes[codes > 0]) if (codes == code).any((1, 2)).sum() >= 5]
    at = np.argwhere(np.isin(codes, common))
    accuracy = {}
    for name, x in rows.items():
        x = x[tuple(at.T)]
        x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
        _, report = fit_probe(x, codes[tuple(at.T)], kind="knn", neighbours=5, groups=at[:, 0], resamples=20)
        accuracy[name] = report.metrics["accuracy"].estimate
    assert accuracy["trained"] > accuracy["bands"] + 0.03 > accuracy["random"]


def held_out(count=24, side_px=16):
    """Look at squares of 160 m on planets from 9500, on four dates; classes of patches of 40 m, 0 where mixed."""
    from affine import Affine
    from odc.geo.geobox import GeoBox

    from panterra.planet import CRS
    from panterra.sample import Batch, Observation

    batches, codes = [], []
    rng = np.random.default_rng(5)
    for seed in range(9500, 9500 + count):
        left, top = 500000 + 10 * rng.integers(-20000, 20000), 5300000 + 10 * rng.integers(-20000, 20000)
        planet = Planet(seed=seed)
        ground = planet.ground(GeoBox((side_px, side_px), Affine(10, 0, left, 0, -10, top), CRS))
        days = ("2022-04-10", "2022-06-20", "2022-08-05", "2022-10-01")
        pixels = np.stack([planet.observe("sentinel2_l2a", ground, day)[0] for day in days])
        batches.append(Batch(observations={"sentinel2_l2a": Observation.build(pixels, list(days))}))
        blocks = planet.truth(ground).reshape(side_px // 4, 4, side_px // 4, 4).swapaxes(1, 2).reshape(4, 4, 16)
        codes.append(np.where((blocks == blocks[..., :1]).all(-1), blocks[..., 0], 0))
    return batches, np.stack(codes)
