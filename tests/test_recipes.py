from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from panterra.data.olmoearth_h5 import Sample, open_corpus, write_corpus
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.weights import load_model
from panterra.objectives.latent_mim import LatentMIM, View, Views
from panterra.objectives.masking import make_masks
from panterra.recipes import ABLATED, ABLATIONS, RECIPES, recipe
from panterra.recipes.checks import Labelled, knn_check, loss_check, read_labelled
from panterra.recipes.olmoearth import RUNS
from panterra.recipes.overrides import check, override
from panterra.recipes.plan import (
    Power,
    Rate,
    activation_bytes,
    count_parameters,
    crop_tokens,
    estimate_memory,
    facts_of,
    measure_rate,
    plan_run,
    published_facts,
    training_flops,
)
from panterra.recipes.run import hold_out, make_run, masked_batches, watched_views
from panterra.sample import Batch, Observation
from panterra.train.loop import Options, train

SIDE = 16
TINY = (
    "encoder.dim=32",
    "encoder.depth=2",
    "encoder.heads=2",
    "predictor_depth=1",
    "patch_px=2,4",
    "side_patches=1,2,3",
    "token_budget=200",
    "batch=4",
    "micro_batch=2",
    "steps=4",
    "warmup_steps=2",
    "precision=float32",
)


def tiny(name, *changes):
    return override(recipe(name), [*TINY, *changes])


def make_sample(seed, *, without=()):
    rng = np.random.Generator(np.random.PCG64(seed))
    dates = np.arange(12) % 3 == seed % 3
    series = ("sentinel2_l2a", "sentinel1", "landsat")
    pixels = {
        m: rng.normal(1000, 500, (SIDE, SIDE, int(dates.sum()), len(MODALITIES[m].bands))).astype(np.float32)
        for m in series
    }
    pixels |= {m: rng.integers(0, 100, (SIDE, SIDE, 1, 1)).astype(np.uint8) for m in ("worldcover", "srtm")}
    kept = {m: x for m, x in pixels.items() if m not in without}
    months = np.arange(12)
    return Sample(
        latlon=(seed, -seed),
        timestamps=np.stack([np.full(12, 15), months, np.full(12, 2021)], axis=1),
        pixels=kept,
        present={m: dates for m in series if m in kept},
    )


def write(root, number=10, **options):
    return open_corpus(write_corpus(root, (make_sample(i, **options) for i in range(number)), compression=None))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    samples = [make_sample(i, without=("landsat",) if i % 2 else ()) for i in range(10)]
    return open_corpus(write_corpus(tmp_path_factory.mktemp("corpus"), samples, compression=None))


# What was published


@pytest.mark.parametrize(
    ("name", "lr", "weight_decay", "encoder", "predictor"),
    [
        ("v1-nano", 1e-3, 0.002, 1_361_024, 827_520),
        ("v1-tiny", 2e-4, 0.02, 6_202_560, 1_855_680),
        ("v1-base", 1e-4, 0.02, 88_953_600, 29_541_120),
        ("v1-large", 1e-4, 0.002, 307_770_368, 52_495_360),
        ("v1.1-nano", 2e-4, 0.02, 1_697_328, 827_424),
        ("v1.1-tiny", 2e-4, 0.002, 12_461_296, 1_855_536),
        ("v1.1-base", 1e-4, 0.02, 113_973_952, 29_540_544),
        ("v1.2-nano", 2e-4, 0.02, 1_698_096, 828_192),
        ("v1.2-tiny", 2e-4, 0.002, 12_464_752, 1_856_688),
        ("v1.2-small", 2e-4, 0.02, 35_615_200, 7_399_776),
        ("v1.2-base", 1e-4, 0.02, 113_987_776, 29_545_152),
        ("v1.1-large", 1e-4, 0.02, None, None),
        ("v1.2-large", 1e-4, 0.02, None, None),
    ],
)
def test_the_official_runs_have_the_published_values(name, lr, weight_decay, encoder, predictor):
    run = recipe(f"olmoearth-{name}")
    assert (run.lr, run.weight_decay) == (lr, weight_decay)
    if encoder is not None:
        counted = count_parameters(run)
        assert (counted["encoder"], counted["predictor"]) == (encoder, predictor)
    first = name.startswith("v1-")
    assert run.micro_batch == (32 if first else 64)
    assert run.contrast_weight == (0.1 if first else 0.05)
    assert run.band_dropout == (0.0 if first else 0.2)
    assert run.symmetries == first
    assert run.masking["type"] == ("modality_cross_random" if first else "random_time_with_decode")
    assert run.loss["type"] == "modality_patch_discrimination" + ("_vec" if first else "_masked_negatives_vec")
    assert (run.batch, run.epochs, run.steps, run.warmup_steps, run.final_share) == (512, 300, None, 8000, 0.1)
    assert (run.betas, run.eps, run.clip_norm, run.precision) == ((0.9, 0.999), 1e-8, 1.0, "bfloat16")
    assert (run.data_seed, run.init_seed, run.token_budget, run.budget_band_sets) == (3622, 12536, 2250, "v1")
    assert (run.patch_px, run.side_patches) == (tuple(range(1, 9)), tuple(range(1, 13)))
    assert (run.teacher.seed, run.teacher.momentum_start, run.teacher.momentum_end) == (None, 1.0, 1.0)
    assert len(run.modalities) == 9
    assert run.objective.predictor.drop_path == 0


def test_names_are_those_of_the_recipes_and_every_run_has_a_lab_note():
    assert all(make().name == name for name, make in RECIPES.items())
    assert set(ABLATED) | set(RUNS) == {name for name in RECIPES if name.startswith("olmoearth-")}
    assert all("Published" in (make.__doc__ or "") for make in RUNS.values())
    assert "olmoearth-v1-nano-no-band-dropout" not in RECIPES
    assert "olmoearth-v1.2-nano-no-contrast" in RECIPES


@pytest.mark.parametrize(
    ("ablation", "changed"),
    [
        ("random-masking", {"masking"}),
        ("fixed-modality-masking", {"masking"}),
        ("no-contrast", {"contrast_weight"}),
        ("patch-discrimination", {"loss"}),
        ("mae", {"loss"}),
        ("reinitialised-targets", {"teacher"}),
        ("moving-targets", {"teacher"}),
        ("sentinel2-only", {"encoder"}),
        ("no-band-dropout", {"band_dropout"}),
        ("no-pixel-layer", {"encoder"}),
        ("v1-loss", {"loss"}),
        ("v1-masking", {"masking"}),
    ],
)
def test_an_ablation_changes_one_thing(ablation, changed):
    whole, without = (asdict(recipe(f"olmoearth-v1.1-base{end}")) for end in ("", f"-{ablation}"))
    assert {key for key in whole if whole[key] != without[key]} == {"name", *changed}
    assert ablation in ABLATIONS


def test_every_recipe_can_be_run():
    for make in RECIPES.values():
        check(make())


def test_an_unknown_name_says_what_is_near():
    with pytest.raises(InputError, match=r"near it: olmoearth-v1\.2-nano"):
        recipe("olmoearth-v12-nano")


# What a person changes


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("lr=1e-4", 1e-4),
        ("loss.tau=0.2", 0.2),
        ("loss.mask_negatives_for_modalities=worldcover,cdl", ("worldcover", "cdl")),
        ("masking.encode_ratio=0.25", 0.25),
        ("patch_px=1, 2,4", (1, 2, 4)),
        ("patch_px=[3]", (3,)),
        ("patch_px=3", (3,)),
        ("steps=10", 10),
        ("steps=null", None),
        ("encoder.depth=2", 2),
        ("encoder.modalities=sentinel2_l2a,worldcover", ("sentinel2_l2a", "worldcover")),
        ('encoder.band_sets={"sentinel1": [["vv"], ["vh"]]}', {"sentinel1": (("vv",), ("vh",))}),
        ("teacher.momentum_start=0.99", 0.99),
        ("symmetries=true", True),
        ("precision=float32", "float32"),
        ('masking={"type": "random"}', {"type": "random"}),
        ("betas=0.9,0.95", (0.9, 0.95)),
        ('regulariser={"type": "KoLeo", "mode": "patch"}', {"type": "KoLeo", "mode": "patch"}),
        ("licence=Apache-2.0", "Apache-2.0"),
    ],
)
def test_a_change_takes_the_type_of_its_setting(change, value):
    changed = override(recipe("olmoearth-v1.2-nano"), [change])
    check(changed)
    for part in change.partition("=")[0].split("."):
        changed = changed[part] if isinstance(changed, dict) else getattr(changed, part)
    assert changed == value
    assert type(changed) is type(value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("lr", "key=value"),
        ("lrr=1", "no 'lrr' to set (lrr); near it: lr"),
        ("loss.tauu=1", "no 'tauu' to set (loss.tauu); near it: tau"),
        ("loss.type=patch_discriminate", "near it: patch_discrimination"),
        ("masking.type=random", "has no option 'random_ratio'"),
        ("encoder.dpeth=2", "near it: depth"),
        ("lr=fast", "lr cannot be 'fast'"),
        ("masking.encode_ratio=half", "masking.encode_ratio cannot be 'half'"),
        ("precision=float16", "'float32' or 'bfloat16'"),
        ("teacher=1", "teacher.momentum_start"),
        ("lr.peak=1", "nothing to set inside lr"),
        ("encoder.dim=36", "width of 36"),
        ("encoder.modalities=sentinel3", "no modality 'sentinel3'"),
        ("encoder.modalities=era5l_day_10", "no statistics"),
        ("views=3", "contrast_weight=0"),
        ("batch=0", "batch is 0"),
        ('regulariser={"type": "KoLeo", "mode": "all"}', "give instance"),
        ("patch_px=[]", "patch_px is []"),
    ],
)
def test_a_wrong_change_is_one_line(change, says):
    with pytest.raises(InputError) as caught:
        check(override(recipe("olmoearth-v1.2-nano"), [change]))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# What a run takes


def test_the_plan_of_a_full_run_is_the_published_one():
    run = recipe("olmoearth-v1.2-base")
    plan = plan_run(
        run, published_facts(run), world=8, rate=Rate(flops=1e14, source=""), power=Power(watts=700, source="")
    )
    assert plan.steps == 667_200
    assert [crop.dates for crop in plan.crops] == [12, 12, 12, 12, 12, 9, 6, 4, 3, 2, 2, 1]
    assert plan.micro_batches == 1
    assert sum(crop.share for crop in plan.crops) == pytest.approx(1)
    by_side = {crop.side_patches: crop for crop in plan.crops}
    # The specification's shares of four dates and of one.
    assert by_side[8].visible / by_side[8].tokens == pytest.approx(0.222, abs=0.001)
    assert by_side[8].decoded / by_side[8].tokens == pytest.approx(0.444, abs=0.001)
    assert by_side[12].visible / by_side[12].tokens == pytest.approx(0.111, abs=0.001)
    assert by_side[12].decoded / by_side[12].tokens == pytest.approx(0.722, abs=0.001)
    assert plan.kwh == pytest.approx(plan.hours * 8 * 0.7)
    assert plan.hours == pytest.approx(667_200 * plan.flops_per_step / 8 / 1e14 / 3600)


def draw_views(settings, crop, patch_px, number):
    g = torch.Generator().manual_seed(settings.data_seed)
    inputs, missing = {}, {}
    for m in settings.modalities:
        dates = crop.dates if MODALITIES[m].kind == "series" else 1
        side = crop.side_patches * patch_px
        inputs[m] = torch.rand(number, dates, len(MODALITIES[m].bands), side, side, generator=g)
        grid = (number, crop.side_patches, crop.side_patches, dates, len(settings.encoder.groups(m)))
        missing[m] = torch.zeros(grid, dtype=torch.bool)
    stamps = torch.tensor([[15, i, 2021] for i in range(12)]).expand(number, -1, -1)
    masks = [make_masks(missing, settings.masking, generator=g) for _ in range(settings.views)]
    return Views(tuple(View(inputs=inputs, timestamps=stamps, masks=m, patch_px=patch_px) for m in masks))


def kept_for_backward(model, views):
    """Add up what automatic differentiation keeps, parameters left out."""
    sizes, alive = {}, []

    def pack(x):
        if not isinstance(x, torch.nn.Parameter):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(views).total
    assert loss.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("olmoearth-v1.2-nano", ()),
        ("olmoearth-v1.1-nano-patch-discrimination", ()),
        ("olmoearth-v1.2-nano-no-pixel-layer", ()),
        ("olmoearth-v1-nano-random-masking", ()),
        ("olmoearth-v1-nano-random-masking", ('loss={"type": "mae"}',)),
    ],
)
def test_arithmetic_and_memory_are_what_a_small_step_takes(name, changes):
    settings = replace(override(recipe(name), changes), micro_batch=2, side_patches=(3,), precision="float32")
    (crop,) = crop_tokens(settings, published_facts(settings))
    model, views = LatentMIM(settings.objective), draw_views(settings, crop, 2, 2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(views).total.backward()
    assert 2 * training_flops(settings, crop) == pytest.approx(counter.get_total_flops(), rel=0.05)
    estimate = activation_bytes(settings, crop, 2, samples=2, width=4)
    assert 0.8 < estimate / kept_for_backward(model, views) < 1.6


def test_memory_counts_parameters_gradients_and_moments():
    settings = replace(recipe("olmoearth-v1.2-nano"), precision="float32", side_patches=(2,))
    facts = published_facts(settings)
    crops = crop_tokens(settings, facts)
    alone, spread = (estimate_memory(settings, facts, crops, world=w, sharded=w > 1) for w in (1, 4))
    model = LatentMIM(settings.objective)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimiser.step()
    moments = sum(x.nbytes for state in optimiser.state.values() for x in state.values() if x.ndim)
    assert alone.optimiser == pytest.approx(moments, rel=0.01)
    assert alone.gradients == pytest.approx(sum(p.grad.nbytes for p in trained), rel=0.01)
    assert alone.parameters == sum(p.nbytes for p in model.parameters())
    assert (spread.parameters, spread.optimiser) == (alone.parameters / 4, alone.optimiser / 4)


def test_a_rate_is_measured_and_a_plan_without_one_leaves_time_open(corpus):
    settings = tiny("olmoearth-v1.2-nano")
    facts = facts_of([corpus], settings)
    assert facts.coverage["landsat"] == 0.5
    assert facts.coverage["cdl"] == 0
    rate = measure_rate(settings, crop_tokens(settings, facts))
    assert rate.flops > 0
    plan = plan_run(settings, facts)
    assert plan.hours is None
    assert plan.kwh is None
    assert plan.as_dict()["corpus"]["samples"] == 10


def test_a_plan_that_cannot_be_says_so(corpus):
    settings = tiny("olmoearth-v1.2-nano")
    with pytest.raises(InputError, match="multiple of 3"):
        plan_run(settings, facts_of([corpus], settings), world=3)
    with pytest.raises(InputError, match="do not fill a batch of 64"):
        plan_run(replace(settings, batch=64), facts_of([corpus], settings))
    with pytest.raises(InputError, match="do not fit into tiles of 16 px"):
        plan_run(replace(settings, patch_px=(8,), side_patches=(3,)), facts_of([corpus], settings))


# Runs


def weights(folder):
    return load_model(folder).state_dict()


@pytest.mark.parametrize(
    "name",
    ["olmoearth-v1-nano", "olmoearth-v1.2-nano", "olmoearth-v1.2-nano-moving-targets", "olmoearth-v1-nano-mae"],
)
def test_a_run_stops_goes_on_and_ends_as_if_it_had_not_stopped(corpus, tmp_path, name):
    settings = tiny(name, "held_out=2")
    options = Options(workers=0, device="cpu", logs=("jsonl",), log_every=1)
    run = make_run(settings, [corpus], check_every=2)
    straight = train(run, tmp_path / "straight", options)
    halves = [train(run, tmp_path / "halves", replace(options, steps_this_time=number)) for number in (2, None)]
    assert [half.finished for half in halves] == [False, True]
    assert straight.loss == halves[1].loss
    one, other = weights(straight.model), weights(halves[1].model)
    assert all(torch.equal(one[key], other[key]) for key in one)
    model = load_model(straight.model)
    assert model.dim == 32
    card = (straight.model / "README.md").read_text()
    assert name in card
    assert "| landsat | 50.0% | seen and predicted |" in card
    log = (tmp_path / "straight" / "log.jsonl").read_text()
    assert log.count("collapse/summary_effective_rank") == log.count("watched/loss") == 3


def test_a_moving_teacher_moves_and_a_frozen_one_does_not(corpus):
    for name, moves in (("olmoearth-v1.2-nano", False), ("olmoearth-v1.2-nano-moving-targets", True)):
        run = make_run(tiny(name), [corpus], check_every=0)
        torch.manual_seed(run.init_seed)
        objective = run.objective()
        before = [p.clone() for p in objective.teacher.parameters()]
        with torch.no_grad():
            for p in objective.encoder.parameters():
                p.add_(1.0)
        assert (run.before_step is not None) == moves
        if run.before_step is not None:
            run.before_step(objective, 0)
            for old, new in zip(before, objective.teacher.parameters(), strict=True):
                torch.testing.assert_close(new, old + 0.004)


def test_a_reinitialised_teacher_differs_from_the_student(corpus):
    same, other = (
        make_run(tiny(f"olmoearth-v1.2-nano{end}"), [corpus], check_every=0).objective()
        for end in ("", "-reinitialised-targets")
    )
    key = "sentinel2_l2a.0.proj.weight"
    assert torch.equal(same.teacher.patch_embeddings.state_dict()[key], same.encoder.patch_embeddings.state_dict()[key])
    drawn, student = (part.patch_embeddings.state_dict()[key] for part in (other.teacher, other.encoder))
    assert not torch.equal(drawn, student)


def test_samples_held_out_are_never_trained_on(corpus, tmp_path):
    second = write(tmp_path, 6)
    settings = tiny("olmoearth-v1.2-nano", "held_out=5")
    training, held = hold_out([corpus, second], settings)
    parts = [{(c.folder, int(i)) for c in part for i in c.usable(settings.modalities)} for part in (training, held)]
    assert [len(part) for part in parts] == [11, 5]
    assert not parts[0] & parts[1]
    read = {(c.folder, i) for c, i in masked_batches(settings, training).batches.places}
    assert read == parts[0]
    with pytest.raises(InputError, match="cannot be held out"):
        hold_out([corpus], override(settings, ["held_out=10"]))


def test_several_corpora_are_one_stream(corpus, tmp_path):
    settings = tiny("olmoearth-v1.2-nano", "steps=null", "epochs=3", "warmup_steps=1")
    run = make_run(settings, [corpus, write(tmp_path, 6)], check_every=0)
    assert run.optimisation.steps == 3 * (16 // 4)
    assert [c["samples"] for c in run.settings["corpora"]] == [10, 6]


def test_corpora_of_smaller_tiles_come_first(corpus, tmp_path):
    whole = make_sample(0)
    cut = replace(whole, pixels={m: x[:8, :8] for m, x in whole.pixels.items()})
    small = open_corpus(write_corpus(tmp_path, [cut], compression=None))
    settings = tiny("olmoearth-v1.2-nano")
    assert facts_of([small, corpus], settings).tile_px == 8
    with pytest.raises(InputError, match="smallest ones first"):
        facts_of([corpus, small], settings)


def test_a_batch_larger_than_the_corpus_is_refused(corpus):
    with pytest.raises(InputError, match="set batch smaller"):
        make_run(recipe("olmoearth-v1.2-nano"), [corpus])


# Checks


def test_the_batch_that_is_watched_stays_the_same(corpus):
    settings = tiny("olmoearth-v1-nano", "held_out=4")
    training, held = hold_out([corpus], settings)
    views, again = watched_views(settings, held), watched_views(settings, held)
    assert views.samples == 4
    assert views.views[0].patch_px == 2
    torch.manual_seed(0)
    model = LatentMIM(settings.objective).eval()
    (first, *others) = (loss_check(v, every=1).run(model, 0)["loss"] for v in (views, again))
    assert others == [first]
    assert loss_check(watched_views(settings, training), every=1).run(model, 0)["loss"] != first


def labelled_arrays(number=24):
    rng = np.random.Generator(np.random.PCG64(0))
    label = np.arange(number) % 2
    level = np.where(label, 4000, 500)[:, None, None, None, None]
    pixels = rng.normal(0, 100, (number, 2, 12, 8, 8)) + level
    return {
        "label": label,
        "train": np.arange(number) < number // 2,
        "sentinel2_l2a": pixels,
        "sentinel2_l2a.dates": np.tile([18000, 18100], (number, 1)),
        "srtm": np.zeros((number, 1, 1, 8, 8)),
        "srtm.dates": np.zeros((number, 1)),
    }


@pytest.mark.parametrize("version", ["v1", "v1.2"])
def test_neighbours_find_what_is_plain(tmp_path, version):
    np.savez(tmp_path / "labelled.npz", **labelled_arrays())
    found = knn_check(read_labelled(tmp_path / "labelled.npz"), every=1)
    torch.manual_seed(0)
    model = LatentMIM(tiny(f"olmoearth-{version}-nano").objective).eval()
    assert found.run(model, 0) == {"accuracy": 1.0}
    # What was embedded without gradients leaves nothing behind that training would stumble over.
    settings = tiny(f"olmoearth-{version}-nano")
    (crop,) = crop_tokens(replace(settings, side_patches=(4,)), published_facts(settings))
    model.train()(draw_views(settings, crop, 2, 2)).total.backward()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train": np.ones(24)}, "train true and others with false"),
        ({"label": None}, "has no label"),
        ({"sentinel2_l2a.dates": None}, "has no sentinel2_l2a.dates"),
    ],
)
def test_labelled_samples_that_cannot_be_used_say_so(tmp_path, change, says):
    arrays = {key: value for key, value in (labelled_arrays() | change).items() if value is not None}
    np.savez(tmp_path / "labelled.npz", **arrays)
    with pytest.raises(InputError, match=says):
        read_labelled(tmp_path / "labelled.npz")


def test_labelled_samples_of_other_sensors_are_refused():
    pixels = torch.zeros(4, 1, 1, 8, 8)
    srtm = Observation(pixels=pixels, dates=torch.zeros(4, 1, dtype=torch.int64), valid=pixels[:, :, 0] == 0)
    labelled = Labelled(
        batches=(Batch(observations={"srtm": srtm}),),
        classes=np.array([0, 1, 0, 1]),
        train=np.array([True, True, False, False]),
    )
    with pytest.raises(InputError, match="wanted any of sentinel2_l2a"):
        knn_check(labelled, every=1).run(LatentMIM(tiny("olmoearth-v1.2-nano").objective), 0)
